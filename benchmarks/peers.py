"""What resconv is compared with: filters pruned by Torch-Pruning, thinner nets, given layouts, other rankings.

The shortcuts of the built-in ResNets pad new channels with zeros ("option A"). Torch-Pruning 1.6.1 does not follow
channels through such a shortcut (the pruned net does not run), so the channels of the residual stream stay and those
between the two convs of a block go, which is how filter pruning is commonly done on these nets. Where the shortcut of a
block is a conv ("option B"), all channels may go.
"""

import copy
import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resconv
from resconv import nets
from resconv.data import BatchLoader, ImageData
from resconv.nets.resnet import ResidualBlock, ResNet
from resconv.nn.gates import zeroed
from resconv.planning.costs import cost_model

__all__ = [
    "LAYOUTS",
    "RANKINGS",
    "ConvShortcutBlock",
    "blocks_beyond",
    "blocks_kept",
    "lowest",
    "prune_channels",
    "uniform_width",
    "without_units",
]

RANKINGS = ("random", "weight", "leave-one-out")
# Blocks kept a stage, as published for ResNet-56 (docs/method.md names the sources).
LAYOUTS = {"CKA [5,2,5]": (5, 2, 5), "CKA [2,2,3]": (2, 2, 3), "Consensus [2,2,2]": (2, 2, 2)}


class ConvShortcutBlock(ResidualBlock):
    """A residual block whose shortcut is a 1x1 conv where channels or size change ("option B")."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        if self.shortcut is not None:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )


def blocks_a_stage(net: str) -> int:
    return (int("".join(c for c in net if c.isdigit())) - 2) // 6


def blocks_beyond(net: str, kept: tuple[int, ...]) -> list[str]:
    """Return the blocks to remove so that the first ``kept`` of each stage stay."""
    return [
        f"layer{stage}.{block}"
        for stage, keep in enumerate(kept, 1)
        for block in range(keep, blocks_a_stage(net))
    ]


def blocks_kept(net: str, remove: list[str]) -> list[str]:
    """Return, for each stage, how many blocks are whole, and how many have one conv left."""
    kept = []
    for stage in (1, 2, 3):
        whole = half = 0
        for block in range(blocks_a_stage(net)):
            name = f"layer{stage}.{block}"
            convs = sum(f"{name}.conv{i}" in remove for i in (1, 2))
            whole += name not in remove and convs == 0
            half += name not in remove and convs == 1
        kept.append(f"{whole}" + (f"+{half}" if half else ""))
    return kept


def without_units(model: nn.Module, example: Tensor, remove: list[str]) -> nn.Module:
    """Return the architecture that is left without these units, with the weights of ``model``."""
    gated = resconv.convert(model, example, filter=lambda name, module: name in remove)
    for gate in resconv.gates(gated).values():
        if gate.control is not None:
            nn.init.ones_(gate.control)  # a removed conv passes its input on as it is
    return resconv.prune(gated.eval(), resconv.Plan(tuple(remove)))


def prune_channels(
    model: nn.Module,
    example: Tensor,
    macs: float,
    *,
    round_to: int | None = None,
    inner_only: bool = True,
) -> nn.Module | None:
    """Return a copy with uniformly thinner layers at (nearly) ``macs`` times the MACs.

    Of the nets at most 1 % over the budget, the largest; None where there is none. The MACs do not
    fall steadily with the ratio (Torch-Pruning leaves a layer whole that would lose all its
    channels, and rounds), so ratios are tried one by one.
    """
    whole = resconv.profile(model, example).macs
    best: tuple[float, nn.Module] | None = None
    for step in range(2, 37):
        net = _pruned(model, example, step / 40, round_to, inner_only)
        share = resconv.profile(net, example).macs / whole
        if share <= 1.01 * macs and (best is None or share > best[0]):
            best = share, net
    return None if best is None else best[1]


def _pruned(
    model: nn.Module, example: Tensor, ratio: float, round_to: int | None, inner_only: bool
) -> nn.Module:
    import torch_pruning as tp

    net = copy.deepcopy(model).eval()
    keep: list[Any] = [m for m in net.modules() if isinstance(m, nn.Linear)]
    if inner_only:
        # The stem and the second conv of each block write the residual stream.
        keep += [m for n, m in net.named_modules() if n == "conv1" or n.endswith(".conv2")]
    pruner = tp.pruner.GroupNormPruner(
        net,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=False,
        ignored_layers=keep,
        round_to=round_to,
    )
    pruner.step()
    with torch.no_grad():
        net(example)
    return net


def uniform_width(net: str, share: float, example: Tensor) -> nn.Module:
    """Return the same net with all channels scaled alike, the widest within the MACs."""
    whole = resconv.profile(nets.create(net), example).macs
    for width in range(16, 1, -1):
        thin = ResNet(ResidualBlock, blocks_a_stage(net), width=width)
        if resconv.profile(thin, example).macs <= share * whole:
            return thin.eval()
    raise AssertionError(f"{net} has no width for {100 * share:g}%")


def lowest(
    gated: nn.Module, ranking: str, macs: float, example: Tensor, data: ImageData, seed: int
) -> list[str]:
    """Return the units that a ranking puts last, as many as ``macs`` times the MACs demands."""
    costs = cost_model(gated, example)
    scores = _scores(gated, ranking, data, seed)
    chosen: list[str] = []
    for name in sorted(costs.names, key=lambda n: scores[n]):
        if costs.macs - costs.cost_of(chosen).macs <= macs * costs.macs:
            break
        chosen.append(name)
    return chosen


def _scores(gated: nn.Module, ranking: str, data: ImageData, seed: int) -> dict[str, float]:
    names = list(resconv.gates(gated))
    if ranking == "random":
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        return dict(zip(names, order.tolist(), strict=True))
    if ranking == "weight":
        kernels = {n: p for n, p in gated.named_parameters() if p.ndim == 4}
        return {
            name: statistics.fmean(
                p.detach().abs().mean().item() for n, p in kernels.items() if n.startswith(name)
            )
            for name in names
        }
    if ranking != "leave-one-out":
        raise SystemExit(f"ranking: {ranking}; there are {', '.join(RANKINGS)}.")
    images, labels = next(
        iter(BatchLoader(data.train, 1000, data.preprocessing, shuffle=True, seed=seed))
    )
    scores = {}
    for name in names:
        with zeroed(gated, (name,)), torch.no_grad():
            scores[name] = F.cross_entropy(gated(images), labels).item()
    return scores
