"""One training run by Lightning's Trainer: resumable, logged, in the machine's best precision."""

import hashlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import msgspec
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from torch import nn

from resconv.data import ImageData
from resconv.errors import ResConvWarning, RunError
from resconv.integrations.lightning import SparsityCallback
from resconv.latency.table import LatencyTable
from resconv.nn.gates import gates
from resconv.planning.budget import Budget
from resconv.planning.costs import cost_model, excess
from resconv.selection import processes
from resconv.selection.outcome import Snapshot
from resconv.surgery.provenance import example_inputs_of

from .checkpoints import LAST, Bound, Checkpoints, choose_checkpoint
from .module import Classifier
from .precision import Precision, channels_last, choose_precision
from .ranks import choose_devices, raised_inside
from .recipe import Recipe
from .rowlog import RowLog
from .watch import EndsWithParent

__all__ = ["FitResult", "Recipe", "fit"]


@dataclass(frozen=True)
class FitResult:
    """The scales over training (empty without a target), and how many epochs were run.

    ``latency`` is the table of the target, with the nets that were timed during training.
    """

    history: list[Snapshot]
    epochs: int
    latency: LatencyTable | None = None


def fit(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    folder: Path,
    *,
    target: Budget | None = None,
    latency: LatencyTable | None = None,
    teacher: nn.Module | None = None,
    hints: tuple[str, ...] = (),
    precision: Precision | None = None,
    devices: int | str = "auto",
    cuda_graphs: bool = False,
    progress: bool = True,
    callbacks: tuple[Callback, ...] = (),
    bound: str = "",
    say: Callable[[str], None] = print,
) -> FitResult:
    """Train ``model`` in place; ``folder`` keeps the checkpoints and ``metrics.csv``.

    A run that was stopped goes on from its last whole epoch when called again with the same
    folder, the same recipe and the same ``bound``: any text that says what is trained on what. Other
    checkpoints are not used, nor are damaged ones, and ``say`` tells so (see checkpoints.py).

    With a ``target`` it is sparse training towards that budget, with units weighed by ``latency``
    where it limits that. A ``teacher`` is followed in its logits and in what the layers named by
    ``hints`` read (see :func:`resconv.recovery.hint_layers`). ``devices`` are processes on this
    machine, one a GPU (or CPU processes): with more than one the training runs in processes of its
    own, and the trained weights come back. Under torchrun or SLURM, call this in every process;
    how many there are is then what the launcher says. ``cuda_graphs`` records the net's passes on
    the GPU (see recorded.py). With ``recipe.ema`` it is the averaged weights that are judged, and that
    ``model`` has in the end.

    Warns:
        ResConvWarning: the zeros of sparse training leave more than the target.

    Raises:
        RunError: the checkpoint does not fit the model, there are not as many devices, or the net
            cannot be recorded.
    """
    precision = precision or choose_precision()
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Classifier(
        model,
        data,
        recipe,
        teacher=teacher,
        hints=hints,
        cuda_graphs=cuda_graphs,
    )
    sparsity: list[SparsityCallback] = []
    if target is not None:
        sparsity = [SparsityCallback(target, net="model", latency=latency)]
    elif gates(model):
        # No pressure, but scalars are moved apart from the weights all the same: they overshoot.
        sparsity = [SparsityCallback(net="model", strength=0.0)]
    # One file, written over after every epoch.
    checkpoint = ModelCheckpoint(
        folder,
        filename=Path(LAST).stem,
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    shown: list[Callback] = [RichProgressBar(leave=False)] if progress else []
    last = folder / LAST
    bound = hashlib.sha256(f"{bound} {recipe}".encode()).hexdigest()
    start = processes.by_first(
        lambda: choose_checkpoint(folder, bound, say), processes.are_several()
    )
    kept = [Bound(bound), RowLog(folder / "metrics.csv", sparsity), EndsWithParent()]
    kwargs = choose_devices(devices)
    spawns = kwargs["strategy"] == "ddp_spawn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of settings that the user cannot change
        warnings.simplefilter("always", ResConvWarning)
        trainer = lightning.Trainer(
            max_epochs=recipe.epochs,
            precision=precision.name,  # type: ignore[arg-type]
            callbacks=[*sparsity, *kept, checkpoint, *shown, *callbacks],
            plugins=[Checkpoints()],
            logger=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            benchmark=torch.cuda.is_available(),
            **kwargs,
        )
        nets = [model] if teacher is None else [model, teacher]
        images = torch.zeros(2, data.channels, data.image_size, data.image_size)
        try:
            with channels_last(nets, images) as module.channels_last:
                trainer.fit(module, ckpt_path=None if start is None else str(start))
        except SystemExit:
            if trainer.interrupted:  # Ctrl-C, which Lightning turns into an exit
                raise KeyboardInterrupt from None
            raise
        except Exception as error:  # raised again below
            inside = raised_inside(error)
            if inside is not None:
                raise inside from error
            misfit = "state_dict" in str(error) or "state dict" in str(error)
            if last.is_file() and misfit:
                raise RunError(
                    f"The checkpoint {last} belongs to another net or version: "
                    f"{str(error)[-200:]}. Start anew with --fresh."
                ) from error
            raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    module.to("cpu")
    if module.average is not None:
        model.load_state_dict(module.average.module.state_dict())
    history: list[Snapshot] = []
    if target is not None:
        if spawns:
            state = _stored_state(last)
            history = msgspec.convert(state["history"], list[Snapshot])
            if "latency" in state:
                latency = LatencyTable.from_json(state["latency"])
        elif (sparsifier := sparsity[0].sparsifier) is not None:
            history, latency = sparsifier.history, sparsifier.latency
        if missed := _missed(model, target, latency):
            warnings.warn(missed, ResConvWarning, stacklevel=2)
    return FitResult(history, recipe.epochs if spawns else trainer.current_epoch, latency)


def _missed(model: nn.Module, target: Budget, latency: LatencyTable | None) -> str:
    """Say by how much the zeros miss the target; empty where they meet it.

    It is worked out from the trained net: other processes may have trained it, or an earlier call.
    """
    costs = cost_model(model, example_inputs_of(None, model))
    if latency is not None:
        costs = costs.with_latency(latency.latency_ms, latency.unit_ms)
    zero = [n for n, gate in gates(model).items() if gate.scale.item() == 0]
    over = excess(costs.left(zero), costs.whole, target.limits(*costs.whole))
    if not over:
        return ""
    return (
        f"Sparse training missed its target: {len(zero)} scales are exactly 0, which leaves {over}. "
        "To remove more units changes the outputs; longer sparse training may bring them to 0."
    )


def _stored_state(checkpoint: Path) -> dict[str, Any]:
    """Read the Sparsifier's state, as the processes that trained left it in the checkpoint."""
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"]
    state: dict[str, Any] = next(
        s["sparsifier"] for n, s in stored.items() if n.startswith("SparsityCallback")
    )
    return state
