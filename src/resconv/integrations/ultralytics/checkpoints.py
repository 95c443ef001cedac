"""What a checkpoint of ultralytics lacks: all numbers as they are, the Sparsifier, and where a step began.

Ultralytics goes on from the average of the weights, in half precision, with momentum in half
precision and another order of images. A run that goes on so is another run, and a scale that was fading
starts anew.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.utils.patches import torch_load

from resconv.errors import RunError
from resconv.files import write_atomic

__all__ = ["STATE", "add_to_checkpoint", "load_tensors", "seed_epoch", "settings_of", "tensors_of"]

STATE = "resconv"
_TEACHER = "teacher_model."


def add_to_checkpoint(path: Path, target: Path, state: dict[str, Any] | None) -> None:
    """Write the checkpoint at ``path`` to ``target``, whole or not at all, with our state in it."""
    saved = torch_load(path, map_location="cpu")
    saved.pop(STATE, None)
    if state is not None:
        saved[STATE] = state
    write_atomic(target, lambda temporary: torch.save(saved, temporary))


def settings_of(path: str | Path) -> dict[str, Any]:
    """Return our state in a checkpoint from which a run goes on.

    Raises:
        RunError: it was written without resconv's trainer.
    """
    found = torch_load(path, map_location="cpu").get(STATE)
    if not isinstance(found, dict):
        raise RunError(
            f"{path} was not written by resconv's trainer, so scores and zeros are not known. Start "
            "anew from its weights: YOLO(path).train(trainer=...) without resume."
        )
    return found


def tensors_of(net: nn.Module) -> dict[str, Any]:
    """Return all numbers of the net but the teacher's, which is loaded from its own file."""
    state = net.state_dict()
    return {n: t.detach().clone() for n, t in state.items() if not n.startswith(_TEACHER)}


def load_tensors(net: nn.Module, tensors: dict[str, Any]) -> None:
    missing = net.load_state_dict(tensors, strict=False)
    lost = [n for n in missing.missing_keys if not n.startswith(_TEACHER)]
    if lost or missing.unexpected_keys:
        raise RunError(
            f"The checkpoint does not fit the net: {len(lost)} tensors are missing "
            f"({', '.join(lost[:3])}), {len(missing.unexpected_keys)} have no place. Resume with "
            "the data and the distill_model that the run was started with."
        )


def seed_epoch(trainer: Any) -> None:
    """Let the images of an epoch, their order and changes, depend on its number and the seed alone."""
    seed = (trainer.args.seed * 1_000_003 + trainer.epoch) % 2**31
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    loader = trainer.train_loader
    if getattr(loader, "generator", None) is not None:
        loader.generator.manual_seed(seed)
    # Mosaics are made of the images that were read last.
    data: Any = loader.dataset
    if getattr(data, "buffer", None) and getattr(data, "cache", None) != "ram":
        for i in data.buffer:
            data.ims[i] = data.im_hw0[i] = data.im_hw[i] = None
        data.buffer = []
    if hasattr(loader, "reset"):
        loader.reset()
