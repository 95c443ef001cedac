"""What fails outside of resconv, in words (memory, disks, permissions), and what fails in resconv itself."""

import errno
import os
import re
from pathlib import Path

import torch

from .errors import ResConvError, RunError

__all__ = ["in_words", "is_out_of_memory", "is_own"]

_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|"
    r"failed to map segment|_STATUS_ALLOC_FAILED|std::bad_alloc|killed by signal: Killed",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that there is not enough memory, of the GPU or the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | ImportError) and bool(_MEMORY.search(str(error)))


# What a slip in a program raises, and torch seldom does.
_SLIPS = (
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    StopIteration,
    TypeError,
    ZeroDivisionError,
)
_HERE = Path(__file__).parent
# Layers and nets of resconv's own run in the place of the user's.
_IN_PLACE_OF_OTHERS = ("nn", "nets")
_HANDS_ON = (
    "__torch_dispatch__",
    "__torch_function__",
)  # each operation to torch, which may refuse


def is_own(error: BaseException) -> bool:
    """Return whether a line of resconv itself raised the error, by a slip.

    What runs the user's code catches whatever that raises, and says that the net is at fault. It must
    not say so of a fault in resconv.
    """
    last = error.__traceback__
    if last is None or not isinstance(error, _SLIPS):
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    place = Path(code.co_filename)
    return (
        _HERE in place.parents
        and place.relative_to(_HERE).parts[0] not in _IN_PLACE_OF_OTHERS
        and code.co_name not in _HANDS_ON
    )


def in_words(error: BaseException) -> ResConvError | None:
    """Return the error for the user that stands for this one, or None where it is none of theirs."""
    if isinstance(error, ResConvError):
        return error
    text = next((line for line in str(error).splitlines() if _MEMORY.search(line)), "")
    if is_out_of_memory(error):
        return RunError(
            f"There is not enough memory{f' ({text.strip()[:200]})' if text else ''}. Ask for less: a "
            "smaller batch_size or image_size, or fewer images (limit=1000)."
        )
    if isinstance(error, OSError) and error.errno is not None:
        return RunError(_of_system(error))
    return None


def _of_system(error: OSError) -> str:
    place = "" if error.filename is None else f"{error.filename}: "
    reason = os.strerror(error.errno or 0)
    steps = {
        errno.ENOSPC: "Make room on the disk",
        errno.EDQUOT: "Make room on the disk",
        errno.EACCES: "Ask for the right to it, or choose another place",
        errno.EPERM: "Ask for the right to it, or choose another place",
        errno.EROFS: "Choose a place that can be written",
        errno.ENAMETOOLONG: "Choose a shorter name",
        errno.ENOENT: "Something that was there is gone; check the path",
    }
    step = steps.get(error.errno or 0, "Check the path")
    return f"{place}{reason}. {step}, and give the same command again."
