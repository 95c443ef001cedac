"""The pressure arrives at the target, and repeats itself."""

from collections import Counter

import pytest
import torch
from torch import nn

import resconv
from resconv import data, nets
from resconv.planning.costs import cost_model
from resconv.selection.schedule import Schedule


def small(seed=0):
    torch.manual_seed(seed)
    x = torch.randn(16, 3, 8, 8)
    gated = resconv.convert(nets.create("resnet20").eval(), x).train()
    return gated, x, torch.arange(16) % 10


def train(steps=60, seed=0, resume_at=None, **kwargs):
    torch.manual_seed(seed)
    model = nets.create("resnet20").eval()
    x = torch.randn(16, 3, 8, 8)
    y = torch.arange(16) % 10
    gated = resconv.convert(model, x).train()
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.05, momentum=0.9)
    sparsifier = resconv.Sparsifier(gated, **kwargs).attach(optimizer)
    for step in range(steps):
        if step == resume_at:
            state = (gated.state_dict(), optimizer.state_dict(), sparsifier.state_dict())
            state = torch.load(_stored(state), weights_only=True)
            gated = resconv.convert(model, x).train()
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
        left = costs.macs - costs.cost_of(fewer).macs
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
    gated = resconv.convert(model, x)
    before = gated(x)
    resconv.Sparsifier(gated).attach(torch.optim.SGD(gated.parameters(), lr=0.1))
    torch.testing.assert_close(gated(x), before, rtol=1e-6, atol=1e-6)
    assert any(abs(g.scale.item() - 1) > 0.1 for g in resconv.gates(gated).values())


def one_step(make, *, closure=False, scheduler=None, share=0.1, grad=0.5, scale=None):
    """Take one step in which every gradient is ``grad``; return the model and the optimizer."""
    torch.manual_seed(0)
    gated = resconv.convert(nets.create("resnet20").eval(), torch.randn(1, 3, 8, 8), units="layers")
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
    gated = resconv.convert(nets.create("resnet20").eval(), torch.randn(1, 3, 8, 8), units="layers")
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
    gated = resconv.convert(nets.create("resnet20").eval(), torch.randn(1, 3, 8, 8), units="layers")
    with pytest.raises(resconv.ResConvError, match="has no gates"):
        resconv.Sparsifier(nets.create("resnet20"))
    with pytest.raises(resconv.ResConvError, match="total_steps"):
        resconv.Sparsifier(gated, target=resconv.Budget(macs=0.5))
    with pytest.raises(resconv.ResConvError, match="threshold only"):
        resconv.Sparsifier(gated, target=resconv.Budget(threshold=0.1), total_steps=100)
    with pytest.raises(resconv.ResConvError, match="cannot be reached"):
        resconv.Sparsifier(gated, target=resconv.Budget(macs=0.01), total_steps=100)
    dense = nets.create("resnet20").eval()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    with pytest.raises(resconv.ResConvError, match=r"does not hold 32 of 32 scalars.*a copy"):
        resconv.Sparsifier(resconv.convert(dense, torch.randn(1, 3, 8, 8), units="layers")).attach(
            optimizer
        )


def test_attaching_anew_leaves_the_first_optimizer():
    gated = resconv.convert(nets.create("resnet20").eval(), torch.randn(1, 3, 8, 8), units="layers")
    first, second = (torch.optim.SGD(gated.parameters(), lr=0.1) for _ in range(2))
    sparsifier = resconv.Sparsifier(gated).attach(first).attach(second)
    for optimizer, count in ((first, 0), (second, 1)):
        optimizer.step()
        assert sparsifier.state_dict()["step"] == count
    sparsifier.detach()
    second.step()
    assert sparsifier.state_dict()["step"] == 1


def test_on_digits_the_shallower_net_is_nearly_as_good():
    digits = data.load("digits")
    x = digits.train.images[:].float().div(255).sub(0.5).reshape(-1, 1, 8, 8)
    y = torch.as_tensor(digits.train.labels[:]).long()
    torch.manual_seed(0)
    model = nets.create("resnet20", in_channels=1)
    budget = resconv.Budget(macs=0.6)

    def epochs(net, count, optimizer):
        for _ in range(count):
            for index in torch.randperm(len(x)).split(128):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[index]), y[index]).backward()
                optimizer.step()

    epochs(model, 3, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    gated = resconv.convert(model.eval(), x[:2]).train()
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.05, momentum=0.9)
    steps = 5 * len(torch.arange(len(x)).split(128))
    sparsifier = resconv.Sparsifier(gated, target=budget, total_steps=steps).attach(optimizer)
    epochs(gated, 5, optimizer)
    outcome = sparsifier.finish()
    assert outcome.met, str(outcome)
    compact = resconv.prune(gated.eval(), resconv.plan(gated, x[:2], budget))
    assert resconv.profile(compact, x[:1]).macs == outcome.macs <= 0.6 * sparsifier.costs.macs
    with torch.no_grad():
        # On its own training images: what is tested is that pruning arrives without ruin.
        top1 = (compact(x).argmax(1) == y).float().mean()
        # The control: as many units, but those that training kept.
        wrong = [n for n in sparsifier.costs.names if n not in outcome.removed]
        for name in wrong[: len(outcome.removed)]:
            resconv.gates(gated)[name].scale.zero_()
        assert (gated(x).argmax(1) == y).float().mean() < 0.8 * top1
    assert top1 > 0.95


