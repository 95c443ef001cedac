"""The net's own preprocessing in every file, and what is predicted and judged with nothing else."""

import json

import onnx
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import resconv
from resconv import data, nets, prediction
from resconv.cli.app import app
from resconv.data import BatchLoader, Form, decode_all, list_images, load_val
from resconv.errors import DataError, ExportError, LoadError
from resconv.nn.pixels import FromPixels
from resconv.preprocessing import Preprocessing, from_metadata, to_metadata
from resconv.storage.runtimes import open_file
from resconv.surgery.provenance import provenance_of

from .helpers import randomise

NAMES = ("dog", "cat, big", "owl")


def own(order="RGB", **more):
    count = len(order)
    given = {
        "size": 16,
        "crop_fraction": 0.8,
        "interpolation": "bicubic",
        "mean": (0.2, 0.5, 0.4)[:count],
        "std": (0.3, 0.2, 0.1)[:count],
        "channel_order": order,
        "class_names": NAMES,
    }
    return Preprocessing(**{**given, **more})


def net_for(preprocessing):
    torch.manual_seed(0)
    net = nets.create("resnet20", num_classes=3, in_channels=preprocessing.num_channels)
    return randomise(net, 0, torch.randn(4, preprocessing.num_channels, 16, 16))


@pytest.fixture
def photos(tmp_path):
    """Images of different sizes in folders of classes, in another order than the net has them."""
    gen = torch.Generator().manual_seed(0)
    for name, count in (("cat, big", 5), ("dog", 4), ("owl", 6)):
        for i in range(count):
            place = tmp_path / "photos" / name / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            shape = (20 + 3 * i, 17 + 2 * i, 3)
            pixels = torch.randint(256, shape, generator=gen, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(place)
    return tmp_path / "photos"


def expected(net, photos, preprocessing):
    """Return what the net says of the images, by the loader that it is trained with."""
    split, _ = load_val(str(photos), preprocessing)
    batches = BatchLoader(split, 4, preprocessing, num_workers=0)
    with torch.no_grad():
        return torch.cat([net(images) for images, _ in batches]).softmax(1), split


# What is written


@pytest.mark.parametrize("order", ["RGB", "BGR", "L"])
def test_metadata_say_what_preprocessing_says(order):
    texts = to_metadata(own(order))
    assert all(isinstance(v, str) for v in texts.values())
    assert json.loads(texts["class_names"]) == list(NAMES)
    assert (texts["image_size"], texts["resize_to"]) == ("16", "20")
    assert from_metadata(texts) == own(order)
    assert from_metadata({"producer": "others"}) is None
    for wrong in (
        {"mean": "[1, 2, 3, 4]"},
        {"std": "no"},
        {"interpolation": "magic"},
        {"image_size": "-1"},
    ):
        with pytest.raises(DataError):
            from_metadata({**texts, **wrong})


def test_a_saved_net_brings_its_preprocessing_back(tmp_path):
    net = net_for(own())
    plain = resconv.load(resconv.save(net, tmp_path / "plain"))
    assert provenance_of(plain).preprocessing is None
    path = resconv.save(net, tmp_path / "net", preprocessing=own())
    back = resconv.load(path)
    assert provenance_of(back).preprocessing == own()
    compact = resconv.fuse(resconv.convert(back, torch.randn(2, 3, 16, 16)), fold_norms=True)
    again = resconv.load(resconv.save(compact, tmp_path / "compact"))
    assert provenance_of(again).preprocessing == own()
    assert provenance_of(again).class_names == NAMES
    file = tmp_path / "net" / "model.json"
    for before, after in (('"bicubic"', '"magic"'), ('"size": 16', '"size": 0')):
        file.write_text(file.read_text().replace(before, after))
        with pytest.raises(LoadError):
            resconv.load(path)
        path = resconv.save(net, tmp_path / "net", preprocessing=own())


def test_the_metadata_of_an_onnx_file_are_plain_keys(tmp_path):
    """Whoever has the file alone, and onnx, knows how to feed it."""
    x = torch.randn(2, 3, 16, 16)
    resconv.export(net_for(own()), tmp_path / "net.onnx", x, preprocessing=own())
    found = {p.key: p.value for p in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert found.items() >= to_metadata(own()).items()
    assert (found["input_format"], found["output_format"]) == ("normalised", "logits")


# Files that normalise by themselves


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".xml"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("softmax", [False, True])
def test_a_file_with_preprocessing_reads_pixels(suffix, layout, softmax, tmp_path):
    net, file = net_for(own()), tmp_path / f"net{suffix}"
    done = resconv.export(net, file, preprocessing=own(), pixels=layout, softmax=softmax)
    assert done.dynamic_batch
    pixels = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (own().mean, own().std))
    with torch.no_grad():
        wanted = net((pixels / 255 - mean) / std)
    given = pixels if layout == "nchw" else pixels.permute(0, 2, 3, 1).contiguous()
    (got,) = open_file(file, trust_source=True).run(given)
    torch.testing.assert_close(got, wanted.softmax(1) if softmax else wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, wanted if softmax else wanted.softmax(1), atol=1e-2)


def test_pixels_need_to_know_their_preprocessing(tmp_path):
    net, x = net_for(own()), torch.randn(1, 3, 16, 16)
    with pytest.raises(ExportError, match="does not carry its preprocessing"):
        resconv.export(net, tmp_path / "net.onnx", x, pixels="nchw")
    with pytest.raises(ExportError, match="softmax=True is for files that read pixels"):
        resconv.export(net, tmp_path / "net.onnx", x, softmax=True)
    with pytest.raises(ExportError, match="choose one of nchw, nhwc"):
        resconv.export(net, tmp_path / "net.onnx", x, pixels="chw")
    grey = own("L", mean=(0.1,), std=(1.0,))
    with pytest.raises(ExportError, match="1 channels of 16x16"):
        resconv.export(net, tmp_path / "net.onnx", x, preprocessing=grey, pixels="nchw")
    features = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(ExportError, match="for classifiers"):
        resconv.export(
            features, tmp_path / "n.onnx", preprocessing=own(), pixels="nchw", softmax=True
        )


def test_pixels_in_front_of_a_net_in_double_precision():
    net = net_for(own()).double()
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    whole = FromPixels(net, own())
    assert whole(pixels).dtype == torch.float64
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (own().mean, own().std))
    torch.testing.assert_close(
        whole(pixels), net(((pixels / 255) - mean).div(std).double()), rtol=1e-4, atol=1e-4
    )


