"""What is called removable can be removed, and what is not carries its reason before anything is trained."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import resconv
from resconv.planning.costs import cost_model
from resconv.selection.scalars import stepping
from resconv.surgery import proof

from .helpers import randomise, randomise_gates

WIDTH = 4


def conv(**kwargs):
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1, **kwargs)


def images(n=2, channels=WIDTH):
    return torch.randn(n, channels, 8, 8, dtype=torch.float64)


def built(net):
    torch.manual_seed(0)
    return randomise(net).double()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def each_can_go(net, x, units=("layers", "blocks")):
    """Remove each unit alone, and all of them; the outputs are those of the gated net."""
    gated = randomise_gates(resconv.convert(net, x, units=units)).eval()
    names = list(resconv.gates(gated))
    assert names
    for plan in (*((n,) for n in names), tuple(names)):
        whole = {n: g.scale.item() for n, g in resconv.gates(gated).items()}
        with torch.no_grad():
            for n in plan:
                resconv.gates(gated)[n].scale.zero_()
            compact = resconv.prune(gated, resconv.Plan(plan))
            close(compact(x), gated(x))
            for n, value in whole.items():
                resconv.gates(gated)[n].scale.fill_(value)
            assert not torch.allclose(compact(x), gated(x))
    return names


class AnyArguments(nn.Module):
    """Two branches in a forward that cannot be rewritten: it asks for numbers in a tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), nn.Conv2d(WIDTH, 2 * WIDTH, 1)

    def forward(self, x):
        x = x + self.a(x)
        if float(self.c.weight.sum()) > 1e9:
            return x
        return F.silu(x + self.b(x))


def test_what_prune_would_refuse_stays_with_the_reason():
    x = images()
    net = built(nn.Sequential(conv(), AnyArguments(), conv()))
    found = {u.name: u for u in resconv.units(net, x)}
    blocks = [u for u in found.values() if u.kind == "block"]
    assert len(blocks) == 2
    assert not any(u.removable for u in blocks)
    assert all("forward of 1 (AnyArguments)" in u.reason for u in blocks)
    # The convs inside those branches can go, and so can the others.
    assert {u.name for u in found.values() if u.removable} == {"0", "1.a", "1.b", "2"}
    assert each_can_go(net, x) == ["0", "1.a", "1.b", "2"]
    with pytest.raises(resconv.ResConvError, match=r"forward of 1 \(AnyArguments\)"):
        resconv.convert(net, x, units="blocks")


def test_trying_leaves_the_model_as_it_was():
    x = images()
    net = built(nn.Sequential(conv(), AnyArguments(), conv())).train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    names = [n for n, _ in net.named_modules()]
    resconv.units(net, x)
    resconv.convert(net, x, start="identity", units="layers")
    assert names == [n for n, _ in net.named_modules()]
    assert net.training
    for n, t in net.state_dict().items():
        assert torch.equal(t, before[n])


# One module under several names


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(bias=False), nn.BatchNorm2d(WIDTH)
        self.all_modules = nn.Sequential(self.conv, self.norm, nn.ReLU())

    def forward(self, x):
        return self.all_modules(x)


