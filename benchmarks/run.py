"""Run the arms of an experiment and append one tidy row for each to ``results.jsonl``.

    python -m benchmarks.run benchmarks/experiments/NAME.yaml [ARM ...] [--seeds 0,1,2]

An experiment is a YAML file: a net, a set, what all arms share (``common``), and the arms. An arm is trained
by the command line of resconv wherever it can be (``resconv train``, ``resconv compress``); what is not ours to
offer (a filter-pruned net, a given layout, another ranking) comes from ``peers.py`` and is trained by the same
``fit``. Arms whose row is there already are left out; a stopped one goes on where it was, since the command line
does. Each arm leaves ``net.pt`` in its folder under ``runs/bench``, for ``benchmarks.latency``.

Fields of an arm, besides the options of the command line (``macs``, ``params``, ``distill``, ...):

    from: ARM            the arm whose trained net it starts from, of the same seed, or a file of weights
    epochs: N            epochs of this arm alone
    by: train            plain training (the default), from scratch or going on
        resconv-form     trained in the training form from random weights, nothing removed, then fused
        compress         ``resconv compress``: sparse training, removal, finetuning
        filters          Torch-Pruning (DepGraph), then finetuned
        layout           the first ``blocks`` of each stage, from scratch
        ranked           branches by ``ranking`` (peers.RANKINGS), removed at once, then trained
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import resconv
from resconv import data as datasets
from resconv import nets
from resconv.latency.timing import machine
from resconv.run import RunFolder
from resconv.train import Recipe, evaluate, fit

from . import peers

__all__ = ["RESULTS", "Arm", "arms_of", "rows"]

RESULTS = Path(__file__).parent / "results.jsonl"
WORK = Path("runs/bench")
# CIFAR-10 as JPEG: a folder with train.parquet and test.parquet.
DATA = {"cifar10-jpeg": "parquet:" + os.environ.get("CIFAR10_JPEG", "../shared/cifar10-jpeg")}
NAMES = {"cifar10-jpeg": "CIFAR-10 (JPEG)"}


def rows(**wanted: Any) -> list[dict[str, Any]]:
    """Return the rows of ``results.jsonl`` that have all these values."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
    every = [json.loads(line) for line in text.splitlines()]
    return [r for r in every if all(r.get(k) == v for k, v in wanted.items())]


def commit() -> str:
    described = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()


def add_row(row: dict[str, Any]) -> None:
    """Append a row, with when, where and by which commit it was measured."""
    row |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "commit": commit()}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print({k: v for k, v in row.items() if k not in ("machine", "commit")}, flush=True)


@dataclass(frozen=True)
class Arm:
    """One arm of an experiment with one seed."""

    experiment: str
    name: str
    net: str
    data: str
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return WORK / self.experiment / f"{self.net}-{self.name}-seed{self.seed}"

    def done(self) -> list[dict[str, Any]]:
        """Return the rows that this arm has."""
        return rows(experiment=self.experiment, arm=self.name, net=self.net, seed=self.seed)

    def get(self, key: str, default: Any = None) -> Any:
        return self.options.get(key, default)


def arms_of(path: Path, seeds: tuple[int, ...] | None = None) -> list[Arm]:
    """Read an experiment's file."""
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    common = spec.get("common", {})
    found = []
    for net in spec["nets"] if "nets" in spec else [spec["net"]]:
        # A net may have settings of its own: `nets: {resnet20: {epochs: 12}}`.
        own = (spec["nets"][net] or {}) if isinstance(spec.get("nets"), dict) else {}
        for seed in seeds or own.get("seeds", spec.get("seeds", [0, 1, 2])):
            for name, options in spec["arms"].items():
                more = {k: v for k, v in own.items() if k != "seeds"}
                every = common | more | (options or {})
                found.append(Arm(path.stem, name, net, spec["data"], seed, every))
    return found


