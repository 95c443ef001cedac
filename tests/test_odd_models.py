"""What models in the wild do: each is handled exactly, or refused with a reason."""

import copy
import dataclasses
import random
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import resconv
from resconv.nn.gates import zeroed
from resconv.surgery.verification import relative_error

from .helpers import randomise, randomise_gates

WIDTH = 8


def conv(c_in=WIDTH, c_out=WIDTH, kernel=3, **kwargs):
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **kwargs)


def layer(norm=None):
    return nn.Sequential(conv(), norm or nn.BatchNorm2d(WIDTH), nn.ReLU())


def prune_all(model, x, *, kept=(), remove=None, tolerance=1e-10, units=("layers", "blocks")):
    """Convert, prune (all units but ``kept``), and hold the laws; return the compact net."""
    model = randomise(model)
    before = run(model, x)
    gated = resconv.convert(model, x, units=units)
    assert relative_error(run(gated, x), before) <= tolerance
    randomise_gates(gated, 3)
    names = [n for n in resconv.gates(gated) if n not in kept] if remove is None else remove
    assert names
    plan = resconv.Plan(tuple(names))
    with zeroed(gated, plan.remove):
        promised = run(gated, x)
    assert relative_error(promised, before) > 1e-3  # negative control
    for fuse in (True, False):
        compact = resconv.prune(gated, plan, fuse=fuse)
        assert relative_error(run(compact, x), promised) <= tolerance
    return resconv.prune(gated, plan)


def run(model, x):
    from resconv.analysis.inputs import as_call

    args, kwargs = as_call(x)
    with torch.no_grad():
        return model(*args, **kwargs)


def reasons(model, x):
    return {u.name: u.reason for u in resconv.units(model, x)}


@pytest.fixture
def small():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


class Net(nn.Module):
    """A stem, whatever is between, and a head that is a linear layer."""

    def __init__(self, *between):
        super().__init__()
        self.stem = nn.Sequential(conv(3), nn.ReLU())
        self.body = nn.Sequential(*between)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def net(*between):
    return Net(*between).double().eval()


# --- modules, parameters and containers ---------------------------------------------------------


def test_a_module_called_twice_stays_and_the_rest_goes(small):
    twice = layer()
    model = net(twice, layer(), twice)
    assert "called 2 times" in reasons(model, small)["body.0.0"]
    prune_all(model, small)


def test_a_kernel_shared_by_two_layers_stays(small):
    model = net(layer(), layer(), layer())
    model.body[1][0].weight = model.body[0][0].weight
    assert "shared with another layer" in reasons(model, small)["body.0.0"]
    compact = prune_all(model, small)
    assert compact.body[1][0].weight is compact.body[0][0].weight


def test_a_norm_tied_to_two_convs(small):
    norm = nn.BatchNorm2d(WIDTH)
    prune_all(net(conv(), norm, nn.ReLU(), conv(), norm, nn.ReLU()), small)


