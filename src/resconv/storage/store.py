"""A network in a folder: ``model.safetensors`` for the numbers, ``model.json`` for everything else.

The JSON (see schema.py) names the source of the architecture, the structural edits that made the
net compact, and the gates of a net in training form; loading builds the first, replays the
second, puts in the third, and copies the numbers in. Nothing is
unpickled, and no code comes from the folder: a source outside resconv, timm and torchvision is
built only when the caller says so, or hands in the model.
"""

import copy
import hashlib
import json
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..analysis.input_spec import describe_inputs, make_inputs
from ..analysis.inputs import as_call, evaluating, to_device_of, unwrap
from ..analysis.recorder import restored
from ..errors import LoadError, ResConvError, SaveError
from ..files import write_together
from ..planning.plan import Plan
from ..surgery.copying import copy_model
from ..surgery.edits import apply_edits
from ..surgery.state import State, plan_of, record_of
from ..surgery.verification import relative_error, tolerance_for
from ..version import __version__
from .schema import (
    FORMAT_VERSION,
    check_source,
    describe_modules,
    differing_modules,
    read_header,
    seal,
)
from .training_form import describe_gates, insert_gates

__all__ = ["FORMAT_VERSION", "load", "read_header", "save"]

_MAX_CALLS = 60_000  # operations that building a network may take; the largest take some 20,000
_MAX_BUILT_AGAIN = 2**30  # bytes of a net that is built once more to be compared
_CALLS, _CALLS_EACH = 4_000, 60  # and those of one with so many modules left
_MAX_HEADER = 8 * 2**20  # of safetensors: some 50,000 tensors
_MOST_BYTES = 768 * 2**20  # above the file's own: how much larger the net before pruning may be
_LARGE = 2**22  # elements: what may come of less is not worth asking in advance
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save(
    model: nn.Module, path: str | Path, *, plan: Plan | None = None, example_inputs: Any = None
) -> Path:
    """Write a network (pruned, fused, dense, or still in training form) into the folder ``path``.

    Every parameter and buffer, also one that is not in the state dict, keeps its dtype,
    ``requires_grad``, channels-last layout and sharing; other files in the folder stay. Both files
    are written beside, read back and compared, and moved into place: a crash leaves the old net or
    none, never half of one. The weights are compared bit by bit; where the net can be built again
    (it came from ``resconv.nets.create`` and has at most 1 GiB) so are its outputs.

    ``example_inputs`` (a tensor, tuple or dict) give the input signature that is saved, ``plan`` is
    kept beside it; by default both are those that the net carries from ``convert`` and ``prune``.
    Returns the folder; ``model`` is left as it was.

    Raises:
        SaveError: the model holds what plain tensors cannot, the folder cannot be written, or what
            was read back is not what was written.

    Warns:
        UserWarning: the net was changed since it was created, so that only
            ``load(path, model=...)`` can bring it back.

    Example:
        >>> model = resconv.convert(net, images, start="identity")
        >>> path = resconv.save(resconv.prune(model, resconv.Plan(("3",))), "compact")
        >>> sorted(file.name for file in path.iterdir())
        ['model.json', 'model.safetensors']
    """
    model = unwrap(model)
    folder = Path(path)
    if folder.is_file():
        raise SaveError(f"{folder} is a file; a network is saved into a folder.")
    tensors, shared = _tensors(model)
    header = _header(model, plan, example_inputs, shared)

    def write(files: Any) -> None:
        weights, description = files
        save_file(tensors, weights)
        _compare_weights(weights, tensors)
        with weights.open("rb") as file:
            header["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        header["num_bytes"] = weights.stat().st_size
        description.write_text(json.dumps(seal(header), indent=2) + "\n", encoding="utf-8")
        _compare_nets(weights.parent, model, header)

    try:
        write_together([folder / "model.safetensors", folder / "model.json"], write)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"{folder} cannot be written: {error}. A network saved there before is untouched."
        ) from error
    return folder


