"""A sample of the zoos: prune a random half, compare with the gated net, and the file with both.

The whole sweep is a benchmark (docs/coverage.md).
"""

import copy

import pytest
import torch
from torch import nn

import resconv
from resconv import nets
from resconv.nn.gates import zeroed

from .helpers import randomise, randomise_gates, settle, some_plan

SAMPLE = [
    "torchvision:resnet18",
    "torchvision:resnext50_32x4d",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:efficientnet_b0",
    "torchvision:mnasnet0_5",
    "torchvision:regnet_y_400mf",
    "torchvision:densenet121",
    "torchvision:googlenet",
    "torchvision:vgg11_bn",
    "timm:resnetv2_50",
    "timm:seresnet33ts",
    "timm:res2net50_14w_8s",
    "timm:repvgg_a0",
    "timm:mobilenetv1_100",
    "timm:mobilenetv4_conv_small",
    "timm:ghostnet_050",
    "timm:lcnet_050",
    "timm:tinynet_e",
    "timm:hardcorenas_a",
    "timm:fbnetc_100",
    "timm:dla46_c",
    "timm:cspdarknet53",
    "timm:rexnet_100",
    "timm:selecsls42b",
    "timm:convnextv2_atto",
    "timm:convmixer_768_32",
    "timm:edgenext_xx_small",
    "timm:poolformer_s12",
    "timm:inception_next_tiny",
    "timm:mobileone_s0",
    "timm:repghostnet_050",
    "timm:starnet_s050",
    "timm:fastvit_t8",
    "timm:efficientvit_b0",
    "timm:efficientvit_m0",
    "timm:mambaout_femto",
    "timm:fasternet_t0",
    "timm:skresnet18",
]
# Written as ONNX too, which takes ten times as long.
AS_FILE = [
    "torchvision:resnet18",
    "timm:mobilenetv3_small_050",
    "timm:convnextv2_atto",
    "timm:starnet_s050",
]


def pruned(name: str, x: torch.Tensor) -> tuple[nn.Module, nn.Module, nn.Module, resconv.Plan]:
    model = randomise(nets.create(name), 0, x)
    gated = randomise_gates(resconv.convert(model, x, units="all"))
    plan = some_plan(gated, 1)
    with zeroed(gated, plan.remove):
        settle(gated, x, 2)
    return model, gated, resconv.prune(gated, plan), plan


@pytest.mark.parametrize("name", SAMPLE)
def test_zoo_nets_are_pruned_right(name):
    size = 96 if "edgenext" in name or "inception" in name else 64
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    model, gated, compact, plan = pruned(name, x)
    try:
        assert resconv.verify(gated, compact, x, plan=plan).max_rel_error <= 1e-4
    except resconv.errors.VerificationError:  # rounding that the net magnifies, or a fault
        wide, y = copy.deepcopy(gated).double(), x.double()
        exact = resconv.verify(wide, resconv.prune(wide, plan), y, plan=plan)
        assert exact.max_rel_error <= 1e-10
    assert not resconv.gates(compact)
    assert resconv.profile(compact, x).macs < resconv.profile(model, x).macs
    # What was removed counts: with the planned scales in place the net is another one.
    with pytest.raises(resconv.errors.VerificationError, match=r"disagree|all its .* are NaN"):
        resconv.verify(gated, compact, x)


@pytest.mark.parametrize("name", AS_FILE)
def test_pruned_zoo_nets_run_in_onnx_runtime(name, tmp_path):
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    _, _, compact, plan = pruned(name, x)
    made = resconv.export(compact, tmp_path / "net.onnx", x, plan=plan)
    assert made.verification.max_rel_error <= 1e-4
    assert made.dynamic_batch
