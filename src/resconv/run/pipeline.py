"""The stages of the main job, in order: each reads what those before it left, and is done once."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from resconv import nets
from resconv.errors import ResConvWarning, RunError
from resconv.planning.plan import Plan
from resconv.selection.outcome import Snapshot
from resconv.storage.quantising import require_quantiser
from resconv.train import join
from resconv.train.seeds import seed_all

from . import deployment, exchange, quantising, stages, surgery, training
from .checks import check
from .config import Config
from .folder import RunFolder, log_files
from .job import INT8_FILES, Run, Say
from .lock import locked
from .metrics import Metrics
from .start import settled

__all__ = [
    "STAGES",
    "Run",
    "begin",
    "compress",
    "history",
    "open_run",
    "quantise",
    "rehearse",
    "run_stage",
    "use_plan",
]


STAGES: dict[str, Callable[[Run], None]] = {
    "dense": training.dense,
    "sparse": training.sparse,
    "plan": surgery.plan,
    "prune": surgery.prune,
    "finetune": training.finetune,
    "control": training.control,
    "export": deployment.export,
    "measure": deployment.measure,
    "report": deployment.report,
}


# The stages that every process takes part in; the leading one does the rest.
_SHARED = ("dense", "sparse", "finetune", "control")
_TRAINED = ("dense", "sparse")


def begin(
    path: Path,
    config: Config,
    *,
    fresh: bool = False,
    say: Say | None = print,
    dense_only: bool = False,
) -> Run:
    """Check a run, and make (or open again) its folder; under a launcher, once for all its processes.

    What can be known before anything is trained is asked first, and a run that is refused leaves
    nothing. With ``fresh`` an earlier run in the folder is then moved aside. With ``dense_only`` no
    target is asked for.

    Raises:
        RunError: see :meth:`RunFolder.begin`.
        ResConvError: see :func:`resconv.run.checks.check`.
    """
    ranks = join()
    # The net's name came with the call, from the user.
    run = Run(RunFolder(path), say, ranks, config, trust_source=True)
    run.use(ranks.by_first(lambda: settled(run)))
    ranks.by_first(lambda: _begin(run, fresh, dense_only))
    run.owns_folder = run.is_checked = True
    return run


def rehearse(
    path: Path,
    config: Config,
    *,
    fresh: bool = False,
    say: Say | None = print,
    dense_only: bool = False,
) -> Run:
    """Check a run as :func:`begin` does, and make nothing.

    Raises:
        ResConvError: what :func:`begin` would raise.
    """
    run = Run(RunFolder(path), say, None, config, trust_source=True)
    run.use(settled(run))
    _check(run, fresh, dense_only)
    return run


def _check(run: Run, fresh: bool, dense_only: bool) -> None:
    path, config = run.folder.path, run.config
    if not dense_only:
        config.budget()
    RunFolder.refuse(path, config, fresh=fresh)
    run.owns_folder = not fresh and run.folder.holds(config)
    check(run, [] if fresh else run.folder.done(), sparse=not dense_only)


def _begin(run: Run, fresh: bool, dense_only: bool) -> None:
    path, config = run.folder.path, run.config
    _check(run, fresh, dense_only)
    folder = RunFolder.begin(path, config, fresh=fresh)
    if folder.path != path:
        with locked(path):
            try:
                run.say(f"The earlier run in {path} is now in {exchange.complete(path)}.")
            except BaseException:
                exchange.discard(path)
                raise
    run.owns_folder = True
    if run.latency is not None:
        run.keep_latency(run.latency)


def open_run(path: Path, say: Say | None = print, *, trust_source: bool = False) -> Run:
    """Open a run that is there; its net is built by the user's own code only with ``trust_source``."""
    return Run(RunFolder.open(path), say, trust_source=trust_source)


def run_stage(run: Run, stage: str, *, again: bool = False) -> None:
    """Run one stage unless it is done, or not asked for; one that is run again undoes those after it.

    Raises:
        RunError: a stage before it is missing, what it is to use changed, or the folder is in use.
    """
    if stage not in _asked(run):
        return
    with _owned(run):
        # What is done is decided once: the folder changes while the others look.
        bound = run.ranks.by_first(lambda: _prepare(run, stage, again))
        if bound is None or not (run.ranks.leads or stage in _SHARED):
            return
        run.bound = bound
        seed_all(
            run.config.training.seed
        )  # a stage's draws do not depend on what ran before in this process
        start = time.perf_counter()
        with _told(run, stage):
            STAGES[stage](run)
        if run.ranks.leads:
            seconds = run.folder.metrics().seconds
            run.folder.add_metrics(
                seconds={**seconds, stage: round(time.perf_counter() - start, 1)}
            )
            run.folder.finish(stage, stages.record(run, stage))


