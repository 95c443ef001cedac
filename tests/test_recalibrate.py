"""Statistics are collected anew, and nothing else changes."""

import pytest
import torch
from torch import nn

import resconv
from resconv import nets

from .helpers import randomise


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=generator) for _ in range(4)]


def test_statistics_are_the_average_over_the_batches(data):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().train()
    norm = model[1]
    assert resconv.recalibrate(model, data) == 4
    values = [model[0](x).transpose(0, 1).flatten(1) for x in data]
    torch.testing.assert_close(norm.running_mean, sum(v.mean(1) for v in values) / 4)
    torch.testing.assert_close(norm.running_var, sum(v.var(1) for v in values) / 4)
    assert norm.momentum == 0.1


@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: (x, torch.zeros(8)), lambda x: {"input": x}]
)
def test_only_statistics_change(form, data):
    model = resconv.convert(randomise(nets.create("resnet20").double()), data[0])
    model.train()
    model.layer1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    if isinstance(form(data[0]), dict):
        forward = model.forward
        model.forward = lambda input: forward(input)
    resconv.recalibrate(model, map(form, data))
    assert [m.training for m in model.modules()] == modes
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if "running_" in k or "num_batches" in k}
    # Once is as good as twice.
    once = {k: v.clone() for k, v in model.state_dict().items()}
    resconv.recalibrate(model, map(form, data))
    torch.testing.assert_close(dict(model.state_dict()), once)


def test_a_pruned_net_comes_nearer(data):
    """After units with a scale that is not 0 have gone, new statistics are what fits."""
    torch.manual_seed(1)
    model = nets.create("resnet20").double()
    resconv.recalibrate(model, data)
    gated = resconv.convert(model.eval(), data[0], units="blocks")
    plan = resconv.Plan(("layer1.0", "layer2.1"))
    compact = resconv.prune(gated, plan, fuse=False)
    norm = compact.get_submodule("layer3.0.bn1")
    stale = norm.running_var.clone()
    resconv.recalibrate(compact, data)
    values = []
    norm.register_forward_pre_hook(lambda m, args: values.append(args[0]))
    with torch.no_grad():
        for x in data:
            compact.eval()(x)
    true = torch.cat(values).transpose(0, 1).flatten(1).var(1)
    assert (norm.running_var - true).abs().max() < 0.2 * (stale - true).abs().max()


def test_refusals_put_everything_back(data):
    model = randomise(nets.create("resnet20").double())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(resconv.ResConvError, match="no batch"):
        resconv.recalibrate(model, [])
    with pytest.raises(resconv.ResConvError, match="A batch is a str"):
        resconv.recalibrate(model, [data[0], "image"])
    with pytest.raises(resconv.ResConvError, match=r"statistics of bn1 are not finite"):
        resconv.recalibrate(model, [data[0] * float("nan")])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    resconv.recalibrate(
        model, [{"picture": data[0]}], call=lambda net, batch: net(batch["picture"])
    )
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])
