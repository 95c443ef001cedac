"""How closely nets that were taught follow their teacher, and whether that makes them right.

``python -m benchmarks.followed SUITE`` reads the nets of a suite's distilled arms from their runs'
folders, so it is for the machine that trained them.
"""

import argparse

import torch
from torch import Tensor, nn

import resconv
from resconv import data as datasets
from resconv.data import BatchLoader, ImageData, Split

from .accuracy import started
from .arms import SUITES, Job, read_results
from .claims import schedule_of, words_for
from .page import stamp, table, write_section

IMAGES = 10_000  # of the training images; all of the others


def logits_of(model: nn.Module, split: Split, data: ImageData) -> tuple[Tensor, Tensor]:
    """Return the logits (N, classes) and the labels (N,) of a split's first images."""
    loader = BatchLoader(
        split, 500, shuffle=False, seed=0, augment=None, mean=data.mean, std=data.std
    )
    outputs, labels = [], []
    with torch.no_grad():
        for images, truth in loader:
            outputs.append(model(images))
            labels.append(truth)
            if sum(map(len, labels)) >= IMAGES:
                break
    return torch.cat(outputs), torch.cat(labels)


def row_of(name: str, found: list[tuple[Tensor, Tensor]], taught: list[Tensor]) -> list[str]:
    cells = [name]
    for (logits, labels), wanted in zip(found, taught, strict=True):
        said = logits.argmax(1)
        right = 100 * (said == labels).float().mean()
        alike = 100 * (said == wanted.argmax(1)).float().mean()
        cells += [f"{right:.2f}", f"{resconv.distill(logits, wanted):.3f}", f"{alike:.2f}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.followed")
    parser.add_argument("suite", choices=[s for s in SUITES if any(j.distill for j in SUITES[s])])
    suite = parser.parse_args().suite
    results = read_results()

    def is_here(job: Job) -> bool:
        ours = job.kind == "ours" and job.distill
        return ours and job.name in results and (job.folder / "model.safetensors").is_file()

    jobs = [j for j in SUITES[suite] if is_here(j)]
    if not jobs:
        raise SystemExit(f"No net of a distilled arm of {suite} is here: train one first.")
    data = datasets.load(jobs[0].data)
    splits = (data.train, data.val)
    teacher = started(jobs[0], data)
    found = [logits_of(teacher, split, data) for split in splits]
    taught = [logits for logits, _ in found]
    rows = [row_of("the teacher", found, taught)]
    for job in jobs:
        model = resconv.load(job.folder)
        found = [logits_of(model, split, data) for split in splits]
        rows.append(row_of(words_for(job), found, taught))
    write_section(
        f"Nets and their teacher: {jobs[0].net} on {jobs[0].data_name}, {schedule_of(jobs[0])} epochs",
        f"{stamp(jobs[0].seed)} Of {IMAGES:,} training images (as they are, not augmented) and of all "
        "test images: top-1 in %, the distance to the teacher (`resconv.distill`: T^2 KL at "
        "temperature 4), and of how many in % net and teacher say the same.\n\n"
        + table(
            ["net"]
            + [f"{w}: {c}" for w in ("train", "test") for c in ("top-1", "distance", "alike")],
            rows,
        ),
    )


if __name__ == "__main__":
    main()
