"""Converting keeps the outputs; what cannot be converted says why."""

import pytest
import torch
from torch import nn

import resconv
from resconv import nets

from .helpers import randomise


@pytest.mark.parametrize("start", ["keep", "identity"])
@pytest.mark.parametrize("units", ["layers", "blocks", "all"])
@pytest.mark.parametrize("name", ["resnet20", "plainnet20", "vgg16_bn"])
def test_convert_keeps_outputs(name, units, start, images):
    model = randomise(nets.create(name).double())
    if units == "blocks" and name != "resnet20":
        with pytest.raises(resconv.ResConvError, match="Nothing to convert"):
            resconv.convert(model, images, units=units)
        return
    before = model(images)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gated = resconv.convert(model, images, units=units, start=start)
    torch.testing.assert_close(gated(images), before, rtol=1e-9, atol=1e-9)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])  # the argument is left as it was
    # Negative control: every gate matters.
    with torch.no_grad():
        for name, gate in resconv.gates(gated).items():
            gate.scale.mul_(0.5)
            assert not torch.allclose(gated(images[:1]), before[:1], rtol=1e-6), name
            gate.scale.mul_(2)


def test_a_fresh_net_gets_the_plain_shortcut(images):
    gated = resconv.convert(
        nets.create("plainnet20").double(), images, start="identity", units="layers"
    )
    assert all(g.control.item() == 1 for g in resconv.gates(gated).values())


@pytest.mark.parametrize("depth", [20, 56])
@pytest.mark.parametrize("net", ["resnet", "plainnet"])
@pytest.mark.parametrize("units", ["layers", "all"])
def test_all_branches_of_an_untrained_net_add_about_as_much_as_the_stream_holds(net, depth, units):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    gated = resconv.convert(nets.create(f"{net}{depth}").train(), x, units=units, start="identity")
    gates = resconv.gates(gated)
    small = {n: g for n, g in gates.items() if g.scale.item() != 1}
    blocks = (depth - 2) // 6
    for name, gate in small.items():
        # Two layers a block, but for the first of two stages, which is strided; or the blocks, and
        # in those two stages the other layer of the first one.
        stage = blocks if net == "resnet" else 2 * blocks - (not name.startswith("layer1"))
        assert gate.scale.item() == pytest.approx(stage**-0.5), name
    assert len(small) == (3 * blocks if net == "resnet" else 6 * blocks - 2)

    growth = []
    for stage in (gated.layer1, gated.layer2, gated.layer3):
        stage.register_forward_hook(lambda m, args, y: growth.append(y.std() / args[0].std()))
    gated(x)
    assert max(growth) < 2
    for gate in small.values():
        gate.scale.data.fill_(1.0)
    growth.clear()
    gated(x)
    # Negative control: at s = 1 the variance grows with every branch.
    assert growth[0] > 0.6 * (1 + blocks) ** 0.5


def test_the_start_of_a_trained_net_keeps_its_scales(images):
    gated = resconv.convert(
        randomise(nets.create("plainnet20").double()), images, start="identity", units="layers"
    )
    assert {g.scale.item() for g in resconv.gates(gated).values()} == {1.0}


def test_units_say_why_they_stay(images):
    found = {u.name: u for u in resconv.units(nets.create("resnet20").double(), images)}
    assert found["layer2.0.conv1"].reason == "stride 2 changes the size"
    assert found["conv1"].reason == "3 channels in, 16 out"
    assert found["layer1.0.conv1"].removable
    assert found["layer1.0.conv1"].macs == 32 * 32 * 16 * 16 * 9
    assert found["layer1.0.conv1"].num_params == 16 * 16 * 9 + 32
    assert found["layer1.0"].kind == "block"
    assert found["layer1.0"].macs == 2 * found["layer1.0.conv1"].macs
    assert "layer2.0" not in found or not found["layer2.0"].removable


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.relu(self.conv(x)))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return torch.relu(nn.functional.conv2d(x, self.conv.weight, self.conv.bias, padding=1))


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.conv.register_forward_hook(lambda m, a, y: y * 2)

    def forward(self, x):
        return torch.relu(self.conv(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Twice(), "called 2 times"),
        (Functional(), "never called as a module"),
        (Hooked(), "carries a hook"),
        (
            nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1)), nn.ReLU()
            ),
            "computed in its forward|parametrised",
        ),
        (nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()), "size 32 in, 30 out"),
        (nn.Sequential(nn.ConvTranspose2d(3, 3, 3, padding=1), nn.ReLU()), "transposed"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), "no such layer"),
    ],
)
def test_refusals_name_the_layer_and_the_reason(model, reason, images):
    model = model.double().eval()
    with pytest.raises(resconv.ResConvError, match=reason):
        resconv.convert(model, images, units="layers")