class HoldsOther(nn.Module):
    """A decoder that keeps its encoder, as U-Nets do."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.body = encoder, Twice()

    def forward(self, x):
        return self.body(x)


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(Twice(), Twice())
        self.decoder = HoldsOther(self.encoder)

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_a_layer_under_two_names_is_replaced_under_both(tmp_path):
    x = images()
    net = built(EncoderDecoder())
    assert len(each_can_go(net, x)) == 3
    gated = resconv.convert(net, x, units="layers")
    assert gated.encoder[0].conv is gated.encoder[0].all_modules[0]
    assert gated.decoder.encoder is gated.encoder
    plan = resconv.Plan(("encoder.0.conv",))
    for gate in resconv.gates(gated).values():
        gate.control.data.fill_(0.7)
    gated.encoder[0].conv.scale.data.zero_()
    compact = resconv.prune(gated, plan)
    assert compact.encoder[0].conv is compact.encoder[0].all_modules[0]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in compact.modules())
    resconv.save(compact, tmp_path / "net", plan=plan, example_inputs=x)
    back = resconv.load(tmp_path / "net", model=lambda: EncoderDecoder().double())
    close(back(x), gated.eval()(x))
    assert back.encoder[0].all_modules[0] is back.encoder[0].conv


def test_a_layer_that_runs_twice_still_stays():
    layer = conv()
    found = resconv.units(built(nn.Sequential(layer, nn.SiLU(), layer)), images())
    assert [u.reason for u in found] == ["0 is called 2 times in one forward pass"]


# Additions in other words


class Residual(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.f, self.how = nn.Sequential(conv(), nn.BatchNorm2d(WIDTH)), how

    def forward(self, x):
        return self.how(x, self.f(F.silu(x)))


@pytest.mark.parametrize(
    "how",
    [
        lambda x, f: torch.add(x, f, alpha=0.2),
        lambda x, f: torch.sub(x, f, alpha=3),
        lambda x, f: x - f,
        lambda x, f: sum([x, f]),
        lambda x, f: sum([f, x]),
        lambda x, f: x.sub(f),
    ],
    ids=["alpha", "sub alpha", "minus", "sum", "sum, branch first", "method"],
)
def test_a_residual_addition_in_other_words_can_go(how):
    net = built(nn.Sequential(nn.Conv2d(3, WIDTH, 3), Residual(how), conv()))
    assert each_can_go(net, images(channels=3), units="blocks") == ["1"]


@pytest.mark.parametrize(
    ("how", "left"),
    [(lambda x, f: f - x, "-1"), (lambda x, f: torch.add(f, x, alpha=0.5), "0.5")],
    ids=["minus the input", "half the input"],
)
def test_what_would_leave_a_multiple_of_the_input_stays_with_that_reason(how, left):
    net = built(nn.Sequential(nn.Conv2d(3, WIDTH, 3), Residual(how), conv()))
    (block,) = [u for u in resconv.units(net, images(channels=3)) if u.kind == "block"]
    assert block.reason == f"without the branch {left} times its input would be left, not the input"


# Shared parameters


def tied_norms():
    net = nn.Sequential(conv(), nn.BatchNorm2d(WIDTH), nn.ReLU(), conv(), nn.BatchNorm2d(WIDTH))
    net = built(net)
    net[4].weight, net[4].bias = net[1].weight, net[1].bias
    return net


@pytest.mark.parametrize("tied", [True, False])
def test_attach_leaves_the_outputs_alone(tied):
    net = tied_norms()
    if not tied:
        net[4].weight = nn.Parameter(net[1].weight.detach().clone())
        net[4].bias = nn.Parameter(net[1].bias.detach().clone())
    x = images()
    gated = resconv.convert(net, x, units="layers")
    before = gated(x)
    resconv.Sparsifier(gated).attach(torch.optim.SGD(gated.parameters(), lr=0.1))
    close(gated(x), before)
    scales = [g.scale.item() for g in resconv.gates(gated).values()]
    # Only what a norm has for itself goes into the scale.
    assert (scales == [1.0, 1.0]) is tied


class TiedBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.n1 = conv(), nn.BatchNorm2d(WIDTH)
        self.c2, self.n2 = conv(), nn.BatchNorm2d(WIDTH)
        self.n2.weight, self.n2.bias = self.n1.weight, self.n1.bias

    def forward(self, x):
        return F.silu(x + self.n2(self.c2(F.silu(self.n1(self.c1(x))))))


def test_the_scale_of_a_branch_does_not_go_into_a_norm_that_another_shares():
    x = images()
    net = built(nn.Sequential(conv(), TiedBranch(), conv()))
    blocks = [u for u in resconv.units(net, x) if u.kind == "block"]
    assert [u.removable for u in blocks] == [False]
    each_can_go(net, x)


# Gates


def test_a_gate_answers_for_the_layer_inside_it():
    layer = conv(groups=2, bias=False)
    layer.mark = "theirs"
    net = built(nn.Sequential(layer, nn.SiLU(), nn.Sequential(conv())))
    gate = resconv.convert(net, images(), units="layers")[0]
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(gate, name) == getattr(layer, name)
    assert (gate.groups, gate.padding_mode, gate.bias, gate.mark) == (2, "zeros", None, "theirs")
    assert gate.weight is gate.conv.weight
    assert not hasattr(gate, "running_mean")
    with pytest.raises(AttributeError, match="'ResConv' object has no attribute 'no_such'"):
        _ = gate.no_such


def test_second_derivatives_with_a_closed_shortcut():
    x = images().requires_grad_()
    gated = resconv.convert(
        built(nn.Sequential(conv(), nn.Softplus(), conv())), x.detach(), units="layers"
    )
    for gate in resconv.gates(gated).values():
        gate.control.data.zero_()

    def penalty(call):
        (slope,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        scalars = [s for g in resconv.gates(gated).values() for s in (g.scale, g.control)]
        return torch.stack(torch.autograd.grad(slope.square().sum(), scalars))

    def written(x):
        for m in gated:
            x = m.scale * m.conv(x) + m.control * x if hasattr(m, "scale") else m(x)
        return x

    close(penalty(gated), penalty(written))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(conv(), nn.BatchNorm2d(WIDTH))

    def forward(self, x):
        return (
            x + checkpoint(self.branch, x, use_reentrant=True)
            if self.training
            else (x + self.branch(x))
        )


def test_a_skipped_branch_under_a_reentrant_checkpoint():
    x = images()
    gated = resconv.convert(built(nn.Sequential(conv(), Checkpointed())), x, units="blocks")
    (gate,) = resconv.gates(gated).values()
    gate.scale.data.zero_()
    gate.skipped = True
    out = gated.train()(x)
    out.square().sum().backward()
    close(out, gated[0](x))
    assert gate.scale.grad is None
    assert gated[0].weight.grad is not None


# Optimizers inside others


class HandsOn:
    """Calls its optimizer, as accelerate's and fastai's do."""

    def __init__(self, optimizer, name):
        setattr(self, name, optimizer)
        self.param_groups = optimizer.param_groups


@pytest.mark.parametrize("name", ["optimizer", "opt"])
def test_an_optimizer_inside_another_is_found(name):
    inner = torch.optim.SGD([nn.Parameter(torch.ones(()))], lr=0.1)
    assert stepping(HandsOn(inner, name)) is inner
    assert stepping(inner) is inner


class Lookahead(HandsOn):
    pass


def test_an_optimizer_that_cannot_be_followed_is_named():
    inner = torch.optim.SGD([nn.Parameter(torch.ones(()))], lr=0.1)
    for outer in (Lookahead(inner, "optimizer"), HandsOn(inner, "hidden")):
        with pytest.raises(resconv.ResConvError, match=f"{type(outer).__name__} cannot be follow"):
            stepping(outer)


# Inputs


def test_an_example_without_a_batch_dimension_is_refused():
    net = built(nn.Sequential(conv(), nn.ReLU(), conv()))
    for verb in (resconv.units, resconv.convert, resconv.count):
        with pytest.raises(resconv.ResConvError, match=r"\(4, 8, 8\) has no batch dimension: 0"):
            verb(net, images(1)[0])
        verb(net, images(1))


class FromList(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, images):
        return self.body(torch.stack(images))


def test_the_costs_of_a_net_that_takes_a_list_of_images():
    body = built(nn.Sequential(conv(), nn.ReLU(), conv()))
    macs = resconv.profile(body, images(1)).macs
    for n in (1, 2, 3, 8):
        assert resconv.profile(FromList(body), (list(images(n)),)).macs == macs


def test_a_bare_number_is_no_budget():
    gated = resconv.convert(
        built(nn.Sequential(conv(), nn.ReLU(), conv())), images(), units="layers"
    )
    for call in (
        lambda: resconv.Sparsifier(gated, target=0.4, total_steps=60),
        lambda: resconv.plan(gated, images(), 0.4),
    ):
        with pytest.raises(resconv.ResConvError, match=r"Budget\(macs=0\.4\)"):
            call()


# Branches for training alone


class Rep(nn.Module):
    """Two convs and a norm in parallel, which become one conv."""

    wrong = False

    def __init__(self):
        super().__init__()
        self.big, self.small, self.skip = conv(), nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)
        self.one = None

    def forward(self, x):
        if self.one is not None:
            return F.silu(self.one(x))
        return F.silu(self.big(x) + self.small(x) + self.skip(x))

    def switch_to_deploy(self):
        one = conv().to(self.big.weight)
        a = self.skip.weight / (self.skip.running_var + self.skip.eps).sqrt()
        with torch.no_grad():
            one.weight.copy_(self.big.weight)
            one.weight[:, :, 1, 1] += self.small.weight[:, :, 0, 0] + torch.diag(a)
            one.bias.copy_(self.big.bias + self.small.bias + self.skip.bias)
            one.bias.sub_(a * self.skip.running_mean * (not self.wrong))
        self.one = one
        del self.big, self.small, self.skip


class ConvNorm(nn.Sequential):
    """Its ``fuse`` merely puts the norm into the conv: that is no branch."""

    def __init__(self):
        super().__init__(conv(), nn.BatchNorm2d(WIDTH))

    def fuse(self):
        raise AssertionError


def rep():
    return nn.Sequential(Rep(), ConvNorm(), Rep(), conv())


def test_branches_for_training_alone_are_named_and_merged_on_request(tmp_path):
    x = images()
    net = built(rep())
    for verb in (resconv.units, resconv.convert):
        with pytest.warns(UserWarning, match=r"2 modules .*\(0, 2\).*reparameterize=True"):
            verb(net, x)
    before = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gated = resconv.convert(net, x, reparameterize=True, units="layers")
    assert net[0].one is None
    close(gated(x), before)
    assert list(resconv.gates(gated)) == ["0.one", "1.0", "2.one", "3"]
    for gate in resconv.gates(gated).values():
        gate.control.data.fill_(1.0)
    gated[0].one.scale.data.zero_()
    plan = resconv.Plan(("0.one",))
    compact = resconv.prune(gated, plan)
    close(compact(x), gated(x))
    resconv.save(compact, tmp_path / "net", plan=plan, example_inputs=x)
    close(resconv.load(tmp_path / "net", model=lambda: rep().double())(x), gated(x))


def test_a_merge_that_changes_the_outputs_is_refused(monkeypatch):
    monkeypatch.setattr(Rep, "wrong", True)
    with pytest.raises(resconv.ResConvError, match=r"Merging the branches of 0, 2 changes"):
        resconv.convert(built(rep()), images(), reparameterize=True, units="layers")


class Maps(nn.Module):
    """Returns feature maps of two depths from one loop, as encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x).relu()
            maps.append(x)
        return maps


