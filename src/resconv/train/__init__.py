"""Training by Lightning: dense nets, converted nets under a Sparsifier, and finetuning."""

from resconv.errors import MissingExtraError

try:
    import lightning  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as error:
    raise MissingExtraError(error.name or "lightning", "train", "Training") from error

from .evaluation import evaluate
from .fitting import FitResult, fit
from .precision import Precision, choose_precision
from .ranks import Ranks, join
from .recipe import RECIPES, Recipe
from .recorded import RecordedNet

__all__ = [
    "RECIPES",
    "FitResult",
    "Precision",
    "Ranks",
    "Recipe",
    "RecordedNet",
    "choose_precision",
    "evaluate",
    "fit",
    "join",
]
