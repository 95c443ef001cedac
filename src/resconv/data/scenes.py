"""``digits-detect`` and ``digits-segment``: scans of digits placed on canvases.

A small set for detection and for semantic segmentation that needs no download. Every digit is a real
scan (see digits.py), enlarged to a random size and put onto a canvas with a gradient, lines and
noise, lighter or darker than what lies behind it. Boxes and masks follow its ink. A scan is in scenes of
one split alone, by the split of ``digits``; a scene depends on its split, its number, the side and
the seed alone, on any machine.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from resconv.data.digits import load_scans
from resconv.data.splits import split_stratified
from resconv.errors import DataError, MissingExtraError
from resconv.files import write_text

__all__ = ["NUM_TRAIN", "NUM_VAL", "Scene", "make_scenes", "write_scenes"]

NUM_TRAIN, NUM_VAL = 600, 200
_SIDES = (0.1, 0.32)  # of a digit, as a share of the canvas's side
_MOST_DIGITS = 8
_INK = 0.25  # from this share of full ink on, a pixel belongs to the digit
_OVERLAP = 0.05  # share of a new digit's square that others may cover
_TRIES = 20
_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Scene:
    """One canvas: ``image`` (H, W) uint8 grey; ``boxes`` (N, 4) as x0, y0, x1, y1 in pixels;
    ``labels`` (N,); ``mask`` (H, W) uint8, 0 for the background and 1 + label for a digit's ink.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    mask: NDArray[np.uint8]


def make_scenes(
    split: Literal["train", "val"], count: int, *, side: int = 160, seed: int = 0
) -> Iterator[Scene]:
    """Yield ``count`` scenes of ``side`` x ``side`` pixels; the same arguments give the same scenes.

    Raises:
        DataError: an unknown split, or a side below 32 pixels.
        MissingExtraError: scikit-learn is not installed.
    """
    if split not in _SPLITS:
        raise DataError(f"split={split!r}: choose one of {', '.join(_SPLITS)}.")
    if side < 32:
        raise DataError(f"side={side}: digits are not to be told apart below 32 pixels.")
    scans, labels, _ = load_scans("digits-detect")
    rows = split_stratified(labels, 0.2)[_SPLITS.index(split)]
    inks, of = scans[rows].numpy().astype(np.float64) / 255, labels[rows].numpy()
    for index in range(count):
        yield _scene(np.random.default_rng([seed, _SPLITS.index(split), index]), inks, of, side)


def write_scenes(
    folder: str | Path,
    *,
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
    side: int = 160,
    seed: int = 0,
) -> Path:
    """Write the set into ``folder`` in the layout that YOLO trainers read; return its ``data.yaml``.

    ``images/SPLIT/00000.png``, ``labels/SPLIT/00000.txt`` (a line a digit: class, centre, width and height
    as shares of the side) and ``masks/SPLIT/00000.png`` (0 for the background, 1 + class). Files of the
    same names are replaced; others stay. The folder may be moved.

    Raises:
        DataError: the folder cannot be written, or counts or side make no sense.
        MissingExtraError: scikit-learn or Pillow is not installed.

    Example:
        >>> from resconv.data import write_scenes
        >>> path = write_scenes("digits-detect", num_train=4, num_val=2)
        >>> sorted(p.name for p in path.parent.iterdir())
        ['data.yaml', 'images', 'labels', 'masks']
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "train", "Writing images") from error
    if num_train < 1 or num_val < 1:
        raise DataError(
            f"num_train={num_train}, num_val={num_val}: at least one image each is needed."
        )
    folder = Path(folder)
    try:
        for split, count in (("train", num_train), ("val", num_val)):
            places = {kind: folder / kind / split for kind in ("images", "labels", "masks")}
            for place in places.values():
                place.mkdir(parents=True, exist_ok=True)
            for i, scene in enumerate(make_scenes(split, count, side=side, seed=seed)):  # type: ignore[arg-type]
                Image.fromarray(scene.image).save(places["images"] / f"{i:05}.png")
                Image.fromarray(scene.mask).save(places["masks"] / f"{i:05}.png")
                lines = _yolo_lines(scene, side)
                (places["labels"] / f"{i:05}.txt").write_text(lines, encoding="utf-8")
        names = json.dumps(load_scans("digits-detect")[2])
        # JSON is YAML; without a path, trainers take the folder of this file.
        text = f"train: images/train\nval: images/val\nnames: {names}\n"
        write_text(folder / "data.yaml", text)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}."
        ) from error
    return folder / "data.yaml"


def _scene(
    rng: np.random.Generator, inks: NDArray[np.float64], labels: NDArray[np.int64], side: int
) -> Scene:
    canvas = _background(rng, side)
    mask = np.zeros((side, side), np.uint8)
    taken = np.zeros((side, side), bool)
    boxes, found = [], []
    for _ in range(int(rng.integers(2, _MOST_DIGITS + 1))):
        row = int(rng.integers(len(inks)))
        size = round(side * rng.uniform(*_SIDES))
        place = _free_place(rng, taken, size)
        if place is None:
            continue
        y, x = place
        ink = _enlarge(inks[row], size)
        square = (slice(y, y + size), slice(x, x + size))
        taken[square] = True
        tone = rng.uniform(70, 150) * rng.choice((-1.0, 1.0))
        canvas[square] += ink * tone
        is_ink = ink >= _INK
        mask[square][is_ink] = labels[row] + 1
        rows, columns = (np.flatnonzero(is_ink.any(axis)) for axis in (1, 0))
        boxes.append((x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1))
        found.append(labels[row])
    image = canvas + rng.normal(0, rng.uniform(2, 10), canvas.shape)
    return Scene(
        np.clip(np.rint(image), 0, 255).astype(np.uint8),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(found, np.int64),
        mask,
    )


def _background(rng: np.random.Generator, side: int) -> NDArray[np.float64]:
    """Return a gradient with some thick lines across it, all within 80 and 175."""
    slope_y, slope_x = rng.uniform(-25, 25, 2)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    canvas = rng.uniform(115, 140) + slope_y * y + slope_x * x
    for _ in range(int(rng.integers(0, 5))):
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.5, 0.5)
        near = np.abs(y * np.cos(angle) + x * np.sin(angle) - offset) < rng.uniform(0.005, 0.02)
        canvas[near] += rng.uniform(-35, 35)
    return np.clip(canvas, 80, 175)  # type: ignore[no-any-return]


def _free_place(
    rng: np.random.Generator, taken: NDArray[np.bool_], size: int
) -> tuple[int, int] | None:
    for _ in range(_TRIES):
        y, x = rng.integers(0, len(taken) - size + 1, 2)
        if taken[y : y + size, x : x + size].mean() <= _OVERLAP:
            return int(y), int(x)
    return None


def _enlarge(ink: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Return the scan at another size, bilinearly, its ink at most 1."""
    whole = torch.from_numpy(ink)[None, None]
    larger = torch.nn.functional.interpolate(
        whole, (size, size), mode="bilinear", align_corners=False, antialias=size < len(ink)
    )
    array: NDArray[np.float64] = larger[0, 0].numpy()
    return array


def _yolo_lines(scene: Scene, side: int) -> str:
    lines = []
    for label, (x0, y0, x1, y1) in zip(scene.labels, scene.boxes.tolist(), strict=True):
        shares = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
        lines.append(f"{label} " + " ".join(f"{s / side:.6f}" for s in shares))
    return "".join(line + "\n" for line in lines)
