"""Proof before a net is handed out: it runs, and computes what the gated net computes.

In eval mode, and in training mode where that can be compared: norms frozen, and every random number
of torch replaced by a pattern that depends on its shape alone, so that dropout and stochastic depth
act on both nets alike.

A net that never asks for its mode computes the same in both (analysis/asking.py): its outputs in
eval mode stand for those in training mode then, and it is not run again.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..analysis.asking import depends_on_mode, hides_its_mode, noting_modes
from ..analysis.graph import Graph, Ref
from ..analysis.inputs import as_call, copied, evaluating, tensors_in, to_device_of
from ..analysis.recorder import restored
from ..errors import VerificationError
from ..nn.gates import gates
from .copying import copy_model
from .verification import relative_error, round_anew

__all__ = [
    "TrainingDiffersError",
    "Witness",
    "trains_as_identity",
    "untrained",
    "values_in_training_code",
]

_NORMS = (nn.modules.batchnorm._NormBase,)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest output; else 5e-2
_TRIES = 4  # passes in training mode, for nets that skip layers at random
_MARGIN = 100  # by how much more than one rounding of every weight two nets may differ


class _Patterned(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every random tensor is a fixed pattern: the first number is the lowest, every second is 0."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if name in ("native_dropout",):
            x, p = args[0], args[1]
            mask = _coins(torch.empty_like(x))
            return x * mask / max(1 - p, 1e-6), mask.bool()
        made = func(*args, **kwargs)
        if name in ("bernoulli_", "bernoulli"):
            return _coins(made)
        if name in ("uniform_", "rand", "rand_like", "random_", "normal_", "randn", "randn_like"):
            return made.copy_(_pattern(made)) if made.is_floating_point() else made
        return made


def _pattern(t: Tensor) -> Tensor:
    n = t.numel()
    return (torch.arange(n, device=t.device) / max(n, 1)).reshape(t.shape).to(t.dtype)


def _coins(t: Tensor) -> Tensor:
    # Not 0, 1, 0, 1: a row of even length would lose the same places in every image.
    n = t.numel()
    coins = (torch.arange(n, device=t.device) * 7 % 5 < 3) & (torch.arange(n, device=t.device) > 0)
    return t.copy_(coins.reshape(t.shape).to(t.dtype))


@contextmanager
def _as_in_training(model: nn.Module, patterned: bool = True) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    model.train()
    for m in model.modules():
        if isinstance(m, _NORMS):
            m.training = False
    state = random.getstate()
    try:
        numbers = _Patterned() if patterned else nullcontext()  # type: ignore[no-untyped-call]
        with torch.no_grad(), torch.random.fork_rng(devices=[]), numbers:
            yield
    finally:
        random.setstate(state)
        for m, mode in modes:
            m.training = mode


def _run(model: nn.Module, example_inputs: Any) -> Any:
    args, kwargs = as_call(to_device_of(model, copied(example_inputs)))
    return tree_map(_detached, model(*args, **kwargs))


def _detached(t: Any) -> Any:
    return t.detach().clone() if isinstance(t, Tensor) else t


def _in_training(model: nn.Module, example_inputs: Any, seed: int) -> Any:
    """Return the outputs in training mode, or None where it does not run."""
    try:
        with _as_in_training(model):
            random.seed(seed)
            return _run(model, example_inputs)
    except Exception:
        return None  # a training forward may ask for targets


class TrainingDiffersError(VerificationError):
    """Two nets agree in eval mode, and in training mode they do not."""


class Witness:
    """What a net computes, to be compared with the net that a surgery makes of it.

    ``start`` returns a new copy of it, and ``record`` is of one. Where neither net asks for its
    mode, training mode shows nothing new, and it is not run.
    """

    def __init__(self, start: Callable[[], nn.Module], example_inputs: Any, record: Graph) -> None:
        self.start, self.example_inputs = start, example_inputs
        self.evaluated = tree_map(_detached, record.output)
        self.asks = bool(record.asking)

    @cached_property
    def trained(self) -> Any:
        """Return the outputs in training mode, or None where there is nothing to compare."""
        return self._in_training(0) if self.asks else self.evaluated

    def _in_training(self, seed: int, evaluate_first: bool = False) -> Any:
        net = self.start()
        if evaluate_first:
            with evaluating(net), torch.no_grad():
                _run(net, self.example_inputs)
        return _in_training(net, self.example_inputs, seed)

    def require_same(self, made: nn.Module) -> None:
        """Raise where ``made`` does not run, or computes something else.

        Raises:
            VerificationError: with the reason and the numbers.
        """
        # What a forward leaves on a net stays on the copy.
        made = copy_model(made, VerificationError, share=True)
        asks = [made] if hides_its_mode(made) else []

        def note(module: nn.Module) -> None:
            if depends_on_mode(module):
                asks.append(module)

        try:
            with evaluating(made), restored(made), noting_modes(note):
                evaluated = _run(made, self.example_inputs)
        except Exception as error:  # of the user's forward
            raise VerificationError(
                "The net without these units does not run on its example inputs "
                f"({type(error).__name__}: {error}). Some code of the model reaches into what was "
                "removed; leave it out of the plan."
            ) from error
        self._compare(evaluated, self.evaluated, "")
        if not (self.asks or asks) or self.trained is None:
            return
        after = self._run_in_training(made) if asks else evaluated
        try:
            self._compare(after, self.trained, "In training mode, ")
        except TrainingDiffersError:
            # Some nets sample in training mode what they keep, when the last batch was of another
            # size: they are alike once the gated net has seen the same batches as ``made``.
            followed = self._in_training(0, evaluate_first=True)
            # Python's own random numbers cannot be replaced: where they count, there is nothing to
            # compare.
            again = self._in_training(1, evaluate_first=True)
            if again is not None and relative_error(again, followed) == 0:
                self._compare(after, followed, "In training mode, ")

    def _run_in_training(self, made: nn.Module) -> Any:
        try:
            with _as_in_training(made), restored(made):
                random.seed(0)
                return _run(made, self.example_inputs)
        except Exception as error:  # of the user's forward
            raise TrainingDiffersError(
                "In training mode the net without these units does not run "
                f"({type(error).__name__}: {error}), and the gated net does. Leave what was removed "
                "there out of the plan."
            ) from error

    def _compare(self, after: Any, before: Any, where: str) -> None:
        found = relative_error(after, before)
        dtype = next((t.dtype for t in tensors_in(before) if t.is_floating_point()), None)
        allowed = _TOLERANCE.get(dtype, 5e-2) if dtype is not None else 0.0
        if found <= allowed or found <= _MARGIN * self._rounding():
            return
        raise (TrainingDiffersError if where else VerificationError)(
            f"{where}the net without these units would compute something else than the gated net "
            f"with their scales at 0: {found:.2e} of the largest output apart, allowed is "
            f"{allowed:.0e}. The record does not show all that the model's code does; leave the "
            "units out of the plan that it does this with."
        )

    def _rounding(self) -> float:
        """Return how far the outputs move when every weight is rounded anew."""
        moved = round_anew(self.start())
        with evaluating(moved):
            return relative_error(_run(moved, self.example_inputs), self.evaluated)


def untrained(gated: nn.Module, graph: Graph, example_inputs: Any) -> dict[str, str]:
    """Return the units that training mode never runs, so that no scale of theirs would move.

    Such a layer is there for eval mode alone (SPAN merges its branches into it, in each forward).
    ``graph`` is a record of ``gated``. Where the net does not run in training mode on the example (it
    may ask for targets), nothing is known, and nothing is returned.
    """
    missing = set(gates(gated)) if graph.asking else set()
    seen: set[nn.Module] = set()
    for seed in range(_TRIES):
        if not missing:
            break
        net = copy_model(gated, VerificationError, share=True)
        hooks = [
            gate.register_forward_pre_hook(lambda gate, _: seen.add(gate))
            for gate in gates(net).values()
        ]
        try:
            with _as_in_training(net, patterned=False), restored(net):
                torch.manual_seed(seed)
                random.seed(seed)
                _run(net, example_inputs)
        except Exception:  # of the user's forward
            return {}
        finally:
            for hook in hooks:
                hook.remove()
        missing -= {name for name, gate in gates(net).items() if gate in seen}
    return dict.fromkeys(
        sorted(missing), "it does not run in training mode, so nothing would train its scale"
    )


def trains_as_identity(module: nn.Module, like: Tensor) -> bool:
    """Whether a module that passes its input on in eval mode does so in training mode, too.

    True also where that cannot be told. The module may multiply by a constant.
    """
    trial = copy_model(module, VerificationError)
    try:
        with evaluating(trial):
            settled = _is_multiple(trial(like.clone()), like)
        with _as_in_training(trial):
            return not settled or _is_multiple(trial(like.clone()), like)
    except Exception:  # of the user's forward, which may want more than a tensor
        return True


def _is_multiple(y: Any, x: Tensor) -> bool:
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return False
    factor = float((y * x).sum() / (x * x).sum())
    return bool((y - factor * x).abs().max() <= 1e-3 * x.abs().max())


def values_in_training_code(graph: Graph) -> set[int]:
    """Return the values that are at hand in a forward whose code names ``training``."""
    asking = {c.index for c in graph.calls if _names_training(type(c.module).forward)}
    seen: list[Any] = [(c.args, c.kwargs, c.output) for c in graph.calls if c.index in asking]
    seen += [
        (c.args, c.kwargs, c.output)
        for c in graph.calls
        if c.parent is not None and c.parent.index in asking
    ]
    found = {leaf.value for leaf in tree_leaves(seen) if isinstance(leaf, Ref)}
    for node in graph.nodes:
        if node.call.index in asking:
            found.update((*node.inputs, *node.outputs))
    return {v for v in found if not graph.values[v].constant}


def _names_training(forward: Any) -> bool:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is None or "training" in code.co_names
