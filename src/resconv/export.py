"""Files for other runtimes, each checked by running the file itself.

.onnx   ONNX, read back by ONNX Runtime      .pt2   torch.export, loads without this package
.xml    OpenVINO IR, by its own converter
"""

import copy
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import ExportError, MissingExtraError, VerificationError
from .files import write_atomic
from .gates import Gate
from .plan import Plan
from .trace import as_call, evaluating, to_device_of, unwrap
from .verify import Verification, compare_outputs

__all__ = ["Exported", "export", "run_onnx"]

_OPSET = 18


@dataclass(frozen=True)
class Exported:
    """A written file, and how far its outputs are from the network's."""

    path: Path
    format: str
    num_bytes: int
    dynamic_batch: bool
    opset: int | None
    verification: Verification


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    plan: Plan | None = None,
    opset: int = _OPSET,
    tolerance: float | None = None,
) -> Exported:
    """Write an ordinary network for another runtime, and check the file by running it.

    The ending chooses the format: ``.onnx``, ``.pt2`` or ``.xml`` (OpenVINO). The batch is dynamic
    where the network allows it. The file is moved into place only when its outputs agree.

    Raises:
        ExportError: the model has gates left, the ending is unknown, or the exporter refuses.
        VerificationError: the file computes something else.
        MissingExtraError: the format's package is not installed.
    """
    model = unwrap(model)
    if any(isinstance(m, Gate) for m in model.modules()):
        raise ExportError("The model has gates left. Call resconv.prune or resconv.fuse first.")
    path = Path(path)
    writers = {".onnx": _write_onnx, ".pt2": _write_pt2, ".xml": _write_openvino}
    if path.suffix not in writers:
        raise ExportError(
            f"{path} ends in {path.suffix or 'nothing'!r}: networks are written as .onnx, .pt2 or "
            ".xml (OpenVINO)."
        )
    net = copy.deepcopy(model).cpu().eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    inputs = to_device_of(net, example_inputs)
    return writers[path.suffix](net, path, inputs, plan, opset, tolerance)


def _quietly(call: Callable[[], Any]) -> Any:
    """Run an exporter without its chatter; its errors still come through."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir", "torch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            return call()
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _dynamic(inputs: Any) -> Any:
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    return tree_map(
        lambda t: ({0: batch} if t.ndim else {}) if isinstance(t, Tensor) else None, inputs
    )


def _as_batch(inputs: Any, size: int) -> Any:
    """Repeat the example to another batch size."""

    def repeat(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.ndim:
            return t
        return t[torch.arange(size) % t.shape[0]].clone()

    return tree_map(repeat, inputs)


def _first_line(error: BaseException) -> str:
    return next((s for s in str(error).splitlines() if s.strip()), type(error).__name__)[:200]


def _attempts(net: nn.Module, inputs: Any) -> list[tuple[bool, Any, dict[str, Any], Any]]:
    """Return (dynamic, args, kwargs, dynamic shapes) to try in turn."""
    two = _as_batch(inputs, 2)
    args, kwargs = as_call(two)
    shapes: Any = _dynamic(two)
    if isinstance(shapes, dict) and not kwargs:
        shapes = (shapes,)
    fixed_args, fixed_kwargs = as_call(inputs)
    return [(True, args, kwargs, shapes), (False, fixed_args, fixed_kwargs, None)]


def _write_onnx(
    net: nn.Module, path: Path, inputs: Any, plan: Plan | None, opset: int, tolerance: float | None
) -> Exported:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "onnx", "Writing ONNX") from error
    failures = []
    for dynamic, args, kwargs, shapes in _attempts(net, inputs):
        names = [f"input{i}" if i else "input" for i in range(len(tree_leaves((args, kwargs))))]

        def run(
            args: Any = args, kwargs: Any = kwargs, shapes: Any = shapes, names: Any = names
        ) -> Any:
            return torch.onnx.export(
                net,
                args,
                kwargs=kwargs or None,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=names if not kwargs else None,
                external_data=False,
                verbose=False,
            )

        try:
            program = _quietly(run)
        except Exception as error:
            failures.append(_first_line(error))
            continue
        proto = program.model_proto
        meta = {"producer": "resconv", "plan": plan.to_json() if plan else "{}"}
        for key, value in meta.items():
            entry = proto.metadata_props.add()
            entry.key, entry.value = key, value
        found: list[Verification] = []

        def write(
            temporary: Path, proto: Any = proto, found: Any = found, dynamic: bool = dynamic
        ) -> None:
            onnx.save(proto, temporary)
            found.append(_check_onnx(temporary, net, inputs, dynamic, tolerance))

        try:
            write_atomic(path, write)
        except (VerificationError, onnxruntime.capi.onnxruntime_pybind11_state.Fail) as error:
            if dynamic:  # a batch that was fixed somewhere inside shows here
                failures.append(_first_line(error))
                continue
            raise
        used = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
        return Exported(path, "onnx", path.stat().st_size, dynamic, used, found[0])
    raise ExportError(
        f"torch cannot write {type(net).__name__} as ONNX. {failures[-1]} Try .pt2, or another opset."
    )


def run_onnx(path: Path, inputs: Any) -> list[Tensor]:
    """Run a file in ONNX Runtime (CPU) on the tensors in ``inputs``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    names = [i.name for i in session.get_inputs()]
    feed = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=False)}
    return [torch.from_numpy(a) for a in session.run(None, feed)]


