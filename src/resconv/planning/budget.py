"""What the user asks for: how large or how slow the compact net may be."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import BudgetError

__all__ = ["RUNTIMES", "Budget", "Limits", "require_budget"]

RUNTIMES = ("torch", "onnxruntime")


class Limits(NamedTuple):
    """The most that may be left of each; infinite where there is no limit."""

    macs: float = math.inf
    num_params: float = math.inf
    latency_ms: float = math.inf

    def without_latency(self) -> "Limits":
        return self._replace(latency_ms=math.inf)


@dataclass(frozen=True)
class Budget:
    """Upper limits for the compact net, and a threshold for the scales. All limits hold together.

    Args:
        macs: multiply-accumulates at batch size 1. A float in (0, 1] is a fraction of the net's
            own, an int the number itself.
        num_params: parameters, in the same way.
        latency_ms: milliseconds of one forward pass on this machine, as a median. Always
            milliseconds, int or float.
        latency: the same as a share in (0, 1) of the dense net's latency, both with their norms
            folded. Give one of the two.
        runtime: what the latency is measured in, "torch" (eager, on the model's device) or
            "onnxruntime" (on the CPU).
        batch: images a forward pass, for the latency.
        threads: for the latency; None stands for torch's own number.
        threshold: every unit with ``|scale| <= threshold`` goes, whatever the other limits say.

    Raises:
        BudgetError: nothing is asked for, or numbers make no sense; all faults are named.

    Example:
        >>> resconv.Budget(macs=0.5).limits(macs=1000, num_params=200)
        Limits(macs=500.0, num_params=inf, latency_ms=inf)
    """

    macs: float | int | None = None
    num_params: float | int | None = None
    threshold: float | None = None
    latency_ms: float | int | None = None
    latency: float | None = None
    runtime: str = "torch"
    batch: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        faults = [*_size_faults(self), *_latency_faults(self)]
        limits = (self.macs, self.num_params, self.latency_ms, self.latency, self.threshold)
        if all(v is None for v in limits):
            faults.append(
                "A budget needs a limit: Budget(macs=0.5), Budget(num_params=200_000), "
                "Budget(latency_ms=8), Budget(latency=0.5) or Budget(threshold=0.01)"
            )
        if faults:
            raise BudgetError("; ".join(faults) + ".")

    @property
    def times(self) -> bool:
        """Whether there is a limit on the latency."""
        return self.latency_ms is not None or self.latency is not None

    @property
    def sizes(self) -> bool:
        """Whether there is any limit but the threshold."""
        return self.times or self.macs is not None or self.num_params is not None

    def limits(self, macs: int, num_params: int, latency_ms: float = math.inf) -> Limits:
        """Return the absolute limits (infinite where there is none) for a net of this size."""
        time = math.inf
        if self.latency_ms is not None:
            time = float(self.latency_ms)
        elif self.latency is not None:
            time = self.latency * latency_ms
        return Limits(_limit(self.macs, macs), _limit(self.num_params, num_params), time)


def require_budget(value: Any, name: str) -> None:
    """Raise where something else is given for a budget.

    Raises:
        BudgetError: it says which budget a bare number may stand for.
    """
    if isinstance(value, Budget):
        return
    share = value if _is_number(value) and 0 < value <= 1 else 0.5
    raise BudgetError(
        f"{name}={value!r} is a {type(value).__name__}, and does not say what it limits. Give a "
        f"Budget: Budget(macs={share!r}) for that share of the MACs, Budget(num_params=...) or "
        "Budget(latency_ms=...)."
    )


def _limit(asked: float | int | None, whole: int) -> float:
    if asked is None:
        return math.inf
    return asked * whole if isinstance(asked, float) else float(asked)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _size_faults(budget: Budget) -> list[str]:
    faults = []
    for name in ("macs", "num_params"):
        value = getattr(budget, name)
        if value is None:
            continue
        if not _is_number(value):
            faults.append(f"{name}={value!r} is no number")
        elif isinstance(value, float) and not 0 < value <= 1:
            faults.append(
                f"{name}={value!r}: a float is a fraction of the net's own and lies in (0, 1]; "
                f"for an absolute number give an int ({name}=40_000_000)"
            )
        elif isinstance(value, int) and value < 1:
            faults.append(f"{name}={value!r}: an absolute limit is at least 1")
    t: Any = budget.threshold
    if t is not None and not (_is_number(t) and math.isfinite(t) and t >= 0):
        faults.append(f"threshold={t!r}: give a number from 0 up")
    return faults


def _latency_faults(budget: Budget) -> list[str]:
    faults = []
    ms: Any = budget.latency_ms
    share: Any = budget.latency
    if ms is not None and not (_is_number(ms) and math.isfinite(ms) and ms > 0):
        faults.append(f"latency_ms={ms!r}: give milliseconds above 0")
    if share is not None and not (_is_number(share) and 0 < share < 1):
        faults.append(
            f"latency={share!r} is a share of the dense net's latency and lies in (0, 1); for "
            "milliseconds give latency_ms"
        )
    if ms is not None and share is not None:
        faults.append(
            f"latency_ms={ms!r} and latency={share!r} limit the same thing; give one of them"
        )
    if budget.runtime not in RUNTIMES:
        faults.append(f"runtime={budget.runtime!r}; choose {' or '.join(map(repr, RUNTIMES))}")
    for name in ("batch", "threads"):
        value = getattr(budget, name)
        optional = name == "threads"
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            faults.append(f"{name}={value!r}: give a whole number from 1 up")
    asked = budget.runtime != "torch" or budget.batch != 1 or budget.threads is not None
    if asked and ms is None and share is None:
        faults.append(
            "runtime, batch and threads say how a latency is measured, but no latency is limited; "
            "add latency_ms=8 or latency=0.5"
        )
    return faults
