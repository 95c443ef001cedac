"""The LightningModule of an image classifier."""

import math
from typing import Any

import lightning
import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from resconv.data import BatchLoader, ImageData, choose_augment
from resconv.errors import RunError
from resconv.recovery.distillation import distillation_loss, hint_loss
from resconv.recovery.hints import FeatureTap

from .averaging import Average
from .mixing import Mixing
from .recipe import Recipe
from .recorded import RecordedNet, check_recording

__all__ = ["Classifier"]

_CHECK = 20  # steps between two looks at the loss


class Classifier(lightning.LightningModule):
    """Trains ``model`` on ``data`` as the recipe says: warm-up and cosine, cross-entropy.

    Args:
        teacher: a dense net whose logits are followed as well (knowledge distillation,
            Hinton et al. 2015), weighted by ``recipe.distill``.
        hints: layers of both nets whose inputs are to be the teacher's as well (see hints.py).
        cuda_graphs: replay the net's passes instead of launching them anew (see recorded.py).
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        recipe: Recipe,
        *,
        teacher: nn.Module | None = None,
        hints: tuple[str, ...] = (),
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.data, self.recipe = data, recipe
        self.channels_last = False  # of the batches
        hints = () if teacher is None else hints
        # The student and then its teacher. In lists, so that no weights but the net's are trained or
        # saved, and those once.
        self._nets = [FeatureTap(model, hints)]
        if teacher is not None:
            self._nets.append(FeatureTap(teacher.eval().requires_grad_(False), hints))
        self._recorded = [RecordedNet(net) for net in self._nets] if cuda_graphs else []
        mix = recipe.mix
        self._mixing = None if mix is None else Mixing(mix, data.num_classes, recipe.seed)
        self.accuracy = MulticlassAccuracy(data.num_classes, average="micro")
        # A module, so that it is in the checkpoints; nothing of it is trained.
        self.average = None if recipe.ema is None else Average(model, recipe.ema)

    @property
    def outcome(self) -> nn.Module:
        """The net that is judged, and that training results in."""
        return self.model if self.average is None else self.average.module

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.average is not None:
            self.average.follow(self.model, self.trainer.global_step)
            if self.trainer.is_last_batch:  # validation and the checkpoint follow
                self.average.keep_exact(self.model)

    def train_dataloader(self) -> BatchLoader:
        data, recipe = self.data, self.recipe
        # The recipe counts the images of a step on all ranks together.
        world = self.trainer.world_size
        if recipe.batch_size < world or len(data.val) < world:
            raise RunError(
                f"{world} processes cannot share a batch of {recipe.batch_size} images and a "
                f"validation set of {len(data.val)}: each needs at least one image. Use fewer "
                "devices or a larger batch size."
            )
        size = recipe.batch_on(len(data.train)) // world
        return BatchLoader(
            data.train,
            size,
            data.preprocessing,
            shuffle=True,
            seed=recipe.seed,
            augment=recipe.augment or choose_augment(data),
            drop_last=True,
            device=self.device,
            channels_last=self.channels_last,
            rank=self.trainer.global_rank,
            world_size=world,
        )

    def val_dataloader(self) -> BatchLoader:
        return BatchLoader(
            self.data.val,
            500,
            self.data.preprocessing,
            device=self.device,
            channels_last=self.channels_last,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        # Norms, biases and gates are not decayed.
        optimizer = create_optimizer_v2(
            self.model, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = max(1, int(total * recipe.warmup))
        scheduler, _ = create_scheduler_v2(
            optimizer,
            "cosine",
            num_epochs=max(1, total - warmup),  # an "epoch" of one update: all is counted in steps
            updates_per_epoch=1,
            step_on_epochs=False,
            warmup_epochs=warmup,
            warmup_lr=recipe.lr / warmup,
            warmup_prefix=True,
        )
        scheduler.step_update(0)  # the rate of the first step
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.trainer.global_step)

    def on_fit_start(self) -> None:
        if self._recorded:
            check_recording(self.device.type, self.trainer.world_size)
        for net in self._nets:
            net.to(self.device)

    def on_train_epoch_start(self) -> None:
        for net in self._recorded:
            net.renew()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        if self._mixing is not None:
            images, labels = self._mixing(images, labels, self.trainer.global_step)
        net, *teacher = self._recorded or self._nets
        logits, inputs = net(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        if teacher:
            with torch.no_grad():
                wanted, teacher_inputs = teacher[0](images)
            followed = distillation_loss(logits, wanted)
            if inputs:
                # They fade as the rate does: they bring a net back that lost layers, and in the end
                # it is the logits that count, of which a smaller net cannot follow all causes.
                left = self.trainer.optimizers[0].param_groups[0]["lr"] / self.recipe.lr
                followed = followed + left * self.recipe.hints * hint_loss(inputs, teacher_inputs)
            share = self.recipe.distill
            loss = (1 - share) * loss + share * followed
        # Now and then only: to ask is to wait for the device. The last batch before a checkpoint counts.
        if index % _CHECK == 0 or self.trainer.is_last_batch:
            self._require_finite(loss)
        self.log("loss", loss, prog_bar=True)
        return loss

    def _require_finite(self, loss: Tensor) -> None:
        value = loss.item()
        if not math.isfinite(value):
            raise RunError(
                f"Training diverged: the loss is {value} at step {self.trainer.global_step:,} (epoch "
                f"{self.current_epoch + 1} of {self.recipe.epochs}, learning rate {self.recipe.lr:g} at "
                "its peak). Start anew with a lower rate (--lr, in sparse training --sparse-lr, "
                "after pruning --finetune-lr), and "
                "look for NaN in the images or the weights if that changes nothing."
            )

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.accuracy(self.outcome(images).float(), labels)
        self.log("top1", self.accuracy, on_step=False, on_epoch=True, prog_bar=True)
