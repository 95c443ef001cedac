"""Which number format and memory layout this machine trains fastest in."""

from dataclasses import dataclass

import torch

from resconv.errors import RunError

__all__ = ["PRECISIONS", "Precision", "choose_precision"]

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Precision:
    """A Lightning precision, the memory layout, and why."""

    name: str
    channels_last: bool
    reason: str


def choose_precision(asked: str = "auto") -> Precision:
    """Return bf16 autocast with channels-last where the hardware computes in bf16, else float32.

    Raises:
        RunError: ``asked`` is none of :data:`PRECISIONS`, or this machine cannot train in it.
    """
    if asked not in PRECISIONS:
        raise RunError(f"precision={asked!r}: choose one of {', '.join(PRECISIONS)}.")
    if asked == "16-mixed" and not torch.cuda.is_available():
        raise RunError(
            f"precision={asked!r} needs a GPU, and torch finds none here. Choose bf16-mixed, 32-true or "
            "auto."
        )
    if asked != "auto":
        return Precision(asked, asked != "32-true", "asked for")
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16-mixed", True, "the GPU computes in bf16")
        return Precision("16-mixed", True, "the GPU has no bf16")
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
        if capability.get(flag) or _has_flag(flag):
            return Precision("bf16-mixed", True, f"the CPU has {label}")
    return Precision("32-true", False, "the CPU has no bf16 instructions")


def _has_flag(flag: str) -> bool:
    checks = {
        "amx_bf16": getattr(torch.cpu, "_is_amx_tile_supported", None),
        "avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", None),
    }
    check = checks[flag]
    return bool(check and check())
