"""A training loop of your own: half the MACs, then finetuning with distillation."""

from digits import Net, accuracy, digits
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader

import resconv


def train(
    net: nn.Module, batches: DataLoader, epochs: int, lr: float, *, target=None, teacher=None
):
    """The loop; what sparse training and distillation add to it are the three marked lines."""
    optimizer = optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * len(batches)
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    if target is not None:
        resconv.Sparsifier(net, optimizer, target=target, total_steps=steps)  # 1
    net.train()
    for _ in range(epochs):
        for images, labels in batches:
            logits = net(images)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                loss = 0.5 * loss + 0.5 * resconv.recovery.distillation_loss(
                    logits, teacher(images)
                )  # 2, 3
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    net.eval()


def main(epochs: tuple[int, int, int] = (8, 12, 4), macs: float = 0.5) -> dict[str, float]:
    train_set, held_out = digits()
    batches = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    example = train_set.tensors[0][:2]
    budget = resconv.Budget(macs=macs)

    dense = Net()
    train(dense, batches, epochs[0], 0.1)

    gated = resconv.convert(dense, example)
    train(gated, batches, epochs[1], 0.05, target=budget)
    resconv.verify(gated, resconv.prune(gated))  # the scales are exactly 0

    # The units that stay keep their shortcut while they are finetuned, and are fused after it.
    open_net = resconv.prune(gated, fuse=False)
    train(open_net, batches, epochs[2], 0.02, teacher=dense.requires_grad_(False))
    compact = resconv.fuse(open_net, fold_norms=True)
    resconv.verify(open_net, compact)
    return {
        "macs": resconv.profile(compact, example).macs / resconv.profile(dense, example).macs,
        "dense": accuracy(dense, held_out),
        "compact": accuracy(compact, held_out),
    }


if __name__ == "__main__":
    print(main())