@torch.inference_mode(False)
def load(
    path: str | Path,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    trust_source: bool = False,
) -> nn.Module:
    """Return the network saved in the folder ``path``, on the CPU and in eval mode.

    One in training form has its gates, scales and controls again: call ``train()`` and go on, then
    ``prune`` and ``fuse`` it as the net that was saved. Its example inputs are random ones of the
    saved signature.

    Args:
        path: what :func:`save` wrote.
        model: the net as it was before pruning, or a function that makes it. Needed where the
            file names no source; it is copied.
        trust_source: allow a source ``package.module:factory``, which imports and runs that
            package of this machine, and keywords that nothing is known about. Built-in, timm and
            torchvision nets need no permission.

    Raises:
        LoadError: the folder is missing, changed, truncated, from a newer format, hostile, or does
            not fit the model; all faults found are listed.

    Example:
        >>> path = resconv.save(resconv.convert(net, images), "trained")
        >>> model = resconv.load(path, model=net)
        >>> list(resconv.gates(model))
        ['0', '3', '6']
    """
    folder = Path(path)
    header = read_header(folder)
    tensors = _read_weights(folder / "model.safetensors", header)
    try:
        net = _build(header, folder, tensors, model, trust_source)
        _check_structure(net, header, folder)
        _fill(net, tensors, header, folder)
    except LoadError:
        raise
    except ResConvError as error:
        raise LoadError(f"{folder / 'model.json'} does not fit its source: {error}") from error
    except Exception as error:  # whatever a hostile file may set off in torch is its own fault
        raise LoadError(
            f"{folder / 'model.json'} cannot be carried out: {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from error
    if header["gates"] is None:
        net.resconv_record = {  # type: ignore[assignment]
            **{k: header[k] for k in ("source", "edits", "inputs")},
            "plan": _plan_in(header),
        }
    else:
        net.__dict__.pop("resconv_record", None)  # of the dense net that was given
        inputs = make_inputs(header["inputs"], torch.Generator().manual_seed(0))
        net.resconv_state = State(  # type: ignore[assignment]
            inputs, header["source"], header["edits"], _plan_in(header)
        )
    return net.eval()


def _plan_in(header: dict[str, Any]) -> Plan | None:
    return None if header["plan"] is None else Plan.from_json(json.dumps(header["plan"]))


def _compare_weights(weights: Path, tensors: dict[str, Tensor]) -> None:
    """Read the file back, one tensor at a time, and compare it with what was to be written."""
    with safe_open(weights, "pt") as file:
        for name, tensor in tensors.items():
            back = file.get_tensor(name)
            if (back.dtype, back.shape) != (tensor.dtype, tensor.shape) or not torch.equal(
                back.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)
            ):
                raise SaveError(
                    f"{name} was read back otherwise than it was written: the disk or its file "
                    "system is at fault. Save into another folder."
                )


def _compare_nets(folder: Path, model: nn.Module, header: dict[str, Any]) -> None:
    """Load what was written, where that needs nothing but the file, and compare the outputs."""
    from ..nets import runs_user_code

    if header["inputs"] is None:
        return
    try:
        inputs = make_inputs(header["inputs"], torch.Generator().manual_seed(0))
    except LoadError as error:
        if header["gates"] is None:
            return  # an ordinary net is loaded without them
        raise SaveError(
            "A net in training form is loaded together with its example inputs, and these are too "
            f"large for that; give a smaller batch: resconv.save(net, path, example_inputs=x). {error}"
        ) from error
    source = header["source"]
    again = source is not None and not runs_user_code(source["name"])
    if not again or header["num_bytes"] > _MAX_BUILT_AGAIN:
        if header["gates"] is not None:
            _run(model, inputs)
        return
    try:
        back = load(folder)
    except LoadError as error:
        warnings.warn(
            f"The network is saved, but its source {source['name']!r} alone does not give it again: "
            f"load it with resconv.load(path, model=...) and the net it was made from. {error}",
            stacklevel=6,
        )
        return
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    before, after = _run(model, inputs), _run(back.to(device), inputs)
    if before is None or after is None:
        return
    error_size = relative_error(after, before)
    if not error_size <= max(tolerance_for(model), 1e-10):
        raise SaveError(
            f"The network that was read back computes something else (by {error_size:.2e} of the "
            "largest output), so nothing was saved. Please report this net; its numbers can be kept "
            "with torch.save(model.state_dict())."
        )


