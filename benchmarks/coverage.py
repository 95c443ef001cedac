"""Prune a random half of every convolutional family of timm and all of torchvision.

Appends to build/coverage.jsonl, goes on where it stopped, and writes docs/coverage.md.
"""

import json
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path

import timm
import torch
import torchvision

import resconv
from resconv import nets
from resconv.verify import verify
from tests.helpers import randomise, randomise_gates, some_plan

from .page import stamp, table, write_section

LOG = Path("build/coverage.jsonl")
# Families without convolutions in their body, or of language-image towers.
SKIP = (
    "vision_transformer",
    "vit",
    "beit",
    "cait",
    "deit",
    "eva",
    "swin",
    "xcit",
    "volo",
    "crossvit",
    "tnt",
    "twins",
    "naflex",
    "mlp_mixer",
    "sequencer",
    "pit",
    "visformer",
    "tiny_vit",
    "hiera",
    "davit",
    "deepseek",
    "gemma",
    "gcvit",
    "maxxvit",
    "mvitv2",
    "nest",
    "nextvit",
    "levit",
    "efficientformer",
    "coat",
    "convit",
    "vision_transformer_sam",
    "shvit",
    "swiftformer",
    "mobilevit",
    "fastvit",
    "rdnet_vit",
    "csatv2",
    "pvt_v2",
    "efficientvit_msra",
    "vitamin",
    "gpvit",
)
SMALL = (
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs",
    "xx_small",
    "x_small",
    "xs",
    "mini",
    "tiny",
    "small",
    "_s0",
    "_s1",
    "_t0",
    "_t",
    "_s",
    "_a0",
    "_n",
    "14",
    "18",
    "26",
    "42b",
    "46",
    "050",
    "035",
    "_b0",
    "_002",
    "a0",
    "l0",
    "f0",
)


def timm_names() -> list[str]:
    found = []
    for module in timm.list_modules():
        if any(module == s or module.startswith(s) for s in SKIP):
            continue
        by_family: dict[str, list[str]] = defaultdict(list)
        for name in timm.list_models(module=module):
            by_family[name.split("_")[0].rstrip("0123456789")].append(name)
        for names in by_family.values():

            def rank(name: str) -> tuple[int, int, str]:
                return (next((i for i, s in enumerate(SMALL) if s in name), 99), len(name), name)

            found.append("timm:" + min(names, key=rank))
    return sorted(set(found))


def torchvision_names() -> list[str]:
    models = torchvision.models
    skip = ("vit_", "swin", "maxvit", "raft", "quantized", "mvit")
    modules = [models, models.segmentation, models.video]
    names = [n for m in modules for n in models.list_models(module=m)]
    return ["torchvision:" + n for n in sorted(set(names)) if not any(s in n for s in skip)]


def example(name: str, model: torch.nn.Module) -> torch.Tensor:
    video = name.partition(":")[2] in torchvision.models.list_models(
        module=torchvision.models.video
    )
    sizes = [64, 96, 128, 160, 192, 224, 256, 299]  # the smallest that the model takes
    for size in sizes:
        shape = (1, 3, 8, size, size) if video else (1, 3, size, size)
        x = torch.randn(shape)
        try:
            with torch.no_grad():
                model.eval()(x)
        except Exception:
            continue
        return x
    raise resconv.ResConvError(f"{name} runs on no square input of {sizes}")


def one(name: str) -> dict:
    torch.manual_seed(0)
    start = time.perf_counter()
    row: dict = {"model": name}
    try:
        model = randomise(nets.create(name))
        x = example(name, model)
        row["input"] = "x".join(map(str, x.shape[1:]))
        start = time.perf_counter()
        gated = randomise_gates(resconv.convert(model, x, units="all"))
        plan = some_plan(gated, 1)
        row |= {"units": len(resconv.gates(gated)), "removed": len(plan.remove)}
        compact = resconv.prune(gated, plan)
        try:
            row["error"] = verify(gated, compact, x, plan=plan).max_rel_error
            row["outcome"] = "complete"
        except resconv.ResConvError as error:
            # Random weights make some deep nets chaotic: is it rounding, or is it wrong?
            gated, x = gated.double(), x.double()
            exact = resconv.prune(gated, plan)
            exact_error = verify(gated, exact, x, plan=plan, tolerance=1e-4).max_rel_error
            row |= {
                "outcome": "unstable",
                "reason": f"equal in float64 ({exact_error:.0e}); the "
                f"net amplifies float32 rounding. {error}"[:300],
            }
    except resconv.ResConvError as error:
        wrong = type(error).__name__ == "VerificationError"
        row |= {"outcome": "wrong" if wrong else "refused", "reason": str(error)[:300]}
    except Exception as error:
        row |= {"outcome": "crashed", "reason": f"{type(error).__name__}: {error}"[:300]}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def report(rows: list[dict]) -> None:
    for zoo in ("torchvision", "timm"):
        mine = [r for r in rows if r["model"].startswith(zoo)]
        counts = {
            k: sum(r["outcome"] == k for r in mine)
            for k in ("complete", "unstable", "refused", "wrong", "crashed")
        }
        text = ", ".join(f"{v} {k}" for k, v in counts.items())
        lines = [
            [
                r["model"].partition(":")[2],
                r.get("input", ""),
                str(r.get("units", "")),
                str(r.get("removed", "")),
                f"{r['error']:.0e}" if "error" in r else "",
                f"{r['seconds']:.1f}",
                r["outcome"],
                r.get("reason", "").replace("|", "/").replace("\n", " ")[:160],
            ]
            for r in mine
        ]
        write_section(
            zoo,
            f"{stamp()} {len(mine)} models: {text}. float32, random weights, randomised BatchNorm "
            "statistics; a random half of the units removed with random controls, compared with "
            "the gated net.\n\n"
            + table(
                ["model", "input", "units", "removed", "error", "seconds", "outcome", "reason"],
                lines,
            ),
            page="coverage.md",
        )


def main() -> None:
    warnings.filterwarnings("ignore")
    limit = float(sys.argv[1]) if len(sys.argv) > 1 else float("inf")
    LOG.parent.mkdir(exist_ok=True)
    rows = [json.loads(s) for s in LOG.read_text().splitlines()] if LOG.is_file() else []
    done = {r["model"] for r in rows}
    start = time.monotonic()
    for name in [*torchvision_names(), *timm_names()]:
        if name in done or time.monotonic() - start > limit:
            continue
        row = one(name)
        rows.append(row)
        with LOG.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row["outcome"], name, row.get("reason", row.get("error")), flush=True)
    report(rows)


if __name__ == "__main__":
    main()
