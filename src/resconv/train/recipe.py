"""How long and how fast to train."""

from dataclasses import dataclass

from resconv.data import Augment

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum 0.9, warm-up over a share of the steps, then cosine to 0.

    ``weight_decay`` leaves norms, biases and gates alone. ``distill`` is the share of the loss
    that follows the teacher, where there is one; ``hints`` weighs what layers read against logits in it.
    ``mix`` ("mixup", "cutmix") trains on images, and labels, blended two by two (see mixing.py).
    ``augment`` is how images are changed at random; None is what is usual for their size.
    """

    epochs: int
    lr: float = 0.1
    batch_size: int = 128
    weight_decay: float = 5e-4
    warmup: float = 0.05
    seed: int = 0
    distill: float = 0.5
    hints: float = 100.0
    mix: str | None = None
    augment: Augment | None = None

    def batch_on(self, num_images: int) -> int:
        """Return the images of a step, on all ranks together, where there are ``num_images``."""
        return min(self.batch_size, num_images)

    def count_steps(self, num_images: int) -> int:
        """Return the optimizer steps of the run; an epoch's last images that fill no batch are left out."""
        return self.epochs * (num_images // self.batch_on(num_images))
