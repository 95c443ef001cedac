"""Fusion is exact for every kind of conv that can carry an identity."""

import itertools

import pytest
import torch
from torch import nn

import resconv
from resconv.gates import gates

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
    gated = randomise_gates(resconv.convert(model, x))
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
    gated = randomise_gates(resconv.convert(model, x))
    torch.testing.assert_close(resconv.fuse(gated)(x), gated(x), rtol=1e-10, atol=1e-10)


def test_fuse_after_training_steps(images):
    model = randomise(resconv_net()).double()
    gated = resconv.convert(model, images)
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
    gated = resconv.convert(randomise(resconv_net()).double(), images)
    fused = resconv.fuse(gated)
    with pytest.raises(resconv.ResConvError, match="no ResConv to fuse"):
        resconv.fuse(fused)
    folded = resconv.fuse(fused, images)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(folded(images), gated(images), rtol=1e-10, atol=1e-10)


def test_training_mode_is_refused(images):
    gated = resconv.convert(randomise(resconv_net()).double(), images).train()
    with pytest.raises(resconv.ResConvError, match=r"training mode.*model\.eval\(\)"):
        resconv.fuse(gated)
