"""The net at the end of a run: pruned, in the form to train on, and as ultralytics and resconv read it."""

from torch import nn

from resconv.selection.pruning import prune
from resconv.surgery import fusion
from resconv.surgery.provenance import is_converted

from .networks import in_training_form, of_its_own_class, ordinary, with_form

__all__ = ["compacted"]


def compacted(gated: nn.Module, *, prunes: bool) -> tuple[nn.Module, nn.Module]:
    """Return the net without its units at 0: for :func:`resconv.save`, and for ultralytics.

    Raises:
        PruneError: a unit cannot be removed exactly; the reason is in the message.
    """
    form = of_its_own_class(gated).eval()
    if prunes:
        form = prune(form, fuse=False)
    # Files of ultralytics hold half precision: all that is written is of the same numbers.
    form = form.half().float()
    compact = fusion.fuse(form) if is_converted(form) else form
    plain = with_form(ordinary(compact), in_training_form(form))
    return compact, plain
