"""What Torch-Pruning does with the nets of the coverage sweep."""

from typing import Any

import torch
from torch import nn

from tests.helpers import randomise

from .coverage_steps import Row, copied, one_line, outputs
from .zoo import build

try:
    import torch_pruning as tp
except ImportError:
    tp = None

__all__ = ["torch_pruning"]


def torch_pruning(name: str) -> Row:
    """Return what Torch-Pruning does with the same net: half of the channels, the outputs kept.

    Its documented way, by magnitude: the layer that ends the net keeps its channels.
    """
    if tp is None:
        return {"tp": "not installed"}
    torch.manual_seed(0)
    model, example = build(name)
    model = randomise(model, 0, example)
    before, last = sum(p.numel() for p in model.parameters()), _last_layer(model, example)
    row: Row = {"tp": "no graph"}
    try:
        pruner = tp.pruner.BasePruner(
            model,
            copied(example),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=last,
        )
        row["tp"] = "not pruned"
        pruner.step()
        row["tp_kept"] = round(sum(p.numel() for p in model.parameters()) / before, 3)
        row["tp"] = "does not run"
        outputs(model, example)
        row["tp"] = "nothing pruned" if row["tp_kept"] == 1 else "runs"
    except Exception as error:
        row["tp_reason"] = one_line(f"{type(error).__name__}: {error}")[:200]
    return row


def _last_layer(model: nn.Module, example: Any) -> list[nn.Module]:
    """Return the convolution or linear layer that runs last."""
    ran: list[nn.Module] = []
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    hooks = [
        m.register_forward_hook(lambda m, *_: ran.append(m))
        for m in model.modules()
        if isinstance(m, kinds)
    ]
    outputs(model, example)
    for hook in hooks:
        hook.remove()
    return ran[-1:]
