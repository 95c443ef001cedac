"""Units beyond the identity: any summand, a conv in a segment's place, a gate that multiplies."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resconv
from resconv.nn.gates import Segment, zeroed
from resconv.planning.costs import cost_model
from resconv.surgery.provenance import example_inputs_of

from .helpers import randomise

KINDS = ("summands", "segments", "gates")
W = 4


def images(n=2, channels=3, side=9, dims=2):
    return torch.randn(n, channels, *[side] * dims, dtype=torch.float64)


def built(net, seed=0):
    torch.manual_seed(seed)
    return randomise(net, seed).double()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def fill_left(gated, seed=0):
    """Give what segments leave numbers of their own: at zero nothing would be proved."""
    gen = torch.Generator().manual_seed(seed)
    for gate in resconv.gates(gated).values():
        if isinstance(gate, Segment):
            for name, t in gate.left.state_dict().items():
                if t.is_floating_point():
                    some = torch.randn(t.shape, generator=gen, dtype=t.dtype)
                    t.copy_(some.abs() + 0.5 if name.endswith("running_var") else 0.5 * some)
    return gated


def pairs(names, excluded):
    """Every unit, and two that can go together."""
    every = [(n,) for n in names]
    # Of many units those that follow each other.
    every += [*itertools.combinations(names, 2)] if len(names) < 6 else [*itertools.pairwise(names)]
    for plan in every:
        if not any(b in excluded.get(a, ()) for a in plan for b in plan):
            yield plan


def laws(net, x, units="all", **options):
    """Outputs kept, exact at 0, both orders of removal the same, costs as promised, files too."""
    before = net(x)
    gated = fill_left(resconv.convert(net, x, units=units, **options)).eval()
    close(gated(x), before)
    costs = cost_model(gated, x)
    assert costs.macs == resconv.profile(net, x).macs
    with torch.no_grad():
        for gate in resconv.gates(gated).values():
            if gate.control is not None:
                gate.control.fill_(0.7)
    before = gated(x)
    for plan in (*pairs(costs.names, costs.excluded), costs.compatible(costs.names)):
        with zeroed(gated, plan), torch.no_grad():
            promised = gated(x)
        assert not torch.allclose(promised, gated(x))
        compact = resconv.prune(gated, resconv.Plan(plan))
        close(compact(x), promised)
        assert resconv.profile(compact, x).macs == costs.left(plan).macs
        assert not any(isinstance(m, Segment) for m in compact.modules())
        half = resconv.prune(gated, resconv.Plan(plan[:1]), fuse=False)
        rest = tuple(n for n in plan[1:] if n in resconv.gates(half))
        twice = resconv.prune(half, resconv.Plan(rest)) if rest else resconv.fuse(half)
        close(twice(x), promised)
    close(resconv.fuse(gated)(x), before)
    return gated


def names_of(gated, kind):
    costs = cost_model(gated, example_inputs_of(None, gated))
    return [n for n in costs.names if costs.kinds[n].startswith(kind)]


# --- summands ---


class Projected(nn.Module):
    """A block whose shortcut is a conv, in the forms in which a sum is written."""

    def __init__(self, how="a+b", act="relu"):
        super().__init__()
        self.conv1 = nn.Conv2d(W, 2 * W, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * W)
        self.conv2 = nn.Conv2d(2 * W, 2 * W, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * W)
        self.short = nn.Sequential(nn.Conv2d(W, 2 * W, 1, 2, bias=False), nn.BatchNorm2d(2 * W))
        self.how, self.act = how, {"relu": F.relu, "silu": F.silu, "none": lambda y: y}[act]

    def forward(self, x):
        b = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        a = self.short(x)
        if self.how == "a+b":
            y = a + b
        elif self.how == "b+a":
            y = b + a
        elif self.how == "a-b":
            y = a - b
        elif self.how == "alpha":
            y = torch.add(a, b, alpha=0.5)
        elif self.how == "sum":
            y = sum([a, b])
        elif self.how == "b+=a":
            b += a
            y = b
        return self.act(y)


def around(*blocks):
    return nn.Sequential(nn.Conv2d(3, W, 3, padding=1), nn.ReLU(), *blocks)


@pytest.mark.parametrize("act", ["relu", "silu", "none"])
@pytest.mark.parametrize("how", ["a+b", "b+a", "a-b", "alpha", "sum", "b+=a"])
def test_either_side_of_a_sum_can_go(how, act):
    net, x = built(around(Projected(how, act))), images()
    gated = laws(net, x, "summands")
    found = names_of(gated, "summand")
    # With a factor of its own, the second side cannot be what is left.
    assert found == (["2/short.1"] if how == "a-b" else found) or how in ("a-b", "alpha")
    expected = 1 if how in ("a-b", "alpha") else 2
    assert len(found) == expected
    assert "2/bn2" in found


def test_of_a_sum_one_side_stays():
    net, x = built(around(Projected())), images()
    gated = resconv.convert(net, x, units="summands")
    costs = cost_model(gated, x)
    assert costs.excluded == {
        "2/bn2": frozenset({"2/short.1"}),
        "2/short.1": frozenset({"2/bn2"}),
    }
    assert costs.compatible(costs.names) == ("2/bn2",)
    with pytest.raises(resconv.ResConvError, match="Only one side of the sum in 2 can go"):
        resconv.prune(gated, resconv.Plan(("2/bn2", "2/short.1")))
    with pytest.raises(resconv.ResConvError, match="cannot be reached"):
        resconv.plan(gated, resconv.Budget(macs=0.01))
    with torch.no_grad():
        for gate in resconv.gates(gated).values():
            gate.scale.zero_()
    # Trained to 0 on both sides the net still is what it computes.
    close(resconv.fuse(gated)(x), gated(x))


class Pyramid(nn.Module):
    """Top-down sums, as in FPN: a lateral conv meets what comes from the level above."""

    def __init__(self):
        super().__init__()
        self.c1 = nn.Sequential(nn.Conv2d(3, W, 3, 1, 1), nn.ReLU())
        self.c2 = nn.Sequential(nn.Conv2d(W, W, 3, 2, 1), nn.ReLU())
        self.lateral1, self.lateral2 = nn.Conv2d(W, W, 1), nn.Conv2d(W, W, 1)
        self.out1, self.out2 = nn.Conv2d(W, W, 3, 1, 1), nn.Conv2d(W, W, 3, 1, 1)

    def forward(self, x):
        c1 = self.c1(x)
        c2 = self.c2(c1)
        p2 = self.lateral2(c2)
        p1 = self.lateral1(c1) + F.interpolate(p2, size=c1.shape[2:])
        return torch.cat([self.out1(p1).flatten(1), self.out2(p2).flatten(1)], 1)


def test_laterals_of_a_pyramid_can_go():
    net, x = built(Pyramid()), images(side=8)
    gated = laws(net, x, "summands")
    assert names_of(gated, "summand") == ["root/lateral1"]


class Hourglass(nn.Module):
    """The deeper level of a U with sums: all that only it needs leaves with it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, W, 3, 1, 1), nn.ReLU())
        self.down = nn.Conv2d(W, W, 3, 2, 1)
        self.low = nn.Sequential(nn.Conv2d(W, W, 3, 1, 1), nn.ReLU())
        self.up = nn.ConvTranspose2d(W, W, 2, 2)
        self.skip = nn.Conv2d(W, W, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.skip(x) + self.up(self.low(self.down(x)))


def test_what_only_a_summand_needs_leaves_with_it():
    net, x = built(Hourglass()), images(side=8)
    gated = laws(net, x, ("layers", "summands"))
    costs = cost_model(gated, x)
    assert costs.within("low.0", "root/up")
    only = resconv.prune(gated, resconv.Plan(("root/up",)))
    assert resconv.profile(only, x).num_convs == 2
    # Counted once, whether the layer inside it is named or not.
    assert costs.cost_of(("root/up", "low.0")) == costs.cost_of(("root/up",))


# --- segments ---


def cbr(c_in, c_out, k=3, act=nn.ReLU, dims=2, **kwargs):
    conv, norm = (
        (nn.Conv1d, nn.BatchNorm1d),
        (nn.Conv2d, nn.BatchNorm2d),
        (nn.Conv3d, nn.BatchNorm3d),
    )[dims - 1]
    kwargs.setdefault("padding", k // 2)
    return [conv(c_in, c_out, k, **kwargs), norm(c_out), act()]


class Inverted(nn.Sequential):
    def __init__(self, c_in, c_out, stride, act=nn.ReLU6, dims=2):
        mid = 6 * c_in
        super().__init__(
            *cbr(c_in, mid, 1, act, dims),
            *cbr(mid, mid, 3, act, dims, stride=stride, groups=mid),
            *cbr(mid, c_out, 1, nn.Identity, dims),
        )


class Branches(nn.Module):
    """Three branches that are concatenated, one of them through a pooling."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(*cbr(W, 24, 3), *cbr(24, 2, 3, stride=2))
        self.b = nn.Sequential(nn.MaxPool2d(3, 2, 1), *cbr(W, 2, 3))
        self.c = nn.Conv2d(W, 2, 1, 2)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x), self.c(x)], 1)


class Functional(nn.Module):
    """Ends in an activation that is no module."""

    def __init__(self, act):
        super().__init__()
        self.conv1, self.bn1, self.act1 = cbr(W, 24)
        self.conv2, self.bn2, _ = cbr(24, 6, stride=2)
        self.act = act

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))


SEGMENTS = {
    "inverted": lambda: Inverted(W, 6, 2),
    "same size": lambda: Inverted(W, 6, 1),
    "dilated": lambda: nn.Sequential(*cbr(W, 24, dilation=2, padding=2), *cbr(24, 6, stride=2)),
    "grouped": lambda: nn.Sequential(*cbr(W, 24, groups=2), *cbr(24, 6, groups=2, stride=2)),
    "no padding": lambda: nn.Sequential(*cbr(W, 24, padding=0), *cbr(24, 6, padding=0)),
    "pooled": lambda: nn.Sequential(*cbr(W, 24), *cbr(24, 6), nn.MaxPool2d(2)),
    "branches": Branches,
    "kernels 1x3": lambda: nn.Sequential(
        nn.Conv2d(W, 24, (1, 3), padding=(0, 1)),
        nn.ReLU(),
        nn.Conv2d(24, 6, (3, 1), (2, 1), (1, 0)),
    ),
    "relu": lambda: Functional(F.relu),
    "relu in place": lambda: Functional(lambda y: F.relu(y, inplace=True)),
    "relu6": lambda: Functional(F.relu6),
    "silu": lambda: Functional(F.silu),
    "leaky": lambda: Functional(lambda y: F.leaky_relu(y, 0.3)),
    "gelu tanh": lambda: Functional(lambda y: F.gelu(y, approximate="tanh")),
}


def only_segments(net, x, **options):
    return laws(net, x, "segments", **options)


def segmented(name, tail=True):
    block = SEGMENTS[name]()
    return built(nn.Sequential(nn.Conv2d(3, W, 1), block, *([nn.Conv2d(6, 5, 1)] if tail else [])))


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_conv_can_stand_for_a_segment(name):
    net, x = segmented(name), images(side=8)
    gated = only_segments(net, x)
    assert set(resconv.gates(gated)) == ({"1", "1.a"} if name == "branches" else {"1"})
    gate = resconv.gates(gated)["1"]
    compact = resconv.prune(gated, resconv.Plan(("1",)))
    left = compact.get_submodule("1")
    inside = [left] if not isinstance(left, nn.Sequential) else list(left)
    assert all(type(m).__module__.startswith("torch.nn") for m in inside)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in inside)
    assert len(inside) <= len(gate.left)
    # Other sizes than the example's.
    for side in (8, 9, 11, 14):
        other = images(1, side=side)
        with zeroed(gated, ["1"]):
            close(compact(other), gated(other))
    assert resconv.units(compact, x)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["dense", "pointwise", "separable"])
def test_kinds_of_shortcuts_in_all_dimensions(kind, dims):
    stem = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 8, 1)
    net = built(nn.Sequential(stem, Inverted(8, 10, 2, dims=dims), nn.Flatten(1)))
    x = images(side=6, dims=dims)
    gated = laws(net, x, "segments", shortcut_kinds=[kind])
    convs = [m for m in resconv.gates(gated)["1"].left if hasattr(m, "kernel_size")]
    assert len(convs) == (2 if kind == "separable" else 1)
    assert set(convs[0].kernel_size) == ({1} if kind == "pointwise" else {3})
    assert convs[0].groups == (8 if kind == "separable" else 1)


def test_the_fit_of_a_linear_segment_is_exact():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Conv2d(W, 40, 1), nn.Conv2d(40, 6, 3, 2, 1), nn.BatchNorm2d(6))
    net = built(nn.Sequential(nn.Conv2d(3, W, 1), linear, nn.ReLU()))
    x, batches = images(), [(images(8), torch.zeros(8)) for _ in range(3)]
    gated = resconv.convert(net, x, units="segments", batches=batches, shortcut_kinds=["dense"])
    gate = resconv.gates(gated)["1"]
    assert gate.residual < 1e-5
    with zeroed(gated, ["1"]):
        assert resconv.analysis is not None
        error = (gated(x) - net(x)).abs().max() / net(x).abs().max()
    assert error < 1e-2  # the ridge, and the padding of what lies between, are all that differs
    # A small kernel cannot, and says so.
    other = resconv.convert(net, x, units="segments", batches=batches, shortcut_kinds="pointwise")
    assert resconv.gates(other)["1"].residual > 0.1


def test_the_fit_is_the_best_of_its_kind():
    net, x = segmented("inverted"), images(side=8)
    batches = [images(16, side=8) for _ in range(2)]
    for kind in ("dense", "pointwise", "separable"):
        gated = resconv.convert(
            net, x, units="segments", batches=batches, shortcut_kinds=[kind]
        ).eval()
        gate = resconv.gates(gated)["1"]
        stem = gated.get_submodule("0")
        with torch.no_grad():
            inputs = torch.cat([stem(b) for b in batches])
            wanted, found = gate.module(inputs), gate.left(inputs)
            spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
            residual = float((wanted - found).square().mean() / spread)
            assert residual == pytest.approx(gate.residual, abs=2e-2)
            assert 0 < residual < 1
            # Any step away from it is worse.
            last = [m for m in gate.left if hasattr(m, "kernel_size")][-1]
            for seed in range(3):
                torch.manual_seed(seed)
                step = 0.05 * last.weight.abs().mean() * torch.randn_like(last.weight)
                last.weight += step
                worse = (wanted - gate.left(inputs)).square().mean() / spread
                last.weight -= step
                assert worse > residual


def test_units_report_what_is_left_and_how_well_it_fits():
    net, x = segmented("inverted"), images(side=8)
    batches = [images(8, side=8) for _ in range(2)]
    (found,) = [u for u in resconv.units(net, x, "segments", batches=batches) if u.removable]
    assert "conv" in found.left
    assert 0 < found.residual < 1
    gated = resconv.convert(net, x, units="segments", batches=batches)
    costs = cost_model(gated, x)
    assert costs.cost_of(["1"]).macs == found.macs
    (again,) = resconv.units(gated, x, "segments")
    assert again.macs == found.macs
    assert again.residual == found.residual
    (bare,) = [u for u in resconv.units(net, x, "segments") if u.removable]
    assert bare.residual is None


def test_without_data_a_conv_starts_at_its_own_kernel():
    net = built(nn.Sequential(nn.Conv2d(3, W, 1), nn.Conv2d(W, 8, 3, 1, 1), nn.ReLU()))
    x = images()
    gated = resconv.convert(net, x, units="segments", shortcut_kinds="pointwise")
    conv, own = resconv.gates(gated)["1"].left[0], net[1]
    close(conv.weight[:, :, 0, 0], own.weight.sum((2, 3)))
    close(conv.bias, own.bias)
    flat = torch.ones(1, 3, 9, 9, dtype=torch.float64)
    with zeroed(gated, ["1"]):  # where nothing changes from place to place, they are the same
        close(gated(flat)[..., 1:-1, 1:-1], net(flat)[..., 1:-1, 1:-1])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Inverted(W, 6, 2)
        self.other = nn.Conv2d(3, 6, 1, 2)

    def forward(self, x, image):
        return self.body(x) * self.other(image)


class Indexed(nn.Module):
    """Reads single layers of a part that it calls as a whole, too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, W, 1)
        self.body = Inverted(W, 6, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.body(x).mean() + self.body[0].weight.mean()


class WritesIntoInput(nn.Sequential):
    def forward(self, x):
        return super().forward(F.relu_(x))


class Up(nn.Sequential):
    def __init__(self):
        super().__init__(*cbr(W, 24, 1), nn.Upsample(scale_factor=2), *cbr(24, 6, 1))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: WritesIntoInput(*cbr(W, 24, 1), *cbr(24, 6, 1)), "writes into its input"),
        (Up, "no strided window turns size 9x9 into 18x18"),
        (
            lambda: nn.Sequential(*cbr(W, 24, 1), nn.ConvTranspose2d(24, 6, 2, 2)),
            "no strided window",
        ),
    ],
)
def test_what_no_conv_can_stand_for_says_why(block, reason):
    net, x = built(nn.Sequential(nn.Conv2d(3, W, 1), block())), images()
    found = {u.name: u.reason for u in resconv.units(net, x, "segments")}
    assert reason in found["1"]


