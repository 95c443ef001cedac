"""How an image becomes a net's input: what training, evaluation, export and prediction read alike."""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from .errors import DataError

__all__ = [
    "ChannelOrder",
    "Interpolation",
    "Preprocessing",
    "from_metadata",
    "of_timm",
    "of_torchvision",
    "resized_side",
    "to_metadata",
]

Interpolation = Literal["nearest", "bilinear", "bicubic"]
ChannelOrder = Literal["L", "RGB", "BGR"]


class Preprocessing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The way from an image to the numbers that a net reads.

    The image is turned upright, its shorter side is resized to :attr:`resized` pixels, the centre square of
    ``size`` pixels is cut out, and each channel becomes ``(pixel / 255 - mean) / std``.

    Attributes:
        size: side of the square that the net reads, in pixels.
        crop_fraction: ``size`` as a share of the side that is resized to; 1 keeps the whole centre square.
        interpolation: how pixels are resampled, with antialiasing.
        mean, std: one value a channel, for pixels in 0..1.
        channel_order: ``L`` (grey), ``RGB`` or ``BGR``; None where there are other channels than those.
        class_names: of the net's outputs, in their order; empty where nobody named them.

    Raises:
        DataError: numbers that make no sense.
    """

    size: int
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: ChannelOrder | None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = []
        if self.size < 1:
            faults.append(f"size={self.size}: at least 1 pixel")
        if not 0 < self.crop_fraction <= 1:
            faults.append(f"crop_fraction={self.crop_fraction}: a share above 0 and up to 1")
        if self.interpolation not in get_args(Interpolation):
            faults.append(
                f"interpolation={self.interpolation!r}: choose one of {', '.join(get_args(Interpolation))}"
            )
        if not 0 < len(self.mean) == len(self.std):
            faults.append(f"{len(self.mean)} values of mean and {len(self.std)} of std: as many")
        if not all(map(math.isfinite, self.mean)) or not all(0 < s < math.inf for s in self.std):
            faults.append(f"mean={self.mean}, std={self.std}: finite numbers, std above 0")
        if self.channel_order is not None and len(self.channel_order) != len(self.mean):
            faults.append(f"mean={self.mean}: one value for each of {self.channel_order}")
        if faults:
            raise DataError(f"No images can be prepared with {'; '.join(faults)}.")

    @property
    def num_channels(self) -> int:
        return len(self.mean)

    @property
    def resized(self) -> int:
        """The pixels that the shorter side is resized to, before the square is cut out."""
        return resized_side(self.size, self.crop_fraction)


def resized_side(size: int, crop_fraction: float) -> int:
    """Return the pixels that the shorter side is resized to."""
    # As timm rounds it; the small term is for fractions such as 224/232 that have no exact float.
    return math.floor(size / crop_fraction + 1e-4)


def to_metadata(preprocessing: Preprocessing) -> dict[str, str]:
    """Return it as keys and texts, as they stand in the metadata of an exported file.

    ``image_size``, ``resize_to`` (the shorter side, before the centre square is cut out), ``crop_fraction``,
    ``interpolation`` and ``channel_order`` are numbers and words; ``mean``, ``std`` and ``class_names`` are
    JSON lists.

    Example:
        >>> own = Preprocessing(size=224, crop_fraction=0.875, mean=(0.5,), std=(0.25,), channel_order="L")
        >>> to_metadata(own)["resize_to"], to_metadata(own)["mean"]
        ('256', '[0.5]')
    """
    return {
        "image_size": str(preprocessing.size),
        "resize_to": str(preprocessing.resized),
        "crop_fraction": repr(preprocessing.crop_fraction),
        "interpolation": preprocessing.interpolation,
        "channel_order": preprocessing.channel_order or "",
        "mean": json.dumps(preprocessing.mean),
        "std": json.dumps(preprocessing.std),
        "class_names": json.dumps(preprocessing.class_names),
    }


def from_metadata(texts: Mapping[str, str]) -> Preprocessing | None:
    """Return what :func:`to_metadata` wrote into a file, or None where nothing is there.

    Raises:
        DataError: what stands there is no preprocessing.
    """
    if "image_size" not in texts:
        return None
    try:
        return msgspec.convert(
            {
                "size": int(texts["image_size"]),
                "crop_fraction": float(texts["crop_fraction"]),
                "interpolation": texts["interpolation"],
                "channel_order": texts["channel_order"] or None,
                **{name: json.loads(texts[name]) for name in ("mean", "std", "class_names")},
            },
            Preprocessing,
        )
    except (KeyError, ValueError) as error:  # of json, and msgspec's
        raise DataError(
            f"The file's metadata do not say how images become its inputs ({type(error).__name__}: {error})."
        ) from error


def of_timm(config: Mapping[str, Any]) -> Preprocessing:
    """Return what a net's ``pretrained_cfg`` in timm says of its inputs.

    Raises:
        DataError: its images are no squares, or are resampled in another way than can be done here.
    """
    channels, height, width = config["input_size"]
    if height != width:
        raise DataError(
            f"The net reads images of {height}x{width} pixels: only squares can be made."
        )
    names = config.get("label_names") or ()
    return Preprocessing(
        size=height,
        crop_fraction=float(config.get("crop_pct") or 1.0),
        interpolation=config.get("interpolation") or "bilinear",
        mean=_per_channel(config["mean"], channels),
        std=_per_channel(config["std"], channels),
        channel_order=_ORDERS.get(channels),
        class_names=tuple(names) if len(names) == config.get("num_classes") else (),
    )


def of_torchvision(transforms: Any, class_names: tuple[str, ...] = ()) -> Preprocessing:
    """Return what torchvision's ``Weights.transforms()`` do to an image; ``class_names`` are its categories.

    Raises:
        DataError: they resample in another way than can be done here.
    """
    (size,), (resized,) = transforms.crop_size, transforms.resize_size
    return Preprocessing(
        size=size,
        crop_fraction=min(1.0, size / resized),
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        channel_order="RGB",
        class_names=tuple(class_names),
    )


_ORDERS: dict[int, ChannelOrder] = {1: "L", 3: "RGB"}


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    """Return one value a channel: timm's nets of one channel may state three."""
    found = tuple(map(float, values))
    return found if len(found) == channels else (sum(found) / len(found),) * channels
