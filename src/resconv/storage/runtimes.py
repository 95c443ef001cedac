"""Files of other runtimes, opened to be run here: ONNX Runtime, torch.export, OpenVINO.

What resconv writes into a file beside the network, where the format has room for it: its own
version, the plan, and the signature of the inputs.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..analysis.input_spec import InputSpec, describe_inputs
from ..analysis.inputs import as_call
from ..errors import LoadError, MissingExtraError, SaveError
from ..json_files import parse_json
from ..nets import require_trust

__all__ = ["SUFFIXES", "Opened", "first_line", "open_file", "quietly", "run_onnx", "tensors_of"]

SUFFIXES = (".onnx", ".pt2", ".xml")


@dataclass(frozen=True)
class Opened:
    """A file that can be run: example inputs in, output tensors out.

    Attributes:
        inputs: their signature.
        batch: the only batch size that it runs with; None where any will do.
        texts: what else was written into the file, by its keys.
    """

    run: Callable[[Any], list[Tensor]]
    inputs: InputSpec | None
    batch: int | None = None
    texts: Mapping[str, str] = field(default_factory=dict)


def open_file(path: Path, *, trust_source: bool = False) -> Opened:
    """Open a .onnx, .pt2 or .xml file to run it on the CPU.

    A .pt2 is a pickle inside, and reading it runs what it names: only with ``trust_source``.

    Raises:
        TrustError: a .pt2 without it.
        LoadError: it is missing, of another kind, or cannot be read.
        MissingExtraError: its runtime is not installed.
    """
    openers = {".onnx": _open_onnx, ".pt2": _open_pt2, ".xml": _open_openvino}
    if path.suffix not in openers:
        raise LoadError(
            f"{path}: a run folder, a saved network, .onnx, .pt2 or .xml is needed, not "
            f"{path.suffix or 'this'!r}."
        )
    if not path.is_file():
        raise LoadError(f"There is no {path}.")
    if path.suffix == ".pt2":
        what = "torch.export keeps pickled objects in a .pt2, and reading it runs what they name"
        require_trust(what, path, trusted=trust_source)
    return openers[path.suffix](path)


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in a structure, in order."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def first_line(error: BaseException) -> str:
    """Return an error's kind and first telling line (OpenVINO starts with places in its source)."""
    # torch.onnx wraps what happened into advice on how to report it.
    while error.__cause__ is not None and type(error).__module__.startswith("torch.onnx"):
        error = error.__cause__
    lines = [s.strip() for s in str(error).splitlines() if s.strip()]
    text = next((s for s in lines if not s.startswith(("Exception from", "Check '"))), "")
    return f"{type(error).__name__}: {text}"[:240] if text else type(error).__name__


@contextmanager
def quietly() -> Iterator[None]:
    """Keep an exporter from chattering; its errors still come through."""
    names = (None, "torch.onnx", "onnxscript", "onnx_ir", "torch")  # None: ONNX Runtime's quantiser
    loggers = [logging.getLogger(n) for n in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _signature(text: str | None) -> InputSpec | None:
    """Return the signature that was written into a file, if it is one."""
    try:
        return None if text is None else parse_json(text, InputSpec, "The signature", LoadError)
    except LoadError:
        return None


def _by_name(inputs: Any, names: list[str], path: Path) -> dict[str, Tensor]:
    """Say which tensor goes into which input of a file: by name, else in order."""
    _, kwargs = as_call(inputs)
    given = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
    if given and set(names) <= set(given):
        return {n: given[n] for n in names}
    tensors = tensors_of(inputs)
    if len(tensors) != len(names):
        raise LoadError(
            f"{path} takes {len(names)} inputs ({', '.join(names)}), {len(tensors)} are given."
        )
    return dict(zip(names, tensors, strict=True))


def run_onnx(path: Path, inputs: Any) -> list[Tensor]:
    """Run a file in ONNX Runtime (CPU) on the tensors in ``inputs``."""
    return _open_onnx(path).run(inputs)


def _open_onnx(path: Path) -> Opened:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "Reading an ONNX file") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's own classes
        raise LoadError(f"ONNX Runtime cannot read {path}: {first_line(error)}") from error
    names = [i.name for i in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        feed = {n: _numpy(t) for n, t in _by_name(inputs, names, path).items()}
        return [torch.from_numpy(a) for a in session.run(None, feed)]

    texts, found = session.get_modelmeta().custom_metadata_map, _onnx_inputs(session)
    signature = _signature(texts.get("inputs")) or _from_shapes(found)
    return Opened(run, signature, _fixed_batch(found), texts)


def _numpy(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        raise LoadError(
            "numpy, through which this runtime is fed, has no bfloat16: compare a .pt2 or a saved "
            "network."
        )
    return tensor.detach().cpu().contiguous().numpy()


_ONNX_TYPES = {
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    **{f"tensor({t})": t for t in ("uint8", "int8", "int16", "int32", "int64")},
}


def _onnx_inputs(session: Any) -> list[tuple[list[Any], str | None]]:
    return [(i.shape, _ONNX_TYPES.get(i.type)) for i in session.get_inputs()]


def _fixed_batch(found: list[tuple[list[Any], str | None]]) -> int | None:
    sizes = [shape[0] for shape, _ in found if shape]
    return sizes[0] if sizes and isinstance(sizes[0], int) else None


def _from_shapes(found: list[tuple[list[Any], str | None]]) -> InputSpec | None:
    """Make a signature of shapes in which only the batch is open, else None."""
    specs = []
    for shape, dtype in found:
        if shape and not isinstance(shape[0], int):
            shape = [1, *shape[1:]]
        if dtype is None or not all(isinstance(n, int) and n > 0 for n in shape):
            return None
        try:
            specs.append(InputSpec(shape=tuple(shape), dtype=dtype))
        except ValueError:  # sizes beyond any example
            return None
    return InputSpec(items=tuple(specs)) if specs else None


class _Extra(Struct):
    """What of the metadata in a .pt2 is read again."""

    inputs: InputSpec | None = None


def _texts(text: str) -> dict[str, str]:
    """Return the texts beside the network in a .pt2."""
    try:
        found = parse_json(text, dict[str, Any], "The metadata", LoadError)
    except LoadError:
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)}


