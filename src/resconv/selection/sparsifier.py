"""Pressure on the scales until enough of them are exactly 0.

After every ``optimizer.step()`` a proximal L1 step is taken on the layer scaling factors:
``s <- max(s - lr * strength * w, 0)``, with a weight ``w`` for each unit (mean 1) that grows with
its share of the MACs (or of the measured latency) and as ``1 / (s + eps)``: pressure that is the
same on all shrinks a whole residual stage without making one scale 0 (reweighted L1).

With a ``target``, no strength has to be found. Every unit is scored by what its removal would do to
the loss to first order, ``sqrt(mean((s dL/ds - (1 - p) dL/dp)^2))`` per share of the cost (a
removed layer becomes the identity, so ``p`` goes to 1 as ``s`` goes to 0; a branch has no ``p``).
It counts for more, the less of its kind is left (see schedule.py). On a schedule that ends at 40 %
of the run, the next units in that order are put under a penalty that grows until their scale is 0.
So exactly enough scales end at 0, and the rest of the run trains the net that will be shipped. A
target in milliseconds is then measured on that net, once, and where it misses, more units go.

``s`` and the norm's weight ``g`` multiply, so L1 alone is cheated (``s`` shrinks, ``g`` grows). After
each step ``(s, g, b)`` becomes ``(s r, g / r, b / r)`` with ``r`` the root mean square of ``g``: the same
function, with the size of the branch in ``s`` alone.

Nothing here waits for the device in an ordinary step: importance stay there until a unit is chosen.

A removed layer leaves ``p * x``, and the removal multiplies ``p`` into linear layers around it. Where
none can take it (SiLU on both sides), it would stay as a multiply. So whenever units have arrived at
0, their removal is worked out, and controls that nothing absorbs are held at exactly 1 from then on
(controls.py).

A unit that the target has brought to 0 rests (see gates.py): the rest of the run does not compute
it, so sparse training gets faster while it goes. Not with several processes, whose reduction of the
gradients waits for every parameter, nor in code from ``torch.compile``.
"""

import math
import warnings
from collections import Counter
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..analysis.inputs import unwrap
from ..errors import (
    BudgetError,
    ConversionError,
    ExportError,
    PruneError,
    ResConvWarning,
    RunError,
)
from ..json_files import to_plain
from ..latency.table import (
    LatencyTable,
    check_latency,
    corrected_limit,
    fitting,
    is_met,
    measure_latency,
)
from ..nn.gates import BranchGate, FactorGate, Gate, ResConv, Segment, gates
from ..planning.budget import Budget, Limits, require_budget
from ..planning.costs import CostModel, cost_model, excess
from ..tables import html_table, text_table
from .controls import Controls
from .importance import Importance
from .outcome import Outcome, Snapshot
from .processes import are_several, by_first, differing_ranks, from_first, is_shared
from .scalars import Scalars, by_name, like, stack
from .schedule import Schedule

__all__ = ["Sparsifier", "check_form"]

_EPS = 0.1
_LEAST_CONTROL = 0.05  # of a removed layer: a control of 0 would cut the net in two
_LEAST_STEPS = 20  # with a target
_REFRESH = 100  # steps between two refreshes without a target


