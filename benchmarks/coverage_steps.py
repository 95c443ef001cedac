"""What the coverage sweep tries on one net. A fault is a row's entry, not the end of the sweep.

For each net, in float32, with random weights and random BatchNorm statistics that are kept near
each norm's own input (tests/helpers.py says why):

    convert   units="all", the convs beside segments fitted; outputs against the model's
    prune     a random half of the units, every scale and control random in [0.5, 1.5]; the compact
              net against the gated one with those scales at 0
    units     all of them in one plan, then one after the other (SINGLES at most, EACH_SECONDS long)
    backward  one pass in training mode of the gated net, of the compact one and of its training form; every parameter
              that the dense net's pass reaches gets a finite gradient
    pickle    gated, open and compact net, where the dense one can: torch.save, torch.load in a new
              process, same outputs
    save      resconv.save and resconv.load of the compact net, same outputs
    ONNX      resconv.export of the compact net; the file in ONNX Runtime against the compact net
    power     how far the output moves when one unit's scale is 0.5 off: the least of six units. An
              error has to move it further than the tolerance to be seen.
"""

import copy
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import resconv
from resconv.analysis.inputs import as_call, tensors_in
from resconv.nn.gates import zeroed
from resconv.planning.costs import cost_model
from resconv.surgery.verification import relative_error, round_anew
from tests.helpers import randomise, randomise_gates, settle, some_plan

from .zoo import build

__all__ = ["Row", "copied", "one", "one_line", "outputs"]

TOLERANCE = 1e-4
SINGLES, EACH_SECONDS = 64, 10
LOAD = """
import sys, torch
from torch.utils._pytree import tree_map
args, kwargs = torch.load(sys.argv[1], weights_only=False)
for path in sys.argv[2:]:
    try:
        net = torch.load(path, weights_only=False).eval()
        with torch.no_grad():
            copied = tree_map(lambda t: t.clone() if hasattr(t, "clone") else t, (args, kwargs))
            torch.save(net(*copied[0], **copied[1]), path + ".out")
    except Exception as error:
        print(path, type(error).__name__, " ".join(str(error).split())[:300], sep="\\t")
"""

Row = dict[str, Any]


def one(name: str, onnx: bool, send: Callable[[Row], None]) -> Row:
    """Return the row of one net; ``send`` gets it after each step, in case the next one crashes."""
    start = time.perf_counter()
    row: Row = {"model": name, "faults": {}, "step": "build"}
    send(row)
    try:
        for found in _steps(name, onnx, row["faults"]):
            row |= found
            send(row)
    except resconv.errors.VerificationError as error:
        row |= {"outcome": "wrong", "reason": str(error)}
    except resconv.ResConvError as error:
        early = row["step"] in ("build", "convert")
        row |= {"outcome": "refused" if early else "refused by prune", "reason": str(error)}
        row["nothing"] = "Nothing to convert" in row["reason"]
    except Exception as error:
        row |= {"outcome": "crashed", "reason": f"{type(error).__name__}: {error}"}
    if "reason" in row:
        row["reason"] = one_line(row["reason"])
    row["reached"] = row["step"]
    row["total_seconds"] = round(time.perf_counter() - start, 1)
    gc.collect()
    return row


def one_line(text: object) -> str:
    return " ".join(str(text).split())[:400]


