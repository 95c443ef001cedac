"""Build a network from its name.

A name is one of

- a built-in net: ``resnet56`` (:func:`list_builtin` has them all),
- ``timm:NAME`` or ``torchvision:NAME``, built without downloading any weights; ``timm:NAME.TAG`` and
  ``torchvision:NAME.WEIGHTS`` name pretrained weights too (see pretrained.py),
- ``hf-hub:OWNER/NAME``, a net for timm on the Hugging Face hub, whose description is fetched,
- ``package.module:factory``, a function or class of the user's own.
"""

import difflib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from resconv.errors import MissingExtraError, ModelError, TrustError
from resconv.nets import resnet, vgg
from resconv.nets.hub import hub_config
from resconv.surgery.provenance import Provenance, Source, carry

__all__ = [
    "create",
    "default_input_size",
    "list_builtin",
    "require_trust",
    "require_trusted_source",
    "runs_user_code",
    "split_weights_name",
]

_ZOOS = ("timm", "torchvision")
_BUILTIN: dict[str, Callable[..., nn.Module]] = {
    **{
        f"{family}{depth}": getattr(resnet, f"{family}{depth}")
        for family in ("resnet", "plainnet")
        for depth in (20, 32, 44, 56, 110)
    },
    "vgg16_bn": vgg.vgg16_bn,
}
# Keywords by which the zoos fetch or unpickle weights. Weights come from load_weights only.
_WEIGHT_KEYWORDS = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
    | {"weights", "weights_backbone", "pretrained_backbone"}
)


def list_builtin() -> list[str]:
    """Return the names of the built-in nets."""
    return list(_BUILTIN)


def runs_user_code(name: str) -> bool:
    """Return whether creating ``name`` imports and calls code outside resconv and the two zoos.

    A name read from a file that came from someone else can name any callable on this machine:
    ask the user before creating such a net.
    """
    return ":" in name and name.split(":", 1)[0] not in (*_ZOOS, "hf-hub")


def split_weights_name(zoo: str, rest: str) -> tuple[str, str]:
    """Return the architecture and the name of its weights (or nothing): ``resnet50.IMAGENET1K_V2``."""
    net, _, tag = rest.partition(".") if zoo != "hf-hub" else (rest, "", "")
    return net, tag


def require_trust(what: str, place: object, *, trusted: bool) -> None:
    """The one question that is asked before a file leads to code that is not resconv's.

    Args:
        what: what would run, as a user reads it.
        place: the file or folder that leads there.
        trusted: whether the user said so, for this call.

    Raises:
        TrustError: the user did not.
    """
    if not trusted:
        raise TrustError(
            f"{place}: {what}. Code that runs can do anything. If you trust its origin, add "
            "--trust-source (in Python: load(trust_source=True))."
        )


def require_trusted_source(name: str, place: object, *, trusted: bool) -> None:
    """Ask :func:`require_trust` about a net that is built by its name, where it is not resconv's.

    Raises:
        TrustError: the name leads to code outside resconv, timm and torchvision, and the user did
            not say that it may run.
    """
    if runs_user_code(name):
        what = f"its net is made by {name[:120]!r}, code that is in neither resconv, timm nor torchvision"
        require_trust(what, place, trusted=trusted)


def create(name: str, **kwargs: Any) -> nn.Module:
    """Return a new network with random weights, in training mode.

    It carries its name and keywords, from which the same architecture can be built again (see
    :class:`resconv.surgery.provenance.Provenance`).

    Args:
        name: a built-in name, ``timm:NAME``, ``torchvision:NAME``, ``hf-hub:OWNER/NAME`` or
            ``package.module:factory``.
            The factory's module is imported and its code runs; it is looked up in the current
            folder too. See :func:`runs_user_code` for names that are not your own.
        kwargs: ``num_classes`` and ``in_channels`` mean the same for built-in and zoo nets; the
            rest goes to the net's own function unchanged. All values must be JSON values.

    Raises:
        ModelError: no such net, a keyword it does not take, or no ``nn.Module`` came back.
        MissingExtraError: the zoo's package is not installed.
    """
    try:
        json.dumps(kwargs)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"The keywords of {name!r} cannot be saved as JSON ({error}), so the net could not "
            "be built again from a saved file. Use numbers, strings, lists and dicts only."
        ) from error
    prefix, colon, rest = name.partition(":")
    if not colon:
        model = _create_builtin(name, kwargs)
    elif prefix == "timm":
        model = _create_timm(rest, kwargs)
    elif prefix == "torchvision":
        model = _create_torchvision(rest, kwargs)
    elif prefix == "hf-hub":
        # A saved net is built again without the hub.
        _, architecture, own = hub_config(rest)
        name, kwargs = f"timm:{architecture}", {**own, **kwargs}
        model = _create_timm(architecture, kwargs)
    else:
        model = _create_from_factory(prefix, rest, kwargs)
    carry(model, Provenance(Source(name, dict(kwargs))))
    return model


