"""Batches of an image set: shuffled, augmented and normalised as whole batches on the device."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resconv.data.splits import LazySplit, Split
from resconv.errors import DataError, MissingExtraError

__all__ = ["Augment", "BatchLoader", "augment_batch", "default_augment", "seed_of"]


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image.

    Attributes:
        pad: pixels of black around the image before a crop of the old size is taken at a random
            place. Lazy splits take torchvision's random resized crop instead, where pad > 0.
        flip: mirror every second image, left to right, at random.
    """

    pad: int = 4
    flip: bool = True


def default_augment(name: str, image_size: int = 32, class_names: Sequence[str] = ()) -> Augment:
    """Return the usual augmentation: a shift of up to an eighth of the side, and mirroring.

    Characters are not mirrored (a mirrored 2 is no 2): ``digits``, and sets whose class names
    are single characters.
    """
    is_glyphs = name == "digits" or (
        len(class_names) > 0 and all(len(class_name) == 1 for class_name in class_names)
    )
    return Augment(pad=max(1, image_size // 8), flip=not is_glyphs)


def augment_batch(images: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Return shifted and mirrored copies, each image by draws of its own.

    Shape: uint8 (N, C, H, W) -> the same, in channels-last memory where anything was changed.
    ``generator`` lives on the CPU, so the draws are the same on every device.
    """
    count, _, height, width = images.shape
    pad = augment.pad
    if pad == 0 and not augment.flip:
        return images
    top = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    if augment.flip:
        mirrored = torch.rand((count, 1), generator=generator) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = left + columns
    device = images.device
    padded = F.pad(images, (pad, pad, pad, pad))
    index = torch.arange(count, device=device).view(count, 1, 1)
    rows, columns = _send(rows, device), _send(columns, device)
    taken = padded[index, :, rows.view(count, height, 1), columns.view(count, 1, width)]
    return taken.permute(0, 3, 1, 2)  # indexing put the channels last


class BatchLoader:
    """Iterates over (images, labels): float32 (B, C, H, W), normalised, and int64 (B,).

    The order and the augmentation depend on ``seed`` and the epoch only, never on the global
    random state; :meth:`set_epoch` moves on to the next epoch's. Two passes in the same epoch
    give the same batches.

    Args:
        split: images in memory, or lazy ones, which worker processes decode.
        batch_size: images a batch on this rank.
        shuffle: a new order each epoch.
        seed: of the order and the augmentation.
        augment: None in evaluation.
        mean, std: of each channel, for pixels in 0..1.
        drop_last: leave out the last, smaller batch.
        device: where the batches are made; images in memory are moved there once.
        channels_last: give batches in ``torch.channels_last`` memory format.
        rank, world_size: this process takes every ``world_size``-th image from ``rank`` on. With
            ``shuffle`` the order is filled up from its start so that all ranks see equally many;
            without, no image is seen twice, so that accuracies are exact.
        num_workers: decoding processes of a lazy split, by default one a CPU core, at most 8.

    Raises:
        DataError: an empty split, a batch size below 1, a rank outside ``world_size``, or a mean
            and std that do not have one value a channel.
    """

    def __init__(
        self,
        split: Split | LazySplit,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        augment: Augment | None,
        mean: Sequence[float],
        std: Sequence[float],
        drop_last: bool = False,
        device: torch.device | str | None = None,
        channels_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
    ) -> None:
        channels = split.channels if isinstance(split, LazySplit) else split.images.shape[1]
        if batch_size < 1 or not 0 <= rank < world_size or len(split) == 0:
            raise DataError(
                f"No batches from {len(split):,} images with batch_size={batch_size}, "
                f"rank={rank}, world_size={world_size}: needed are at least one image, a batch "
                "size of 1 and a rank below world_size."
            )
        if not len(mean) == len(std) == channels or min(std) <= 0:
            raise DataError(
                f"mean {tuple(mean)} and std {tuple(std)} do not fit {channels} channel(s): one "
                "value a channel is needed, std above 0. Take them from the loaded ImageData."
            )
        self.split = split
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment
        self.drop_last = drop_last
        self.device = torch.device(device or "cpu")
        self.channels_last = channels_last
        self.rank = rank
        self.world_size = world_size
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.epoch = 0
        # (x / 255 - mean) / std as one multiplication and one addition.
        spread = torch.tensor(std, device=self.device).view(1, -1, 1, 1)
        self._scale = 1 / (255 * spread)
        self._shift = -torch.tensor(mean, device=self.device).view(1, -1, 1, 1) / spread
        self._on_device: tuple[Tensor, Tensor] | None = None

    @property
    def sampler(self) -> "BatchLoader":
        """The loader itself: Lightning looks here for ``set_epoch``."""
        return self

    @property
    def batch_sampler(self) -> "BatchLoader":
        """The loader itself, for the same reason."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next pass gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        count = self._count_images()
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order()
        batches = [
            order[start : start + self.batch_size]
            for start in range(0, len(self) * self.batch_size, self.batch_size)
        ]
        if isinstance(self.split, LazySplit):
            yield from self._iterate_lazy(self.split, batches)
        else:
            yield from self._iterate_memory(self.split, batches)

    def _count_images(self) -> int:
        total = len(self.split)
        if self.shuffle:
            return -(-total // self.world_size)
        return len(range(self.rank, total, self.world_size))

    def _order(self) -> Tensor:
        """Return this rank's indices of this epoch, int64 (n,)."""
        if not self.shuffle:
            return torch.arange(self.rank, len(self.split), self.world_size)
        order = torch.randperm(len(self.split), generator=_make_generator(self.seed, self.epoch))
        missing = -len(order) % self.world_size
        if missing:
            order = torch.cat([order, order.repeat(-(-missing // len(order)))[:missing]])
        return order[self.rank :: self.world_size]

    def _iterate_memory(
        self, split: Split, batches: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if self._on_device is None:
            self._on_device = split.images.to(self.device), split.labels.to(self.device)
        images, labels = self._on_device
        generator = _make_generator(self.seed, self.epoch, 1 + self.rank)
        for rows in batches:
            rows = _send(rows, self.device)
            batch = images[rows]
            if self.augment is not None:
                batch = augment_batch(batch, self.augment, generator)
            yield self._normalise(batch), labels[rows]

    def _iterate_lazy(
        self, split: LazySplit, batches: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[tuple[Tensor, int]] = DataLoader(
            _TransformedSplit(split, self.augment, self.seed, self.epoch),
            batch_sampler=[rows.tolist() for rows in batches],
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            generator=_make_generator(self.seed, self.epoch, 0),  # else it draws from the global
        )
        for images, labels in loader:
            yield (
                self._normalise(images.to(self.device, non_blocking=True)),
                labels.to(self.device, non_blocking=True),
            )

    def _normalise(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        batch = images.to(torch.float32, memory_format=layout)
        return batch.mul_(self._scale).add_(self._shift)


class _TransformedSplit(Dataset[tuple[Tensor, int]]):
    """A lazy split whose images are cropped and mirrored at random, each by a seed of its own."""

    def __init__(self, split: LazySplit, augment: Augment | None, seed: int, epoch: int) -> None:
        self.split = split
        self.seed = seed
        self.epoch = epoch
        self.transform = _make_transform(augment, split.image_size) if augment else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.transform is None:
            return self.split[index]
        with torch.random.fork_rng(devices=[]):
            # An image's draws do not depend on which worker reads it.
            torch.manual_seed(seed_of(self.seed, self.epoch, index))
            return self.split.read(index, self.transform), int(self.split.labels[index])


def _make_transform(augment: Augment, image_size: int) -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise MissingExtraError("torchvision", "train", "Augmenting an image folder") from error
    from resconv.data.images import fit_square

    crop: Any = (
        v2.RandomResizedCrop(image_size, antialias=True)
        if augment.pad > 0
        else v2.Lambda(lambda image: fit_square(image, image_size))
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip()]) if augment.flip else crop


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device; a GPU is not waited for, so that its next steps can be launched."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _make_generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*numbers))


def seed_of(*numbers: int) -> int:
    """Return one seed of 63 bits: plain sums would give seed 1, epoch 0 the draws of 0, 1."""
    mixed = 0
    for number in numbers:
        mixed = ((mixed ^ number) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63
