"""Where a net comes from travels with every net, and keeps no batch of the user's alive."""

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import resconv
from resconv import nets
from resconv.analysis.input_spec import ExampleInputs
from resconv.preprocessing import Preprocessing
from resconv.surgery.edit_kinds import Children
from resconv.surgery.provenance import Provenance, carry, example_inputs_of, provenance_of

from .helpers import randomise, randomise_gates


def made(name, **kwargs):
    torch.manual_seed(0)
    return randomise(nets.create(name, **kwargs).double())


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def forms(net, x, tmp_path):
    """Yield the net in every form that resconv returns, with a word for it."""
    gated = randomise_gates(resconv.convert(net, x, units="all"))
    plan = resconv.Plan(tuple(resconv.gates(gated))[1:3])
    opened = resconv.prune(gated, plan, fuse=False)
    compact = resconv.prune(gated, plan)
    yield "gated", gated
    yield "open", opened
    yield "compact", compact
    yield "fused", resconv.fuse(opened)
    yield "folded", resconv.fuse(compact, fold_norms=True)
    for word, one in (("gated", gated), ("open", opened), ("compact", compact)):
        yield f"{word}, loaded", resconv.load(resconv.save(one, tmp_path / word))


def test_every_net_carries_one_record(tmp_path, x):
    net = made("resnet20", num_classes=4)
    names = ("a", "b", "c", "d")
    own = Preprocessing(
        size=32, mean=(0.5, 0.25, 0.1), std=(1, 2, 3), channel_order="BGR", class_names=names
    )
    mark = {"preprocessing": own, "class_names": names}
    carry(net, replace(provenance_of(net), **mark))
    before = 0
    for word, one in forms(net, x, tmp_path):
        names = [n for n in vars(one) if n.startswith("resconv")]
        assert names == ["resconv_provenance"], word
        known = provenance_of(one)
        assert (known.source.name, known.source.kwargs) == ("resnet20", {"num_classes": 4}), word
        assert known.class_names == mark["class_names"], word
        assert known.preprocessing == mark["preprocessing"], word
        assert known.inputs.spec.shape == x.shape, word
        assert (known.plan is None) is word.startswith("gated"), word
        assert known.training_form is word.startswith(("gated", "open")), word
        if word in ("gated", "open"):
            assert len(known.edits) >= before, word
            before = len(known.edits)
    assert any(isinstance(e, Children) for e in known.edits)
    assert provenance_of(nn.ReLU()) == Provenance()


def test_a_record_is_not_changed_by_what_is_made_of_it(x):
    net = made("resnet20")
    first = provenance_of(net)
    gated = randomise_gates(resconv.convert(net, x, units="all"))
    second, edits = provenance_of(gated), provenance_of(gated).edits
    resconv.prune(gated, resconv.Plan(tuple(resconv.gates(gated))[:2]))
    assert provenance_of(net) is first
    assert not first.edits
    assert provenance_of(gated) is second
    assert second.edits is edits
    with pytest.raises(AttributeError):
        second.plan = None


def test_a_net_converted_anew_goes_on_from_its_record(tmp_path, x):
    """Also where it was loaded; a plan is of the last pruning."""
    gated = randomise_gates(resconv.convert(made("resnet20"), x, units="all"))
    compact = resconv.prune(gated, resconv.Plan(("layer1.1",)))
    again = randomise_gates(resconv.convert(resconv.load(resconv.save(compact, tmp_path)), x))
    assert provenance_of(again).plan is None
    smaller = resconv.prune(again, resconv.Plan(("layer2.1",)))
    back = resconv.load(resconv.save(smaller, tmp_path / "second"))
    assert provenance_of(back).plan.remove == ("layer2.1",)
    assert torch.equal(back(x), smaller(x))


def test_records_are_copied_and_pickled_with_the_net(x):
    gated = resconv.convert(made("resnet20"), x)
    for again in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        assert provenance_of(again) == provenance_of(gated)
        assert list(resconv.gates(resconv.prune(again, resconv.Plan(("layer1.1",))))) == []


def reachable(net, size):
    """Return the tensors of so many elements that live on with the net."""
    gc.collect()
    own = {id(t) for t in (*net.parameters(), *net.buffers())}
    return [
        t
        for t in gc.get_objects()
        if type(t) is torch.Tensor and t.numel() == size and id(t) not in own
    ]


