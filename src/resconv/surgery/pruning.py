"""A gated model and a plan in, a plain shallower net out.

Removal sets ``s = 0``. What is left, ``y = p * x`` for a layer and ``y = x`` for a block, costs
nothing: the unit's value becomes its input's value, activations that no longer change anything go
with it, and the factors travel into linear layers (see potentials.py). The tree of modules is then
edited: a module that only passes its input on becomes an identity, and where a module's own forward
has to change (two branches in one block, a functional activation) that forward is rewritten.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..analysis.graph import Graph, Node
from ..analysis.input_spec import ExampleInputs
from ..analysis.inputs import unwrap
from ..analysis.recorder import record
from ..errors import PlanError, PruneError, VerificationError
from ..nn.gates import BranchGate, Gate, Segment, gates, is_leaf
from ..planning.plan import Plan
from .copying import copy_model
from .decisions import original_path
from .edit_kinds import Append, Blend, Conv, Edit, Multiply, Soften
from .edits import apply_edits, indexed_containers
from .factors import absorb, kernels_of
from .folding import Fused, conv_edit, fill_convs
from .proof import TrainingDiffersError, Witness
from .provenance import carry, carry_on, converted, example_inputs_of, provenance_of
from .replacing import Replaced, put, replacements
from .state import require_finite, set_submodule
from .trial import FAITHFUL, decisions

__all__ = ["leftovers", "operate", "prune"]


def prune(model: nn.Module, plan: Plan, *, fuse: bool = True) -> nn.Module:
    """Return the net without the planned units; ``model`` is left as it was.

    With ``fuse=True`` no resconv module is left in it. With ``fuse=False`` the units that stay keep
    their training form, to be trained further and fused later.

    Raises:
        PlanError: the plan is empty, or names a unit that the model does not have.
        PruneError: a unit cannot be removed exactly; the reason is in the message. Or the model
            holds NaN or infinite numbers.
        VerificationError: the result, run once, does not compute what the gated net computes.
    """
    every = gates(unwrap(model))
    if not plan.remove:
        raise PlanError(
            "The plan removes nothing. Train longer, raise the strength or the threshold, or call "
            "resconv.fuse(model) to get the whole net back."
        )
    for name, gate in gates(unwrap(model), fixed=True).items():
        if name in plan.remove and gate.reason is not None:
            raise PlanError(
                f"{name} cannot be removed: {gate.reason}. It has a shortcut to train with; leave it "
                "out of the plan."
            )
    unknown = [name for name in plan.remove if name not in every]
    if unknown:
        raise PlanError(
            f"The model has no removable unit named {', '.join(map(repr, unknown[:5]))}. It has "
            f"{len(every)}: {', '.join(list(every)[:8])}{' ...' if len(every) > 8 else ''}. "
            "`resconv.units(model, example_inputs)` lists why other layers are kept."
        )
    return operate(model, tuple(plan.remove), fuse=fuse, plan=plan)


@torch.inference_mode(False)
def operate(
    model: nn.Module,
    remove: tuple[str, ...],
    *,
    fuse: bool,
    plan: Plan | None = None,
    matched: dict[Any, list[Node]] | None = None,
) -> nn.Module:
    """Remove the named units and, with ``fuse``, turn every other gate into ordinary layers.

    ``matched`` is what an earlier record of the same net found out; see ``Graph``.
    """
    model = unwrap(model)
    before = converted(model)
    example_inputs = example_inputs_of(None, model)
    require_finite(model, PruneError)
    idle: tuple[str, ...] = ()
    if fuse:
        # What counts nothing need not be computed, whether it was planned or not.
        idle = tuple(
            name
            for name, gate in gates(model).items()
            if isinstance(gate, BranchGate | Segment)
            and gate.scale.item() == 0
            and name not in remove
        )
    start = partial(_at_zero, model, remove)
    witness = None
    faithful = 0
    while True:
        copied = start()
        with torch.random.fork_rng(devices=[]):  # modules are made, and tried on random numbers
            with indexed_containers() as indexed:
                graph = record(copied, example_inputs, leaf=is_leaf)
            graph.matched = {} if matched is None else matched
            witness = witness or Witness(start, example_inputs, graph)
            made, edits = _operated(copied, graph, indexed, remove, idle, fuse, faithful)
        try:
            witness.require_same(made)
            break
        except TrainingDiffersError:
            if faithful == len(FAITHFUL) - 1:
                raise
            faithful += 1
        except VerificationError:
            if not _is_right_in_double(
                model, example_inputs, partial(operate, remove=remove, fuse=fuse)
            ):
                raise
            break
    carry_on(made, before, edits=edits, plan=plan, training_form=not fuse)
    return made


def _is_right_in_double(
    model: nn.Module, example_inputs: Any, removing: Callable[[nn.Module], nn.Module]
) -> bool:
    """Whether the same removal is exact in float64: what it changes is then rounding alone.

    A net whose activations grow without bound magnifies rounding more than anything shows that could
    be asked of it in float32.
    """
    if any(p.dtype == torch.float64 for p in model.parameters()):
        return False
    inputs = tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t,
        example_inputs,
    )
    try:
        wide = copy_model(model, PruneError).double()
        carry(wide, dataclasses.replace(provenance_of(model), inputs=ExampleInputs.of(inputs)))
        removing(wide)
    except Exception:  # of a forward that knows no float64, or of the comparison
        return False
    return True


def _at_zero(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Return a copy of a gated model in which the scales of the named units are 0."""
    model = copy_model(model, PruneError)
    every = gates(model, fixed=True)
    for gate in every.values():
        gate.skipped = False  # whose run is over; a unit at 0 that stays may learn again
        gate.waiting = False
    with torch.no_grad():
        for name in names:
            every[name].scale.zero_()
    return model


