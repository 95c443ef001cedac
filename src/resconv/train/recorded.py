"""A net's forward and backward pass in training, recorded once as CUDA graphs and then replayed.

So is a teacher's forward pass, which has no backward pass.

A small net on a large GPU waits for its launches: a step of ResNet-56 is some thousand kernels of a few
microseconds. A recorded step is two launches. Its results are those of the same kernels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from resconv.errors import RunError
from resconv.nn.gates import gates

__all__ = ["RecordedNet", "check_recording"]


def check_recording(device_type: str, world_size: int) -> None:
    """Refuse where nothing can be recorded.

    Raises:
        RunError: there is no CUDA GPU, or there are several processes.
    """
    if device_type != "cuda":
        raise RunError(
            "CUDA graphs need an NVIDIA GPU, and torch finds none here. Leave --cuda-graphs out."
        )
    if world_size > 1:
        raise RunError(
            f"CUDA graphs are for one process, and here are {world_size}, which exchange gradients in "
            "the backward pass. Leave --cuda-graphs out, or train with --devices 1."
        )


class _Net(nn.Module):
    """The net as a module of its own: recording replaces the forward of what it is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Any:
        return self.net(images)


class RecordedNet:
    """Runs ``net`` as recorded for batches of one shape; anything else runs as it is.

    The net itself is not changed. What its forward decides in Python is decided once, when it is
    recorded: at the first batch, and after :meth:`renew` where units rest since.

    Raises (when called):
        RunError: the net cannot be recorded, because its forward waits for the device.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self._recorded: _Net | None = None
        self._shape: torch.Size | None = None
        self._resting: tuple[str, ...] = ()

    def __call__(self, images: Tensor) -> Any:
        if self._recorded is None:
            self._recorded = self._record(images)
            self._shape, self._resting = images.shape, self._find_resting()
        return (self._recorded if images.shape == self._shape else self.net)(images)

    def renew(self) -> None:
        """Record anew at the next batch where other units rest than when it was recorded."""
        if self._resting != self._find_resting():
            self._recorded = None

    def _find_resting(self) -> tuple[str, ...]:
        every = gates(self.net, fixed=True)
        waiting = (n for n, g in every.items() if g.waiting)
        return (*(n for n, g in every.items() if g.skipped), "", *waiting)

    def _record(self, images: Tensor) -> _Net:
        net = _Net(self.net)
        # Recording runs the net a few times: what it gathers meanwhile (running statistics) is put back.
        before = {n: b.clone() for n, b in net.named_buffers()}
        kind = images.device.type
        try:
            # Casts kept from one forward pass to the next would be left out of the record.
            with torch.autocast(
                kind,
                dtype=torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=False,
            ):
                torch.cuda.make_graphed_callables(net, (images.clone(),), allow_unused_input=True)
        except Exception as error:  # of CUDA, or of the user's forward
            raise RunError(
                "The net cannot be recorded as CUDA graphs, most likely because its forward reads a value "
                f"back from the GPU ({type(error).__name__}: {str(error)[:160]}). Train without "
                "--cuda-graphs."
            ) from error
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(before[name])
        return net
