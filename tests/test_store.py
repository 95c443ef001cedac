"""Saved networks come back the same, and changed files are refused."""

import hashlib
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import resconv
from resconv import nets
from resconv.errors import LoadError, SaveError
from resconv.storage import building
from resconv.storage.modules import describe_modules
from resconv.storage.schema import read_header, seal

from .helpers import randomise, randomise_gates, some_plan


@pytest.fixture
def saved(images, tmp_path):
    gated = randomise_gates(resconv.convert(randomise(nets.create("resnet20").double()), images))
    plan = some_plan(gated, 4)
    compact = resconv.prune(gated, plan)
    folder = resconv.save(compact, tmp_path / "net", plan=plan, example_inputs=images)
    return compact, folder


def test_save_and_load_keep_outputs(saved, images):
    compact, folder = saved
    loaded = resconv.load(folder)
    assert torch.equal(loaded(images), compact(images))
    assert not loaded.training
    # Negative control: the source alone, without the edits, is another net.
    assert not torch.equal(nets.create("resnet20").double().eval()(images), compact(images))


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "timm:regnetx_002"])
def test_zoo_nets_survive(name, tmp_path):
    x = torch.randn(2, 3, 64, 64)
    gated = randomise_gates(resconv.convert(randomise(nets.create(name)), x))
    compact = resconv.prune(gated, some_plan(gated, 1))
    resconv.save(compact, tmp_path)
    torch.testing.assert_close(resconv.load(tmp_path)(x), compact(x))


def test_a_net_without_a_source_needs_its_model(images, tmp_path):
    model = (
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)).double().eval()
    )
    gated = randomise_gates(resconv.convert(model, images, units="layers"))
    compact = resconv.prune(gated, resconv.Plan(["0"]))
    resconv.save(compact, tmp_path)
    with pytest.raises(resconv.ResConvError, match="does not say which network"):
        resconv.load(tmp_path)
    assert torch.equal(resconv.load(tmp_path, model=model)(images), compact(images))


def edit_header(folder, change, *, sealed=True):
    """Change the header as an attacker would, who makes the checksum anew."""
    file = folder / "model.json"
    header = json.loads(file.read_text())
    change(header)
    file.write_text(json.dumps(seal(header) if sealed else header))


def test_changed_and_truncated_weights_are_refused(saved):
    _, folder = saved
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    with pytest.raises(resconv.ResConvError, match="truncated"):
        resconv.load(folder)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(resconv.ResConvError, match="changed after it was saved"):
        resconv.load(folder)
    weights.unlink()
    with pytest.raises(resconv.ResConvError, match="missing"):
        resconv.load(folder)


def conv(**args):
    return {"op": "conv", "path": "conv1", "type": "Conv2d", "args": args}


def bypass(**fields):
    return {"op": "bypass", "path": "", "constants": {}, "nodes": [], "code": "", **fields}


