"""The trainers that a user names: what they aim at, and which of ultralytics' trainers they extend."""

from pathlib import Path
from typing import Any

from ultralytics.cfg import get_cfg, get_save_dir
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.patches import torch_load

from resconv.errors import BudgetError, RunError

from .checkpoints import STATE
from .training import Settings, SparseTraining

__all__ = ["finetuner", "trainer"]

_TASKS = ("detect", "segment", "pose", "obb", "classify")


class TrainerFactory:
    """What ``YOLO(...).train(trainer=...)`` takes: makes the trainer of the model's task."""

    def __init__(self, settings: Settings, goes_on: bool) -> None:
        self.settings, self.goes_on = settings, goes_on

    def __call__(
        self, overrides: dict[str, Any], _callbacks: dict[str, Any] | None = None
    ) -> SparseTraining:
        task = overrides.get("task") or "detect"
        if task not in _TASKS:
            raise RunError(f"task={task!r}: resconv's trainer knows {', '.join(_TASKS)}.")
        if self.goes_on and not overrides.get("resume"):
            overrides = _continued(overrides)
        theirs: Any = _trainer_of(task)
        # Its own settings on a class, as ultralytics makes and copies trainers by their class.
        made = type(
            f"Sparse{theirs.__name__}", (SparseTraining, theirs), {"settings": self.settings}
        )
        return made(overrides=overrides, _callbacks=_callbacks)  # type: ignore[no-any-return]


def _trainer_of(task: str) -> type:
    from ultralytics.models import yolo

    return {  # type: ignore[no-any-return]
        "detect": yolo.detect.DetectionTrainer,
        "segment": yolo.segment.SegmentationTrainer,
        "pose": yolo.pose.PoseTrainer,
        "obb": yolo.obb.OBBTrainer,
        "classify": yolo.classify.ClassificationTrainer,
    }[task]


def trainer(
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    latency_ms: float | int | None = None,
    latency: float | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    batch: int | None = None,
    units: Any = None,
    start: str = "keep",
    learning_rate: float = 0.1,
    continue_run: bool = False,
) -> TrainerFactory:
    """Return a trainer for ``YOLO(...).train(trainer=...)`` that makes the net sparse and prunes it.

    The net is converted when its weights are loaded, and a :class:`resconv.Sparsifier` follows the
    optimizer. ``best.pt`` is chosen among the epochs after which all zeros were there, and is
    pruned at the end: ``weights/compact.pt`` in the run's folder is for ``YOLO(path)`` (val, predict, export;
    to train it on, see :func:`finetuner`), the folder ``compact/`` for :func:`resconv.load`
    (``trust_source=True``: the net is built by ultralytics). ``distill_model="dense.pt"`` of
    ultralytics works beside it.

    A run that was stopped goes on with ``YOLO("last.pt").train(resume=True, trainer=...)`` and ends like
    one that was not.

    Args:
        macs: the budget to arrive at, a share or a number, of the MACs at ``imgsz``. This and the
            next six are as for :class:`resconv.Sparsifier`; on resuming they may be left out.
        params: the same of the parameters.
        latency_ms: milliseconds a batch.
        latency: a share of the dense net's latency.
        runtime: by which the latency is measured.
        threads: with how many threads.
        batch: and of how many images.
        units: which kinds of units, as for :func:`resconv.convert`.
        start: the same.
        learning_rate: of scales and controls, as a share of the optimizer's own.
        continue_run: if the folder of ``project`` and ``name`` holds a run of this kind that was
            stopped, go on with it: the same command then starts and resumes. ``exist_ok`` is implied.

    Raises (when training is started, before its first step):
        ConversionError: there is nothing to convert.
        BudgetError: the target cannot be reached, or no target is given.
        RunError: several devices, training by ``time``, or a checkpoint that does not fit.
    """
    numbers = {
        "macs": macs,
        "params": params,
        "latency_ms": latency_ms,
        "latency": latency,
        "runtime": runtime,
        "threads": threads,
        "batch": batch,
    }
    target = {k: v for k, v in numbers.items() if v is not None}
    conversion = {"start": start} | ({} if units is None else {"units": units})
    return TrainerFactory(
        Settings(True, target, {"learning_rate": learning_rate}, conversion), continue_run
    )


def finetuner(*, learning_rate: float = 0.1, continue_run: bool = False) -> TrainerFactory:
    """Return a trainer for ``YOLO("compact.pt").train(trainer=...)`` that trains a pruned net on.

    The net is trained in the form that :func:`trainer` left it in, with its norms, and is made ordinary
    at the end; nothing is removed. ``distill_model="dense.pt"`` of ultralytics lets it learn from
    the dense net. Files and resuming are those of :func:`trainer`.

    Args:
        learning_rate: of scales and controls, as a share of the optimizer's own.
        continue_run: as for :func:`trainer`.

    Raises (when training is started, before its first step):
        RunError: the weights are no pruned net, or as for :func:`trainer`.
    """
    options = {"learning_rate": learning_rate, "strength": 0.0}
    return TrainerFactory(Settings(False, {}, options, {}), continue_run)


def _continued(overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the overrides, with ``resume`` where the run's folder holds one that was stopped."""
    overrides = {**overrides, "exist_ok": True}
    if not overrides.get("name"):
        raise BudgetError(
            "continue_run=True goes on with the run of its name: give train() a name=..., too."
        )
    plain = {k: v for k, v in overrides.items() if k != "save_dir"}
    last = Path(get_save_dir(get_cfg(DEFAULT_CFG, plain))) / "weights" / "last.pt"
    if not last.exists():
        return overrides
    saved = torch_load(last, map_location="cpu")
    if STATE in saved and saved.get("epoch", -1) >= 0:
        return {**overrides, "resume": str(last)}
    raise RunError(
        f"{last.parent.parent} holds a run that has ended (or one of another trainer). Give another "
        "name=..., or remove the folder."
    )
