"""Several processes: which one this is, how many there are, and how they keep step.

A launcher (torchrun, SLURM) starts every process with the same command. Without one, Lightning starts
the processes for the time of a fit.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from resconv import errors
from resconv.errors import ResConvError, RunError
from resconv.selection import processes

from .watch import Group, end_with_launcher, join_store

__all__ = ["Ranks", "choose_devices", "find_ranks", "join", "leave", "raised_inside"]

T = TypeVar("T")
_groups: list[Group] = []  # the one that this process watches


@dataclass(frozen=True)
class Ranks:
    """One process among those that a launcher started (alone: rank 0 of 1)."""

    rank: int = 0
    world_size: int = 1
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        return self.world_size > 1

    def by_first(self, call: Callable[[], T]) -> T:
        """Let the leading process call for all, and give every one what it returned (or its error)."""
        return processes.by_first(call, self.are_several)


def find_ranks() -> Ranks:
    """Return what the launcher says in the environment.

    Raises:
        RunError: it does not say how many processes run on this machine.
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        local = os.environ.get("LOCAL_WORLD_SIZE", "1")
        return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(local))
    if SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1:
        world = int(os.environ["SLURM_NTASKS"])
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        if world % nodes:
            raise RunError(
                f"SLURM runs {world} tasks on {nodes} nodes: every node needs as many as the "
                "others. Use --ntasks-per-node, one task a GPU."
            )
        return Ranks(int(os.environ["SLURM_PROCID"]), world, world // nodes)
    return Ranks()


def join() -> Ranks:
    """Return this process's ranks; connect them, where there are several and none has yet.

    From then on each looks after the others, and ends where one fails (see watch.py).

    Raises:
        RunError: some did not come.
    """
    ranks = find_ranks()
    if ranks.are_several and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = join_store(ranks.rank, ranks.world_size)
        # The others wait while the first one evaluates and prunes.
        distributed.init_process_group(
            backend,
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(days=1),
        )
        _groups.append(Group(store, ranks.rank, ranks.world_size))
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_launcher()
    return ranks


def leave(error: BaseException | None = None) -> BaseException | None:
    """Tell the other processes of a launcher that this one ends, or which error it fails with.

    What comes back is that error, or one that says more where it came from another process.
    """
    while _groups:
        error = _groups.pop().leave(error)
    return error


def choose_devices(asked: int | str) -> dict[str, Any]:
    """Return the Trainer's accelerator, devices, num_nodes and strategy.

    Raises:
        RunError: fewer GPUs (or CPU cores) than asked for, or a number below 1.
    """
    ranks = find_ranks()
    cuda = torch.cuda.is_available()
    accelerator = "cuda" if cuda else "cpu"
    if ranks.are_several:
        return {
            "accelerator": accelerator,
            "devices": ranks.local_size,
            "num_nodes": ranks.world_size // ranks.local_size,
            "strategy": "ddp",
        }
    there = torch.cuda.device_count() if cuda else (os.cpu_count() or 1)
    count = (there if cuda else 1) if asked == "auto" else int(asked)
    if not 1 <= count <= there:
        kind = "GPU" if cuda else "CPU core"
        raise RunError(
            f"devices={asked}: at least 1 and at most {there}, the {kind}{'s' * (there != 1)} of this "
            "machine."
        )
    strategy = "ddp_spawn" if count > 1 else "auto"
    return {"accelerator": accelerator, "devices": count, "num_nodes": 1, "strategy": strategy}


def raised_inside(error: Exception) -> ResConvError | None:
    """Return the error for the user that a process of the fit died of, if it was one."""
    if isinstance(error, ProcessExitedException):
        return RunError(
            f"Process {error.error_index} of the training ended ({error}), perhaps for want of "
            "memory. The same command goes on from the last whole epoch."
        )
    if not isinstance(error, ProcessRaisedException):
        return None
    found = re.findall(r"^resconv\.errors\.(\w+): (.*)", str(error), re.MULTILINE | re.DOTALL)
    if not found:
        return None
    name, text = found[-1]
    kind = getattr(errors, name, ResConvError)
    if kind is errors.MissingExtraError:  # its arguments are not its text
        kind = ResConvError
    return kind(text.strip())
