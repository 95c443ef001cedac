"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resconv.errors import printable

if TYPE_CHECKING:
    from resconv.run.metrics import Metrics

__all__ = [
    "ImageSize",
    "Out",
    "RunPath",
    "TrustSource",
    "example_for",
    "say_warnings",
    "show_table",
]

Out = Annotated[Path, typer.Option(help="The run folder.")]
RunPath = Annotated[Path, typer.Argument(help="A run folder.")]
TrustSource = Annotated[
    bool,
    typer.Option(
        help="Let files that are given here run code: a net's own package.module:factory, a .pt2."
    ),
]
ImageSize = Annotated[int | None, typer.Option(help="Side of the images in pixels.")]


def example_for(name: str, image_size: int | None) -> tuple[Any, Any]:
    """Build a net by name, without weights, and an example batch for it."""
    import torch

    from resconv import nets
    from resconv.errors import ModelError

    if image_size is not None and image_size < 1:
        raise ModelError(f"--image-size {image_size}: at least 1.")
    model = nets.create(name).eval()
    channels, height, width = nets.default_input_size(name, model)
    if image_size is not None:
        height = width = image_size
    return model, torch.randn(1, channels, height, width)


def say_warnings(metrics: "Metrics") -> None:
    """Repeat what a run warned of, where it would be lost above."""
    from .messages import as_options

    for texts in metrics.warnings.values():
        for text in texts:
            typer.echo(f"Warning: {as_options(text)}")


def show_table(title: str, header: list[str], rows: list[Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(printable(title)), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        # A unit or a folder may be called "[red]", or worse.
        table.add_row(*(escape(printable(cell)) for cell in row))
    Console().print(table)
