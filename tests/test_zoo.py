"""A sample of the zoos: prune a random half, compare with the gated net (the full sweep is a benchmark)."""

import pytest
import torch

import resconv
from resconv import nets

from .helpers import randomise, randomise_gates, some_plan

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
    "timm:starnet_s1",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_zoo_nets_are_pruned_right(name):
    size = 96 if "edgenext" in name or "inception" in name else 64
    x = torch.randn(1, 3, size, size)
    model = randomise(nets.create(name))
    gated = randomise_gates(resconv.convert(model, x, units="all"))
    plan = some_plan(gated, 1)
    compact = resconv.prune(gated, plan)
    assert resconv.verify(gated, compact, x, plan=plan).max_rel_error <= 1e-4
    assert not resconv.gates(compact)
    assert resconv.count(compact, x).macs < resconv.count(model, x).macs
