"""Image sets in memory, and the loader that augments them in batches on the device."""

from resconv.data.datasets import check_fit, load
from resconv.data.loader import Augment, BatchLoader, default_augment
from resconv.data.splits import ImageData, LazySplit, Split

__all__ = [
    "Augment",
    "BatchLoader",
    "ImageData",
    "LazySplit",
    "Split",
    "check_fit",
    "default_augment",
    "load",
]
