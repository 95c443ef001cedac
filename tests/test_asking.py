"""Training mode is run only where something may do something else there; what is alike, once."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resconv
from resconv.analysis.recorder import record
from resconv.surgery.edits import indexed_containers

from .helpers import randomise, randomise_gates


class Block(nn.Module):
    """A residual block, to be made to ask for its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def branch(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        return F.relu(self.branch(x) + x)


class Asks(Block):
    def forward(self, x):
        return F.relu(self.branch(F.dropout(x, 0.5, self.training)) + x)


class Helped(Block):
    def drop(self, x):
        return x * 0.5 if getattr(self, "training") else x  # noqa: B009 (no name in the code)

    def forward(self, x):
        return F.relu(self.drop(self.branch(x)) + x)


class Switched(Block):
    """Knows its mode by other means than the attribute."""

    deployed = False

    def train(self, mode=True):
        self.deployed = not mode
        return super().train(mode)

    def forward(self, x):
        return F.relu(self.branch(x) * (1.0 if self.deployed else 2.0) + x)


class Dropout(Block):
    p = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(self.p)

    def branch(self, x):
        return self.drop(super().branch(x))


class NoDropout(Dropout):
    p = 0.0


def hooked() -> nn.Module:
    block = Block()
    block.register_forward_hook(lambda m, args, y: y * 2 if m.training else y)
    return block


def looking_first() -> nn.Module:
    block = Block()
    block.register_forward_pre_hook(lambda m, args: (args[0] * 2,) if m.training else None)
    return block


def scripted() -> nn.Module:
    return nn.Sequential(Block(), torch.jit.script(nn.Dropout(0.5)))


IMAGES = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [Asks, Helped, Switched, Dropout, hooked, looking_first, scripted])
@pytest.mark.parametrize("nested", [False, True])
def test_a_forward_that_may_do_something_else_in_training_mode_is_known(make, nested):
    model = make().double()
    assert record(nn.Sequential(model, nn.ReLU()) if nested else model, IMAGES).asking


@pytest.mark.parametrize("make", [Block, NoDropout])
def test_a_forward_that_does_not_ask_for_its_mode_is_known(make):
    model = nn.Sequential(make(), Asks(), nn.ReLU()).double()
    graph = record(model, IMAGES)
    asking = {graph.calls[i].path for i in graph.asking}
    assert asking == {"", "1"}  # the call that asks, and those around it
    assert not hasattr(nn.Module, "training")  # nothing stays on torch's class


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))


COUNTS: list[bool] = []


def counted(*args) -> None:
    COUNTS.append(vars(args[0])["training"])  # without asking


@pytest.mark.parametrize(("kind", "convert", "prune"), [(Block, 5, 2), (Dropout, 8, 4)])
def test_a_surgery_runs_the_net_no_more_often_than_it_has_to(kind, convert, prune):
    net = randomise(Net(kind(), kind(), kind()).double(), 0, IMAGES)
    net.register_forward_pre_hook(counted)  # copies of the net count in the same list
    COUNTS.clear()
    gated = resconv.convert(net, IMAGES)
    # The net, on its inputs and on those described; the gated net; the gated net without units and
    # the compact net, in each mode in which they may differ. There, which units run in training mode, too.
    assert len(COUNTS) == convert
    randomise_gates(gated)
    COUNTS.clear()
    resconv.prune(gated, resconv.Plan(("blocks.1",)))
    assert len(COUNTS) == prune


class Turned(Block):
    """Blocks of one class whose forwards differ by a flag."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x):
        y = self.branch(x)
        y = x + y if self.first else y + x
        return F.relu(y) if self.first else F.relu(F.relu(y) + x)


@pytest.mark.parametrize("fuse", [False, True])
def test_blocks_that_are_alike_and_blocks_that_are_not_are_told_apart(fuse):
    flags = (True, True, False, True, False)
    net = randomise(Net(*(Turned(f) for f in flags)).double(), 0, IMAGES)
    gated = randomise_gates(resconv.convert(net, IMAGES))
    every = tuple(resconv.gates(gated))
    for names in (every[::2], every[1::2]):
        plan = resconv.Plan(names)
        compact = resconv.prune(gated, plan, fuse=fuse)
        assert resconv.verify(gated, compact, IMAGES, plan=plan).max_rel_error < 1e-10
        # Negative control: other units are not these.
        other = resconv.Plan(tuple(n for n in every if n not in names))
        with pytest.raises(resconv.errors.VerificationError):
            resconv.verify(gated, compact, IMAGES, plan=other)


def test_who_indexes_a_sequential_is_seen_by_its_own_thread_and_the_class_is_put_back():
    """Two recordings overlap in two threads; the one that began first ends first."""
    before = nn.Sequential.__getitem__
    first, second = (nn.Sequential(nn.ReLU(), nn.Tanh()) for _ in range(2))
    begun, ended, found = threading.Event(), threading.Event(), []

    def other():
        with indexed_containers() as seen:
            begun.set()
            assert ended.wait(30)
            found.append((second[0], second[-1:], set(seen)))

    thread = threading.Thread(target=other)
    with indexed_containers() as seen:
        thread.start()
        assert begun.wait(30)
        assert isinstance(first[1], nn.Tanh)
    assert seen == {id(first)}
    ended.set()
    thread.join()
    ((module, part, theirs),) = found
    assert module is second[0]
    assert len(part) == 1
    assert theirs == {id(second)}
    assert nn.Sequential.__getitem__ is before


def test_a_wrapper_that_someone_else_puts_on_meanwhile_stays(monkeypatch):
    monkeypatch.setattr(nn.Sequential, "__getitem__", nn.Sequential.__getitem__)
    with indexed_containers():
        ours = nn.Sequential.__getitem__

        def theirs(self, index):
            return ours(self, index)

        nn.Sequential.__getitem__ = theirs
    assert nn.Sequential.__getitem__ is theirs
    net = nn.Sequential(nn.ReLU())
    with indexed_containers() as seen:
        assert isinstance(net[0], nn.ReLU)
    assert seen == {id(net)}
    assert nn.Sequential.__getitem__ is theirs
