"""Two CPU processes: the same scales and plan on both, and the result of one process."""

import copy
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import lightning
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn import functional as F
from typer.testing import CliRunner

import resconv
from resconv import run
from resconv.cli.app import app
from resconv.errors import BudgetError, MissingExtraError
from resconv.run import stages
from resconv.selection.processes import by_first
from resconv.train import fit

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import digits as example

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
BUDGET, STEPS, BATCH = resconv.Budget(macs=0.5), 220, 64
# What DistributedDataParallel is asked for, in a run of its own each.
WAYS = {
    "plain": {},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "accumulating": {},
}
CONFIG = {
    "model": "resnet20",
    "data": "digits",
    "macs": 0.6,
    "limit": 192,
    "epochs": 1,
    "sparse_epochs": 4,
    "finetune_epochs": 1,
    "batch_size": 32,
    "progress": False,
}


def gated_net(depth=2):
    torch.manual_seed(0)
    images, _ = example.digits()[0].tensors
    return resconv.convert(example.Net(8, depth), images[:2]).train()


def train(model, *, rank=0, world=1, steps=STEPS, accumulate=1, call=None, scores=None, **options):
    """Train on every ``world``-th image of each batch, as DDP's users do."""
    images, labels = example.digits()[0].tensors
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    sparsifier = resconv.Sparsifier(model, target=BUDGET, total_steps=steps, **options)
    sparsifier.attach(optimizer)
    if scores is not None:
        sparsifier._importance.read = scores
    call = call or model
    for _ in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            batch = torch.randint(len(images), (BATCH,), generator=order)[rank::world]
            last = part == accumulate - 1
            loss = lambda: F.cross_entropy(call(images[batch]), labels[batch])  # noqa: E731, B023
            if last or not isinstance(model, nn.parallel.DistributedDataParallel):
                loss().backward()
            else:
                with model.no_sync():
                    loss().backward()
        optimizer.step()
        schedule.step()
    return sparsifier


def worker(rank, folder, port):
    """Everything that two processes are needed for, in one start of them."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
    }
    # As under torchrun: the whole job, called in every process.
    said = []
    job = run.begin(folder / "run", run.Config.of(**CONFIG), say=said.append)
    metrics = run.compress(job)
    found = {"said": len(said), "metrics": bool(metrics)}
    for name, options in WAYS.items():
        model = nn.parallel.DistributedDataParallel(gated_net(), **options)
        steps = STEPS if name == "plain" else 24
        accumulate = 2 if name == "accumulating" else 1
        sparsifier = train(model, rank=rank, world=2, steps=steps, accumulate=accumulate)
        state = {k: v for k, v in sparsifier.state_dict().items() if k != "history"}
        found[name] = (model.module.state_dict(), state, sparsifier.outcome().met)

    def unequal():
        """Importance that the processes would draw opposite conclusions from."""
        return {n: 4.0 ** (i if rank == 0 else -i) for i, n in enumerate(names)}

    names = list(resconv.gates(gated_net()))
    for shared in (None, False):
        model = nn.parallel.DistributedDataParallel(gated_net())
        sparsifier = train(model, rank=rank, world=2, steps=24, shared=shared, scores=unequal)
        found[f"chosen-{shared}"] = sparsifier.removed
    model = nn.parallel.DistributedDataParallel(gated_net())
    try:
        train(model, rank=rank, world=2, steps=24, call=model.module)
    except resconv.ResConvError as error:
        found["apart"] = str(error)
    found["by first"] = [outcome(call, rank) for call in CALLS]
    found["hf"] = train_with_transformers(folder / "hf")
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def refuse(rank):
    raise BudgetError(f"no such budget on {rank}")


def want(rank):
    raise MissingExtraError("onnxruntime", "onnx", f"Timing on {rank}")


CALLS = [lambda rank: ("rank", rank), lambda rank: None, refuse, want]


def outcome(call, rank):
    """Return what the first process's call gives this one."""
    try:
        return by_first(lambda: call(rank), True)
    except resconv.ResConvError as error:
        return type(error).__name__, str(error)


