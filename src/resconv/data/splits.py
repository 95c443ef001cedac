"""What a loaded image set is: two splits, their classes, and the statistics of the pixels."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = [
    "NO_VAL_HINT",
    "ImageData",
    "LazySplit",
    "Source",
    "Split",
    "measure_pixels",
    "split_stratified",
]

# What a user can do whose set has no split to judge by.
NO_VAL_HINT = " Without one, hold a part of train out: holdout=0.1 (--holdout 0.1)."

_STATISTICS_SAMPLE = 1024  # images of a lazy split that its mean and std are taken from


@dataclass(frozen=True)
class Split:
    """Images in memory.

    Attributes:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class LazySplit(Dataset[tuple[Tensor, int]]):
    """Image files that are decoded when they are read; item i is a uint8 (C, S, S) and a label.

    Attributes:
        paths: N files.
        labels: int64, shape (N,).
        channels: 1 or 3; files of the other kind are converted.
        image_size: S, the side of the square in pixels.
    """

    paths: tuple[Path, ...] = field(repr=False)
    labels: Tensor = field(repr=False)
    channels: int
    image_size: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index), int(self.labels[index])

    def read(self, index: int, transform: Callable[[Any], Any] | None = None) -> Tensor:
        """Return image ``index``, cut to the square by ``transform`` (of PIL images) if given.

        Raises:
            DataError: the file is not a readable image.
        """
        from resconv.data.images import EncodedImage, decode

        path = self.paths[index]
        return decode(EncodedImage(str(path), path), self.channels, self.image_size, transform)


@dataclass(frozen=True)
class ImageData:
    """An image set.

    Attributes:
        name: the name it was loaded by.
        train, val: the splits; ``val`` is held out of ``train`` where that was asked for.
        class_names: one name a label, in the labels' order.
        channels: 1 (grey) or 3 (RGB).
        image_size: side of the square images, in pixels.
        mean, std: of each channel over ``train``, pixels scaled to 0..1.
        example: one image's place, for messages.
    """

    name: str
    train: Split | LazySplit
    val: Split | LazySplit
    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    example: str | None = None


@dataclass(frozen=True)
class Source:
    """A split before it is decoded: labels, int64 (N,), and a function that decodes some rows."""

    labels: Tensor
    read: Callable[[Tensor], Split | LazySplit]


def split_stratified(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the sorted indices of the rest, and of ``fraction`` of every class drawn by ``seed``.

    A class of two images or more has at least one on each side; a class of one stays in the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in torch.unique(labels):
        members = (labels == label).nonzero().flatten()
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        drawn.append(members[torch.randperm(len(members), generator=generator)[:count]])
    is_drawn = torch.zeros(len(labels), dtype=torch.bool)
    is_drawn[torch.cat(drawn)] = True
    return (~is_drawn).nonzero().flatten(), is_drawn.nonzero().flatten()


def measure_pixels(split: Split | LazySplit) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, pixels scaled to 0..1.

    Over all images in memory, over 1,024 evenly spaced ones of a lazy split. A constant channel
    gets one grey level as its deviation, so that dividing by it is harmless.
    """
    if isinstance(split, LazySplit):
        count = min(len(split), _STATISTICS_SAMPLE)
        rows = torch.linspace(0, len(split) - 1, count).long().tolist()
        parts = (split.read(row).unsqueeze(0) for row in rows)  # one at a time
    else:
        starts = range(0, len(split), _STATISTICS_SAMPLE)
        parts = (split.images[i : i + _STATISTICS_SAMPLE] for i in starts)
    levels = torch.arange(256, dtype=torch.float64) / 255
    # Histograms are exact, and need no float copy of the images.
    histograms = sum(
        torch.stack([c.flatten().bincount(minlength=256) for c in part.unbind(1)]) for part in parts
    )
    assert isinstance(histograms, Tensor)
    means, stds = [], []
    for histogram in histograms.double():
        share = histogram / histogram.sum()
        mean = float((share * levels).sum())
        variance = float((share * (levels - mean) ** 2).sum())
        means.append(mean)
        stds.append(max(variance**0.5, 1 / 255))
    return tuple(means), tuple(stds)
