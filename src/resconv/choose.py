"""The verb: from scales and a budget to a plan."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .budget import Budget
from .errors import BudgetError
from .gates import gates
from .ledger import Ledger, excess, ledger
from .plan import Plan, why_not_now
from .trace import unwrap

__all__ = ["plan"]


def plan(model: nn.Module, example_inputs: Any, budget: Budget) -> Plan:
    """Return which units to remove to meet ``budget``; the model is left as it was.

    Units whose scale is 0 (or at most the threshold) always go. Then the smallest ``|scale|`` go
    first, until every limit holds; those among them that turn out not to be needed stay.

    Raises:
        BudgetError: the budget cannot be met; the least possible size and the reasons are given.
        ConversionError: the model was not converted.
    """
    from .convert import state_of

    model = unwrap(model)
    state_of(model)
    costs = ledger(model, example_inputs)
    every = gates(model)
    scales = {name: every[name].scale.item() for name in costs.names}
    blocked = {n: r for n in costs.names if (r := why_not_now(model, n)) is not None}
    free = [n for n in costs.names if n not in blocked]
    limits = budget.limits(*costs.whole)
    threshold = 0.0 if budget.threshold is None else budget.threshold
    surely = [n for n in free if abs(scales[n]) <= threshold]
    ranked = sorted(
        (n for n in free if n not in surely),
        key=lambda n: (abs(scales[n]), -costs.own_macs(n)),
    )
    chosen = _fill(costs, surely, ranked, limits)
    if chosen is None:
        _refuse(costs, free, blocked, limits)
    assert chosen is not None
    left = costs.left(chosen)
    return Plan(
        remove=tuple(n for n in costs.names if n in chosen),
        macs_before=costs.macs,
        macs_after=left.macs,
        num_params_before=costs.num_params,
        num_params_after=left.num_params,
        scales=scales,
    )


def _fill(
    costs: Ledger, surely: Iterable[str], ranked: list[str], limits: tuple[float, float, float]
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


def _within(costs: Ledger, chosen: list[str], limits: tuple[float, float, float]) -> bool:
    return all(s <= lim for s, lim in zip(costs.left(chosen), limits, strict=True))


def _next(
    costs: Ledger, ranked: list[str], chosen: list[str], limits: tuple[float, float, float]
) -> str | None:
    """Return the first unit that saves what is over a limit; whole branches before their last layer."""
    now = costs.left(chosen)
    emptying = None
    for name in ranked:
        then = costs.left([*chosen, name])
        if not any(t < n and n > lim for t, n, lim in zip(then, now, limits, strict=True)):
            continue
        if not costs.empties(name, chosen):
            return name
        emptying = emptying or name
    return emptying


def _refuse(
    costs: Ledger, free: list[str], blocked: dict[str, str], limits: tuple[float, float, float]
) -> None:
    too_much = excess(costs.left(free), costs.whole, limits)
    why = "; ".join(f"{n}: {r}" for n, r in list(blocked.items())[:5])
    raise BudgetError(
        f"The budget cannot be reached: removing all {len(free)} removable units leaves {too_much}."
        + (f" {len(blocked)} more units stay for now ({why})." if blocked else "")
        + " Raise the budget, convert with units='all', or run `resconv inspect` to see why the "
        "other layers are kept."
    )
