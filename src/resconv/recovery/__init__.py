"""Getting accuracy back: distillation, hints, BatchNorm statistics collected anew."""

from .distillation import distillation_loss, hint_loss
from .hints import FeatureTap, hint_layers
from .recalibration import recalibrate

__all__ = ["FeatureTap", "distillation_loss", "hint_layers", "hint_loss", "recalibrate"]
