"""Weights averaged over training: the formula, the zeros, and runs that are stopped meanwhile."""

import csv

import lightning
import pytest
import torch
from torch import nn

import resconv
from resconv import data
from resconv.errors import ConversionError, RunError
from resconv.run.config import Config
from resconv.train import Recipe, evaluate, fit
from resconv.train.averaging import Average

from . import noisy
from .helpers import randomise

EMA = 0.9


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("index", torch.tensor([5, 7]))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x):
        return self.norm(self.conv(x))


def test_an_average_is_what_its_formula_says():
    torch.manual_seed(0)
    net = randomise(Counting()).double().train()
    average = Average(net, EMA)
    wanted, optimizer = {}, torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(1, 120):
        optimizer.zero_grad()
        out = net(torch.randn(4, 2, 5, 5, dtype=torch.float64))
        (out * torch.randn_like(out)).mean().backward()
        optimizer.step()
        average.follow(net, step)
        decay = min(EMA, (1 + step) / (10 + step))
        for key, value in net.state_dict().items():
            if step == 1 or not value.is_floating_point():
                wanted[key] = value.clone()
            else:
                wanted[key] = decay * wanted[key] + (1 - decay) * value
    found = average.module.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)
    assert found["index"].tolist() == [5, 7]  # an average of whole numbers would be cut off
    assert found["norm.num_batches_tracked"] == net.norm.num_batches_tracked == 119
    assert not torch.allclose(found["conv.weight"], net.conv.weight, rtol=1e-6)
    assert not any(p.requires_grad for p in average.parameters())


def test_what_is_held_at_0_or_1_is_so_in_the_average():
    net = resconv.convert(noisy.net(), torch.randn(2, 1, 8, 8), units="layers,blocks")
    average = Average(net, EMA)
    units = list(resconv.gates(net).values())
    held = {units[0].scale: 0.0, units[1].scale: 1.0}
    controls = [g.control for g in units if g.control is not None]
    if controls:
        held[controls[0]] = 1.0
    with torch.no_grad():
        for value in (0.4, None):
            for gate in units:
                gate.scale.fill_(0.6)
            for parameter, end in held.items():
                parameter.fill_(end if value is None else value)
            average.follow(net, 50)
    averaged = {n: g.scale.item() for n, g in resconv.gates(average.module).items()}
    assert 0 < min(averaged.values()) < max(averaged.values()) < 1
    average.keep_exact(net)
    for gate, other in zip(units, resconv.gates(average.module).values(), strict=True):
        for own, found in ((gate.scale, other.scale), (gate.control, other.control)):
            if own is not None:
                assert (found.item() in (0, 1)) == any(
                    own is h for h in held
                ) or own is gate.control
                assert not any(own is h for h in held) or found.item() == own.item()


class Look(lightning.Callback):
    """Keeps the weights that are trained, and stops when it is told to."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.stop_at:
            raise KeyboardInterrupt

    def on_train_end(self, trainer, pl_module):
        self.trained = {k: v.clone() for k, v in pl_module.model.state_dict().items()}


def trained(folder, ema, stop_at=None):
    torch.manual_seed(0)
    images = data.load("digits", limit=64)
    net = resconv.convert(noisy.net(), torch.randn(2, 1, 8, 8)).train()
    look = Look(stop_at)
    options = {"target": resconv.Budget(macs=0.6), "progress": False, "callbacks": (look,)}
    fit(net, images, Recipe(6, batch_size=16, ema=ema), folder, say=lambda text: None, **options)
    return net, look.trained, images


def zeros(net):
    return [n for n, g in resconv.gates(net).items() if g.scale.item() == 0]


def test_an_averaged_net_is_what_is_judged_kept_and_gone_on_with(tmp_path):
    net, raw, images = trained(tmp_path / "ema", EMA)
    plain, plain_raw, _ = trained(tmp_path / "plain", None)
    state = net.state_dict()
    # The average does not change the training, and is not what is trained.
    assert all(torch.equal(raw[k], plain_raw[k]) for k in raw)
    assert all(torch.equal(v, plain_raw[k]) for k, v in plain.state_dict().items())
    assert not any(torch.equal(state[k], raw[k]) for k in raw if k.endswith("conv1.weight"))
    assert zeros(net) == zeros(plain) != []
    with (tmp_path / "ema" / "metrics.csv").open() as file:
        judged = [float(r["top1"]) for r in csv.DictReader(file) if r["top1"]]
    assert 100 * judged[-1] == pytest.approx(evaluate(net.eval(), images))
    compact = resconv.prune(net)
    assert resconv.verify(net, compact, torch.randn(2, 1, 8, 8)).max_rel_error < 1e-4
    # Stopped, it goes on with the average it had, to the bit.
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", EMA, stop_at=4)
    resumed = trained(tmp_path / "stopped", EMA)[0].state_dict()
    assert all(torch.equal(resumed[k], v) for k, v in state.items())
    # One that began anew in the middle would not.
    checkpoint = torch.load(tmp_path / "stopped" / "last.ckpt", weights_only=True)["state_dict"]
    assert any(k.startswith("average.module.") for k in checkpoint)
    assert checkpoint["average.n_averaged"] == 24


def test_a_decay_is_between_0_and_1():
    for wrong in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(RunError, match="ema="):
            Config.of(model="resnet20", data="digits", ema=wrong)
    assert Config.of(model="resnet20", data="digits").training.ema is None


def test_a_net_that_cannot_be_copied_is_refused():
    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    with pytest.raises(ConversionError, match=r"ema=0.9: .*no copies.*Train without it"):
        Average(Own(2, 2), EMA)
