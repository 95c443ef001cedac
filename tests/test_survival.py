"""Runs that are killed, damaged, crowded or stopped: nothing is lost, and nothing of others is touched."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import lightning
import psutil
import pytest
import torch
from PIL import Image
from torch import distributed

from resconv import data, files, run
from resconv.errors import ResConvError, RunError
from resconv.files import OURS, write_text, write_together
from resconv.run import exchange, lock, stages
from resconv.run.fingerprint import differing_parts, fingerprint
from resconv.run.mark import MARK, Mark, Record
from resconv.run.metrics import Metrics
from resconv.train import Recipe, checkpoints, fit, watch
from resconv.train.checkpoints import Bound, choose_checkpoint

from . import noisy

ROOT = Path(__file__).parents[1]
CONFIG = run.Config.of(
    model="tests.noisy:net",
    data="digits",
    macs=0.6,
    limit=64,
    epochs=1,
    sparse_epochs=5,
    finetune_epochs=0,
    batch_size=16,
    progress=False,
)


def quiet(text):
    """Say nothing."""


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Kills


def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.survival", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (tally,), checks = json.loads(done.stdout)
    assert tally["kills"] >= 3
    assert tally["differing"] == []
    assert tally["raw"] == []
    assert all(c["kept"] for c in checks), checks  # another seed is told apart


class Stop(lightning.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


def train(folder, *, stop=False):
    torch.manual_seed(0)
    model = noisy.net()
    images = data.load("digits", limit=64)
    recipe = Recipe(4, batch_size=16)
    callbacks = (Stop(),) if stop else ()
    fit(model, images, recipe, folder, progress=False, callbacks=callbacks, say=quiet)
    return model.state_dict()


def test_a_net_with_dropout_goes_on_with_the_draws_it_would_have_made(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")

    def resumed(name):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / name, stop=True)
        torch.rand(7)  # what else the process draws does not matter
        return train(tmp_path / name)

    same = resumed("resumed")
    assert all(torch.equal(same[k], whole[k]) for k in whole)
    rows = [(tmp_path / n / "metrics.csv").read_text() for n in ("whole", "resumed")]
    assert rows[0] == rows[1]
    assert len(rows[0].splitlines()) == 5
    monkeypatch.setattr(Bound, "on_train_epoch_start", lambda *args: None)
    other = resumed("other")
    assert not all(torch.equal(other[k], whole[k]) for k in whole)


def test_files_are_whole_or_not_there(tmp_path):
    paths = [tmp_path / "weights", tmp_path / "header"]
    for path in paths:
        path.write_text("old")

    def fail(temporaries):
        temporaries[0].write_text("new")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_together(paths, fail)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "weights": "old",
        "header": "old",
    }
    write_together(paths, lambda temporaries: [t.write_text("new") for t in temporaries])
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "weights": "new",
        "header": "new",
    }


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path):
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    folder = tmp_path / "run"
    (folder / f"{OURS}part-abc").mkdir(parents=True)
    (folder / f"{OURS}part-abc" / "half").write_text("x")
    (folder / f"{OURS}part-abc" / "link").symlink_to(outside)
    (folder / f"{OURS}part-link").symlink_to(outside)
    (folder / "part-mine").mkdir()
    assert files.sweep(folder) == 1
    assert sorted(p.name for p in folder.iterdir()) == [f"{OURS}part-link", "part-mine"]
    assert (outside / "kept").is_dir()


# Checkpoints


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints: of the first epoch and of the second."""
    io, path = checkpoints.Checkpoints(), tmp_path / "last.ckpt"
    for epoch in (1, 2):
        io.save_checkpoint(
            {"epoch": epoch, "callbacks": {"Bound": {"bound": "mine", "random": []}}}, path
        )
    return tmp_path


def epoch_of(folder, bound="mine"):
    said = []
    path = choose_checkpoint(folder, bound, said.append)
    return (None if path is None else torch.load(path)["epoch"]), " ".join(said)


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(saved):
    assert epoch_of(saved) == (2, "")  # whole: nothing to say
    flip(saved / "last.ckpt")
    epoch, said = epoch_of(saved)
    assert epoch == 1
    assert "last.ckpt is not used: its bytes are not those that were written" in said
    assert epoch_of(saved) == (1, "")
    flip(saved / "last.ckpt")
    epoch, said = epoch_of(saved)
    assert epoch is None
    assert "starts from its beginning" in said


@pytest.mark.parametrize("left", [b"", b"PK\x03\x04"])
def test_a_cut_checkpoint_is_not_used(saved, left):
    (saved / "last.ckpt").write_bytes(left)
    assert epoch_of(saved)[0] == 1


def test_a_checkpoint_of_something_else_is_not_used(saved):
    epoch, said = epoch_of(saved, "another plan")
    assert epoch is None
    assert "belongs to another run, or to other settings, data or weights" in said