def test_a_module_that_is_called_twice_or_indexed_is_no_segment():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, W, 1), Inverted(W, 6, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.body(x) + self.body(-x)

    for net in (built(Twice()), built(Indexed())):
        kept = resconv.units(net, images(), "segments")
        assert all(u.name != "body" or not u.removable for u in kept)


def test_a_segment_scaled_between_keeps_both_sides():
    net, x = segmented("inverted"), images(side=8)
    gated = fill_left(resconv.convert(net, x, units="segments")).eval()
    with torch.no_grad():
        resconv.gates(gated)["1"].scale.fill_(0.3)
    fused = resconv.fuse(gated)
    close(fused(x), gated(x))
    assert resconv.leftovers(fused) == {"1": pytest.approx(0.3)}


def test_the_shortcut_trains_as_the_segment_fades():
    net, x = segmented("inverted"), images(side=8)
    gated = resconv.convert(net, x, units="segments").train()
    gate = resconv.gates(gated)["1"]
    fill_left(gated)
    gated(x).square().mean().backward()
    assert gate.scale.grad.abs() > 0
    assert all(p.grad is None for p in gate.left.parameters())
    with torch.no_grad():
        gate.scale.fill_(0.5)
    gated(x).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in gate.left.parameters())
    # Held at 0, the segment itself need not run.
    with torch.no_grad():
        gate.scale.zero_()
    gated.eval()
    whole = gated(x)
    for m in gated.modules():
        m.training = not isinstance(m, nn.modules.batchnorm._BatchNorm)
    gate.skipped = True
    close(gated(x), whole)


