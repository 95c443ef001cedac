"""Controls that nothing can absorb end at exactly 1, so that a trained net is pruned without a multiply."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resconv

from .helpers import randomise


def net_of(act, layers=5):
    torch.manual_seed(0)
    row = (
        m
        for _ in range(layers)
        for m in (nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), act())
    )
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), act(), *row, *head)).double()


def train(gated, x, steps, **kwargs):
    labels = torch.arange(len(x)) % 3
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1)
    sparsifier = resconv.Sparsifier(gated, total_steps=steps, **kwargs).attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(gated(x), labels).backward()
        optimizer.step()
    sparsifier.detach()
    return sparsifier


@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU, nn.Hardswish, nn.ReLU])
def test_a_net_pruned_after_training_has_no_multiply(act):
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    gated = resconv.convert(net_of(act), x, units="layers").train()
    sparsifier = train(gated, x, 60, target=resconv.Budget(macs=0.6))
    removed = sparsifier.removed
    assert removed
    gated.eval()
    plan = resconv.Plan(tuple(removed))
    compact = resconv.prune(gated, plan)
    assert resconv.leftovers(compact) == {}
    torch.testing.assert_close(compact(x), gated(x), rtol=1e-10, atol=1e-10)
    controls = [resconv.gates(gated)[n].control.item() for n in removed]
    if act is nn.ReLU:  # absorbed by the linear layers around it: these are free
        assert any(c != 1 for c in controls)
    else:
        assert controls == [1.0] * len(removed)
        with torch.no_grad():  # a control that were a little off would stay as a multiply
            resconv.gates(gated)[removed[0]].control.fill_(1.001)
        assert resconv.leftovers(resconv.prune(gated, plan))


def test_without_a_target_the_control_of_a_layer_at_0_moves_to_1():
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    gated = resconv.convert(net_of(nn.SiLU), x, units="layers").train()
    for gate in resconv.gates(gated).values():
        gate.control.data.fill_(0.7)
    train(gated, x, 520, strength=0.5)
    gone = [g for g in resconv.gates(gated).values() if g.scale.item() == 0]
    assert gone
    assert [g.control.item() for g in gone] == [1.0] * len(gone)


def test_a_resumed_run_holds_the_same_controls():
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    gated = resconv.convert(net_of(nn.SiLU), x, units="layers").train()
    first = train(gated, x, 60, target=resconv.Budget(macs=0.6))
    second = resconv.Sparsifier(gated, target=resconv.Budget(macs=0.6), total_steps=60)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["held"] == first.state_dict()["held"] != []
