"""Modules whose forward was rewritten, and modules that only pass their input on.

A rewritten module stays an instance of its own class: its type is a subclass of the same name with
another ``forward``, which has the original's signature. All else (methods, attributes, names of
parameters) is as it was. The code is kept as text with the objects it names, so that the module can
be copied and pickled wherever its own class can be imported.
"""

import inspect
import types
from typing import Any

import torch
from torch import Tensor, fx, nn

from .arguments import FREE

__all__ = [
    "Blended",
    "Clone",
    "Factor",
    "PassThrough",
    "Softened",
    "attributes_of",
    "of_user",
    "own_class",
    "rewrite_forward",
    "stand_in",
]


def _same(value: Any, constant: Any) -> bool:
    if constant is None or value is None:
        return value is constant
    return not isinstance(value, Tensor) and bool(value == constant)


def _refuse(place: str, value: Any) -> None:
    raise AssertionError(
        f"{place} was rewritten by resconv for the arguments of its example, and is called with "
        f"another kind of argument here ({type(value).__name__}). Convert and prune with an example "
        "of the arguments that you use."
    )


class Code:
    """The text of a forward with the objects it names; makes the class that runs it."""

    def __init__(self, base: type[nn.Module], source: str, names: dict[str, Any]) -> None:
        self.base, self.source, self.names = base, source, names
        self._made: type[nn.Module] | None = None

    def made(self) -> type[nn.Module]:
        """Return the subclass of ``base`` that runs this code."""
        if self._made is None:
            names = dict(self.names) | {"_same": _same, "_refuse": _refuse, "torch": torch}
            exec(compile(self.source, f"<rewritten {self.base.__name__}>", "exec"), names)
            forward: Any = names["forward"]
            forward.__signature__ = inspect.signature(self.base.forward)
            forward.__doc__ = self.base.forward.__doc__
            inner = {
                "forward": forward,
                "resconv_code": self,
                "__reduce_ex__": _reduce,
                "__module__": self.base.__module__,
                "__qualname__": self.base.__qualname__,
                "__doc__": self.base.__doc__,
            }
            self._made = type(self.base.__name__, (self.base,), inner)
        return self._made

    def __deepcopy__(self, memo: Any) -> "Code":
        return self

    def __reduce__(self) -> Any:
        # Modules are no objects that pickle knows.
        plain = {k: v for k, v in self.names.items() if not isinstance(v, types.ModuleType)}
        modules = {k: v.__name__ for k, v in self.names.items() if isinstance(v, types.ModuleType)}
        return _read_code, (self.base, self.source, plain, modules)


def _read_code(
    base: type[nn.Module], source: str, plain: dict[str, Any], modules: dict[str, str]
) -> Code:
    imported = {k: __import__(name, fromlist=["_"]) for k, name in modules.items()}
    return Code(base, source, plain | imported)


