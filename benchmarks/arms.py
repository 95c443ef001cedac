"""What is compared: the arms of every suite, and what came out of those that were run."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = [
    "CIFAR",
    "COMPARED",
    "NAMES",
    "OURS",
    "RANKINGS",
    "RESULTS",
    "SUITES",
    "TIMED",
    "Job",
    "Rows",
    "arm_named",
    "arm_of",
    "epochs_in",
    "epochs_of",
    "gains",
    "read_results",
    "rows_of",
    "start_of",
    "top1_with_and_without",
]

Rows = dict[str, dict[str, Any]]  # results by the name of the arm

RESULTS = Path(__file__).parent / "results" / "accuracy"
WORK = Path("runs/accuracy")
# Nets that others go on from and that take a GPU to train; the rest is trained where it is needed.
KEPT = RESULTS.parent / "weights"
# A folder with train.parquet and test.parquet; CIFAR-10 as JPEG, see docs/results.md.
CIFAR = "parquet:" + os.environ.get("CIFAR10_JPEG", "../shared/cifar10-jpeg")

NAMES = {"digits": "digits", CIFAR: "CIFAR-10 (JPEG)"}


@dataclass(frozen=True)
class Job:
    """One arm: what is trained, from which other arm's net, and for how long."""

    name: str
    kind: str  # one of accuracy.KINDS
    net: str
    data: str
    epochs: int
    seed: int = 0
    lr: float = 0.1
    batch_size: int = 128
    macs: float | None = None
    num_params: float | None = None
    start: str | None = None  # the arm whose trained net this one starts from
    like: str | None = None  # the arm whose compact architecture this one trains from scratch
    blocks: tuple[int, ...] | None = None  # or how many blocks a stage that one has
    units: str = "all"
    ranking: str | None = None
    distill: bool = False  # follow the outputs of the net it starts from as well
    hints: bool = False  # and what its layers between units read
    holdout: float = 0.0  # judged by this share of the training images, which no arm is trained on

    @property
    def data_name(self) -> str:
        """What it is trained on and judged by, in words."""
        held_out = f", {self.holdout:.0%} of the training images held out to judge by"
        return NAMES[self.data] + (held_out if self.holdout else "")

    @property
    def held_to(self) -> str:
        """The target of one of our arms, in words."""
        assert self.macs is not None
        limited = "MACs" if self.num_params is None else "MACs and parameters"
        return f"{100 * self.macs:g} % of the {limited}"

    @property
    def taught(self) -> str:
        """How it follows the dense net, in words."""
        return "distilled with hints" if self.hints else "distilled" if self.distill else ""

    @property
    def marks(self) -> list[str]:
        """What sets it apart from an arm of the same method: ["distilled", "MACs only"]."""
        limited = "MACs only" if self.kind in OURS and self.num_params is None else ""
        return [mark for mark in (self.taught, limited) if mark]

    @property
    def label(self) -> str:
        """What the tables of latency call one of our arms."""
        return ", ".join(["resconv", *self.marks])

    @property
    def arm(self) -> str:
        """What it is within its suite, whatever the seed: "ours-50"."""
        return self.name.rpartition("/")[2].partition("-seed")[0]

    @property
    def folder(self) -> Path:
        return WORK / self.name.replace("/", "-")

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name.replace('/', '-')}.json"

    @property
    def weights(self) -> Path:
        """Where the trained net is: in the run's folder, or kept beside the results."""
        kept = KEPT / f"{self.folder.name}.safetensors"
        return kept if kept.is_file() else self.folder / "trained.safetensors"


def _compare(
    net: str,
    data: str,
    before: int,
    total: int,
    macs: tuple[float, ...],
    seed: int = 0,
    where: str = "cifar",
    distilled: bool = False,
    lr: float = 0.1,
    batch_size: int = 128,
) -> list[Job]:
    """Return the arms that compare pruning methods: ``before`` epochs dense, ``total`` in all.

    With ``distilled``, ours also with the dense net that it starts from as its teacher.
    """
    base = Job("", "", net, data, total - before, seed, lr, batch_size)
    end = f"-seed{seed}" if seed else ""

    def job(arm: str, share: float | None = None, **more: Any) -> Job:
        at = "" if share is None else f"-{round(100 * share)}"
        name = f"{where}/{net}/{arm}{at}{end}"
        return replace(base, name=name, macs=share, **{"kind": arm, **more})

    start = job("start", kind="dense", epochs=before)
    jobs = [start, job("dense", epochs=total)]
    for share in macs:
        # As few parameters as a filter-pruned net of these MACs has; and with the MACs alone.
        ours = job("ours", share, num_params=share, start=start.name)
        jobs += [
            job("once", share, num_params=share, epochs=total),
            ours,
            job("ours-macs", share, kind="ours", start=start.name),
            job("torch-pruning", share, start=start.name),
            job("scratch", share, epochs=total, like=ours.name),
        ]
        if distilled:
            jobs.append(replace(ours, name=job("ours-distilled", share).name, distill=True))
    return jobs


