"""The main job as a run folder: stages that are done once, and picked up where they stopped."""

from .config import Config
from .folder import FROM_PRUNE, RunFolder
from .pipeline import STAGES, begin, compress, open_run, run_stage

__all__ = [
    "FROM_PRUNE",
    "STAGES",
    "Config",
    "RunFolder",
    "begin",
    "compress",
    "open_run",
    "run_stage",
]
