"""What removing each unit would do to the loss, to first order, followed while the net is trained."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nn.gates import Gate

__all__ = ["Importance"]

_KEEP = 0.98  # of the old score a step


class Importance:
    """A running mean of ``(s dL/ds - (1 - p) dL/dp)^2`` for each unit.

    A removed layer does not vanish, it becomes the identity: as ``s`` goes to 0, ``p`` goes to 1. A
    branch has no ``p``. It stays on the device until it is read.
    """

    def __init__(self, gates: Mapping[str, Gate], scalars: Mapping[str, Tensor]) -> None:
        self.gates = dict(gates)
        self._values: Tensor | None = None  # by unit; NaN: not seen yet
        place = {id(p): i for i, p in enumerate(scalars.values())}
        # A branch reads the 0 that is put behind the vector.
        self._scales = torch.tensor([place[id(g.scale)] for g in self.gates.values()])
        self._controls = torch.tensor(
            [len(place) if g.control is None else place[id(g.control)] for g in self.gates.values()]
        )

    def add(self, values: Tensor, grads: Tensor, seen: Tensor) -> None:
        """Take in one step: all scalars, their gradients (0 where ``seen`` is false)."""
        if self._scales.device != values.device:
            self._scales = self._scales.to(values.device)
            self._controls = self._controls.to(values.device)
        scale = (-values * grads)[self._scales]
        control = F.pad((1 - values) * grads, (0, 1))[self._controls]
        now = (scale + control).square()
        old = torch.full_like(now, math.nan) if self._values is None else self._values
        old = old.to(now.device)
        new = torch.where(old.isnan(), now, _KEEP * old + (1 - _KEEP) * now)
        # A step that overflowed says nothing, nor does one in which the unit had no gradient.
        self._values = torch.where(now.isfinite() & seen[self._scales], new, old)

    def read(self) -> dict[str, float]:
        """Return the importance of the units that were seen; this waits for the device."""
        if self._values is None:
            return {}
        values = zip(self.gates, self._values.tolist(), strict=True)
        return {n: v for n, v in values if math.isfinite(v)}

    def restore(self, importance: Mapping[str, float]) -> None:
        """Go on from what :meth:`read` returned."""
        values = [importance.get(n, math.nan) for n in self.gates]
        self._values = torch.tensor(values, dtype=torch.float32)
