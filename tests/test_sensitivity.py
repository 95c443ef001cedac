"""What a unit's removal alone costs, and what a plan would leave, without training."""

import json
import re

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import resconv
from resconv.cli.app import app
from resconv.errors import BudgetError
from resconv.planning.costs import cost_model
from resconv.planning.plan import Plan
from resconv.selection.sensitivity import judge, plan_untrained, sensitivity, without
from tests import noisy

from .helpers import randomise


@pytest.fixture
def gated():
    torch.manual_seed(0)
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    net = randomise(noisy.net().double(), 0, x).eval()
    return resconv.convert(net, x, units="layers,blocks").eval()


@pytest.fixture
def batches():
    gen = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 1, 8, 8, generator=gen, dtype=torch.float64), torch.arange(n) % 10)
        for n in (5, 3)
    ]


def test_each_unit_is_judged_as_the_net_without_it_is(gated, batches):
    before = {k: v.clone() for k, v in gated.state_dict().items()}
    found = sensitivity(gated, batches)
    assert set(found) == set(resconv.gates(gated))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for name, judged in found.items():
        with without(gated, [name]):
            compact = resconv.prune(gated, Plan((name,)))
        with torch.no_grad():
            logits = compact(images)
        assert judged.loss == pytest.approx(
            F.cross_entropy(logits.float(), labels).item(), rel=1e-5
        )
        assert judged.top1 == pytest.approx(
            100 * (logits.argmax(1) == labels).double().mean().item()
        )
    assert len({round(j.loss, 6) for j in found.values()}) > 3  # units differ
    assert judge(gated, batches).loss not in [j.loss for j in found.values()]
    # A layer that goes leaves its input: with its shortcut closed the net would be cut in two.
    (layer,) = [n for n in found if n.endswith("0.conv2")]
    with torch.no_grad():
        resconv.gates(gated)[layer].scale.zero_()
    assert judge(gated, batches).loss != pytest.approx(found[layer].loss, rel=1e-4)
    gated.load_state_dict(before)
    assert all(torch.equal(v, before[k]) for k, v in gated.state_dict().items())


def test_units_come_back_after_an_error(gated):
    before = {k: v.clone() for k, v in gated.state_dict().items()}
    units = resconv.gates(gated)

    def fail():
        with without(gated, list(units)):
            assert all(g.scale.item() == 0 for g in units.values())
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert all(torch.equal(v, before[k]) for k, v in gated.state_dict().items())


def test_a_plan_without_training_takes_what_costs_the_least(gated):
    names = list(resconv.gates(gated))
    costs = cost_model(gated, torch.randn(2, 1, 8, 8, dtype=torch.float64))
    before = {k: v.clone() for k, v in gated.state_dict().items()}
    blocks = [n for n in names if not n.endswith(("conv1", "conv2"))]
    for cheap in blocks:
        loss_of = {n: 0.0 if n == cheap else 1.0 for n in names}
        chosen = plan_untrained(gated, resconv.Budget(macs=0.75), costs, None, loss_of)
        assert chosen.remove == (cheap,)
        assert chosen.macs_after <= 0.75 * chosen.macs_before
    assert all(torch.equal(v, before[k]) for k, v in gated.state_dict().items())
    with pytest.raises(BudgetError, match="cannot be reached"):
        plan_untrained(gated, resconv.Budget(macs=0.001), costs, None, loss_of)
    assert all(torch.equal(v, before[k]) for k, v in gated.state_dict().items())


# On the screen


def invoke(*args):
    return CliRunner().invoke(app, list(map(str, args)), catch_exceptions=True)


def assert_fits(output):
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    # A number that was cut would leave a line of digits alone.
    assert not [line for line in lines if re.fullmatch(r"[\s\d.,%]+", line) and line.strip()]


def test_a_table_fits_80_columns_and_groups_what_stays():
    result = invoke("inspect", "resnet20", "--image-size", 8, "--units", "all", "--macs", "0.7")
    assert result.exit_code == 0, result.output
    assert_fits(result.output)
    _, _, below = result.output.partition("What stays, and why:")
    reasons = [line.split(":")[0] for line in below.splitlines() if line.startswith("  ")]
    assert len(reasons) == len(set(reasons))
    assert "Plan: remove" in below


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    net = randomise(noisy.net(), 0, torch.randn(8, 1, 8, 8))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_units_of_a_trained_net_are_judged_timed_and_drawn(tmp_path, weights, monkeypatch):
    from resconv.latency import table

    monkeypatch.chdir(tmp_path)  # its name is as long as it is

    measured = []

    def once(*args):
        measured[:] = measured or [table.measure_latency(*args, seconds=0.1)]
        return measured[0]

    monkeypatch.setattr(resconv, "measure_latency", once)
    asked = [
        "inspect",
        "tests.noisy:net",
        "--data",
        "digits",
        "--limit",
        "40",
        "--weights",
        weights,
    ]
    result = invoke(*asked, "--macs", "0.7", "--plot", "u.svg")
    assert result.exit_code == 0, result.output
    assert_fits(result.output)
    assert "Untrained it has top-1" in " ".join(result.output.split())
    assert (tmp_path / "u.svg").read_text().count("<svg") == 1
    found = json.loads(invoke(*asked, "--json").output)
    assert found["num_images"] == 40
    assert found["plan"] is None
    units = {u["name"]: u for u in found["units"]}
    assert set(units) >= {"blocks.0", "blocks.1", "blocks.2"}
    assert all(u["latency_ms"] >= 0 for u in units.values())
    # What leaves with a block is what leaves with its layers, and more.
    assert units["blocks.0"]["latency_ms"] >= units["blocks.0.conv1"]["latency_ms"]
    assert units["blocks.0"]["macs"] == 2 * units["blocks.0.conv1"]["macs"]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["resnet20", "--data", "digits"], "resnet20 has random weights"),
        (["resnet20", "--weights", "w.pt"], "--weights takes images"),
        (["resnet20", "--plot", "units.pdf"], "--plot units.pdf: let it end in .svg or .png"),
        (["resnet20", "--macs", "2x"], "--macs 2x"),
        (["resnet20", "--units", "rooms"], "--units rooms"),
        (["resnet20", "--runtime", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_inspected_is_said_at_once(args, text, monkeypatch):
    monkeypatch.setattr(resconv, "units", lambda *a, **k: pytest.fail("work"))
    result = invoke("inspect", *args)
    assert isinstance(result.exception, resconv.ResConvError), result.output
    assert text in str(result.exception)
