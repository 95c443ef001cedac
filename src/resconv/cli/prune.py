"""``resconv prune``: plan, removal, proof and finetuning of a trained run."""

from pathlib import Path
from typing import Annotated

import typer

from .options import RunPath, TrustSource

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
    trust_source: TrustSource = False,
) -> None:
    """Remove the planned units of a trained run, verify the compact net, and finetune it."""
    from resconv import run as runs
    from resconv.planning.plan import Plan

    current = runs.open_run(run, typer.echo, trust_source=trust_source)
    if plan is None:
        runs.run_stage(current, "plan", again=True)
    else:
        chosen = Plan.load(plan)
        missing = [s for s in ("dense", "sparse") if s not in current.folder.done()]
        if missing:
            runs.run_stage(current, "plan")  # says which stage is missing
        current.folder.unmark(runs.FROM_PRUNE)
        chosen.save(current.folder / "plan.json")
        current.folder.mark("plan")
    for stage in ("prune", "finetune"):
        runs.run_stage(current, stage)
