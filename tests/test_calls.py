"""The five calls: inputs and budget are given once, and what comes back prints for a reader."""

import gc
import weakref

import pytest
import torch
from torch import nn

import resconv
from resconv import errors
from resconv.analysis.inputs import as_call
from resconv.surgery.provenance import example_inputs_of, plan_of, provenance_of
from tests.helpers import randomise, randomise_gates


class TwoInputs(nn.Module):
    """Takes a tensor, a tensor of whole numbers and a plain value, as keyword arguments."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(
                m
                for _ in range(3)
                for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            )
        )
        self.embed = nn.Embedding(5, 4)

    def forward(self, images, label, twice):
        x = self.body(images).mean((2, 3)) + self.embed(label)
        return x * 2 if twice else x


def plain():
    return nn.Sequential(
        *(
            m
            for _ in range(4)
            for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        )
    )


def tensor_call():
    return plain(), torch.randn(2, 4, 6, 6, dtype=torch.float64)


def keyword_call():
    inputs = {
        "images": torch.randn(2, 4, 6, 6, dtype=torch.float64),
        "label": torch.tensor([0, 4]),
        "twice": True,
    }
    return TwoInputs(), inputs


CALLS = pytest.mark.parametrize("make", [tensor_call, keyword_call])


def converted(make, zero=1):
    """Return the gated net with ``zero`` of its scales at 0, and its inputs."""
    torch.manual_seed(0)
    net, inputs = make()
    gated = randomise_gates(resconv.convert(randomise(net.double()).eval(), inputs))
    with torch.no_grad():
        for gate in list(resconv.gates(gated).values())[:zero]:
            gate.scale.zero_()
    return gated, inputs


def run(net, inputs):
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        return net(*args, **kwargs)


def test_branches_are_converted_without_being_asked_for():
    net = resconv.nets.create("resnet20").eval()
    kinds = {u.kind for u in resconv.units(net, torch.randn(1, 3, 8, 8)) if u.removable}
    everything = set(resconv.gates(resconv.convert(net, torch.randn(1, 3, 8, 8))))
    layers = set(resconv.gates(resconv.convert(net, torch.randn(1, 3, 8, 8), units="layers")))
    assert kinds == {"layer", "block"}
    assert layers < everything


@CALLS
def test_what_arrived_at_0_goes_without_a_plan(make):
    gated, inputs = converted(make, zero=2)
    names = tuple(resconv.gates(gated))[:2]
    compact = resconv.prune(gated)
    by_plan = resconv.prune(gated, resconv.Plan(names))
    assert plan_of(compact).remove == names
    assert plan_of(compact).macs_after == resconv.profile(compact, inputs).macs
    for made in (compact, by_plan):
        torch.testing.assert_close(run(made, inputs), run(gated, inputs), rtol=1e-10, atol=1e-10)
    assert resconv.profile(compact, inputs) == resconv.profile(by_plan, inputs)


def test_a_budget_is_planned_and_pruned_at_once():
    gated, inputs = converted(tensor_call)
    budget = resconv.Budget(macs=0.6)
    plan = resconv.plan(gated, inputs, budget)
    assert resconv.plan(gated, budget) == resconv.plan(gated, budget=budget) == plan
    compact = resconv.prune(gated, budget)
    assert plan_of(compact) == plan
    resconv.verify(gated, compact, plan=plan)
    with pytest.raises(errors.VerificationError):  # scales that were not 0 went
        resconv.verify(gated, compact)


def test_nothing_at_0_is_refused_with_the_least_scale():
    gated, _ = converted(tensor_call, zero=0)
    with torch.no_grad():
        resconv.gates(gated)["6"].scale.fill_(0.125)
    with pytest.raises(errors.PlanError, match=r"among the 4 .* of 6, is 0\.125.*Budget\(macs"):
        resconv.prune(gated)
    with pytest.raises(errors.BudgetError, match=r"plan=0.5 is a float.*Budget\(macs=0.5\)"):
        resconv.prune(gated, 0.5)
    with pytest.raises(errors.ConversionError, match="not a converted model"):
        resconv.prune(plain())


@CALLS
@pytest.mark.parametrize("form", ["compact", "open", "folded", "loaded"])
def test_inputs_and_plan_travel_along(make, form, tmp_path):
    """In every form, calls without inputs do what they do with inputs of the same kind."""
    gated, inputs = converted(make)
    net = resconv.prune(gated, fuse=form != "open")
    if form == "folded":
        net = resconv.fuse(net, fold_norms=True)
    if form == "loaded":
        net = resconv.load(resconv.save(net, tmp_path / "first"), model=make()[0].double())
    assert plan_of(net).remove == tuple(resconv.gates(gated))[:1]
    resconv.verify(gated, net)
    if form == "open":
        net = resconv.fuse(net)
    given = run(net, inputs)
    made = run(net, example_inputs_of(None, net))
    assert made.shape == given.shape
    assert made.dtype == given.dtype
    back = resconv.load(resconv.save(net, tmp_path / "net"), model=make()[0].double())
    assert plan_of(back) == plan_of(net)
    torch.testing.assert_close(run(back, inputs), given, rtol=1e-10, atol=1e-10)
    assert resconv.export(net, tmp_path / "net.pt2").format == "pt2"


def test_the_batch_is_not_kept_by_any_net():
    """Not the user's tensor, nor a copy of it."""
    gated, inputs = converted(tensor_call)
    compact = resconv.prune(gated)
    theirs, size = weakref.ref(inputs), inputs.shape
    del inputs
    gc.collect()
    assert theirs() is None
    for net in (gated, compact):
        known = provenance_of(net).inputs
        assert known.spec.shape == size
        assert not known.kept
        assert known.whole is None
        resconv.units(net)


