"""The verb: from scales and a budget to a plan."""

from collections.abc import Iterable
from typing import Any, overload

from torch import nn

from ..analysis.candidates import compatible
from ..analysis.inputs import unwrap
from ..errors import BudgetError, PlanError
from ..latency.table import (
    LatencyTable,
    TimedNet,
    check_latency,
    corrected_limit,
    fitting,
    is_met,
    measure_latency,
)
from ..nn.gates import gates
from ..planning.budget import Budget, Limits, require_budget
from ..planning.costs import CostModel, cost_model, excess
from ..planning.plan import Plan, why_not_now

__all__ = ["plan", "plan_measured"]


@overload
def plan(model: nn.Module, budget: Budget, /, *, latency: LatencyTable | None = None) -> Plan: ...


@overload
def plan(
    model: nn.Module,
    example_inputs: Any = None,
    budget: Budget | None = None,
    *,
    latency: LatencyTable | None = None,
) -> Plan: ...


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    budget: Budget | None = None,
    *,
    latency: LatencyTable | None = None,
) -> Plan:
    """Return which units to remove to meet ``budget``; the model is left as it was.

    Units whose scale is 0 (or at most the threshold) always go. Then the smallest ``|scale|`` go
    first, until every limit holds; those among them that turn out not to be needed stay. Where the
    latency is limited, the finished net is timed, and where it misses the limit, more units go.

    Args:
        model: what :func:`resconv.convert` returned, trained.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; may be left
            out (``plan(model, budget)``): those that the model carries.
        budget: the limits.
        latency: what :func:`resconv.measure_latency` returned for this model; measured now if the
            budget needs it and none is given.

    Raises:
        BudgetError: the budget cannot be met; the least possible size and the reasons are given.
        ConversionError: the model was not converted.
        PlanError: the model holds NaN or infinite numbers.
        MissingExtraError: the budget's runtime is not installed.

    Example:
        >>> model = resconv.convert(net, images, start="identity")
        >>> resconv.plan(model, resconv.Budget(macs=0.7))
        Plan: remove 1 unit: 0
                    before   after  change
        MACs        15,564  10,380  -33.3%
        parameters     483     327  -32.3%
    """
    from ..surgery.provenance import converted, example_inputs_of

    if budget is None:
        example_inputs, budget = None, example_inputs
    require_budget(budget, "budget")
    converted(model)
    example_inputs = example_inputs_of(example_inputs, model)
    return plan_measured(model, example_inputs, budget, latency)[0]


def plan_measured(
    model: nn.Module, example_inputs: Any, budget: Budget | None, table: LatencyTable | None
) -> tuple[Plan, LatencyTable | None]:
    """Return the plan, and the latency table with the timings of finished nets added."""
    from ..surgery.provenance import converted
    from ..surgery.state import require_finite

    require_budget(budget, "budget")
    assert budget is not None
    model = unwrap(model)
    converted(model)
    require_finite(model, PlanError)
    costs = cost_model(model, example_inputs)
    if budget.times:
        if table is None:
            table = measure_latency(model, example_inputs, budget)
        table = fitting(table, costs, budget)
        costs = costs.with_latency(table.latency_ms, table.unit_ms)
    every = gates(model)
    scales = {name: every[name].scale.item() for name in costs.names}
    blocked = {n: r for n in costs.names if (r := why_not_now(model, n)) is not None}
    free = [n for n in costs.names if n not in blocked]
    threshold = 0.0 if budget.threshold is None else budget.threshold
    surely = sorted((n for n in free if abs(scales[n]) <= threshold), key=lambda n: abs(scales[n]))
    surely = list(compatible(surely, costs.excluded))
    ranked = sorted(
        (n for n in free if n not in surely),
        key=lambda n: (abs(scales[n]), -costs.own_macs(n)),
    )
    limits = budget.limits(*costs.whole)
    chosen = _fill(costs, surely, ranked, limits)
    timed: TimedNet | None = None
    if budget.times:
        assert table is not None
        while True:
            # With nothing left to choose, what counts is how long that net takes, not what is
            # predicted for it.
            last = chosen is None
            chosen = list(costs.compatible(free)) if chosen is None else chosen
            table, timed = check_latency(model, example_inputs, table, chosen)
            if is_met(budget, timed):
                break
            if last or len(chosen) == len(costs.compatible(free)):
                _refuse(costs, free, blocked, limits, _too_slow(budget, timed))
            least = min(limits.latency_ms, corrected_limit(budget, table, timed))
            limits = limits._replace(latency_ms=least)
            chosen = _fill(costs, surely, ranked, limits)
    if chosen is None or not _within(costs, chosen, limits.without_latency()):
        _refuse(costs, free, blocked, limits, "")
    assert chosen is not None
    left = costs.left(chosen)
    planned = Plan(
        remove=tuple(n for n in costs.names if n in chosen),
        macs_before=costs.macs,
        macs_after=left.macs,
        num_params_before=costs.num_params,
        num_params_after=left.num_params,
        scales=scales,
        latency_ms_before=None if timed is None else timed.dense_ms,
        latency_ms_predicted=None if timed is None else left.latency_ms,
        latency_ms_after=None if timed is None else timed.latency_ms,
    )
    return planned, table


def _fill(
    costs: CostModel, surely: Iterable[str], ranked: list[str], limits: Limits
) -> list[str] | None:
    """Return the units to remove, or None where all of them are not enough."""
    chosen, rest, added = list(surely), list(ranked), []
    while not _within(costs, chosen, limits):
        name = _next(costs, rest, chosen, limits)
        if name is None:
            return None
        rest.remove(name)
        chosen.append(name)
        added.append(name)
    for name in reversed(added[:-1]):
        fewer = [n for n in chosen if n != name]
        if _within(costs, fewer, limits):
            chosen = fewer
    return chosen


def _within(costs: CostModel, chosen: list[str], limits: Limits) -> bool:
    return all(s <= lim for s, lim in zip(costs.left(chosen), limits, strict=True))


def _next(costs: CostModel, ranked: list[str], chosen: list[str], limits: Limits) -> str | None:
    """Return the first unit that saves what is over a limit; whole branches before their last layer."""
    now = costs.left(chosen)
    emptying = None
    for name in ranked:
        if costs.excludes(name, chosen):
            continue
        then = costs.left([*chosen, name])
        if not any(t < n and n > lim for t, n, lim in zip(then, now, limits, strict=True)):
            continue
        if not costs.empties(name, chosen):
            return name
        emptying = emptying or name
    return emptying


def _too_slow(budget: Budget, timed: TimedNet) -> str:
    asked = f"{budget.latency_ms} ms" if budget.latency is None else f"{budget.latency:.0%} of it"
    return (
        f"a net that takes {timed.latency_ms:.3g} ms where the dense one takes "
        f"{timed.dense_ms:.3g} ms (the budget is {asked}; {budget.runtime}, batch {budget.batch})"
    )


def _refuse(
    costs: CostModel,
    free: list[str],
    blocked: dict[str, str],
    limits: Limits,
    too_slow: str,
) -> None:
    going = costs.compatible(free)
    size = excess(costs.left(going), costs.whole, limits.without_latency())
    too_much = " and ".join(t for t in (size, too_slow) if t)
    why = "; ".join(f"{n}: {r}" for n, r in list(blocked.items())[:5])
    raise BudgetError(
        f"The budget cannot be reached: removing all {len(going)} removable units leaves {too_much}."
        + (f" {len(blocked)} more units stay for now ({why})." if blocked else "")
        + " Raise the budget, convert with units='all', or run `resconv inspect` to see why the "
        "other layers are kept."
    )
