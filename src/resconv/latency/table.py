"""Milliseconds that leave with each unit, measured on this machine.

Real nets are timed: converted, some units removed, norms folded, in the runtime that was asked for.
Units with the same operations on the same shapes count as one kind, and all kinds are weighed
together (weighing.py), so a net of a hundred layers needs a dozen timings. The result is an
additive model; that it holds for a finished net is not believed but checked, by timing that net.
"""

import copy
import importlib.util
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace
from torch import nn

from ..analysis.inputs import as_batch, unwrap
from ..errors import BudgetError, MissingExtraError, PlanError, PruneError
from ..files import write_text
from ..json_files import parse_json, read_bounded, to_json
from ..nn.gates import gates
from ..planning.budget import RUNTIMES, Budget
from ..planning.costs import CostModel, cost_model
from ..planning.plan import Plan
from ..storage.exporting import onnx_bytes
from ..surgery.fusion import fuse
from ..surgery.pruning import prune
from .least_squares import design, solve
from .timing import Timing, onnx_runner, processor, time_together, torch_runner, torch_threads

__all__ = [
    "LatencyTable",
    "TimedNet",
    "check_latency",
    "corrected_limit",
    "fitting",
    "is_met",
    "measure_latency",
    "require_runtime",
    "time_nets",
]

_LEAST_ERROR = 0.005  # relative; what repeats cannot average away
_SECONDS = 15.0
_CHECK = 5.0
_VERSION = 1  # of the file; one without a number is of this version, too


class TimedNet(Struct, frozen=True, forbid_unknown_fields=True):
    """A net without some units: its median, and the whole net's in the same rounds."""

    removed: tuple[str, ...]
    latency_ms: float
    dense_ms: float
    predicted_ms: float


class LatencyTable(Struct, frozen=True, forbid_unknown_fields=True):
    """What :func:`measure_latency` found; JSON in and out.

    ``unit_ms`` leaves with a unit, beyond what leaves with the units inside it. ``nets`` are the
    timings that the model was made from, ``checks`` those of finished nets, which a plan made again
    from the same table reads instead of timing anew. ``error`` is the largest relative deviation of
    the model from ``nets``.

    Example:
        >>> model = resconv.convert(net, images)
        >>> budget = resconv.Budget(latency=0.9)
        >>> table = resconv.measure_latency(model, images, budget, seconds=0.1)
        >>> table.save("latency.json")
        >>> resconv.LatencyTable.load("latency.json") == table
        True
    """

    runtime: str
    batch: int
    threads: int
    device: str
    processor: str
    torch_version: str
    latency_ms: float
    unit_ms: dict[str, float]
    error: float
    nets: tuple[TimedNet, ...] = ()
    checks: tuple[TimedNet, ...] = ()

    def __post_init__(self) -> None:
        nets = (*self.nets, *self.checks)
        times = (self.latency_ms, *self.unit_ms.values(), *(n.latency_ms for n in nets))
        if not all(math.isfinite(t) and t >= 0 for t in (*times, self.error)):
            raise PlanError("A latency table has a time that is negative or infinite.")
        if self.runtime not in RUNTIMES or self.batch < 1 or self.threads < 1:
            raise PlanError(
                f"A latency table for runtime={self.runtime!r}, batch={self.batch}, "
                f"threads={self.threads} cannot be: runtimes are {' and '.join(RUNTIMES)}, and at "
                "least one image and one thread are needed."
            )

    def check_of(self, removed: Iterable[str]) -> TimedNet | None:
        """Return the timing of the net without exactly these units, where there is one."""
        wanted = set(removed)
        return next((c for c in self.checks if set(c.removed) == wanted), None)

    def why_unfit(self, costs: CostModel, budget: Budget) -> str | None:
        """Return why the table says nothing about this model, budget or machine; else None."""
        if set(costs.names) != set(self.unit_ms):
            odd = sorted(set(costs.names) ^ set(self.unit_ms))
            return f"it was measured on another net ({', '.join(odd[:3])} is in one of both only)"
        for name in ("runtime", "batch", "threads"):
            asked = getattr(budget, name)
            if asked is not None and asked != getattr(self, name):
                return f"it holds {name}={getattr(self, name)!r}, asked is {asked!r}"
        if self.device != "cpu" and not _is_here(self.device):
            return f"it was measured on {self.device!r}, which this machine does not have"
        if self.processor != processor():
            return f"it was measured on another machine ({self.processor}; this is {processor()})"
        return None

    def to_json(self) -> str:
        return to_json(self, _VERSION)

    @classmethod
    def from_json(cls, text: str | bytes, place: str = "The latency table") -> "LatencyTable":
        """Read a table; ``place`` names it in errors.

        Raises:
            PlanError: no JSON, of a newer version, or no table.
        """
        return parse_json(text, cls, place, PlanError, upgrades=())

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        return cls.from_json(read_bounded(Path(path), PlanError), str(path))