def start_of(arm: Arm, arms: list[Arm]) -> tuple[Path | None, list[int]]:
    """Return the weights an arm starts from, and the epochs these had."""
    start = arm.get("from")
    if start is None:
        return None, []
    if Path(str(start)).suffix:
        return Path(__file__).parent / start, list(arm.get("epochs_before", []))
    before = next(a for a in arms if (a.name, a.seed, a.net) == (start, arm.seed, arm.net))
    found = before.done()
    weights = before.folder / "trained.safetensors"
    if not found or not weights.is_file():
        run(before, arms)
        found = before.done()
    return weights, found[-1]["epochs"]


def run(arm: Arm, arms: list[Arm]) -> None:
    """Train the arm and append its row."""
    weights, before = start_of(arm, arms)
    arm.folder.mkdir(parents=True, exist_ok=True)
    by = arm.get("by", "train")
    data = datasets.load(DATA.get(arm.data, arm.data), holdout=arm.get("holdout", 0.0))
    example = torch.randn(2, data.channels, data.image_size, data.image_size)
    model, more = MAKERS[by](arm, data, example, weights)
    size = resconv.profile(model, example)
    dense = resconv.profile(_created(arm, data), example)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, arm.folder / "trained.safetensors")
    # For timing by benchmarks.latency, on this machine; never published.
    torch.save(model, arm.folder / "net.pt")
    row = {
        "experiment": arm.experiment,
        "arm": arm.name,
        "method": by,
        "net": arm.net,
        "data": NAMES.get(arm.data, arm.data),
        "seed": arm.seed,
        "epochs": before + more.pop("epochs", [arm.get("epochs", 0)]),
        "top1": round(evaluate(model, data), 2),
        "macs": size.macs,
        "num_params": size.num_params,
        "macs_share": round(size.macs / dense.macs, 4),
        "params_share": round(size.num_params / dense.num_params, 4),
    }
    kept = [
        "lr",
        "batch_size",
        "distill",
        "distill_share",
        "hints",
        "mix",
        "ranking",
        "units",
        "holdout",
        "note",
    ]
    row |= {k: arm.options[k] for k in kept if arm.get(k) not in (None, False, 0.0)}
    row |= {f"target_{k}": arm.options[k] for k in ("macs", "params", "latency") if arm.get(k)}
    add_row(row | more)


def _created(arm: Arm, data: datasets.ImageData) -> nn.Module:
    torch.manual_seed(arm.seed)
    return nets.create(arm.net, num_classes=data.num_classes, in_channels=data.channels)


def _started(arm: Arm, data: datasets.ImageData, weights: Path | None) -> nn.Module:
    model = _created(arm, data)
    if weights is not None:
        model.load_state_dict(load_file(weights))
    return model


def _fit(arm: Arm, model: nn.Module, data: datasets.ImageData, weights: Path | None) -> nn.Module:
    """Train in place as the arm says, taught by the net it starts from where it is to be."""
    how = {"lr": arm.get("lr", 0.1), "batch_size": arm.get("batch_size", 128), "seed": arm.seed}
    recipe = Recipe(arm.get("epochs", 0), distill=arm.get("distill_share", 0.5), **how)
    teacher = _started(arm, data, weights).eval() if arm.get("distill") else None
    graphs = torch.cuda.is_available()
    if recipe.epochs:
        how = {"teacher": teacher, "cuda_graphs": graphs, "progress": False}
        fit(model.train(), data, recipe, arm.folder / "fit", **how)
    return model.eval()


Made = tuple[nn.Module, dict[str, Any]]


def _train(arm: Arm, data: Any, example: Any, weights: Path | None) -> Made:
    return _fit(arm, _started(arm, data, weights), data, weights), {}


def _resconv_form(arm: Arm, data: Any, example: Any, weights: Path | None) -> Made:
    model = resconv.convert(_created(arm, data), example, units="layers", start="identity")
    model = _fit(arm, model, data, weights)
    return resconv.fuse(model), {"top1_before_removal": round(evaluate(model, data), 2)}


