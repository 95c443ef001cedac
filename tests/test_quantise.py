"""The compact net goes on: into 8 bits by other libraries' tools, and onto a GPU."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import resconv
from resconv import nets
from resconv.errors import ExportError
from resconv.preprocessing import to_metadata
from resconv.storage.quantising import quantise_onnx
from resconv.storage.runtimes import open_file

from .helpers import RGB, randomise, randomise_gates, some_plan

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def examples():
    """The example modules, on one trained net, and that net's images."""
    pytest.importorskip("sklearn")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        torch.manual_seed(0)
        made = importlib.import_module("compact").compact_digits((2, 3), 0.6)

        def load(name):
            module = importlib.import_module(name)
            patch.setattr(module, "compact_digits", lambda *_: made)
            return module

        yield load, made


def test_onnxruntime_example(examples):
    pytest.importorskip("onnxruntime")
    result = examples[0]("quantise_onnxruntime").main()
    assert result["float32"] > 0.8
    assert result["int8"] > result["float32"] - 0.03
    assert result["agreement"] > 0.95
    assert result["bytes"] < 0.7


# Files in 8 bits


def exported(net, path, x, **options):
    resconv.export(net, path, x, **options)
    return path


class Upwards(nn.Sequential):
    """A net with a transposed convolution and a matrix product."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 6, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2, stride=2),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 5),
        )


class Mobile(nn.Module):
    """A net with a depthwise and a grouped convolution, an attention of channels and a sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.grouped = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.depthwise(x)
        x = x + self.grouped(y * self.gate(y))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("kind", [Upwards, Mobile])
def test_a_file_in_8_bits_computes_what_the_float_file_does(kind, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    net = randomise(kind(), 0, x).eval()
    whole = exported(net, tmp_path / "whole.onnx", x[:2])
    before = whole.read_bytes()
    done = quantise_onnx(whole, tmp_path / "small.onnx", x.split(4))
    assert whole.read_bytes() == before
    assert done.num_layers == sum(
        isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) for m in net.modules()
    )
    assert done.num_quantised == done.num_layers
    assert done.num_images == 8
    assert done.rel_error < 0.1
    # Another batch size, and what the file was not calibrated on.
    y = torch.randn(3, 3, 12, 12)
    (got,), (wanted,) = (open_file(f).run(y) for f in (done.path, whole))
    assert (got - wanted).norm() < 0.15 * wanted.norm()
    assert not torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)  # it is not the float file
    # Calibrated on values that do not occur, it computes something else.
    wrong = quantise_onnx(whole, tmp_path / "wrong.onnx", [x / 100])
    (lost,) = open_file(wrong.path).run(y)
    assert (lost - wanted).norm() > 2 * (got - wanted).norm()


def test_a_file_in_8_bits_says_what_the_float_file_says(tmp_path):
    """How images become inputs, and the plan; its normalisation and probabilities stay in float."""
    import onnx

    net = randomise(Upwards(), 0, torch.randn(4, 3, 16, 16)).eval()
    options = {"preprocessing": RGB, "pixels": "nhwc", "softmax": True}
    whole = exported(net, tmp_path / "whole.onnx", None, **options)
    pixels = torch.randint(256, (32, 16, 16, 3), dtype=torch.uint8)
    done = quantise_onnx(whole, tmp_path / "small.onnx", [pixels])
    model = onnx.load(done.path)
    texts = {p.key: p.value for p in model.metadata_props}
    assert (
        texts.items()
        >= (to_metadata(RGB) | {"input_format": "uint8 nhwc", "precision": "int8"}).items()
    )
    nodes = {o: n for n in model.graph.node for o in n.output}
    (last,) = (nodes[o.name] for o in model.graph.output)
    assert last.op_type == "Softmax"
    first = next(
        n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in nodes
    )
    assert nodes[first.input[0]].op_type in ("Add", "Mul", "Transpose")  # of what is normalised
    (got,), (wanted,) = (open_file(f).run(pixels) for f in (done.path, whole))
    torch.testing.assert_close(got.sum(1), torch.ones(32))
    assert (got - wanted).abs().max() < 0.1


def test_a_fixed_batch_is_filled(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).reshape(4, 64)

    whole = exported(Fixed().eval(), tmp_path / "whole.onnx", torch.randn(4, 3, 6, 6))
    assert open_file(whole).batch == 4
    done = quantise_onnx(whole, tmp_path / "small.onnx", torch.randn(11, 3, 6, 6).split(3))
    assert done.num_images == 8
    with pytest.raises(ExportError, match="no inputs to calibrate with"):
        quantise_onnx(whole, tmp_path / "none.onnx", torch.randn(3, 3, 6, 6).split(3))
    assert not (tmp_path / "none.onnx").exists()


def test_what_8_bits_cannot_hold_is_refused_and_nothing_is_left(tmp_path):
    whole = exported(nn.Sequential(nn.ReLU()), tmp_path / "whole.onnx", torch.randn(2, 3))
    with pytest.raises(ExportError, match="no convolution or matrix product"):
        quantise_onnx(whole, tmp_path / "small.onnx", [torch.randn(4, 3)])

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x, y):
            return self.head(x + y)

    x = torch.randn(2, 3)
    two = exported(Two().eval(), tmp_path / "two.onnx", (x, x))
    with pytest.raises(ExportError, match=r"two.onnx in 8 bits"):
        quantise_onnx(two, tmp_path / "small.onnx", [x])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two.onnx", "whole.onnx"]


def test_torchao_example(examples):
    pytest.importorskip("torchao")
    load, (net, images, _) = examples
    module = load("quantise_torchao")
    result = module.main()
    assert result["float32"] > 0.8
    assert result["int8"] > result["float32"] - 0.03
    assert result["agreement"] > 0.95
    assert result["int8_tensors"] >= result["layers"] > 3
    # Negative control: calibrated on nothing, the same net is lost.
    lost = module.quantise(net, torch.zeros(64, 1, 8, 8))
    with torch.no_grad():
        same = (lost(images).argmax(1) == net(images).argmax(1)).float().mean().item()
    assert same < 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(tmp_path):
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gated = randomise_gates(
        resconv.convert(randomise(nets.create("resnet20").double()), x, units="layers"), 1
    )
    compact = resconv.prune(gated, some_plan(gated, 1))
    expected = compact(x)
    compact.cuda()
    torch.testing.assert_close(compact(x.cuda()).cpu(), expected, rtol=1e-10, atol=1e-10)
    resconv.save(compact, tmp_path / "net", example_inputs=x.cuda())
    assert torch.equal(resconv.load(tmp_path / "net")(x), expected)
    again = resconv.convert(
        compact, x, units="layers"
    )  # on the device, from an example that is not
    assert next(again.parameters()).is_cuda
    assert resconv.export(compact.float(), tmp_path / "net.pt2", x).dynamic_batch