def _taught(suite: list[Job], net: str, before: int, macs: tuple[float, ...]) -> list[Job]:
    """Return the arms that follow a dense net of ``before`` epochs, with as many in all as a suite.

    The suite's own arms that they are compared with are among them.
    """
    jobs = []
    arms = {(j.arm, j.seed): j for j in suite}
    for seed in sorted({j.seed for j in suite}):
        dense, start = arms["dense", seed], arms["start", seed]
        # The dense net that the runs of twice as many epochs start from.
        start = replace(start, name=start.name.replace("cifar/", "cifar-24/"), epochs=before)
        jobs += [start, dense]

        def taught(job: Job, how: str, start: Job = start, total: int = dense.epochs) -> Job:
            name = job.name.replace("cifar/", "cifar-taught/").replace(job.kind, job.kind + how)
            more = {"epochs": total - start.epochs, "start": start.name, "distill": bool(how)}
            return replace(job, name=name, **more)

        for share in macs:
            ours, filters = (
                arms[f"{arm}-{round(100 * share)}", seed] for arm in ("ours", "torch-pruning")
            )
            jobs += [
                taught(ours, "-distilled"),
                taught(ours, ""),
                taught(filters, "-distilled"),
                filters,
            ]
    return jobs


# The arms that are trained further once they are pruned.
_FURTHER = ("ours-distilled-50", "ours-macs-distilled-50", "ours-distilled-35")


def _onward(
    trained: str, net: str, epochs: int, lr: float, where: str = "onward", seeds: int = 1
) -> list[Job]:
    """Return the arms that go on from a net that is trained out, which also teaches them."""
    start = Job(f"onward/{net}/start", "dense", net, CIFAR, 0, lr=lr, start=trained)
    base = replace(start, epochs=epochs, start=start.name)

    def job(arm: str, kind: str, share: float | None = None, **more: Any) -> Job:
        return replace(base, name=f"{where}/{net}/{arm}", kind=kind, macs=share, **more)

    jobs = [
        start,
        job("dense", "dense"),
        job("ours-distilled-50", "ours", 0.5, num_params=0.5, distill=True),
        job("torch-pruning-distilled-50", "torch-pruning", 0.5, distill=True),
        job("ours-hinted-50", "ours", 0.5, num_params=0.5, distill=True, hints=True),
        job("ours-50", "ours", 0.5, num_params=0.5),
        job("torch-pruning-50", "torch-pruning", 0.5),
        job("ours-macs-distilled-50", "ours", 0.5, distill=True),
        job("ours-distilled-35", "ours", 0.35, distill=True),
        job("torch-pruning-distilled-35", "torch-pruning", 0.35, distill=True),
        job("ours-hinted-35", "ours", 0.35, distill=True, hints=True),
    ]
    more_seeds = [
        replace(j, name=f"{j.name}-seed{seed}", seed=seed)
        for seed in range(1, seeds)
        for j in jobs
        if j.arm in _FURTHER
    ]
    return jobs + more_seeds


def _further(start: Job, sparse: list[Job], epochs: int, lr: float, batch_size: int) -> list[Job]:
    """Return the arms that learn anew at a high rate, all of ours after the removal.

    ``sparse`` are arms that went on from ``start``: what they left is trained for the rest of
    ``epochs``. The other arms get as many epochs in all, and every pruned one has the same teacher.
    """
    jobs = [start]
    for seed in sorted({j.seed for j in sparse}):
        base = replace(start, epochs=epochs, seed=seed, lr=lr, batch_size=batch_size)

        def job(arm: str, kind: str, base: Job = base, **more: Any) -> Job:
            end = f"-seed{base.seed}" if base.seed else ""
            more = {"start": start.name, **more}
            return replace(base, name=f"further/{base.net}/{arm}{end}", kind=kind, **more)

        jobs.append(job("dense", "dense"))
        mine = [j for j in sparse if j.seed == seed]
        for ours in mine:
            rest = {"epochs": epochs - ours.epochs, "start": ours.name}
            held = {"macs": ours.macs, "num_params": ours.num_params}
            jobs.append(job(ours.arm, "finetuned", distill=True, **held, **rest))
        for share in dict.fromkeys(j.macs for j in mine if j.macs is not None):
            filters = f"torch-pruning-distilled-{round(100 * share)}"
            jobs.append(job(filters, "torch-pruning", macs=share, distill=True))
    return jobs