# --- gates ---


class SqueezeExcite(nn.Module):
    def __init__(self, gate=torch.sigmoid, swapped=False):
        super().__init__()
        self.down, self.up = nn.Conv2d(W, 2, 1), nn.Conv2d(2, W, 1)
        self.gate, self.swapped = gate, swapped

    def forward(self, x):
        g = self.gate(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return g * x if self.swapped else x * g


class Spatial(nn.Module):
    """One number a position, as in the second half of CBAM."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(pooled))


@pytest.mark.parametrize(
    "block", [SqueezeExcite, Spatial, lambda: SqueezeExcite(F.hardsigmoid, True)]
)
def test_a_gate_leaves_what_it_multiplies(block):
    net, x = built(around(block(), nn.Conv2d(W, W, 3, padding=1))), images()
    gated = laws(net, x, "gates")
    assert names_of(gated, "gate") == ["2"]
    compact = resconv.prune(gated, resconv.Plan(("2",)))
    rest = copy.deepcopy(net)
    del rest[2]
    close(compact(x), rest(x))


class Attention(nn.Module):
    """Returns the factor, in a shape of its own; the product is in the caller's forward."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x):
        return torch.sigmoid(self.fc(x.mean((2, 3))))


class Attending(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(W, W, 3, padding=1), nn.BatchNorm2d(W)
        self.attention, self.how = Attention(), how

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        g = self.attention(y)[:, :, None, None]
        if self.how == "expanded":
            g = g.expand_as(y)
        if self.how == "in place":
            y *= g
            return x + y
        return x + (g * y if self.how == "g*x" else y * g)


@pytest.mark.parametrize("how", ["x*g", "g*x", "expanded", "in place"])
def test_a_factor_computed_elsewhere_can_go(how, tmp_path):
    net, x = built(around(Attending(how), nn.Conv2d(W, W, 3, padding=1))), images()
    gated = laws(net, x, "gates")
    assert names_of(gated, "gate") == ["2.attention"]
    laws(net, x, ("layers", "blocks", "gates"))
    resconv.save(gated, tmp_path, example_inputs=x)
    back = resconv.load(tmp_path, model=net).eval()
    with torch.no_grad():
        for model in (gated, back):
            resconv.gates(model)["2.attention"].scale.fill_(0.3)
    close(back(x), gated(x))
    fused = resconv.fuse(gated)
    close(fused(x), gated(x))
    assert resconv.leftovers(fused) == {"2.attention": pytest.approx(0.3)}
    resconv.save(fused, tmp_path / "fused", example_inputs=x)
    close(resconv.load(tmp_path / "fused", model=net)(x), gated(x))


def test_a_product_without_bounds_is_no_gate():
    net, x = built(around(SqueezeExcite(F.softplus))), images()
    with pytest.raises(resconv.ResConvError, match="Nothing to convert"):
        resconv.convert(net, x, units="gates")


# --- all together ---


class Mixed(nn.Module):
    """Every kind of unit, one inside another."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*cbr(3, W))
        self.inner = nn.Sequential(Inverted(W, 2 * W, 2), nn.ReLU())
        self.block = Projected()
        self.se = SqueezeExcite()
        self.merge = nn.Conv2d(2 * W, 2 * W, 1)
        self.head = nn.Linear(2 * W, 3)

    def forward(self, x):
        x = self.se(self.stem(x))
        y = self.merge(self.inner(x)) + self.block(x)
        return self.head(y.mean((2, 3)))


def test_kinds_inside_each_other_are_counted_once_and_keep_the_laws():
    net, x = built(Mixed()), images(side=8)
    gated = laws(net, x, "all", batches=[images(4, side=8)])
    costs = cost_model(gated, x)
    kinds = {costs.kinds[n].partition(":")[0] for n in costs.names}
    assert {"layer", "summand", "segment", "gate"} <= kinds
    for inner in costs.names:
        for outer in costs.names:
            if costs.within(inner, outer):
                assert costs.cost_of((inner, outer)) == costs.cost_of((outer,))


def test_files_hold_every_kind(tmp_path):
    net, x = built(Mixed()), images(side=8)
    gated = resconv.convert(net, x, units="all", batches=[images(4, side=8)]).eval()
    resconv.save(gated, tmp_path / "open", example_inputs=x)
    back = resconv.load(tmp_path / "open", model=net).eval()
    close(back(x), gated(x))
    assert list(resconv.gates(back)) == list(resconv.gates(gated))
    assert cost_model(back, x) == cost_model(gated, x)
    costs = cost_model(gated, x)
    plan = resconv.Plan(costs.compatible(costs.names))
    with torch.no_grad():
        for model in (gated, back):
            for gate in resconv.gates(model).values():
                if gate.control is not None:
                    gate.control.fill_(0.8)
    compact = resconv.prune(gated, plan)
    close(resconv.prune(back, plan)(x), compact(x))
    resconv.save(compact, tmp_path / "compact", example_inputs=x)
    close(resconv.load(tmp_path / "compact", model=net)(x), compact(x))


@pytest.mark.parametrize("target", [0.6, 0.35])
def test_a_target_takes_segments_and_gates_whole_or_not_at_all(target):
    torch.manual_seed(0)
    net = randomise(Mixed())
    x, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    model = resconv.convert(net, x, units="all", batches=[x]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier = resconv.Sparsifier(model, optimizer, macs=target, total_steps=60)
    for _ in range(60):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sparsifier.finish().met
    every = resconv.gates(model)
    assert {g.scale.item() for g in every.values() if isinstance(g, Segment)} <= {0.0, 1.0}
    removed, costs = sparsifier.removed, sparsifier.costs
    assert costs.compatible(removed) == tuple(removed)
    model.eval()
    compact = resconv.prune(model)
    torch.testing.assert_close(compact(x), model(x), rtol=1e-4, atol=1e-4)
    assert not resconv.leftovers(compact)
    assert resconv.profile(compact, x).macs <= target * costs.macs


def test_a_strength_alone_leaves_segments_whole_and_one_side_of_each_sum():
    torch.manual_seed(0)
    net = randomise(Mixed())
    x = torch.randn(4, 3, 8, 8)
    model = resconv.convert(net, x, units="all").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    resconv.Sparsifier(model, optimizer, strength=1.0)
    for _ in range(30):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    every = resconv.gates(model)
    assert all(g.scale.item() == 1 for g in every.values() if isinstance(g, Segment))
    zero = [n for n, g in every.items() if g.scale.item() == 0]
    costs = cost_model(model, x)
    assert any(n in costs.excluded for n in zero)
    assert costs.compatible(zero) == tuple(zero)


def test_a_segment_that_fits_badly_scores_worse():
    """To first order a removal changes the loss by what the conv in its place does not explain."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Conv2d(W, 40, 1), nn.Conv2d(40, 6, 3, 2, 1), nn.BatchNorm2d(6))
    net, x = built(nn.Sequential(nn.Conv2d(3, W, 1), linear, nn.ReLU())), images(16, side=8)
    found = {}
    for how, batches in (("fitted", [x]), ("zero", None)):
        model = resconv.convert(
            net, x[:2], units="segments", batches=batches, shortcut_kinds="dense"
        )
        model.train().get_submodule("1").module.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sparsifier = resconv.Sparsifier(model, optimizer, macs=0.9, total_steps=1000)
        for part in x.split(4):
            optimizer.zero_grad()
            model(part).square().mean().backward()
            optimizer.step()
        found[how] = sparsifier._importance.read()["1"]
    assert found["fitted"] < 1e-2 * found["zero"]


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        ("all", {"layer", "block", "summand", "segment", "gate"}),
        ("summands", {"summand"}),
        ("layers,gates", {"layer", "gate"}),
        (("segments", "layers"), {"layer", "segment"}),
    ],
)
def test_kinds_are_asked_for_by_name(asked, kinds):
    net, x = built(Mixed()), images(side=8)
    gated = resconv.convert(net, x, units=asked)
    costs = cost_model(gated, x)
    assert {costs.kinds[n].partition(":")[0] for n in costs.names} == kinds - {"block"}


def test_unknown_kinds_are_refused():
    net, x = built(Mixed()), images(side=8)
    with pytest.raises(resconv.ResConvError, match="choose 'layers', 'blocks', 'summands'"):
        resconv.convert(net, x, units="summand")
    with pytest.raises(resconv.ResConvError, match="shortcut_kinds='wide'"):
        resconv.convert(net, x, units="segments", shortcut_kinds="wide")
    with pytest.raises(resconv.ResConvError, match="no batch"):
        resconv.convert(net, x, units="segments", batches=[])
