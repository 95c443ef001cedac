"""Image folders: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resconv.data.images import EncodedImage, decode_all, probe
from resconv.data.splits import NO_VAL_HINT, LazySplit, Source, Split
from resconv.errors import DataError, MissingExtraError

__all__ = ["FolderSource", "find_folder"]

_MAX_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class FolderSource:
    """Two listed, undecoded splits (``val`` where it was asked for) and what their files are."""

    train: Source
    val: Source | None
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    example: str


def find_folder(
    path: Path, *, image_size: int | None, channels: int | None, needs_val: bool, limit: int | None
) -> FolderSource:
    """List the images below ``path``; they are decoded at once if they fit into 2 GiB, else lazily.

    Raises:
        DataError: a missing folder, an empty class, or classes that differ between the splits.
    """
    if not path.is_dir():
        raise DataError(f"There is no folder {path}. Check the path after 'folder:'.")
    names = ["train", "val"] if needs_val else ["train"]
    for name in names:
        if not (path / name).is_dir():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            hint = NO_VAL_HINT if name == "val" else ""
            raise DataError(
                f"{path} has no folder {name}/ (it holds: {found}). Put one folder for each class "
                f"into {path / name}.{hint}"
            )
    splits = {name: _list_images(path / name) for name in names}
    class_names = splits["train"][2]
    if needs_val and splits["val"][2] != class_names:
        _raise_class_difference(path, class_names, splits["val"][2])
    train_images = [EncodedImage(str(file), file) for file in splits["train"][0]]
    found_probe = probe(train_images)
    channels = channels or found_probe.channels
    image_size = image_size or found_probe.image_size
    num_images = sum(min(len(s[0]), limit or len(s[0])) for s in splits.values())
    is_lazy = num_images * channels * image_size**2 > _MAX_BYTES

    def make_source(name: str) -> Source:
        files, labels, _ = splits[name]

        def read(rows: Tensor) -> Split | LazySplit:
            chosen = [files[row] for row in rows.tolist()]
            if is_lazy:
                return LazySplit(tuple(chosen), labels[rows], channels, image_size)
            encoded = [EncodedImage(str(file), file) for file in chosen]
            return Split(decode_all(encoded, channels, image_size), labels[rows])

        return Source(labels, read)

    return FolderSource(
        train=make_source("train"),
        val=make_source("val") if needs_val else None,
        class_names=class_names,
        channels=channels,
        image_size=image_size,
        example=str(splits["train"][0][0]),
    )


def _list_images(folder: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise MissingExtraError("torchvision", "train", "Reading an image folder") from error
    try:
        listed = ImageFolder(folder, allow_empty=True)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} has no folder in it: one for each class is needed, named as the class."
        ) from error
    labels = torch.tensor([label for _, label in listed.samples], dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(listed.classes)).tolist()
    empty = [name for name, count in zip(listed.classes, counts, strict=True) if count == 0]
    if empty:
        raise DataError(
            f"{folder} has no image in {_name_some(empty)}. Add images, or remove the folders of "
            "classes that are not wanted (from every split)."
        )
    # Listed class by class; drawn into one fixed order, any prefix is a fair sample.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    files = [Path(listed.samples[row][0]) for row in order.tolist()]
    return files, labels[order], tuple(listed.classes)


def _raise_class_difference(path: Path, train: tuple[str, ...], val: tuple[str, ...]) -> None:
    only_train = [name for name in train if name not in val]
    only_val = [name for name in val if name not in train]
    parts = [
        f"only in {split}/: {_name_some(names)}"
        for split, names in (("train", only_train), ("val", only_val))
        if names
    ]
    raise DataError(
        f"The classes of {path} differ between its splits ({len(train)} in train/, {len(val)} in "
        f"val/; {'; '.join(parts)}). Give both the same class folders."
    )


def _name_some(names: list[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + more
