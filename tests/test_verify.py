"""A proof by numbers is one: nothing compared, or nothing finite compared, is a failure."""

import dataclasses
import enum

import numpy as np
import pytest
import torch
from torch import nn

import resconv
from resconv import nets
from resconv.errors import LoadError, VerificationError
from resconv.storage.comparison import compare
from resconv.surgery.verification import compare_outputs, relative_error

from .helpers import randomise

NAN, INF = float("nan"), float("inf")


def two_nets():
    return (randomise(nets.create("resnet20").double(), seed) for seed in (0, 1))


@pytest.mark.parametrize("value", [NAN, INF])
def test_two_nets_that_overflow_do_not_agree(value, images):
    first, second = two_nets()
    for net in (first, second):
        net.fc.bias.data.fill_(value)
    with pytest.raises(VerificationError, match=r"Nothing (finite )?was compared: all .*40"):
        resconv.verify(first, second, images)
    # Negative control: the same nets with sound numbers are compared, and differ.
    for net in (first, second):
        net.fc.bias.data.fill_(1)
    with pytest.raises(VerificationError, match="disagree"):
        resconv.verify(first, second, images)
    assert resconv.verify(first, first, images).max_abs_error == 0


def test_infinities_of_the_two_signs_differ():
    x = torch.tensor([1.0, INF, -INF], dtype=torch.float64)
    assert compare_outputs(x, x.clone()).max_abs_error == 0
    assert relative_error(x, x.clone()) == 0
    for other in ([1.0, -INF, -INF], [1.0, NAN, -INF], [1.0, 5.0, -INF]):
        y = torch.tensor(other, dtype=torch.float64)
        with pytest.raises(VerificationError, match="disagree"):
            compare_outputs(x, y)
        assert relative_error(y, x) == INF


def test_one_output_of_nan_among_others_is_named():
    good = torch.ones(3)
    with pytest.raises(VerificationError, match=r"output \['b'\].*all its 3 numbers are NaN"):
        compare_outputs({"a": good, "b": good * NAN}, {"a": good, "b": good * NAN})
    partly = torch.tensor([1.0, NAN])
    assert compare_outputs({"b": partly}, {"b": partly.clone()}).num_outputs == 1


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (2, 3, 0, 32)])
def test_no_images_prove_nothing(shape, tmp_path):
    first, second = two_nets()
    empty = torch.empty(shape, dtype=torch.float64)
    with pytest.raises(VerificationError, match=r"hold nothing to compare on.*\(\d, 3, \d+, 32\)"):
        resconv.verify(first, second, empty)
    with pytest.raises(VerificationError, match="hold nothing to compare on"):
        resconv.export(first, tmp_path / "net.pt2", empty)
    folders = [
        resconv.save(net, tmp_path / str(i), example_inputs=empty)
        for i, net in enumerate((first, second))
    ]
    with pytest.raises(VerificationError, match="hold nothing to compare on"):
        compare(*folders)
    with pytest.raises(VerificationError, match="disagree"):
        compare(*folders, shape="2,3,32,32")


def test_outputs_without_numbers_prove_nothing():
    with pytest.raises(VerificationError, match="return no numbers at all"):
        compare_outputs(torch.empty(0, 3), torch.empty(0, 3))
    with pytest.raises(VerificationError, match="no tensor and no number"):
        compare_outputs(["cat", None], ["cat", None])


def test_an_exported_net_of_nan_is_not_checked(tmp_path, images):
    net = next(two_nets())
    net.fc.bias.data.fill_(NAN)
    with pytest.raises(VerificationError, match="Nothing was compared"):
        resconv.export(net, tmp_path / "net.pt2", images)
    assert not (tmp_path / "net.pt2").exists()


def test_files_of_nets_of_nan_do_not_agree(tmp_path, images):
    folders = []
    for i, net in enumerate(two_nets()):
        net.fc.bias.data.fill_(NAN)
        folders.append(resconv.save(net, tmp_path / str(i), example_inputs=images))
    with pytest.raises(VerificationError, match="Nothing was compared"):
        compare(*folders)


def test_a_net_that_does_not_run_is_named(images, tmp_path):
    first, second = two_nets()
    broken = nn.Sequential(second, nn.Linear(7, 2).double())
    with pytest.raises(VerificationError, match=r"second net \(Sequential\) does not run.*Runtime"):
        resconv.verify(first, broken, images)
    with pytest.raises(VerificationError, match=r"first net \(Sequential\) does not run"):
        resconv.verify(broken, first, images)
    folder = resconv.save(first, tmp_path, example_inputs=images)
    with pytest.raises(VerificationError, match="does not run on inputs of shape"):
        compare(folder, folder, shape="1,3,32")
    with pytest.raises(LoadError, match=r"a saved network.* is needed"):
        compare(folder, tmp_path / "nothing")


class Colour(enum.Enum):
    RED, BLUE = 1, 2


@dataclasses.dataclass
class Found:
    label: str
    score: torch.Tensor


VALUES = {
    "text": ("cat", "dog"),
    "whole number": (3, 4),
    "number": (0.5, 0.6),
    "complex": (1 + 2j, 1 - 2j),
    "truth": (True, False),
    "nothing": (None, 0.0),
    "array": (np.arange(3.0), np.arange(3.0) + 1),
    "array of texts": (np.array(["a", "b"]), np.array(["a", "c"])),
    "array's number": (np.float32(1), np.float32(2)),
    "choice": (Colour.RED, Colour.BLUE),
    "object": (Found("a", torch.ones(1)), Found("b", torch.ones(1))),
    "object's tensor": (Found("a", torch.ones(1)), Found("a", torch.zeros(1))),
    "complex tensor": (torch.ones(2) * 1j, torch.ones(2) * 2j),
    "sparse": (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
    "classes": (torch.tensor([100_000, 7]), torch.tensor([100_001, 7])),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("nest", [lambda v: (v,), lambda v: {"a": [v]}], ids=["tuple", "dict"])
def test_every_kind_of_output_is_compared(name, nest):
    value, other = VALUES[name]
    logits = torch.ones(2, 3)
    assert compare_outputs((logits, nest(value)), (logits.clone(), nest(value)))
    with pytest.raises(VerificationError):
        compare_outputs((logits, nest(value)), (logits.clone(), nest(other)))
    with pytest.raises(VerificationError, match="structure"):
        compare_outputs((logits, nest(value)), (logits, nest(value), logits))


def test_what_cannot_be_compared_is_named():
    logits = torch.ones(2)
    with pytest.raises(VerificationError, match=r"\[1\] is a generator, which cannot be compared"):
        compare_outputs((logits, (i for i in ())), (logits, (i for i in ())))


def test_each_output_has_the_tolerance_of_its_own_type():
    """A float64 beside a float32 output does not ask of it what float32 cannot give."""
    first = (torch.ones(3, dtype=torch.float64), torch.ones(3))
    rounded = (first[0].clone(), first[1] + 1e-6)
    found = compare_outputs(first, rounded)
    assert (found.tolerance, found.dtype) == (1e-4, "float32")
    with pytest.raises(VerificationError, match="allowed is 1e-10"):
        compare_outputs(first, (first[0] + 1e-6, first[1]))
