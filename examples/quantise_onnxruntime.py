"""A compact net in 8 bits with ONNX Runtime: static quantisation, calibrated on training images."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from compact import compact_digits
from onnxruntime import quantization
from torch import Tensor

import resconv


class Calibration(quantization.CalibrationDataReader):
    """Feeds the images in batches."""

    def __init__(self, images: Tensor) -> None:
        self.batches = iter(images.split(64))

    def get_next(self) -> dict | None:
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch.numpy()}


def classes(file: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": images.numpy()})[0]).argmax(1)


def main(epochs: tuple[int, int] = (8, 12), macs: float = 0.5) -> dict[str, float]:
    net, calibration, held_out = compact_digits(epochs, macs)
    images, labels = held_out.tensors
    with tempfile.TemporaryDirectory() as folder:
        full, prepared, small = (Path(folder) / f"{n}.onnx" for n in ("full", "prepared", "int8"))
        resconv.export(net, full, images[:2])
        quantization.quant_pre_process(full, prepared)
        quantization.quantize_static(
            prepared,
            small,
            Calibration(calibration[:512]),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
        )
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
