"""What a network is fed, as plain data: structure, shapes and types of its inputs.

tensor   {"shape": [1, 3, 32, 32], "dtype": "float32", "low": -2.1, "high": 2.6}
         "low" and "high" are the range that was seen; a class index or a token has to lie in it
several  {"tuple": [...]}, {"list": [...]} or {"dict": {name: ...}}
constant {"value": true}
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import torch
from msgspec import UNSET, Meta, UnsetType
from torch import Tensor, nn

from ..errors import LoadError, SaveError
from .inputs import copied

__all__ = ["ExampleInputs", "InputSpec", "describe_inputs", "make_inputs", "require_small"]

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.complex64, torch.complex128, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
_MAX_DEPTH, _MAX_ENTRIES, _MAX_ELEMENTS = 8, 1000, 2**28
_MAX_BYTES = 2**28  # of all inputs together, as they are made: 64 images of 3x512x512 are 201 MB
_MAX_KEPT = 2**20  # bytes of all values that are kept together
_LOOK = 4096  # elements that are looked at to tell a mask
_MAX_WHOLE = 2**62


class InputSpec(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """One input, or several; exactly one of the forms above.

    Raises:
        ValueError: it is of none or of several forms, or too large for an example.
    """

    shape: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=16)] | None = None
    dtype: str | None = None
    low: int | float | None = None
    high: int | float | None = None
    items: tuple["InputSpec", ...] | None = msgspec.field(default=None, name="tuple")
    listed: tuple["InputSpec", ...] | None = msgspec.field(default=None, name="list")
    named: dict[str, "InputSpec"] | None = msgspec.field(default=None, name="dict")
    value: bool | int | float | str | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        forms = (self.shape, self.items, self.listed, self.named)
        if sum(f is not None for f in forms) + (self.value is not UNSET) != 1:
            raise ValueError("it is no input: give shape and dtype, tuple, list, dict or value")
        if (self.shape is None) != (self.dtype is None):
            raise ValueError("shape and dtype come together")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"dtype {self.dtype[:40]!r} is not known")
        if self.shape is not None and math.prod(self.shape) > _MAX_ELEMENTS:
            raise ValueError(f"a tensor of shape {self.shape} is too large for an example")
        self._check_range()
        # Whatever is inside was looked at before, so this ends soon.
        if self._depth() > _MAX_DEPTH or sum(1 for _ in self._every()) > _MAX_ENTRIES:
            raise ValueError("it is nested too deeply or too long")

    def _check_range(self) -> None:
        low, high = self.low, self.high
        if low is None and high is None:
            return
        whole = self.dtype is not None and not self.is_real
        if (
            low is None
            or high is None
            or self.dtype is None
            or not low <= high
            or (whole and not (isinstance(low, int) and isinstance(high, int)))
            or not math.isfinite(high - low)
            or (whole and max(abs(low), abs(high)) >= _MAX_WHOLE)
        ):
            raise ValueError(f"the range {low!s:.40} to {high!s:.40} is none")

    @property
    def inside(self) -> tuple["InputSpec", ...]:
        """The inputs that this one is made of."""
        return self.items or self.listed or tuple((self.named or {}).values())

    @property
    def is_real(self) -> bool:
        dtype = _DTYPES[self.dtype or "bool"]
        return dtype.is_floating_point or dtype.is_complex

    @property
    def num_bytes(self) -> int:
        """What making the inputs takes: whole numbers are drawn as int64."""
        if self.shape is None or self.dtype is None:
            return sum(s.num_bytes for s in self.inside)
        dtype = _DTYPES[self.dtype]
        drawn = 0 if dtype.itemsize >= 4 and self.is_real else 8
        return math.prod(self.shape) * (dtype.itemsize + drawn)

    def tensors(self) -> list["InputSpec"]:
        """Return the tensors, in order."""
        return [s for s in self._every() if s.shape is not None]

    def _every(self) -> Iterator["InputSpec"]:
        yield self
        for spec in self.inside:
            yield from spec._every()

    def _depth(self) -> int:
        return 1 + max((s._depth() for s in self.inside), default=0)


@dataclass(frozen=True)
class ExampleInputs:
    """The example inputs of a net, described; the user's batch is not kept.

    From the description come random inputs, the same ones every time: floats in the range that was
    seen (normal ones where there was none), whole numbers in theirs. Copies are kept where values
    matter: of whole numbers, of true or false, and of floats that are no signal (a mask of two
    values, infinities), up to 1 MiB in all; beyond that these are described, too. Of inputs that
    plain data cannot describe (objects, sparse tensors), and of more than 256 MiB, a whole copy is kept.

    Attributes:
        spec: the description; None where there is none.
        kept: copies, by the position among the tensors of ``spec``.
        whole: a copy of the inputs without a description.
    """

    spec: InputSpec | None
    kept: Mapping[int, Tensor] = field(default_factory=dict, compare=False)
    whole: Any = field(default=None, compare=False)

    @classmethod
    def of(cls, example_inputs: Any) -> "ExampleInputs":
        """Describe the inputs, and copy of them what a description would lose."""
        try:
            spec = describe_inputs(example_inputs) if _is_plain(example_inputs) else None
        except SaveError:
            spec = None
        if spec is None or spec.num_bytes > _MAX_BYTES:
            return cls.copy_of(example_inputs)
        kept, left = {}, _MAX_KEPT
        for place, tensor in enumerate(_tensors(example_inputs)):
            if tensor.nbytes <= left and _matters(tensor):
                kept[place] = tensor.detach().cpu().clone()
                left -= tensor.nbytes
        return cls(spec, kept)

    @classmethod
    def copy_of(cls, example_inputs: Any) -> "ExampleInputs":
        """Keep a copy of the inputs as they are, for a net that does not take others of their kind."""
        return cls(None, {}, copied(example_inputs))

    @property
    def is_exact(self) -> bool:
        """Whether every value is kept."""
        return self.spec is None or len(self.kept) == len(self.spec.tensors())

    def make(self) -> Any:
        """Return inputs as the net was given them; what is done to them changes nothing here."""
        if self.spec is None:
            return copied(self.whole)
        require_small(self.spec)  # it may come from a file
        places = iter(range(_MAX_ENTRIES))
        generator = torch.Generator().manual_seed(0)
        return _make(self.spec, generator, lambda: self.kept.get(next(places)))

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExampleInputs":
        return self  # nothing writes into it


def _is_plain(tree: Any, inside: bool = False) -> bool:
    """Whether a description gives back the same types; the arguments' own names may come as any mapping."""
    if isinstance(tree, Mapping) and (type(tree) is dict or not inside):
        return all(_is_plain(v, True) for v in tree.values())
    if type(tree) in (tuple, list):
        return all(_is_plain(v, True) for v in tree)
    return type(tree) in (Tensor, nn.Parameter, bool, int, float, str, type(None))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for inner in tree:
            yield from _tensors(inner)
    elif isinstance(tree, Mapping):
        for inner in tree.values():
            yield from _tensors(inner)