def train_with_transformers(folder):
    """Return the weights that transformers' Trainer leaves in this process, and the zeros."""
    import huggingface as hf

    torch.manual_seed(0)
    train_set = example.digits()[0]
    inputs = {"pixel_values": train_set.tensors[0][:2]}
    gated = resconv.convert(hf.build(), inputs)
    callback = hf.SparsityCallback(resconv.Budget(macs=0.7))
    hf.fit(gated, hf.Images(train_set), folder, 2, 0.005, [callback], ddp_backend="gloo")
    assert callback.sparsifier.shared
    assert callback.sparsifier.outcome().met
    return gated.state_dict(), callback.sparsifier.removed


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    workers = start_processes(
        worker, (folder, free_port()), nprocs=2, start_method="spawn", join=False
    )
    deadline = time.monotonic() + 400
    try:
        while not workers.join(timeout=5):
            assert time.monotonic() < deadline, "the two processes wait for each other"
    finally:
        for process in workers.processes:
            if process.is_alive():
                process.kill()
    return folder, [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(2)]


@pytest.mark.parametrize("name", WAYS)
def test_ranks_hold_the_same_scales_and_plan(two, name):
    first, second = (found[name] for found in two[1])
    weights = {k: v for k, v in first[0].items() if "running" not in k and "tracked" not in k}
    assert any(".scale" in k for k in weights)
    for key, value in weights.items():
        assert torch.equal(value, second[0][key]), key
    assert first[1] == second[1]  # scores, zeros, fades
    assert first[1]["zero"]
    assert first[2]
    assert second[2]
    # BatchNorm statistics are each rank's own, so nothing above may come from them.
    assert any(not torch.equal(first[0][k], second[0][k]) for k in first[0] if "running" in k)


def test_transformers_trains_one_net_too(two):
    (first, removed), (second, same) = (found["hf"] for found in two[1])
    assert removed == same != []
    for key, value in first.items():
        if "running" not in key and "tracked" not in key:
            assert torch.equal(value, second[key]), key
    assert any(not torch.equal(first[k], second[k]) for k in first if "running" in k)


def test_the_first_decides_for_all(two):
    one, other = two[1]
    assert one["chosen-None"] == other["chosen-None"] != []
    assert one["chosen-False"] != other["chosen-False"]  # the scores would have told them apart


def test_all_get_what_the_first_one_got(two):
    one, other = two[1]
    assert one["by first"] == other["by first"]
    value, nothing, refused, missing = one["by first"]
    assert value == ("rank", 0)
    assert nothing is None
    assert refused == ("BudgetError", "no such budget on 0")
    assert missing[0] == "MissingExtraError"
    assert missing[1].startswith("Timing on 0 needs the package 'onnxruntime'")
    assert by_first(lambda: CALLS[0](1), False) == ("rank", 1)


def test_ranks_that_train_apart_are_told_so(two):
    for found in two[1]:
        assert "scales of rank 1 are not those of rank 0" in found["apart"]


def test_two_processes_agree_with_one(two):
    images = example.digits()[0].tensors[0]
    held_out = example.digits()[1]
    single = gated_net()
    alone = train(single)
    both = gated_net()
    both.load_state_dict(two[1][0]["plain"][0])
    shares, nets = [], []
    for gated in (single, both):
        plan = resconv.plan(gated.eval(), images[:2], BUDGET)
        compact = resconv.prune(gated, plan)
        resconv.verify(gated, compact, images[:2])
        shares.append(resconv.profile(compact, images[:2]).macs / alone.costs.macs)
        nets.append(example.accuracy(compact, held_out))
    assert max(shares) <= 0.5
    assert min(nets) > 0.85
    # 360 images: the standard error of the difference of two accuracies near 0.93 is 0.02.
    assert abs(nets[0] - nets[1]) < 0.06, nets


def test_the_whole_job_under_a_launcher(two):
    folder, (lead, other) = two
    assert lead["metrics"]
    assert lead["said"]
    assert not other["metrics"]
    assert not other["said"]
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["macs_compact"] <= 0.6 * metrics["macs_dense"]
    assert metrics["removed_with_nonzero_scale"] == []
    assert json.loads((folder / "run" / "stages.json").read_text()) == [
        stage for stage in run.STAGES if stage != "control"
    ]
    # Six steps of 32 images an epoch, shared by the two.
    rows = (folder / "run" / "logs" / "sparse" / "metrics.csv").read_text().splitlines()
    assert int(rows[-1].split(",")[rows[0].split(",").index("step")]) == 4 * 6 - 1


class Die(lightning.Callback):
    """One of the processes is gone in the middle of training."""

    def on_train_epoch_start(self, trainer, pl_module):
        assert trainer.world_size == 2
        if trainer.current_epoch == 2 and trainer.global_rank == 1:
            os._exit(9)


