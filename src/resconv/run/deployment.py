"""The stages that deploy: the file for another runtime, timings of it, and the report."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch
from torch import nn

import resconv
from resconv.errors import (
    ExportError,
    MissingExtraError,
    ResConvError,
    RunError,
    VerificationError,
)
from resconv.latency.table import LatencyTable, time_nets
from resconv.latency.timing import machine, onnx_runner, peak_memory, time_together, torch_runner

from .job import INT8_FILES, LATENCY, Run
from .metrics import Exported, History, Measured, Memory, Target, Times
from .report import nets_of, write_card, write_report
from .surgery import compact_of, removed_units
from .timing import latency_table

__all__ = ["export", "measure", "report"]

T = TypeVar("T")
_CARD = "README.md"


def export(run: Run) -> None:
    path = run.folder / "model.onnx"
    run.folder.remove(("model.onnx", "model.onnx.data", *INT8_FILES))  # of another net, perhaps
    compact = compact_of(run)
    try:
        done = resconv.export(compact, path, run.example(), plan=run.plan())
    except (MissingExtraError, ExportError, VerificationError) as error:
        # The net itself is saved: that it has no other form is no reason to stop here.
        run.folder.add_metrics(onnx=None)
        run.warn("export", f"No ONNX file: {error}")
        return
    run.folder.add_metrics(
        onnx=Exported(
            done.opset, done.num_bytes, done.dynamic_batch, done.verification.max_rel_error
        )
    )
    run.say(
        f"Exported: {done.path} (opset {done.opset}, checked in ONNX Runtime, error "
        f"{done.verification.max_rel_error:.1e})."
    )


def _against_target(run: Run, dense: nn.Module, compact: nn.Module) -> Target:
    """Time the two nets as the target says, and return all that is to be known about it."""
    budget, plan, table = run.config.budget(), run.plan(), latency_table(run, run.gated())
    assert table is not None  # the budget limits the latency
    before, after = time_nets([dense, compact], run.example(), table)
    limit = budget.limits(0, 0, before.median_ms).latency_ms
    found = Target(
        asked_ms=budget.latency_ms,
        asked_share=budget.latency,
        limit_ms=limit,
        runtime=table.runtime,
        batch=table.batch,
        threads=table.threads,
        predicted_ms=plan.latency_ms_predicted,
        planned_ms=plan.latency_ms_after,
        dense_ms=before.median_ms,
        compact_ms=after.median_ms,
        repeats=after.repeats,
        met=after.median_ms <= limit,
        table_error=table.error,
        nets_timed=len(table.nets),
    )
    text = (
        f"Target: at most {limit:.3g} ms in {table.runtime}; the net takes {after.median_ms:.3g} ms"
    )
    if found.met:
        run.say(f"{text}.")
    else:
        run.warn(
            "measure",
            f"{text}, which is over it now: the machine is slower than when it was planned, or "
            "busy. Measure again: resconv measure.",
        )
    return found


def _onnx_runners(run: Run, dense: nn.Module) -> dict[str, Any]:
    """Return the two nets in ONNX Runtime, or nothing where one of them does not get there."""
    example, threads = run.example(), torch.get_num_threads()
    other = run.folder / "dense.onnx"
    try:
        resconv.export(dense, other, example)
        return {
            "onnxruntime/dense": onnx_runner(other, example, threads),
            "onnxruntime/compact": onnx_runner(run.folder / "model.onnx", example, threads),
        }
    except (MissingExtraError, ExportError, VerificationError) as error:
        run.warn("measure", f"Not measured in ONNX Runtime: {error}")
        return {}


def measure(run: Run) -> None:
    config = run.config
    example = run.example()
    compact = compact_of(run)
    # The same deployment form on both sides: norms folded.
    dense = resconv.fuse(run.dense(), example, fold_norms=True)
    runners = {
        "torch/dense": torch_runner(dense, example),
        "torch/compact": torch_runner(compact, example),
    }
    if (run.folder / "model.onnx").is_file():
        runners |= _onnx_runners(run, dense)
    timings = time_together(runners, repeats=50, warmup=5)
    latency = {}
    for runtime in dict.fromkeys(name.split("/")[0] for name in timings):
        before, after = (timings[f"{runtime}/{w}"].median_ms for w in ("dense", "compact"))
        latency[runtime] = Times(before, after, after / before)
    run.folder.add_metrics(
        latency=latency,
        peak_memory_bytes=Memory(peak_memory(dense, example), peak_memory(compact, example)),
        measured=Measured(1, torch.get_num_threads(), 50, run.data.image_size),
    )
    if config.budget().times:
        run.folder.add_metrics(latency_target=_against_target(run, dense, compact))
    text = ", ".join(f"{k} {v.dense_ms:.2f} -> {v.compact_ms:.2f} ms" for k, v in latency.items())
    run.say(f"Latency (batch 1, medians, interleaved): {text}.")


def _optional(run: Run, what: str, read: Callable[[], T]) -> T | None:
    """Return what a file holds that the report can do without, or say what it lacks."""
    try:
        return read()
    except ResConvError as error:
        run.say(f"The report has no {what}: {error}")
        return None


def report(run: Run) -> None:
    run.folder.add_metrics(machine=machine(), date=datetime.now(UTC).strftime("%Y-%m-%d"))
    if run.folder.metrics().verify is None:
        raise RunError(
            f"{run.folder / 'metrics.json'} lacks what pruning found. Make it anew: resconv prune "
            f"{run.folder.path}."
        )
    if run.folder.metrics().removed_units is None:  # a run of an older version
        run.folder.add_metrics(removed_units=removed_units(run, run.gated(), run.plan()))
    _write_card(run)
    table = run.folder / LATENCY
    try:
        path = write_report(
            run.folder / "report.html",
            run.config,
            run.folder.metrics(),
            run.plan(),
            _optional(run, "plot of the scales", run.folder.history) or History(()),
            _optional(run, "latency of single units", lambda: LatencyTable.load(table))
            if run.config.budget().times
            else None,
            _optional(run, "drawing of the net", lambda: nets_of(run)),
        )
    except MissingExtraError as error:
        run.warn("report", f"No report: {error}")
        return
    run.say(f"Report: {path}")


def _write_card(run: Run) -> None:
    """Write the card of the net, which stays when the net is made anew and its licence was filled in."""
    try:
        run.folder.claim((_CARD,))
    except RunError as error:
        run.say(f"No model card: {error}")
        return
    if not write_card(run.folder / _CARD, run.config, run.folder.metrics()):
        run.say(f"{run.folder / _CARD} was filled in and stays as it is; its figures may be older.")
