"""Train one arm after another, each once, and keep what came out in benchmarks/results/accuracy/.

``python -m benchmarks.accuracy SUITE [PART ...]`` runs the arms of a suite that have no result yet, in
order (only those whose name, closed by a slash, contains a PART, in the order of the PARTs:
``/ours-50/`` is one arm with seed 0, ``/ours-50`` is it with all seeds). Stopped arms go on from
their last epoch. With ``--at-once N`` N arms run at a time, on a GPU that one of them does not fill.
Every arm of a suite gets the same number of epochs in all. The tables are written by
``python -m benchmarks.claims``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import resconv
from resconv import data as datasets
from resconv import nets
from resconv import run as runs
from resconv.data import BatchLoader
from resconv.files import write_text
from resconv.latency.timing import machine
from resconv.nn.gates import zeroed
from resconv.planning.costs import ledger
from resconv.run.pipeline import history
from resconv.selection.outcome import Snapshot
from resconv.train import FitResult, Recipe, evaluate, fit

from .arms import SUITES, Job, arm_named, read_results
from .channels import prune_channels

__all__ = ["blocks_a_stage", "blocks_beyond", "blocks_kept", "started", "without_units"]


def without_units(net: str, classes: int, channels: int, side: int, remove: list[str]) -> nn.Module:
    """Return the architecture of a compact net with random weights, ready to be trained."""
    model = nets.create(net, num_classes=classes, in_channels=channels)
    example = torch.randn(2, channels, side, side)
    gated = resconv.convert(model, example, units="all", filter=lambda name, module: name in remove)
    for gate in resconv.gates(gated).values():
        if gate.control is not None:
            nn.init.ones_(gate.control)  # a removed conv passes its input on as it is
    return resconv.prune(gated.eval(), resconv.Plan(tuple(remove)))


def blocks_a_stage(net: str) -> int:
    return (int("".join(c for c in net if c.isdigit())) - 2) // 6


def blocks_beyond(net: str, kept: tuple[int, ...]) -> list[str]:
    """Return the blocks to remove so that the first ``kept`` of each stage stay."""
    return [
        f"layer{stage}.{block}"
        for stage, keep in enumerate(kept, 1)
        for block in range(keep, blocks_a_stage(net))
    ]


def blocks_kept(net: str, remove: list[str]) -> list[str]:
    """Return, for each stage, how many blocks are whole, and how many have one conv left."""
    kept = []
    for stage in (1, 2, 3):
        whole = half = 0
        for block in range(blocks_a_stage(net)):
            name = f"layer{stage}.{block}"
            convs = sum(f"{name}.conv{i}" in remove for i in (1, 2))
            whole += name not in remove and convs == 0
            half += name not in remove and convs == 1
        kept.append(f"{whole}" + (f"+{half}" if half else ""))
    return kept


def _create(job: Job, data: datasets.ImageData) -> nn.Module:
    torch.manual_seed(job.seed)
    return nets.create(job.net, num_classes=data.num_classes, in_channels=data.channels)


def started(job: Job, data: datasets.ImageData) -> nn.Module:
    """Return the trained net that the job starts from."""
    model = _create(job, data)
    model.load_state_dict(load_file(_start_weights(job)))
    return model.eval()


def _start_weights(job: Job) -> Path:
    """Return the weights that the job starts from: trained now where only their figures are here."""
    start = arm_named(job.start)
    _make(start)
    return start.weights


def _make(job: Job) -> None:
    """Train the net that others go on from, unless it is here."""
    there = job.folder / "plan.json" if job.kind == "ours" else job.weights
    if not there.is_file():
        run(job)


def _fit(model: nn.Module, job: Job, data: datasets.ImageData, **more: Any) -> FitResult:
    """Train as the job says; ``more`` is what only some arms give: a target, a teacher."""
    return fit(
        model.train(),
        data,
        Recipe(job.epochs, lr=job.lr, batch_size=job.batch_size, seed=job.seed),
        job.folder / "fit",
        cuda_graphs=torch.cuda.is_available(),
        progress=False,
        **more,
    )


def _trained(model: nn.Module, job: Job, data: datasets.ImageData, **more: Any) -> nn.Module:
    _fit(model, job, data, **more)
    return model.eval()


def _finish(model: nn.Module, job: Job, data: datasets.ImageData) -> dict[str, Any]:
    example = torch.randn(1, data.channels, data.image_size, data.image_size)
    size = resconv.count(model, example)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, job.folder / "trained.safetensors")
    return {
        "top1": evaluate(model, data),
        "macs_after": size.macs,
        "num_params_after": size.num_params,
    }


def _dense(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    model = started(job, data) if job.start else _create(job, data)
    return _finish(_trained(model, job, data) if job.epochs else model, job, data)


def _resconv(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    example = torch.randn(2, data.channels, data.image_size, data.image_size)
    model = resconv.convert(_create(job, data), example, units="layers", start="identity")
    model = _trained(model, job, data)
    gates = resconv.gates(model)
    extra = {
        "top1_training_form": evaluate(model, data),
        "scales": {n: g.scale.item() for n, g in gates.items()},
        "controls": {n: g.control.item() for n, g in gates.items() if g.control is not None},
    }
    return _finish(resconv.fuse(model), job, data) | extra


def _ours(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    config = runs.Config(
        model=job.net,
        data=job.data,
        holdout=job.holdout,
        macs=job.macs,
        num_params=job.num_params,
        weights=str(_start_weights(job)),
        sparse_epochs=job.epochs,
        finetune_epochs=0,
        sparse_lr=job.lr,
        batch_size=job.batch_size,
        seed=job.seed,
        units=job.units,
        distill=job.distill,
        hints=job.hints,
        cuda_graphs=torch.cuda.is_available(),
        progress=False,
    )
    folder = runs.RunFolder.begin(job.folder, config)
    opened = runs.open_run(folder.path)
    for stage in ("dense", "sparse", "plan", "prune"):
        runs.run_stage(opened, stage)
    metrics = folder.metrics()
    plan = folder.read_json("plan.json")
    steps = history(folder)
    size = {
        "top1": metrics["top1_pruned"],
        "macs_after": metrics["macs_compact"],
        "num_params_after": metrics["num_params_compact"],
    }
    nonzero = metrics["removed_with_nonzero_scale"]
    return size | _choice(job, metrics["top1_gated"], plan["remove"], nonzero, steps)


def _once(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    """Train a net from random weights towards the target, in one run that makes no dense net."""
    example = torch.randn(2, data.channels, data.image_size, data.image_size)
    gated = resconv.convert(_create(job, data), example, units=job.units, start="identity")
    budget = resconv.Budget(macs=job.macs, num_params=job.num_params)
    steps = _fit(gated, job, data, target=budget).history
    plan = resconv.plan(gated.eval(), example, budget)
    compact = resconv.fuse(resconv.prune(gated, plan), example)
    resconv.verify(gated, compact, example, plan=plan)
    nonzero = [n for n in plan.remove if plan.scales[n] != 0]
    return _finish(compact, job, data) | _choice(
        job, evaluate(gated, data), list(plan.remove), nonzero, steps
    )


def _choice(
    job: Job, top1: float, remove: list[str], nonzero: list[str], steps: list[Snapshot]
) -> dict[str, Any]:
    """Return what sparse training chose; ``top1`` is that of the training form."""
    return {
        "top1_training_form": top1,
        "removed_with_nonzero_scale": nonzero,
        "num_units": len(steps[0].scales),
        "remove": remove,
        "layout": blocks_kept(job.net, remove),
        "history": [[s.step, s.scales] for s in steps[:: max(1, len(steps) // 25)]],
    }


def _torch_pruning(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    assert job.macs is not None
    model = started(job, data)
    example = torch.randn(1, data.channels, data.image_size, data.image_size)
    made = prune_channels(model, example, job.macs)
    assert made is not None
    model, ratio = made
    extra = {"top1_pruned": evaluate(model, data), "channel_ratio": ratio}
    teacher = started(job, data) if job.distill else None
    return _finish(_trained(model, job, data, teacher=teacher), job, data) | extra


def _finetuned(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    """Train on what one of our arms left, in its training form (with the norms that fusing absorbs)."""
    pruned = arm_named(job.start)
    _make(pruned)
    opened = runs.open_run(pruned.folder)
    plan = opened.plan()
    model = resconv.prune(opened.gated(), plan, fuse=False)
    teacher = started(pruned, data) if job.distill else None
    _trained(model, job, data, teacher=teacher)
    example = torch.randn(2, data.channels, data.image_size, data.image_size)
    compact = resconv.fuse(model, example)
    resconv.verify(model, compact, example)
    resconv.save(compact, job.folder, example_inputs=example)
    return _finish(compact, job, data) | {
        "top1_training_form": evaluate(model, data),
        "layout": blocks_kept(job.net, list(plan.remove)),
    }


def _ranked_arm(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    """Remove the branches that rank lowest, all at once, and train what is left."""
    assert job.macs is not None
    model = started(job, data)
    example = torch.randn(2, data.channels, data.image_size, data.image_size)
    gated = resconv.convert(model, example, units=job.units).eval()
    costs = ledger(gated, example)
    scores = _scores(gated, job, data)
    chosen: list[str] = []
    for name in sorted(costs.names, key=lambda n: scores[n]):
        if costs.macs - costs.saving(chosen).macs <= job.macs * costs.macs:
            break
        chosen.append(name)
    compact = resconv.prune(gated, resconv.Plan(tuple(chosen)))
    extra = {
        "top1_pruned": evaluate(compact, data),
        "remove": chosen,
        "layout": blocks_kept(job.net, chosen),
    }
    return _finish(_trained(compact, job, data), job, data) | extra


def _scores(gated: nn.Module, job: Job, data: datasets.ImageData) -> dict[str, float]:
    """Return what each branch counts for, by the job's ranking; the lowest go."""
    names = list(resconv.gates(gated))
    if job.ranking == "random":
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(job.seed))
        return dict(zip(names, order.tolist(), strict=True))
    if job.ranking == "weight":
        kernels = {n: p for n, p in gated.named_parameters() if p.ndim == 4}
        return {
            name: statistics.fmean(
                p.detach().abs().mean().item() for n, p in kernels.items() if n.startswith(name)
            )
            for name in names
        }
    images, labels = next(
        iter(
            BatchLoader(
                data.train,
                1000,
                shuffle=True,
                seed=job.seed,
                augment=None,
                mean=data.mean,
                std=data.std,
                device=torch.device("cpu"),
            )
        )
    )
    scores = {}
    for name in names:
        with zeroed(gated, (name,)), torch.no_grad():
            scores[name] = F.cross_entropy(gated(images), labels).item()
    return scores


