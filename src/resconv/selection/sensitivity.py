"""What each unit's removal alone costs, without any training, and the plan that follows from it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from msgspec import Struct
from torch import Tensor, nn
from torch.nn import functional as F

from ..analysis.inputs import evaluating
from ..latency.table import LatencyTable
from ..nn.gates import gates, kept, zeroed
from ..planning.budget import Budget
from ..planning.costs import CostModel
from ..planning.plan import Plan
from ..surgery.provenance import example_inputs_of
from .planner import plan_measured

__all__ = ["Judged", "judge", "plan_untrained", "sensitivity", "without"]

Batches = Sequence[tuple[Tensor, Tensor]]


class Judged(Struct, frozen=True):
    """Mean cross-entropy over some images, and percent of them that are told right."""

    loss: float
    top1: float


def judge(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Judged:
    """Judge a classifier by (images, labels) in eval mode; it is left as it was."""
    loss, right, count = 0.0, 0, 0
    with evaluating(model):
        for images, labels in batches:
            logits = model(images).float()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
            count += len(labels)
    return Judged(loss / count, 100 * right / count)


@contextmanager
def without(gated: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let the named units of a converted net be gone for a block: scale 0, and its input as it was."""
    every = gates(gated)
    names = list(names)
    controls = [c for n in names if (c := every[n].control) is not None]
    with kept(controls), zeroed(gated, names):
        with torch.no_grad():
            for control in controls:
                control.fill_(1.0)
        yield


def sensitivity(gated: nn.Module, batches: Batches) -> dict[str, Judged]:
    """Return how a converted net does without each of its units alone; it is left as it was."""
    found = {}
    for name in gates(gated):
        with without(gated, [name]):
            found[name] = judge(gated, batches)
    return found


def plan_untrained(
    gated: nn.Module,
    budget: Budget,
    costs: CostModel,
    table: LatencyTable | None,
    loss_of: Mapping[str, float],
) -> Plan:
    """Return the plan for a net that was not trained for it: first goes what costs the least loss for its MACs.

    Args:
        gated: the converted net, which is left as it was.
        budget: the limits.
        costs: of its units.
        table: their latency, where the budget limits that.
        loss_of: what each unit's removal alone adds to the loss; empty where nobody knows: then the largest go first.

    Raises:
        BudgetError: the budget cannot be met.
    """
    every = gates(gated)
    ranked = sorted(loss_of, key=lambda n: loss_of[n] / max(1, costs.own_macs(n)))
    with kept(g.scale for g in every.values()):
        with torch.no_grad():
            # The planner takes the smallest scales first, and none of these is 0.
            for place, name in enumerate(ranked, 1):
                every[name].scale.fill_(place / len(ranked))
        return plan_measured(gated, example_inputs_of(None, gated), budget, table)[0]
