"""Which unit goes next, and when: the schedule that brings a run to its target.

After a share of the run that only collects importance, the net that the schedule wants shrinks linearly
from the whole to the target. Whenever the planned zeros leave more than that, the unit that costs
least for what it brings nearer to the limits is put under a penalty that grows until its scale is 0.

A unit that goes leaves its work to its like (units of the same shapes, the blocks of one stage). Importance
shows that late, and in training at a high rate hardly for the last stages, so by importance alone nearly all
of one stage goes. So every kind of unit is held to the share of all importance that it had in the whole net:
the less of it is left, the more each of those that stay counts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..planning.budget import Budget, Limits
from ..planning.costs import Cost, CostModel

__all__ = ["DONE", "Fade", "Schedule"]

LEARN = 0.05  # share of the run that only collects importance
DONE = 0.4  # share of the run by which every planned scale is 0
LAST = 0.95  # no penalty grows longer than this


@dataclass
class Fade:
    """A scale on its way to 0: its bound falls linearly from ``scale``."""

    start: int
    end: int
    scale: float

    def left(self, step: int) -> float:
        """Return the share of the way that is left; 0 or less at its end."""
        return (self.end - step) / max(1, self.end - self.start)


@dataclass
class Schedule:
    """The units that are 0, those on their way, and the choice of the next."""

    costs: CostModel
    target: Budget
    total: int
    fading: dict[str, Fade] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)
    # By kind of unit, its share of all importance when the first unit was chosen.
    work: dict[str, float] = field(default_factory=dict)
    limit_ms: float = math.inf  # corrected by measuring the finished net

    @property
    def window(self) -> int:
        return max(1, self.total // 10)

    @property
    def taken(self) -> list[str]:
        return [*self.zero, *self.fading]

    @property
    def limits(self) -> Limits:
        limits = self.target.limits(*self.costs.whole)
        return limits._replace(latency_ms=min(limits.latency_ms, self.limit_ms))

    def due(self, step: int) -> bool:
        """Whether units may be chosen after this step."""
        return step >= self.total * LEARN and step % max(1, self.total // 200) == 0

    def progress(self, step: int) -> float:
        first, last = self.total * LEARN, self.total * DONE - self.window
        return min(1.0, (step - first) / max(1.0, last - first))

    def choose(
        self, step: int, importance: Mapping[str, float], scale_of: Callable[[str], float]
    ) -> None:
        """Put the next units under pressure, as many as the schedule asks for by now."""
        progress = self.progress(step)
        self.work = self.work or self._shares(frozenset(), importance)
        # Where the schedule wants the net to be now; the limit itself at the end.
        wanted = [
            w - max(0.0, w - min(w, lim)) * progress
            for w, lim in zip(self.costs.whole, self.limits, strict=True)
        ]
        for name in self._until(wanted, self.taken, importance):
            end = min(step + self.window, max(step + 1, int(self.total * LAST)))
            self.fading[name] = Fade(step, end, scale_of(name))

    def settled(self, step: int) -> bool:
        """Whether all that the target needs has been chosen, and is 0."""
        return self.progress(step) >= 1 and not self.fading and bool(self.zero)

    def missing(self, importance: Mapping[str, float]) -> list[str]:
        """Return the units that would still have to be chosen to meet the limits."""
        return self._until(list(self.limits), self.taken, importance)

    def _until(
        self, wanted: list[float], taken: list[str], importance: Mapping[str, float]
    ) -> list[str]:
        taken = list(taken)
        more: list[str] = []
        while True:
            left = self.costs.left(taken)
            if all(s <= w + 1e-9 for s, w in zip(left, wanted, strict=True)):
                return more
            over = [max(0.0, s - lim) for s, lim in zip(left, self.limits, strict=True)]
            name = self._least(taken, over, importance)
            if name is None:
                return more
            taken.append(name)
            more.append(name)

    def _least(
        self, taken: list[str], over: list[float], importance: Mapping[str, float]
    ) -> str | None:
        """Return the unit whose removal costs least for what it brings nearer to the limits.

        ``over`` is what is over the limits (MACs, parameters, milliseconds). To remove more than that
        is a waste, and counts as one: the last unit is one that fits, and parameters that are
        within their limit are spared.
        """
        sizes = [max(w, 1e-9) for w in self.costs.whole]
        limited = [math.isfinite(lim) for lim in self.limits]
        now: Cost = self.costs.cost_of(taken)
        loads = self._loads(taken, importance)
        best, best_score = None, math.inf
        for name in self.costs.names:
            if name in taken or self.costs.empties(name, taken):
                continue
            if self.costs.excludes(name, taken):
                continue
            then = self.costs.cost_of([*taken, name])
            saved = [t - n for t, n in zip(then, now, strict=True)]
            # What is saved of limited costs, and what of that is over the limits.
            whole = sum(v / w for v, w, lim in zip(saved, sizes, limited, strict=True) if lim)
            useful = sum(min(v, o) / w for v, o, w in zip(saved, over, sizes, strict=True))
            if useful <= 1e-12:
                continue
            load = loads.get(self.costs.kinds[name], 1.0)
            score = math.sqrt(importance.get(name, math.inf)) * load / useful * (whole / useful)
            if best is None or score < best_score:
                best, best_score = name, score
        return best

    def _loads(self, taken: list[str], importance: Mapping[str, float]) -> dict[str, float]:
        """Return, by kind of unit, how much more than their importance those that stay count.

        That is the share of all importance that the kind had in the whole net, over the share it has now.
        """
        before = self.work or self._shares(frozenset(), importance)
        now = self._shares(self.costs.gone(taken), importance)
        return {k: before.get(k, 0.0) / share for k, share in now.items() if share > 0}

    def _shares(self, gone: frozenset[str], importance: Mapping[str, float]) -> dict[str, float]:
        """Return the share of all importance that each kind of unit has, without those gone."""
        found: dict[str, float] = {}
        for name in self.costs.names:
            if name not in gone:
                kind = self.costs.kinds[name]
                found[kind] = found.get(kind, 0.0) + math.sqrt(importance.get(name, 0.0))
        whole = sum(found.values())
        return {k: v / whole for k, v in found.items()} if whole > 0 else {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "fading": {n: [f.start, f.end, f.scale] for n, f in self.fading.items()},
            "zero": list(self.zero),
            "work": dict(self.work),
            "limit_ms": None if math.isinf(self.limit_ms) else self.limit_ms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fading = {n: Fade(*f) for n, f in state["fading"].items()}
        self.zero = list(state["zero"])
        self.work = dict(state.get("work", {}))
        limit = state.get("limit_ms")
        self.limit_ms = math.inf if limit is None else limit
