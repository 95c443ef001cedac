"""The before/after table, for the terminal, the page and the docs."""

from ..metrics import Metrics

__all__ = ["epochs_note", "rows"]


def rows(metrics: Metrics) -> list[tuple[str, str, str, str]]:
    """Return (what, dense, compact, change) of everything a run has measured so far."""
    table: list[tuple[str, str, str, str]] = []
    dense = metrics.top1_dense
    for key, label in (
        ("top1_gated", "top-1 after sparse training (%)"),
        ("top1_pruned", "top-1 pruned, no retraining (%)"),
        ("top1_recalibrated", "top-1 with new BatchNorm statistics (%)"),
        ("top1_finetuned", "top-1 finetuned (%)"),
    ):
        value = getattr(metrics, key)
        if key == "top1_finetuned" and metrics.finetuned_kept is False:
            label = "top-1 finetuned, worse and not kept (%)"
        if value is not None and dense is None:
            table.append((label, "", f"{value:.2f}", ""))
        elif value is not None:
            table.append((label, f"{dense:.2f}", f"{value:.2f}", f"{value - dense:+.2f} points"))
    control, compact = metrics.top1_control, metrics.top1_compact
    if control is not None and compact is not None:
        label = f"top-1, dense net trained on for {metrics.epochs_control} epochs (%)"
        table.append(
            (label, f"{control:.2f}", f"{compact:.2f}", f"{compact - control:+.2f} points")
        )
    if metrics.epochs_sparse is not None:
        # A short dense training flatters the compact net, which was trained for longer.
        before = metrics.epochs_dense
        after = metrics.epochs_sparse + metrics.epochs_finetune
        cells = ("as given", f"{after} more")
        if before is not None:
            cells = (f"{before}", f"{before + after}")
        table.append(("epochs of training", *cells, ""))
    for key, label in (
        ("num_convs", "convolutions"),
        ("macs", "MACs"),
        ("num_params", "parameters"),
    ):
        before, after = getattr(metrics, f"{key}_dense"), getattr(metrics, f"{key}_compact")
        if before is not None and after is not None:
            table.append((label, f"{before:,}", f"{after:,}", _change(before, after)))
    for runtime, found in metrics.latency.items():
        table.append(
            (
                f"latency, {runtime} (ms)",
                f"{found.dense_ms:.3g}",
                f"{found.compact_ms:.3g}",
                f"{found.ratio:.2f}x",
            )
        )
    target = metrics.latency_target
    if target is not None:
        table.append(
            (
                f"latency of the target, {target.runtime}, batch {target.batch} (ms)",
                f"{target.dense_ms:.3g}",
                f"{target.compact_ms:.3g}",
                f"{target.compact_ms / target.dense_ms:.2f}x" if target.dense_ms else "",
            )
        )
    memory = metrics.peak_memory_bytes
    if memory is not None:
        before, after = memory.dense, memory.compact
        table.append(
            (
                "peak memory (KiB)",
                f"{before / 1024:,.0f}",
                f"{after / 1024:,.0f}",
                _change(before, after),
            )
        )
    return table


def epochs_note(metrics: Metrics) -> str:
    """Say how much longer the compact net was trained, where no control tells what that is worth; else empty."""
    more = (metrics.epochs_sparse or 0) + metrics.epochs_finetune
    if metrics.top1_control is not None or metrics.top1_dense is None or not more:
        return ""
    return (
        f"The compact net was trained for {more} epoch{'s' * (more != 1)} more than the dense net. What those alone "
        "are worth, --control tells: it trains the dense net on for as many."
    )


def _change(before: int, after: int) -> str:
    return f"{after / before - 1:+.1%}" if before else ""
