"""Files for phones and boards: ExecuTorch and LiteRT, each where its packages are installed."""

import importlib.util

import pytest
import torch
from torch import nn

import resconv
from resconv import prediction
from resconv.errors import ExportError, LoadError, MissingExtraError
from resconv.nn.pixels import scale_and_shift
from resconv.storage import device
from resconv.storage.comparison import compare
from resconv.storage.runtimes import open_file

from .helpers import RGB, randomise


def net():
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish()),
        *(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(8, 5)),
    ]
    return randomise(nn.Sequential(*layers), 0, torch.randn(4, 3, 16, 16)).eval()


@pytest.fixture(params=device.DEVICE_SUFFIXES)
def suffix(request):
    if not device.has_converter(request.param):
        pytest.skip(f"the packages that write {request.param} are not installed")
    return request.param


def test_a_file_for_a_device_computes_the_same_and_says_how_to_feed_it(suffix, tmp_path):
    model, x = net(), torch.randn(2, 3, 16, 16)
    done = resconv.export(model, tmp_path / f"net{suffix}", x, preprocessing=RGB)
    assert not done.dynamic_batch
    opened = open_file(done.path)
    assert opened.batch == 2
    assert (opened.inputs.shape, opened.inputs.dtype) == ((2, 3, 16, 16), "float32")
    with torch.no_grad():
        wanted = model(x)
        first = opened.run(x)[0]
        torch.testing.assert_close(first, wanted, rtol=1e-4, atol=1e-5)
        opened.run(x + 1)  # whose results do not overwrite those before
        torch.testing.assert_close(first, wanted, rtol=1e-4, atol=1e-5)
    pixels = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    scale, shift = scale_and_shift(RGB)
    with torch.no_grad():
        likely = model(pixels * scale + shift).softmax(1)
    classifier = prediction.open_classifier(done.path)
    assert classifier.preprocessing == RGB
    torch.testing.assert_close(classifier.probabilities(pixels), likely, rtol=1e-4, atol=1e-5)
    resconv.export(model, tmp_path / "net.pt2", x)
    assert compare(tmp_path / "net.pt2", done.path, trust_source=True).max_rel_error < 1e-4
    with torch.no_grad():
        model[-1].bias += 0.1
    resconv.export(model, tmp_path / "other.pt2", x)
    with pytest.raises(resconv.ResConvError, match="disagree"):
        compare(tmp_path / "other.pt2", done.path, trust_source=True)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_file_for_a_device_reads_pixels(suffix, layout, tmp_path):
    model, pixels = net(), torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    file = tmp_path / f"net{suffix}"
    resconv.export(model, file, preprocessing=RGB, pixels=layout, softmax=True)
    classifier = prediction.open_classifier(file)
    assert (classifier.input_format, classifier.batch) == (f"uint8 {layout}", 1)
    scale, shift = scale_and_shift(RGB)
    with torch.no_grad():
        likely = model(pixels * scale + shift).softmax(1)
    torch.testing.assert_close(classifier.probabilities(pixels), likely, rtol=1e-4, atol=1e-5)


def test_a_damaged_file_is_refused(suffix, tmp_path):
    file = tmp_path / f"net{suffix}"
    file.write_bytes(b"x" * 100)
    with pytest.raises(LoadError, match="is not a readable"):
        open_file(file)


@pytest.mark.parametrize("suffix", device.DEVICE_SUFFIXES)
def test_what_is_asked_for_in_vain_is_said_before_work(suffix, tmp_path, monkeypatch):
    x, file = torch.randn(1, 3, 16, 16), tmp_path / f"net{suffix}"
    with pytest.raises(ExportError, match="images of one size"):
        resconv.export(net(), file, x, dynamic_size=True)
    find = importlib.util.find_spec
    extra = device.EXTRAS[suffix]
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (
            None if name.startswith(("executorch", "litert")) else find(name, *rest)
        ),
    )
    with pytest.raises(MissingExtraError, match=rf"resconv\[{extra}\]"):
        resconv.export(net(), file, x)
    monkeypatch.setattr(device, "has_converter", lambda suffix: True)
    monkeypatch.setattr("resconv.storage.exporting.has_converter", lambda suffix: True)
    with pytest.raises(ExportError, match="in order"):
        resconv.export(net(), file, {"input": x})
    assert not file.exists()
