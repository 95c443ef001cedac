"""Pressure on the scales until enough of them are exactly 0.

After every ``optimizer.step()`` a proximal L1 step is taken on the layer scaling factors:
``s <- max(s - lr * strength * w, 0)``, with a weight ``w`` for each unit (mean 1) that grows with
its share of the MACs and as ``1 / (s + eps)``: pressure that is the same on all shrinks a whole
residual stage without making one scale 0 (reweighted L1).

With a ``target``, no strength has to be found. Every unit is scored by what its removal would do to
the loss to first order, ``sqrt(mean((s dL/ds - (1 - p) dL/dp)^2))`` per MAC (a removed layer becomes
the identity, so ``p`` goes to 1 as ``s`` goes to 0; a branch has no ``p``). On a schedule that ends at
60 % of the run, the next units in that order are put under a penalty that grows until their scale
is 0. So exactly enough scales end at 0, and the rest of the run trains the net that will be shipped.

``s`` and the norm's weight ``g`` multiply, so L1 alone is cheated (``s`` shrinks, ``g`` grows). After
each step ``(s, g, b)`` becomes ``(s r, g / r, b / r)`` with ``r`` the root mean square of ``g``: the same
function, with the size of the branch in ``s`` alone.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .budget import Budget
from .errors import BudgetError, ConversionError
from .gates import BranchGate, Gate, ResConv, gates
from .ledger import Ledger, ledger
from .plan import floor
from .scalars import Scalars
from .trace import unwrap

__all__ = ["Snapshot", "Sparsifier"]

_EPS = 0.1
_LEARN = 0.05  # share of the run that only collects scores
_DONE = 0.6  # share of the run by which every planned scale is 0
_LEAST_CONTROL = 0.05  # of a removed layer: a control of 0 would cut the net in two
_REFRESH = 100  # steps between two refreshes without a target


@dataclass(frozen=True)
class Snapshot:
    """The scales (and controls) after a step, and the share of MACs that the zeros leave."""

    step: int
    scales: dict[str, float]
    controls: dict[str, float]
    macs: float


@dataclass
class _Fade:
    start: int
    end: int
    scale: float


@dataclass
class _State:
    step: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    fading: dict[str, _Fade] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)


class Sparsifier:
    """Makes the scales of a converted model sparse while the user's own loop trains it.

    Args:
        model: what :func:`resconv.convert` returned.
        strength: of the L1 term; not used with a target.
        mode: "proximal" (reaches exactly 0) or "subgradient" (the plain reading of the paper:
            ``strength * sign(s)`` is added to the gradient; never reaches 0).
        target: a budget to arrive at; needs ``total_steps``.
        total_steps: how many optimizer steps the run has.
        example_inputs: to count MACs with; by default those of ``convert``.
        learning_rate: of scales and controls, as a share of the optimizer's own.

    Raises:
        ConversionError: the model has no gates.
        BudgetError: the target cannot be reached, or ``total_steps`` is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float = 1e-3,
        *,
        mode: str = "proximal",
        target: Budget | None = None,
        total_steps: int | None = None,
        example_inputs: Any = None,
        learning_rate: float = 0.1,
    ) -> None:
        from .convert import state_of

        if mode not in ("proximal", "subgradient"):
            raise BudgetError(f"mode={mode!r}; choose 'proximal' or 'subgradient'.")
        if not strength >= 0 or not math.isfinite(strength):
            raise BudgetError(f"strength={strength!r}: give a number from 0 up.")
        self.model = unwrap(model)
        self.gates = gates(self.model)
        if not self.gates:
            raise ConversionError(
                "The model has no gates. Call resconv.convert(model, example_inputs) first."
            )
        if example_inputs is None:
            example_inputs = state_of(self.model).example_inputs
        self.strength, self.mode, self.target = strength, mode, target
        self.total_steps = total_steps
        self.costs: Ledger = ledger(self.model, example_inputs)
        self.history: list[Snapshot] = []
        self._state = _State()
        self._weights = dict.fromkeys(self.costs.names, 1.0)
        self._macs = {n: max(self.costs.own_macs(n), 1) for n in self.costs.names}
        scalars = {
            f"{n}.{kind}": p
            for n, g in self.gates.items()
            for kind, p in (("scale", g.scale), ("control", g.control))
            if p is not None
        }
        self._scalars = Scalars(scalars, learning_rate, self._observe, self._finish_step)
        if target is not None:
            self._check_target(target)

    def _check_target(self, target: Budget) -> None:
        if self.mode != "proximal":
            raise BudgetError("A target needs mode='proximal': the subgradient never reaches 0.")
        if not self.total_steps or self.total_steps < 20:
            raise BudgetError(
                f"total_steps={self.total_steps!r}: with a target, say how many optimizer steps "
                "the run has (at least 20), so that the zeros are there in time."
            )
        limit_macs, limit_params = target.limits(self.costs.macs, self.costs.num_params)
        macs, num_params = floor(self.costs, self.costs.names)
        if macs > limit_macs or num_params > limit_params:
            raise BudgetError(
                f"The target cannot be reached: with all {len(self.costs.names)} units gone "
                f"{macs:,} of {self.costs.macs:,} MACs and {num_params:,} of "
                f"{self.costs.num_params:,} parameters are left. Raise it, or convert with "
                "units='all'."
            )

    def attach(self, optimizer: Optimizer) -> "Sparsifier":
        """Follow ``optimizer``: after each of its steps, take a step on the scales.

        The optimizer keeps the scalars in its groups and leaves their update to the Sparsifier (see
        scalars.py), so it does not matter whether schedulers are made before or after. Attached to
        another optimizer, the Sparsifier leaves the first.

        Raises:
            ConversionError: the optimizer does not hold the scales: it was made from another model.
        """
        self._scalars.attach(optimizer)
        self._normalise()
        self._snapshot()
        return self

    def detach(self) -> None:
        """Leave the optimizer; scales at 0 are then held there by nothing."""
        self._scalars.detach()

    def _observe(self, grads: dict[int, Tensor]) -> None:
        if self.mode == "subgradient":
            for name, gate in self.gates.items():
                if id(gate.scale) in grads:
                    weight = self.strength * self._weights.get(name, 1.0)
                    grads[id(gate.scale)].add_(weight * gate.scale.sign())
        elif self.target is not None:
            self._score(grads)

    def _score(self, grads: dict[int, Tensor]) -> None:
        """Follow the score of each unit: what removing it does to the loss, to first order."""
        names = [n for n in self.costs.names if id(self.gates[n].scale) in grads]
        if not names:
            return
        changes = []
        for name in names:
            gate = self.gates[name]
            change = -gate.scale.detach() * grads[id(gate.scale)]
            if gate.control is not None and id(gate.control) in grads:
                # A layer does not vanish, it becomes the identity: p goes to 1 meanwhile.
                change = change + (1 - gate.control.detach()) * grads[id(gate.control)]
            changes.append(change)
        squares = torch.stack(changes).float().square().tolist()
        state = self._state
        for name, square in zip(names, squares, strict=True):
            if math.isfinite(square):
                old = state.scores.get(name)
                state.scores[name] = square if old is None else 0.98 * old + 0.02 * square

    def _finish_step(self, optimizer: Optimizer) -> None:
        self._state.step += 1
        self._project()
        self._normalise()
        if self.mode == "proximal":
            if self.target is not None:
                self._steer()
            else:
                self._shrink(optimizer)
        every = max(1, (self.total_steps or 2000) // 100)
        if self._state.step % every == 0:
            self._snapshot()

    def _project(self) -> None:
        """Keep ``s >= 0``, and ``p >= 0``, so that a ReLU behind the unit can go with it."""
        if self.mode == "proximal":
            scales: list[Tensor] = [g.scale for g in self.gates.values()]
            torch._foreach_clamp_min_(scales, 0.0)
        controls: list[Tensor] = [g.control for g in self.gates.values() if g.control is not None]
        if controls:
            torch._foreach_clamp_min_(controls, 0.0)

    @torch.no_grad()
    def _normalise(self) -> None:
        """Put the size of every normalised branch into its scale; the function stays the same."""
        found = [(g, n) for g in self.gates.values() if (n := _affine(g)) is not None]
        if not found:
            return
        weights = [n.weight for _, n in found]
        root = [math.sqrt(w.numel()) for w in weights]
        ratios = torch.stack(torch._foreach_norm(weights)).div_(
            torch.tensor(root, device=weights[0].device)
        )
        ratios = torch.where(ratios > 1e-6, ratios, torch.ones_like(ratios))
        pieces = [r.to(w.dtype) for r, w in zip(ratios.unbind(), weights, strict=True)]
        torch._foreach_div_(weights, pieces)
        torch._foreach_div_([n.bias for _, n in found], pieces)
        for ratio, (gate, _) in zip(pieces, found, strict=True):
            gate.scale.mul_(ratio.to(gate.scale.dtype))

    def _shrink(self, optimizer: Optimizer) -> None:
        """Take the reweighted proximal L1 step."""
        if self._state.step % _REFRESH == 1:
            mean = sum(self._macs.values()) / len(self._macs)
            raw = {
                n: self._macs[n] / mean / (abs(self.gates[n].scale.item()) + _EPS)
                for n in self.costs.names
            }
            total = sum(raw.values()) / len(raw)
            self._weights = {n: w / total for n, w in raw.items()}
        rate = max(float(g["lr"]) for g in optimizer.param_groups)
        for name in self.costs.names:
            scale = self.gates[name].scale
            scale.sub_(rate * self.strength * self._weights[name]).clamp_(min=0.0)

    def _steer(self) -> None:
        state, total = self._state, self.total_steps
        assert total is not None
        window = max(1, total // 10)
        refresh = max(1, total // 200)
        if state.step >= total * _LEARN and state.step % refresh == 0:
            self._choose(total, window)
        for name, fade in list(state.fading.items()):
            scale = self.gates[name].scale
            left = (fade.end - state.step) / max(1, fade.end - fade.start)
            control = self.gates[name].control
            if control is not None:
                # The shortcut comes as the conv goes: from p = 0 nothing would be left to pass.
                control.clamp_(min=min(1.0, 1 - left))
            if left <= 0:
                scale.zero_()
                del state.fading[name]
                state.zero.append(name)
            else:
                scale.clamp_(max=fade.scale * left)
        for name in state.zero:
            gate = self.gates[name]
            gate.scale.zero_()
            if gate.control is not None:
                gate.control.clamp_(min=_LEAST_CONTROL)

    def _choose(self, total: int, window: int) -> None:
        """Put the next units under pressure, as many as the schedule asks for by now."""
        state = self._state
        assert self.target is not None
        last = total * _DONE - window
        first = total * _LEARN
        progress = min(1.0, (state.step - first) / max(1.0, last - first))
        limits = self.target.limits(self.costs.macs, self.costs.num_params)
        whole = (self.costs.macs, self.costs.num_params)
        taken = [*state.zero, *state.fading]
        while True:
            saved = self.costs.saving(taken)
            size = (whole[0] - saved.macs, whole[1] - saved.num_params)
            # Where the schedule wants the net to be now; the limit itself at the end.
            wanted = [
                w - max(0.0, w - min(w, lim)) * progress
                for w, lim in zip(whole, limits, strict=True)
            ]
            if all(s <= w + 1e-9 for s, w in zip(size, wanted, strict=True)):
                return
            name = self._least(
                taken, [max(0.0, s - lim) for s, lim in zip(size, limits, strict=True)]
            )
            if name is None:
                return
            taken.append(name)
            end = min(state.step + window, max(state.step + 1, int(total * 0.95)))
            state.fading[name] = _Fade(state.step, end, self.gates[name].scale.item())

    def _least(self, taken: list[str], missing: list[float]) -> str | None:
        """Return the unit whose removal costs least for what it brings nearer to the limits.

        ``missing`` is what is over the limits (MACs, parameters). More than that is of no use, so
        the last unit is one that fits, not the one that is cheapest per MAC.
        """
        whole = (max(1, self.costs.macs), max(1, self.costs.num_params))
        now = self.costs.saving(taken)
        best, best_score = None, math.inf
        for name in self.costs.names:
            if name in taken or self.costs.empties(name, taken):
                continue
            then = self.costs.saving([*taken, name])
            gains = (then.macs - now.macs, then.num_params - now.num_params)
            useful = sum(min(g, m) / w for g, m, w in zip(gains, missing, whole, strict=True))
            if useful <= 0:
                continue
            score = math.sqrt(self._state.scores.get(name, math.inf)) / useful
            if best is None or score < best_score:
                best, best_score = name, score
        return best

    def _snapshot(self) -> None:
        scales = {n: g.scale.item() for n, g in self.gates.items()}
        zero = [n for n in self.costs.names if scales[n] == 0]
        left = self.costs.macs - self.costs.saving(zero).macs
        controls = {n: g.control.item() for n, g in self.gates.items() if g.control is not None}
        self.history.append(
            Snapshot(self._state.step, scales, controls, left / max(1, self.costs.macs))
        )

    @property
    def removed(self) -> list[str]:
        """Names of the units whose scale is 0."""
        return [n for n, g in self.gates.items() if g.scale.item() == 0]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data."""
        state = self._state
        return {
            "step": state.step,
            "scores": dict(state.scores),
            "fading": {n: [f.start, f.end, f.scale] for n, f in state.fading.items()},
            "zero": list(state.zero),
            "weights": dict(self._weights),
            "scalars": self._scalars.state_dict(),
            "history": [[s.step, s.scales, s.controls, s.macs] for s in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = _State(
            state["step"],
            dict(state["scores"]),
            {n: _Fade(*f) for n, f in state["fading"].items()},
            list(state["zero"]),
        )
        self._weights = dict(state["weights"])
        if "scalars" in state:
            self._scalars.load_state_dict(state["scalars"])
        self.history = [Snapshot(*s) for s in state["history"]]


def _affine(gate: Gate) -> Any:
    """Return the gate's BatchNorm where it has a weight and a bias, else None."""
    norm: Any = None
    if isinstance(gate, ResConv):
        norm = gate.norm
    elif isinstance(gate, BranchGate):
        norm = gate.module
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return None
    weight: Tensor | None = norm.weight
    return None if weight is None or norm.bias is None else norm
