"""Image sets: where they come from, how an image becomes an input, and batches of them."""

from resconv.data.augmentation import Augment, choose_augment
from resconv.data.datasets import check_fit, load
from resconv.data.loader import BatchLoader
from resconv.data.splits import ImageData, LazySplit, Split

__all__ = [
    "Augment",
    "BatchLoader",
    "ImageData",
    "LazySplit",
    "Split",
    "check_fit",
    "choose_augment",
    "load",
]
