"""Make trained convolutional networks shallower.

convert -> train with a Sparsifier -> plan -> prune -> verify -> save and export.
"""

from .budget import Budget as Budget
from .choose import plan as plan
from .convert import convert as convert
from .distill import distill as distill
from .distill import follow as follow
from .errors import ResConvError as ResConvError
from .export import export as export
from .fuse import fuse as fuse
from .gates import copy_zeros as copy_zeros
from .gates import gates as gates
from .hints import Watched as Watched
from .hints import skeleton as skeleton
from .latency import LatencyTable as LatencyTable
from .latency import measure_latency as measure_latency
from .plan import Plan as Plan
from .prune import leftovers as leftovers
from .prune import prune as prune
from .recalibrate import recalibrate as recalibrate
from .sparsify import Sparsifier as Sparsifier
from .store import load as load
from .store import save as save
from .trace import count as count
from .units import units as units
from .verify import verify as verify
from .version import __version__ as __version__
