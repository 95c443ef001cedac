"""A module whose forward was rewritten is still the model's: its class, its call, both its modes."""

import copy
import inspect
import io
import multiprocessing
import pickle
import random

import pytest
import torch
from msgspec import ValidationError, convert
from msgspec.structs import replace
from torch import Tensor, nn
from torch.nn import functional as F

import resconv
from resconv.errors import ConversionError, PruneError, VerificationError
from resconv.surgery import conversion
from resconv.surgery.edit_kinds import Edit
from resconv.surgery.edits import apply_edits
from resconv.surgery.rewritten import PassThrough

from .helpers import edits_read_again, randomise, randomise_gates

WIDTH = 4


def conv_bn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH))


class Two(nn.Module):
    """Two branches in one forward, so that it has to change when one of them goes."""

    expansion = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mark = conv_bn(), conv_bn(), "kept"
        self.gain = nn.Parameter(torch.rand(WIDTH, 1, 1) + 0.5)

    def own(self) -> str:
        return self.mark

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gain * self.a(x)
        return F.relu(x + self.b(x))


class ByKeyword(Two):
    def forward(self, x, *, scale=1.0, flag=False, shift: float = 0.5, **unused):
        x = x + self.a(x)
        if flag:
            x = x * 2
        return F.relu(x + self.b(x) * scale) + shift


class AnyNumber(Two):
    def forward(self, x, *rest, **more):
        x = x + self.a(x)
        x = x + self.b(x)
        for each in rest:
            x = x + each
        return x + more.get("bias", 0)


class OtherName(Two):
    def forward(this, x, /, *unused, **never):  # noqa: N805
        x = x + this.a(x)
        return x + this.b(x)


class Nested(Two):
    def forward(self, x):
        x = x + self.a(x)
        y = F.relu(x + self.b(x))
        return {"all": (x, [y]), "last": y}


class Counts(nn.Module):
    """Containers are counted, indexed and walked through."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(conv_bn() for _ in range(3))

    def forward(self, x):
        for i in range(len(self.blocks)):
            x = x + F.relu(self.blocks[i](x))
        for _ in range(len(x.shape) - 3):
            x = F.relu(x)
        height, width = (size for size in x.shape[2:])
        for child in next(iter(self.children())):
            assert len(list(child.parameters())) >= 0
        return x.reshape(x.shape[0], WIDTH, height * width).reshape(
            x.shape[0], WIDTH, height, width
        )


class Dropping(Two):
    def forward(self, x):
        x = x + self.a(x)
        x = F.dropout(x, 0.5, self.training)
        return F.relu(x + self.b(x))


class ByHand(Two):
    """Stochastic depth, written by hand."""

    def thinned(self, x):
        if not self.training:
            return x
        return x * (0.5 + torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device)).floor()

    def forward(self, x):
        x = x + self.thinned(self.a(x))
        return F.relu(x + self.thinned(self.b(x)))


class OtherCode(Two):
    """The same branch, written once for each mode."""

    def forward(self, x):
        x = x + F.dropout(self.a(x), 0.3) if self.training else x + self.a(x)
        return F.relu(x + self.b(x))


class Helped(Two):
    """A head that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Conv2d(WIDTH, 2, 1)

    def forward(self, x):
        x = x + self.a(x)
        aux = self.aux(x) if self.training else None
        x = F.relu(x + self.b(x))
        return (x, aux) if self.training else x


class Tossing(Two):
    def forward(self, x):
        if self.training and random.random() < 0.5:
            return x
        x = x + self.a(x)
        return F.relu(x + self.b(x))


class TossingTensor(Two):
    def forward(self, x):
        if self.training and torch.rand(1).item() < 0.5:
            return x
        x = x + self.a(x)
        return F.relu(x + self.b(x))


CALLS = {
    "plain": lambda block, x: block(x),
    "keywords": lambda block, x: block(x, scale=0.5, flag=True, other=None),
    "all by name": lambda block, x: block(x=x, shift=2.0),
    "many": lambda block, x: block(x, x.mean(), 2 * x, bias=x.sum() / 100),
    "nested": lambda block, x: (lambda d: d["all"][0] + d["all"][1][0] + 2 * d["last"])(block(x)),
}
CASES = {
    "two branches": (Two, "plain"),
    "keywords": (ByKeyword, "keywords"),
    "all by name": (ByKeyword, "all by name"),
    "defaults": (ByKeyword, "plain"),
    "any number": (AnyNumber, "many"),
    "none of any number": (AnyNumber, "plain"),
    "another name for self": (OtherName, "plain"),
    "nested outputs": (Nested, "nested"),
    "counted containers": (Counts, "plain"),
    "dropout": (Dropping, "plain"),
    "stochastic depth": (ByHand, "plain"),
    "other code in training": (OtherCode, "plain"),
    "a head in training": (Helped, "plain"),
}


