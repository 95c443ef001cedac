"""Train one arm after another, each once, and keep what came out in benchmarks/results/accuracy/.

``python -m benchmarks.accuracy SUITE [PART ...]`` runs the arms of a suite that have no result yet, in
order (only those whose name contains a PART, in the order of the PARTs). Stopped arms go on from
their last epoch. Every arm of a suite gets the same number of epochs in all. The tables are written
by ``python -m benchmarks.claims``.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
from resconv.gates import zeroed
from resconv.ledger import ledger
from resconv.measure import machine
from resconv.run.pipeline import history
from resconv.train import Recipe, evaluate, fit

from .channels import prune_channels

__all__ = [
    "RESULTS",
    "SUITES",
    "Job",
    "blocks_kept",
    "chosen_arm",
    "read_results",
    "without_units",
]

RESULTS = Path(__file__).parent / "results" / "accuracy"
WORK = Path("runs/accuracy")
# A folder with train.parquet and test.parquet; CIFAR-10 as JPEG, see docs/results.md.
CIFAR = "parquet:" + os.environ.get("CIFAR10_JPEG", "../shared/cifar10-jpeg")


@dataclass(frozen=True)
class Job:
    """One arm: what is trained, from which other arm's net, and for how long."""

    name: str
    kind: str  # one of KINDS
    net: str
    data: str
    epochs: int
    seed: int = 0
    lr: float = 0.1
    macs: float | None = None
    num_params: float | None = None
    start: str | None = None  # the arm whose trained net this one starts from
    like: str | None = None  # the arm whose compact architecture this one trains from scratch
    units: str = "all"
    ranking: str | None = None

    @property
    def folder(self) -> Path:
        return WORK / self.name.replace("/", "-")

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name.replace('/', '-')}.json"

    @property
    def weights(self) -> Path:
        return self.folder / "trained.safetensors"


def _compare(net: str, data: str, before: int, total: int, macs: tuple[float, ...]) -> list[Job]:
    """Return the arms that compare pruning methods: ``before`` epochs dense, ``total`` in all."""
    where = "digits" if data == "digits" else "cifar"
    base = Job("", "", net, data, total - before)

    def job(arm: str, share: float | None = None, **more: Any) -> Job:
        at = "" if share is None else f"-{round(100 * share)}"
        return replace(base, name=f"{where}/{net}/{arm}{at}", macs=share, **{"kind": arm, **more})

    start = job("start", kind="dense", epochs=before)
    jobs = [start, job("dense", epochs=total)]
    for share in macs:
        # As few parameters as a filter-pruned net of these MACs has; and with the MACs alone.
        ours = job("ours", share, num_params=share, start=start.name)
        jobs += [
            job("once", share, num_params=share, epochs=total),
            ours,
            job("ours-macs", share, kind="ours", start=start.name),
            job("torch-pruning", share, start=start.name),
            job("scratch", share, epochs=total, like=ours.name),
        ]
    return jobs


def _ranked(net: str, before: int, total: int, macs: float, seeds: int = 3) -> list[Job]:
    """Return the arms that choose whole branches by the scales, or in one shot by other rankings."""
    jobs = []
    for seed in range(seeds):
        end = f"-seed{seed}"
        start = Job(f"digits/{net}/start{end}", "dense", net, "digits", before, seed)
        base = replace(start, epochs=total - before, macs=macs, start=start.name, units="blocks")
        jobs += [start, replace(base, name=f"digits/{net}/ranked-scales{end}", kind="ours")]
        jobs += [
            replace(base, name=f"digits/{net}/ranked-{r}{end}", kind="ranked", ranking=r)
            for r in RANKINGS
        ]
    return jobs


def _rates(net: str, before: int, total: int, shares: tuple[float, ...], seeds: int) -> list[Job]:
    """Return the arms for accuracy right after pruning, over pruning rates."""
    jobs = []
    for seed in range(seeds):
        end = f"-seed{seed}"
        start = Job(f"digits/{net}/start{end}", "dense", net, "digits", before, seed)
        jobs.append(start)
        jobs.append(replace(start, name=f"digits/{net}/whole{end}", epochs=total))
        jobs += [
            replace(
                start,
                name=f"digits/{net}/rate-{round(100 * share)}{end}",
                kind="ours",
                epochs=total - before,
                macs=share,
                start=start.name,
            )
            for share in shares
        ]
    return jobs