class Sparsifier:
    """Makes the scales of a converted model sparse while the user's own loop trains it.

    Args:
        model: what :func:`resconv.convert` returned.
        optimizer: made from the model's parameters; followed from now on, as by :meth:`attach`.
        macs, params, latency_ms, latency, runtime, threads, batch: the budget to arrive at, as the
            numbers of :class:`resconv.Budget` (``macs=0.5``: half the MACs; ``params`` is its
            ``num_params``); needs ``total_steps``. ``latency`` may also be what
            :func:`resconv.measure_latency` returned for this model: units then weigh by their
            milliseconds. With a limit on the latency it is measured here if not given (in several
            processes by the first, for all).
        target: the same as a budget.
        strength: of the L1 term; not used with a target.
        mode: "proximal" (reaches exactly 0) or "subgradient" (the plain reading of the paper:
            ``strength * sign(s)`` is added to the gradient; never reaches 0).
        total_steps: how many steps the optimizer will take (with gradient accumulation, fewer
            than there are batches). A run that goes on longer keeps its zeros; for one that ends
            earlier, :meth:`finish` says what is missing.
        example_inputs: to count MACs with; by default those of ``convert``.
        learning_rate: of scales and controls, as a share of the optimizer's own.
        shared: whether the processes of ``torch.distributed`` train one net together, so that the
            first one decides for all, and their scales are compared now and then. By default where
            ``model`` is wrapped in DistributedDataParallel.

    Raises:
        ConversionError: the model has no gates, or the optimizer was made from another one.
        BudgetError: the target cannot be reached or limits nothing, ``total_steps`` is missing, or
            both a target and its numbers are given.
        MissingExtraError: the target's runtime is not installed.

    Example:
        >>> model = resconv.convert(net, images).train()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> sparsifier = resconv.Sparsifier(model, optimizer, macs=0.7, total_steps=40)
        >>> for _ in range(40):
        ...     loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1]))
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> sparsifier.finish().met
        True
        >>> compact = resconv.prune(model.eval())
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        macs: float | int | None = None,
        params: float | int | None = None,
        latency_ms: float | int | None = None,
        latency: float | LatencyTable | None = None,
        runtime: str | None = None,
        threads: int | None = None,
        batch: int | None = None,
        target: Budget | None = None,
        strength: float = 1e-3,
        mode: str = "proximal",
        total_steps: int | None = None,
        example_inputs: Any = None,
        learning_rate: float = 0.1,
        shared: bool | None = None,
    ) -> None:
        from ..surgery.provenance import converted, example_inputs_of

        if mode not in ("proximal", "subgradient"):
            raise BudgetError(f"mode={mode!r}; choose 'proximal' or 'subgradient'.")
        if not strength >= 0 or not math.isfinite(strength):
            raise BudgetError(f"strength={strength!r}: give a number from 0 up.")
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise BudgetError(
                f"optimizer={optimizer!r} is a {type(optimizer).__name__}, no torch.optim.Optimizer. "
                "The strength, a budget and all else are given by name: strength=..., macs=0.5."
            )
        table = latency if isinstance(latency, LatencyTable) else None
        numbers = {
            "macs": macs,
            "params": params,
            "latency_ms": latency_ms,
            "latency": None if isinstance(latency, LatencyTable) else latency,
            "runtime": runtime,
            "threads": threads,
            "batch": batch,
        }
        target = _target(target, {k: v for k, v in numbers.items() if v is not None})
        self.shared = is_shared(model) if shared is None else shared and are_several()
        self.model = unwrap(model)
        self.gates = gates(self.model)
        if not self.gates:
            raise ConversionError(
                "The model has no gates. Call resconv.convert(model, example_inputs) first."
            )
        if example_inputs is None:
            converted(self.model)
            example_inputs = example_inputs_of(None, self.model)
        self.strength, self.mode, self.target = strength, mode, target
        self.total_steps = total_steps
        self.history: list[Snapshot] = []
        self.costs: CostModel = cost_model(self.model, example_inputs)
        self._step = 0
        scalars = {
            f"{n}.{kind}": p
            for n, g in gates(self.model, fixed=True).items()
            for kind, p in (("scale", g.scale), ("control", g.control))
            if p is not None
        }
        self._scalars = Scalars(scalars, learning_rate, self._observe, self._finish_step)
        self._importance = Importance({n: self.gates[n] for n in self.costs.names}, scalars)
        removable = {id(g.scale) for g in self.gates.values()}
        self._pulled = torch.tensor([float(id(p) in removable) for p in scalars.values()])
        self._weights = dict.fromkeys(self.costs.names, 1.0)
        # Segments and gates are there whole or not at all: only a target takes them out.
        self._held = {n: g for n, g in self.gates.items() if isinstance(g, Segment | FactorGate)}
        self._shrunk = [n for n in self.costs.names if n not in self._held]
        # What several norms share cannot go into the scale of one of them.
        tied = _tied(self.model)
        every = [(g, n) for g in self.gates.values() if (n := _affine(g)) is not None]
        self._normed = [(g, n) for g, n in every if not {id(n.weight), id(n.bias)} & tied]
        self.latency = table
        self._controls = Controls(self.model, example_inputs)
        self._untimed = False
        self._example_inputs = example_inputs
        self._schedule: Schedule | None = None
        if target is not None:
            check_form(target, mode, total_steps)
            if target.times and table is None:
                self.latency = by_first(
                    lambda: measure_latency(self.model, example_inputs, target), self.shared
                )
        if self.latency is not None:
            if target is not None and target.times:
                fitting(self.latency, self.costs, target)
            self.costs = self.costs.with_latency(self.latency.latency_ms, self.latency.unit_ms)
        if target is not None:
            self._check_reach(target)
            assert total_steps is not None  # check_form
            self._schedule = Schedule(self.costs, target, total_steps)
        if optimizer is not None:
            self.attach(optimizer)

    def _check_reach(self, target: Budget) -> None:
        limits = target.limits(*self.costs.whole)
        if not excess(self.costs.whole, self.costs.whole, limits):
            ms = f", {self.costs.latency_ms:.3g} ms" if self.costs.unit_ms else ""
            raise BudgetError(
                f"The net is within the target as it is ({self.costs.macs:,} MACs, "
                f"{self.costs.num_params:,} parameters{ms}): nothing would be removed. Lower it."
            )
        every = self.costs.compatible(self.costs.names)
        left = self.costs.left(every)
        if self.latency is not None:
            # The net without all its units may have been timed for the table.
            timed = [n.latency_ms for n in self.latency.nets if set(n.removed) == set(every)]
            left = left._replace(latency_ms=min([left.latency_ms, *timed]))
        too_much = excess(left, self.costs.whole, limits)
        if too_much:
            raise BudgetError(
                f"The target cannot be reached: with all {len(every)} units gone "
                f"{too_much} are left. Raise it, or convert with units='all'."
            )

    def __repr__(self) -> str:
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[str, list[str], list[list[object]]]:
        """Return title, header and rows of what a reader wants to know."""
        of = "" if self.total_steps is None else f" of {self.total_steps:,}"
        title = f"Sparsifier of {type(self.model).__name__}, after {self._step:,}{of} steps"
        whole, now = self.costs.whole, self.costs.left(self.removed)
        limits = Limits() if self.target is None else self.target.limits(*whole)
        names = ("MACs", "parameters", "latency (ms)")
        rows: list[list[object]] = [
            [name, before, after, "" if math.isinf(limit) else f"{limit:,.6g}"]
            for name, before, after, limit in zip(names, whole, now, limits, strict=True)
            if name != "latency (ms)" or self.costs.unit_ms
        ]
        rows.insert(0, ["scales above 0", len(self.gates), len(self.gates) - len(self.removed), ""])
        return title, ["", "whole", "without those at 0", "target"], rows

    def attach(self, optimizer: Optimizer) -> "Sparsifier":
        """Follow ``optimizer``: after each of its steps, take a step on the scales.

        The optimizer keeps the scalars in its groups and leaves their update to the Sparsifier (see
        scalars.py), so it does not matter whether schedulers are made before or after. Attached to
        another optimizer, the Sparsifier leaves the first.

        Raises:
            ConversionError: the optimizer does not hold the scales: it was made from another model.
        """
        self._scalars.attach(optimizer)
        self._skip()
        self._normalise()
        self._snapshot()
        return self

    def detach(self) -> None:
        """Leave the optimizer; scales at 0 are then held there by nothing."""
        self._scalars.detach()
        for gate in self.gates.values():
            gate.skipped = False
        for segment in self._held.values():
            segment.waiting = False

    def finish(self) -> Outcome:
        """Leave the optimizer, and return where the run stands.

        A run that stopped before its zeros were all there gets a warning that says what is missing.
        """
        self.detach()
        if not self.history or self.history[-1].step != self._step:
            self._snapshot()
        outcome = self.outcome()
        if not outcome.met:
            warnings.warn(str(outcome), stacklevel=2)
        return outcome

    def outcome(self) -> Outcome:
        """Return where the run stands now; nothing changes."""
        removed = self.removed
        left = self.costs.left(removed)
        over = ""
        pending: tuple[str, ...] = ()
        if self._schedule is not None:
            over = excess(left, self.costs.whole, self._schedule.limits)
            if over:
                planned = [*self._schedule.taken, *self._schedule.missing(self._importance.read())]
                pending = tuple(n for n in planned if n not in removed)
        return Outcome(
            step=self._step,
            total_steps=self.total_steps,
            removed=tuple(removed),
            pending=pending,
            macs=left.macs,
            num_params=left.num_params,
            latency_ms=left.latency_ms if self.costs.unit_ms else None,
            over=over,
        )

    def _observe(self, grads: Tensor, seen: Tensor) -> None:
        if self.mode == "subgradient":
            signs = self._scalars.values().sign()
            grads.add_(self._pulled.to(grads.device) * signs, alpha=self.strength)
        elif self.target is not None:
            self._importance.add(self._scalars.values(), grads, seen)

    def _finish_step(self, optimizer: Optimizer) -> None:
        self._step += 1
        self._project()
        self._normalise()
        if self._schedule is not None:
            self._follow(self._schedule)
        elif self.mode == "proximal":
            self._shrink(optimizer)
            if self._step % _REFRESH == 0:
                self._controls.pull(self.removed)
            self._controls.hold(slowly=True)
        self._keep_sums()
        every = max(1, (self.total_steps or 2000) // 100)
        if self._step % every == 0:
            self._snapshot()

    @torch.no_grad()
    def _project(self) -> None:
        """Keep ``s >= 0``, and ``p >= 0``, so that a ReLU behind the unit can go with it."""
        if self.mode == "proximal":
            scales: list[Tensor] = [g.scale for g in self.gates.values()]
            torch._foreach_clamp_min_(scales, 0.0)
        controls: list[Tensor] = [g.control for g in self.gates.values() if g.control is not None]
        if controls:
            torch._foreach_clamp_min_(controls, 0.0)
        taken = set() if self._schedule is None else set(self._schedule.taken)
        whole: list[Tensor] = [g.scale for n, g in self._held.items() if n not in taken]
        if whole:
            torch._foreach_zero_(whole)
            torch._foreach_add_(whole, 1.0)

    @torch.no_grad()
    def _keep_sums(self) -> None:
        """Hold one side of every sum above 0: with both at 0 nothing would be left of it."""
        for name, others in self.costs.excluded.items():
            mine = self.gates[name].scale
            for other in others:
                if name < other:
                    theirs = self.gates[other].scale
                    theirs.copy_(torch.where(mine == 0, theirs.clamp_min(_LEAST_CONTROL), theirs))

    @torch.no_grad()
    def _normalise(self) -> None:
        """Put the size of every normalised branch into its scale; the function stays the same."""
        found = self._normed
        if not found:
            return
        weights = [n.weight for _, n in found]
        root = [math.sqrt(w.numel()) for w in weights]
        ratios = torch.stack(torch._foreach_norm(weights)).div_(
            torch.tensor(root, device=weights[0].device)
        )
        # What is normalised stays as it is to the last bit, or a resumed run would drift away from
        # the whole one.
        still = (ratios <= 1e-6) | ((ratios - 1).abs() <= 1e-6)
        ratios = torch.where(still, torch.ones_like(ratios), ratios)
        pieces = [r.to(w.dtype) for r, w in zip(ratios.unbind(), weights, strict=True)]
        torch._foreach_div_(weights, pieces)
        torch._foreach_div_([n.bias for _, n in found], pieces)
        scales: list[Tensor] = [g.scale for g, _ in found]
        torch._foreach_mul_(scales, like(scales, pieces))

    def _shrink(self, optimizer: Optimizer) -> None:
        """Take the reweighted proximal L1 step."""
        names = self._shrunk
        if not names:
            return
        if self._step % _REFRESH == 1:
            values = stack([self.gates[n].scale for n in names]).tolist()
            cost = self.costs.own_ms if self.costs.unit_ms else self.costs.own_macs
            raw = {n: cost(n) / (abs(v) + _EPS) for n, v in zip(names, values, strict=True)}
            total = max(sum(raw.values()) / len(raw), 1e-12)
            self._weights = {n: w / total for n, w in raw.items()}
        rate = max(float(g["lr"]) for g in optimizer.param_groups)
        scales: list[Tensor] = [self.gates[n].scale for n in names]
        torch._foreach_sub_(scales, [rate * self.strength * self._weights[n] for n in names])
        torch._foreach_clamp_min_(scales, 0.0)

    def _follow(self, schedule: Schedule) -> None:
        step = self._step
        if schedule.due(step):
            before = len(schedule.taken)
            schedule.choose(step, self._importance.read(), lambda n: self.gates[n].scale.item())
            if self.shared:
                schedule.load_state_dict(from_first(schedule.state_dict()))
            if len(schedule.taken) != before:
                self._skip()
            if self.target is not None and self.target.times and schedule.settled(step):
                self._check_latency(schedule, self.target)
        fades = {n: f.left(step) for n, f in schedule.fading.items()}
        arrived = [n for n, left in fades.items() if left <= 0]
        for name in arrived:
            del schedule.fading[name]
            schedule.zero.append(name)
        if arrived:
            self._skip()
        # The shortcut comes as the conv goes: from p = 0 nothing would be left to pass.
        self._keep_controls({n: min(1.0, 1 - left) for n, left in fades.items()})
        if schedule.fading:
            bounds = {n: f.scale * fades[n] for n, f in schedule.fading.items()}
            torch._foreach_clamp_max_(
                [self.gates[n].scale for n in schedule.fading], list(bounds.values())
            )
            for name in bounds.keys() & self._held.keys():
                self._held[name].scale.fill_(bounds[name])
        if schedule.zero:
            torch._foreach_zero_([self.gates[n].scale for n in schedule.zero])
            self._keep_controls(dict.fromkeys(schedule.zero, _LEAST_CONTROL))
            self._controls.hold()
        if arrived:
            self._controls.settle(schedule.zero)

    def _keep_controls(self, least: dict[str, float]) -> None:
        """Hold the controls of the named units (branches have none) at their least or above."""
        controls = {n: c for n in least if (c := self.gates[n].control) is not None}
        if controls:
            torch._foreach_clamp_min_(list(controls.values()), [least[n] for n in controls])

    def _skip(self) -> None:
        """Let the units that the schedule brought to 0 rest, and those inside them."""
        zero = [] if self._schedule is None or are_several() else self._schedule.zero
        gone = self.costs.gone(zero)
        for name, gate in self.gates.items():
            gate.skipped = name in gone
        taken = () if self._schedule is None else self._schedule.taken
        for name, segment in self._held.items():
            segment.waiting = name not in taken

    def _compare(self) -> None:
        every: list[Tensor] = [g.scale for g in self.gates.values()]
        every += [g.control for g in self.gates.values() if g.control is not None]
        ranks = differing_ranks(stack(every))
        if ranks:
            raise RunError(
                f"After step {self._step} the scales of rank {', '.join(map(str, ranks))} are not "
                "those of rank 0: the processes are not training one net. Call the model that is "
                "wrapped in DistributedDataParallel in the training loop, not the one inside it, "
                "and convert before wrapping."
            )

    def _check_latency(self, schedule: Schedule, target: Budget) -> None:
        """Time the net that the zeros leave; where it misses the target, let more units go."""
        table = self.latency
        assert table is not None
        if table.check_of(schedule.zero) is not None or self._untimed:
            return

        def check() -> LatencyTable:
            return check_latency(self.model, self._example_inputs, table, schedule.zero)[0]

        try:
            self.latency = by_first(check, self.shared)
        except (PruneError, ExportError) as error:
            # Not worth losing the run for; the plan will meet it again.
            self._untimed = True
            text = f"The net was not timed during training: {error}"
            warnings.warn(text, ResConvWarning, stacklevel=2)
            return
        found = self.latency.check_of(schedule.zero)
        assert found is not None
        if not is_met(target, found):
            schedule.limit_ms = min(schedule.limit_ms, corrected_limit(target, self.latency, found))

    def _snapshot(self) -> None:
        if self.shared:
            self._compare()
        scales = by_name({n: g.scale for n, g in self.gates.items()})
        controls = by_name({n: g.control for n, g in self.gates.items() if g.control is not None})
        left = self.costs.left([n for n in self.costs.names if scales[n] == 0])
        share = left.macs / max(1, self.costs.macs)
        ms = left.latency_ms if self.costs.unit_ms else None
        self.history.append(Snapshot(self._step, scales, controls, share, ms))

    @property
    def removed(self) -> list[str]:
        """Names of the units whose scale is 0."""
        scales = by_name({n: g.scale for n, g in self.gates.items()})
        return [n for n, s in scales.items() if s == 0]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data."""
        state: dict[str, Any] = {
            "step": self._step,
            "importance": self._importance.read(),
            "fading": {},
            "zero": [],
            "weights": dict(self._weights),
            "scalars": self._scalars.state_dict(),
            "held": list(self._controls.held),
            "history": to_plain(self.history),
        }
        if self.latency is not None:
            state["latency"] = self.latency.to_json()
        if self._schedule is not None:
            state |= self._schedule.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another Sparsifier's ``state_dict`` (the same model and arguments)."""
        self._step = state["step"]
        self._importance.restore(state["importance"])
        self._weights = dict(state["weights"])
        if "scalars" in state:
            self._scalars.load_state_dict(state["scalars"])
        self._controls.held = list(state.get("held", ()))
        self.history = msgspec.convert(state["history"], list[Snapshot])
        if "latency" in state:
            # A resumed run goes on from what the first one measured.
            self.latency = LatencyTable.from_json(state["latency"])
            self.costs = self.costs.with_latency(self.latency.latency_ms, self.latency.unit_ms)
        if self._schedule is not None:
            self._schedule.costs = self.costs
            self._schedule.load_state_dict(state)
            self._skip()