def test_given_inputs_win():
    gated, inputs = converted(tensor_call)
    compact = resconv.prune(gated)
    for call in (
        lambda x: resconv.verify(gated, compact, x),
        lambda x: resconv.fuse(compact, x),
        lambda x: resconv.plan(gated, x, resconv.Budget(macs=0.6)),
    ):
        call(inputs)
        with pytest.raises(errors.ResConvError):
            call(torch.randn(2, 5, 6, 6, dtype=torch.float64))


def test_a_net_without_inputs_asks_for_them(tmp_path):
    for call in (
        lambda: resconv.export(plain(), tmp_path / "net.pt2"),
        lambda: resconv.verify(plain(), plain()),
        lambda: resconv.fuse(plain().eval(), fold_norms=True),
        lambda: resconv.units(plain()),
    ):
        with pytest.raises(errors.TraceError, match=r"carries no example inputs.*Give example_inp"):
            call()


def test_norms_are_folded_where_it_is_said():
    gated, inputs = converted(keyword_call)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *plain())
    x = torch.randn(2, 4, 8, 8)
    model = resconv.convert(randomise(net).eval()[:3].append(nn.Conv2d(8, 8, 1)), x)
    assert any(isinstance(m, nn.BatchNorm2d) for m in resconv.fuse(model, x).modules())
    folded = resconv.fuse(model, fold_norms=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    resconv.verify(model, folded)
    resconv.verify(gated, resconv.fuse(gated, inputs))


def test_the_optimizer_is_attached_at_once_and_numbers_stand_for_a_budget():
    """Step by step the same scales, however it is said."""
    ends = []
    for said in (
        lambda m, o: resconv.Sparsifier(m, o, macs=0.6, params=0.9, total_steps=30),
        lambda m, o: resconv.Sparsifier(
            m, target=resconv.Budget(macs=0.6, num_params=0.9), total_steps=30
        ).attach(o),
    ):
        gated, inputs = converted(tensor_call, zero=0)
        optimizer = torch.optim.SGD(gated.train().parameters(), lr=0.01)
        sparsifier = said(gated, optimizer)
        for _ in range(30):
            optimizer.zero_grad()
            gated(inputs).square().mean().backward()
            optimizer.step()
        assert sparsifier.finish().met
        ends.append([gate.scale.item() for gate in resconv.gates(gated).values()])
    assert ends[0] == ends[1]
    assert 0 in ends[0]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"macs": 0.5, "target": resconv.Budget(macs=0.5)}, r"macs=0\.5 both say.*one of them"),
        ({"macs": 50.0}, r"macs=50\.0: a float is a fraction"),
        ({"params": 50.0}, r"^params=50\.0: a float is a fraction"),
        ({"latency_ms": 3, "latency": 0.5}, "limit the same thing"),
        ({"macs": 0.5, "threads": 2}, "no latency is limited"),
        ({"optimizer": 0.5}, "optimizer=0.5 is a float.*by name"),
        ({"macs": 0.5, "total_steps": None}, "say how many optimizer steps"),
    ],
)
def test_what_makes_no_sense_is_refused_in_the_words_that_were_typed(arguments, match):
    gated, _ = converted(tensor_call, zero=0)
    with pytest.raises(errors.BudgetError, match=match):
        resconv.Sparsifier(gated, **{"total_steps": 100, **arguments})


def test_results_print_as_tables():
    gated, inputs = converted(tensor_call)
    compact = resconv.prune(gated)
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1)
    results = {
        "units": (
            resconv.units(resconv.nets.create("resnet20").eval(), torch.randn(1, 3, 8, 8)),
            "MACs",
        ),
        "plan": (resconv.plan(gated, resconv.Budget(macs=0.6)), "before"),
        "hand": (resconv.Plan(("<b>", "x" * 100)), "unit"),
        "verify": (resconv.verify(gated, compact, inputs), "difference"),
        "sparsifier": (resconv.Sparsifier(gated, optimizer, macs=0.6, total_steps=50), "target"),
    }
    for name, (result, word) in results.items():
        lines = repr(result).splitlines()
        assert len(lines) >= 3, name
        assert max(map(len, lines)) <= 80, name
        assert word in lines[1], name
        page = result._repr_html_()
        assert page.count("<tr>") >= 2, name
        assert "<b>" not in page, name
    found = results["units"][0]
    assert isinstance(found, list)
    assert found[0] == next(iter(found))
    stays = [u.reason for u in found if not u.removable]
    assert stays
    assert all(word in repr(found) for reason in stays for word in reason.split())
