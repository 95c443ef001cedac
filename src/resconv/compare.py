"""Compare any two of: saved network, .onnx, .pt2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .errors import LoadError, MissingExtraError
from .export import run_onnx
from .store import load, read_header
from .verify import Verification, compare_outputs

__all__ = ["compare"]

_Runner = Callable[[Tensor], list[Tensor]]


def compare(
    a: Path,
    b: Path,
    *,
    shape: str | None = None,
    tolerance: float = 1e-4,
    trust_source: bool = False,
) -> Verification:
    """Run both networks on one random input and compare.

    Raises:
        LoadError: a file is missing or of another kind, or the input's shape is not known.
        VerificationError: they disagree.
    """
    opened = [_open(Path(p), trust_source) for p in (a, b)]
    sizes = [s for _, s in opened if s]
    size = _parse(shape) if shape is not None else (sizes[0] if sizes else None)
    if size is None:
        raise LoadError("Neither file says its input's shape. Give it: --shape 1,3,224,224.")
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    outputs = []
    for path, (run, _) in zip((a, b), opened, strict=True):
        try:
            outputs.append(run(x))
        except Exception as error:
            raise LoadError(
                f"{path} does not run on an input of shape {tuple(size)}: "
                f"{str(error).splitlines()[0][:200]}"
            ) from error
    return compare_outputs(outputs[0], outputs[1], tolerance=tolerance)


def _parse(shape: str) -> list[int]:
    try:
        numbers = [int(n) for n in shape.replace("x", ",").split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise LoadError(f"--shape {shape}: give whole numbers, such as 1,3,224,224.")
    return numbers


def _open(path: Path, trust_source: bool) -> tuple[_Runner, list[int] | None]:
    if path.is_dir():
        header = read_header(path)
        model = load(path, trust_source=trust_source)
        shape = header["inputs"][0]["shape"] if header["inputs"] else None

        def run_module(x: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return _tensors(model(x))

        return run_module, shape
    if not path.is_file():
        raise LoadError(f"There is no {path}.")
    if path.suffix == ".onnx":
        return lambda x: run_onnx(path, x), _onnx_shape(path)
    if path.suffix == ".pt2":
        try:
            program = torch.export.load(path)
        except Exception as error:
            raise LoadError(f"{path} is not a readable .pt2: {str(error)[:200]}") from error
        module = program.module()

        def run_program(x: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return _tensors(module(x))

        return run_program, None
    raise LoadError(f"{path}: a folder, .onnx or .pt2 is needed, not {path.suffix or 'this'!r}.")


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _onnx_shape(path: Path) -> list[int] | None:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "Reading an ONNX file") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise LoadError(f"{path} is not a readable ONNX file: {str(error)[:200]}") from error
    shape = [d if isinstance(d, int) else 1 for d in session.get_inputs()[0].shape]
    return shape if all(d > 0 for d in shape) else None
