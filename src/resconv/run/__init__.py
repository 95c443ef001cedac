"""The main job as a run folder: stages that are done once, and picked up where they stopped."""

from .config import Config
from .folder import RunFolder
from .pipeline import STAGES, begin, compress, open_run, run_stage, use_plan

__all__ = [
    "STAGES",
    "Config",
    "RunFolder",
    "begin",
    "compress",
    "open_run",
    "run_stage",
    "use_plan",
]
