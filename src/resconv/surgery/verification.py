"""Proof by numbers: the compact net computes what the gated net computes with its scales at 0.

Nothing compared proves nothing: no images in, no numbers out, or nothing but NaN and infinities is
a failure, and so is a value that cannot be compared.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from ..analysis.inputs import as_call, evaluating, tensors_in, to_device_of, unwrap
from ..analysis.recorder import restored
from ..errors import PlanError, TraceError, VerificationError
from ..nn.gates import gates, zeroed
from ..planning.plan import Plan
from ..tables import html_table, text_table
from .provenance import example_inputs_of

__all__ = [
    "Verification",
    "compare_outputs",
    "relative_error",
    "require_examples",
    "round_anew",
    "tolerance_for",
    "verify",
]

_TOLERANCES = {torch.float64: 1e-10, torch.complex128: 1e-10}
_TOLERANCES |= {torch.float32: 1e-4, torch.complex64: 1e-4}
_HALF = 5e-2


@dataclass(frozen=True)
class Verification:
    """How far two networks are apart: largest difference, alone and over the largest output.

    ``tolerance`` and ``dtype`` are those of the output that came closest to its tolerance;
    ``num_outputs`` counts tensors, arrays and numbers.
    """

    max_abs_error: float
    max_rel_error: float
    tolerance: float
    num_outputs: int
    dtype: str

    def __repr__(self) -> str:
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[str, list[str], list[list[object]]]:
        """Return title, header and rows of what a reader wants to know."""
        outputs = (
            "1 output agrees" if self.num_outputs == 1 else f"{self.num_outputs} outputs agree"
        )
        return (
            f"Verified: {outputs}",
            ["", "difference", "allowed"],
            [
                ["of the largest entry", self.max_rel_error, f"{self.tolerance:.3g}"],
                ["alone", self.max_abs_error, ""],
                ["compared in", self.dtype, ""],
            ],
        )


def verify(
    model: nn.Module,
    compact: nn.Module,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Compare ``model`` (its planned scales set to 0 meanwhile) with ``compact``, in eval mode.

    Both run on ``example_inputs``; by default on those that ``model`` carries, else on those of
    ``compact``. The tolerance is relative to the largest entry of each output:
    by default 1e-10 for float64, 1e-4 for float32, 5e-2 for half precision, by the least precise
    of the output's type and the nets' parameters'. Whole numbers, texts and the structure of the
    outputs must be equal, NaN and infinities stand at the same places. Both nets are left as they
    were.

    Raises:
        VerificationError: they disagree (the numbers are in the message), one of them does not
            run, or nothing finite can be compared.
        PlanError: the plan names a unit that ``model`` does not have.

    Example:
        >>> model = resconv.convert(net, images)
        >>> resconv.verify(model, resconv.fuse(model)).num_outputs
        1
    """
    model, compact = unwrap(model), unwrap(compact)
    names: tuple[str, ...] = () if plan is None else plan.remove
    unknown = [n for n in names if n not in gates(model)]
    if unknown:
        raise PlanError(f"The gated model has no unit named {', '.join(map(repr, unknown[:5]))}.")
    example_inputs = example_inputs_of(example_inputs, model, compact)
    require_examples(example_inputs)
    with zeroed(model, names):
        before = _outputs(model, example_inputs, "first")
    after = _outputs(compact, example_inputs, "second")
    least = max(tolerance_for(model), tolerance_for(compact))
    return compare_outputs(before, after, tolerance=tolerance, least=least)


