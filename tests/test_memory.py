"""Memory that a removal joins: what is written in place there, forward and backward."""

import copy
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resconv
from resconv.analysis.recorder import record
from resconv.analysis.saved import kept_for_backward
from resconv.errors import VerificationError
from resconv.surgery import rewriting
from resconv.surgery.inplace import Writes
from resconv.surgery.provenance import example_inputs_of

WIDTH = 4


def conv():
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


class Writer(nn.Module):
    """``before``, then the conv that goes, then ``after``, which writes into what the conv made."""

    def __init__(self, before, after):
        super().__init__()
        self.stem, self.goes, self.head = conv(), conv(), conv()
        self.before, self.after = before, after
        self.gain = nn.Parameter(torch.rand(WIDTH, 1, 1) + 0.5)

    def forward(self, x):
        kept = self.before(self.stem(x))
        return self.head(self.after(self, self.goes(kept), kept))


class Module(nn.Module):
    """The same, where a module writes."""

    def __init__(self, act):
        super().__init__()
        self.stem, self.first, self.goes, self.head = conv(), nn.Sigmoid(), conv(), conv()
        self.act = act

    def forward(self, x):
        return self.head(self.act(self.goes(self.first(self.stem(x)))))


def added(net, y, kept):
    y += kept.flip(1)
    return y


def doubled(net, y, kept):
    y += kept  # with the conv gone this is y + y
    return y


def gated(net, y, kept):
    return y.mul_(torch.sigmoid(kept.mean((2, 3), keepdim=True)))


def part(net, y, kept):
    y[:, :2].mul_(2).tanh_()
    return y


def chunks(net, y, kept):
    a, b = torch.chunk(y, 2, 1)
    return torch.cat([a.neg(), b], 1).mul_(kept)


def into(net, y, kept):
    # Autograd has no backward pass for out=; the numbers are what counts.
    with torch.no_grad():
        torch.mul(y, 2.0, out=y)
    return y + kept


FUNCTIONS = {
    "plus equals": added,
    "plus the same": doubled,
    "relu in place": lambda net, y, kept: F.relu(y.sub_(0.5), inplace=True),
    "hardswish in place": lambda net, y, kept: F.hardswish(y, inplace=True),
    "clamp_": lambda net, y, kept: y.clamp_(-0.2, 0.6),
    "times a gate": gated,
    "times a parameter": lambda net, y, kept: y.mul_(net.gain),
    "times what the conv read": lambda net, y, kept: y.mul_(kept),
    "read again later": lambda net, y, kept: y.mul_(2) + kept,
    "a part": part,
    "out=": into,
    "chunks": chunks,
}
BEFORE = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "sine": torch.sin,
    "view": lambda x: torch.sigmoid(x).flatten(1).view_as(x),
    "chunk": lambda x: torch.cat([x, x], 1).chunk(2, 1)[1],
    "unbound": lambda x: torch.stack([x, x.exp()]).unbind()[1],
    "expanded": lambda x: x.mean(1, keepdim=True).expand(-1, WIDTH, -1, -1),
}
ACTIVATIONS = {
    "ReLU": nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.3, inplace=True),
    "Hardswish": nn.Hardswish(inplace=True),
    "Hardsigmoid": nn.Hardsigmoid(inplace=True),
    "SiLU": nn.SiLU(inplace=True),
    "Mish": nn.Mish(inplace=True),
    "ELU": nn.ELU(inplace=True),
    "Dropout": nn.Dropout(0.5, inplace=True),
    "Dropout2d": nn.Dropout2d(0.5, inplace=True),
    "in a row": nn.Sequential(nn.Dropout(0.5, inplace=True), nn.SiLU(inplace=True)),
}


def images():
    return torch.randn(2, WIDTH, 6, 6, dtype=torch.float64)


def without_the_conv(net, x, fuse, **kwargs):
    """Return the converted net, its conv at scale 0, and the net without it."""
    torch.manual_seed(0)
    net = net.double()
    converted = resconv.convert(
        net, x, filter=lambda name, module: name != "stem", **{"units": "layers", **kwargs}
    )
    with torch.no_grad():
        for name, gate in resconv.gates(converted).items():
            gate.control.fill_(1.0)
            if name == "goes":
                gate.scale.zero_()
    return converted, resconv.prune(converted, resconv.Plan(("goes",)), fuse=fuse)


def gradients(net, x):
    """Return the outputs, and the gradients by the input and by the layer before the writes.

    The latter times the layer's weight: a factor may have gone into that.
    """
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    net.zero_grad()
    out = net.train()(x)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), x.grad, (net.stem.weight.grad * net.stem.weight).detach()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def nets():
    for before in BEFORE:
        for after in FUNCTIONS:
            yield pytest.param(Writer(BEFORE[before], FUNCTIONS[after]), id=f"{before}, {after}")
    for name, act in ACTIVATIONS.items():
        yield pytest.param(Module(act), id=name)


