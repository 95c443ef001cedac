"""``resconv compress``: the whole job."""

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
    show_table,
)

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv compress --model resnet20 --data digits --macs 0.5 --out runs/digits

  resconv compress --model resnet56 --data cifar10 --macs 0.35 --finetune-epochs 20 --out runs/c56

  resconv compress --model timm:resnet18 --data folder:photos --weights mine.safetensors --macs 60% --out runs/mine

  resconv compress --model resnet56 --data cifar10 --latency-ms 1.2 --runtime onnxruntime --threads 1 --out runs/fast

  resconv compress --model plainnet56 --data digits --macs 0.5 --epochs 0 --sparse-epochs 30 --out runs/one

  torchrun --nproc-per-node 4 -m resconv compress --model resnet56 --data cifar10 --macs 0.5 --out runs/c56
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(compress)


def compress(
    model: Model,
    data: Data,
    out: Out,
    macs: Annotated[str | None, typer.Option(help="MACs to end at: 0.5, 50% or 20M.")] = None,
    params: Annotated[
        str | None, typer.Option(help="Parameters to end at: 0.5, 50% or 200k.")
    ] = None,
    latency_ms: LatencyMs = None,
    latency: Latency = None,
    runtime: Runtime = "torch",
    latency_batch: LatencyBatch = 1,
    threads: Threads = None,
    weights: Annotated[
        str | None, typer.Option(help="Trained weights (.safetensors, .pt); else it is trained.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of dense training; 0: sparse training from random weights."),
    ] = None,
    sparse_epochs: Annotated[int | None, typer.Option(help="Epochs of sparse training.")] = None,
    finetune_epochs: Annotated[int | None, typer.Option(help="Epochs after pruning.")] = None,
    distill: Annotated[bool, typer.Option(help="Follow the dense net's outputs as well.")] = False,
    recalibrate: Annotated[
        bool | None,
        typer.Option(
            help="Collect BatchNorm statistics anew after pruning; default: where a unit goes "
            "whose scale is not 0."
        ),
    ] = None,
    units: Annotated[str, typer.Option(help="What may go: layers, blocks or all.")] = "all",
    lr: Annotated[float, typer.Option(help="Peak learning rate of dense training.")] = 0.1,
    sparse_lr: Annotated[
        float | None,
        typer.Option(help="Of sparse training; default: half of --lr, all of it with --epochs 0."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    image_size: ImageSize = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey) or 3 (RGB).")] = None,
    limit: Annotated[int | None, typer.Option(help="Use this many images of each split.")] = None,
    precision: Annotated[str, typer.Option(help="auto, 32-true, bf16-mixed or 16-mixed.")] = "auto",
    devices: Devices = None,
    fresh: Annotated[bool, typer.Option(help="Delete an earlier run in the folder.")] = False,
) -> None:
    """Make a network shallower, end to end: train, sparsify, prune, verify, export, measure.

    A stopped run goes on where it was when the same command is given again.
    """
    from resconv import run as runs
    from resconv.report.table import rows

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
        distill=distill,
        recalibrate=recalibrate,
        units=units,
        lr=lr,
        sparse_lr=sparse_lr,
        batch_size=batch_size,
        seed=seed,
        image_size=image_size,
        channels=channels,
        limit=limit,
        precision=precision,
        devices="auto" if devices is None else devices,
    )
    config.budget()
    run = runs.begin(out, config, fresh=fresh, say=typer.echo)
    metrics = runs.compress(run)
    if not run.ranks.leads:
        return
    show_table(
        f"{model} on {data}, {metrics['num_zero']} of {metrics['num_units']} units at 0",
        ["", "dense", "compact", "change"],
        rows(metrics),
    )
    typer.echo("Written:")
    for name in (
        "plan.json",
        "model.safetensors",
        "model.json",
        "model.onnx",
        "latency.json",
        "metrics.json",
        "report.html",
    ):
        if (out / name).is_file():
            typer.echo(f"  {out / name}")
