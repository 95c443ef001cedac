"""The Sparsifier as a Hugging Face ``TrainerCallback``."""

from dataclasses import asdict
from typing import Any

from torch.optim import Optimizer

from resconv.errors import MissingExtraError, RunError
from resconv.planning.budget import Budget
from resconv.selection.sparsifier import Sparsifier

from .wrapped import find_converted, find_optimizer

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise MissingExtraError("transformers", "hf", "The Hugging Face callback") from error

__all__ = ["SparsityCallback"]


class SparsityCallback(TrainerCallback, ExportableState):
    """Makes the converted net that a ``transformers.Trainer`` trains sparse.

    The Sparsifier is made when training starts, for ``state.max_steps`` steps, and attached to the
    Trainer's optimizer; its scheduler exists by then. The state goes into the Trainer's
    checkpoints (``trainer_state.json``) and comes back with ``resume_from_checkpoint``. ``macs``,
    the share of MACs that the zeros leave, joins every log.

    Args:
        target: the budget to arrive at.
        net: the converted net's name in the Trainer's model, where it holds several.
        options: ``strength``, ``mode``, ``example_inputs``, ``learning_rate`` of the Sparsifier.

    ``sparsifier`` is None before training.

    Raises (when training starts):
        ConversionError: no converted net.
        RunError: a checkpoint that was written without this callback, or a setting that splits
            parameters over processes.
        BudgetError: see :class:`resconv.Sparsifier`.
    """

    def __init__(
        self,
        target: Budget | dict[str, Any] | None = None,
        *,
        net: str | None = None,
        **options: Any,
    ) -> None:
        # A dict is what the Trainer hands over when it makes its callbacks anew from a checkpoint.
        self.target = Budget(**target) if isinstance(target, dict) else target
        self.net, self.options = net, options
        self.sparsifier: Sparsifier | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise RunError(
                "FSDP and DeepSpeed split parameters over the processes, so no process sees a "
                "whole norm. Convolutional nets fit on one device: train with plain DDP (torchrun)."
            )
        net = find_converted(kwargs["model"], self.net)
        if self.sparsifier is not None:
            self.sparsifier.detach()
        self.sparsifier = Sparsifier(
            net,
            target=self.target,
            total_steps=state.max_steps,
            shared=args.world_size > 1,
            **self.options,
        )
        self.sparsifier.attach(find_optimizer(net, [_innermost(kwargs["optimizer"])]))
        if state.global_step > 0:
            saved = (state.stateful_callbacks or {}).get(type(self).__name__)
            saved = saved[0] if isinstance(saved, list) and saved else saved
            if not isinstance(saved, dict) or not saved.get("attributes", {}).get("resumed"):
                raise RunError(
                    f"The checkpoint of step {state.global_step} was written without the "
                    "SparsityCallback, so scores and zeros are not known. Start sparse training "
                    "anew: load the weights into the net and call train() without "
                    "resume_from_checkpoint."
                )
            self.sparsifier.load_state_dict(saved["attributes"]["resumed"])

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self.sparsifier is not None and logs is not None:
            share = self.sparsifier.history[-1].macs
            logs["macs"] = share
            if state.log_history:
                state.log_history[-1].setdefault("macs", share)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # With load_best_model_at_end the best may be a net from before the zeros: this says so.
        if self.sparsifier is not None:
            self.sparsifier.finish()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer stores: ``args`` to make this anew, and the Sparsifier's state."""
        target = None if self.target is None else asdict(self.target)
        resumed = None if self.sparsifier is None else self.sparsifier.state_dict()
        return {"args": {"target": target, "net": self.net}, "attributes": {"resumed": resumed}}


def _innermost(optimizer: Any) -> Optimizer:
    """Return torch's optimizer inside accelerate's."""
    while hasattr(optimizer, "accelerator_state"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, Optimizer)
    return optimizer