class Tied(nn.Module):
    """Two BatchNorms with the same parameters (not the same module)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = layer(), layer()
        self.b[1].weight, self.b[1].bias = self.a[1].weight, self.a[1].bias

    def forward(self, x):
        return self.b(self.a(x)) + x


@pytest.mark.parametrize("remove", [["body.0.a.0"], ["body.0.b.0"], None])
def test_norms_with_tied_parameters(remove, small):
    prune_all(net(Tied(), layer()), small, remove=remove)


@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize("where", ["conv", "norm", "act", "sequential", "block"])
def test_hooks_go_on_running_or_the_layer_stays(where, pre, small):
    inner = layer()
    model = net(layer(), inner, layer())
    module = {"conv": inner[0], "norm": inner[1], "act": inner[2]}.get(where)
    module = module or (inner if where == "sequential" else model.body)
    if pre:
        module.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
    else:
        module.register_forward_hook(lambda m, args, y: y * 1.5)
    if where == "conv":
        assert "carries a hook" in reasons(model, small)["body.1.0"]
    prune_all(model, small)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: parametrizations.weight_norm(m),
        lambda m: parametrizations.spectral_norm(m),
        lambda m: nn.utils.weight_norm(m),
        lambda m: nn.utils.spectral_norm(m),
    ],
)
def test_a_parametrised_kernel_stays(make, small):
    model = net(layer(), nn.Sequential(conv(), nn.ReLU()), layer())
    make(model.body[1][0])
    assert reasons(model, small)["body.1.0"] is not None
    prune_all(model, small)


class Indexing(nn.Module):
    """Code that counts positions in a Sequential."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.layers = nn.Sequential(
            conv(3), nn.ReLU(), conv(), nn.BatchNorm2d(WIDTH), nn.ReLU(), conv(), nn.ReLU(), conv()
        )

    def forward(self, x):
        if self.how == "calls":
            for i in range(8):
                x = self.layers[i](x)
            return x
        if self.how == "slices":
            for part in self.layers[:2]:
                x = part(x)
            return self.layers[2:](x)
        if self.how == "counts":
            for i, part in enumerate(self.layers):
                x = part(x) * 2 if i == 5 else part(x)
            return x
        y = self.layers(x)
        return y * self.layers[7].bias.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("how", ["calls", "slices", "counts", "reads"])
def test_positions_in_a_sequential_stay_what_they_were(how, small):
    model = Indexing(how).double()
    compact = prune_all(model, small, kept=("layers.7",))
    assert len(compact.layers) == len(model.layers)
    assert [n for n, _ in compact.layers.named_children()] == [str(i) for i in range(8)]
    if how == "reads":  # its last layer stays as it is, since its bias is read by other code
        assert "is read by other code" in reasons(model, small)["layers.7"]
        return
    # ... and the next conversion works on what is left.
    again = resconv.convert(compact, small)
    assert relative_error(run(again, small), run(compact, small)) < 1e-10


def test_a_sequential_that_only_runs_loses_what_is_gone(small):
    compact = prune_all(net(*layer(), *layer(), *layer()), small, remove=["body.3"])
    assert [n for n, _ in compact.body.named_children()] == ["0", "2", "6", "8"]


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.many = nn.ModuleList([layer(), layer(), layer()])
        self.named = nn.ModuleDict({"left": layer(), "right": layer()})

    def forward(self, x):
        for part in self.many:
            x = part(x)
        return self.named["left"](x) + self.named["right"](x)


def test_module_lists_and_dicts(small):
    prune_all(net(Lists()), small)


def test_frozen_parameters_stay_frozen(small):
    model = net(layer(), layer(), layer()).requires_grad_(False)
    model.head.requires_grad_(True)
    gated = randomise_gates(resconv.convert(model, small, units="layers"))
    assert all(g.scale.requires_grad for g in resconv.gates(gated).values())
    plan = resconv.Plan(("body.1.0",))
    for compact in (resconv.prune(gated, plan), resconv.fuse(gated, small, fold_norms=True)):
        trained = {n for n, p in compact.named_parameters() if p.requires_grad}
        assert trained == {"head.weight", "head.bias"}


def test_modes_are_kept(small):
    model = randomise(net(layer(), layer())).train()
    model.body[1].eval()
    gated = resconv.convert(model, small, units="layers")
    assert model.training
    assert not model.body[1].training
    assert gated.training
    assert gated.body[0].training
    assert not gated.body[1][0].training
    randomise_gates(gated)
    compact = resconv.prune(gated, resconv.Plan(("body.0.0",)))
    assert gated.training
    assert gated.body[0].training
    assert compact.training
    assert compact.head.training
    assert not compact.get_submodule("body.1.0").training
    resconv.verify(gated, compact, small, plan=resconv.Plan(("body.0.0",)))


