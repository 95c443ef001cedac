"""Exported files compute the same, and hold no leftovers."""

from collections import Counter

import onnx
import pytest
import torch
from torch import nn

import resconv
from resconv import nets
from resconv.compare import compare

from .helpers import randomise, randomise_gates, some_plan


def compact_net(name="resnet20", units="all", seed=1, size=32):
    x = torch.randn(2, 3, size, size)
    gated = randomise_gates(resconv.convert(randomise(nets.create(name)), x, units=units), seed)
    plan = some_plan(gated, seed)
    return resconv.prune(gated, plan), plan, x


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_exported_files_agree(suffix, tmp_path):
    compact, plan, x = compact_net()
    done = resconv.export(compact, tmp_path / f"net{suffix}", x, plan=plan)
    assert done.verification.max_rel_error <= 1e-4
    assert done.dynamic_batch
    resconv.save(compact, tmp_path / "net", example_inputs=x)
    assert compare(tmp_path / "net", done.path).max_rel_error <= 1e-4
    with torch.no_grad():
        compact.fc.bias += 0.1
    resconv.save(compact, tmp_path / "other", example_inputs=x)
    with pytest.raises(resconv.ResConvError, match="disagree"):
        compare(tmp_path / "other", done.path)


@pytest.mark.parametrize(
    ("name", "units"), [("plainnet20", "layers"), ("vgg16_bn", "layers"), ("resnet20", "blocks")]
)
def test_no_leftovers_in_the_graph(name, units, tmp_path):
    compact, plan, x = compact_net(name, units)
    done = resconv.export(resconv.fuse(compact, x), tmp_path / "net.onnx", x, plan=plan)
    model = onnx.load(done.path)
    ops = Counter(n.op_type for n in model.graph.node)
    assert not ops["Mul"] + ops["Identity"] + ops["BatchNormalization"], ops
    convs = sum(isinstance(m, nn.Conv2d) for m in compact.modules())
    assert ops["Conv"] == convs
    producers = {o: n.op_type for n in model.graph.node for o in n.output}
    assert not [
        n for n in model.graph.node if n.op_type == "Relu" and producers.get(n.input[0]) == "Relu"
    ]
    meta = {p.key: p.value for p in model.metadata_props}
    assert resconv.Plan.from_json(meta["plan"]) == plan


def test_refusals(tmp_path):
    compact, _, x = compact_net()
    with pytest.raises(resconv.ResConvError, match=r"\.onnx, \.pt2 or"):
        resconv.export(compact, tmp_path / "net.pb", x)
    with pytest.raises(resconv.ResConvError, match="gates left"):
        resconv.export(resconv.convert(compact, x), tmp_path / "net.onnx", x)
    with pytest.raises(resconv.ResConvError, match="There is no"):
        compare(tmp_path / "a.onnx", tmp_path / "b.onnx")
