"""Gates into a copy of a net: each conv becomes a ResConv, the end of each branch gets a scale.

A segment is wrapped whole, with the layers beside it that may come in its place.
"""

from collections import Counter

import torch
from torch import Tensor, nn

from ..analysis.candidates import Candidate
from ..analysis.graph import Graph
from ..errors import ConversionError
from ..nn.algebra import add_identity
from ..nn.gates import BranchGate, FactorGate, Gate, ResConv, Segment, is_plain_norm
from ..nn.geometry import tap
from ..nn.shortcuts import built, in_mode_of
from .copying import copy_model
from .edit_kinds import Children, Drop, Edit
from .edits import apply_edit, droppable
from .provenance import Provenance, carry_on
from .state import set_submodule

__all__ = ["is_fresh", "sharing_copy", "with_gates"]


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the tree of modules that holds the parameters and buffers of ``model``.

    Raises:
        ConversionError: a module cannot be copied.
    """
    return copy_model(model, ConversionError, share=True)


def with_gates(
    model: nn.Module,
    graph: Graph,
    indexed: set[int],
    chosen: list[Candidate],
    branches: list[Candidate],
    start: str,
    provenance: Provenance,
) -> nn.Module:
    """Return a copy of ``model`` with gates, which shares its tensors; ``model`` is left unchanged.

    ``graph`` and ``indexed`` are of a record of the model, ``branches`` all its residual branches.
    The copy carries ``provenance``, with the edits that were made. Kernels that ``start`` changes are
    new ones.
    """
    fresh = is_fresh(model)
    # A norm that goes into a ResConv leaves its place; a branch may have ended there.
    moved = _behind_norms(model, chosen)
    empty = [
        c.norm for c in chosen if c.norm is not None and droppable(model, graph, c.norm, indexed)
    ]
    in_branch = set().union(*(c.nodes for c in branches)) if fresh else set()
    model = sharing_copy(model)
    edits: list[Edit] = []
    for candidate in chosen:
        if candidate.unit.kind == "layer":
            identity = start == "identity" and not candidate.nodes & in_branch
            edits += _insert_layer(model, candidate, identity, fresh)
    for path in empty:
        if isinstance(model.get_submodule(path), nn.Identity):
            edits.append(Drop(path))
            apply_edit(model, edits[-1])
    places = [
        (c.gate if _is_whole(c) else moved.get(c.gate, c.gate), c)
        for c in chosen
        if c.unit.kind != "layer"
    ]
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    # The innermost first: a gate around it lengthens the paths of all that it holds. A branch that
    # ends in a segment is scaled with all that the segment returns.
    for place, c in sorted(places, key=lambda p: (-p[0].count("."), not _is_whole(p[1]))):
        module = model.get_submodule(place)
        gate: Gate = (
            _segment(module, c, like)
            if _is_whole(c)
            else (FactorGate if c.unit.kind == "gate" else BranchGate)(module, like=like)
        )
        gate.unit = c.unit.name
        set_submodule(model, place, gate)
    if start == "identity" and fresh:
        ends = {moved.get(c.gate, c.gate): c.value for c in branches if c.gate}
        _start_small(model, graph, chosen, ends)
    carry_on(model, provenance, edits=edits, training_form=True)
    return model


def _is_whole(c: Candidate) -> bool:
    """Whether the gate holds all of the unit, and not the end of it."""
    return c.unit.kind == "segment" or (c.unit.kind == "gate" and c.add < 0)


def _segment(module: nn.Module, c: Candidate, like: Tensor | None) -> Segment:
    own = next((p for p in module.parameters() if p.is_floating_point()), like)
    left: nn.Module = nn.Identity()
    if c.shortcut is not None:
        left = built(c.shortcut.layers(), own)
        left.load_state_dict(c.start)
    gate = Segment(module, in_mode_of(left, module), like=like)
    gate.residual = c.unit.residual
    return gate


@torch.no_grad()
def _start_small(
    model: nn.Module, graph: Graph, chosen: list[Candidate], ends: dict[str, int]
) -> None:
    """Set s = 1 / sqrt(n) where ``n`` branches of an untrained net meet identities of one shape.

    ``ends`` are the places where the branches of its own blocks end, with the value each is added
    to. A branch whose end has no gate counts, and stays as it is.
    """
    joins = [(model.get_submodule(place), value) for place, value in ends.items()]
    layers = {m.unit: m for m in model.modules() if isinstance(m, ResConv)}
    for c in chosen:
        if c.unit.kind == "layer" and _is_open(layers[c.conv]):
            joins.append((layers[c.conv], graph.calls_of(c.conv)[0].args[0].value))
    count = Counter(graph.values[value].shape for _, value in joins)
    for module, value in joins:
        if isinstance(module, Gate):
            module.scale.fill_(count[graph.values[value].shape] ** -0.5)


def _is_open(gate: ResConv) -> bool:
    return gate.reach is None and gate.control is not None and gate.control.item() != 0


def _behind_norms(model: nn.Module, chosen: list[Candidate]) -> dict[str, str]:
    """Return where the layers inside a norm's module will stand once the norm is out of it."""
    places: dict[str, str] = {}
    for c in chosen:
        if c.norm is None:
            continue
        left = [
            name
            for name in c.norm_children
            if not isinstance(model.get_submodule(f"{c.norm}.{name}"), nn.Identity)
        ]
        if not left:  # only identities stood there: the ResConv ends the branch now
            places |= {f"{c.norm}.{name}": c.conv for name in c.norm_children}
            places[c.norm] = c.conv
        for i, name in enumerate(left):
            places[f"{c.norm}.{name}"] = c.norm if len(left) == 1 else f"{c.norm}.{i}"
    return places


