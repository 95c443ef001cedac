"""The compact net of a run as a file in 8 bits: calibrated on its training images, judged on its test images."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import resconv
from resconv import data as datasets
from resconv.data import LazySplit, decode_all
from resconv.latency.timing import onnx_runner, time_together
from resconv.prediction import Classifier, evaluate, open_classifier
from resconv.storage.quantising import quantise_onnx

from .job import Run
from .metrics import Int8
from .surgery import compact_of

__all__ = ["quantise"]

_NUM_IMAGES = 256  # of which the largest and smallest values of the activations are taken
_BATCH = 32
_REPEATS = 50
_POINTS = 1.0  # that 8 bits may cost before it is warned of


def quantise(run: Run, path: Path, **options: Any) -> Int8:
    """Write the run's compact net to ``path`` in 8 bits, and return what it is worth; ``options`` are of the export."""
    source = run.config.data
    split, names = datasets.load_val(
        source.source,
        run.data.preprocessing,
        holdout=source.holdout,
        limit=source.limit,
    )
    example = None if options.get("pixels") else run.example()
    with TemporaryDirectory() as folder:
        whole = Path(folder) / "float.onnx"
        files = {"float": whole, "int8": path}
        resconv.export(compact_of(run), whole, example, plan=run.plan(), **options)
        before = open_classifier(whole)
        done = quantise_onnx(whole, path, _calibration(run, before))
        after = open_classifier(path)
        top1 = [evaluate(net, split, names).top1 for net in (before, after)]
        one = before.inputs(next(_pixels(run))[:1])
        threads = torch.get_num_threads()
        runners = {file: onnx_runner(place, one, threads) for file, place in files.items()}
        times = time_together(runners, repeats=_REPEATS, warmup=5)
        size = whole.stat().st_size
    found = Int8(
        file=str(path),
        num_bytes=done.num_bytes,
        num_bytes_float=size,
        top1=top1[1],
        top1_float=top1[0],
        latency_ms=times["int8"].median_ms,
        latency_ms_float=times["float"].median_ms,
        threads=threads,
        num_calibration=done.num_images,
        num_layers=done.num_layers,
        num_quantised=done.num_quantised,
    )
    _say(run, found, len(split))
    return found


def _pixels(run: Run) -> Iterator[Tensor]:
    """Yield some training images as the net's preprocessing cuts them, uint8: the same ones every time."""
    split = run.data.train
    generator = torch.Generator().manual_seed(run.config.training.seed)
    rows = torch.randperm(len(split), generator=generator)[:_NUM_IMAGES]
    for part in torch.split(rows, _BATCH):
        if isinstance(split, LazySplit):
            yield decode_all([split.encoded[row] for row in part.tolist()], split.form)
        else:
            yield split.images[part]


def _calibration(run: Run, classifier: Classifier) -> Iterator[Tensor]:
    yield from (classifier.inputs(pixels) for pixels in _pixels(run))


def _say(run: Run, found: Int8, num_images: int) -> None:
    run.say(
        f"In 8 bits: {found.file}, {found.num_bytes:,} bytes (float {found.num_bytes_float:,}), "
        f"{found.num_quantised} of {found.num_layers} layers, calibrated on {found.num_calibration} "
        "training images."
    )
    run.say(
        f"In ONNX Runtime: top-1 {found.top1:.2f} % on {num_images:,} test images (float {found.top1_float:.2f}), "
        f"{found.latency_ms:.3g} ms (float {found.latency_ms_float:.3g}; batch 1, {found.threads} "
        f"thread{'s' * (found.threads != 1)}, medians, interleaved)."
    )
    if found.top1 < found.top1_float - _POINTS:
        run.say(
            f"Warning: 8 bits cost {found.top1_float - found.top1:.2f} points of top-1. Where that is too much, take "
            "the float file."
        )
    if found.latency_ms > found.latency_ms_float:
        run.say(
            "Warning: on this machine the file in 8 bits is slower than the float file. Time both on the device "
            "that is to run them."
        )
