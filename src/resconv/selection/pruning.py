"""The verb: what goes is named by a plan, found by a budget, or has arrived at 0 already."""

from torch import nn

from ..analysis.inputs import unwrap
from ..errors import PlanError
from ..nn.gates import gates
from ..planning.budget import Budget, require_budget
from ..planning.costs import cost_model
from ..planning.plan import Plan
from ..surgery import pruning as surgery
from ..surgery.provenance import converted, example_inputs_of
from .planner import plan as plan_units

__all__ = ["prune"]


def prune(model: nn.Module, plan: Plan | Budget | None = None, *, fuse: bool = True) -> nn.Module:
    """Return the net without its planned units; ``model`` is left as it was.

    The result is run once and compared with ``model`` (those scales set to 0), in eval mode and, where
    that can be compared, in training mode. It carries the plan and the specification of its inputs.

    Args:
        model: what :func:`resconv.convert` returned, trained.
        plan: which units go. None: all whose scale is exactly 0. A :class:`resconv.Budget`: what
            :func:`resconv.plan` chooses for it.
        fuse: leave ordinary layers only. With False the units that stay keep their training form,
            to be trained further and fused later.

    Raises:
        PlanError: nothing is to be removed, or the plan names a unit that the model does not have.
        BudgetError: the budget cannot be met.
        PruneError: a unit cannot be removed exactly; the reason is in the message. Or the model
            holds NaN or infinite numbers.
        VerificationError: the result, run once, does not compute what the gated net computes.

    Example:
        >>> model = resconv.convert(net, images, start="identity")
        >>> compact = resconv.prune(model, resconv.Budget(macs=0.7))
        >>> resconv.profile(compact, images).num_convs
        2
    """
    if plan is None:
        plan = _arrived(model)
    elif not isinstance(plan, Plan):
        require_budget(plan, "plan")
        plan = plan_units(model, budget=plan)
    return surgery.prune(model, plan, fuse=fuse)


def _arrived(model: nn.Module) -> Plan:
    """Return the plan that removes the units whose scale is exactly 0."""
    model = unwrap(model)
    converted(model)
    scales = {name: gate.scale.item() for name, gate in gates(model).items()}
    names = tuple(name for name, scale in scales.items() if scale == 0)
    if not names:
        smallest = min(scales, key=lambda n: abs(scales[n]), default=None)
        least = f"; the smallest, of {smallest}, is {scales[smallest]:.3g}" if smallest else ""
        raise PlanError(
            f"No scale is exactly 0 among the {len(scales)} of the model{least}. Train with "
            "resconv.Sparsifier(model, optimizer, macs=0.5, total_steps=...) until some are; or say "
            "what to remove: resconv.prune(model, resconv.Budget(macs=0.5)), or a resconv.Plan."
        )
    costs = cost_model(model, example_inputs_of(None, model))
    left = costs.left(names)
    return Plan(names, costs.macs, left.macs, costs.num_params, left.num_params, scales)
