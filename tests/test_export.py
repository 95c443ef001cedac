"""Exported files compute the same, load by themselves, and hold no leftovers."""

import itertools
import json
import re
import subprocess
import sys
import textwrap
from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import resconv
from resconv import nets
from resconv.errors import ExportError, LoadError, VerificationError
from resconv.storage.comparison import compare
from resconv.storage.runtimes import open_file

from .helpers import randomise, randomise_gates, some_plan

FORMATS = [".onnx", ".pt2", ".xml"]


def compact_net(name="resnet20", units=("layers", "blocks"), seed=1, size=32):
    x = torch.randn(2, 3, size, size)
    gated = randomise_gates(resconv.convert(randomise(nets.create(name)), x, units=units), seed)
    plan = some_plan(gated, seed)
    return resconv.prune(gated, plan), plan, x


@pytest.fixture(scope="module")
def small():
    """A small pruned net, its plan, and an input."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    x = torch.randn(2, 3, 16, 16)
    gated = randomise_gates(resconv.convert(randomise(net), x, units="layers"))
    plan = resconv.Plan(["3"])
    return resconv.prune(gated, plan), plan, x


@pytest.mark.parametrize("suffix", FORMATS)
def test_exported_files_agree(suffix, tmp_path):
    compact, plan, x = compact_net()
    done = resconv.export(compact, tmp_path / f"net{suffix}", x, plan=plan)
    assert done.verification.max_rel_error <= 1e-4
    assert done.dynamic_batch
    resconv.save(compact, tmp_path / "net", example_inputs=x)
    assert compare(tmp_path / "net", done.path, trust_source=True).max_rel_error <= 1e-4
    with torch.no_grad():
        compact.fc.bias += 0.1
    resconv.save(compact, tmp_path / "other", example_inputs=x)
    with pytest.raises(resconv.ResConvError, match="disagree"):
        compare(tmp_path / "other", done.path, trust_source=True)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_batch_is_open(suffix, small, tmp_path):
    compact, plan, x = small
    done = resconv.export(compact, tmp_path / f"net{suffix}", x, plan=plan)
    assert done.dynamic_batch
    other = torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            open_file(done.path, trust_source=True).run(other)[0], compact(other)
        )
    inputs = open_file(done.path, trust_source=True).inputs
    assert (inputs.shape, inputs.dtype) == ((2, 3, 16, 16), "float32")


@pytest.mark.parametrize("suffix", FORMATS)
def test_height_and_width_are_open_on_request(suffix, small, tmp_path):
    compact, plan, x = small
    strided = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2), compact).eval()
    done = resconv.export(strided, tmp_path / f"net{suffix}", x, plan=plan, dynamic_size=True)
    assert done.dynamic_batch
    other = torch.randn(3, 3, 21, 38)
    run = open_file(done.path, trust_source=True).run
    with torch.no_grad():
        torch.testing.assert_close(run(other)[0], strided(other), rtol=1e-4, atol=1e-5)
    if suffix == ".xml":  # OpenVINO makes a fixed one anew for other sizes, where it can
        return
    fixed = resconv.export(strided, tmp_path / f"fixed{suffix}", x, plan=plan)
    with pytest.raises(Exception, match=r"(?i)dimension|shape|guard|size"):
        open_file(fixed.path, trust_source=True).run(other)


def test_a_net_of_one_size_is_refused_open_height_and_width(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, 4)).eval()
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(resconv.ResConvError, match=r"leave height and width fixed|cannot run"):
        resconv.export(net, tmp_path / "net.onnx", x, dynamic_size=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match="no height and width"):
        resconv.export(nn.Linear(3, 2), tmp_path / "net.onnx", x[:, :, 0, 0], dynamic_size=True)


class OnlyOne(nn.Module):
    """Reads its batch as a number that tracing fixes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) * float(x.shape[0])


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_fixed_batch_is_named(suffix, tmp_path):
    net, x = OnlyOne().eval(), torch.randn(1, 3, 8, 8)
    done = resconv.export(net, tmp_path / f"net{suffix}", x)
    got = open_file(done.path, trust_source=True).run(x)[0]
    torch.testing.assert_close(got, net(x).detach())
    if done.dynamic_batch:  # then it is right at every batch
        y = torch.randn(5, 3, 8, 8)
        torch.testing.assert_close(
            open_file(done.path, trust_source=True).run(y)[0], net(y).detach()
        )


