"""Compare any two of: run folder, saved network, .onnx, .pt2, .xml."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from ..analysis.input_spec import InputSpec, make_inputs
from ..analysis.inputs import as_call
from ..errors import LoadError, VerificationError
from ..surgery.verification import Verification, compare_outputs, require_examples
from .runtimes import Opened, first_line, open_file, tensors_of
from .store import load, read_header

__all__ = ["compare"]


def compare(
    a: Path,
    b: Path,
    *,
    shape: str | Sequence[str] | None = None,
    tolerance: float = 1e-4,
    trust_source: bool = False,
) -> Verification:
    """Run both networks on the same random inputs and compare their outputs.

    The inputs (how many, their shapes and types) are those that the files say they take; ``shape``
    replaces the shapes: one for each tensor, such as ``"1,3,224,224"``.

    Raises:
        TrustError: without ``trust_source``: a .pt2, or a net whose code is not resconv's.
        LoadError: a file is missing or of another kind, or the inputs are not known.
        VerificationError: they disagree, one of them does not run, or nothing can be compared.
    """
    if not tolerance > 0:
        raise LoadError(f"--tolerance {tolerance}: give a number above 0, such as 1e-4.")
    opened = [_open(Path(p), trust_source) for p in (a, b)]
    known = [o.inputs for o in opened if o.inputs is not None]
    shapes = [shape] if isinstance(shape, str) else list(shape or [])
    try:
        signature = _with_shapes(known[0] if known else None, [_parse(s) for s in shapes])
    except ValueError as error:
        raise LoadError(f"--shape {' '.join(shapes)}: {error}. Give smaller ones.") from error
    if signature is None:
        raise LoadError("Neither file says its input's shape. Give it: --shape 1,3,224,224.")
    inputs = make_inputs(signature, torch.Generator().manual_seed(0))
    require_examples(inputs)
    outputs = []
    for path, one in zip((a, b), opened, strict=True):
        try:
            outputs.append(one.run(inputs))
        except LoadError:
            raise
        except Exception as error:  # of a runtime, or of the user's own net
            sizes = ", ".join(str(tuple(t.shape)) for t in tensors_of(inputs))
            raise VerificationError(
                f"{path} does not run on inputs of shape {sizes}: {first_line(error)}. Are both "
                "files of one network? Another shape can be given with --shape."
            ) from error
    try:
        return compare_outputs(outputs[0], outputs[1], tolerance=tolerance)
    except VerificationError as error:
        raise VerificationError(f"{a} and {b}: {error}") from error


def _parse(shape: str) -> tuple[int, ...]:
    try:
        numbers = [int(n) for n in shape.replace("x", ",").split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise LoadError(f"--shape {shape}: give whole numbers, such as 1,3,224,224.")
    return tuple(numbers)


def _with_shapes(signature: InputSpec | None, shapes: list[tuple[int, ...]]) -> InputSpec | None:
    """Return the signature with other shapes, or one made of shapes alone (float tensors)."""
    if not shapes:
        return signature
    if signature is None:
        return InputSpec(items=tuple(InputSpec(shape=s, dtype="float32") for s in shapes))
    known = signature.tensors()
    if len(known) != len(shapes):
        raise LoadError(
            f"The network takes {len(known)} tensors, --shape was given {len(shapes)} times. "
            "Give it once for each, in order."
        )
    left = iter(shapes)

    def reshaped(spec: InputSpec) -> InputSpec:
        return replace(
            spec,
            shape=None if spec.shape is None else next(left),
            items=None if spec.items is None else tuple(map(reshaped, spec.items)),
            listed=None if spec.listed is None else tuple(map(reshaped, spec.listed)),
            named=None if spec.named is None else {k: reshaped(s) for k, s in spec.named.items()},
        )

    return reshaped(signature)


def _open(path: Path, trust_source: bool) -> Opened:
    if not path.is_dir():
        return open_file(path, trust_source=trust_source)
    header = read_header(path)
    model = load(path, trust_source=trust_source)

    def run(inputs: Any) -> list[torch.Tensor]:
        args, kwargs = as_call(inputs)
        with torch.no_grad():
            return tensors_of(model(*args, **kwargs))

    return Opened(run, header.inputs)
