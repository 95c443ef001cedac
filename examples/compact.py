"""A compact net for digits: what the quantisation examples start from."""

from digits import Net, digits
from own_loop import train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import resconv


def compact_digits(
    epochs: tuple[int, int] = (8, 12), macs: float = 0.5
) -> tuple[nn.Module, Tensor, TensorDataset]:
    """Return a trained net with its units removed and its norms folded, and the digits.

    The images come in a training part (to calibrate with) and a held-out one with labels.
    """
    train_set, held_out = digits()
    batches = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    example = train_set.tensors[0][:2]
    dense = Net()
    train(dense, batches, epochs[0], 0.1)
    gated = resconv.convert(dense, example)
    budget = resconv.Budget(macs=macs)
    train(gated, batches, epochs[1], 0.05, target=budget)
    pruned = resconv.prune(gated)
    # Norms go into the convs first: a quantised net is better off without them.
    return resconv.fuse(pruned, fold_norms=True), train_set.tensors[0], held_out
