"""Where a net comes from: one record, carried by every net that resconv returns.

``nets.create`` writes down the source, ``convert`` the inputs, ``prune`` and ``fuse`` the edits and
the plan; ``save`` writes all of it into ``model.json``, from which ``load`` has it again. It is
plain data: no batch of the user's is kept alive by it (see :class:`ExampleInputs`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from msgspec import Struct
from torch import nn

from ..analysis.input_spec import ExampleInputs
from ..analysis.inputs import unwrap
from ..errors import ConversionError, TraceError
from ..planning.plan import Plan
from ..preprocessing import Preprocessing
from .edit_kinds import Edit

__all__ = [
    "Provenance",
    "Source",
    "carry",
    "carry_on",
    "converted",
    "example_inputs_of",
    "is_converted",
    "plan_of",
    "provenance_of",
]

_NAME = "resconv_provenance"


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """The name and the keywords from which ``resconv.nets.create`` builds the net."""

    name: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Provenance:
    """Where a net comes from; its attribute ``resconv_provenance``.

    Attributes:
        source: from what the net before all edits is built; None for a net of the user's own.
        edits: what the surgery changed in its tree of modules, in order.
        inputs: a description of its example inputs.
        plan: by which units left it.
        training_form: whether the net was converted and not fused since: it has gates, or had.
        preprocessing: how an image becomes an input.
        class_names: of the outputs, in order; also of a net whose inputs are no images.
    """

    source: Source | None = None
    edits: tuple[Edit, ...] = ()
    inputs: ExampleInputs | None = None
    plan: Plan | None = None
    training_form: bool = False
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Provenance":
        return self  # frozen, and so is what it holds


def provenance_of(model: nn.Module) -> Provenance:
    """Return where a net comes from; an empty record where nothing is known."""
    found = getattr(unwrap(model), _NAME, None)
    return found if isinstance(found, Provenance) else Provenance()


def carry(model: nn.Module, provenance: Provenance) -> None:
    """Let the net carry the record."""
    # nn.Module types its attributes as tensors and modules; this one is plain data.
    unwrap(model).__dict__[_NAME] = provenance


def carry_on(
    model: nn.Module, before: Provenance, *, edits: Iterable[Edit] = (), **changes: Any
) -> None:
    """Let the net carry the record of the one that it was made from, with what was done since.

    ``edits`` come after those that were there; a change that is None changes nothing.
    """
    known = {name: value for name, value in changes.items() if value is not None}
    carry(model, replace(before, edits=(*before.edits, *edits), **known))


def is_converted(model: nn.Module) -> bool:
    """Whether the net is in training form: what ``convert`` returned, or ``prune`` with ``fuse=False``."""
    return provenance_of(model).training_form


def converted(model: nn.Module) -> Provenance:
    """Return the record of a net in training form.

    Raises:
        ConversionError: the model was not converted.
    """
    found = provenance_of(model)
    if not found.training_form:
        raise ConversionError(
            f"{type(model).__name__} is not a converted model. "
            "Call resconv.convert(model, example_inputs) first."
        )
    return found


def plan_of(model: nn.Module) -> Plan | None:
    """Return the plan by which units left the net, or None."""
    return provenance_of(model).plan


def example_inputs_of(given: Any, *models: nn.Module) -> Any:
    """Return ``given``, or else inputs as the first of the nets describes them that does.

    They are random, and the same ones every time; see :class:`ExampleInputs` for what is kept.

    Raises:
        TraceError: none were given, and the nets carry none.
    """
    if given is not None:
        return given
    for model in models:
        inputs = provenance_of(model).inputs
        if inputs is not None:
            return inputs.make()
    raise TraceError(
        f"{type(unwrap(models[0])).__name__} carries no example inputs (nets that convert, prune, "
        "fuse or load returned do, if their inputs are tensors and plain values). Give "
        "example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments."
    )
