"""Who asks for its mode while it runs: a forward that does not does the same in training mode.

``module.training`` is an attribute of the instance. For the time of a pass :class:`torch.nn.Module`
gets a descriptor of that name, which hands the value out as before and says who was asked. What is
read from there can be seen; :func:`hides_its_mode` names what cannot.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["depends_on_mode", "hides_its_mode", "noting_modes"]

Note = Callable[[nn.Module], None]


class _Watched:
    """``training`` of a module, as it is kept in the instance; each reader is noted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.notes: list[tuple[int, Note]] = []  # of which thread, and whom to tell

    def __get__(self, module: Any, owner: Any = None) -> Any:
        try:
            value = vars(module)["training"]
        except (KeyError, TypeError):
            raise AttributeError("training") from None
        thread = threading.get_ident()
        for of, note in list(self.notes):
            if of == thread:
                note(module)
        return value

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)["training"] = value

    def __delete__(self, module: Any) -> None:
        del vars(module)["training"]


_watched = _Watched()


@contextmanager
def noting_modes(note: Note) -> Iterator[None]:
    """Call ``note`` with every module whose ``training`` this thread reads meanwhile."""
    entry = (threading.get_ident(), note)
    with _watched.lock:
        _watched.notes.append(entry)
        nn.Module.training = _watched  # type: ignore[assignment]
    try:
        yield
    finally:
        with _watched.lock:
            _watched.notes.remove(entry)
            if not _watched.notes:
                del nn.Module.training


def depends_on_mode(module: nn.Module) -> bool:
    """Whether a module that asks for its mode may do something else in training mode.

    A norm that is frozen there does not, nor does torch's dropout of probability 0.
    """
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return False
    dropout = type(module).__module__ == nn.modules.dropout.__name__
    return not (dropout and getattr(module, "p", None) == 0)


def hides_its_mode(model: nn.Module) -> bool:
    """Whether a module in ``model`` may know its mode without a read that could be seen.

    It is scripted or compiled, or more than its mode changes where it is put into training mode.
    """
    modules = list(model.modules())
    if any(
        isinstance(m, torch.jit.ScriptModule)
        or m._compiled_call_impl is not None
        or not vars(m).keys().isdisjoint(("train", "eval", "_orig_mod"))
        for m in modules
    ):
        return True
    return any(_class_hides(cls) for cls in {type(m) for m in modules})


def _class_hides(cls: type[nn.Module]) -> bool:
    if cls.train is not nn.Module.train or cls.eval is not nn.Module.eval:
        return True
    return any(
        name == "training" or hasattr(value, "_torchdynamo_orig_callable")
        for each in cls.__mro__
        if each is not nn.Module
        for name, value in vars(each).items()
    )
