"""The digits of scikit-learn: 1,797 handwritten digits, scanned to 8 x 8 pixels of 17 levels."""

import torch
from torch import Tensor

from resconv.errors import MissingExtraError

__all__ = ["load_scans"]


def load_scans(wanted_by: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return the scans (N, 8, 8) as uint8, their labels (N,), and the names of the ten classes.

    Raises:
        MissingExtraError: scikit-learn is not installed; it says what wanted it.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train", f"The dataset {wanted_by!r}") from error
    bunch = load_digits()
    levels = torch.from_numpy(bunch.images)  # 0..16
    scans = (levels * (255 / 16)).round().to(torch.uint8)
    names = tuple(str(name) for name in bunch.target_names)
    return scans, torch.from_numpy(bunch.target).long(), names
