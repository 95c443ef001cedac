"""Options that several commands share."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resconv.errors import BudgetError, printable

if TYPE_CHECKING:
    from resconv.run.metrics import Metrics

__all__ = [
    "Data",
    "Devices",
    "ImageSize",
    "Latency",
    "LatencyBatch",
    "LatencyMs",
    "Model",
    "Out",
    "RunPath",
    "Runtime",
    "Threads",
    "TrustSource",
    "amount",
    "example_for",
    "say_warnings",
    "share",
    "show_table",
]

Model = Annotated[
    str,
    typer.Option(help="resnet20, vgg16_bn, timm:NAME, torchvision:NAME or package.module:factory."),
]
Data = Annotated[str, typer.Option(help="digits, cifar10, cifar100, folder:PATH or parquet:PATH.")]
Out = Annotated[Path, typer.Option(help="The run folder.")]
RunPath = Annotated[Path, typer.Argument(help="A run folder.")]
Devices = Annotated[
    int | None,
    typer.Option(
        help="Processes that train: GPUs, or CPU processes; default: every GPU, else one process."
    ),
]
LatencyMs = Annotated[
    float | None, typer.Option(help="Milliseconds of one forward pass on this machine to end at.")
]
Latency = Annotated[
    str | None, typer.Option(help="The same as a share of the dense net's: 0.5 or 50%.")
]
Runtime = Annotated[
    str, typer.Option(help="What the latency is measured in: torch or onnxruntime.")
]
LatencyBatch = Annotated[int, typer.Option(help="Images a forward pass, for the latency.")]
Threads = Annotated[
    int | None, typer.Option(help="For the latency; default: as many as torch uses.")
]
TrustSource = Annotated[
    bool,
    typer.Option(
        help="Let files that are given here run code: a net's own package.module:factory, a .pt2."
    ),
]
ImageSize = Annotated[int | None, typer.Option(help="Side of the images in pixels.")]


def amount(text: str | None, name: str) -> float | int | None:
    """Read a fraction (0.5, 50%) or an absolute number (40000000, 40M)."""
    if text is None:
        return None
    fault = BudgetError(
        f"--{name} {text}: give a fraction above 0 and up to 1 (0.5 or 50%), or a whole number from 1 up "
        "(40000000 or 40M)."
    )
    units = {"%": 0.01, "k": 1e3, "m": 1e6, "g": 1e9}
    raw = text.strip().lower().replace("_", "").replace(",", "")
    try:
        if raw and raw[-1] in units:
            value = float(raw[:-1]) * units[raw[-1]]
            is_fraction = raw[-1] == "%"
        else:
            value = float(raw)
            # 1e7 is a number, and 1 the whole net.
            is_fraction = "." in raw or value <= 1
    except ValueError:
        raise fault from None
    if not (0 < value <= 1 if is_fraction else 1 <= value < math.inf):
        raise fault
    return value if is_fraction else round(value)


def share(text: str | None, name: str) -> float | None:
    """Read a fraction (0.5, 50%)."""
    value = amount(text, name)
    if value is None or 0 < value < 1:
        return value
    raise BudgetError(
        f"--{name} {text}: a share of the dense net's latency lies between 0 and 1 (0.5 or 50%). "
        f"For milliseconds give --latency-ms."
    )


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
