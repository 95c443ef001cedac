"""Forwards that are rewritten: two branches in one module, called with more than a tensor."""

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn

import resconv
from resconv.surgery.edit_kinds import Bypass
from resconv.surgery.edits import apply_edits
from resconv.surgery.provenance import provenance_of

from .helpers import edits_read_again, randomise, randomise_gates, settle


class Tokens(nn.Module):
    """Two residual branches; the height and width come in beside the tokens."""

    def __init__(self, channels: int, decides: bool) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.mlp = nn.Linear(channels, channels)
        self.decides = decides

    def forward(self, x: Tensor, size: tuple[int, int], scales: list[Tensor]) -> Tensor:
        height, width = size
        if self.decides and height * width > 40 and x.shape[2] > 5:
            x = x * 0.5
        image = x.transpose(1, 2).reshape(x.shape[0], -1, height, width)
        x = x + self.norm(self.mix(image)).flatten(2).transpose(1, 2)
        return x + self.mlp(torch.relu(x) * scales[0])


class Net(nn.Module):
    def __init__(self, decides: bool = False, channels: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.gain = nn.Parameter(torch.ones(channels))
        self.blocks = nn.ModuleList([Tokens(channels, decides) for _ in range(3)])
        self.head = nn.Linear(channels, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        size = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, size, [self.gain * 2])
        return self.head(x.mean(1))


def pruned(decides: bool, example: Tensor) -> tuple[nn.Module, nn.Module, resconv.Plan]:
    model = randomise(Net(decides).double(), 0, example)
    gated = randomise_gates(resconv.convert(model, example, units="blocks"))
    names = list(resconv.gates(gated))
    assert len(names) == 6
    # One branch of the first block, the other of the second: both forwards have to change.
    plan = resconv.Plan((names[0], names[3]))
    return settle(gated, example), resconv.prune(gated, plan), plan


@pytest.mark.parametrize("decides", [False, True])
def test_a_forward_with_sizes_and_lists_is_rewritten(decides):
    example = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    gated, compact, plan = pruned(decides, example)
    resconv.verify(gated, compact, example, plan=plan)
    with pytest.raises(resconv.errors.VerificationError, match="disagree"):
        resconv.verify(gated, compact, example)  # nothing set to 0: another function
    names = [n for n, _ in compact.named_parameters()]
    assert not any(n.startswith(("blocks.0.mix", "blocks.1.mlp")) for n in names), names


@pytest.mark.parametrize("decides", [False, True])
def test_a_rewritten_forward_runs_on_other_sizes(decides):
    example = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    other = torch.randn(3, 3, 10, 20, dtype=torch.float64)  # the same branch as the example
    gated, compact, plan = pruned(decides, example)
    resconv.verify(gated, compact, other, plan=plan)


def test_a_size_of_another_branch_is_an_error():
    _, compact, _ = pruned(True, torch.randn(2, 3, 16, 12, dtype=torch.float64))
    with pytest.raises(AssertionError, match="rewritten by resconv for its example's size"):
        compact(torch.randn(2, 3, 8, 8, dtype=torch.float64))


def test_units_of_a_forward_that_branches_on_numbers_stay():
    class Decides(Tokens):
        def forward(self, x: Tensor, size: tuple[int, int], scales: list[Tensor]) -> Tensor:
            if x.sum() > 1e9:
                return x
            return super().forward(x, size, scales)

    net = Net()
    net.blocks[0] = Decides(6, False)
    example = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    net = randomise(net.double(), 0, example)
    gated = resconv.convert(net, example, units="blocks")
    assert not [name for name in resconv.gates(gated) if name.startswith("blocks.0")]
    reasons = [u.reason for u in resconv.units(net, example) if u.name.startswith("blocks.0/")]
    assert len(reasons) == 2
    assert all(reasons), reasons


@pytest.mark.parametrize("decides", [False, True])
def test_rewrites_are_replayed_from_plain_data(decides):
    example = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    _, compact, _ = pruned(decides, example)
    edits = edits_read_again(compact)
    assert any(isinstance(e, Bypass) and bool(e.branches) is decides for e in edits)
    again = apply_edits(Net(decides).double().eval(), edits)
    again.load_state_dict(compact.state_dict())
    torch.testing.assert_close(again(example), compact(example), rtol=0, atol=0)


def test_a_damaged_argument_is_refused():
    example = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    _, compact, _ = pruned(False, example)
    edit = next(e for e in provenance_of(compact).edits if isinstance(e, Bypass))
    bad = edit.constants | {"size": {"call": "os.system"}}
    with pytest.raises(ValueError, match="Not an argument"):
        replace(edit, constants=bad)