def _tuning(net: str, before: int, total: int) -> list[Job]:
    """Return the arms on which choices are made: does ResConv help, where should blocks stay?

    The test images have no part in it. Every arm is trained on the other nine tenths: a net that has
    seen the images it is judged by says nothing.
    """
    base = Job("", "", net, CIFAR, total, holdout=0.1)
    jobs = [
        replace(base, name=f"held-out/{net}/{arm}{end}", kind=kind, epochs=epochs)
        for arm, epochs in (("start", before), ("dense", total))
        for end, kind in (("", "dense"), ("-resconv", "resconv"))
    ]
    # Half the MACs, from scratch: the same number of blocks, mostly of the last stage, or of none.
    layouts = {"late": (2, 4, 7), "even": (4, 4, 5), "early": (7, 4, 2)}
    jobs += [
        replace(base, name=f"held-out/{net}/{arm}-50", kind="scratch", macs=0.5, blocks=blocks)
        for arm, blocks in layouts.items()
    ]
    return jobs


def _ranked(net: str, before: int, total: int, macs: float, seeds: int = 3) -> list[Job]:
    """Return the arms that choose whole branches by the scales, or in one shot by other rankings."""
    jobs = []
    for seed in range(seeds):
        end = f"-seed{seed}"
        start = Job(f"digits/{net}/start{end}", "dense", net, "digits", before, seed)
        base = replace(start, epochs=total - before, macs=macs, start=start.name, units="blocks")
        jobs += [start, replace(base, name=f"digits/{net}/ranked-scales{end}", kind="ours")]
        jobs += [
            replace(base, name=f"digits/{net}/ranked-{r}{end}", kind="ranked", ranking=r)
            for r in RANKINGS
        ]
    return jobs


def _rates(net: str, before: int, total: int, shares: tuple[float, ...], seeds: int) -> list[Job]:
    """Return the arms for accuracy right after pruning, over pruning rates."""
    jobs = []
    for seed in range(seeds):
        end = f"-seed{seed}"
        start = Job(f"digits/{net}/start{end}", "dense", net, "digits", before, seed)
        jobs.append(start)
        jobs.append(replace(start, name=f"digits/{net}/whole{end}", epochs=total))
        jobs += [
            replace(
                start,
                name=f"digits/{net}/rate-{round(100 * share)}{end}",
                kind="ours",
                epochs=total - before,
                macs=share,
                start=start.name,
            )
            for share in shares
        ]
    return jobs


def _plain(net: str, data: str, epochs: int, seeds: int = 1, lr: float = 0.1) -> list[Job]:
    """Return the arms that train a net with ResConv and without it."""
    where = "digits" if data == "digits" else "cifar"
    return [
        Job(f"{where}/{net}/{kind}-seed{seed}", kind, net, data, epochs, seed, lr)
        for seed in range(seeds)
        for kind in ("dense", "resconv")
    ]


RANKINGS = ("random", "weight", "leave-one-out")

SUITES: dict[str, list[Job]] = {
    "resnet56": [
        job
        for seed in range(3)
        for job in _compare("resnet56", CIFAR, 4, 12, (0.5, 0.35, 0.25), seed)
    ],
    # Twice as long: how much of what pruning costs is that a short schedule leaves nets half trained?
    "resnet56-long": [
        job
        for seed in range(2)
        for job in _compare("resnet56", CIFAR, 8, 24, (0.5, 0.35), seed, "cifar-24", True)
    ],
    "resnet56-onward": _onward("gpu/resnet56/dense", "resnet56", 8, 0.01, seeds=3),
    # Twice as many epochs, at twice the rate: what is left of the net has further to go.
    "resnet56-onward-16": [
        job
        for job in _onward("gpu/resnet56/dense", "resnet56", 16, 0.02, "onward-16")
        if job.kind == "dense" or (job.distill and not job.hints and "macs" not in job.arm)
    ],
    "held-out": _tuning("resnet56", 4, 12),
    # On a GPU: schedules that train a net out, and batches that keep it busy.
    "resnet56-gpu": [
        job
        for seed in range(3)
        for job in _compare("resnet56", CIFAR, 30, 90, (0.5, 0.35), seed, "gpu", False, 0.2, 256)
    ],
    "resnet110": _compare("resnet110", CIFAR, 15, 45, (0.345,), 0, "gpu", False, 0.2, 256),
    "plain": [
        *_plain("plainnet20", CIFAR, 3),
        *_plain("plainnet56", CIFAR, 3),
        *_plain("resnet20", CIFAR, 3),
        *_plain("resnet56", CIFAR, 3),
        *_plain("plainnet110", CIFAR, 3),
    ],
    "digits": [
        job
        for net in ("plainnet20", "plainnet56", "plainnet110", "resnet20", "resnet56")
        for job in _plain(net, "digits", 30, seeds=3)
    ],
    "rankings": _ranked("resnet56", 30, 60, 0.5),
    "rates": _rates("resnet56", 30, 60, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), 2),
}
# As many epochs in all, but most of them for the dense net, which then is the teacher.
SUITES["resnet56-taught"] = _taught(SUITES["resnet56"], "resnet56", 8, (0.5, 0.35))

