"""Write the before/after table of a finished run folder into docs/results.md."""

import sys
from dataclasses import fields
from pathlib import Path

from resconv.run import Config, RunFolder
from resconv.run.report.table import rows

from .page import table, write_section


def command_of(config: Config) -> str:
    """Return the command line that makes this run."""
    names = {"num_params": "params"}
    parts = ["resconv compress"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None or value == field.default or field.name in ("progress", "devices"):
            continue
        flag = "--" + names.get(field.name, field.name).replace("_", "-")
        parts.append(flag if value is True else f"{flag} {value}")
    return " ".join(parts)


def main() -> None:
    folder = RunFolder.open(Path(sys.argv[1]))
    config, metrics = folder.config(), folder.metrics()
    plan = folder.read_json("plan.json")
    measured = metrics["measured"]
    minutes = sum(metrics["seconds"].values()) / 60
    epochs = "/".join(map(str, config.stage_epochs()))
    top1 = metrics["top1_pruned"] - metrics["top1_gated"]
    body = (
        f"`{command_of(config)}`, {metrics['date']}, seed {config.seed}, {metrics['machine']}. "
        f"Epochs dense/sparse/finetune: {epochs}; {minutes:.0f} minutes in all.\n\n"
        + table(["", "dense", "compact", "change"], [list(r) for r in rows(metrics)])
        + f"\n\nRemoved: {len(plan['remove'])} of {metrics['num_units']} units "
        f"({', '.join('`' + n + '`' for n in plan['remove'])}); "
        f"{len(metrics['removed_with_nonzero_scale'])} of them with a scale other than 0. Pruning "
        f"itself changed top-1 by {top1:+.2f} points; the compact net agrees with the gated one to "
        f"{metrics['verify']['max_rel_error']:.1e} (relative). Latency: batch {measured['batch']}, "
        f"{measured['threads']} threads, medians of {measured['repeats']} interleaved repeats, "
        "norms folded on both sides."
    )
    write_section(f"{config.model} on {Path(config.data).name}, MACs {config.macs}", body)


if __name__ == "__main__":
    main()
