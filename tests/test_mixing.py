"""Images blended two by two, and a teacher that alone says what they show."""

from dataclasses import replace

import pytest
import torch

from resconv import data as datasets
from resconv import nets
from resconv.errors import RunError
from resconv.train import Recipe, fit
from resconv.train.mixing import Mixing

CLASSES = 5


def batch():
    """Return images that show their class: 1 in its channel, 0 elsewhere."""
    labels = torch.arange(CLASSES).repeat(2)
    colours = torch.nn.functional.one_hot(labels, CLASSES).double()
    return colours[:, :, None, None].expand(-1, -1, 12, 12).clone(), labels


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_blended_as_the_images_are(kind):
    images, labels = batch()
    mixing = Mixing(kind, CLASSES, seed=0)
    largest = []
    for step in range(50):
        blended, shares = mixing(images, labels, step)
        assert blended.shape == images.shape
        torch.testing.assert_close(blended.mean((2, 3)), shares.double(), rtol=0, atol=1e-6)
        whole = blended.amax(1) == 1  # a pixel of CutMix is of one image or of the other
        assert bool(whole.all()) == (kind == "cutmix") or shares.max() == 1
        largest.append(shares.amax(1).mean().item())
    assert min(largest) < 0.6  # every share occurs
    assert max(largest) > 0.9
    assert torch.equal(images, batch()[0])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_what_is_drawn_depends_on_seed_and_step_alone(kind):
    images, labels = batch()
    first = Mixing(kind, CLASSES, seed=1)(images, labels, 7)[1]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(Mixing(kind, CLASSES, seed=1)(images, labels, 7)[1], first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(Mixing(kind, CLASSES, seed=1)(images, labels, 8)[1], first)
    assert not torch.equal(Mixing(kind, CLASSES, seed=2)(images, labels, 7)[1], first)


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(RunError, match="mix='cutup': choose one of mixup, cutmix"):
        Mixing("cutup", CLASSES, seed=0)


@pytest.mark.parametrize("mix", ["cutmix", None])
def test_of_blended_images_the_teacher_alone_is_followed(mix, tmp_path):
    digits = datasets.load("digits", limit=160)
    wrong = replace(digits.train, labels=digits.train.labels.roll(1))
    torch.manual_seed(0)
    teacher = nets.create("resnet20", num_classes=10, in_channels=1)
    recipe = Recipe(1, batch_size=32, lr=0.01, mix=mix)
    weights = []
    for name, data in (("right", digits), ("wrong", replace(digits, train=wrong))):
        torch.manual_seed(1)
        net = nets.create("resnet20", num_classes=10, in_channels=1)
        fit(net.train(), data, recipe, tmp_path / name, teacher=teacher, progress=False)
        weights.append(net.fc.weight.detach())
    same = torch.equal(*weights)
    assert same == (mix is not None)  # without blending the labels count
