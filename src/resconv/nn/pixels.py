"""Pixels to a net's inputs, ``(pixel / 255 - mean) / std`` a channel, as arithmetic and as a module in front."""

from typing import Literal

import torch
from torch import Tensor, nn

from ..preprocessing import Preprocessing

__all__ = ["FromPixels", "PixelLayout", "scale_and_shift"]

PixelLayout = Literal["nchw", "nhwc"]


def scale_and_shift(
    preprocessing: Preprocessing, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return what a pixel of 0..255 is multiplied by, and what is then added: one multiplication, one addition.

    Shape: (1, C, 1, 1) each, float32.
    """
    std = torch.tensor(preprocessing.std, device=device).view(1, -1, 1, 1)
    mean = torch.tensor(preprocessing.mean, device=device).view(1, -1, 1, 1)
    return 1 / (255 * std), -mean / std


class FromPixels(nn.Module):
    """A net that reads pixels: it normalises them itself, and may give probabilities.

    Images are resized and cropped before, and their channels are in the preprocessing's order. The net inside is
    the one given.

    Shape: uint8 (N, C, H, W), or (N, H, W, C) with the layout ``nhwc``, -> what the net returns.
    """

    def __init__(
        self,
        net: nn.Module,
        preprocessing: Preprocessing,
        layout: PixelLayout = "nchw",
        *,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.layout, self.softmax = net, layout, softmax
        first = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
        for name, value in zip(
            ("scale", "shift"), scale_and_shift(preprocessing, first.device), strict=True
        ):
            self.register_buffer(name, value.to(first.dtype))
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, pixels: Tensor) -> Tensor:
        if self.layout == "nhwc":
            pixels = pixels.permute(0, 3, 1, 2)
        out: Tensor = self.net(pixels.to(self.scale.dtype) * self.scale + self.shift)
        return out.softmax(1) if self.softmax else out