def _new(code: Code) -> nn.Module:
    made = code.made()
    return made.__new__(made)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    code: Code = type(self).resconv_code  # type: ignore[attr-defined]
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # type: ignore[no-untyped-call]
    return _new, (code,), state


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module had before its forward was rewritten."""
    code = getattr(type(module), "resconv_code", None)
    return code.base if isinstance(code, Code) else type(module)


def rewrite_forward(
    module: nn.Module,
    arguments: dict[str, Any],
    graph: fx.Graph,
    training: fx.Graph | None = None,
) -> None:
    """Let the module's forward run the graph (in place); with ``training``, that one in training.

    ``arguments`` says, for each parameter, which parts of it the placeholders stand for.
    """
    base = own_class(module)
    parts: list[str] = []
    names: dict[str, Any] = {}
    for name, each in (("_forward", graph), ("_forward_in_training", training)):
        if each is not None:
            written = each.python_code("self")
            parts.append(written.src.strip().replace("def forward(", f"def {name}(", 1))
            # torch is put in by name; what else the code names comes along.
            names |= {k: v for k, v in written.globals.items() if k in written.src and k != "torch"}
    lines, given = _unpacking(arguments, base.__qualname__)
    signature = inspect.signature(base.forward)
    itself = next(iter(signature.parameters))
    call = ", ".join([itself, *given])
    head, defaults = _header(signature)
    if training is not None:
        lines += [f"if {itself}.training:", f"    return _forward_in_training({call})"]
    lines.append(f"return _forward({call})")
    parts.append(f"def forward({head}):\n" + "\n".join(f"    {line}" for line in lines))
    source = "\n\n\n".join(parts) + "\n"
    # A forward that was put on the instance alone would hide the new one.
    module.__dict__.pop("forward", None)
    module.__class__ = Code(base, source, names | defaults).made()


def _header(signature: inspect.Signature) -> tuple[str, dict[str, Any]]:
    """Return the parameter list as code, and the default values it names."""
    parts: list[str] = []
    defaults: dict[str, Any] = {}
    kinds = inspect.Parameter
    before: Any = None
    for name, p in signature.parameters.items():
        if before is kinds.POSITIONAL_ONLY and p.kind is not kinds.POSITIONAL_ONLY:
            parts.append("/")
        if p.kind is kinds.KEYWORD_ONLY and before not in (
            kinds.KEYWORD_ONLY,
            kinds.VAR_POSITIONAL,
        ):
            parts.append("*")
        stars = "*" if p.kind is kinds.VAR_POSITIONAL else ""
        stars = "**" if p.kind is kinds.VAR_KEYWORD else stars
        default = ""
        if p.default is not kinds.empty:
            defaults[f"_default_{name}"] = p.default
            default = f"=_default_{name}"
        parts.append(f"{stars}{name}{default}")
        before = p.kind
    if before is kinds.POSITIONAL_ONLY:
        parts.append("/")
    return ", ".join(parts), defaults


def _unpacking(arguments: dict[str, Any], place: str) -> tuple[list[str], list[str]]:
    """Return code that takes the arguments apart, and the expressions of their free parts."""
    lines: list[str] = []
    given: list[str] = []

    def require(condition: str, text: str) -> None:
        lines.extend([f"if not ({condition}):", f"    _refuse({place!r}, {text})"])

    def look(shape: Any, text: str) -> None:
        if shape is FREE:
            given.append(text)
        elif isinstance(shape, tuple | list):
            require(f"isinstance({text}, (tuple, list)) and len({text}) == {len(shape)}", text)
            for i, part in enumerate(shape):
                look(part, f"{text}[{i}]")
        elif isinstance(shape, dict):
            require(f"isinstance({text}, dict) and sorted({text}) == {sorted(shape)!r}", text)
            for key, part in shape.items():
                look(part, f"{text}[{key!r}]")
        else:
            require(f"_same({text}, {shape!r})", text)

    for name, shape in arguments.items():
        if shape == () or shape == {}:
            require(f"not {name}", name)
        else:
            look(shape, name)
    return lines, given


class Clone(nn.Module):
    """Copies its input, which an in-place operation behind it would otherwise overwrite.

    With ``only_for_gradients``, where only the backward pass needs what would be overwritten.
    """

    def __init__(self, only_for_gradients: bool = False) -> None:
        super().__init__()
        self.only_for_gradients = only_for_gradients

    def forward(self, x: Tensor) -> Tensor:
        return x.to(x.dtype, copy=x.requires_grad if self.only_for_gradients else True)


class Factor(nn.Module):
    """Multiplies by a constant that no layer could absorb."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:.6g}"


class Blended(nn.Module):
    """``left + factor * (whole - left)``: a segment whose scale ended neither at 0 nor at 1."""

    def __init__(self, whole: nn.Module, left: nn.Module, factor: float) -> None:
        super().__init__()
        self.left = left
        self.whole = whole
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        whole: Tensor = self.whole(x)
        return torch.lerp(left.to(whole.dtype), whole, self.factor)

    def extra_repr(self) -> str:
        return f"{self.factor:.6g}"


class Softened(Factor):
    """Brings numbers nearer to 1, by a constant: what is left of a gate that went halfway."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 + self.factor * (x - 1)


class PassThrough(nn.Identity):
    """An identity in the place of a removed module, with the plain attributes that it had.

    Others may read them: detectors keep feature maps by attributes of blocks. It takes whatever
    arguments the module took, and returns the first.
    """

    def __init__(self, name: str = "input") -> None:
        super().__init__()
        self._name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs[self._name]

    def extra_repr(self) -> str:
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())


def stand_in(module: nn.Module) -> nn.Module:
    """Return what takes the place of a module that only passes its input on.

    An ``nn.Identity`` where the module had no attributes or further arguments of its own.
    """
    if isinstance(module, nn.Identity):
        return module
    kept = attributes_of(module)
    names = list(inspect.signature(own_class(module).forward).parameters)[1:]
    if not kept and (len(names) <= 1 or not of_user(module)):
        return nn.Identity().train(module.training)
    made = PassThrough(names[0] if names else "input")
    vars(made).update(kept)
    return made.train(module.training)


def of_user(module: nn.Module) -> bool:
    """Whether the module's class is not one of torch's own."""
    return not own_class(module).__module__.startswith("torch.nn.")


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the public attributes that are neither tensors, modules, functions nor torch's own."""
    standard = set(vars(nn.Module()))
    for cls in own_class(module).__mro__:
        if cls.__module__.startswith("torch."):
            standard |= set(getattr(cls, "__annotations__", ()))
            standard |= set(cls.__dict__.get("__constants__", ()))
            if cls.__module__.startswith("torch.nn.modules"):
                standard |= set(inspect.signature(cls).parameters)
    return {
        name: value
        for name, value in vars(module).items()
        if name not in standard and not name.startswith("_") and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    return isinstance(
        value, bool | int | float | complex | str | bytes | type(None) | torch.dtype | torch.device
    )
