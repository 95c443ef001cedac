"""What each stage reads and writes, and the look that is taken at it before it is used."""

import hashlib
import json
from pathlib import Path
from typing import Any

from resconv.errors import RunError
from resconv.files import digest

from .fingerprint import differing_parts
from .job import INT8_FILES, LATENCY, Run
from .mark import Record
from .settings import settings as all_settings

__all__ = ["READS", "WRITES", "bind", "check", "record"]

_NET = ("model.safetensors", "model.json")


_GATED = ("dense.safetensors", "gated.safetensors")
READS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "sparse": ("dense.safetensors",),
    "plan": _GATED,
    "prune": (*_GATED, "plan.json"),
    "finetune": (*_GATED, "plan.json"),
    "control": ("dense.safetensors",),
    "export": (*_NET, "plan.json"),
    "measure": (*_NET, "plan.json", "dense.safetensors", "model.onnx", "model.onnx.data"),
    "report": ("plan.json", "scales.json"),
}
WRITES: dict[str, tuple[str, ...]] = {
    "dense": ("dense.safetensors",),
    "sparse": ("gated.safetensors", "scales.json", LATENCY),
    "plan": ("plan.json", LATENCY),
    "prune": _NET,
    "finetune": _NET,
    "control": ("control.safetensors",),
    "export": ("model.onnx", "model.onnx.data", *INT8_FILES),
    "measure": ("dense.onnx", "dense.onnx.data"),
    "report": ("report.html",),
}


def check(run: Run, stage: str) -> None:
    """Look at what ``stage`` is about to use: is it what the stages before it read and wrote?

    Raises:
        RunError: the settings, the images or labels, or a file changed meanwhile.
    """
    mark = run.folder.mark()
    order = list(READS)
    before = {s: mark.stages[s] for s in order[: order.index(stage)] if s in mark.stages}
    settings = run.config.bearing()
    # A run of an older version was without those that came later.
    defaults = {s.name: s.default for s in all_settings()}
    for name, found in before.items():
        there = {k: found.settings.get(k, defaults[k]) for k in settings}
        if differing := [k for k in settings if there[k] != settings[k]]:
            words = "; ".join(f"{k}: {there[k]!r} there, {settings[k]!r} now" for k in differing)
            raise RunError(
                f"{run.folder / 'config.json'} is not what the stage {name!r} ran with ({words}). Put "
                "that back, or start anew with --fresh."
            )
        if parts := differing_parts(found.data, run.fingerprint):
            raise RunError(
                f"{run.config.data.source} changed since the stage {name!r}: other {', '.join(parts)}. What was "
                "trained on the old data says nothing about the new. Put it back, or start anew with "
                "--fresh."
            )
        for outside, sealed in found.read.items():
            source = Path(outside)
            if source.is_absolute() and source.is_file() and digest(source) != sealed:
                raise RunError(
                    f"{outside} changed since the stage {name!r} read it. Put it back, or start anew "
                    "with --fresh."
                )
    wrote = {f: (name, seal) for name, found in before.items() for f, seal in found.wrote.items()}
    for file in READS[stage]:
        name, seal = wrote.get(file, ("", ""))
        path = run.folder / file
        if name and not path.is_file():
            raise RunError(
                f"{path} is missing, which the stage {name!r} wrote. Put it back, or {_again(name, run)}."
            )
        if name and digest(path) != seal:
            raise RunError(
                f"{path} is not what the stage {name!r} wrote: it was damaged, changed or comes from "
                f"another run (SHA-256 {seal[:12]}... there, {digest(path)[:12]}... now). Put it back, "
                f"or {_again(name, run)}."
            )


def _again(stage: str, run: Run) -> str:
    """Return how the user gets what ``stage`` wrote anew."""
    if stage in ("plan", "prune", "finetune"):
        plan = " (with --plan FILE for a plan of your own)" if stage == "plan" else ""
        return f"make it anew: resconv prune {run.folder.path}{plan}"
    if stage == "export":
        return f"make it anew: resconv export {run.folder.path}"
    return "start anew with --fresh"


def bind(run: Run, stage: str) -> str:
    """Return what a checkpoint of this stage is bound to: one of anything else is not gone on from."""
    content: list[Any] = [
        run.folder.mark().id,
        stage,
        run.config.bearing(),
        run.fingerprint,
        _read(run, stage),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(run: Run, stage: str) -> dict[str, str]:
    read = run.folder.digests(READS[stage])
    weights = run.config.net.weights
    if stage == "dense" and weights is not None and Path(weights).is_file():
        read[str(Path(weights).resolve())] = digest(Path(weights))
    return read


def record(run: Run, stage: str) -> Record:
    """Return what ``stage`` read and wrote, now that it is done."""
    return Record(
        settings=run.config.bearing(),
        data=run.fingerprint,
        read=_read(run, stage),
        wrote=run.folder.digests(WRITES[stage]),
        metrics=sorted(run.folder.added),
    )
