"""The compact net equals the gated net with the planned scales at 0."""

import pytest
import torch
from torch import nn

import resconv
from resconv import nets
from resconv.surgery.pruning import leftovers

from .helpers import randomise, randomise_gates, some_plan


def gated_net(name, images, units=("layers", "blocks"), start="keep", seed=0):
    model = randomise(nets.create(name).double(), seed)
    return randomise_gates(resconv.convert(model, images, units=units, start=start), seed)


@pytest.mark.parametrize("name", ["resnet20", "plainnet20", "vgg16_bn"])
@pytest.mark.parametrize("seed", range(4))
def test_prune_equals_gated_at_zero(name, seed, images):
    gated = gated_net(name, images, seed=seed)
    plan = some_plan(gated, seed)
    state = {k: v.clone() for k, v in gated.state_dict().items()}
    compact = resconv.prune(gated, plan)
    result = resconv.verify(gated, compact, images, plan=plan)
    assert result.max_rel_error < 1e-10
    assert not [m for m in compact.modules() if type(m).__module__.startswith("resconv.gates")]
    for key, value in gated.state_dict().items():
        assert torch.equal(value, state[key])
    # Negative control: with the scales as they are, the two differ.
    with pytest.raises(resconv.ResConvError, match="disagree"):
        resconv.verify(gated, compact, images)


def test_a_removed_block_costs_nothing(images):
    gated = gated_net("resnet20", images, units="blocks")
    names = list(resconv.gates(gated))
    compact = resconv.prune(gated, resconv.Plan(names))
    assert not leftovers(compact)
    convs = [n for n, m in compact.named_modules() if isinstance(m, nn.Conv2d)]
    assert convs == [
        "conv1",
        "layer2.0.conv1",
        "layer2.0.conv2",
        "layer3.0.conv1",
        "layer3.0.conv2",
    ]
    assert sum(isinstance(m, nn.ReLU) for m in compact.modules()) == 5
    assert (
        resconv.profile(compact, images).macs
        == resconv.plan(zero(gated, names), images, resconv.Budget(threshold=0.0)).macs_after
    )


def zero(gated, names):
    with torch.no_grad():
        for name in names:
            resconv.gates(gated)[name].scale.zero_()
    return gated


def test_a_removed_plain_layer_takes_its_norm_and_relu_along(images):
    gated = gated_net("plainnet20", images, units="layers")
    plan = some_plan(gated, 3)
    compact = resconv.prune(gated, plan)
    assert not leftovers(compact)

    def ran(model):
        seen = []
        hooks = [
            m.register_forward_hook(lambda m, a, y: seen.append(type(m)))
            for m in model.modules()
            if not list(m.children())
        ]
        model(images)
        for hook in hooks:
            hook.remove()
        return seen

    before, after = ran(resconv.fuse(gated)), ran(compact)
    assert before.count(nn.Conv2d) - after.count(nn.Conv2d) == len(plan.remove)
    assert before.count(nn.ReLU) - after.count(nn.ReLU) == len(plan.remove)


def test_another_activation_stays(images):
    body = [
        nn.Conv2d(3, 8, 1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 2, 1),
    ]
    model = nn.Sequential(*body).double().eval()
    gated = randomise_gates(resconv.convert(model, images, units="layers"))
    compact = resconv.prune(gated, resconv.Plan(["2"]))
    assert sum(isinstance(m, nn.SiLU) for m in compact.modules()) == 2
    resconv.verify(gated, compact, images, plan=resconv.Plan(["2"]))


def test_a_negative_control_keeps_its_relu(images):
    body = [
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    ]
    gated = resconv.convert(nn.Sequential(*body).double().eval(), images, units="layers")
    with torch.no_grad():
        resconv.gates(gated)["2"].control.fill_(-0.8)
    plan = resconv.Plan(["2"])
    compact = resconv.prune(gated, plan)
    resconv.verify(gated, compact, images, plan=plan)
    assert sum(isinstance(m, nn.ReLU) for m in compact.modules()) == 2


def test_prune_twice_is_prune_once(images):
    gated = gated_net("resnet20", images, units="blocks")
    names = list(resconv.gates(gated))
    once = resconv.prune(gated, resconv.Plan(names[:4]))
    half = resconv.prune(gated, resconv.Plan(names[:2]), fuse=False)
    twice = resconv.prune(half, resconv.Plan(names[2:4]))
    torch.testing.assert_close(twice(images), once(images), rtol=1e-10, atol=1e-10)
    assert resconv.profile(twice, images) == resconv.profile(once, images)
    with pytest.raises(resconv.ResConvError, match="no removable unit named"):
        resconv.prune(half, resconv.Plan(names[:1]))


