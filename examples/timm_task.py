"""timm's own distillation tasks, as in timm's train.py, with a store in place of the teacher.

    python examples/timm_task.py params.yaml soft

timm runs the teacher in every step. Here the teacher is a module that returns what the store holds for the batch: the
task, its losses and the rest of the loop are timm's. `timm.task` needs a timm that has it; 1.0.31 does.
"""

import sys

import torch
from timm import create_model
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TokenDistillationTask, TrainingTask
from torch import nn
from torch.nn.functional import one_hot

import pipeline


class TeacherFromStore(nn.Module):
    """A teacher that answers each batch once, with the predictions stored for it: logits, or one-hot for `hard`."""

    def __init__(self, classes: int, distill_type: str):
        super().__init__()
        self.classes, self.distill_type, self.predictions = classes, distill_type, None

    def set_batch(self, batch: pipeline.StudentBatch) -> None:
        hard = self.distill_type == "hard"  # the stored class is that of the teacher's unrounded logits
        self.predictions = one_hot(batch.argmax, self.classes).float() if hard else batch.logits

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        predictions, self.predictions = self.predictions, None  # never for a second batch
        if predictions is None or len(predictions) != len(pictures):
            raise RuntimeError("set_batch must be called with each batch, and soft distillation needs its logits")
        return predictions


def train(
    batches: pipeline.Batches, model: nn.Module, steps: int, distill_type: str = "soft", alpha: float = 0.5,
    tau: float = 3.0, **optimizer_settings: float,
) -> list[float]:  # fmt: skip
    """Train through a distillation token. Returns the losses of the steps."""
    device = next(model.parameters()).device
    mean, std = (255 * torch.tensor(values, device=device)[:, None, None] for values in (batches.mean, batches.std))
    teacher = TeacherFromStore(len(batches.classes), distill_type)
    task: TrainingTask = TokenDistillationTask(
        model, teacher, SoftTargetCrossEntropy(), distill_type=distill_type, temperature=tau,
        task_loss_weight=1 - alpha, distill_loss_weight=alpha, device=device, verbose=False,
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, opt="adamw", **optimizer_settings)
    schedule, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=batches.epochs, min_lr=1e-5, warmup_epochs=1, warmup_lr=1e-6
    )
    losses = []
    task.train()
    for batch in batches.steps(0, steps):
        batch = batch.without_padding()  # timm's losses average over the batch
        teacher.set_batch(batch)
        result = task((batch.pictures - mean) / std, batch.targets)
        result["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result["loss"].item())
        if (batch.step + 1) % batches.steps_per_epoch == 0:
            schedule.step(batch.step // batches.steps_per_epoch)  # as DeiT; timm's train.py is one epoch ahead
    return losses


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = pipeline.open_batches(*sys.argv[1:3], logits=True, device=device)
    student = create_model("deit_tiny_distilled_patch16_224", img_size=opened.size, num_classes=len(opened.classes))
    print(train(opened, student.to(device), len(opened), lr=5e-4, weight_decay=0.05))
