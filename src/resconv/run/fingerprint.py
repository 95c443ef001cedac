"""What tells one image set from another: names, sizes, labels and bytes of the images."""

import hashlib
import os
from pathlib import Path

import torch

from resconv.data import ImageData, LazySplit, Split
from resconv.data.images import EncodedImage
from resconv.errors import DataError

__all__ = ["differing_parts", "fingerprint"]

_ALL_BYTES = 256 << 20  # images in memory up to here are taken whole
_SAMPLE = 256  # of more than that, and of files, as many are looked into
_HEAD = 1 << 16  # bytes of a file


def fingerprint(data: ImageData) -> dict[str, str]:
    """Return a digest of each part: classes, form, and labels and images of both splits.

    Images in memory are taken whole, or 256 of them where they are more than 256 MiB; their mean
    is part of the form, so that a change of any other one shows too. Of images that are decoded later it is
    256, of files the first 64 KiB of each, and the names and sizes of all.

    Raises:
        DataError: a file is gone.
    """
    parts = {
        "classes": _digest(repr(data.class_names).encode()),
        "form": _digest(repr((data.channels, data.image_size, data.mean, data.std)).encode()),
    }
    for name, split in (("train", data.train), ("val", data.val)):
        parts[f"labels of {name}"] = _digest(split.labels.contiguous().numpy().tobytes())
        if isinstance(split, LazySplit):
            parts.update(_of_lazy(name, split))
        else:
            parts[f"images of {name}"] = _of_memory(split)
    return parts


def differing_parts(there: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the parts whose digests differ."""
    return sorted(k for k in {*there, *now} if there.get(k) != now.get(k))


def _of_memory(split: Split) -> str:
    images = split.images
    if images.numel() > _ALL_BYTES:
        images = images[_rows(len(images))]
    return _digest(repr(tuple(split.images.shape)).encode(), images.contiguous().numpy().data)


def _of_lazy(name: str, split: LazySplit) -> dict[str, str]:
    sampled = [split.encoded[row] for row in _rows(len(split)).tolist()]
    if not isinstance(sampled[0].content, Path):
        return {f"images of {name}": _digest(repr(len(split)).encode(), *map(_head, sampled))}
    paths = [image.content for image in split.encoded if isinstance(image.content, Path)]
    root = os.path.commonpath([p.parent for p in paths])
    try:
        sizes = [p.stat().st_size for p in paths]
        heads = [_head(image) for image in sampled]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read any more: {error.strerror}.") from error
    return {
        f"names of {name}": _digest("\n".join(os.path.relpath(p, root) for p in paths).encode()),
        f"sizes of {name}": _digest(repr(sizes).encode()),
        f"images of {name}": _digest(*heads),
    }


def _rows(count: int) -> torch.Tensor:
    return torch.linspace(0, count - 1, min(count, _SAMPLE)).long()


def _head(image: EncodedImage) -> bytes:
    content = image.content
    if isinstance(content, Path):
        with content.open("rb") as file:
            return file.read(_HEAD)
    return content if isinstance(content, bytes) else content.tobytes()


def _digest(*contents: "bytes | memoryview") -> str:
    found = hashlib.sha256()
    for content in contents:
        found.update(content)
    return found.hexdigest()