class Joins(nn.Module):
    """Adds what comes from the deepest map to the shallowest one."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = Maps()
        self.up = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        maps = self.maps(x)
        return maps[0] + self.up(maps[-1])


def test_a_branch_that_reaches_into_another_forward_saves_what_it_says_or_stays():
    torch.manual_seed(0)
    net, x = Joins().double().eval(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    units = resconv.units(net, x, "all")
    (branch,) = (u for u in units if u.macs == 2 * 4 * 4 * 9 * 36 + 4 * 4 * 36)
    assert not branch.removable
    assert "maps.stages.1 would still run" in branch.reason
    # What is said to be saved is saved: by every unit, alone.
    gated = randomise_gates(resconv.convert(net, x))
    costs = cost_model(gated, x)
    for name in costs.names:
        compact = resconv.prune(gated, resconv.Plan((name,)))
        assert resconv.profile(compact, x).macs == costs.left([name]).macs
    # Negative control: where the maps are made by the forward that adds, the branch can go.
    inline = Inline().double().eval()
    assert [u.removable for u in resconv.units(inline, x, "all") if u.macs == branch.macs] == [True]


class Inline(Joins):
    def forward(self, x):
        first = x = self.maps.stages[0](x).relu()
        for stage in self.maps.stages[1:]:
            x = stage(x).relu()
        return first + self.up(x)


class Down(nn.Sequential):
    """A stage that one conv can stand for."""

    def __init__(self) -> None:
        super().__init__(conv(), nn.ReLU(), nn.Conv2d(WIDTH, 2 * WIDTH, 3, 2, 1), nn.ReLU())


class Scaled(nn.Module):
    """Takes an option that the other stages do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1)

    def forward(self, x, factor=1.0):
        return x + factor * self.inner(x)


