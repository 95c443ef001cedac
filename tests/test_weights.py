"""Weights as training code leaves them are loaded; what cannot be right changes nothing."""

import io
import os
import pickle
import re
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from resconv import nets
from resconv.errors import ModelError


@pytest.fixture
def net():
    return nets.create("resnet20", num_classes=4)


@pytest.fixture
def trained():
    torch.manual_seed(5)
    return nets.create("resnet20", num_classes=4).state_dict()


def named(state, prefix):
    return {prefix + name: value for name, value in state.items()}


PREFIXES = ["module.", "model.", "_orig_mod.", "net.", "model._orig_mod.", "module.module."]
KEYS = ["state_dict", "model_state_dict", "model", "net", "ema", "state_dict_ema", "model_ema"]


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
@pytest.mark.parametrize("key", [None, *KEYS])
def test_a_state_dict_is_found_and_its_names_are_the_nets(net, trained, prefix, key, tmp_path):
    state = named(trained, prefix)
    content = state if key is None else {"epoch": 3, key: state, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "net.ckpt")
    assert not torch.equal(net.state_dict()["fc.weight"], trained["fc.weight"])
    nets.load_weights(net, tmp_path / "net.ckpt")
    assert all(torch.equal(v, trained[k]) for k, v in net.state_dict().items())


def test_what_a_training_module_holds_beside_its_net_is_left(net, trained, tmp_path):
    """A Lightning module with a loss and metrics of its own; torch's AveragedModel with a counter."""
    beside = {"loss.weight": torch.ones(4), "n_averaged": torch.tensor(3)}
    torch.save({"state_dict": named(trained, "model.") | beside}, tmp_path / "last.ckpt")
    nets.load_weights(net, tmp_path / "last.ckpt")
    assert torch.equal(net.state_dict()["fc.weight"], trained["fc.weight"])
    torch.save(trained | beside, tmp_path / "bare.pt")  # no prefix says which names are the net's
    with pytest.raises(ModelError, match=r"2 unexpected \(loss.weight, n_averaged\)"):
        nets.load_weights(net, tmp_path / "bare.pt")


def test_a_net_whose_own_names_begin_like_a_wrapper_keeps_them(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)

    source, target = Wrapped(), Wrapped()
    for state in (source.state_dict(), named(source.state_dict(), "module.")):
        torch.save(state, tmp_path / "net.pt")
        nets.load_weights(target, tmp_path / "net.pt")
        assert torch.equal(target.model.weight, source.model.weight)


def test_half_precision_is_converted(net, trained, tmp_path):
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in trained.items()},
        tmp_path / "net.safetensors",
    )
    nets.load_weights(net, tmp_path / "net.safetensors")
    assert net.fc.weight.dtype == torch.float32
    assert torch.equal(net.fc.weight, trained["fc.weight"].half().float())


WRONG = {
    "int8": lambda t: t.to(torch.int8),
    "bool": lambda t: t > 0,
    "complex64": lambda t: t.to(torch.complex64),
    "float8_e4m3fn": lambda t: t.to(torch.float8_e4m3fn),
    "NaN": lambda t: t * float("nan"),
    "infinite": lambda t: t / 0,
    "sparse_coo": lambda t: t.to_sparse(),
    "no plain tensor": lambda t: t.to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "without values": lambda t: t.to("meta"),
    "1e+300, more than torch.float32": lambda t: t.double() * 0 + 1e300,
    "of another shape": lambda t: t[:-1],
    "missing": lambda t: None,
}


@pytest.mark.parametrize("message", WRONG)
def test_a_net_that_is_refused_its_weights_is_as_it_was(net, trained, message, tmp_path):
    """The last tensor is wrong: those before it are not copied either."""
    last = "fc.weight"
    wrong = WRONG[message](trained[last])
    state = {k: v for k, v in trained.items() if k != last} | (
        {} if wrong is None else {last: wrong}
    )
    torch.save(state, tmp_path / "net.pt")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ModelError, match=re.escape(message)) as error:
        nets.load_weights(net, tmp_path / "net.pt")
    assert last in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    torch.save(trained, tmp_path / "net.pt")  # control: the same file, whole
    nets.load_weights(net, tmp_path / "net.pt")
    assert torch.equal(net.fc.weight, trained[last])


class Hidden:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def packed(content):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def test_code_in_a_checkpoint_does_not_run(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("net.pt", "last.ckpt"):
        torch.save({"state_dict": Hidden()}, name)
        with pytest.raises(ModelError, match="would run code"):
            nets.load_weights(net, name)
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Hidden()))
    assert (tmp_path / "canary").exists()  # control: it would


def test_what_unpacks_to_more_than_it_is_is_not_unpacked(net, tmp_path):
    buffer = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(2**20)}, buffer)
    file = tmp_path / "net.pt"
    file.write_bytes(packed(buffer.getvalue()))
    assert file.stat().st_size < 2**17
    with pytest.raises(ModelError, match=r"packed archive \(\d of \d entries\)"):
        nets.load_weights(net, file)
    file.write_bytes(buffer.getvalue())
    with pytest.raises(ModelError, match="does not fit"):  # control: read, as it is not packed
        nets.load_weights(net, file)


def test_a_header_larger_than_any_nets_is_not_read(net, tmp_path):
    file = tmp_path / "net.safetensors"
    header = b"{" + b" " * (9 * 2**20) + b"}"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="a header of 9,437,186 bytes"):
        nets.load_weights(net, file)


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net.ckpt"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\xff" * 64])
def test_what_is_no_weights_file_is_named(net, name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        nets.load_weights(net, tmp_path / name)


def test_a_pipe_and_a_folder_are_no_weights(net, tmp_path):
    os.mkfifo(tmp_path / "net.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("net.pt", "no file"),
        ("folder.pt", "no file"),
        ("gone.pt", "There is no"),
    ):
        with pytest.raises(ModelError, match=message):
            nets.load_weights(net, tmp_path / name)
    with pytest.raises(ModelError, match="weights file"):
        nets.load_weights(net, tmp_path / ("x" * 300 + ".pt"))
