"""The net of a file built: by its source, or of the user's model; its edits and gates put in.

The file may be hostile, so what building makes is bounded by what the weights can fill.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..analysis.inputs import unwrap
from ..errors import LoadError, ResConvError
from ..nets import create, require_trusted_source
from ..surgery.copying import copy_model
from ..surgery.edits import apply_edits
from ..surgery.provenance import Source
from .schema import Header
from .sources import check_source
from .training_form import insert_gates

__all__ = ["build"]

_MAX_CALLS = 60_000  # operations that building a network may take; the largest take some 20,000
_CALLS, _CALLS_EACH = 4_000, 60  # and those of one with so many modules left
_MOST_BYTES = 768 * 2**20  # above the file's own: how much larger the net before pruning may be
_LARGE = 2**22  # elements: what may come of less is not worth asking in advance


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to make more numbers than a network of this file's size can need.

    Counted are the bytes of every tensor that is made, those of a factory call and those that come
    of others (a table of positions grows with the fourth power of a window's side). What may be
    large is asked of tensors without memory first.
    """

    def __init__(self, num_bytes: int, num_modules: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left: int = num_bytes + min(8 * num_bytes + 2**28, _MOST_BYTES)
        self.calls: int = min(_MAX_CALLS, _CALLS + _CALLS_EACH * num_modules)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        given = [t for t in leaves if isinstance(t, Tensor)]
        self.calls -= 1
        self._refuse_beyond(0)
        numbers = [n for n in leaves if isinstance(n, int | float) and not isinstance(n, bool)]
        sides = [t.numel() for t in given] + [int(n) for n in numbers if 1 <= n < math.inf]
        if math.prod(sides) > _LARGE:
            self._foresee(func, args, kwargs)
        out = func(*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in given}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.left -= t.untyped_storage().nbytes()
        self._refuse_beyond(0)
        return out

    def _foresee(self, func: Any, args: Any, kwargs: Any) -> None:
        def light(x: Any) -> Any:
            return x.to("meta") if isinstance(x, Tensor) else x

        try:
            light_kwargs = {**tree_map(light, kwargs)}
            if "device" in light_kwargs:
                light_kwargs["device"] = torch.device("meta")
            out = func(*tree_map(light, args), **light_kwargs)
        except Exception:  # an operation may refuse to run so in any way it likes
            return  # its size depends on numbers, or it has no such form; it is counted when made
        given = [t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if func._schema.is_mutable or not made:
            return
        # A view says as many numbers as it shows; what is made is at least its storage.
        most = max(t.untyped_storage().nbytes() for t in made)
        if math.prod(made[0].shape) > 4 * max(given, default=0):
            self._refuse_beyond(most)

    def _refuse_beyond(self, num_bytes: int) -> None:
        if self.left < num_bytes or self.calls < 0:
            raise LoadError(
                "model.json asks for a network that the weights do not fill, by far: building it "
                "was stopped. If you trust its origin, add --trust-source (in Python: "
                "load(trust_source=True))."
            )


def build(
    header: Header,
    folder: Path,
    tensors: dict[str, Tensor],
    model: nn.Module | Callable[[], nn.Module] | None,
    trust_source: bool,
) -> nn.Module:
    """Return the net that the header describes, with its gates; its numbers are filled in later."""
    edits = header.edits
    bounded = Bounded(sum(t.nbytes for t in tensors.values()), len(header.modules))
    # The random weights of the new layers are overwritten; the caller's seed stays as it was.
    with torch.random.fork_rng(devices=[]):
        if isinstance(model, nn.Module):
            base = copy_model(unwrap(model), LoadError).cpu()
        elif model is not None:
            base = unwrap(model()).cpu()
        else:
            base = _from_source(header.source, folder, trust_source, bounded)
        # Every edit takes a unit out, or mends what lies around it; a rewritten root takes longest.
        most = 100 + 4 * len(list(base.modules()))
        if len(edits) > most:
            raise LoadError(
                f"{folder / 'model.json'} has {len(edits):,} edits, more than a net of "
                f"{len(list(base.modules())):,} modules can need ({most:,})."
            )
        with bounded if not trust_source else nullcontext():
            net = apply_edits(base, edits)
            gates, num_modules = header.gates or (), len(list(net.modules()))
            if len(gates) > num_modules:
                raise LoadError(
                    f"{folder / 'model.json'} has {len(gates):,} gates for a net of "
                    f"{num_modules:,} modules; each has at most one."
                )
            insert_gates(net, gates)
            return net


def _from_source(
    source: Source | None, folder: Path, trust_source: bool, bounded: Bounded
) -> nn.Module:
    if source is None:
        raise LoadError(
            f"{folder} does not say which network it was made from (it was not built by "
            "resconv.nets.create). Give the unpruned net: resconv.load(path, model=your_net)."
        )
    name = source.name
    try:
        require_trusted_source(name, folder, trusted=trust_source)
        if trust_source:
            return create(name, **source.kwargs)
        fault = check_source(source)
        if fault:
            raise LoadError(
                f"{folder / 'model.json'}: {name[:120]!r} is not built, {fault}. If you trust its "
                "origin, add --trust-source (in Python: load(trust_source=True)), or give the unpruned "
                "net: resconv.load(path, model=your_net)."
            )
        with bounded:
            return create(name, **source.kwargs)
    except LoadError:
        raise
    except ResConvError as error:
        raise LoadError(f"{folder}: its source cannot be built. {error}") from error
