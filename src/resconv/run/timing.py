"""What a target in milliseconds needs before and while training: the units' measured latency."""

import os

from torch import nn

import resconv
from resconv.errors import PlanError
from resconv.latency.table import LatencyTable
from resconv.planning.costs import ledger
from resconv.selection.sparsifier import check_form

from .job import LATENCY, Run

__all__ = ["check_reach", "latency_table"]


def latency_table(run: Run, model: nn.Module) -> LatencyTable | None:
    """Return the units' measured latency where the target needs it: the folder's, or measured now."""
    budget = run.config.budget()
    if not budget.times:
        return None
    path = run.folder / LATENCY
    costs = ledger(model, run.example())
    if os.path.lexists(path):
        try:
            table = LatencyTable.load(path)
            reason = table.why_unfit(costs, budget)
            if reason is None:
                return table
        except PlanError as error:
            reason = str(error).rstrip(".")
        run.say(f"{path} is measured anew: {reason}.")
    run.say(f"Measuring the latency of {len(costs.names)} units in {budget.runtime}.")
    table = resconv.measure_latency(model, run.example(), budget)
    table.save(path)
    run.say(
        f"The dense net takes {table.latency_ms:.3g} ms (batch {table.batch}, {table.threads} "
        f"threads); {len(table.nets)} nets timed, the model of them is right to {table.error:.0%}."
    )
    return table


def check_reach(run: Run) -> None:
    """Refuse a target that no plan can reach, or no run so short, before anything is trained.

    Raises:
        BudgetError: see :class:`resconv.Sparsifier`.
    """
    config = run.config
    recipe = run.recipe(config.stage_epochs()[1], config.sparse_rate())
    total_steps = recipe.count_steps(len(run.data.train))
    check_form(config.budget(), "proximal", total_steps)  # before the latency takes its time
    model = resconv.convert(run.create().eval(), run.example(2), units=config.units)
    resconv.Sparsifier(
        model,
        target=config.budget(),
        total_steps=total_steps,
        example_inputs=run.example(),
        latency=latency_table(run, model),
    )
