"""What the user asks for: how large the compact net may be."""

import math
from dataclasses import dataclass

from .errors import BudgetError

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """Upper limits for the compact net, and a threshold for the scales.

    Args:
        macs: multiply-accumulates at batch size 1. A float in (0, 1] is a fraction of the net's
            own, an int the number itself.
        num_params: parameters, in the same way.
        threshold: every unit with ``|scale| <= threshold`` goes, whatever the other limits say.

    Raises:
        BudgetError: nothing is asked for, or a number makes no sense.
    """

    macs: float | int | None = None
    num_params: float | int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.macs is None and self.num_params is None and self.threshold is None:
            raise BudgetError(
                "A budget needs a limit: Budget(macs=0.5), Budget(num_params=200_000) or "
                "Budget(threshold=0.01)."
            )
        for name in ("macs", "num_params"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise BudgetError(f"{name}={value!r} is no number.")
            if isinstance(value, float) and not 0 < value <= 1:
                raise BudgetError(
                    f"{name}={value!r}: a float is a fraction of the net's own and lies in (0, 1]. "
                    f"For an absolute number give an int ({name}=40_000_000)."
                )
            if isinstance(value, int) and value < 1:
                raise BudgetError(f"{name}={value!r}: an absolute limit is at least 1.")
        if self.threshold is not None and not (
            math.isfinite(self.threshold) and self.threshold >= 0
        ):
            raise BudgetError(f"threshold={self.threshold!r}: give a number from 0 up.")

    def limits(self, macs: int, num_params: int) -> tuple[float, float]:
        """Return the absolute limits (infinite where there is none) for a net of this size."""
        return _limit(self.macs, macs), _limit(self.num_params, num_params)


def _limit(asked: float | int | None, whole: int) -> float:
    if asked is None:
        return math.inf
    return asked * whole if isinstance(asked, float) else float(asked)
