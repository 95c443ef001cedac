"""Convert, prune and export one small variant of every family of timm, and all of torchvision.

    python -m benchmarks.coverage [SECONDS] [onnx] [MODEL ...]

Appends to benchmarks/results/coverage.jsonl, goes on where it stopped (SECONDS bounds one call; named models are
done again), and writes docs/coverage.md from the log. A first pass prunes every model, the smallest
first, a second one (with ``onnx`` the only one) writes the files, which takes ten times as long.

For each model, in float32, with random weights and random BatchNorm statistics that are kept near
each norm's own input (tests/helpers.py says why):

    convert  units="all", outputs against the model's
    prune    a random half of the units, every scale and control random in [0.5, 1.5]; the compact
             net against the gated one with those scales at 0
    ONNX     resconv.export of the compact net; the file in ONNX Runtime against the compact net
    power    how far the output moves when one unit's scale is 0.5 off: the least of six units. An
             error has to move it further than the tolerance to be seen.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

import resconv
from resconv.analysis.inputs import as_call
from resconv.nn.gates import zeroed
from resconv.surgery.verification import relative_error
from tests.helpers import VARIANCES, randomise, randomise_gates, settle, some_plan

from . import coverage_page
from .zoo import build, timm_families, torchvision_sizes

LOG = Path(__file__).parent / "results" / "coverage.jsonl"
TOLERANCE = 1e-4


def outputs(model: nn.Module, example: Any) -> Any:
    args, kwargs = as_call(example)
    with torch.no_grad():
        return model(*args, **kwargs)


def power(gated: nn.Module, plan: resconv.Plan, example: Any) -> float:
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


def shape_of(example: Any) -> str:
    first = example[0] if isinstance(example, tuple) else example
    return ("2 of " if isinstance(example, tuple) else "") + "x".join(map(str, first.shape[1:]))


def write_onnx(compact: nn.Module, model: nn.Module, example: Any, plan: resconv.Plan) -> dict:
    """Export and check; where torch cannot write the file, see whether it can write the dense net."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = resconv.export(compact, Path(folder) / "compact.onnx", example, plan=plan)
            row: dict = {"onnx_error": made.verification.max_rel_error}
            if not made.dynamic_batch:
                row["note"] = "fixed batch"
        except resconv.ResConvError as error:
            row = {"reason": f"ONNX: {error}"}
            try:
                resconv.export(model, Path(folder) / "dense.onnx", example)
                wrong = isinstance(error, resconv.errors.VerificationError)
                row["outcome"] = "wrong" if wrong else "refused"
            except resconv.ResConvError as dense:
                row = {"outcome": "no ONNX from torch", "reason": f"dense net: {dense}"}
    return row | {"onnx_seconds": round(time.perf_counter() - start, 1)}


def surgery(name: str, onnx: bool) -> dict:
    torch.manual_seed(0)
    row: dict = {"model": name}
    model, example = build(name)
    row["input"] = shape_of(example)
    model = randomise(model, 0, example)
    start = time.perf_counter()
    gated = resconv.convert(model, example, units="all")
    converted = time.perf_counter() - start
    row["convert_error"] = relative_error(outputs(gated, example), outputs(model, example))
    if row["convert_error"] > TOLERANCE:
        return row | {"outcome": "wrong", "reason": "convert changed the outputs"}
    gated = randomise_gates(gated)
    plan = some_plan(gated, 1)
    row |= {"units": len(resconv.gates(gated)), "removed": len(plan.remove)}
    with zeroed(gated, plan.remove):
        settle(gated, example, 2)
    start = time.perf_counter()
    compact = resconv.prune(gated, plan)
    row["seconds"] = round(converted + time.perf_counter() - start, 1)
    try:
        row["prune_error"] = resconv.verify(
            gated, compact, example, plan=plan, tolerance=TOLERANCE
        ).max_rel_error
    except resconv.errors.VerificationError as error:
        # Wrong, or a net that magnifies float32's rounding? Double precision tells.
        gated, wide = gated.double(), tree_map(lambda t: t.double(), example)
        exact = resconv.verify(gated, resconv.prune(gated, plan), wide, plan=plan)
        return row | {
            "outcome": "unstable",
            "reason": f"right in float64 ({exact.max_rel_error:.0e}), so the net magnifies the "
            f"rounding of float32 under these statistics. {error}",
        }
    row["power"] = power(gated, plan, example)
    del gated
    if not onnx:
        return row | {"outcome": "pruned"}
    return row | {"outcome": "complete"} | write_onnx(compact, model, example, plan)


def one(name: str, onnx: bool) -> dict:
    start = time.perf_counter()
    row: dict = {"model": name}
    try:
        row |= surgery(name, onnx)
    except resconv.ResConvError as error:
        wrong = isinstance(error, resconv.errors.VerificationError)
        row |= {"outcome": "wrong" if wrong else "refused", "reason": str(error)}
        row["nothing"] = "Nothing to convert" in str(error)
    except Exception as error:
        row |= {"outcome": "crashed", "reason": f"{type(error).__name__}: {error}"}
    if "reason" in row:
        row["reason"] = " ".join(row["reason"].split())[:400]
    gc.collect()
    return row | {"total_seconds": round(time.perf_counter() - start, 1)}


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def jobs() -> list[tuple[str, list[str]]]:
    """Return (label, variants), the smallest first.

    The next variant of a family is for one whose smaller variants have nothing to remove.
    """
    found = [(size, name, [name]) for name, size in torchvision_sizes().items()]
    found += [(size, f"timm:{f}", names) for f, (size, names) in timm_families().items()]
    return [(label, names) for _, label, names in sorted(found)]


def main() -> None:
    warnings.filterwarnings("ignore")
    wanted = set(sys.argv[1:])
    limit = next((float(a) for a in wanted if a.replace(".", "").isdigit()), float("inf"))
    again = {a for a in wanted if ":" in a}
    LOG.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(s) for s in LOG.read_text().splitlines()] if LOG.is_file() else []
    last = {r["job"]: r for r in rows}
    begun, at = time.monotonic(), commit()
    for onnx in (True,) if again or "onnx" in wanted else (False, True):
        for label, names in jobs():
            if again:
                if not again & {label, *names}:
                    continue
            elif label in last and not (onnx and last[label]["outcome"] == "pruned"):
                continue
            if time.monotonic() - begun > limit:
                break
            for name in names[:4]:
                row = one(name, onnx) | {"job": label, "commit": at, "variances": VARIANCES}
                if not row.pop("nothing", False):
                    break
            last[label] = row
            with LOG.open("a") as file:
                file.write(json.dumps(row) + "\n")
            figure = row.get("onnx_error", row.get("prune_error"))
            print(row["outcome"], row["model"], row.get("reason", figure), flush=True)
    coverage_page.write(list(last.values()), [label for label, _ in jobs()])


if __name__ == "__main__":
    main()
