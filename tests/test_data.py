"""Images to train on and to judge by: what is held out is not trained on, and what is drawn is drawn again."""

import contextlib
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from typer.testing import CliRunner

from resconv import data, nets
from resconv.cli.app import app
from resconv.data import Augment, BatchLoader, choose_augment
from resconv.data.augmentation import shift
from resconv.errors import DataError
from resconv.preprocessing import Preprocessing, of_timm, of_torchvision
from resconv.run.fingerprint import differing_parts, fingerprint
from resconv.train import Recipe, fit


def pixels(*splits):
    """Return the images of the splits, sorted, so that only what is there counts."""
    return sorted(bytes(image.flatten().tolist()) for s in splits for image in s.images)


def test_holding_out_divides_the_training_images_and_leaves_the_others_alone():
    whole = data.load("digits")
    parts = data.load("digits", holdout=0.1)
    assert pixels(parts.train, parts.val) == pixels(whole.train)
    assert pixels(parts.val) != pixels(whole.val)
    counts, every = (torch.bincount(s.labels) for s in (parts.val, whole.train))
    assert torch.all((counts - 0.1 * every).abs() <= 1)
    again = data.load("digits", holdout=0.1)
    assert torch.equal(again.val.images, parts.val.images)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(DataError, match="a share from 0 to below 1"):
        data.load("digits", holdout=share)


def test_a_folder_without_val_is_used_once_a_share_is_held_out(tmp_path):
    for label, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
        folder = tmp_path / "photos" / "train" / label
        folder.mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), tuple(c + i for c in colour)).save(folder / f"{i}.png")
    command = [
        *("train", "--model", "resnet20", "--data", f"folder:{tmp_path / 'photos'}"),
        *("--macs", "0.5", "--epochs", "1", "--sparse-epochs", "5", "--batch-size", "4"),
        *("--out", str(tmp_path / "out")),
    ]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, DataError)
    assert "--holdout 0.1" in str(refused.exception)
    accepted = CliRunner().invoke(app, [*command, "--holdout", "0.25"])
    assert accepted.exit_code == 0, (accepted.output, accepted.exception)
    other = CliRunner().invoke(app, [*command, "--holdout", "0.5"])
    assert "holdout: 0.25 there, 0.5 now" in str(other.exception)


def noise(seed, size):
    """Return an image of smooth noise, as a photo is; ``size`` is (width, height)."""
    small = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """A folder of 16 and 6 photos of 70 x 50 pixels."""
    for split, count in (("train", 8), ("val", 3)):
        for k, label in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                noise(100 * k + i, (70, 50)).save(folder / f"{i}.png")
    return f"folder:{tmp_path / 'photos'}"


def batches(loaded, augment, epoch=0, **more):
    loader = BatchLoader(
        loaded.train, 5, loaded.preprocessing, augment=augment, seed=3, num_workers=0, **more
    )
    loader.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


def test_small_images_are_changed_alike_in_memory_and_as_files(photos, monkeypatch):
    """The size of a set decides where it is held, and nothing of what training sees."""
    held = data.load(photos, image_size=24)
    monkeypatch.setattr("resconv.data.datasets.MAX_MEMORY", 0)
    lazy = data.load(photos, image_size=24)
    assert isinstance(held.train, data.Split)
    assert isinstance(lazy.train, data.LazySplit)
    assert held.preprocessing == lazy.preprocessing
    assert choose_augment(held) == choose_augment(lazy) == Augment("shift", pad=3, mirror=True)
    for epoch in range(3):
        for shuffle in (True, False):
            seen = batches(held, choose_augment(held), epoch, shuffle=shuffle)
            assert torch.equal(seen, batches(lazy, choose_augment(lazy), epoch, shuffle=shuffle))
    assert not torch.equal(seen, batches(held, None))


