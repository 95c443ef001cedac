"""A training step of the converted net against the plain net's (goal: at most 1.15x).

The last arm has arrived at half the MACs: its units at 0 rest (see gates.py).
"""

import torch
from torch.nn import functional as F

import resconv
from resconv import nets
from resconv.latency.timing import time_together
from resconv.train import choose_precision

from .page import stamp, table, write_section

ARRIVED = "all + Sparsifier, at 50 % of the MACs"


def step_of(model, optimizer, x, y, autocast):
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    precision = choose_precision()
    rows = []
    cases = [
        (name, autocast, start)
        for name, autocast in (("resnet20", False), ("resnet20", True), ("resnet56", True))
        for start in ("keep", "identity")
    ]
    for name, autocast, start in cases:
        torch.manual_seed(0)
        x = torch.randn(128, 3, 32, 32)
        y = torch.arange(128) % 10
        layout = torch.channels_last if autocast else torch.contiguous_format
        x = x.to(memory_format=layout)
        base = nets.create(name)
        steps = {}
        for arm in ("plain", "blocks", "layers", "all", "all + Sparsifier", ARRIVED):
            model = base
            if arm != "plain":
                model = resconv.convert(base, x[:2], units=arm.split()[0], start=start)
            model = model.train().to(memory_format=layout)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
            total = 20 if arm == ARRIVED else 100_000
            if "Sparsifier" in arm:
                target = resconv.Budget(macs=0.5)
                sparsifier = resconv.Sparsifier(model, target=target, total_steps=total)
                sparsifier.attach(optimizer)
            steps[arm] = step_of(model, optimizer, x, y, autocast)
            if arm == ARRIVED:
                for _ in range(total):
                    steps[arm]()
                assert sparsifier.outcome().met
        timings = time_together(steps, repeats=6, warmup=1)
        plain = timings["plain"].median_ms
        rows.append(
            [name, start, "bf16, channels last" if autocast else "float32", f"{plain:.0f}"]
            + [f"{timings[a].median_ms / plain:.3f}" for a in steps if a != "plain"]
        )
    write_section(
        "Cost of a training step",
        f"{stamp()} Batch 128, interleaved, medians; the columns after the plain net's "
        f"milliseconds are ratios to it. This machine trains in {precision.name} "
        f"({precision.reason}). With start=keep the shortcut is closed (p = 0) until "
        "training opens it. What a layer unit costs is one pass `z + p * x` forward, and one "
        "dot product and one sum of gradients backward; a block unit costs nothing of the size of "
        "an activation, its scale goes into the norm. Units that a target has brought to 0 are not "
        "computed any more.\n\n"
        + table(["net", "start", "format", "plain (ms)", *list(steps)[1:]], rows),
    )


if __name__ == "__main__":
    main()
