"""The main job as a run folder: stages that are done once, and picked up where they stopped.

Names are loaded when they are first used: the help of the command line needs the settings alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config as Config
    from .folder import RunFolder as RunFolder
    from .pipeline import STAGES as STAGES
    from .pipeline import begin as begin
    from .pipeline import compress as compress
    from .pipeline import open_run as open_run
    from .pipeline import quantise as quantise
    from .pipeline import rehearse as rehearse
    from .pipeline import run_stage as run_stage
    from .pipeline import use_plan as use_plan

_HOME_OF = {
    "Config": "config",
    "RunFolder": "folder",
    **dict.fromkeys(
        (
            "STAGES",
            "begin",
            "compress",
            "open_run",
            "quantise",
            "rehearse",
            "run_stage",
            "use_plan",
        ),
        "pipeline",
    ),
}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