def _operated(
    model: nn.Module,
    graph: Graph,
    indexed: set[int],
    remove: tuple[str, ...],
    idle: tuple[str, ...],
    fuse: bool,
    faithful: int,
) -> tuple[nn.Module, list[Edit]]:
    """Carry the surgery out on ``model``, and return the net with the edits that made it.

    ``graph`` and ``indexed`` are of a record of ``model`` itself. ``idle`` units go, too, as far as
    the others allow.
    """
    todo, structure = decisions(
        model,
        graph,
        (*remove, *idle),
        fuse=fuse,
        indexed=indexed,
        faithful=faithful,
        idle=frozenset(idle),
    )
    kept = kernels_of(todo) if fuse else {}
    absorb(model, todo, fuse)
    convs: list[Conv] = []
    kernels: dict[str, Fused] = {}
    for path, (weight, bias, like) in kept.items():
        original = original_path(model, path)
        convs.append(conv_edit(original, like, bias is not None))
        layer: Any = model.get_submodule(path)
        kernels[original] = Fused(weight, bias, like, layer.norm)
    replaced = replacements(model, todo, fuse)
    model = _without_gates(model, everything=fuse, removed=remove)
    # Each as it is written down, and as it is carried out here: where gates stay, paths are longer.
    written = [*(r.edit for r in replaced), *structure]
    numbers = [*(r.numbers for r in replaced), *({} for _ in structure)]
    here = written if fuse else [_gated(model, e) for e in written]
    steps = [(e, Replaced(h, n)) for e, h, n in zip(written, here, numbers, strict=True)]
    # What is put around or behind a module comes last, as it gives all within another path.
    around = [s for s in steps if isinstance(s[0], Append | Blend | Soften)]
    around.sort(key=lambda s: -s[1].edit.path.count("."))
    steps = [s for s in steps if not isinstance(s[0], Append | Blend | Soften)] + around
    # Kernels first: what is put behind a conv later gives it another path.
    model = apply_edits(model, convs)
    fill_convs(model, kernels)
    model = put(model, [s[1] for s in steps])
    return model, [*convs, *(s[0] for s in steps)]


def _without_gates(model: nn.Module, *, everything: bool, removed: tuple[str, ...]) -> nn.Module:
    """Put the layers that gates hold back in their places (in place)."""
    for path, module in list(model.named_modules())[::-1]:
        if not isinstance(module, Gate) or not (everything or module.unit in removed):
            continue
        whole = isinstance(module, BranchGate | Segment)
        inner: Any = module.module if whole else module.conv
        set_submodule(model, path, inner)
    return model


def _gated(model: nn.Module, edit: Edit) -> Edit:
    """Point an edit at the same module of a model that keeps some gates."""
    module: nn.Module = model
    path = []
    for part in edit.path.split(".") if edit.path else []:
        if isinstance(module, BranchGate | Segment):
            path.append("module")
            module = module.module
        path.append(part)
        module = getattr(module, part)
    # Edits speak of the original layers, which stand inside the gates that stay.
    while isinstance(module, BranchGate | Segment):
        path.append("module")
        module = module.module
    return replace(edit, path=".".join(path))


def leftovers(compact: nn.Module) -> dict[str, float]:
    """Return the factors that no layer could absorb, by the path of the multiply.

    Also the scales of segments and gates that are neither 0 nor 1: both sides of these are left.

    Example:
        >>> model = resconv.convert(net, images, start="identity")
        >>> resconv.leftovers(resconv.prune(model, resconv.Plan(("3",))))
        {}
    """
    edits = provenance_of(compact).edits
    kinds = Multiply | Append | Blend | Soften
    return {e.path: e.factor for e in edits if isinstance(e, kinds)}
