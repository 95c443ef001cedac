"""The settings of a run: each defined once, for Python, the command line and ``config.json`` alike."""

import json
import subprocess
import sys
from typing import get_args

import pytest
from typer.testing import CliRunner

from resconv import run
from resconv.cli.app import app
from resconv.data.augmentation import AugmentKind
from resconv.errors import ResConvError, RunError
from resconv.run.config import Config, Data, Net, Target, Training
from resconv.run.settings import settings
from resconv.train.mixing import MIXES
from resconv.train.precision import PRECISIONS

LEAST = {"model": "resnet20", "data": "digits"}
# For every option something else than its default, as it is typed and as the setting has it.
OTHERS = {
    "model": ("vgg16_bn", "vgg16_bn"),
    "weights": ("w.pt", "w.pt"),
    "pretrained": (None, True),
    "data": ("cifar10", "cifar10"),
    "image_size": ("40", 40),
    "crop_fraction": ("0.9", 0.9),
    "interpolation": ("bicubic", "bicubic"),
    "mean": ("0.5,0.25,0.125", (0.5, 0.25, 0.125)),
    "std": ("1,2,3", (1.0, 2.0, 3.0)),
    "channels": ("3", 3),
    "num_classes": ("12", 12),
    "augment": ("none", "none"),
    "mirror": (None, True),
    "holdout": ("0.2", 0.2),
    "limit": ("7", 7),
    "macs": ("50%", 0.5),
    "num_params": ("200k", 200_000),
    "latency_ms": ("3", 3.0),
    "latency": ("0.5", 0.5),
    "units": ("blocks", "blocks"),
    "recalibrate": (None, True),
    "runtime": ("onnxruntime", "onnxruntime"),
    "latency_batch": ("2", 2),
    "threads": ("1", 1),
    "epochs": ("3", 3),
    "sparse_epochs": ("3", 3),
    "finetune_epochs": ("3", 3),
    "distill": (None, True),
    "distill_share": ("0.3", 0.3),
    "hints": (None, True),
    "ema": ("0.99", 0.99),
    "control": (None, True),
    "mix": ("cutmix", "cutmix"),
    "recipe": ("transfer", "transfer"),
    "lr": ("0.2", 0.2),
    "sparse_lr": ("0.2", 0.2),
    "finetune_lr": ("0.2", 0.2),
    "batch_size": ("8", 8),
    "seed": ("3", 3),
    "precision": ("32-true", "32-true"),
    "devices": ("2", 2),
    "cuda_graphs": (None, True),
}
# What a setting cannot be without.
WITH = {
    "hints": {"distill": True},
    **{name: {"latency_ms": 3.0} for name in ("runtime", "latency_batch", "threads")},
}
SHOWN = [s for s in settings() if not s.limits.hidden]


def typed(values):
    """Return settings as options, in words."""
    by_name = {s.name: s for s in settings()}
    words = []
    for name, value in values.items():
        option = by_name[name].option
        words += [option] if value is True else [option, str(value)]
    return words


@pytest.fixture
def parsed(monkeypatch):
    """Return a function that gives the Config of a command line."""
    found = []

    def begin(out, config, **more):
        found.append(config)
        raise RunError("parsed")

    monkeypatch.setattr(run, "begin", begin)

    def parse(*words):
        result = CliRunner().invoke(app, ["compress", "--out", "x", *words])
        if str(result.exception) != "parsed":
            raise result.exception or AssertionError(result.output)
        return found.pop()

    return parse


@pytest.mark.parametrize("setting", SHOWN, ids=lambda s: s.name)
def test_a_setting_is_an_option_and_stands_in_the_file(setting, parsed):
    text, value = OTHERS[setting.name]
    others = WITH.get(setting.name, {})
    given = typed({**LEAST, **others, setting.name: True if text is None else text})
    config = parsed(*given)
    assert setting.of(config) == value != setting.default
    assert type(setting.of(config)) is type(value)
    assert config == Config.of(**{**LEAST, **others, setting.name: value})
    assert Config.from_content(json.loads(json.dumps(config.content()))) == config
    # Nothing else changed by it.
    without = Config.of(**{**LEAST, **others})
    changed = {k for k, v in config.values().items() if v != without.values()[k]}
    assert changed == {setting.name}
    if value is True:
        negative = setting.option.replace("--", "--no-", 1)
        assert setting.of(parsed(*typed(LEAST), negative)) is False


def test_without_options_the_defaults_hold(parsed):
    assert parsed(*typed(LEAST)) == Config(net=Net(model="resnet20"), data=Data(source="digits"))


def test_every_setting_has_a_help_text_and_one_name():
    names = [s.name for s in settings()]
    assert len(set(names)) == len(names) == len({s.option for s in settings()})
    assert set(OTHERS) == {s.name for s in SHOWN}
    help_text = " ".join(CliRunner().invoke(app, ["compress", "--help"]).output.split())
    for setting in SHOWN:
        assert setting.help.endswith(".")
        assert setting.option in help_text