def _steps(name: str, onnx: bool, faults: dict[str, str]) -> Iterator[Row]:
    torch.manual_seed(0)
    model, example = build(name)
    model = randomise(model, 0, example)
    yield {"step": "convert", "input": _shape(example)}
    start = time.perf_counter()
    gated = resconv.convert(model, copied(example), units="all", batches=_batches(example))
    converted = time.perf_counter() - start
    error = relative_error(outputs(gated, example), outputs(model, example))
    yield {"step": "prune", "convert_error": error, "units": len(resconv.gates(gated))}
    if error > TOLERANCE:
        raise resconv.errors.VerificationError("convert changed the outputs")
    gated = randomise_gates(gated)
    plan = some_plan(gated, 1)
    with zeroed(gated, plan.remove):
        settle(gated, copied(example), 2)
    start = time.perf_counter()
    try:
        compact = resconv.prune(gated, plan)
    except resconv.ResConvError as refusal:  # then with units that go alone, to see the other steps
        faults["prune half"] = one_line(refusal)
        row, alone = _each_unit(gated, example, faults)
        plan = resconv.Plan(alone[::2])
        yield {"step": "prune"} | row
        compact = resconv.prune(gated, plan)
    seconds = round(converted + time.perf_counter() - start, 1)
    yield {"step": "run", "removed": len(plan.remove), "seconds": seconds}
    try:
        checked = resconv.verify(gated, compact, copied(example), plan=plan, tolerance=TOLERANCE)
        yield {"prune_error": checked.max_rel_error, "outcome": "pruned"}
    except resconv.errors.VerificationError as error:
        yield {"outcome": "unstable", "reason": _in_double(gated, plan, example, error)}
    if onnx:
        yield {"step": "ONNX"}
        yield {"outcome": "complete"} | _write_onnx(compact, model, example, plan)
        return
    yield {"step": "power", "power": _power(gated, plan, example)}
    if "prune half" not in faults:
        yield {"step": "units"} | _each_unit(gated, example, faults)[0]
    nets = {"gated": gated, "compact": compact}
    with _noting(faults, "prune training-form"):
        nets["training-form"] = resconv.prune(gated, plan, fuse=False)
    yield {"step": "backward"}
    reached, trouble = _gradients(model, example)
    if trouble:  # neither does the dense net, then
        yield {"note": f"the dense net has no backward pass here: {trouble}"}
    for kind, net in nets.items() if not trouble else ():
        got, trouble = _gradients(net, example)
        own = {n for n, _ in net.named_parameters()}
        lost = sorted((reached & own) - got)
        if trouble or lost:
            faults[f"backward {kind}"] = trouble or f"no gradient: {', '.join(lost[:5])}"
    yield {"step": "pickle"}
    found = _pickle({"dense": model, **nets}, example)
    if dense := found.get("pickle dense"):
        yield {"note": f"the dense net cannot be pickled: {dense}"}
    else:
        faults.update(found)
    yield {"step": "save"}
    with _noting(faults, "save"), tempfile.TemporaryDirectory() as folder:
        resconv.save(compact, folder, plan=plan, example_inputs=copied(example))
        _require_same(resconv.load(folder, model=model), compact, example)
    yield {"step": "end"}


def _batches(example: Any) -> list[Any] | None:
    """Return the example as a batch of training data; None where it is no tensor and no dict."""
    args, kwargs = as_call(copied(example))
    if len(args) == 1 and not kwargs:
        return [args[0]] if isinstance(args[0], Tensor) else None
    return [kwargs] if kwargs and not args else None


@contextmanager
def _noting(faults: dict[str, str], step: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        faults.setdefault(step, one_line(f"{type(error).__name__}: {error}"))


def copied(example: Any) -> Any:
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, example)


def outputs(model: nn.Module, example: Any) -> Any:
    args, kwargs = as_call(copied(example))  # some nets write into their input
    with torch.no_grad():
        return model(*args, **kwargs)


def _require_same(net: nn.Module, wanted: nn.Module, example: Any) -> None:
    error = relative_error(outputs(net.eval(), example), outputs(wanted.eval(), example))
    if not error <= TOLERANCE:
        raise ValueError(f"the outputs are {error:.0e} off")


def _shape(example: Any) -> str:
    every = [t for t in tensors_in(example) if t.ndim > 1]
    return " and ".join("x".join(map(str, t.shape[1:])) for t in every)


def _in_double(gated: nn.Module, plan: resconv.Plan, example: Any, error: Exception) -> str:
    """Return why this is no fault of the surgery, or raise: double precision tells."""
    wide = tree_map(lambda t: t.double() if t.is_floating_point() else t, copied(example))
    gated = copy.deepcopy(gated).double()
    exact = resconv.verify(gated, resconv.prune(gated, plan), wide, plan=plan)
    return (
        f"right in float64 ({exact.max_rel_error:.0e}), so the net magnifies the rounding of float32 "
        f"under these statistics. {error}"
    )


def _power(gated: nn.Module, plan: resconv.Plan, example: Any) -> float:
    """Return the least change of the output when the scale of one of six units is 0.5 off.

    Units inside a removed branch do not count: nothing depends on them.
    """
    gates = list(resconv.gates(gated).values())
    moved: list[float] = []
    with zeroed(gated, plan.remove), torch.no_grad():
        before = outputs(gated, example)
        for i in torch.randperm(len(gates), generator=torch.Generator().manual_seed(0)).tolist():
            scale = gates[i].scale.clone()
            gates[i].scale.add_(0.5)
            change = relative_error(outputs(gated, example), before)
            gates[i].scale.copy_(scale)
            moved += [change] if change else []
            if len(moved) == 6:
                break
    return min(moved, default=0.0)


def _each_unit(
    gated: nn.Module, example: Any, faults: dict[str, str]
) -> tuple[Row, tuple[str, ...]]:
    """Remove all units in one plan, then each alone, in random order.

    Returns how many were tried alone and how many of them failed, and the names of those that went.
    """
    names = list(resconv.gates(gated))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    together = cost_model(gated, copied(example)).compatible(names)
    _try_plan(gated, together, example, faults, "all")
    end = time.process_time() + EACH_SECONDS
    went, tried = [], 0
    for i in order[:SINGLES]:
        if tried and time.process_time() > end:
            break
        tried += 1
        if _try_plan(gated, (names[i],), example, faults, "one"):
            went.append(names[i])
    return {"singles": tried, "singles_bad": tried - len(went)}, tuple(went)