def test_devices_and_going_on_after_a_crash(two, tmp_path):
    out = tmp_path / "run"
    config = run.Config.of(
        **CONFIG | {"finetune_epochs": 0, "weights": str(two[0] / "run/dense.safetensors")}
    )
    stopped = run.begin(out, config, say=lambda text: None)
    run.run_stage(stopped, "dense")
    gated = resconv.convert(stopped.dense(), stopped.example(2)).train()
    with pytest.raises(resconv.ResConvError, match="Process 1 of the training ended"):
        fit(
            gated,
            stopped.data,
            stopped.recipe(4, 0.05),
            stopped.folder.logs / "sparse",
            target=config.budget(),
            devices=2,
            progress=False,
            callbacks=(Die(),),
            bound=stages.bind(stopped, "sparse"),
        )
    args = [
        *("compress", "--model", "resnet20", "--data", "digits", "--macs", "0.6"),
        *("--limit", "192", "--epochs", "1", "--sparse-epochs", "4", "--finetune-epochs", "0"),
        *(
            "--batch-size",
            "32",
            "--weights",
            config.net.weights,
            "--devices",
            "2",
            "--out",
            str(out),
        ),
    ]
    # A progress bar is no reason to start anew, nor is the number of devices.
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, (done.output, done.exception)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["macs_compact"] <= 0.6 * metrics["macs_dense"]
    assert metrics["removed_with_nonzero_scale"] == []
    steps = [s["step"] for s in json.loads((out / "scales.json").read_text())["steps"]]
    assert steps == list(range(4 * 6 + 1))
    # The log has the rows from before the crash, and those after it, each once.
    rows = [r.split(",") for r in (out / "logs/sparse/metrics.csv").read_text().splitlines()]
    ends = [int(r[0]) for r in rows[1:] if r[rows[0].index("macs")]]
    assert ends == [0, 1, 2, 3]


def test_an_error_in_a_process_stays_an_error_for_the_user():
    from torch.multiprocessing.spawn import ProcessRaisedException

    from resconv.errors import BudgetError
    from resconv.train.ranks import raised_inside

    def died_of(error):
        try:
            raise error
        except Exception:
            text = f"-- Process 1 terminated with the following error:\n{traceback.format_exc()}"
            return ProcessRaisedException(text, 1, 4711)

    found = raised_inside(died_of(BudgetError("The target cannot be reached: 5 of 9.\nRaise it.")))
    assert type(found) is BudgetError
    assert str(found) == "The target cannot be reached: 5 of 9.\nRaise it."
    assert raised_inside(died_of(ValueError("a bug"))) is None
    assert raised_inside(ValueError("here")) is None


def test_devices_that_are_not_there():
    from resconv.train.ranks import choose_devices

    with pytest.raises(resconv.ResConvError, match="devices=0: at least 1"):
        choose_devices(0)


def test_launchers_are_read(monkeypatch):
    from resconv.train.ranks import Ranks, find_ranks

    assert find_ranks() == Ranks(0, 1, 1)
    slurm = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "5", "SLURM_JOB_NAME": "x"}
    for key, value in slurm.items():
        monkeypatch.setenv(key, value)
    assert find_ranks() == Ranks(5, 8, 4)
    assert not find_ranks().leads
    monkeypatch.setenv("SLURM_NNODES", "3")
    with pytest.raises(resconv.ResConvError, match="8 tasks on 3 nodes"):
        find_ranks()


def test_synchronised_norms():
    """``convert_sync_batchnorm`` on a converted net: the same function, and it can be pruned."""
    torch.manual_seed(0)
    gated = gated_net().double()
    for p in (p for g in resconv.gates(gated).values() for p in (g.scale, g.control)):
        if p is not None:
            nn.init.uniform_(p, 0.5, 1.5)
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(gated))
    norms = [m for m in other.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 5
    calls = []
    for norm in norms:
        norm.register_forward_hook(lambda *a: calls.append(1))
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    for net in (gated, other):
        net.train()(x).square().sum().backward()
    # Each one's own forward ran: that is where it talks to the other processes.
    assert len(calls) == 5
    for (name, a), b in zip(gated.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8, msg=name)
    for (name, a), b in zip(gated.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    sparsifier = resconv.Sparsifier(other, target=BUDGET, total_steps=20).attach(optimizer)
    assert sparsifier.costs.macs == resconv.Sparsifier(gated).costs.macs
    gone = resconv.Plan(("blocks.0", "blocks.1.conv2"))
    other.eval()
    compact = resconv.prune(other, gone)
    resconv.verify(other, compact, x, plan=gone)
    assert not any(
        isinstance(m, nn.SyncBatchNorm)
        for m in resconv.fuse(compact, x, fold_norms=True).blocks.modules()
    )