HUGE = {"in_channels": 10**6, "out_channels": 10**6, "kernel_size": [3, 3]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format_version=99), "format version 99"),
        (lambda h: h.update(format_version=1), "format version 1, which carries no checksum"),
        (lambda h: h.pop("edits"), "has no 'edits'"),
        (lambda h: h.update(extra=1), "has unknown keys: 'extra'"),
        (lambda h: h.update(edits={}), "'edits' is an object, needed is a list"),
        (lambda h: h.update(source={"name": "os:system", "kwargs": {}}), "trust"),
        (lambda h: h.update(source={"name": "timm:hf-hub:a/b", "kwargs": {}}), "no net"),
        (lambda h: h.update(source={"name": "timm:../x", "kwargs": {}}), "no net"),
        (
            lambda h: h.update(source={"name": 3, "kwargs": {}}),
            r"'source'\.name is 3, needed is text",
        ),
        (lambda h: h.update(source={"name": "resnet20"}), "'source' has no 'kwargs'"),
        (
            lambda h: h.update(source={"name": "resnet20", "kwargs": {"num_classes": 10**9}}),
            "unbelievable",
        ),
        (
            lambda h: h.update(source={"name": "resnet20", "kwargs": {"num_classes": 10**6}}),
            "fc is Linear.in_features=64, out_features=1000000",
        ),
        (
            lambda h: h.update(
                source={"name": "timm:convnext_atto", "kwargs": {"depths": [10**6] * 4}}
            ),
            "unbelievable",
        ),
        (
            lambda h: h.update(
                source={"name": "torchvision:vgg16", "kwargs": {"num_classes": 10**6}}
            ),
            "do not fill",
        ),
        *[
            (
                lambda h, k=k, v=v: h.update(source={"name": "timm:resnet18", "kwargs": {k: v}}),
                "is not built",
            )
            for k, v in (
                ("pretrained", True),
                ("checkpoint_path", "x"),
                ("pretrained_cfg", {"url": "x"}),
                ("weights_backbone", "DEFAULT"),
                ("features", "http://a/b"),
                ("block", {"a": 1}),
            )
        ],
        (lambda h: h.update(source={"name": "resnet32", "kwargs": {}}), "not the one that was"),
        (
            lambda h: h["edits"].append({"op": "run", "path": "x"}),
            r"\.op is 'run', which is not known",
        ),
        (lambda h: h["edits"].append("identity"), "is 'identity', needed is an object"),
        (lambda h: h["edits"].append({"op": "identity", "path": "nowhere"}), "nowhere"),
        (lambda h: h["edits"].append({"op": "identity", "path": "__class__"}), "__class__"),
        (lambda h: h["edits"].append({"op": "identity", "path": "../../x"}), "x"),
        (lambda h: h["edits"].append({"op": "identity", "path": ""}), "whole model"),
        (lambda h: h["edits"].append({"op": "children", "path": "bn1", "names": [[]]}), "names"),
        (
            lambda h: h["edits"].append(bypass(constants={"x": {"call": []}})),
            "Not an argument",
        ),
        (
            lambda h: h["edits"].append(bypass(constants={"x)": 1})),
            "no name of an argument",
        ),
        (
            lambda h: h["edits"].append(bypass(constants={"x": 1})),
            "cannot be rewritten|differs from the one",
        ),
        (
            lambda h: h["edits"].append(bypass(nodes=[{"name": "a", "argument": -1}])),
            r"nodes\[0\]\.argument is -1, needed is a whole number >= 0",
        ),
        (
            lambda h: h["edits"].append({"op": "multiply", "path": "conv1", "factor": "1"}),
            "factor",
        ),
        (lambda h: h["edits"].append(conv(**HUGE)), "do not fill"),
        (lambda h: h["edits"].append(conv(**{**HUGE, "in_channels": -1})), "in_channels"),
        (lambda h: h["edits"].append(conv(**{**HUGE, "kernel_size": [3, {}]})), "kernel_size"),
        (lambda h: h["edits"].append(conv(**HUGE, device="meta")), "device"),
        (lambda h: h["modules"].update({"conv1": "Conv3d()"}), "conv1 is Conv2d"),
        (lambda h: h["modules"].pop("fc"), "fc was not saved"),
        (lambda h: h["shared"].update({"fc.weight": "fc.bias"}), "no original"),
        (lambda h: h["frozen"].append("nowhere"), "'nowhere' to freeze"),
        (lambda h: h["channels_last"].append(3), "needed is text"),
        (lambda h: h.update(inputs={"shape": [10**6, 10**6], "dtype": "float32"}), "too large"),
        (lambda h: h.update(inputs={"shape": [1], "dtype": "load"}), "dtype 'load'"),
        (lambda h: h.update(plan={"remove": 3}), r"'plan'\.remove is 3, needed is a list"),
        (lambda h: h.update(num_params=2**70), "out of range"),
        (lambda h: h.update(sha256="0" * 64), "changed after it was saved"),
    ],
)
def test_hostile_headers_are_refused(saved, change, message):
    _, folder = saved
    edit_header(folder, change)
    with pytest.raises(LoadError, match=message):
        resconv.load(folder)