def _reference(net: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = as_call(inputs)
    with evaluating(net):
        return [t for t in tree_leaves(net(*args, **kwargs)) if isinstance(t, Tensor)]


def _check(
    net: nn.Module,
    run: Callable[[Any], list[Tensor]],
    inputs: Any,
    dynamic: bool,
    tolerance: float | None,
) -> Verification:
    result = compare_outputs(_reference(net, inputs), run(inputs), tolerance=tolerance)
    if dynamic:
        other = _as_batch(inputs, 3)
        compare_outputs(_reference(net, other), run(other), tolerance=tolerance)
    return result


def _check_onnx(
    path: Path, net: nn.Module, inputs: Any, dynamic: bool, tolerance: float | None
) -> Verification:
    try:
        return _check(net, lambda x: run_onnx(path, x), inputs, dynamic, tolerance)
    except VerificationError:
        raise
    except Exception as error:
        raise VerificationError(
            f"ONNX Runtime cannot run the file it was given: {_first_line(error)}"
        ) from error


def _write_pt2(
    net: nn.Module, path: Path, inputs: Any, plan: Plan | None, opset: int, tolerance: float | None
) -> Exported:
    failures = []
    for dynamic, args, kwargs, shapes in _attempts(net, inputs):

        def run(args: Any = args, kwargs: Any = kwargs, shapes: Any = shapes) -> Any:
            return torch.export.export(
                net, args, kwargs or None, dynamic_shapes=shapes, strict=False
            )

        try:
            program = _quietly(run)
        except Exception as error:
            failures.append(_first_line(error))
            continue
        found: list[Verification] = []
        extra = {"resconv.json": json.dumps({"plan": plan and json.loads(plan.to_json())})}

        def write(
            temporary: Path,
            program: Any = program,
            found: Any = found,
            dynamic: bool = dynamic,
            extra: Any = extra,
        ) -> None:
            _quietly(lambda: torch.export.save(program, temporary, extra_files=extra))
            back = torch.export.load(temporary).module()

            def again(x: Any) -> list[Tensor]:
                more, named = as_call(x)
                with torch.no_grad():
                    out = back(*more, **named)
                return [t for t in tree_leaves(out) if isinstance(t, Tensor)]

            found.append(_check(net, again, inputs, dynamic, tolerance))

        write_atomic(path, write)
        return Exported(path, "pt2", path.stat().st_size, dynamic, None, found[0])
    raise ExportError(f"torch cannot export {type(net).__name__}: {failures[-1]}")


def _write_openvino(
    net: nn.Module, path: Path, inputs: Any, plan: Plan | None, opset: int, tolerance: float | None
) -> Exported:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino", "Writing OpenVINO IR") from error
    args, kwargs = as_call(inputs)
    if kwargs:
        raise ExportError("OpenVINO export takes positional inputs only.")
    try:
        converted = _quietly(lambda: openvino.convert_model(net, example_input=args))
    except Exception as error:
        raise ExportError(f"OpenVINO cannot convert the network: {_first_line(error)}") from error
    if plan is not None:
        converted.set_rt_info(plan.to_json(), ["resconv", "plan"])
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(converted, path, compress_to_fp16=False)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(x: Any) -> list[Tensor]:
        result = compiled([t.numpy() for t in tree_leaves(x) if isinstance(t, Tensor)])
        return [torch.from_numpy(result[o].copy()) for o in compiled.outputs]

    verification = _check(net, run, inputs, False, tolerance)
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return Exported(path, "openvino", size, False, None, verification)
