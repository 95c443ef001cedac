"""The cards on top of the page, and what a reader may do next."""

import math
from dataclasses import dataclass
from pathlib import Path

from ..metrics import Metrics

__all__ = ["Card", "cards", "name_of", "next_steps", "runtime_of"]

_BIG_LOSS = 1.0  # points of top-1


@dataclass(frozen=True)
class Card:
    """A figure before and after, and how it is to be read."""

    title: str
    before: str
    after: str
    change: str
    note: str


def name_of(source: str) -> str:
    """Return the data's name; where it lies on this machine is nobody else's business."""
    kind, _, place = source.partition(":")
    if kind == "hf" or not place:
        return place or source
    return Path(place).name or kind


def runtime_of(metrics: Metrics) -> str | None:
    """Return the runtime whose milliseconds stand on top: ONNX Runtime where it was timed."""
    return next((r for r in ("onnxruntime", *metrics.latency) if r in metrics.latency), None)


def cards(metrics: Metrics, num_images: int | None) -> list[Card]:
    """Return the cards of accuracy, latency and size."""
    found = []
    if metrics.top1_compact is not None:
        found.append(_accuracy(metrics, num_images))
    runtime = runtime_of(metrics)
    if runtime is not None:
        times = metrics.latency[runtime]
        measured = metrics.measured
        how = (
            f", batch {measured.batch}, {_several(measured.threads, 'thread')}" if measured else ""
        )
        found.append(
            Card(
                "Latency",
                f"{times.dense_ms:.3g}",
                f"{times.compact_ms:.3g} ms",
                f"{times.dense_ms / times.compact_ms:.2f} times as fast"
                if times.compact_ms
                else "",
                f"{runtime}{how}",
            )
        )
    before, after = metrics.num_params_dense, metrics.num_params_compact
    if before is not None and after is not None:
        macs = ""
        if metrics.macs_dense and metrics.macs_compact is not None:
            macs = f"; {_short(metrics.macs_dense)} MACs became {_short(metrics.macs_compact)}"
        found.append(
            Card(
                "Size",
                _short(before).strip(),
                _short(after).strip(),
                f"parameters{f', {after / before - 1:+.1%}' if before else ''}",
                f"{_short(4 * after)}B of float32 weights{macs}",
            )
        )
    return found


def _accuracy(metrics: Metrics, num_images: int | None) -> Card:
    before, after = metrics.top1_dense, metrics.top1_compact
    assert after is not None
    own = metrics.epochs_dense
    more = (metrics.epochs_sparse or 0) + metrics.epochs_finetune
    note = f"epochs: {own} before, {own + more} after" if own is not None else f"{more} epochs more"
    if metrics.top1_control is not None:
        note += f"; the dense net trained on as long has {metrics.top1_control:.2f} %"
    if num_images:
        margin = 196 * math.sqrt(after / 100 * (1 - after / 100) / num_images)
        note += f"; {num_images:,} images judge, so \u00b1{margin:.1f} points"
    if before is None:
        return Card("Accuracy", "", f"{after:.2f} %", "top-1; no dense net was trained", note)
    return Card(
        "Accuracy", f"{before:.2f}", f"{after:.2f} %", f"{after - before:+.2f} points", note
    )


def next_steps(metrics: Metrics, folder: str) -> list[tuple[str, str]]:
    """Return (advice, command) for what this run shows; a command may be empty."""
    steps = []
    before, after = metrics.top1_dense, metrics.top1_compact
    if before is not None and after is not None and before - after > _BIG_LOSS:
        steps.append(
            (
                f"{before - after:.1f} points of accuracy are lost. Finetune longer; the same command with "
                "another number prunes and finetunes anew, and nothing before that. If that does not "
                "help, ask for less: a larger --macs.",
                f"--finetune-epochs {max(10, 2 * metrics.epochs_finetune)}",
            )
        )
    if metrics.finetuned_kept is False:
        steps.append(
            ("Finetuning made the net worse. Lower its learning rate.", "--finetune-lr 0.001")
        )
    if metrics.latency_target is not None and not metrics.latency_target.met:
        steps.append(
            (
                "The latency target was missed. Measure again when the machine is quiet.",
                f"resconv measure {folder}",
            )
        )
    if metrics.onnx is None:
        steps.append(("There is no ONNX file yet.", f"resconv export {folder}"))
    steps += [
        (
            "Look at single images, or judge the file that you will deploy.",
            f"resconv evaluate {folder}/model.onnx DATA"
            if metrics.onnx
            else f"resconv evaluate {folder}",
        ),
        (
            "Let the file read pixels, so that an app needs no preprocessing of its own.",
            f"resconv export {folder} --to app.onnx --with-preprocessing --softmax",
        ),
        ("Put runs with other targets side by side.", f"resconv compare {folder} OTHER_RUN"),
    ]
    steps.append(
        (
            "One run is one seed: before you decide between two nets, run each with three.",
            "--seed 1",
        )
    )
    return steps


def _several(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _short(number: float) -> str:
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {sign}"
    return f"{number:g} "
