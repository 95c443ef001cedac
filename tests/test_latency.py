"""Units are weighed by real timings, plans in milliseconds are checked on the finished net."""

import dataclasses

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import nn

import resconv
from resconv.latency import table as latency_module
from resconv.latency.least_squares import design, solve
from resconv.latency.table import check_latency, is_met, measure_latency
from resconv.latency.timing import Timing
from resconv.planning.costs import cost_model
from resconv.selection.planner import plan_measured

from .helpers import randomise_gates

SHARE = resconv.Budget(latency=0.6, threads=1)


def small_net():
    """Layers of two kinds, and of one kind that weighs next to nothing."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
    layers += [nn.MaxPool2d(2)]
    for _ in range(3):
        layers += [nn.Conv2d(24, 24, 5, padding=2), nn.ReLU()]
    layers += [nn.Conv2d(24, 24, 1, groups=24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 5)).eval()


@pytest.fixture(scope="module")
def example():
    return torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gated(example):
    return randomise_gates(resconv.convert(small_net(), example, units="layers"))


@pytest.fixture(scope="module")
def table(gated, example):
    return measure_latency(gated, example, SHARE, seconds=2.0)


@pytest.mark.parametrize("kinds", [1, 2, 9, 40])
def test_the_design_tells_all_kinds_apart(kinds):
    subsets = design(kinds)
    assert subsets == design(kinds)
    assert subsets[:2] == [frozenset(), frozenset(range(kinds))]
    assert len(set(subsets)) == len(subsets) <= 34
    rows = np.array([[1.0, *(float(k in s) for k in range(kinds))] for s in subsets])
    if kinds < 30:
        assert np.linalg.matrix_rank(rows) == kinds + 1


def test_exact_timings_give_exact_weights():
    rng = np.random.default_rng(0)
    true = np.array([0.3, 0.05, 0.0, 1.2, 0.4])
    sizes = np.array([9, 9, 8, 2, 1])
    counts = np.array([[n if k in s else 0 for k, n in enumerate(sizes)] for s in design(5)], float)
    times = 9.0 - counts @ true
    whole, found = solve(counts, times, 1e-6 * times, rng.uniform(0, 1, 5))
    assert whole == pytest.approx(9.0, rel=1e-4)
    np.testing.assert_allclose(found, true, atol=1e-3)
    # With noise of 1 %, the weights of whole kinds are right to a few percent of the net's time.
    noisy = times * (1 + 0.01 * rng.standard_normal(len(times)))
    _, found = solve(counts, noisy, 0.01 * times, true)
    assert (np.abs(found - true) * sizes).max() < 0.03 * 9
    assert found.min() >= 0


def test_what_the_timings_leave_open_falls_to_the_prior():
    prior = np.array([0.5, 0.25])
    counts = np.array([[0, 0], [4, 0]], float)
    _, found = solve(counts, np.array([10.0, 6.0]), np.array([0.01, 0.01]), prior)
    np.testing.assert_allclose(found, [1.0, 0.25], atol=0.02)


def test_the_table_is_that_of_the_model(table, gated, example, tmp_path):
    costs = cost_model(gated, example)
    assert set(table.unit_ms) == set(costs.names)
    for a in costs.names:
        for b in costs.names:
            if costs.signatures[a] == costs.signatures[b]:
                assert table.unit_ms[a] == table.unit_ms[b]
    # Three kinds, as there are three shapes of layer.
    assert len(set(costs.signatures.values())) == 3
    assert all(ms >= 0 for ms in table.unit_ms.values())
    assert sum(table.unit_ms.values()) <= table.latency_ms
    assert table.nets[0].removed == ()
    assert table.threads == 1
    table.save(tmp_path / "latency.json")
    assert resconv.LatencyTable.load(tmp_path / "latency.json") == table
    with pytest.raises(
        resconv.ResConvError,
        match="The latency table is damaged: the whole has no 'batch'",
    ):
        resconv.LatencyTable.from_json('{"runtime": "torch"}')
    with pytest.raises(resconv.ResConvError, match="negative or infinite"):
        resconv.LatencyTable.from_json(
            table.to_json().replace('"latency_ms": ', '"latency_ms": -', 1)
        )


def test_a_plan_is_checked_and_repeats_itself(table, gated, example, monkeypatch):
    before = {k: v.clone() for k, v in gated.state_dict().items()}
    plan, after = plan_measured(gated, example, SHARE, table)
    assert plan.latency_ms_after <= 0.6 * plan.latency_ms_before
    assert len(after.checks) >= 1
    assert not table.checks
    assert all(torch.equal(v, before[k]) for k, v in gated.state_dict().items())
    assert resconv.Plan.from_json(plan.to_json()) == plan

    def refuse(*args, **kwargs):
        raise AssertionError("timed again")

    monkeypatch.setattr(latency_module, "time_together", refuse)
    stored = resconv.LatencyTable.from_json(after.to_json())
    assert resconv.plan(gated, example, SHARE, latency=stored) == plan
    with pytest.raises(AssertionError, match="timed again"):
        resconv.plan(gated, example, SHARE, latency=table)


def test_a_model_that_promises_too_much_is_corrected(table, gated, example, monkeypatch):
    """Units that seem to save three times what they do: the first plan misses, a later one not.

    A clock that runs by MACs, so that it is the same wherever the test runs.
    """

    def by_macs(nets, *_, **__):
        times = [1e-6 * resconv.profile(n, example).macs for n in nets]
        return [Timing(ms, ms, ms, 1) for ms in times]

    monkeypatch.setattr(latency_module, "time_nets", by_macs)
    costs = cost_model(gated, example)

    def promising(factor):
        saved = {n: factor * 1e-6 * costs.cost_of([n]).macs for n in costs.names}
        return structs.replace(table, latency_ms=1e-6 * costs.macs, unit_ms=saved, nets=())

    _, honest = plan_measured(gated, example, SHARE, promising(1))
    assert [is_met(SHARE, check) for check in honest.checks] == [True]
    plan, after = plan_measured(gated, example, SHARE, promising(3))
    first = after.checks[0]
    assert not is_met(SHARE, first)
    assert len(plan.remove) > len(first.removed)
    assert plan.latency_ms_after <= 0.6 * plan.latency_ms_before


def test_limits_hold_together(table, gated, example):
    both = dataclasses.replace(SHARE, latency=0.9, macs=0.3)
    plan = resconv.plan(gated, example, both, latency=table)
    assert plan.macs_after <= 0.3 * plan.macs_before
    assert plan.latency_ms_after <= 0.9 * plan.latency_ms_before


def test_what_cannot_be_reached_is_refused_with_the_floor(table, gated, example):
    budget = resconv.Budget(latency_ms=1e-4, threads=1)
    floor = r"leaves a net that takes [\d.]+ ms where the dense one takes [\d.]+ ms"
    with pytest.raises(resconv.ResConvError, match=floor):
        resconv.plan(gated, example, budget, latency=table)
    with pytest.raises(
        resconv.ResConvError, match=r"about [\d.]+ of [\d.]+ ms \(the budget is 0.0001"
    ):
        resconv.Sparsifier(gated, target=budget, total_steps=100, latency=table)
    roomy = resconv.Budget(latency_ms=1e6, threads=1)
    with pytest.raises(resconv.ResConvError, match=r"within the target as it is .* ms\)"):
        resconv.Sparsifier(gated, target=roomy, total_steps=100, latency=table)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (resconv.Budget(latency=0.5, threads=2), "threads=1, asked is 2"),
        (resconv.Budget(latency=0.5, batch=4), "batch=1, asked is 4"),
        (resconv.Budget(latency=0.5, runtime="onnxruntime"), "runtime='torch'"),
    ],
)
def test_a_table_of_something_else_is_refused(budget, message, table, gated, example):
    with pytest.raises(resconv.ResConvError, match=message):
        resconv.plan(gated, example, budget, latency=table)


def test_a_table_of_another_net_or_machine_is_refused(table, gated, example):
    other = resconv.convert(
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()), example, units="layers"
    )
    with pytest.raises(resconv.ResConvError, match="another net"):
        resconv.plan(other, example, SHARE, latency=table)
    elsewhere = structs.replace(table, processor="abacus")
    with pytest.raises(resconv.ResConvError, match=r"another machine \(abacus"):
        resconv.plan(gated, example, SHARE, latency=elsewhere)


def test_training_arrives_at_milliseconds(example, table):
    """The run ends with zeros that meet the target on the finished net; so the plan is those."""
    gated = resconv.convert(small_net(), example, units="layers").train()
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.02)
    sparsifier = resconv.Sparsifier(gated, target=SHARE, total_steps=40, latency=table)
    sparsifier.attach(optimizer)
    x = torch.randn(8, 3, 24, 24)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(gated(x), torch.arange(8) % 5).backward()
        optimizer.step()
    outcome = sparsifier.finish()
    assert outcome.met, str(outcome)
    found = sparsifier.latency.check_of(outcome.removed)
    assert is_met(SHARE, found)
    assert sparsifier.history[-1].latency_ms == pytest.approx(outcome.latency_ms)
    plan = resconv.plan(gated.eval(), example, SHARE, latency=sparsifier.latency)
    assert set(plan.remove) == set(outcome.removed)
    assert plan.latency_ms_after == found.latency_ms
    # A resumed run knows what was measured.
    again = resconv.Sparsifier(gated, target=SHARE, total_steps=40, latency=table)
    again.load_state_dict(sparsifier.state_dict())
    assert again.latency == sparsifier.latency


def test_onnx_runtime():
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    x = torch.randn(1, 8, 32, 32)
    gated = randomise_gates(resconv.convert(nn.Sequential(*layers).eval(), x, units="layers"))
    budget = resconv.Budget(latency=0.7, runtime="onnxruntime", batch=2, threads=1)
    plan, table = plan_measured(gated, x, budget, None)
    assert (table.device, table.batch, table.threads) == ("cpu", 2, 1)
    assert plan.latency_ms_after <= 0.7 * plan.latency_ms_before


def test_a_missing_runtime_is_named(gated, example, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    budget = resconv.Budget(latency=0.7, runtime="onnxruntime")
    with pytest.raises(resconv.ResConvError, match=r"ONNX Runtime needs .* pip install"):
        measure_latency(gated, example, budget)


def test_checks_are_kept(table, gated, example):
    names = list(table.unit_ms)[:2]
    once, found = check_latency(gated, example, table, names)
    twice, again = check_latency(gated, example, once, reversed(names))
    assert again is found
    assert twice is once