def _run(model: nn.Module, inputs: Any) -> Any:
    """Return the outputs; None where an ordinary net does not run on inputs of its signature.

    Raises:
        SaveError: so it is with a net in training form, which could not be pruned any more.
    """
    args, kwargs = as_call(to_device_of(model, inputs))
    with torch.random.fork_rng(), evaluating(model), restored(model):
        torch.manual_seed(0)
        try:
            return model(*args, **kwargs)
        except Exception as error:
            if not isinstance(getattr(model, "resconv_state", None), State):
                return None
            raise SaveError(
                f"{type(model).__name__} does not run on random inputs of its signature "
                f"({type(error).__name__}: {str(error)[:200]}), and a saved net in training form has "
                "only those. Save its state dict instead, and convert the dense net anew."
            ) from error


def _header(
    model: nn.Module, plan: Plan | None, example_inputs: Any, shared: dict[str, str]
) -> dict[str, Any]:
    state = model.state_dict(keep_vars=True)
    record = record_of(model)
    plan = plan or plan_of(model)
    converted = getattr(model, "resconv_state", None)
    gates = describe_gates(model)
    if gates and not isinstance(converted, State):
        raise SaveError(
            f"The model has {len(gates)} gates ({', '.join(g['paths'][0] for g in gates[:3])}...), but "
            "not the record of its conversion. Save what resconv.convert or resconv.prune returned."
        )
    if isinstance(converted, State):
        record = {"source": converted.source, "edits": converted.edits}
        if example_inputs is None:
            example_inputs = converted.example_inputs
    header = {
        "format_version": FORMAT_VERSION,
        "resconv_version": __version__,
        "torch_version": str(torch.__version__),
        "source": record.get("source") or getattr(model, "resconv_source", None),
        "edits": record.get("edits") or [],
        "plan": None if plan is None else json.loads(plan.to_json()),
        "inputs": record.get("inputs")
        if example_inputs is None
        else describe_inputs(example_inputs),
        "num_params": sum(p.numel() for p in model.parameters()),
        "modules": describe_modules(model),
        "shared": shared,
        "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        "channels_last": [n for n, t in state.items() if _layout(t) is not None],
        # Buffers that the constructor makes; their numbers may have been changed since.
        "unsaved": {
            n: _word(b.dtype)
            for n, b in model.named_buffers(remove_duplicate=False)
            if n not in state
        },
        "gates": gates if isinstance(converted, State) else None,
    }
    try:
        json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SaveError(f"The network's description cannot be written as JSON: {error}.") from error
    return header


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(tensor: Tensor) -> torch.memory_format | None:
    """Return the channels-last layout that the tensor has and a plain one has not."""
    if tensor.is_contiguous():
        return None
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.ndim)
    return wanted if wanted and tensor.is_contiguous(memory_format=wanted) else None


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and the names under which a tensor stands again."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    memory: set[int] = set()
    unsaved = {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if type(buffer) is Tensor and buffer.layout == torch.strided and not buffer.is_meta
    }
    for name, value in {**unsaved, **model.state_dict()}.items():
        if not isinstance(value, Tensor) or name.rpartition(".")[2] == "_extra_state":
            raise SaveError(
                f"{name} is extra state of {type(model).__name__} that is no parameter or buffer; "
                "it would be lost. Take it out of the model, or keep it elsewhere."
            )
        if type(value.detach()) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise SaveError(
                f"{name} is a {type(value).__name__} ({value.dtype}, {value.layout}), no plain "
                "tensor. Save the network before it is quantised or sharded."
            )
        key = (value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype)
        if value.numel() and not value.is_meta and key in seen:
            shared[name] = seen[key]
            continue
        seen[key] = name
        try:
            plain = value.detach().cpu().contiguous()
            # The file's library refuses memory that two tensors share; only that is copied.
            storage = plain.untyped_storage()
            if storage.data_ptr() in memory or storage.nbytes() != plain.nbytes:
                plain = plain.clone()
            memory.add(storage.data_ptr())
            tensors[name] = plain
        except (RuntimeError, NotImplementedError) as error:
            raise SaveError(f"{name} has no values to save: {str(error)[:200]}") from error
    return tensors, shared