class Net(nn.Module):
    def __init__(self, block: nn.Module, call: str = "plain") -> None:
        super().__init__()
        self.stem, self.block, self.call = nn.Conv2d(3, WIDTH, 3, padding=1), block, call
        self.head = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x):
        y = CALLS[self.call](self.block, self.stem(x))
        return (self.head(y[0]), y[1]) if isinstance(y, tuple) else self.head(y)


def converted(block: nn.Module, call: str = "plain", units: str = "all"):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = randomise(Net(block, call).double(), 0, x)
    return randomise_gates(resconv.convert(net, x, units=units)), x


def in_training(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Run in training mode with frozen norms, and the same random numbers each time."""
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    torch.manual_seed(3)
    out = model(x)
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "open"])
@pytest.mark.parametrize("case", CASES)
def test_each_unit_of_a_rewritten_forward_goes_and_the_module_stays_itself(case, fuse):
    cls, call = CASES[case]
    gated, x = converted(cls(), call)
    rewritten = 0
    for unit in resconv.gates(gated):
        plan = resconv.Plan((unit,))
        compact = resconv.prune(gated, plan, fuse=fuse)
        resconv.verify(gated, compact, x, plan=plan)
        block = compact.block
        rewritten += type(block) is not cls
        assert isinstance(block, cls)
        assert (type(block).__name__, type(block).__module__) == (cls.__name__, cls.__module__)
        assert str(inspect.signature(block.forward)) == str(inspect.signature(cls().forward))
        assert [n for n, _ in block.named_children()] == [n for n, _ in cls().named_children()]
        if isinstance(block, Two):
            assert (block.own(), block.expansion, block.mark) == ("kept", 3, "kept")
        for back in (copy.deepcopy(compact), pickle.loads(pickle.dumps(compact))):
            assert type(back.block).__name__ == cls.__name__
            assert torch.equal(back(x), compact(x))
        sum(o.sum() for o in in_training(compact, x)).backward()
        used = [p for n, p in compact.named_parameters() if n != "block.gain"]
        assert all(p.grad is not None for p in used)
    assert rewritten


@pytest.mark.parametrize("unit", ["block/a.1", "block/b.1"])
@pytest.mark.parametrize("case", ["two branches", "dropout", "a head in training"])
def test_a_rewritten_forward_does_in_training_what_the_gated_net_does(case, unit):
    gated, x = converted(CASES[case][0](), units="blocks")
    compact = resconv.prune(gated, resconv.Plan((unit,)))
    dense = in_training(gated, x)
    with torch.no_grad():
        resconv.gates(gated)[unit].scale.zero_()
    wanted, found = in_training(gated, x), in_training(compact, x)
    assert len(wanted) == len(found) == (2 if case == "a head in training" else 1)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found[0], dense[0])  # with the branch it is another function


def test_dropout_and_stochastic_depth_are_still_there_in_training():
    for block in (Dropping(), ByHand(), OtherCode()):
        gated, x = converted(block, units="blocks")
        compact = resconv.prune(gated, resconv.Plan(("block/b.1",)))
        compact.eval()
        assert torch.equal(compact(x), compact(x))
        for m in compact.train().modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        runs = [compact(x) for _ in range(12)]
        assert not all(torch.equal(runs[0], r) for r in runs)


@pytest.mark.parametrize("block", [Tossing, TossingTensor])
def test_a_training_path_that_tosses_coins_is_refused_by_name(block):
    """Before anything is trained: convert leaves such units out, with that reason."""
    with pytest.raises(
        ConversionError, match=r"block .*training mode cannot be kept .*(random|numbers)"
    ):
        converted(block(), units="blocks")
    gated, _ = converted(Two(), units="blocks")  # the same without the coin
    assert list(resconv.gates(gated)) == ["block/a.1", "block/b.1"]


class Layered(nn.Module):
    """In eval mode nothing is left of it without its conv; in training it still drops."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.drop = nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU(), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.act(self.conv(x)))


def test_a_module_that_drops_in_training_does_not_become_an_identity():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3), nn.ReLU(), Layered(), nn.Conv2d(WIDTH, 2, 1)
    ).double()
    gated = randomise_gates(resconv.convert(net.eval(), x, units="layers"))
    compact = resconv.prune(gated, resconv.Plan(("2.conv",)))
    assert not [m for m in compact.modules() if isinstance(m, nn.ReLU)][1:]
    torch.manual_seed(1)
    assert not torch.equal(compact.train()(x), compact.eval()(x))