@pytest.mark.parametrize("fuse", [False, True], ids=["open", "fused"])
@pytest.mark.parametrize("net", nets())
def test_gradients_are_those_of_the_gated_net(net, fuse):
    x = images()
    converted, compact = without_the_conv(copy.deepcopy(net), x, fuse)
    for found, wanted in zip(gradients(compact, x), gradients(converted, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    resconv.verify(converted, compact, x)


@pytest.mark.parametrize(
    "net",
    [
        Writer(torch.relu, added),
        Writer(torch.sigmoid, FUNCTIONS["relu in place"]),
        Writer(torch.sin, FUNCTIONS["read again later"]),
        Writer(BEFORE["chunk"], FUNCTIONS["clamp_"]),
        Module(nn.Hardswish(inplace=True)),
        Module(nn.Dropout(0.5, inplace=True)),
    ],
)
def test_without_the_care_it_would_go_wrong(net, monkeypatch):
    monkeypatch.setattr(rewriting, "unsafe_writes", lambda *args: Writes())
    x = images()
    same = False
    with suppress(RuntimeError, VerificationError):  # autograd or prune's own comparison notices
        converted, compact = without_the_conv(net, x, True)
        wanted = gradients(converted, x)
        found = gradients(compact, x)
        same = all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))
    assert not same


def test_what_only_the_backward_pass_needs_costs_nothing_without_it():
    x = images()
    _, compact = without_the_conv(Writer(torch.relu, added), x, True)
    with torch.no_grad():
        assert compact.goes(x).data_ptr() == x.data_ptr()
    x.requires_grad_()
    assert compact.goes(x).data_ptr() != x.data_ptr()
    # What is read again in the forward pass is copied there, too.
    _, compact = without_the_conv(Writer(torch.relu, FUNCTIONS["read again later"]), images(), True)
    with torch.no_grad():
        assert compact.goes(x).data_ptr() != x.data_ptr()


def test_behind_frozen_layers_it_is_copied_all_the_same():
    # The parameter's gradient needs what the conv read, which needs none itself.
    def after(net, y, kept):
        return y.add_((kept * net.gain).flip(1))

    net = Writer(torch.sin, after)
    net.stem.requires_grad_(False)
    _, compact = without_the_conv(net, images(), True)
    compact.train()(images()).sum().backward()
    assert compact.gain.grad.abs().sum() > 0


class OtherNames(nn.Module):
    """Reads what was written by the name that the tensor had before."""

    def __init__(self, statement):
        super().__init__()
        self.stem, self.goes, self.also, self.head = conv(), conv(), conv(), conv()
        self.act, self.statement = nn.SiLU(inplace=True), statement

    def forward(self, x):
        kept = torch.sigmoid(self.stem(x))
        y = self.goes(kept)
        if self.statement:
            self.act(y)
            return self.head(y)
        older = y
        y += self.also(kept)
        return self.head(self.act(y) + older)


@pytest.mark.parametrize("units", ["layers", "all"])
@pytest.mark.parametrize("statement", [False, True])
def test_what_is_read_by_an_older_name_is_kept_or_refused(statement, units):
    x = images()
    converted = resconv.convert(OtherNames(statement).double(), x, units=units)
    removed = 0
    for name, gate in resconv.gates(converted).items():
        with torch.no_grad():
            if gate.control is not None:
                gate.control.fill_(1.0)
            gate.scale.zero_()
        plan = resconv.Plan((name,))
        try:
            compact = resconv.prune(converted, plan)
        except resconv.PruneError as error:
            assert "another name" in str(error)  # noqa: PT017
        else:
            resconv.verify(converted, compact, x)
            compact.train()(x).sum().backward()
            removed += 1
        with torch.no_grad():
            gate.scale.fill_(1.0)
    assert removed


def test_a_write_that_hurts_nothing_stays_in_place():
    net = Module(nn.ReLU(inplace=True))
    net.first = nn.Identity()  # a conv keeps nothing of what it made
    _, compact = without_the_conv(net, images(), True)
    assert compact.act.inplace
    assert isinstance(compact.goes, nn.Identity)


def test_copies_come_back_from_a_file(tmp_path):
    x = images()
    net = Writer(torch.relu, added)
    _, compact = without_the_conv(net, x, True)
    torch.manual_seed(0)
    resconv.save(compact, tmp_path / "net")
    loaded = resconv.load(tmp_path / "net", model=copy.deepcopy(net).double())
    for found, wanted in zip(gradients(loaded, x), gradients(compact, x), strict=True):
        assert torch.equal(found, wanted)


# What autograd keeps


