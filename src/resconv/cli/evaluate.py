"""``resconv evaluate``: how often a net is right."""

from pathlib import Path
from typing import Annotated

import typer

from .options import TrustSource, show_json, show_table
from .predict import Net
from .stopping import Stoppable

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv evaluate runs/mine

  resconv evaluate runs/mine/model.onnx folder:photos

  resconv evaluate saved_net digits --json
"""

_WIDEST = 12  # classes whose confusion table a terminal shows
_MISTAKES = 10


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Stoppable)(evaluate)


def evaluate(
    net: Net,
    data: Annotated[
        str | None,
        typer.Argument(
            help="A labelled set, or a folder with a folder a class; of a run by default its own."
        ),
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(help="Judge by this share of train; of a run by default its own."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use this many images; of a run by default its own.", min=1)
    ] = None,
    json: Annotated[bool, typer.Option(help="Print JSON instead of tables.")] = False,
    trust_source: TrustSource = False,
) -> None:
    """Judge a network by labelled images, which are prepared as its own file says."""
    from resconv import data as datasets
    from resconv import prediction

    source, share, most = _asked(net, data, holdout, limit)
    classifier = prediction.open_classifier(net, trust_source=trust_source)
    split, names = datasets.load_val(source, classifier.preprocessing, holdout=share, limit=most)
    found = prediction.evaluate(classifier, split, names)
    if json:
        show_json(found)
        return
    typer.echo(
        f"{net} on {found.num_images:,} images of {source}: top-1 {found.top1:.2f} %, top-5 "
        f"{found.top5:.2f} %."
    )
    rows = [
        (name, f"{count:,}", "" if share is None else f"{share:.1f}")
        for name, count, share in zip(
            found.class_names, found.num_of_class, found.accuracy_of_class, strict=True
        )
        if count
    ]
    show_table("Of each class", ["class", "images", "right (%)"], rows)
    if len(found.class_names) <= _WIDEST:
        cells = [
            (name, *(str(n) if n else "" for n in row))
            for name, row in zip(found.class_names, found.confusion, strict=True)
        ]
        show_table("Taken for", ["class", *found.class_names], cells)
    elif mistakes := found.confused():
        show_table(
            "Most frequent mistakes",
            ["class", "taken for", "images"],
            [(name, other, str(count)) for count, name, other in mistakes[:_MISTAKES]],
        )


def _asked(
    net: Path, data: str | None, holdout: float | None, limit: int | None
) -> tuple[str, float, int | None]:
    """Return what to judge by: what is asked for, else the run's own."""
    from resconv import run as runs
    from resconv.errors import RunError

    if data is not None:
        return data, holdout or 0.0, limit
    if not (net / "config.json").is_file():
        raise RunError(
            f"{net} is no run folder, so its data is not known. Name it: resconv evaluate {net} folder:PATH."
        )
    own = runs.RunFolder.open(net).config().data
    return own.source, own.holdout if holdout is None else holdout, limit or own.limit
