"""The stages that train: dense, sparse, finetuning of what is left, and a control."""

import math
from typing import Any

import msgspec
from torch import nn

import resconv
from resconv.errors import RunError
from resconv.train import FitResult, evaluate, fit
from resconv.train.progress import RunProgress

from .config import Config
from .job import LATENCY, Run, save_state
from .metrics import History
from .start import is_trained_first, load_start
from .surgery import compact_of, removed_units, save_compact
from .timing import latency_table

__all__ = ["control", "dense", "finetune", "sparse"]


def dense(run: Run) -> None:
    config = run.config
    weights, training = config.net.weights, config.training
    model = run.create()
    start = load_start(run, model)
    is_trained = is_trained_first(config, start)
    if start.origin is not None:
        run.say(start.words(run.data.num_classes))
    if weights is not None and training.epochs and not is_trained:
        run.warn(
            "dense",
            f"epochs={training.epochs} is not used: weights={weights!r} is the dense net, and is not "
            "trained on before sparse training.",
        )
    if not is_trained and (start.origin is None or start.new_head):
        what = "random weights" if start.origin is None else "the pretrained weights"
        run.say(f"No dense training: sparse training starts from {what}.")
    elif is_trained:
        epochs = config.stage_epochs()[0]
        run.say(
            f"Training {config.net.model} on {config.data.source} for {_epochs(epochs)} "
            f"({len(run.data.train):,} images, recipe {config.recipe}, {run.precision.name}: "
            f"{run.precision.reason})."
        )
        _fit(run, "dense", model, epochs, config.dense_rate())
    if not run.ranks.leads:
        return
    has_head = is_trained or (start.origin is not None and not start.new_head)
    top1 = evaluate(model, run.data) if has_head else None
    size = resconv.profile(model, run.example())
    save_state(model, run.folder / "dense.safetensors")
    epochs = config.stage_epochs()[0]
    run.folder.add_metrics(
        preprocessing=msgspec.to_builtins(run.data.preprocessing),
        augment=msgspec.to_builtins(run.augment),
        top1_dense=top1,
        macs_dense=size.macs,
        num_params_dense=size.num_params,
        # None: not trained here
        epochs_dense=epochs if is_trained or config.from_random else None,
    )
    trained = "" if top1 is None else f"top-1 {top1:.2f} %, "
    run.say(f"Dense: {trained}{size.macs:,} MACs, {size.num_params:,} parameters.")
    if top1 is not None:
        advice = "train for more --epochs, or with another --lr"
        if not is_trained:
            advice = f"{start.origin} may be of other classes, or of images prepared in another way"
        warn_of_chance(run, "dense", "The dense net", top1, advice)


def sparse(run: Run) -> None:
    config = run.config
    # The shortcut is what makes an untrained deep net trainable; a trained one keeps its function.
    start = "identity" if config.from_random else "keep"
    example = run.example(2)
    model = run.converted(run.dense(), start)
    hints = resconv.recovery.hint_layers(model, example) if config.training.hints else ()
    if config.training.hints and not hints:
        raise RunError(
            f"--hints: {config.net.model} has no layer, called as a module, between its units. Train "
            "without --hints."
        )
    table = run.ranks.by_first(lambda: latency_table(run, model))
    epochs = config.stage_epochs()[1]
    run.say(
        f"Sparse training for {_epochs(epochs)}: {len(resconv.gates(model))} units, target "
        f"{_words(config)}."
    )
    result = _fit(
        run,
        "sparse",
        model,
        epochs,
        config.sparse_rate(),
        target=config.budget(),
        latency=table,
        teacher=run.dense() if config.training.distill else None,
        hints=hints,
    )
    if not run.ranks.leads:
        return
    top1 = evaluate(model, run.data)
    save_state(model, run.folder / "gated.safetensors")
    run.folder.write_history(History(tuple(result.history)))
    if result.latency is not None:
        result.latency.save(run.folder / LATENCY)
    zero = [n for n, g in resconv.gates(model).items() if g.scale.item() == 0]
    run.folder.add_metrics(
        top1_gated=top1,
        num_units=len(resconv.gates(model)),
        num_zero=len(zero),
        epochs_sparse=epochs,
    )
    run.say(f"Gated: top-1 {top1:.2f} %, {len(zero)} scales are exactly 0.")
    warn_of_chance(
        run,
        "sparse",
        "The net after sparse training",
        top1,
        "give it more sparse_epochs or another sparse_lr",
    )


