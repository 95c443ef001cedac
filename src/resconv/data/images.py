"""Decode image files and bytes to uint8 tensors; a broken one is named in the error."""

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

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EncodedImage", "Probe", "decode", "decode_all", "fit_square", "probe"]

_PROBED = 1000  # images whose headers are read to find out channels and size
_DEFAULT_SIZE = 224
_THREADED_BYTES = 8192  # below this, threads spend longer waiting for the GIL than they win
_MODES = {1: "L", 3: "RGB"}
# Only these are tried, whatever a file is called: others start programs (EPS: Ghostscript) or fetch.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
_MAX_PIXELS = 2**26  # 8192 x 8192: Pillow holds 4 bytes for each, twice while it converts
# The EXIF tag 0x0112 says how the camera was held.
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class EncodedImage:
    """A file, or a file's bytes, and its place as an error message names it.

    ``content`` is never text: that would be opened as a path.
    """

    place: str
    content: Path | bytes


@dataclass(frozen=True)
class Probe:
    """Channels (1 if every image is grey, else 3) and the natural side of the square."""

    channels: int
    image_size: int


def probe(images: Sequence[EncodedImage]) -> Probe:
    """Read the headers of up to 1,000 evenly spaced images.

    The size is that of the images where all are squares of one size, else 224.

    Raises:
        DataError: one of them is not a readable image.
    """
    # A turned image is as square as it was.
    step = max(1, len(images) // _PROBED)
    modes, sizes = set(), set()
    for image in images[::step]:
        with _open(image) as opened:
            modes.add(opened.mode)
            sizes.add(opened.size)
    width, height = next(iter(sizes), (_DEFAULT_SIZE, _DEFAULT_SIZE))
    same = len(sizes) == 1 and width == height
    return Probe(1 if modes <= {"1", "L"} else 3, width if same else _DEFAULT_SIZE)


def fit_square(image: "Image", image_size: int) -> "Image":
    """Return the centre square of ``image``, resized to ``image_size`` pixels.

    From 160 pixels up the border is cut too (224 out of 256), as is usual in evaluation.
    """
    from PIL import Image

    if image.size == (image_size, image_size):
        return image
    side = round(image_size * 256 / 224) if image_size >= 160 else image_size
    scale = min(image.size) / side
    crop = image_size * scale
    left, top = (image.width - crop) / 2, (image.height - crop) / 2
    return image.resize(
        (image_size, image_size),
        Image.Resampling.BILINEAR,
        box=(left, top, left + crop, top + crop),
    )


def decode(
    image: EncodedImage,
    channels: int,
    image_size: int,
    transform: Callable[["Image"], "Image"] | None = None,
) -> Tensor:
    """Return one image as uint8, shape (channels, image_size, image_size).

    Raises:
        DataError: it is not a readable 8-bit image; the message names it.
    """
    return torch.from_numpy(_decode(image, channels, image_size, transform)).permute(2, 0, 1)


def decode_all(images: Sequence[EncodedImage], channels: int, image_size: int) -> Tensor:
    """Return the images as uint8, shape (N, channels, image_size, image_size).

    Raises:
        DataError: one is not a readable 8-bit image; the message names it.
    """
    out = torch.empty((len(images), channels, image_size, image_size), dtype=torch.uint8)
    view = out.permute(0, 2, 3, 1).numpy()

    def fill(rows: range) -> None:
        for row in rows:
            view[row] = _decode(images[row], channels, image_size)

    chunks = [range(s, min(s + 256, len(images))) for s in range(0, len(images), 256)]
    small = images and all(_count_bytes(image) < _THREADED_BYTES for image in images[:64])
    if small or len(chunks) < 2:
        for chunk in chunks:
            fill(chunk)
    else:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for _ in pool.map(fill, chunks):
                pass
    return out


def _count_bytes(image: EncodedImage) -> int:
    content = image.content
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _decode(
    image: EncodedImage,
    channels: int,
    image_size: int,
    transform: Callable[["Image"], "Image"] | None = None,
) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    with _open(image) as opened:
        try:
            opened.draft(None, (2 * image_size, 2 * image_size))  # JPEG: skip what is not needed
            pixels = _upright(opened.convert(_MODES[channels]), opened)
        except Exception as error:  # decoders raise whatever a damaged file sets off in them
            raise _unreadable(image, error) from error
    square = transform(pixels) if transform else fit_square(pixels, image_size)
    return np.array(square, dtype=np.uint8).reshape(image_size, image_size, channels)


def _open(image: EncodedImage) -> "Image":
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "train", "Reading images") from error
    content = image.content
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


def _upright(pixels: "Image", opened: "Image") -> "Image":
    """Return the decoded image as it was seen, by the EXIF orientation of the one it comes from."""
    from PIL.Image import Transpose

    try:
        held = opened.getexif().get(_ORIENTATION, 1)
    except Exception:
        return pixels  # the pixels are whole, what is written beside them is not
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(held) if isinstance(held, int) else None
    return pixels if turn is None else pixels.transpose(turn)


def _unreadable(image: EncodedImage, error: Exception) -> DataError:
    return DataError(
        f"{image.place} is not a readable image ({type(error).__name__}: {str(error)[:200]}). Read "
        f"are {', '.join(_FORMATS)}. Remove or replace it."
    )
