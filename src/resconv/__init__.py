"""Make trained convolutional networks shallower.

convert -> train with a Sparsifier -> plan -> prune -> verify -> save and export.
"""

from .budget import Budget as Budget
from .convert import convert as convert
from .errors import ResConvError as ResConvError
from .export import export as export
from .fuse import fuse as fuse
from .gates import gates as gates
from .plan import Plan as Plan
from .plan import plan as plan
from .prune import prune as prune
from .sparsify import Sparsifier as Sparsifier
from .store import load as load
from .store import save as save
from .trace import count as count
from .units import units as units
from .verify import verify as verify

__version__ = "0.1.0"
