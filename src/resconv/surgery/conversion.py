"""Model in, training form out: a scale on every unit, outputs unchanged.

``start="keep"``      s = 1, p = 0: nothing changes.
``start="identity"``  p = 1. From the kernel of a trained net the identity is taken out,
                      W <- W - (sigma / g) * Dirac, and s = 1, so its outputs do not change.

                      An untrained net simply gets the shortcut (that is what makes deep plain nets
                      trainable), except where a layer lies in a residual branch: the block's own
                      shortcut does it there, and a second one multiplies the stream in every block
                      (2^27 in a ResNet-56, whose training ends in NaN), so p = 0. Where n branches
                      meet a stream of one shape, each starts at s = 1 / sqrt(n), so that together
                      they add about as much as it holds, however deep the net is (Hanin and Rolnick
                      2018; De and Smith 2020). At s = 1 deep nets train badly or not at all, by the
                      seed.
"""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.branches import find_blocks
from ..analysis.candidates import Candidate
from ..analysis.graph import Graph
from ..analysis.inputs import as_call, evaluating, to_device_of, unwrap
from ..analysis.layers import find_layers
from ..analysis.recorder import record
from ..errors import ConversionError
from ..nn.algebra import add_identity
from ..nn.gates import BranchGate, Gate, ResConv, is_plain_norm
from ..nn.geometry import tap
from .copying import as_normal_tensors, copy_model
from .edits import apply_edit, droppable, indexed_containers
from .state import State, require_finite, set_submodule
from .verification import relative_error

__all__ = ["convert"]


