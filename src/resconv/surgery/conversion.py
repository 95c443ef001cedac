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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..analysis.branches import find_blocks
from ..analysis.candidates import DEFAULT_KINDS, KINDS, Candidate, Unit, Units
from ..analysis.finding import find_units
from ..analysis.graph import Graph
from ..analysis.input_spec import ExampleInputs
from ..analysis.inputs import as_call, batch_size, evaluating, tensors_in, to_device_of, unwrap
from ..analysis.recorder import record, restored
from ..errors import ConversionError, TraceError
from ..nn.gates import Gate, is_leaf
from ..nn.shortcuts import SHORTCUT_KINDS
from .copying import as_normal_tensors, copy_model
from .edits import indexed_containers
from .fitting import fitted
from .insertion import is_fresh, with_gates
from .merging import merge_branches, warn_of_branches
from .proof import untrained
from .provenance import Provenance, example_inputs_of, provenance_of
from .rehearsal import why_prune_fails
from .state import require_finite
from .trial import first_refused, why_refused
from .verification import relative_error

__all__ = ["convert", "kinds_of", "units"]

_DEFAULT = tuple(f"{k}s" for k in DEFAULT_KINDS)


@torch.inference_mode(False)
def convert(
    model: nn.Module,
    example_inputs: Any,
    *,
    units: str | Iterable[str] = _DEFAULT,
    start: str = "keep",
    shortcut: str = "removable",
    batches: Iterable[Any] | None = None,
    shortcut_kinds: str | Sequence[str] = SHORTCUT_KINDS,
    filter: Callable[[str, nn.Module], bool] | None = None,
    reparameterize: bool = False,
) -> nn.Module:
    """Return a copy of ``model`` in training form; ``model`` is left as it was.

    Args:
        model: any module whose forward runs on ``example_inputs``.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        units: which kinds of units: one name, several (a list, or with commas between), or "all".
            "layers": conv layers get a shortcut. "blocks": residual branches get a scale.
            "summands": of any other sum one side gets one, so that the other is left.
            "segments": a module whose shape one conv can stand for gets that conv as its shortcut.
            "gates": what a squeeze-and-excite multiplies by gets a scale, so that 1 is left.
            By default layers and blocks, whose removal leaves an identity.
        start: "keep" or "identity"; see the module's header.
        shortcut: which conv layers get one. "removable": those that keep their input's shape, so
            that they can go. "always": also those that change it (a stride, other channels, no
            padding), with the identity strided, cut or padded with zero channels. These fuse as
            exactly, and stay: ``gates`` and plans leave them out, ``units`` says why.
        batches: a few batches of training data, as for :func:`resconv.recalibrate`, labels not used.
            The conv beside each segment then starts as the least-squares fit of it, and of the
            ``shortcut_kinds`` the one is taken that leaves least of both: cost, and variance not
            explained. Without batches it starts at the segment's own kernel, where that is one conv,
            else at zero, and has to be trained before it is worth anything.
        shortcut_kinds: "separable" (a depthwise and a 1x1 conv), "pointwise" (1x1), "dense"; the
            best first.
        filter: ``filter(name, module) -> bool``; a unit for which it is false stays ordinary.
        reparameterize: merge branches that are for training alone first, by the modules' own
            methods (RepVGG, MobileOne, ...). Without it they get a warning: nobody deploys such a
            net as it stands.

    Raises:
        ConversionError: there is nothing to convert (the reasons are listed), or the outputs
            would change.
        TraceError: the model does not run on ``example_inputs``.

    Example:
        >>> model = resconv.convert(net, images)
        >>> torch.allclose(model(images), net(images), atol=1e-6)
        True
        >>> wider = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> model = resconv.convert(wider, images, units="segments", batches=[images])
        >>> compact = resconv.prune(model, resconv.Plan(("0",)))
        >>> torch.allclose(model(images), wider(images), atol=1e-6)
        True
        >>> resconv.profile(compact, images).macs < resconv.profile(wider, images).macs / 2
        True
    """
    kinds = kinds_of(units)
    if start not in ("keep", "identity"):
        raise ConversionError(f"start={start!r}; choose 'keep' or 'identity'.")
    if shortcut not in ("removable", "always"):
        raise ConversionError(f"shortcut={shortcut!r}; choose 'removable' or 'always'.")
    if shortcut == "always" and "layer" not in kinds:
        raise ConversionError(
            f"shortcut='always' is about conv layers, and units={units!r} converts none. Choose "
            "units='all' or 'layers'."
        )
    shortcut_kinds = _shortcuts_of(shortcut_kinds)
    model = unwrap(model)
    if any(isinstance(m, Gate) for m in model.modules()):
        raise ConversionError(
            "The model has gates already. Fuse it first (resconv.fuse) to convert it anew."
        )
    model = copy_model(model, ConversionError)
    example_inputs = as_normal_tensors(example_inputs)
    found = _find(model, example_inputs, kinds, shortcut_kinds)
    if reparameterize:
        model = merge_branches(model, found.graph, example_inputs)
        found = _find(model, example_inputs, kinds, shortcut_kinds)
    else:
        warn_of_branches(found.graph)
    if not found.graph.outputs:
        raise ConversionError(
            f"{type(model).__name__} returns no tensor, so nothing can be checked."
        )
    require_finite(model, ConversionError)
    asked = [c for c in found.every if c.unit.kind in kinds]
    if filter is not None:
        asked = [c for c in asked if filter(c.unit.name, model.get_submodule(c.conv or c.gate))]
    if shortcut == "always":
        # Both would stand in the conv's place.
        convs = {c.conv for c in asked if c.conv}
        asked = [c for c in asked if c.shortcut is None or c.gate not in convs]
    asked = fitted(model, found.graph, asked, batches)
    gated, kept = _try(model, found, asked, start, shortcut, example_inputs)
    if gated is None:
        reasons = "; ".join(f"{u.name}: {u.reason}" for u in kept[:8]) or "no such layer was found"
        raise ConversionError(
            f"Nothing to convert with units={units!r}: {len(kept)} candidates stay ({reasons}"
            f"{'; ...' if len(kept) > 8 else ''})."
            + ("" if set(kinds) == set(KINDS) else " Try units='all'.")
        )
    return gated


