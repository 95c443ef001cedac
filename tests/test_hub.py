"""Saved nets on the Hugging Face hub, with a folder in the place of the hub."""

import fnmatch
import shutil

import huggingface_hub
import pytest
import torch

import resconv
from resconv.cli.app import app, run_app
from resconv.errors import LoadError, SaveError
from resconv.run.report.card import TO_FILL_IN
from resconv.storage import hub


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """Let the hub be a folder: repositories below it, and what was said about them."""
    place = tmp_path / "remote"

    class Api:
        def create_repo(self, name, private, exist_ok):
            (place / name).mkdir(parents=True, exist_ok=exist_ok)
            (place / name / ".private").write_text(str(private))

        def upload_folder(self, repo_id, folder_path, allow_patterns, revision, commit_message):
            for path in folder_path.iterdir():
                if any(fnmatch.fnmatch(path.name, p) for p in allow_patterns):
                    shutil.copy(path, place / repo_id / path.name)

    def download(name, revision, allow_patterns):
        if not (place / name).is_dir():
            raise OSError(f"404: no repository {name}\nwith details")
        return str(place / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return place


@pytest.fixture
def saved(tmp_path):
    net = resconv.nets.create("resnet20", num_classes=4).eval()
    folder = resconv.save(net, tmp_path / "run", example_inputs=torch.zeros(1, 3, 8, 8))
    (folder / "README.md").write_text(f"---\n{TO_FILL_IN}\n---\n")
    for name in ("config.json", "report.html", "dense.safetensors", "model.onnx"):
        (folder / name).write_text("x")
    return net, folder


def test_what_was_pushed_loads_and_nothing_of_the_users_machine_goes_along(remote, saved):
    net, folder = saved
    assert hub.push(folder, "me/small", private=True) == "hf://me/small"
    pushed = {p.name for p in (remote / "me/small").iterdir()} - {".private"}
    assert pushed == {"model.json", "model.safetensors", "README.md", "model.onnx"}
    assert (remote / "me/small/.private").read_text() == "True"
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(resconv.load("hf://me/small")(x), net(x))
    # Negative control: what comes from there is checked like any other file.
    weights = remote / "me/small/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(LoadError):
        resconv.load("hf://me/small")


@pytest.mark.parametrize("place", ["small", "me/", "me/small/more", "../me/small", "me/s mall", ""])
def test_what_is_no_place_is_refused_before_the_hub_is_asked(place, saved, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    with pytest.raises(LoadError, match="no place on the hub"):
        hub.push(saved[1], place)


def test_a_hub_that_says_no_is_said_in_words(remote, saved, tmp_path, monkeypatch):
    with pytest.raises(LoadError, match=r"404: no repository me/none\)\. Without a network"):
        resconv.load("hf://me/none@main")

    def refuse(self, *args, **kwargs):
        raise OSError("401 Client Error\nRequest ID: 1")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(SaveError, match=r"401 Client Error\)\. Log in"):
        hub.push(saved[1], "me/small")
    with pytest.raises(LoadError):
        hub.push(tmp_path, "me/small")  # no saved net


def test_the_command_says_how_it_is_loaded_and_that_a_licence_is_missing(
    remote, saved, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["resconv", "push", str(saved[1]), "me/small"])
    assert run_app(app) == 0
    said = capsys.readouterr().out
    assert "resconv.load('hf://me/small') loads it" in said
    assert "licence is not filled in" in said
    (saved[1] / "README.md").write_text("---\nlicense: mit\n---\n")
    assert run_app(app) == 0
    assert "licence" not in capsys.readouterr().out
