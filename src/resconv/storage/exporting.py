"""Files for other runtimes, each checked by running the file itself.

.onnx   ONNX, read back by ONNX Runtime      .pt2   torch.export, loads without this package
.xml    OpenVINO IR (with a .bin beside it), by its own converter
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from ..analysis.input_spec import describe_inputs
from ..analysis.inputs import as_batch, as_call, batch_size, evaluating, to_device_of, unwrap
from ..errors import ExportError, LoadError, MissingExtraError, SaveError, VerificationError
from ..files import write_together
from ..json_files import to_plain
from ..nn.gates import Gate
from ..nn.pixels import FromPixels, PixelLayout
from ..planning.plan import Plan
from ..preprocessing import Preprocessing, to_metadata
from ..surgery.copying import as_normal_tensors, copy_model
from ..surgery.provenance import example_inputs_of, plan_of, provenance_of
from ..surgery.verification import (
    Verification,
    compare_outputs,
    require_examples,
    tolerance_for,
)
from ..version import __version__
from .runtimes import SUFFIXES, first_line, open_file, quietly, run_onnx, tensors_of

__all__ = ["Exported", "export", "onnx_bytes", "run_onnx"]

_OPSET = 18
# A protobuf holds 2 GiB; a larger network has its weights in a second file.
_MAX_PROTO = 1_900_000_000


@dataclass(frozen=True)
class Exported:
    """A written file, and how far its outputs are from the network's.

    ``num_bytes`` counts the weights' file beside it too, where there is one.
    """

    path: Path
    format: str
    num_bytes: int
    dynamic_batch: bool
    opset: int | None
    verification: Verification

    def __repr__(self) -> str:
        batch = "open" if self.dynamic_batch else "fixed"
        return (
            f"{self.path}: {self.format}, {self.num_bytes:,} bytes, {batch} batch; its outputs are "
            f"the network's up to {self.verification.max_rel_error:.2e} of the largest"
        )


@dataclass(frozen=True)
class _Job:
    net: nn.Module
    path: Path
    inputs: Any
    meta: dict[str, str]
    opset: int
    tolerance: float | None
    open_dims: tuple[int, ...] = ()  # of images: height and width, where their size is to be open


@dataclass(frozen=True)
class _Attempt:
    """One way to trace: with an open batch (traced at 2, since 1 is taken for a constant), or not."""

    dynamic: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: Any


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    opset: int = _OPSET,
    tolerance: float | None = None,
    preprocessing: Preprocessing | None = None,
    pixels: PixelLayout | None = None,
    softmax: bool = False,
    dynamic_size: bool = False,
) -> Exported:
    """Write an ordinary network for another runtime, and check the file by running it.

    The ending chooses the format: ``.onnx``, ``.pt2`` or ``.xml`` (OpenVINO, with a ``.bin``). The
    batch is open where the network allows it; then the file is run at another batch size too. The
    plan, the version, the signature of the inputs and how images become inputs (the keys of
    :func:`resconv.preprocessing.to_metadata`) are written into the file. It is moved into place only when
    its outputs agree; ``model`` is left as it was. An ONNX file of more than 1.9 GB has its weights beside
    it, in ``NAME.onnx.data``.

    Args:
        model: a pruned, fused or dense network, in any mode, on any device.
        path: where to write.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; by default
            random ones of the specification that the net carries.
        plan: kept in the file; by default the one that the net was pruned by.
        opset: of ONNX.
        tolerance: relative to the largest output; None as in :func:`resconv.verify`.
        preprocessing: how images become inputs; by default as the net carries it.
        pixels: let the file read uint8 pixels of images that are resized and cropped, as ``nchw`` (N, C, H, W) or
            ``nhwc`` (N, H, W, C), and normalise them itself.
        softmax: let it give probabilities in place of logits (with ``pixels``).
        dynamic_size: leave the height and the width of images open, too; the file is then run at other sizes. A
            net that cannot be is refused.

    Raises:
        ExportError: the model has gates left, the ending is unknown, the exporter refuses, the
            file cannot be written, or pixels are asked for and nothing says how to normalise them.
        VerificationError: the file computes something else, or its runtime cannot run it.
        MissingExtraError: the format's package is not installed.

    Example:
        >>> compact = resconv.fuse(resconv.convert(net, images), fold_norms=True)
        >>> resconv.export(compact, "compact.pt2").format
        'pt2'
    """
    model = unwrap(model)
    if any(isinstance(m, Gate) for m in model.modules()):
        raise ExportError("The model has gates left. Call resconv.prune or resconv.fuse first.")
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ExportError(
            f"{path} ends in {path.suffix or 'nothing'!r}: networks are written as .onnx, .pt2 or "
            ".xml (OpenVINO)."
        )
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the name of a file.")
    if pixels not in (None, *get_args(PixelLayout)):
        raise ExportError(f"pixels={pixels!r}: choose one of {', '.join(get_args(PixelLayout))}.")
    if softmax and pixels is None:
        raise ExportError(
            "softmax=True is for files that read pixels: give pixels='nchw' or 'nhwc' too."
        )
    plan = plan or plan_of(model)
    net = copy_model(model, ExportError).cpu().eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    meta = {"producer": "resconv", "resconv_version": __version__}
    preprocessing = preprocessing or provenance_of(model).preprocessing
    if preprocessing is not None:
        meta |= to_metadata(preprocessing)
    if pixels is not None:
        if preprocessing is None:
            raise ExportError(
                f"{type(model).__name__} does not carry its preprocessing, so nothing says how pixels are "
                "normalised. Give it: resconv.export(..., preprocessing=Preprocessing(...))."
            )
        net, inputs = _from_pixels(net, preprocessing, pixels, softmax)
    else:
        example_inputs = example_inputs_of(example_inputs, model)
        require_examples(example_inputs)
        inputs = _inputs_for(net, as_normal_tensors(example_inputs))
    meta["input_format"] = "normalised" if pixels is None else f"uint8 {pixels}"
    meta["output_format"] = "probabilities" if softmax else "logits"
    with suppress(SaveError):  # inputs that cannot be described are the exporter's to refuse
        meta["inputs"] = json.dumps(to_plain(describe_inputs(inputs)))
    if plan is not None:
        meta["plan"] = plan.to_json()
    dims = ((1, 2) if pixels == "nhwc" else (2, 3)) if dynamic_size else ()
    if dynamic_size and not any(t.ndim == 4 for t in tensors_of(inputs)):
        raise ExportError(
            f"{type(net).__name__} reads no images (N, C, H, W), so it has no height and width to leave open."
        )
    job = _Job(net, path, inputs, meta, opset, tolerance, dims)
    write = {".onnx": _write_onnx, ".pt2": _write_pt2, ".xml": _write_openvino}[path.suffix]
    return write(job)


def _from_pixels(
    net: nn.Module, preprocessing: Preprocessing, layout: PixelLayout, softmax: bool
) -> tuple[nn.Module, Tensor]:
    """Return the net behind its preprocessing, and pixels to run it on."""
    side, channels = preprocessing.size, preprocessing.num_channels
    shape = (2, channels, side, side) if layout == "nchw" else (2, side, side, channels)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    whole = FromPixels(net, preprocessing, layout, softmax=softmax).eval()
    try:
        logits = _reference(whole, pixels)
    except Exception as error:  # of the net's own forward
        raise ExportError(
            f"{type(net).__name__} does not run on {channels} channels of {side}x{side} pixels, as its "
            f"preprocessing says: {first_line(error)}."
        ) from error
    if softmax and (len(logits) != 1 or logits[0].ndim != 2):
        raise ExportError(
            f"{type(net).__name__} returns no (N, classes) tensor: softmax=True is for classifiers."
        )
    return whole, pixels


def onnx_bytes(model: nn.Module, example_inputs: Any) -> bytes:
    """Return the network as ONNX at the example's own batch size, unchecked: to time it, not to ship it.

    Raises:
        ExportError: torch cannot write it.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "onnx", "Writing ONNX") from error
    net = copy_model(unwrap(model), ExportError).cpu().eval()
    attempt = _Attempt(False, *as_call(_inputs_for(net, as_normal_tensors(example_inputs))), None)
    try:
        with quietly():
            program = _to_onnx(net, attempt, opset_version=_OPSET)
    except Exception as error:  # torch's exporter runs the net, and has classes of its own
        raise ExportError(
            f"torch cannot write {type(net).__name__} as ONNX. {first_line(error)}"
        ) from error
    content: bytes = program.model_proto.SerializeToString()
    return content


