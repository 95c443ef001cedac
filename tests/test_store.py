"""Saved networks come back the same, and changed files are refused."""

import json
import shutil

import pytest
import torch
from torch import nn

import resconv
from resconv import nets

from .helpers import randomise, randomise_gates, some_plan


@pytest.fixture
def saved(images, tmp_path):
    gated = randomise_gates(
        resconv.convert(randomise(nets.create("resnet20").double()), images, units="all")
    )
    plan = some_plan(gated, 4)
    compact = resconv.prune(gated, plan)
    folder = resconv.save(compact, tmp_path / "net", plan=plan, example_inputs=images)
    return compact, folder


def test_save_and_load_keep_outputs(saved, images):
    compact, folder = saved
    loaded = resconv.load(folder)
    assert torch.equal(loaded(images), compact(images))
    assert not loaded.training
    # Negative control: the source alone, without the edits, is another net.
    assert not torch.equal(nets.create("resnet20").double().eval()(images), compact(images))


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "timm:regnetx_002"])
def test_zoo_nets_survive(name, tmp_path):
    x = torch.randn(2, 3, 64, 64)
    gated = randomise_gates(resconv.convert(randomise(nets.create(name)), x, units="all"))
    compact = resconv.prune(gated, some_plan(gated, 1))
    resconv.save(compact, tmp_path)
    torch.testing.assert_close(resconv.load(tmp_path)(x), compact(x))


def test_a_net_without_a_source_needs_its_model(images, tmp_path):
    model = (
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)).double().eval()
    )
    gated = randomise_gates(resconv.convert(model, images))
    compact = resconv.prune(gated, resconv.Plan(["0"]))
    resconv.save(compact, tmp_path)
    with pytest.raises(resconv.ResConvError, match="does not say which network"):
        resconv.load(tmp_path)
    assert torch.equal(resconv.load(tmp_path, model=model)(images), compact(images))


def edit_header(folder, change):
    file = folder / "model.json"
    header = json.loads(file.read_text())
    change(header)
    file.write_text(json.dumps(header))


def test_changed_and_truncated_weights_are_refused(saved):
    _, folder = saved
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    with pytest.raises(resconv.ResConvError, match="truncated"):
        resconv.load(folder)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(resconv.ResConvError, match="changed after it was saved"):
        resconv.load(folder)
    weights.unlink()
    with pytest.raises(resconv.ResConvError, match="missing"):
        resconv.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format_version=99), "format version 99"),
        (lambda h: h.pop("edits"), "'edits' is missing"),
        (lambda h: h.update(edits={}), "'edits' is a dict"),
        (lambda h: h.update(source={"name": "os:system", "kwargs": {}}), "trust"),
        (
            lambda h: h.update(source={"name": "resnet20", "kwargs": {"num_classes": 10**9}}),
            "unbelievable",
        ),
        (lambda h: h.update(source={"name": "resnet32", "kwargs": {}}), "does not fit"),
        (lambda h: h["edits"].append({"op": "run", "path": "x"}), "Not an edit"),
        (lambda h: h["edits"].append({"op": "identity", "path": "nowhere"}), "nowhere"),
        (
            lambda h: h["edits"].append(
                {
                    "op": "conv",
                    "path": "conv1",
                    "type": "Conv2d",
                    "args": {"in_channels": 10**6, "out_channels": 10**6, "kernel_size": [3, 3]},
                }
            ),
            "do not fill",
        ),
        (lambda h: h.update(dtype="nonsense"), "no torch dtype"),
        (lambda h: h.update(plan={"remove": 3}), "list of unit names"),
    ],
)
def test_hostile_headers_are_refused(saved, change, message):
    _, folder = saved
    edit_header(folder, change)
    with pytest.raises(resconv.ResConvError, match=message):
        resconv.load(folder)


def test_not_json_and_no_folder(saved, tmp_path):
    _, folder = saved
    (folder / "model.json").write_text("[" * 100_000)
    with pytest.raises(resconv.ResConvError, match="not JSON"):
        resconv.load(folder)
    with pytest.raises(resconv.ResConvError, match="no such folder"):
        resconv.load(tmp_path / "nothing")


def test_gated_nets_are_not_saved(images, tmp_path):
    gated = resconv.convert(nets.create("resnet20").double().eval(), images)
    with pytest.raises(resconv.ResConvError, match="gates left"):
        resconv.save(gated, tmp_path)


def test_nothing_is_unpickled(saved, monkeypatch):
    import pickle

    _, folder = saved
    shutil.copytree(folder, folder.parent / "copy")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    resconv.load(folder.parent / "copy")
