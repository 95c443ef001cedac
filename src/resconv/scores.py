"""What removing each unit would do to the loss, to first order, followed while the net is trained."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .gates import Gate
from .scalars import stack

__all__ = ["Scores"]

_KEEP = 0.98  # of the old score a step


class Scores:
    """A running mean of ``(s dL/ds - (1 - p) dL/dp)^2`` for each unit.

    A removed layer does not vanish, it becomes the identity: as ``s`` goes to 0, ``p`` goes to 1. A
    branch has no ``p``. The scores stay on the device until they are read.
    """

    def __init__(self, gates: Mapping[str, Gate]) -> None:
        self.gates = dict(gates)
        self._values: Tensor | None = None  # by unit; NaN: not seen yet

    def add(self, grads: Mapping[int, Tensor]) -> None:
        """Take in the gradients of one step, by the id of the scalar."""
        unseen = torch.full((), math.nan, device=self._device())
        changes = []
        for gate in self.gates.values():
            if id(gate.scale) not in grads:
                changes.append(unseen)
                continue
            change = -gate.scale.detach() * grads[id(gate.scale)]
            if gate.control is not None and id(gate.control) in grads:
                change = change + (1 - gate.control.detach()) * grads[id(gate.control)]
            changes.append(change)
        now = stack(changes).square()
        old = torch.full_like(now, math.nan) if self._values is None else self._values
        old = old.to(now.device)
        new = torch.where(old.isnan(), now, _KEEP * old + (1 - _KEEP) * now)
        # A step that overflowed says nothing.
        self._values = torch.where(now.isfinite(), new, old)

    def read(self) -> dict[str, float]:
        """Return the scores of the units that were seen; this waits for the device."""
        if self._values is None:
            return {}
        values = zip(self.gates, self._values.tolist(), strict=True)
        return {n: v for n, v in values if math.isfinite(v)}

    def restore(self, scores: Mapping[str, float]) -> None:
        """Go on from what :meth:`read` returned."""
        values = [scores.get(n, math.nan) for n in self.gates]
        self._values = torch.tensor(values, device=self._device(), dtype=torch.float32)

    def _device(self) -> torch.device:
        return next(iter(self.gates.values())).scale.device
