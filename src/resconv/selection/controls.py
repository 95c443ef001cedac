"""Controls that nothing can absorb are brought to exactly 1, so that a removal leaves no multiply."""

from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.recorder import record
from ..errors import ResConvError
from ..nn.gates import gates, is_leaf
from ..surgery.trial import generic, unabsorbed

__all__ = ["Controls"]

_PULL = 0.02  # of the way to 1, a step
_NEAR = 1e-3  # from here on it is 1


class Controls:
    """Knows whose control has to be 1, by working out the removal on a record of the model."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model = model
        self.params = {n: g.control for n, g in gates(model).items() if g.control is not None}
        self.held: list[str] = []
        self._graph = None
        if self.params:
            self._graph = record(model, example_inputs, leaf=is_leaf)
            self._graph.output = None  # the tensors are not needed

    def settle(self, removed: list[str]) -> None:
        """Hold the controls at 1 that a removal of these units would leave over.

        A control at 1 can stand in the way of another (both feed one sum), so this goes on until
        nothing is left over.
        """
        while more := self._left_over(removed):
            self.held += more
            self.hold()

    def pull(self, removed: list[str]) -> None:
        """Choose anew whose control is to move to 1: units at 0 may come back."""
        self.held = []
        while more := self._left_over(removed):
            self.held += more

    @torch.no_grad()
    def hold(self, *, slowly: bool = False) -> None:
        """Set the held controls to 1, or move them a step towards it."""
        held: list[Tensor] = [self.params[n] for n in self.held]
        if not held:
            return
        if not slowly:
            torch._foreach_zero_(held)
            torch._foreach_add_(held, 1.0)
            return
        for control in held:
            moved = control + _PULL * (1 - control)
            near = (1 - moved).abs() < _NEAR
            control.copy_(torch.where(near, torch.ones_like(moved), moved))

    def _left_over(self, removed: list[str]) -> list[str]:
        if self._graph is None or not any(n in self.params for n in removed):
            return []
        # With values of no meaning: what happens to be 1 now is not yet absorbed for good.
        free = [p for n, p in self.params.items() if n not in self.held]
        held = [self.params[n] for n in self.held]
        try:
            with generic(free), generic(held, 1.0, 1.0):
                found = unabsorbed(self.model, self._graph, tuple(removed))
        except ResConvError:
            return []  # prune will say what is wrong
        return [n for n in found if n in self.params and n not in self.held]