@torch.inference_mode(False)
def convert(
    model: nn.Module,
    example_inputs: Any,
    *,
    units: str = "layers",
    start: str = "keep",
    shortcut: str = "removable",
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Return a copy of ``model`` in training form; ``model`` is left as it was.

    Args:
        model: any module whose forward runs on ``example_inputs``.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        units: "layers" (conv layers get a shortcut), "blocks" (residual branches get a scale)
            or "all".
        start: "keep" or "identity"; see the module's header.
        shortcut: which conv layers get one. "removable": those that keep their input's shape, so
            that they can go. "always": also those that change it (a stride, other channels, no
            padding), with the identity strided, cut or padded with zero channels. These fuse as
            exactly, and stay: ``gates`` and plans leave them out, ``units`` says why.
        filter: ``filter(name, module) -> bool``; a unit for which it is false stays ordinary.

    Raises:
        ConversionError: there is nothing to convert (the reasons are listed), or the outputs
            would change.
        TraceError: the model does not run on ``example_inputs``.
    """
    if units not in ("layers", "blocks", "all"):
        raise ConversionError(f"units={units!r}; choose 'layers', 'blocks' or 'all'.")
    if start not in ("keep", "identity"):
        raise ConversionError(f"start={start!r}; choose 'keep' or 'identity'.")
    if shortcut not in ("removable", "always"):
        raise ConversionError(f"shortcut={shortcut!r}; choose 'removable' or 'always'.")
    if shortcut == "always" and units == "blocks":
        raise ConversionError(
            "shortcut='always' is about conv layers, and units='blocks' converts none. Choose "
            "units='all' or 'layers'."
        )
    model = unwrap(model)
    if any(isinstance(m, Gate) for m in model.modules()):
        raise ConversionError(
            "The model has gates already. Fuse it first (resconv.fuse) to convert it anew."
        )
    model = copy_model(model, ConversionError)
    example_inputs = as_normal_tensors(example_inputs)
    with indexed_containers() as indexed:
        graph = record(model, example_inputs)
    if not graph.outputs:
        raise ConversionError(
            f"{type(model).__name__} returns no tensor, so nothing can be checked."
        )
    require_finite(model, ConversionError)
    layers = find_layers(model, graph) if units in ("layers", "all") else []
    branches = find_blocks(model, graph)
    blocks = branches if units in ("blocks", "all") else []
    kept = [c.unit for c in (*layers, *blocks) if not c.unit.removable]
    chosen = [
        c
        for c in (*layers, *blocks)
        if c.unit.removable or (shortcut == "always" and c.reach is not None)
    ]
    if filter is not None:
        chosen = [c for c in chosen if filter(c.unit.name, model.get_submodule(c.conv or c.gate))]
    if not chosen:
        reasons = "; ".join(f"{u.name}: {u.reason}" for u in kept[:8]) or "no such layer was found"
        raise ConversionError(
            f"Nothing to convert with units={units!r}: {len(kept)} candidates stay ({reasons}"
            f"{'; ...' if len(kept) > 8 else ''}). Try units='all'."
        )
    fresh = is_fresh(model)
    record_before = getattr(model, "resconv_record", None) or {}
    state = State(
        example_inputs,
        source=record_before.get("source") or getattr(model, "resconv_source", None),
        edits=copy.deepcopy(record_before.get("edits") or []),
    )
    # A norm that goes into a ResConv leaves its place; a branch may have ended there.
    moved = _behind_norms(model, chosen)
    empty = [
        c.norm for c in chosen if c.norm is not None and droppable(model, graph, c.norm, indexed)
    ]
    in_branch = set().union(*(c.nodes for c in branches)) if fresh else set()
    for candidate in chosen:
        if candidate.unit.kind == "layer":
            identity = start == "identity" and not candidate.nodes & in_branch
            _insert_layer(model, candidate, state, identity, fresh)
    for path in empty:
        if isinstance(model.get_submodule(path), nn.Identity):
            state.edits.append({"op": "drop", "path": path})
            apply_edit(model, state.edits[-1])
    places: dict[str, str] = {}
    for candidate in chosen:
        if candidate.unit.kind == "block":
            places.setdefault(moved.get(candidate.gate, candidate.gate), candidate.unit.name)
    # The innermost first: a gate around it lengthens the paths of all that it holds.
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    for place in sorted(places, key=lambda p: -p.count(".")):
        gate = BranchGate(model.get_submodule(place), like=like)
        gate.unit = places[place]
        set_submodule(model, place, gate)
    if start == "identity" and fresh:
        ends = {moved.get(c.gate, c.gate): c.value for c in branches if c.gate}
        _start_small(model, graph, chosen, ends)
    model.resconv_state = state  # type: ignore[assignment]
    if start == "keep" or not fresh:
        _check(model, example_inputs, graph.output)
    return model


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
    model: nn.Module, candidate: Candidate, state: State, identity: bool, fresh: bool
) -> None:
    conv = model.get_submodule(candidate.conv)
    norm = None
    if candidate.norm is not None:
        whole = model.get_submodule(candidate.norm)
        norm = plain_norm(whole)
        edit = {"op": "children", "path": candidate.norm, "names": list(candidate.norm_children)}
        state.edits.append(edit)
        apply_edit(model, edit)
    control = 0.0
    where = tap(conv) if candidate.reach is None else candidate.reach.tap
    if identity and where is not None and (fresh or take_out_identity(conv, norm, where)):
        control = 1.0
    gate = ResConv(conv, norm, 1.0, control, candidate.reach)
    gate.unit, gate.reason = candidate.conv, candidate.unit.reason
    set_submodule(model, candidate.conv, gate)


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
        changed = add_identity(weight.double(), -amount, where, conv.groups)
        weight.copy_(changed.to(weight.dtype))
    return True


def _check(model: nn.Module, example_inputs: Any, before: Any) -> None:
    args, kwargs = as_call(to_device_of(model, example_inputs))
    with evaluating(model):
        try:
            after = model(*args, **kwargs)
        except Exception as error:
            raise ConversionError(
                f"The converted model does not run ({type(error).__name__}: {error}). Some code "
                "of the model reaches into a layer that was replaced; leave it out with filter=."
            ) from error
    error_size = relative_error(after, before)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    if not error_size <= (5e-2 if half else 1e-4):
        raise ConversionError(
            f"Converting would change the outputs by {error_size:.2e} (relative). The forward pass "
            "is random in eval mode, or uses a layer in a way the record does not show."
        )
