"""What a target in milliseconds needs before and while training: the units' measured latency."""

import os

from torch import nn

import resconv
from resconv.errors import PlanError
from resconv.latency.table import LatencyTable
from resconv.planning.costs import cost_model

from .job import LATENCY, Run

__all__ = ["latency_table"]


def latency_table(run: Run, model: nn.Module) -> LatencyTable | None:
    """Return the units' measured latency where the target needs it: the run's, or measured now."""
    budget = run.config.budget()
    if not budget.times:
        return None
    path = run.folder / LATENCY
    costs = cost_model(model, run.example())
    if run.latency is not None:
        return run.latency
    if run.owns_folder and os.path.lexists(path):
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
    run.keep_latency(table)
    run.say(
        f"The dense net takes {table.latency_ms:.3g} ms (batch {table.batch}, {table.threads} "
        f"threads); {len(table.nets)} nets timed, the model of them is right to {table.error:.0%}."
    )
    return table
