"""``resconv compare``: several runs on one page."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, show_json, show_table
from .stopping import Stoppable

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv compare runs/half runs/third

  resconv compare runs/half runs/third --to compared.html --json
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Stoppable)(compare)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, two or more.")],
    to: Annotated[
        Path | None, typer.Option(help="Write a page with the Pareto front to this .html file.")
    ] = None,
    json: Json = False,
) -> None:
    """Put finished runs side by side, and say which nets no other one beats."""
    from resconv.run.report.comparison import compare_runs, write_comparison

    found = compare_runs(runs)
    if to is not None:
        write_comparison(to, found)
    if json:
        show_json(found)
        return
    for note in found.notes:
        typer.echo(f"Note: {note}")
    show_table(
        f"Top-1 against {found.cost}; * no other net is right as often and costs as little",
        ["net", "top-1 (%)", "ms", "MACs", "parameters", "front"],
        [
            (
                net.name,
                f"{net.top1:.2f}",
                "" if net.latency_ms is None else f"{net.latency_ms:.3g}",
                "" if net.macs is None else f"{net.macs:,}",
                "" if net.num_params is None else f"{net.num_params:,}",
                "*" if net.on_front else "",
            )
            for net in found.nets
        ],
    )
    if to is not None:
        typer.echo(f"Written: {to}")
