"""``resconv push``: a compact net on the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, show_json
from .stopping import Stoppable

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv push runs/mine OWNER/NAME --private

  python -c "import resconv; net = resconv.load('hf://OWNER/NAME')"
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Stoppable)(push)


def push(
    net: Annotated[Path, typer.Argument(help="A finished run, or a saved network.")],
    place: Annotated[str, typer.Argument(help="Where to: OWNER/NAME on the hub.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    json: Json = False,
) -> None:
    """Put a network on the Hugging Face hub, with its model card, plan and ONNX files."""
    from resconv.run.report.card import TO_FILL_IN
    from resconv.storage import hub

    card = net / "README.md"
    address = hub.push(net, place, private=private)
    if json:
        show_json({"place": address})
        return
    typer.echo(f"Pushed: resconv.load({address!r}) loads it.")
    if card.is_file() and TO_FILL_IN in card.read_text(encoding="utf-8", errors="replace"):
        typer.echo(f"Its licence is not filled in yet: see {card}, and push again.")
