"""What every command offers: short help, JSON, silence, settings from a file, and a rehearsal."""

import json
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from resconv.cli.app import app
from resconv.cli.settings import takes_config
from resconv.run import Config, RunFolder
from resconv.train import progress
from resconv.train.progress import RunProgress, in_words

COMMANDS = tuple(typer.main.get_command(app).commands)
NAME = f"{__name__}:Tiny"
SMALL = ["--model", NAME, "--data", "digits", "--limit", 64, "--batch-size", 8, "--epochs", 1]
SMALL += ["--sparse-epochs", 4, "--finetune-epochs", 0, "--macs", 0.6, "--seed", 3]


class Tiny(nn.Module):
    """Two residual branches on grey images."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)) for _ in range(2)
        )
        self.head = nn.Linear(6, num_classes)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for branch in self.branches:
            x = torch.relu(x + branch(x))
        return self.head(x.mean((2, 3)))


def invoke(*args):
    return CliRunner().invoke(app, list(map(str, args)), catch_exceptions=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_short_help_is_the_long_one(command):
    short, long = invoke(command, "-h"), invoke(command, "--help")
    assert short.exit_code == long.exit_code == 0
    assert short.output == long.output
    assert "Usage" in short.output


def test_the_help_documents_the_exit_status():
    said = " ".join(invoke("-h").output.split())
    for status in ("0 done", "1 an unforeseen", "2 a mistake", "130 or 143"):
        assert status in said


# --- settings from a file ---------------------------------------------------------------------


@pytest.fixture
def made():
    """A command that takes settings, and what it made of them."""
    application, found = typer.Typer(), []

    @application.command()
    @takes_config
    def command(config: Config) -> None:
        found.append(config)

    return lambda *args: CliRunner().invoke(application, list(map(str, args))), found


@pytest.mark.parametrize(
    "values",
    [
        {"macs": 0.25, "mean": (0.5, 0.25, 1 / 3), "std": (1.0, 2.0, 3.0), "distill": True},
        {"num_params": 40_000, "epochs": 0, "pretrained": False, "mirror": False},
        {"latency": 0.5, "runtime": "onnxruntime", "latency_batch": 4, "precision": "32-true"},
    ],
)
def test_a_runs_own_config_is_read_and_options_win(values, made, tmp_path):
    command, found = made
    config = Config.of(model="timm:resnet18", data="folder:my photos", **values)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.content()))
    assert command("--config", path).exit_code == 0
    assert found.pop() == config
    done = command("--seed", 9, "--config", path, "--data", "digits")
    assert done.exit_code == 0, done.output
    assert found.pop() == Config.of(model="timm:resnet18", data="digits", seed=9, **values)
    # Without the file, what it held is asked for.
    assert "Missing option" in command("--seed", 9).output


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "config.json"), ('{"net": {"model": 3}, "data": {"source": "digits"}}', "net.model")],
)
def test_a_damaged_config_is_refused_by_name(content, words, made, tmp_path):
    command, found = made
    path = tmp_path / "config.json"
    path.write_text(content)
    assert words in str(command("--config", path).exception)
    assert found == []


# --- a rehearsal, JSON, silence ---------------------------------------------------------------


def test_a_rehearsal_checks_and_makes_nothing(tmp_path):
    out = tmp_path / "run"
    done = invoke("compress", *SMALL, "--out", out, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["epochs"] == {"dense": 1, "sparse": 4, "finetune": 0}
    assert (found["train_images"], found["classes"], found["image"]) == (64, 10, [1, 8, 8])
    assert found["stages"][:3] == ["dense", "sparse", "plan"]
    assert not out.exists()
    # What a run would refuse is refused here.
    refused = invoke("compress", *SMALL, "--sparse-epochs", 1, "--out", out, "--dry-run")
    assert refused.exit_code != 0
    assert "optimizer steps" in str(refused.exception)
    assert not out.exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "x"
    return out, invoke("compress", *SMALL, "--out", out, "--json")


def test_json_is_all_that_stdout_has(finished):
    out, done = finished
    assert done.exit_code == 0, done.output
    printed, kept = json.loads(done.stdout), json.loads((out / "metrics.json").read_text())
    assert printed["top1_compact"] == kept["top1_compact"]
    assert printed["macs_compact"] == kept["macs_compact"]
    # Nothing is drawn where nobody looks: an epoch is a line, counted from 1.
    assert "sparse 4/4, top-1" in done.stderr
    assert not set("━╸\x1b") & set(done.stderr)


def test_quiet_says_nothing(finished):
    out, _ = finished
    done = invoke("measure", out, "--quiet", "--trust-source")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    loud = invoke("measure", out, "--trust-source")
    assert "latency" in loud.stdout
    assert not set("┃│━") & set(loud.stdout)  # a table's lines are drawn in a terminal alone


def test_the_card_says_how_the_net_is_used(finished, monkeypatch, tmp_path):
    """The hub's own reader takes its metadata, and its code runs in the folder."""
    from PIL import Image

    from resconv.run.report.card import TO_FILL_IN, write_card

    out, _ = finished
    cards = pytest.importorskip("huggingface_hub").ModelCard
    card, metrics = cards.load(out / "README.md"), RunFolder(out).metrics()
    assert card.data.library_name == "resconv"
    assert card.data.license == "unknown"
    (result,) = card.data.eval_results
    assert result.metric_value == round(metrics.top1_compact / 100, 4)
    Image.new("L", (9, 8), 200).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(out)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    scope = {}
    code = code.replace('"photo.jpg"', repr(str(tmp_path / "photo.jpg")))
    code = code.replace('"."', '".", trust_source=True')  # this net is built by the user's own code
    exec(compile(code, "README.md", "exec"), scope)
    assert len(scope["found"]) == 1
    # What the user filled in stays; else it is written anew.
    copied = tmp_path / "README.md"
    copied.write_text((out / "README.md").read_text().replace(TO_FILL_IN, "license: mit"))
    config = RunFolder(out).config()
    assert write_card(copied, config, metrics) is False
    assert "license: mit" in copied.read_text()
    assert write_card(out / "README.md", config, metrics) is True