def _read_weights(weights: Path, header: dict[str, Any]) -> dict[str, Tensor]:
    """Read the file once, so that what is checked is what is used."""
    if not weights.is_file():
        raise LoadError(f"{weights} is missing.")
    size = weights.stat().st_size
    if size != header["num_bytes"]:
        raise LoadError(
            f"{weights} has {size:,} bytes, {header['num_bytes']:,} were written: it is truncated "
            "or was changed. Copy the folder again."
        )
    try:
        content = weights.read_bytes()
    except (OSError, MemoryError) as error:
        raise LoadError(f"{weights} cannot be read: {error}.") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != header["sha256"]:
        raise LoadError(
            f"{weights} was changed after it was saved (SHA-256 {digest[:12]}..., "
            f"{header['sha256'][:12]}... is written in model.json). Copy the folder again."
        )
    try:
        if int.from_bytes(content[:8], "little") > _MAX_HEADER:
            raise ValueError("its header is larger than any net's")
        return load_bytes(content)
    except Exception as error:  # safetensors has several for a wrong header
        raise LoadError(
            f"{weights} is not a readable safetensors file: {type(error).__name__}: "
            f"{str(error)[:200]}."
        ) from error


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        except Exception:
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


def _build(
    header: dict[str, Any],
    folder: Path,
    tensors: dict[str, Tensor],
    model: nn.Module | Callable[[], nn.Module] | None,
    trust_source: bool,
) -> nn.Module:
    edits = copy.deepcopy(header["edits"])
    bounded = _Bounded(sum(t.nbytes for t in tensors.values()), len(header["modules"]))
    # The random weights of the new layers are overwritten; the caller's seed stays as it was.
    with torch.random.fork_rng(devices=[]):
        if isinstance(model, nn.Module):
            base = copy_model(unwrap(model), LoadError).cpu()
        elif model is not None:
            base = unwrap(model()).cpu()
        else:
            base = _from_source(header["source"], folder, trust_source, bounded)
        # Every edit takes a unit out, or mends what lies around it; a rewritten root takes longest.
        most = 100 + 4 * len(list(base.modules()))
        if len(edits) > most:
            raise LoadError(
                f"{folder / 'model.json'} has {len(edits):,} edits, more than a net of "
                f"{len(list(base.modules())):,} modules can need ({most:,})."
            )
        with bounded if not trust_source else nullcontext():
            net = apply_edits(base, edits)
            gates, num_modules = header["gates"] or [], len(list(net.modules()))
            if len(gates) > num_modules:
                raise LoadError(
                    f"{folder / 'model.json'} has {len(gates):,} gates for a net of "
                    f"{num_modules:,} modules; each has at most one."
                )
            insert_gates(net, gates)
            return net


def _from_source(
    source: dict[str, Any] | None, folder: Path, trust_source: bool, bounded: _Bounded
) -> nn.Module:
    from ..nets import create, require_trusted_source

    if source is None:
        raise LoadError(
            f"{folder} does not say which network it was made from (it was not built by "
            "resconv.nets.create). Give the unpruned net: resconv.load(path, model=your_net)."
        )
    name: str = source["name"]
    try:
        require_trusted_source(name, folder, trusted=trust_source)
        if trust_source:
            return create(name, **source["kwargs"])
        fault = check_source(source)
        if fault:
            raise LoadError(
                f"{folder / 'model.json'}: {name[:120]!r} is not built, {fault}. If you trust its "
                "origin, add --trust-source (in Python: load(trust_source=True)), or give the unpruned "
                "net: resconv.load(path, model=your_net)."
            )
        with bounded:
            return create(name, **source["kwargs"])
    except LoadError:
        raise
    except ResConvError as error:
        raise LoadError(f"{folder}: its source cannot be built. {error}") from error


def _check_structure(net: nn.Module, header: dict[str, Any], folder: Path) -> None:
    faults = differing_modules(header["modules"], describe_modules(net))
    if faults:
        raise LoadError(
            f"{folder}: the net that is built is not the one that was saved: {'; '.join(faults[:4])}"
            f"{f'; and {len(faults) - 4} more' if len(faults) > 4 else ''}. Was it changed by hand "
            "after it was made, or does it come from another version of its library? It was saved "
            f"with torch {header['torch_version'][:40]}."
        )


