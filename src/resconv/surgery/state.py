"""What a net knows about where it came from, and what every surgery asks of a model.

A net in training form has a :class:`State`, with a copy of its example inputs. An ordinary net that
came out of the surgery has a record of plain data: source, edits, the *specification* of the inputs
(shapes, types, plain values; no batch is kept alive by it) and the plan.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.input_spec import describe_inputs, make_inputs
from ..analysis.inputs import unwrap
from ..errors import ConversionError, ResConvError, SaveError, TraceError
from ..planning.plan import Plan

__all__ = [
    "State",
    "example_inputs_of",
    "plan_of",
    "record_of",
    "require_finite",
    "set_submodule",
    "specified",
    "state_of",
]


@dataclass
class State:
    """What a converted model knows about where it came from; plain data on ``resconv_state``."""

    example_inputs: Any
    source: dict[str, Any] | None = None
    edits: list[dict[str, Any]] = field(default_factory=list)
    plan: Plan | None = None  # by which units left it


def state_of(model: nn.Module) -> State:
    """Return the conversion state.

    Raises:
        ConversionError: the model was not converted.
    """
    state = getattr(unwrap(model), "resconv_state", None)
    if not isinstance(state, State):
        raise ConversionError(
            f"{type(model).__name__} is not a converted model. "
            "Call resconv.convert(model, example_inputs) first."
        )
    return state


def record_of(model: nn.Module) -> dict[str, Any]:
    """Return the record of an ordinary net; empty where no surgery made it."""
    return getattr(unwrap(model), "resconv_record", None) or {}


def plan_of(model: nn.Module) -> Plan | None:
    """Return the plan by which units left the net, or None."""
    state = getattr(unwrap(model), "resconv_state", None)
    plan = state.plan if isinstance(state, State) else record_of(model).get("plan")
    return plan if isinstance(plan, Plan) else None


def specified(example_inputs: Any) -> dict[str, Any] | None:
    """Return the specification of inputs; None where plain data cannot describe them."""
    try:
        return describe_inputs(example_inputs)
    except SaveError:
        return None


def example_inputs_of(given: Any, *models: nn.Module) -> Any:
    """Return ``given``, or else the example inputs that the first of the nets carries that has any.

    A net in training form has those of ``convert``. One that was pruned, fused or loaded has their
    specification: what comes back are random inputs of it, the same ones every time.

    Raises:
        TraceError: none were given, and the nets carry none.
    """
    if given is not None:
        return given
    for model in models:
        state = getattr(unwrap(model), "resconv_state", None)
        if isinstance(state, State) and state.example_inputs is not None:
            return state.example_inputs
        spec = record_of(model).get("inputs")
        if spec is not None:
            return make_inputs(spec, torch.Generator().manual_seed(0))
    raise TraceError(
        f"{type(unwrap(models[0])).__name__} carries no example inputs (nets that convert, prune, "
        "fuse or load returned do, if their inputs are tensors and plain values). Give "
        "example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments."
    )


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one at ``path``, under every name that it has."""
    old = model.get_submodule(path)
    # All places first: what comes may hold the old one inside it.
    places, seen, stack = [], {id(model)}, [model]
    while stack:
        parent = stack.pop()
        for name, child in parent._modules.items():
            if child is old:
                places.append((parent, name))
            elif child is not None and id(child) not in seen:
                seen.add(id(child))
                stack.append(child)
    for parent, name in places:
        setattr(parent, name, module)


def require_finite(model: nn.Module, error: type[ResConvError]) -> None:
    """Raise ``error`` where a weight, scale or control is NaN or infinite: nothing can be compared.

    Buffers may hold infinities (a mask of them is sound), but no NaN.
    """
    bad = [n for n, p in model.named_parameters() if not _has_finite_sum(p)]
    bad = [n for n in bad if not bool(model.get_parameter(n).isfinite().all())]
    bad += [n for n, b in model.named_buffers() if bool(b.isnan().any())]
    if bad:
        raise error(
            f"{', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''} of {type(model).__name__} hold "
            "NaN or infinite numbers, so no outputs can be compared. If it was trained like "
            "this, the training diverged: lower the learning rate. Else load sound weights first."
        )


def _has_finite_sum(tensor: Tensor) -> bool:
    """Whether the sum of the entries is finite: then all are, found in one pass over them."""
    return bool(tensor.detach().sum().isfinite())
