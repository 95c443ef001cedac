"""Checkpoints that a kill, a full disk or a flipped bit cannot lose.

A new one is written beside, read back and moved into the place of ``last.ckpt``, which stays as
``previous.ckpt``. Digests stand in ``checkpoints.json``, which is written before anything is moved: of
the new one and of the two before it. So whatever lies there after a kill can be told from damage.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Callback
from torch import distributed

from resconv.errors import RunError
from resconv.files import digest, write_atomic, write_text
from resconv.json_files import read_json
from resconv.selection import processes

from .seeds import random_states, restore_random

__all__ = ["CHECKPOINT_FILES", "LAST", "Bound", "Checkpoints", "choose_checkpoint"]

LAST, _PREVIOUS, _SEALS = "last.ckpt", "previous.ckpt", "checkpoints.json"
CHECKPOINT_FILES = (LAST, _PREVIOUS, _SEALS)
_KEY = "resconv"


class Checkpoints(CheckpointIO):
    """Lightning's way to the checkpoints of a fit; other files (its own, in TMPDIR) go the plain way."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        path = Path(path)
        if path.name != LAST:
            write_atomic(path, lambda temporary: _dump(checkpoint, temporary))
            return

        def write(temporary: Path) -> None:
            _dump(checkpoint, temporary)
            _load(temporary)  # read back before the one before it gives way
            seals = [digest(temporary), *_seals(path.parent)[:2]]
            write_text(path.parent / _SEALS, json.dumps(seals))
            if path.is_file():
                path.replace(path.with_name(_PREVIOUS))

        try:
            write_atomic(path, write)
        except OSError as error:
            raise RunError(
                f"{path} cannot be written: {error}. The checkpoint before it is untouched: the same "
                "command goes on from there."
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Never unpickles more than tensors and plain types, whatever the caller says."""
        return _load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        if Path(path).name == ".temp.ckpt":  # in a folder that Lightning made for it
            Path(path).parent.rmdir()


def _dump(checkpoint: dict[str, Any], path: Path) -> None:
    """Write by way of memory: torch's own writer does not say that a disk is full."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    path.write_bytes(buffer.getbuffer())


def _load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def _seals(folder: Path) -> list[str]:
    try:
        return read_json(folder / _SEALS, list[str], RunError)
    except RunError:
        return []


def choose_checkpoint(folder: Path, bound: str, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint to go on from: the last one, the one before it where that is damaged, or none.

    Those that were written for something else (see :class:`Bound`) are not gone on from. What is
    not used is said, and why; it is overwritten by the next one.
    """
    last, previous = folder / LAST, folder / _PREVIOUS
    if not last.is_file() and not previous.is_file():
        return None
    seals = _seals(folder)
    faults = {p: _fault(p, bound, seals) for p in (last, previous) if p.is_file()}
    if last in faults and faults[last] is None:
        return last
    if last in faults:
        say(f"{last} is not used: {faults[last]}.")
    if previous in faults and faults[previous] is None:
        if last in faults:
            say(f"Training goes on from the checkpoint before it, {previous.name}.")
        previous.replace(last)
        return last
    say("No checkpoint can be used: this training starts from its beginning.")
    # A damaged one is not to become the one before the next.
    last.unlink(missing_ok=True)
    return None


def _fault(path: Path, bound: str, seals: list[str]) -> str | None:
    """Return in words why a checkpoint cannot be gone on from."""
    if digest(path) not in seals:
        return "its bytes are not those that were written (it is damaged, or comes from elsewhere)"
    try:
        found = _load(path)["callbacks"]
        written = next(state for name, state in found.items() if name.startswith(Bound.__name__))
    except Exception as error:  # whatever a damaged file sets off
        return f"it cannot be read ({type(error).__name__}: {str(error)[:120]})"
    if written["bound"] != bound:
        return "it belongs to another run, or to other settings, data or weights"
    return None


class Bound(Callback):
    """Keeps in the checkpoint what it is for, and every process's random states.

    A net with dropout draws from them: a run that was stopped goes on with the draws that an
    undisturbed one would have made.
    """

    def __init__(self, bound: str) -> None:
        self.bound = bound
        self._restored: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        mine = random_states()
        states: list[Any] = [mine]
        if processes.are_several():
            states = [None] * distributed.get_world_size()
            distributed.all_gather_object(states, mine)
        return {"bound": self.bound, "random": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["random"]

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if len(self._restored) == trainer.world_size:
            restore_random(self._restored[trainer.global_rank])
        self._restored = []
