"""A Lightning module that trains a student from the store.

    pip install lightning
    python examples/lightning_module.py params.yaml soft

Lightning has one endless epoch here, and is given the step that it resumes at.
"""

import sys
from typing import Any

import lightning
import timm
import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

import pipeline


class DistilledStudent(lightning.LightningModule):
    """Soft distillation, eq. 2 of the paper.

    Args:
        model: returns logits, or those of the class head and of the distillation head.
        arguments: of pipeline.open_batches, which is called when the trainer knows the rank.
    """

    def __init__(self, model: nn.Module, alpha: float = 0.5, tau: float = 3.0, lr: float = 5e-4, **arguments: Any):
        super().__init__()
        self.model, self.alpha, self.tau, self.lr, self.arguments = model, alpha, tau, lr, arguments
        self.batches: pipeline.Batches | None = None

    def setup(self, stage: str) -> None:
        self.batches = pipeline.open_batches(
            **self.arguments, logits=True, rank=self.global_rank, world_size=self.trainer.world_size
        )
        for name in ("mean", "std"):
            value = 255 * torch.tensor(getattr(self.batches, name))[:, None, None]
            self.register_buffer(name, value.to(self.device), persistent=False)

    def train_dataloader(self):
        return self.batches.steps(self.global_step, self.trainer.max_steps)

    def on_train_batch_start(self, batch: pipeline.StudentBatch, batch_idx: int) -> None:
        self.schedule.step(max(batch.step // self.batches.steps_per_epoch - 1, 0))  # lags by one epoch, as in DeiT

    def training_step(self, batch: pipeline.StudentBatch) -> torch.Tensor:
        output = self.model((batch.pictures - self.mean) / self.std)
        logits, distilled = output if isinstance(output, tuple) else (output, output)
        label_loss = pipeline.base_loss(logits, batch.targets, batch.weights)
        teacher_loss = pipeline.soft_loss(distilled, batch.logits, batch.weights, self.tau, "batchmean")
        loss = ((1 - self.alpha) * label_loss + self.alpha * teacher_loss) / batch.step_samples
        return loss * self.trainer.world_size  # DDP averages gradients; each rank's loss is its share of one sum

    def configure_optimizers(self):
        groups = param_groups_weight_decay(self.model, 0.05, no_weight_decay_list=("cls_token", "pos_embed"))
        optimizer = torch.optim.AdamW(groups, self.lr)
        self.schedule = CosineLRScheduler(
            optimizer, self.batches.epochs, lr_min=1e-5, warmup_t=1, warmup_lr_init=1e-6, warmup_prefix=False
        )
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches"] = self.batches.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.batches is not None and checkpoint["batches"] != self.batches.fingerprint:
            raise RuntimeError("the checkpoint is of a run on other batches")


if __name__ == "__main__":
    opened = pipeline.open_batches(*sys.argv[1:3], logits=True)
    student = timm.create_model("deit_tiny_patch16_224", img_size=opened.size, num_classes=len(opened.classes))
    trainer = lightning.Trainer(max_steps=len(opened), max_epochs=-1, use_distributed_sampler=False)
    trainer.fit(DistilledStudent(student, config=sys.argv[1], student=sys.argv[2]))
