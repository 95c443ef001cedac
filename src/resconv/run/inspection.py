"""What a user can know of a trained net before any training for size: each unit's cost, and what a plan would leave."""

from itertools import islice
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace
from torch import nn

import resconv
from resconv.data import BatchLoader
from resconv.errors import MissingExtraError, RunError
from resconv.files import write_atomic
from resconv.latency.table import LatencyTable
from resconv.planning.budget import Budget
from resconv.planning.costs import cost_model
from resconv.planning.plan import Plan
from resconv.selection.sensitivity import Judged, judge, plan_untrained, sensitivity, without

from .config import Config
from .folder import RunFolder
from .job import Run
from .start import load_start, settled

__all__ = ["Inspected", "UnitCost", "draw", "inspect", "opened"]

_IMAGES = 512  # to judge by, where nothing else is asked for
_BATCH = 128
_UNITS = "layers,blocks"


class UnitCost(Struct, frozen=True):
    """A unit that can go: what leaves with it, and what its removal alone costs."""

    name: str
    kind: str
    macs: int
    num_params: int
    latency_ms: float
    loss: float
    top1: float


class Inspected(Struct, frozen=True):
    """A net and its units.

    Attributes:
        whole: of the net with all its units.
        units: those that can go; ``loss`` and ``top1`` are what removing each alone adds.
        plan: for the target, where there is one.
        planned, planned_ms: the net without the planned units, not trained any more.
        table: the milliseconds of the units.
    """

    macs: int
    num_params: int
    whole: Judged
    num_images: int
    units: tuple[UnitCost, ...]
    table: LatencyTable
    plan: Plan | None = None
    planned: Judged | None = None
    planned_ms: float | None = None


def opened(
    model: str, data: str | None, units: str | None, *, trust_source: bool = False, **settings: Any
) -> tuple[Run, nn.Module]:
    """Return a run, of which nothing is written, and its trained net: of a run folder, or of a net, weights and data.

    Raises:
        RunError: the net is not trained, so nobody can say what its units are worth.
        ResConvError: the net, the weights or the data cannot be loaded.
    """
    place = Path(model)
    if (place / "config.json").is_file():
        run = Run(RunFolder.open(place), trust_source=trust_source)
        if "dense" not in run.folder.done() or run.folder.metrics().top1_dense is None:
            raise RunError(
                f"{model} has no trained dense net: `resconv train --dense-only` makes one."
            )
        if units is not None:
            run.config = replace(run.config, target=replace(run.config.target, units=units))
        return run, run.dense()
    if data is None:
        raise RunError(f"{model}: to judge it takes images: --data digits, folder:PATH, ...")
    config = Config.of(model=model, data=data, units=units or _UNITS, **settings)
    run = Run(RunFolder(place), lambda text: None, None, config, trust_source=True)
    run.use(settled(run))
    net = run.create()
    start = load_start(run, net)
    if start.origin is None or start.new_head:
        what = "random weights" if start.origin is None else "a new head, which is not trained,"
        raise RunError(
            f"{model} has {what} so nobody can say what its units are worth. Give weights of these classes "
            "(--weights FILE), or train it and inspect that run: resconv train --dense-only ... --out RUN, resconv "
            "inspect RUN."
        )
    return run, net.eval()


def inspect(run: Run, net: nn.Module, budget: Budget | None, runtime: str) -> Inspected:
    """Measure and judge each unit of a trained net, and plan for the budget, where there is one."""
    data = run.data
    gated = run.converted(net, "keep").eval()
    loader = BatchLoader(data.val, _BATCH, data.preprocessing, num_workers=0)
    most = run.config.data.limit or _IMAGES
    batches = list(islice(loader, -(-most // _BATCH)))
    whole = judge(gated, batches)
    each = sensitivity(gated, batches)
    example = run.example()
    timed = Budget(latency=0.5, runtime=runtime) if budget is None or not budget.times else budget
    table = resconv.measure_latency(gated, example, timed)
    costs = cost_model(gated, example).with_latency(table.latency_ms, table.unit_ms)
    kinds = {u.name: u for u in resconv.units(net, example, run.config.target.units) if u.removable}
    added = {n: j.loss - whole.loss for n, j in each.items()}
    found = tuple(
        UnitCost(
            name=n,
            kind=kinds[n].kind,
            macs=kinds[n].macs,
            num_params=kinds[n].num_params,
            latency_ms=costs.cost_of([n]).latency_ms,
            loss=added[n],
            top1=j.top1 - whole.top1,
        )
        for n, j in each.items()
        if n in kinds
    )
    plan = planned = ms = None
    if budget is not None:
        plan = plan_untrained(gated, budget, costs, table if budget.times else None, added)
        with without(gated, plan.remove):
            planned = judge(gated, batches)
        ms = costs.left(plan.remove).latency_ms
    count = sum(len(labels) for _, labels in batches)
    return Inspected(costs.macs, costs.num_params, whole, count, found, table, plan, planned, ms)


def draw(found: Inspected, path: Path) -> None:
    """Draw what the units save and cost into an .svg or .png file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "A plot") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    units, planned = found.units, set(found.plan.remove if found.plan else ())
    height = 1.2 + 0.22 * max(1, len(units))
    figure, axes = pyplot.subplots(1, 3, figsize=(10, height), sharey=True, layout="constrained")
    places = range(len(units))
    colors = ["#c0392b" if u.name in planned else "#2c3e50" for u in units]
    for one, values, label in zip(
        axes,
        (
            [100 * u.macs / max(1, found.macs) for u in units],
            [u.latency_ms for u in units],
            [u.loss for u in units],
        ),
        ("MACs saved (%)", f"ms saved ({found.table.runtime})", "loss added by its removal alone"),
        strict=True,
    ):
        one.barh(places, values, color=colors)
        one.set_xlabel(label)
        one.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(places, [u.name for u in units], fontsize=7)
    axes[0].invert_yaxis()
    if planned:
        figure.suptitle("red: what the plan would remove", fontsize=9)
    write_atomic(path, lambda file: figure.savefig(file, format=path.suffix[1:]))
    pyplot.close(figure)
