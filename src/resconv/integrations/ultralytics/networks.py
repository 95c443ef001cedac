"""A YOLO net in training form, and the ordinary one that it becomes.

Ultralytics builds a net anew from its yaml, and folds norms by looking for convs with a ``bn`` beside
them. Neither holds for a net that was converted or pruned. So

- its yaml says in place of the layers who can train it: building it anew fails with that sentence,
  where it would otherwise give the dense net with random weights,
- a net in training form has a ``fuse`` of its own, that makes it ordinary first,
- an ordinary net has no empty ``bn`` left, as if ultralytics had fused it there.

Opening a checkpoint, ultralytics lets all activations overwrite their input. Behind a conv that was
removed it is the input of other layers, too: there they are kept from it.
"""

import io
import json
from copy import copy, deepcopy
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from ultralytics.nn.modules import Conv, Conv2, ConvTranspose, RepConv, RepVGGDW

from resconv.errors import ConversionError, RunError
from resconv.surgery import conversion, fusion
from resconv.surgery.copying import copy_model
from resconv.surgery.provenance import Provenance, Source, carry, is_converted, provenance_of
from resconv.surgery.rewritten import PassThrough, own_class
from resconv.surgery.state import set_submodule

__all__ = [
    "convert",
    "form_of",
    "in_training_form",
    "of_its_own_class",
    "ordinary",
    "student_of",
    "with_form",
]

_FORM = "resconv_form"
_REFUSAL = (
    "This net was converted or pruned by resconv, so its yaml does not build it. Train it with "
    "model.train(trainer=resconv.integrations.ultralytics.finetuner(), ...)."
)
# These merge their convs by methods of their own, which know no other layers.
_MERGING = (Conv2, RepConv, RepVGGDW)


def convert(
    net: nn.Module, image_size: int, frozen: tuple[str, ...] = (), **options: Any
) -> nn.Module:
    """Return a copy of a YOLO net in training form, that ultralytics can train.

    Args:
        net: a dense one, with its weights.
        image_size: side of the images, in pixels.
        frozen: beginnings of names of layers that are not trained; their units stay ordinary.
        options: of :func:`resconv.convert`.

    Raises:
        ConversionError: there is nothing to convert.
    """
    merging = tuple(f"{n}." for n, m in net.named_modules() if isinstance(m, _MERGING))
    left = (*merging, *frozen)
    carry(net, Provenance(source=_source_of(net)))
    channels = net.yaml.get("channels", 3)  # type: ignore[union-attr, operator]
    side = -(-int(image_size) // 32) * 32
    training = net.training
    gated = conversion.convert(
        net.eval(),
        torch.zeros(1, channels, side, side, device=next(net.parameters()).device),
        filter=lambda name, module: not name.startswith(left),
        **options,
    )
    net.train(training)
    return in_training_form(gated.train(training))


def _source_of(net: nn.Module) -> Source | None:
    """Return from what the net is built, where that gives the same layers."""
    known: Any = net
    try:
        settings = json.loads(json.dumps(known.yaml))
    except (TypeError, ValueError):
        return None
    channels, classes = settings.get("channels", 3), settings.get("nc")
    kwargs = {"cfg": settings, "ch": channels, "nc": classes, "verbose": False}
    own: Any = own_class(net)
    with torch.random.fork_rng(devices=[]):
        again = own(**deepcopy(kwargs))
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (net, again)]
    if shapes[0] != shapes[1]:
        return None  # weights of another width of head were loaded
    return Source(f"{own.__module__}:{own.__qualname__}", kwargs)


class Apart(nn.Module):
    """An activation that never overwrites its input, whatever ultralytics sets on all modules."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        whole = copy(activation)
        whole.inplace = False
        vars(self)["whole"] = whole  # not among the modules, where it would be found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the activation returns, in a tensor of its own."""
        result: torch.Tensor = vars(self)["whole"](x)
        return result


def _keep_apart(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, Conv | ConvTranspose):
            layer = getattr(module, "conv", None) or getattr(module, "conv_transpose", None)
            if isinstance(layer, nn.Identity) and hasattr(module.act, "inplace"):
                module.act = Apart(module.act)


class _Fusing:
    """Makes the net ordinary before ultralytics fuses it; the first base of a net's class."""

    def fuse(self, verbose: bool = True, imgsz: Any = 640) -> Any:
        """Make this net an ordinary, fused one, in place, and return it."""
        plain = ordinary(self)  # type: ignore[arg-type]
        self.__dict__.clear()
        self.__dict__.update(plain.__dict__)
        self.__class__ = type(plain)  # type: ignore[assignment]
        return self.fuse(verbose=verbose, imgsz=imgsz)

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__mro__[2]
        return _again, (getattr(base, "resconv_code", base),), self.__dict__


