"""Images to train on and to judge by: what is held out is not trained on."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from resconv import data
from resconv.cli.app import app
from resconv.errors import DataError


def pixels(*splits):
    """Return the images of the splits, sorted, so that only what is there counts."""
    return sorted(bytes(image.flatten().tolist()) for s in splits for image in s.images)


def test_holding_out_divides_the_training_images_and_leaves_the_others_alone():
    whole = data.load("digits")
    parts = data.load("digits", holdout=0.1)
    assert pixels(parts.train, parts.val) == pixels(whole.train)
    assert pixels(parts.val) != pixels(whole.val)
    counts, every = (torch.bincount(s.labels) for s in (parts.val, whole.train))
    assert torch.all((counts - 0.1 * every).abs() <= 1)
    again = data.load("digits", holdout=0.1)
    assert torch.equal(again.val.images, parts.val.images)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(DataError, match="a share from 0 to below 1"):
        data.load("digits", holdout=share)


def test_a_folder_without_val_is_used_once_a_share_is_held_out(tmp_path):
    for label, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
        folder = tmp_path / "photos" / "train" / label
        folder.mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), tuple(c + i for c in colour)).save(folder / f"{i}.png")
    command = [
        *("train", "--model", "resnet20", "--data", f"folder:{tmp_path / 'photos'}"),
        *("--macs", "0.5", "--epochs", "1", "--sparse-epochs", "5", "--batch-size", "4"),
        *("--out", str(tmp_path / "out")),
    ]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, DataError)
    assert "--holdout 0.1" in str(refused.exception)
    accepted = CliRunner().invoke(app, [*command, "--holdout", "0.25"])
    assert accepted.exit_code == 0, (accepted.output, accepted.exception)
    other = CliRunner().invoke(app, [*command, "--holdout", "0.5"])
    assert "holdout: 0.25 there, 0.5 now" in str(other.exception)
