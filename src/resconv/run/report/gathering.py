"""What the page shows beside the figures of ``metrics.json``, worked out from a run folder."""

import csv
import platform
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import resconv

from ..config import Config
from ..job import Run
from ..settings import settings
from ..surgery import compact_of
from .judging import Judgement, judge
from .layers import Layer, computed_layers, judged

__all__ = ["Epoch", "Nets", "command_of", "epochs_of", "nets_of", "versions"]

_STAGES = ("dense", "sparse", "finetune")
_PACKAGES = ("resconv", "torch", "torchvision", "timm", "lightning", "onnxruntime")


@dataclass(frozen=True)
class Nets:
    """What the run's two nets are made of, and what they say of the images.

    ``new`` are layers of the compact net that the dense net does not have.
    """

    layers: tuple[Layer, ...]
    new: tuple[Layer, ...]
    judgement: Judgement


@dataclass(frozen=True)
class Epoch:
    """What an epoch ended with: top-1 in percent; ``macs``, a share, is None outside of sparse training."""

    stage: str
    number: int
    top1: float
    macs: float | None


def nets_of(run: Run) -> Nets:
    """Look at the run's dense and compact net.

    Raises:
        ResConvError: one of them is missing or damaged.
    """
    dense, compact, example = run.dense(), compact_of(run), run.example()
    found = resconv.units(dense, example, run.config.target.units)
    reasons = {u.name: u.reason for u in found if u.reason is not None}
    before, after = computed_layers(dense, example), computed_layers(compact, example)
    metrics = run.folder.metrics()
    names = {layer.name for layer in before}
    layers = judged(
        before, [x.name for x in after], run.plan(), metrics.removed_units or (), reasons
    )
    is_trained = metrics.top1_dense is not None
    return Nets(
        tuple(layers),
        tuple(x for x in after if x.name not in names),
        judge(dense if is_trained else None, compact, run.data),
    )


def epochs_of(logs: Path) -> list[Epoch]:
    """Read the epochs that the stages logged, in order; none where there is no log."""
    found: list[Epoch] = []
    for stage in _STAGES:
        path = logs / stage / "metrics.csv"
        if not path.is_file():
            continue
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("top1")]
        for row in rows:
            macs = row.get("macs")
            try:
                found.append(
                    Epoch(
                        stage,
                        len(found) + 1,
                        100 * float(row["top1"]),
                        float(macs) if macs else None,
                    )
                )
            except ValueError:  # a log that was edited
                continue
    return found


def command_of(config: Config, out: Path) -> str:
    """Return the command that does the same run."""
    words = ["resconv", "compress"]
    for setting in settings():
        value = setting.of(config)
        if setting.limits.hidden or value == setting.default:
            continue
        if setting.is_flag:
            words.append(setting.option if value else setting.option.replace("--", "--no-", 1))
            continue
        is_list = isinstance(value, tuple | list)
        words += [setting.option, ",".join(map(repr, value)) if is_list else str(value)]
    return shlex.join([*words, "--out", str(out)])


def versions() -> list[tuple[str, str]]:
    """Return (package, version) of what the run stands on."""
    found = [("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found.append(("CUDA", str(torch.version.cuda)))
    return found
