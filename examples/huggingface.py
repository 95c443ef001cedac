"""Hugging Face: a ResNet of transformers, its Trainer, and one callback. Nothing is downloaded."""

import tempfile

import torch
from digits import digits
from torch.utils.data import Dataset, TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import resconv
from resconv.integrations.huggingface import SparsityCallback


class Images(Dataset):
    """The digits as the dicts that transformers' models take."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, label = self.data[index]
        return {"pixel_values": image, "labels": label}


def build() -> torch.nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[3, 3],
            layer_type="basic",
            num_labels=10,
        )
    )


def fit(net, data, folder, epochs, lr, callbacks=(), **options) -> None:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        max_grad_norm=5.0,
        seed=0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_strategy": "epoch"} | options,
    )
    trainer = Trainer(net, arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.train()
    net.eval()


@torch.no_grad()
def accuracy(net, data: TensorDataset) -> float:
    images, labels = data.tensors
    return (net(images).logits.argmax(1) == labels).float().mean().item()


def main(epochs: tuple[int, int] = (10, 15), macs: float = 0.6) -> dict[str, float]:
    torch.manual_seed(0)
    train_set, held_out = digits()
    example = {"pixel_values": train_set.tensors[0][:2]}
    budget = resconv.Budget(macs=macs)
    with tempfile.TemporaryDirectory() as folder:
        dense = build()
        fit(dense, Images(train_set), folder, epochs[0], 0.01)

        gated = resconv.convert(dense, example)
        fit(gated, Images(train_set), folder, epochs[1], 0.005, [SparsityCallback(budget)])

    compact = resconv.prune(gated)
    resconv.verify(gated, compact)  # the scales are exactly 0
    return {
        "macs": resconv.profile(compact, example).macs / resconv.profile(dense, example).macs,
        "dense": accuracy(dense, held_out),
        "compact": accuracy(compact, held_out),
    }


if __name__ == "__main__":
    print(main())
