"""YOLO nets made shallower by ultralytics' own training.

``YOLO("yolo11n.pt").train(trainer=trainer(macs=0.6), data=..., epochs=...)`` converts the net, makes
it sparse while ultralytics trains it, prunes it, and leaves ``weights/compact.pt`` (for ``YOLO(path)``)
and ``compact/`` (for :func:`resconv.load`) in the run's folder. ``finetuner()`` trains such a net on.

Ultralytics is licensed under the AGPL-3.0, which also binds programs that are built on it. It is not
a part of resconv, and is imported by this module alone.
"""

from resconv.errors import MissingExtraError

try:
    import ultralytics as _ultralytics  # noqa: F401
except ImportError as error:
    raise MissingExtraError("ultralytics", "yolo", "Training YOLO nets") from error

from .choosing import finetuner, trainer
from .networks import ordinary

__all__ = ["finetuner", "ordinary", "trainer"]
