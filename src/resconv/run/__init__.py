"""The main job as a run folder: stages that are done once, and picked up where they stopped."""

from .config import Config
from .folder import FROM_PRUNE, RunFolder
from .pipeline import STAGES, begin, compress, open_run, run_stage
from .surgery import adopt

__all__ = [
    "FROM_PRUNE",
    "STAGES",
    "Config",
    "RunFolder",
    "adopt",
    "begin",
    "compress",
    "open_run",
    "run_stage",
]
