"""The training form computes y = s * N(C(x)) + p * x, forward and backward."""

import pytest
import torch
from torch import nn

from resconv.nn.gates import BranchGate, ResConv


def layer(norm=True, train=False):
    conv = nn.Conv2d(6, 6, 3, padding=1, bias=not norm).double()
    bn = nn.BatchNorm2d(6).double() if norm else None
    if bn is not None:
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    gate = ResConv(conv, bn, 0.7, 0.4)
    with torch.no_grad():
        gate.scale.data = gate.scale.data.double()
        gate.control.data = gate.control.data.double()
    return gate.train(train)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_forward_is_the_formula(norm, train):
    gate = layer(norm, train)
    x = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    reference = (
        nn.Sequential(gate.conv) if gate.norm is None else nn.Sequential(gate.conv, gate.norm)
    )
    state = {k: v.clone() for k, v in gate.state_dict().items()}
    y = gate(x)
    gate.load_state_dict(state)  # the running statistics as before
    expected = gate.scale * reference(x) + gate.control * x
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y, gate.scale * reference(x))


def test_running_statistics_move_as_in_the_plain_norm():
    gate = layer(train=True)
    twin = nn.BatchNorm2d(6).double()
    twin.load_state_dict(gate.norm.state_dict())
    x = torch.randn(8, 6, 5, 5, dtype=torch.float64)
    gate(x)
    twin(gate.conv(x))
    torch.testing.assert_close(gate.norm.running_mean, twin.running_mean)
    torch.testing.assert_close(gate.norm.running_var, twin.running_var)
    assert gate.norm.num_batches_tracked == twin.num_batches_tracked == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("control", [0.4, 0.0])
def test_gradients_are_right(layout, control):
    gate = layer(train=True)
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()

    gate.norm.track_running_stats, gate.norm.running_mean, gate.norm.running_var = False, None, None

    def run(x, s, p):
        return torch.func.functional_call(gate, {"scale": s, "control": p}, (x,))

    s = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    p = torch.tensor(control, dtype=torch.float64, requires_grad=True)
    if control == 0:
        # Finite differences of x and p around p = 0 leave the short cut of the closed gate.
        run(x, s, p).square().sum().backward()
        found = (x.grad.clone(), p.grad.clone())
        x.grad = p.grad = None
        z = gate.scale * 0 + s  # the same formula, written out
        y = z * gate.norm(gate.conv(x)) + p * x
        y.square().sum().backward()
        torch.testing.assert_close(found, (x.grad, p.grad), rtol=1e-9, atol=1e-9)
        return
    assert torch.autograd.gradcheck(run, (x, s, p))


def test_branch_gate_scales_any_module():
    for module in (nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, affine=False)):
        gate = BranchGate(module.eval(), 0.3)
        x = torch.randn(2, 6, 4, 4)
        torch.testing.assert_close(gate(x), 0.3 * module(x))
