"""Plans meet budgets, survive JSON, and refuse what cannot be."""

import pytest
import torch

import resconv
from resconv import nets
from resconv.planning.costs import cost_model

from .helpers import randomise, randomise_gates


@pytest.fixture
def gated(images):
    model = randomise(nets.create("resnet20").double())
    return randomise_gates(resconv.convert(model, images))


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_macs_budget_is_met_and_predicted(share, gated, images):
    plan = resconv.plan(gated, images, resconv.Budget(macs=share))
    assert plan.macs_after <= share * plan.macs_before
    compact = resconv.prune(gated, plan)
    assert resconv.profile(compact, images).macs == plan.macs_after
    fewer = plan.remove[:-1]
    compact = resconv.prune(gated, resconv.Plan(fewer)) if fewer else resconv.fuse(gated)
    assert resconv.profile(compact, images).macs > plan.macs_after


def test_parameters_and_absolute_budgets(gated, images):
    plan = resconv.plan(gated, images, resconv.Budget(num_params=100_000))
    compact = resconv.prune(gated, plan)
    assert resconv.profile(compact, images).num_params <= plan.num_params_after <= 100_000


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
        ("{}", "has no 'remove'"),
        ("[]", "the whole is a list, needed is an object"),
        ('{"remove": "a"}', "'remove' is 'a', needed is a list"),
        ('{"remove": [1]}', r"'remove'\[0\] is 1, needed is text"),
        ('{"remove": ["a", "a"]}', "more than once"),
        ('{"remove": [], "extra": 1}', "unknown keys: 'extra'"),
        (
            '{"remove": [], "macs_after": "x"}',
            "'macs_after' is 'x', needed is a whole number or null",
        ),
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


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"latency_ms": -1}, "latency_ms=-1: give milliseconds above 0"),
        ({"latency_ms": float("nan")}, "milliseconds above 0"),
        ({"latency": 1.0}, r"a share .* lies in \(0, 1\); for milliseconds give latency_ms"),
        ({"latency": 8}, "for milliseconds give latency_ms"),
        ({"latency": 0.5, "latency_ms": 8.0}, "limit the same thing"),
        ({"latency": 0.5, "runtime": "tflite"}, "choose 'torch' or 'onnxruntime'"),
        ({"latency": 0.5, "batch": 0}, "batch=0"),
        ({"latency": 0.5, "threads": 1.5}, "threads=1.5"),
        ({"macs": 0.5, "runtime": "onnxruntime"}, "no latency is limited"),
        ({}, r"Budget\(latency_ms=8\)"),
    ],
)
def test_bad_latencies(kwargs, message):
    with pytest.raises(resconv.ResConvError, match=message):
        resconv.Budget(**kwargs)


def test_all_faults_are_named_at_once():
    with pytest.raises(resconv.ResConvError) as error:
        resconv.Budget(macs=2.0, latency_ms=-1, runtime="x", batch=0)
    for part in ("macs=2.0", "latency_ms=-1", "runtime='x'", "batch=0"):
        assert part in str(error.value)


def test_milliseconds_are_milliseconds():
    assert resconv.Budget(latency_ms=8).limits(10, 10, 20.0)[2] == 8
    assert resconv.Budget(latency_ms=0.5).limits(10, 10, 20.0)[2] == 0.5
    assert resconv.Budget(latency=0.5).limits(10, 10, 20.0)[2] == 10


def test_no_unit_goes_in_vain(gated, images):
    """Without any one of the units that were not 0, the budget is missed."""
    budget = resconv.Budget(macs=0.55, num_params=0.8)
    plan = resconv.plan(gated, images, budget)
    costs = cost_model(gated, images)
    for name in plan.remove:
        left = costs.left([n for n in plan.remove if n != name])
        assert left.macs > 0.55 * costs.macs or left.num_params > 0.8 * costs.num_params


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
