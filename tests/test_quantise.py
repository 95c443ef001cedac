"""The compact net goes on: into 8 bits by other libraries' tools, and onto a GPU."""

import importlib
from pathlib import Path

import pytest
import torch

import resconv
from resconv import nets

from .helpers import randomise, randomise_gates, some_plan

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