def test_a_run_that_ends_early_says_what_is_missing():
    gated, x, y = small()
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.05)
    budget = resconv.Budget(macs=0.4)
    sparsifier = resconv.Sparsifier(gated, target=budget, total_steps=100).attach(optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(gated(x), y).backward()
        optimizer.step()
    with pytest.warns(
        UserWarning, match=r"after 30 steps of the 100 announced, which leaves .* MACs"
    ):
        outcome = sparsifier.finish()
    assert not outcome.met
    assert outcome.pending
    assert not set(outcome.pending) & set(sparsifier.removed)
    costs = sparsifier.costs
    assert costs.left([*outcome.removed, *outcome.pending]).macs <= 0.4 * costs.macs
    assert costs.left(outcome.removed).macs > 0.4 * costs.macs
    # The optimizer is left alone from here on.
    before = len(sparsifier.history)
    optimizer.step()
    assert sparsifier.outcome().step == 30
    assert len(sparsifier.history) == before


def test_a_longer_run_keeps_its_zeros():
    budget = resconv.Budget(macs=0.5)
    _, sparsifier, _ = train(steps=90, target=budget, total_steps=60)
    _, exact, _ = train(steps=60, target=budget, total_steps=60)
    assert sparsifier.removed == exact.removed
    assert sparsifier.finish().met


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_and_skipped_steps(fused):
    """A GradScaler multiplies the gradients and skips steps: the plan is that of float32."""
    plans = []
    for scaled in (False, True):
        gated, x, y = small()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=scaled)
        optimizer = torch.optim.SGD(gated.parameters(), lr=0.05, fused=fused)
        sparsifier = resconv.Sparsifier(gated, target=resconv.Budget(macs=0.5), total_steps=40)
        sparsifier.attach(optimizer)
        for step in range(41 if scaled else 40):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(gated(x), y)
            if scaled and step == 20:  # an overflow
                bad = loss * float("inf")
                scaler.scale(bad).backward()
            else:
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        scores = sparsifier.state_dict()["importance"]
        assert len(scores) == len(sparsifier.costs.names)
        plans.append((sparsifier.finish(), scores))
    (plain, a), (amp, b) = plans
    assert plain.met
    assert amp.met
    ratios = [b[n] / a[n] for n in a if a[n] > 0]
    assert 0.2 < sorted(ratios)[len(ratios) // 2] < 5


def test_no_step_waits_for_the_device(monkeypatch):
    """Between two choices nothing is read back: on a GPU each reading would wait for it."""
    gated, x, y = small()
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.05)
    sparsifier = resconv.Sparsifier(gated, target=resconv.Budget(macs=0.5), total_steps=10_000)
    sparsifier.attach(optimizer)
    nn.functional.cross_entropy(gated(x), y).backward()
    optimizer.step()

    def refuse(self):
        raise AssertionError("read back")

    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    optimizer.step()
    with pytest.raises(AssertionError, match="read back"):
        _ = sparsifier.removed


def test_a_unit_without_gradients_is_chosen_last():
    gated, x, y = small()
    frozen = resconv.gates(gated)["layer2.1"]
    frozen.scale.requires_grad_(False)
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.05)
    sparsifier = resconv.Sparsifier(gated, target=resconv.Budget(macs=0.6), total_steps=40)
    sparsifier.attach(optimizer)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(gated(x), y).backward()
        optimizer.step()
    assert sparsifier.finish().met
    assert "layer2.1" not in sparsifier.removed


