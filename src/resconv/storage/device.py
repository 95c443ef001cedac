"""Files for phones and boards: ExecuTorch (.pte, for its XNNPACK kernels) and LiteRT (.tflite).

Each is written by its own converter and run by its own runtime, at one batch size. What is said of the net (how images
become inputs, the plan) stands in a .pte as a method ``resconv`` that returns JSON, in a .tflite as a file
``resconv.json`` in a zip behind the model, where that format keeps such files.
"""

import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "DEVICE_SUFFIXES",
    "EXTRAS",
    "Ready",
    "convert_for_device",
    "has_converter",
    "open_device_file",
]

DEVICE_SUFFIXES = (".pte", ".tflite")
EXTRAS = {".pte": "executorch", ".tflite": "litert"}
_CONVERTERS = {".pte": "executorch", ".tflite": "litert_torch"}
_TEXTS = "resconv.json"
_METHOD = "resconv"


@dataclass(frozen=True)
class Ready:
    """An opened file: tensors in, tensors out, in the file's own order.

    Attributes:
        inputs: shape and type (by torch's name) of each input.
        texts: what was written beside the net.
    """

    run: Callable[[Sequence[Tensor]], list[Tensor]]
    inputs: list[tuple[list[int], str | None]]
    texts: dict[str, str]


def has_converter(suffix: str) -> bool:
    """Whether the package that writes such files is installed."""
    return importlib.util.find_spec(_CONVERTERS[suffix]) is not None


def convert_for_device(
    net: nn.Module, args: tuple[Any, ...], suffix: str, texts: Mapping[str, str]
) -> Callable[[Path], None]:
    """Convert a net in eval mode at the inputs' shapes, and return what writes the file.

    Raises:
        Exception: whatever the converter raises.
    """
    converters = {".pte": _to_executorch, ".tflite": _to_litert}
    return converters[suffix](net, args, json.dumps(dict(texts)))


def open_device_file(path: Path) -> Ready:
    """Open a file to run it here.

    Raises:
        ImportError: the runtime is not installed.
        Exception: whatever the runtime raises.
    """
    openers = {".pte": _open_executorch, ".tflite": _open_litert}
    with _silent():
        return openers[path.suffix](path)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what the runtimes' C++ writes to standard error (places of /sys that are missing) from the screen."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _to_executorch(net: nn.Module, args: tuple[Any, ...], texts: str) -> Callable[[Path], None]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(net, args, strict=False)
    lowered = to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], constant_methods={_METHOD: texts}
    )
    content = lowered.to_executorch().buffer

    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def _open_executorch(path: Path) -> Ready:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    meta = method.metadata

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        with _silent():
            found = method.execute([t.detach().cpu().contiguous() for t in tensors])
        # The memory of a result is used again by the next call.
        return [t.clone() for t in found if isinstance(t, Tensor)]

    each = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
    inputs = [(list(m.sizes()), _EXECUTORCH_TYPES.get(m.dtype())) for m in each]
    texts = "{}"
    if _METHOD in program.method_names:
        (texts,) = program.load_method(_METHOD).execute([])
    return Ready(run, inputs, _as_texts(texts))


# By the numbers of torch's c10::ScalarType.
_EXECUTORCH_TYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
}
_EXECUTORCH_TYPES |= {7: "float64", 11: "bool"}


def _to_litert(net: nn.Module, args: tuple[Any, ...], texts: str) -> Callable[[Path], None]:
    import litert_torch

    model = litert_torch.convert(net, args)

    def write(path: Path) -> None:
        model.export(str(path))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(_TEXTS, texts)

    return write


def _open_litert(path: Path) -> Ready:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    given, returned = interpreter.get_input_details(), interpreter.get_output_details()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        for place, tensor in zip(given, tensors, strict=True):
            interpreter.set_tensor(place["index"], tensor.detach().cpu().contiguous().numpy())
        with _silent():
            interpreter.invoke()
        return [torch.from_numpy(interpreter.get_tensor(place["index"])) for place in returned]

    inputs = [(place["shape"].tolist(), place["dtype"]().dtype.name) for place in given]
    texts = "{}"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if _TEXTS in archive.namelist():
                texts = archive.read(_TEXTS).decode()
    return Ready(run, inputs, _as_texts(texts))


def _as_texts(text: str) -> dict[str, str]:
    """Return the keys and texts that were written into a file; nothing where it holds something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)}
