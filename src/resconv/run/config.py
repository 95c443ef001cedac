"""What a run was asked to do."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from resconv.errors import BudgetError, RunError
from resconv.planning.budget import Budget
from resconv.train.mixing import check_mix
from resconv.train.precision import PRECISIONS

__all__ = ["Config"]

_EPOCHS = {"digits": (12, 10, 0)}
_DEFAULT_EPOCHS = (30, 20, 10)
# These change how a run is carried out, not what comes out of it.
_FREE = {"progress", "devices", "cuda_graphs"}
# These are read after pruning alone, which trains nothing.
_LATE = {"finetune_epochs", "finetune_lr"}
_LEAST = {
    **dict.fromkeys(("epochs", "finetune_epochs", "seed"), 0),
    **dict.fromkeys(("sparse_epochs", "batch_size", "image_size", "limit"), 1),
    **dict.fromkeys(("latency_batch", "threads"), 1),
}
_UNITS = ("layers", "blocks", "summands", "segments", "gates")


@dataclass(frozen=True)
class Config:
    """All settings of a run; JSON in ``config.json``. None means: the default for the data."""

    model: str
    data: str
    macs: float | int | None = None
    num_params: float | int | None = None
    latency_ms: float | None = None
    latency: float | None = None
    runtime: str = "torch"
    latency_batch: int = 1
    threads: int | None = None
    weights: str | None = None
    epochs: int | None = None
    sparse_epochs: int | None = None
    finetune_epochs: int | None = None
    distill: bool = False
    distill_share: float = 0.5  # of the loss, where there is a teacher
    hints: bool = False
    mix: str | None = None
    recalibrate: bool | None = None  # None: where a unit goes whose scale is not 0
    units: str = "layers,blocks"
    lr: float = 0.1
    sparse_lr: float | None = None
    finetune_lr: float | None = None
    batch_size: int = 128
    seed: int = 0
    image_size: int | None = None
    channels: int | None = None
    holdout: float = 0.0  # the share of every class of train that is judged by, in place of val
    limit: int | None = None
    precision: str = "auto"
    devices: int | str = "auto"
    cuda_graphs: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        faults = [*self._number_faults(), *self._choice_faults()]
        if faults:
            raise RunError("; ".join(faults) + ".")
        if self.from_random and self.distill:
            raise RunError(
                "distill=True with epochs=0: there is no dense net to learn from. Give its weights, or "
                "more epochs to train it."
            )
        if self.hints and not self.distill:
            raise RunError(
                "hints=True is about what the dense net shows as a teacher: add distill=True."
            )
        if self.mix is not None:
            check_mix(self.mix)
        asked = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name in ("runtime", "latency_batch", "threads")
            and getattr(self, f.name) != f.default
        ]
        if asked and self.latency is None and self.latency_ms is None:
            raise BudgetError(
                f"{' and '.join(asked)} says how a latency is measured, but no latency is limited; add "
                "latency_ms=8 or latency=0.5."
            )
        if self.has_target():
            self._budget()

    def _number_faults(self) -> list[str]:
        """Return what is out of range, in words; a comparison with NaN is false."""
        faults = []
        for key, least in _LEAST.items():
            value = getattr(self, key)
            if value is not None and value < least:
                faults.append(f"{key}={value}: at least {least}")
        for key in ("lr", "sparse_lr", "finetune_lr"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                faults.append(f"{key}={value}: it must be above 0, and finite")
        if not 0 <= self.holdout < 1:
            faults.append(f"holdout={self.holdout}: a share from 0 to below 1")
        if not 0 < self.distill_share <= 1:
            faults.append(f"distill_share={self.distill_share}: a share above 0, up to 1")
        if self.seed >= 2**32:
            faults.append(f"seed={self.seed}: below {2**32}")
        return faults

    def _choice_faults(self) -> list[str]:
        faults = []
        if self.channels not in (None, 1, 3):
            faults.append(f"channels={self.channels}: images are grey (1) or RGB (3)")
        asked = [name.strip() for name in self.units.split(",")]
        if self.units != "all" and not set(asked) <= set(_UNITS):
            faults.append(
                f"units={self.units!r}: choose among {', '.join(_UNITS)} (several with commas between), "
                "or all"
            )
        if self.precision not in PRECISIONS:
            faults.append(f"precision={self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        return faults

    @property
    def from_random(self) -> bool:
        """Whether sparse training starts from random weights, with no dense net before it."""
        return self.weights is None and self.epochs == 0

    def sparse_rate(self) -> float:
        """Return the peak learning rate of sparse training."""
        if self.sparse_lr is not None:
            return self.sparse_lr
        return self.lr if self.from_random else self.lr / 2

    def finetune_rate(self) -> float:
        """Return the peak learning rate of finetuning."""
        return self.sparse_rate() / 2 if self.finetune_lr is None else self.finetune_lr

    def has_target(self) -> bool:
        limits = (self.macs, self.num_params, self.latency_ms, self.latency)
        return any(v is not None for v in limits)

    def _budget(self) -> Budget:
        return Budget(
            macs=self.macs,
            num_params=self.num_params,
            latency_ms=self.latency_ms,
            latency=self.latency,
            runtime=self.runtime,
            batch=self.latency_batch,
            threads=self.threads,
        )

    def budget(self) -> Budget:
        """Return the target.

        Raises:
            RunError: none was given.
        """
        if not self.has_target():
            raise RunError(
                "Nothing is asked for: give --macs 0.5 (half the MACs), --params 0.5, "
                "--latency-ms 8 or --latency 0.5 (of the dense net's)."
            )
        return self._budget()

    def stage_epochs(self) -> tuple[int, int, int]:
        """Return the epochs of dense, sparse and finetuning."""
        default = _EPOCHS.get(self.data, _DEFAULT_EPOCHS)
        asked = (self.epochs, self.sparse_epochs, self.finetune_epochs)
        dense, sparse, fine = (d if a is None else a for a, d in zip(asked, default, strict=True))
        return dense, sparse, fine

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def bearing(self) -> dict[str, Any]:
        """Return the settings that bear on training and planning."""
        return {k: v for k, v in self.to_dict().items() if k not in _FREE | _LATE}

    def differences(self, other: "Config", *, late: bool = False) -> list[str]:
        """Return in words which settings differ that bear on training and planning.

        With ``late``, those that finetuning alone depends on.
        """
        bearing = _LATE if late else {f.name for f in fields(self)} - _FREE - _LATE
        return [
            f"{f.name}: {getattr(self, f.name)!r} there, {getattr(other, f.name)!r} now"
            for f in fields(self)
            if f.name in bearing and getattr(self, f.name) != getattr(other, f.name)
        ]
