"""The command line and the run folder: the main job, stopped and resumed, and bad input."""

import json
import re
import shutil

import pytest
import torch
from msgspec.structs import replace
from PIL import Image
from typer.testing import CliRunner

import resconv
from resconv import data, nets, run
from resconv.cli.app import app, run_app
from resconv.errors import RunError
from resconv.run import RunFolder
from resconv.run.pipeline import STAGES
from resconv.run.report.table import epochs_note, rows

SMALL = [
    "--model",
    "resnet20",
    "--data",
    "digits",
    "--limit",
    "256",
    "--epochs",
    "1",
    "--sparse-epochs",
    "4",
    "--finetune-epochs",
    "1",
    "--batch-size",
    "32",
]


def invoke(*args):
    return CliRunner().invoke(app, list(map(str, args)), catch_exceptions=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "x"
    result = invoke("compress", *SMALL, "--macs", "0.5", "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_compress_leaves_everything_behind(finished):
    out, output = finished
    for name in (
        "config.json",
        "plan.json",
        "model.safetensors",
        "model.json",
        "model.onnx",
        "metrics.json",
        "report.html",
        "logs",
    ):
        assert (out / name).exists(), name
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["macs_compact"] <= 0.5 * metrics["macs_dense"]
    assert metrics["removed_with_nonzero_scale"] == []
    assert metrics["top1_pruned"] == metrics["top1_gated"]
    assert metrics["verify"]["max_rel_error"] < 1e-4
    assert "top1_finetuned" in metrics
    # How images become inputs, and how they were changed in training.
    inputs = metrics["preprocessing"]
    assert (inputs["size"], inputs["channel_order"]) == (8, "L")
    assert inputs["class_names"] == list("0123456789")
    assert 0.2 < inputs["mean"][0] < 0.4
    assert metrics["augment"] == {"kind": "shift", "pad": 1, "least_area": 0.08, "mirror": False}
    assert {"torch", "onnxruntime"} <= set(metrics["latency"])
    # Figures of top-1 beside the dense net's say how long each side was trained.
    # Those of finetuning count where it made the net better, or the one before it was kept.
    assert metrics["finetuned_kept"] is (metrics["top1_finetuned"] >= metrics["top1_pruned"])
    kept = replace(RunFolder(out).metrics(), finetuned_kept=True, epochs_finetune=1)
    assert ("epochs of training", "1", "6", "") in rows(kept)
    given = replace(kept, epochs_dense=None)
    assert ("epochs of training", "as given", "5 more", "") in rows(given)
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "epochs of training" in page
    assert f"mean {round(inputs['mean'][0], 4)} and std" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    assert "latency" in output


def test_the_folder_loads_and_equals_the_onnx(finished):
    out, _ = finished
    net = resconv.load(out)
    assert not resconv.gates(net)
    assert invoke("verify", out, out / "model.onnx").exit_code == 0
    other = nets.create("resnet20", in_channels=1).eval()
    resconv.export(other, out.parent / "other.onnx", torch.randn(1, 1, 8, 8))
    result = invoke("verify", out, out.parent / "other.onnx")
    assert isinstance(result.exception, resconv.ResConvError)


def test_a_run_in_8_bits_is_calibrated_judged_and_reported(finished, tmp_path):
    out = tmp_path / "x"
    shutil.copytree(finished[0], out)
    result = invoke("export", out, "--int8")
    assert result.exit_code == 0, result.output
    assert "13 of 13 layers" not in result.output  # some were removed
    metrics = RunFolder(out).metrics()
    found = metrics.int8
    assert found.num_calibration == 256
    assert (
        found.num_quantised == found.num_layers == metrics.num_convs_compact + 1
    )  # the classifier
    assert found.num_bytes < found.num_bytes_float
    # The float file of that run, and this file by all that it says of itself.
    assert found.top1_float == pytest.approx(metrics.top1_compact, abs=0.5)
    assert abs(found.top1 - found.top1_float) < 3
    judged = invoke("evaluate", out / "model-int8.onnx", "digits", "--limit", "256", "--json")
    assert json.loads(judged.output)["top1"] == found.top1
    said = invoke("predict", out / "model-int8.onnx", "digits", "--top", "1", "--json")
    assert len(json.loads(said.output)) == 359
    assert f"{found.top1:.2f}" in (out / "report.html").read_text().partition("In 8 bits")[2]
    # It is the run's: it goes when the net that it was made of goes.
    folder = RunFolder(out)
    folder.undo(["export"])
    assert not (out / "model-int8.onnx").exists()
    assert folder.metrics().int8 is None
    assert folder.metrics().top1_compact is not None


def test_8_bits_are_refused_before_work(finished, tmp_path, monkeypatch):
    from resconv.run import quantising

    out = tmp_path / "x"
    shutil.copytree(finished[0], out)
    monkeypatch.setattr(quantising, "quantise", lambda *args, **options: pytest.fail("work"))
    result = invoke("export", out, "--int8", "--to", "net.pt2")
    assert "--int8 --to net.pt2: files in 8 bits are ONNX" in str(result.exception)
    saved = tmp_path / "saved"
    resconv.save(resconv.load(out), saved)
    result = invoke("export", saved, "--int8")
    assert "names no images, which --int8 calibrates with" in str(result.exception)
    content = json.loads((out / "config.json").read_text())
    content["data"]["source"] = f"folder:{tmp_path / 'gone'}"
    (out / "config.json").write_text(json.dumps(content))
    result = invoke("export", out, "--int8")
    assert isinstance(result.exception, resconv.ResConvError)
    assert str(tmp_path / "gone") in str(result.exception)


def test_a_second_call_does_nothing_again(finished):
    out, _ = finished
    before = (out / "dense.safetensors").stat().st_mtime_ns
    result = invoke("compress", *SMALL, "--macs", "0.5", "--out", out)
    assert result.output.count("done already") == len(STAGES) - 1  # no control was asked for
    assert (out / "dense.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_may_be_given_a_control(finished, tmp_path, monkeypatch):
    """The dense net trained on, to the same bit whether it was stopped or not; what was trained before stays."""
    import lightning

    from resconv.run import training

    assert "than the dense net" in finished[1]  # without one it is said that the epochs differ
    assert "than the dense net" in (finished[0] / "report.html").read_text()
    config = RunFolder(finished[0]).config()
    config = replace(config, training=replace(config.training, control=True, progress=False))
    outs = [tmp_path / "whole", tmp_path / "stopped"]
    jobs = []
    for out in outs:
        shutil.copytree(finished[0], out)
        jobs.append(run.begin(out, config, say=lambda text: None))
        assert jobs[-1].folder.done() == [s for s in STAGES if s != "control"]
    run.run_stage(jobs[0], "control")
    assert jobs[0].folder.done() == ["dense", "sparse", "plan", "prune", "finetune", "control"]
    metrics = jobs[0].folder.metrics()
    assert metrics.epochs_control == 5
    assert metrics.top1_compact == RunFolder(finished[0]).metrics().top1_compact
    (row,) = [r for r in rows(metrics) if r[0] == "top-1, dense net trained on for 5 epochs (%)"]
    assert row[1:3] == (f"{metrics.top1_control:.2f}", f"{metrics.top1_compact:.2f}")
    assert not epochs_note(metrics)

    class Stop(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        fit = training.fit
        patch.setattr(training, "fit", lambda *a, **o: fit(*a, **{**o, "callbacks": (Stop(),)}))
        with pytest.raises(KeyboardInterrupt):
            run.run_stage(jobs[1], "control")
    assert not (outs[1] / "control.safetensors").exists()
    run.run_stage(run.open_run(outs[1], lambda text: None), "control")
    nets = [(out / "control.safetensors").read_bytes() for out in outs]
    assert nets[0] == nets[1]
    assert nets[0] != (finished[0] / "dense.safetensors").read_bytes()
    csv = [(out / "logs" / "control" / "metrics.csv").read_text() for out in outs]
    assert csv[0] == csv[1]


def test_another_configuration_is_refused(finished):
    out, _ = finished
    result = invoke("compress", *SMALL, "--macs", "0.4", "--out", out)
    assert "macs: 0.5 there, 0.4 now" in str(result.exception)


def test_finetuning_may_be_asked_for_anew(finished, tmp_path, monkeypatch):
    """What was trained before it stays; the net is the one of a run that asked for it at once."""
    from resconv.run import training

    monkeypatch.setattr(training, "evaluate", lambda *args: 100.0)  # or it might not be kept
    out, whole = tmp_path / "mine", tmp_path / "whole"
    shutil.copytree(finished[0], out)
    before = [(out / f"{n}.safetensors").stat().st_mtime_ns for n in ("dense", "gated")]
    asked = ("--macs", "0.5", "--finetune-epochs", 2, "--finetune-lr", "0.05")
    result = invoke("compress", *SMALL, *asked, "--out", out)
    assert result.exit_code == 0, result.output
    for stage in ("dense", "sparse", "plan"):
        assert f"[{stage}] done already" in result.output
    assert result.output.count("done already") == 3
    assert before == [(out / f"{n}.safetensors").stat().st_mtime_ns for n in ("dense", "gated")]
    metrics = json.loads((out / "metrics.json").read_text())
    assert ("epochs of training", "1", "7", "") in rows(RunFolder(out).metrics())
    tuned = resconv.load(out)
    assert invoke("compress", *SMALL, *asked, "--out", whole).exit_code == 0
    mine, theirs, old = (n.state_dict() for n in map(resconv.load, (out, whole, finished[0])))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(t, old[n], rtol=1e-2, atol=1e-3) for n, t in mine.items())

    # None at all: the net is the one that pruning left.
    result = invoke("compress", *SMALL, "--macs", "0.5", "--finetune-epochs", 0, "--out", out)
    assert result.exit_code == 0, result.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["top1_finetuned"] is None
    assert ("epochs of training", "1", "5", "") in rows(RunFolder(out).metrics())
    pruned = resconv.prune(run.open_run(out).gated(), run.open_run(out).plan())
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(resconv.load(out)(x), pruned.eval()(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tuned(x), pruned(x), rtol=1e-2, atol=1e-2)


def test_stages_are_commands(finished, tmp_path):
    out = tmp_path / "mine"
    shutil.copytree(finished[0], out)  # other tests read the run as it was
    assert invoke("export", out, "--to", out / "model.pt2").exit_code == 0
    assert (out / "model.pt2").is_file()
    plan = out / "mine.json"
    plan.write_text('{"remove": ["layer3.1"]}')
    assert invoke("prune", out, "--plan", plan).exit_code == 0
    assert invoke("export", out).exit_code == 0
    result = invoke("measure", out)
    assert result.exit_code == 0, result.output


def test_a_stopped_run_goes_on(tmp_path):
    config = run.Config.of(
        model="resnet20",
        data="digits",
        macs=0.6,
        limit=128,
        epochs=3,
        sparse_epochs=3,
        finetune_epochs=0,
        batch_size=32,
        progress=False,
    )
    from lightning.pytorch.callbacks import Callback

    from resconv.train import fit

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    folder = run.RunFolder.begin(tmp_path / "a", config)
    stopped = run.open_run(folder.path, lambda text: None)
    model = stopped.create()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(
            model,
            stopped.data,
            stopped.recipe(3, 0.1),
            folder.logs / "dense",
            progress=False,
            callbacks=(Stop(),),
        )
    assert (folder.logs / "dense" / "last.ckpt").is_file()
    run.run_stage(stopped, "dense")
    whole = run.open_run(run.RunFolder.begin(tmp_path / "b", config).path, lambda text: None)
    run.run_stage(whole, "dense")
    a, b = stopped.dense().state_dict(), whole.dense().state_dict()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-3)
    with pytest.raises(RunError, match="'sparse' has to be run before 'prune'"):
        run.run_stage(whole, "prune")


def test_a_target_in_latency(tmp_path):
    out = tmp_path / "fast"
    args = ("compress", *SMALL, "--latency", "60%", "--threads", 1, "--finetune-epochs", 0)
    result = invoke(*args, "--out", out)
    assert result.exit_code == 0, (result.output, result.exception)
    metrics = json.loads((out / "metrics.json").read_text())
    plan = resconv.Plan.load(out / "plan.json")
    assert plan.latency_ms_after <= 0.6 * plan.latency_ms_before
    target = metrics["latency_target"]
    assert target["asked_share"] == 0.6
    assert target["planned_ms"] == plan.latency_ms_after
    assert target["predicted_ms"] == plan.latency_ms_predicted
    assert target["compact_ms"] < target["dense_ms"]
    table = resconv.LatencyTable.load(out / "latency.json")
    assert table.check_of(plan.remove).latency_ms == plan.latency_ms_after
    assert "Latency target" in (out / "report.html").read_text()
    assert json.loads((out / "scales.json").read_text())["steps"][0]["latency_ms"] > 0
    # The stored table is used again, and gives the same plan.
    result = invoke("prune", out)
    assert "Measuring" not in result.output
    assert resconv.Plan.load(out / "plan.json") == plan


def test_a_run_that_is_too_short_is_refused_before_anything_is_measured(tmp_path):
    out = tmp_path / "short"
    args = ("compress", *SMALL, "--latency", "60%", "--sparse-epochs", 1, "--limit", 64)
    result = invoke(*args, "--out", out)
    assert result.exit_code != 0
    assert "takes at least 20 optimizer steps" in str(result.exception) + result.output
    assert "Measuring" not in result.output
    assert not (out / "latency.json").exists()


@pytest.mark.parametrize("stage", ["sparse", "finetune"])
def test_stopped_and_resumed_gives_the_same_net(stage, tmp_path, monkeypatch):
    from lightning.pytorch.callbacks import Callback
    from safetensors.torch import load_file

    from resconv.run import training

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    config = run.Config.of(
        model="resnet20",
        data="digits",
        macs=0.6,
        limit=160,
        epochs=1,
        sparse_epochs=5,
        finetune_epochs=2,
        batch_size=32,
        distill=True,
        hints=True,
        mix="cutmix",
        progress=False,
    )
    fit = training.fit

    def train(current):
        for name in STAGES:
            run.run_stage(current, name)
            if name == "finetune":
                break

    def stopping(*args, **kwargs):
        if args[3].name == stage:
            kwargs["callbacks"] = (Stop(),)
        return fit(*args, **kwargs)

    nets_of = {}
    for name in ("whole", "stopped"):
        current = run.open_run(run.RunFolder.begin(tmp_path / name, config).path, lambda t: None)
        if name == "stopped":
            monkeypatch.setattr(training, "fit", stopping)
            with pytest.raises(KeyboardInterrupt):
                train(current)
            assert stage not in current.folder.done()
            monkeypatch.setattr(training, "fit", fit)
            current = run.open_run(current.folder.path, lambda t: None)
        train(current)
        nets_of[name] = load_file(tmp_path / name / "model.safetensors"), current.plan().remove
    whole, stopped = nets_of["whole"], nets_of["stopped"]
    assert whole[1] == stopped[1]
    assert whole[0].keys() == stopped[0].keys()
    for key in whole[0]:
        torch.testing.assert_close(stopped[0][key], whole[0][key], rtol=0, atol=1e-6)


def test_statistics_are_collected_anew_where_a_scale_is_not_zero(finished, tmp_path):
    """A plan by hand takes units that training kept; without new statistics that costs more."""
    out = tmp_path / "hand"
    shutil.copytree(finished[0], out)
    scales = resconv.Plan.load(out / "plan.json").scales
    kept = [n for n, s in scales.items() if s > 0.2 and "conv" not in n]  # branches
    (tmp_path / "plan.json").write_text(json.dumps({"remove": kept[-2:]}))
    current = run.open_run(out, lambda t: None)
    run.use_plan(current, tmp_path / "plan.json")
    # What the old plan led to is gone, files and figures.
    assert not (out / "model.onnx").exists()
    left = current.folder.metrics()
    assert (left.onnx, left.latency, left.top1_pruned) == (None, {}, None)
    run.run_stage(current, "prune")
    metrics = current.folder.metrics()
    assert sorted(metrics.removed_with_nonzero_scale) == sorted(kept[-2:])
    assert metrics.top1_recalibrated is not None
    assert metrics.top1_recalibrated != metrics.top1_pruned
    first = json.loads((finished[0] / "metrics.json").read_text())
    assert first["top1_recalibrated"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--macs", "2.0"], r"--macs 2.0: give a fraction .* a whole number"),
        (["--macs", "abc"], "--macs abc: give a fraction"),
        (["--latency-ms", "-1"], "latency_ms=-1.0: give milliseconds above 0"),
        (["--latency", "8"], "For milliseconds give --latency-ms"),
        (["--latency", "0.5", "--latency-ms", "3"], "limit the same thing"),
        (["--macs", "0.5", "--threads", "2"], "no latency is limited"),
        (["--latency", "0.5", "--runtime", "tflite"], "choose 'torch' or 'onnxruntime'"),
        (["--latency", "0.5", "--latency-batch", "0"], "batch=0"),
        ([], "Nothing is asked for.*--latency-ms"),
        (["--macs", "0.01"], "cannot be reached"),
        (["--latency-ms", "0.0001", "--threads", "1"], r"cannot be reached.* ms"),
        (["--macs", "1.0"], "within the target as it is"),
        (
            ["--macs", "0.5", "--sparse-epochs", "9"],
            "total_steps=18: .* at least 20 .* more epochs",
        ),
    ],
)
def test_bad_targets_are_refused_before_any_training(args, message, tmp_path):
    start = ["compress", "--model", "resnet20", "--data", "digits", "--limit", "64"]
    result = invoke(*start, "--batch-size", "30", *args, "--out", tmp_path / "out")
    assert isinstance(result.exception, resconv.ResConvError), result.output
    assert re.search(message, str(result.exception)), result.exception
    assert not (tmp_path / "out" / "dense.safetensors").exists()
    assert not (tmp_path / "out" / "logs").exists()


def test_a_missing_runtime_is_named_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    start = ["compress", "--model", "resnet20", "--data", "digits", "--limit", "64"]
    asked = ["--latency", "0.5", "--runtime", "onnxruntime"]
    result = invoke(*start, *asked, "--out", tmp_path / "out")
    assert isinstance(result.exception, resconv.ResConvError)
    assert "pip install 'resconv[onnx]'" in str(result.exception)
    assert not (tmp_path / "out" / "logs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["compress", "--model", "resnet21", "--data", "digits", "--macs", "0.5"],
            "No built-in net",
        ),
        (
            ["compress", "--model", "resnet20", "--data", "digit", "--macs", "0.5"],
            "Did you mean 'digits'",
        ),
        (["compress", "--model", "resnet20", "--data", "digits"], "Nothing is asked for"),
        (
            ["compress", "--model", "resnet20", "--data", "digits", "--macs", "half"],
            "give a fraction",
        ),
        (
            ["compress", "--model", "resnet20", "--data", "folder:/nowhere", "--macs", "0.5"],
            "/nowhere",
        ),
        (
            ["compress", "--model", "vgg16_bn", "--data", "digits", "--macs", "0.5"],
            "image-size|image_size",
        ),
        (
            ["compress", "--model", "torchvision:resnet18", "--data", "digits", "--macs", "0.5"],
            "3 channels",
        ),
        (
            [
                "compress",
                "--model",
                "resnet20",
                "--data",
                "digits",
                "--macs",
                "0.5",
                "--weights",
                "no.pt",
            ],
            "no weights file",
        ),
    ],
)
def test_bad_input_is_a_clear_error(args, message, tmp_path):
    result = invoke(*args, "--out", tmp_path / "out")
    assert isinstance(result.exception, resconv.ResConvError), result.output
    assert re.search(message, str(result.exception)), result.exception


