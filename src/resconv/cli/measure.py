"""``resconv measure``: latency and memory, side by side."""

import typer

from .options import Json, Quiet, RunPath, TrustSource, say_warnings, show_json, show_table, voice
from .stopping import Stoppable

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv measure runs/digits
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Stoppable)(measure)


def measure(
    run: RunPath, json: Json = False, quiet: Quiet = False, trust_source: TrustSource = False
) -> None:
    """Measure the dense and the compact net of a run in turn, and write the report."""
    from resconv import run as runs
    from resconv.run.report.table import rows

    current = runs.open_run(run, voice(quiet, json), trust_source=trust_source)
    runs.run_stage(current, "measure", again=True)
    runs.run_stage(current, "report", again=True)
    metrics = current.folder.metrics()
    if json:
        show_json(metrics)
    elif not quiet:
        show_table(str(run), ["", "dense", "compact", "change"], rows(metrics))
    say_warnings(metrics, err=json or quiet)
