"""``metrics.csv``: the loss now and then, and what an epoch ended with."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from resconv.files import write_text
from resconv.integrations.lightning import SparsityCallback

__all__ = ["RowLog"]

_EVERY = 20  # steps between two rows
_COLUMNS = ("epoch", "step", "loss", "top1", "macs")


class RowLog(Callback):
    """Keeps the rows in the checkpoint, so that a resume neither loses one nor has one twice.

    The file is the rows of the checkpoint, written whole after every epoch.
    """

    def __init__(self, path: Path, sparsity: list[SparsityCallback]) -> None:
        self.path, self.sparsity = path, sparsity
        self.rows: list[list[Any]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._write(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % _EVERY == 0:
            self._add(trainer, loss=outputs["loss"].item())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        top1 = trainer.callback_metrics.get("top1")
        macs = [
            c.sparsifier.history[-1].macs
            for c in self.sparsity
            if c.sparsifier is not None and c.target is not None
        ]
        self._add(
            trainer, top1=None if top1 is None else top1.item(), macs=macs[0] if macs else None
        )
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def _add(self, trainer: Any, **values: Any) -> None:
        found = {"epoch": trainer.current_epoch, "step": trainer.global_step - 1, **values}
        self.rows.append([found.get(c) for c in _COLUMNS])

    def _write(self, trainer: Any) -> None:
        if trainer.is_global_zero and self.rows:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows(self.rows)
            write_text(self.path, text.getvalue())
