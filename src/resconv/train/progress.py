"""How far a run of several trainings is: one bar in a terminal, and lines where nothing is drawn."""

import sys
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback

__all__ = ["RunProgress", "in_words"]


class RunProgress(Callback):
    """Shows one training of a run, and when the whole run's trainings will be over.

    In a terminal that is a bar on stderr; elsewhere ``say`` is called after every epoch. The time
    left is guessed from this training's batches: those to come may take longer or shorter.

    Args:
        stage: the training's name.
        before: epochs of the trainings before it.
        total: epochs of all trainings.
        say: where lines go; None shows nothing at all.
    """

    def __init__(
        self, stage: str, before: int, total: int, say: Callable[[str], None] | None
    ) -> None:
        self.stage, self.before, self.total, self.say = stage, before, total, say
        self._bar: Any = None
        self._task: Any = None
        self._begun: tuple[float, float] | None = None  # time, and epochs that were over then
        self._figures = ""

    def __getstate__(self) -> dict[str, Any]:
        """For processes of their own, which cannot call back."""
        say = None if self.say is None else print
        return vars(self) | {"say": say, "_bar": None, "_task": None}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._begun = (time.monotonic(), self._epochs_over(trainer))
        if self.say is None or not trainer.is_global_zero or not _is_terminal():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=max(1, self.total), left="")
        self._bar.start()
        self._draw(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self._bar is not None:
            self._draw(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        found = trainer.callback_metrics
        parts = [
            f"{words} {100 * found[key].item():.1f} %"
            for key, words in (("top1", "top-1"), ("macs", "MACs"))
            if key in found
        ]
        self._figures = ", ".join(parts)
        if self._bar is None and self.say is not None and trainer.is_global_zero:
            left = self._left(trainer, trainer.current_epoch + 1)
            self.say(", ".join(filter(None, [self._where(trainer), self._figures, left])))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, trainer: Any) -> None:
        over = self._epochs_over(trainer)
        text = self._where(trainer) + (f", {self._figures}" if self._figures else "")
        left = self._left(trainer, over)
        self._bar.update(self._task, completed=self.before + over, description=text, left=left)

    def _where(self, trainer: Any) -> str:
        number = min(trainer.current_epoch + 1, trainer.max_epochs)
        return f"{self.stage} {number}/{trainer.max_epochs}"

    def _epochs_over(self, trainer: Any) -> float:
        batches = trainer.num_training_batches or 1
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        return float(min(trainer.current_epoch + min(done / batches, 1), trainer.max_epochs))

    def _left(self, trainer: Any, over: float) -> str:
        """Say when the whole run's trainings will be over; empty before that can be guessed."""
        assert self._begun is not None  # by on_train_start
        since, first = self._begun
        if over <= first:
            return ""
        seconds = (time.monotonic() - since) / (over - first) * (self.total - self.before - over)
        return f"about {in_words(seconds)} left" if seconds >= 1 else ""


def in_words(seconds: float) -> str:
    """Return a time as one reads it.

    Example:
        >>> from resconv.train.progress import in_words
        >>> in_words(42), in_words(130), in_words(7300)
        ('42 s', '2 min', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _is_terminal() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty()
