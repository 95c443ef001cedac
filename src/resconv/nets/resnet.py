"""ResNets for 32x32 images (He et al. 2016, section 4.2), and the same nets without shortcuts.

A net of depth ``6 n + 2`` has three stages of ``n`` blocks with 16, 32 and 64 channels. Where a
stage begins the shortcut takes every second pixel and pads the new channels with zeros ("option
A"), so that it has no parameters. Global average pooling makes every input size from 4x4 work.
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "PlainBlock",
    "ResNet",
    "ResidualBlock",
    "plainnet20",
    "plainnet32",
    "plainnet44",
    "plainnet56",
    "plainnet110",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]


def _conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class ZeroPadShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, the missing channels filled with zeros on both sides.

    Shape: (N, C, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        missing = out_channels - in_channels
        self.before = missing // 2
        self.after = missing - self.before

    def forward(self, x: Tensor) -> Tensor:
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, self.before, self.after))


class PlainBlock(nn.Module):
    """Two 3x3 convs with BatchNorm and ReLU, no shortcut.

    Shape: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(out_channels, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        # Two ReLU modules, each called once: a graph node then has a name of its own.
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(y)))
        return out


class ResidualBlock(PlainBlock):
    """A :class:`PlainBlock` with an identity (or option A) shortcut added before the last ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else ZeroPadShortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu2(y + (x if self.shortcut is None else self.shortcut(x)))
        return out


class ResNet(nn.Module):
    """A net of ``6 * blocks_per_stage + 2`` layers.

    Shape: (N, in_channels, H, W) -> (N, num_classes); any H and W from 4 up. The stages have
    ``width``, ``2 * width`` and ``4 * width`` channels.
    """

    def __init__(
        self,
        block: type[PlainBlock],
        blocks_per_stage: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.layer1 = _make_stage(block, width, width, 1, blocks_per_stage)
        self.layer2 = _make_stage(block, width, 2 * width, 2, blocks_per_stage)
        self.layer3 = _make_stage(block, 2 * width, 4 * width, 2, blocks_per_stage)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.flatten(self.pool(x)))
        return logits


def _make_stage(
    block: type[PlainBlock], in_channels: int, out_channels: int, stride: int, num_blocks: int
) -> nn.Sequential:
    first = block(in_channels, out_channels, stride)
    rest = [block(out_channels, out_channels) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *rest)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return a ResNet-20: 0.27 M parameters, 41 M MACs at 3x32x32."""
    return ResNet(ResidualBlock, 3, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return a ResNet-32: 0.46 M parameters, 69 M MACs at 3x32x32."""
    return ResNet(ResidualBlock, 5, num_classes, in_channels)


def resnet44(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return a ResNet-44: 0.66 M parameters, 97 M MACs at 3x32x32."""
    return ResNet(ResidualBlock, 7, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return a ResNet-56: 0.85 M parameters, 126 M MACs at 3x32x32."""
    return ResNet(ResidualBlock, 9, num_classes, in_channels)


def resnet110(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return a ResNet-110: 1.7 M parameters, 253 M MACs at 3x32x32."""
    return ResNet(ResidualBlock, 18, num_classes, in_channels)


def plainnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return :func:`resnet20` without its shortcuts."""
    return ResNet(PlainBlock, 3, num_classes, in_channels)


def plainnet32(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return :func:`resnet32` without its shortcuts."""
    return ResNet(PlainBlock, 5, num_classes, in_channels)


def plainnet44(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return :func:`resnet44` without its shortcuts."""
    return ResNet(PlainBlock, 7, num_classes, in_channels)


def plainnet56(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return :func:`resnet56` without its shortcuts."""
    return ResNet(PlainBlock, 9, num_classes, in_channels)


def plainnet110(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return :func:`resnet110` without its shortcuts."""
    return ResNet(PlainBlock, 18, num_classes, in_channels)
