"""Images blended two by two, and their labels with them."""

import pytest
import torch
from torch import nn

from resconv.data import Augment, ImageData, Split
from resconv.errors import RunError
from resconv.preprocessing import Preprocessing
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


class Reads(nn.Module):
    """Says how much of each colour an image has, to the power of its one weight."""

    def __init__(self):
        super().__init__()
        self.power = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.power * (images.mean((2, 3)) + 1e-4).log()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_training_blends_labels_as_images(kind, tmp_path, monkeypatch):
    """What each image shows of the classes is then its label, and there is nothing to be learnt."""
    colours, labels = batch()
    split = Split((255 * colours).byte().repeat(40, 1, 1, 1), labels.repeat(40))
    zeros, ones = (0.0,) * CLASSES, (1.0,) * CLASSES
    inputs = Preprocessing(
        size=12, mean=zeros, std=ones, channel_order=None, class_names=tuple("abcde")
    )
    data = ImageData("colours", split, split, inputs)

    def learnt(name):
        net = Reads()
        recipe = Recipe(4, batch_size=20, mix=kind, augment=Augment("none"))
        fit(net, data, recipe, tmp_path / name, progress=False)
        return abs(net.power.item() - 1)

    assert learnt("blended") < 0.02
    blend = Mixing.__call__

    def of_the_first(self, images, labels, step):
        return blend(self, images, labels, step)[0], labels

    monkeypatch.setattr(Mixing, "__call__", of_the_first)
    assert learnt("images alone") > 0.1
