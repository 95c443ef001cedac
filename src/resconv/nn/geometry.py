"""Where a convolution reads: the kernel tap at the output's own position, and what a strided identity reads."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Reach", "padding_before", "tap"]


def padding_before(conv: Any, dim: int) -> int:
    if conv.padding == "valid":
        return 0
    if conv.padding == "same":
        # torch puts the odd element behind.
        return int(conv.dilation[dim] * (conv.kernel_size[dim] - 1) // 2)
    return int(conv.padding[dim])


def tap(conv: nn.Module) -> tuple[int, ...] | None:
    """Return the kernel index that reads the output's own position, or None (see method)."""
    found = []
    for i, (kernel, dilation) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):  # type: ignore[arg-type]
        before = padding_before(conv, i)
        if before % dilation or before // dilation >= kernel:
            return None
        found.append(before // dilation)
    return tuple(found)


@dataclass(frozen=True)
class Reach:
    """What the shortcut of a shape-changing conv reads: one tap of its kernel, see ``analysis.layers.reach``.

    Output position ``o`` reads input position ``offset + stride * o``. Within each group, output
    channel ``c`` reads input channel ``c``, or 0 where there is none.
    """

    tap: tuple[int, ...]
    offset: tuple[int, ...]

    def __call__(self, x: Tensor, conv: Any, size: torch.Size) -> Tensor:
        steps = zip(self.offset, conv.stride, size, strict=True)
        read: Any = (..., *(slice(o, o + s * (n - 1) + 1, s) for o, s, n in steps))
        x = x[read]
        wide, narrow = conv.out_channels // conv.groups, conv.in_channels // conv.groups
        if wide != narrow:
            x = x.reshape(-1, conv.groups, narrow, *size)[:, :, :wide]
            x = F.pad(x, [0, 0] * len(size) + [0, wide - x.shape[2]]).flatten(1, 2)
        return x
