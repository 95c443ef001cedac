"""The Sparsifier as a Lightning ``Callback``, beside a LightningModule and Trainer of one's own."""

import math
import warnings
from typing import Any

from resconv.errors import MissingExtraError, ResConvWarning, RunError
from resconv.planning.budget import Budget
from resconv.selection.sparsifier import Sparsifier

from .wrapped import find_converted, find_optimizer

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise MissingExtraError("lightning", "train", "The Lightning callback") from error

__all__ = ["SparsityCallback"]

_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel", "XLA")


class SparsityCallback(Callback):
    """Makes the converted net inside a LightningModule sparse while ``Trainer.fit`` trains it.

    The Sparsifier is made when the fit starts, for as many steps as the Trainer will take, and
    attached to the optimizer that holds the scales; schedulers may exist. Its state is saved in
    the Trainer's checkpoints and restored with them. ``macs``, the share of MACs that the zeros
    leave, is logged after every epoch (not with a strength of 0).

    Args:
        target: the budget to arrive at.
        net: the converted net's name in the LightningModule, where it holds several (an EMA copy).
        total_steps: of the optimizer, where the Trainer cannot know (``max_epochs=-1``).
        options: ``strength``, ``mode``, ``example_inputs``, ``learning_rate`` of the Sparsifier.

    ``sparsifier`` is None before the first fit.

    Raises (when the fit starts):
        ConversionError: no converted net, or an optimizer that does not hold its scales.
        RunError: the number of steps is unknown, or the strategy splits parameters.
        BudgetError: see :class:`resconv.Sparsifier`.
    """

    def __init__(
        self,
        target: Budget | None = None,
        *,
        net: str | None = None,
        total_steps: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.target, self.net, self.total_steps, self.options = target, net, total_steps, options
        self.sparsifier: Sparsifier | None = None
        self._resumed: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        strategy = type(trainer.strategy).__name__
        if strategy.startswith(_SHARDED):
            raise RunError(
                f"{strategy} splits parameters over the processes, so no process sees a whole "
                "norm. Convolutional nets fit on one device: train with strategy='ddp'."
            )
        net = find_converted(pl_module, self.net)
        if not net.training:
            warnings.warn(
                "The converted net is in eval mode, and Lightning leaves modes alone: its BatchNorms "
                "would be frozen. Call net.train() before Trainer.fit, unless that is meant.",
                ResConvWarning,
                stacklevel=2,
            )
        steps = self.total_steps
        if steps is None and self.target is not None:
            estimate = trainer.estimated_stepping_batches
            if not math.isfinite(estimate):
                raise RunError(
                    "The Trainer does not know how many steps it will take. Give it max_epochs or "
                    "max_steps, or say SparsityCallback(target, total_steps=...)."
                )
            steps = int(estimate)
        if self.sparsifier is not None:
            self.sparsifier.detach()
        self.sparsifier = Sparsifier(
            net,
            target=self.target,
            total_steps=steps,
            shared=trainer.world_size > 1,
            **self.options,
        )
        self.sparsifier.attach(find_optimizer(net, trainer.optimizers))
        if self._resumed is not None:
            self.sparsifier.load_state_dict(self._resumed)
            self._resumed = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        sparsifier = self.sparsifier
        # Without pressure nothing goes, and 1 would be read as the net's share of the dense one.
        if sparsifier is not None and (self.target is not None or sparsifier.strength > 0):
            # The same on every rank; Lightning wants to hear how ranks are put together all the same.
            share = sparsifier.history[-1].macs
            pl_module.log("macs", share, prog_bar=True, sync_dist=trainer.world_size > 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.sparsifier is not None:
            self.sparsifier.finish()  # warns where the target was not met

    def state_dict(self) -> dict[str, Any]:
        return {} if self.sparsifier is None else {"sparsifier": self.sparsifier.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get("sparsifier")
