"""``resconv verify``: do two networks compute the same?"""

from pathlib import Path
from typing import Annotated

import typer

from resconv.errors import printable

from .options import Json, TrustSource, show_json
from .stopping import Stoppable

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv verify runs/digits runs/digits/model.onnx

  resconv verify saved_net model.xml --tolerance 1e-3

  resconv verify a.pt2 b.onnx --shape 1,3,32,32 --trust-source
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Stoppable)(verify)


def verify(
    a: Annotated[Path, typer.Argument(help="A run folder, saved network, .onnx, .pt2 or .xml.")],
    b: Annotated[Path, typer.Argument(help="The other one.")],
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Input shape, such as 1,3,224,224; once for each input. Default: as saved."
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest relative error.")] = 1e-4,
    json: Json = False,
    trust_source: TrustSource = False,
) -> None:
    """Run two networks on the same random inputs and compare their outputs."""
    from resconv.storage.comparison import compare

    result = compare(a, b, shape=shape, tolerance=tolerance, trust_source=trust_source)
    if json:
        show_json(result)
        return
    typer.echo(
        f"{printable(str(a))} and {printable(str(b))} agree: {result.num_outputs} outputs, largest difference "
        f"{result.max_abs_error:.2e}, relative {result.max_rel_error:.2e} "
        f"(allowed {result.tolerance:.0e})."
    )
