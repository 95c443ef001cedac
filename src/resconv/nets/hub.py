"""Nets that their authors put on the Hugging Face hub for timm: ``hf-hub:OWNER/NAME``."""

from functools import cache
from typing import Any

from resconv.errors import MissingExtraError, ModelError

__all__ = ["hub_config"]


@cache
def hub_config(place: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return timm's ``pretrained_cfg``, the name of the architecture in timm, and the keywords it is built with.

    Raises:
        ModelError: it cannot be fetched, or is no net of timm's.
        MissingExtraError: timm is not installed.
    """
    try:
        import timm
        from timm.models import load_model_config_from_hf
    except ImportError as error:
        raise MissingExtraError(
            error.name or "timm", "train", f"The net 'hf-hub:{place}'"
        ) from error
    try:
        config, name, kwargs = load_model_config_from_hf(place)
    except Exception as error:  # of the network, the hub and timm
        text = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(
            f"hf-hub:{place} could not be fetched ({type(error).__name__}: {text}). Without a network: give the "
            "architecture by its name in timm, and a file of the weights: model='timm:NAME', weights=FILE and "
            "pretrained=True."
        ) from error
    if not timm.is_model(name):
        raise ModelError(
            f"hf-hub:{place} is a {name!r}, which timm {timm.__version__} does not have."
        )
    return dict(config), name, dict(kwargs or {})