def test_verify_answers_in_json(finished):
    out, _ = finished
    done = invoke("verify", out / "model.onnx", out / "model.onnx", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["max_abs_error"] == 0


def test_the_doctor_knows_what_is_here(monkeypatch):
    from resconv.cli import doctor

    found = json.loads(invoke("doctor", "--json").stdout)
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert found["extras"]["train"] == []
    assert found["machine"]["GPUs"]
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "timm" else known(name))
    assert doctor._missing("train") == ["timm"]


# --- how far it is ----------------------------------------------------------------------------


def trainer_at(epoch, batches=0, **figures):
    current = SimpleNamespace(completed=batches)
    loop = SimpleNamespace(batch_progress=SimpleNamespace(current=current))
    return SimpleNamespace(
        current_epoch=epoch,
        max_epochs=12,
        num_training_batches=10,
        is_global_zero=True,
        callback_metrics={k: torch.tensor(v) for k, v in figures.items()},
        fit_loop=SimpleNamespace(epoch_loop=loop),
    )


def test_a_line_an_epoch_with_the_time_of_the_whole_run(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = RunProgress("sparse", before=5, total=20, say=said.append)
    shown.on_train_start(trainer_at(0), None)
    now[0] += 30
    shown.on_train_epoch_end(trainer_at(0, 10, top1=0.5, macs=0.875), None)
    assert said == ["sparse 1/12, top-1 50.0 %, MACs 87.5 %, about 7 min left"]  # 14 x 30 s
    shown.on_train_epoch_end(trainer_at(11, 10, top1=0.75), None)
    assert said[-1].startswith("sparse 12/12, top-1 75.0 %")
    # A run that went on counts from where it was.
    again = RunProgress("sparse", before=5, total=20, say=said.append)
    again.on_train_start(trainer_at(10), None)
    now[0] += 10
    again.on_train_epoch_end(trainer_at(10, 10), None)
    assert said[-1] == "sparse 11/12, about 40 s left"


def test_in_a_terminal_there_is_one_bar_for_all_trainings(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "_is_terminal", lambda: True)
    shown = RunProgress("sparse", before=5, total=20, say=said.append)
    shown.on_train_start(trainer_at(2), None)
    bar = shown._bar
    shown.on_train_batch_end(trainer_at(2, 5))
    (task,) = bar.tasks
    assert (task.total, task.completed, task.description) == (20, 7.5, "sparse 3/12")
    shown.on_train_epoch_end(trainer_at(2, 10, top1=0.5), None)
    shown.on_exception(trainer_at(2, 10), None, KeyboardInterrupt())
    assert not bar.live.is_started
    assert said == []


def test_other_processes_and_a_quiet_run_say_nothing():
    said = []
    for say, leads in ((None, True), (said.append, False)):
        trainer = trainer_at(0, 10, top1=0.5)
        trainer.is_global_zero = leads
        shown = RunProgress("dense", 0, 12, say)
        shown.on_train_start(trainer, None)
        shown.on_train_epoch_end(trainer, None)
        shown.on_train_end(trainer, None)
    assert said == []
    # Processes of their own get it through a pipe.
    copied = pickle.loads(pickle.dumps(RunProgress("dense", 0, 12, lambda text: None)))
    assert copied.say is print


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59, "59 s"), (89, "1 min"), (3600, "1 h 0 min")]
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words
