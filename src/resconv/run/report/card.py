"""The model card: ``README.md`` beside a run's net, as the Hugging Face hub reads it."""

import json
from pathlib import Path
from typing import Any

from resconv.files import write_text
from resconv.preprocessing import resized_side

from ..config import Config
from ..metrics import Metrics
from .table import rows
from .words import name_of

__all__ = ["TO_FILL_IN", "card_of", "write_card"]

# While this line stands, the card is written anew with the net; then it is the user's.
TO_FILL_IN = (
    "license: unknown  # of the weights that it began with: fill in, and this file stays as it is"
)


def write_card(path: Path, config: Config, metrics: Metrics) -> bool:
    """Write the card to ``path``, unless its licence was filled in; return whether it was written."""
    if path.is_file() and TO_FILL_IN not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    write_text(path, card_of(config, metrics))
    return True


def card_of(config: Config, metrics: Metrics) -> str:
    """Return the card's text: metadata, what the net is, how it is used, and what it was measured at."""
    net, source = config.net.model, config.data.source
    has_onnx = metrics.onnx is not None
    parts = [
        "---",
        *_metadata(config, metrics),
        "---",
        "",
        f"# {_plain(net)}, made shallower",
        "",
        f"A `{_plain(net)}` for the {len(_classes(metrics))} classes of `{_plain(name_of(source))}`, from "
        "which resconv removed layers. What is left are ordinary layers.",
        "",
        "| | before | after | change |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows(metrics)),
        "",
        f"Measured on {_plain(metrics.machine)}, seed {config.training.seed}, {metrics.date}. One run is one seed.",
        "",
        "## Use it",
        "",
        "In the folder of this file:",
        "",
        "```python",
        "from resconv.data import list_images",
        "from resconv.prediction import open_classifier, predict",
        "",
        'found = list(predict(open_classifier("."), list_images("photo.jpg")))',
        "```",
        "",
        "`model.safetensors` and `model.json` are the net; loading them unpickles nothing."
        + (" `model.onnx` needs ONNX Runtime alone." if has_onnx else ""),
        "",
        *_preprocessing(metrics),
        "## Licence",
        "",
        "To be filled in: that of the weights and images which the net began with binds this one, too.",
        "",
    ]
    return "\n".join(parts)


def _metadata(config: Config, metrics: Metrics) -> list[str]:
    """Return the lines of the front matter; a JSON string is a YAML one."""
    net, source = config.net.model, config.data.source
    tags = ["image-classification", "layer-pruning", "resconv", *(["onnx"] if metrics.onnx else [])]
    lines = [
        TO_FILL_IN,
        "library_name: resconv",
        "pipeline_tag: image-classification",
        f"tags: {json.dumps(tags)}",
    ]
    zoo, _, name = net.partition(":")
    if zoo == "hf-hub" or (zoo == "timm" and "." in name):
        lines.append(f"base_model: {json.dumps(name if zoo == 'hf-hub' else f'timm/{name}')}")
    kind, known = source.partition(":")[0], name_of(source)
    if kind == "hf":
        lines.append(f"datasets: {json.dumps([known])}")
    if metrics.top1_compact is not None:
        result: dict[str, Any] = {
            "task": {"type": "image-classification"},
            "dataset": {"name": known, "type": known if kind == "hf" else kind},
            "metrics": [{"type": "accuracy", "value": round(metrics.top1_compact / 100, 4)}],
        }
        index = [{"name": f"{net}, made shallower", "results": [result]}]
        lines.append(f"model-index: {json.dumps(index)}")
    return lines


def _classes(metrics: Metrics) -> tuple[str, ...]:
    return () if metrics.preprocessing is None else metrics.preprocessing.class_names


def _preprocessing(metrics: Metrics) -> list[str]:
    images = metrics.preprocessing
    if images is None:
        return []
    resized = resized_side(images.size, images.crop_fraction)
    mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (images.mean, images.std))
    return [
        "## How images become inputs",
        "",
        f"Channels {images.channel_order or 'as given'}; the shorter side resized "
        f"({images.interpolation}) to {resized} pixels; the centre square of {images.size} "
        f"cut out; (pixel / 255 - mean) / std with mean {mean} and std {std}.",
        "",
    ]


def _plain(text: str) -> str:
    """Return text that no Markdown or YAML sees anything in."""
    return " ".join(text.replace("`", "'").split())


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")
