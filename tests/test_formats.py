"""Networks that earlier versions saved still load, and compute what they did then."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import resconv

FIXTURES = Path(__file__).parent / "fixtures"


class Branches(nn.Module):
    """Two branches in one forward, which is rewritten when one of them goes."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x):
        x = x + self.a(x)
        return F.relu(x + self.b(x))


class Writes(nn.Module):
    """An activation in place behind a conv, beside a shortcut that is read later."""

    def __init__(self, act):
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1), act
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.act(self.conv(x)) if self.act is not None else self.conv(x).mul_(2)
        return self.last(y) * x.abs().mean()


class Kinds(nn.Module):
    """A small net whose pruning needs edits of every kind."""

    gone = ("single", "inplace.conv", "cloned.conv", "two/a.1", "left", "row.1")

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.row = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)))
        self.single = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inplace = Writes(nn.Hardswish(inplace=True))
        self.cloned = Writes(None)
        self.two = Branches()
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.single(self.row(self.stem(x))))
        x = self.two(self.cloned(self.inplace(torch.tanh(x))))
        x = F.silu(self.left(F.silu(x)))  # nothing between two SiLUs absorbs a factor
        x = F.silu(x + self.branch(x))
        return self.fc(x.mean((2, 3)))


def example():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def load(name, **kwargs):
    folder = FIXTURES / "format2" / name
    expected = load_file(FIXTURES / "format2" / f"{name}.safetensors")
    return resconv.load(folder, **kwargs), expected["x"], expected["y"]


def edits_of(name):
    header = json.loads((FIXTURES / "format2" / name / "model.json").read_text())
    assert header["format_version"] == 2
    return {edit["op"] for edit in header["edits"]}


@pytest.mark.parametrize(("name", "source"), [("resnet20", None), ("kinds", Kinds)])
def test_a_network_of_format_2_still_loads(name, source):
    """Saved when non-persistent buffers were not in the file and gated nets could not be saved."""
    net, x, y = load(name, model=source)
    assert not any(p.requires_grad is False for p in net.parameters())
    with torch.no_grad():
        torch.testing.assert_close(net.double()(x), y, rtol=1e-9, atol=1e-9)
        # Negative control: another input gives other outputs.
        assert not torch.allclose(net(x + 0.1), y, rtol=1e-3)


def test_the_saved_networks_hold_edits_of_every_kind():
    assert edits_of("resnet20") | edits_of("kinds") == {
        *("conv", "identity", "drop", "clone", "outplace"),
        *("children", "bypass", "multiply", "append"),
    }