def test_larger_images_are_cropped_whatever_the_size_of_the_set(photos, monkeypatch):
    few = data.load(photos, image_size=65)
    monkeypatch.setattr("resconv.data.datasets.MAX_MEMORY", 0)
    many = data.load(photos, image_size=65)
    assert choose_augment(few) == choose_augment(many) == Augment("crop", mirror=True)
    assert isinstance(few.val, data.Split)  # which nothing is drawn for
    assert isinstance(many.val, data.LazySplit)
    assert torch.equal(few.val.images, many.val.in_memory().images)
    seen = batches(few, choose_augment(few), 1, shuffle=True)
    assert torch.equal(seen, batches(many, choose_augment(many), 1, shuffle=True))
    assert not torch.equal(seen, batches(many, choose_augment(many), 2, shuffle=True))


@pytest.mark.parametrize("size", [24, 65])
def test_what_is_drawn_for_an_image_depends_on_seed_epoch_and_number_alone(photos, size):
    """Not on the batch it is in, the process that reads it, or what was drawn before."""
    loaded = data.load(photos, image_size=size)
    augment = choose_augment(loaded)

    def views(**more):
        torch.manual_seed(torch.seed())
        given = {"batch_size": 16, "num_workers": 0, "seed": 1} | more
        batch_size = given.pop("batch_size")
        loader = BatchLoader(
            loaded.train, batch_size, loaded.preprocessing, augment=augment, **given
        )
        loader.set_epoch(4)
        return torch.cat([images for images, _ in loader])

    whole = views()
    assert torch.equal(views(batch_size=3), whole)
    assert torch.equal(views(num_workers=2), whole)
    shares = [views(rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), whole)
    assert not torch.equal(views(seed=2), whole)


def test_shifts_and_mirrors_are_drawn_evenly():
    """Every place occurs as often, for neighbouring numbers, seeds and epochs too."""
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    count = 20_000
    rows = torch.arange(count)
    augment = Augment("shift", pad=1, mirror=True)
    seen = shift(image.expand(count, 1, 5, 5), augment, 0, 0, rows)
    centres = seen[:, 0, 2, 2].long().bincount(minlength=26).float() / count
    places = centres[centres > 0]
    assert len(places) == 9
    assert (places - 1 / 9).abs().max() < 0.01
    left = (seen[:, 0, 2, 1].int() - seen[:, 0, 2, 2].int() == 1).float()
    assert abs(left.mean() - 0.5) < 0.015  # mirrored
    for seed, epoch in ((0, 1), (1, 0)):
        other = shift(image.expand(count, 1, 5, 5), augment, seed, epoch, rows)
        same = (other == seen).flatten(1).all(1).float().mean()
        assert abs(same - 1 / 18) < 0.01
    plain = shift(image.expand(count, 1, 5, 5), Augment("shift", pad=1), 0, 0, rows)
    assert len({tuple(i.flatten().tolist()) for i in plain}) == 9


def test_characters_are_not_mirrored_and_a_policy_may_be_asked_for(photos):
    assert not choose_augment(data.load("digits")).mirror
    loaded = data.load(photos, image_size=24)
    assert choose_augment(loaded, "none", mirror=False) == Augment("none")
    assert torch.equal(batches(loaded, Augment("none")), batches(loaded, None))
    with pytest.raises(DataError, match=r"crop.*images of 24 pixels.*larger image_size"):
        choose_augment(loaded, "crop")


