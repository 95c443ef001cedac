"""An ONNX file in 8 bits: static quantisation by ONNX Runtime, calibrated on images.

Weights are signed, one scale a channel; activations are unsigned, one scale a tensor, from the least and
the largest value that the calibration sees. Pairs of QuantizeLinear and DequantizeLinear stand around each
operation (QDQ), so the file is plain ONNX. Weights use 7 of their 8 bits: a sum of two products of 8 and 8
bits overflows the 16 bits in which x86 processors without VNNI add them, silently.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError, MissingExtraError
from ..files import write_atomic
from .runtimes import first_line, open_file, quietly

__all__ = ["Quantised", "quantise_onnx", "require_quantiser"]

_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# At the end of a classifier, where 8 bits save nothing and cost the small probabilities.
_FLOAT = ("Softmax", "LogSoftmax")


@dataclass(frozen=True)
class Quantised:
    """A written file in 8 bits.

    Attributes:
        num_bytes: of the file.
        num_layers: operations with weights (convolutions, matrix products) of the float file.
        num_quantised: how many of them compute in 8 bits.
        num_images: that it was calibrated on.
        rel_error: its outputs on these, less those of the float file, as a share of these (in the 2-norm).
    """

    path: Path
    num_bytes: int
    num_layers: int
    num_quantised: int
    num_images: int
    rel_error: float


def require_quantiser() -> None:
    """Ask for the packages that quantise.

    Raises:
        MissingExtraError: one is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime.quantization  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxruntime", "onnx", "An INT8 file") from error


def quantise_onnx(source: str | Path, path: str | Path, batches: Iterable[Tensor]) -> Quantised:
    """Write an ONNX file of one input in 8 bits; ``source`` is left as it is, and its metadata come along.

    Args:
        source: the float file.
        path: where to write, ending in ``.onnx``.
        batches: inputs as the file reads them, to calibrate with; a few hundred from training are enough.

    Raises:
        ExportError: no inputs are given, ONNX Runtime cannot quantise the file, nothing in it is computed in
            8 bits, or its outputs are not finite.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    require_quantiser()
    source, path = Path(source), Path(path)
    opened = open_file(source)
    inputs = _in_batches(batches, opened.batch)
    if not inputs:
        raise ExportError("There are no inputs to calibrate with: give some from training.")
    found: list[tuple[int, int]] = []
    errors: list[float] = []

    def write(temporary: Path) -> None:
        try:
            with quietly():
                found.append(_write(source, temporary, inputs))
        except ExportError:
            raise
        except Exception as error:  # of ONNX Runtime and its quantiser
            raise ExportError(
                f"ONNX Runtime cannot write {source} in 8 bits: {first_line(error)}."
            ) from error
        expected = torch.cat([opened.run(x)[0].float() for x in inputs])
        run = open_file(temporary).run
        got = torch.cat([run(x)[0].float() for x in inputs])
        if not got.isfinite().all():
            raise ExportError(f"In 8 bits {source} returns values that are not finite.")
        errors.append(float((got - expected).norm() / expected.norm().clamp(min=1e-12)))

    write_atomic(path, write)
    ((num_layers, num_quantised),) = found
    num_images = sum(len(x) for x in inputs)
    size = path.stat().st_size
    return Quantised(path, size, num_layers, num_quantised, num_images, errors[0])


def _in_batches(batches: Iterable[Tensor], size: int | None) -> list[Tensor]:
    """Return the inputs in batches that the file can be fed: of its own size, where that is fixed."""
    if size is None:
        return [x for x in batches if len(x)]
    every = [part for x in batches for part in torch.split(x, 1)]
    return [torch.cat(every[i : i + size]) for i in range(0, len(every) - size + 1, size)]


def _write(source: Path, path: Path, inputs: list[Tensor]) -> tuple[int, int]:
    """Quantise, and return how many operations have weights, and how many of these compute in 8 bits."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        layers = sum(n.op_type in _WITH_WEIGHTS for n in graph.node)

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.feeds: Iterator[dict[str, Any]] = iter(
                    {graph.input[0].name: x.numpy()} for x in inputs
                )

            def get_next(self) -> dict[str, Any] | None:
                return next(self.feeds, None)

        quantization.quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_kept_in_float(graph),
        )
    model = onnx.load(path)
    dequantised = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    quantised = sum(
        n.op_type in _WITH_WEIGHTS and set(n.input[:2]) <= dequantised for n in model.graph.node
    )
    if not quantised:
        raise ExportError(
            f"{source} has no convolution or matrix product that ONNX Runtime computes in 8 bits."
        )
    texts = {p.key: p.value for p in onnx.load(source, load_external_data=False).metadata_props}
    onnx.helper.set_model_props(model, texts | {"precision": "int8"})
    onnx.save(model, path)
    return layers, quantised


def _kept_in_float(graph: Any) -> list[str]:
    """Return the names of what normalises pixels, before the first weights, and of what gives probabilities."""
    behind: set[str] = set()  # values that a layer with weights has gone into
    kept = []
    for node in graph.node:
        if node.op_type in _WITH_WEIGHTS or behind.intersection(node.input):
            behind.update(node.output)
        else:
            kept.append(node.name)
        if node.op_type in _FLOAT:
            kept.append(node.name)
    return [name for name in kept if name]