def _matters(tensor: Tensor) -> bool:
    """Whether random numbers would not do in the place of these."""
    if not tensor.is_floating_point():
        return not tensor.is_complex()
    if tensor.numel() <= 1 or not bool(tensor.isfinite().all()):
        return True
    some = tensor.detach().flatten()[:: max(1, tensor.numel() // _LOOK)]
    return len(set(some.tolist())) <= 2


def describe_inputs(example_inputs: Any) -> InputSpec | None:
    """Return the signature of a tensor, tuple, list or dict of inputs; None for None.

    Raises:
        SaveError: they hold something that plain data cannot describe.
    """
    if example_inputs is None:
        return None
    try:
        return _describe(example_inputs)
    except ValueError as error:
        raise SaveError(f"example_inputs cannot be described: {error}.") from error


def _describe(x: Any) -> InputSpec:
    if isinstance(x, Tensor):
        dtype = str(x.dtype).removeprefix("torch.")
        dense = x.layout == torch.strided and not (x.is_meta or x.is_nested)
        if dtype in _DTYPES and dense:
            return InputSpec(shape=tuple(x.shape), dtype=dtype, **_range(x))
    elif isinstance(x, tuple):
        return InputSpec(items=tuple(_describe(e) for e in x))
    elif isinstance(x, list):
        return InputSpec(listed=tuple(_describe(e) for e in x))
    elif isinstance(x, Mapping) and all(isinstance(k, str) for k in x):
        return InputSpec(named={k: _describe(v) for k, v in x.items()})
    elif isinstance(x, bool | int | float | str | type(None)):
        return InputSpec(value=x)
    what = f"{x.dtype} tensor ({x.layout})" if isinstance(x, Tensor) else type(x).__name__
    raise SaveError(
        f"example_inputs hold a {what}, which a saved signature cannot describe: it knows tensors, "
        "tuples, lists, dicts with names, numbers and strings."
    )


def _range(x: Tensor) -> dict[str, Any]:
    """Return the range of the values, where it says what others may be."""
    if x.is_complex() or x.dtype == torch.bool:
        return {}
    if not x.is_floating_point():
        return {
            "low": int(x.min()) if x.numel() else 0,
            "high": int(x.max()) if x.numel() else 0,
        }
    low, high = (float(x.min()), float(x.max())) if x.numel() else (0.0, 0.0)
    # Zeros, the usual example of a shape, are no range.
    return {"low": low, "high": high} if low < high and math.isfinite(high - low) else {}


def make_inputs(spec: InputSpec, generator: torch.Generator) -> Any:
    """Return random inputs of a signature: numbers in their range, normal floats where it is not known.

    Raises:
        LoadError: they would take more than 256 MiB.
    """
    require_small(spec)
    return _make(spec, generator)


def require_small(spec: InputSpec) -> None:
    """Refuse inputs that are too large to be made up.

    Raises:
        LoadError: they would take more than 256 MiB.
    """
    num_bytes = spec.num_bytes
    if num_bytes > _MAX_BYTES:
        raise LoadError(
            f"The inputs that are written down take {num_bytes:,} bytes, more than the "
            f"{_MAX_BYTES:,} that are made up to try a network. Give smaller ones, such as --shape "
            "1,3,224,224."
        )


def _make(
    spec: InputSpec,
    generator: torch.Generator,
    next_kept: Callable[[], Tensor | None] = lambda: None,
) -> Any:
    def make(inner: InputSpec) -> Any:
        return _make(inner, generator, next_kept)

    if spec.items is not None:
        return tuple(make(s) for s in spec.items)
    if spec.listed is not None:
        return [make(s) for s in spec.listed]
    if spec.named is not None:
        return {k: make(s) for k, s in spec.named.items()}
    if spec.shape is None:
        return spec.value
    kept = next_kept()
    return _draw(spec, generator) if kept is None else kept.clone()


def _draw(spec: InputSpec, generator: torch.Generator) -> Tensor:
    assert spec.shape is not None
    assert spec.dtype is not None
    dtype = _DTYPES[spec.dtype]
    if not spec.is_real:
        low, high = int(spec.low or 0), 1 if spec.high is None else int(spec.high)
        return torch.randint(low, high + 1, spec.shape, generator=generator).to(dtype)
    exact = dtype if dtype.itemsize >= 4 else torch.float32
    if spec.low is None or spec.high is None:
        return torch.randn(spec.shape, dtype=exact, generator=generator).to(dtype)
    drawn = torch.rand(spec.shape, dtype=exact, generator=generator)
    return drawn.mul_(spec.high - spec.low).add_(spec.low).to(dtype)
