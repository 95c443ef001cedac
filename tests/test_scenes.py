"""digits-detect and digits-segment: the same scenes every time, boxes and masks that fit the ink."""

import numpy as np
import pytest

import resconv
from resconv.data import make_scenes, write_scenes

pytest.importorskip("sklearn")


def scenes(split="train", count=6, **more):
    return list(make_scenes(split, count, side=96, **more))


def test_scenes_depend_on_split_number_and_seed_alone():
    first, again, shorter = scenes(), scenes(), scenes(count=2)
    for a, b in zip(first, [*shorter, *again[2:]], strict=True):
        for mine, theirs in zip(vars(a).values(), vars(b).values(), strict=True):
            assert np.array_equal(mine, theirs)
    for other in (scenes("val"), scenes(seed=1)):
        assert not any(np.array_equal(a.image, b.image) for a, b in zip(first, other, strict=True))


def test_boxes_and_masks_fit_the_ink():
    seen = set()
    for scene in scenes(count=12):
        assert scene.image.dtype == scene.mask.dtype == np.uint8
        assert scene.image.shape == scene.mask.shape == (96, 96)
        assert len(scene.boxes) == len(scene.labels) >= 1
        inside = np.zeros((96, 96), bool)
        for label, box in zip(scene.labels, scene.boxes.astype(int), strict=True):
            x0, y0, x1, y1 = box
            assert 0 <= x0 < x1 <= 96
            assert 0 <= y0 < y1 <= 96
            assert (scene.mask[y0:y1, x0:x1] == label + 1).any()
            inside[y0:y1, x0:x1] = True
            seen.add(int(label))
        assert not scene.mask[~inside].any()  # no ink outside of all boxes
        # The digits stand out from what lies behind them.
        ink = scene.image[scene.mask > 0].astype(float)
        assert np.abs(ink - np.median(scene.image[scene.mask == 0])).mean() > 20
    assert len(seen) > 5


def test_no_scan_is_in_both_splits():
    from resconv.data.digits import load_scans
    from resconv.data.splits import split_stratified

    train, val = split_stratified(load_scans("test")[1], 0.2)
    assert not set(train.tolist()) & set(val.tolist())


def test_the_set_is_written_as_yolo_reads_it(tmp_path):
    Image = pytest.importorskip("PIL.Image")  # noqa: N806
    path = write_scenes(tmp_path / "set", num_train=3, num_val=2, side=96)
    text = path.read_text()
    assert "train: images/train" in text
    assert "val: images/val" in text
    for split, count in (("train", 3), ("val", 2)):
        for i, scene in enumerate(make_scenes(split, count, side=96)):
            image = np.asarray(Image.open(path.parent / "images" / split / f"{i:05}.png"))
            mask = np.asarray(Image.open(path.parent / "masks" / split / f"{i:05}.png"))
            assert np.array_equal(image, scene.image)
            assert np.array_equal(mask, scene.mask)
            rows = np.loadtxt(path.parent / "labels" / split / f"{i:05}.txt", ndmin=2)
            assert np.array_equal(rows[:, 0], scene.labels)
            corners = np.hstack([rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2])
            assert np.abs(corners * 96 - scene.boxes).max() < 1e-3


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(resconv.errors.DataError, match="test"):
        scenes("test")
    with pytest.raises(resconv.errors.DataError, match="side=8"):
        list(make_scenes("train", 1, side=8))
    with pytest.raises(resconv.errors.DataError, match="num_val=0"):
        write_scenes(tmp_path, num_val=0)
    (tmp_path / "file").touch()
    with pytest.raises(resconv.errors.DataError, match="cannot be written"):
        write_scenes(tmp_path / "file", num_train=1, num_val=1)