def _target(target: Budget | None, numbers: dict[str, Any]) -> Budget | None:
    """Return the budget, given whole or as its numbers.

    Raises:
        BudgetError: both are given, or the numbers make no sense.
    """
    if target is not None:
        require_budget(target, "target")
        if numbers:
            raise BudgetError(
                f"target=Budget(...) and {', '.join(f'{k}={v!r}' for k, v in numbers.items())} both say "
                "what to arrive at. Give one of them."
            )
        return target
    if not numbers:
        return None
    if "params" in numbers:
        numbers = {**numbers, "num_params": numbers["params"]}
        del numbers["params"]
    try:
        return Budget(**numbers)
    except BudgetError as error:
        # In the words that were typed.
        raise BudgetError(str(error).replace("num_params", "params")) from None


def check_form(target: Budget, mode: str, total_steps: int | None) -> None:
    """Refuse a target that no run of this kind or length arrives at, whatever the net.

    Raises:
        BudgetError: it says what is missing.
    """
    if mode != "proximal":
        raise BudgetError("A target needs mode='proximal': the subgradient never reaches 0.")
    if not target.sizes:
        raise BudgetError(
            "The target has a threshold only, which is no size to arrive at. Limit macs, "
            "num_params or the latency; or leave the target out and set the strength."
        )
    if not total_steps:
        raise BudgetError(
            f"total_steps={total_steps!r}: with a target, say how many optimizer steps "
            "the run has, so that the zeros are there in time."
        )
    if total_steps < _LEAST_STEPS:
        raise BudgetError(
            f"total_steps={total_steps}: to arrive at a target takes at least "
            f"{_LEAST_STEPS} optimizer steps. Train for more epochs or with smaller batches."
        )


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


def _tied(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that several modules hold."""
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    return {held for held, times in holders.items() if times > 1}
