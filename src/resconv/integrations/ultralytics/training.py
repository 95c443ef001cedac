"""Ultralytics' training with a Sparsifier in it; the first base of a trainer of any task."""

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK
from ultralytics.utils.patches import torch_load
from ultralytics.utils.torch_utils import unwrap_model

from resconv.errors import BudgetError, RunError
from resconv.files import OURS, write_atomic
from resconv.nn.gates import copy_zeros, gates
from resconv.selection.sparsifier import Sparsifier
from resconv.storage.store import save

from .checkpoints import (
    STATE,
    add_to_checkpoint,
    load_tensors,
    seed_epoch,
    settings_of,
    tensors_of,
)
from .compacting import compacted
from .networks import convert, form_of, student_of
from .steps import count_steps

__all__ = ["Settings", "SparseTraining"]


@dataclass(frozen=True)
class Settings:
    """Whether units are removed, the numbers of the target, options of Sparsifier and conversion."""

    prunes: bool
    target: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    conversion: dict[str, Any] = field(default_factory=dict)


class SparseTraining(BaseTrainer):  # type: ignore[misc]
    """See :func:`resconv.integrations.ultralytics.trainer`; methods are called by ultralytics.

    ``sparsifier`` is there from the first epoch on; ``compact`` is the path of ``compact.pt`` at the end.
    """

    settings: ClassVar[Settings]
    last: Path
    best: Path

    def __init__(
        self, cfg: Any = DEFAULT_CFG, overrides: Any = None, _callbacks: Any = None
    ) -> None:
        self.sparsifier: Sparsifier | None = None
        self.compact: Path | None = None
        self._offset = self._next_offset = 0
        self._batch = self._stepped = -1
        self._pending: dict[str, torch.Tensor] = {}
        self._arrived = False
        super().__init__(cfg, overrides, _callbacks)
        if self.world_size > 1:
            raise RunError(
                f"device={self.args.device!r}: resconv's trainer trains on one device. Give it one."
            )
        if self.args.time:
            raise RunError(
                f"time={self.args.time}: the number of steps must be known, so that all zeros are "
                "there in time. Give epochs=... instead."
            )
        self.aims = self._aims_of_run()
        self.add_callback("on_train_epoch_start", SparseTraining._start_epoch)
        self.add_callback("on_train_batch_start", SparseTraining._start_batch)

    def _aims_of_run(self) -> Settings:
        """Return the settings: those of the run that is resumed, if it is one."""
        given = self.settings
        if self.resume:
            found = Settings(**settings_of(self.args.model)["settings"])
            if given.prunes != found.prunes or (given.target and given.target != found.target):
                raise RunError(
                    f"{self.args.model} is of a run with {found.target or 'no target'}, and is "
                    f"resumed with {given.target or 'no target'}. Resume it with its own, or start anew."
                )
            return found
        if given.prunes and not given.target:
            raise BudgetError("Say what to arrive at: trainer(macs=0.6), params=... or latency=...")
        return given

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        form = None if weights is None else form_of(weights)
        if form is not None:
            classes = self.data.get("nc")
            if len(form.names) != classes:  # type: ignore[arg-type]
                raise RunError(
                    f"The net tells {len(form.names)} classes apart, the data has "  # type: ignore[arg-type]
                    f"{classes}. Train a dense net on the data first, and prune that."
                )
            return form
        if not self.aims.prunes:
            raise RunError(
                "finetuner() trains a pruned net on, and this one is not pruned. Start from a "
                "compact.pt; or prune with trainer(macs=...)."
            )
        net = super().get_model(cfg=cfg, weights=weights, verbose=verbose)
        freeze = self.args.freeze
        layers = freeze if isinstance(freeze, list) else range(freeze or 0)
        frozen = tuple(f"model.{i}." for i in layers)
        return convert(net, self.args.imgsz, frozen, **self.aims.conversion)

    def _build_train_pipeline(self) -> None:
        super()._build_train_pipeline()
        batches = len(self.train_loader)
        warmup = self._get_warmup_iterations(batches)
        steps = count_steps(batches, self.epochs, warmup, self.accumulate)
        # Ultralytics builds again with half the batch where memory did not suffice.
        if self.sparsifier is not None:
            if self.sparsifier.total_steps == steps:
                return
            self.sparsifier.detach()
        net = student_of(unwrap_model(self.model))
        if not gates(net) and not self.aims.prunes:
            return  # all units are gone, and ordinary layers are trained on
        self.sparsifier = Sparsifier(
            net, total_steps=steps, **self.aims.target, **self.aims.options
        ).attach(self.optimizer)

    @property
    def accumulate(self) -> int:
        """How many batches make a step; until the first step after a resumption, counted from -1."""
        return self._accumulate + self._offset

    @accumulate.setter
    def accumulate(self, value: int) -> None:
        self._accumulate = value

    @staticmethod
    def _start_epoch(trainer: Any) -> None:
        trainer._batch = len(trainer.train_loader) * trainer.epoch - 1
        # Ultralytics counts from batch -1 again; the run that was stopped did not.
        trainer._offset, trainer._next_offset = trainer._offset + trainer._next_offset, 0
        if trainer._pending:
            for name, parameter in trainer.model.named_parameters():
                parameter.grad = trainer._pending.get(name)
            trainer._pending = {}
        seed_epoch(trainer)

    @staticmethod
    def _start_batch(trainer: Any) -> None:
        trainer._batch += 1

    def optimizer_step(self) -> None:
        super().optimizer_step()
        self._stepped, self._offset = self._batch, 0
        if self.ema and self.sparsifier is not None:
            copy_scalars(self.sparsifier.model, student_of(self.ema.ema))

    def validate(self) -> Any:
        # An epoch before the zeros is of another net than the one that is left.
        if not self._arrived:
            self.best_fitness = None
            self.stopper.best_fitness, self.stopper.best_epoch = 0.0, self.epoch
        self._arrived = self._arrived or self._has_arrived()
        return super().validate()

    def _has_arrived(self) -> bool:
        return self.sparsifier is None or self.sparsifier.outcome().met

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        if self.sparsifier is not None and self.aims.prunes:
            left = self.sparsifier.outcome().macs / max(1, self.sparsifier.costs.macs)
            metrics = {**metrics, "resconv/macs": left}
        super().save_metrics(metrics)

    def save_model(self) -> bool:
        last, best = self.last, self.best
        with tempfile.TemporaryDirectory(dir=self.wdir, prefix=OURS) as beside:
            self.last, self.best = Path(beside) / last.name, Path(beside) / best.name
            try:
                saved: bool = super().save_model()
                if self.best.exists():
                    best_bytes = self.best.read_bytes()
                    write_atomic(best, lambda temporary: _write(temporary, best_bytes))
                if self.last.exists():
                    add_to_checkpoint(self.last, last, self._state())
            finally:
                self.last, self.best = last, best
        return saved

    def _state(self) -> dict[str, Any]:
        grads = {}
        if self._stepped < self._batch:
            named = self.model.named_parameters()
            grads = {n: p.grad.clone() for n, p in named if p.grad is not None}
        return {
            "settings": asdict(self.aims),
            "model": tensors_of(unwrap_model(self.model)),
            "ema": tensors_of(self.ema.ema),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": None if self.sparsifier is None else self.sparsifier.state_dict(),
            "stepped": self._stepped,
            "grads": grads,
            "arrived": self._arrived,
        }

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        super()._load_checkpoint_state(ckpt)
        state = ckpt[STATE]
        load_tensors(unwrap_model(self.model), state["model"])
        load_tensors(self.ema.ema, state["ema"])
        for saved, group in zip(
            state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True
        ):
            saved["fused"] = group.get("fused")  # the device of now decides
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(state["sparsifier"])
        self._arrived = state["arrived"]
        self._stepped = state["stepped"]
        self._next_offset = self._stepped + 1
        self._pending = {n: g.to(self.device) for n, g in state["grads"].items()}

    def final_eval(self) -> None:
        super().final_eval()
        if RANK in {-1, 0}:
            self._write_compact()

    def _write_compact(self) -> None:
        outcome = None if self.sparsifier is None else self.sparsifier.finish()
        if self.last.exists():
            add_to_checkpoint(self.last, self.last, None)
        if not self.best.exists() or not (outcome is None or outcome.met):
            LOGGER.warning(f"resconv: no compact net is written. {outcome or ''}")
            return
        saved = torch_load(self.best, map_location="cpu")
        gated = student_of(saved["model"]).float()
        compact, plain = compacted(gated, prunes=self.aims.prunes)
        folder = save(compact, self.save_dir / "compact")
        path = self.wdir / "compact.pt"
        write_atomic(
            path, lambda temporary: torch.save({**saved, "model": plain.half()}, temporary)
        )
        self.compact = path
        LOGGER.info(f"resconv: {path} for YOLO(path), {folder} for resconv.load")
        self.metrics = self.validator(model=path)
        self.metrics.pop("fitness", None)
        self.best = path  # what YOLO.train loads when it returns


def copy_scalars(model: nn.Module, average: nn.Module) -> None:
    """Give the average the zeros of the model, and the controls beside them that are held at 1.

    The average of a control that is held at 1 comes near 1, and would be left as a multiplication.
    """
    copy_zeros(model, average)
    others = gates(average)
    with torch.no_grad():
        for name, gate in gates(model).items():
            if gate.control is not None and (mine := others[name].control) is not None:
                held = (gate.scale == 0) & (gate.control == 1)
                mine.copy_(torch.where(held, gate.control, mine))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