def _scratch(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    if job.blocks is not None:
        remove = blocks_beyond(job.net, job.blocks)
    else:
        assert job.like is not None
        remove = read_results()[job.like]["remove"]
    torch.manual_seed(job.seed)
    model = without_units(job.net, data.num_classes, data.channels, data.image_size, remove)
    layout = {"layout": blocks_kept(job.net, remove)}
    return _finish(_trained(model, job, data), job, data) | layout


KINDS: dict[str, Callable[[Job, datasets.ImageData], dict[str, Any]]] = {
    "dense": _dense,
    "resconv": _resconv,
    "ours": _ours,
    "once": _once,
    "finetuned": _finetuned,
    "torch-pruning": _torch_pruning,
    "ranked": _ranked_arm,
    "scratch": _scratch,
}


def run(job: Job) -> None:
    start = time.perf_counter()
    job.folder.mkdir(parents=True, exist_ok=True)
    data = datasets.load(job.data, holdout=job.holdout)
    outcome = KINDS[job.kind](job, data)
    row = asdict(job) | {"data": job.data_name} | outcome
    row |= {
        "seconds": round(time.perf_counter() - start),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
    }
    write_text(job.result, json.dumps(row) + "\n")
    print(job.name, f"top-1 {row['top1']:.2f}", f"{row['macs_after']:,} MACs", flush=True)


def run_together(suite: str, jobs: list[Job], at_once: int) -> None:
    """Run up to so many arms at a time, each in a process of its own, after those it starts from."""
    for job in jobs:
        if job.start and all(job.start != j.name for j in jobs):
            _make(arm_named(job.start))  # once, not by each arm that starts from it
    waiting, running = list(jobs), dict[str, subprocess.Popen[bytes]]()
    failed: set[str | None] = set()
    while waiting or running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    print(name, f"failed ({process.returncode})", flush=True)
                    failed.add(name)
        unfinished = {*running, *(j.name for j in waiting)}
        for job in list(waiting):
            needed = {job.start, job.like}
            if not failed.isdisjoint(needed):
                print(job.name, "left out: what it starts from failed", flush=True)
                failed.add(job.name)
                waiting.remove(job)
            elif len(running) < at_once and unfinished.isdisjoint(needed):
                command = [sys.executable, "-m", "benchmarks.accuracy", suite, f"{job.name}/"]
                running[job.name] = subprocess.Popen(command)
                waiting.remove(job)
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("parts", nargs="*", help="of arms' names; default: every arm")
    parser.add_argument("--at-once", type=int, default=1, help="arms at a time")
    asked = parser.parse_args()
    every = SUITES[asked.suite]
    found = [j for part in asked.parts or [""] for j in every if part in f"{j.name}/"]
    wanted = [j for j in dict.fromkeys(found) if not j.result.is_file()]
    if asked.at_once > 1:
        run_together(asked.suite, wanted, asked.at_once)
        return
    for job in wanted:
        print(job.name, "...", flush=True)
        run(job)


if __name__ == "__main__":
    main()
