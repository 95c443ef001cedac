"""Training by Lightning: dense nets, converted nets under a Sparsifier, and finetuning."""

from .evaluate import evaluate
from .fit import FitResult, Recipe, fit
from .precision import Precision, choose_precision

__all__ = [
    "FitResult",
    "Precision",
    "Recipe",
    "choose_precision",
    "evaluate",
    "fit",
]