def train_to_half(make, *, rest, steps=60, dtype=torch.float64, autocast=False):
    """Train towards half the MACs, with units at 0 skipped or computed; return what ran at the end."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32, dtype=dtype)
    gated = resconv.convert(make().to(dtype).eval(), x).train()
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.05, momentum=0.9)
    sparsifier = resconv.Sparsifier(
        gated, target=resconv.Budget(macs=0.5), total_steps=steps
    ).attach(optimizer)
    if not rest:
        sparsifier._skip = lambda: None
    ran = set()
    for name, module in gated.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, n=name: ran.add(n))
    y = torch.arange(16) % 10
    for _ in range(steps):
        ran.clear()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(gated(x).float().to(dtype), y)
        loss.backward()
        optimizer.step()
    return gated, sparsifier, x, ran


@pytest.mark.parametrize("make", [lambda: nets.create("resnet20"), lambda: squeezing_net()])
def test_units_at_zero_rest_and_nothing_else_changes(make):
    skipped, first, x, ran = train_to_half(make, rest=True)
    computed, second, _, ran_all = train_to_half(make, rest=False)
    assert first.removed == second.removed
    assert first.removed
    assert len(ran) < len(ran_all)
    plan = resconv.plan(skipped, x, resconv.Budget(macs=0.5))
    compact = resconv.prune(skipped.eval(), plan, fuse=False)
    other = resconv.prune(computed.eval(), plan, fuse=False)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(compact.state_dict()[name], value, rtol=1e-9, atol=1e-12)
    kept = resconv.prune(skipped, resconv.Plan(first.removed[:1]), fuse=False)
    assert not any(g.skipped for g in resconv.gates(kept).values())
    # The law sees a wrong rest: a unit that is not at 0 moves the outputs when it rests.
    name, gate = next((n, g) for n, g in resconv.gates(skipped).items() if not g.skipped)
    with torch.no_grad():
        before = skipped.train()(x)
        gate.skipped = True
        assert (skipped(x) - before).abs().max() > 1e-3, name
        first.detach()  # nothing rests any longer
        torch.testing.assert_close(skipped(x), before, rtol=1e-9, atol=1e-12)


def test_skipped_units_keep_the_type_of_the_computed_ones():
    kwargs = {"dtype": torch.float32, "autocast": True, "steps": 30}
    gated, sparsifier, x, _ = train_to_half(lambda: nets.create("resnet20"), rest=True, **kwargs)
    assert sparsifier.removed
    seen = {}
    for name, gate in resconv.gates(gated).items():
        gate.register_forward_hook(
            lambda m, i, out, n=name: seen.setdefault(n, []).append(out.dtype)
        )
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        gated(x)
        sparsifier.detach()
        gated(x)
    assert all(len(set(types)) == 1 for types in seen.values()), seen


def squeezing_net():
    """Residual branches that end in a layer scale, an SE block or an activation, with ReLU in place."""

    class Squeeze(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))

    class Block(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.branch = nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), last
            )

        def forward(self, x):
            return x + self.branch(x)

    lasts = [Squeeze, lambda: nn.Conv2d(8, 8, 3, padding=1), nn.Tanh, lambda: nn.BatchNorm2d(8)]
    blocks = [Block(make()) for make in lasts for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


def test_every_kind_of_unit_keeps_its_share_of_the_work():
    """Three stages alike in everything but the scores, a little lower in the second."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    costs = cost_model(resconv.convert(nets.create("resnet56"), x, units="blocks"), x)
    stage = {n: n.split(".")[0] for n in costs.names}
    scores = {n: {"layer1": 1.0, "layer2": 0.81, "layer3": 1.21}[s] for n, s in stage.items()}

    def chosen(already_zero=()):
        schedule = Schedule(costs, resconv.Budget(macs=0.35), 1000)
        schedule.choose(50, scores, lambda name: 1.0)
        assert not schedule.fading  # too early; what each kind does is known from here on
        schedule.zero = list(already_zero)
        other = Schedule(costs, resconv.Budget(macs=0.35), 1000)
        other.load_state_dict(schedule.state_dict())
        for state in (schedule, other):
            state.choose(999, scores, lambda name: 1.0)
        assert schedule.fading == other.fading
        return Counter(stage[n] for n in schedule.taken)

    at_once = chosen()
    assert sum(at_once.values()) == 18
    assert max(at_once.values()) - min(at_once.values()) <= 1
    assert at_once["layer2"] == max(at_once.values())
    # What went before counts, also when its scores are gone.
    assert chosen([f"layer2.{i}" for i in range(1, 6)]) == at_once
    # Where scores differ by far, they decide: all others go first.
    scores |= {n: 100.0 for n in scores if stage[n] == "layer1"}
    assert chosen() == {"layer1": 2, "layer2": 8, "layer3": 8}


@pytest.mark.parametrize("share", [0.8, 0.5, 0.35])
def test_no_more_is_removed_than_the_target_asks_for(share):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    costs = cost_model(resconv.convert(nets.create("resnet56"), x), x)
    # A whole block is a little cheaper than one of its layers, and removes twice as much.
    scores = {n: 1.0 if "conv" in n else 0.9 for n in costs.names}
    schedule = Schedule(costs, resconv.Budget(macs=share), 1000)
    schedule.choose(999, scores, lambda name: 1.0)
    left = costs.left(schedule.taken).macs
    one = costs.own_macs("layer1.0.conv1")
    assert share * costs.macs - one < left <= share * costs.macs
    assert costs.own_macs("layer1.0") == 2 * one
