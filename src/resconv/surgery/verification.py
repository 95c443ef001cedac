"""Proof by numbers: the compact net computes what the gated net computes with its scales at 0."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..analysis.inputs import as_call, evaluating, tensors_in, to_device_of, unwrap
from ..errors import PlanError, VerificationError
from ..nn.gates import gates, zeroed
from ..planning.plan import Plan

__all__ = ["Verification", "compare_outputs", "relative_error", "verify"]


@dataclass(frozen=True)
class Verification:
    """How far two networks are apart: largest difference, alone and over the largest output."""

    max_abs_error: float
    max_rel_error: float
    tolerance: float
    num_outputs: int
    dtype: str


def verify(
    model: nn.Module,
    compact: nn.Module,
    example_inputs: Any,
    *,
    plan: Plan | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Compare ``model`` (its planned scales set to 0 meanwhile) with ``compact``, in eval mode.

    Both run on ``example_inputs``. The tolerance is relative to the largest output: by default
    1e-10 for float64 nets, 1e-4 for float32, 5e-2 for half precision. Both are left as they were.

    Raises:
        VerificationError: they disagree (the numbers are in the message), or ``compact`` does not run.
        PlanError: the plan names a unit that ``model`` does not have.
    """
    model, compact = unwrap(model), unwrap(compact)
    names: tuple[str, ...] = () if plan is None else plan.remove
    unknown = [n for n in names if n not in gates(model)]
    if unknown:
        raise PlanError(f"The gated model has no unit named {', '.join(map(repr, unknown[:5]))}.")
    with zeroed(model, names):
        before = _outputs(model, example_inputs)
    try:
        after = _outputs(compact, example_inputs)
    except Exception as error:
        raise VerificationError(
            f"The compact net does not run on these inputs ({type(error).__name__}: {error})."
        ) from error
    return compare_outputs(before, after, tolerance=tolerance)


def compare_outputs(before: Any, after: Any, *, tolerance: float | None = None) -> Verification:
    """Compare two sets of outputs; see :func:`verify`."""
    xs = tensors_in(before)
    ys = tensors_in(after)
    if [tuple(t.shape) for t in xs] != [tuple(t.shape) for t in ys]:
        raise VerificationError(
            f"The outputs differ in shape: {[tuple(t.shape) for t in xs][:4]} before, "
            f"{[tuple(t.shape) for t in ys][:4]} after."
        )
    if not xs:
        raise VerificationError("The networks return no tensor, so there is nothing to compare.")
    dtype = xs[0].dtype
    if tolerance is None:
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 5e-2)
    worst = max(
        (float((x.double() - y.to(x.device).double()).abs().max()) if x.numel() else 0.0)
        for x, y in zip(xs, ys, strict=True)
    )
    relative = relative_error(after, before)
    if not relative <= tolerance:
        raise VerificationError(
            f"The networks disagree: the largest difference is {worst:.3e}, {relative:.3e} of the "
            f"largest output; allowed is {tolerance:.0e}. Do not ship the compact net. Was the "
            "model trained or changed between plan, prune and verify?"
        )
    return Verification(worst, relative, tolerance, len(xs), str(dtype).removeprefix("torch."))


def _outputs(model: nn.Module, example_inputs: Any) -> Any:
    args, kwargs = as_call(to_device_of(model, copy.copy(example_inputs)))
    with evaluating(model):
        return tree_map(
            lambda t: t.detach().clone() if isinstance(t, Tensor) else t, model(*args, **kwargs)
        )


def relative_error(a: Any, b: Any) -> float:
    """Return the largest difference of two outputs over the largest entry of the second.

    Infinite where structure or shapes differ, or where one has a NaN that the other has not.
    """
    worst = 0.0
    xs, ys = tensors_in(a), tensors_in(b)
    if len(xs) != len(ys):
        return float("inf")
    for x, y in zip(xs, ys, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if not x.numel():
            continue
        x, y = x.detach().to(y.device).double(), y.detach().double()
        if not bool((x.isfinite() == y.isfinite()).all()):
            return float("inf")
        x, y = x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0)
        worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-12)))
    return worst
