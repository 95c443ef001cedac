"""``resconv prune``: plan, removal, proof and finetuning of a trained run."""

from pathlib import Path
from typing import Annotated

import typer

from .options import RunPath

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv prune runs/digits

  resconv prune runs/digits --plan my_plan.json
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(prune)


def prune(
    run: RunPath,
    plan: Annotated[
        Path | None, typer.Option(help="A plan written by hand, in place of the run's own.")
    ] = None,
) -> None:
    """Remove the planned units of a trained run, verify the compact net, and finetune it."""
    from resconv import run as runs

    current = runs.open_run(run, typer.echo)
    if plan is None:
        runs.run_stage(current, "plan", again=True)
    else:
        runs.use_plan(current, plan)
    for stage in ("prune", "finetune"):
        runs.run_stage(current, stage)
