"""The options that say what a run is, for every command that begins one."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    Data,
    Devices,
    ImageSize,
    Latency,
    LatencyBatch,
    LatencyMs,
    Model,
    Runtime,
    Threads,
    amount,
    share,
)

if TYPE_CHECKING:
    from resconv.run import Config

__all__ = ["takes_config"]


def make_config(
    model: Model,
    data: Data,
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
    distill: Annotated[
        bool, typer.Option(help="Follow the outputs of the dense net too: of one well trained.")
    ] = False,
    distill_share: Annotated[
        float,
        typer.Option(help="With --distill: the share of the loss that follows the dense net."),
    ] = 0.5,
    hints: Annotated[
        bool,
        typer.Option(help="With --distill: follow what the layers between units read there, too."),
    ] = False,
    mix: Annotated[
        str | None,
        typer.Option(help="Train on images blended two by two, their labels too: mixup or cutmix."),
    ] = None,
    recalibrate: Annotated[
        bool | None,
        typer.Option(
            help="Collect BatchNorm statistics anew after pruning; default: where a unit goes "
            "whose scale is not 0."
        ),
    ] = None,
    units: Annotated[
        str,
        typer.Option(
            help="What may go: layers, blocks, summands, segments, gates (several with commas "
            "between), or all."
        ),
    ] = "layers,blocks",
    lr: Annotated[float, typer.Option(help="Peak learning rate of dense training.")] = 0.1,
    sparse_lr: Annotated[
        float | None,
        typer.Option(help="Of sparse training; default: half of --lr, all of it with --epochs 0."),
    ] = None,
    finetune_lr: Annotated[
        float | None,
        typer.Option(help="Of training after pruning; default: half of that of sparse training."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    image_size: ImageSize = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey) or 3 (RGB).")] = None,
    holdout: Annotated[
        float,
        typer.Option(help="Judge by this share of the training images, in place of a val split."),
    ] = 0.0,
    limit: Annotated[int | None, typer.Option(help="Use this many images of each split.")] = None,
    precision: Annotated[str, typer.Option(help="auto, 32-true, bf16-mixed or 16-mixed.")] = "auto",
    devices: Devices = None,
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            help="Record the training step on the GPU: faster for small nets whose forward does the "
            "same operations every time."
        ),
    ] = False,
) -> "Config":
    """Read the options."""
    from resconv import run as runs

    return runs.Config(
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
        distill_share=distill_share,
        hints=hints,
        mix=mix,
        recalibrate=recalibrate,
        units=units,
        lr=lr,
        sparse_lr=sparse_lr,
        finetune_lr=finetune_lr,
        batch_size=batch_size,
        seed=seed,
        image_size=image_size,
        channels=channels,
        holdout=holdout,
        limit=limit,
        precision=precision,
        devices="auto" if devices is None else devices,
        cuda_graphs=cuda_graphs,
    )


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is the ``Config``, the options that make one.

    Typer reads a command's options from its signature, so that is where they are added.
    """
    settings = inspect.signature(make_config).parameters
    own = list(inspect.signature(command).parameters.values())[1:]

    @wraps(command)
    def call(**given: Any) -> None:
        config = make_config(**{name: given.pop(name) for name in settings})
        command(config, **given)

    # What must be given comes first.
    every = sorted([*settings.values(), *own], key=lambda p: p.default is not p.empty)
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=p.KEYWORD_ONLY) for p in every]
    )
    call.__annotations__ = {p.name: p.annotation for p in every}
    return call