def _try_plan(
    gated: nn.Module, remove: tuple[str, ...], example: Any, faults: dict[str, str], which: str
) -> bool:
    plan = resconv.Plan(remove)
    try:
        compact = resconv.prune(gated, plan)
        with zeroed(gated, remove):
            wanted = outputs(gated, example)
        off = relative_error(outputs(compact, example), wanted)
        if not off <= max(TOLERANCE, 100 * _rounding(compact, example)):
            _in_double(gated, plan, example, ValueError(f"{off:.0e} off"))
    except Exception as error:
        kinds = {"wrong": resconv.errors.VerificationError, "prune": resconv.ResConvError}
        kind = next((k for k, t in kinds.items() if isinstance(error, t)), "run")
        known, why = faults.get(f"{kind} {which}", ""), one_line(f"{type(error).__name__}: {error}")
        why = f"{remove[0]}: {why[:160]}" if which == "one" else why
        if known.count("; ") < 2:  # three examples say enough
            faults[f"{kind} {which}"] = f"{known}; {why}" if known else why
        return False
    return True


def _gradients(net: nn.Module, example: Any) -> tuple[set[str], str]:
    """Return which parameters one training pass on two examples reaches, and what went wrong."""
    net = copy.deepcopy(net).train().requires_grad_(True)
    twice = tree_map(
        lambda t: torch.cat([t, t]) if t.ndim and t.shape[0] == 1 else t, copied(example)
    )
    try:
        torch.manual_seed(0)
        args, kwargs = as_call(twice)
        found = [t for t in tensors_in(net(*args, **kwargs)) if t.requires_grad]
        sum(t.float().square().mean() for t in found).backward()
    except Exception as error:
        return set(), one_line(f"{type(error).__name__}: {error}")
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    infinite = [n for n, g in grads.items() if not bool(g.isfinite().all())]
    return set(grads), f"not finite: {', '.join(infinite[:5])}" if infinite else ""


def _pickle(nets: dict[str, nn.Module], example: Any) -> dict[str, str]:
    """Load every net in one new process and compare what it computes; return what failed."""
    faults: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        given = f"{folder}/example"
        torch.save(as_call(example), given)
        paths = {}
        for kind, net in nets.items():
            with _noting(faults, f"pickle {kind}"):
                torch.save(net.eval(), f"{folder}/{kind}")
                paths[f"{folder}/{kind}"] = kind
        done = subprocess.run(
            [sys.executable, "-c", LOAD, given, *paths], capture_output=True, text=True, check=False
        )
        for line in done.stdout.splitlines():
            path, _, reason = line.partition("\t")
            if path in paths:
                faults[f"pickle {paths[path]}"] = reason.replace("\t", ": ")
        for path, kind in paths.items():
            if f"pickle {kind}" not in faults:
                with _noting(faults, f"pickle {kind}"):
                    if not Path(path + ".out").is_file():
                        raise ValueError(f"the process ended: {done.stderr[-200:]}")
                    made = torch.load(path + ".out", weights_only=False)
                    if not relative_error(made, outputs(nets[kind], example)) <= TOLERANCE:
                        raise ValueError("the loaded net computes something else")
    return faults


def _rounding(net: nn.Module, example: Any) -> float:
    """Return how far the outputs move when every weight is rounded once more."""
    moved = outputs(round_anew(copy.deepcopy(net)), example)
    return relative_error(moved, outputs(net, example))


def _write_onnx(compact: nn.Module, model: nn.Module, example: Any, plan: resconv.Plan) -> Row:
    """Export and check; where torch cannot write the file, see whether it can write the dense net."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = resconv.export(
                compact, Path(folder) / "compact.onnx", copied(example), plan=plan
            )
            row: Row = {"onnx_error": made.verification.max_rel_error}
            if not made.dynamic_batch:
                row["note"] = "fixed batch"
        except resconv.ResConvError as error:
            row = {"reason": f"ONNX: {error}"}
            try:
                resconv.export(model, Path(folder) / "dense.onnx", copied(example))
                wrong = isinstance(error, resconv.errors.VerificationError)
                row["outcome"] = "wrong" if wrong else "refused"
                if wrong and (rounding := _rounding(compact, example)) > TOLERANCE / 10:
                    row["outcome"] = "unstable"
                    row["reason"] += f" One rounding of every weight moves them by {rounding:.0e}."
            except resconv.ResConvError as dense:
                row = {"outcome": "no ONNX from torch", "reason": f"dense net: {dense}"}
    return row | {"onnx_seconds": round(time.perf_counter() - start, 1)}
