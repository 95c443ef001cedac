"""``resconv export``: files for other runtimes."""

from pathlib import Path
from typing import Annotated

import typer

from .options import RunPath

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv export runs/digits

  resconv export runs/digits --to model.pt2
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(export)


def export(
    run: RunPath,
    to: Annotated[
        Path | None,
        typer.Option(help="A .onnx, .pt2 or .xml file; default: model.onnx in the run folder."),
    ] = None,
) -> None:
    """Write the compact net of a run for another runtime, and check the file by running it."""
    import resconv
    from resconv import run as runs
    from resconv.run.pipeline import compact_of

    current = runs.open_run(run, typer.echo)
    if to is None:
        runs.run_stage(current, "export", again=True)
        return
    done = resconv.export(compact_of(current), to, current.example(), plan=current.plan())
    typer.echo(
        f"{done.path}: {done.format}, {done.num_bytes:,} bytes, "
        f"{'dynamic' if done.dynamic_batch else 'fixed'} batch, relative error "
        f"{done.verification.max_rel_error:.1e}"
    )
