"""Which number format this machine trains fastest in, and which memory layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resconv.analysis.inputs import evaluating
from resconv.analysis.recorder import restored
from resconv.errors import RunError

__all__ = ["PRECISIONS", "Precision", "channels_last", "choose_precision"]

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Precision:
    """A Lightning precision, and why."""

    name: str
    reason: str


def choose_precision(asked: str = "auto") -> Precision:
    """Return bf16 autocast where the hardware computes in bf16, else float32.

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
        return Precision(asked, "asked for")
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16-mixed", "the GPU computes in bf16")
        return Precision("16-mixed", "the GPU has no bf16")
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
        if capability.get(flag) or _has_flag(flag):
            return Precision("bf16-mixed", f"the CPU has {label}")
    return Precision("32-true", "the CPU has no bf16 instructions")


@contextmanager
def channels_last(nets: list[nn.Module], images: Tensor) -> Iterator[bool]:
    """Keep the nets' kernels with channels last meanwhile; yield whether they are.

    A step takes less time then, in float32 on a CPU by 1 to 40 % (VGG-16, resnet18, resnet56; most of all
    where convs are depthwise). A net that cannot read ``images`` of this layout (``view`` of a feature map
    in its forward) keeps its own.
    """
    before = [{n for n, p in net.named_parameters() if _is_plain(p)} for net in nets]
    try:
        for net in nets:
            net.to(memory_format=torch.channels_last)
        fits = all(_runs(net, images.to(memory_format=torch.channels_last)) for net in nets)
        if not fits:
            _put_back(nets, before)
        yield fits
    finally:
        _put_back(nets, before)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous()


def _put_back(nets: list[nn.Module], plain: list[set[str]]) -> None:
    for net, names in zip(nets, plain, strict=True):
        for name, p in net.named_parameters():
            if name in names:
                # A kernel of one channel lies in memory in both ways, and convs go by its strides.
                p.data = p.data.clone(memory_format=torch.contiguous_format)


def _runs(net: nn.Module, images: Tensor) -> bool:
    own = next(net.parameters())
    try:
        with evaluating(net), restored(net):
            net(images.to(own.device, own.dtype))
    except RuntimeError:  # of the user's forward
        return False
    return True


def _has_flag(flag: str) -> bool:
    checks = {
        "amx_bf16": getattr(torch.cpu, "_is_amx_tile_supported", None),
        "avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", None),
    }
    check = checks[flag]
    return bool(check and check())