def _plain(net: str, data: str, epochs: int, seeds: int = 1, lr: float = 0.1) -> list[Job]:
    """Return the arms that train a net with ResConv and without it."""
    where = "digits" if data == "digits" else "cifar"
    return [
        Job(f"{where}/{net}/{kind}-seed{seed}", kind, net, data, epochs, seed, lr)
        for seed in range(seeds)
        for kind in ("dense", "resconv")
    ]


RANKINGS = ("random", "weight", "leave-one-out")

SUITES: dict[str, list[Job]] = {
    "resnet56": _compare("resnet56", CIFAR, 4, 12, (0.5, 0.35)),
    "resnet110": _compare("resnet110", CIFAR, 80, 200, (0.345,)),
    "plain": [
        *_plain("plainnet20", CIFAR, 3),
        *_plain("plainnet56", CIFAR, 3),
        *_plain("resnet20", CIFAR, 3),
        *_plain("resnet56", CIFAR, 3),
        *_plain("plainnet110", CIFAR, 3),
    ],
    "digits": [
        job
        for net in ("plainnet20", "plainnet56", "plainnet110", "resnet20", "resnet56")
        for job in _plain(net, "digits", 30, seeds=3)
    ],
    "rankings": _ranked("resnet56", 30, 60, 0.5),
    "rates": _rates("resnet56", 30, 60, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), 2),
}


def without_units(net: str, classes: int, channels: int, side: int, remove: list[str]) -> nn.Module:
    """Return the architecture of a compact net with random weights, ready to be trained."""
    model = nets.create(net, num_classes=classes, in_channels=channels)
    example = torch.randn(2, channels, side, side)
    gated = resconv.convert(model, example, units="all", filter=lambda name, module: name in remove)
    for gate in resconv.gates(gated).values():
        if gate.control is not None:
            nn.init.ones_(gate.control)  # a removed conv passes its input on as it is
    return resconv.prune(gated.eval(), resconv.Plan(tuple(remove)))