@torch.inference_mode(False)
def units(
    model: nn.Module,
    example_inputs: Any = None,
    kinds: str | Iterable[str] = _DEFAULT,
    *,
    batches: Iterable[Any] | None = None,
    shortcut_kinds: str | Sequence[str] = SHORTCUT_KINDS,
) -> Units:
    """List every unit of these kinds, with its cost and, where it stays, the reason.

    A unit is removable when its removal works out on a record of the whole model, alone and with
    the others, as :func:`resconv.prune` will do it. The model is run in eval mode and left as it
    was. What comes back is a list that prints as a table. ``example_inputs`` may be left out where
    the model carries some. ``kinds``, ``batches`` and ``shortcut_kinds`` are those of
    :func:`resconv.convert`: with batches, each segment's ``residual`` says, before any training,
    how much of its variance the layers in its place leave unexplained.

    Raises:
        TraceError: the model does not run on ``example_inputs``.
        ConversionError: the model cannot be copied.

    Example:
        >>> resconv.units(net, images)
        3 units, 3 of them removable
        unit  kind    MACs  parameters  removable, or why not
        0     layer  5,184         156  can go
        3     layer  5,184         156  can go
        6     layer  5,184         156  can go
    """
    model = unwrap(model)
    example_inputs = as_normal_tensors(example_inputs_of(example_inputs, model))
    found = _find(model, example_inputs, kinds_of(kinds), _shortcuts_of(shortcut_kinds))
    warn_of_branches(found.graph)
    every = found.every
    listed = {id(c): c.unit for c in every}
    if not any(isinstance(m, Gate) for m in model.modules()):
        every = fitted(model, found.graph, every, batches)
        try:
            _, kept = _try(model, found, every, "keep", "removable", example_inputs)
            reasons = {(u.kind, u.name): u.reason for u in kept}
        except ConversionError as error:
            reasons = {(c.unit.kind, c.unit.name): str(error) for c in every}
        for c in every:
            reason = c.unit.reason or reasons.get((c.unit.kind, c.unit.name))
            listed[id(c)] = replace(c.unit, removable=reason is None, reason=reason)
    batch = batch_size(example_inputs)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    every = sorted(every, key=lambda c: order.get(c.conv or c.gate, 0))
    return Units(replace(listed[id(c)], macs=c.unit.macs // batch) for c in every)


@dataclass(frozen=True)
class _Found:
    """A record of a model, and the units in it."""

    graph: Graph
    indexed: set[int]  # ids of containers that code indexes
    every: list[Candidate]
    blocks: list[Candidate]  # whether they were asked for or not


def kinds_of(units: str | Iterable[str]) -> tuple[str, ...]:
    """Return the kinds of units that were asked for, as a unit names its own.

    Raises:
        ConversionError: there is no such kind.
    """
    asked = units.split(",") if isinstance(units, str) else list(units)
    asked = [a.strip() if isinstance(a, str) else a for a in asked]
    if asked == ["all"]:
        return KINDS
    plural = {f"{k}s": k for k in KINDS}
    unknown = [a for a in asked if a not in plural]
    if unknown or not asked:
        raise ConversionError(
            f"units={units!r}; choose {', '.join(map(repr, plural))}, several of them, or 'all'."
        )
    return tuple(k for p, k in plural.items() if p in asked)


def _shortcuts_of(kinds: str | Sequence[str]) -> tuple[str, ...]:
    asked = tuple(k.strip() for k in kinds.split(",")) if isinstance(kinds, str) else tuple(kinds)
    if not asked or not set(asked) <= set(SHORTCUT_KINDS):
        raise ConversionError(
            f"shortcut_kinds={kinds!r}; choose among {', '.join(map(repr, SHORTCUT_KINDS))}."
        )
    return asked


def _find(
    model: nn.Module, example_inputs: Any, kinds: Iterable[str], shortcuts: Sequence[str]
) -> _Found:
    with indexed_containers() as indexed:
        graph = record(model, example_inputs, leaf=is_leaf)
    every = find_units(model, graph, kinds, indexed, shortcuts)
    blocks = [c for c in every if c.unit.kind == "block"]
    # What lies in a block starts in another way, whether the block is a unit or not.
    return _Found(graph, indexed, every, blocks or find_blocks(model, graph))


def _try(
    model: nn.Module,
    found: _Found,
    asked: list[Candidate],
    start: str,
    shortcut: str,
    example_inputs: Any,
) -> tuple[nn.Module | None, list[Unit]]:
    """Return the gated copy in which every unit can be removed, and the units that stay.

    ``None`` where there is nothing to convert. The copy shares the tensors of ``model``.
    """
    fusible = {c.unit.name for c in asked if c.conv and (c.unit.removable or c.reach is not None)}
    ends: dict[str, str] = {}
    for c in asked:
        if (
            c.gate
            and c.unit.kind in ("block", "summand")
            and c.unit.removable
            and (other := ends.setdefault(c.gate, c.unit.name)) != (c.unit.name)
        ):
            c.unit = _kept(c.unit, f"its branch ends in the module that ends {other}, too")
    before = _described(model, found.graph, example_inputs)
    compare = start == "keep" or not is_fresh(model)

    def gated_with(chosen: list[Candidate]) -> tuple[nn.Module, Graph, set[int]]:
        gated = with_gates(model, found.graph, found.indexed, chosen, found.blocks, start, before)
        return gated, *_record_again(gated, example_inputs, found.graph, compare)

    while True:
        chosen = [
            c
            for c in asked
            if c.unit.removable or (shortcut == "always" and c.unit.name in fusible)
        ]
        kept = [c.unit for c in asked if not c.unit.removable]
        if not chosen:
            return None, kept
        try:
            gated, graph, indexed = gated_with(chosen)
        except ConversionError as error:
            if shortcut == "always":
                raise
            c, reason = _first_in_the_way(chosen, gated_with, error)
            c.unit = _kept(c.unit, reason)
            continue
        refused = (
            why_refused(gated, graph, indexed)
            or untrained(gated, graph, example_inputs)
            or why_prune_fails(gated, chosen, graph)
        )
        if not refused:
            return gated, kept
        for c in chosen:
            if c.unit.name in refused:
                c.unit = _kept(c.unit, refused[c.unit.name])


def _first_in_the_way(
    chosen: list[Candidate], gated_with: Callable[[list[Candidate]], Any], error: Exception
) -> tuple[Candidate, str]:
    """Return a unit whose gate keeps the model from running as it did, with the reason, by halving.

    Raises:
        ConversionError: the model does not run as it did without a gate either.
    """

    def attempt(names: Sequence[str]) -> str | None:
        try:
            gated_with(chosen[: len(names)])
        except ConversionError as error:
            return str(error)
        return None

    if attempt([]) is not None:
        raise error
    count, reason = first_refused([c.unit.name for c in chosen], attempt, str(error))
    return chosen[count - 1], reason.partition(" Some code of")[0].rstrip(".")


def _described(model: nn.Module, graph: Graph, example_inputs: Any) -> Provenance:
    """Return where the model comes from, with its inputs described.

    They are copied whole where it does not run on others of their kind, or computes no finite numbers
    of the same sizes then.
    """
    inputs = ExampleInputs.of(example_inputs)
    before = replace(provenance_of(model), inputs=inputs, plan=None)
    if inputs.is_exact:
        return before
    args, kwargs = as_call(to_device_of(model, inputs.make()))
    try:
        with evaluating(model), restored(model):
            outputs = tensors_in(model(*args, **kwargs))
    except Exception:  # the user's forward may raise anything where it is not given what it expects
        outputs = []
    given = tensors_in(graph.output)
    if [o.shape for o in outputs] == [g.shape for g in given] and all(
        bool(o.isfinite().all()) or not bool(g.isfinite().all())
        for o, g in zip(outputs, given, strict=True)
    ):
        return before
    return replace(before, inputs=ExampleInputs.copy_of(example_inputs))


def _kept(unit: Unit, reason: str) -> Unit:
    return replace(unit, removable=False, reason=reason)


def _record_again(
    gated: nn.Module, example_inputs: Any, before: Graph, compare: bool
) -> tuple[Graph, set[int]]:
    """Record the gated model, and check that it computes what the model did.

    Raises:
        ConversionError: it does not run, or computes something else.
    """
    try:
        with indexed_containers() as indexed:
            graph = record(gated, example_inputs, leaf=is_leaf)
    except TraceError as error:
        raise ConversionError(
            f"The converted model does not run ({error}). Some code of the model reaches into a "
            "layer that was replaced; leave it out with filter=."
        ) from error
    error_size = relative_error(graph.output, before.output) if compare else 0.0
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in gated.parameters())
    if not error_size <= (5e-2 if half else 1e-4):
        raise ConversionError(
            f"Converting would change the outputs by {error_size:.2e} (relative). The forward pass "
            "is random in eval mode, or uses a layer in a way the record does not show."
        )
    return graph, indexed
