"""Files of a run and saved nets that were damaged, or made to cost: named, and refused at once."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from msgspec import Struct

import resconv
from benchmarks.mutants import LARGE
from resconv import nets
from resconv.analysis.input_spec import InputSpec, make_inputs
from resconv.errors import LoadError, PlanError, ResConvError, RunError
from resconv.json_files import parse_json, read_json, to_json
from resconv.run import Config, RunFolder
from resconv.run.metrics import Metrics
from resconv.run.report.table import rows
from resconv.storage.schema import seal
from resconv.storage.sources import check_source
from resconv.surgery.provenance import Source


class Inner(Struct, frozen=True, forbid_unknown_fields=True):
    names: tuple[str, ...]
    share: float = 0.5


class Outer(Struct):
    inner: Inner | None = None
    count: int = 0
    text: str | None = ""
    each: dict[str, dict[str, float]] = {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"inner": {"names": "a"}}', "'inner'.names is 'a', needed is a list"),
        ('{"inner": {"names": ["a", 1]}}', r"'inner'.names\[1\] is 1, needed is text"),
        ('{"inner": {}}', "'inner' has no 'names'"),
        ('{"inner": {"names": [], "x": 1}}', "'inner' has unknown keys: 'x'"),
        ('{"inner": {"names": [], "share": true}}', "share is True, needed is a finite number"),
        ('{"inner": {"names": [], "share": 1e999}}', "share is inf, which is out of range"),
        ('{"inner": {"names": ["\\ud800"]}}', "which is no text"),
        ('{"count": 1.5}', "'count' is 1.5, needed is a whole number"),
        ('{"count": 9223372036854775808}', "out of range"),
        (
            '{"inner": {"names": [], "share": 1' + "0" * 400 + "}}",
            "share is a number of many digits",
        ),
        ('{"count": NaN}', "NaN is no JSON number"),
        ('{"count": ' + "9" * 5000 + "}", "not JSON|out of range"),
        ('{"count": 1, "count": 2}', "a key stands twice"),
        ('{"text": 1}', "'text' is 1, needed is text or null"),
        (
            '{"each": {"a": {"x": 1}, "b": {"y": 2, "z": "3"}, "c": {"z": "4"}}}',
            r"'each'\.b\.z is '3', needed is a finite number",
        ),
        ('{"x` - at `$.each[...]": "\\ud800"}', "which is no text"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ("null", "the whole is None, needed is an object"),
        ("", "not JSON"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_a_fault_is_named_with_its_field(text, message):
    with pytest.raises(RunError, match=f"the file.*({message})"):
        parse_json(text, Outer, "the file", RunError)


def test_what_is_right_is_read_as_it_was_written():
    text = '{"inner": {"names": ["a", "\\u00e9"]}, "count": 3, "text": null, "more": [1]}'
    assert parse_json(text, Outer, "", RunError) == Outer(Inner(("a", "é")), 3, None)


class Text(str):
    pass


def test_numbers_and_texts_of_other_classes_are_written_as_plain_ones():
    given = Outer(Inner((Text("a"),), np.float64(0.25)), np.int64(3), torch.__version__)
    back = parse_json(to_json(given), Outer, "", RunError)
    assert back == Outer(Inner(("a",), 0.25), 3, str(torch.__version__))
    with pytest.raises(TypeError, match="a Tensor is no plain data"):
        to_json(Outer(count=torch.ones(2)))


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "large.json").write_bytes(b" " * (17 * 2**20))
    for name, message in (
        ("pipe.json", "is no file"),
        (".", "is no file"),
        ("link.json", "No such file"),
        ("large.json", "larger than 16 MiB"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(RunError, match=message):
            read_json(tmp_path / name, dict, RunError)


@pytest.fixture
def run(tmp_path):
    folder = RunFolder.begin(tmp_path / "run", Config.of(model="resnet20", data="digits", macs=0.5))
    folder.add_metrics(top1_dense=90.0, macs_dense=100, macs_compact=50)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "config.json",
            '{"model": "x", "data": "y", "lr": "0.1"}',
            r"config\.json.*training\.lr: expected `float \| null`, got `str`",
        ),
        ("config.json", '{"model": "x"}', r"config\.json.*missing required field `source`"),
        ("config.json", '{"model": "x", "data": "y", "macs": 7.5}', r"config\.json: macs=7\.5"),
        (
            "metrics.json",
            '{"top1_dense": "90"}',
            r"metrics\.json.*'top1_dense' is '90'.*delete the",
        ),
        ("metrics.json", '{"latency": {"torch": {"dense_ms": 1}}}', r"torch has no 'compact_ms'"),
        ("scales.json", '[[1, {"a": null}, {}, 1, null]]', r"'steps'\[0\]\.scales\.a is None"),
        ("scales.json", "[[1]]", r"scales\.json.*'steps'\[0\] has no 'scales'"),
        ("scales.json", '{"version": 3, "steps": []}', "has version 3; this resconv reads up to 2"),
        ("metrics.json", '{"version": 2}', r"has version 2; .*pip install -U"),
        ("metrics.json", '{"version": "1"}', "'version' is '1', needed is a whole number"),
        ("metrics.json", '{"top2": 1}', r"metrics\.json.*unknown keys: 'top2'"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(run, name, content, message):
    (run / name).write_text(content)

    def read():
        run.config()
        run.metrics()
        run.history()

    with pytest.raises(ResConvError, match=message):
        read()
    assert rows(parse_json('{"macs_dense": 0, "macs_compact": 5}', Metrics, "", RunError))


def saved(folder):
    resconv.save(
        nets.create("resnet20", num_classes=4).eval(),
        folder,
        example_inputs=torch.zeros(1, 3, 8, 8),
    )
    return folder


def forge(folder, **values):
    file = folder / "model.json"
    file.write_text(json.dumps(seal({**json.loads(file.read_text()), **values})))


# The memory is that of a process of its own, whose limit is on what it writes to.
READ = """
import resource, sys, torch, json
from pathlib import Path
import timm, torchvision, resconv
from resconv.errors import LoadError
from resconv.analysis.input_spec import make_inputs
from resconv.storage.schema import read_header
torch.set_num_threads(1)
peak = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))
before, most = peak(), 0
for place in sys.argv[1:]:
    try:
        resconv.load(place)
        make_inputs(read_header(Path(place)).inputs, torch.Generator())
        print('loaded')
    except LoadError as error:
        print('refused')
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_asks_for_much_is_refused_before_it_is_made(tmp_path):
    places = []
    for name, values in LARGE.items():
        places.append(saved(tmp_path / name))
        forge(places[-1], **values)
    places.append(saved(tmp_path / "the control"))
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, places)], capture_output=True, text=True
    )
    *ends, mib = done.stdout.split()
    assert ends == ["refused"] * len(LARGE) + ["loaded"], done.stderr
    assert int(mib) < 1024