def test_sparse_training_from_random_weights(tmp_path):
    short = [*SMALL, "--epochs", "0", "--macs", "0.6"]
    result = invoke("compress", *short, "--model", "plainnet20", "--out", tmp_path / "x")
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "x" / "metrics.json").read_text())
    assert metrics["top1_dense"] is None
    assert metrics["top1_pruned"] == metrics["top1_gated"]
    assert metrics["macs_compact"] <= 0.6 * metrics["macs_dense"]
    assert not metrics["removed_with_nonzero_scale"]
    # What makes an untrained plain net trainable is there from the first step.
    controls = json.loads((tmp_path / "x" / "scales.json").read_text())["steps"][0]["controls"]
    assert set(controls.values()) == {1.0}
    refused = invoke("compress", *short, "--distill", "--out", tmp_path / "y")
    assert "no dense net to learn from" in str(refused.exception or refused.output)
    refused = invoke("compress", *SMALL, "--hints", "--macs", "0.6", "--out", tmp_path / "z")
    assert "add distill=True" in str(refused.exception or refused.output)
    refused = invoke("compress", *short, "--mix", "cutup", "--out", tmp_path / "z")
    assert "one of mixup, cutmix" in str(refused.exception or refused.output)


def test_a_training_that_diverges_is_stopped_and_says_so(tmp_path):
    result = invoke("compress", *SMALL, "--lr", "1e9", "--macs", "0.5", "--out", tmp_path / "x")
    text = " ".join(str(result.exception or result.output).split())
    assert result.exit_code != 0
    assert "Training diverged" in text
    assert "lower rate" in text


