"""What a finished net says of images, from nothing but what its own file says about them."""

from .classifier import Classifier, open_classifier
from .evaluation import Evaluation, evaluate
from .images import Prediction, predict

__all__ = ["Classifier", "Evaluation", "Prediction", "evaluate", "open_classifier", "predict"]
