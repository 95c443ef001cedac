"""``resconv compress``: the whole job."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .options import (
    DryRun,
    Fresh,
    Json,
    Out,
    Quiet,
    say_warnings,
    show_json,
    show_table,
    voice,
)
from .settings import takes_config
from .stopping import Resumable

if TYPE_CHECKING:
    from resconv.run import Config
    from resconv.run.metrics import Metrics

__all__ = ["register"]

EXAMPLES = """
[bold]Examples[/bold]

  resconv compress --model resnet20 --data digits --macs 0.5 --out runs/digits

  resconv compress --model resnet56 --data cifar10 --macs 0.35 --finetune-epochs 20 --out runs/c56

  resconv compress --model timm:resnet18 --data folder:photos --weights mine.safetensors --macs 60% --out runs/mine

  resconv compress --model resnet56 --data cifar10 --latency-ms 1.2 --runtime onnxruntime --threads 1 --out runs/fast

  resconv compress --model plainnet56 --data digits --macs 0.5 --epochs 0 --sparse-epochs 30 --out runs/one

  resconv compress --config runs/mine/config.json --macs 0.4 --out runs/smaller --dry-run

  torchrun --nproc-per-node 4 -m resconv compress --model resnet56 --data cifar10 --macs 0.5 --out runs/c56
"""

_WRITTEN = (
    "plan.json",
    "model.safetensors",
    "model.json",
    "README.md",
    "model.onnx",
    "latency.json",
    "metrics.json",
    "report.html",
)


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES, cls=Resumable)(compress)


@takes_config
def compress(
    config: "Config",
    out: Out,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a network shallower, end to end: train, sparsify, prune, verify, export, measure.

    A stopped run goes on where it was when the same command is given again.

    With other settings of finetuning, pruning and finetuning alone are done anew.
    """
    from resconv import run as runs

    from .rehearsal import rehearse

    if dry_run:
        rehearse(out, config, fresh=fresh, json=json)
        return
    run = runs.begin(out, config, fresh=fresh, say=voice(quiet, json))
    metrics = runs.compress(run)
    if metrics is None:  # another process leads
        return
    if json:
        show_json(metrics)
    elif not quiet:
        _show(out, config, metrics)
    say_warnings(metrics, err=json or quiet)


def _show(out: Path, config: "Config", metrics: "Metrics") -> None:
    from resconv.run.report.table import epochs_note, rows
    from resconv.run.surgery import in_convs

    show_table(
        f"{config.net.model} on {config.data.source}: {in_convs(metrics)}",
        ["", "dense", "compact", "change"],
        rows(metrics),
    )
    if note := epochs_note(metrics):
        typer.echo(note)
    typer.echo("Written:")
    for name in _WRITTEN:
        if (out / name).is_file():
            typer.echo(f"  {out / name}")
