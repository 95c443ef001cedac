"""``resconv inspect``: what could go, without training."""

from typing import Annotated

import typer

from .options import ImageSize, example_for, show_table
from .stopping import Stoppable

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv inspect resnet56

  resconv inspect timm:mobilenetv3_small_100 --units all

  resconv inspect my_package.nets:build --image-size 96 --json
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Stoppable)(inspect)


def inspect(
    model: Annotated[
        str,
        typer.Argument(help="resnet20, timm:NAME, torchvision:NAME, package.module:factory."),
    ],
    image_size: ImageSize = None,
    units: Annotated[
        str,
        typer.Option(
            help="Kinds to look for: layers, blocks, summands, segments, gates (several with commas "
            "between), or all."
        ),
    ] = "layers,blocks",
    json: Annotated[bool, typer.Option(help="Print JSON instead of a table.")] = False,
) -> None:
    """Say which layers, branches and other units could go, which not and why, and what that would save."""
    import dataclasses
    import json as json_module
    import warnings

    import resconv
    from resconv.planning.costs import cost_model
    from resconv.surgery.merging import TrainingFormWarning

    net, example = example_for(model, image_size)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", TrainingFormWarning)
        found = resconv.units(net, example, units)
    notes = [str(w.message) for w in said]
    total = resconv.profile(net, example)
    if json:
        typer.echo(json_module.dumps([dataclasses.asdict(u) for u in found], indent=2))
        return
    rows = [
        (
            u.name,
            u.kind,
            f"{u.macs:,}",
            f"{u.macs / max(1, total.macs):.1%}",
            f"{u.num_params:,}",
            u.left if u.removable else "",
            "yes" if u.removable else "no",
            u.reason or "",
        )
        for u in found
    ]
    show_table(
        f"{model} at {'x'.join(map(str, example.shape[1:]))}",
        ["unit", "kind", "MACs", "share", "parameters", "in its place", "removable", "why not"],
        rows,
    )
    removable = [u for u in found if u.removable]
    text = f"{total.macs:,} MACs, {total.num_params:,} parameters."
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
    typer.echo(text)
    for note in notes:
        typer.echo(note)
