"""The stages of the main job, in order: each reads what those before it left, and is done once."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resconv.errors import ResConvWarning, RunError
from resconv.selection.outcome import Snapshot
from resconv.train import join

from . import deployment, surgery, training
from .checks import check
from .config import Config
from .folder import RunFolder
from .job import Run, Say

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


def begin(
    path: Path,
    config: Config,
    *,
    fresh: bool = False,
    say: Say = print,
    dense_only: bool = False,
) -> Run:
    """Check a run, and make (or open again) its folder; under a launcher, once for all its processes.

    What can be known before anything is trained is asked first, and a run that is refused leaves
    nothing. With ``dense_only`` no target is asked for.

    Raises:
        RunError: see :meth:`RunFolder.refuse`.
        ResConvError: see :func:`resconv.run.checks.check`.
    """
    ranks = join()
    run = Run(RunFolder(path), say, ranks, config)

    def make() -> None:
        if not dense_only:
            config.budget()
        RunFolder.refuse(path, config, fresh=fresh)
        run.owns_folder = not fresh and run.folder.holds(config)
        check(run, [] if fresh else run.folder.done(), sparse=not dense_only)
        RunFolder.begin(path, config, fresh=fresh)
        run.owns_folder = True
        if run.latency is not None:
            run.keep_latency(run.latency)

    ranks.by_first(make)
    return run


def open_run(path: Path, say: Say = print) -> Run:
    return Run(RunFolder.open(path), say)


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
    run.folder.forget_warnings(order[order.index(stage) :])
    start = time.perf_counter()
    with _told(run, stage):
        STAGES[stage](run)
    seconds = run.folder.metrics().get("seconds", {})
    run.folder.add_metrics(seconds={**seconds, stage: round(time.perf_counter() - start, 1)})
    run.folder.mark(stage)


@contextmanager
def _told(run: Run, stage: str) -> Iterator[None]:
    """Let what resconv itself warns of reach the user and the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", ResConvWarning)
        other = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, ResConvWarning):
                run.warn(stage, str(message))
            else:
                other(message, category, *where, **more)

        warnings.showwarning = show
        yield


def compress(run: Run) -> dict[str, Any]:
    """Run every stage that is not done, and return the metrics (on the leading process)."""
    for stage in STAGES:
        run_stage(run, stage)
    return run.folder.metrics() if run.ranks.leads else {}


def history(folder: RunFolder) -> list[Snapshot]:
    """Return the scales over sparse training."""
    return [Snapshot(*row) for row in folder.read_json("scales.json")]
