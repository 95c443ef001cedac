"""``--dry-run``: what a run would do, when nothing stands against it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .options import show_json

if TYPE_CHECKING:
    from resconv.run import Config

__all__ = ["rehearse"]


def rehearse(
    out: Path,
    config: "Config",
    *,
    fresh: bool = False,
    json: bool = False,
    dense_only: bool = False,
) -> None:
    """Check a run and say what it would do; nothing is written.

    Raises:
        ResConvError: the run would be refused.
    """
    from resconv import run as runs

    run = runs.rehearse(
        out,
        config,
        fresh=fresh,
        say=lambda text: typer.echo(text, err=json),
        dense_only=dense_only,
    )
    done = [] if fresh else run.folder.done()
    has_control = run.config.training.control
    stages = [s for s in runs.STAGES if s not in done and (s != "control" or has_control)]
    if dense_only:
        stages = [s for s in stages if s == "dense"]
    dense, sparse, fine = run.config.stage_epochs()
    epochs = {"dense": dense, "sparse": sparse, "finetune": fine, "control": sparse + fine}
    found: dict[str, Any] = {
        "out": str(out),
        "done": done,
        "stages": stages,
        "epochs": {s: n for s, n in epochs.items() if s in stages},
        "train_images": len(run.data.train),
        "val_images": len(run.data.val),
        "classes": run.data.num_classes,
        "image": [run.data.channels, run.data.image_size, run.data.image_size],
        "recipe": run.config.recipe,
        "precision": run.precision.name,
    }
    if json:
        show_json(found)
        return
    typer.echo(
        f"{config.net.model} on {config.data.source}: {found['train_images']:,} images to train, "
        f"{found['val_images']:,} to judge, {found['classes']} classes, "
        f"{'x'.join(map(str, found['image']))}."
    )
    for stage in stages:
        number = found["epochs"].get(stage)
        typer.echo(f"  {stage}" + ("" if number is None else f": {number} epochs"))
    typer.echo(f"Nothing stands against it. Nothing was written to {out}.")
