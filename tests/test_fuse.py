"""Fusion is exact for every kind of conv that can carry an identity."""

import itertools

import pytest
import torch
from torch import nn

import resconv
from resconv.nn.gates import gates

from .helpers import randomise, randomise_gates

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def net(dims, groups, dilation, padding_mode, bias, norm):
    conv = CONVS[dims](
        8,
        8,
        3,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        bias=bias,
    )
    layers = [CONVS[dims](3, 8, 1), conv]
    if norm:
        layers.append(NORMS[dims](8))
    layers += [nn.ReLU(), CONVS[dims](8, 2, 1)]
    return randomise(nn.Sequential(*layers).double())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("groups", "dilation"), [(1, 1), (2, 2), (8, 1)])
@pytest.mark.parametrize(
    ("padding_mode", "bias", "norm"),
    [
        *itertools.product(
            ["zeros", "reflect", "replicate", "circular"], [True, False], [True, False]
        )
    ],
)
def test_fuse_keeps_outputs(dims, groups, dilation, padding_mode, bias, norm):
    if padding_mode == "reflect" and dims == 3 and dilation > 1:
        pytest.skip("reflect padding of 2 in 3-D is slow, the other cases cover it")
    model = net(dims, groups, dilation, padding_mode, bias, norm)
    x = torch.randn(2, 3, *[6] * dims, dtype=torch.float64)
    gated = randomise_gates(resconv.convert(model, x, units="layers"))
    fused = resconv.fuse(gated)
    assert not gates(fused)
    assert type(fused.get_submodule("1")) is CONVS[dims]
    torch.testing.assert_close(fused(x), gated(x), rtol=1e-10, atol=1e-10)
    # Negative control: without the shortcut the outputs differ.
    with torch.no_grad():
        next(iter(gates(gated).values())).control.zero_()
    assert not torch.allclose(fused(x), gated(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", [1, 2, 4, (3, 5)])
def test_even_and_uneven_kernels(kernel):
    conv = nn.Conv2d(4, 4, kernel, padding="same")
    model = randomise(nn.Sequential(conv, nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)).double())
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    gated = randomise_gates(resconv.convert(model, x, units="layers"))
    torch.testing.assert_close(resconv.fuse(gated)(x), gated(x), rtol=1e-10, atol=1e-10)


def test_fuse_after_training_steps(images):
    model = randomise(resconv_net()).double()
    gated = resconv.convert(model, images, units="layers")
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.05)
    gated.train()
    for _ in range(3):
        loss = nn.functional.cross_entropy(gated(images), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gated.eval()
    assert any(g.control.item() != 0 for g in gates(gated).values())
    fused = resconv.fuse(gated)
    torch.testing.assert_close(fused(images), gated(images), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(fused(images), model(images), rtol=1e-3)


def resconv_net():
    from resconv import nets

    return nets.create("plainnet20")


def test_fuse_twice_is_refused_and_fold_folds_all(images):
    gated = resconv.convert(randomise(resconv_net()).double(), images, units="layers")
    fused = resconv.fuse(gated)
    with pytest.raises(resconv.ResConvError, match="no ResConv to fuse"):
        resconv.fuse(fused)
    folded = resconv.fuse(fused, images, fold_norms=True)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(folded(images), gated(images), rtol=1e-10, atol=1e-10)


def test_training_mode_is_refused(images):
    gated = resconv.convert(randomise(resconv_net()).double(), images, units="layers").train()
    with pytest.raises(resconv.ResConvError, match=r"training mode.*model\.eval\(\)"):
        resconv.fuse(gated)


@pytest.mark.parametrize(
    "spec",
    [
        {"c_out": 8, "kernel": 3, "stride": 2, "padding": 1},
        {"c_out": 12, "kernel": 3, "padding": 1},
        {"c_out": 4, "kernel": 3, "padding": 1, "padding_mode": "reflect"},
        {"c_out": 8, "kernel": 3},
        {"c_out": 8, "kernel": 5, "dilation": 2, "padding": 1},
        {"c_out": 12, "kernel": 1, "stride": 2, "bias": False},
        {"c_out": 8, "kernel": 2, "stride": 2},
        {"c_out": 16, "kernel": 4, "stride": 4, "padding": 1},
        {"c_out": 16, "kernel": 3, "stride": 2, "padding": 1, "groups": 8},
        {"c_out": 4, "kernel": 3, "padding": 1, "groups": 2, "padding_mode": "circular"},
        {"c_out": 12, "kernel": 3, "stride": 2, "padding": 1, "groups": 4},
        {"c_out": 12, "kernel": 4, "padding": "same"},
        {"c_out": 4, "kernel": 7, "stride": 3, "padding": "valid"},
    ],
)
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_a_shape_changing_layer_may_have_a_fusible_shortcut(spec, dims, norm):
    spec = dict(spec)
    c_out, kernel = spec.pop("c_out"), spec.pop("kernel")
    conv = CONVS[dims](8, c_out, kernel, **spec)
    layers = [CONVS[dims](3, 8, 1), conv, *([NORMS[dims](c_out)] if norm else []), nn.ReLU()]
    model = randomise(nn.Sequential(*layers, CONVS[dims](c_out, 2, 1)).double())
    x = torch.randn(2, 3, *[11] * dims, dtype=torch.float64)
    gated = resconv.convert(model, x, shortcut="always", units="layers")
    torch.testing.assert_close(gated(x), model(x), rtol=1e-10, atol=1e-10)
    assert set(resconv.gates(gated)) == set()
    fixed = resconv.gates(gated, fixed=True)
    assert "1" in fixed
    assert not fixed["1"].removable
    with torch.no_grad():
        fixed["1"].control.fill_(0.7)
    before = gated(x)
    # Negative control: the shortcut does something, and it is where the fused kernel has it.
    assert not torch.allclose(before, model(x), rtol=1e-3, atol=1e-3)
    fused = resconv.fuse(gated)
    assert type(fused.get_submodule("1")) is CONVS[dims]
    assert not resconv.gates(fused, fixed=True)
    torch.testing.assert_close(fused(x), before, rtol=1e-10, atol=1e-10)
    # From a trained net the identity is taken out of the kernel: the function stays.
    started = resconv.convert(model, x, shortcut="always", start="identity", units="layers")
    assert all(g.control.item() == 1 for g in resconv.gates(started, fixed=True).values())
    torch.testing.assert_close(started(x), model(x), rtol=1e-9, atol=1e-9)
    # Its gradient is that of the formula.
    gated.train()
    gated(x).square().sum().backward()
    assert fixed["1"].control.grad is not None
    assert fixed["1"].scale.grad is None


def test_the_shortcut_of_a_strided_layer_is_the_strided_input():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False).double()
    model = nn.Sequential(nn.Identity(), conv, nn.Conv2d(6, 1, 1).double()).eval()
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    gated = resconv.convert(model, x, shortcut="always", units="layers")
    with torch.no_grad():
        conv_in = gated.get_submodule("1")
        conv_in.conv.weight.zero_()
        conv_in.control.fill_(2.0)
        y = conv_in(x)
    assert torch.equal(y[:, :4], 2 * x[:, :, ::2, ::2])
    assert not y[:, 4:].any()


def test_a_shape_changing_layer_stays_and_says_why(images):
    from resconv import nets

    model = randomise(nets.create("resnet20").double())
    gated = randomise_gates(resconv.convert(model, images, shortcut="always"))
    plain = resconv.convert(model, images)
    assert set(resconv.gates(gated)) == set(resconv.gates(plain))
    found = {u.name: u for u in resconv.units(gated, images)}
    assert found["layer2.0.conv1"].reason == "stride 2 changes the size"
    assert not found["layer2.0.conv1"].removable
    a, b = (resconv.plan(m, images, resconv.Budget(macs=0.5)) for m in (gated, plain))
    assert a.macs_before == b.macs_before
    assert a.num_params_before == b.num_params_before
    assert "layer2.0.conv1" not in a.scales
    with torch.no_grad():
        resconv.gates(gated, fixed=True)["layer2.0.conv1"].control.fill_(0.8)
    with pytest.raises(resconv.ResConvError, match=r"layer2\.0\.conv1 cannot be removed: stride 2"):
        resconv.prune(gated, resconv.Plan(["layer2.0.conv1"]))
    for fuse in (True, False):
        compact = resconv.prune(gated, a, fuse=fuse)
        resconv.verify(gated, compact, images, plan=a)
        if not fuse:
            resconv.verify(gated, resconv.fuse(compact), images, plan=a)


def test_a_conv_that_reaches_too_far_out_gets_no_shortcut():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=2), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
    x = torch.randn(1, 4, 8, 8)
    gated = resconv.convert(model.eval(), x, shortcut="always", units="layers")
    assert set(resconv.gates(gated, fixed=True)) == {"2"}
    with pytest.raises(resconv.ResConvError, match="choose 'removable' or 'always'"):
        resconv.convert(model, x, shortcut="sometimes", units="layers")
    with pytest.raises(resconv.ResConvError, match="units='blocks' converts none"):
        resconv.convert(model, x, shortcut="always", units="blocks")
