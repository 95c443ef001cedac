"""Lightning: a LightningModule and Trainer of your own, and one callback."""

import lightning
import torch
from digits import Net, accuracy, digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import resconv
from resconv.integrations.lightning import SparsityCallback


class Classifier(lightning.LightningModule):
    """Knows nothing of resconv."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch, index):
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.05)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(net: nn.Module, batches: DataLoader, epochs: int, lr: float, callbacks=(), **options):
    net.train()  # a converted net is in the mode of the net it was made from
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        gradient_clip_val=5.0,
        accumulate_grad_batches=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False} | options,
    )
    trainer.fit(Classifier(net, lr), batches)
    net.eval()


def main(epochs: tuple[int, int] = (8, 12), macs: float = 0.5) -> dict[str, float]:
    lightning.seed_everything(0, verbose=False)
    train_set, held_out = digits()
    batches = DataLoader(train_set, batch_size=32, shuffle=True, drop_last=True)
    example = train_set.tensors[0][:2]
    budget = resconv.Budget(macs=macs)

    dense = Net()
    fit(dense, batches, epochs[0], 0.01)

    gated = resconv.convert(dense, example)
    fit(gated, batches, epochs[1], 0.005, [SparsityCallback(budget)])

    compact = resconv.prune(gated)
    resconv.verify(gated, compact)  # the scales are exactly 0
    return {
        "macs": resconv.profile(compact, example).macs / resconv.profile(dense, example).macs,
        "dense": accuracy(dense, held_out),
        "compact": accuracy(compact, held_out),
    }


if __name__ == "__main__":
    print(main())
