"""``resconv train``: the two training stages."""

from typing import TYPE_CHECKING, Annotated

import typer

from .options import Out
from .settings import takes_config

if TYPE_CHECKING:
    from resconv.run import Config

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv train --model resnet20 --data digits --macs 0.5 --out runs/digits

  resconv train --model resnet20 --data digits --dense-only --out runs/dense
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(train)


@takes_config
def train(
    config: "Config",
    out: Out,
    dense_only: Annotated[bool, typer.Option(help="Stop after dense training.")] = False,
    fresh: Annotated[bool, typer.Option(help="Move an earlier run in the folder aside.")] = False,
) -> None:
    """Train a network, then train its scales towards the target. `prune` goes on from there."""
    from resconv import run as runs

    if not dense_only:
        config.budget()
    run = runs.begin(out, config, fresh=fresh, say=typer.echo)
    runs.run_stage(run, "dense")
    if not dense_only:
        runs.run_stage(run, "sparse")
