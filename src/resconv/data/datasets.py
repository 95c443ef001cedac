"""Load an image set by its name."""

import difflib
from pathlib import Path

import torch
from torch import Tensor

from resconv.data.digits import load_scans
from resconv.data.folder import find_folder, list_classes
from resconv.data.hub import find_hub
from resconv.data.images import EncodedImage, Form, probe
from resconv.data.parquet import find_parquet
from resconv.data.splits import (
    MAX_MEMORY,
    SMALL,
    ImageData,
    LazySplit,
    Listed,
    Split,
    measure_pixels,
    split_stratified,
)
from resconv.errors import DataError, MissingExtraError
from resconv.preprocessing import Interpolation, Preprocessing

__all__ = ["NAMED", "check_fit", "load", "load_val"]

NAMED = ("digits", "cifar10", "cifar100")
_NAMES = (*NAMED, "folder:PATH", "parquet:PATH", "hf:NAME")
_DEFAULT_SIZE = 224
_CUT_FROM = 160  # pixels from which the border is cut (224 out of 256), as is usual in evaluation
# A set of whole squares, or of listed images; of val where it is needed.
_Found = tuple[Listed, Listed | None, tuple[str, ...]]


def load(
    name: str,
    *,
    root: str | Path | None = None,
    holdout: float = 0.0,
    limit: int | None = None,
    channels: int | None = None,
    image_size: int | None = None,
    crop_fraction: float | None = None,
    interpolation: Interpolation | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    num_classes: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> ImageData:
    """Load an image set; the same arguments always give the same images in the same order.

    How images become inputs is what is asked for here, else what ``preprocessing`` says (a pretrained net's
    own), else what is usual or measured on train; the whole of it stands in the result.

    Images of up to 64 pixels a side are decoded at once, as long as they take no more than 2 GiB; others
    when they are read. What training sees does not depend on that.

    Args:
        name: ``digits`` (1,797 scans of 8x8, 80/20), ``cifar10``, ``cifar100``, ``folder:PATH``
            (train/ and val/, one folder a class), ``parquet:PATH`` (the hub's layout) or ``hf:NAME``
            (a set of the hub; ``hf:NAME:CONFIGURATION``).
        root: where downloads are kept, ``~/.cache/resconv`` by default (those of ``hf:`` in the hub's cache).
        holdout: share of every class of train that becomes ``val``; the set's own test or
            validation split is then not touched.
        limit: at most this many images of each split, from its start.
        channels: 1 or 3 converts to grey or RGB. Default: 1 where all images are grey, else 3.
        image_size: side in pixels that the images are resized and centre-cropped to. Default:
            their own where all are squares of one size, else 224.
        crop_fraction: share of the shorter side that is kept. Default: 224 of 256 from 160 pixels up, else 1.
        interpolation: "bilinear" by default.
        mean: of each channel, pixels in 0..1. Default: measured on train.
        std: standard deviation, in the same way.
        num_classes: how many there are, where the set does not name them: its labels may lack the last.
        preprocessing: the net's own.

    Raises:
        DataError: an unknown name, missing or unreadable files, classes that do not agree.
        MissingExtraError: the source's package is not installed.
    """
    _check_arguments(name, image_size, holdout, limit, channels)
    try:
        train, val, class_names = _find_splits(name, root, holdout, limit)
        class_names = _with_all_classes(name, class_names, num_classes)
        form = _choose_form(
            train, channels, image_size, crop_fraction, interpolation, preprocessing
        )
        train_split, val_split = (LazySplit(p.images, p.labels, form) for p in (train, val))
        held_train = _hold(train_split, small_only=True)
        own = preprocessing
        mean = mean or (own.mean if own and own.channel_order == form.channel_order else None)
        std = std or (own.std if own and own.channel_order == form.channel_order else None)
        if mean is None or std is None or isinstance(held_train, LazySplit):
            # Of images that are decoded later this is also the look whether all can be.
            measured = measure_pixels(held_train)
            mean, std = mean or measured[0], std or measured[1]
        return ImageData(
            name=name,
            train=held_train,
            val=_hold(val_split, small_only=False),
            preprocessing=form.with_values(mean, std, class_names),
            example=train.images[0].place,
        )
    except OSError as error:
        place = error.filename or name
        raise DataError(f"{place} cannot be read: {error.strerror or error}.") from error


def load_val(
    name: str,
    preprocessing: Preprocessing,
    *,
    root: str | Path | None = None,
    holdout: float = 0.0,
    limit: int | None = None,
) -> tuple[LazySplit, tuple[str, ...]]:
    """Return the images of a set to judge a net by, prepared as the net wants them, and the names of its classes.

    They are those of ``val`` in :func:`load`, which takes the same names and arguments; nothing is decoded. The
    path of a folder with one folder a class is a set too.

    Raises:
        DataError: as :func:`load` does.
        MissingExtraError: the source's package is not installed.
    """
    _check_arguments(name, None, holdout, limit, None)
    form = Form.of(preprocessing)
    place = Path(name).expanduser()
    try:
        if place.is_dir() and not (place / "val").is_dir():
            found, names = list_classes(place)
            found = found.take(torch.arange(len(found.labels))[:limit])
        else:
            source = f"folder:{place}" if place.is_dir() else name
            _, found, names = _find_splits(source, root, holdout, limit)
    except OSError as error:
        raise DataError(
            f"{error.filename or name} cannot be read: {error.strerror or error}."
        ) from error
    return LazySplit(found.images, found.labels, form), names


def _find_splits(
    name: str, root: str | Path | None, holdout: float, limit: int | None
) -> tuple[Listed, Listed, tuple[str, ...]]:
    """Return both splits, and the names of the classes."""
    train, val, class_names = _find(name, root, needs_val=holdout == 0.0)
    train_rows = torch.arange(len(train.labels))
    if val is None:
        train_rows, val_rows = split_stratified(train.labels, holdout)
        val = train
    else:
        val_rows = torch.arange(len(val.labels))
    if len(val_rows) == 0:
        raise DataError(f"{name!r}: no class has 2 images, so none can be held out of train.")
    return train.take(train_rows[:limit]), val.take(val_rows[:limit]), class_names


def _find(name: str, root: str | Path | None, *, needs_val: bool) -> _Found:
    kind, _, place = name.partition(":")
    if name == "digits":
        found = _load_digits()
        return found if needs_val else (found[0], None, found[2])
    if name in ("cifar10", "cifar100"):
        cache = Path(root).expanduser() if root else Path.home() / ".cache" / "resconv"
        return _load_cifar(name, cache, needs_val)
    if kind == "folder" and place:
        return find_folder(Path(place).expanduser(), needs_val=needs_val)
    if kind == "parquet" and place:
        return find_parquet(Path(place).expanduser(), needs_val=needs_val)
    if kind == "hf" and place:
        return find_hub(place, needs_val=needs_val)
    close = difflib.get_close_matches(name, _NAMES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise DataError(f"There is no dataset {name!r}.{hint} There are: {', '.join(_NAMES)}.")


def _with_all_classes(name: str, names: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """Return the names of as many classes as are asked for, where they are only numbered."""
    if count is None or count == len(names):
        return names
    if count < len(names) or names != tuple(map(str, range(len(names)))):
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(
            f"num_classes={count}: {name} has {len(names)} classes ({shown}). Leave num_classes out: it is for "
            "data that does not name its classes."
        )
    return tuple(map(str, range(count)))


def _choose_form(
    train: Listed,
    channels: int | None,
    image_size: int | None,
    crop_fraction: float | None,
    interpolation: Interpolation | None,
    own: Preprocessing | None,
) -> Form:
    """Return what the images are decoded to: as asked for, as the net has it, or as they are."""
    found = probe(train.images)
    natural = found.side or _DEFAULT_SIZE
    size = image_size or (own.size if own else natural)
    if crop_fraction is None and own is not None:
        crop_fraction = own.crop_fraction
    if crop_fraction is None:
        crop_fraction = 1.0 if size == found.side or size < _CUT_FROM else 224 / 256
    order = {1: "L", 3: "RGB"}.get(channels or 0) or (own.channel_order if own else None)
    return Form(
        size=size,
        crop_fraction=crop_fraction,
        interpolation=interpolation or (own.interpolation if own else "bilinear"),
        channel_order=order or ("L" if found.is_grey else "RGB"),  # type: ignore[arg-type]
    )


def _hold(split: LazySplit, *, small_only: bool) -> Split | LazySplit:
    """Decode what fits into memory; of larger training images the originals are cropped."""
    is_held = split.num_bytes <= MAX_MEMORY and (split.form.size <= SMALL or not small_only)
    return split.in_memory() if is_held else split


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


def _load_digits() -> _Found:
    images, labels, names = load_scans("digits")
    every = _list_pixels("digits", images, labels)
    train, val = (every.take(rows) for rows in split_stratified(labels, 0.2))
    return train, val, names


def _load_cifar(name: str, root: Path, needs_val: bool) -> _Found:
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
    found = [_list_pixels(name, torch.from_numpy(s.data), torch.tensor(s.targets)) for s in splits]
    return found[0], found[1] if needs_val else None, tuple(splits[0].classes)


def _list_pixels(name: str, images: Tensor, labels: Tensor) -> Listed:
    """List images that are there as pixels, (N, H, W) or (N, H, W, 3)."""
    places = (EncodedImage(f"Image {i} of {name}", p) for i, p in enumerate(images.numpy()))
    return Listed(list(places), labels)
