"""Code that is not resconv's runs only with the user's word, in every command."""

import json
import sys
import textwrap

import pytest
import torch
from typer.testing import CliRunner

import resconv
from resconv import data as datasets
from resconv import nets
from resconv.cli.app import app
from resconv.errors import TrustError
from resconv.run import Config, RunFolder, begin, open_run, stages
from resconv.run.fingerprint import fingerprint
from resconv.run.mark import Record
from resconv.storage.comparison import compare

FACTORY = """
    import os
    os.makedirs("canary", exist_ok=True)

    def build(num_classes=10):
        from torch import nn
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, num_classes),
        )
"""


def invoke(*args):
    return CliRunner().invoke(app, list(map(str, args)), catch_exceptions=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder: a run that someone else made, with the code that its settings name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"factory_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(FACTORY))
    yield tmp_path, f"{name}:build"
    sys.modules.pop(name, None)


@pytest.fixture
def foreign_run(place):
    folder, source = place
    config = Config.of(model=source, data="digits", macs=0.5)
    run = RunFolder.begin(folder / "run", config)
    found = fingerprint(datasets.load("digits"))
    for stage in ("dense", "sparse", "plan", "prune", "finetune", "export", "measure"):
        names = stages.WRITES[stage]
        run.claim(names)
        for name in names:
            (run / name).write_text(f"of {stage}")
        run.finish(stage, Record(config.bearing(), found, {}, run.digests(names), []))
    return run.path


@pytest.mark.parametrize("command", ["export", "prune", "measure"])
def test_a_run_of_someone_else_runs_no_code_of_its_own(foreign_run, command, monkeypatch):
    canary = foreign_run.parent / "canary"
    before = {p.name: p.read_bytes() for p in foreign_run.iterdir() if p.is_file()}
    refused = invoke(command, foreign_run)
    assert isinstance(refused.exception, TrustError), refused.exception
    assert "--trust-source" in str(refused.exception)
    assert "code that is in neither resconv, timm nor torchvision" in str(refused.exception)
    assert not canary.exists()
    assert before == {p.name: p.read_bytes() for p in foreign_run.iterdir() if p.is_file()}
    invoke(command, foreign_run, "--trust-source")  # control: what follows fails, but the code ran
    assert canary.exists()


def test_the_users_own_command_line_is_his_word(place):
    folder, source = place
    run = begin(
        folder / "mine", Config.of(model=source, data="digits", macs=0.5), say=lambda text: None
    )
    assert run.create()[8].out_features == 10
    with pytest.raises(TrustError):
        open_run(folder / "mine").create()


@pytest.fixture
def own_net(place):
    """A pruned net of the user's own package, saved, and as ONNX."""
    folder, source = place
    x = torch.randn(2, 1, 8, 8)
    gated = resconv.convert(nets.create(source).eval(), x)
    unit = next(iter(resconv.gates(gated)))
    with torch.no_grad():
        resconv.gates(gated)[unit].control.fill_(1.0)
    compact = resconv.prune(gated, resconv.Plan((unit,)))
    resconv.save(compact, folder / "net", example_inputs=x)
    for name in ("net/model.onnx", "net.pt2"):
        resconv.export(compact, folder / name, x)
    return folder


def test_ones_own_net_is_compared_with_its_file_by_the_option_in_the_message(own_net):
    pair = (own_net / "net", own_net / "net" / "model.onnx")
    refused = invoke("verify", *pair)
    assert isinstance(refused.exception, TrustError)
    assert "--trust-source" in str(refused.exception)
    done = invoke("verify", *pair, "--trust-source")
    assert done.exit_code == 0, done.exception
    assert "agree" in done.output


def test_a_pt2_is_a_pickle_and_is_opened_on_the_users_word_alone(own_net):
    pair = (own_net / "net" / "model.onnx", own_net / "net.pt2")
    with pytest.raises(TrustError, match=r"net\.pt2: .*pickled objects"):
        compare(*pair)
    refused = invoke("verify", *pair)
    assert "--trust-source" in str(refused.exception)
    assert compare(*pair, trust_source=True).max_rel_error < 1e-4
    assert invoke("verify", *pair, "--trust-source").exit_code == 0
    assert compare(pair[0], pair[0])  # control: ONNX needs no word


def test_a_saved_net_is_loaded_with_trust_or_with_the_net(own_net):
    with pytest.raises(TrustError):
        resconv.load(own_net / "net")
    x = torch.randn(1, 1, 8, 8)
    source = json.loads((own_net / "net" / "model.json").read_text())["source"]
    given = nets.create(source["name"], **source["kwargs"])
    trusted = resconv.load(own_net / "net", trust_source=True)
    assert torch.equal(trusted(x), resconv.load(own_net / "net", model=given)(x))


def test_a_source_of_the_zoos_needs_no_word(tmp_path):
    net = nets.create("resnet20").eval()
    resconv.save(net, tmp_path / "net")
    assert torch.equal(resconv.load(tmp_path / "net").fc.weight, net.fc.weight)