class AsksForClass(nn.Module):
    """Calls a stage as its class says."""

    def __init__(self, asked: type[nn.Module]) -> None:
        super().__init__()
        self.asked = asked
        self.stages = nn.ModuleList([Down(), Scaled()])

    def forward(self, x):
        for stage in self.stages:
            x = stage(x) if isinstance(stage, self.asked) else stage(x, factor=0.5)
        return x


def test_one_unit_that_code_knows_by_its_class_does_not_keep_the_others_from_going():
    net, x = built(AsksForClass(Down)), images()
    units = {u.name: u for u in resconv.units(net, x, "all")}
    assert not units["stages.0"].removable
    assert "factor" in units["stages.0"].reason
    names = each_can_go(net, x, "all")
    assert "stages.0" not in names
    # Negative control: asked for a class that it has afterwards, it goes as well.
    assert "stages.0" in each_can_go(built(AsksForClass(nn.Module)), x, "all")


class Merges(nn.Module):
    """Two convs in training mode, and one in eval mode that stands for both."""

    def __init__(self, in_training: bool, writes: bool = False) -> None:
        super().__init__()
        self.in_training, self.writes = in_training, writes
        self.a, self.b, self.merged = conv(bias=False), conv(bias=False), conv(bias=False)

    def forward(self, x):
        if self.in_training and self.training:
            return self.a(x) + self.b(x)
        if self.writes:  # as SPAN does
            self.merged.weight.data = self.a.weight.data + self.b.weight.data
        return self.merged(x)


def around(*options):
    return built(nn.Sequential(conv(), Merges(*options), conv()))


