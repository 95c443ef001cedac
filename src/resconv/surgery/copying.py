"""A copy of the user's model that shares no layer, tensor or function with it.

``copy.deepcopy`` alone is not enough:

- it refuses a tensor that autograd made (a feature map kept from the last step): here its numbers
  are copied;
- it hands functions on as they are, so a forward that is a closure, or a hook, would go on using
  the original's layers: here the closure is made anew over the copy's;
- inside ``torch.inference_mode`` it makes tensors that can never be trained: here that is left
  for the time of the copy.
"""

import copy
import gc
import types
import weakref
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResConvError

__all__ = ["as_normal_tensors", "copy_model"]

# What holds no state of a model: the search ends there, as deepcopy does.
_ATOMIC = (
    *(type, types.BuiltinFunctionType, types.ModuleType, types.CodeType, types.GenericAlias),
    *(str, bytes, int, float, complex, type(None), property, weakref.ref),
    *(torch.dtype, torch.device, torch.Size),
)


def copy_model(model: nn.Module, error: type[ResConvError], *, share: bool = False) -> nn.Module:
    """Return a copy of ``model`` in its own modes, types, layouts and devices; see the header.

    With ``share``, the copy has modules of its own that hold the same parameters and buffers.

    Raises:
        ``error``: a part cannot be copied; its module and attribute are named.
    """
    with torch.inference_mode(False):
        return _Copy(model, error, share).made()


def as_normal_tensors(tree: Any) -> Any:
    """Return the inputs with tensors of ``torch.inference_mode`` replaced by ordinary copies."""
    with torch.inference_mode(False):
        return torch.utils._pytree.tree_map(
            lambda t: t.clone() if isinstance(t, Tensor) and t.is_inference() else t, tree
        )


class _Copy:
    def __init__(self, model: nn.Module, error: type[ResConvError], share: bool) -> None:
        self.model, self.error = model, error
        # ids of all that a copy must not use: the original's modules, parameters and buffers
        self.own = {id(m) for m in model.modules()}
        self.own |= {id(t) for t in (*model.parameters(), *model.buffers())}
        self.memo: dict[int, Any] = {}
        if share:
            self.memo |= {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.rebound: dict[int, tuple[types.FunctionType, types.FunctionType, str]] = {}

    def made(self) -> nn.Module:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self._prepare(tensor, "")
        for place, value in _attributes(self.model):
            for found in _reachable(value, self.own):
                self._prepare(found, place)
        try:
            copied = copy.deepcopy(self.model, self.memo)
        except Exception as reason:  # copying runs methods of the user's objects
            raise self.error(f"{self._culprit()} cannot be copied: {reason}") from reason
        self._bind(copied)
        return copied

    def _prepare(self, found: Any, place: str) -> None:
        """Say what takes the place of something that deepcopy refuses or hands on as it is."""
        if id(found) in self.memo:
            return
        if isinstance(found, Tensor):
            if not nn.parameter.is_lazy(found) and (not found.is_leaf or found.is_inference()):
                plain = found.detach().clone()
                if isinstance(found, nn.Parameter):
                    plain = nn.Parameter(plain, found.requires_grad)
                self.memo[id(found)] = plain
        elif isinstance(found, types.FunctionType):
            self._refuse_globals(found, place)
            if self._uses_original(found):
                made = _with_new_cells(found)
                self.memo[id(found)] = made
                self.rebound[id(made)] = found, made, place

    def _uses_original(self, found: Any, stop: frozenset[int] = frozenset()) -> bool:
        return any(id(x) in self.own for x in _reachable(found, self.own | stop))

    def _refuse_globals(self, function: types.FunctionType, place: str) -> None:
        if place.rpartition(".")[2].startswith("_"):  # a hook that prints the net is no fault
            return
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, dict):
                value = tuple(value.values())
            items = value if isinstance(value, list | tuple) else (value,)
            if any(isinstance(m, nn.Module) and self._uses_original(m) for m in items):
                raise self.error(self._message(place, f"the global variable {name!r}"))

    def _message(self, place: str, what: str) -> str:
        return (
            f"{place} of {type(self.model).__name__} is a function that uses layers of this very "
            f"model through {what}. A copy of the model would run, and train, the original's "
            "layers. Make it a method of the module's class, or bind it to the module: "
            "module.forward = types.MethodType(function, module)."
        )

    def _bind(self, copied: nn.Module) -> None:
        """Give the functions of the copy its own layers; none may be left with the original's."""
        new = frozenset(id(m) for m in copied.modules())
        for place, value in _attributes(copied):
            for found in _reachable(value, new):
                # It is filled before the search goes on into it.
                if id(found) in self.rebound:
                    self._fill(*self.rebound.pop(id(found)))
                elif _is_callable(found) and self._uses_original(found, new):
                    raise self.error(self._message(place, f"a {type(found).__name__}"))

    def _fill(self, old: types.FunctionType, new: types.FunctionType, place: str) -> None:
        try:
            for before, cell in zip(old.__closure__ or (), new.__closure__ or (), strict=True):
                try:
                    content = before.cell_contents
                except ValueError:  # not assigned yet
                    continue
                cell.cell_contents = copy.deepcopy(content, self.memo)
            new.__defaults__ = copy.deepcopy(old.__defaults__, self.memo)
            new.__kwdefaults__ = copy.deepcopy(old.__kwdefaults__, self.memo)
            new.__dict__.update(copy.deepcopy(old.__dict__, self.memo))
        except Exception as reason:  # as above
            raise self.error(
                f"{self._message(place, 'its closure')} What it closes over cannot be copied: {reason}"
            ) from reason

    def _culprit(self) -> str:
        """Return the attribute that deepcopy stumbles over, or else the model's class."""
        for place, value in _attributes(self.model):
            try:
                copy.deepcopy(value, dict(self.memo))
            except Exception:  # as above
                return f"{place} of {type(self.model).__name__} (a {type(value).__name__})"
        return type(self.model).__name__


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what the modules hold beside parameters, buffers and modules, with its place."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in list(vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                yield f"{path}.{name}" if path else name, value


def _reachable(start: Any, stop: AbstractSet[int]) -> Iterator[Any]:
    """Yield tensors, modules and callables that ``start`` holds; those in ``stop`` end the search."""
    seen: set[int] = set()
    todo = [start]
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, _ATOMIC):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor | nn.Module) or _is_callable(x):
            yield x
        if isinstance(x, Tensor) or id(x) in stop:
            continue
        if isinstance(x, types.FunctionType):
            todo += [x.__defaults__, x.__kwdefaults__, x.__dict__]
            todo += [_content(cell) for cell in x.__closure__ or ()]
        else:
            todo += gc.get_referents(x)


def _is_callable(x: Any) -> bool:
    return callable(x) and not isinstance(x, nn.Module)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _with_new_cells(function: types.FunctionType) -> types.FunctionType:
    """Return the same function over cells that are still empty."""
    closure = tuple(types.CellType() for _ in function.__closure__ or ())
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, None, closure or None
    )
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    made.__doc__, made.__annotations__ = function.__doc__, function.__annotations__
    return made


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
