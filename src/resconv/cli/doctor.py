"""``resconv doctor``: what is installed here, and what runs would use."""

import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import typer

from .options import Json, show_json, show_table
from .stopping import Stoppable

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv doctor

  resconv doctor --json
"""

# What a user installs by name; the others are for working on resconv.
_EXTRAS = ("train", "onnx", "report", "hf", "yolo", "openvino")


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Stoppable)(doctor)


def doctor(json: Json = False) -> None:
    """Say what is installed, which devices there are, and what runs would use."""
    found = examine()
    if json:
        show_json(found)
        return
    show_table("Versions", ["package", "version"], list(found["versions"].items()))
    rows = [
        (name, "yes" if not missing else f"no: {', '.join(missing)} is missing")
        for name, missing in found["extras"].items()
    ]
    show_table("Extras", ["pip install resconv[...]", "installed"], rows)
    show_table("This machine", ["", "found"], list(found["machine"].items()))
    show_table(
        "Runtimes that nets are timed and checked in",
        ["runtime", "usable"],
        [(name, usable or "not installed") for name, usable in found["runtimes"].items()],
    )


def examine() -> dict[str, Any]:
    """Return versions, extras with what they lack, devices and runtimes, each by name."""
    import torch

    from resconv.latency.timing import processor
    from resconv.train import choose_precision

    packages = (
        "resconv",
        "torch",
        "torchvision",
        "timm",
        "lightning",
        "onnx",
        "onnxruntime",
        "openvino",
    )
    versions = {"python": platform.python_version()}
    versions |= {name: number for name in packages if (number := _version(name))}
    precision = choose_precision()
    machine = {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "threads of torch": str(torch.get_num_threads()),
        "GPUs": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        or "none",
        "precision of training": f"{precision.name} ({precision.reason})",
    }
    return {
        "versions": versions,
        "extras": {extra: _missing(extra) for extra in _EXTRAS},
        "machine": machine,
        "runtimes": {
            "torch": "always",
            "onnxruntime": _providers(),
            "openvino": _version("openvino"),
        },
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _missing(extra: str) -> list[str]:
    """Return the packages of an extra that are not installed."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in requires("resconv") or ()]
    return [
        w.name
        for w in wanted
        if w.marker is not None
        and w.marker.evaluate({"extra": extra})
        and not w.marker.evaluate({"extra": ""})
        and not _version(w.name)
    ]


def _providers() -> str:
    try:
        import onnxruntime
    except ImportError:
        return ""
    return ", ".join(onnxruntime.get_available_providers())
