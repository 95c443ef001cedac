"""Networks by name: built in, from the zoos, or from the user's own code."""

from resconv.nets.pretrained import fits_own_head, load_pretrained, own_preprocessing
from resconv.nets.sources import (
    create,
    default_input_size,
    list_builtin,
    require_trust,
    require_trusted_source,
    runs_user_code,
)
from resconv.nets.weights import load_weights

__all__ = [
    "create",
    "default_input_size",
    "fits_own_head",
    "list_builtin",
    "load_pretrained",
    "load_weights",
    "own_preprocessing",
    "require_trust",
    "require_trusted_source",
    "runs_user_code",
]
