"""What ``metrics.json`` and ``scales.json`` hold."""

from typing import TypedDict

__all__ = ["Metrics", "Row"]

# A snapshot of the scales as it stands in scales.json: step, scales, controls, MACs, latency.
Row = tuple[int, dict[str, float], dict[str, float], float, float | None]


class Times(TypedDict):
    dense_ms: float
    compact_ms: float
    ratio: float


class Memory(TypedDict):
    dense: int
    compact: int


class Measured(TypedDict):
    batch: int
    threads: int
    repeats: int
    image_size: int


class Verified(TypedDict):
    max_abs_error: float
    max_rel_error: float
    tolerance: float


class Target(TypedDict):
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


class Exported(TypedDict):
    opset: int | None
    num_bytes: int
    dynamic_batch: bool
    max_rel_error: float


class Preprocessed(TypedDict):
    """How images become inputs (see resconv.preprocessing)."""

    size: int
    crop_fraction: float
    interpolation: str
    mean: list[float]
    std: list[float]
    channel_order: str | None
    class_names: list[str]


class Augmented(TypedDict):
    """How training images were changed at random (see resconv.data)."""

    kind: str
    pad: int
    least_area: float
    mirror: bool


class Metrics(TypedDict, total=False):
    """The figures of a run, each there once its stage has run; others may stand beside them."""

    preprocessing: Preprocessed
    augment: Augmented
    top1_dense: float | None
    top1_gated: float
    top1_pruned: float
    top1_recalibrated: float | None
    top1_finetuned: float | None
    top1_compact: float
    finetuned_kept: bool | None
    epochs_dense: int | None
    epochs_sparse: int
    epochs_finetune: int
    macs_dense: int
    macs_compact: int
    num_params_dense: int
    num_params_compact: int
    num_units: int
    num_zero: int
    num_convs_dense: int
    num_convs_compact: int
    removed_units: list[str]
    removed_with_nonzero_scale: list[str]
    leftover_factors: dict[str, float]
    verify: Verified
    verify_finetuned: float
    onnx: Exported | None
    warnings: dict[str, list[str]]
    latency: dict[str, Times]
    latency_target: Target
    peak_memory_bytes: Memory
    measured: Measured
    seconds: dict[str, float]
    machine: str
    date: str
