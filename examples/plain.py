"""A custom training loop in plain PyTorch: its own model, optimizer and schedule, and the pipeline's batches.

    python examples/plain.py params.yaml hard

Started again, it resumes after the last complete epoch: a step's batches follow from the step's number.
"""

import os
import sys
from pathlib import Path

import timm
import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler

import pipeline

CHECKPOINT = Path("plain.ckpt")


def train(
    batches: pipeline.Batches, model: torch.nn.Module, steps: int, lr: float = 5e-4, alpha: float = 0.5
) -> list[float]:
    """Hard distillation through the distillation token, eq. 3 of the paper. Returns the losses of the steps taken."""
    device = next(model.parameters()).device
    mean, std = (255 * torch.tensor(values, device=device)[:, None, None] for values in (batches.mean, batches.std))
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=("cls_token", "pos_embed"))
    optimizer = torch.optim.AdamW(groups, lr)
    schedule = CosineLRScheduler(optimizer, batches.epochs, lr_min=1e-5, warmup_t=1, warmup_lr_init=1e-6)
    model.train().set_distilled_training(True)  # both heads' logits instead of their mean
    first, losses = 0, []
    if CHECKPOINT.exists():
        state = torch.load(CHECKPOINT, weights_only=True)
        if state["batches"] != batches.fingerprint:
            raise SystemExit(f"{CHECKPOINT} is of a run on other batches")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for batch in batches.steps(first, steps):
        torch.manual_seed(batch.step)  # drop-path
        schedule.step(max(batch.step // batches.steps_per_epoch - 1, 0))  # lags by one epoch, as in DeiT
        logits, distilled = model((batch.pictures - mean) / std)
        label_loss = pipeline.base_loss(logits, batch.targets, batch.weights)
        teacher_loss = pipeline.hard_loss(distilled, batch.argmax, batch.weights)
        loss = ((1 - alpha) * label_loss + alpha * teacher_loss) / batch.step_samples
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (batch.step + 1) % batches.steps_per_epoch == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": batch.step + 1, "batches": batches.fingerprint}, f"{CHECKPOINT}.partial")
            os.replace(f"{CHECKPOINT}.partial", CHECKPOINT)
    return losses


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opened = pipeline.open_batches(*sys.argv[1:3], device=device)
    torch.manual_seed(0)
    student = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=opened.size, num_classes=len(opened.classes), drop_path_rate=0.1
    )
    print(train(opened, student.to(device), len(opened)))
