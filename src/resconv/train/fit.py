"""One training run by Lightning's Trainer: resumable, logged, in the machine's best precision."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from resconv.budget import Budget
from resconv.data import ImageData
from resconv.errors import RunError
from resconv.sparsify import Snapshot

from .module import Classifier
from .precision import Precision, choose_precision
from .recipe import Recipe

__all__ = ["FitResult", "Recipe", "fit"]


@dataclass(frozen=True)
class FitResult:
    """The scales over training (empty without a target), and how many epochs were run."""

    history: list[Snapshot]
    epochs: int


def fit(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    folder: Path,
    *,
    target: Budget | None = None,
    teacher: nn.Module | None = None,
    precision: Precision | None = None,
    devices: int | str = "auto",
    progress: bool = True,
    callbacks: tuple[Callback, ...] = (),
) -> FitResult:
    """Train ``model`` in place; ``folder`` keeps the checkpoints and ``metrics.csv``.

    A run that was stopped goes on from its last whole epoch when called again with the same
    folder.

    Raises:
        RunError: the checkpoint does not fit the model.
    """
    precision = precision or choose_precision()
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if precision.channels_last:
        model.to(memory_format=torch.channels_last)
    module = Classifier(
        model, data, recipe, channels_last=precision.channels_last, target=target, teacher=teacher
    )
    # One file, written over after every epoch.
    checkpoint = ModelCheckpoint(
        folder, filename="last", save_top_k=1, enable_version_counter=False
    )
    shown: list[Callback] = [RichProgressBar(leave=False)] if progress else []
    last = folder / "last.ckpt"
    kwargs: dict[str, Any] = {}
    if not torch.cuda.is_available():
        kwargs["accelerator"] = "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=recipe.epochs,
            precision=precision.name,  # type: ignore[arg-type]
            devices=1 if kwargs and devices == "auto" else devices,
            callbacks=[checkpoint, *shown, *callbacks],
            logger=CSVLogger(folder.parent, name=folder.name, version=""),
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            benchmark=torch.cuda.is_available(),
            log_every_n_steps=20,
            **kwargs,
        )
        try:
            trainer.fit(module, ckpt_path=str(last) if last.is_file() else None)
        except SystemExit:
            if trainer.interrupted:  # Ctrl-C, which Lightning turns into an exit
                raise KeyboardInterrupt from None
            raise
        except RuntimeError as error:
            if last.is_file() and "state_dict" in str(error):
                raise RunError(
                    f"The checkpoint {last} belongs to another net: {str(error)[:200]}. "
                    "Start anew with --fresh."
                ) from error
            raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    module.model.to("cpu")
    history = module.sparsifier.history if module.sparsifier is not None else []
    return FitResult(history, trainer.current_epoch)
