"""A network in a folder: ``model.safetensors`` for the numbers, ``model.json`` for everything else.

The JSON (see schema.py) names the source of the architecture, the structural edits that made the
net compact, and the gates of a net in training form; loading builds the first, replays the
second, puts in the third, and copies the numbers in. Nothing is
unpickled, and no code comes from the folder: a source outside resconv, timm and torchvision is
built only when the caller says so, or hands in the model.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ..analysis.input_spec import (
    ExampleInputs,
    InputSpec,
    describe_inputs,
    make_inputs,
    require_small,
)
from ..analysis.inputs import as_call, evaluating, to_device_of, unwrap
from ..analysis.recorder import restored
from ..errors import LoadError, ResConvError, SaveError
from ..failures import is_own
from ..files import digest, write_together
from ..json_files import to_plain
from ..nets import runs_user_code
from ..planning.plan import Plan
from ..preprocessing import Preprocessing
from ..surgery.provenance import Provenance, carry, is_converted, provenance_of
from ..surgery.verification import relative_error, tolerance_for
from ..version import __version__
from . import hub
from .building import build
from .filling import check_structure, fill
from .modules import describe_modules
from .schema import FORMAT_VERSION, Header, read_header, seal
from .training_form import describe_gates
from .weights import (
    compare_weights,
    dtype_name,
    is_channels_last,
    read_weights,
    tensors_of_model,
)

__all__ = ["FORMAT_VERSION", "load", "read_header", "save"]

_MAX_BUILT_AGAIN = 2**30  # bytes of a net that is built once more to be compared


def save(
    model: nn.Module,
    path: str | Path,
    *,
    plan: Plan | None = None,
    example_inputs: Any = None,
    preprocessing: Preprocessing | None = None,
) -> Path:
    """Write a network (pruned, fused, dense, or still in training form) into the folder ``path``.

    Every parameter and buffer, also one that is not in the state dict, keeps its dtype,
    ``requires_grad``, channels-last layout and sharing; other files in the folder stay. Both files
    are written beside, read back and compared, and moved into place: a crash leaves the old net or
    none, never half of one. The weights are compared bit by bit; where the net can be built again
    (it came from ``resconv.nets.create`` and has at most 1 GiB) so are its outputs.

    ``example_inputs`` (a tensor, tuple or dict) give the input signature that is saved, ``plan`` is
    kept beside it; by default both are those that the net carries from ``convert`` and ``prune``.
    ``preprocessing`` says how an image becomes an input, and names the classes; a loaded net carries it, and
    ``resconv predict`` needs no more. Returns the folder; ``model`` is left as it was.

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
    tensors, shared = tensors_of_model(model)
    header = _header(model, plan, example_inputs, preprocessing, shared)

    def write(files: Any) -> None:
        weights, description = files
        save_file(tensors, weights)
        compare_weights(weights, tensors)
        whole = replace(header, sha256=digest(weights), num_bytes=weights.stat().st_size)
        text = json.dumps(seal(_plain(whole)), indent=2) + "\n"
        description.write_text(text, encoding="utf-8")
        _compare_nets(weights.parent, model, whole)

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
        path: what :func:`save` wrote, or ``hf://OWNER/NAME`` (``@REVISION``), where ``resconv push`` put it.
        model: the net as it was before pruning, or a function that makes it. Needed where the
            file names no source; it is copied.
        trust_source: allow a source ``package.module:factory``, which imports and runs that
            package of this machine, and keywords that nothing is known about. Built-in, timm and
            torchvision nets need no permission.

    Raises:
        MissingExtraError: huggingface_hub is not installed, for a place on the hub.
        LoadError: the folder is missing, changed, truncated, from a newer format, hostile, or does
            not fit the model; all faults found are listed.

    Example:
        >>> path = resconv.save(resconv.convert(net, images), "trained")
        >>> model = resconv.load(path, model=net)
        >>> list(resconv.gates(model))
        ['0', '3', '6']
    """
    folder = hub.fetched(str(path)) if str(path).startswith(hub.SCHEME) else Path(path)
    header = read_header(folder)
    tensors = read_weights(folder / "model.safetensors", header)
    if header.gates is not None and header.inputs is not None:
        require_small(header.inputs)
    try:
        net = build(header, folder, tensors, model, trust_source)
        check_structure(net, header, folder)
        fill(net, tensors, header, folder)
    except LoadError:
        raise
    except ResConvError as error:
        raise LoadError(f"{folder / 'model.json'} does not fit its source: {error}") from error
    except Exception as error:  # whatever a hostile file may set off in torch is its own fault
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise LoadError(
            f"{folder} cannot be read by a fault in resconv ({what}). Please report it."
            if is_own(error)
            else f"{folder / 'model.json'} cannot be carried out: {what}"
        ) from error
    inputs = None if header.inputs is None else ExampleInputs(header.inputs)
    carry(
        net,
        Provenance(
            source=header.source,
            edits=header.edits,
            inputs=inputs,
            plan=header.plan,
            training_form=header.gates is not None,
            preprocessing=header.preprocessing,
            class_names=header.class_names,
        ),
    )
    return net.eval()


def _compare_nets(folder: Path, model: nn.Module, header: Header) -> None:
    """Load what was written, where that needs nothing but the file, and compare the outputs."""
    if header.inputs is None:
        return
    try:
        inputs = make_inputs(header.inputs, torch.Generator().manual_seed(0))
    except LoadError as error:
        if header.gates is None:
            return  # an ordinary net is loaded without them
        raise SaveError(
            "A net in training form is loaded together with its example inputs, and these are too "
            f"large for that; give a smaller batch: resconv.save(net, path, example_inputs=x). {error}"
        ) from error
    source = header.source
    large = header.num_bytes > _MAX_BUILT_AGAIN
    if source is None or runs_user_code(source.name) or large:
        if header.gates is not None:
            _run(model, inputs)
        return
    try:
        back = load(folder)
    except LoadError as error:
        warnings.warn(
            f"The network is saved, but its source {source.name!r} alone does not give it again: "
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
    with evaluating(model), restored(model):
        torch.manual_seed(0)
        try:
            return model(*args, **kwargs)
        except Exception as error:  # the user's forward may raise anything
            if not is_converted(model):
                return None
            raise SaveError(
                f"{type(model).__name__} does not run on random inputs of its signature "
                f"({type(error).__name__}: {str(error)[:200]}), and a saved net in training form has "
                "only those. Save its state dict instead, and convert the dense net anew."
            ) from error


def _header(
    model: nn.Module,
    plan: Plan | None,
    example_inputs: Any,
    preprocessing: Preprocessing | None,
    shared: dict[str, str],
) -> Header:
    """Return what is to be written, but for the digest and the size of the weights."""
    state = model.state_dict(keep_vars=True)
    known = provenance_of(model)
    gates = describe_gates(model)
    if gates and not known.training_form:
        raise SaveError(
            f"The model has {len(gates)} gates ({', '.join(g.paths[0] for g in gates[:3])}...), but "
            "not the record of its conversion. Save what resconv.convert or resconv.prune returned."
        )
    header = Header(
        resconv_version=__version__,
        torch_version=str(torch.__version__),
        source=known.source,
        edits=known.edits,
        plan=plan or known.plan,
        inputs=_spec(known, example_inputs),
        preprocessing=preprocessing or known.preprocessing,
        class_names=(preprocessing and preprocessing.class_names) or known.class_names,
        num_params=sum(p.numel() for p in model.parameters()),
        modules=describe_modules(model),
        shared=shared,
        frozen=tuple(n for n, p in model.named_parameters() if not p.requires_grad),
        channels_last=tuple(n for n, t in state.items() if is_channels_last(t)),
        # Buffers that the constructor makes; their numbers may have been changed since.
        unsaved={
            n: dtype_name(b.dtype)
            for n, b in model.named_buffers(remove_duplicate=False)
            if n not in state
        },
        gates=gates if known.training_form else None,
        sha256="",
        num_bytes=0,
    )
    try:
        seal(_plain(header))
    except (TypeError, ValueError) as error:
        raise SaveError(f"The network's description cannot be written as JSON: {error}.") from error
    return header


def _plain(header: Header) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **to_plain(header)}


def _spec(known: Provenance, example_inputs: Any) -> InputSpec | None:
    """Return the signature of the inputs that were given, or else of those that the net carries."""
    if example_inputs is not None:
        return describe_inputs(example_inputs)
    if known.inputs is None or known.inputs.spec is not None:
        return None if known.inputs is None else known.inputs.spec
    try:
        return describe_inputs(known.inputs.whole)
    except SaveError:
        if known.training_form:
            raise
        return None  # an ordinary net is loaded without them