def _fit(
    run: Run, stage: str, model: nn.Module, epochs: int, rate: float, **options: Any
) -> FitResult:
    """Train a net in place by the run's recipe and on its devices."""
    training = run.config.training
    ema = None if stage == "dense" else training.ema
    return fit(
        model.train(),
        run.data,
        run.recipe(epochs, rate, ema),
        run.folder.logs / stage,
        precision=run.precision,
        progress=False,
        callbacks=_shown(run, stage),
        devices=run.devices,
        cuda_graphs=training.cuda_graphs,
        bound=run.bound,
        say=run.say,
        **options,
    )


def _shown(run: Run, stage: str) -> tuple[RunProgress, ...]:
    """Return what shows how far the run is."""
    if not run.config.training.progress:
        return ()
    names, epochs = ("dense", "sparse", "finetune", "control"), list(run.config.stage_epochs())
    epochs.append(epochs[1] + epochs[2] if run.config.training.control else 0)
    if stage != "dense" and run.config.net.weights is not None:
        epochs[0] = 0  # given, not trained
    before = sum(epochs[: names.index(stage)])
    return (RunProgress(stage, before, sum(epochs), run.say if run.speaks else None),)


def warn_of_chance(run: Run, stage: str, what: str, top1: float, advice: str) -> None:
    """Warn where a net is right as often as one that always names the most frequent class."""
    labels = run.data.val.labels
    share = labels.bincount().max().item() / len(labels)
    # Two standard deviations of what guessing gives on so many images.
    chance = share + 2 * math.sqrt(share * (1 - share) / len(labels))
    if top1 <= 100 * chance:
        run.warn(
            stage,
            f"{what} does no better than guessing: top-1 {top1:.2f} % on {len(labels):,} images, of which "
            f"{share:.1%} are of one class: {advice}.",
        )


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' * (number != 1)}"


def _words(config: Config) -> str:
    parts, target, runtime = [], config.target, config.deployment.runtime
    for value, what in ((target.macs, "MACs"), (target.num_params, "parameters")):
        if value is not None:
            parts.append(
                f"{value:.0%} of the {what}" if isinstance(value, float) else f"{value:,} {what}"
            )
    if target.latency_ms is not None:
        parts.append(f"{target.latency_ms:g} ms in {runtime}")
    if target.latency is not None:
        parts.append(f"{target.latency:.0%} of the latency in {runtime}")
    return " and ".join(parts)


def finetune(run: Run) -> None:
    config, epochs = run.config, run.config.stage_epochs()[2]
    if epochs == 0:
        run.say("No finetuning asked for.")
        return
    plan, example = run.plan(), run.example(4)
    model = resconv.prune(run.gated(), plan, fuse=False)
    run.say(f"Finetuning for {_epochs(epochs)}.")
    teacher = run.dense() if config.training.distill else None
    _fit(run, "finetune", model, epochs, config.finetune_rate(), teacher=teacher)
    if not run.ranks.leads:
        return
    model.eval()
    compact = resconv.fuse(model, example, fold_norms=True)
    check = resconv.verify(model, compact, example)
    top1 = evaluate(compact, run.data)
    before = run.folder.metrics().top1_compact
    if before is None:  # the user may delete metrics.json
        before = evaluate(compact_of(run), run.data)
    better = top1 >= before
    run.folder.add_metrics(
        top1_finetuned=top1,
        finetuned_kept=better,
        verify_finetuned=check.max_rel_error,
        epochs_finetune=epochs if better else 0,
    )
    run.say(f"Finetuned: top-1 {top1:.2f} %.")
    if better:
        save_compact(run, compact, plan)
        run.folder.add_metrics(
            top1_compact=top1,
            removed_units=removed_units(run, model, plan),
            num_convs_compact=resconv.profile(compact, run.example()).num_convs,
        )
    else:
        run.warn(
            "finetune",
            f"Finetuning made the net worse (top-1 {before:.2f} % before, {top1:.2f} % after {_epochs(epochs)}): "
            "the net as it was pruned is kept. Try a lower finetune_lr, or more finetune_epochs.",
        )
    warn_of_chance(
        run, "finetune", "The compact net", max(top1, before), "give it more finetune_epochs"
    )


def control(run: Run) -> None:
    """Train the dense net on for as long as the compact one: what the epochs alone are worth."""
    config = run.config
    epochs = sum(config.stage_epochs()[1:])
    model = run.dense()
    run.say(
        f"Control: training the dense net on for {_epochs(epochs)}, as many as sparse training and finetuning have."
    )
    teacher = run.dense() if config.training.distill else None
    _fit(run, "control", model, epochs, config.sparse_rate(), teacher=teacher)
    if not run.ranks.leads:
        return
    top1 = evaluate(model, run.data)
    save_state(model, run.folder / "control.safetensors")
    run.folder.add_metrics(top1_control=top1, epochs_control=epochs)
    run.say(f"Control: top-1 {top1:.2f} %.")