def test_how_images_become_inputs_is_asked_for_or_the_nets_or_measured(photos):
    own = Preprocessing(
        size=30,
        crop_fraction=0.9,
        interpolation="bicubic",
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.2, 0.2),
        channel_order="RGB",
    )
    measured = data.load(photos).preprocessing
    assert (measured.size, measured.resized, measured.crop_fraction) == (224, 256, 0.875)
    assert measured.class_names == ("cat", "dog")
    of_the_net = data.load(photos, preprocessing=own).preprocessing
    assert of_the_net.size == 30
    assert (of_the_net.mean, of_the_net.std) == (own.mean, own.std)
    assert of_the_net.interpolation == "bicubic"
    asked = data.load(photos, preprocessing=own, image_size=40, mean=(0.0, 0.0, 0.0)).preprocessing
    assert (asked.size, asked.mean, asked.std) == (40, (0.0, 0.0, 0.0), own.std)
    # Grey images in place of colours: the net's numbers are not theirs.
    grey = data.load(photos, preprocessing=own, channels=1).preprocessing
    assert grey.channel_order == "L"
    assert grey.num_channels == 1


def test_bgr_is_rgb_the_other_way_round(photos):
    rgb = data.load(photos, image_size=24)
    inputs = Preprocessing(
        size=24,
        mean=rgb.mean[::-1],
        std=rgb.std[::-1],
        channel_order="BGR",
    )
    bgr = data.load(photos, preprocessing=inputs)
    assert torch.equal(bgr.train.images, rgb.train.images.flip(1))
    torch.testing.assert_close(batches(bgr, None), batches(rgb, None).flip(1))


def inputs_of(image, preprocessing, tmp_path):
    """Return what a net reads of an image."""
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "one" / split / label
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / "0.png")
    loaded = data.load(f"folder:{tmp_path / 'one'}", preprocessing=preprocessing)
    return next(iter(BatchLoader(loaded.val, 1, loaded.preprocessing)))[0][0]


@pytest.mark.parametrize("size", [(400, 301), (260, 260), (133, 500)])
@pytest.mark.parametrize("net", ["efficientnet_b0", "tf_efficientnetv2_b2", "vit_tiny_patch16_224"])
def test_a_net_of_timm_reads_what_timm_gives_it(net, size, tmp_path):
    timm = pytest.importorskip("timm")
    config = timm.models.get_pretrained_cfg(net).to_dict()
    mine = of_timm(config)
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=config), is_training=False
    )
    image = noise(5, size)
    wanted, found = transform(image), inputs_of(image, mine, tmp_path)
    assert_same_pixels(found, wanted, mine)
    with pytest.raises(AssertionError):
        assert_same_pixels(found.flip(2), wanted, mine)


def assert_same_pixels(found, wanted, preprocessing):
    """To two grey levels: Pillow rounds to whole ones after each of its two passes, and its weights to 22 bits."""
    level = 2.01 / 255 / min(preprocessing.std)
    torch.testing.assert_close(found, wanted, rtol=0, atol=level)