def test_a_second_rewrite_and_a_fuse_change_nothing_else():
    gated, x = converted(Dropping(), units="blocks")
    first = resconv.prune(gated, resconv.Plan(("block/a.1",)), fuse=False)
    second = resconv.prune(first, resconv.Plan(("block/b.1",)))
    at_once = resconv.prune(gated, resconv.Plan(("block/a.1", "block/b.1")))
    torch.testing.assert_close(second(x), at_once(x), rtol=1e-12, atol=1e-12)
    assert type(second.block).__mro__[1] is Dropping  # no class upon class
    torch.testing.assert_close(resconv.fuse(first)(x), first(x), rtol=1e-9, atol=1e-9)
    torch.manual_seed(0)
    assert not torch.equal(second.train()(x), second.eval()(x))


@pytest.mark.parametrize(
    "case", ["keywords", "dropout", "a head in training", "counted containers"]
)
def test_both_modes_are_replayed_from_plain_data(case):
    cls, call = CASES[case]
    gated, x = converted(cls(), call, units="blocks")
    compact = resconv.prune(gated, resconv.Plan((next(iter(resconv.gates(gated))),)))
    edits = edits_read_again(compact)
    again = apply_edits(Net(cls(), call).double().eval(), edits)
    again.load_state_dict(compact.state_dict())
    assert torch.equal(again(x), compact(x))
    for a, b in zip(in_training(again, x), in_training(compact, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["dropout", "a head in training"])
def test_a_saved_net_loads_with_both_modes(case, tmp_path):
    cls, _ = CASES[case]
    gated, x = converted(cls(), units="blocks")
    compact = resconv.prune(gated, resconv.Plan(("block/a.1",)))
    resconv.save(compact, tmp_path / "net")
    back = resconv.load(tmp_path / "net", model=Net(cls()).double())
    assert torch.equal(back.eval()(x), compact(x))
    for a, b in zip(in_training(back, x), in_training(compact, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "training",
    [
        {"nodes": [], "code": 3},
        {"nodes": [{"name": "a", "argument": -1}], "code": ""},
        {"nodes": [], "code": "", "branches": ["x"]},
        {"nodes": []},
        [],
    ],
)
def test_a_damaged_training_path_is_found_in_the_file(training):
    edit = {"op": "bypass", "path": "", "constants": {}, "nodes": [], "code": "", "removed": []}
    assert convert(edit, Edit).training is None
    sound = {"nodes": [{"name": "a", "argument": 0}], "code": "ff"}
    assert convert(edit | {"training": sound}, Edit).training.code == "ff"
    with pytest.raises(ValidationError, match=r"\.training"):
        convert(edit | {"training": training}, Edit)
    with pytest.raises(ValidationError, match=r"\.removed"):
        convert(edit | {"removed": [1]}, Edit)


def test_an_edit_of_an_earlier_version_is_replayed():
    # As it was written when a rewritten module became a GraphModule of its forward in eval mode.
    edit = {"op": "bypass", "path": "block", "constants": {}}
    passed = {"nodes": [{"name": "add_1", "argument": 0}], "code": "5e402d095a91dd78"}
    edit = convert(edit | passed, Edit)
    net = Net(Two()).double().eval()
    old = apply_edits(copy.deepcopy(net), [edit])
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y = net.stem(x)
    y = net.head(torch.relu(y + net.block.gain * net.block.a(y)))
    assert torch.equal(old(x), y)
    assert not [n for n, _ in old.block.named_parameters() if n.startswith("b")]
    with pytest.raises(PruneError, match="differs from the one that was pruned"):
        apply_edits(copy.deepcopy(net), [replace(edit, code="0")])


def test_a_rewritten_forward_names_the_argument_that_it_was_not_made_for():
    gated, x = converted(ByKeyword(), "keywords", units="blocks")
    compact = resconv.prune(gated, resconv.Plan(("block/a.1",)))
    y = compact.stem(x)
    with pytest.raises(
        AssertionError, match=r"ByKeyword was rewritten by resconv for the arguments"
    ):
        compact.block(y, scale=0.5, flag=False, other=None)
    with pytest.raises(TypeError, match="positional argument"):
        compact.block(y, 1, flag=True)


def _run_elsewhere(data: bytes, x: Tensor, results) -> None:
    try:
        results.put(pickle.loads(data)(x).detach().numpy())
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("form", ["gated", "open", "compact"])
def test_a_pickled_net_runs_in_a_spawned_process(form):
    gated, x = converted(Dropping())
    if form != "gated":
        plan = resconv.Plan(("block/a.1", "block.b.0"))
        gated = resconv.prune(gated, plan, fuse=form == "compact")
    file = io.BytesIO()
    torch.save(gated, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), gated(x))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_run_elsewhere, args=(pickle.dumps(gated), x, results))
    process.start()
    found = results.get(timeout=120)
    process.join()
    assert not isinstance(found, str), found
    torch.testing.assert_close(torch.from_numpy(found), gated(x).detach(), rtol=1e-9, atol=1e-9)


