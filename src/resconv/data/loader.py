"""Batches of an image set: shuffled, augmented and normalised as whole batches on the device.

Images in memory lie on the device and are taken from there as batches: for small nets and images, torch's
``DataLoader``, which collects one image after the other, would take longer than the training. It is what
reads those that are decoded meanwhile.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resconv.data.augmentation import Augment, seed_of, send, shift
from resconv.data.splits import LazySplit, Split
from resconv.errors import DataError, MissingExtraError
from resconv.nn.pixels import scale_and_shift
from resconv.preprocessing import Preprocessing

__all__ = ["BatchLoader"]


class BatchLoader:
    """Iterates over (images, labels): float32 (B, C, H, W), normalised, and int64 (B,).

    The order and the augmentation depend on ``seed`` and the epoch only, never on the global
    random state; :meth:`set_epoch` moves on to the next epoch's. Two passes in the same epoch
    give the same batches.

    Args:
        split: images in memory, or lazy ones, which worker processes decode.
        batch_size: images a batch on this rank.
        preprocessing: of the set, for the mean and standard deviation of each channel.
        shuffle: a new order each epoch.
        seed: of the order and the augmentation.
        augment: None in evaluation.
        drop_last: leave out the last, smaller batch.
        device: where the batches are made; images in memory are moved there once.
        channels_last: give batches in ``torch.channels_last`` memory format.
        rank, world_size: this process takes every ``world_size``-th image from ``rank`` on. With
            ``shuffle`` the order is filled up from its start so that all ranks see equally many;
            without, no image is seen twice, so that accuracies are exact.
        num_workers: decoding processes of a lazy split, by default one a CPU core, at most 8.

    Raises:
        DataError: an empty split, a batch size below 1, a rank outside ``world_size``, a mean and std that
            do not have one value a channel, or crops of images that are held as squares.
    """

    def __init__(
        self,
        split: Split | LazySplit,
        batch_size: int,
        preprocessing: Preprocessing,
        *,
        shuffle: bool = False,
        seed: int = 0,
        augment: Augment | None = None,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        channels_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
    ) -> None:
        channels = split.num_channels
        if batch_size < 1 or not 0 <= rank < world_size or len(split) == 0:
            raise DataError(
                f"No batches from {len(split):,} images with batch_size={batch_size}, "
                f"rank={rank}, world_size={world_size}: needed are at least one image, a batch "
                "size of 1 and a rank below world_size."
            )
        if preprocessing.num_channels != channels:
            raise DataError(
                f"mean {preprocessing.mean} and std {preprocessing.std} do not fit {channels} channel(s): "
                "one value a channel is needed. Take the preprocessing of the loaded ImageData."
            )
        if augment is not None and augment.kind == "crop" and isinstance(split, Split):
            raise DataError("Images that are held as squares in memory cannot be cropped anew.")
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
        self._scale, self._shift = scale_and_shift(preprocessing, self.device)
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
        for rows in batches:
            there = send(rows, self.device)
            batch = images[there]
            if self.augment is not None:
                batch = shift(batch, self.augment, self.seed, self.epoch, rows)
            yield self._normalise(batch), labels[there]

    def _iterate_lazy(
        self, split: LazySplit, batches: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[tuple[Tensor, int]] = DataLoader(
            _Augmented(split, self.augment, self.seed, self.epoch),
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


class _Augmented(Dataset[tuple[Tensor, int]]):
    """A lazy split whose images are changed at random, each by draws of its own."""

    def __init__(self, split: LazySplit, augment: Augment | None, seed: int, epoch: int) -> None:
        self.split, self.augment = split, augment
        self.seed, self.epoch = seed, epoch
        crops = augment is not None and augment.kind == "crop"
        self.transform = _make_crop(augment, split) if augment and crops else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.augment is None:
            return self.split[index]
        label = int(self.split.labels[index])
        if self.transform is None:
            image = self.split.read(index).unsqueeze(0)
            row = torch.tensor([index])
            return shift(image, self.augment, self.seed, self.epoch, row).squeeze(0), label
        with torch.random.fork_rng(devices=[]):
            # An image's draws do not depend on which worker reads it.
            torch.manual_seed(seed_of(self.seed, self.epoch, index))
            return self.split.read(index, self.transform), label


def _make_crop(augment: Augment, split: LazySplit) -> Any:
    try:
        from torchvision.transforms import InterpolationMode, v2
    except ImportError as error:
        raise MissingExtraError("torchvision", "train", "Augmenting images") from error
    crop = v2.RandomResizedCrop(
        split.form.size,
        scale=(augment.least_area, 1.0),
        interpolation=InterpolationMode(split.form.interpolation),
        antialias=True,
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip()]) if augment.mirror else crop


def _make_generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*numbers))