def is_fresh(model: nn.Module) -> bool:
    """Whether no BatchNorm of the model has seen a batch (a net without any counts as trained)."""
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    return bool(norms) and all(
        not m.num_batches_tracked and not m.running_mean.any()  # type: ignore[union-attr]
        for m in norms
    )


def plain_norm(norm: nn.Module) -> nn.Module:
    """Return torch's own BatchNorm with the parameters of ``norm``, a subclass of it."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if is_plain_norm(norm):
        return norm
    kinds = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
    cls = next((k for k in kinds if isinstance(norm, k)), nn.BatchNorm2d)
    plain = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    plain.weight, plain.bias = norm.weight, norm.bias
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(plain, name, getattr(norm, name))
    plain.training = norm.training
    return plain


def _insert_layer(
    model: nn.Module, candidate: Candidate, identity: bool, fresh: bool
) -> list[Edit]:
    """Put a ResConv in the place of the conv, in place, and return how the tree was changed for it."""
    edits: list[Edit] = []
    conv = model.get_submodule(candidate.conv)
    norm = None
    if candidate.norm is not None:
        whole = model.get_submodule(candidate.norm)
        norm = plain_norm(whole)
        edits.append(Children(candidate.norm, tuple(candidate.norm_children)))
        apply_edit(model, edits[-1])
    control = 0.0
    where = tap(conv) if candidate.reach is None else candidate.reach.tap
    if identity and where is not None and (fresh or take_out_identity(conv, norm, where)):
        control = 1.0
    gate = ResConv(conv, norm, 1.0, control, candidate.reach)
    gate.unit, gate.reason = candidate.conv, candidate.unit.reason
    gate.scale.requires_grad_(gate.reason is None)
    set_submodule(model, candidate.conv, gate)
    return edits


def take_out_identity(conv: nn.Module, norm: nn.Module | None, where: tuple[int, ...]) -> bool:
    """Subtract from the kernel what ``+ x`` adds behind the norm; False where that is impossible.

    W <- W - (sigma / g) * Dirac. A channel whose norm weight ``g`` is (nearly) 0 would need an
    unbounded kernel, so such a layer keeps s = 1, p = 0.
    """
    weight = conv.weight
    assert isinstance(weight, Tensor)
    amount = torch.ones(weight.shape[0], dtype=torch.float64, device=weight.device)
    if norm is not None:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        assert norm.running_var is not None
        sigma = (norm.running_var.double() + norm.eps).sqrt()
        g = torch.ones_like(sigma) if norm.weight is None else norm.weight.detach().double()
        if bool((g.abs() < 1e-3 * sigma).any()):
            return False
        amount = sigma / g
    assert isinstance(conv.groups, int)
    with torch.no_grad():
        changed = add_identity(weight.double(), -amount, where, conv.groups).to(weight.dtype)
    # A new parameter: the one that was there is still the other copies'.
    laid = torch.empty_like(weight).copy_(changed)
    conv.weight = nn.Parameter(laid, requires_grad=weight.requires_grad)
    return True