# Prediction


def forms(net, folder, preprocessing):
    """Write the net in every form that can be opened."""
    x = torch.randn(1, preprocessing.num_channels, 16, 16)
    yield resconv.save(net, folder / "saved", preprocessing=preprocessing, example_inputs=x)
    for name, more in (
        ("a.onnx", {}),
        ("b.onnx", {"pixels": "nhwc", "softmax": True}),
        ("c.xml", {}),
        ("d.xml", {"pixels": "nchw"}),
        ("e.pt2", {}),
    ):
        resconv.export(net, folder / name, x, preprocessing=preprocessing, **more)
        yield folder / name


@pytest.mark.parametrize("order", ["RGB", "BGR", "L"])
def test_every_form_says_the_same_of_the_same_images(order, photos, tmp_path):
    preprocessing = own(order)
    net = net_for(preprocessing)
    wanted, split = expected(net, photos, preprocessing)
    names = ("cat, big", "dog", "owl")  # of the folders, in their order
    right = [
        NAMES[i] == names[label]
        for i, label in zip(wanted.argmax(1).tolist(), split.labels.tolist(), strict=True)
    ]
    judged = []
    for path in forms(net, tmp_path, preprocessing):
        classifier = prediction.open_classifier(path, trust_source=True)
        assert classifier.preprocessing == preprocessing
        found = classifier.probabilities(decode_all(split.encoded[:], Form.of(preprocessing)))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        judged.append(prediction.evaluate(classifier, split, names))
    assert all(one == judged[0] for one in judged)
    assert judged[0].top1 == pytest.approx(100 * sum(right) / 15)
    assert judged[0].top5 == 100
    assert judged[0].num_of_class == (4, 5, 6)  # in the order of the net's classes
    assert [sum(row) for row in judged[0].confusion] == [4, 5, 6]
    for i, share in enumerate(judged[0].accuracy_of_class):
        assert share == pytest.approx(100 * judged[0].confusion[i][i] / (4, 5, 6)[i])


