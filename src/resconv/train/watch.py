"""No process of a training outlives the others: each looks after those that it depends on.

A process that was started by another one ends with it. Processes under a launcher leave signs of
life in its store, beside the reason where one of them fails. The looks are taken by a thread, since the
main one may wait inside a collective call that never returns.
"""

import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from resconv.errors import ResConvError, RunError

__all__ = ["EndsWithParent", "Group", "end_with_launcher", "join_store"]

# Seconds: to wait for all to come, between two looks, and of silence after which one counts as gone.
_JOIN, _LOOK, _SILENCE = 45.0, 1.0, 45.0
_WORD = 3 * _LOOK  # for another process's reason to come through
_LOST = re.compile(r"connection|closed by peer|socket|gloo|nccl", re.IGNORECASE)
_FAILED, _LEFT = "resconv/failed", "left"


class EndsWithParent(Callback):
    """Ends a worker whose parent was killed: nobody would wait for what it trains."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            _start(partial(_end_after, parent))


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(143)


def end_with_launcher() -> None:
    """End this process when the launcher that started it is gone."""
    launcher = os.getppid()

    def look() -> None:
        while os.getppid() == launcher:
            time.sleep(_LOOK)
        os._exit(143)

    _start(look)


def join_store(rank: int, world_size: int) -> Any:
    """Return the store of a launcher's processes when all have come.

    Raises:
        RunError: some have not, and which.
    """
    wait = timedelta(seconds=_JOIN)
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=wait))
    except (distributed.DistError, RuntimeError, ValueError) as error:
        raise RunError(
            f"Process {rank} of {world_size} finds no other within {_JOIN:.0f} s ({str(error)[:200]}). Is "
            "MASTER_ADDR:MASTER_PORT reachable, and was every process started?"
        ) from error
    keys = [f"resconv/joined/{r}" for r in range(world_size)]
    store.set(keys[rank], "1")
    try:
        store.wait(keys, wait)
    except (distributed.DistError, RuntimeError) as error:
        missing = [str(r) for r, key in enumerate(keys) if not store.check([key])]
        raise RunError(
            f"{world_size} processes were to join, and {', '.join(missing) or 'one'} did not within "
            f"{_JOIN:.0f} s. Look at what they printed: did they end, or was fewer of them started?"
        ) from error
    return store


class Group:
    """Watches the other processes of a launcher, for as long as the command runs."""

    def __init__(
        self, store: Any, rank: int, world_size: int, end: Callable[[str], None] | None = None
    ) -> None:
        self.store, self.rank, self.world_size = store.clone(), rank, world_size
        self._end = end or _say_and_exit
        self._over = threading.Event()
        self._thread = _start(self._watch)

    def leave(self, error: BaseException | None = None) -> BaseException | None:
        """Tell the others that this process is done, or why it failed; return what to tell the user.

        Where the error is that a connection was lost, the reason is another process's: it is waited
        for, and ends this one.
        """
        if error is not None and not isinstance(error, ResConvError) and _LOST.search(str(error)):
            self._thread.join(_WORD)
            error = RunError(
                f"The connection to another process was lost ({str(error).splitlines()[0][:160]}): it "
                "was killed, or its machine is gone. The same command goes on from the last whole epoch."
            )
        self._over.set()
        self._thread.join()
        try:
            if error is not None:
                known = isinstance(error, ResConvError)
                text = str(error) if known else f"{type(error).__name__}: {str(error)[:300]}"
                self.store.set(_FAILED, f"Process {self.rank} of {self.world_size} failed: {text}")
            self.store.set(self._key(self.rank), _LEFT)
        except RuntimeError:
            pass  # the store went with its host
        return error

    def _key(self, rank: int) -> str:
        return f"resconv/alive/{rank}"

    def _watch(self) -> None:
        others = [r for r in range(self.world_size) if r != self.rank]
        seen = {r: ("", time.monotonic()) for r in others}
        beat = 0
        while not self._over.wait(_LOOK):
            beat += 1
            try:
                self.store.set(self._key(self.rank), str(beat))
                if self.store.check([_FAILED]):
                    self._end(self.store.get(_FAILED).decode())
                    return
                for r in others:
                    there = self.store.check([self._key(r)])
                    sign = self.store.get(self._key(r)).decode() if there else ""
                    if sign != seen[r][0] or sign == _LEFT:
                        seen[r] = (sign, time.monotonic())
            except RuntimeError:
                if self._over.wait(5):
                    return
                self._end("The process that the others meet at is gone.")
                return
            silent = [r for r, (_, when) in seen.items() if time.monotonic() - when > _SILENCE]
            if silent:
                self._end(
                    f"Process {silent[0]} of {self.world_size} has given no sign of life for "
                    f"{_SILENCE:.0f} s: it was killed, or its machine is gone."
                )
                return


def _say_and_exit(text: str) -> None:
    print(
        f"{text} The same command goes on from the last whole epoch.", file=sys.stderr, flush=True
    )
    os._exit(2)


def _start(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread
