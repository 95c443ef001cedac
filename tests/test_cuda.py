"""On an NVIDIA GPU: the surgery's laws, recorded training steps, and a run from end to end."""

import copy

import pytest
import torch
from torch.nn import functional as F

import resconv
from resconv import data, nets, run
from resconv.errors import RunError
from resconv.train import Recipe, RecordedNet, evaluate, fit

from .helpers import randomise, randomise_gates

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def converted(dtype=torch.float32, skipped=()):
    torch.manual_seed(0)
    example = torch.randn(2, 3, 16, 16, dtype=dtype)
    model = resconv.convert(nets.create("resnet20").to(dtype), example)
    randomise(model)
    for name, gate in resconv.gates(model).items():
        with torch.no_grad():
            gate.scale.fill_(0.0 if name in skipped else 0.7)
            if gate.control is not None:
                gate.control.fill_(0.6)
        gate.skipped = name in skipped
    return model.train()


@needs_gpu
@pytest.mark.parametrize("skipped", [(), ("layer1.1.conv1", "layer2.2")])
@pytest.mark.parametrize("watched", [(), ("layer2.0.conv1", "fc")])
def test_a_recorded_step_is_the_same_step(watched, skipped, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    plain = converted(torch.float64, skipped).cuda()
    twin = copy.deepcopy(plain)
    steps = (
        resconv.recovery.FeatureTap(plain, watched),
        RecordedNet(resconv.recovery.FeatureTap(twin, watched)),
    )
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(4):
        x = torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=generator).cuda()
        y = torch.arange(8, device="cuda")
        losses = []
        for net, step in zip((plain, twin), steps, strict=True):
            net.zero_grad()
            logits, inputs = step(x)
            loss = F.cross_entropy(logits, y) + sum(t.square().mean() for t in inputs)
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
        seen.add(losses[1].item())
        for (name, p), q in zip(plain.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=name)
        for (name, a), b in zip(plain.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)
        with torch.no_grad():
            for net in (plain, twin):
                for p in net.parameters():
                    if p.grad is not None:
                        p -= 0.01 * p.grad
    assert len(seen) == 4  # what is replayed reads the new images and the moved weights


@needs_gpu
@pytest.mark.parametrize("watched", [(), ("layer2.0.conv1", "fc")])
def test_a_recorded_teacher_says_the_same(watched, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    net = converted(torch.float64).cuda().eval().requires_grad_(False)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    teacher = resconv.recovery.FeatureTap(net, watched)
    recorded = RecordedNet(teacher)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(3):
        x = torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=generator).cuda()
        with torch.no_grad():
            logits, inputs = recorded(x)
            wanted, wanted_inputs = teacher(x)
        torch.testing.assert_close(logits, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(inputs, wanted_inputs, rtol=1e-12, atol=1e-12)
        assert not logits.requires_grad
        seen.add(logits.sum().item())
    assert recorded._recorded is not None
    assert len(seen) == 3
    for name, t in net.state_dict().items():
        assert torch.equal(t, before[name]), name  # in eval mode nothing is gathered


@needs_gpu
def test_units_that_rest_later_are_recorded_anew():
    model = converted().cuda()
    recorded = RecordedNet(model)
    x = torch.randn(8, 3, 16, 16, device="cuda")
    recorded(x)
    first = recorded._recorded
    recorded.renew()
    recorded(x)
    assert recorded._recorded is first
    gate = resconv.gates(model)["layer1.1.conv1"]
    gate.skipped = True
    with torch.no_grad():
        gate.scale.zero_()
    recorded.renew()
    model.zero_grad()
    recorded(x).sum().backward()
    assert recorded._recorded is not first
    assert gate.conv.weight.grad is None
    # Another shape runs as it is.
    assert recorded(x[:3]).shape == (3, 10)


@needs_gpu
def test_a_net_that_waits_for_the_device_is_refused():
    class Waits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return y * y.mean().item()

    with pytest.raises(RunError, match="cannot be recorded as CUDA graphs"):
        RecordedNet(Waits().cuda().train())(torch.randn(2, 3, 8, 8, device="cuda"))
    torch.cuda.synchronize()
    assert torch.ones(3, device="cuda").sum() == 3  # the device is as usable as before


@needs_gpu
@pytest.mark.parametrize(("cuda_graphs", "taught"), [(False, False), (True, False), (True, True)])
def test_training_arrives_at_its_target(cuda_graphs, taught, tmp_path):
    images = data.load("digits")
    torch.manual_seed(0)
    net = nets.create("resnet20", num_classes=10, in_channels=1)
    if taught:
        fit(net.train(), images, Recipe(4, seed=0), tmp_path / "dense", progress=False)
    gated = resconv.convert(
        net, torch.randn(2, 1, images.image_size, images.image_size), units="layers"
    )
    budget = resconv.Budget(macs=0.5)
    recipe = Recipe(12, seed=0)
    result = fit(
        gated.train(),
        images,
        recipe,
        tmp_path / "fit",
        target=budget,
        teacher=copy.deepcopy(net).eval() if taught else None,
        cuda_graphs=cuda_graphs,
        progress=False,
    )
    assert next(gated.parameters()).device.type == "cpu"
    assert result.history[-1].macs <= 0.5
    top1 = evaluate(gated, images)
    assert next(gated.parameters()).device.type == "cpu"
    assert top1 > 80
    example = torch.randn(2, 1, images.image_size, images.image_size)
    plan = resconv.plan(gated.eval(), example, budget)
    compact = resconv.fuse(resconv.prune(gated, plan), example, fold_norms=True)
    resconv.verify(gated, compact, example, plan=plan)
    # The net was judged on the GPU: as exactly as on the CPU, but for rounding.
    assert abs(evaluate(compact, images) - top1) < 0.5


@needs_gpu
def test_surgery_keeps_the_function_on_the_gpu():
    example = torch.randn(4, 3, 16, 16, dtype=torch.float64, device="cuda")
    torch.manual_seed(0)
    model = randomise(nets.create("resnet20").double()).cuda()
    gated = resconv.convert(model, example).eval()
    randomise_gates(gated)
    names = list(resconv.gates(gated))[3:9]
    with torch.no_grad():
        for name in names:
            resconv.gates(gated)[name].scale.zero_()
    plan = resconv.Plan(tuple(names))
    compact = resconv.fuse(resconv.prune(gated, plan), example, fold_norms=True)
    assert {p.device.type for p in compact.parameters()} == {"cuda"}
    torch.testing.assert_close(compact(example), gated(example), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(compact(example), model(example), rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_recording_is_refused(tmp_path):
    config = run.Config.of(
        model="resnet20", data="digits", macs=0.5, epochs=1, limit=64, cuda_graphs=True
    )
    with pytest.raises(RunError, match="need an NVIDIA GPU"):
        run.begin(tmp_path / "run", config, say=lambda text: None)
    assert not (tmp_path / "run").exists()
