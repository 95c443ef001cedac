"""``resconv measure``: latency and memory, side by side."""

import typer

from .options import RunPath, TrustSource, say_warnings, show_table
from .stopping import Stoppable

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv measure runs/digits
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Stoppable)(measure)


def measure(run: RunPath, trust_source: TrustSource = False) -> None:
    """Measure the dense and the compact net of a run in turn, and write the report."""
    from resconv import run as runs
    from resconv.run.report.table import rows

    current = runs.open_run(run, typer.echo, trust_source=trust_source)
    runs.run_stage(current, "measure", again=True)
    runs.run_stage(current, "report", again=True)
    metrics = current.folder.metrics()
    show_table(str(run), ["", "dense", "compact", "change"], rows(metrics))
    say_warnings(metrics)