def default_input_size(name: str, model: nn.Module) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that the net ``name`` is meant for.

    Built-in: 32x32. timm: the size in its ``pretrained_cfg``. Others: 224x224, torchvision's
    ``inception_v3`` 299x299. C is what the first conv of ``model`` reads, 3 if it has none.
    """
    channels = _count_input_channels(model)
    if ":" not in name:
        return channels, 32, 32
    if name == "torchvision:inception_v3":
        return channels, 299, 299
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        _, height, width = config["input_size"]
        return channels, int(height), int(width)
    return channels, 224, 224


def _count_input_channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return module.in_channels
    return 3


def _create_builtin(name: str, kwargs: dict[str, Any]) -> nn.Module:
    if name not in _BUILTIN:
        zoo = [f"{zoo}:{name}" for zoo in _ZOOS if name in _list_zoo_if_installed(zoo)]
        hint = f" Did you mean {' or '.join(zoo)}?" if zoo else _suggest(name, _BUILTIN)
        raise ModelError(
            f"No built-in net is called {name!r}.{hint} Built in: {', '.join(_BUILTIN)}. "
            "Elsewhere: timm:NAME, torchvision:NAME, package.module:factory."
        )
    return _call(name, _BUILTIN[name], kwargs)


def _create_timm(name: str, kwargs: dict[str, Any]) -> nn.Module:
    _refuse_weight_keywords(f"timm:{name}", kwargs)
    try:
        import timm
    except ImportError as error:
        # timm itself needs torchvision.
        package = error.name or "timm"
        raise MissingExtraError(package, "train", f"The net 'timm:{name}'") from error
    # Checked first: create_model also takes addresses of the hub, and would go on the network.
    if ":" in name or "/" in name or not timm.is_model(name):
        raise ModelError(
            f"timm {timm.__version__} has no net {name!r}."
            f"{_suggest(name, timm.list_models(), prefix='timm:')}"
        )
    mapped = dict(kwargs)
    if "in_channels" in mapped:
        mapped["in_chans"] = mapped.pop("in_channels")
    return _call(f"timm:{name}", timm.create_model, mapped, name, pretrained=False)


def _create_torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    _refuse_weight_keywords(f"torchvision:{name}", kwargs)
    try:
        import torchvision
    except ImportError as error:
        raise MissingExtraError("torchvision", "train", f"The net 'torchvision:{name}'") from error
    names = torchvision.models.list_models()
    name, _ = split_weights_name("torchvision", name)
    if name not in names:
        raise ModelError(
            f"torchvision {torchvision.__version__} has no net {name!r}."
            f"{_suggest(name, names, prefix='torchvision:')}"
        )
    mapped = dict(kwargs)
    in_channels = mapped.pop("in_channels", 3)
    if in_channels != 3:
        raise ModelError(
            f"torchvision's nets read 3 channels, asked were {in_channels}. Use the net of the "
            "same name in timm (timm:NAME takes in_channels), or convert the images to RGB."
        )
    builder = torchvision.models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    mapped["weights"] = None
    if "weights_backbone" in parameters:
        mapped["weights_backbone"] = None  # its default downloads a backbone
    if name in ("googlenet", "inception_v3"):
        mapped.setdefault("init_weights", True)  # what None means, without the warning
    return _call(f"torchvision:{name}", builder, mapped)


def _create_from_factory(module_name: str, attribute: str, kwargs: dict[str, Any]) -> nn.Module:
    name = f"{module_name}:{attribute}"
    module = _import_module(module_name, name)
    factory: Any = module
    for part in attribute.split("."):
        known = [n for n in dir(factory) if not n.startswith("_")]
        factory = getattr(factory, part, None)
        if factory is None:
            raise ModelError(
                f"Module {module_name!r} ({getattr(module, '__file__', 'built in')}) has no "
                f"{attribute!r}.{_suggest(part, known)}"
            )
    if not callable(factory):
        raise ModelError(
            f"{name!r} is a {type(factory).__name__}, not a function or class that returns an "
            "nn.Module. Name the function that builds the net."
        )
    model = _call(name, factory, kwargs)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name!r} returned a {type(model).__name__}, not an nn.Module. Let the function "
            "return the net itself."
        )
    return model


def _import_module(module_name: str, name: str) -> Any:
    form = "A net's name is built-in, timm:NAME, torchvision:NAME or package.module:factory."
    if not all(part.isidentifier() for part in module_name.split(".")):
        hint = _suggest(module_name, _ZOOS)
        raise ModelError(f"{name!r}: {module_name!r} is not a module's name.{hint} {form}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file here hides no installed package
    importlib.invalidate_caches()  # or a file written a moment ago may not be seen
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{name!r}: there is no module {error.name!r} (looked in the current folder and in "
            f"the installed packages).{_suggest(module_name, _ZOOS)} {form}"
        ) from error
    except Exception as error:  # the user's module runs when it is imported
        raise ModelError(
            f"{name!r}: importing {module_name!r} failed with {type(error).__name__}: {error}"
        ) from error


def _call(
    name: str, factory: Callable[..., nn.Module], kwargs: dict[str, Any], *args: Any, **fixed: Any
) -> nn.Module:
    try:
        return factory(*args, **fixed, **kwargs)
    except ModelError:
        raise
    except Exception as error:  # a factory of a zoo's or the user's
        asked = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no keywords"
        raise ModelError(
            f"Building {name!r} with {asked} failed with {type(error).__name__}: {error}"
        ) from error


def _refuse_weight_keywords(name: str, kwargs: dict[str, Any]) -> None:
    refused = sorted(_WEIGHT_KEYWORDS & kwargs.keys())
    if refused:
        raise ModelError(
            f"{name!r} was given {', '.join(refused)}: nets are built without weights. Save the "
            "weights as .safetensors and load them with load_weights(model, path)."
        )


def _list_zoo_if_installed(zoo: str) -> list[str]:
    if importlib.util.find_spec(zoo) is None:
        return []
    if zoo == "torchvision":
        return list(importlib.import_module("torchvision.models").list_models())
    return list(importlib.import_module("timm").list_models())


def _suggest(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(prefix + match for match in close)}?" if close else ""
