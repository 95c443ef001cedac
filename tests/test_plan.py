"""Plans meet budgets, survive JSON, and refuse what cannot be."""

import pytest
import torch

import resconv
from resconv import nets

from .helpers import randomise, randomise_gates


@pytest.fixture
def gated(images):
    model = randomise(nets.create("resnet20").double())
    return randomise_gates(resconv.convert(model, images, units="all"))


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_macs_budget_is_met_and_predicted(share, gated, images):
    plan = resconv.plan(gated, images, resconv.Budget(macs=share))
    assert plan.macs_after <= share * plan.macs_before
    compact = resconv.prune(gated, plan)
    assert resconv.count(compact, images).macs == plan.macs_after
    fewer = plan.remove[:-1]
    compact = resconv.prune(gated, resconv.Plan(fewer)) if fewer else resconv.fuse(gated)
    assert resconv.count(compact, images).macs > plan.macs_after


def test_parameters_and_absolute_budgets(gated, images):
    plan = resconv.plan(gated, images, resconv.Budget(num_params=100_000))
    compact = resconv.prune(gated, plan)
    assert resconv.count(compact, images).num_params <= plan.num_params_after <= 100_000


def test_zero_scales_go_first(gated, images):
    with torch.no_grad():
        resconv.gates(gated)["layer3.1"].scale.zero_()
    plan = resconv.plan(gated, images, resconv.Budget(macs=0.99))
    assert plan.remove == ("layer3.1",)
    small = resconv.plan(gated, images, resconv.Budget(threshold=0.7))
    expected = {n for n, g in resconv.gates(gated).items() if g.scale.item() <= 0.7}
    assert set(small.remove) == expected


def test_json(gated, images, tmp_path):
    plan = resconv.plan(gated, images, resconv.Budget(macs=0.5))
    assert resconv.Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert resconv.Plan.load(tmp_path / "plan.json") == plan
    assert resconv.Plan.from_json('{"remove": ["a"]}') != plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"remove": "a"}', "list of unit names"),
        ('{"remove": [1]}', "every entry is a unit's name"),
        ('{"remove": ["a", "a"]}', "more than once"),
        ('{"remove": [], "extra": 1}', "unknown keys: extra"),
        ('{"remove": [], "macs_after": "x"}', "no whole number"),
    ],
)
def test_bad_plans(text, message):
    with pytest.raises(resconv.ResConvError, match=message):
        resconv.Plan.from_json(text)


@pytest.mark.parametrize(
    "kwargs", [{}, {"macs": 0.0}, {"macs": 1.5}, {"macs": 0}, {"macs": True}, {"threshold": -1.0}]
)
def test_bad_budgets(kwargs):
    with pytest.raises(resconv.ResConvError):
        resconv.Budget(**kwargs)


def test_unreachable_budget_gives_the_floor(gated, images):
    with pytest.raises(
        resconv.ResConvError, match=r"removing all 23 removable units leaves [\d,]+"
    ):
        resconv.plan(gated, images, resconv.Budget(macs=0.01))


def test_a_layer_without_a_shortcut_is_not_planned(gated, images):
    with torch.no_grad():
        gate = resconv.gates(gated)["layer1.0.conv1"]
        gate.scale.zero_()
        gate.control.zero_()
    plan = resconv.plan(gated, images, resconv.Budget(macs=0.6))
    assert "layer1.0.conv1" not in plan.remove
