"""``resconv export``: files for other runtimes."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from resconv.errors import printable

from .options import TrustSource
from .stopping import Stoppable

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv export runs/digits

  resconv export runs/digits --to model.pt2

  resconv export saved_net --to model.xml

  resconv export runs/digits --to app.onnx --with-preprocessing --layout nhwc --softmax

  resconv export runs/digits --int8
"""


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Stoppable)(export)


def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder that resconv.save wrote.")],
    to: Annotated[
        Path | None,
        typer.Option(
            help="A .onnx, .pt2 (torch.export), .xml (OpenVINO), .pte (ExecuTorch) or .tflite (LiteRT) file; default: "
            "model.onnx there."
        ),
    ] = None,
    with_preprocessing: Annotated[
        bool,
        typer.Option(
            "--with-preprocessing",
            help="Let the file read uint8 pixels of images that are resized and cropped, and normalise them.",
        ),
    ] = False,
    layout: Annotated[
        Literal["nchw", "nhwc"], typer.Option(help="Of those pixels: nchw or nhwc.")
    ] = "nchw",
    softmax: Annotated[
        bool,
        typer.Option("--softmax", help="With --with-preprocessing: give probabilities."),
    ] = False,
    dynamic_size: Annotated[
        bool,
        typer.Option("--dynamic-size", help="Leave the height and width of images open, too."),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Write ONNX in 8 bits, calibrated on the run's training images and judged on its test images; "
            "default: model-int8.onnx there.",
        ),
    ] = False,
    trust_source: TrustSource = False,
) -> None:
    """Write a compact net for another runtime, and check the file by running it.

    The file says how images become its inputs: in an ONNX file, metadata_props.
    """
    import resconv
    from resconv import run as runs
    from resconv.errors import ExportError
    from resconv.run.surgery import compact_of

    if softmax and not with_preprocessing:
        raise ExportError(
            "--softmax is for files that read pixels: add --with-preprocessing, or leave it out."
        )
    options: dict[str, Any] = {}
    if with_preprocessing:
        options = {"pixels": layout, "softmax": softmax}
    if dynamic_size:
        if to is None:
            raise ExportError(
                "--dynamic-size: the run's own model.onnx stays as it is; add --to FILE."
            )
        options["dynamic_size"] = True
    if int8:
        _refuse_int8(run, to)
        opened = runs.open_run(run, typer.echo, trust_source=trust_source)
        runs.quantise(opened, to, **options)
        return
    if with_preprocessing:
        to = to or run / "model-pixels.onnx"
    if _is_saved_net(run):
        _say(_export_saved(run, to or run / "model.onnx", trust_source, options))
        return
    current = runs.open_run(run, typer.echo, trust_source=trust_source)
    if to is None:
        runs.run_stage(current, "export", again=True)
        if not (run / "model.onnx").is_file():
            raise ExportError(f"{run} has no ONNX file now; the reason is above.")
        return
    _say(resconv.export(compact_of(current), to, current.example(), plan=current.plan(), **options))


def _is_saved_net(folder: Path) -> bool:
    """Whether the folder holds a saved net, and no run."""
    return (folder / "model.json").is_file() and not (folder / "config.json").is_file()


def _refuse_int8(run: Path, to: Path | None) -> None:
    """Refuse what cannot be calibrated or written, before anything is done."""
    from resconv.errors import ExportError

    if to is not None and to.suffix != ".onnx":
        raise ExportError(f"--int8 --to {to}: files in 8 bits are ONNX; let it end in .onnx.")
    if _is_saved_net(run):
        raise ExportError(
            f"{run} is a saved net and names no images, which --int8 calibrates with. Give the run folder that it "
            "comes from; from Python, resconv.storage.quantising.quantise_onnx takes inputs of your own."
        )


def _export_saved(folder: Path, to: Path, trust_source: bool, options: dict[str, Any]) -> Any:
    import torch

    import resconv
    from resconv.analysis.input_spec import make_inputs
    from resconv.errors import ExportError
    from resconv.storage.store import read_header

    header = read_header(folder)
    if options.get("pixels"):  # which the preprocessing describes
        return resconv.export(
            resconv.load(folder, trust_source=trust_source), to, plan=header.plan, **options
        )
    if header.inputs is None:
        raise ExportError(
            f"{folder} does not say what its network is fed. Save it with its inputs: "
            "resconv.save(net, path, example_inputs=x), or call resconv.export from Python."
        )
    net = resconv.load(folder, trust_source=trust_source)
    inputs = make_inputs(header.inputs, torch.Generator().manual_seed(0))
    return resconv.export(net, to, inputs, plan=header.plan, **options)


def _say(done: Any) -> None:
    opset = f", opset {done.opset}" if done.opset else ""
    typer.echo(
        f"{printable(str(done.path))}: {done.format}{opset}, {done.num_bytes:,} bytes, "
        f"{'dynamic' if done.dynamic_batch else 'fixed'} batch, relative error "
        f"{done.verification.max_rel_error:.1e}"
    )
