"""``resconv predict``: what a net says of images."""

from pathlib import Path
from typing import Annotated

import typer

from .options import TrustSource, show_json, show_table
from .stopping import Stoppable

__all__ = ["Net", "register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv predict runs/mine photo.jpg

  resconv predict runs/mine/model.onnx photos --top 3 --json
"""

Net = Annotated[
    Path,
    typer.Argument(
        help="A run folder, a saved network, .onnx, .xml, .pt2, .pte or .tflite.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Stoppable)(predict)


def predict(
    net: Net,
    images: Annotated[
        str,
        typer.Argument(help="An image, a folder of images, or a set (digits, parquet:PATH, ...)."),
    ],
    top: Annotated[int, typer.Option(help="Classes an image.", min=1)] = 5,
    json: Annotated[bool, typer.Option(help="Print JSON instead of a table.")] = False,
    trust_source: TrustSource = False,
) -> None:
    """Name the likeliest classes of images, which are prepared as the network's own file says."""
    from resconv import data, prediction

    classifier = prediction.open_classifier(net, trust_source=trust_source)
    place = Path(images).expanduser()
    if place.exists() or (":" not in images and images not in data.NAMED):
        listed = data.list_images(place)
    else:
        split, _ = data.load_val(images, classifier.preprocessing)
        listed = list(split.encoded)
    found = list(prediction.predict(classifier, listed, top=top))
    if json:
        show_json(found)
        return
    rows = [
        (
            one.image,
            ", ".join(
                f"{name} {share:.1%}"
                for name, share in zip(one.classes, one.probabilities, strict=True)
            ),
        )
        for one in found
    ]
    show_table(str(net), ["image", "classes"], rows)