@cache
def _fusing(base: Any) -> type[nn.Module]:
    # It goes by its base's name, under which files and messages know it.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (_Fusing, base), names)


def _again(base: Any) -> Any:
    made: Any = _fusing(base if isinstance(base, type) else base.made())
    return made.__new__(made)


def in_training_form(net: nn.Module) -> nn.Module:
    """Return the converted net, which ultralytics can now fuse, and does not build anew."""
    if not isinstance(net, _Fusing):
        base: Any = type(net)
        net.__class__ = _fusing(base)
    _refuse_yaml(net)
    _keep_apart(net)
    return net


def of_its_own_class(net: nn.Module) -> nn.Module:
    """Return a copy of the net of the classes that it was built with."""
    net = copy_model(net, ConversionError)
    for name, module in list(net.named_modules()):
        if isinstance(module, Apart):
            set_submodule(net, name, vars(module)["whole"].train(module.training))
    if isinstance(net, _Fusing):
        itself: Any = net
        itself.__class__ = type(net).__mro__[2]
    return net


def _refuse_yaml(net: nn.Module) -> None:
    known: Any = net
    known.yaml = {**known.yaml, "backbone": [[-1, 1, _REFUSAL, []]]}


def ordinary(net: nn.Module) -> nn.Module:
    """Return a copy of the net with ordinary layers alone, as ultralytics would have fused them.

    ``net`` is one in training form (its gates are folded into the layers), or what
    :func:`resconv.prune`, :func:`resconv.fuse` or :func:`resconv.load` returned; it is left as it was. What
    comes back is for inference, and for ``export``.

    Raises:
        PruneError: the net holds NaN or infinite numbers.
    """
    net = of_its_own_class(net).eval()
    if is_converted(net):
        net = fusion.fuse(net)
    _refuse_yaml(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, PassThrough):
            set_submodule(net, name, _identity(module))
        elif isinstance(module, ConvTranspose):
            _drop_empty_norm(module, "conv_transpose")
        elif isinstance(module, Conv) and not isinstance(module, Conv2):
            _drop_empty_norm(module, "conv")
    _keep_apart(net)
    return net


def _identity(module: PassThrough) -> nn.Module:
    made = nn.Identity().train(module.training)
    vars(made).update({k: v for k, v in vars(module).items() if k not in vars(made)})
    return made


def _drop_empty_norm(module: Any, name: str) -> None:
    """Leave the norm away where ultralytics would fold it, and it is no norm of a conv."""
    norm = getattr(module, "bn", None)
    if not isinstance(norm, nn.Module):
        return
    layer = getattr(module, name)
    if isinstance(layer, nn.modules.conv._ConvNd) and isinstance(norm, _BatchNorm):
        return
    if not isinstance(norm, nn.Identity):
        setattr(module, name, nn.Sequential(layer, norm))
    if own_class(module) is type(module):
        del module.bn
        vars(module)["forward"] = module.forward_fuse
    elif ".bn" not in type(module).resconv_code.source:
        del module.bn  # a rewritten forward names what is left


def with_form(net: nn.Module, form: nn.Module) -> nn.Module:
    """Return ``net`` (ordinary, pruned), with the training form of it to train it on from."""
    file = io.BytesIO()
    torch.save(of_its_own_class(form).half(), file)
    vars(net)[_FORM] = file.getvalue()
    # What the record says is in the training form; a file without it is read without resconv.
    vars(net).pop("resconv_provenance", None)
    return net


def form_of(weights: nn.Module) -> nn.Module | None:
    """Return the training form of a net from a checkpoint of ours, or None for any other net.

    Raises:
        RunError: the net was changed since its training form was kept.
    """
    kept = vars(weights).get(_FORM)
    if kept is None:
        found = deepcopy(weights) if is_converted(weights) else None
    else:
        found = torch.load(io.BytesIO(kept), map_location="cpu", weights_only=False).float()
        expected, given = ordinary(found).half().state_dict(), weights.state_dict()
        if not all(
            n in given and torch.equal(t, given[n].detach().cpu().to(t.dtype))
            for n, t in expected.items()
        ):
            raise RunError(
                "The net's weights are not those that it was pruned with, so the form in which it "
                "could be trained on is lost. Start from compact.pt as resconv wrote it."
            )
    if found is None:
        if provenance_of(weights).edits:
            raise RunError(
                "This net was pruned, and is not one of ours to train on: ultralytics would build "
                "the dense one. Start from compact.pt of a run with resconv's trainer."
            )
        return None
    for parameter in found.parameters():
        parameter.requires_grad_(True)
    return in_training_form(found.train())


def student_of(net: Any) -> nn.Module:
    """Return the net that is trained: itself, or the student where ultralytics distils."""
    found: nn.Module = getattr(net, "student_model", net)
    return found
