"""The nets of the coverage sweep, with the smallest input each takes; zoo.yaml lists other packages'."""

import builtins
import importlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torchvision import models

import resconv
from resconv import nets

__all__ = ["OTHERS", "TORCH_PRUNING", "build", "timm_families", "torchvision_sizes"]

SIZES = Path("build/zoo_sizes.json")
_ZOO = yaml.safe_load(Path(__file__).with_name("zoo.yaml").read_text(encoding="utf-8"))
# Whether Torch-Pruning prunes it, by its own page; then the models.
TORCH_PRUNING = {key: names.split() for key, names in _ZOO["torch_pruning"].items()}
# Package to net to the expressions that make the net and its inputs.
OTHERS = {
    package: {name: made for names, made in of.items() for name in names.split()}
    for package, of in _ZOO["others"].items()
}
# First words that say how a net was trained or coded, not what it is.
_PREFIXES = {"tf", "legacy", "nf", "dm"}


class _Package:
    """A package or module; its modules are imported when they are asked for."""

    def __init__(self, name: str) -> None:
        self._module = importlib.import_module(name)

    def __getattr__(self, name: str) -> Any:
        inner = f"{self._module.__name__}.{name}"
        found = getattr(self._module, name, None)
        if found is None or type(found).__name__ in ("module", "LazyModule"):
            return _Package(inner)
        return found


class _Names(Mapping[str, Any]):
    """The names of an expression in zoo.yaml."""

    def __init__(self, name: str) -> None:
        own = {"x": lambda *shape: torch.rand(1, *shape), "torch": torch, "nn": nn, "name": name}
        self._own = vars(builtins) | own

    def __getitem__(self, key: str) -> Any:
        return self._own[key] if key in self._own else _Package(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


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
            word += "_bn" if words[-1] == "bn" else ""
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
    convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    warnings.simplefilter("ignore")
    for name in timm.list_models(exclude_filters="test_*"):
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception:  # a constructor that computes with its weights
            model = timm.create_model(name)
        kernels = [m for m in model.modules() if isinstance(m, convs)]
        overlap = any(max(m.kernel_size) > max(m.stride) for m in kernels)
        found[name] = (sum(p.numel() for p in model.parameters()), overlap)
    SIZES.parent.mkdir(exist_ok=True)
    SIZES.write_text(json.dumps(found))
    return found


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a model with random weights in eval mode, and the smallest example that it runs on.

    Raises:
        ResConvError: it runs on none of the shapes tried.
    """
    package, _, short = name.partition(":")
    if package in OTHERS:
        names = _Names(short)
        net, example = (eval(expression, {}, names) for expression in OTHERS[package][short])
        return net.eval(), example
    model = nets.create(name)
    if short in models.list_models(module=models.detection):
        model = Detector(model)
    model.eval()
    last = ""
    for example in _examples(short):
        try:
            with torch.no_grad():
                model(*example) if isinstance(example, tuple) else model(example)
        except Exception as error:
            last = f"{type(error).__name__}: {error}"
            continue
        return model, example
    raise resconv.ResConvError(f"{name} runs on none of the inputs tried ({last[:160]})")


def _examples(name: str) -> Iterator[Any]:
    if name in models.list_models(module=models.video):
        for frames in (8, 16, 32):
            for size in (64, 112, 224):
                yield torch.randn(1, 3, frames, size, size)
    elif name in models.list_models(module=models.optical_flow):
        yield torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)
    else:
        for size in (64, 96, 128, 160, 192, 224, 256, 299, 384, 448, 512):
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