def tolerance_for(model: nn.Module) -> float:
    """Return the default tolerance of a net's least precise parameter; 0 for a net without any."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()}
    return max((_TOLERANCES.get(d, _HALF) for d in dtypes), default=0.0)


def require_examples(example_inputs: Any) -> None:
    """Raise where every input tensor is empty: nets that are shown nothing cannot differ.

    Raises:
        VerificationError: with the shapes.
    """
    shapes = [tuple(t.shape) for t in tensors_in(example_inputs)]
    if shapes and (all(0 in s for s in shapes) or shapes[0][:1] == (0,)):
        raise VerificationError(
            f"The example inputs hold nothing to compare on: their shapes are {shapes[:4]}. Give "
            "at least one image."
        )


def compare_outputs(
    before: Any, after: Any, *, tolerance: float | None = None, least: float = 0.0
) -> Verification:
    """Compare two sets of outputs; see :func:`verify`.

    ``least`` is the least that a default tolerance may be.
    """
    pairs = _paired(before, after)
    worst, closest = 0.0, (-1.0, 0.0, 0.0, torch.float32)
    for place, (x, y) in pairs.items():
        if not x.numel():
            continue
        exact = not (x.is_floating_point() or x.is_complex())
        wide = _TOLERANCES.get(x.dtype, _HALF)
        allowed = tolerance if tolerance is not None else 0.0 if exact else max(least, wide)
        if bool(x.isnan().all()):
            raise VerificationError(
                f"Nothing was compared{place and f' in output {place}'}: all its {x.numel():,} "
                "numbers are NaN, so nothing shows that the networks agree. Look for the layer that "
                "overflows, and load sound weights."
            )
        largest, relative = _distance(x, y)
        worst = max(worst, largest)
        if not relative <= allowed:
            raise VerificationError(
                f"The networks disagree{place and f' in output {place}'}: the largest difference is "
                f"{largest:.3e}, {relative:.3e} of the largest entry; allowed is {allowed:.0e}. "
                "Do not ship the compact net. Was the model trained or changed between plan, prune "
                "and verify?"
            )
        share = relative / allowed if allowed else 0.0
        if share > closest[0]:
            closest = (share, relative, allowed, x.dtype)
    if not any(bool(x.isfinite().any()) for x, _ in pairs.values()):
        total = sum(x.numel() for x, _ in pairs.values())
        raise VerificationError(
            "Nothing was compared: the networks return no numbers at all on these inputs."
            if not total
            else f"Nothing finite was compared: all {total:,} numbers that the networks return are "
            "NaN or infinite, so nothing shows that they agree. Look for the layer that overflows."
        )
    _, relative, allowed, dtype = closest
    return Verification(worst, relative, allowed, len(pairs), str(dtype).removeprefix("torch."))


def _paired(before: Any, after: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the numbers of two sets of outputs, side by side; all else must be equal."""
    xs, ys = dict(_leaves(before)), dict(_leaves(after))
    if list(xs) != list(ys):
        only = [*(p for p in xs if p not in ys), *(p for p in ys if p not in xs)]
        raise VerificationError(
            f"The outputs differ in structure: {len(xs)} values before, {len(ys)} after; only one "
            f"of the two has {', '.join(only[:3]) or 'them in this order'}."
        )
    numbers = {p: (_numbers(xs[p]), _numbers(ys[p])) for p in xs}
    for place, (x, y) in numbers.items():
        if x is None or y is None:
            _compare_plain(place, xs[place], ys[place])
    pairs = {p: (x, y) for p, (x, y) in numbers.items() if x is not None and y is not None}
    shapes = [[tuple(t.shape) for t in side] for side in zip(*pairs.values(), strict=True)]
    if shapes and shapes[0] != shapes[1]:
        raise VerificationError(
            f"The outputs differ in shape: {shapes[0][:4]} before, {shapes[1][:4]} after."
        )
    if not pairs:
        raise VerificationError(
            "The networks return no tensor and no number, so there is nothing to compare."
        )
    return pairs


