"""The Sparsifier in other people's training loops; each module needs that loop's package.

``resconv.integrations.lightning.SparsityCallback``    a Lightning ``Callback``
``resconv.integrations.huggingface.SparsityCallback``  a Hugging Face ``TrainerCallback``
``resconv.integrations.ultralytics.trainer``           a trainer for ``YOLO(...).train``
"""

from importlib import import_module
from typing import Any

_MODULES = ("huggingface", "lightning", "ultralytics")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