def test_bad_arguments(images):
    model = nets.create("resnet20").double()
    with pytest.raises(resconv.ResConvError, match="units='channels'"):
        resconv.convert(model, images, units="channels")
    with pytest.raises(resconv.ResConvError, match="start='zero'"):
        resconv.convert(model, images, start="zero", units="layers")
    with pytest.raises(resconv.ResConvError, match="does not run on inputs of shape"):
        resconv.convert(model, torch.randn(1, 5, 32, 32), units="layers")
    gated = resconv.convert(model, images, units="layers")
    with pytest.raises(resconv.ResConvError, match="has gates already"):
        resconv.convert(gated, images, units="layers")


def test_filter_chooses(images):
    model = nets.create("resnet20").double().eval()
    gated = resconv.convert(
        model, images, filter=lambda name, module: name.startswith("layer3"), units="layers"
    )
    assert set(resconv.gates(gated)) == {
        "layer3.0.conv2",
        "layer3.1.conv1",
        "layer3.1.conv2",
        "layer3.2.conv1",
        "layer3.2.conv2",
    }


@pytest.mark.parametrize("net", ["resnet56", "plainnet56"])
def test_an_untrained_net_gets_one_shortcut_a_block(net):
    torch.manual_seed(0)
    model, x = nets.create(net).train(), torch.randn(8, 3, 32, 32)
    gated = resconv.convert(model, x, start="identity", units="layers")
    controls = {n: g.control for n, g in resconv.gates(gated).items()}
    branches = [u.name for u in resconv.units(model, x) if u.kind == "block" and u.removable]
    for name, control in controls.items():
        assert control.item() == (0.0 if name.rpartition(".")[0] in branches else 1.0), name
    # Values stay of the size they had; with a second shortcut they double in every block.
    plain, converted = model(x).abs().max(), gated(x).abs().max()
    if net == "resnet56":
        assert converted < 10 * plain
        for control in controls.values():
            control.data.fill_(1.0)
        assert gated(x).abs().max() > 1e4 * plain


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "resnet10t", "regnety_002"])
def test_a_converted_net_trains_as_the_plain_one_does(name):
    timm = pytest.importorskip("timm")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    net = randomise(timm.create_model(name, num_classes=5).double(), 0, x)
    gated = resconv.convert(net, x)
    weights = torch.linspace(-1, 1, 10, dtype=x.dtype).reshape(2, 5)

    def trained(model):
        """Return outputs in training mode, and gradients by the tensor they belong to."""
        y = model.train()(x)
        (y * weights).sum().backward()
        return y, [p.grad for n, p in model.named_parameters() if not n.endswith(SCALARS)]

    (before, plain), (after, ours) = trained(net), trained(gated)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    # The statistics of a batch magnify rounding: in float32 gradients may be 1 % apart.
    for ours_, plain_ in zip(ours, plain, strict=True):
        torch.testing.assert_close(ours_, plain_, rtol=1e-7, atol=1e-7 * float(plain_.abs().max()))
    with torch.no_grad():  # Negative control
        next(iter(resconv.gates(gated).values())).scale.mul_(0.5)
    assert not torch.allclose(gated(x), before, rtol=1e-6)


SCALARS = (".scale", ".control")