def _fill(net: nn.Module, tensors: dict[str, Tensor], header: dict[str, Any], folder: Path) -> None:
    """Copy the numbers in, each tensor in the type it was saved in; every misfit is named."""
    shared = header["shared"]
    faults = [
        f"shared tensor {alias!r} has no original"
        for alias, first in shared.items()
        if first not in tensors or alias in tensors
    ]
    tensors = {**tensors, **{a: tensors[f] for a, f in shared.items() if f in tensors}}
    own = dict(net.state_dict(keep_vars=True))
    own |= {n: b for n in header["unsaved"] if (b := _unsaved(net, n, tensors)) is not None}
    faults += [f"{k} is missing" for k in own if k not in tensors]
    faults += [f"{k} belongs nowhere" for k in tensors if k not in own]
    both = [k for k in own if k in tensors]
    faults += [
        f"{k} has shape {tuple(tensors[k].shape)}, not {tuple(own[k].shape)}"
        for k in both
        if tensors[k].shape != own[k].shape
    ]
    faults += [
        f"{k} is {_word(tensors[k].dtype)}, not {_word(own[k].dtype)}"
        for k in both
        if not _same_kind(tensors[k].dtype, own[k].dtype)
    ]
    # A tensor that the net holds once cannot take two values.
    places: dict[int, str] = {}
    for k in both:
        first = places.setdefault(id(own[k]), k)
        if shared.get(k, k) != shared.get(first, first):
            faults.append(f"{k} and {first} are one tensor in the net, two in the file")
    names = {**dict(net.named_parameters(remove_duplicate=False)), **own}
    faults += [f"{n!r} to freeze is not there" for n in header["frozen"] if n not in names]
    faults += [f"{n!r} is not there" for n in header["channels_last"] if n not in own]
    buffers = dict(net.named_buffers())
    unsaved = {n: b for n, b in buffers.items() if n not in own}
    for n, b in unsaved.items():
        dtype = getattr(torch, header["unsaved"].get(n, _word(b.dtype)), None)
        if not isinstance(dtype, torch.dtype) or not _same_kind(dtype, b.dtype):
            faults.append(f"buffer {n} is {_word(b.dtype)}, not {header['unsaved'][n][:40]!r}")
        elif not faults and n not in tensors:
            b.data = b.data.to(dtype)
    if faults:
        raise LoadError(
            f"{folder} does not fit its network: {len(faults)} faults ({'; '.join(faults[:6])}"
            f"{'; ...' if len(faults) > 6 else ''}). Was the source's version another one?"
        )
    frozen, laid_out = set(header["frozen"]), set(header["channels_last"])
    with torch.no_grad():
        for k in both:
            target = own[k]
            if target.dtype != tensors[k].dtype:
                target.data = target.data.to(tensors[k].dtype)
            if k in laid_out and target.ndim in (4, 5):
                layout = torch.channels_last if target.ndim == 4 else torch.channels_last_3d
                target.data = target.data.to(memory_format=layout)
            target.copy_(tensors[k])
    for n, p in net.named_parameters():
        p.requires_grad_(n not in frozen)
    _tie(net, own, shared)


def _unsaved(net: nn.Module, name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """Return the buffer, not in the state dict, that takes a tensor of the file; made where needed."""
    path, _, last = name.rpartition(".")
    try:
        owner = net.get_submodule(path)
    except AttributeError:
        return None
    if name not in tensors or last not in owner._buffers:
        return None
    buffer, new = owner._buffers[last], tensors[name]
    # Made in a forward, as a cache, or one number at many places.
    if (
        buffer is None
        or buffer.shape != new.shape
        or any(s == 0 and n > 1 for s, n in zip(buffer.stride(), buffer.shape, strict=True))
    ):
        buffer = owner._buffers[last] = torch.empty_like(new)
    return buffer


def _same_kind(a: torch.dtype, b: torch.dtype) -> bool:
    return a == b or (a in _FLOATS and b in _FLOATS)


def _tie(net: nn.Module, own: dict[str, Tensor], shared: dict[str, str]) -> None:
    """Share again what was shared when it was saved."""
    for alias, first in shared.items():
        if own[alias] is own[first]:
            continue
        path, _, name = alias.rpartition(".")
        owner = net.get_submodule(path)
        original = own[first]
        if name in owner._parameters and isinstance(original, nn.Parameter):
            owner._parameters[name] = original
        elif name in owner._buffers:
            owner._buffers[name] = original
