"""What a loaded image set is: two splits, their classes, and how their images become inputs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from resconv.data.images import EncodedImage, Form, decode, decode_all
from resconv.preprocessing import Preprocessing

__all__ = [
    "MAX_MEMORY",
    "NO_VAL_HINT",
    "SMALL",
    "ImageData",
    "LazySplit",
    "Listed",
    "Split",
    "measure_pixels",
    "split_stratified",
]

# What a user can do whose set has no split to judge by.
NO_VAL_HINT = " Without one, hold a part of train out: holdout=0.1 (--holdout 0.1)."
# Pixels a side up to which training takes the squares; of larger images it crops the originals.
SMALL = 64
MAX_MEMORY = 2 * 1024**3  # bytes of decoded images
_SAMPLE = 1024  # images of a larger split that its mean and std are taken from
_CHUNK = 256


@dataclass(frozen=True)
class Listed:
    """A split before anything is decoded: N images, and labels as int64 (N,)."""

    images: Sequence[EncodedImage] = field(repr=False)
    labels: Tensor = field(repr=False)

    def take(self, rows: Tensor) -> "Listed":
        return Listed(Chosen(self.images, rows), self.labels[rows])

    def mixed(self) -> "Listed":
        """Return them in one fixed random order: where they lay class by class, any prefix is now a sample."""
        generator = torch.Generator().manual_seed(0)
        return self.take(torch.randperm(len(self.labels), generator=generator))


class Chosen(Sequence[EncodedImage]):
    """Some images of a sequence, which need not be held in memory."""

    def __init__(self, images: Sequence[EncodedImage], rows: Tensor) -> None:
        self.images: Sequence[EncodedImage] = images
        self.rows: Tensor = rows
        if isinstance(images, Chosen):
            self.images, self.rows = images.images, images.rows[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Chosen(self.images, self.rows[index])
        return self.images[int(self.rows[index])]


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

    @property
    def num_channels(self) -> int:
        return self.images.shape[1]


@dataclass(frozen=True)
class LazySplit(Dataset[tuple[Tensor, int]]):
    """Images that are decoded when they are read; item i is a uint8 (C, S, S) and a label.

    Attributes:
        encoded: N files, or bytes of files.
        labels: int64, shape (N,).
        form: what they are decoded to.
    """

    encoded: Sequence[EncodedImage] = field(repr=False)
    labels: Tensor = field(repr=False)
    form: Form

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index), int(self.labels[index])

    def read(self, index: int, transform: Callable[[Any], Any] | None = None) -> Tensor:
        """Return image ``index``, cut to the square by ``transform`` (of PIL images) if given.

        Raises:
            DataError: the file is not a readable image.
        """
        return decode(self.encoded[index], self.form, transform)

    @property
    def num_channels(self) -> int:
        return len(self.form.channel_order)

    @property
    def num_bytes(self) -> int:
        """Of all images, decoded."""
        return len(self) * self.num_channels * self.form.size**2

    def in_memory(self) -> Split:
        """Return all images, decoded."""
        return Split(decode_all(self.encoded, self.form), self.labels)


@dataclass(frozen=True)
class ImageData:
    """An image set.

    Attributes:
        name: the name it was loaded by.
        train, val: the splits; ``val`` is held out of ``train`` where that was asked for.
        preprocessing: how an image becomes a net's input, and the names of the classes.
        example: one image's place, for messages.
    """

    name: str
    train: Split | LazySplit
    val: Split | LazySplit
    preprocessing: Preprocessing
    example: str | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a label, in the labels' order."""
        return self.preprocessing.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.preprocessing.num_channels

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return self.preprocessing.size

    @property
    def mean(self) -> tuple[float, ...]:
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.preprocessing.std


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

    Over all images of up to 2 GiB, over 1,024 evenly spaced ones of more. A constant channel gets
    one grey level as its deviation, so that dividing by it is harmless.

    Raises:
        DataError: one of those images is not readable.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    # Histograms are exact, and need no float copy of the images.
    histograms = sum(
        torch.stack([c.flatten().bincount(minlength=256) for c in part.unbind(1)])
        for part in _parts(split)
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


def _parts(split: Split | LazySplit) -> Iterator[Tensor]:
    if isinstance(split, Split):
        starts = range(0, len(split), _SAMPLE)
        yield from (split.images[i : i + _SAMPLE] for i in starts)
        return
    count = len(split) if split.num_bytes <= MAX_MEMORY else min(len(split), _SAMPLE)
    rows = torch.linspace(0, len(split) - 1, count, dtype=torch.float64).round().long().tolist()
    at_once = max(1, min(_CHUNK, 2**24 // max(1, split.num_bytes // len(split))))
    for i in range(0, count, at_once):  # few at a time
        yield decode_all([split.encoded[row] for row in rows[i : i + at_once]], split.form)