def test_errors_end_as_a_panel_and_status_two(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["resconv", "prune", "/nowhere"])
    assert run_app(app) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_help_ends_in_examples():
    for command in ("compress", "inspect", "train", "prune", "export", "measure", "verify"):
        result = invoke(command, "--help")
        assert result.exit_code == 0
        assert "Examples" in result.output, command


def test_inspect():
    result = invoke("inspect", "resnet20", "--json")
    rows = json.loads(result.output)
    assert {r["name"]: r for r in rows}["conv1"]["reason"] == "3 channels in, 16 out"
    assert "units are removable" in invoke("inspect", "resnet20").output


def test_own_images_and_own_net(tmp_path, monkeypatch):
    for split, count in (("train", 12), ("val", 4)):
        for label, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 16), tuple(c + i for c in colour)).save(folder / f"{i}.png")
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    result = invoke(
        "compress",
        "--model",
        "mynet:build",
        "--data",
        "folder:photos",
        "--macs",
        "0.6",
        "--image-size",
        "16",
        "--epochs",
        "2",
        "--sparse-epochs",
        "8",
        "--batch-size",
        "8",
        "--finetune-epochs",
        "0",
        "--out",
        "out",
    )
    assert result.exit_code == 0, (result.output, result.exception)
    with pytest.raises(resconv.ResConvError, match="trust"):
        resconv.load("out")
    assert resconv.load("out", trust_source=True)(torch.randn(1, 3, 16, 16)).shape == (1, 2)
    Image.new("RGB", (4, 4)).save("photos/val/cat/zz.png")
    (tmp_path / "photos/val/cat/broken.png").write_bytes(b"not an image")
    with pytest.raises(resconv.ResConvError, match=r"broken\.png"):
        data.load("folder:photos", image_size=16)
