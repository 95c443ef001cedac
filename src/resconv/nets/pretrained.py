"""Weights that a zoo offers for a net, and how the images were prepared that they were trained on.

They come through the zoo's own loader, or from a file in its place. Nothing is unpickled but tensors.
A head of other classes is left out, and said (see weights.py).
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resconv.errors import DataError, MissingExtraError, ModelError
from resconv.nets.hub import hub_config
from resconv.nets.sources import create, split_weights_name
from resconv.nets.weights import copy_weights, load_weights, read_weights
from resconv.preprocessing import Preprocessing, of_timm, of_torchvision

__all__ = ["fits_own_head", "load_pretrained", "own_preprocessing"]


def own_preprocessing(name: str) -> Preprocessing | None:
    """Return how images were prepared for the pretrained weights that ``name`` stands for.

    timm's and the hub's nets have it in their ``pretrained_cfg``, torchvision's weights in their transforms;
    of other nets nothing is known, and None comes back.

    Raises:
        ModelError: there is no such net, or no such weights.
        DataError: the net's images cannot be prepared in that way here.
    """
    zoo, _, rest = name.partition(":")
    try:
        if zoo in ("timm", "hf-hub"):
            return of_timm(_timm_config(zoo, rest))
        if zoo == "torchvision":
            weights = _torchvision_weights(rest)
            names = weights.meta.get("categories") or ()
            return of_torchvision(weights.transforms(), tuple(names))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return None


def load_pretrained(model: nn.Module, name: str, path: str | Path | None = None) -> tuple[str, ...]:
    """Load the pretrained weights of the net ``name`` into ``model``, which has the classes and channels wanted.

    Args:
        model: what ``create(name, ...)`` returned; changed in place, and left as it was on an error.
        name: ``timm:NAME`` (with a tag or without), ``torchvision:NAME`` (``NAME.WEIGHTS``), ``hf-hub:OWNER/NAME``.
            Any other net needs ``path``.
        path: a file of those weights, which is read in place of the network.

    Returns:
        The names of the tensors that were left out, because the weights tell other classes apart: the head.

    Raises:
        ModelError: there are none, they cannot be fetched or read, or do not fit the net.
    """
    zoo, _, rest = name.partition(":")
    is_timm = zoo in ("timm", "hf-hub")
    if path is not None:
        try:
            return load_weights(model, path, new_head=True)
        except ModelError as error:
            # Files of the time before a net's layers got other names: timm knows how to read them.
            if not is_timm or "does not fit" not in str(error):
                raise
            state = read_weights(path)
            try:
                return copy_weights(
                    model, _timm_state(zoo, rest, model, state), path, new_head=True
                )
            except ModelError:
                raise error from None
    if is_timm:
        return copy_weights(model, _timm_state(zoo, rest, model, None), name, new_head=True)
    if zoo == "torchvision":
        return copy_weights(model, _torchvision_state(rest), name, new_head=True)
    raise ModelError(
        f"There are no pretrained weights of {name!r} in a zoo. Give a file of them: weights=FILE."
    )


def fits_own_head(name: str, path: str | Path) -> bool:
    """Return whether a file's weights fit a zoo's net with the head that its own weights have."""
    if name.partition(":")[0] not in ("timm", "torchvision", "hf-hub"):
        return False
    with torch.random.fork_rng(devices=[]):
        own = create(name)
        try:
            return not load_pretrained(own, name, path)
        except ModelError:
            return False


def _timm_config(zoo: str, rest: str) -> dict[str, Any]:
    if zoo == "hf-hub":
        return hub_config(rest)[0]
    timm = _zoo("timm", rest)
    if not timm.is_model(rest):
        create(f"timm:{rest}")  # which says what there is
    try:
        found = timm.models.get_pretrained_cfg(rest, allow_unregistered=True)
    except RuntimeError as error:
        net, tag = split_weights_name("timm", rest)
        names = timm.list_pretrained(f"{net}.*")
        raise ModelError(
            f"timm {timm.__version__} has no weights {tag!r} of {net}. There are: "
            f"{', '.join(f'timm:{n}' for n in names) or 'none'}."
        ) from error
    if found is None:
        raise ModelError(f"timm says nothing of pretrained weights of {rest!r}.")
    return dict(vars(found))


def _zoo(package: str, rest: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        what = f"The net '{package}:{rest}'"
        raise MissingExtraError(error.name or package, "train", what) from error


def _timm_state(
    zoo: str, rest: str, model: nn.Module, state: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return the pretrained weights in the names of timm's present net, with their own head."""
    timm, config = _zoo("timm", rest), _timm_config(zoo, rest)
    kwargs: dict[str, Any] = {}
    source = f"hf-hub:{rest}" if zoo == "hf-hub" else rest
    if zoo == "hf-hub":
        kwargs |= {"pretrained_cfg": config, **hub_config(rest)[2]}
        source = hub_config(rest)[1]
    kwargs["num_classes"] = config["num_classes"]
    if state is not None:
        heads = config.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        rows = [state[f"{h}.weight"].shape[0] for h in heads if f"{h}.weight" in state]
        kwargs["num_classes"] = rows[0] if rows else config["num_classes"]
        overlay = {"state_dict": dict(state), "num_classes": kwargs["num_classes"], "source": ""}
        kwargs["pretrained_cfg_overlay"] = overlay
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels in (1, 3):
        kwargs["in_chans"] = first.in_channels
    try:
        with torch.random.fork_rng(devices=[]):
            own = timm.create_model(source, pretrained=True, **kwargs)
    except Exception as error:  # of the network, the hub and timm
        if state is not None:
            raise ModelError(
                f"timm cannot read these weights of {rest}: {_first_line(error)}"
            ) from error
        raise _not_fetched(f"{zoo}:{rest}", _timm_place(config), error) from error
    return dict(own.state_dict())