def _open_pt2(path: Path) -> Opened:
    extra = {"resconv.json": ""}
    try:
        with quietly():
            program = torch.export.load(path, extra_files=extra)
            module = program.module()
    except Exception as error:  # it unpickles, and runs what it finds
        raise LoadError(f"{path} is not a readable .pt2: {first_line(error)}") from error

    def run(inputs: Any) -> list[Tensor]:
        args, kwargs = as_call(inputs)
        with torch.no_grad():
            return tensors_of(module(*args, **kwargs))

    try:
        signature = parse_json(extra["resconv.json"], _Extra, str(path), LoadError).inputs
    except LoadError:
        signature = None
    if signature is None and program.example_inputs is not None:
        args, kwargs = program.example_inputs
        try:
            signature = None if args and kwargs else describe_inputs(kwargs or tuple(args))
        except SaveError:
            signature = None
    shapes = [list(n.meta["val"].shape) for n in program.graph.nodes if _is_input(n, program)]
    return Opened(
        run, signature, _fixed_batch([(s, None) for s in shapes]), _texts(extra["resconv.json"])
    )


def _is_input(node: Any, program: Any) -> bool:
    return node.name in program.graph_signature.user_inputs and isinstance(
        node.meta.get("val"), Tensor
    )


def _open_openvino(path: Path) -> Opened:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino", "Reading OpenVINO IR") from error
    if not path.with_suffix(".bin").is_file():
        raise LoadError(f"{path} has no weights beside it: {path.with_suffix('.bin')} is missing.")
    try:
        core = openvino.Core()
        model = core.read_model(path)
        hints = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(model, "CPU", hints)
    except Exception as error:  # OpenVINO's own classes
        raise LoadError(f"OpenVINO cannot read {path}: {first_line(error)}") from error
    names = [_ov_name(p, i) for i, p in enumerate(compiled.inputs)]

    def run(inputs: Any) -> list[Tensor]:
        feed = _by_name(inputs, names, path)
        # A request of its own: a result's memory is used again by the next call.
        result = compiled.create_infer_request().infer([_numpy(feed[n]) for n in names])
        return [torch.from_numpy(result[o].copy()) for o in compiled.outputs]

    has_texts = model.has_rt_info(["resconv"])
    there = model.get_rt_info(["resconv"]).astype(dict) if has_texts else {}
    texts = {str(k): str(getattr(v, "value", v)) for k, v in there.items()}
    shapes: list[tuple[list[Any], str | None]] = [
        (
            [d.get_length() if d.is_static else None for d in p.get_partial_shape()],
            _OV_TYPES.get(p.get_element_type().get_type_name()),
        )
        for p in compiled.inputs
    ]
    signature = _signature(texts.get("inputs")) or _from_shapes(shapes)
    return Opened(run, signature, _fixed_batch(shapes), texts)


_OV_TYPES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "boolean": "bool",
    "u8": "uint8",
    **{f"i{n}": f"int{n}" for n in (8, 16, 32, 64)},
}


def _ov_name(port: Any, index: int) -> str:
    names = sorted(port.get_names())
    return names[0] if names else f"input {index}"
