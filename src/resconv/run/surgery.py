"""The stages between training and deployment: which units go, and the net without them."""

from itertools import islice
from typing import Any

from torch import Tensor, nn

import resconv
from resconv.data import BatchLoader
from resconv.nn.gates import BranchGate, Segment
from resconv.planning.costs import cost_model, excess
from resconv.planning.plan import Plan
from resconv.selection.planner import plan_measured
from resconv.surgery.pruning import leftovers
from resconv.surgery.verification import Verification
from resconv.train import evaluate

from .job import LATENCY, Run
from .metrics import Metrics, Verified
from .timing import latency_table

__all__ = ["compact_of", "in_convs", "plan", "prune", "removed_units", "save_compact", "try_plan"]


def plan(run: Run) -> None:
    """Choose the units that go, for the run's target."""
    gated = run.gated()
    plan, table = plan_measured(
        gated, run.example(), run.config.budget(), latency_table(run, gated)
    )
    if table is not None:
        table.save(run.folder / LATENCY)
    plan.save(run.folder / "plan.json")
    nonzero = [n for n in plan.remove if plan.scales[n] != 0]
    run.say(
        f"Plan: {len(plan.remove)} units go ({', '.join(plan.remove[:6])}"
        f"{', ...' if len(plan.remove) > 6 else ''})"
        + (f"; the scale of {len(nonzero)} of them is not 0." if nonzero else ".")
    )
    if plan.latency_ms_after is not None:
        run.say(
            f"The net that is left takes {plan.latency_ms_after:.3g} ms (predicted "
            f"{plan.latency_ms_predicted:.3g}, dense {plan.latency_ms_before:.3g})."
        )


def try_plan(run: Run, plan: Plan) -> None:
    """Carry a plan out, up to the comparison of the outputs; nothing is written.

    Raises:
        ResConvError: the plan does not fit the run's net, or its units cannot go.
    """
    gated, example = run.gated(), run.example(4)
    _carry_out(gated, plan, example)


def _carry_out(gated: nn.Module, plan: Plan, example: Tensor) -> tuple[nn.Module, Verification]:
    compact = resconv.fuse(resconv.prune(gated, plan), example, fold_norms=True)
    return compact, resconv.verify(gated, compact, example, plan=plan)


def _warn_of_target(run: Run, gated: nn.Module, plan: Plan) -> None:
    """Warn where a plan, written by hand perhaps, leaves more than the run was asked for."""
    costs = cost_model(gated, run.example())
    limits = run.config.budget().limits(costs.macs, costs.num_params)
    # Milliseconds are not predicted but measured, at the end.
    left = costs.left(removed_units(run, gated, plan))
    over = excess(left, costs.whole, limits.without_latency())
    if over:
        run.warn("prune", f"The plan misses the target of the run: it leaves {over}.")


def prune(run: Run) -> None:
    gated, plan, example = run.gated(), run.plan(), run.example(4)
    compact, check = _carry_out(gated, plan, example)
    _warn_of_target(run, gated, plan)
    top1 = evaluate(compact, run.data)
    nonzero = [n for n in plan.remove if resconv.gates(gated)[n].scale.item() != 0]
    run.say(
        f"Pruned, without retraining: top-1 {top1:.2f} %; agrees with the gated net to "
        f"{check.max_rel_error:.1e}."
    )
    metrics: dict[str, Any] = {
        "top1_pruned": top1,
        "top1_recalibrated": None,
        "top1_finetuned": None,
        "epochs_finetune": 0,
        "finetuned_kept": None,
        "top1_compact": top1,
        "num_units": len(resconv.gates(gated)),
        "removed_units": removed_units(run, gated, plan),
        "num_convs_dense": resconv.profile(run.dense(), run.example()).num_convs,
        "num_convs_compact": resconv.profile(compact, run.example()).num_convs,
    }
    run.say(in_convs(Metrics(**metrics)) + ".")
    asked = run.config.target.recalibrate
    if asked or (asked is None and nonzero):
        compact = _recalibrated(run, gated, plan)
        metrics["top1_recalibrated"] = metrics["top1_compact"] = evaluate(compact, run.data)
        run.say(f"BatchNorm statistics collected anew: top-1 {metrics['top1_recalibrated']:.2f} %.")
    save_compact(run, compact, plan)
    run.folder.add_metrics(
        **metrics,
        verify=Verified(check.max_abs_error, check.max_rel_error, check.tolerance),
        removed_with_nonzero_scale=nonzero,
        leftover_factors=leftovers(compact),
    )
    if left := leftovers(compact):
        run.say(
            f"{len(left)} factors of removed layers could not be absorbed and stay as one multiply "
            f"each: {', '.join(list(left)[:4])}{', ...' if len(left) > 4 else ''}."
        )


def removed_units(run: Run, trained: nn.Module, plan: Plan) -> list[str]:
    """Return the units that the net without its gates lacks, also those inside of others.

    Beside the planned ones these are branches that count nothing: they are not computed either.
    """
    still = resconv.gates(trained)
    idle = [
        n for n, g in still.items() if isinstance(g, BranchGate | Segment) and g.scale.item() == 0
    ]
    gated = run.gated()
    gone = cost_model(gated, run.example()).gone([*plan.remove, *idle])
    return [n for n in resconv.gates(gated) if n in gone]


def in_convs(metrics: Metrics) -> str:
    """Say what the removed units are in convolutions; empty in a run of an older version."""
    if metrics.num_convs_compact is None:
        return ""
    gone, before = len(metrics.removed_units or ()), metrics.num_convs_dense
    return (
        f"{gone} of {metrics.num_units} units are removed, those inside of others counted: {before} "
        f"convolution{'s' * (before != 1)} became {metrics.num_convs_compact}"
    )


def _recalibrated(run: Run, gated: nn.Module, plan: Plan) -> nn.Module:
    """Return the compact net with BatchNorm statistics from training images, without retraining."""
    data = run.data
    net = resconv.prune(gated, plan, fuse=False)
    loader = BatchLoader(
        data.train, 256, data.preprocessing, shuffle=True, seed=run.config.training.seed
    )
    resconv.recalibrate(net, islice(loader, 50))
    return resconv.fuse(net.eval(), run.example(4), fold_norms=True)


def save_compact(run: Run, compact: nn.Module, plan: Plan) -> None:
    resconv.save(compact, run.folder.path, plan=plan, example_inputs=run.example())
    size = resconv.profile(compact, run.example())
    run.folder.add_metrics(macs_compact=size.macs, num_params_compact=size.num_params)


def compact_of(run: Run) -> nn.Module:
    """Return the saved compact net of a run."""
    # From the net that the run's settings name: what model.json names as its source is not asked.
    return resconv.load(run.folder.path, model=run.create(), trust_source=run.trust_source)
