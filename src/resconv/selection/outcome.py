"""What a sparse training run says of itself: the scales over time, and where it stands."""

from dataclasses import dataclass

from msgspec import Struct

__all__ = ["Outcome", "Snapshot"]


class Snapshot(Struct, frozen=True, forbid_unknown_fields=True):
    """The scales (and controls) after a step, and the share of MACs that the zeros leave.

    ``latency_ms`` is what the zeros are predicted to leave, where latency was measured.
    """

    step: int
    scales: dict[str, float]
    controls: dict[str, float]
    macs: float
    latency_ms: float | None = None


@dataclass(frozen=True)
class Outcome:
    """Where a run stands: ``str()`` of it is a sentence for the user.

    ``pending`` are units that the target needs and whose scale is not 0 yet.
    """

    step: int
    total_steps: int | None
    removed: tuple[str, ...]
    pending: tuple[str, ...]
    macs: int
    num_params: int
    latency_ms: float | None
    over: str

    @property
    def met(self) -> bool:
        """Whether the zeros alone meet the target (true without one)."""
        return not self.over

    def __str__(self) -> str:
        text = f"{len(self.removed)} scales are exactly 0 after {self.step:,} steps"
        if self.met:
            return text + "."
        of = "" if self.total_steps is None else f" of the {self.total_steps:,} announced"
        names = ", ".join(self.pending[:4]) + (", ..." if len(self.pending) > 4 else "")
        return (
            f"{text}{of}, which leaves {self.over}. {len(self.pending)} scales that should be 0 are "
            f"not ({names}). Train on to the announced number of steps; or go on with "
            "resconv.plan, which removes units whose scale is not 0 (the outputs change), then "
            "resconv.recalibrate and finetune."
        )
