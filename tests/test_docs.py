"""What the docs show runs: every public example, every Python block and command line of the pages.

The examples of docstrings know ``torch``, ``nn``, ``resconv``, a small ``net`` and its ``images``.
"""

import doctest
import importlib
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import resconv
from resconv import recovery
from resconv.cli.app import app
from resconv.run import Config

ROOT = Path(__file__).parents[1]
PUBLIC = {f"resconv.{n}": getattr(resconv, n) for n in resconv.__all__ if n != "__version__"}
PUBLIC |= {f"resconv.recovery.{n}": getattr(recovery, n) for n in recovery.__all__}


@pytest.fixture
def known(tmp_path, monkeypatch):
    """The names that examples may use, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layers = [
        m for _ in range(3) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    ]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    return {
        "torch": torch,
        "nn": nn,
        "resconv": resconv,
        "net": net,
        "images": torch.randn(2, 4, 6, 6),
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_that_runs(name, known):
    """A docstring's example prints what it says."""
    text = PUBLIC[name].__doc__
    test = doctest.DocTestParser().get_doctest(text, known, name, None, 0)
    assert test.examples, f"{name} has no example"
    told = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not runner.run(test, out=told.append).failed, "".join(told)


def test_an_example_that_says_something_else_fails(known):
    wrong = doctest.DocTestParser().get_doctest(">>> len(images)\n3\n", known, "wrong", None, 0)
    assert doctest.DocTestRunner().run(wrong, out=lambda text: None).failed == 1


def blocks(page, language):
    every = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", (ROOT / page).read_text(), re.M | re.S)
    found = [textwrap.dedent(code) for _, kind, code in every if kind == language]
    assert found, page
    return found


def test_the_readme_runs_word_for_word(known):
    pytest.importorskip("onnxruntime")
    scope = {}
    for code in blocks("README.md", "python"):
        exec(compile(code, "README.md", "exec"), scope)
    assert Path("compact.onnx").is_file()
    assert resconv.load("compact")(scope["images"]).shape == (8, 10)
    assert scope["sparsifier"].outcome().met


def test_the_page_on_several_processes_runs_word_for_word(known, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    scope = known | {"device": "cpu", "steps": 100}
    try:
        for code in blocks("docs/distributed.md", "python"):
            exec(compile(code, "docs/distributed.md", "exec"), scope)
        assert scope["sparsifier"].outcome().total_steps == 100
    finally:
        torch.distributed.destroy_process_group()


def test_the_first_steps_print_what_they_say(capsys, known):
    """On a net as ``resconv compress`` leaves it there."""
    x = torch.randn(1, 1, 8, 8)
    net = resconv.nets.create("resnet20", in_channels=1).eval()
    model = resconv.convert(net, x, start="identity")
    resconv.save(resconv.prune(model, resconv.Plan(("layer1.0",))), "runs/demo")
    (code,) = blocks("docs/first-steps.md", "python")
    exec(compile(code, "docs/first-steps.md", "exec"), {})
    assert capsys.readouterr().out in blocks("docs/first-steps.md", "text")


def commands(page):
    """Return every line of the page's shell blocks that calls the command line."""
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(.* -m )?resconv ", line):
                words = shlex.split(line, comments=True)
                yield words[words.index("resconv") + 1 :]


@pytest.mark.parametrize("page", ["docs/faq.md", "docs/latency.md"])
def test_pages_of_small_examples_run_word_for_word(page, known):
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), dict(known))


def test_the_tutorial_can_be_followed(known):
    """Its commands in order, on fewer of its images and for fewer epochs, and its Python."""
    less = (
        "--limit 30 --batch-size 6 --image-size 8 --epochs 1 --sparse-epochs 4 --finetune-epochs 0"
    )
    draws, loads = blocks("docs/tutorial.md", "python")
    exec(compile(draws, "docs/tutorial.md", "exec"), {})
    for words in commands("docs/tutorial.md"):
        if words[0] == "compress" and "--config" in words:
            shutil.copytree("runs/half", words[-1])  # as long as the first one
            continue
        given = [*words, *shlex.split(less)] if words[0] == "compress" else words
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, (words, done.output, done.exception)
        assert Path("runs/half").exists() is (
            words[0] not in ("doctor", "inspect") and "--dry-run" not in words
        )
    exec(compile(loads, "docs/tutorial.md", "exec"), {})
    for name in ("app.onnx", "compared.html", "runs/half/report.html", "runs/half/README.md"):
        assert Path(name).is_file(), name


PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "tutorial",
            "first-steps",
            "distributed",
            "pretrained",
            "latency",
            "command-line",
        )
    ),
)


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_are_understood(page, known):
    Path("runs/half").mkdir(parents=True)
    config = Config.of(model="resnet20", data="folder:photos", macs=0.5)
    Path("runs/half/config.json").write_text(json.dumps(config.content()))
    group = typer.main.get_command(app)
    lines = list(commands(page))
    assert lines
    for words in lines:
        with group.make_context("resconv", list(words)) as root:
            name, command, rest = group.resolve_command(root, list(words))
            command.make_context(name, rest, parent=root)
    with pytest.raises(Exception, match="No such option"):
        group.commands["compress"].make_context("compress", ["--no-such-option"])


def test_no_page_names_what_is_not_there():
    """Every ``resconv.name`` on a page and in a message exists."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py")]
    said = {
        m
        for p in pages
        for m in re.findall(r"(?<![.\w/-])resconv\.([a-z_]+(?:\.\w+)*)\b", p.read_text())
    }
    said.discard("json")  # a file's name, resconv.json
    missing = []
    for path in sorted(said):
        parts = path.split(".")
        try:
            owner = resconv
            for i, part in enumerate(parts):
                if not hasattr(owner, part):
                    importlib.import_module(".".join(("resconv", *parts[: i + 1])))
                owner = getattr(owner, part)
        except resconv.errors.MissingExtraError:
            continue  # it is there, and needs a package that is not
        except (ImportError, AttributeError):
            missing.append(path)
    assert missing == []
