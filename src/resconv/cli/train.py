"""``resconv train``: the two training stages."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Data,
    Devices,
    ImageSize,
    Latency,
    LatencyBatch,
    LatencyMs,
    Model,
    Out,
    Runtime,
    Threads,
    amount,
    share,
)

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv train --model resnet20 --data digits --macs 0.5 --out runs/digits

  resconv train --model resnet20 --data digits --dense-only --out runs/dense
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(train)


def train(
    model: Model,
    data: Data,
    out: Out,
    macs: Annotated[str | None, typer.Option(help="MACs to end at: 0.5, 50% or 20M.")] = None,
    params: Annotated[str | None, typer.Option(help="Parameters to end at.")] = None,
    latency_ms: LatencyMs = None,
    latency: Latency = None,
    runtime: Runtime = "torch",
    latency_batch: LatencyBatch = 1,
    threads: Threads = None,
    dense_only: Annotated[bool, typer.Option(help="Stop after dense training.")] = False,
    weights: Annotated[str | None, typer.Option(help="Trained weights to start from.")] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of dense training; 0: sparse training from random weights."),
    ] = None,
    sparse_epochs: Annotated[int | None, typer.Option(help="Epochs of sparse training.")] = None,
    finetune_epochs: Annotated[int | None, typer.Option(help="Kept for `prune`.")] = None,
    units: Annotated[str, typer.Option(help="What may go: layers, blocks or all.")] = "all",
    lr: Annotated[float, typer.Option(help="Peak learning rate of dense training.")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    image_size: ImageSize = None,
    limit: Annotated[int | None, typer.Option(help="Use this many images of each split.")] = None,
    devices: Devices = None,
    fresh: Annotated[bool, typer.Option(help="Delete an earlier run in the folder.")] = False,
) -> None:
    """Train a network, then train its scales towards the target. `prune` goes on from there."""
    from resconv import run as runs

    config = runs.Config(
        model=model,
        data=data,
        macs=amount(macs, "macs"),
        num_params=amount(params, "params"),
        latency_ms=latency_ms,
        latency=share(latency, "latency"),
        runtime=runtime,
        latency_batch=latency_batch,
        threads=threads,
        weights=weights,
        epochs=epochs,
        sparse_epochs=sparse_epochs,
        finetune_epochs=finetune_epochs,
        units=units,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        image_size=image_size,
        limit=limit,
        devices="auto" if devices is None else devices,
    )
    if not dense_only:
        config.budget()
    run = runs.begin(Path(out), config, fresh=fresh, say=typer.echo)
    runs.run_stage(run, "dense")
    if not dense_only:
        runs.run_stage(run, "sparse")
