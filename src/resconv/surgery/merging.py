"""Training-time branches merged before a conversion, by the methods that their modules bring along."""

import warnings
from typing import Any

from torch import nn

from ..analysis.graph import Graph
from ..analysis.merging import find_merging, merge_method
from ..analysis.recorder import record
from ..errors import ConversionError, PruneError
from .edit_kinds import Merge
from .provenance import carry_on, provenance_of
from .state import set_submodule
from .verification import relative_error

__all__ = ["TrainingFormWarning", "merge_branches", "merged", "warn_of_branches"]


class TrainingFormWarning(UserWarning):
    """The net has branches for training alone, which it merges before it is deployed."""


def warn_of_branches(graph: Graph) -> None:
    """Warn where a record shows branches that are to be merged before the net is deployed."""
    found = find_merging(graph)
    if found:
        warnings.warn(
            f"{len(found)} modules train branches that they merge into one conv each for "
            f"deployment ({_some(found)}), and have not merged them. Sizes and latency are those of "
            "the training form. Call resconv.convert(..., reparameterize=True) to merge them first.",
            TrainingFormWarning,
            stacklevel=3,
        )


def merge_branches(model: nn.Module, graph: Graph, example_inputs: Any) -> nn.Module:
    """Merge the training-time branches in ``model``, in place, and return it.

    Raises:
        ConversionError: a module's own method fails, or the outputs change.
    """
    found = find_merging(graph)
    for path in found:
        try:
            set_submodule(model, path, merged(model.get_submodule(path), path))
        except PruneError as error:
            raise ConversionError(f"{error} Convert without reparameterize=True.") from error
    after = record(model, example_inputs)
    error_size = relative_error(after.output, graph.output)
    if not error_size <= 1e-3:
        raise ConversionError(
            f"Merging the branches of {_some(found)} changes the outputs by {error_size:.2e} "
            "(relative): the modules' own methods are wrong here. Convert without "
            "reparameterize=True."
        )
    carry_on(model, provenance_of(model), edits=map(Merge, found))
    return model


def merged(module: nn.Module, path: str) -> nn.Module:
    """Return the module with its branches merged; it is changed.

    Raises:
        PruneError: it has no method for that, or the method fails.
    """
    method = merge_method(module)
    if method is None:
        raise PruneError(f"{path!r} ({type(module).__name__}) has no branches to merge.")
    training = module.training
    module.eval()
    try:
        new = getattr(module, method)()
    except Exception as error:  # the module's own method
        raise PruneError(
            f"{path}.{method}() fails with {type(error).__name__}: {error}."
        ) from error
    if isinstance(new, nn.Module):
        module = new
    elif callable(after := getattr(module, "forward_fuse", None)):
        # What ultralytics does from outside, after the convs are merged.
        module.forward = after
    return module.train(training)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
