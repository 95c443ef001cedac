"""The command line as a hurried user meets it: refusals before any work, in the words of its options."""

import errno
import json
import re
import sys

import pytest
import torch
from PIL import Image
from torch import nn

import resconv
from resconv import run
from resconv.cli.app import app, run_app
from resconv.cli.messages import as_options
from resconv.errors import BudgetError, ResConvWarning, RunError
from resconv.failures import in_words, is_out_of_memory
from resconv.run import training
from resconv.run.checks import check
from resconv.run.job import Run
from resconv.run.settings import amount
from resconv.train import fit

from .helpers import Block

NAME = f"{__name__}:Tiny"
BASE = {
    "--model": NAME,
    "--data": "digits",
    "--limit": 64,
    "--batch-size": 8,
    "--epochs": 1,
    "--sparse-epochs": 4,
    "--finetune-epochs": 1,
    "--macs": 0.5,
    "--seed": 3,
}


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """Long paths are not folded."""
    monkeypatch.setenv("COLUMNS", "1000")


class Tiny(nn.Module):
    """Four residual blocks on grey images."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(8) for _ in range(4)))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class TwoHeads(Tiny):
    """Returns more in training than in use."""

    def forward(self, x):
        out = super().forward(x)
        return (out, out) if self.training else out


class NeedsTwoValues(Tiny):
    """A norm over one value a channel and image, which a batch of one image cannot be trained with."""

    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


def command(*args):
    """Run the command line in this process; what would be a traceback is raised.

    The runs here are of a net of this file, code of the user's own, which a run folder may not start
    without his word.
    """
    before = sys.argv
    trusts = ["--trust-source"] if args[0] in ("prune", "measure", "export") else []
    sys.argv = ["resconv", *map(str, args), *trusts]
    try:
        return run_app(app)
    finally:
        sys.argv = before


def compress(out, *args, name="compress", **changes):
    """Run ``compress`` with the small settings and some others; None leaves one out."""
    given = BASE | {f"--{k.replace('_', '-')}": v for k, v in changes.items()}
    flat = [x for k, v in given.items() if v is not None for x in (k, v)]
    return command(name, *flat, *args, "--out", out)


def said(capsys):
    """Return what was printed, as one line without the frame."""
    captured = capsys.readouterr()
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", captured.out + captured.err).split())


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "done"
    assert compress(out) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    import shutil

    return shutil.copytree(finished, tmp_path / "copied")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"macs": "0"}, "--macs 0: give a fraction above 0 and up to 1"),
        ({"macs": "1.5"}, "--macs 1.5: give a fraction"),
        ({"macs": "nan"}, "--macs nan: give a fraction"),
        ({"macs": "1e400M"}, "--macs 1e400M: give a fraction"),
        ({"macs": "1"}, "within the target as it is"),
        ({"macs": "3"}, "cannot be reached"),
        ({"macs": None}, "Nothing is asked for: give --macs 0.5"),
        ({"epochs": -1}, "--epochs -1: at least 0"),
        ({"sparse_epochs": 0}, "--sparse-epochs 0: at least 1"),
        ({"sparse_epochs": 2}, "at least 20 optimizer steps.* --sparse-epochs and --batch-size"),
        ({"batch_size": 0, "seed": -1}, "--batch-size 0: at least 1|--seed -1: at least 0"),
        ({"lr": "nan"}, "--lr nan: it must be above 0"),
        ({"finetune_lr": "inf"}, "--finetune-lr inf: it must be above 0"),
        ({"holdout": 1.0}, "--holdout 1.0: a share"),
        ({"channels": 4}, "--channels 4: images are grey"),
        (
            {"units": "layer"},
            "--units layer: choose among layers, blocks, summands, segments, gates",
        ),
        ({"precision": "fp8"}, "--precision fp8: choose one of auto, 32-true"),
        ({"devices": 0}, "--devices 0: at least 1 and at most"),
        ({"devices": 4096}, "--devices 4096: at least 1 and at most"),
        ({"threads": 2}, "--threads 2 says how a latency is measured, but no latency is limited"),
        ({"macs": None, "latency": 0.5, "threads": 4096}, "--threads 4096: this machine has"),
        ({"weights": "nope.pt"}, "There is no weights file nope.pt"),
        ({"model": f"{__name__}:TwoHeads"}, r"In training .* returns a tuple"),
        ({"model": f"{__name__}:NeedsTwoValues", "batch_size": 1}, "larger --batch-size"),
        ({"image_size": 99_999_999}, "not enough memory.* smaller --batch-size"),
    ],
)
def test_what_can_be_known_is_refused_before_there_is_a_folder(changes, message, tmp_path, capsys):
    assert compress(tmp_path / "out", **changes) == 2
    text = said(capsys)
    assert re.search(message, text), text
    assert "Traceback" not in text
    assert "Training" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--cuda-graphs",), "Leave --cuda-graphs out"),
        (("--precision", "16-mixed"), "--precision 16-mixed needs a GPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(args, message, tmp_path, capsys):
    assert compress(tmp_path / "out", *args) == 2
    assert message in said(capsys)
    assert list(tmp_path.iterdir()) == []


def test_hints_without_a_layer_for_them_are_refused_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resconv.recovery, "hint_layers", lambda *args: ())
    assert compress(tmp_path / "out", "--distill", "--hints") == 2
    assert "--hints: " in said(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_refused_for_nothing_else_is_begun(tmp_path):
    """The checks let through what can be trained; they leave the random numbers of the run alone."""
    config = run.Config.of(
        model=NAME, data="digits", limit=64, batch_size=8, macs=0.5, sparse_epochs=4
    )
    begun = run.begin(tmp_path / "out", config, say=lambda text: None)
    assert (tmp_path / "out" / "config.json").is_file()
    assert begun.folder.done() == []
    first = begun.create().state_dict()
    check(begun, [])
    for name, tensor in begun.create().state_dict().items():
        assert torch.equal(tensor, first[name])


def test_one_class_is_refused(tmp_path, capsys):
    def images(*names):
        for split, number in (("train", 24), ("val", 4)):
            for name in names:
                folder = tmp_path / "data" / split / name
                folder.mkdir(parents=True)
                for i in range(number):
                    Image.new("L", (8, 8), 9 * i).save(folder / f"{i}.png")

    images("cat")
    data = f"folder:{tmp_path / 'data'}"
    assert compress(tmp_path / "out", data=data) == 2
    assert "one class only (cat)" in said(capsys)
    images("dog")
    config = run.Config.of(model=NAME, data=data, batch_size=8, macs=0.5, sparse_epochs=4)
    run.begin(tmp_path / "out", config, say=lambda text: None)


@pytest.mark.parametrize("place", ["file", "file/run", "file/a/b", f"{'x' * 300}/run"])
def test_a_place_where_no_folder_can_be(place, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert compress(tmp_path / place) == 2
    assert "Choose another --out" in said(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    assert compress(tmp_path / "out") == 2
    assert f"{tmp_path.name} cannot be written" in said(capsys)


def test_a_run_that_failed_before_training_does_not_lock_its_folder(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", fail)
        assert compress(tmp_path / "out") == 2
    assert "not enough memory" in said(capsys)
    assert (tmp_path / "out" / "config.json").is_file()

    # With a smaller batch it begins anew there; what was trained for an epoch is not thrown away.
    stored = run.Config.from_content(json.loads((tmp_path / "out" / "config.json").read_text()))
    config = run.Config.of(**{**stored.values(), "batch_size": 4})
    begun = run.begin(tmp_path / "out", config, say=lambda text: None)
    assert begun.folder.config().training.batch_size == 4
    run.run_stage(begun, "dense")
    with pytest.raises(
        RunError, match=r"batch_size: 4 there, 8 now.*--weights .*dense.safetensors"
    ):
        run.begin(tmp_path / "out", run.Config.of(**{**config.values(), "batch_size": 8}))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "2 GiB"),
        (RuntimeError("x\n[enforce] DefaultCPUAllocator: can't allocate memory: y"), "Allocator"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (ImportError("a.so: failed to map segment from shared object"), "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space.* Make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a/b"), "/a/b: No such file.* gone"),
        (RunError("as it is"), "^as it is$"),
    ],
)
def test_what_fails_outside_is_said_in_words(error, words):
    assert re.search(words, str(in_words(error)))


def test_no_memory_is_said_where_none_is_left_to_say_it(monkeypatch, capfd):
    def full(*args):
        raise MemoryError

    monkeypatch.setattr("resconv.cli.messages.as_options", full)
    assert compress("/dev/null/out") == 2
    assert "There is not enough memory. Ask for less" in capfd.readouterr().err
    # Negative control: another fault of what shows errors is not taken for it.
    monkeypatch.setattr("resconv.cli.messages.as_options", lambda text: [][0])
    with pytest.raises(IndexError):
        compress("/dev/null/out")


def test_what_nobody_foresaw_ends_in_one_panel_and_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert in_words(RuntimeError("shapes differ")) is None
    assert not is_out_of_memory(RuntimeError("shapes differ"))

    def fail(*args, **kwargs):
        raise KeyError("never seen")

    monkeypatch.setattr(run, "open_run", fail)
    assert command("measure", tmp_path) == 1
    text = said(capsys)
    assert "Unexpected: KeyError: 'never seen'" in text
    assert "Traceback" not in text
    (details,) = tmp_path.glob("resconv-*.txt")
    assert "Traceback" in details.read_text()


def test_python_keywords_become_options():
    assert as_options("sparse_epochs=3: at least 4.") == "--sparse-epochs 3: at least 4."
    assert as_options("distill=True with recalibrate=False.") == "--distill with --no-recalibrate."
    assert as_options("num_params=0.5; units='all'") == "--params 0.5; --units all"
    assert as_options("a larger batch_size.") == "a larger --batch-size."
    assert as_options("macs: 0.5 there, 0.4 now") == "--macs: 0.5 there, 0.4 now"
    assert as_options("holdout=0.1 (--holdout 0.1)") == "--holdout 0.1"
    # Not what stands in code, in a path or in prose.
    for text in (
        "Budget(macs=0.5)",
        "a/batch_size.py",
        "my_macs=3",
        "the limit of the model: 3",
    ):
        assert as_options(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("0.5", 0.5), ("50%", 0.5), ("1", 1.0), ("100%", 1.0), ("40M", 40_000_000)),
        *(("2_000", 2000), ("1e7", 10_000_000), ("0.5M", 500_000), ("1e-1", 0.1)),
    ],
)
def test_amounts(text, value):
    found = amount(text, "--macs")
    assert found == value
    assert type(found) is type(value)
    for bad in (f"-{text}", f"{text}x"):
        with pytest.raises(BudgetError, match="give a fraction"):
            amount(bad, "--macs")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "Stopped. The same command goes on"),
        (("--fresh",), "command, without --fresh, goes on"),
    ],
)
def test_ctrl_c_says_that_the_same_command_goes_on(args, words, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", stop)
    assert compress(tmp_path / "out", *args) == 130
    assert words in said(capsys)
    # Where nothing goes on, nothing of the kind is said.
    monkeypatch.setattr(resconv, "units", stop)
    assert command("inspect", "resnet20") == 130
    text = said(capsys)
    assert "Stopped." in text
    assert "goes on" not in text


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("", "plan.json is not JSON"),
        ("[]", "the whole is a list, needed is an object"),
        ('{"remove": 3}', "'remove' is 3, needed is a list"),
        ('{"remove": []}', "The plan removes nothing"),
        ('{"remove": ["layer9"]}', "no removable unit named 'layer9'"),
        ('{"remove": ["stem.0"]}', "no removable unit named 'stem.0'"),
        ('{"remove": ["blocks.0", "blocks.0"]}', "more than once"),
    ],
)
def test_a_bad_plan_leaves_every_file_as_it_was(plan, message, copied, tmp_path, capsys):
    (tmp_path / "plan.json").write_text(plan)
    before = files(copied)
    assert command("prune", copied, "--plan", tmp_path / "plan.json") == 2
    assert files(copied) == before
    assert message in said(capsys)


def test_a_plan_that_misses_the_target_is_carried_out_and_said(copied, tmp_path, capsys):
    (tmp_path / "plan.json").write_text('{"remove": ["blocks.1"]}')
    assert command("prune", copied, "--plan", tmp_path / "plan.json") == 0
    assert "misses the target of the run" in said(capsys)
    assert command("measure", copied) == 2  # the file for another runtime is of the net before
    assert command("export", copied) == 0
    assert command("measure", copied) == 0
    assert "misses the target of the run" in (copied / "report.html").read_text()
    metrics = json.loads((copied / "metrics.json").read_text())
    assert "misses the target" in metrics["warnings"]["prune"][0]
    assert {"blocks.1", "blocks.1.conv1", "blocks.1.conv2"} <= set(metrics["removed_units"])
    # The run's own plan again: the warning goes with what it was about.
    assert command("prune", copied) == 0
    assert "prune" not in json.loads((copied / "metrics.json").read_text()).get("warnings", {})


def test_the_report_tells_what_is_removed(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    metrics = json.loads((finished / "metrics.json").read_text())
    planned = resconv.Plan.load(finished / "plan.json").remove
    compact = run.open_run(finished, lambda text: None, trust_source=True)
    left = dict(resconv.load(finished, model=compact.create()).named_modules())
    outcome = dict(
        re.findall(
            r'<th scope="row">(blocks[^<]*)</th><td class="n">[\d.]+</td>\n.*?<td>((?:removed|kept)[^<]*)</td></tr>',
            page,
            re.DOTALL,
        )
    )
    assert set(outcome) == set(resconv.gates(compact.gated()))
    for name, text in outcome.items():
        if "conv" in name:
            gone = not isinstance(left.get(name), nn.Conv2d)
            assert text.startswith("removed" if gone else "kept"), name
        elif name in planned:
            assert text == "removed", name
    assert {"kept", "removed"} <= {t.split(",")[0] for t in outcome.values()}
    convs = sum(isinstance(m, nn.Conv2d) for m in left.values())
    assert metrics["num_convs_compact"] == convs < metrics["num_convs_dense"] == 9
    assert f"9 convolutions became {convs}" in page


def test_a_target_that_training_missed_is_said(tmp_path, monkeypatch, capsys):
    """Here nothing brings a scale to 0; a run that arrives says nothing of the kind."""
    from resconv.selection.schedule import Schedule

    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "choose", lambda *args: None)
        assert compress(tmp_path / "out") == 0
    assert "Sparse training missed its target: 0 scales" in said(capsys)
    warned = json.loads((tmp_path / "out" / "metrics.json").read_text())["warnings"]
    assert "missed its target" in warned["sparse"][0]
    assert "missed its target" in (tmp_path / "out" / "report.html").read_text()


def test_fit_warns_of_a_missed_target_and_of_nothing_else(tmp_path, monkeypatch, recwarn):
    from resconv.selection.schedule import Schedule

    def train(name):
        torch.manual_seed(0)
        config = run.Config.of(model=NAME, data="digits", limit=64, batch_size=8, macs=0.5)
        current = Run(run.RunFolder(tmp_path), lambda text: None, config=config, trust_source=True)
        model = resconv.convert(current.create().eval(), current.example(2)).train()
        recipe = current.recipe(4, 0.05)
        fit(model, current.data, recipe, tmp_path / name, target=config.budget(), progress=False)
        return [w for w in recwarn.list if issubclass(w.category, ResConvWarning)]

    assert train("met") == []
    monkeypatch.setattr(Schedule, "choose", lambda *args: None)
    (warned,) = train("missed")
    assert "missed its target" in str(warned.message)


@pytest.mark.parametrize("better", [True, False])
def test_finetuning_that_made_it_worse_is_not_kept(better, copied, monkeypatch, capsys):
    monkeypatch.setattr(training, "evaluate", lambda *args: 100.0 if better else 1.0)
    current = run.open_run(copied, trust_source=True)
    run.run_stage(current, "prune", again=True)
    pruned = (copied / "model.safetensors").read_bytes()
    before = current.folder.metrics().top1_pruned
    run.run_stage(current, "finetune")
    kept = (copied / "model.safetensors").read_bytes() == pruned
    metrics = current.folder.metrics()
    assert kept is not better
    assert metrics.finetuned_kept is better
    assert metrics.top1_compact == (100.0 if better else before)
    assert ("Finetuning made the net worse" in said(capsys)) is not better
    assert bool(metrics.warnings.get("finetune")) is not better


def test_a_net_at_chance_level_is_said(finished):
    current = run.open_run(finished, lambda text: None, trust_source=True)
    labels = current.data.val.labels
    chance = 100 * labels.bincount().max().item() / len(labels)
    said: list[str] = []
    current.warn = lambda stage, text: said.append(text)  # type: ignore[method-assign]
    training.warn_of_chance(current, "dense", "The net", chance + 40, "train it")
    assert said == []
    training.warn_of_chance(current, "dense", "The net", chance, "train it")
    assert "no better than guessing" in said[0]


def test_epochs_beside_weights_are_said(finished, tmp_path, capsys):
    weights = finished / "dense.safetensors"
    for epochs in (None, 3):
        out = tmp_path / f"epochs-{epochs}"
        assert compress(out, "--dense-only", name="train", weights=weights, epochs=epochs) == 0
        assert ("--epochs 3 is not used" in said(capsys)) is (epochs == 3)


def test_another_form_that_cannot_be_had_does_not_cost_the_run(copied, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise resconv.errors.ExportError("no such operation")

    monkeypatch.setattr(resconv, "export", fail)
    assert command("export", copied) == 2
    assert "No ONNX file: no such operation" in said(capsys)
    assert command("measure", copied) == 0
    assert "No ONNX file" in (copied / "report.html").read_text()


def test_prune_goes_on_with_the_finetuning_that_was_stopped(copied, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    fit = training.fit
    monkeypatch.setattr(training, "fit", stop)
    assert command("prune", copied) == 130
    assert "The same command goes on" in said(capsys)
    monkeypatch.setattr(training, "fit", fit)
    assert command("prune", copied) == 0
    assert "carried out already" in said(capsys)
    assert "finetune" in run.open_run(copied, trust_source=True).folder.done()


@pytest.mark.parametrize("name", ["model.onnx", "plan.json", "report.html", "model.safetensors"])
def test_a_file_that_is_gone_is_made_anew(name, copied, capsys):
    """What training left is never made anew unasked: that is refused where it is read."""
    (copied / name).unlink()
    assert compress(copied) == 0
    assert f"is done anew: {name} is missing" in said(capsys)
    assert (copied / name).is_file()
    (copied / "dense.safetensors").unlink()
    assert compress(copied) == 0
    assert "done anew" not in said(capsys)
    assert command("prune", copied) == 2
    assert "dense.safetensors is missing" in said(capsys)


def test_metrics_that_are_gone(copied, capsys):
    (copied / "metrics.json").unlink()
    assert command("measure", copied) == 2
    assert "Make it anew: resconv prune" in said(capsys)
    assert command("prune", copied) == 0
    assert command("export", copied) == 0
    assert command("measure", copied) == 0


def test_inspect_of_no_pixels(capsys):
    assert command("inspect", "resnet20", "--image-size", -3) == 2
    assert "--image-size -3: at least 1" in said(capsys)


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:mobilenetv3_small_050"])
def test_a_net_of_a_zoo_is_finetuned_without_some_layers(name, tmp_path):
    """Writes in place, by the net's own code, spoil no gradient where a layer went."""
    config = run.Config.of(
        model=name, data="digits", image_size=32, limit=16, batch_size=8, macs=0.8
    )
    current = Run(run.RunFolder(tmp_path), lambda text: None, config=config, trust_source=True)
    gated = resconv.convert(
        current.create().eval(), current.example(2), units="layers", start="identity"
    )
    gone = tuple(list(resconv.gates(gated))[:4])
    with torch.no_grad():
        for unit in gone:
            resconv.gates(gated)[unit].scale.zero_()
            resconv.gates(gated)[unit].control.fill_(1.0)
    model = resconv.prune(gated, resconv.Plan(gone), fuse=False)
    before = {k: v.clone() for k, v in model.named_parameters()}
    recipe = current.recipe(1, 0.01)
    fit(model.train(), current.data, recipe, tmp_path / "logs", progress=False)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    # Two steps may leave a gate's scalar where it is, but no kernel or norm.
    still = [k for k, v in model.named_parameters() if v.ndim and torch.equal(v, before[k])]
    assert still == []
