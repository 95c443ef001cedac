"""Decode image files and bytes to uint8 tensors; a broken one is named in the error.

Pillow decodes: it can be held to named formats and reads the orientation, which torchvision's decoders
cannot be or do for all of them.
"""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from resconv.errors import DataError, MissingExtraError
from resconv.preprocessing import ChannelOrder, Interpolation, Preprocessing, resized_side

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EncodedImage", "Form", "Probe", "decode", "decode_all", "fit_square", "probe"]

_PROBED = 1000  # images whose headers are read to find out channels and size
_DEFAULT_SIZE = 224
_THREADED_BYTES = 8192  # below this, threads spend longer waiting for the GIL than they win
# Only these are tried, whatever a file is called: others start programs (EPS: Ghostscript) or fetch.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
_MAX_PIXELS = 2**26  # 8192 x 8192: Pillow holds 4 bytes for each, twice while it converts


@dataclass(frozen=True)
class EncodedImage:
    """A file, a file's bytes or pixels (uint8, H x W or H x W x 3), and its place in error messages.

    ``content`` is never text: that would be opened as a path.
    """

    place: str
    content: "Path | bytes | np.ndarray[Any, np.dtype[np.uint8]]"


@dataclass(frozen=True)
class Form:
    """What an image is decoded to: the part of a :class:`Preprocessing` before pixels are scaled."""

    size: int
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bilinear"
    channel_order: ChannelOrder = "RGB"

    @property
    def resized(self) -> int:
        """The pixels that the shorter side is resized to, before the square is cut out."""
        return resized_side(self.size, self.crop_fraction)

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> "Form":
        """Return the part of it that is about decoding.

        Raises:
            DataError: it is for other channels than those of images.
        """
        order = preprocessing.channel_order
        if order is None:
            raise DataError(
                f"The net reads {preprocessing.num_channels} channels, and images have 1 (grey) or 3."
            )
        return cls(
            preprocessing.size, preprocessing.crop_fraction, preprocessing.interpolation, order
        )

    def with_values(
        self, mean: tuple[float, ...], std: tuple[float, ...], class_names: tuple[str, ...]
    ) -> Preprocessing:
        """Return the whole of it."""
        return Preprocessing(
            size=self.size,
            crop_fraction=self.crop_fraction,
            interpolation=self.interpolation,
            mean=mean,
            std=std,
            channel_order=self.channel_order,
            class_names=class_names,
        )


@dataclass(frozen=True)
class Probe:
    """Whether every image is grey, and the side in pixels where all are squares of one size."""

    is_grey: bool
    side: int | None