def _inputs_for(net: nn.Module, example_inputs: Any) -> Any:
    """Return the inputs on the CPU in their own types, if the network runs on these."""
    given = tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, example_inputs)
    try:
        _reference(net, given)
    except Exception:  # a float32 example for a network in half precision, say
        return to_device_of(net, given)
    return given


def _batched(inputs: Any) -> Callable[[Any], bool]:
    """Return which leaves of the inputs have the batch as their first dimension."""
    size = batch_size(inputs)
    return lambda t: isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == size


def _attempts(job: _Job) -> list[_Attempt]:
    inputs = job.inputs
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    two, has_batch = as_batch(inputs, 2), _batched(inputs)
    sizes = dict.fromkeys(job.open_dims, torch.export.Dim.DYNAMIC)

    def open_dims(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return None
        return ({0: batch} if has_batch(t) else {}) | open_sizes(t)

    def open_sizes(t: Any) -> Any:
        return (sizes if t.ndim == 4 else {}) if isinstance(t, Tensor) else None

    args, kwargs = as_call(inputs)
    sized = tree_map(open_sizes, kwargs or args) if sizes else None
    return [
        _Attempt(True, *as_call(two), tree_map(open_dims, kwargs or args)),
        _Attempt(False, args, kwargs, sized),
    ]


def _write_first(
    job: _Job,
    paths: Sequence[Path],
    make: Callable[[_Attempt], Any],
    save: Callable[[Any, Path], None],
    runtime: str,
) -> tuple[Any, bool, Verification]:
    """Write by the first attempt whose file agrees with the network."""
    failures: list[ExportError | VerificationError] = []
    for attempt in _attempts(job):
        try:
            with quietly():
                program = make(attempt)
        except ExportError:
            raise
        except Exception as error:  # as above, and those of OpenVINO's converter
            kind = type(job.net).__name__
            failures.append(
                ExportError(
                    f"{runtime} cannot take {kind}: {first_line(error)}. Try another format: "
                    f"{', '.join(s for s in SUFFIXES if s != job.path.suffix)}."
                    + (" Or leave height and width fixed." if job.open_dims else "")
                )
            )
            continue
        found: list[Verification] = []

        def write(
            files: Sequence[Path],
            program: Any = program,
            attempt: _Attempt = attempt,
            found: list[Verification] = found,
        ) -> None:
            try:
                with quietly():
                    save(program, files[-1])
            except Exception as error:  # of the libraries that write the formats
                raise ExportError(f"{job.path} cannot be written: {first_line(error)}") from error
            found.append(_check(job, files[-1], attempt.dynamic, runtime))

        try:
            write_together(paths, write)
        except VerificationError as error:
            failures.append(error)  # a batch that was fixed somewhere inside shows here
            continue
        except OSError as error:
            raise ExportError(f"{job.path} cannot be written: {error}") from error
        return program, attempt.dynamic, found[0]
    raise failures[-1]


def _check(job: _Job, file: Path, dynamic: bool, runtime: str) -> Verification:
    """Run the file, at the example's batch and (with an open batch) at two others, and at other open sizes."""
    try:
        run = open_file(file, trust_source=True).run  # written a moment ago
        sizes = [1, 3] if dynamic else []
        result = None
        for inputs in (job.inputs, *(as_batch(job.inputs, n) for n in sizes), *_other_sizes(job)):
            expected, got = _reference(job.net, inputs), run(inputs)
            checked = compare_outputs(
                expected, got, tolerance=job.tolerance, least=tolerance_for(job.net)
            )
            result = result or checked
    except (VerificationError, MissingExtraError):
        raise
    except Exception as error:  # of the runtimes
        text = str(error) if isinstance(error, LoadError) else first_line(error)
        raise VerificationError(
            f"{runtime} cannot run the file it was given: {text} Nothing was written."
        ) from error
    assert result is not None
    return result


def _other_sizes(job: _Job) -> Iterator[Any]:
    """Yield images of twice the height, and of twice the width: multiples, as many nets want."""
    for dim in job.open_dims:

        def doubled(t: Any, dim: int = dim) -> Any:
            is_image = isinstance(t, Tensor) and t.ndim == 4
            return torch.cat([t, t.flip(dim)], dim) if is_image else t

        yield tree_map(doubled, job.inputs)


def _reference(net: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = as_call(inputs)
    with evaluating(net):
        return tensors_of(net(*args, **kwargs))


def _num_bytes(net: nn.Module) -> int:
    tensors = {id(t): t for t in (*net.parameters(), *net.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _result(job: _Job, paths: Sequence[Path], kind: str, opset: int | None, done: Any) -> Exported:
    size = sum(p.stat().st_size for p in paths if p.is_file())
    return Exported(job.path, kind, size, done[1], opset, done[2])


def _write_onnx(job: _Job) -> Exported:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "onnx", "Writing ONNX") from error
    _refuse_types(job, "ONNX Runtime")
    external = _num_bytes(job.net) > _MAX_PROTO

    def make(attempt: _Attempt) -> Any:
        leaves = [t for t in tree_leaves(attempt.args) if isinstance(t, Tensor)]
        names = [f"input{i}" if i else "input" for i in range(len(leaves))]
        program = _to_onnx(
            job.net,
            attempt,
            opset_version=job.opset,
            input_names=names or None,  # keyword arguments keep their own
            output_names=_output_names(job),
            external_data=external,
        )
        used = program.model.opset_imports.get("", program.model.opset_imports.get("ai.onnx"))
        if used != job.opset:
            raise ExportError(
                f"opset={job.opset} was asked for, this torch writes {used} instead. Leave opset "
                f"out, or give one from {_OPSET} up that it knows."
            )
        program.model.metadata_props.update(job.meta)
        return program

    def save(program: Any, file: Path) -> None:
        program.save(str(file), external_data=external)

    data = job.path.with_name(job.path.name + ".data")
    paths = [data, job.path] if external else [job.path]
    done = _write_first(job, paths, make, save, "ONNX Runtime")
    return _result(job, paths, "onnx", job.opset, done)


def _to_onnx(net: nn.Module, attempt: _Attempt, **options: Any) -> Any:
    """Translate the net, operation by operation; one without an ONNX form is taken apart first."""
    options |= {"kwargs": attempt.kwargs or None, "dynamo": True, "verbose": False}
    try:
        program = torch.onnx.export(net, attempt.args, dynamic_shapes=attempt.shapes, **options)
    except Exception as error:  # torch.onnx does not export its classes
        if type(error).__name__ != "ConversionError":  # torch.onnx's, of the translation
            raise
        traced = _exported(net, attempt)
        # Attention that is not 4-D, for one: only the kernel "math" is made of simple operations.
        with sdpa_kernel(SDPBackend.MATH):
            traced = traced.run_decompositions()
        program = torch.onnx.export(traced, attempt.args, **options)
    assert program is not None
    return program


def _refuse_types(job: _Job, runtime: str) -> None:
    """Refuse what the runtime's CPU kernels cannot run, so that the file could not be checked."""
    dtypes = {p.dtype for p in job.net.parameters()}
    for dtype in (torch.bfloat16, torch.float64):
        if dtype in dtypes:
            raise ExportError(
                f"The network is in {str(dtype).removeprefix('torch.')}, in which {runtime} runs no "
                "convolution on a CPU, so the file could not be checked. Export a copy in another "
                "type (copy.deepcopy(model).float()), or write .pt2."
            )


def _output_names(job: _Job) -> list[str] | None:
    """Return the keys of a net that returns a dict of tensors, as names for the file's outputs."""
    args, kwargs = as_call(job.inputs)
    with evaluating(job.net):
        out = job.net(*args, **kwargs)
    taken = set(kwargs) | {"input"}
    if isinstance(out, dict) and all(isinstance(t, Tensor) for t in out.values()):
        names = [str(k) for k in out]
        return [n if n not in taken else f"{n}_out" for n in names]
    return None


def _exported(net: nn.Module, attempt: _Attempt) -> Any:
    return torch.export.export(
        net,
        attempt.args,
        attempt.kwargs or None,
        dynamic_shapes=attempt.shapes,
        strict=False,
    )


def _write_pt2(job: _Job) -> Exported:
    extra = {k: json.loads(v) if k in ("plan", "inputs") else v for k, v in job.meta.items()}

    def save(program: Any, file: Path) -> None:
        # Through memory: torch's own writer ends the process when the disk is full.
        content = BytesIO()
        torch.export.save(program, content, extra_files={"resconv.json": json.dumps(extra)})
        file.write_bytes(content.getbuffer())

    done = _write_first(
        job, [job.path], lambda attempt: _exported(job.net, attempt), save, "torch.export"
    )
    return _result(job, [job.path], "pt2", None, done)


def _write_openvino(job: _Job) -> Exported:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino", "Writing OpenVINO IR") from error
    _refuse_types(job, "OpenVINO")

    def make(attempt: _Attempt) -> Any:
        converted = openvino.convert_model(_exported(job.net, attempt))
        for parameter in converted.get_parameters():
            # An argument that is no tensor was fixed while tracing, and nothing reads it.
            if parameter.get_element_type().is_dynamic():
                converted.remove_parameter(parameter)
        for key, value in job.meta.items():
            converted.set_rt_info(value, ["resconv", key])
        return converted

    def save(program: Any, file: Path) -> None:
        openvino.save_model(program, file, compress_to_fp16=False)

    paths = [job.path.with_suffix(".bin"), job.path]
    done = _write_first(job, paths, make, save, "OpenVINO")
    return _result(job, paths, "openvino", None, done)
