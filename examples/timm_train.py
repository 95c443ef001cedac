"""timm: the loop of its train.py, from its own parts, with mixup, AMP, gradient accumulation and EMA.

What resconv adds are the four marked lines; in timm's script they go into the same places.
"""

import torch
from digits import accuracy, digits
from timm import create_model
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import resconv

ACCUMULATE = 2


def enlarged(data: TensorDataset) -> TensorDataset:
    images, labels = data.tensors
    return TensorDataset(F.interpolate(images, scale_factor=4.0, mode="bilinear"), labels)


def train(model: nn.Module, loader: DataLoader, epochs: int, lr: float, target=None) -> nn.Module:
    """Return the EMA of the model over the training."""
    mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=0.0, label_smoothing=0.05, num_classes=10)
    loss_fn = SoftTargetCrossEntropy()
    updates = len(loader) // ACCUMULATE  # of the optimizer, in an epoch
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05)
    scaler = NativeScaler(device="cpu")
    ema = ModelEmaV3(model, decay=0.98)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=epochs,
        warmup_epochs=1,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    if target is not None:  # timm makes its scheduler before; the order does not matter
        steps = epochs * updates
        resconv.Sparsifier(model, optimizer, target=target, total_steps=steps)  # 1, 2
    model.train()
    update = 0
    for _ in range(epochs):
        for index, (images, labels) in enumerate(loader):
            images, labels = mixup(images, labels)
            last = (index + 1) % ACCUMULATE == 0
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(model(images).float(), labels) / ACCUMULATE
            scaler(loss, optimizer, clip_grad=5.0, parameters=model.parameters(), need_update=last)
            if last:
                optimizer.zero_grad()
                update += 1
                ema.update(model, step=update)
                if target is not None:
                    resconv.copy_zeros(model, ema.module)  # 3: an average never gets to 0
                scheduler.step_update(update)
    model.eval()
    return ema.module.eval()


def main(epochs: tuple[int, int] = (6, 10), macs: float = 0.6) -> dict[str, float]:
    torch.manual_seed(0)
    train_set, held_out = (enlarged(data) for data in digits())
    loader = DataLoader(train_set, batch_size=32, shuffle=True, drop_last=True)
    example = train_set.tensors[0][:2]
    budget = resconv.Budget(macs=macs)

    dense = create_model(
        "resnet18", in_chans=1, num_classes=10, layers=(2, 2, 2, 2), channels=(16, 16, 32, 32),
        stem_type="deep", stem_width=8,
    )  # fmt: skip
    train(dense, loader, epochs[0], 0.01)

    gated = resconv.convert(dense, example)  # 4: before the optimizer is made
    averaged = train(gated, loader, epochs[1], 0.005, budget)

    compact = resconv.prune(averaged)
    resconv.verify(averaged, compact)  # the scales are exactly 0
    return {
        "macs": resconv.profile(compact, example).macs / resconv.profile(dense, example).macs,
        "dense": accuracy(dense, held_out),
        "compact": accuracy(compact, held_out),
    }


if __name__ == "__main__":
    print(main())
