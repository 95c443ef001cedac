"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resconv.errors import printable

if TYPE_CHECKING:
    from resconv.run.metrics import Metrics

__all__ = [
    "DryRun",
    "Fresh",
    "ImageSize",
    "Json",
    "Out",
    "Quiet",
    "RunPath",
    "TrustSource",
    "example_for",
    "say_warnings",
    "show_json",
    "show_table",
    "voice",
]

Out = Annotated[Path, typer.Option(help="The run folder.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Move an earlier run in the folder aside.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check everything that a run checks, say what it would do, and stop."
    ),
]
RunPath = Annotated[Path, typer.Argument(help="A run folder.")]
TrustSource = Annotated[
    bool,
    typer.Option(
        help="Let files that are given here run code: a net's own package.module:factory, a .pt2."
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and warnings alone, and no progress.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of tables; what is told goes to stderr.")
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


def voice(quiet: bool = False, json: bool = False) -> Callable[[str], None] | None:
    """Return what tells the user how a run goes; None where it is quiet."""
    from .messages import as_options

    return None if quiet else lambda text: typer.echo(as_options(text), err=json)


def show_json(content: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(content)).decode())


def say_warnings(metrics: "Metrics", err: bool = False) -> None:
    """Repeat what a run warned of, where it would be lost above."""
    from .messages import as_options

    for texts in metrics.warnings.values():
        for text in texts:
            typer.echo(f"Warning: {as_options(text)}", err=err)


def show_table(title: str, header: list[str], rows: list[Any]) -> None:
    from rich.box import HEAVY_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    # Lines are for eyes; a program reads columns.
    box = HEAVY_HEAD if console.is_terminal else None
    table = Table(title=escape(printable(title)), title_justify="left", box=box)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        # A unit or a folder may be called "[red]", or worse.
        table.add_row(*(escape(printable(cell)) for cell in row))
    console.print(table)
