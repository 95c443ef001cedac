"""What the user's model is set to (modes, flags, layouts, hooks, types) is kept by every surgery."""

import functools
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resconv
from resconv import nets
from resconv.data import load
from resconv.errors import ConversionError
from resconv.train import Recipe, fit
from resconv.train.precision import channels_last

from .helpers import randomise, randomise_gates, some_plan

NETS = {
    "resnet20": lambda: nets.create("resnet20"),
    "torchvision resnet18": lambda: nets.create("torchvision:resnet18", num_classes=4),
    "timm mobilenetv3": lambda: nets.create("timm:mobilenetv3_small_050", num_classes=4),
}


def trained(name, x):
    return randomise(NETS[name]().double(), 0, x)


def every_form(net, x, units=("layers", "blocks")):
    """Yield what each verb makes of the net, with a word for it."""
    gated = randomise_gates(resconv.convert(net, x, units=units))
    plan = some_plan(gated, 1, 0.3)
    yield "gated", gated
    opened = resconv.prune(gated, plan, fuse=False)
    yield "open", opened
    yield "compact", resconv.prune(gated, plan)


def bare(name):
    """Return a module's name without the steps that gates add."""
    return ".".join(p for p in name.split(".") if p not in ("conv", "module"))


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("units", ["layers", "all"])
def test_norms_that_were_frozen_stay_frozen(name, units, x):
    """In eval mode inside a net in training mode: their statistics do not move, in any form."""
    net = trained(name, x).train()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.eval()
    for word, made in every_form(net, x, units):
        left = {n: m for n, m in made.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert left or word == "compact"
        assert not any(m.training for m in left.values()), word
        assert made.training
        before = {n: m.running_mean.clone() for n, m in left.items()}
        with torch.no_grad():
            made(x + 5)
        assert all(torch.equal(m.running_mean, before[n]) for n, m in left.items()), word
    # Negative control: a norm that nobody froze learns.
    norms[0].train()
    gated = resconv.convert(net, x, units="layers")
    assert sum(m.training for m in gated.modules() if isinstance(m, nn.BatchNorm2d)) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_the_mode_of_the_argument_is_the_mode_of_the_result(name, training, x):
    net = trained(name, x).train(training)
    for word, made in every_form(net, x):
        assert {m.training for m in made.modules()} == {training}, word
        assert {m.training for m in net.modules()} == {training}
    if not training:
        fused = resconv.fuse(resconv.convert(net, x), x, fold_norms=True)
        assert {m.training for m in fused.modules()} == {False}


class Keeping(nn.BatchNorm2d):
    """Frozen by its class: ``train()`` does not reach it."""

    def train(self, mode=True):
        return super().train(False)


def test_a_norm_that_sets_its_own_mode_keeps_doing_so(x):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), Keeping(4), nn.ReLU())
    gated = resconv.convert(randomise(net.double()), x, units="layers").train()
    (norm,) = (m for m in gated.modules() if isinstance(m, nn.BatchNorm2d))
    assert not norm.training


def test_frozen_parameters_stay_frozen(x):
    net = trained("torchvision resnet18", x)
    for n, p in net.named_parameters():
        p.requires_grad_(not n.startswith(("conv1", "bn1", "layer1")))
    frozen = {n.rpartition(".")[0] for n, p in net.named_parameters() if not p.requires_grad}
    convs = {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    gated = resconv.convert(net, x)
    assert all(
        p.requires_grad != bare(n).startswith(("conv1", "bn1", "layer1"))
        for n, p in gated.named_parameters()
        if not n.endswith(("scale", "control"))
    )
    fused = resconv.fuse(gated.eval(), x, fold_norms=True)
    for n, m in fused.named_modules():
        if isinstance(m, nn.Conv2d):
            assert n in convs
            flags = {p.requires_grad for p in m.parameters()}
            assert flags == {n not in frozen}, n


@pytest.mark.parametrize("name", NETS)
def test_channels_last_is_kept(name, x, tmp_path):
    net = trained(name, x).to(memory_format=torch.channels_last)
    forms = dict(every_form(net, x))
    forms["fused"] = resconv.fuse(resconv.convert(net, x, units="layers"), x, fold_norms=True)
    forms["folded"] = resconv.fuse(net, x, fold_norms=True)
    forms["loaded"] = resconv.load(resconv.save(forms["compact"], tmp_path))
    for word, made in forms.items():
        kernels = [m.weight for m in made.modules() if isinstance(m, nn.Conv2d)]
        assert all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels), word
    # Negative control: a plain net does not become channels-last.
    plain = dict(every_form(trained(name, x), x))["compact"]
    kernels = [m.weight for m in plain.modules() if isinstance(m, nn.Conv2d)]
    assert all(k.is_contiguous() for k in kernels)


