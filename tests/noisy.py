"""A net whose training draws random numbers in its forward pass: dropout and stochastic depth."""

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

__all__ = ["net"]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.depth = StochasticDepth(0.2, "row")

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(x + self.depth(out))


class _Net(nn.Module):
    def __init__(self, num_classes: int, in_channels: int, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.norm(self.stem(x))))
        return self.fc(self.dropout(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)))


def net(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Return a residual net of 3 blocks for small images."""
    return _Net(num_classes, in_channels)