def _timm_place(config: Mapping[str, Any]) -> str:
    hub = config.get("hf_hub_id")
    if not hub:
        return f"fetch {config['url']} elsewhere" if config.get("url") else ""
    from huggingface_hub.constants import HF_HUB_CACHE

    file = config.get("hf_hub_filename") or "model.safetensors"
    return (
        f"fetch {file} of {hub} from the Hugging Face hub elsewhere (a machine's cache of the hub may be copied "
        f"whole: here it is {HF_HUB_CACHE})"
    )


def _torchvision_weights(rest: str) -> Any:
    torchvision = _zoo("torchvision", rest)
    net, tag = split_weights_name("torchvision", rest)
    if net not in torchvision.models.list_models():
        create(f"torchvision:{net}")  # which says what there is
    every = torchvision.models.get_model_weights(net)
    found = every.__members__.get(tag or "DEFAULT")
    if found is None:
        raise ModelError(
            f"torchvision has no weights {tag or 'DEFAULT'!r} of {net}. There are: "
            f"{', '.join(every.__members__) or 'none'}."
        )
    return found


def _torchvision_state(rest: str) -> dict[str, Tensor]:
    weights = _torchvision_weights(rest)
    try:
        # Without the last word, torch would unpickle whatever the file holds.
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # of the network, and of torch
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        place = f"fetch {weights.url} elsewhere and put it into {folder}"
        raise _not_fetched(f"torchvision:{rest}", place, error) from error
    return state


def _not_fetched(name: str, place: str, error: Exception) -> ModelError:
    if "No pretrained weights exist" in str(error):
        return ModelError(
            f"There are no pretrained weights of {name}. Give a file of them (weights=FILE), or train it "
            "from random weights (pretrained=False)."
        )
    return ModelError(
        f"The pretrained weights of {name} could not be fetched ({_first_line(error)}). Without a network: "
        f"{place}{', or' if place else ''} give a file of the weights with weights=FILE and pretrained=True."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