def test_each_module_keeps_its_type():
    net = randomise(nets.create("resnet20")).to(torch.bfloat16)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.float()
    x = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    for word, made in every_form(net, x):
        for m in made.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                assert {p.dtype for p in m.parameters()} == {torch.bfloat16}, word
            elif isinstance(m, nn.BatchNorm2d):
                assert m.weight.dtype == torch.float32, word


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


def row():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *(Block() for _ in range(3)))
    return randomise(net.double())


def as_lambda(block):
    block.forward = lambda x: torch.relu(block.norm(block.conv(x)))


def as_default(block):
    block.forward = lambda x, b=block: torch.relu(b.norm(b.conv(x)))


def as_method(block):
    block.forward = types.MethodType(lambda self, x: torch.relu(self.norm(self.conv(x))), block)


def as_partial(block):
    block.forward = functools.partial(lambda b, x: torch.relu(b.norm(b.conv(x))), block)


def as_wrapper(block):
    inner = block.forward

    @functools.wraps(inner)
    def forward(x):
        return inner(x)

    block.forward = forward


def as_table(block):
    block.steps = {"all": [lambda x: block.conv(x), lambda x: torch.relu(block.norm(x))]}
    block.forward = types.MethodType(
        lambda self, x: self.steps["all"][1](self.steps["all"][0](x)), block
    )


@pytest.mark.parametrize(
    "patch", [as_lambda, as_default, as_method, as_partial, as_wrapper, as_table]
)
def test_a_forward_that_closes_over_its_layers_runs_those_of_the_copy(patch, x):
    net = row()
    patch(net[2])
    before = net(x)
    gated = resconv.convert(net, x, units="layers")
    assert "2.conv" in resconv.gates(gated)
    torch.testing.assert_close(gated(x), before, rtol=1e-10, atol=1e-10)
    gated.train()(x).square().sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in gated.parameters())
    for word, made in every_form(net, x):
        made(x).square().sum().backward()
        assert all(p.grad is None for p in net.parameters()), word


GLOBAL = Block()


def test_a_function_that_cannot_be_made_anew_is_named(x):
    net = row()
    net.add_module("patched", Block().double())
    block = net.patched
    block.forward = functools.lru_cache(lambda x: block.norm(block.conv(x)))
    with pytest.raises(ConversionError, match=r"patched\.forward of Sequential is a function that"):
        resconv.convert(net, x, units="layers")
    GLOBAL.forward = lambda x: GLOBAL.norm(GLOBAL.conv(x))
    net = row()
    net.add_module("patched", GLOBAL.double())
    with pytest.raises(ConversionError, match=r"patched\.forward.*the global variable 'GLOBAL'"):
        resconv.convert(net, x, units="layers")


