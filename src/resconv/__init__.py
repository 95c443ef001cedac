"""Make trained convolutional networks shallower.

convert -> train with a Sparsifier -> plan -> prune -> verify -> save and export.
"""

from . import signals as signals  # first: it reads signals from here on
from .analysis.counting import count as count
from .analysis.listing import units as units
from .errors import ResConvError as ResConvError
from .latency.table import LatencyTable as LatencyTable
from .latency.table import measure_latency as measure_latency
from .nn.gates import copy_zeros as copy_zeros
from .nn.gates import gates as gates
from .planning.budget import Budget as Budget
from .planning.plan import Plan as Plan
from .recovery.distillation import distill as distill
from .recovery.distillation import follow as follow
from .recovery.hints import Watched as Watched
from .recovery.hints import skeleton as skeleton
from .recovery.recalibration import recalibrate as recalibrate
from .selection.planner import plan as plan
from .selection.sparsifier import Sparsifier as Sparsifier
from .storage.exporting import export as export
from .storage.store import load as load
from .storage.store import save as save
from .surgery.conversion import convert as convert
from .surgery.fusion import fuse as fuse
from .surgery.pruning import leftovers as leftovers
from .surgery.pruning import prune as prune
from .surgery.verification import verify as verify
from .version import __version__ as __version__