def test_a_compact_net_is_exported_and_compiled():
    gated, x = converted(Dropping(), units="blocks")
    compact = resconv.prune(gated, resconv.Plan(("block/a.1",)))
    exported = torch.export.export(compact, (x,)).module()
    torch.testing.assert_close(exported(x), compact(x), rtol=1e-9, atol=1e-9)
    compiled = torch.compile(compact, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), compact(x), rtol=1e-9, atol=1e-9)


class Marked(nn.Module):
    """One branch; what others read of it are plain attributes."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.f, self.index, self.conv = [-1, index], index, nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv.note = "a"

    def forward(self, x, unused=None):
        return x + self.conv(F.relu(x))


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 1)
        self.model = nn.Sequential(*(Marked(i) for i in range(3)))

    def forward(self, x):
        x, kept = self.stem(x), 0
        for m in self.model:
            x = m(x, unused=None)
            if m.f[1] == 1 and hasattr(m, "index"):
                kept = kept + x
        return x + 2 * kept


def test_what_stands_for_a_removed_module_keeps_its_attributes():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gated = randomise_gates(resconv.convert(randomise(Reads().double(), 0), x, units="blocks"))
    plan = resconv.Plan(tuple(resconv.gates(gated)))
    compact = resconv.prune(gated, plan)
    resconv.verify(gated, compact, x, plan=plan)
    assert [m.f for m in compact.model] == [[-1, 0], [-1, 1], [-1, 2]]
    assert all(type(m) is PassThrough for m in compact.model)
    assert not [n for n, _ in compact.model.named_parameters()]
    assert compact.model[0](x, unused=3) is x
    back = pickle.loads(pickle.dumps(compact))
    assert back.model[1].index == 1
    assert torch.equal(back(x), compact(x))


def test_a_module_without_attributes_of_its_own_gives_way_to_a_plain_identity():
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.ReLU(), Two(), nn.Conv2d(WIDTH, WIDTH, 1))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gated = randomise_gates(resconv.convert(randomise(net.double(), 0), x, units="layers"))
    compact = resconv.prune(gated, resconv.Plan(("2.a.0",)))
    assert not [m for m in compact.modules() if isinstance(m, PassThrough)]


class LooksInside(nn.Module):
    """Code that asks for what a removal takes away, without calling it."""

    def __init__(self, softly: bool) -> None:
        super().__init__()
        self.stem, self.block, self.softly = nn.Conv2d(3, WIDTH, 1), Marked(0), softly
        self.block.inner = nn.Module()
        self.last = nn.Conv2d(WIDTH, 2, 1)

    def forward(self, x):
        x = self.block(self.stem(x))
        if self.softly:
            return self.last(x) * (2 if hasattr(self.block, "inner") else 1)
        return self.last(x) * len(list(self.block.inner.children()))


@pytest.mark.parametrize(("softly", "said"), [(True, "something else"), (False, "does not run")])
def test_a_result_that_is_wrong_or_does_not_run_is_not_handed_out(softly, said, monkeypatch):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = LooksInside(softly).double().eval()
    # Nothing is trained first: the unit has no gate to begin with, and its reason is that.
    with pytest.raises(ConversionError, match=said):
        resconv.convert(net, x, units="blocks")
    (unit,) = [u for u in resconv.units(net, x) if u.kind == "block"]
    assert not unit.removable
    assert said in unit.reason
    # And what has one all the same is not handed out.
    monkeypatch.setattr(conversion, "why_prune_fails", lambda *args: {})
    gated = resconv.convert(net, x, units="blocks")
    with pytest.raises(VerificationError, match=said):
        resconv.prune(gated, resconv.Plan(tuple(resconv.gates(gated))))


def test_prune_leaves_the_random_numbers_of_the_user_alone():
    gated, _ = converted(ByHand())
    torch.manual_seed(5)
    random.seed(5)
    wanted = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    resconv.prune(gated, resconv.Plan(("block/a.1",)))
    assert torch.equal(torch.rand(3), wanted[0])
    assert random.random() == wanted[1]


def test_a_net_that_does_not_run_is_no_verified_net():
    gated, x = converted(Two())
    compact = resconv.fuse(gated)
    del compact.head
    with pytest.raises(VerificationError, match=r"does not run .*head"):
        resconv.verify(gated, compact, x)
