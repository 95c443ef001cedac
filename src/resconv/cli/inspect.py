"""``resconv inspect``: what could go and what that costs, without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resconv.errors import printable

from .options import ImageSize, TrustSource, example_for, show_json
from .stopping import Stoppable

if TYPE_CHECKING:
    from resconv.run.inspection import Inspected

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv inspect resnet56

  resconv inspect timm:mobilenetv3_small_100 --units all --macs 0.5

  resconv inspect runs/dense --macs 0.5 --plot units.svg

  resconv inspect timm:resnet18 --data folder:photos --weights mine.safetensors --runtime onnxruntime

  resconv inspect my_package.nets:build --image-size 96 --json
"""
_WIDTH = 80


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Stoppable)(inspect)


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="resnet20, timm:NAME, torchvision:NAME, package.module:factory, or a run folder."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to judge the units by (digits, folder:PATH, ...); of a run its own."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Trained weights (.safetensors, .pt).")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Take the zoo's own.")] = False,
    image_size: ImageSize = None,
    holdout: Annotated[
        float, typer.Option(help="Judge by this share of train, in place of a val split.")
    ] = 0.0,
    limit: Annotated[
        int | None, typer.Option(help="Judge by this many images; default: 512.", min=1)
    ] = None,
    units: Annotated[
        str | None,
        typer.Option(
            help="Kinds to look for: layers, blocks, summands, segments, gates (several with commas "
            "between), or all; default: layers,blocks, of a run its own."
        ),
    ] = None,
    macs: Annotated[
        str | None, typer.Option(help="Show the plan for this target, untrained: 0.5, 50% or 20M.")
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="The same for the parameters: 0.5, 50% or 200k.")
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="What milliseconds are measured in: torch or onnxruntime.")
    ] = "torch",
    plot: Annotated[
        Path | None, typer.Option(help="Draw the units into this .svg or .png file.")
    ] = None,
    json: Annotated[bool, typer.Option(help="Print JSON instead of a table.")] = False,
    trust_source: TrustSource = False,
) -> None:
    """Say which units could go, which not and why, and what that would save.

    With trained weights and images, or a run folder, each unit is timed and judged: what its removal alone costs.
    Nothing is trained, and nothing is written but the plot.
    """
    from resconv.errors import RunError
    from resconv.latency.table import require_runtime
    from resconv.planning.budget import Budget
    from resconv.run.settings import amount, kinds

    if units is not None:
        kinds(units, "--units")
    budget = None
    if macs is not None or params is not None:
        budget = Budget(
            macs=None if macs is None else amount(macs, "--macs"),
            num_params=None if params is None else amount(params, "--params"),
        )
    require_runtime(Budget(latency=0.5, runtime=runtime).runtime)
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise RunError(f"--plot {plot}: let it end in .svg or .png.")
    is_run = (Path(model) / "config.json").is_file()
    if not is_run and data is None:
        for given, option in (
            (weights, "--weights"),
            (plot, "--plot"),
            (pretrained, "--pretrained"),
        ):
            if given:
                raise RunError(f"{option} takes images to judge the units by: add --data.")
        _structure(model, image_size, units or "layers,blocks", budget, json)
        return
    from resconv.run import inspection

    settings: dict[str, Any] = {
        "weights": weights,
        "image_size": image_size,
        "holdout": holdout,
        "limit": limit,
    }
    run, net = inspection.opened(
        model,
        data,
        units,
        trust_source=trust_source,
        **({"pretrained": True} if pretrained else {}),
        **settings,
    )
    found = inspection.inspect(run, net, budget, runtime)
    if plot is not None:
        inspection.draw(found, plot)
    if json:
        show_json(found)
        return
    _show_costs(model, run.config.data.source, found)
    _say_kept(_units_of(net, run.example(), run.config.target.units)[0])
    if plot is not None:
        typer.echo(f"Drawn: {plot}")


