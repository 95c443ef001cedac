"""The layers beside a segment, as they start: fitted in closed form to what the segment computes.

A conv is linear in the patches it reads, so the one nearest to a segment, in the least squares over some
data, solves (X'X + r I) W = X'Y with X the patches and Y what the segment makes of them (before its
last activation). A depthwise and a 1x1 conv are not linear together. The depthwise kernel of a
channel is taken first, by itself: of all kernels the one whose output explains most of Y, which is the
first eigenvector of (X_c'X_c)^-1 X_c'Y Y'X_c (Y projected on a few random directions). Given these, the
1x1 conv is a least-squares problem again. Everything is summed up in float64 over blocks of rows, so
memory does not grow with the data.

Without data, a segment that is one conv starts at its own kernel: what of it the smaller one can hold.
Any other starts at zero.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..analysis.candidates import Candidate
from ..analysis.graph import Graph
from ..analysis.inputs import evaluating
from ..analysis.recorder import restored
from ..analysis.segments import ACTIVATIONS, with_shortcut
from ..errors import ConversionError, DataError
from ..nn.shortcuts import Shortcut, built
from ..recovery.recalibration import run_batch

__all__ = ["fitted"]

_ROWS = 4096  # patches of one batch
_CELLS = 2**23  # numbers in a block of patches
_MOST_BATCHES = 64
_MOST_TAPS = 2304  # inputs of a dense conv that is fitted: its moments are their square
_RIDGE = 1e-4  # of the mean square of an input
_DIRECTIONS = 16
_Step = Callable[["_Fit", Tensor, Tensor, torch.Generator], None]


def fitted(
    model: nn.Module,
    graph: Graph,
    candidates: list[Candidate],
    batches: Iterable[Any] | None,
) -> list[Candidate]:
    """Return the candidates with the start of each segment's layers, chosen among its options.

    The model is run in eval mode, twice on each batch, and left as it was.

    Raises:
        ConversionError: there is no batch, or it does not run on one.
    """
    segments = [c for c in candidates if c.shortcut is not None]
    if not segments:
        return candidates
    if batches is None:
        made = {id(c): replace(c, start=_without_data(model, graph, c)) for c in segments}
        return [made.get(id(c), c) for c in candidates]
    held = list(islice(batches, _MOST_BATCHES))
    if not held:
        raise ConversionError("batches holds no batch to fit the segments' convs to.")
    # A dense conv that is too wide to be solved for starts as it does without data.
    fits = {id(c): [_Fit(c, s) for s in c.options if _is_small(s)] for c in segments}
    for step in (_Fit.see_channels, _Fit.see):
        _run(model, graph, segments, held, fits, step)
    chosen = {}
    for c in segments:
        whole = sum(graph.nodes[i].macs for i in c.nodes)
        solved = [(f, *f.solve()) for f in fits[id(c)]]
        if not solved:
            chosen[id(c)] = replace(c, start=_without_data(model, graph, c))
            continue
        fit, numbers, residual = min(
            solved, key=lambda s: s[0].shortcut.macs_each * c.positions / whole + s[2]
        )
        chosen[id(c)] = replace(with_shortcut(c, fit.shortcut, residual), start=numbers)
    return [chosen.get(id(c), c) for c in candidates]


def _is_small(shortcut: Shortcut) -> bool:
    return (
        shortcut.kind != "dense" or shortcut.in_channels * math.prod(shortcut.kernel) <= _MOST_TAPS
    )


def _run(
    model: nn.Module,
    graph: Graph,
    segments: list[Candidate],
    batches: list[Any],
    fits: dict[int, list["_Fit"]],
    step: "_Step",
) -> None:
    """Hand each segment's inputs and outputs to its fits, batch by batch."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with evaluating(model), restored(model), ExitStack() as hooks:
        for c in segments:
            tap = _Tap(c, partial(_hand_on, fits[id(c)], step, generator))
            hooks.enter_context(tap.on(model.get_submodule(c.gate)))
        for batch in batches:
            try:
                run_batch(model, batch, device)
            except DataError:
                raise
            except Exception as error:
                raise ConversionError(
                    f"{type(model).__name__} does not run on one of the batches "
                    f"({type(error).__name__}: {error})."
                ) from error


def _hand_on(
    fits: list["_Fit"], step: "_Step", generator: torch.Generator, x: Tensor, y: Tensor
) -> None:
    for fit in fits:
        step(fit, x, y, generator)


class _Tap:
    """Sees what a segment reads, and what it makes before its last activation."""

    def __init__(self, c: Candidate, take: Callable[[Tensor, Tensor], Any]) -> None:
        assert c.shortcut is not None
        self.take, self.ends = take, c.shortcut.activation
        self.x: Tensor | None = None
        self.seen: _LastActivation | None = None

    @contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        before = module.register_forward_pre_hook(self._before)
        after = module.register_forward_hook(self._after)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.x = args[0].clone()
        if self.ends is not None:
            self.seen = _LastActivation()
            self.seen.__enter__()  # type: ignore[no-untyped-call]

    def _after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        y = output
        if self.seen is not None:
            self.seen.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            assert self.seen.read is not None
            y, self.seen = self.seen.read, None
        assert self.x is not None
        self.take(self.x, y)
        self.x = None


