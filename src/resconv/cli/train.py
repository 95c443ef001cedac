"""``resconv train``: the two training stages."""

from typing import TYPE_CHECKING, Annotated

import typer

from .options import DryRun, Fresh, Json, Out, Quiet, say_warnings, show_json, voice
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
    dense_only: Annotated[
        bool, typer.Option("--dense-only", help="Stop after dense training.")
    ] = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a network, then train its scales towards the target. `prune` goes on from there."""
    from resconv import run as runs

    from .rehearsal import rehearse

    say = voice(quiet, json)
    if dry_run:
        rehearse(out, config, fresh=fresh, json=json, dense_only=dense_only)
        return
    run = runs.begin(out, config, fresh=fresh, say=say, dense_only=dense_only)
    runs.run_stage(run, "dense")
    if not dense_only:
        runs.run_stage(run, "sparse")
    if run.ranks.leads and json:
        show_json(run.folder.metrics())
    if run.ranks.leads and quiet:
        say_warnings(run.folder.metrics(), err=True)