def test_inputs_that_fit_are_made():
    one = InputSpec(shape=(64, 3, 512, 512), dtype="float32")
    (made,) = make_inputs(InputSpec(items=(one,)), torch.Generator())
    assert made.shape == (64, 3, 512, 512)
    with pytest.raises(LoadError, match="402,653,184 bytes"):
        make_inputs(InputSpec(items=(one, one)), torch.Generator())


@pytest.mark.parametrize("key", ["drop_path_rate", "drop_path", "init_weights", "weight_init"])
def test_a_keyword_that_only_sounds_like_a_path_is_no_danger(key):
    assert check_source(Source("timm:x", {key: 0.1})) is None


@pytest.mark.parametrize(
    "key",
    [
        *("pretrained", "pretrained_cfg", "checkpoint_path", "weights", "weights_backbone", "url"),
        *(
            "cache_dir",
            "config_path",
            "hf_hub_id",
            "file",
            "filename",
            "path",
            "model_path",
            "block_fn",
        ),
        *(
            "pretrained_filter_fn",
            "pretrained_backbone",
            "pretrained_cfg_overlay",
            "CHECKPOINT_PATH",
        ),
    ],
)
def test_a_keyword_that_fetches_is_refused(key):
    assert "fetch or read" in check_source(Source("timm:x", {key: True}))


def test_a_net_with_stochastic_depth_comes_back(tmp_path):
    net = nets.create("timm:convnext_atto", drop_path_rate=0.1, num_classes=3).eval()
    resconv.save(net, tmp_path / "net")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(resconv.load(tmp_path / "net")(x), net(x))


@pytest.mark.parametrize("name", ["\x1b[2J\x07", "\udcff", "a\rb", "\u202egnp"])
def test_no_message_holds_what_a_terminal_obeys(name):
    with pytest.raises(PlanError) as error:
        resconv.Plan.from_json(json.dumps({"remove": [], name: 1}))
    text = str(error.value)
    assert name not in text
    assert text.encode()  # which a lone surrogate would not survive
    assert text.isprintable()
    assert math.isfinite(len(text))


@pytest.mark.parametrize("package", ["lightning", "torchmetrics"])
def test_a_missing_package_is_named_with_its_extra(package):
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from resconv.errors import MissingExtraError\n"
        "try: import resconv.train\n"
        "except MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"needs the package '{package}'" in done.stdout, done.stderr
    assert "pip install 'resconv[train]'" in done.stdout