class TwoInputs(nn.Module):
    """An image and a class; a dict comes back."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.classes = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image, label, double=False):
        h = self.conv(image).relu().mean((2, 3)) + self.classes(label)
        h = h * 2 if double else h
        return {"logits": self.head(h), "features": h}


IMAGE, LABEL = torch.randn(1, 3, 8, 8), torch.tensor([4])


@pytest.mark.parametrize(
    "inputs",
    [
        (IMAGE, LABEL),
        {"label": LABEL, "image": IMAGE, "double": True},
    ],
)
def test_several_inputs_and_a_dict_of_outputs(inputs, tmp_path):
    net = TwoInputs().eval()
    files = [tmp_path / f"net{s}" for s in FORMATS]
    for file in files:
        assert resconv.export(net, file, inputs).dynamic_batch
    resconv.save(net, tmp_path / "net", example_inputs=inputs)
    # Inputs are made from what each file says of them: a class stays below 5.
    for a, b in itertools.pairwise(files):
        assert compare(a, b, trust_source=True).num_outputs == 2
        shapes = ["6,3,8,8", "6"]
        shapes = shapes if isinstance(inputs, tuple) else shapes[::-1]
        assert compare(a, b, shape=shapes, trust_source=True).max_rel_error < 1e-4
        with pytest.raises(LoadError, match="takes 2 tensors"):
            compare(a, b, shape="6,3,8,8", trust_source=True)
    outputs = onnxruntime.InferenceSession(str(files[0])).get_outputs()
    assert [o.name for o in outputs] == ["logits", "features"]
    with pytest.raises(LoadError, match="does not say which network"):
        compare(tmp_path / "net", files[0], trust_source=True)


@pytest.mark.parametrize("suffix", FORMATS)
def test_half_precision(suffix, small, tmp_path):
    compact, _, x = small
    half = resconv.fuse(compact, x, fold_norms=True).half()
    done = resconv.export(half, tmp_path / f"net{suffix}", x)
    assert done.verification.dtype == "float16"
    if suffix != ".pt2":
        for dtype in (torch.bfloat16, torch.float64):
            other = resconv.fuse(compact, x, fold_norms=True).to(dtype)
            before = done.path.read_bytes()
            with pytest.raises(ExportError, match=f"is in {str(dtype).split('.')[1]}"):
                resconv.export(other, done.path, x)
            assert done.path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "units"), [("plainnet20", "layers"), ("vgg16_bn", "layers"), ("resnet20", "blocks")]
)
def test_no_leftovers_in_the_graph(name, units, tmp_path):
    compact, plan, x = compact_net(name, units)
    done = resconv.export(
        resconv.fuse(compact, x, fold_norms=True), tmp_path / "net.onnx", x, plan=plan
    )
    model = onnx.load(done.path)
    ops = Counter(n.op_type for n in model.graph.node)
    assert not ops["Mul"] + ops["Identity"] + ops["BatchNormalization"], ops
    convs = sum(isinstance(m, nn.Conv2d) for m in compact.modules())
    assert ops["Conv"] == convs
    producers = {o: n.op_type for n in model.graph.node for o in n.output}
    assert not [
        n for n in model.graph.node if n.op_type == "Relu" and producers.get(n.input[0]) == "Relu"
    ]


def test_what_the_files_say(small, tmp_path):
    compact, plan, x = small
    done = resconv.export(compact, tmp_path / "net.onnx", x, plan=plan)
    model = onnx.load(done.path)
    meta = {p.key: p.value for p in model.metadata_props}
    assert resconv.Plan.from_json(meta["plan"]) == plan
    assert meta["resconv_version"] == resconv.__version__
    assert [o.version for o in model.opset_import if not o.domain] == [done.opset] == [18]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert resconv.export(compact, tmp_path / "net.onnx", x, opset=20).opset == 20
    with pytest.raises(ExportError, match="opset=13 was asked for, this torch writes 18"):
        resconv.export(compact, tmp_path / "net.onnx", x, opset=13)
    extra = {"resconv.json": ""}
    torch.export.load(
        resconv.export(compact, tmp_path / "net.pt2", x, plan=plan).path, extra_files=extra
    )
    assert json.loads(extra["resconv.json"])["plan"]["remove"] == ["3"]
    openvino = pytest.importorskip("openvino")
    resconv.export(compact, tmp_path / "net.xml", x, plan=plan)
    read = openvino.Core().read_model(tmp_path / "net.xml")
    assert resconv.Plan.from_json(read.get_rt_info(["resconv", "plan"]).astype(str)) == plan


def test_pt2_loads_without_this_package(small, tmp_path):
    compact, plan, x = small
    resconv.export(compact, tmp_path / "net.pt2", x, plan=plan)
    torch.save((x, compact(x).detach()), tmp_path / "expected.pt")
    script = """
        import sys, torch
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "resconv":
                    raise ImportError("resconv was asked for")
        sys.meta_path.insert(0, Refuse())
        try:
            import resconv
        except ImportError:
            x, expected = torch.load("expected.pt")
            net = torch.export.load("net.pt2").module()
            torch.testing.assert_close(net(x), expected)
            net(torch.randn(5, 3, 16, 16))
            print("agrees")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "agrees", done.stderr[-2000:]