def blocks_kept(net: str, remove: list[str]) -> list[str]:
    """Return, for each stage, how many blocks are whole, and how many have one conv left."""
    depth = int("".join(c for c in net if c.isdigit()))
    kept = []
    for stage in (1, 2, 3):
        whole = half = 0
        for block in range((depth - 2) // 6):
            name = f"layer{stage}.{block}"
            convs = sum(f"{name}.conv{i}" in remove for i in (1, 2))
            whole += name not in remove and convs == 0
            half += name not in remove and convs == 1
        kept.append(f"{whole}" + (f"+{half}" if half else ""))
    return kept


def chosen_arm(net: str, share: float, results: dict[str, Any]) -> str | None:
    """Return the arm whose net stands for the method at this share: latency is measured on it too."""
    names = (f"cifar/{net}/{arm}-{round(100 * share)}" for arm in ("ours", "ours-macs", "once"))
    return next((name for name in names if name in results), None)


def read_results() -> dict[str, dict[str, Any]]:
    """Return all results so far, by the name of the arm."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))]
    return {row["name"]: row for row in found}


def _create(job: Job, data: datasets.ImageData) -> nn.Module:
    torch.manual_seed(job.seed)
    return nets.create(job.net, num_classes=data.num_classes, in_channels=data.channels)


def _started(job: Job, data: datasets.ImageData) -> nn.Module:
    """Return the trained net that the job starts from."""
    assert job.start is not None
    model = _create(job, data)
    model.load_state_dict(load_file(_job(job.start).weights))
    return model.eval()


def _trained(model: nn.Module, job: Job, data: datasets.ImageData) -> nn.Module:
    fit(
        model.train(),
        data,
        Recipe(job.epochs, lr=job.lr, seed=job.seed),
        job.folder / "fit",
        progress=False,
    )
    return model.eval()


def _finish(model: nn.Module, job: Job, data: datasets.ImageData) -> dict[str, Any]:
    example = torch.randn(1, data.channels, data.image_size, data.image_size)
    size = resconv.count(model, example)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, job.weights)
    return {
        "top1": evaluate(model, data),
        "macs_after": size.macs,
        "num_params_after": size.num_params,
    }


def _dense(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    return _finish(_trained(_create(job, data), job, data), job, data)


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
    assert job.start is not None
    config = runs.Config(
        model=job.net,
        data=job.data,
        macs=job.macs,
        num_params=job.num_params,
        weights=str(_job(job.start).weights),
        sparse_epochs=job.epochs,
        finetune_epochs=0,
        sparse_lr=job.lr,
        seed=job.seed,
        units=job.units,
        progress=False,
    )
    folder = runs.RunFolder.begin(job.folder, config)
    metrics = runs.compress(runs.open_run(folder.path))
    plan = folder.read_json("plan.json")
    steps = history(folder)
    return {
        "top1": metrics["top1_pruned"],
        "top1_training_form": metrics["top1_gated"],
        "removed_with_nonzero_scale": metrics["removed_with_nonzero_scale"],
        "num_units": metrics["num_units"],
        "remove": plan["remove"],
        "layout": blocks_kept(job.net, plan["remove"]),
        "macs_after": metrics["macs_compact"],
        "num_params_after": metrics["num_params_compact"],
        "history": [[s.step, s.scales] for s in steps[:: max(1, len(steps) // 25)]],
    }


def _once(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    """Train a net from random weights towards the target, in one run that makes no dense net."""
    example = torch.randn(2, data.channels, data.image_size, data.image_size)
    gated = resconv.convert(_create(job, data), example, units=job.units, start="identity")
    budget = resconv.Budget(macs=job.macs, num_params=job.num_params)
    recipe = Recipe(job.epochs, lr=job.lr, seed=job.seed)
    steps = fit(
        gated.train(), data, recipe, job.folder / "fit", target=budget, progress=False
    ).history
    plan = resconv.plan(gated.eval(), example, budget)
    compact = resconv.fuse(resconv.prune(gated, plan), example)
    resconv.verify(gated, compact, example, plan=plan)
    return _finish(compact, job, data) | {
        "top1_training_form": evaluate(gated, data),
        "removed_with_nonzero_scale": [n for n in plan.remove if plan.scales[n] != 0],
        "num_units": len(resconv.gates(gated)),
        "remove": list(plan.remove),
        "layout": blocks_kept(job.net, list(plan.remove)),
        "history": [[s.step, s.scales] for s in steps[:: max(1, len(steps) // 25)]],
    }


def _torch_pruning(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    assert job.macs is not None
    model = _started(job, data)
    example = torch.randn(1, data.channels, data.image_size, data.image_size)
    made = prune_channels(model, example, job.macs)
    assert made is not None
    model, ratio = made
    extra = {"top1_pruned": evaluate(model, data), "channel_ratio": ratio}
    return _finish(_trained(model, job, data), job, data) | extra


def _ranked_arm(job: Job, data: datasets.ImageData) -> dict[str, Any]:
    """Remove the branches that rank lowest, all at once, and train what is left."""
    assert job.macs is not None
    model = _started(job, data)
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
    "torch-pruning": _torch_pruning,
    "ranked": _ranked_arm,
    "scratch": _scratch,
}


def _job(name: str | None) -> Job:
    return next(job for suite in SUITES.values() for job in suite if job.name == name)


def run(job: Job) -> None:
    start = time.perf_counter()
    job.folder.mkdir(parents=True, exist_ok=True)
    data = datasets.load(job.data)
    outcome = KINDS[job.kind](job, data)
    row = asdict(job) | {"data": "digits" if job.data == "digits" else "CIFAR-10 (JPEG)"} | outcome
    row |= {
        "seconds": round(time.perf_counter() - start),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
    }
    write_text(job.result, json.dumps(row) + "\n")
    print(job.name, f"top-1 {row['top1']:.2f}", f"{row['macs_after']:,} MACs", flush=True)


def main() -> None:
    suite, *parts = sys.argv[1:]
    wanted = [j for part in parts or [""] for j in SUITES[suite] if part in j.name]
    for job in wanted:
        if not job.result.is_file():
            print(job.name, "...", flush=True)
            run(job)


if __name__ == "__main__":
    main()
