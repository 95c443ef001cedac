"""The filter-pruning arm: Torch-Pruning (DepGraph) on a ResNet of ours, to a number of MACs.

The shortcuts of these nets pad new channels with zeros ("option A"). Torch-Pruning 1.6.1 does not
follow channels through such a shortcut (the pruned net does not run), so the channels of the
residual stream stay and those between the two convs of a block go, which is how filter pruning is
commonly done on these nets. Where a block's shortcut is a conv ("option B"), all channels may go.
"""

import copy
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import resconv

__all__ = ["prune_channels"]


def prune_channels(
    model: nn.Module,
    example: Tensor,
    macs: float,
    *,
    round_to: int | None = None,
    inner_only: bool = True,
) -> tuple[nn.Module, float] | None:
    """Return a copy with uniformly thinner layers at (nearly) ``macs`` times the MACs, and its ratio.

    Of the nets at most 1 % over the budget, the largest; None where there is none. The MACs do not
    fall steadily with the ratio (Torch-Pruning leaves a layer whole that would lose all its
    channels, and rounds), so ratios are tried one by one.
    """
    whole = resconv.count(model, example).macs
    best: tuple[float, nn.Module, float] | None = None
    for step in range(2, 37):
        ratio = step / 40
        net = _pruned(model, example, ratio, round_to, inner_only)
        share = resconv.count(net, example).macs / whole
        if share <= 1.01 * macs and (best is None or share > best[0]):
            best = share, net, ratio
    return None if best is None else best[1:]


def _pruned(
    model: nn.Module, example: Tensor, ratio: float, round_to: int | None, inner_only: bool
) -> nn.Module:
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
