"""What a run was asked to do."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from resconv.errors import RunError
from resconv.planning.budget import Budget
from resconv.train.mixing import check_mix

__all__ = ["Config"]

_EPOCHS = {"digits": (12, 10, 0)}
_DEFAULT_EPOCHS = (30, 20, 10)
# These change how a run is carried out, not what comes out of it.
_FREE = {"progress", "devices", "cuda_graphs"}
# These are read after pruning alone, which trains nothing.
_LATE = {"finetune_epochs", "finetune_lr"}


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
    hints: bool = False
    mix: str | None = None
    recalibrate: bool | None = None  # None: where a unit goes whose scale is not 0
    units: str = "all"
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
        for key in ("epochs", "sparse_epochs", "finetune_epochs"):
            value = getattr(self, key)
            least = 1 if key == "sparse_epochs" else 0
            if value is not None and value < least:
                raise RunError(f"{key}={value}: at least {least}.")
        if self.from_random and self.distill:
            raise RunError(
                "distill=True with epochs=0: there is no dense net to learn from. Give its weights, or "
                "epochs to train it."
            )
        if self.hints and not self.distill:
            raise RunError(
                "hints=True is about what the dense net shows as a teacher: add distill=True."
            )
        if self.mix is not None:
            check_mix(self.mix)
        for key in ("lr", "sparse_lr", "finetune_lr", "batch_size"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise RunError(f"{key}={value}: it must be above 0.")
        asked = self.runtime != "torch" or self.latency_batch != 1 or self.threads is not None
        if self._has_target() or asked:
            self._budget()

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

    def _has_target(self) -> bool:
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
        if not self._has_target():
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