def test_a_kill_between_the_moves_leaves_the_one_before(saved):
    (saved / "last.ckpt").replace(saved / "previous.ckpt")
    assert epoch_of(saved) == (2, "")


def test_a_full_disk_keeps_the_last_checkpoint(saved, monkeypatch):
    before = (saved / "last.ckpt").read_bytes()

    def full(content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_dump", full)
    with pytest.raises(RunError, match="No space left"):
        checkpoints.Checkpoints().save_checkpoint({"epoch": 3}, saved / "last.ckpt")
    assert (saved / "last.ckpt").read_bytes() == before
    assert epoch_of(saved) == (2, "")


# What belongs to whom


def test_a_folder_of_someone_else_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_text('{"architectures": ["X"]}')
    (out / "thesis.tex").write_text("years of work")
    before = listing(out)
    for fresh in (False, True):
        with pytest.raises(RunError, match="no run of resconv"):
            run.RunFolder.begin(out, CONFIG, fresh=fresh)
    with pytest.raises(RunError, match=f"it has no {MARK}"):
        run.open_run(out)
    assert listing(out) == before
    # What a process that was killed at its first write leaves is not someone else's.
    for name in before:
        (out / name).unlink()
    (out / f"{OURS}part-x").mkdir()
    (out / f"{OURS}lock").touch()
    run.RunFolder.begin(out, CONFIG)
    assert run.open_run(out).config == CONFIG


def test_logs_that_are_a_link_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    (outside / "finetune").mkdir(parents=True)
    (outside / "finetune" / "last.ckpt").write_text("of someone else")
    folder = run.RunFolder.begin(tmp_path / "run", CONFIG)
    folder.logs.symlink_to(outside)
    for fresh in (False, True):
        with pytest.raises(RunError, match="is a link"):
            run.RunFolder.begin(tmp_path / "run", CONFIG, fresh=fresh)
    folder.remove(["logs/finetune/last.ckpt"])
    assert (outside / "finetune" / "last.ckpt").is_file()
    folder.logs.unlink()
    (folder.logs / "finetune").mkdir(parents=True)
    (folder.logs / "finetune" / "last.ckpt").touch()
    folder.remove(["logs/finetune/last.ckpt"])  # a real one goes
    assert not (folder.logs / "finetune" / "last.ckpt").exists()


def test_a_mark_cannot_name_files_outside(tmp_path):
    folder = run.RunFolder.begin(tmp_path / "run", CONFIG)
    (tmp_path / "mine").touch()
    for name in ("../mine", str(tmp_path / "mine")):
        content = json.loads((folder / MARK).read_text())
        (folder / MARK).write_text(json.dumps(content | {"files": [name]}))
        with pytest.raises(RunError, match="no place in the folder"):
            folder.remove([name])
    assert (tmp_path / "mine").is_file()
    for damaged in ("[]", "{}", "nonsense", '{"format": "resconv-run", "version": 2}'):
        (folder / MARK).write_text(damaged)
        with pytest.raises(RunError, match=MARK):
            run.RunFolder.begin(tmp_path / "run", CONFIG, fresh=True)


def test_a_file_of_the_user_is_not_written_over(tmp_path):
    folder = run.RunFolder.begin(tmp_path / "run", CONFIG)
    (folder / "model.onnx").write_text("the user's")
    with pytest.raises(RunError, match="is not of this run"):
        folder.claim(stages.WRITES["export"])


@pytest.fixture
def earlier(tmp_path):
    """A folder with a run in it, of which a stage is done, and a file of the user's."""
    folder = run.RunFolder.begin(tmp_path / "run", CONFIG)
    folder.claim(["dense.safetensors"])
    (folder / "dense.safetensors").write_text("trained for days")
    (folder.logs / "dense").mkdir(parents=True)
    (folder.logs / "dense" / "metrics.csv").write_text("rows")
    folder.finish("dense", Record(CONFIG.bearing(), {}, {}, {}, []))
    (folder / "notes.txt").write_text("the user's")
    return folder


def test_fresh_moves_the_earlier_run_aside(earlier):
    out, old = earlier.path, earlier.mark()
    run.begin(out, CONFIG, fresh=True, say=quiet)
    assert (out / "earlier-1" / "dense.safetensors").read_text() == "trained for days"
    assert (out / "earlier-1" / "logs/dense/metrics.csv").read_text() == "rows"
    assert run.open_run(out / "earlier-1").folder.mark() == old
    assert (out / "notes.txt").read_text() == "the user's"
    assert run.open_run(out).folder.done() == []
    assert not (out / "dense.safetensors").exists()
    assert not list(out.glob(f"{OURS}*"))


def test_a_target_that_cannot_be_reached_leaves_the_earlier_run(earlier):
    before = listing(earlier.path)
    impossible = run.Config.of(**CONFIG.values() | {"macs": 1e-6})
    with pytest.raises(ResConvError, match="reach"):
        run.begin(earlier.path, impossible, fresh=True, say=quiet)
    assert listing(earlier.path) == before


def test_an_exchange_that_is_cut_short_is_finished(earlier, monkeypatch):
    rename = os.rename
    for moves in range(12):
        copy = earlier.path.parent / f"copy-{moves}"
        shutil.copytree(earlier.path, copy)
        left = [moves]

        def dies(old, new, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            rename(old, new)

        run.RunFolder.begin(copy, CONFIG, fresh=True)
        monkeypatch.setattr(os, "rename", dies)
        try:
            exchange.complete(copy)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "rename", rename)
        run.RunFolder.begin(copy, CONFIG)
        assert (copy / "earlier-1" / "dense.safetensors").read_text() == "trained for days"
        assert run.open_run(copy / "earlier-1").folder.done() == ["dense"]
        assert run.open_run(copy).folder.done() == []
        assert (copy / "notes.txt").is_file()
        assert not list(copy.glob(f"{OURS}*"))
    assert moves >= 4


def test_what_a_stage_left_goes_when_it_is_undone(earlier):
    earlier.claim(["model.onnx", "plan.json"])
    for name in ("model.onnx", "plan.json"):
        (earlier / name).write_text("old")
    earlier.add_metrics(
        top1_pruned=1.0,
        latency={"torch": dict.fromkeys(("dense_ms", "compact_ms", "ratio"), 1.0)},
        seconds={"plan": 1},
    )
    record = lambda *names, metrics=(): Record({}, {}, {}, dict.fromkeys(names, ""), list(metrics))  # noqa: E731
    earlier.finish("plan", record("plan.json", metrics=["top1_pruned", "seconds"]))
    earlier.finish("measure", record("model.onnx", metrics=["latency", "seconds"]))
    earlier.undo(["measure"])
    assert not (earlier / "model.onnx").exists()
    assert earlier.metrics() == Metrics(top1_pruned=1.0, seconds={"plan": 1})
    assert (earlier / "plan.json").exists()
    assert earlier.done() == ["dense", "plan"]
    assert (earlier / "notes.txt").exists()


# What a stage uses


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose dense and sparse training are done, and another one with another seed."""
    found = []
    for seed in (0, 1):
        config = run.Config.of(**CONFIG.values() | {"seed": seed})
        out = tmp_path_factory.mktemp("trained") / "run"
        current = run.begin(out, config, say=quiet)
        for stage in ("dense", "sparse"):
            run.run_stage(current, stage)
        found.append(out)
    return found


@pytest.mark.parametrize("name", ["dense.safetensors", "gated.safetensors"])
@pytest.mark.parametrize("how", [flip, "another run", Path.unlink])
def test_a_file_that_is_not_what_was_written_is_refused(trained, tmp_path, name, how):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    if how == "another run":
        shutil.copy(trained[1] / name, out / name)
    else:
        how(out / name)
    with pytest.raises(RunError, match=f"{name} is (missing|not what the stage)"):
        run.run_stage(run.open_run(out, quiet, trust_source=True), "plan")
    shutil.copy(trained[0] / name, out / name)
    run.run_stage(run.open_run(out, quiet, trust_source=True), "plan")  # put back, it is used


def test_settings_of_another_run_are_refused(trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    shutil.copy(trained[1] / "config.json", out / "config.json")
    with pytest.raises(RunError, match="seed: 0 there, 1 now"):
        run.run_stage(run.open_run(out, quiet, trust_source=True), "plan")


def test_a_checkpoint_of_another_run_is_not_gone_on_from(trained, tmp_path):
    out, said = tmp_path / "run", []
    shutil.copytree(trained[0], out)
    shutil.copytree(trained[1] / "logs", out / "logs", dirs_exist_ok=True)
    run.run_stage(run.open_run(out, said.append, trust_source=True), "sparse", again=True)
    assert "belongs to another run" in " ".join(said)
    assert (out / "gated.safetensors").read_bytes() == (
        trained[0] / "gated.safetensors"
    ).read_bytes()


def write_images(root, *, side=8, shift=0):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("val", 4)):
        for i in range(count):
            folder = root / split / "abcd"[(i + shift) % 4]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (torch.rand(side, side, generator=generator) * 255).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"shift": 1}, {"images of train", "images of val"}),
        ({"side": 9}, {"form", "images of train"}),
        ({}, set()),
    ],
    ids=["labels", "sizes", "control"],
)
def test_images_that_changed_are_seen(tmp_path, change, parts):
    prints = []
    for settings in ({}, change):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        write_images(tmp_path / "x", **settings)
        prints.append(fingerprint(data.load(f"folder:{tmp_path / 'x'}")))
    found = set(differing_parts(*prints))
    assert parts <= found
    assert bool(found) == bool(change)


# One process at a time


def held_by_another(folder):
    """Own the folder in another process, until its standard input is closed."""
    script = (
        "import sys; from pathlib import Path; from resconv.run.lock import locked\n"
        f"with locked(Path({str(folder)!r})): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_process_says_who_has_the_folder(tmp_path):
    process = held_by_another(tmp_path)
    name = f"process {process.pid} on {socket.gethostname()!r}"
    with pytest.raises(RunError, match=name), lock.locked(tmp_path):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / lock.LOCK).is_file()  # left behind, and no hindrance
    with lock.locked(tmp_path), lock.locked(tmp_path):
        assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / lock.LOCK).exists()


def test_stale_locks_where_the_file_system_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    here, started = socket.gethostname(), psutil.Process(os.getppid()).create_time()
    alive = {"pid": os.getppid(), "host": here, "started": started}
    for owner, is_free in (
        (alive, False),
        (alive | {"started": started - 100}, True),  # another process with its number
        (alive | {"pid": 2**22 + 1}, True),
        (alive | {"host": "elsewhere"}, False),
        ({}, True),
    ):
        (tmp_path / lock.LOCK).write_text(json.dumps(owner))
        if is_free:
            with lock.locked(tmp_path):
                pass
        else:
            with pytest.raises(RunError, match="is in use by process"), lock.locked(tmp_path):
                pass


# Signals, and processes that depend on each other


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_importing_says_how_to_go_on(tmp_path, number, status):
    command = [sys.executable, "-X", "importtime", "-m", "resconv", "compress"]
    process = subprocess.Popen(
        [*command, "--model", "resnet20", "--data", "digits", "--out", tmp_path / "x"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and the tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = next(line for line in process.stderr if "typer" in line)
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait() == status, seen
    assert "The same command goes on" in rest
    assert "Traceback" not in rest


def test_importing_resconv_leaves_signals_alone():
    script = "import signal, resconv; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "True"


def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing as mp, time\n"
        "from resconv.train.watch import EndsWithParent\n"
        "def work(watches):\n"
        "    if watches: EndsWithParent().setup(None, None, 'fit')\n"
        "    time.sleep(300)\n"
        "if __name__ == '__main__':\n"
        "    mp.set_start_method('spawn')\n"
        "    found = [mp.Process(target=work, args=(w,)) for w in (True, False)]\n"
        "    for p in found: p.start()\n"
        "    print(*(p.pid for p in found), flush=True)\n"
        "    time.sleep(300)\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    watching, other = map(psutil.Process, map(int, parent.stdout.readline().split()))
    try:
        parent.kill()
        parent.wait()
        watching.wait(timeout=60)
        assert other.is_running()  # control: without the watch it stays
    finally:
        other.kill()


@pytest.fixture
def store():
    return distributed.TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(seconds=5))


def test_a_process_that_fails_or_falls_silent_ends_the_others(store, monkeypatch):
    monkeypatch.setattr(watch, "_LOOK", 0.05)
    monkeypatch.setattr(watch, "_SILENCE", 2.0)
    ended = {0: [], 1: []}
    groups = [watch.Group(store, r, 2, ended[r].append) for r in range(2)]
    time.sleep(0.5)
    assert ended == {0: [], 1: []}
    groups[1].leave(RunError("The disk is full."))
    deadline = time.monotonic() + 10
    while not ended[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended[0] == ["Process 1 of 2 failed: The disk is full."]
    store.delete_key("resconv/failed")
    ended[0].clear()
    group = watch.Group(store, 0, 2, ended[0].append)  # the other one left: no matter
    time.sleep(3)
    assert not ended[0]
    store.set("resconv/alive/1", "7")  # a sign of life, and then none
    while not ended[0] and time.monotonic() < deadline + 10:
        time.sleep(0.05)
    assert "no sign of life" in ended[0][0]
    group.leave()


def test_a_process_that_never_comes_is_named(monkeypatch):
    monkeypatch.setattr(watch, "_JOIN", 2.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(key, value)
    start = time.monotonic()
    with pytest.raises(RunError, match=r"Process 0 of 2 finds no other|1 did not"):
        watch.join_store(0, 2)
    assert time.monotonic() - start < 60
    assert watch.join_store(0, 1) is not None


def test_a_text_is_written_with_the_rights_of_any_other_file(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "ours", "x")
    modes = [(tmp_path / n).stat().st_mode for n in ("plain", "ours")]
    assert modes[0] == modes[1]
    assert Mark.new().id != Mark.new().id
