"""Several runs side by side: which of them no other one beats."""

import math
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from resconv.errors import RunError
from resconv.files import write_text

from ..folder import RunFolder
from ..metrics import Metrics
from . import charts
from .html import render
from .words import runtime_of

__all__ = ["Compared", "Comparison", "compare_runs", "write_comparison"]


class Compared(Struct, frozen=True):
    """A net of a run; figures that the run did not measure are None.

    Attributes:
        name: the run's folder (its whole path where two are called the same), with "(dense)" behind
            it where it is the net that the run began with.
        cost: what the front is about: milliseconds, or MACs.
        on_front: whether no other net costs as little and is right as often.
    """

    name: str
    model: str
    data: str
    is_dense: bool
    top1: float
    epochs: int | None
    macs: int | None
    num_params: int | None
    latency_ms: float | None
    cost: float
    on_front: bool = False


class Comparison(Struct, frozen=True):
    """The nets of several runs.

    Attributes:
        nets: of each run the compact net, and the dense one where it was trained.
        cost: what the costs are, such as "onnxruntime (ms)".
        notes: why figures may not be comparable.
    """

    nets: tuple[Compared, ...]
    cost: str
    notes: tuple[str, ...] = ()


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Read the figures of finished runs.

    Latencies are compared where every run measured the same runtime, else MACs.

    Raises:
        RunError: fewer than two runs, the same one twice, or one that is not finished.
    """
    if len(paths) < 2:
        raise RunError("Two runs or more are compared: give their folders.")
    if len({p.resolve() for p in paths}) < len(paths):
        raise RunError("The same run is given twice.")
    folders = [RunFolder.open(path) for path in paths]
    figures = [folder.metrics() for folder in folders]
    for path, metrics in zip(paths, figures, strict=True):
        if metrics.top1_compact is None or metrics.macs_compact is None:
            raise RunError(f"{path} has no compact net yet: the run is not finished.")
    runtime = _common_runtime(figures)
    nets = []
    short = [path.name for path in paths]
    for path, folder, metrics in zip(paths, folders, figures, strict=True):
        config = folder.config()
        name = path.name if short.count(path.name) == 1 else str(path)
        of = (name, config.net.model, config.data.source)
        nets += _nets(of, metrics, runtime)
    better = [
        net for net in nets if not any(_beats(other, net) for other in nets if other is not net)
    ]
    marked = tuple(replace(net, on_front=net in better) for net in nets)
    cost = "MACs" if runtime is None else f"latency, {runtime} (ms)"
    return Comparison(marked, cost, tuple(_notes(figures, nets, runtime)))


def _common_runtime(figures: Sequence[Metrics]) -> str | None:
    common = set.intersection(*(set(m.latency) for m in figures))
    first = runtime_of(figures[0])
    return first if first in common else min(common, default=None)


def _nets(of: tuple[str, str, str], metrics: Metrics, runtime: str | None) -> list[Compared]:
    name, model, data = of
    times = None if runtime is None else metrics.latency[runtime]
    more = (metrics.epochs_sparse or 0) + metrics.epochs_finetune
    own = metrics.epochs_dense
    found = []
    for is_dense in (True, False):
        top1 = metrics.top1_dense if is_dense else metrics.top1_compact
        macs = metrics.macs_dense if is_dense else metrics.macs_compact
        ms = None
        if times is not None:
            ms = times.dense_ms if is_dense else times.compact_ms
        if top1 is None:
            continue
        found.append(
            Compared(
                f"{name} (dense)" if is_dense else name,
                model,
                data,
                is_dense,
                top1,
                own if is_dense else (own or 0) + more,
                macs,
                metrics.num_params_dense if is_dense else metrics.num_params_compact,
                ms,
                ms if ms is not None else float(macs if macs is not None else math.inf),
            )
        )
    return found


def _beats(one: Compared, other: Compared) -> bool:
    """Whether ``one`` is nowhere worse and somewhere better."""
    as_good = one.cost <= other.cost and one.top1 >= other.top1
    return as_good and (one.cost, one.top1) != (other.cost, other.top1)


def _notes(figures: Sequence[Metrics], nets: Sequence[Compared], runtime: str | None) -> list[str]:
    notes = []
    if len({n.data for n in nets}) > 1:
        notes.append("The runs are of different data, so their accuracies do not compare.")
    if len({m.measured.image_size for m in figures if m.measured}) > 1:
        notes.append("The runs read images of different sizes.")
    if runtime is not None and len({m.machine for m in figures}) > 1:
        notes.append("Latencies were measured on different machines or versions of torch.")
    setups = {(m.measured.batch, m.measured.threads) for m in figures if m.measured}
    if runtime is not None and len(setups) > 1:
        notes.append("Latencies were measured with different batch sizes or numbers of threads.")
    if len({n.epochs for n in nets if not n.is_dense}) > 1:
        notes.append("The compact nets were trained for different numbers of epochs.")
    return notes


def write_comparison(path: Path, comparison: Comparison) -> Path:
    """Write a page with a table and the Pareto front to ``path``, and return it.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    nets = comparison.nets
    # Runs that began with one dense net have one point of it.
    points = {
        (net.cost, net.top1): (
            net.cost,
            net.top1,
            net.name,
            "dot-front" if net.on_front else "dot-dense" if net.is_dense else "dot",
        )
        for net in reversed(nets)
    }
    front = [(net.cost, net.top1) for net in nets if net.on_front]
    title = f"Top-1 (%) against {comparison.cost}"
    chart = charts.scatter(title, list(points.values()), comparison.cost, front)
    write_text(path, render("comparison.html", comparison=comparison, chart=chart, title=title))
    return path