def test_what_others_compute_from_the_file_alone(photos, tmp_path):
    """ONNX Runtime and OpenVINO, with Pillow and the metadata, and nothing of resconv."""
    import numpy as np

    net = net_for(own())
    resconv.export(net, tmp_path / "n.onnx", preprocessing=own(), pixels="nhwc", softmax=True)
    image = photos / "owl" / "3.png"
    (one,) = prediction.predict(
        prediction.open_classifier(tmp_path / "n.onnx"), list_images(image), top=3
    )
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx")
    meta = session.get_modelmeta().custom_metadata_map
    side, size = int(meta["resize_to"]), int(meta["image_size"])
    opened = Image.open(image)
    share = side / min(opened.size)
    resized = opened.resize(
        [int(s * share) for s in opened.size], Image.Resampling[meta["interpolation"].upper()]
    )
    left, top = ((s - size) // 2 for s in resized.size)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)))[None]
    (got,) = session.run(None, {session.get_inputs()[0].name: pixels})
    names = json.loads(meta["class_names"])
    assert names[int(got.argmax())] == one.classes[0]
    assert float(got.max()) == pytest.approx(one.probabilities[0], abs=0.03)
    compiled = openvino.Core().compile_model(tmp_path / "n.onnx", "CPU")
    np.testing.assert_allclose(compiled(pixels)[0], got, atol=1e-2)


def test_a_file_of_one_batch_size_is_fed_in_that(tmp_path, photos):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(x).reshape(2, 3, 14, 14).mean((2, 3))

    net = randomise(Fixed())
    x = torch.randn(2, 3, 16, 16)
    done = resconv.export(net, tmp_path / "n.onnx", x, preprocessing=own())
    assert not done.dynamic_batch
    classifier = prediction.open_classifier(done.path)
    assert classifier.batch == 2
    split, _ = load_val(str(photos), own())
    found = classifier.probabilities(decode_all(split.encoded[:5], split.form))
    assert found.shape == (5, 3)


def test_sets_with_other_classes_are_refused(photos, tmp_path):
    path = resconv.save(net_for(own()), tmp_path / "net", preprocessing=own())
    classifier = prediction.open_classifier(path)
    (photos / "dog").rename(photos / "emu")
    split, names = load_val(str(photos), own())
    with pytest.raises(DataError, match=r"does not know 1 of the set's 3 classes \(emu\)"):
        prediction.evaluate(classifier, split, names)
    nameless = own(class_names=())
    path = resconv.save(net_for(own()), tmp_path / "net", preprocessing=nameless)
    assert prediction.evaluate(prediction.open_classifier(path), split, names).class_names == (
        "0",
        "1",
        "2",
    )
    wrong = own(class_names=("a", "b"))
    path = resconv.save(net_for(own()), tmp_path / "net", preprocessing=wrong)
    with pytest.raises(LoadError, match="names 2 classes, and its net tells 3 apart"):
        list(prediction.predict(prediction.open_classifier(path), list_images(photos)))


def test_a_file_that_says_nothing_is_refused(tmp_path):
    path = resconv.save(net_for(own()), tmp_path / "net")
    with pytest.raises(LoadError, match="does not say how images become its inputs"):
        prediction.open_classifier(path)
    resconv.export(net_for(own()), tmp_path / "n.onnx", torch.randn(1, 3, 16, 16))
    with pytest.raises(LoadError, match="does not say how images become its inputs"):
        prediction.open_classifier(tmp_path / "n.onnx")
    with pytest.raises(LoadError, match=r"There is no .*nothing"):
        prediction.open_classifier(tmp_path / "nothing")


# The command line


def invoke(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception is not None:
        raise result.exception
    return result.output


def test_predict_and_evaluate_print_and_give_json(photos, tmp_path):
    path = resconv.save(net_for(own()), tmp_path / "net", preprocessing=own())
    found = json.loads(invoke("predict", path, photos, "--top", 2, "--json"))
    assert len(found) == 15
    assert [len(one["classes"]) for one in found] == [2] * 15
    assert found[0]["image"] == str(photos / "cat, big" / "0.png")
    assert found[0]["probabilities"][0] >= found[0]["probabilities"][1]
    assert "%" in invoke("predict", path, photos / "owl" / "0.png")
    judged = json.loads(invoke("evaluate", path, photos, "--json"))
    assert judged["num_images"] == 15
    text = invoke("evaluate", path, photos)
    assert f"top-1 {judged['top1']:.2f} %" in text
    assert "Taken for" in text
    with pytest.raises(DataError, match="no image or folder"):
        invoke("predict", path, tmp_path / "none")
    with pytest.raises(resconv.ResConvError, match="is no run folder"):
        invoke("evaluate", path)


def test_a_run_is_judged_as_it_judged_itself(tmp_path):
    """By the compact net, its ONNX file, and a file that normalises by itself, on the run's own images."""
    out = tmp_path / "run"
    invoke(
        *("compress", "--model", "resnet20", "--data", "digits", "--limit", 96, "--macs", 0.6),
        *("--epochs", 1, "--sparse-epochs", 8, "--finetune-epochs", 1, "--batch-size", 24),
        *("--image-size", 12, "--out", out),
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert from_metadata(open_file(out / "model.onnx").texts).size == 12
    known = provenance_of(resconv.load(out)).preprocessing
    assert (known.mean, known.class_names) == (
        tuple(metrics["preprocessing"]["mean"]),
        tuple("0123456789"),
    )
    invoke("export", out, "--with-preprocessing", "--layout", "nhwc", "--softmax")
    invoke("export", out, "--to", out / "m.xml")
    top1 = [
        json.loads(invoke("evaluate", *words, "--json"))["top1"]
        for words in (
            (out,),
            (out / "model.onnx", "digits", "--limit", 96),
            (out / "model-pixels.onnx", "digits", "--limit", 96),
            (out / "m.xml", "digits", "--limit", 96),
        )
    ]
    assert top1 == [pytest.approx(metrics["top1_compact"], abs=0.01)] * 4
    assert len(json.loads(invoke("predict", out, "digits", "--json"))) > 300


def test_the_images_to_judge_by_are_those_that_training_is_judged_by():
    for given in ({}, {"holdout": 0.2}, {"limit": 7}, {"holdout": 0.1, "limit": 5}):
        loaded = data.load("digits", **given)
        split, names = load_val("digits", loaded.preprocessing, **given)
        assert names == loaded.class_names
        assert torch.equal(split.labels, loaded.val.labels)
        assert torch.equal(split.in_memory().images, loaded.val.images)
