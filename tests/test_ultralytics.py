"""YOLO nets in ultralytics' own training: converted, stopped and resumed, pruned, used and trained on."""

import copy
import io
import os
import tempfile
from pathlib import Path

import pytest
import torch

import resconv
from resconv.data import write_scenes

os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())  # its settings, not the user's
ultralytics = pytest.importorskip("ultralytics")

from ultralytics import YOLO  # noqa: E402
from ultralytics.nn.tasks import DetectionModel, load_checkpoint, yaml_model_load  # noqa: E402

from resconv.integrations.ultralytics import finetuner, ordinary, trainer  # noqa: E402
from resconv.integrations.ultralytics.networks import convert, form_of, of_its_own_class  # noqa: E402
from resconv.integrations.ultralytics.steps import count_steps  # noqa: E402

SIDE, EPOCHS = 64, 9


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Ultralytics writes into the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a yaml of a narrow yolo11 and a set of a few small scenes."""
    folder = tmp_path_factory.mktemp("yolo")
    settings = yaml_model_load("yolo11n.yaml")
    settings |= {"scales": {"n": [0.5, 0.0625, 1024]}, "nc": 10}
    settings.pop("yaml_file", None)
    (folder / "tiny11n.yaml").write_text(str(settings))
    write_scenes(folder / "data", num_train=14, num_val=4, side=SIDE)
    return folder


def arguments_for(place):
    data = {"data": str(place / "data" / "data.yaml"), "imgsz": SIDE, "batch": 3, "nbs": 6}
    augmentation = {"mosaic": 0.5, "close_mosaic": 2}
    learning = {"optimizer": "AdamW", "lr0": 0.002, "warmup_epochs": 1, "val": False}
    place = {"project": str(place / "runs"), "exist_ok": True, "device": "cpu", "workers": 0}
    return data | augmentation | learning | place | {"plots": False, "verbose": False}


def train(place, name, start=None, epochs=EPOCHS, stop_at=None, **more):
    """Train, and let the run die in the batch with the number ``stop_at``."""
    yolo = YOLO(str(start or place / "tiny11n.yaml"))
    seen = []

    def die(_):
        seen.append(1)
        if len(seen) == stop_at:
            raise KeyboardInterrupt

    if stop_at:
        yolo.add_callback("on_train_batch_end", die)
    arguments = {**arguments_for(place), "name": name, "epochs": epochs, **more}
    if stop_at:
        with pytest.raises(KeyboardInterrupt):
            yolo.train(**arguments)
    else:
        yolo.train(**arguments)
    return yolo


@pytest.fixture(scope="module")
def trained(place):
    """What a whole run leaves: the YOLO that was trained."""
    return train(place, "whole", trainer=trainer(macs=0.8))


def weights(place, run, file):
    return place / "runs" / run / "weights" / file


def numbers(net, side=SIDE):
    with torch.no_grad():
        return net.float().eval()(torch.rand(2, 3, side, side, generator=seeded()))[0]


def seeded():
    return torch.Generator().manual_seed(0)


def assert_close(a, b, within=1e-4):
    """Boxes (the first four rows) and scores are close, each relative to its largest."""
    assert a.shape == b.shape
    for ours, theirs in ((a[:, :4], b[:, :4]), (a[:, 4:], b[:, 4:])):
        assert (ours - theirs).abs().max() <= within * theirs.abs().max()


def test_the_run_leaves_a_compact_net_that_is_the_gated_one(place, trained):
    gated = load_checkpoint(weights(place, "whole", "best.pt"))[0]
    zeros = [n for n, gate in resconv.gates(gated).items() if gate.scale == 0]
    assert zeros  # kept in the average of the weights, and in the checkpoint that was chosen
    dense = DetectionModel(str(place / "tiny11n.yaml"), verbose=False)
    x = torch.zeros(1, 3, SIDE, SIDE)
    assert resconv.profile(trained.model, x).macs <= 0.8 * resconv.profile(dense, x).macs
    # Files hold half precision (11 bits), in which the folded kernels are rounded once more.
    assert_close(numbers(trained.model), numbers(gated), within=3e-3)
    steps = trained.trainer.sparsifier
    assert steps.outcome().step == steps.total_steps


def test_resconv_loads_the_compact_net(place, trained):
    folder = place / "runs" / "whole" / "compact"
    loaded = resconv.load(folder, trust_source=True)
    x = torch.rand(2, 3, SIDE, SIDE, generator=seeded())
    with torch.no_grad():
        half = ordinary(loaded).half().float()(x)[0]
        assert_close(half, trained.model.float().eval()(x)[0])
    with pytest.raises(resconv.ResConvError, match="--trust-source"):
        resconv.load(folder)


def test_activations_that_overwrite_their_input_change_nothing(place, trained):
    # Ultralytics sets that on all of them when it opens a file; behind a removed conv the input is
    # another layer's, too.
    for file in ("best.pt", "compact.pt"):
        path = weights(place, "whole", file)
        inplace, apart = (numbers(load_checkpoint(path, inplace=b)[0]) for b in (True, False))
        assert_close(inplace, apart)
    net = of_its_own_class(load_checkpoint(weights(place, "whole", "compact.pt"))[0])
    bare = [m for m in net.modules() if isinstance(getattr(m, "conv", None), torch.nn.Identity)]
    assert bare
    for module in bare:
        module.act.inplace = True
    with pytest.raises(AssertionError):
        assert_close(numbers(net), inplace)


@pytest.mark.parametrize("file", ["best.pt", "compact.pt"])
def test_ultralytics_uses_gated_and_compact_nets(place, trained, file):
    yolo = YOLO(str(weights(place, "whole", file)))
    before = numbers(copy.deepcopy(yolo.model))
    fused = copy.deepcopy(yolo.model).fuse(verbose=False)
    assert fused.is_fused()
    assert_close(numbers(fused), before)
    assert_close(numbers(fused, 96), numbers(copy.deepcopy(yolo.model), 96))
    image = (torch.rand(SIDE, SIDE, 3, generator=seeded()) * 255).byte().numpy()
    assert len(yolo.predict(image, imgsz=SIDE, conf=1e-9, device="cpu", verbose=False)) == 1
    data = str(place / "data" / "data.yaml")
    result = yolo.val(data=data, imgsz=SIDE, device="cpu", plots=False, verbose=False, workers=0)
    assert 0 <= result.box.map <= 1


def test_the_compact_net_is_exported_with_open_sides(place, trained):
    runtime = pytest.importorskip("onnxruntime")
    yolo = YOLO(str(weights(place, "whole", "compact.pt")))
    file = yolo.export(format="onnx", imgsz=SIDE, dynamic=True, device="cpu", simplify=False)
    session = runtime.InferenceSession(file)
    net = load_checkpoint(weights(place, "whole", "compact.pt"))[0]
    for side in (SIDE, 96):
        x = torch.rand(1, 3, side, side, generator=seeded())
        with torch.no_grad():
            assert_close(torch.tensor(session.run(None, {"images": x.numpy()})[0]), net(x)[0])


def test_a_stopped_run_ends_like_one_that_was_not(place, trained):
    # In the middle of an epoch in which scales fade, with half a step's gradients.
    train(place, "stopped", trainer=trainer(macs=0.8), stop_at=23)
    last = weights(place, "stopped", "last.pt")
    state = torch.load(last, weights_only=False)["resconv"]
    assert state["sparsifier"]["fading"] or state["sparsifier"]["zero"]
    assert state["grads"]
    resumed = YOLO(str(last))
    resumed.train(resume=True, trainer=trainer())
    for file in ("best.pt", "compact.pt"):
        ours = load_checkpoint(weights(place, "stopped", file))[0].state_dict()
        theirs = load_checkpoint(weights(place, "whole", file))[0].state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, msg=name)


def test_resuming_without_our_state_would_end_elsewhere(place, trained, monkeypatch):
    from resconv.integrations.ultralytics import training

    monkeypatch.setattr(training, "load_tensors", lambda net, tensors: None)
    train(place, "rounded", trainer=trainer(macs=0.8, continue_run=True), stop_at=23)
    train(place, "rounded", trainer=trainer(macs=0.8, continue_run=True))
    ours = load_checkpoint(weights(place, "rounded", "best.pt"))[0].state_dict()
    theirs = load_checkpoint(weights(place, "whole", "best.pt"))[0].state_dict()
    assert any(not torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_run_is_resumed_with_its_own_target_and_by_its_own_trainer(place, trained):
    train(place, "other", trainer=trainer(macs=0.8), stop_at=8)
    last = str(weights(place, "other", "last.pt"))
    with pytest.raises(resconv.errors.RunError, match=r"macs.*0\.8"):
        YOLO(last).train(resume=True, trainer=trainer(macs=0.7))
    with pytest.raises(KeyError, match="finetuner"):
        YOLO(last).train(resume=True)
    with pytest.raises(resconv.errors.RunError, match="has ended"):
        train(place, "whole", trainer=trainer(macs=0.8, continue_run=True))


def test_the_compact_net_is_trained_on_with_a_teacher(place, trained):
    train(place, "dense", epochs=1)
    teacher = str(weights(place, "dense", "best.pt"))
    compact = weights(place, "whole", "compact.pt")
    before = form_of(load_checkpoint(compact)[0])
    yolo = train(place, "fine", compact, 2, trainer=finetuner(), distill_model=teacher)
    x = torch.zeros(1, 3, SIDE, SIDE)
    sizes = {resconv.profile(net, x).macs for net in (yolo.model, trained.model)}
    assert len(sizes) == 1
    after = form_of(yolo.model).state_dict()
    assert any(not torch.equal(after[n], t) for n, t in before.state_dict().items())
    assert resconv.load(place / "runs" / "fine" / "compact", trust_source=True)


def test_ultralytics_alone_does_not_build_another_net_in_its_place(place, trained):
    for file in ("best.pt", "compact.pt"):
        with pytest.raises(KeyError, match="finetuner"):
            train(place, "refused", weights(place, "whole", file), 1)


def test_a_compact_net_that_was_changed_is_not_trained_on(place, trained):
    net = load_checkpoint(weights(place, "whole", "compact.pt"))[0].half()
    assert form_of(net) is not None
    with torch.no_grad():
        next(net.parameters()).add_(1)
    with pytest.raises(resconv.errors.RunError, match="not those that it was pruned with"):
        form_of(net)


@pytest.mark.parametrize(
    ("settings", "more", "error", "match"),
    [
        ({"macs": 0.001}, {}, "BudgetError", "cannot be reached"),
        ({"macs": 0.8}, {"epochs": 1}, "BudgetError", "at least 20"),
        ({}, {}, "BudgetError", "Say what to arrive at"),
        ({"macs": 0.8}, {"freeze": 24}, "ConversionError", "Nothing to convert"),
        ({"macs": 0.8}, {"time": 0.1}, "RunError", "epochs="),
    ],
)
def test_what_must_fail_fails_before_training(place, settings, more, error, match):
    def never(_):
        raise AssertionError

    yolo = YOLO(str(place / "tiny11n.yaml"))
    yolo.add_callback("on_train_epoch_start", never)
    arguments = {**arguments_for(place), "epochs": EPOCHS, "name": "failing", **more}
    with pytest.raises(getattr(resconv.errors, error), match=match):
        yolo.train(trainer=trainer(**settings), **arguments)


def test_finetuner_refuses_a_dense_net(place):
    with pytest.raises(resconv.errors.RunError, match="not pruned"):
        train(place, "refused", trainer=finetuner())


@pytest.mark.parametrize("name", ["yolov8n", "yolo26n", "yolo11n-seg"])
def test_other_nets_are_fused_and_written_in_training_form(name):
    yolo = YOLO(f"{name}.yaml")
    torch.manual_seed(0)
    gated = convert(yolo.model, SIDE).eval()
    with torch.no_grad():
        for gate in resconv.gates(gated).values():
            gate.scale.fill_(0.7)
            if gate.control is not None:
                gate.control.fill_(0.3)
    file = io.BytesIO()
    torch.save(gated, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    x = torch.rand(1, 3, SIDE, SIDE, generator=seeded())
    with torch.no_grad():
        expected = _first(gated(x))
        for net in (back, back.fuse(verbose=False)):
            assert_close(_first(net(x)), expected)
    assert back.is_fused()


def _first(tree):
    """The first tensor of the outputs: what is inferred."""
    while not isinstance(tree, torch.Tensor):
        tree = tree[0]
    return tree


@pytest.mark.parametrize(
    ("batches", "epochs", "warmup", "accumulate"), [(5, 4, 5, 4), (7, 3, 0, 1)]
)
def test_steps_are_those_of_the_training_loop(batches, epochs, warmup, accumulate):
    assert 0 < count_steps(batches, epochs, warmup, accumulate) <= batches * epochs
    assert count_steps(batches, epochs, 0, 1) == batches * epochs
    # Without a warm-up a step comes after every `accumulate` batches.
    assert count_steps(batches, epochs, 0, accumulate) == batches * epochs // accumulate


def test_a_file_cut_short_by_a_kill_is_not_left(place, trained, monkeypatch):
    from resconv.integrations.ultralytics import checkpoints, training

    def dies(*args):
        raise KeyboardInterrupt

    folder = weights(place, "cut", "last.pt")
    train(place, "cut", trainer=trainer(macs=0.8), stop_at=8)
    before = Path(folder).read_bytes()
    monkeypatch.setattr(training, "add_to_checkpoint", dies)
    assert checkpoints.settings_of(folder)["settings"]["target"] == {"macs": 0.8}
    with pytest.raises(KeyboardInterrupt):
        YOLO(str(folder)).train(resume=True, trainer=trainer())
    assert folder.read_bytes() == before
