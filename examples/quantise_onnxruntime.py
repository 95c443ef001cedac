"""A compact net in 8 bits for ONNX Runtime: static quantisation, calibrated on training images.

Of a run folder, `resconv export RUN --int8` does the same.
"""

import tempfile
from pathlib import Path

from compact import compact_digits
from torch import Tensor

import resconv
from resconv.storage.exporting import run_onnx
from resconv.storage.quantising import quantise_onnx


def classes(file: Path, images: Tensor) -> Tensor:
    return run_onnx(file, images)[0].argmax(1)


def main(epochs: tuple[int, int] = (8, 12), macs: float = 0.5) -> dict[str, float]:
    net, calibration, held_out = compact_digits(epochs, macs)
    images, labels = held_out.tensors
    with tempfile.TemporaryDirectory() as folder:
        full, small = Path(folder) / "full.onnx", Path(folder) / "int8.onnx"
        resconv.export(net, full, images[:2])
        quantise_onnx(full, small, calibration[:512].split(64))
        before, after = classes(full, images), classes(small, images)
        sizes = full.stat().st_size, small.stat().st_size
    return {
        "float32": (before == labels).float().mean().item(),
        "int8": (after == labels).float().mean().item(),
        "agreement": (before == after).float().mean().item(),
        "bytes": sizes[1] / sizes[0],
    }


if __name__ == "__main__":
    print(main())
