"""Latency and memory of networks, side by side in one run.

Machines are noisy: the networks take turns, repeat by repeat, and medians are compared.
"""

import platform
import random
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..analysis.inputs import as_call, copied, evaluating, to_device_of
from ..errors import ExportError, MissingExtraError

__all__ = [
    "Timing",
    "machine",
    "onnx_runner",
    "peak_memory",
    "processor",
    "time_together",
    "torch_runner",
    "torch_threads",
]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and quartiles of ``repeats``."""

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int


def time_together(
    runners: Mapping[str, Callable[[], Any]], *, repeats: int = 30, warmup: int = 3
) -> dict[str, Timing]:
    """Time the calls in turn, ``repeats`` rounds, each round in another order.

    Each timed call follows an untimed one of the same net: it finds its own data in the caches, as
    in a service that runs one net, and not what another net has left there.
    """
    names = list(runners)
    for name in names:
        for _ in range(warmup):
            runners[name]()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        # A fixed or rotating order would give each call the same predecessor.
        for name in random.Random(turn).sample(names, len(names)):
            runners[name]()
            start = time.perf_counter()
            runners[name]()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: _timing(values) for name, values in taken.items()}


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Timing(median, low, high, len(values))


@contextmanager
def torch_threads(count: int | None) -> Any:
    """Run a block with a fixed number of intra-op threads."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_runner(model: nn.Module, example_inputs: Any) -> Callable[[], Any]:
    """Return a call that runs ``model`` eagerly in eval mode (waiting for its device)."""
    args, kwargs = as_call(to_device_of(model, example_inputs))
    model.eval()
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    cuda = bool(inputs) and inputs[0].is_cuda
    before, versions = copied(inputs), [t._version for t in inputs]

    def run() -> Any:
        if [t._version for t in inputs] != versions:  # the net wrote into them
            with torch.no_grad():
                for tensor, own in zip(inputs, before, strict=True):
                    tensor.copy_(own)
            versions[:] = [t._version for t in inputs]
        with torch.inference_mode():
            out = model(*args, **kwargs)
            if cuda:
                torch.cuda.synchronize()
            return out

    return run


def onnx_runner(
    model: Path | bytes, example_inputs: Any, threads: int | None = None
) -> Callable[[], Any]:
    """Return a call that runs an ONNX file, or its content, in ONNX Runtime on the CPU.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        ExportError: it cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "Timing an ONNX file") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # ONNX Runtime's own classes
        what = "the network it was given" if isinstance(model, bytes) else model
        raise ExportError(f"ONNX Runtime cannot read {what}: {str(error)[:200]}") from error
    tensors = [t for t in tree_leaves(example_inputs) if isinstance(t, Tensor)]
    feed = {
        i.name: t.detach().cpu().numpy()
        for i, t in zip(session.get_inputs(), tensors, strict=False)
    }
    return lambda: session.run(None, feed)


def processor() -> str:
    """Return the name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="ignore").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    """Describe this machine for a results table: processor, threads, accelerator, torch."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    plural = "s" if threads != 1 else ""
    return f"{processor()}, {threads} thread{plural}{gpu}, torch {torch.__version__}"


def peak_memory(model: nn.Module, example_inputs: Any) -> int:
    """Return the most bytes alive at one time in a forward pass: parameters and activations.

    Counted exactly from the tensors' own lifetimes, so it does not depend on the allocator or on
    what else runs. Workspace inside a kernel is not seen.
    """
    args, kwargs = as_call(to_device_of(model, example_inputs))
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    base = sum(held.values()) + sum(t.untyped_storage().nbytes() for t in inputs)
    known = {*held, *(t.untyped_storage().data_ptr() for t in inputs)}
    with evaluating(model), _Alive(base, known) as alive:
        model(*args, **kwargs)
    return int(alive.peak)


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, base: int, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = base
        self.peak: int = base
        self.known = known
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self.known or address in self.alive or not size:
            return
        self.alive.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.now -= size
