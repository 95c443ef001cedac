"""What can be known of a run before anything is trained, or a folder is made for it."""

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resconv
from resconv.errors import BudgetError, DataError, ResConvError, RunError
from resconv.failures import is_out_of_memory
from resconv.latency.table import require_runtime
from resconv.selection.sparsifier import check_form
from resconv.train.ranks import choose_devices
from resconv.train.recorded import check_recording

from .job import Run
from .start import load_start
from .timing import latency_table

__all__ = ["check"]


def check(run: Run, done: list[str], *, sparse: bool = True) -> None:
    """Refuse what cannot end well, as far as that can be known at once; nothing is written.

    Asked are the machine, the data, the net (which takes a step of training on two images) and, with
    ``sparse``, the target. What is ``done`` is not asked about again.

    Raises:
        ResConvError: it says what is wrong, and which setting mends it.
    """
    config = run.config
    if sparse:
        require_runtime(config.budget().runtime)
    wanted = ["dense", *(["sparse", "finetune"] if sparse else [])]
    if sparse and config.training.control:
        wanted.append("control")
    if all(stage in done for stage in wanted):
        return
    _check_machine(run)
    _check_data(run)
    if "sparse" in done or ("dense" in done and not sparse):
        return
    model = run.create()
    if "dense" not in done:
        load_start(run, model)
    _try_step(run, copy.deepcopy(model), config.net.model)
    if sparse:
        _check_target(run, model)


def _world_size(run: Run) -> int:
    devices: int = choose_devices(run.devices)["devices"]
    return run.ranks.world_size if run.ranks.are_several else devices


def _check_machine(run: Run) -> None:
    config, cores = run.config, os.cpu_count() or 1
    assert run.precision  # which raises where this machine has no such format
    world = _world_size(run)
    if config.training.cuda_graphs:
        check_recording("cuda" if torch.cuda.is_available() else "cpu", world)
    threads = config.deployment.threads
    if threads is not None and threads > cores:
        raise RunError(f"threads={threads}: this machine has {cores} CPU cores.")


def _check_data(run: Run) -> None:
    config, data, world = run.config, run.data, _world_size(run)
    batch_size = config.training.batch_size
    assert run.augment  # which raises where the images cannot be changed as asked
    if data.num_classes < 2:
        raise DataError(
            f"{config.data.source} has one class only ({', '.join(data.class_names)}): there is nothing to "
            "tell apart. Add a folder of images that are something else."
        )
    if batch_size < world or len(data.val) < world:
        raise RunError(
            f"{world} processes cannot share a batch of {batch_size} images and a validation "
            f"set of {len(data.val)}: each needs at least one image. Use fewer devices or a larger "
            "batch_size."
        )


def _try_step(run: Run, model: nn.Module, name: str) -> None:
    """Take one step forwards and backwards with two images (one, where that is a batch)."""
    data = run.data
    size = min(2, run.recipe(1, 0.1).batch_on(len(data.train)))
    try:
        out = model.train()(run.example(size))
        if isinstance(out, Tensor) and out.shape == (size, data.num_classes):
            loss = F.cross_entropy(out, torch.zeros(size, dtype=torch.long))
            torch.autograd.backward(loss)
            return
    except ResConvError:
        raise
    except Exception as error:  # of a zoo's or the user's forward
        if is_out_of_memory(error):
            raise
        text = (str(error).splitlines() or [""])[0][:200]
        raise RunError(
            f"{name} cannot be trained on batches of {size} images of "
            f"{data.channels}x{data.image_size}x{data.image_size}: a step of training ended in "
            f"{type(error).__name__}: {text}. Where it asks for more values, give a larger batch_size "
            "or image_size; else the fault is in the net."
        ) from error
    raise RunError(
        f"In training {name} returns {_describe(out)}, and no tensor of ({size}, {data.num_classes}). "
        "Where it has auxiliary heads, write a function that builds it without them, and name that: "
        "package.module:factory."
    )


def _describe(out: Any) -> str:
    if isinstance(out, Tensor):
        return f"a tensor of {tuple(out.shape)}"
    return f"a {type(out).__name__}"


def _check_target(run: Run, model: nn.Module) -> None:
    """Refuse a target that no plan can reach, or that no run so short arrives at."""
    config = run.config
    epochs = config.stage_epochs()[1]
    recipe = run.recipe(epochs, config.sparse_rate())
    total_steps = recipe.count_steps(len(run.data.train))
    try:
        check_form(config.budget(), "proximal", total_steps)  # before the latency takes its time
    except BudgetError as error:
        raise BudgetError(
            f"Sparse training has {epochs} epochs of {total_steps // epochs} steps. {error} Here that is "
            "sparse_epochs and batch_size."
        ) from error
    gated = run.converted(model.eval(), "keep")
    if config.training.hints and not resconv.recovery.hint_layers(gated, run.example(2)):
        raise RunError(
            f"hints=True: {config.net.model} has no layer, called as a module, between its units. Train "
            "without it."
        )
    _try_step(run, copy.deepcopy(gated), f"{config.net.model} with its units")
    resconv.Sparsifier(
        gated,
        target=config.budget(),
        total_steps=total_steps,
        example_inputs=run.example(),
        latency=latency_table(run, gated),
    )
