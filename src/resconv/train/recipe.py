"""How long and how fast to train."""

from dataclasses import dataclass
from typing import Any, Literal

from resconv.data import Augment

__all__ = ["RECIPES", "Recipe"]

# What they differ in, but for the rates: those of a net that learns everything, and of one that has learnt
# to see, from small sets often, and is not to forget it.
RECIPES: dict[str, dict[str, Any]] = {
    "scratch": {"optimizer": "sgd", "weight_decay": 5e-4, "label_smoothing": 0.0},
    "transfer": {"optimizer": "adamw", "weight_decay": 0.01, "label_smoothing": 0.1},
}


@dataclass(frozen=True)
class Recipe:
    """Warm-up over a share of the steps, then cosine to 0, by timm's schedulers and optimizers.

    ``optimizer`` is "sgd" (Nesterov momentum 0.9) or "adamw"; ``weight_decay`` leaves norms, biases and
    gates alone. ``label_smoothing`` is that of ``torch.nn.functional.cross_entropy``. ``distill`` is the share
    of the loss that follows the teacher, where there is one; ``hints`` weighs what layers read against logits in it.
    ``mix`` ("mixup", "cutmix") trains on images, and labels, blended two by two (see mixing.py).
    ``augment`` is how images are changed at random; None is what is usual for their size. ``ema`` is the decay of an
    average of the weights over the steps, which becomes the trained net (see averaging.py); None is none.
    """

    epochs: int
    lr: float = 0.1
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup: float = 0.05
    seed: int = 0
    distill: float = 0.5
    hints: float = 100.0
    mix: str | None = None
    augment: Augment | None = None
    ema: float | None = None

    def batch_on(self, num_images: int) -> int:
        """Return the images of a step, on all ranks together, where there are ``num_images``."""
        return min(self.batch_size, num_images)

    def count_steps(self, num_images: int) -> int:
        """Return the optimizer steps of the run; an epoch's last images that fill no batch are left out."""
        return self.epochs * (num_images // self.batch_on(num_images))