@pytest.mark.parametrize("units", ["layers", "blocks", "all"])
def test_prune_for_finetuning_then_fuse(units, images):
    gated = gated_net("resnet20", images, units=units)
    plan = some_plan(gated, 2)
    open_net = resconv.prune(gated, plan, fuse=False)
    assert set(resconv.gates(open_net)) <= set(resconv.gates(gated)) - set(plan.remove)
    resconv.verify(gated, open_net, images, plan=plan)
    compact = resconv.fuse(open_net)
    resconv.verify(gated, compact, images, plan=plan)
    optimizer = torch.optim.SGD(open_net.parameters(), lr=0.01)
    open_net.train()
    nn.functional.cross_entropy(open_net(images), torch.arange(4)).backward()
    optimizer.step()
    open_net.eval()
    torch.testing.assert_close(
        resconv.fuse(open_net)(images), open_net(images), rtol=1e-9, atol=1e-9
    )


def test_compact_can_be_converted_and_pruned_again(images):
    gated = gated_net("resnet20", images)
    compact = resconv.prune(gated, some_plan(gated, 1))
    again = randomise_gates(resconv.convert(compact, images), 5)
    plan = some_plan(again, 5)
    smaller = resconv.prune(again, plan)
    resconv.verify(again, smaller, images, plan=plan)
    assert resconv.profile(smaller, images).macs < resconv.profile(compact, images).macs


def test_refusals(images):
    gated = gated_net("resnet20", images)
    with pytest.raises(resconv.ResConvError, match="removes nothing"):
        resconv.prune(gated, resconv.Plan())
    with pytest.raises(resconv.ResConvError, match="no removable unit named 'nope'"):
        resconv.prune(gated, resconv.Plan(["nope"]))
    with torch.no_grad():
        resconv.gates(gated)["layer1.0.conv1"].control.zero_()
    with pytest.raises(resconv.ResConvError, match=r"layer1\.0\.conv1 has control 0"):
        resconv.prune(gated, resconv.Plan(["layer1.0.conv1"]))
    with pytest.raises(resconv.ResConvError, match="not a converted model"):
        resconv.plan(nets.create("resnet20"), images.float(), resconv.Budget(macs=0.5))


def test_verify_finds_a_changed_weight(images):
    gated = gated_net("resnet20", images)
    plan = some_plan(gated)
    compact = resconv.prune(gated, plan)
    with torch.no_grad():
        compact.fc.weight[0, 0] += 1e-3
    with pytest.raises(resconv.ResConvError, match="largest difference"):
        resconv.verify(gated, compact, images, plan=plan)


def test_scales_of_zero_or_below_that_are_not_planned(images):
    gated = gated_net("resnet20", images)
    with torch.no_grad():
        resconv.gates(gated)["layer1.1"].scale.zero_()
        resconv.gates(gated)["layer1.2"].scale.fill_(-0.7)
        resconv.gates(gated)["layer2.1.conv1"].scale.zero_()
        resconv.gates(gated)["layer2.2.conv1"].scale.fill_(-0.4)
    plan = resconv.Plan(["layer3.1"])
    resconv.verify(gated, resconv.prune(gated, plan), images, plan=plan)
    resconv.verify(gated, resconv.prune(gated, plan, fuse=False), images, plan=plan)


class InPlace(nn.Module):
    """A branch whose activation writes in place, or whose sum does."""

    def __init__(self, functional):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.functional = functional

    def forward(self, x):
        x = self.stem(x)
        y = self.conv1(x)
        y = torch.relu_(y) if self.functional else self.act(y)
        return x + self.conv2(y)


@pytest.mark.parametrize("functional", [True, False])
def test_in_place_operations_do_not_reach_the_shortcut(functional, images):
    model = InPlace(functional).double().eval()
    gated = randomise_gates(resconv.convert(model, images, units="layers"))
    plan = resconv.Plan(["conv1"])
    compact = resconv.prune(gated, plan)
    resconv.verify(gated, compact, images, plan=plan)
    if not functional:
        assert compact.act.inplace is False
        assert model.act.inplace is True


@pytest.mark.parametrize("where", ["layer2.1.conv1.scale", "fc.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_net_that_diverged_is_refused(where, value, images):
    gated = gated_net("resnet20", images)
    parameters = dict(gated.named_parameters())
    with torch.no_grad():
        parameters[where].fill_(value)
    errors = resconv.errors
    calls = [
        (errors.PlanError, lambda: resconv.plan(gated, images, resconv.Budget(macs=0.5))),
        (errors.PruneError, lambda: resconv.prune(gated, resconv.Plan(("layer1.0",)))),
        (errors.PruneError, lambda: resconv.fuse(gated)),
    ]
    for error, call in calls:
        with pytest.raises(error, match=r"NaN or infinite numbers, .*training diverged"):
            call()
