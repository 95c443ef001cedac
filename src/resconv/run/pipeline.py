"""The stages of the main job, in order: each reads what those before it left, and is done once."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resconv.errors import RunError
from resconv.latency.table import require_runtime
from resconv.selection.outcome import Snapshot
from resconv.train import join

from . import deployment, surgery, training
from .config import Config
from .folder import RunFolder
from .job import Run, Say
from .metrics import Row
from .timing import check_reach

__all__ = ["STAGES", "Run", "begin", "compress", "history", "open_run", "run_stage"]


STAGES: dict[str, Callable[[Run], None]] = {
    "dense": training.dense,
    "sparse": training.sparse,
    "plan": surgery.plan,
    "prune": surgery.prune,
    "finetune": training.finetune,
    "export": deployment.export,
    "measure": deployment.measure,
    "report": deployment.report,
}


# The stages that every process takes part in; the leading one does the rest.
_SHARED = ("dense", "sparse", "finetune")


def begin(path: Path, config: Config, *, fresh: bool = False, say: Say = print) -> Run:
    """Make (or open again) a run folder; under a launcher, once for all its processes.

    Raises:
        RunError: see :meth:`RunFolder.begin`.
    """
    ranks = join()
    ranks.by_first(lambda: RunFolder.begin(path, config, fresh=fresh) and None)
    # The net's name came with the call, from the user.
    return Run(RunFolder.open(path), say, ranks, trust_source=True)


def open_run(path: Path, say: Say = print, *, trust_source: bool = False) -> Run:
    """Open a run that is there; its net is built by the user's own code only with ``trust_source``."""
    return Run(RunFolder.open(path), say, trust_source=trust_source)


def run_stage(run: Run, stage: str, *, again: bool = False) -> None:
    """Run one stage unless it is done; one that is run again undoes those after it.

    Raises:
        RunError: a stage before it is missing.
    """
    order = list(STAGES)
    # What is done is decided once: the folder changes while the others look.
    done = run.ranks.by_first(run.folder.done)
    if not run.ranks.leads:
        if stage in _SHARED and (again or stage not in done):
            STAGES[stage](run)
        return
    if stage in done and not again:
        run.say(f"[{stage}] done already.")
        return
    before = order[: order.index(stage)]
    missing = [s for s in before if s not in done]
    if missing:
        raise RunError(
            f"{run.folder.path}: the stage {missing[0]!r} has to be run before {stage!r}. "
            f"`resconv compress` with the same settings does all that is missing."
        )
    run.folder.unmark(tuple(order[order.index(stage) :]))
    start = time.perf_counter()
    STAGES[stage](run)
    seconds = run.folder.metrics().get("seconds", {})
    run.folder.add_metrics(seconds={**seconds, stage: round(time.perf_counter() - start, 1)})
    run.folder.mark(stage)


def compress(run: Run) -> dict[str, Any]:
    """Run every stage that is not done, and return the metrics (on the leading process)."""
    require_runtime(run.config.budget().runtime)
    if "sparse" not in run.ranks.by_first(run.folder.done):
        run.ranks.by_first(lambda: check_reach(run))
    for stage in STAGES:
        run_stage(run, stage)
    return run.folder.metrics() if run.ranks.leads else {}


def history(folder: RunFolder) -> list[Snapshot]:
    """Return the scales over sparse training."""
    return [Snapshot(*row) for row in folder.read_json("scales.json", list[Row])]
