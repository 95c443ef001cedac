"""Which nets torch.fx, torch.export and a recorded forward can trace, and in what time.

    python -m benchmarks.tracing [EVERY]

Takes the smallest variant of every EVERY-th convolutional family of timm (4 by default), in eval mode,
and writes a section of docs/coverage.md. Seconds are of this process's CPU time.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from resconv.analysis.recorder import record

from .page import stamp, table, write_section
from .zoo import build, timm_families

WAYS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "torch.fx.symbolic_trace": lambda model, x: fx.symbolic_trace(model),
    "torch.export.export(strict=False)": lambda model, x: torch.export.export(
        model, (x,), strict=False
    ),
    "one recorded forward": record,
}


def main() -> None:
    warnings.filterwarnings("ignore")
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    failing: dict[str, list[str]] = {way: [] for way in WAYS}
    names = [members[0] for _, members in sorted(timm_families().values())][::every]
    for name in names:
        model, x = build(name)
        for way, trace in WAYS.items():
            start = time.process_time()
            try:
                with torch.no_grad():
                    trace(model, x)
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0]
                failing[way].append(
                    f"{name.partition(':')[2]} ({type(error).__name__}: {reason[:80]})"
                )
                continue
            seconds[way].append(time.process_time() - start)
        print(name, *(f"{s[-1]:.1f}" if s else "-" for s in seconds.values()), flush=True)
    lines = [
        [
            way,
            f"{len(s)} of {len(names)}",
            f"{statistics.median(s):.2f}",
            f"{max(s):.1f}",
            "; ".join(failing[way]).replace("|", "/") or "none",
        ]
        for way, s in seconds.items()
    ]
    write_section(
        "Tracing",
        f"{stamp()} The smallest variant of every {every}th convolutional family of timm.\n\n"
        + table(["way", "traced", "median seconds", "longest", "not traced"], lines),
        page="coverage.md",
    )


if __name__ == "__main__":
    main()
