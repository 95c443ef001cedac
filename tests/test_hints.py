"""What a teacher shows besides its logits: what the layers between units read."""

import copy

import pytest
import torch
from torch import nn

import resconv
from resconv import nets

from .helpers import randomise, randomise_gates, some_plan

NETS = ["resnet20", "plainnet20", "timm:resnet18", "timm:convnext_atto", "torchvision:vgg11_bn"]


def made(name):
    torch.manual_seed(0)
    example = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = nets.create(name, num_classes=5).double()
    return randomise(model, example_inputs=example), example


@pytest.mark.parametrize("name", NETS)
def test_layers_between_units_read_the_same_whatever_goes(name):
    if ":" in name:
        pytest.importorskip(name.partition(":")[0])
    model, x = made(name)
    names = resconv.recovery.hint_layers(model, x)
    gated = resconv.convert(model, x).eval()
    assert resconv.recovery.hint_layers(gated, x) == names
    output, inputs = resconv.recovery.FeatureTap(model, names)(x)
    torch.testing.assert_close(output, model(x), rtol=0, atol=0)
    same = resconv.recovery.FeatureTap(gated, names)(x)[1]
    assert resconv.recovery.hint_loss(same, inputs) < 1e-20
    # Whatever goes, they are there and read what has the same shape; but no longer the same.
    randomise_gates(gated)
    for plan in (some_plan(gated), resconv.Plan(tuple(resconv.gates(gated)))):
        open_net = resconv.prune(gated, plan, fuse=False)
        left = resconv.recovery.FeatureTap(open_net, names)(x)[1]
        assert [t.shape for t in left] == [t.shape for t in inputs]
        assert resconv.recovery.hint_loss(left, inputs) > 1e-3


def test_the_stages_of_a_resnet():
    model, x = made("resnet20")
    assert resconv.recovery.hint_layers(model, x) == (
        "layer2.0.conv1",
        "layer3.0.conv1",
        "pool",
        "fc",
    )
    with_shortcuts = resconv.convert(model, x, shortcut="always")
    assert resconv.recovery.hint_layers(with_shortcuts, x) == resconv.recovery.hint_layers(model, x)


def test_watching_leaves_the_net_as_it_was():
    model, x = made("resnet20")
    watched = resconv.recovery.FeatureTap(model, ("layer2.0.conv1", "fc"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    inputs = watched(x)[1]
    assert inputs[1].shape == (2, 64)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        watched(x[:, :1])
    assert not any(m._forward_pre_hooks for m in model.modules())
    copy.deepcopy(watched)(x)


def test_what_cannot_be_watched_is_refused():
    model, _ = made("resnet20")
    with pytest.raises(
        resconv.ResConvError, match=r"no layer named 'layer9'.*resconv\.recovery\.hint_layers"
    ):
        resconv.recovery.FeatureTap(model, ("fc", "layer9"))

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(resconv.ResConvError, match="did not call 'unused'"):
        resconv.recovery.FeatureTap(Skips(), ("unused",))(torch.randn(2, 4))


def test_following():
    teacher = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    student = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    loss = resconv.recovery.hint_loss((student,), (teacher,))
    wanted = ((student - teacher) ** 2).sum() / (teacher**2).sum()
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, 2 * (student - teacher) / (teacher**2).sum())
    # Relative: the scale of a tensor does not weigh, and neither does the number of tensors.
    a, b = student.detach(), teacher.detach()
    torch.testing.assert_close(resconv.recovery.hint_loss((a, 9 * a), (b, 9 * b)), wanted.detach())
    assert resconv.recovery.hint_loss((0 * a,), (b,)) == pytest.approx(1)
    assert resconv.recovery.hint_loss((0 * a,), (0 * b,)) == 0
    half = resconv.recovery.hint_loss((a.bfloat16(),), (b.bfloat16(),))
    assert half.dtype == torch.float32
    with pytest.raises(resconv.ResConvError, match=r"\(3, 4, 5, 5\).*\(3, 4, 5, 4\)"):
        resconv.recovery.hint_loss((a,), (b[..., :4],))
    with pytest.raises(resconv.ResConvError, match="at least one"):
        resconv.recovery.hint_loss((), ())


def test_hints_bring_a_pruned_net_back_to_its_teacher():
    model, x = made("resnet20")
    gated = randomise_gates(resconv.convert(model, x, units="blocks")).eval()
    names = resconv.recovery.hint_layers(gated, x)
    teacher = resconv.recovery.FeatureTap(copy.deepcopy(gated), names)
    student = resconv.recovery.FeatureTap(resconv.prune(gated, some_plan(gated), fuse=False), names)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    with torch.no_grad():
        wanted = teacher(x)[1]
    losses = []
    for _ in range(20):
        loss = resconv.recovery.hint_loss(student(x)[1], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