def _is_here(device: str) -> bool:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def require_runtime(runtime: str) -> None:
    """Make sure that the runtime is installed.

    Raises:
        MissingExtraError: it is not.
    """
    needed = {"torch": (), "onnxruntime": ("onnx", "onnxscript", "onnxruntime")}[runtime]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "A latency in ONNX Runtime")


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget,
    *,
    seconds: float = _SECONDS,
    seed: int = 0,
) -> LatencyTable:
    """Return the milliseconds that leave with each unit of a converted model, which stays as it is.

    Weights do not matter, so this can be asked before training.

    Args:
        model: what :func:`resconv.convert` returned.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; repeated to
            the budget's batch.
        budget: names the runtime, the batch and the threads.
        seconds: about how long to time. Building and exporting the nets comes on top.
        seed: of which units the timed nets lack.

    Raises:
        ConversionError: the model was not converted.
        MissingExtraError: the runtime is not installed.

    Example:
        >>> model = resconv.convert(net, images)
        >>> budget = resconv.Budget(latency=0.9, threads=1)
        >>> table = resconv.measure_latency(model, images, budget, seconds=0.1)
        >>> sorted(table.unit_ms) == sorted(resconv.gates(model))
        True
    """
    from ..surgery.provenance import converted

    model = unwrap(model)
    converted(model)
    require_runtime(budget.runtime)
    costs = cost_model(model, example_inputs)
    device = next(model.parameters()).device
    bare = LatencyTable(
        runtime=budget.runtime,
        batch=budget.batch,
        threads=budget.threads or torch.get_num_threads(),
        device="cpu" if budget.runtime == "onnxruntime" else str(device),
        processor=processor(),
        torch_version=str(torch.__version__),
        latency_ms=0.0,
        unit_ms={},
        error=0.0,
    )
    ready = _ready(model)
    kinds: dict[str, list[str]] = {}
    for name in costs.names:
        kinds.setdefault(costs.signatures[name], []).append(name)
    groups = list(kinds.values())
    nets: dict[tuple[str, ...], nn.Module] = {}
    for subset in design(len(groups), seed):
        asked = [n for n in costs.names if any(n in groups[k] for k in subset)]
        removed = costs.compatible(asked)
        try:
            nets[removed] = _deployed(ready, removed, example_inputs)
        except PruneError:
            # Such a net cannot be had, so no plan will ask for it either; the others tell enough.
            continue
    timings = time_nets(list(nets.values()), example_inputs, bare, seconds=seconds)
    removals = list(nets)
    counts = np.array(
        [[len(costs.gone(r) & set(group)) for group in groups] for r in removals], dtype=float
    )
    times = np.array([t.median_ms for t in timings])
    errors = np.array([_error_of(t) for t in timings])
    own = np.array([_own_macs(costs, group[0]) for group in groups], dtype=float)
    whole, unit_ms = solve(counts, times, errors, times[0] * own / max(1, costs.macs))
    predicted = whole - counts @ unit_ms
    return replace(
        bare,
        latency_ms=whole,
        unit_ms={n: float(e) for group, e in zip(groups, unit_ms, strict=True) for n in group},
        error=float(np.abs(predicted / times - 1).max()),
        nets=tuple(
            TimedNet(r, float(t), float(times[0]), float(p))
            for r, t, p in zip(removals, times, predicted, strict=True)
        ),
    )