def probe(images: Sequence[EncodedImage]) -> Probe:
    """Read the headers of up to 1,000 evenly spaced images.

    Raises:
        DataError: one of them is not a readable image.
    """
    # A turned image is as square as it was.
    step = max(1, len(images) // _PROBED)
    modes, sizes = set(), set()
    for row in range(0, len(images), step):
        with _open(images[row]) as opened:
            modes.add(opened.mode)
            sizes.add(opened.size)
    width, height = next(iter(sizes), (0, 1))
    return Probe(modes <= {"1", "L"}, width if len(sizes) == 1 and width == height else None)


def fit_square(image: "Image", form: Form) -> "Image":
    """Return the centre square of ``image`` as the form says.

    Pixel for pixel what torchvision's Resize and CenterCrop give. Those make the long side of a strip of
    1 x 60,000,000 pixels longer in proportion before they cut it, which no memory holds: here the part of
    the image that is kept is worked out first, and resized alone.
    """
    from PIL import Image

    size, resized = form.size, form.resized
    if image.size == (size, size) == (resized, resized):
        return image
    shorter = min(image.size)
    box = []
    for side in image.size:
        whole = resized * side // shorter  # the side of the resized image
        offset = round((whole - size) / 2)
        box.append((offset * side / whole, (offset + size) * side / whole))
    (left, right), (top, bottom) = box
    return image.resize(
        (size, size),
        Image.Resampling[form.interpolation.upper()],
        box=(left, top, min(right, image.width), min(bottom, image.height)),
    )


def decode(
    image: EncodedImage, form: Form, transform: "Callable[[Image], Image] | None" = None
) -> Tensor:
    """Return one image as uint8, shape (C, size, size), made square by ``transform`` if given.

    Raises:
        DataError: it is not a readable 8-bit image; the message names it.
    """
    return torch.from_numpy(_decode(image, form, transform)).permute(2, 0, 1)


def decode_all(images: Sequence[EncodedImage], form: Form) -> Tensor:
    """Return the images as uint8, shape (N, C, size, size).

    Raises:
        DataError: one is not a readable 8-bit image; the message names it.
    """
    shape = (len(images), len(form.channel_order), form.size, form.size)
    out = torch.empty(shape, dtype=torch.uint8)
    view = out.permute(0, 2, 3, 1).numpy()

    def fill(rows: range) -> None:
        for row in rows:
            view[row] = _decode(images[row], form)

    chunks = [range(s, min(s + 64, len(images))) for s in range(0, len(images), 64)]
    if len(chunks) < 2 or all(_count_bytes(images[i]) < _THREADED_BYTES for i in range(64)):
        for chunk in chunks:
            fill(chunk)
    else:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for _ in pool.map(fill, chunks):
                pass
    return out


def _count_bytes(image: EncodedImage) -> int:
    content = image.content
    if isinstance(content, Path):
        return content.stat().st_size
    return len(content) if isinstance(content, bytes) else content.size


def _decode(
    image: EncodedImage, form: Form, transform: "Callable[[Image], Image] | None" = None
) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    size, order, content = form.size, form.channel_order, image.content
    natural = {"L": (size, size), "RGB": (size, size, 3)}.get(order)
    is_natural = transform is None and form.resized == size
    if is_natural and isinstance(content, np.ndarray) and content.shape == natural:
        return content.reshape(size, size, len(order))  # nothing is left to do
    with _open(image) as opened:
        try:
            # JPEG: skip what is not needed.
            side = 2 * round(size / form.crop_fraction)
            opened.draft(None, (side, side))
            pixels = _upright(opened.convert("L" if order == "L" else "RGB"), opened)
        except Exception as error:  # decoders raise whatever a damaged file sets off in them
            raise _unreadable(image, error) from error
    square = transform(pixels) if transform else fit_square(pixels, form)
    found = np.array(square, dtype=np.uint8).reshape(size, size, len(order))
    return np.ascontiguousarray(found[..., ::-1]) if order == "BGR" else found


def _open(image: EncodedImage) -> "Image":
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "train", "Reading images") from error
    content = image.content
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    try:
        if isinstance(content, Path) and not content.is_file():
            raise OSError("it is no file, or is gone")  # reading a pipe would wait for ever
        opened = Image.open(
            io.BytesIO(content) if isinstance(content, bytes) else content, formats=_FORMATS
        )
    except Exception as error:
        raise _unreadable(image, error) from error
    if opened.width * opened.height > _MAX_PIXELS:
        raise DataError(
            f"{image.place} has {opened.width:,} x {opened.height:,} pixels; up to {_MAX_PIXELS:,} "
            "are read. Make it smaller."
        )
    if opened.mode[0] in "IF":
        raise DataError(
            f"{image.place} has pixels of {opened.mode!r}, more than 8 bits: read are 8-bit grey "
            "and colour images. Convert the images to 8 bits."
        )
    return opened


# The EXIF tag that says how the camera was held, and what turns an image back.
_ORIENTATION = 0x0112
_TURNS = (
    *("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE"),
    *("ROTATE_270", "TRANSVERSE", "ROTATE_90"),
)


def _upright(pixels: "Image", opened: "Image") -> "Image":
    """Return the decoded image as it was seen, by the EXIF orientation of the one it comes from.

    Pillow's ``exif_transpose`` also writes the tags anew, and fails where one of the others is damaged.
    """
    from PIL.Image import Transpose

    try:
        held = opened.getexif().get(_ORIENTATION, 1)
    except Exception:
        return pixels  # the pixels are whole, what is written beside them is not
    if not isinstance(held, int) or not 2 <= held <= 8:
        return pixels
    return pixels.transpose(Transpose[_TURNS[held - 2]])


def _unreadable(image: EncodedImage, error: Exception) -> DataError:
    return DataError(
        f"{image.place} is not a readable image ({type(error).__name__}: {str(error)[:200]}). Read "
        f"are {', '.join(_FORMATS)}. Remove or replace it."
    )