# --- types, devices, wrappers -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, small):
    model = randomise(net(layer(), layer(), layer())).to(dtype)
    gated = randomise_gates(resconv.convert(model, small, units="layers"))
    plan = resconv.Plan(("body.0.0", "body.2.0"))
    compact = resconv.prune(gated, plan)
    assert {p.dtype for p in compact.parameters()} == {dtype}
    resconv.verify(gated, compact, small, plan=plan)
    with pytest.raises(resconv.ResConvError, match="disagree"):
        resconv.verify(gated, compact, small)


@pytest.mark.parametrize("wrap", ["parallel", "compile", "ddp"])
def test_wrapped_models(wrap, small, tmp_path):
    model = randomise(net(layer(), layer()))
    if wrap == "compile":
        wrapped = torch.compile(model)
    elif wrap == "parallel":
        wrapped = nn.DataParallel(model)
    else:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        wrapped = nn.parallel.DistributedDataParallel(model)
    try:
        gated = randomise_gates(resconv.convert(wrapped, small, units="layers"))
        plan = resconv.Plan(("body.0.0",))
        around = nn.DataParallel(gated)
        compact = resconv.prune(around, plan)
        resconv.verify(around, compact, small, plan=plan)
        assert isinstance(compact, Net)
        assert isinstance(gated, Net)
    finally:
        if wrap == "ddp":
            torch.distributed.destroy_process_group()


def test_no_numbers_no_surgery(small):
    with torch.device("meta"):
        model = Net(layer())
    with pytest.raises(
        resconv.ResConvError, match=r"stem\.0\.weight.*meta device.*Load the weights"
    ):
        resconv.convert(model, small, units="layers")
    lazy = nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.ReLU(), conv())
    with pytest.raises(
        resconv.ResConvError, match=r"has no size yet \(a lazy module\).*Run the model"
    ):
        resconv.convert(lazy, small, units="layers")
    lazy(small.float())
    assert set(resconv.gates(resconv.convert(lazy.eval(), small, units="layers"))) == {"2"}
    broken = net(layer())
    with torch.no_grad():
        broken.body[0][0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(resconv.ResConvError, match=r"body\.0\.0\.weight.*hold NaN"):
        resconv.convert(broken, small, units="layers")


# --- inputs, outputs, control flow --------------------------------------------------------------


class Outputs(nn.Module):
    """Returns an inner value as well, in the form asked for."""

    def __init__(self, wrap):
        super().__init__()
        self.stem, self.mid, self.last = conv(3), layer(), layer()
        self.wrap = wrap

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.mid(x)
        return self.wrap(x, y, self.last(y))


@dataclasses.dataclass
class Answer:
    first: torch.Tensor
    second: torch.Tensor
    inner: object


class Plain:
    def __init__(self, *values):
        self.values = list(values)


Named = namedtuple("Named", "a b c")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b, c: (a, [b, {"c": c}]),
        lambda a, b, c: {"a": a, "b": b, "c": c},
        lambda a, b, c: Answer(a, b, Answer(c, c, None)),
        lambda a, b, c: Named(a, b, c),
        lambda a, b, c: Plain(a, b, c),
    ],
)
def test_forms_of_outputs(wrap, small):
    compact = prune_all(Outputs(wrap).double(), small)
    # All three are outputs, so both factors are left over: none may be moved across one.
    assert len(resconv.leftovers(compact)) == 2
    assert type(compact(small)) is type(wrap(0, 1, 2))


class Inputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mid, self.extra = conv(3), layer(), layer()

    def forward(self, image, *, scale=1.0, mask=None):
        x = self.mid(torch.relu(self.stem(image))) * scale
        return self.extra(x if mask is None else x * mask)


@pytest.mark.parametrize("form", ["tuple", "dict", "keyword"])
def test_forms_of_inputs(form, small):
    mask = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    inputs = {
        "tuple": (small,),
        "dict": {"image": small, "mask": mask},
        "keyword": {"image": small, "scale": 0.5},
    }[form]
    prune_all(Inputs().double(), inputs)


