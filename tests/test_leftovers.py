"""A removed unit costs nothing at run time: op counts of the exported graph, and what is left over."""

from collections import Counter

import onnx
import pytest
import torch
from torch import nn

import resconv
from resconv import nets
from resconv.analysis.branches import find_blocks
from resconv.analysis.layers import find_layers
from resconv.analysis.ops import clamp_limits
from resconv.analysis.recorder import record
from resconv.nn.gates import is_leaf

from .helpers import randomise, randomise_gates, some_plan


def op_counts(path):
    graph = onnx.load(path).graph
    maker = {name: node.op_type for node in graph.node for name in node.output}
    doubled = [
        node.name
        for node in graph.node
        if node.op_type in ("Relu", "Clip") and maker.get(node.input[0]) == node.op_type
    ]
    return Counter(node.op_type for node in graph.node), doubled


def pruned(name, size, seed, share):
    """A net pruned by a random plan, the dense one, and how many convs the plan takes out."""
    model = randomise(nets.create(name))
    x = torch.randn(1, 3, size, size)
    gated = randomise_gates(resconv.convert(model, x), seed)
    plan = some_plan(gated, seed, share)
    compact = resconv.prune(gated, plan)
    assert resconv.leftovers(compact) == {}
    graph = record(gated, x, leaf=is_leaf)
    found = [*find_layers(gated, graph), *find_blocks(gated, graph)]
    gone = set().union(*(c.nodes for c in found if c.unit.name in plan.remove))
    removed = sum(bool(graph.nodes[i].macs) for i in gone)
    assert removed > 0
    return model, compact, x, removed


NETS = [
    ("resnet56", 32),
    ("torchvision:resnet18", 32),
    ("vgg16_bn", 32),
    ("timm:repvgg_a0", 32),
    ("timm:mobilenetv1_100", 32),
    ("torchvision:mobilenet_v2", 32),
    ("torchvision:densenet121", 32),
]


@pytest.mark.parametrize(("name", "size"), NETS)
@pytest.mark.parametrize(("seed", "share"), [(0, 0.3), (1, 0.5), (2, 0.8), (3, 1.1)])
def test_a_compact_net_has_no_leftovers(name, size, seed, share):
    model, compact, x, removed = pruned(name, size, seed, share)
    dense, graph = (record(resconv.fuse(m, x, fold_norms=True), x) for m in (model, compact))
    before, after = (Counter(n.op.removesuffix("_") for n in g.nodes) for g in (dense, graph))
    assert before["convolution"] - after["convolution"] == removed
    assert after["mul"] == before["mul"] == 0
    assert set(after) <= set(before)
    for node in graph.nodes:
        if clamp_limits(node):
            maker = graph.producer(node.inputs[0])
            assert maker.op in ("convolution", "add", "add_", "addmm", "native_batch_norm")
    assert all(after[op] <= before[op] for op in ("relu", "hardtanh", "add"))


@pytest.mark.parametrize(
    ("name", "size", "seed", "share"),
    [
        ("resnet20", 32, 1, 0.8),
        ("vgg16_bn", 32, 0, 0.5),
        ("timm:repvgg_a0", 32, 0, 0.7),
        ("timm:mobilenetv1_100", 32, 0, 0.8),
    ],
)
def test_an_exported_net_has_no_leftovers(name, size, seed, share, tmp_path):
    model, compact, x, removed = pruned(name, size, seed, share)
    dense = Counter(n.op for n in record(model, x).nodes)
    path = resconv.export(
        resconv.fuse(compact, x, fold_norms=True), tmp_path / "compact.onnx", x
    ).path
    counts, doubled = op_counts(path)
    assert counts["Conv"] == dense["convolution"] - removed
    assert not doubled
    assert not {"Mul", "Div", "Identity"} & set(counts)
    # Every activation that is left stands behind something that needs it.
    acts = counts["Relu"] + counts["Clip"]
    assert 0 < acts <= counts["Conv"] + counts["Add"]


