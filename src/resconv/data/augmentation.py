"""Random changes of training images: one policy for a set, however large it is and wherever it is held.

What is drawn for an image depends on the seed, the epoch and the image's number alone: not on the batch
or the process it is in, nor on whether it is decoded in advance. So a run that was stopped goes on as it
would have, to the bit.
"""

from typing import Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from resconv.data.splits import SMALL, ImageData
from resconv.errors import DataError

__all__ = ["Augment", "AugmentKind", "choose_augment", "seed_of", "send", "shift"]

AugmentKind = Literal["shift", "crop", "none"]


class Augment(msgspec.Struct, frozen=True):
    """What is done at random to a training image.

    Attributes:
        kind: ``shift`` puts black around the square image and takes a square of the old size from it;
            ``crop`` cuts a part of the whole image and resizes it (torchvision's RandomResizedCrop);
            ``none`` does neither.
        pad: pixels of black on each side, for ``shift``.
        least_area: the smallest part, as a share of the image's area, for ``crop``.
        mirror: mirror every second image, left to right.
    """

    kind: AugmentKind
    pad: int = 0
    least_area: float = 0.08
    mirror: bool = False


def choose_augment(
    data: ImageData, kind: AugmentKind | None = None, mirror: bool | None = None
) -> Augment:
    """Return the policy for a set: what is asked for, else what is usual for images of this size.

    Up to 64 pixels that is a shift by up to an eighth of the side, above a crop. Characters are not
    mirrored (a mirrored 2 is no 2): ``digits``, and sets whose class names are single characters.

    Raises:
        DataError: a crop of small images is asked for.
    """
    size, names = data.image_size, data.class_names
    if kind is None:
        kind = "shift" if size <= SMALL else "crop"
    if kind == "crop" and size <= SMALL:
        raise DataError(
            f"augment='crop' with images of {size} pixels: crops are taken from the images as they are in "
            f"their files, and up to {SMALL} pixels the squares alone are held. Use augment='shift', or a "
            "larger image_size."
        )
    if mirror is None:
        is_glyphs = data.name == "digits" or (bool(names) and all(len(n) == 1 for n in names))
        mirror = not is_glyphs
    return Augment(kind, pad=max(1, size // 8) if kind == "shift" else 0, mirror=mirror)


def shift(images: Tensor, augment: Augment, seed: int, epoch: int, rows: Tensor) -> Tensor:
    """Return shifted and mirrored copies, each image by draws of its own.

    Shape: uint8 (N, C, H, W) and the images' numbers in their set, int64 (N,) -> (N, C, H, W).
    The draws are made on the CPU, so they are the same on every device.
    """
    count, _, height, width = images.shape
    pad, device = augment.pad, images.device
    if pad == 0 and not augment.mirror:
        return images
    drawn = _draw(seed, epoch, rows.cpu(), 3)
    top, left = (drawn[:, :2] * (2 * pad + 1)).long().unbind(1)
    y = top.view(-1, 1) + torch.arange(height)
    x = torch.arange(width).expand(count, width)
    if augment.mirror:
        x = torch.where(drawn[:, 2:] < 0.5, width - 1 - x, x)
    x = left.view(-1, 1) + x
    padded = F.pad(images, (pad, pad, pad, pad))
    index = torch.arange(count, device=device).view(count, 1, 1)
    y, x = send(y, device), send(x, device)
    taken = padded[index, :, y.view(count, height, 1), x.view(count, 1, width)]
    return taken.permute(0, 3, 1, 2)  # indexing put the channels last


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device; a GPU is not waited for, so that its next steps can be launched."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _draw(seed: int, epoch: int, rows: Tensor, count: int) -> Tensor:
    """Return uniform numbers in [0, 1), float64 (N, count), by SplitMix64 (Steele et al. 2014).

    torch's generators give one stream each; here every image has its own, made for all at once.
    """
    start = seed_of(seed, epoch)
    steps = rows.view(-1, 1) * count + torch.arange(1, count + 1)
    z = start + steps * _signed(_GAMMA)  # 64-bit numbers wrap around
    z = (z ^ _right(z, 30)) * _signed(_MIX1)
    z = (z ^ _right(z, 27)) * _signed(_MIX2)
    return _right(z ^ _right(z, 31), 11).double() / 2**53


def _right(z: Tensor, bits: int) -> Tensor:
    """Shift to the right as an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - 2**64


def seed_of(*numbers: int) -> int:
    """Return one seed of 63 bits: plain sums would give seed 1, epoch 0 the draws of 0, 1."""
    mixed = 0
    for number in numbers:
        mixed = ((mixed ^ number) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63