def reasons(net, kinds="layers"):
    return {u.name: u.reason for u in resconv.units(net, images(), kinds)}


def test_a_layer_that_training_never_runs_is_no_unit():
    assert "does not run in training mode" in reasons(around(True))["1.merged"]
    assert each_can_go(around(True), images(), ("layers",)) == ["0", "2"]
    # Negative control: the same layer in a forward that runs it in both modes.
    assert each_can_go(around(False), images(), ("layers",)) == ["0", "1.merged", "2"]


def test_nothing_is_put_into_a_weight_that_the_forward_writes():
    net = around(False, True)
    assert "the forward writes into 1.merged.weight" in reasons(net)["1.merged"]
    # The controls of its neighbours go elsewhere.
    assert each_can_go(net, images(), ("layers",)) == ["0", "2"]


class SkipsAtRandom(nn.Module):
    """Leaves a layer out of most batches in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(), conv(), conv()])

    def forward(self, x):
        for layer in self.layers:
            if not self.training or torch.rand(()) < 0.6:
                x = layer(x)
        return x


def test_a_layer_that_training_runs_at_times_is_a_unit():
    units = resconv.units(built(SkipsAtRandom()), images(), "layers")
    assert not [u.reason for u in units if "does not run in training" in (u.reason or "")]


class KeepsMask(nn.Module):
    """Samples a dropout mask for the batch's size, and keeps it until the size changes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU())
        self.size = 2
        self.register_buffer("mask", F.dropout(torch.ones(64, WIDTH, 1, 1), 0.5))

    def forward(self, x):
        if len(x) != self.size:
            self.size = len(x)
            if self.training:
                self.mask = F.dropout(torch.ones_like(self.mask), 0.5)
        return self.body(x) * (self.mask[: len(x)] if self.training else 1)


def test_a_mask_that_a_net_keeps_between_batches_is_no_difference(monkeypatch):
    net, x = built(KeepsMask()), images()
    gated = randomise_gates(resconv.convert(net, x)).eval()
    gated(images(5))  # the last batch was of another size
    plan = resconv.Plan(("body.2",))
    compact = resconv.prune(gated, plan)
    resconv.verify(gated, compact, x, plan=plan)
    # Negative control: what differs in training mode alone is seen all the same.
    run = proof._run
    halved = lambda m, e: run(m, e) * (0.5 if m.training and not resconv.gates(m) else 1)  # noqa: E731
    monkeypatch.setattr(proof, "_run", halved)
    with pytest.raises(resconv.ResConvError, match="In training mode"):
        resconv.prune(gated, plan)


class Chaotic(nn.Module):
    """Doubles a difference again and again, as a net does whose activations grow without bound."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())

    def forward(self, x):
        y = self.body(x).sigmoid()
        for _ in range(14):
            y = 4 * y * (1 - y)
        return y


def test_rounding_that_a_net_magnifies_is_told_from_a_fault_in_double(monkeypatch):
    net, x = built(Chaotic()).float(), images().float()
    gated = randomise_gates(resconv.convert(net, x)).eval()
    plan = resconv.Plan(("body.2",))
    monkeypatch.setattr(proof.Witness, "_rounding", lambda self: 0.0)
    monkeypatch.setattr(proof, "_TOLERANCE", proof._TOLERANCE | {torch.float32: 1e-7})
    compact = resconv.prune(gated, plan)
    assert compact.body[0].weight.dtype == torch.float32
    # Negative control: a fault is one in double, too.
    run = proof._run
    wrong = lambda m, e: run(m, e) * (1 if resconv.gates(m) else 1 + 1e-6)  # noqa: E731
    monkeypatch.setattr(proof, "_run", wrong)
    with pytest.raises(resconv.errors.VerificationError):
        resconv.prune(gated, plan)


class Numbered(nn.Module):
    """Calls its stages as numbers on them say, as YOLO nets do."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Down(), Scaled()])
        for i, stage in enumerate(self.stages):
            stage.reads = i - 1

    def forward(self, x):
        for stage in self.stages:
            x = stage(x) if stage.reads == -1 else stage(x, factor=0.5)
        return x


def test_what_comes_in_a_modules_place_has_the_attributes_that_code_reads(tmp_path):
    net, x = built(Numbered()), images()
    assert "stages.0" in each_can_go(net, x, "all")
    gated = resconv.convert(net, x, units="all")
    compact = resconv.prune(gated, resconv.Plan(("stages.0",)))
    assert compact.stages[0].reads == -1
    close(resconv.load(resconv.save(compact, tmp_path), model=net)(x), compact(x))
