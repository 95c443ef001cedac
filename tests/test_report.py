"""The pages about runs: what they say is so, they read without a network or scripts, and small."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import msgspec
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import resconv
from resconv.cli.app import app
from resconv.cli.settings import takes_config
from resconv.data import ImageData, Split
from resconv.errors import RunError
from resconv.planning.plan import Plan
from resconv.preprocessing import Preprocessing
from resconv.run import Config, RunFolder
from resconv.run.metrics import History, Measured, Metrics, Times, Verified
from resconv.run.report import charts, write_report
from resconv.run.report.comparison import compare_runs
from resconv.run.report.gathering import Nets, command_of, epochs_of
from resconv.run.report.judging import judge
from resconv.run.report.layers import Layer, computed_layers, drawn, judged
from resconv.selection.outcome import Snapshot

from .helpers import Block

CONFIG = Config.of(model="resnet20", data="digits", macs=0.5)


def net(width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.ReLU(),
        Block(width),
        Block(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    ).eval()


def images(number=12):
    pixels = torch.randint(0, 256, (number, 1, 8, 8), dtype=torch.uint8)
    split = Split(pixels, torch.arange(number) % 3)
    own = Preprocessing(
        size=8, mean=(0.5,), std=(0.2,), channel_order="L", class_names=("a", "b", "<c>")
    )
    return ImageData("test", split, split, own)


# --- the layers -------------------------------------------------------------------------------


def outcome(plan):
    dense, x = net(), torch.randn(2, 1, 8, 8)
    model = resconv.convert(dense, x, start="identity")
    for gate in resconv.gates(model).values():
        if gate.control is not None:
            gate.control.data.fill_(1.0)
    compact = resconv.prune(model, plan) if plan.remove else resconv.fuse(model, x)
    left = computed_layers(compact, x)
    found = judged(
        computed_layers(dense, x), [la.name for la in left], plan, plan.remove, {"0": "1 in, 4 out"}
    )
    return found, dict(compact.named_modules())


@pytest.mark.parametrize("gone", [(), ("2",), ("2.conv1",), ("2", "3")])
def test_a_layer_is_drawn_as_kept_where_the_compact_net_has_it(gone):
    plan = Plan(gone, scales={"2": 0.0, "2.conv1": 0.0, "3": 0.25})
    found, left = outcome(plan)
    assert [la.name for la in found] == ["0", "2.conv1", "2.conv2", "3.conv1", "3.conv2", "6"]
    for layer in found:
        assert layer.kept is isinstance(left.get(layer.name), nn.Conv2d | nn.Linear), layer
    assert sum(not la.kept for la in found) == sum(1 if "conv" in g else 2 for g in gone)
    why = {la.name: la.why for la in found}
    assert why["0"] == "1 in, 4 out"
    if "2" in gone:
        assert why["2.conv2"] == "the scale of 2 arrived at 0"
    if "3" in gone:  # a scale that is not 0 is not said to be
        assert "0.25" in why["3.conv1"]
        assert "arrived" not in why["3.conv1"]


def test_layers_say_what_they_are():
    layers = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1, stride=2), nn.ConvTranspose2d(8, 2, 2)
    )
    said = [
        (la.what, la.channels, la.side) for la in computed_layers(layers, torch.randn(1, 4, 8, 8))
    ]
    assert said == [
        ("3x3 depthwise conv", 4, "6x6"),
        ("1x1 conv, stride 2", 8, "3x3"),
        ("2x2 transposed conv", 2, "4x4"),
    ]


def test_no_group_of_layers_is_wider_than_a_phone():
    layers = [Layer(str(i), "conv", 8 + i, "8x8" if i < 41 else "4x4") for i in range(50)]
    layers.append(Layer("head", "linear", 1000, ""))
    groups = drawn(layers)
    assert [la for group in groups for la in group.layers] == layers
    assert [len(g.layers) for g in groups] == [13, 14, 14, 9, 1]  # evenly
    tall = {la.name: h for g in groups for la, h in zip(g.layers, g.heights, strict=True)}
    assert tall["head"] == tall["49"] == 110 > tall["0"] > 0
    assert all(15 * len(g.layers) <= 300 and len({la.side for la in g.layers}) == 1 for g in groups)


# --- what the nets say of the images ----------------------------------------------------------


def test_a_net_against_itself_loses_nothing():
    data, model = images(), net()
    found = judge(model, model, data)
    assert (found.lost, found.gained, found.samples) == (0, 0, ())
    assert all(c.dense == c.compact and c.num_images == 4 for c in found.classes)


def test_what_a_net_lost_is_shown():
    class Knows(nn.Module):
        """Right about every image, or of another net: always "b"."""

        def __init__(self, answers):
            super().__init__()
            self.answers, self.at = answers, 0

        def forward(self, x):
            rows = self.answers[self.at : self.at + len(x)]
            self.at += len(x)
            return nn.functional.one_hot(rows, 3).float()

    data = images()
    found = judge(Knows(data.val.labels), Knows(torch.ones(12, dtype=torch.int64)), data)
    assert [(c.name, c.dense, c.compact) for c in found.classes] == [
        ("a", 100, 0),
        ("b", 100, 100),
        ("<c>", 100, 0),
    ]
    assert (found.lost, found.gained, len(found.samples)) == (8, 0, 8)
    assert {(s.label, s.said) for s in found.samples} == {("a", "b"), ("<c>", "b")}
    # No dense net was trained: there is nothing to lose.
    alone = judge(None, Knows(data.val.labels), data)
    assert alone.samples == ()
    assert all(c.dense is None for c in alone.classes)


# --- the page ---------------------------------------------------------------------------------


class Page(HTMLParser):
    """Notes what a reader without scripts or network would miss."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.captions, self.plain = [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        for name, value in attrs:
            if name in ("src", "href") and not value.startswith(("data:", "#")):
                self.plain.append(value)

    handle_startendtag = handle_starttag

    def of(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def check_page(text):
    page = Page(text)
    assert page.of("script") == []
    assert page.of("link") == []
    assert page.plain == []
    assert "http" not in text
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.of("th"))
    assert all("alt" in attrs for attrs in page.of("img"))
    assert page.of("html") == [{"lang": "en"}]
    for svg in re.findall(r"<svg[^>]*role=.*?</svg>", text, re.S):
        drawing = ElementTree.fromstring(svg)
        assert drawing[0].tag == "title"
        for kind in ("rect", "circle", "polyline"):
            assert all(mark.find("title") is not None for mark in drawing.iter(kind)), svg[:200]
    return page


