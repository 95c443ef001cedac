"""The evidence: pages hold what results.jsonl says, experiments are sound, and the runner runs."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("yaml")
from benchmarks import report, run

EXPERIMENTS = sorted((Path(run.__file__).parent / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("page", report.PAGES, ids=lambda p: p.name)
def test_the_tables_of_a_page_are_those_of_the_measurements(page, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    copy = tmp_path / page.name
    shutil.copy(page, copy)
    report.fill(copy)
    assert copy.read_text() == page.read_text()
    assert "<!-- begin" in copy.read_text()
    # A figure that was typed in does not stay.
    damaged = copy.read_text().replace("49.2%", "12.3%")
    if damaged != copy.read_text():
        copy.write_text(damaged)
        report.fill(copy)
        assert "12.3%" not in copy.read_text()


def test_a_verdict_needs_three_seeds_and_more_than_the_spread():
    def seeds(*values):
        return [{"seed": i, "top1": v} for i, v in enumerate(values)]

    base = seeds(90.0, 90.2, 89.8)
    assert report.against(seeds(91.0, 91.2), base) == "+1.00 (two seeds)"
    assert "better" in report.against(seeds(91.0, 91.3, 90.8), base)
    assert "worse" in report.against(seeds(89.0, 89.3, 88.8), base)
    assert "within the spread" in report.against(seeds(91.0, 89.3, 90.4), base)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_names_what_there_is(path):
    arms = run.arms_of(path)
    names = {a.name for a in arms}
    assert arms
    for arm in arms:
        assert arm.get("by", "train") in run.MAKERS
        start = arm.get("from")
        assert start is None or start in names or (Path(run.__file__).parent / start).is_file()
    assert len({a.folder for a in arms}) == len(arms)


def test_an_experiment_runs_and_is_not_run_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(run, "WORK", tmp_path / "work")
    path = tmp_path / "small.yaml"
    path.write_text(
        "net: resnet20\ndata: digits\nseeds: [0]\ncommon: {from: start}\narms:\n"
        "  start: {from: null, epochs: 1}\n"
        "  ours: {by: compress, macs: 0.7, sparse_epochs: 3, finetune_epochs: 0, limit: 256, batch_size: 32}\n"
        "  random: {by: ranked, ranking: random, macs: 0.7, units: blocks, epochs: 0}\n"
    )
    arms = run.arms_of(path)
    for arm in run.missing(arms, []):
        run.run(arm, arms)
    found = {r["arm"]: r for r in map(json.loads, run.RESULTS.read_text().splitlines())}
    assert set(found) == {"start", "ours", "random"}
    assert found["start"]["macs_share"] == 1.0
    assert 0 < found["ours"]["macs_share"] <= 0.7
    assert found["ours"]["epochs"] == [1, 3]
    assert found["ours"]["removed_units"]
    assert list(run.missing(arms, [])) == []


def test_the_nets_of_other_packages_are_expressions_of_that_package():
    from benchmarks import zoo

    for package, nets in zoo.OTHERS.items():
        for name, (net, inputs) in nets.items():
            assert package in compile(net, name, "eval").co_names, name
            assert "x" in compile(inputs, name, "eval").co_names, name
    pytest.importorskip("transformers")
    net, x = zoo.build("transformers:ResNet")
    assert not net.training
    assert net(x).logits.shape == (1, 2)