class _LastActivation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what the last activation of a forward reads, written in place or not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: Tensor | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name.split("::")[-1].removesuffix("_") in ACTIVATIONS:
            self.read = args[0].clone()
        return func(*args, **(kwargs or {}))


class _Fit:
    """The least-squares fit of one kind of layers to one segment."""

    def __init__(self, c: Candidate, shortcut: Shortcut) -> None:
        self.candidate, self.shortcut = c, shortcut
        self.taps = math.prod(shortcut.kernel)
        channels = shortcut.in_channels
        separable = shortcut.kind == "separable"
        self.inputs = channels if separable else channels * self.taps
        self.depthwise: Tensor | None = None  # (C, taps)
        self.gram = torch.zeros(self.inputs + 1, self.inputs + 1, dtype=torch.float64)
        self.cross = torch.zeros(self.inputs + 1, shortcut.out_channels, dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)
        if separable:
            some = torch.Generator().manual_seed(0)
            self.directions = torch.randn(
                shortcut.out_channels, _DIRECTIONS, generator=some, dtype=torch.float64
            )
            self.own = torch.zeros(channels, self.taps, self.taps, dtype=torch.float64)
            self.with_y = torch.zeros(channels, self.taps, _DIRECTIONS, dtype=torch.float64)
            self.mean_x = torch.zeros(channels, self.taps, dtype=torch.float64)
            self.mean_y = torch.zeros(_DIRECTIONS, dtype=torch.float64)
            self.rows = 0

    def see_channels(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """Sum up what the depthwise kernels are taken from."""
        if self.shortcut.kind != "separable":
            return
        for patches, made in self._blocks(x, y, generator):
            p = patches.transpose(0, 1)  # (C, rows, taps)
            seen = made @ self.directions
            self.own += p.transpose(1, 2) @ p
            self.with_y += p.transpose(1, 2) @ seen
            self.mean_x += p.sum(1)
            self.mean_y += seen.sum(0)
            self.rows += len(made)

    def see(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """Sum up the moments of the inputs and outputs of the conv that is solved for."""
        for patches, made in self._blocks(x, y, generator):
            rows = self._features(patches)
            rows = F.pad(rows, (0, 1), value=1.0)
            self.gram += rows.T @ rows
            self.cross += rows.T @ made
            self.squares += made.square().sum()

    def _features(self, patches: Tensor) -> Tensor:
        if self.shortcut.kind != "separable":
            return patches.flatten(1)
        if self.depthwise is None:
            self.depthwise = self._kernels()
        return torch.einsum("rct,ct->rc", patches, self.depthwise)

    def _kernels(self) -> Tensor:
        """Return the kernel of each channel that explains most of the output by itself."""
        n = max(self.rows, 1)
        own = self.own / n - self.mean_x[:, :, None] * self.mean_x[:, None, :] / n**2
        with_y = self.with_y / n - self.mean_x[:, :, None] * self.mean_y / n**2
        size = own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        own = own + 1e-3 * size[:, None, None] * torch.eye(self.taps, dtype=own.dtype)
        root = torch.linalg.cholesky(own)
        turned = torch.linalg.solve_triangular(root, with_y, upper=False)
        first = torch.linalg.svd(turned).U[:, :, :1]
        kernels = torch.linalg.solve_triangular(root.transpose(1, 2), first, upper=True)[:, :, 0]
        return F.normalize(kernels, dim=1)

    def _blocks(
        self, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield patches (rows, C, taps) and outputs (rows, O), of random positions if there are many."""
        x, y = x.detach().double().cpu(), y.detach().double().cpu()
        out = y.shape[2:]
        positions = len(y) * math.prod(out)
        rows = torch.arange(positions)
        if positions > _ROWS:
            rows = torch.randperm(positions, generator=generator)[:_ROWS].sort().values
        s = self.shortcut
        padded = F.pad(x, [n for p in reversed(s.padding) for n in (p, p)])
        step = max(1, _CELLS // (s.in_channels * self.taps))
        made = y.movedim(1, -1).reshape(positions, -1)
        for block in torch.split(rows, step):
            image, at = block // math.prod(out), block % math.prod(out)
            places = []
            for size in reversed(out):
                places.append(at % size)
                at = at // size
            where = [p * stride for p, stride in zip(places[::-1], s.stride, strict=True)]
            taps = []
            for offset in _offsets(s.kernel):
                index = [w + o for w, o in zip(where, offset, strict=True)]
                taps.append(padded.movedim(1, -1)[(image, *index)])
            yield torch.stack(taps, 2), made[block]

    def solve(self) -> tuple[dict[str, Tensor], float]:
        """Return the numbers of the layers, and the share of the variance they do not explain."""
        n = float(self.gram[-1, -1])
        mean = self.gram[-1, :-1] / n
        target = self.cross[-1] / n
        spread = self.gram[:-1, :-1] / n - mean[:, None] * mean
        with_y = self.cross[:-1] / n - mean[:, None] * target
        ridge = _RIDGE * float(spread.diagonal().mean()) + 1e-12
        kernel = torch.linalg.solve(
            spread + ridge * torch.eye(len(spread), dtype=spread.dtype), with_y
        )
        total = float(self.squares / n - target.square().sum())
        left = total - 2 * float((kernel * with_y).sum())
        left += float((kernel * (spread @ kernel)).sum())
        residual = min(1.0, max(0.0, left / total)) if total > 0 else 0.0
        variance = (kernel * (spread @ kernel)).sum(0).clamp_min(0)
        bias = target - mean @ kernel
        return self._numbers(kernel.T, bias, mean @ kernel, variance), residual

    def _numbers(
        self, kernel: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
    ) -> dict[str, Tensor]:
        s, dims = self.shortcut, len(self.shortcut.kernel)
        layers = built(s.layers(), None)
        numbers = layers.state_dict()
        at = 0
        if s.kind == "separable":
            assert self.depthwise is not None
            numbers["0.weight"] = self.depthwise.reshape(s.in_channels, 1, *s.kernel)
            numbers["1.weight"] = kernel.reshape(*kernel.shape, *[1] * dims)
            at = 1
        else:
            numbers["0.weight"] = kernel.reshape(s.out_channels, s.in_channels, *s.kernel)
        if s.norm:
            norm: Any = layers[at + 1]
            numbers |= {
                f"{at + 1}.running_mean": mean,
                f"{at + 1}.running_var": variance,
                f"{at + 1}.weight": (variance + norm.eps).sqrt(),
                f"{at + 1}.bias": bias + mean,
            }
        else:
            numbers[f"{at}.bias"] = bias
        return {
            k: v.to(layers.state_dict()[k].dtype) if not v.is_floating_point() else v
            for k, v in numbers.items()
        }


def _offsets(kernel: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the taps of a kernel in the order of its memory."""
    grids = torch.meshgrid(*(torch.arange(k) for k in kernel), indexing="ij")
    return [tuple(int(g) for g in row) for row in torch.stack(grids, -1).reshape(-1, len(kernel))]


def _without_data(model: nn.Module, graph: Graph, c: Candidate) -> dict[str, Tensor]:
    """Return the start of a segment's layers that no data was given for."""
    s = c.shortcut
    assert s is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        numbers = built(s.layers(), None).state_dict()
    last = 1 if s.kind == "separable" else 0
    module: Any = model.get_submodule(c.gate)
    kernel = _own_kernel(module, s)
    if kernel is None:
        # The gradient finds its way in by what is zero last.
        zero = [f"{last + 1}.weight"] if s.norm else [f"{last}.weight", f"{last}.bias"]
        return {k: torch.zeros_like(v) if k in zero else v for k, v in numbers.items()}
    if s.kind == "separable":
        # Of each input channel the kernel that is nearest to all those it meets.
        rows = kernel.flatten(2).transpose(0, 1)  # (C, O, taps)
        u, size, v = torch.linalg.svd(rows, full_matrices=False)
        numbers["0.weight"] = v[:, :1].reshape(numbers["0.weight"].shape)
        points = (u[:, :, 0] * size[:, :1]).T
        numbers["1.weight"] = points.reshape(numbers["1.weight"].shape)
    else:
        numbers["0.weight"] = kernel
    if module.bias is not None:
        numbers[f"{last}.bias"] = module.bias.detach().double()
    else:
        numbers[f"{last}.bias"] = torch.zeros_like(numbers[f"{last}.bias"])
    return numbers


def _own_kernel(module: nn.Module, s: Shortcut) -> Tensor | None:
    """Return what of a conv's own kernel fits into the shortcut's, or None where it is no conv."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or module.groups != 1 or s.norm:
        return None
    kernel = module.weight.detach().double().cpu()
    if s.kind == "pointwise":
        # A smooth map looks the same at every tap.
        return kernel.flatten(2).sum(2).reshape(*kernel.shape[:2], *s.kernel)
    if isinstance(module.padding, str) or max(module.dilation) > 1:
        return None
    for dim, (had, has, before, padding) in enumerate(
        zip(module.kernel_size, s.kernel, module.padding, s.padding, strict=True), 2
    ):
        cut = before - padding
        if cut < 0 or cut + has > had:
            return None
        kernel = kernel.narrow(dim, cut, has)
    return kernel