@pytest.fixture
def written(tmp_path):
    metrics = Metrics(
        top1_dense=90.0,
        top1_compact=88.0,
        epochs_dense=2,
        epochs_sparse=3,
        macs_dense=4_000_000,
        macs_compact=2_000_000,
        num_params_dense=40_000,
        num_params_compact=10_000,
        removed_units=("2",),
        latency={"torch": Times(2.0, 1.0, 0.5), "onnxruntime": Times(0.4, 0.1, 0.25)},
        measured=Measured(1, 1, 50, 8),
        verify=Verified(0, 1e-7, 1e-4),
        warnings={"prune": ["<b>watch out</b>"]},
    )
    plan = Plan(("2",), scales={"2": 0.0, "3": 0.25, "<x>": 1.0})
    found, _ = outcome(plan)
    steps = tuple(Snapshot(i, {"2": 1 - i / 300, "<x>": 1.0}, {}, 1 - i / 600) for i in range(300))
    logs = tmp_path / "logs/sparse"
    logs.mkdir(parents=True)
    (logs / "metrics.csv").write_text(
        "epoch,step,loss,top1,macs\n0,20,1.5,,\n0,30,,0.5,0.9\n1,60,,0.8,0.5\n"
    )
    nets = Nets(tuple(found), (), judge(net(), net(), images()))
    write_report(tmp_path / "report.html", CONFIG, metrics, plan, History(steps), nets=nets)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone_and_can_be_read_aloud(written):
    page = check_page(written)
    assert "&lt;b&gt;watch out" in written
    assert "<b>watch" not in written
    assert "prefers-color-scheme: dark" in written
    assert page.of("meta")[1] == {
        "name": "viewport",
        "content": "width=device-width, initial-scale=1",
    }
    with pytest.raises(AssertionError):
        check_page(written.replace("</body>", '<script src="https://x.y/z.js"></script></body>'))
    with pytest.raises(AssertionError):
        check_page(written.replace("<caption>", "<b>"))


def test_the_cards_say_before_and_after(written):
    cards = re.findall(r'<section class="card">(.*?)</section>', written, re.S)
    texts = [re.sub(r"<[^>]+>", "", card).replace("&rarr;", "->") for card in cards]
    assert [t.split("\n")[0] for t in texts] == ["Accuracy", "Latency", "Size"]
    assert "90.00 -> 88.00 %" in texts[0]
    assert "-2.00 points" in texts[0]
    assert "epochs: 2 before, 5 after" in texts[0]
    assert "0.4 -> 0.1 ms" in texts[1]  # ONNX Runtime's
    assert "4.00 times as fast" in texts[1]
    assert "40 k -> 10 k" in texts[2]
    assert "parameters, -75.0%" in texts[2]
    assert "2.0 points of accuracy are lost" in written


