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


def one_step(make, *, closure=False, scheduler=None, share=0.1, grad=0.5, scale=None):
    """Take one step in which every gradient is ``grad``; return the model and the optimizer."""
    torch.manual_seed(0)
    gated = resconv.convert(nets.create("resnet20").eval(), torch.randn(1, 3, 8, 8))
    optimizer = make(gated.parameters())
    if scheduler is not None:
        scheduler(optimizer)
    sparsifier = resconv.Sparsifier(gated, strength=0.0, learning_rate=share).attach(optimizer)

    def backward():
        for p in gated.parameters():
            p.grad = torch.full_like(p, grad)
        return torch.tensor(0.0)

    if closure:
        for p in gated.parameters():
            p.grad = torch.full_like(p, -7.0)  # of the step before
        optimizer.step(backward)
    else:
        backward()
        if scale is not None:
            optimizer.grad_scale, optimizer.found_inf = scale
        optimizer.step()
    return gated, optimizer, sparsifier


def assert_moved(gated, moved):
    """Every control began at 0."""
    for gate in resconv.gates(gated).values():
        assert gate.control.item() == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(
    ("make", "grad", "moved"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=9.0), -0.5, 0.005),
        (lambda p: torch.optim.SGD(p, 0.1, nesterov=True, momentum=0.9), -30.0, 0.01),  # bounded
        (lambda p: torch.optim.SGD(p, 0.1, maximize=True), 0.5, 0.005),
        (lambda p: torch.optim.AdamW(p, 0.1, weight_decay=9.0), -0.5, 0.01),
        (lambda p: torch.optim.AdamW(p, 0.1, fused=True), -1e-3, 0.01),
        (lambda p: torch.optim.Adam(p, 0.1, foreach=True, betas=(0.5, 0.6)), -1e-3, 0.01),
        (lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9), -0.5, 0.01),
    ],
)
def test_scalars_are_moved_beside_the_optimizer(make, grad, moved, closure):
    gated, optimizer, _ = one_step(make, closure=closure, grad=grad)
    assert_moved(gated, moved)
    scalars = {id(p) for g in resconv.gates(gated).values() for p in (g.scale, g.control)}
    assert not scalars & {id(p) for p in optimizer.state}
    assert len(optimizer.param_groups) == 1
    # They stay where zero_grad and gradient clipping find them.
    assert scalars <= {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(g.scale.grad is not None for g in resconv.gates(gated).values())


def test_a_fused_step_unscales_and_is_skipped_when_it_overflowed():
    def make(params):
        return torch.optim.SGD(params, 0.1, fused=True)

    for overflow, moved in ((0.0, 0.005), (1.0, 0.0)):
        scale = (torch.tensor(1024.0), torch.tensor(overflow))
        gated, _, sparsifier = one_step(make, grad=-0.5 * 1024, scale=scale)
        assert_moved(gated, moved)
        assert sparsifier.state_dict()["step"] == 1 - overflow


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5 ** (step + 1)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=9),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=9),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=9),
            ],
            [2],
        ),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
)
@pytest.mark.parametrize("early", [True, False])
def test_any_scheduler_before_or_after(scheduler, early):
    gated = resconv.convert(nets.create("resnet20").eval(), torch.randn(1, 3, 8, 8))
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1, momentum=0.9)
    plan = scheduler(optimizer) if early else None
    resconv.Sparsifier(gated, strength=0.0).attach(optimizer)
    plan = plan or scheduler(optimizer)
    wanted = 0.0
    for _ in range(6):
        for p in gated.parameters():
            p.grad = torch.full_like(p, -0.5)
        wanted += 0.1 * optimizer.param_groups[0]["lr"] * 0.5
        optimizer.step()
        plan.step(1.0) if isinstance(
            plan, torch.optim.lr_scheduler.ReduceLROnPlateau
        ) else plan.step()
    assert_moved(gated, wanted)
    assert wanted != pytest.approx(6 * 0.1 * 0.1 * 0.5)  # the rate did change


def test_refusals():
    gated = resconv.convert(nets.create("resnet20").eval(), torch.randn(1, 3, 8, 8))
    with pytest.raises(resconv.ResConvError, match="has no gates"):
        resconv.Sparsifier(nets.create("resnet20"))
    with pytest.raises(resconv.ResConvError, match="total_steps"):
        resconv.Sparsifier(gated, target=resconv.Budget(macs=0.5))
    with pytest.raises(resconv.ResConvError, match="cannot be reached"):
        resconv.Sparsifier(gated, target=resconv.Budget(macs=0.01), total_steps=100)
    dense = nets.create("resnet20").eval()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    with pytest.raises(resconv.ResConvError, match=r"does not hold 32 of 32 scalars.*a copy"):
        resconv.Sparsifier(resconv.convert(dense, torch.randn(1, 3, 8, 8))).attach(optimizer)


def test_attaching_anew_leaves_the_first_optimizer():
    gated = resconv.convert(nets.create("resnet20").eval(), torch.randn(1, 3, 8, 8))
    first, second = (torch.optim.SGD(gated.parameters(), lr=0.1) for _ in range(2))
    sparsifier = resconv.Sparsifier(gated).attach(first).attach(second)
    for optimizer, count in ((first, 0), (second, 1)):
        optimizer.step()
        assert sparsifier.state_dict()["step"] == count
    sparsifier.detach()
    second.step()
    assert sparsifier.state_dict()["step"] == 1