class Shared(nn.Module):
    """A value that two graph outputs pin on both sides of a removed layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return x, torch.relu(self.mid(x))


def test_what_cannot_be_absorbed_is_one_multiply_and_is_reported(images):
    gated = randomise_gates(resconv.convert(randomise(Shared()).double(), images, units="layers"))
    plan = resconv.Plan(["mid"])
    compact = resconv.prune(gated, plan)
    resconv.verify(gated, compact, images, plan=plan)
    left = resconv.leftovers(compact)
    assert set(left) == {"mid"}
    assert left["mid"] == pytest.approx(resconv.gates(gated)["mid"].control.item())


class TwoLayers(nn.Module):
    """Both layers of a branch removed as layers: ``p2 * p1 * x + x``."""

    def __init__(self, swap, inplace):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)
        self.swap, self.inplace = swap, inplace

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.conv2(torch.relu(self.conv1(x)))
        if self.inplace:
            y += x
        else:
            y = x + y if self.swap else y + x
        return self.head(torch.relu(y))


@pytest.mark.parametrize(("swap", "inplace"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("with_block", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_sum_of_one_value_is_that_value_scaled(swap, inplace, with_block, fuse, images):
    model = randomise(TwoLayers(swap, inplace)).double()
    units = ("layers", "blocks") if with_block else "layers"
    gated = resconv.convert(model, images, units=units)
    gated = randomise_gates(gated, 2)
    plan = resconv.Plan(["conv1", "conv2"])
    compact = resconv.prune(gated, plan, fuse=fuse)
    resconv.verify(gated, compact, images, plan=plan)
    if not fuse:
        compact = resconv.fuse(compact)
    resconv.verify(gated, compact, images, plan=plan)
    assert resconv.leftovers(compact) == {}
    ops = [n.op for n in record(compact, images).nodes if n.op != "empty"]
    assert ops == ["convolution", "relu", "convolution"]
    with torch.no_grad():  # negative control: the factor is really there
        compact.stem.weight.mul_(0.99)
    with pytest.raises(resconv.ResConvError, match="disagree"):
        resconv.verify(gated, compact, images, plan=plan)


@pytest.mark.parametrize("controls", [(0.6, 1.4), (1.4, 0.6), (0.6, 0.7), (1.3, 1.4), (1.0, 1.0)])
def test_relu6_goes_on_the_side_that_no_longer_needs_it(controls, images):
    body = [nn.Conv2d(3, 8, 1), nn.ReLU6()]
    for _ in range(2):
        body += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6()]
    model = nn.Sequential(*body, nn.Conv2d(8, 2, 1)).double().eval()
    with torch.no_grad():
        model[0].weight.mul_(30)  # so that the upper limit is met
    gated = resconv.convert(model, images, units="layers")
    for (_, gate), control in zip(resconv.gates(gated).items(), controls, strict=True):
        with torch.no_grad():
            gate.control.fill_(control)
    plan = resconv.Plan(list(resconv.gates(gated)))
    compact = resconv.prune(gated, plan)
    resconv.verify(gated, compact, images, plan=plan)
    assert resconv.leftovers(compact) == {}
    ops = [n.op for n in record(compact, images).nodes if n.op != "empty"]
    assert ops == ["convolution", "hardtanh", "convolution"]


class Concat(nn.Module):
    """One value after each of several layers, side by side (VoVNet's block)."""

    def __init__(self, groups, norm):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
        self.mid = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)
        )
        self.norm = nn.BatchNorm2d(32) if norm else nn.Identity()
        self.head = nn.Conv2d(32, 32, 1, groups=groups)

    def forward(self, x):
        values = [self.stem(x)]
        for layer in self.mid:
            values.append(layer(values[-1]))
        y = torch.cat(values, 1)
        return self.head(self.norm(nn.functional.max_pool2d(torch.relu(y), 2)))


@pytest.mark.parametrize("groups", [1, 2, 32])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
def test_slices_of_a_concatenation_keep_their_own_factors(groups, norm, fuse, images):
    model = randomise(Concat(groups, norm)).double()
    gated = randomise_gates(resconv.convert(model, images, units="layers"), 2)
    plan = resconv.Plan(["mid.0.0", "mid.2.0"])
    compact = resconv.prune(gated, plan, fuse=fuse)
    resconv.verify(gated, compact, images, plan=plan)
    if fuse:
        assert resconv.leftovers(compact) == {}
    else:
        resconv.verify(gated, resconv.fuse(compact), images, plan=plan)


def test_a_concatenation_that_is_an_output_keeps_its_multiply(images):
    model = randomise(Concat(1, False)).double()
    model.head = nn.Identity()
    gated = randomise_gates(resconv.convert(model, images, units="layers"), 2)
    plan = resconv.Plan(["mid.0.0"])
    compact = resconv.prune(gated, plan)
    resconv.verify(gated, compact, images, plan=plan)
    assert set(resconv.leftovers(compact)) == {"mid.0.0"}


class BothPinned(nn.Module):
    """The stream before and after a branch is an output, so the branch keeps its factor."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return x, torch.relu(x + self.act(self.conv(x)))


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_a_branch_scale_of_one_does_not_lose_the_factor_inside(scale, images):
    gated = resconv.convert(randomise(BothPinned()).double(), images)
    found = resconv.gates(gated)
    block = next(n for n, g in found.items() if g.control is None)
    with torch.no_grad():
        found["conv"].control.fill_(0.5)
        found[block].scale.fill_(scale)
    plan = resconv.Plan(["conv"])
    compact = resconv.prune(gated, plan)
    resconv.verify(gated, compact, images, plan=plan)
    assert list(resconv.leftovers(compact).values()) == [pytest.approx(0.5 * scale)]
