"""Fill the page's template with the numbers of a run folder."""

import io
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from resconv.errors import MissingExtraError
from resconv.files import write_text
from resconv.latency.table import LatencyTable
from resconv.planning.plan import Plan
from resconv.preprocessing import resized_side

from ..metrics import History, Metrics
from .table import epochs_note, rows

__all__ = ["write_report"]


def write_report(
    path: Path,
    config: Any,
    metrics: Metrics,
    plan: Plan,
    history: History,
    latency: LatencyTable | None = None,
) -> Path:
    """Write the page about a run to ``path``, and return it.

    ``latency`` is the run's table, where its target limits the latency.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        import matplotlib
    except ImportError as error:
        raise MissingExtraError(error.name or "jinja2", "report", "The report") from error
    matplotlib.use("Agg")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        files("resconv.run.report").joinpath("template.html").read_text(encoding="utf-8")
    )
    removed = metrics.removed_units or ()
    inputs = metrics.preprocessing
    units = _units(plan, removed, history, latency)
    page = template.render(
        config=config,
        metrics=metrics,
        rows=rows(metrics),
        epochs=epochs_note(metrics),
        resized=inputs and resized_side(inputs.size, inputs.crop_fraction),
        units=units,
        num_removed=len(removed),
        warnings=[text for texts in metrics.warnings.values() for text in texts],
        target=metrics.latency_target,
        plot=_plot(history, removed, latency),
    )
    write_text(path, page)
    return path


def _units(
    plan: Plan, gone: Sequence[str], history: History, latency: LatencyTable | None
) -> list[dict[str, Any]]:
    """Return the rows of the units; those inside of a removed one are removed, too."""
    removed, named = set(gone), set(plan.remove)
    controls = history.steps[-1].controls if history.steps else {}
    times = {} if latency is None else latency.unit_ms
    return [
        {
            "name": n,
            "scale": s,
            "control": controls.get(n),
            "ms": times.get(n),
            "removed": n in removed,
            "inside": n in removed and n not in named,
        }
        for n, s in plan.scales.items()
    ]


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _plot(history: History, removed: Sequence[str], latency: LatencyTable | None) -> str:
    """Draw the scales over training and, on the same steps below, what the zeros leave."""
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 5.6), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    steps = [s.step for s in history.steps]
    gone = set(removed)
    for name in history.steps[-1].scales if history.steps else ():
        values = [s.scales.get(name, math.nan) for s in history.steps]
        color, order = ("#c0392b", 2) if name in gone else ("#7f8c8d", 1)
        above.plot(steps, values, color=color, linewidth=1.1, alpha=0.8, zorder=order)
    above.plot([], [], color="#c0392b", label=f"removed ({len(gone)})")
    above.plot([], [], color="#7f8c8d", label="kept")
    above.set(ylabel="layer scaling factor s")
    above.set_ylim(bottom=0)
    macs = [100 * s.macs for s in history.steps]
    below.step(steps, macs, where="post", color="#2c3e50", label="MACs")
    times = [s.latency_ms for s in history.steps if s.latency_ms is not None]
    if latency is not None and latency.latency_ms > 0 and len(times) == len(steps):
        shares = [100 * t / latency.latency_ms for t in times]
        below.step(steps, shares, where="post", color="#2980b9", label="latency, predicted")
    below.set(xlabel="optimizer step", ylabel="left by the zeros (%)")
    below.set_ylim(0, 105)
    for axes in (above, below):
        axes.legend(frameon=False, loc="lower left")
        axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)
