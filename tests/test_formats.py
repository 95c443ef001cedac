"""Files that earlier versions wrote still load, and nets compute what they did then."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import resconv
from resconv.run import RunFolder
from resconv.run.report.table import rows
from resconv.run.stages import READS
from resconv.storage.schema import FORMAT_VERSION, seal
from resconv.surgery.provenance import provenance_of

RUN_FILES = ("run/metrics.json", "run/scales.json", "run/resconv-run.json")
FIXTURES = Path(__file__).parent / "fixtures"


class Branches(nn.Module):
    """Two branches in one forward, which is rewritten when one of them goes."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x):
        x = x + self.a(x)
        return F.relu(x + self.b(x))


class Writes(nn.Module):
    """An activation in place behind a conv, beside a shortcut that is read later."""

    def __init__(self, act):
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1), act
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.act(self.conv(x)) if self.act is not None else self.conv(x).mul_(2)
        return self.last(y) * x.abs().mean()


class Kinds(nn.Module):
    """A small net whose pruning needs edits of every kind."""

    gone = ("single", "inplace.conv", "cloned.conv", "two/a.1", "left", "row.1")

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.row = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)))
        self.single = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inplace = Writes(nn.Hardswish(inplace=True))
        self.cloned = Writes(None)
        self.two = Branches()
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.single(self.row(self.stem(x))))
        x = self.two(self.cloned(self.inplace(torch.tanh(x))))
        x = F.silu(self.left(F.silu(x)))  # nothing between two SiLUs absorbs a factor
        x = F.silu(x + self.branch(x))
        return self.fc(x.mean((2, 3)))


def example():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


VERSIONS = range(2, FORMAT_VERSION + 1)
LATER = range(3, FORMAT_VERSION + 1)  # which have nets in training form, and all that is no net


def load(version, name, **kwargs):
    folder = FIXTURES / f"format{version}" / name
    expected = load_file(f"{folder}.safetensors")
    return resconv.load(folder, **kwargs), expected["x"], expected["y"]


def kinds_of_edits(version, name):
    header = json.loads((FIXTURES / f"format{version}" / name / "model.json").read_text())
    assert header["format_version"] == version
    return {edit["op"] for edit in header["edits"]}


def require_same(net, x, y):
    with torch.no_grad():
        torch.testing.assert_close(net.double()(x), y, rtol=1e-9, atol=1e-9)
        # Negative control: another input gives other outputs.
        assert not torch.allclose(net(x + 0.1), y, rtol=1e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_compact_net_of_every_format_loads(version):
    net, x, y = load(version, "kinds", model=Kinds)
    assert all(p.requires_grad for p in net.parameters())
    require_same(net, x, y)
    known = provenance_of(net)
    assert not known.training_form
    assert known.plan.remove == Kinds.gone
    assert known.inputs.make().shape == (2, 3, 8, 8)
    assert (known.preprocessing, known.class_names) == (None, None)


def test_a_net_of_format_2_with_a_source_loads():
    net, x, y = load(2, "resnet20")
    require_same(net, x, y)


@pytest.mark.parametrize("version", LATER)
@pytest.mark.parametrize("name", ["gated", "open"])
def test_a_training_form_of_every_format_loads(version, name, tmp_path):
    net, x, y = load(version, name, model=Kinds)
    require_same(net, x, y)
    names = list(resconv.gates(net))
    assert ("single" in names) is (name == "gated")
    # It is pruned and fused as the net that was saved, and written in the present format.
    back = resconv.load(resconv.save(net, tmp_path / "again"), model=lambda: Kinds().double())
    require_same(resconv.fuse(back), x, y)
    header = json.loads((tmp_path / "again" / "model.json").read_text())
    assert header["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("version", VERSIONS)
def test_the_saved_networks_hold_edits_of_every_kind(version):
    names = ["kinds", "resnet20"] if version == 2 else ["kinds"]
    assert set().union(*(kinds_of_edits(version, n) for n in names)) == {
        *("conv", "identity", "drop", "clone", "outplace"),
        *("children", "bypass", "multiply", "append"),
    }


@pytest.mark.parametrize("version", LATER)
def test_a_plan_and_a_table_of_every_format_load(version):
    plan = resconv.Plan.load(FIXTURES / f"format{version}" / "plan.json")
    expected = resconv.Plan(Kinds.gone, 9_000, 3_000, 900, 600, {"single": 0.0, "row.0": 0.5})
    assert plan == expected
    table = resconv.LatencyTable.load(FIXTURES / f"format{version}" / "latency.json")
    assert table.unit_ms == {"a": 0.5, "b": 0.3}
    assert table.check_of(["b", "a"]).predicted_ms == 1.2


@pytest.mark.parametrize("version", LATER)
def test_the_files_of_a_run_of_every_format_load(version, tmp_path):
    """Also when the run goes on: what was read is written again and reads the same."""
    shutil.copytree(FIXTURES / f"format{version}" / "run", tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    assert folder.config().stage_epochs() == (1, 3, 1)
    assert folder.done() == [s for s in READS if s != "control"]
    assert folder.mark().stages["sparse"].wrote.keys() == {"gated.safetensors", "scales.json"}
    metrics, history = folder.metrics(), folder.history()
    assert metrics.epochs_sparse == 3
    assert metrics.verify.max_rel_error < metrics.verify.tolerance
    assert metrics.latency["torch"].ratio > 0
    assert rows(metrics)
    assert [s.step for s in history.steps][-1] == 24
    assert history.steps[0].scales.keys() >= {"layer1.0"}
    folder.add_metrics(date="today")
    folder.write_history(history)
    assert folder.history() == history
    assert folder.metrics() == replace(metrics, date="today")


def newer(content, key="version"):
    return {**content, key: content.get(key, 1) + 1}


@pytest.mark.parametrize("name", ["plan.json", "latency.json", *RUN_FILES])
def test_a_newer_file_is_refused_with_words(name, tmp_path):
    shutil.copytree(FIXTURES / f"format{FORMAT_VERSION}", tmp_path / "all")
    file = tmp_path / "all" / name
    read = {
        "plan.json": resconv.Plan.load,
        "latency.json": resconv.LatencyTable.load,
        "run/metrics.json": lambda f: RunFolder.open(f.parent).metrics(),
        "run/scales.json": lambda f: RunFolder.open(f.parent).history(),
        "run/resconv-run.json": lambda f: RunFolder.open(f.parent).mark(),
    }[name]
    read(file)
    file.write_text(json.dumps(newer(json.loads(file.read_text()))))
    with pytest.raises(resconv.ResConvError, match=r"has version \d; this resconv reads up to \d"):
        read(file)


def test_a_newer_net_is_refused_with_words(tmp_path):
    shutil.copytree(FIXTURES / f"format{FORMAT_VERSION}" / "kinds", tmp_path / "net")
    file = tmp_path / "net" / "model.json"
    file.write_text(json.dumps(seal(newer(json.loads(file.read_text()), "format_version"))))
    with pytest.raises(resconv.ResConvError, match=r"format version 5; .*reads up to 4.*pip inst"):
        resconv.load(tmp_path / "net", model=Kinds)