def test_epochs_are_read_from_the_logs(written, tmp_path):
    assert [(e.stage, e.number, e.top1, e.macs) for e in epochs_of(tmp_path / "logs")] == [
        ("sparse", 1, 50.0, 0.9),
        ("sparse", 2, 80.0, 0.5),
    ]
    assert epochs_of(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "macs": 0.25,
            "mean": (0.5, 0.25, 1 / 3),
            "distill": True,
            "lr": 1e-3,
            "pretrained": False,
        },
        {"num_params": 40_000, "units": "blocks,gates", "epochs": 0, "weights": None, "seed": 7},
        {"latency_ms": 1.25, "runtime": "onnxruntime", "threads": 1, "image_size": 32},
    ],
)
def test_the_command_on_the_page_makes_the_same_settings(values, tmp_path):
    config = Config.of(model="resnet20", data="folder:my photos", **({"macs": 0.5} | values))
    application, made = typer.Typer(), []

    @application.command()
    @takes_config
    def command(given: Config, out: Annotated[Path, typer.Option()]) -> None:
        made.append(given)

    import shlex

    words = shlex.split(command_of(config, tmp_path / "a b"))
    result = CliRunner().invoke(application, words[2:])
    assert result.exit_code == 0, result.output
    assert made == [config]


# --- charts -----------------------------------------------------------------------------------


def test_a_chart_is_text_with_titles():
    text = charts.lines("<A>", [charts.Line("one & two", "line-main", [(0, 1), (5, 3)])], "x < y")
    drawing = ElementTree.fromstring(text)
    assert drawing[0].text == "<A>"
    assert "x < y" in [t.text for t in drawing.iter("text")]
    assert drawing.find("polyline/title").text == "one & two"
    assert charts.lines("empty", [], "x") == ""


@pytest.mark.parametrize(
    "span", [(0, 105), (83.4, 98.1), (0, 0.0012), (-3, 3), (0, 40_000), (5, 5)]
)
def test_ticks_are_few_and_inside(span):
    ticks = charts.nice_ticks(*span)
    assert 1 <= len(ticks) <= 8
    assert all(span[0] <= t <= span[1] + 1e-9 for t in ticks)


def test_long_lines_keep_their_ends():
    points = [(float(i), float(i)) for i in range(1001)]
    text = charts.lines("t", [charts.Line("a", "k", points)], "x")
    drawn_points = ElementTree.fromstring(text).find("polyline").get("points").split()
    assert len(drawn_points) <= 130
    assert drawn_points[0].startswith("44")
    assert drawn_points[-1].startswith("350")


# --- several runs -----------------------------------------------------------------------------


def make_run(path, top1, ms, macs, **other):
    folder = RunFolder.begin(path, CONFIG)
    values = {
        "top1_dense": 90.0,
        "top1_compact": top1,
        "macs_dense": 4_000_000,
        "macs_compact": macs,
        "latency": {"onnxruntime": Times(4.0, ms, ms / 4)},
        "machine": "one",
    }
    folder.add_metrics(**msgspec.to_builtins(values | other))
    return path


def test_the_front_is_what_no_other_net_beats(tmp_path):
    draw = torch.Generator().manual_seed(3)
    runs = [
        make_run(tmp_path / str(i), *torch.randint(1, 9, (2,), generator=draw).tolist(), 1_000_000)
        for i in range(6)
    ]
    found = compare_runs(runs)
    front = sorted((n.cost, n.top1) for n in found.nets if n.on_front)
    assert 0 < len(front) < len(found.nets)
    # Along the front more time buys more accuracy, and whoever is off it is beaten by one on it.
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(front) if (a, b) != (c, d))
    for one in found.nets:
        beaten = any(
            a <= one.cost and b >= one.top1 and (a, b) != (one.cost, one.top1) for a, b in front
        )
        assert beaten is not one.on_front


def test_what_does_not_compare_is_said(tmp_path):
    one = make_run(tmp_path / "one", 89.0, 1.0, 2_000_000)
    assert compare_runs([one, make_run(tmp_path / "same", 88.0, 2.0, 1_000_000)]).notes == ()
    other = make_run(tmp_path / "two", 88.0, 2.0, 1_000_000, machine="two")
    assert "different machines" in compare_runs([one, other]).notes[0]
    untimed = make_run(tmp_path / "three", 88.0, 2.0, 1_000_000, latency={})
    found = compare_runs([one, untimed])
    assert found.cost == "MACs"
    assert [n.cost for n in found.nets] == [4e6, 2e6, 4e6, 1e6]


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    one = make_run(tmp_path / "one", 89.0, 1.0, 2_000_000)
    with pytest.raises(RunError, match="Two runs or more"):
        compare_runs([one])
    with pytest.raises(RunError, match="given twice"):
        compare_runs([one, one])
    RunFolder.begin(tmp_path / "two", CONFIG)
    with pytest.raises(RunError, match="not finished"):
        compare_runs([one, tmp_path / "two"])


def test_compare_writes_a_page_and_json(tmp_path):
    runs = [make_run(tmp_path / n, 91.0 + i, 1.0 + i, 10**6) for i, n in enumerate("ab")]
    page = tmp_path / "both.html"
    done = CliRunner().invoke(app, ["compare", *map(str, runs), "--to", str(page), "--json"])
    assert done.exit_code == 0, done.output
    nets = msgspec.json.decode(done.output)["nets"]
    assert [n["on_front"] for n in nets] == [False, True, False, True]
    check_page(page.read_text())