def check_latency(
    model: nn.Module, example_inputs: Any, table: LatencyTable, removed: Iterable[str]
) -> tuple[LatencyTable, TimedNet]:
    """Time the finished net without these units, and return the table that knows it.

    A net that the table has timed already is not timed again. The model is left as it was.
    """
    model = unwrap(model)
    costs = cost_model(model, example_inputs).with_latency(table.latency_ms, table.unit_ms)
    asked = set(removed)
    names = tuple(n for n in costs.names if n in asked)
    known = table.check_of(names)
    if known is not None:
        return table, known
    copied = copy.deepcopy(model).to(table.device).eval()
    finished = _deployed(copied, names, example_inputs)
    dense = _deployed(_ready(copied), (), example_inputs)
    before, after = time_nets([dense, finished], example_inputs, table)
    found = TimedNet(names, after.median_ms, before.median_ms, costs.left(names).latency_ms)
    return replace(table, checks=(*table.checks, found)), found


def fitting(table: LatencyTable, costs: CostModel, budget: Budget) -> LatencyTable:
    """Return the table as it is.

    Raises:
        BudgetError: it belongs to another net, budget or machine.
    """
    reason = table.why_unfit(costs, budget)
    if reason is not None:
        raise BudgetError(
            f"The latency table cannot be used: {reason}. Measure anew: resconv.measure_latency("
            "model, example_inputs, budget)."
        )
    return table


def is_met(budget: Budget, found: TimedNet) -> bool:
    """Whether a timed net keeps to the budget's latency."""
    if budget.latency_ms is not None:
        return found.latency_ms <= budget.latency_ms
    return budget.latency is None or found.latency_ms <= budget.latency * found.dense_ms


def corrected_limit(budget: Budget, table: LatencyTable, found: TimedNet) -> float:
    """Return the limit for predictions under which a net like the timed one keeps to the budget.

    The prediction was wrong by the ratio of what was timed, so the next one is taken to be, too. A
    share is a ratio of two nets timed in the same rounds, so a slower hour does not change it.
    """
    wanted = budget.latency_ms
    if wanted is None:
        assert budget.latency is not None
        wanted = budget.latency * found.dense_ms
    ratio = found.predicted_ms / found.latency_ms
    # Whatever the ratio, the next net has to be smaller, or planning would not end.
    return min(wanted * ratio, found.predicted_ms - 1e-6 * table.latency_ms)


def _ready(model: nn.Module) -> nn.Module:
    """Return a copy whose every unit can be removed: what is timed is structure, not weights."""
    ready = copy.deepcopy(model).eval()
    with torch.no_grad():
        for gate in gates(ready).values():
            gate.scale.fill_(1.0)
            if gate.control is not None:
                gate.control.fill_(1.0)
    return ready


def _deployed(model: nn.Module, removed: tuple[str, ...], example_inputs: Any) -> nn.Module:
    net = prune(model, Plan(removed)) if removed else fuse(model)
    return fuse(net, example_inputs, fold_norms=True)


def time_nets(
    nets: list[nn.Module], example_inputs: Any, table: LatencyTable, *, seconds: float = _CHECK
) -> list[Timing]:
    """Time ordinary nets in turn, in the runtime, batch and threads of the table."""
    inputs = as_batch(example_inputs, table.batch)
    if table.runtime == "onnxruntime":
        runners = [onnx_runner(onnx_bytes(n, inputs), inputs, table.threads) for n in nets]
    else:
        runners = [torch_runner(n, inputs) for n in nets]
    with torch_threads(table.threads):
        for run in runners:
            run()
        start = time.perf_counter()
        for run in runners:
            run()
        once = time.perf_counter() - start
        repeats = int(min(100, max(15, seconds / max(2 * once, 1e-6))))
        timings = time_together(
            {str(i): run for i, run in enumerate(runners)}, repeats=repeats, warmup=1
        )
    return [timings[str(i)] for i in range(len(nets))]


def _error_of(timing: Timing) -> float:
    """Return the standard error of a median, from its quartiles."""
    spread = (timing.high_ms - timing.low_ms) / 1.35
    return max(_LEAST_ERROR * timing.median_ms, 1.25 * spread / math.sqrt(timing.repeats))


def _own_macs(costs: CostModel, name: str) -> int:
    inside: Mapping[str, Any] = dict.fromkeys(costs.inner[name])
    return costs.cost_of([name]).macs - costs.cost_of(inside).macs
