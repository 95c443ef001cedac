"""A run, a saved net or a file of another runtime, opened to classify images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resconv.errors import DataError, LoadError, VerificationError
from resconv.nn.pixels import scale_and_shift
from resconv.preprocessing import Preprocessing, from_metadata
from resconv.storage.runtimes import SUFFIXES, Opened, first_line, open_file
from resconv.storage.store import load
from resconv.surgery.provenance import provenance_of

__all__ = ["Classifier", "open_classifier"]

_FORMATS = ("normalised", "uint8 nchw", "uint8 nhwc")


@dataclass(frozen=True)
class Classifier:
    """A net that tells images apart, and how they are prepared for it.

    Attributes:
        place: where it is from.
        preprocessing: its own.
        run: from inputs to logits, or to probabilities.
        input_format: "normalised" (float), "uint8 nchw" or "uint8 nhwc".
        gives_probabilities: whether ``run`` does.
        batch: the only number of images it runs with; None where any will do.
    """

    place: Path
    preprocessing: Preprocessing
    run: Callable[[Tensor], Tensor]
    input_format: str = "normalised"
    gives_probabilities: bool = False
    batch: int | None = None

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return the probability of every class.

        Shape: uint8 (N, C, S, S), resized and cropped -> (N, classes).

        Raises:
            LoadError: it returns something else.
            VerificationError: it does not run on such images.
        """
        inputs = self.inputs(pixels)
        whole = inputs if self.batch is None else _padded(inputs, self.batch)
        parts = [whole] if self.batch is None else list(torch.split(whole, self.batch))
        try:
            out = torch.cat([self.run(part) for part in parts])[: len(pixels)].float()
        except Exception as error:  # of a runtime, or of the net's own forward
            raise VerificationError(
                f"{self.place} does not run on images of {tuple(pixels.shape[1:])}, as its own preprocessing "
                f"says: {first_line(error)}."
            ) from error
        if out.ndim != 2 or len(out) != len(pixels):
            raise LoadError(
                f"{self.place} returns {tuple(out.shape)} for {len(pixels)} images: no classifier's (N, classes)."
            )
        names = self.preprocessing.class_names
        if names and len(names) != out.shape[1]:
            raise LoadError(
                f"{self.place} names {len(names)} classes, and its net tells {out.shape[1]} apart."
            )
        return out if self.gives_probabilities else out.softmax(1)

    def inputs(self, pixels: Tensor) -> Tensor:
        """Return what the net reads of resized and cropped images, uint8 (N, C, S, S)."""
        if self.input_format == "uint8 nhwc":
            return pixels.permute(0, 2, 3, 1).contiguous()
        if self.input_format == "uint8 nchw":
            return pixels
        scale, shift = scale_and_shift(self.preprocessing)
        return pixels.float() * scale + shift


def open_classifier(path: str | Path, *, trust_source: bool = False) -> Classifier:
    """Open a run folder, a folder that ``resconv.save`` wrote, or an .onnx, .xml or .pt2 file.

    Raises:
        TrustError: without ``trust_source``: a .pt2, or a net whose code is not resconv's.
        LoadError: it is missing or damaged, or does not say how images become its inputs.
        MissingExtraError: its runtime is not installed.
    """
    path = Path(path)
    if path.is_dir():
        net = load(path, trust_source=trust_source)
        own = _required(provenance_of(net).preprocessing, path)
        dtype = next((p.dtype for p in net.parameters()), torch.float32)

        def run(inputs: Tensor) -> Tensor:
            with torch.inference_mode():
                out: Tensor = net(inputs.to(dtype))
            return out

        return Classifier(path, own, run)
    if not path.exists():
        raise LoadError(
            f"There is no {path}: give a run folder, a saved net, {', '.join(SUFFIXES)}."
        )
    opened = open_file(path, trust_source=trust_source)
    try:
        own = _required(from_metadata(opened.texts), path)
    except DataError as error:
        raise LoadError(f"{path}: {error}") from error
    form = opened.texts.get("input_format", "normalised")
    if form not in _FORMATS:
        raise LoadError(f"{path} reads {form[:60]!r}; known are {', '.join(_FORMATS)}.")
    is_done = opened.texts.get("output_format") == "probabilities"
    return Classifier(path, own, _runner(opened, path), form, is_done, opened.batch)


def _required(found: Preprocessing | None, path: Path) -> Preprocessing:
    if found is None:
        raise LoadError(
            f"{path} does not say how images become its inputs. Write it again with that: "
            "resconv.save(net, path, preprocessing=Preprocessing(...)), or resconv.export with the same."
        )
    return found


def _runner(opened: Opened, path: Path) -> Callable[[Tensor], Tensor]:
    dtype = getattr(torch, (opened.inputs and opened.inputs.tensors()[0].dtype) or "float32")

    def run(inputs: Tensor) -> Tensor:
        outputs = opened.run(inputs.to(dtype))
        if len(outputs) != 1:
            raise LoadError(f"{path} has {len(outputs)} outputs: no classifier's one.")
        return outputs[0]

    return run


def _padded(inputs: Tensor, batch: int) -> Tensor:
    """Fill the last batch up with its last image."""
    missing = -len(inputs) % batch
    return torch.cat([inputs, inputs[-1:].expand(missing, *inputs.shape[1:])])