def _outputs(model: nn.Module, example_inputs: Any, which: str) -> Any:
    args, kwargs = as_call(to_device_of(model, copy.copy(example_inputs)))
    with evaluating(model), restored(model):
        try:
            return tree_map(
                lambda t: t.detach().clone() if isinstance(t, Tensor) else t,
                model(*args, **kwargs),
            )
        except TraceError:
            raise
        except Exception as error:  # of the user's forward
            shapes = [tuple(t.shape) for t in tensors_in((args, kwargs))]
            raise VerificationError(
                f"The {which} net ({type(model).__name__}) does not run on inputs of shape "
                f"{shapes[:4]}: {type(error).__name__}: {error}"
            ) from error


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield every value of a nested structure with its place, the fields of objects included."""
    seen: set[int] = set()

    def look(tree: Any, place: str) -> Iterator[tuple[str, Any]]:
        for path, leaf in _with_places(tree):
            here = place + path
            fields = getattr(leaf, "__dict__", None)
            plain = isinstance(leaf, Tensor | type | Enum | nn.Module) or callable(leaf)
            if plain or fields is None or _numbers(leaf) is not None:
                yield here, leaf
            elif id(leaf) not in seen:
                seen.add(id(leaf))
                yield from look(dict(fields), f"{here}.{type(leaf).__name__}")

    return look(tree, "")


def _with_places(tree: Any) -> list[tuple[str, Any]]:
    try:
        return [("".join(map(str, path)), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]
    except ValueError:  # a class that was registered without the names of its parts
        return [(f"[{i}]", leaf) for i, leaf in enumerate(tree_leaves(tree))]


def _numbers(leaf: Any) -> Tensor | None:
    """Return a tensor, an array or a number as a dense tensor; None for anything else."""
    if isinstance(leaf, Tensor):
        dense: Tensor = leaf.detach()
        if dense.is_quantized:
            dense = dense.dequantize()
        elif dense.is_nested:
            dense = torch.cat([t.flatten() for t in dense.unbind()])
        return dense if dense.layout == torch.strided else dense.to_dense()
    if isinstance(leaf, bool | int | float | complex):
        return torch.tensor(leaf, dtype=None if isinstance(leaf, bool | int) else _python(leaf))
    if type(leaf).__module__ == "numpy" and getattr(leaf, "dtype", None) is not None:
        try:
            return torch.as_tensor(leaf)
        except (TypeError, ValueError, RuntimeError):  # an array of texts or objects
            return None
    return None


def _python(leaf: float | complex) -> torch.dtype:
    return torch.complex128 if isinstance(leaf, complex) else torch.float64


def _compare_plain(place: str, x: Any, y: Any) -> None:
    """Compare what holds no numbers: it is equal, or it is named."""
    if callable(x) or isinstance(x, nn.Module):
        return  # no value: a function, a class, a layer
    own: Any = type(x).__eq__
    if own is object.__eq__ and x is not y:
        raise VerificationError(
            f"Output {place} is a {type(x).__name__}, which cannot be compared. Let the networks "
            "return tensors, numbers, texts, or structures of them."
        )
    try:
        if hasattr(x, "tolist") and hasattr(y, "tolist"):  # arrays of texts
            x, y = x.tolist(), y.tolist()
        same = type(x) is type(y) and bool(x == y)
    except Exception as error:  # of the comparison of a class of the user's
        raise VerificationError(
            f"Output {place} is a {type(x).__name__}, which cannot be compared: {error}"
        ) from error
    if not same:
        raise VerificationError(
            f"The networks disagree in output {place}: {str(x)[:60]!r} ({type(x).__name__}) "
            f"before, {str(y)[:60]!r} ({type(y).__name__}) after."
        )


def _distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the largest difference, alone and over the largest entry of ``x``.

    Both infinite where NaN, inf and -inf do not stand at the same places.
    """
    x, y = (_real(t) for t in (x, y.to(x.device)))
    if not x.numel():
        return 0.0, 0.0
    odd = ~(x.isfinite() & y.isfinite())
    if bool(odd.any()):
        a, b = x[odd], y[odd]
        if not bool(((a == b) | (a.isnan() & b.isnan())).all()):
            return math.inf, math.inf
        x, y = x[~odd], y[~odd]
        if not x.numel():
            return 0.0, 0.0
    largest = float((x - y).abs().max())
    return largest, largest / max(float(x.abs().max()), 1e-12)


def _real(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.double()


def relative_error(a: Any, b: Any) -> float:
    """Return the largest difference of two outputs over the largest entry of the second.

    Infinite where structure or shapes differ, or NaN, inf and -inf stand at different places.
    """
    xs, ys = tensors_in(a), tensors_in(b)
    if [x.shape for x in xs] != [y.shape for y in ys]:
        return math.inf
    pairs = ((_numbers(y), _numbers(x)) for x, y in zip(xs, ys, strict=True))
    return max(
        (_distance(y, x)[1] for y, x in pairs if y is not None and x is not None), default=0.0
    )


@torch.no_grad()
def round_anew(model: nn.Module) -> nn.Module:
    """Move every weight by at most one rounding, in place: how far outputs go then is no fault."""
    for p in model.parameters():
        if p.is_floating_point():
            p.mul_(1 + torch.finfo(p.dtype).eps * (torch.rand_like(p) - 0.5))
    return model
