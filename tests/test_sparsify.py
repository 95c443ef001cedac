"""The pressure arrives at the target, and repeats itself."""

import pytest
import torch
from torch import nn

import resconv
from resconv import nets


def train(steps=60, seed=0, resume_at=None, **kwargs):
    torch.manual_seed(seed)
    model = nets.create("resnet20").eval()
    x = torch.randn(16, 3, 8, 8)
    y = torch.arange(16) % 10
    gated = resconv.convert(model, x, units="all").train()
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.05, momentum=0.9)
    sparsifier = resconv.Sparsifier(gated, **kwargs).attach(optimizer)
    for step in range(steps):
        if step == resume_at:
            state = (gated.state_dict(), optimizer.state_dict(), sparsifier.state_dict())
            state = torch.load(_stored(state), weights_only=True)
            gated = resconv.convert(model, x, units="all").train()
            optimizer = torch.optim.SGD(gated.parameters(), lr=0.05, momentum=0.9)
            sparsifier = resconv.Sparsifier(gated, **kwargs).attach(optimizer)
            gated.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            sparsifier.load_state_dict(state[2])
        optimizer.zero_grad()
        nn.functional.cross_entropy(gated(x), y).backward()
        optimizer.step()
    return gated.eval(), sparsifier, x


def _stored(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("macs", [0.7, 0.4])
def test_target_is_reached_with_exact_zeros(macs):
    budget = resconv.Budget(macs=macs)
    gated, sparsifier, x = train(target=budget, total_steps=60)
    plan = resconv.plan(gated, x, budget)
    assert set(plan.remove) == set(sparsifier.removed)
    assert plan.macs_after <= macs * plan.macs_before
    # No more than needed: one unit fewer misses the target.
    costs = sparsifier.costs
    for name in plan.remove:
        fewer = [n for n in plan.remove if n != name]
        left = costs.macs - costs.saving(fewer).macs
        assert left > macs * costs.macs or left == plan.macs_after
    compact = resconv.prune(gated, plan)
    resconv.verify(gated, compact, x)  # the scales are 0 already, so no plan is needed


def test_same_seed_same_plan():
    runs = [train(target=resconv.Budget(macs=0.5), total_steps=60)[1].removed for _ in range(2)]
    assert runs[0] == runs[1]


def test_resumed_run_equals_the_whole_one():
    kwargs = {"target": resconv.Budget(macs=0.5), "total_steps": 60}
    whole, first, x = train(**kwargs)
    resumed, second, _ = train(resume_at=25, **kwargs)
    assert first.removed == second.removed
    torch.testing.assert_close(resumed(x), whole(x), rtol=1e-4, atol=1e-5)


def test_strength_shrinks_and_subgradient_never_reaches_zero():
    _, strong, _ = train(steps=40, strength=2.0)
    assert strong.removed
    _, weak, _ = train(steps=40, strength=0.0)
    assert not weak.removed
    gated, plain, _ = train(steps=40, strength=0.05, mode="subgradient")
    assert not plain.removed
    assert all(torch.isfinite(g.scale) for g in resconv.gates(gated).values())


def test_normalising_keeps_the_function():
    torch.manual_seed(0)
    model = nets.create("resnet20").double().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.2, 3.0)
            nn.init.normal_(m.bias)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gated = resconv.convert(model, x, units="all")
    before = gated(x)
    resconv.Sparsifier(gated).attach(torch.optim.SGD(gated.parameters(), lr=0.1))
    torch.testing.assert_close(gated(x), before, rtol=1e-6, atol=1e-6)
    assert any(abs(g.scale.item() - 1) > 0.1 for g in resconv.gates(gated).values())


def test_scalars_get_a_group_of_their_own():
    gated = resconv.convert(nets.create("resnet20").eval(), torch.randn(1, 3, 8, 8))
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    resconv.Sparsifier(gated).attach(optimizer)
    own = optimizer.param_groups[-1]
    assert own["weight_decay"] == 0
    assert own["momentum"] == 0
    assert own["lr"] == pytest.approx(0.01)
    scalars = {id(p) for g in resconv.gates(gated).values() for p in (g.scale, g.control)}
    assert {id(p) for p in own["params"]} == scalars
    everything = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(everything) == len(set(everything)) == len(list(gated.parameters()))


def test_refusals():
    gated = resconv.convert(nets.create("resnet20").eval(), torch.randn(1, 3, 8, 8))
    with pytest.raises(resconv.ResConvError, match="has no gates"):
        resconv.Sparsifier(nets.create("resnet20"))
    with pytest.raises(resconv.ResConvError, match="total_steps"):
        resconv.Sparsifier(gated, target=resconv.Budget(macs=0.5))
    with pytest.raises(resconv.ResConvError, match="cannot be reached"):
        resconv.Sparsifier(gated, target=resconv.Budget(macs=0.01), total_steps=100)
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    with pytest.raises(resconv.ResConvError, match="scheduler was made before"):
        resconv.Sparsifier(gated).attach(optimizer)
