"""What the dense and the compact net say of the images that judge them."""

import base64
import io
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resconv.analysis.inputs import evaluating
from resconv.data import BatchLoader, ImageData

__all__ = ["ClassShare", "Judgement", "Sample", "judge"]

_SAMPLES = 8
_BATCH = 500


@dataclass(frozen=True)
class ClassShare:
    """Percent of a class's images that are right; ``dense`` is None where that net was not trained."""

    name: str
    num_images: int
    dense: float | None
    compact: float


@dataclass(frozen=True)
class Sample:
    """An image that the dense net has right and the compact net wrong, as a data URI."""

    uri: str
    label: str
    said: str


@dataclass(frozen=True)
class Judgement:
    """What comes of every class, and images that were lost and gained.

    ``lost`` counts images right before and wrong after, ``gained`` the other way round.
    """

    num_images: int
    classes: tuple[ClassShare, ...]
    lost: int = 0
    gained: int = 0
    samples: tuple[Sample, ...] = ()


def judge(dense: nn.Module | None, compact: nn.Module, data: ImageData) -> Judgement:
    """Compare two nets on ``data.val``; both are left as they were."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = data.val.labels
    after = _classes(compact, data, device)
    before = None if dense is None else _classes(dense, data, device)
    names = data.class_names or tuple(map(str, range(data.num_classes)))
    shares = []
    for number, name in enumerate(names):
        of = labels == number
        if count := int(of.sum()):
            first = None if before is None else _percent(before[of] == number)
            shares.append(ClassShare(name, count, first, _percent(after[of] == number)))
    if before is None:
        return Judgement(len(labels), tuple(shares))
    was, now = before == labels, after == labels
    lost = (was & ~now).nonzero().flatten()
    return Judgement(
        len(labels),
        tuple(shares),
        len(lost),
        int((~was & now).sum()),
        tuple(
            Sample(uri, names[int(labels[row])], names[int(after[row])])
            for row, uri in _pictures(data, lost[:_SAMPLES])
        ),
    )


def _classes(model: nn.Module, data: ImageData, device: torch.device) -> Tensor:
    """Return the likeliest class of every image, on the CPU."""
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    loader = BatchLoader(data.val, _BATCH, data.preprocessing, device=device)
    model.to(device)
    try:
        with evaluating(model), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat([model(images).argmax(1).cpu() for images, _ in loader])
    finally:
        model.to(home)


def _percent(is_right: Tensor) -> float:
    return 100 * float(is_right.float().mean())


def _pictures(data: ImageData, rows: Tensor) -> list[tuple[int, str]]:
    from PIL import Image

    found = []
    for row in rows.tolist():
        pixels = data.val[row][0] if not hasattr(data.val, "images") else data.val.images[row]
        array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
        picture = Image.fromarray(array)
        picture.thumbnail((160, 160))
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        found.append((row, "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()))
    return found
