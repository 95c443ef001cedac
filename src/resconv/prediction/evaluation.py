"""How often a net is right about a labelled set."""

import torch
from msgspec import Struct
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from resconv.data import LazySplit, decode_all
from resconv.errors import DataError

from .classifier import Classifier
from .images import BATCH

__all__ = ["Evaluation", "evaluate"]


class Evaluation(Struct, frozen=True):
    """Figures over a set.

    Attributes:
        num_images: how many it has.
        top1, top5: percent of images whose class is the likeliest, or among the five likeliest.
        class_names: of the net's outputs.
        num_of_class: images of each class.
        accuracy_of_class: percent that is right of each class; None where it has no image.
        confusion: for each class (row) how many of its images were taken for which.
    """

    num_images: int
    top1: float
    top5: float
    class_names: tuple[str, ...]
    num_of_class: tuple[int, ...]
    accuracy_of_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]

    def confused(self) -> list[tuple[int, str, str]]:
        """Return (how many, class, taken for) of all mistakes, the most frequent first."""
        names = self.class_names
        found = [
            (count, names[i], names[j])
            for i, row in enumerate(self.confusion)
            for j, count in enumerate(row)
            if count and i != j
        ]
        return sorted(found, key=lambda mistake: -mistake[0])


def evaluate(classifier: Classifier, split: LazySplit, class_names: tuple[str, ...]) -> Evaluation:
    """Judge a net by labelled images, whose labels are the numbers of ``class_names``.

    Classes are told by their names: the set may have them in another order, or some of them alone.

    Raises:
        DataError: the set has classes that the net does not know, or an image cannot be read.
        ResConvError: see :meth:`Classifier.probabilities`.
    """
    output = _outputs_of(classifier, class_names)
    labels = output[split.labels]
    found = []
    for start in range(0, len(split), BATCH):
        pixels = decode_all(split.encoded[start : start + BATCH], split.form)
        found.append(classifier.probabilities(pixels))
    likely = torch.cat(found)
    count = likely.shape[1]
    if int(labels.max()) >= count:
        raise DataError(
            f"{classifier.place} tells {count} classes apart, the set has {len(class_names)}."
        )
    names = classifier.preprocessing.class_names or tuple(map(str, range(count)))
    best = likely.topk(min(5, count)).indices
    is_right = best == labels.unsqueeze(1)
    confusion = multiclass_confusion_matrix(best[:, 0], labels, count)
    total = confusion.sum(1)
    return Evaluation(
        num_images=len(labels),
        top1=_percent(is_right[:, 0]),
        top5=_percent(is_right.any(1)),
        class_names=names,
        num_of_class=tuple(total.tolist()),
        accuracy_of_class=tuple(
            100 * right / n if n else None
            for right, n in zip(confusion.diagonal().tolist(), total.tolist(), strict=True)
        ),
        confusion=tuple(map(tuple, confusion.tolist())),
    )


def _percent(is_right: Tensor) -> float:
    return 100 * is_right.sum().item() / len(is_right)


def _outputs_of(classifier: Classifier, class_names: tuple[str, ...]) -> Tensor:
    """Return the net's output for each class of the set."""
    known = classifier.preprocessing.class_names
    if not known:
        return torch.arange(len(class_names))
    if unknown := [n for n in class_names if n not in known]:
        raise DataError(
            f"{classifier.place} does not know {len(unknown)} of the set's {len(class_names)} classes "
            f"({', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}). It knows "
            f"{', '.join(known[:5])}{', ...' if len(known) > 5 else ''}."
        )
    return torch.tensor([known.index(n) for n in class_names])
