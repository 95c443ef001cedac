"""convert + plan + prune of a large net, against one forward pass (goal: at most 5 of them)."""

import os

import torch

import resconv
from resconv import nets
from resconv.latency.timing import time_together, torch_runner

from .page import stamp, table, write_section

SIZE, BATCH, REPEATS = 224, 8, 3


def main() -> None:
    rows = []
    for name in ("torchvision:resnet152",):
        torch.manual_seed(0)
        model = nets.create(name).eval()
        x = torch.randn(1, 3, SIZE, SIZE)

        def converted(model=model, x=x):
            return resconv.convert(model, x, units="all")

        gated = converted()
        every = list(resconv.gates(gated).values())
        with torch.no_grad():
            for i, gate in enumerate(every):
                gate.scale.fill_(0.1 + i / len(every))
                if gate.control is not None:
                    gate.control.fill_(0.9)
        budget = resconv.Budget(macs=0.6)
        plan = resconv.plan(gated, x, budget)
        calls = {
            "forward": torch_runner(model, torch.randn(BATCH, 3, SIZE, SIZE)),
            "convert": converted,
            "plan": lambda gated=gated, x=x, budget=budget: resconv.plan(gated, x, budget),
            "prune": lambda gated=gated, plan=plan: resconv.prune(gated, plan),
        }
        timings = time_together(calls, repeats=REPEATS, warmup=0)
        ms = {k: t.median_ms for k, t in timings.items()}
        surgery = ms["convert"] + ms["plan"] + ms["prune"]
        rows.append(
            [name, f"{len(plan.remove)} of {len(every)}"]
            + [f"{ms[k]:.0f}" for k in ("forward", "convert", "plan", "prune")]
            + [f"{surgery / ms['forward']:.2f}"]
        )
    header = ["net", "units removed", "forward (ms)", "convert (ms)", "plan (ms)", "prune (ms)"]
    write_section(
        "Time of the surgery",
        f"{stamp()} Forward: batch {BATCH} at {SIZE}x{SIZE}, eager, float32. Convert (all units), "
        "plan (60 % of the MACs, scales all different) and prune run on an example of batch 1. "
        f"{REPEATS} interleaved repeats, medians; the last column is convert + plan + prune over "
        f"forward. Load average {os.getloadavg()[0]:.0f} on "
        f"{os.cpu_count()} cores.\n\n" + table([*header, "ratio"], rows),
    )


if __name__ == "__main__":
    main()