_ONWARD = SUITES["resnet56-onward"]
SUITES["resnet56-further"] = _further(
    _ONWARD[0], [j for j in _ONWARD if j.arm in _FURTHER and j.seed < 2], 60, 0.1, 256
)
_START_110 = Job(
    "onward/resnet110/start", "dense", "resnet110", CIFAR, 0, start="gpu/resnet110/dense"
)
_ONWARD_110 = replace(_START_110, epochs=8, lr=0.02, batch_size=256, start=_START_110.name)
SUITES["resnet110-onward"] = [
    _START_110,
    replace(_ONWARD_110, name="onward/resnet110/dense"),
    replace(
        _ONWARD_110,
        name="onward/resnet110/ours-distilled-34",
        kind="ours",
        macs=0.345,
        distill=True,
    ),
]
SUITES["resnet110-further"] = _further(_START_110, SUITES["resnet110-onward"][-1:], 45, 0.1, 256)

# The kinds of arms whose nets are ours, from a dense net.
OURS = ("ours", "finetuned")

# The suites that compare pruning methods at equal MACs and epochs.
COMPARED = (
    "resnet56",
    "resnet56-taught",
    "resnet56-long",
    "resnet56-gpu",
    "resnet56-onward",
    "resnet56-onward-16",
    "resnet56-further",
    "resnet110",
    "resnet110-onward",
    "resnet110-further",
)

# The arms whose nets (of seed 0) are timed too. What is trained further keeps the layers that it was
# pruned to.
TIMED = ("ours", "ours-macs", "ours-distilled", "ours-macs-distilled")


def read_results() -> Rows:
    """Return all results so far, by the name of the arm."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))]
    return {row["name"]: row for row in found}


def rows_of(
    suite: str, arm: str, results: Rows, net: str | None = None
) -> dict[int, dict[str, Any]]:
    """Return the results of an arm so far, by seed; say of which ``net`` where a suite has several."""
    jobs = [j for j in SUITES[suite] if j.arm == arm and net in (None, j.net)]
    return {j.seed: results[j.name] for j in jobs if j.name in results}


def gains(suite: str, arm: str, other: str, results: Rows, net: str | None = None) -> list[float]:
    """Return by how many points of top-1 an arm is above another, for each seed that both have."""
    mine, theirs = (rows_of(suite, a, results, net) for a in (arm, other))
    return [row["top1"] - theirs[s]["top1"] for s, row in sorted(mine.items()) if s in theirs]


def top1_with_and_without(suite: str, net: str, results: Rows) -> tuple[list[float], list[float]]:
    """Return top-1 of a net as it is and with ResConv, for each seed that was run."""
    plain, ours = (
        [row["top1"] for row in rows_of(suite, arm, results, net).values()]
        for arm in ("dense", "resconv")
    )
    return plain, ours


def start_of(suite: str) -> Job:
    """Return the dense net that the pruned arms of a suite (those of its first seed) start from."""
    return arm_of(suite, "start")


def epochs_of(job: Job) -> int:
    """Return for how many epochs the net of an arm was trained in all, those of its start included."""
    return job.epochs + (epochs_of(arm_named(job.start)) if job.start else 0)


def epochs_in(suite: str) -> str:
    """Return the epochs of the net that a suite starts from, and those after it: "90 + 60"."""
    before = epochs_of(start_of(suite))
    return f"{before} + {epochs_of(arm_of(suite, 'dense')) - before}"


def arm_of(suite: str, arm: str) -> Job:
    """Return an arm of a suite, of its first seed."""
    return next(job for job in SUITES[suite] if job.arm == arm)


def arm_named(name: str | None) -> Job:
    """Return the arm of that name, from whichever suite."""
    return next(job for suite in SUITES.values() for job in suite if job.name == name)
