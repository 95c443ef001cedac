"""The stages between training and deployment: which units go, and the net without them."""

import shutil
from itertools import islice
from typing import Any

from torch import nn

import resconv
from resconv import nets
from resconv.data import BatchLoader
from resconv.planning.plan import Plan
from resconv.selection.planner import plan_measured
from resconv.surgery.pruning import leftovers
from resconv.train import evaluate

from .job import LATENCY, Run
from .timing import latency_table

__all__ = ["compact_of", "plan", "prune", "save_compact"]


def plan(run: Run) -> None:
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


def prune(run: Run) -> None:
    gated, plan, example = run.gated(), run.plan(), run.example(4)
    compact = resconv.fuse(resconv.prune(gated, plan), example)
    check = resconv.verify(gated, compact, example, plan=plan)
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
    }
    asked = run.config.recalibrate
    if asked or (asked is None and nonzero):
        compact = _recalibrated(run, gated, plan)
        metrics["top1_recalibrated"] = evaluate(compact, run.data)
        run.say(f"BatchNorm statistics collected anew: top-1 {metrics['top1_recalibrated']:.2f} %.")
    save_compact(run, compact, plan)
    # A checkpoint of another plan's finetuning would not fit.
    shutil.rmtree(run.folder.logs / "finetune", ignore_errors=True)
    run.folder.add_metrics(
        **metrics,
        verify={
            "max_abs_error": check.max_abs_error,
            "max_rel_error": check.max_rel_error,
            "tolerance": check.tolerance,
        },
        removed_with_nonzero_scale=nonzero,
        leftover_factors=leftovers(compact),
    )
    if left := leftovers(compact):
        run.say(
            f"{len(left)} factors of removed layers could not be absorbed and stay as one multiply "
            f"each: {', '.join(list(left)[:4])}{', ...' if len(left) > 4 else ''}."
        )


def _recalibrated(run: Run, gated: nn.Module, plan: Plan) -> nn.Module:
    """Return the compact net with BatchNorm statistics from training images, without retraining."""
    data = run.data
    net = resconv.prune(gated, plan, fuse=False)
    loader = BatchLoader(
        data.train,
        256,
        shuffle=True,
        seed=run.config.seed,
        augment=None,
        mean=data.mean,
        std=data.std,
    )
    resconv.recalibrate(net, islice(loader, 50))
    return resconv.fuse(net.eval(), run.example(4))


def save_compact(run: Run, compact: nn.Module, plan: Plan) -> None:
    resconv.save(compact, run.folder.path, plan=plan, example_inputs=run.example())
    size = resconv.count(compact, run.example())
    run.folder.add_metrics(macs_compact=size.macs, num_params_compact=size.num_params)


def compact_of(run: Run) -> nn.Module:
    """Return the saved compact net of a run."""
    source = run.create() if nets.runs_user_code(run.config.model) else None
    return resconv.load(run.folder.path, model=source, trust_source=run.trust_source)
