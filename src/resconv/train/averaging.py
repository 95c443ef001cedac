"""An exponential average of a net's weights over training, by torch's AveragedModel, with its zeros kept."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resconv.errors import ConversionError
from resconv.nn.gates import copy_zeros, gates

__all__ = ["Average"]

_Tensors = tuple[Tensor, ...] | list[Tensor]


class Average(AveragedModel):
    """The average of ``model``: ``a <- d a + (1 - d) w`` after each step, of parameters and floating-point buffers.

    The decay ``d`` grows with the steps ``t`` up to the one asked for, ``min(decay, (1 + t) / (10 + t))``, so
    that a short training is not averaged with what it began with. Other buffers are copied.

    Raises:
        ConversionError: the net cannot be copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        try:
            super().__init__(model, multi_avg_fn=self._move, use_buffers=True)
        except Exception as error:  # of the net's own __deepcopy__
            raise ConversionError(
                f"ema={decay}: the weights are averaged in a copy of the net, and {type(model).__name__} cannot be "
                f"copied ({type(error).__name__}: {str(error)[:160]}). Train without it."
            ) from error
        self.decay = decay
        self.steps = 0
        self.requires_grad_(False)

    @torch.no_grad()
    def _move(self, averages: _Tensors, values: _Tensors, count: Tensor | int) -> None:
        """Move averages of one type towards the values."""
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, values)
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(averages, values, 1 - decay)

    def follow(self, model: nn.Module, step: int) -> None:
        """Take in what the model's weights are after ``step`` steps."""
        self.steps = step
        self.update_parameters(model)

    @torch.no_grad()
    def keep_exact(self, model: nn.Module) -> None:
        """Set scales and controls to 0 or 1 where the model holds them at that: an average only comes near."""
        own, others = gates(model), gates(self.module)
        if not own:
            return
        copy_zeros(model, self.module)
        for name, gate in own.items():
            for value, average in (
                (gate.scale, others[name].scale),
                (gate.control, others[name].control),
            ):
                if value is not None and average is not None:
                    average.copy_(torch.where(value == 1, value, average))
