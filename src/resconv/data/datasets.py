"""Load an image set by its name into one uint8 tensor a split."""

import difflib
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from resconv.data.folder import find_folder
from resconv.data.parquet import find_parquet
from resconv.data.splits import ImageData, LazySplit, Source, Split, measure_pixels
from resconv.data.splits import split_stratified as _split_stratified
from resconv.errors import DataError, MissingExtraError

__all__ = ["check_fit", "load"]

_NAMES = ("digits", "cifar10", "cifar100", "folder:PATH", "parquet:PATH")


def load(
    name: str,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    holdout: float = 0.0,
    limit: int | None = None,
    channels: int | None = None,
) -> ImageData:
    """Load an image set; the same arguments always give the same images in the same order.

    Args:
        name: ``digits`` (1,797 scans of 8x8, 80/20), ``cifar10``, ``cifar100``, ``folder:PATH``
            (train/ and val/, one folder a class) or ``parquet:PATH`` (the hub's layout).
        root: where downloads are kept, ``~/.cache/resconv`` by default.
        image_size: side in pixels that the images are resized (and centre-cropped) to. Default:
            their own where all are squares of one size, else 224.
        holdout: share of every class of train that becomes ``val``; the set's own test or
            validation split is then not touched.
        limit: at most this many images of each split, from its start.
        channels: 1 or 3 converts to grey or RGB. Default: 1 where all images are grey, else 3.

    Raises:
        DataError: an unknown name, missing or unreadable files, classes that do not agree.
        MissingExtraError: the source's package is not installed.
    """
    _check_arguments(name, image_size, holdout, limit, channels)
    try:
        return _load(name, root, image_size, holdout, limit, channels)
    except OSError as error:
        place = error.filename or name
        raise DataError(f"{place} cannot be read: {error.strerror or error}.") from error


def _load(
    name: str,
    root: str | Path | None,
    image_size: int | None,
    holdout: float,
    limit: int | None,
    channels: int | None,
) -> ImageData:
    kind, _, place = name.partition(":")
    path = Path(place).expanduser()
    needs_val = holdout == 0.0
    example = None
    class_names: tuple[str, ...]
    val: Source | None
    if name == "digits":
        train, val, class_names = _load_digits()
    elif name in ("cifar10", "cifar100"):
        cache = Path(root).expanduser() if root else Path.home() / ".cache" / "resconv"
        train, val, class_names = _load_cifar(name, cache, needs_val)
    elif kind == "folder" and place:
        found = find_folder(
            path, image_size=image_size, channels=channels, needs_val=needs_val, limit=limit
        )
        train, val, class_names, example = found.train, found.val, found.class_names, found.example
    elif kind == "parquet" and place:
        rows = find_parquet(path, image_size=image_size, channels=channels, needs_val=needs_val)
        train, val, class_names, example = rows.train, rows.val, rows.class_names, rows.example
    else:
        close = difflib.get_close_matches(name, _NAMES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(f"There is no dataset {name!r}.{hint} There are: {', '.join(_NAMES)}.")
    train_rows = torch.arange(len(train.labels))
    if holdout:
        train_rows, val_rows = _split_stratified(train.labels, holdout)
        val = train
    else:
        assert val is not None  # asked for by needs_val
        val_rows = torch.arange(len(val.labels))
    if len(val_rows) == 0:
        raise DataError(f"{name!r}: no class has 2 images, so none can be held out of train.")
    train_split = _resize(train.read(train_rows[:limit]), image_size, channels)
    val_split = _resize(val.read(val_rows[:limit]), image_size, channels)
    mean, std = measure_pixels(train_split)
    shape = train_split.images.shape if isinstance(train_split, Split) else None
    return ImageData(
        name=name,
        train=train_split,
        val=val_split,
        num_classes=len(class_names),
        class_names=class_names,
        channels=len(mean),
        image_size=shape[-1] if shape else _get_lazy_size(train_split),
        mean=mean,
        std=std,
        example=example,
    )


def check_fit(data: ImageData, in_channels: int, num_classes: int) -> None:
    """Check that a net with these inputs and outputs can be trained on ``data``.

    Raises:
        DataError: the channels or the number of classes differ.
    """
    example = f" (such as {data.example})" if data.example else ""
    if data.channels != in_channels:
        kind = {1: "grey", 3: "RGB"}
        convert = (
            f"load the data with channels={in_channels}, which converts it to {kind[in_channels]}"
            if in_channels in kind
            else f"convert the images to {in_channels} channels"
        )
        raise DataError(
            f"{data.name} has images of {data.channels} channel(s){example}, the net reads "
            f"{in_channels}. Build the net with in_channels={data.channels}, or {convert}."
        )
    if data.num_classes != num_classes:
        names = ", ".join(data.class_names[:5]) + (", ..." if data.num_classes > 5 else "")
        raise DataError(
            f"{data.name} has {data.num_classes} classes ({names}), the net tells "
            f"{num_classes} apart. Build the net with num_classes={data.num_classes}."
        )


def _check_arguments(
    name: str, image_size: int | None, holdout: float, limit: int | None, channels: int | None
) -> None:
    if not 0.0 <= holdout < 1.0:
        raise DataError(f"holdout={holdout} for {name!r}: a share from 0 to below 1 is needed.")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size={image_size} for {name!r}: at least 1 pixel is needed.")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} for {name!r}: at least 1 image is needed.")
    if channels not in (None, 1, 3):
        raise DataError(f"channels={channels} for {name!r}: images are grey (1) or RGB (3).")


def _load_digits() -> tuple[Source, Source, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train", "The dataset 'digits'") from error
    bunch = load_digits()
    levels = torch.from_numpy(bunch.images).unsqueeze(1)  # 0..16
    images = (levels * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    train_rows, val_rows = _split_stratified(labels, 0.2)
    train = _hold(images[train_rows], labels[train_rows])
    val = _hold(images[val_rows], labels[val_rows])
    return train, val, tuple(str(name) for name in bunch.target_names)


def _load_cifar(
    name: str, root: Path, needs_val: bool
) -> tuple[Source, Source | None, tuple[str, ...]]:
    try:
        from torchvision.datasets import CIFAR10, CIFAR100
    except ImportError as error:
        raise MissingExtraError("torchvision", "train", f"The dataset {name!r}") from error
    dataset = CIFAR10 if name == "cifar10" else CIFAR100
    try:
        splits = [
            dataset(root, train=is_train, download=True)
            for is_train in ((True, False) if needs_val else (True,))
        ]
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise DataError(
            f"{name} could not be downloaded into {root} ({type(error).__name__}: {error}). Check "
            f"the network, or put {dataset.filename} there yourself and run again."
        ) from error
    sources = [
        _hold(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
        for s in splits
    ]
    return sources[0], sources[1] if needs_val else None, tuple(splits[0].classes)


def _hold(images: Tensor, labels: Tensor) -> Source:
    return Source(labels, lambda rows: Split(images[rows], labels[rows]))


def _resize(
    split: Split | LazySplit, image_size: int | None, channels: int | None
) -> Split | LazySplit:
    """Bring images that came as a tensor to the asked size and channels; decoded ones have them."""
    if isinstance(split, LazySplit):
        return split
    images = split.images
    if channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1).contiguous()
    elif channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R 601, as PIL's
        images = (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
    if image_size is not None and images.shape[-1] != image_size:
        size = (image_size, image_size)
        resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        images = resized.round().clamp(0, 255).to(torch.uint8)
    return replace(split, images=images)


def _get_lazy_size(split: Split | LazySplit) -> int:
    return split.image_size if isinstance(split, LazySplit) else int(split.images.shape[-1])