class Buffers(nn.Module):
    """Buffers that are read, and one that the forward writes."""

    def __init__(self):
        super().__init__()
        self.mid, self.last = layer(), layer()
        self.register_buffer("shift", torch.rand(1, WIDTH, 1, 1))
        self.register_buffer("gain", torch.rand(1, WIDTH, 1, 1) + 0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return self.last((self.mid(x) + self.shift) * self.gain)


def test_buffers_are_read_and_not_worn(small):
    model = net(Buffers(), layer())
    prune_all(model, small)
    calls = model.body[0].calls.item()
    resconv.units(model, small)
    resconv.profile(model, small)
    assert model.body[0].calls.item() == calls


class Decides(nn.Module):
    """What runs depends on a value; the record sees one of the ways."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two, self.out = conv(3), layer(), layer(), layer()
        self.act = nn.ReLU()

    def forward(self, x):
        bright = x.mean() > 0
        x = torch.relu(self.stem(x))
        x = self.one(x)
        x = torch.relu(x) if bright else torch.sigmoid(x) - 0.5
        return self.out(self.act(self.two(x)))


def test_both_ways_of_a_decision_stay_right(small):
    model = randomise(Decides().double())
    bright, dark = small.abs(), -small.abs()
    gated = randomise_gates(resconv.convert(model, bright, units="layers"), 3)
    done = 0
    for name in resconv.gates(gated):
        plan = resconv.Plan((name,))
        try:
            compact = resconv.prune(gated, plan)
        except resconv.ResConvError as error:
            if "has to be rewritten" not in str(error):
                raise
            continue
        done += 1
        for x in (bright, dark):
            resconv.verify(gated, compact, x, plan=plan)
    assert done
    assert relative_error(run(model, bright), run(model, dark)) > 1e-2


@torch.jit.script
def scripted_gain(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * x


class Scripted(nn.Module):
    def __init__(self, example):
        super().__init__()
        self.mid, self.last = layer(), layer()
        self.inside = torch.jit.script(nn.Sequential(conv(), nn.ReLU()).double().eval())

    def forward(self, x):
        return self.last(scripted_gain(self.inside(self.mid(x))))


def test_script_modules_inside(small):
    model = net(Scripted(None), layer())
    assert all(
        "inside" not in n for n in resconv.gates(resconv.convert(model, small, units="layers"))
    )
    prune_all(model, small)


# --- norms and blocks ---------------------------------------------------------------------------


def frozen_norm(channels):
    from torchvision.ops import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d(channels)
    norm.running_mean.uniform_(-0.3, 0.3)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.uniform_(-0.3, 0.3)
    return norm


class ChannelsLast(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "norm",
    [
        nn.SyncBatchNorm,
        nn.InstanceNorm2d,
        lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
        lambda c: nn.BatchNorm2d(c, track_running_stats=False),
        lambda c: nn.BatchNorm2d(c, affine=False),
        lambda c: nn.GroupNorm(2, c),
        ChannelsLast,
        nn.LocalResponseNorm,
        frozen_norm,
    ],
)
def test_norms_behind_the_conv(norm, small):
    blocks = [layer(norm(WIDTH)) for _ in range(3)]
    prune_all(net(*blocks, Branch(layer(norm(WIDTH)))), small)


class Branch(nn.Module):
    """A residual branch with what zoos put into it."""

    def __init__(self, inner, *, attention=False, gamma=False, drop=False):
        super().__init__()
        from timm.layers import DropPath, SqueezeExcite

        self.inner = inner
        self.attention = SqueezeExcite(WIDTH, rd_channels=4) if attention else nn.Identity()
        self.gamma = nn.Parameter(torch.rand(WIDTH, 1, 1) + 0.5) if gamma else None
        self.drop = DropPath(0.2) if drop else nn.Identity()

    def forward(self, x):
        y = self.attention(self.inner(x))
        if self.gamma is not None:
            y = y * self.gamma
        return F.relu(x + self.drop(y))


@pytest.mark.parametrize(
    "options",
    [
        {"attention": True},
        {"gamma": True},
        {"drop": True},
        dict.fromkeys(("attention", "gamma", "drop"), True),
    ],
)
@pytest.mark.parametrize("units", ["layers", "blocks", "all"])
def test_residual_branches_of_the_zoos(options, units, small):
    model = net(Branch(layer(), **options), Branch(layer(), **options))
    prune_all(model, small, units=units)
    first = next(iter(resconv.gates(resconv.convert(model, small, units=units))))
    prune_all(model, small, units=units, remove=[first])


def test_weight_standardised_convs_stay(small):
    from timm.layers import ScaledStdConv2d, StdConv2d

    model = net(
        nn.Sequential(StdConv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()),
        nn.Sequential(ScaledStdConv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()),
        layer(),
    )
    found = reasons(model, small)
    assert "computed in its forward" in found["body.0.0"]
    assert "computed in its forward" in found["body.1.0"]
    prune_all(model, small)


class Nested(nn.Module):
    """A block with layers inside, around a norm with its own activation (timm's BatchNormAct)."""

    def __init__(self):
        super().__init__()
        from timm.layers import BatchNormAct2d

        self.conv1, self.bn1 = conv(bias=False), BatchNormAct2d(WIDTH)
        self.conv2, self.bn2 = conv(bias=False), BatchNormAct2d(WIDTH, apply_act=False)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


def test_any_subset_of_nested_units(small):
    model = randomise(net(Nested(), layer(), Nested()))
    gated = randomise_gates(resconv.convert(model, small), 4)
    names = list(resconv.gates(gated))
    assert len(names) == 7
    for subset in range(1, 2 ** len(names), 5):
        remove = tuple(n for i, n in enumerate(names) if subset >> i & 1)
        plan = resconv.Plan(remove)
        compact = resconv.prune(gated, plan)
        resconv.verify(gated, compact, small, plan=plan)
        assert not resconv.leftovers(compact)


def test_the_argument_is_never_changed(small):
    model = net(layer(), Branch(layer()))
    state = copy.deepcopy(model.state_dict())
    shape = repr(model)
    prune_all(copy.deepcopy(model), small)
    gated = resconv.convert(model, small, start="identity")
    form, numbers = repr(gated), copy.deepcopy(gated.state_dict())
    resconv.fuse(gated, small, fold_norms=True)
    resconv.prune(gated, resconv.Plan(("body.0.0",)))
    assert repr(model) == shape
    assert repr(gated) == form
    for before, after in ((state, model.state_dict()), (numbers, gated.state_dict())):
        assert all(torch.equal(before[k], after[k]) for k in before)


class Noisy(nn.Module):
    """Adds noise in eval mode, too, as pooling of statistics does in nets of speech."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))

    def forward(self, x):
        return self.layers(x) + torch.rand_like(x) + random.random()


def test_a_net_that_draws_random_numbers_in_eval_mode_is_compared_on_the_same_ones():
    torch.manual_seed(0)
    net, x = Noisy().double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    before = torch.get_rng_state(), random.getstate()
    gated = randomise_gates(resconv.convert(net, x))
    plan = resconv.Plan(("layers.1",))
    compact = resconv.prune(gated, plan)
    assert resconv.verify(gated, compact, x, plan=plan).max_rel_error < 1e-12
    assert torch.equal(torch.get_rng_state(), before[0])  # the user's own draws go on
    assert random.getstate() == before[1]
    with torch.no_grad():
        assert not torch.allclose(net(x), net(x))  # negative control: it does draw
        compact.layers[0].weight.mul_(1.01)
    with pytest.raises(resconv.errors.VerificationError):
        resconv.verify(gated, compact, x, plan=plan)