def _asked(run: Run) -> list[str]:
    """Return the stages of the run: a control is an option, which a finished run may be given too."""
    return [s for s in STAGES if s != "control" or run.config.training.control]


def _prepare(run: Run, stage: str, again: bool) -> str | None:
    """Return what the stage's checkpoints are bound to, or None where it is done already."""
    order, done = list(STAGES), run.folder.done()
    if stage in done and not again:
        gone = [f for f in run.folder.mark().stages[stage].wrote if not (run.folder / f).is_file()]
        if not gone or stage in _TRAINED:  # which is too dear to be done anew unasked
            run.say(f"[{stage}] done already.")
            return None
        run.say(f"[{stage}] is done anew: {gone[0]} is missing.")
    missing = [s for s in order[: order.index(stage)] if s in _asked(run) and s not in done]
    if missing:
        raise RunError(
            f"{run.folder.path}: the stage {missing[0]!r} has to be run before {stage!r}. "
            f"`resconv compress` with the same settings does all that is missing."
        )
    # Before anything is undone: what is refused leaves the run as it was.
    nets.require_trusted_source(run.config.net.model, run.folder.path, trusted=run.trust_source)
    stages.check(run, stage)
    run.folder.undo(order[order.index(stage) :], keep=stages.WRITES[stage])
    run.folder.claim(stages.WRITES[stage])
    if stage == "prune":  # of another plan's finetuning
        run.folder.remove(log_files("finetune"))
    run.folder.forget_warnings(order[order.index(stage) :])
    run.folder.added.clear()
    return stages.bind(run, stage)


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


@contextmanager
def _owned(run: Run) -> Iterator[None]:
    """Own the run folder for a block; its leading process does, for all."""
    with ExitStack() as held:
        run.ranks.by_first(lambda: held.enter_context(run.folder.locked()))
        yield


def use_plan(run: Run, path: Path) -> None:
    """Take a plan of the user's in place of the run's own; what the old one led to is undone.

    Raises:
        RunError: training is not done.
        PlanError, PruneError: the plan does not fit the net; the run stays as it was.
    """
    chosen = Plan.load(path)
    with _owned(run):
        missing = [s for s in ("dense", "sparse") if s not in run.folder.done()]
        if missing:
            raise RunError(
                f"{run.folder.path}: the stage {missing[0]!r} has to be run before 'plan'. `resconv "
                "compress` with the same settings does all that is missing."
            )
        stages.check(run, "plan")
        surgery.try_plan(run, chosen)  # before anything is changed
        run.folder.undo(list(STAGES)[2:], keep=stages.WRITES["plan"])
        run.folder.claim(stages.WRITES["plan"])
        run.folder.added.clear()
        chosen.save(run.folder / "plan.json")
        run.folder.finish("plan", stages.record(run, "plan"))


def quantise(run: Run, to: Path | None = None, **options: Any) -> None:
    """Write the compact net of a run in 8 bits, and put what that costs into its metrics and its report.

    Args:
        run: its training images calibrate the file, its test images judge it.
        to: an .onnx file; by default one in the run folder.
        options: ``pixels`` and ``softmax`` of :func:`resconv.export`.

    Raises:
        RunError: a stage before is missing, or what it wrote changed.
        DataError: the run's images are not there any more.
        ExportError: ONNX Runtime cannot write it.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    require_quantiser()
    with _owned(run):
        if "export" not in run.folder.done():
            run_stage(run, "export")
        stages.check(run, "measure")
        plain, pixels = INT8_FILES
        own = pixels if options.get("pixels") else plain
        if to is None:
            run.folder.claim((own,))
        found = quantising.quantise(run, to or run.folder / own, **options)
        run.folder.add_metrics(int8=found)
        run.folder.amend("export", () if to else (own,), ("int8",))
        if "report" in run.folder.done():
            run_stage(run, "report", again=True)


def compress(run: Run) -> Metrics | None:
    """Run every stage that is not done, and return the metrics (None but on the leading process)."""
    run.config.budget()
    with _owned(run):
        if not run.is_checked:
            run.ranks.by_first(lambda: check(run, run.folder.done()))
        for stage in STAGES:
            run_stage(run, stage)
    return run.folder.metrics() if run.ranks.leads else None


def history(folder: RunFolder) -> list[Snapshot]:
    """Return the scales over sparse training."""
    return list(folder.history().steps)