def test_hooks_of_the_user_run_on_the_copy(x):
    net, seen = row(), []
    net[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    net[3].register_forward_hook(lambda module, args, out: out + net[0].bias.sum())
    before = net(x)
    gated = resconv.convert(net, x, units="layers")
    seen.clear()
    torch.testing.assert_close(gated(x), before, rtol=1e-10, atol=1e-10)
    assert len(seen) == 1
    gated(x).sum().backward()
    assert net[0].bias.grad is None
    assert gated[0].bias.grad is not None


class Remembers(Block):
    """Keeps tensors of its last step: as an attribute, in a list, and in a buffer."""

    def __init__(self):
        super().__init__()
        self.features, self.log = None, {"steps": []}
        self.register_buffer("last", torch.zeros(2, 4, 32, 32), persistent=False)

    def forward(self, x):
        self.features = super().forward(x)
        self.log["steps"] = [(self.features, x.shape)]
        self.last = self.features
        return self.features


def test_tensors_kept_from_the_last_step_are_copied(x, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Remembers(), Remembers(), nn.Conv2d(4, 2, 1))
    net = randomise(net.double(), 0, x)

    def step(model):
        model.train()(x).square().sum().backward()
        return model.eval()

    gated = randomise_gates(resconv.convert(step(net), x, units="layers"))
    plan = resconv.Plan(("1.conv",))
    assert step(gated)[1].features.grad_fn is not None
    opened = step(resconv.prune(gated, plan, fuse=False))
    compact = step(resconv.prune(gated, plan))
    resconv.verify(gated, compact, x, plan=plan)
    resconv.verify(opened, resconv.fuse(opened, x, fold_norms=True), x)
    resconv.export(compact, tmp_path / "net.pt2", x)
    back = resconv.load(resconv.save(compact, tmp_path / "net"), model=step(net))
    resconv.verify(compact, back, x)


def test_an_attribute_that_cannot_be_copied_is_named(x):
    import threading

    net = row()
    net[1].lock = threading.Lock()
    with pytest.raises(ConversionError, match=r"1\.lock of Sequential \(a lock\) cannot be copied"):
        resconv.convert(net, x, units="layers")


@pytest.mark.parametrize("where", ["model", "inputs", "verbs", "all"])
def test_inside_inference_mode(where, x, tmp_path):
    """What comes back is made of ordinary tensors: it trains outside."""

    def mode(*words):
        return torch.inference_mode(where in words)

    with mode("model", "all"):
        net = trained("resnet20", x)
    with mode("inputs", "all"):
        example = x.clone()
    with mode("verbs", "all"):
        gated = randomise_gates(resconv.convert(net, example))
        plan = some_plan(gated, 1, 0.3)
        opened = resconv.prune(gated, plan, fuse=False)
        compact = resconv.prune(gated, plan)
        fused = resconv.fuse(opened, example, fold_norms=True)
        resconv.verify(gated, compact, example, plan=plan)
        back = resconv.load(resconv.save(compact, tmp_path))
    for made in (gated, opened, compact, fused, back):
        assert not any(t.is_inference() for t in (*made.parameters(), *made.buffers()))
        made.train()(x).square().sum().backward()
        assert all(p.grad is not None for p in made.parameters())
    gated.eval(), compact.eval()
    resconv.verify(gated, resconv.prune(gated, plan), x, plan=plan)


class Clock(nn.Module):
    """A time stamp in double precision beside an image; and beside whole numbers alone."""

    def __init__(self, words):
        super().__init__()
        self.words = nn.Embedding(5, 4) if words else None
        self.body = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, stamp):
        x = x if self.words is None else self.words(x).permute(0, 3, 1, 2)
        return F.gelu(self.body(x)).mean((2, 3)) + (stamp - 1.7e9).float()[:, None]


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_exported_inputs_keep_their_types(words, suffix, tmp_path):
    net = Clock(words).eval()
    x = torch.randint(5, (2, 6, 6)) if words else torch.randn(2, 4, 6, 6)
    stamp = torch.tensor([1.7e9 + 1, 1.7e9 + 2], dtype=torch.float64)
    if suffix == "onnx":
        pytest.importorskip("onnxruntime")
    file = resconv.export(net, tmp_path / f"net.{suffix}", (x, stamp)).path
    from resconv.storage.runtimes import open_file

    opened = open_file(file, trust_source=True)
    assert [s.dtype for s in opened.inputs.tensors()] == [
        "int64" if words else "float32",
        "float64",
    ]
    with torch.no_grad():
        torch.testing.assert_close(opened.run((x, stamp))[0], net(x, stamp), rtol=1e-4, atol=1e-4)
        # Negative control: in float32 the stamp is another time.
        assert not torch.allclose(net(x, stamp.float().double()), net(x, stamp), atol=0.1)


def test_an_example_of_another_type_still_fits(tmp_path, x):
    """A float32 example for a float64 net, and the other way round, are the net's to take."""
    for net, example in (
        (trained("resnet20", x), x.float()),
        (nets.create("resnet20").eval(), x),
    ):
        assert resconv.gates(resconv.convert(net, example, units="layers"))
        resconv.export(net, tmp_path / "net.pt2", example)


class Views(nn.Module):
    """Reads a feature map in the order of its memory, as many a classifier does."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        )
        self.fc = nn.Linear(width * 64, 10)

    def forward(self, x):
        return self.fc(self.conv(x).view(len(x), -1))


class Reshapes(Views):
    def forward(self, x):
        self.seen = self.conv[1].weight.is_contiguous(memory_format=torch.channels_last)
        return self.fc(self.conv(x).flatten(1))


def test_training_puts_channels_last_where_the_net_takes_it_and_back_after(tmp_path):
    data = load("digits", limit=64)
    made = {"views": Views(), "reshapes": Reshapes()}
    for name, net in made.items():
        fit(net, data, Recipe(epochs=1, batch_size=32), tmp_path / name, progress=False)
        assert net.conv[1].weight.is_contiguous()
    assert made["reshapes"].seen
    images = torch.zeros(2, 1, 8, 8)
    with channels_last([made["reshapes"]], images) as fits:
        assert fits
    with channels_last(list(made.values()), images) as fits:  # control: all of them, or none
        assert not fits
        assert made["reshapes"].conv[1].weight.is_contiguous()
