"""Networks by name: built in, from the zoos, or from the user's own code."""

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
    "list_builtin",
    "load_weights",
    "require_trust",
    "require_trusted_source",
    "runs_user_code",
]