def _structure(model: str, image_size: int | None, units: str, budget: Any, json: bool) -> None:
    """Show what can be known without weights."""
    import dataclasses
    import json as json_module
    import warnings

    import resconv
    from resconv.planning.costs import cost_model
    from resconv.surgery.merging import TrainingFormWarning

    net, example = example_for(model, image_size)
    found, notes = _units_of(net, example, units)
    total = resconv.profile(net, example)
    if json:
        typer.echo(json_module.dumps([dataclasses.asdict(u) for u in found], indent=2))
        return
    removable = [u for u in found if u.removable]
    rows = [
        [u.kind, _short(u.macs), f"{u.macs / max(1, total.macs):.1%}", _short(u.num_params), u.left]
        for u in removable
    ]
    _show_table(
        f"{model} at {'x'.join(map(str, example.shape[1:]))}: units that can go",
        ["kind", "MACs", "share", "params", "in its place"],
        [u.name for u in removable],
        rows,
        text=(0, 4),
    )
    text = f"{total.macs:,} MACs, {total.num_params:,} parameters."
    gated = None
    if removable:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrainingFormWarning)
            gated = resconv.convert(net, example, units=units)
        costs = cost_model(gated, example)
        left = costs.left(costs.compatible(costs.names)).macs
        text += (
            f" {len(removable)} of {len(found)} units are removable; with all of them gone "
            f"{left:,} MACs ({left / max(1, total.macs):.1%}) are left."
        )
    else:
        text += " Nothing is removable."
    _echo(text)
    _say_kept(found)
    for note in notes:
        _echo(note)
    if budget is not None:
        from resconv.errors import BudgetError
        from resconv.selection.sensitivity import plan_untrained

        if gated is None:
            raise BudgetError(f"{model} has no unit that can go, so no plan meets a target.")
        plan = plan_untrained(gated, budget, costs, None, {})
        typer.echo(f"\n{plan}")
        _echo(
            "Untrained, by size alone: the largest units go first. With --data and trained weights it is by what their "
            "removal costs."
        )


def _units_of(net: Any, example: Any, units: str) -> tuple[Any, list[str]]:
    """Return the units of a net, and what is to be said of it."""
    import warnings

    import resconv
    from resconv.surgery.merging import TrainingFormWarning

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", TrainingFormWarning)
        found = resconv.units(net, example, units)
    return found, [str(w.message) for w in said if issubclass(w.category, TrainingFormWarning)]


def _show_costs(model: str, source: str, found: "Inspected") -> None:
    whole = found.whole
    _show_table(
        f"{model} on {found.num_images:,} images of {source}: what each unit's removal alone saves and costs",
        ["kind", "MACs", "share", "params", "ms", "top-1", "loss"],
        [u.name for u in found.units],
        [
            [
                u.kind,
                _short(u.macs),
                f"{u.macs / max(1, found.macs):.1%}",
                _short(u.num_params),
                f"{u.latency_ms:.3f}",
                f"{u.top1:+.1f}",
                f"{u.loss:+.3f}",
            ]
            for u in found.units
        ],
        text=(0,),
    )
    table = found.table
    _echo(
        f"The whole net: {found.macs:,} MACs, {found.num_params:,} parameters, {table.latency_ms:.3g} ms "
        f"({table.runtime}, batch {table.batch}, {table.threads} thread{'s' * (table.threads != 1)}), top-1 "
        f"{whole.top1:.2f} %, loss {whole.loss:.3f}. Nothing was trained: training for a target makes most of what a "
        "removal costs good."
    )
    if found.plan is not None and found.planned is not None:
        typer.echo(f"\n{found.plan}")
        _echo(
            f"Untrained it has top-1 {found.planned.top1:.2f} %, loss {found.planned.loss:.3f}, and takes about "
            f"{found.planned_ms:.3g} ms. First goes what costs the least loss for its MACs; training chooses anew."
        )


def _say_kept(found: Any) -> None:
    """Say why the other units stay, one reason after the other."""
    reasons: dict[str, list[str]] = {}
    for unit in found:
        if not unit.removable:
            reasons.setdefault(unit.reason or "stays", []).append(unit.name)
    if reasons:
        typer.echo("\nWhat stays, and why:")
    for reason, names in reasons.items():
        few = ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
        _echo(f"{reason}: {few}", indent="  ")


def _show_table(
    title: str, header: list[str], names: list[str], rows: list[list[str]], text: tuple[int, ...]
) -> None:
    """Print a table of at most 80 columns: numbers stay whole, a long name loses its beginning, a last text wraps."""
    import textwrap

    last = len(header) - 1 if len(header) - 1 in text else -1
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    if last >= 0:
        widths[last] = min(widths[last], 22)
    room = max(12, _WIDTH - sum(widths) - 2 * len(widths))
    width = min(room, max(map(len, ("unit", *names))))
    _echo(title)
    for name, row in zip(("unit", *names), (header, *rows), strict=True):
        name = printable(name)
        first = name if len(name) <= width else "..." + name[3 - width :]
        wrapped = textwrap.wrap(row[last], widths[last]) or [""] if last >= 0 else [""]
        cells = [
            c.ljust(w) if i in text else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
            if i != last
        ]
        start = "  ".join((first.ljust(width), *cells))
        for i, piece in enumerate(wrapped):
            typer.echo(f"{start if i == 0 else ' ' * len(start)}  {piece}".rstrip())


def _short(number: int) -> str:
    """Return a count in four digits at most: 417, 8.31k, 126M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _echo(text: str, indent: str = "") -> None:
    import textwrap

    for line in textwrap.wrap(
        printable(text), _WIDTH, initial_indent=indent, subsequent_indent=indent * 2
    ):
        typer.echo(line)