def test_no_batch_lives_on(tmp_path):
    """Nor a copy: the control is a net that keeps one."""
    batch = torch.randn(7, 3, 31, 29)
    size = batch.numel()
    net = nets.create("resnet20").eval()
    kept = dict(forms(net, batch, tmp_path))
    del batch
    assert all(not reachable(one, size) for one in kept.values())
    kept["gated"].batch = example_inputs_of(None, kept["gated"])
    assert len(reachable(kept["gated"], size)) == 1


class Words(nn.Module):
    """Tokens, a mask, and an image whose numbers are positive."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())

    def forward(self, tokens, mask, image):
        x = self.words(tokens) * mask[..., None] + image.log().mean((1, 2, 3))[:, None, None, None]
        return self.body(x.permute(0, 3, 1, 2)).mean((2, 3))


def words_inputs():
    gen = torch.Generator().manual_seed(3)
    tokens = torch.randint(50, (2, 8, 8), generator=gen)
    image = 0.1 + torch.rand(2, 3, 8, 8, generator=gen)
    return tokens, (tokens > 20).float(), image


def test_values_that_matter_are_kept_and_others_stay_in_their_range():
    given = words_inputs()
    inputs = ExampleInputs.of(given)
    tokens, mask, image = inputs.make()
    assert torch.equal(tokens, given[0])
    assert torch.equal(mask, given[1])
    assert not torch.equal(image, given[2])
    assert given[2].min() <= image.min()
    assert image.max() <= given[2].max()
    tokens.zero_()  # what is done to them changes nothing
    assert torch.equal(inputs.make()[0], given[0])
    assert torch.equal(inputs.make()[2], image)
    assert all(k is not g for k in inputs.kept.values() for g in given)


def test_what_is_kept_is_bounded():
    large = torch.randint(9, (2**18,))
    inputs = ExampleInputs.of({"a": large, "b": large[:9]})
    assert list(inputs.kept) == [1]
    drawn = inputs.make()["a"]
    assert drawn.shape == large.shape
    assert 0 <= int(drawn.min()) <= int(drawn.max()) <= 8


def test_a_net_that_needs_its_values_is_pruned_without_them():
    """Its logarithm of a random image would be no number."""
    gated = randomise_gates(resconv.convert(randomise(Words()), words_inputs(), units="layers"))
    compact = resconv.prune(gated, resconv.Plan(("body.0",)))
    resconv.verify(gated, compact, words_inputs(), plan=resconv.Plan(("body.0",)))


class Sorted(nn.Module):
    """Takes images whose rows are in order, and no others."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())

    def forward(self, x):
        if bool((x.diff(dim=-1) < 0).any()):
            raise ValueError("rows out of order")
        return self.body(x)


class Logarithm(Sorted):
    """Is finite on probabilities alone."""

    def forward(self, x):
        return self.body((1.0001 - x.sum(1, keepdim=True)).log() + x)


@pytest.mark.parametrize("cls", [Sorted, Logarithm])
def test_inputs_of_a_net_that_takes_no_random_ones_are_copied(cls):
    x = torch.rand(2, 3, 6, 6).sort(-1)[0]
    x = x / x.sum(1, keepdim=True)
    x = x.sort(-1)[0] if cls is Sorted else x
    gated = randomise_gates(resconv.convert(randomise(cls()), x, units="layers"))
    assert torch.equal(example_inputs_of(None, gated), x)
    assert example_inputs_of(None, gated) is not x
    compact = resconv.prune(gated, resconv.Plan(("body.0",)))
    resconv.verify(gated, compact, plan=resconv.Plan(("body.0",)))


class Pair(tuple):
    """A tuple of the user's own, which a description would lose."""


def test_inputs_without_a_description_are_copied():
    x = torch.rand(2, 3)
    given = Pair((x, 1))
    inputs = ExampleInputs.of({"pair": given, "sparse": torch.eye(3).to_sparse()})
    assert inputs.spec is None
    again = inputs.make()
    assert again["sparse"].layout == torch.sparse_coo
    assert torch.equal(again["pair"][0], x)
