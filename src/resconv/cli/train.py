"""``resconv train``: the two training stages."""

from typing import TYPE_CHECKING, Annotated

import typer

from .options import Out
from .settings import takes_config
from .stopping import Resumable

if TYPE_CHECKING:
    from resconv.run import Config

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv train --model resnet20 --data digits --macs 0.5 --out runs/digits

  resconv train --model resnet20 --data digits --dense-only --out runs/dense
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Resumable)(train)


@takes_config
def train(
    config: "Config",
    out: Out,
    dense_only: Annotated[bool, typer.Option(help="Stop after dense training.")] = False,
    fresh: Annotated[bool, typer.Option(help="Move an earlier run in the folder aside.")] = False,
) -> None:
    """Train a network, then train its scales towards the target. `prune` goes on from there."""
    from resconv import run as runs
    from resconv.cli.messages import as_options

    run = runs.begin(
        out,
        config,
        fresh=fresh,
        say=lambda text: typer.echo(as_options(text)),
        dense_only=dense_only,
    )
    runs.run_stage(run, "dense")
    if not dense_only:
        runs.run_stage(run, "sparse")
