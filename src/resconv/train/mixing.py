"""Training images blended two by two: mixup (Zhang et al. 2017), CutMix (Yun et al. 2019).

A net that has its training images by heart learns no more from them, and as a teacher says about them what
their labels say. On blended images it says what it has learnt of the classes (Beyer et al. 2022, arXiv
2106.05237).
"""

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import CutMix, MixUp

from resconv.data.augmentation import seed_of
from resconv.errors import RunError

__all__ = ["MIXES", "Mixing"]

MIXES = {"mixup": MixUp, "cutmix": CutMix}


class Mixing:
    """Blends the images of a batch, and their labels alike, by shares that are drawn uniformly, one a batch.

    What is drawn depends on ``seed`` and the step alone, so a run that was stopped goes on as it would have.

    Raises:
        RunError: ``kind`` is none of :data:`MIXES`.
    """

    def __init__(self, kind: str, num_classes: int, seed: int) -> None:
        if kind not in MIXES:
            raise RunError(f"mix={kind!r}: choose one of {', '.join(MIXES)}.")
        self._blend: nn.Module = MIXES[kind](alpha=1.0, num_classes=num_classes)
        self._seed = seed

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return images of the same shape, and for each the share of every class: (N, classes).

        ``labels`` are class numbers, (N,).
        """
        # The transforms draw from the global state of the CPU.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self._seed, step))
            blended, shares = self._blend(images, labels)
        return blended, shares
