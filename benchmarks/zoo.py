"""The models of the coverage sweep: names, the smallest input each takes, detectors without boxes."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

import resconv
from resconv import nets

__all__ = ["TORCH_PRUNING", "build", "timm_families", "torch_pruning_names", "torchvision_sizes"]

SIZES = Path("build/zoo_sizes.json")

# The 85 models of benchmarks/prunability/readme.md in VainF/Torch-Pruning, which prunes the first 77.
_PRUNED_THERE = """
    alexnet vit_b_16 vit_b_32 vit_l_16 vit_l_32 vit_h_14 convnext_tiny convnext_small
    convnext_base convnext_large densenet121 densenet169 densenet201 densenet161 efficientnet_b0
    efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5
    efficientnet_b6 efficientnet_b7 efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l
    googlenet inception_v3 mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2
    mobilenet_v3_large mobilenet_v3_small regnet_y_400mf regnet_y_800mf regnet_y_1_6gf
    regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf regnet_y_128gf resnet18 resnet34
    resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d wide_resnet50_2
    wide_resnet101_2 fcn_resnet50 fcn_resnet101 deeplabv3_resnet50 deeplabv3_resnet101
    deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large squeezenet1_0 squeezenet1_1 vgg11
    vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn ssdlite320_mobilenet_v3_large
    ssd300_vgg16 fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2
    fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn fcos_resnet50_fpn
    keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn_v2
"""
_FAILING_THERE = """
    raft_large swin_t swin_s swin_b shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
    shufflenet_v2_x2_0
"""
TORCH_PRUNING = {True: _PRUNED_THERE.split(), False: _FAILING_THERE.split()}
# First words that say how a net was trained or coded, not what it is.
_PREFIXES = {"tf", "legacy", "nf", "dm"}


def torch_pruning_names() -> list[str]:
    return ["torchvision:" + n for n in (*TORCH_PRUNING[True], *TORCH_PRUNING[False])]


def torchvision_sizes() -> dict[str, int]:
    """Return the parameters of every model of torchvision, the quantised twins left out."""
    names = [n for n in models.list_models() if not n.startswith("quantized_")]
    weights = {n: list(models.get_model_weights(n)) for n in names}
    return {f"torchvision:{n}": w[0].meta["num_params"] if w else 10**7 for n, w in weights.items()}


def timm_families() -> dict[str, tuple[int, list[str]]]:
    """Return each convolutional family's smallest size and its variants, `timm:` before each.

    A family is a module of timm and the first word of a name, sizes left out (``resnet50d`` and
    ``resnet101d`` are one, ``mobilenetv2`` and ``mobilenetv3`` are two). It is convolutional when
    its smallest variant has a convolution that overlaps (kernel larger than stride), which a
    transformer's patch embedding does not.
    """
    sizes = _sizes()
    families: dict[str, list[str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            words = name.split("_")
            if words[0] == "test" or name not in sizes:
                continue  # timm's own unit tests
            word = "_".join(words[: 2 if words[0] in _PREFIXES else 1])
            word = re.sub(r"(?<!v)\d+(?=[a-z]{0,2}$)", "", word)
            if words[-1] == "bn":
                word += "_bn"
            families.setdefault(f"{module}/{word}", []).append(name)
    for members in families.values():
        members.sort(key=lambda n: (sizes[n][0], n))
    return {
        f: (sizes[m[0]][0], [f"timm:{n}" for n in m]) for f, m in families.items() if sizes[m[0]][1]
    }


def _sizes() -> dict[str, tuple[int, bool]]:
    """Return the number of parameters of each timm model, and whether it convolves (cached)."""
    if SIZES.is_file():
        return json.loads(SIZES.read_text())  # type: ignore[no-any-return]
    found: dict[str, tuple[int, bool]] = {}
    for name in timm.list_models():
        if name.startswith("test_"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except Exception:  # a constructor that computes with its weights
                model = timm.create_model(name)
        found[name] = (sum(p.numel() for p in model.parameters()), _convolves(model))
    SIZES.parent.mkdir(exist_ok=True)
    SIZES.write_text(json.dumps(found))
    return found


def _convolves(model: nn.Module) -> bool:
    convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(max(m.kernel_size) > max(m.stride) for m in model.modules() if isinstance(m, convs))


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a model with random weights, and the smallest example that it runs on.

    Raises:
        ResConvError: it runs on none of the shapes tried.
    """
    model = nets.create(name)
    if name.partition(":")[2] in models.list_models(module=models.detection):
        model = Detector(model)
    model.eval()
    last = ""
    for example in _examples(name.partition(":")[2]):
        try:
            with torch.no_grad():
                model(*example) if isinstance(example, tuple) else model(example)
        except Exception as error:
            last = f"{type(error).__name__}: {error}"
            continue
        return model, example
    raise resconv.ResConvError(f"{name} runs on none of the inputs tried ({last[:160]})")


def _examples(name: str) -> Iterator[Any]:
    square = (64, 96, 128, 160, 192, 224, 256, 299, 384, 448, 512)
    if name in models.list_models(module=models.video):
        for frames in (8, 16, 32):
            for size in (64, 112, 224):
                yield torch.randn(1, 3, frames, size, size)
    elif name in models.list_models(module=models.optical_flow):
        yield torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)
    else:
        for size in square:
            yield torch.randn(1, 3, size, size)


class Detector(nn.Module):
    """A detector up to its boxes: every map and every head's output, no selection.

    Which boxes survive a threshold, a sort and a suppression jumps with the last digit of a score,
    so two equal nets cannot be compared there. The second stage's heads read the first map,
    resampled to the size of a box, in place of boxes.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def forward(self, images: Tensor) -> list[Tensor]:
        net = self.net
        features = net.backbone(images)
        maps = [features] if isinstance(features, Tensor) else list(features.values())
        if not hasattr(net, "rpn"):
            return [*maps, *net.head(maps).values()]
        objectness, deltas = net.rpn.head(maps)
        out = [*maps, *objectness, *deltas]
        heads = net.roi_heads
        for kind in ("box", "mask", "keypoint"):
            head = getattr(heads, f"{kind}_head", None)
            if head is not None:
                size = getattr(heads, f"{kind}_roi_pool").output_size
                read = F.interpolate(maps[0], size=tuple(size), mode="nearest")
                made = getattr(heads, f"{kind}_predictor")(head(read))
                out += [made] if isinstance(made, Tensor) else list(made)
        return out
