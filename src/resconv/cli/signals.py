"""Ctrl-C and SIGTERM end a command at once, with a word on how to go on.

Whatever a run has written is whole at every moment, so nothing has to be tidied up. The signals are
read by a thread: the main one may be importing, or waiting inside a call that runs no Python. Torch
alone imports for seconds, so the command asks for this before anything else.
"""

import os
import signal
import sys
import threading

__all__ = ["end_on_signals"]

_RESUMED = ("compress", "train", "prune")


def end_on_signals() -> None:
    """Exit with 130 on SIGINT and with 143 on SIGTERM, from now on."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(os, "set_blocking"):
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        # A signal that is ignored (nohup, a job in the background) stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # the thread does it
    threading.Thread(target=_wait, args=(reader,), daemon=True).start()


def _wait(reader: int) -> None:
    while True:
        for number in os.read(reader, 16):
            if number in (signal.SIGINT, signal.SIGTERM):
                _end(number)


def _end(number: int) -> None:
    leads = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # the progress bar hides the cursor
        sys.stdout.flush()
        if leads:
            sys.stderr.write(f"\n{_farewell(sys.argv[1:])}\n")
            sys.stderr.flush()
    except (OSError, ValueError, RuntimeError):
        pass  # no one reads it
    os._exit(128 + number)


def _farewell(given: list[str]) -> str:
    if not any(command in given[:1] for command in _RESUMED):
        return "Stopped. The same command does it anew."
    same = "The same command, without --fresh," if "--fresh" in given else "The same command"
    return f"Stopped. {same} goes on from the last whole epoch."