def test_the_choices_are_those_that_there_are():
    """They are named with the settings as well, since to look them up takes torch."""
    choices = {s.name: s.choices for s in settings() if s.choices}
    assert choices["precision"] == PRECISIONS
    assert choices["mix"] == tuple(MIXES)
    assert choices["augment"] == get_args(AugmentKind)


def test_a_file_of_the_first_version_is_read():
    """That had no groups; --devices had a word for its default."""
    old = json.loads(
        '{"model": "resnet20", "data": "digits", "macs": 0.5, "num_params": null, "latency_ms": null, '
        '"latency": 0.5, "runtime": "onnxruntime", "latency_batch": 4, "threads": 2, "weights": null, '
        '"epochs": 3, "sparse_epochs": null, "finetune_epochs": null, "distill": false, "hints": false, '
        '"mix": null, "recalibrate": null, "units": "all", "lr": 0.1, "sparse_lr": null, '
        '"finetune_lr": null, "batch_size": 128, "seed": 0, "image_size": null, "channels": null, '
        '"holdout": 0.0, "limit": null, "precision": "auto", "devices": "auto", "cuda_graphs": false, '
        '"progress": true}'
    )
    config = Config.from_content(old)
    assert config.deployment.batch == 4
    assert config.target == Target(macs=0.5, latency=0.5)
    assert config.training == Training(epochs=3)
    # What a finished stage of such a run noted of its settings is what this one has.
    defaults = {s.name: s.default for s in settings()}
    bearing = config.bearing()
    noted = {k: old.get(k, defaults[k]) for k in bearing}
    # All units were layers and blocks then; a run that stopped between its stages says so, and is refused.
    assert (noted.pop("units"), bearing.pop("units")) == ("all", "layers,blocks")
    assert noted == bearing


def test_a_run_of_the_first_version_goes_on(tmp_path):
    config = Config.of(**LEAST, macs=0.5)
    folder = run.RunFolder.begin(tmp_path / "run", config)
    old = {k: v for k, v in config.values().items() if v is not None}
    (folder / "config.json").write_text(json.dumps(old | {"devices": "auto"}))
    assert folder.config() == config
    assert folder.holds(config)
    assert not folder.holds(Config.of(**LEAST, macs=0.4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3, and this resconv reads 2"),
        ({"version": "x"}, "version: expected `int`"),
        ({"more": 1}, "unknown field `more`"),
        ({"data": {}}, "data: object missing required field `source`"),
        ({"training": {"lr": True}}, r"training\.lr: expected `float \| null`, got `bool`"),
        ({"training": {"epoch": 3}}, "training: object contains unknown field `epoch`"),
        ({"training": {"precision": "fp8"}}, "precision='fp8': choose one of auto"),
        ({"training": [3]}, "training: expected `object`, got `array`"),
        ({"training": {"seed": -1, "batch_size": 0}}, "batch_size=0: at least 1; seed=-1"),
    ],
)
def test_a_file_that_holds_something_else_is_named(change, message, tmp_path):
    folder = run.RunFolder.begin(tmp_path / "run", Config.of(**LEAST, macs=0.5))
    (folder / "config.json").write_text(json.dumps(folder.config().content() | change))
    with pytest.raises(RunError, match=r"config\.json: .*" + message):
        folder.config()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config.of(**LEAST, epoch=3), "no setting 'epoch'"),
        (lambda: Config.of(model="resnet20"), "data: .* missing required field `source`"),
        (
            lambda: Config.of(**LEAST, lr="0.1"),
            r"training\.lr: expected `float \| null`, got `str`",
        ),
        (
            lambda: Config(net=Net(model="x"), data=Data(source="y"), training=Training(lr="0.1")),
            r"training\.lr: expected `float \| null`, got `str`",
        ),
        (
            lambda: Config(net=Net(model="x"), data=Data(source="y", holdout=float("nan"))),
            "holdout=nan: a share from 0 to below 1",
        ),
        (lambda: Config.of(**LEAST, crop_fraction=1.2), "a share above 0 and up to 1"),
        (lambda: Config.of(**LEAST, seed=2**32), "seed=4294967296: below 4294967296"),
        (lambda: Config.of(**LEAST, lr=float("inf")), "lr=inf: it must be above 0, and finite"),
    ],
)
def test_what_is_wrong_in_python_is_named(make, message):
    with pytest.raises(RunError, match=message):
        make()


def test_numbers_that_are_none_are_refused(parsed):
    with pytest.raises(ResConvError, match=r"--mean 0\.5;0\.5: give one number a channel"):
        parsed(*typed(LEAST), "--mean", "0.5;0.5")


def test_help_waits_for_no_heavy_import():
    """Nor does ``import resconv``; the control needs torch."""
    code = (
        "import sys\n"
        "heavy = ('torch', 'datasets', 'torchvision', 'lightning', 'pyarrow', 'pandas')\n"
        "import resconv\n"
        "from typer.testing import CliRunner\n"
        "from resconv.cli.app import app\n"
        "assert CliRunner().invoke(app, ['compress', '--help']).exit_code == 0\n"
        "print([m for m in heavy if m in sys.modules])\n"
        "resconv.run.begin\n"
        "print('torch' in sys.modules, 'datasets' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "True False"], done.stderr
