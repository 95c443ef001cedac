"""How scales and controls move: beside the user's optimizer, not by it.

Scalars with a large gradient overshoot, so they get no weight decay, no momentum, a smaller rate and
a bounded step. They stay in the optimizer's groups, so that ``zero_grad``, gradient clipping and
``GradScaler`` see them; only while it steps are their gradients put aside, and it skips them. Then
they are moved here, with the largest rate that its groups have at that moment. So every scheduler
works, made before or after, and groups and state of the optimizer keep their layout.

    SGD and its kin   x <- x - rate * clamp(g, -1, 1)
    all others        v <- 0.999 v + 0.001 g^2,  x <- x - rate * clamp(g / sqrt(v / (1 - 0.999^t)), -1, 1)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConversionError

__all__ = ["Scalars", "by_name", "like", "stack"]

_BETA = 0.999


class Scalars:
    """Moves ``params`` after each step of the optimizer it is attached to.

    Gradients and changes are one vector, in the order of ``params``: on a GPU a launch for each scalar
    would take longer than the step of a small net.

    Args:
        params: the scalars by name.
        share: of the optimizer's rate.
        prepare: sees (and may change) the gradients before the move: float32, and bool where there
            is one (0 elsewhere), both (number of scalars,).
        finish: is called after the move, with the optimizer.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        share: float,
        prepare: Callable[[Tensor, Tensor], None],
        finish: Callable[[Optimizer], None],
    ) -> None:
        self.params = dict(params)
        self.share, self.prepare, self.finish = share, prepare, finish
        self.steps = 0
        self._squares: Tensor | None = None  # by scalar, on the device
        self._taken: dict[int, Tensor] = {}
        self._rows: tuple[int, ...] = ()  # of the scalars that have a gradient
        self._seen: Tensor | None = None  # the same as a mask, on the device
        self._handles: list[Any] = []

    def attach(self, optimizer: Optimizer) -> None:
        """Follow ``optimizer`` from now on, and no other.

        Raises:
            ConversionError: it does not hold the scalars, or has no learning rate.
        """
        optimizer = stepping(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        out = [n for n, p in self.params.items() if p.requires_grad and id(p) not in held]
        if out:
            raise ConversionError(
                f"The optimizer does not hold {len(out)} of {len(self.params)} scalars "
                f"({', '.join(out[:3])}{', ...' if len(out) > 3 else ''}). resconv.convert returns "
                "a copy: make the optimizer from the parameters of the converted model, after "
                "converting it."
            )
        if not self._rates(optimizer):
            raise ConversionError(
                f"{type(optimizer).__name__} has no learning rate in its groups, which the scales "
                "would follow. Give it one (lr=...)."
            )
        self.detach()
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def values(self) -> Tensor:
        """Return all scalars as one vector."""
        return stack(list(self.params.values()))

    def _rates(self, optimizer: Optimizer) -> list[float]:
        groups = [g for g in optimizer.param_groups if g["params"]]
        return [float(g["lr"]) for g in groups if g.get("lr") is not None]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._taken = {}
        where = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if where is None:
            self._take()
            return None

        # The gradients are made inside the step (Lightning's loop, LBFGS).
        def closure() -> Any:
            loss = where()
            self._take()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _take(self) -> None:
        for param in self.params.values():
            if param.grad is not None:
                self._taken[id(param)] = param.grad
                param.grad = None

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for param in self.params.values():
            if id(param) in self._taken:
                param.grad = self._taken[id(param)]
        # A fused optimizer is handed the factor of a GradScaler, and told to skip the step.
        skip = getattr(optimizer, "found_inf", None)
        if skip is not None and bool(skip):
            return
        factor = getattr(optimizer, "grad_scale", None)
        taken, self._taken = self._taken, {}
        if taken:
            grads, seen = self._as_vectors(taken)
            if factor is not None:
                grads = grads / factor.to(grads.device)
            self.prepare(grads, seen)
            self._move(optimizer, grads, seen)
        self.finish(optimizer)

    def _as_vectors(self, taken: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the gradients, 0 where there is none, and where there is one."""
        rows = tuple(i for i, p in enumerate(self.params.values()) if id(p) in taken)
        # On the device of the first, as what `values` returns.
        none = torch.zeros((), device=next(iter(self.params.values())).device)
        grads = stack([taken.get(id(p), none) for p in self.params.values()])
        if self._seen is None or rows != self._rows or self._seen.device != grads.device:
            self._rows = rows
            self._seen = torch.zeros(len(self.params), dtype=torch.bool)
            self._seen[list(rows)] = True
            self._seen = self._seen.to(grads.device)
        return grads, self._seen

    def _move(self, optimizer: Optimizer, grads: Tensor, seen: Tensor) -> None:
        rate = max(self._rates(optimizer)) * self.share
        changes = grads
        if not _steps_by_gradient(optimizer):
            changes = self._normalise(grads, seen)
        up = any(g.get("maximize") for g in optimizer.param_groups)
        every = list(self.params.values())
        moved: list[Tensor] = [every[i] for i in self._rows]
        pieces = changes.clamp(-1.0, 1.0).unbind()
        steps = like(moved, [pieces[i] for i in self._rows])
        torch._foreach_add_(moved, steps, alpha=rate if up else -rate)

    def _normalise(self, grads: Tensor, seen: Tensor) -> Tensor:
        """Divide each gradient by its running size; nothing here waits for the device."""
        self.steps += 1
        if self._squares is None:
            self._squares = torch.zeros(len(self.params), device=grads.device)
        old = self._squares.to(grads.device)
        square = grads.square()
        counts = seen & square.isfinite()
        self._squares = torch.where(counts, _BETA * old + (1 - _BETA) * square, old)
        size = (self._squares / (1 - _BETA**self.steps)).sqrt() + 1e-12
        return grads / size

    def state_dict(self) -> dict[str, Any]:
        squares = [] if self._squares is None else self._squares.tolist()
        return {"steps": self.steps, "squares": dict(zip(self.params, squares, strict=False))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        saved = state["squares"]
        self._squares = torch.tensor([saved.get(n, 0.0) for n in self.params]) if saved else None


def stepping(optimizer: Any) -> Optimizer:
    """Return the torch optimizer that takes the steps, inside what only hands calls on to it.

    Such are accelerate's AcceleratedOptimizer and fastai's OptimWrapper.

    Raises:
        ConversionError: it has no hooks around its steps, or moves the parameters after the
            optimizer inside it (Lookahead).
    """
    name, given = type(optimizer).__name__, optimizer
    seen: set[int] = set()
    while "lookahead" not in type(optimizer).__name__.lower() and id(optimizer) not in seen:
        seen.add(id(optimizer))
        # torch wraps the step of what was initialised as an Optimizer, so that hooks run.
        hooked = getattr(getattr(type(optimizer), "step", None), "hooked", False)
        if hooked and "_optimizer_step_pre_hooks" in vars(optimizer):
            return optimizer  # type: ignore[no-any-return]
        inside = (getattr(optimizer, n, None) for n in ("optimizer", "opt", "_optimizer"))
        optimizer = next((o for o in inside if hasattr(o, "param_groups")), optimizer)
    raise ConversionError(
        f"{name} cannot be followed: it takes no steps that hooks of torch.optim.Optimizer see"
        + (
            ", and moves the parameters after the optimizer inside it. "
            if "lookahead" in type(given).__name__.lower()
            else ". "
        )
        + "Attach the Sparsifier to a torch.optim.Optimizer that takes the steps itself, such as "
        "SGD or AdamW."
    )


def _steps_by_gradient(optimizer: Optimizer) -> bool:
    """Whether the rate is meant for raw gradients (SGD, LARS), not for normalised ones (Adam)."""
    return any("dampening" in group for group in optimizer.param_groups)


def stack(scalars: list[Tensor]) -> Tensor:
    """Return the scalars as one float32 vector, on the device of the first."""
    device = scalars[0].device
    return torch.stack([s.detach().to(device, torch.float32) for s in scalars])


def like(scalars: list[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Return each of the values in the type and on the device of its scalar."""
    return [v.to(s.device, s.dtype) for s, v in zip(scalars, values, strict=True)]


def by_name(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Read all values in one transfer."""
    if not scalars:
        return {}
    first = next(iter(scalars.values()))
    values = torch.stack([s.detach().to(first.device, first.dtype) for s in scalars.values()])
    return dict(zip(scalars, values.tolist(), strict=True))
