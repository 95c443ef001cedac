"""Image sets: where they come from, how an image becomes an input, and batches of them."""

from resconv.data.augmentation import Augment, choose_augment
from resconv.data.datasets import NAMED, check_fit, load, load_val
from resconv.data.folder import list_images
from resconv.data.images import Form, decode_all
from resconv.data.loader import BatchLoader
from resconv.data.scenes import Scene, make_scenes, write_scenes
from resconv.data.splits import ImageData, LazySplit, Split

__all__ = [
    "NAMED",
    "Augment",
    "BatchLoader",
    "Form",
    "ImageData",
    "LazySplit",
    "Scene",
    "Split",
    "check_fit",
    "choose_augment",
    "decode_all",
    "list_images",
    "load",
    "load_val",
    "make_scenes",
    "write_scenes",
]
