"""The stages of the main job, in order: each reads what those before it left, and is done once."""

import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import resconv
from resconv import data as datasets
from resconv import nets
from resconv.choose import plan_measured
from resconv.data import BatchLoader, ImageData
from resconv.errors import MissingExtraError, RunError
from resconv.files import write_atomic
from resconv.latency import LatencyTable, require_runtime, time_nets
from resconv.ledger import ledger
from resconv.measure import machine, onnx_runner, peak_memory, time_together, torch_runner
from resconv.outcome import Snapshot
from resconv.plan import Plan
from resconv.prune import leftovers
from resconv.report import write_report
from resconv.train import Ranks, Recipe, choose_precision, evaluate, fit, join, tell

from .config import Config
from .folder import RunFolder

__all__ = ["STAGES", "Run", "begin", "compress", "open_run", "run_stage"]

Say = Callable[[str], None]
LATENCY = "latency.json"


class Run:
    """A run folder with its data and nets, loaded when a stage needs them."""

    def __init__(self, folder: RunFolder, say: Say = print, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.folder, self.say = folder, say if self.ranks.leads else lambda text: None
        self.config = folder.config()
        self.precision = choose_precision(self.config.precision)
        self._data: ImageData | None = None

    @property
    def data(self) -> ImageData:
        if self._data is None:
            config = self.config
            self._data = datasets.load(
                config.data,
                image_size=config.image_size,
                channels=config.channels,
                limit=config.limit,
            )
        return self._data

    def create(self) -> nn.Module:
        """Build the net for this data, with random weights from the seed.

        Raises:
            DataError: its inputs or outputs do not fit the data.
        """
        torch.manual_seed(self.config.seed)
        return build(self.config.model, self.data)

    def example(self, size: int = 1) -> Tensor:
        data = self.data
        side = data.image_size
        generator = torch.Generator().manual_seed(0)
        return torch.randn(size, data.channels, side, side, generator=generator)

    def dense(self) -> nn.Module:
        model = self.create()
        _load_state(model, self.folder / "dense.safetensors")
        return model.eval()

    def gated(self) -> nn.Module:
        """Return the net as sparse training left it."""
        model = resconv.convert(
            self.dense(), self.example(2), units=self.config.units, start="keep"
        )
        _load_state(model, self.folder / "gated.safetensors")
        return model.eval()

    def plan(self) -> Plan:
        return Plan.load(self.folder / "plan.json")

    def recipe(self, epochs: int, lr: float) -> Recipe:
        config = self.config
        return Recipe(epochs, lr=lr, batch_size=config.batch_size, seed=config.seed)


def build(name: str, data: ImageData) -> nn.Module:
    """Build the named net for the data's classes and channels, and check that it fits."""
    if nets.runs_user_code(name):
        model = _build_user_net(name, data)
    else:
        kwargs: dict[str, Any] = {"num_classes": data.num_classes}
        if data.channels != 3:
            kwargs["in_channels"] = data.channels
        model = nets.create(name, **kwargs)
    first = next(
        (m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None
    )
    if first is not None:
        datasets.check_fit(data, first.in_channels, data.num_classes)
    side = data.image_size
    model.eval()
    try:
        with torch.no_grad():
            out = model(torch.zeros(1, data.channels, side, side))
    except resconv.ResConvError:
        raise
    except Exception as error:
        raise RunError(
            f"{name} does not run on images of {data.channels}x{side}x{side} "
            f"({type(error).__name__}: {str(error).splitlines()[0][:160]}). "
            "Choose another size with --image-size."
        ) from error
    if not isinstance(out, Tensor) or out.ndim != 2:
        raise RunError(
            f"{name} returns no (N, classes) tensor; it cannot be trained as a classifier."
        )
    datasets.check_fit(data, data.channels, out.shape[1])
    return model.train()


def _build_user_net(name: str, data: ImageData) -> nn.Module:
    from resconv.errors import ModelError

    try:
        return nets.create(name, num_classes=data.num_classes)
    except ModelError as error:
        if "num_classes" not in str(error):
            raise
        return nets.create(name)


def _load_state(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise RunError(f"{path} is missing: the stage before was not finished.")
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:
        raise RunError(
            f"{path} cannot be used ({type(error).__name__}: {str(error)[:160]}). Start anew with "
            "--fresh."
        ) from error


def _save_state(model: nn.Module, path: Path) -> None:
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    write_atomic(path, lambda temporary: save_file(state, temporary))


def _dense(run: Run) -> None:
    config = run.config
    model = run.create()
    if config.weights is not None:
        nets.load_weights(model, config.weights)
        run.say(f"Weights of {config.weights} loaded.")
    elif config.from_random:
        run.say("No dense training: sparse training starts from random weights.")
    else:
        epochs = config.stage_epochs()[0]
        run.say(
            f"Training {config.model} on {config.data} for {epochs} epochs "
            f"({len(run.data.train):,} images, {run.precision.name}: {run.precision.reason})."
        )
        fit(
            model,
            run.data,
            run.recipe(epochs, config.lr),
            run.folder.logs / "dense",
            precision=run.precision,
            progress=config.progress,
            devices=config.devices,
        )
    if not run.ranks.leads:
        return
    top1 = None if config.from_random else evaluate(model, run.data)
    size = resconv.count(model, run.example())
    _save_state(model, run.folder / "dense.safetensors")
    run.folder.add_metrics(top1_dense=top1, macs_dense=size.macs, num_params_dense=size.num_params)
    trained = "" if top1 is None else f"top-1 {top1:.2f} %, "
    run.say(f"Dense: {trained}{size.macs:,} MACs, {size.num_params:,} parameters.")


def _sparse(run: Run) -> None:
    config = run.config
    # The shortcut is what makes an untrained deep net trainable; a trained one keeps its function.
    start = "identity" if config.from_random else "keep"
    model = resconv.convert(run.dense(), run.example(2), units=config.units, start=start)
    table = tell(run.ranks, lambda: latency_table(run, model))
    epochs = config.stage_epochs()[1]
    run.say(
        f"Sparse training for {epochs} epochs: {len(resconv.gates(model))} units, target "
        f"{_words(config)}."
    )
    model.train()
    teacher = run.dense() if config.distill else None
    result = fit(
        model,
        run.data,
        run.recipe(epochs, config.sparse_rate()),
        run.folder.logs / "sparse",
        target=config.budget(),
        latency=table,
        teacher=teacher,
        precision=run.precision,
        progress=config.progress,
        devices=config.devices,
    )
    if not run.ranks.leads:
        return
    top1 = evaluate(model, run.data)
    _save_state(model, run.folder / "gated.safetensors")
    run.folder.write_json(
        "scales.json",
        [[s.step, s.scales, s.controls, s.macs, s.latency_ms] for s in result.history],
    )
    if result.latency is not None:
        result.latency.save(run.folder / LATENCY)
    zero = [n for n, g in resconv.gates(model).items() if g.scale.item() == 0]
    run.folder.add_metrics(top1_gated=top1, num_units=len(resconv.gates(model)), num_zero=len(zero))
    run.say(f"Gated: top-1 {top1:.2f} %, {len(zero)} scales are exactly 0.")


def _words(config: Config) -> str:
    parts = []
    for value, what in ((config.macs, "MACs"), (config.num_params, "parameters")):
        if value is not None:
            parts.append(
                f"{value:.0%} of the {what}" if isinstance(value, float) else f"{value:,} {what}"
            )
    if config.latency_ms is not None:
        parts.append(f"{config.latency_ms:g} ms in {config.runtime}")
    if config.latency is not None:
        parts.append(f"{config.latency:.0%} of the latency in {config.runtime}")
    return " and ".join(parts)


def latency_table(run: Run, model: nn.Module) -> LatencyTable | None:
    """Return the units' measured latency where the target needs it: the folder's, or measured now."""
    budget = run.config.budget()
    if not budget.times:
        return None
    path = run.folder / LATENCY
    costs = ledger(model, run.example())
    if path.is_file():
        table = LatencyTable.load(path)
        reason = table.why_unfit(costs, budget)
        if reason is None:
            return table
        run.say(f"{path} is measured anew: {reason}.")
    run.say(f"Measuring the latency of {len(costs.names)} units in {budget.runtime}.")
    table = resconv.measure_latency(model, run.example(), budget)
    table.save(path)
    run.say(
        f"The dense net takes {table.latency_ms:.3g} ms (batch {table.batch}, {table.threads} "
        f"threads); {len(table.nets)} nets timed, the model of them is right to {table.error:.0%}."
    )
    return table


def check_reach(run: Run) -> None:
    """Refuse a target that no plan can reach, before anything is trained.

    Raises:
        BudgetError: see :class:`resconv.Sparsifier`.
    """
    model = resconv.convert(run.create().eval(), run.example(2), units=run.config.units)
    resconv.Sparsifier(
        model,
        target=run.config.budget(),
        total_steps=1000,
        example_inputs=run.example(),
        latency=latency_table(run, model),
    )


def _plan(run: Run) -> None:
    gated = run.gated()
    plan, table = plan_measured(
        gated, run.example(), run.config.budget(), latency_table(run, gated)
    )
    if table is not None:
        table.save(run.folder / LATENCY)
    plan.save(run.folder / "plan.json")
    nonzero = [n for n in plan.remove if plan.scales[n] != 0]
    run.say(
        f"Plan: {len(plan.remove)} units go ({', '.join(plan.remove[:6])}"
        f"{', ...' if len(plan.remove) > 6 else ''})"
        + (f"; the scale of {len(nonzero)} of them is not 0." if nonzero else ".")
    )
    if plan.latency_ms_after is not None:
        run.say(
            f"The net that is left takes {plan.latency_ms_after:.3g} ms (predicted "
            f"{plan.latency_ms_predicted:.3g}, dense {plan.latency_ms_before:.3g})."
        )


def _prune(run: Run) -> None:
    gated, plan, example = run.gated(), run.plan(), run.example(4)
    compact = resconv.fuse(resconv.prune(gated, plan), example)
    check = resconv.verify(gated, compact, example, plan=plan)
    top1 = evaluate(compact, run.data)
    nonzero = [n for n in plan.remove if resconv.gates(gated)[n].scale.item() != 0]
    run.say(
        f"Pruned, without retraining: top-1 {top1:.2f} %; agrees with the gated net to "
        f"{check.max_rel_error:.1e}."
    )
    metrics: dict[str, Any] = {"top1_pruned": top1, "top1_recalibrated": None}
    asked = run.config.recalibrate
    if asked or (asked is None and nonzero):
        compact = _recalibrated(run, gated, plan)
        metrics["top1_recalibrated"] = evaluate(compact, run.data)
        run.say(f"BatchNorm statistics collected anew: top-1 {metrics['top1_recalibrated']:.2f} %.")
    _finish(run, compact, plan)
    # A checkpoint of another plan's finetuning would not fit.
    shutil.rmtree(run.folder.logs / "finetune", ignore_errors=True)
    run.folder.add_metrics(
        **metrics,
        verify={
            "max_abs_error": check.max_abs_error,
            "max_rel_error": check.max_rel_error,
            "tolerance": check.tolerance,
        },
        removed_with_nonzero_scale=nonzero,
        leftover_factors=leftovers(compact),
    )
    if left := leftovers(compact):
        run.say(
            f"{len(left)} factors of removed layers could not be absorbed and stay as one multiply "
            f"each: {', '.join(list(left)[:4])}{', ...' if len(left) > 4 else ''}."
        )


def _recalibrated(run: Run, gated: nn.Module, plan: Plan) -> nn.Module:
    """Return the compact net with BatchNorm statistics from training images, without retraining."""
    data = run.data
    net = resconv.prune(gated, plan, fuse=False)
    loader = BatchLoader(
        data.train,
        256,
        shuffle=True,
        seed=run.config.seed,
        augment=None,
        mean=data.mean,
        std=data.std,
    )
    resconv.recalibrate(net, islice(loader, 50))
    return resconv.fuse(net.eval(), run.example(4))


def _finish(run: Run, compact: nn.Module, plan: Plan) -> None:
    resconv.save(compact, run.folder.path, plan=plan, example_inputs=run.example())
    size = resconv.count(compact, run.example())
    run.folder.add_metrics(macs_compact=size.macs, num_params_compact=size.num_params)


def _finetune(run: Run) -> None:
    config, epochs = run.config, run.config.stage_epochs()[2]
    if epochs == 0:
        run.say("No finetuning asked for.")
        return
    plan, example = run.plan(), run.example(4)
    model = resconv.prune(run.gated(), plan, fuse=False)
    run.say(f"Finetuning for {epochs} epochs.")
    fit(
        model.train(),
        run.data,
        run.recipe(epochs, config.sparse_rate() / 2),
        run.folder.logs / "finetune",
        teacher=run.dense() if config.distill else None,
        precision=run.precision,
        progress=config.progress,
        devices=config.devices,
    )
    if not run.ranks.leads:
        return
    model.eval()
    compact = resconv.fuse(model, example)
    check = resconv.verify(model, compact, example)
    top1 = evaluate(compact, run.data)
    _finish(run, compact, plan)
    run.folder.add_metrics(top1_finetuned=top1, verify_finetuned=check.max_rel_error)
    run.say(f"Finetuned: top-1 {top1:.2f} %.")


def compact_of(run: Run) -> nn.Module:
    """Return the saved compact net of a run."""
    source = run.create() if nets.runs_user_code(run.config.model) else None
    return resconv.load(run.folder.path, model=source)


def _export(run: Run) -> None:
    try:
        done = resconv.export(
            compact_of(run), run.folder / "model.onnx", run.example(), plan=run.plan()
        )
    except MissingExtraError as error:
        run.say(f"No ONNX file: {error}")
        return
    run.folder.add_metrics(
        onnx={
            "opset": done.opset,
            "num_bytes": done.num_bytes,
            "dynamic_batch": done.dynamic_batch,
            "max_rel_error": done.verification.max_rel_error,
        }
    )
    run.say(
        f"Exported: {done.path} (opset {done.opset}, checked in ONNX Runtime, error "
        f"{done.verification.max_rel_error:.1e})."
    )


def _against_target(run: Run, dense: nn.Module, compact: nn.Module) -> dict[str, Any]:
    """Time the two nets as the target says, and return all that is to be known about it."""
    budget, plan, table = run.config.budget(), run.plan(), LatencyTable.load(run.folder / LATENCY)
    before, after = time_nets([dense, compact], run.example(), table)
    limit = budget.limits(0, 0, before.median_ms)[2]
    found = {
        "asked_ms": budget.latency_ms,
        "asked_share": budget.latency,
        "limit_ms": limit,
        "runtime": table.runtime,
        "batch": table.batch,
        "threads": table.threads,
        "predicted_ms": plan.latency_ms_predicted,
        "planned_ms": plan.latency_ms_after,
        "dense_ms": before.median_ms,
        "compact_ms": after.median_ms,
        "repeats": after.repeats,
        "met": after.median_ms <= limit,
        "table_error": table.error,
        "nets_timed": len(table.nets),
    }
    run.say(
        f"Target: at most {limit:.3g} ms in {table.runtime}; the net takes "
        f"{after.median_ms:.3g} ms"
        + (
            "."
            if found["met"]
            else ", which is over it now: the machine is slower than when it was "
            "planned, or busy. Measure again: resconv measure."
        )
    )
    return found


def _measure(run: Run) -> None:
    config = run.config
    example = run.example()
    compact = compact_of(run)
    # The same deployment form on both sides: norms folded.
    dense = resconv.fuse(run.dense(), example)
    runners = {
        "torch/dense": torch_runner(dense, example),
        "torch/compact": torch_runner(compact, example),
    }
    if (run.folder / "model.onnx").is_file():
        other = run.folder / "dense.onnx"
        resconv.export(dense, other, example)
        runners["onnxruntime/dense"] = onnx_runner(other, example, torch.get_num_threads())
        runners["onnxruntime/compact"] = onnx_runner(
            run.folder / "model.onnx", example, torch.get_num_threads()
        )
    timings = time_together(runners, repeats=50, warmup=5)
    latency: dict[str, dict[str, float]] = {}
    for name, timing in timings.items():
        runtime, which = name.split("/")
        latency.setdefault(runtime, {})[f"{which}_ms"] = timing.median_ms
    for found in latency.values():
        found["ratio"] = found["compact_ms"] / found["dense_ms"]
    memory = {"dense": peak_memory(dense, example), "compact": peak_memory(compact, example)}
    run.folder.add_metrics(
        latency=latency,
        peak_memory_bytes=memory,
        measured={
            "batch": 1,
            "threads": torch.get_num_threads(),
            "repeats": 50,
            "image_size": run.data.image_size,
        },
    )
    if config.budget().times:
        run.folder.add_metrics(latency_target=_against_target(run, dense, compact))
    text = ", ".join(
        f"{k} {v['dense_ms']:.2f} -> {v['compact_ms']:.2f} ms" for k, v in latency.items()
    )
    run.say(f"Latency (batch 1, medians, interleaved): {text}.")


def _report(run: Run) -> None:
    run.folder.add_metrics(machine=machine(), date=datetime.now(UTC).strftime("%Y-%m-%d"))
    try:
        path = write_report(
            run.folder / "report.html",
            run.config,
            run.folder.metrics(),
            run.folder.read_json("plan.json"),
            run.folder.read_json("scales.json"),
            run.folder.read_json(LATENCY) if run.config.budget().times else None,
        )
    except MissingExtraError as error:
        run.say(f"No report: {error}")
        return
    run.say(f"Report: {path}")


STAGES: dict[str, Callable[[Run], None]] = {
    "dense": _dense,
    "sparse": _sparse,
    "plan": _plan,
    "prune": _prune,
    "finetune": _finetune,
    "export": _export,
    "measure": _measure,
    "report": _report,
}


# The stages that every process takes part in; the leading one does the rest.
_SHARED = ("dense", "sparse", "finetune")


def begin(path: Path, config: Config, *, fresh: bool = False, say: Say = print) -> Run:
    """Make (or open again) a run folder; under a launcher, once for all its processes.

    Raises:
        RunError: see :meth:`RunFolder.begin`.
    """
    ranks = join()
    tell(ranks, lambda: RunFolder.begin(path, config, fresh=fresh) and None)
    return Run(RunFolder.open(path), say, ranks)


def open_run(path: Path, say: Say = print) -> Run:
    return Run(RunFolder.open(path), say)


def run_stage(run: Run, stage: str, *, again: bool = False) -> None:
    """Run one stage unless it is done; one that is run again undoes those after it.

    Raises:
        RunError: a stage before it is missing.
    """
    order = list(STAGES)
    # What is done is decided once: the folder changes while the others look.
    done = tell(run.ranks, run.folder.done)
    if not run.ranks.leads:
        if stage in _SHARED and (again or stage not in done):
            STAGES[stage](run)
        return
    if stage in done and not again:
        run.say(f"[{stage}] done already.")
        return
    before = order[: order.index(stage)]
    missing = [s for s in before if s not in done]
    if missing:
        raise RunError(
            f"{run.folder.path}: the stage {missing[0]!r} has to be run before {stage!r}. "
            f"`resconv compress` with the same settings does all that is missing."
        )
    run.folder.unmark(tuple(order[order.index(stage) :]))
    start = time.perf_counter()
    STAGES[stage](run)
    seconds = run.folder.metrics().get("seconds", {})
    run.folder.add_metrics(seconds={**seconds, stage: round(time.perf_counter() - start, 1)})
    run.folder.mark(stage)


def compress(run: Run) -> dict[str, Any]:
    """Run every stage that is not done, and return the metrics (on the leading process)."""
    require_runtime(run.config.budget().runtime)
    if "sparse" not in tell(run.ranks, run.folder.done):
        tell(run.ranks, lambda: check_reach(run))
    for stage in STAGES:
        run_stage(run, stage)
    return run.folder.metrics() if run.ranks.leads else {}


def history(folder: RunFolder) -> list[Snapshot]:
    """Return the scales over sparse training."""
    return [Snapshot(*row) for row in folder.read_json("scales.json")]