OPERATIONS = {
    "add": lambda x, y: x + y,
    "times a value": lambda x, y: x * y,
    "times a number": lambda x, y: x * 2.0,
    "over a value": lambda x, y: x / (y + 10),
    "cat": lambda x, y: torch.cat([x, y]),
    "view": lambda x, y: x.flatten(1) + 0,
    "pad": lambda x, y: F.pad(x, (1, 1)),
    "nearest": lambda x, y: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x, y: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "mean": lambda x, y: x.mean((2, 3)),
    "shuffle": lambda x, y: F.pixel_shuffle(x, 2),
    "relu": lambda x, y: F.relu(x),
    "sigmoid": lambda x, y: x.sigmoid(),
    "tanh": lambda x, y: x.tanh(),
    "softmax": lambda x, y: x.softmax(1),
    "exp": lambda x, y: x.exp(),
    "hardswish": lambda x, y: F.hardswish(x),
    "silu": lambda x, y: F.silu(x),
    "gelu": lambda x, y: F.gelu(x),
    "mish": lambda x, y: F.mish(x),
    "elu": lambda x, y: F.elu(x),
    "leaky_relu": lambda x, y: F.leaky_relu(x),
    "relu6": lambda x, y: F.relu6(x),
    "clamp": lambda x, y: x.clamp(0, 1),
    "softplus": lambda x, y: F.softplus(x),
    "max_pool": lambda x, y: F.max_pool2d(x, 2),
    "avg_pool": lambda x, y: F.avg_pool2d(x, 2),
    "adaptive_pool": lambda x, y: F.adaptive_avg_pool2d(x, 2),
    "reflect": lambda x, y: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "convolution": lambda x, y: F.conv2d(x, torch.ones(4, 4, 3, 3, dtype=x.dtype) + y.mean()),
    "batch_norm": lambda x, y: F.batch_norm(x, x.new_zeros(4), x.new_ones(4), x.new_ones(4)),
    "layer_norm": lambda x, y: F.layer_norm(x, (4, 4)),
    "group_norm": lambda x, y: F.group_norm(x, 2),
    "matmul": lambda x, y: x @ y,
    "power": lambda x, y: x**3,
    "norm": lambda x, y: x.norm(dim=1, keepdim=True),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, y),
    "relu_": lambda x, y: F.relu_(x * 1.0),
    "leaky_relu_": lambda x, y: F.leaky_relu_(x * 1.0),
    "hardswish_": lambda x, y: F.hardswish(x * 1.0, inplace=True),
    "silu_": lambda x, y: F.silu(x * 1.0, inplace=True),
    "elu_": lambda x, y: F.elu_(x * 1.0),
    "relu6_": lambda x, y: F.relu6(x * 1.0, inplace=True),
    "sigmoid_": lambda x, y: (x * 1.0).sigmoid_(),
    "mul_": lambda x, y: (x * 1.0).mul_(y),
    "add_": lambda x, y: (x * 1.0).add_(y),
}
ONE_TOO_MANY = {"convolution", "power", "norm", "attention"}  # said to keep more than they do


class Applies(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_table_holds_what_autograd_keeps(name):
    x, y = torch.rand(2, 2, 4, 4, 4, dtype=torch.float64)
    graph = record(Applies(OPERATIONS[name]), (x, y))
    kept = {
        graph.values[v].memory
        for node in graph.nodes
        for v in sum(kept_for_backward(graph, node), ())
    }
    memory = [graph.values[v].memory for v in (*graph.inputs, *graph.outputs)]
    said = [m in kept for m in memory]
    seen = SimpleNamespace(places=set())
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    tensors = []

    def pack(tensor):
        tensors.append(tensor)  # alive, so that no other tensor gets its place
        seen.places.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = OPERATIONS[name](x, y)
    found = [t.untyped_storage().data_ptr() in seen.places for t in (x, y, out)]
    assert all(s or not f for s, f in zip(said, found, strict=True)), (said, found)
    if name not in ONE_TOO_MANY:
        assert said == found


# A net that writes into its input


class WritesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.goes, self.head = conv(), conv(), conv()

    def forward(self, x):
        x.mul_(2).sub_(1)
        x[:, :1] = 0.5
        return self.head(torch.relu(self.goes(torch.relu(self.stem(x)))))


def test_the_example_stays_as_it_was(tmp_path):
    pytest.importorskip("onnx")
    net, x = WritesItsInput().eval(), torch.randn(2, WIDTH, 6, 6)
    before = x.clone()
    assert resconv.profile(net, x).macs
    assert resconv.units(net, x)
    converted = resconv.convert(net, x, units="layers")
    with torch.no_grad():
        resconv.gates(converted)["goes"].control.fill_(1.0)
        resconv.gates(converted)["goes"].scale.zero_()
        converted(x.clone())
    plan = resconv.Plan(("goes",))
    compact = resconv.prune(converted, plan)
    # Seen twice, a written input would be another one the second time.
    resconv.verify(converted, compact, x, plan=plan)
    resconv.fuse(converted, x, fold_norms=True)
    resconv.recalibrate(compact, [x])
    resconv.export(compact, tmp_path / "net.pt2", x)
    assert torch.equal(x, before)
    with torch.no_grad():
        net(x)
    assert not torch.equal(x, before)  # on its own it does write


def test_the_example_of_a_converted_net_is_its_own():
    net, x = WritesItsInput().eval(), torch.randn(2, WIDTH, 6, 6)
    before = x.clone()
    converted = resconv.convert(net, x, units="layers")
    with torch.no_grad():
        converted(x)
    assert not torch.equal(x, before)
    made = example_inputs_of(None, converted)
    with torch.no_grad():
        converted(made)
    assert not torch.equal(made, example_inputs_of(None, converted))