def _filters(arm: Arm, data: Any, example: Any, weights: Path | None) -> Made:
    dense = _started(arm, data, weights).eval()
    pruned = peers.prune_channels(dense, example[:1], arm.get("macs"))
    if pruned is None:
        raise SystemExit(f"{arm.name}: Torch-Pruning has no net of {arm.get('macs'):.0%} here.")
    before = round(evaluate(pruned, data), 2)
    return _fit(arm, pruned, data, weights), {"top1_after_removal": before}


def _layout(arm: Arm, data: Any, example: Any, weights: Path | None) -> Made:
    remove = peers.blocks_beyond(arm.net, arm.get("blocks"))
    model = peers.without_units(_created(arm, data), example, remove)
    return _fit(arm, model, data, weights), {"layout": peers.blocks_kept(arm.net, remove)}


def _ranked(arm: Arm, data: Any, example: Any, weights: Path | None) -> Made:
    kinds = arm.get("units", "layers,blocks")
    gated = resconv.convert(_started(arm, data, weights), example, units=kinds)
    asked = arm.get("ranking"), arm.get("macs")
    chosen = peers.lowest(gated.eval(), *asked, example, data, arm.seed)
    compact = resconv.prune(gated, resconv.Plan(tuple(chosen)))
    more = {
        "top1_after_removal": round(evaluate(compact, data), 2),
        "layout": peers.blocks_kept(arm.net, chosen),
        "removed_units": chosen,
    }
    return _fit(arm, compact, data, weights), more


# Settings of an arm that are no options of `resconv compress`.
_OURS = {"by", "from", "epochs", "epochs_before", "note", "blocks"}


def _compress(arm: Arm, data: Any, example: Any, weights: Path | None) -> Made:
    """Run ``resconv compress`` itself, as a user would."""
    given = {k: v for k, v in arm.options.items() if k not in _OURS}
    given |= {"model": arm.net, "data": DATA.get(arm.data, arm.data), "seed": arm.seed}
    given |= {"weights": str(weights)} if weights else {}
    given["cuda_graphs"] = torch.cuda.is_available()  # faster there, and the same net
    given |= {k: v for k, v in arm.options.items() if k == "epochs"}
    command = [sys.executable, "-m", "resconv", "compress", "--out", str(arm.folder / "run")]
    for key, value in given.items():
        flag = "--" + key.replace("_", "-")
        command += [flag] if value is True else [] if value is False else [flag, str(value)]
    subprocess.run(command, check=True)
    folder = RunFolder.open(arm.folder / "run")
    metrics, plan = folder.metrics(), resconv.Plan.load(folder / "plan.json")
    stages = folder.config().stage_epochs()
    more = {
        "epochs": [e for e in (stages if weights is None else stages[1:]) if e],
        "top1_before_removal": round(metrics.top1_gated, 2),
        "top1_after_removal": round(metrics.top1_pruned, 2),
        "nonzero": len(metrics.removed_with_nonzero_scale),
        "removed": len(plan.remove),
        "removed_units": list(plan.remove),
        "minutes": round(sum(metrics.seconds.values()) / 60, 1),
    }
    if "resnet" in arm.net:
        more["layout"] = peers.blocks_kept(arm.net, list(plan.remove))
    return resconv.load(folder.path).eval(), more


MAKERS = {"train": _train, "resconv-form": _resconv_form, "compress": _compress}
MAKERS |= {"filters": _filters, "layout": _layout, "ranked": _ranked}


def missing(arms: list[Arm], names: list[str]) -> Iterator[Arm]:
    for arm in arms:
        if (not names or arm.name in names) and not arm.done():
            yield arm


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    parser.add_argument("experiment", type=Path)
    parser.add_argument("arms", nargs="*", help="names; default: all")
    parser.add_argument("--seeds", help="0,1,2; default: those of the file")
    asked = parser.parse_args()
    seeds = tuple(map(int, asked.seeds.split(","))) if asked.seeds else None
    arms = arms_of(asked.experiment, seeds)
    for arm in missing(arms, asked.arms):
        run(arm, arms)


if __name__ == "__main__":
    main()
