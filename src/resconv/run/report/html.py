"""Fill the page's template with the numbers of a run folder."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from resconv.errors import MissingExtraError
from resconv.files import write_text
from resconv.latency.table import LatencyTable
from resconv.planning.plan import Plan
from resconv.preprocessing import resized_side

from ..config import Config
from ..metrics import History, Metrics
from . import charts
from .gathering import Epoch, Nets, command_of, epochs_of, versions
from .layers import drawn
from .table import epochs_note, rows
from .words import cards, name_of, next_steps

__all__ = ["render", "write_report"]

_MOST_CLASSES = 20


def write_report(
    path: Path,
    config: Config,
    metrics: Metrics,
    plan: Plan,
    history: History,
    latency: LatencyTable | None = None,
    nets: Nets | None = None,
) -> Path:
    """Write the page about a run to ``path``, in the run's folder, and return it.

    ``latency`` is the run's table, where its target limits the latency; ``nets`` are what its nets
    show of themselves.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    removed = metrics.removed_units or ()
    inputs = metrics.preprocessing
    epochs = epochs_of(path.parent / "logs")
    judgement = None if nets is None else nets.judgement
    page = render(
        "template.html",
        config=config,
        data_name=name_of(config.data.source),
        metrics=metrics,
        cards=cards(metrics, None if judgement is None else judgement.num_images),
        rows=rows(metrics),
        epochs=epochs_note(metrics),
        resized=inputs and resized_side(inputs.size, inputs.crop_fraction),
        units=_units(plan, removed, history, latency),
        num_removed=len(removed),
        warnings=[text for texts in metrics.warnings.values() for text in texts],
        target=metrics.latency_target,
        nets=nets,
        groups=drawn(nets.layers) if nets else (),
        judgement=judgement,
        classes=_classes(nets),
        plots=[p for p in _plots(metrics, history, removed, epochs, latency) if p[1]],
        latency_bars=_latency_bars(metrics),
        folder=str(path.parent),
        command=command_of(config, path.parent),
        versions=versions(),
        steps=next_steps(metrics, str(path.parent)),
    )
    write_text(path, page)
    return path


def render(template: str, **values: Any) -> str:
    """Return a page made from one of the templates beside this file.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError(error.name or "jinja2", "report", "The report") from error

    def load(name: str) -> str:
        return files("resconv.run.report").joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


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


def _classes(nets: Nets | None) -> list[Any]:
    """Return the classes that lost most, first; of many classes some alone."""
    if nets is None:
        return []
    every = list(nets.judgement.classes)
    if len(every) <= _MOST_CLASSES:
        return every
    return sorted(every, key=lambda c: c.compact - (c.dense or 0))[:_MOST_CLASSES]


def _plots(
    metrics: Metrics,
    history: History,
    removed: Sequence[str],
    epochs: Sequence[Epoch],
    latency: LatencyTable | None,
) -> list[tuple[str, str]]:
    """Return (caption, SVG) of what happened during training."""
    starts = [
        (e.number, e.stage)
        for i, e in enumerate(epochs)
        if i == 0 or epochs[i - 1].stage != e.stage
    ]
    found = [
        (
            "Top-1 on the validation images after every epoch (%)",
            charts.lines(
                "Accuracy over training",
                [charts.Line("top-1 (%)", "line-main", [(e.number, e.top1) for e in epochs])],
                "epoch",
                starts,
            ),
        )
    ]
    left = [charts.Line("MACs (%)", "line-main", [(s.step, 100 * s.macs) for s in history.steps])]
    if latency is not None and latency.latency_ms > 0:
        points = [
            (s.step, 100 * s.latency_ms / latency.latency_ms)
            for s in history.steps
            if s.latency_ms is not None
        ]
        left.append(charts.Line("latency, predicted (%)", "line-other", points))
    found.append(
        (
            "What the scales that are 0 leave of the MACs"
            + (" (and dashed, of the predicted latency)" if len(left) > 1 else "")
            + ", over sparse training (%)",
            charts.lines("MACs over sparse training", left, "optimizer step", y=(0, 105)),
        )
    )
    gone = set(removed)
    scales = [
        charts.Line(
            name,
            "line-gone" if name in gone else "line-kept",
            [(s.step, s.scales[name]) for s in history.steps if name in s.scales],
        )
        for name in (history.steps[-1].scales if history.steps else ())
    ]
    scales.sort(key=lambda line: line.kind, reverse=True)  # removed ones lie on top
    most = max((y for line in scales for _, y in line.points), default=1.0)
    found.append(
        (
            f"The scale of every unit over sparse training: {len(gone)} removed (red), the rest kept",
            charts.lines(
                "Scales over sparse training", scales, "optimizer step", y=(0, max(most, 0.1))
            ),
        )
    )
    return found


def _latency_bars(metrics: Metrics) -> list[tuple[str, str]]:
    """Return (runtime, SVG): each runtime has its own scale of milliseconds."""
    found = []
    for runtime, times in metrics.latency.items():
        found.append(
            (
                runtime,
                charts.bars(
                    f"Latency in {runtime}",
                    [
                        ("dense", times.dense_ms, f"{times.dense_ms:.3g} ms", "bar-before"),
                        ("compact", times.compact_ms, f"{times.compact_ms:.3g} ms", "bar-after"),
                    ],
                    max(times.dense_ms, times.compact_ms),
                ),
            )
        )
    return found
