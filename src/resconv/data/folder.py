"""Image folders: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``.

The listing is our own. torchvision's ``ImageFolder`` follows links in a circle (6 images become 126), takes hidden
folders for classes and pipes for images. The hub's ``datasets`` leaves out whatever is behind a link and classes
without an image, and gives up the classes where one of them has a folder inside, all without a word.
"""

import os
from collections import Counter
from pathlib import Path

import torch

from resconv.data.images import EncodedImage
from resconv.data.splits import NO_VAL_HINT, Listed
from resconv.errors import DataError

__all__ = ["find_folder", "list_classes", "list_images"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def find_folder(path: Path, *, needs_val: bool) -> tuple[Listed, Listed | None, tuple[str, ...]]:
    """List the images below ``path``: those of train, of val where it is needed, and the classes.

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
    train, class_names = list_classes(path / "train")
    if not needs_val:
        return train, None, class_names
    val, val_names = list_classes(path / "val")
    if val_names != class_names:
        _raise_class_difference(path, class_names, val_names)
    return train, val, class_names


def list_classes(folder: Path) -> tuple[Listed, tuple[str, ...]]:
    """Return the images of a split in a fixed random order, and the class names.

    Raises:
        DataError: no folder is in it, or one without an image.
    """
    try:
        classes = sorted((p for p in folder.iterdir() if _is_class(p)), key=lambda p: p.name)
        if not classes:
            raise DataError(
                f"{folder} has no folder in it: one for each class is needed, named as the class."
            )
        # Where a link leads to a class or to the whole, its images are counted there alone.
        others = {_identity(p) for p in (folder, *classes)}
        listed = [_list_class(p, others - {_identity(p)}) for p in classes]
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read: {error.strerror}.") from error
    empty = [p.name for p, files in zip(classes, listed, strict=True) if not files]
    if empty:
        raise DataError(
            f"{folder} has no image in {_name_some(empty)}{_held(folder / empty[0])}. Read are "
            f"{', '.join(_SUFFIXES)}. Add images, or remove the folders of classes that are not "
            "wanted (from every split)."
        )
    labels = torch.tensor([i for i, files in enumerate(listed) for _ in files], dtype=torch.int64)
    images = [EncodedImage(str(file), file) for files in listed for file in files]
    return Listed(images, labels).mixed(), tuple(p.name for p in classes)


def list_images(path: str | Path) -> list[EncodedImage]:
    """Return one image file, or every one below a folder, in the order of their names.

    Raises:
        DataError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return [EncodedImage(str(path), path)]
    if not path.is_dir():
        raise DataError(f"There is no image or folder {path}. Check the path.")
    found = sorted(_list_class(path, set()))
    if not found:
        raise DataError(f"{path} has no image in it{_held(path)}. Read are {', '.join(_SUFFIXES)}.")
    return [EncodedImage(str(file), file) for file in found]


def _is_class(path: Path) -> bool:
    return path.is_dir() and not _is_hidden(path.name)


def _is_hidden(name: str) -> bool:
    # What notebooks, file managers and archives leave behind (.ipynb_checkpoints, ._photo.jpg).
    return name.startswith(".") or name == "__MACOSX"


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _list_class(folder: Path, seen: set[tuple[int, int]]) -> list[Path]:
    """Return the image files below a class, each folder once, however many links lead there."""
    found: list[Path] = []
    todo = [folder]
    while todo:
        place = todo.pop()
        if _identity(place) in seen:
            continue
        seen.add(_identity(place))
        inside = sorted(
            (p for p in place.iterdir() if not _is_hidden(p.name)), key=lambda p: p.name
        )
        # A pipe or a link to nothing is no image, whatever it is called.
        found += [p for p in inside if p.suffix.lower() in _SUFFIXES and p.is_file()]
        todo += [p for p in reversed(inside) if p.is_dir()]
    return found


def _held(folder: Path) -> str:
    names = (Path(name) for _, _, files in os.walk(folder) for name in files)
    kinds = Counter(name.suffix.lower() or "no ending" for name in names)
    if not kinds:
        return ""
    return f" ({folder.name}/ holds: {', '.join(f'{n} of {k}' for k, n in kinds.most_common(4))})"


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