def test_a_net_of_endless_layers_is_stopped(saved, monkeypatch):
    _, folder = saved
    monkeypatch.setattr(building, "_MAX_CALLS", 2000)
    source = {"name": "timm:convnext_atto", "kwargs": {"depths": [500] * 4}}
    edit_header(folder, lambda h: h.update(source=source))
    with pytest.raises(LoadError, match="do not fill"):
        resconv.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["plan"]["remove"].pop(),
        lambda h: h["edits"].pop(),
        lambda h: h.update(source={"name": "resnet56", "kwargs": {}}),
        lambda h: h["inputs"].update(dtype="float32"),
    ],
)
def test_a_changed_plan_edit_or_source_is_noticed(saved, change):
    _, folder = saved
    edit_header(folder, change, sealed=False)
    with pytest.raises(LoadError, match=r"model\.json was changed after it was saved"):
        resconv.load(folder)
    edit_header(folder, lambda h: None)  # negative control: with a right checksum it is read
    read_header(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not JSON|nested"),
        ("[" * 500 + "]" * 500, "nested|holds a list"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "no JSON number"),
        ('{"a": 1e999}', "out of range"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON|out of range"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ("[]", "holds a list"),
        ('"\\ud800"', "no text"),
        ("", "not JSON"),
        ("\x00" * 100, "not JSON"),
    ],
)
def test_hostile_json_is_refused(saved, text, message):
    _, folder = saved
    (folder / "model.json").write_text(text)
    with pytest.raises(LoadError, match=message):
        resconv.load(folder)


def flipped(content, gen):
    """Return the bytes with one bit, byte or range changed, cut or doubled."""
    at, much = gen.randrange(len(content)), gen.randrange(1, 9)
    how = gen.randrange(4)
    if how == 0:
        return content[:at] + bytes([content[at] ^ (1 << gen.randrange(8))]) + content[at + 1 :]
    if how == 1:
        return content[:at] + content[at + much :]
    if how == 2:
        return content[:at] + content[at : at + much] + content[at:]
    return content[:at] + gen.randbytes(much) + content[at + much :]


def same_net(loaded, compact):
    a, b = loaded.state_dict(), compact.state_dict()
    return (
        list(a) == list(b)
        and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
        and describe_modules(loaded) == describe_modules(compact)
    )


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_any_damage_is_refused_or_harmless(saved, name):
    compact, folder = saved
    whole = (folder / name).read_bytes()
    gen, refused = random.Random(0), 0
    for _ in range(150):
        (folder / name).write_bytes(flipped(whole, gen))
        try:
            loaded = resconv.load(folder)
        except LoadError:
            refused += 1
        else:  # white space in the JSON, say
            assert same_net(loaded, compact)
    assert refused > 100


def places(tree, path=()):
    """Yield every place of a JSON tree."""
    yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*path, key))


STRANGE = [None, True, -1, 0, 3, 10**6, 2**62, 1.5, -0.0, "", "x", "conv1", "../x", "a" * 300]
STRANGE += [[], {}, [[]], [1, 2], {"a": 1}, ["conv1"], {"op": "identity", "path": "fc"}]


def test_any_field_of_a_sealed_header_is_refused_or_loads(saved):
    """Whoever makes the checksum anew can ask for another net, but break nothing."""
    _, folder = saved
    file = folder / "model.json"
    whole, gen = json.loads(file.read_text()), random.Random(1)
    every = [p for p in places(whole) if p]
    outside = [p for p in every if p[0] not in ("modules", "frozen")]
    refused = 0
    for _ in range(250):
        header = json.loads(json.dumps(whole))
        place = gen.choice(outside if gen.random() < 0.9 else every)
        at = header
        for key in place[:-1]:
            at = at[key]
        if gen.random() < 0.15:
            del at[place[-1]]
        else:
            at[place[-1]] = gen.choice(STRANGE)
        file.write_text(json.dumps(seal(header)))
        try:
            assert isinstance(resconv.load(folder), nn.Module)
        except LoadError:
            refused += 1
    assert refused > 100