def test_a_large_net_has_its_weights_beside_it(small, tmp_path, monkeypatch):
    compact, plan, x = small
    monkeypatch.setattr(sys.modules["resconv.storage.exporting"], "_MAX_PROTO", 100)
    done = resconv.export(compact, tmp_path / "net.onnx", x, plan=plan)
    data = tmp_path / "net.onnx.data"
    assert done.num_bytes == done.path.stat().st_size + data.stat().st_size
    assert compare(
        done.path, resconv.export(compact, tmp_path / "net.pt2", x).path, trust_source=True
    )
    data.unlink()
    with pytest.raises(LoadError, match="cannot read"):
        compare(done.path, tmp_path / "net.pt2", trust_source=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.pt2"]


@pytest.mark.parametrize("suffix", [".pt2", ".xml"])
def test_a_file_that_disagrees_is_not_put_in_place(suffix, small, tmp_path):
    compact, _, x = small
    file = resconv.export(compact, tmp_path / f"net{suffix}", x).path
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(VerificationError, match="disagree"):
        resconv.export(compact, file, 100 * x, tolerance=-1.0)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_leaves_the_old_file(suffix, small, tmp_path):
    resource = pytest.importorskip("resource")
    compact, _, x = small
    file = resconv.export(compact, tmp_path / f"net{suffix}", x).path
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    big = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3)).eval()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(resconv.ResConvError, match=r"cannot be written|cannot run the file"):
            resconv.export(big, file, x)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_broken_files_are_named(small, tmp_path):
    pytest.importorskip("openvino")
    compact, _, x = small
    whole = resconv.export(compact, tmp_path / "net.pt2", x).path
    resconv.export(compact, tmp_path / "net.xml", x)
    (tmp_path / "net.bin").unlink()
    with pytest.raises(LoadError, match=r"net\.bin is missing"):
        compare(whole, tmp_path / "net.xml", trust_source=True)
    for suffix in FORMATS:
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(b"\x08\x01 nothing")
        (tmp_path / "broken.bin").write_bytes(b"")
        with pytest.raises(LoadError, match=r"cannot read|not a readable"):
            compare(whole, broken, trust_source=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadError, match=re.escape(f"resconv prune {tmp_path}")):
        compare(whole, tmp_path, trust_source=True)


def test_refusals(small, tmp_path):
    compact, _, x = small
    with pytest.raises(resconv.ResConvError, match=r"\.onnx, \.pt2, \.xml"):
        resconv.export(compact, tmp_path / "net.pb", x)
    gated = resconv.convert(
        nets.create("resnet20").eval(), torch.randn(1, 3, 32, 32), units="layers"
    )
    with pytest.raises(resconv.ResConvError, match="gates left"):
        resconv.export(gated, tmp_path / "net.onnx", x)
    with pytest.raises(resconv.ResConvError, match="There is no"):
        compare(tmp_path / "a.onnx", tmp_path / "b.onnx")
    (tmp_path / "x.onnx").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        resconv.export(compact, tmp_path / "x.onnx", x)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        resconv.export(compact, tmp_path / "file" / "x.pt2", x)
    resconv.export(compact, tmp_path / "net.pt2", x)
    with pytest.raises(VerificationError, match="does not run on inputs of shape"):
        compare(*[tmp_path / "net.pt2"] * 2, shape="1,4,16,16", trust_source=True)

    class Loops(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(ExportError, match=r"cannot take Loops.*Try another format"):
        resconv.export(Loops(), tmp_path / "loops.pt2", x)


def test_the_command_line_takes_saved_folders(small, tmp_path, capsys):
    compact, plan, _ = compact_net("plainnet20", "layers")
    x = torch.randn(1, 3, 32, 32)
    resconv.save(compact, tmp_path / "net", plan=plan, example_inputs=x)

    def call(*args):
        from typer.testing import CliRunner

        from resconv.cli.app import app

        return CliRunner().invoke(app, [str(a) for a in args])

    done = call("export", tmp_path / "net", "--to", tmp_path / "a.pt2")
    assert "dynamic batch" in done.output, done.output
    done = call("verify", tmp_path / "net", tmp_path / "a.pt2", "--trust-source")
    assert "agree: 1 outputs" in done.output.replace("\n", " "), (done.output, done.exception)
    done = call("verify", tmp_path / "net", tmp_path / "a.pt2", "--shape", "0,3", "--trust-source")
    assert "give whole numbers" in str(done.exception)
    # A net that was never converted carries no inputs along.
    resconv.save(nets.create("plainnet20"), tmp_path / "net")
    done = call("export", tmp_path / "net")
    assert "does not say what its network is fed" in str(done.exception)
    for command in ("export", "measure", "prune"):
        done = call(command, tmp_path / "nothing")
        assert "is no run folder: it does not exist" in str(done.exception)


class Attention(nn.Module):
    """Attention over windows of an image: the tensors have five dimensions, ONNX takes four."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x).unfold(2, 4, 4).unfold(3, 4, 4)  # (N, 8, H / 4, W / 4, 4, 4)
        x = x.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(3, 0, 4, 1, 2, 5)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x.mean((2, 3)).flatten(1))


def test_an_operation_without_an_onnx_form_is_taken_apart(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    made = resconv.export(Attention(), tmp_path / "net.onnx", x)
    assert made.dynamic_batch
    assert made.verification.max_rel_error < 1e-5
