"""Make trained convolutional networks shallower.

convert -> train with a Sparsifier -> plan -> prune -> verify -> save and export.

Names are loaded when they are first used, so that ``import resconv`` (and the help of the command line) does not
wait for torch. Folders (``resconv.nets``, ``resconv.recovery`` ...) are loaded in the same way.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.counting import count as count
    from .analysis.counting import profile as profile
    from .errors import ResConvError as ResConvError
    from .latency.table import LatencyTable as LatencyTable
    from .latency.table import measure_latency as measure_latency
    from .nn.gates import copy_zeros as copy_zeros
    from .nn.gates import gates as gates
    from .planning.budget import Budget as Budget
    from .planning.plan import Plan as Plan
    from .recovery.recalibration import recalibrate as recalibrate
    from .selection.planner import plan as plan
    from .selection.pruning import prune as prune
    from .selection.sparsifier import Sparsifier as Sparsifier
    from .storage.exporting import export as export
    from .storage.store import load as load
    from .storage.store import save as save
    from .surgery.conversion import convert as convert
    from .surgery.conversion import units as units
    from .surgery.fusion import fuse as fuse
    from .surgery.pruning import leftovers as leftovers
    from .surgery.verification import verify as verify
    from .version import __version__ as __version__

# The same, for the interpreter; a test holds the two lists together.
_HOMES = {
    "analysis.counting": ("count", "profile"),
    "errors": ("ResConvError",),
    "latency.table": ("LatencyTable", "measure_latency"),
    "nn.gates": ("copy_zeros", "gates"),
    "planning.budget": ("Budget",),
    "planning.plan": ("Plan",),
    "recovery.recalibration": ("recalibrate",),
    "selection.planner": ("plan",),
    "selection.pruning": ("prune",),
    "selection.sparsifier": ("Sparsifier",),
    "storage.exporting": ("export",),
    "storage.store": ("load", "save"),
    "surgery.conversion": ("convert", "units"),
    "surgery.fusion": ("fuse",),
    "surgery.pruning": ("leftovers",),
    "surgery.verification": ("verify",),
    "version": ("__version__",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return import_module(f".{name}", __name__)  # a folder
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
