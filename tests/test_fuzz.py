"""A sample of the fuzzing (benchmarks/fuzz.py): some dozen mutants of every kind of file, as there."""

import random

import pytest

from benchmarks import fuzz, mutants
from resconv.errors import RunError

SAMPLE = {name: 4 for name in mutants.KINDS if name.endswith("large")}
SAMPLE |= {"model.json": 20, ".onnx": 20, ".pt2, not trusted": 5, ".pt2, trusted": 5}


# To pack 2 GiB takes long; test_weights.py has it in small.
@pytest.mark.parametrize("name", [n for n in mutants.KINDS if n != "weights .pt, large"])
def test_no_mutant_ends_in_anything_but_an_error_for_the_user(name, tmp_path, monkeypatch):
    kind = mutants.KINDS[name]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "files"
    folder.mkdir()
    target = kind.make(folder)
    good, ends = target.read_bytes(), []
    for number in range(SAMPLE.get(name, 40)):
        target.write_bytes(kind.mutate(good, random.Random(f"{name} {number}")))
        found = fuzz.open_mutant(name, folder)
        assert not {"raw", "executed", "wrong"} & set(found["bad"]), (number, found)
        ends.append(found["end"])
    assert "refused" in ends
    target.write_bytes(good)
    if name != ".pt2, not trusted":
        assert fuzz.open_mutant(name, folder)["end"] == "loaded"  # control: the file itself


def test_what_is_counted_would_be_seen(tmp_path, monkeypatch):
    """The control of all counts: a reader that does what is promised not to happen."""

    def kind(read):
        return mutants.Kind(lambda folder: folder, mutants.any_bytes, read)

    def raises(error):
        def read(folder):
            raise error

        return read

    readers = {
        "raw": raises(IndexError("inside")),
        "wrong": lambda folder: "another net",
        "executed": lambda folder: (folder / mutants.CANARY).mkdir() or "",
    }
    for bad, read in readers.items():
        monkeypatch.setitem(mutants.KINDS, bad, kind(read))
        assert bad in fuzz.open_mutant(bad, tmp_path)["bad"]
    (tmp_path / mutants.CANARY).rmdir()
    monkeypatch.setitem(mutants.KINDS, "good", kind(raises(RunError("no run"))))
    assert fuzz.open_mutant("good", tmp_path)["bad"] == []
    held = []

    def large(folder):
        held.append(bytearray(b"x") * (3 * fuzz.GIB // 2))
        held.clear()
        raise RunError("too much")

    monkeypatch.setitem(mutants.KINDS, "large", kind(large))
    assert "large" in fuzz.open_mutant("large", tmp_path)["bad"]
    monkeypatch.setattr(fuzz, "SECONDS", -1.0)
    assert "slow" in fuzz.open_mutant("good", tmp_path)["bad"]
