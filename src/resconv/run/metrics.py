"""What ``metrics.json`` and ``scales.json`` hold."""

from typing import Any

from msgspec import Struct

from resconv.selection.outcome import Snapshot

__all__ = ["HISTORY_UPGRADES", "METRICS_VERSION", "History", "Metrics"]

METRICS_VERSION = 1  # a file without a number is of this version, too


class _Part(Struct, frozen=True, forbid_unknown_fields=True):
    """A group of figures."""


class Times(_Part, frozen=True):
    dense_ms: float
    compact_ms: float
    ratio: float


class Memory(_Part, frozen=True):
    dense: int
    compact: int


class Measured(_Part, frozen=True):
    batch: int
    threads: int
    repeats: int
    image_size: int


class Verified(_Part, frozen=True):
    max_abs_error: float
    max_rel_error: float
    tolerance: float


class Target(_Part, frozen=True):
    """The latency that was asked for, and what came of it."""

    asked_ms: float | None
    asked_share: float | None
    limit_ms: float
    runtime: str
    batch: int
    threads: int
    predicted_ms: float | None
    planned_ms: float | None
    dense_ms: float
    compact_ms: float
    repeats: int
    met: bool
    table_error: float
    nets_timed: int


class Exported(_Part, frozen=True):
    opset: int | None
    num_bytes: int
    dynamic_batch: bool
    max_rel_error: float


class Int8(_Part, frozen=True):
    """The file in 8 bits beside the float file: both judged on the run's test images, and timed in turn."""

    file: str
    num_bytes: int
    num_bytes_float: int
    top1: float
    top1_float: float
    latency_ms: float
    latency_ms_float: float
    threads: int
    num_calibration: int
    num_layers: int
    num_quantised: int


class Preprocessed(_Part, frozen=True):
    """How images become inputs (see resconv.preprocessing)."""

    size: int
    crop_fraction: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: str | None
    class_names: tuple[str, ...]


class Augmented(_Part, frozen=True):
    """How training images were changed at random (see resconv.data)."""

    kind: str
    pad: int
    least_area: float
    mirror: bool


class Metrics(Struct, frozen=True, forbid_unknown_fields=True):
    """The figures of a run; None until its stage has run."""

    preprocessing: Preprocessed | None = None
    augment: Augmented | None = None
    top1_dense: float | None = None
    top1_gated: float | None = None
    top1_pruned: float | None = None
    top1_recalibrated: float | None = None
    top1_finetuned: float | None = None
    top1_compact: float | None = None
    top1_control: float | None = None
    finetuned_kept: bool | None = None
    epochs_dense: int | None = None
    epochs_sparse: int | None = None
    epochs_finetune: int = 0
    epochs_control: int | None = None
    macs_dense: int | None = None
    macs_compact: int | None = None
    num_params_dense: int | None = None
    num_params_compact: int | None = None
    num_units: int | None = None
    num_zero: int | None = None
    num_convs_dense: int | None = None
    num_convs_compact: int | None = None
    removed_units: tuple[str, ...] | None = None
    removed_with_nonzero_scale: tuple[str, ...] | None = None
    leftover_factors: dict[str, float] | None = None
    verify: Verified | None = None
    verify_finetuned: float | None = None
    onnx: Exported | None = None
    int8: Int8 | None = None
    warnings: dict[str, list[str]] = {}
    latency: dict[str, Times] = {}
    latency_target: Target | None = None
    peak_memory_bytes: Memory | None = None
    measured: Measured | None = None
    seconds: dict[str, float] = {}
    machine: str = ""
    date: str = ""


class History(Struct, frozen=True, forbid_unknown_fields=True):
    """The scales over sparse training."""

    steps: tuple[Snapshot, ...]


def _named(rows: Any) -> Any:
    """Version 1 was a list of rows without names."""
    names = Snapshot.__struct_fields__
    if not isinstance(rows, list):
        return rows
    return {
        "steps": [
            dict(zip(names, row, strict=False)) if isinstance(row, list) else row for row in rows
        ]
    }


HISTORY_UPGRADES = (_named,)