def reseal_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)

    def change(header):
        header.update(sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))

    edit_header(folder, change)


def test_any_sealed_weights_are_refused_or_load(saved):
    _, folder = saved
    whole = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    gen, refused = random.Random(2), 0
    for _ in range(120):  # in the header of the safetensors file
        reseal_weights(folder, flipped(whole[: 8 + size], gen) + whole[8 + size :])
        try:
            assert isinstance(resconv.load(folder), nn.Module)
        except LoadError:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"fc.bias": t["fc.bias"].int()}), "fc.bias is int32, not float32"),
        (lambda t: t.update({"fc.bias": t["fc.bias"][:-1].clone()}), r"shape \(9,\), not \(10,\)"),
        (lambda t: t.pop("fc.bias"), "fc.bias is missing"),
        (lambda t: t.update({"../x": torch.zeros(1)}), "x belongs nowhere"),
        (lambda t: t.update({"fc.bias": t["fc.bias"].to(torch.float8_e4m3fn)}), "float8"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved, change, message, tmp_path):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    reseal_weights(folder, (tmp_path / "x.safetensors").read_bytes())
    with pytest.raises(LoadError, match=message):
        resconv.load(folder)


def test_links_and_pipes(saved, tmp_path):
    compact, folder = saved
    moved = tmp_path / "blob"
    (folder / "model.safetensors").rename(moved)
    (folder / "model.safetensors").symlink_to(moved)  # as caches of downloads hold them
    assert same_net(resconv.load(folder), compact)
    before = moved.read_bytes()
    with torch.no_grad():
        compact.fc.bias += 1
    resconv.save(compact, folder)  # replaces the link, and leaves what it led to
    assert moved.read_bytes() == before
    assert not (folder / "model.safetensors").is_symlink()
    for name in ("model.safetensors", "model.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(LoadError, match=r"missing|no model\.json"):
            resconv.load(folder)
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        with pytest.raises(LoadError, match=r"missing|no model\.json"):
            resconv.load(folder)
        (folder / name).unlink()
        resconv.save(compact, folder)


class Odd(nn.Module):
    """Everything a state dict can hold."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("table", torch.arange(6, dtype=torch.int32).reshape(2, 3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("grid", torch.linspace(0, 1, 5), persistent=False)

    def forward(self, x):
        return self.norm(self.b(self.a(self.stem(x)))) * self.grid.mean().to(x.dtype)


def test_every_kind_of_tensor_comes_back(tmp_path):
    net = Odd().half().eval()
    net.norm.float()  # mixed, as half-precision nets often are
    net.stem.bias.requires_grad_(False)
    net.to(memory_format=torch.channels_last)
    net.steps.fill_(41)
    net.norm.running_var[0] = float("nan")
    resconv.save(net, tmp_path)
    back = resconv.load(tmp_path, model=Odd)
    for name, tensor in net.state_dict(keep_vars=True).items():
        got = back.state_dict(keep_vars=True)[name]
        assert (got.dtype, got.shape, got.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        torch.testing.assert_close(got, tensor, rtol=0, atol=0, equal_nan=True)
        assert got.requires_grad == tensor.requires_grad
    assert back.grid.dtype == torch.float16
    assert back.a.weight is back.b.weight
    assert back.stem.weight.is_contiguous(memory_format=torch.channels_last)
    # Negative control: a net that ties nothing is filled, and tied again.
    loose = Odd()
    loose.b.weight = nn.Parameter(loose.b.weight.detach().clone())
    assert resconv.load(tmp_path, model=loose).b.weight is not loose.b.weight
    tied = resconv.load(tmp_path, model=loose)
    assert tied.a.weight is tied.b.weight


def test_the_seed_of_the_caller_is_left_alone(saved):
    _, folder = saved
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    resconv.load(folder)
    assert torch.equal(torch.rand(3), expected)


def test_a_net_changed_by_hand_is_not_loaded_as_another(tmp_path):
    net = nets.create("resnet20").eval()
    net.layer1[0].relu1 = nn.GELU()
    resconv.save(net, tmp_path)
    with pytest.raises(LoadError, match=r"layer1\.0\.relu1 is ReLU\(.*saved was GELU\("):
        resconv.load(tmp_path)
    assert same_net(resconv.load(tmp_path, model=net), net)


def test_pruned_trained_pruned_again(tmp_path, images):
    """The edits of every round are kept: the folder is built from the source in one go."""
    net = nets.create("resnet20").double()
    for turn in range(3):
        gated = randomise_gates(resconv.convert(randomise(net), images), turn)
        net = resconv.prune(gated, some_plan(gated, turn, 0.3))
        net.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        before = net.fc.weight.detach().clone()
        net(images).square().mean().backward()
        optimizer.step()
        assert not torch.equal(net.fc.weight, before)
        net.eval()
        resconv.save(net, tmp_path)
        net = resconv.load(tmp_path)
        assert resconv.verify(net, resconv.load(tmp_path), images).max_abs_error == 0
    folded = resconv.fuse(net, images, fold_norms=True)
    resconv.save(folded, tmp_path / "folded")
    back = resconv.load(tmp_path / "folded")
    assert torch.equal(back(images), folded(images))
    assert len(list(back.modules())) < len(list(nets.create("resnet20").modules()))


def test_refused_before_anything_is_written(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(SaveError, match="_extra_state is extra state"):
        resconv.save(Extra(2, 2), tmp_path / "a")
    with pytest.raises(SaveError, match="no values"):
        resconv.save(nn.Linear(2, 2, device="meta"), tmp_path / "a")
    with pytest.raises(SaveError, match="hold a set"):
        resconv.save(nn.Linear(2, 2), tmp_path / "a", example_inputs={1})
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="is a file"):
        resconv.save(nn.Linear(2, 2), tmp_path / "file")
    with pytest.raises(SaveError, match="cannot be written"):
        resconv.save(nn.Linear(2, 2), tmp_path / "file" / "net")


def test_a_full_disk_leaves_the_old_net(saved):
    resource = pytest.importorskip("resource")
    compact, folder = saved
    (folder / "notes.txt").write_text("mine")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = nets.create("resnet56")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SaveError, match=r"cannot be written.*untouched"):
            resconv.save(other, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    assert same_net(resconv.load(folder), compact)
    resconv.save(other, folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_not_json_and_no_folder(saved, tmp_path):
    _, folder = saved
    (folder / "model.json").unlink()
    with pytest.raises(resconv.ResConvError, match=r"no model\.json"):
        resconv.load(folder)
    with pytest.raises(resconv.ResConvError, match="no such folder"):
        resconv.load(tmp_path / "nothing")


class Blurs(nn.Module):
    """Linear in a kernel that is no parameter and not in the state dict, and keeps two caches."""

    def __init__(self, size=3):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", (row[:, None] * row).repeat(4, 1, 1, 1), persistent=False)
        self.register_buffer("same", self.filt, persistent=False)
        self.register_buffer("ones", torch.ones(1, 1, 1, 1).expand(1, 4, 1, 1), persistent=False)
        self.register_buffer("seen", None, persistent=False)

    def forward(self, x):
        self.seen = torch.full((1,), float(x.shape[-1]), dtype=x.dtype, device=x.device)
        x = nn.functional.gelu(self.conv(x)) * self.ones
        return nn.functional.conv2d(x, self.filt, padding=1, groups=4)


def blurring():
    convs = (nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1))
    return nn.Sequential(*convs, Blurs(), nn.Conv2d(4, 4, 3, padding=1), nn.GELU()).double()


def test_a_buffer_outside_the_state_dict_is_saved(tmp_path):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = blurring().eval()
    net[3].filt.mul_(torch.rand(4, 1, 3, 3))
    net[3].same = net[3].filt
    resconv.save(net, tmp_path, example_inputs=x)
    back = resconv.load(tmp_path, model=blurring)
    assert torch.equal(back(x), net(x))
    assert torch.equal(back[3].filt, net[3].filt)
    assert back[3].same is back[3].filt
    # Negative control: what the constructor makes is another net.
    fresh = blurring().eval()
    fresh.load_state_dict(net.state_dict())
    assert not torch.allclose(fresh(x), net(x))


def test_a_cache_that_a_forward_filled_is_no_obstacle(tmp_path):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = blurring().eval()
    net(x)
    assert net[3].seen is not None
    resconv.save(net, tmp_path)
    back = resconv.load(tmp_path, model=blurring)
    assert torch.equal(back[3].seen, net[3].seen)
    assert torch.equal(back(x), net(x))


def open_and_gated(make, x, units, share=0.3):
    gated = randomise_gates(resconv.convert(randomise(make(), 0, x), x, units=units))
    return gated, resconv.prune(gated, some_plan(gated, 2, share), fuse=False)


TRAINING_FORMS = {
    "resnet20, all": (lambda: nets.create("resnet20").double(), 32, "all"),
    "resnet20, blocks": (lambda: nets.create("resnet20").double(), 32, "blocks"),
    "plainnet20": (lambda: nets.create("plainnet20").double(), 32, "layers"),
    "mobilenet": (lambda: nets.create("torchvision:mobilenet_v2").double(), 32, "all"),
    "timm's norms": (lambda: nets.create("timm:mobilenetv3_small_050").double(), 32, "all"),
    "no source": (blurring, 8, "layers"),
}


@pytest.mark.parametrize("name", TRAINING_FORMS)
def test_a_net_in_training_form_is_resumed(name, tmp_path):
    """Gates, scales and zeros come back; training, pruning and fusing give what they would have."""
    make, size, units = TRAINING_FORMS[name]
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for i, net in enumerate(open_and_gated(make, x, units)):
        names = list(resconv.gates(net))
        with torch.no_grad():
            resconv.gates(net)[names[-1]].scale.zero_()
        net.requires_grad_(True)
        next(net.parameters()).requires_grad_(False)
        folder = resconv.save(net, tmp_path / str(i))
        source = make if name == "no source" else None
        back = resconv.load(folder, model=source)
        assert list(resconv.gates(back)) == names
        assert list(back.state_dict()) == list(net.state_dict())
        for key, tensor in net.state_dict().items():
            assert torch.equal(back.state_dict()[key], tensor), key
        assert [p.requires_grad for p in back.parameters()] == [
            p.requires_grad for p in net.parameters()
        ]
        with torch.no_grad():
            assert torch.equal(back(x), net(x))
        # One step of training moves both alike.
        for one in (net, back):
            torch.manual_seed(0)  # of dropout
            one.train()
            optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=1e-3)
            one(x).square().mean().backward()
            optimizer.step()
            one.eval()
        with torch.no_grad():
            assert torch.equal(back(x), net(x))
        plan = resconv.Plan((names[-1],))
        with torch.no_grad():
            for one in (net, back):
                resconv.gates(one)[names[-1]].scale.zero_()
        compact = resconv.prune(back, plan)
        resconv.verify(net, compact, x, plan=plan)
        resconv.verify(net, resconv.fuse(back), x)
        again = resconv.load(resconv.save(compact, tmp_path / f"{i}c"), model=source)
        resconv.verify(net, again, x, plan=plan)


def test_an_open_net_without_gates_keeps_its_edits(tmp_path, images):
    net = (
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)).double().eval()
    )
    gated = randomise_gates(resconv.convert(net, images, units="layers"))
    bare = resconv.prune(gated, resconv.Plan(("0",)), fuse=False)
    assert not resconv.gates(bare)
    back = resconv.load(resconv.save(bare, tmp_path), model=net)
    assert torch.equal(back(images), bare(images))
    assert torch.equal(resconv.fuse(back)(images), bare(images))


def test_gates_that_a_file_makes_up_are_refused(tmp_path, images):
    gated = resconv.convert(nets.create("resnet20").double().eval(), images)
    folder = resconv.save(gated, tmp_path / "a")
    content = (folder / "model.json").read_text()
    for change, message in (
        (lambda g: g[0].update(paths=["nowhere"]), "'nowhere', which the net does not have"),
        (
            lambda g: g[-1].update(kind="door"),
            r"'gates'\[\d+\]\.kind is 'door', which is not known",
        ),
        (
            lambda g: g[0].update(norm={"type": "Linear", "args": {}}),
            r"norm\.type is 'Linear'|norm\.args has no",
        ),
        (lambda g: g.pop(), "was not saved|is not there"),
        (
            lambda g: next(x for x in g if x["norm"])["norm"]["args"].update(num_features=8),
            "num_features=8",
        ),
        (lambda g: g.extend(g * 600), "each has at most one|needed is a list of length"),
    ):
        (folder / "model.json").write_text(content)
        edit_header(folder, lambda h, change=change: change(h["gates"]))
        with pytest.raises(LoadError, match=message):
            resconv.load(folder)
    (folder / "model.json").write_text(content)
    resconv.load(folder)
    lost = resconv.convert(nets.create("resnet20").double().eval(), images, units="layers")
    del lost.resconv_provenance
    with pytest.raises(SaveError, match="not the record of its conversion"):
        resconv.save(lost, tmp_path / "b")


def test_what_is_read_back_is_compared(tmp_path, images, monkeypatch):
    from resconv.storage import store

    net = nets.create("resnet20").double().eval()
    resconv.save(net, tmp_path, example_inputs=images)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write = store.save_file

    def damaged(tensors, path):
        write({k: t + 1e-12 if k == "conv1.weight" else t for k, t in tensors.items()}, path)

    monkeypatch.setattr(store, "save_file", damaged)
    with pytest.raises(SaveError, match=r"conv1\.weight was read back otherwise"):
        resconv.save(net, tmp_path, example_inputs=images)
    monkeypatch.undo()
    # Something that no tensor of the file holds: the outputs tell.
    net.layer2[0].relu1.forward = lambda x: x.clamp(min=0.1)
    with pytest.raises(SaveError, match="computes something else"):
        resconv.save(net, tmp_path, example_inputs=images)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    del net.layer2[0].relu1.forward
    resconv.save(net, tmp_path, example_inputs=images)


def test_a_net_changed_by_hand_is_said_when_it_is_saved(tmp_path, images):
    net = nets.create("resnet20").double().eval()
    net.layer1[0].relu1 = nn.GELU()
    with pytest.warns(UserWarning, match=r"load it with resconv\.load\(path, model="):
        resconv.save(net, tmp_path, example_inputs=images)
    assert same_net(resconv.load(tmp_path, model=net), net)


@pytest.mark.skipif(os.name != "posix", reason="about the permissions of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path, images, mask, mode):
    from resconv.files import write_text

    net = nets.create("resnet20").eval()
    before = os.umask(mask)
    try:
        resconv.save(net, tmp_path / "net")
        resconv.export(net, tmp_path / "net.pt2", images.float())
        write_text(tmp_path / "text", "a")
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 4
    assert {oct(p.stat().st_mode & 0o777) for p in files} == {oct(mode)}


def test_nothing_is_unpickled(saved, monkeypatch):
    import pickle

    _, folder = saved
    shutil.copytree(folder, folder.parent / "copy")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    resconv.load(folder.parent / "copy")
