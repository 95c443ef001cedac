"""``resconv prune``: plan, removal, proof and finetuning of a trained run."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Quiet, RunPath, TrustSource, say_warnings, show_json, voice
from .stopping import Resumable

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv prune runs/digits

  resconv prune runs/digits --plan my_plan.json
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Resumable)(prune)


def prune(
    run: RunPath,
    plan: Annotated[
        Path | None, typer.Option(help="A plan written by hand, in place of the run's own.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    trust_source: TrustSource = False,
) -> None:
    """Remove the planned units of a trained run, verify the compact net, and finetune it.

    A plan that does not fit the run is refused, and the run stays as it was.
    """
    from resconv import run as runs
    from resconv.planning.plan import Plan

    current = runs.open_run(run, voice(quiet, json), trust_source=trust_source)
    done = current.folder.done()
    # Stopped while it finetuned: the same command goes on there.
    stopped = "prune" in done and "finetune" not in done
    if stopped and (plan is None or Plan.load(plan).remove == current.plan().remove):
        current.say("The plan is carried out already.")
    elif plan is None:
        runs.run_stage(current, "plan", again=True)
    else:
        runs.use_plan(current, plan)
    for stage in ("prune", "finetune", "control"):
        runs.run_stage(current, stage)
    if json:
        show_json(current.folder.metrics())
    if quiet:  # else they were told when they came
        say_warnings(current.folder.metrics(), err=True)
