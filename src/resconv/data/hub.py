"""Image sets of the Hugging Face hub, by name, through its package ``datasets``.

It downloads them once, keeps them as Arrow files in its cache and maps those into memory, so that a set may be
larger than the memory. No code of a set's is run: ``datasets`` 4 dropped that.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resconv.data.images import EncodedImage
from resconv.data.parquet import numbered
from resconv.data.splits import NO_VAL_HINT, Listed
from resconv.errors import DataError, MissingExtraError

__all__ = ["find_hub"]

_VAL = ("validation", "valid", "val", "test")  # the first that is there


def find_hub(name: str, *, needs_val: bool) -> tuple[Listed, Listed | None, tuple[str, ...]]:
    """Open a set of the hub (``owner/name`` or ``owner/name:configuration``), or a folder laid out like one.

    Returns:
        The images of train, of val where it is needed, and the classes.

    Raises:
        DataError: it cannot be loaded, or has no split, images or labels to train on.
        MissingExtraError: ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train", "A dataset of the hub") from error
    repository, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # of the network, the hub, the cache or the files: there are many
        text = (str(error).splitlines() or [""])[0][:300]
        raise DataError(
            f"The dataset {name!r} cannot be loaded ({type(error).__name__}: {text}). Check the name and the "
            "network. Without a network: copy its parquet files to a folder and use parquet:PATH."
        ) from error
    there = ", ".join(found)
    if "train" not in found:
        raise DataError(f"{name} has no split 'train' (it has: {there}).")
    val_name = next((v for v in _VAL if v in found), None)
    if needs_val and val_name is None:
        raise DataError(f"{name} has no split {' or '.join(_VAL)} (it has: {there}).{NO_VAL_HINT}")
    image, label = _columns(name, found["train"].features, datasets)
    kind = found["train"].features[label]
    names = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else ()
    parts = {"train": found["train"]}
    if needs_val:
        parts["val"] = found[val_name]
        if parts["val"].features != parts["train"].features:
            raise DataError(
                f"{name}: its splits train and {val_name} have other columns or classes."
            )
    listed = {}
    for split, rows in parts.items():
        labels = _labels(name, rows[label], names)
        # Without decoding: that is done as for any other image (see images.py).
        images = _Rows(rows.cast_column(image, datasets.Image(decode=False)), image, name)
        listed[split] = Listed(images, labels).mixed()
    return listed["train"], listed.get("val"), names or numbered(name, listed["train"].labels)


class _Rows(Sequence[EncodedImage]):
    """The images of a split, each read when it is asked for."""

    def __init__(self, rows: Any, column: str, name: str) -> None:
        self.rows, self.column = rows.select_columns([column]), column
        self.name = f"{name} ({rows.split})"
        # Only of a folder of images are the paths those that the package found by itself.
        self.has_files = rows.info.builder_name == "imagefolder"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise TypeError("one image at a time")
        found, place = self.rows[index][self.column], f"Row {index} of {self.name}"
        content = None if found is None else found["bytes"]
        if content is None and found is not None and self.has_files and found["path"]:
            return EncodedImage(os.fspath(found["path"]), Path(found["path"]))
        if content is None:
            raise DataError(
                f"{place} has no image bytes. Only images embedded in the set are read."
            )
        return EncodedImage(place, content)


def _columns(name: str, features: Any, datasets: Any) -> tuple[str, str]:
    """Return the names of the one column of images and of the one of labels."""
    images = [c for c, kind in features.items() if isinstance(kind, datasets.Image)]
    classes = [c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    whole = [
        c
        for c, kind in features.items()
        if c in ("label", "labels") and "int" in str(getattr(kind, "dtype", ""))
    ]
    labels = [c for c in classes if c == "label"] or classes or whole
    has = ", ".join(f"{c}: {type(kind).__name__}" for c, kind in features.items())
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{name} has {len(images)} columns of images and {len(labels)} of class labels (it has: {has}). "
            "Give it one of each; a column called 'label' goes before others."
        )
    return images[0], labels[0]


def _labels(name: str, column: Any, names: tuple[str, ...]) -> Tensor:
    values = list(column)
    most = len(names) if names else 2**31
    wrong = [i for i, v in enumerate(values) if v is None or not 0 <= v < most]
    if wrong:
        raise DataError(
            f"Row {wrong[0]} of {name} has the label {values[wrong[0]]}; {len(wrong):,} of its rows are "
            f"outside of 0 to {most - 1:,}. A split without labels cannot be trained on or judged by."
        )
    return torch.tensor(values, dtype=torch.int64)