def test_weights_of_torchvision_say_how_to_prepare_images(tmp_path):
    from torchvision.models import ResNet50_Weights

    weights = ResNet50_Weights.IMAGENET1K_V2
    mine = of_torchvision(weights.transforms(), tuple(weights.meta["categories"]))
    assert (mine.size, mine.resized) == (224, 232)
    assert len(mine.class_names) == 1000
    image = noise(5, (400, 300))
    wanted, found = weights.transforms()(image), inputs_of(image, mine, tmp_path)
    assert_same_pixels(found, wanted, mine)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"crop_fraction": 1.5}, "crop_fraction=1.5"),
        ({"interpolation": "lanczos"}, "choose one of nearest"),
        ({"std": (0.0, 1.0, 1.0)}, "std above 0"),
        ({"mean": (0.5,)}, "1 values of mean and 3 of std"),
        ({"mean": (float("nan"), 0.5, 0.5)}, "finite"),
        ({"channel_order": "L"}, "one value for each of L"),
    ],
)
def test_a_preparation_that_makes_no_sense_is_refused(wrong, message):
    right = {"size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3, "channel_order": "RGB"}
    assert Preprocessing(**right).num_channels == 3
    with pytest.raises(DataError, match=message):
        Preprocessing(**right | wrong)


def encoded(seed):
    buffer = io.BytesIO()
    noise(seed, (20, 20)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that writes a set as the hub has them, in place of one from the network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def write(name="set", splits=("train", "test"), labels=(0, 1, 2, 1), names="abc", kind="Image"):
        folder = tmp_path / name
        folder.mkdir()
        images = [{"bytes": encoded(i), "path": None} for i in range(len(labels))]
        if kind == "path":
            images = [{"bytes": None, "path": "/etc/hostname"}] * len(labels)
        shape = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table([pa.array(images, shape), pa.array(labels)], names=["img", "fine_label"])
        features = {
            "img": {"_type": "Image"},
            "fine_label": {"_type": "ClassLabel", "names": list(names)},
        }
        table = table.replace_schema_metadata(
            {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        )
        for split in splits:
            pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
        return f"hf:{folder}"

    return write


def test_a_set_of_the_hub_is_read_by_the_kinds_of_its_columns(hub):
    loaded = data.load(hub())
    assert loaded.class_names == ("a", "b", "c")
    assert sorted(loaded.train.labels.tolist()) == [0, 1, 1, 2]
    wanted = [torch.tensor(np.array(noise(i, (20, 20)))).permute(2, 0, 1) for i in range(4)]
    for image, label in zip(loaded.train.images, loaded.train.labels.tolist(), strict=True):
        row = next(i for i, w in enumerate(wanted) if torch.equal(image, w))
        assert label == (0, 1, 2, 1)[row]


def test_a_set_of_the_hub_that_cannot_be_trained_on_is_named(hub):
    cases = (
        ({"splits": ("train",)}, "no split validation or .* test .*--holdout 0.1"),
        ({"splits": ("test",)}, "no split 'train'"),
        ({"labels": (0, 1, -1, 1)}, "Row 2 of .* has the label -1"),
        ({"kind": "path"}, "Row . of .* has no image bytes"),
    )
    for i, (given, message) in enumerate(cases):
        with pytest.raises(DataError, match=message):
            data.load(hub(f"set{i}", **given))
    with pytest.raises(DataError, match="cannot be loaded"):
        data.load("hf:/no/such/folder")


def test_files_and_sets_of_the_hub_have_fingerprints(photos, hub, tmp_path, monkeypatch):
    sets = [photos, hub()]
    first = [fingerprint(data.load(name, image_size=70)) for name in sets]
    assert first == [fingerprint(data.load(name, image_size=70)) for name in sets]
    assert "names of train" in first[0]
    file = tmp_path / "photos" / "train" / "cat" / "0.png"
    noise(999, (70, 50)).save(file)
    changed = differing_parts(first[0], fingerprint(data.load(photos, image_size=70)))
    assert "images of train" in changed
    assert "labels of train" not in changed
    other = fingerprint(data.load(hub("other", labels=(0, 1, 2, 2)), image_size=70))
    assert "labels of train" in differing_parts(first[1], other)


@pytest.mark.parametrize("size", [24, 65])
def test_a_training_that_was_stopped_goes_on_to_the_bit(photos, size, tmp_path):
    """By shifts of squares in memory, and by crops of files that processes read."""

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    loaded = data.load(photos, image_size=size)

    def train(name, recipe, *callbacks):
        torch.manual_seed(0)
        net = nets.create("resnet20", num_classes=2)
        place = tmp_path / name
        with contextlib.suppress(KeyboardInterrupt):
            fit(net, loaded, recipe, place, progress=False, callbacks=callbacks)
        return net.state_dict()

    recipe = Recipe(2, lr=0.01, batch_size=4)
    whole = train("whole", recipe)
    stopped = train("stopped", recipe, Stop())
    resumed = train("stopped", recipe)
    assert any(not torch.equal(stopped[k], v) for k, v in whole.items())
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())
    plain = Recipe(2, lr=0.01, batch_size=4, augment=Augment("none"))
    assert any(not torch.equal(train("plain", plain)[k], v) for k, v in whole.items())
