"""The likeliest classes of images."""

from collections.abc import Iterator, Sequence

from msgspec import Struct

from resconv.data import Form, decode_all
from resconv.data.images import EncodedImage

from .classifier import Classifier

__all__ = ["BATCH", "Prediction", "predict"]

BATCH = 32


class Prediction(Struct, frozen=True):
    """The likeliest classes of an image, the first first: names (or numbers) and probabilities."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    classifier: Classifier, images: Sequence[EncodedImage], *, top: int = 5
) -> Iterator[Prediction]:
    """Yield what the net says of each image, in order.

    Raises:
        DataError: an image cannot be read.
        ResConvError: see :meth:`Classifier.probabilities`.
    """
    form = Form.of(classifier.preprocessing)
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        found = classifier.probabilities(decode_all(part, form))
        names = classifier.preprocessing.class_names or tuple(map(str, range(found.shape[1])))
        best = found.topk(min(top, found.shape[1]))
        for image, shares, rows in zip(
            part, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            yield Prediction(image.place, tuple(names[r] for r in rows), tuple(shares))
