"""Which units go: the plan, made from the scales and a budget, or written by hand."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from .budget import Budget
from .errors import BudgetError, PlanError
from .files import write_text
from .gates import gates
from .ledger import Ledger, ledger
from .trace import unwrap

__all__ = ["Plan", "floor", "plan", "why_not_now"]


@dataclass(frozen=True)
class Plan:
    """The units to remove; JSON in and out.

    ``macs`` and ``num_params`` (at batch size 1, norms unfolded) say what is expected before and
    after; they are None in a plan written by hand.
    """

    remove: tuple[str, ...] = ()
    macs_before: int | None = None
    macs_after: int | None = None
    num_params_before: int | None = None
    num_params_after: int | None = None
    scales: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names: Any = self.remove
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise PlanError(f"remove={names!r}: give a list of unit names.")
        names = tuple(names)
        if not all(isinstance(n, str) for n in names):
            raise PlanError(f"remove={names!r}: every entry is a unit's name.")
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise PlanError(f"The plan names {', '.join(map(repr, twice))} more than once.")
        object.__setattr__(self, "remove", names)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "remove": list(self.remove)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan.

        Raises:
            PlanError: no JSON, or no plan; the fault is named.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise PlanError(f"The plan is not JSON: {error}.") from error
        if not isinstance(content, dict) or "remove" not in content:
            raise PlanError('A plan is a JSON object with the key "remove", a list of unit names.')
        unknown = sorted(set(content) - {f.name for f in fields(cls)})
        if unknown:
            raise PlanError(f"The plan has unknown keys: {', '.join(unknown)}.")
        if not isinstance(content["remove"], list):
            raise PlanError(f"remove={content['remove']!r}: give a list of unit names.")
        if not isinstance(content.get("scales", {}), dict):
            raise PlanError('"scales" is an object of unit names and numbers.')
        for key in ("macs_before", "macs_after", "num_params_before", "num_params_after"):
            value = content.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise PlanError(f"{key}={value!r} is no whole number.")
        return cls(**content)

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"The plan {path} cannot be read: {error}.") from error
        return cls.from_json(text)


def why_not_now(model: nn.Module, name: str) -> str | None:
    """Return why a converted unit cannot go as its parameters stand, or None."""
    gate = gates(unwrap(model))[name]
    if not math.isfinite(gate.scale.item()):
        return f"its scale is {gate.scale.item():g}: training diverged"
    if gate.control is not None:
        p = gate.control.item()
        if p == 0 or not math.isfinite(p):
            return f"its control is {p:g}, so nothing would pass through"
    return None


def plan(model: nn.Module, example_inputs: Any, budget: Budget) -> Plan:
    """Return which units to remove to meet ``budget``; the model is left as it was.

    Units whose scale is 0 (or at most the threshold) always go. Then the smallest ``|scale|`` go
    first, until every limit holds.

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
    limit_macs, limit_params = budget.limits(costs.macs, costs.num_params)
    threshold = 0.0 if budget.threshold is None else budget.threshold
    chosen = [n for n in free if abs(scales[n]) <= threshold]

    def met() -> bool:
        saved = costs.saving(chosen)
        return (
            costs.macs - saved.macs <= limit_macs
            and costs.num_params - saved.num_params <= limit_params
        )

    rest = sorted(
        (n for n in free if n not in chosen),
        key=lambda n: (abs(scales[n]), -costs.own_macs(n)),
    )
    while not met():
        name = _next(costs, rest, chosen)
        if name is None:
            _refuse(costs, budget, free, blocked, limit_macs, limit_params)
        else:
            rest.remove(name)
            chosen.append(name)
    saved = costs.saving(chosen)
    return Plan(
        remove=tuple(n for n in costs.names if n in chosen),
        macs_before=costs.macs,
        macs_after=costs.macs - saved.macs,
        num_params_before=costs.num_params,
        num_params_after=costs.num_params - saved.num_params,
        scales=scales,
    )


def _next(costs: Ledger, ranked: list[str], chosen: list[str]) -> str | None:
    """Return the first unit that still saves something; whole branches before their last layer."""
    now = costs.saving(chosen)
    emptying = None
    for name in ranked:
        if costs.saving([*chosen, name]) == now:
            continue
        if not costs.empties(name, chosen):
            return name
        emptying = emptying or name
    return emptying


def floor(costs: Ledger, free: Iterable[str]) -> tuple[int, int]:
    """Return the MACs and parameters left when every unit that can go is gone."""
    saved = costs.saving(free)
    return costs.macs - saved.macs, costs.num_params - saved.num_params


def _refuse(
    costs: Ledger,
    budget: Budget,
    free: list[str],
    blocked: dict[str, str],
    limit_macs: float,
    limit_params: float,
) -> None:
    macs, num_params = floor(costs, free)
    parts = []
    if macs > limit_macs:
        parts.append(f"{macs:,} of {costs.macs:,} MACs (the budget is {int(limit_macs):,})")
    if num_params > limit_params:
        parts.append(
            f"{num_params:,} of {costs.num_params:,} parameters (the budget is {int(limit_params):,})"
        )
    why = "; ".join(f"{n}: {r}" for n, r in list(blocked.items())[:5])
    raise BudgetError(
        f"The budget cannot be reached: removing all {len(free)} removable units leaves "
        f"{' and '.join(parts)}."
        + (f" {len(blocked)} more units stay for now ({why})." if blocked else "")
        + " Raise the budget, convert with units='all', or run `resconv inspect` to see why the "
        "other layers are kept."
    )
