"""Loss scaling for training in float16, whose smallest numbers gradients would often fall below."""

from typing import Any, cast

import torch
from torch.amp.grad_scaler import GradScaler

from pipeline.common.errors import PipelineError
from pipeline.training.run import Run

MIN_SCALE = 1.0
"""The run stops at a smaller scale: its gradients overflow although they are not enlarged."""
SCALER_VALUES = ("loss_scale", "skipped")


class LossScaler:
    """torch's GradScaler, as timm uses it, without making the host wait for a result.

    The loss is multiplied by the scale before the backward pass, and gradients are divided by it afterwards. If one of
    them is not finite, the optimizer skips the step and the scale is halved; it doubles after 2,000 steps without that.
    Schedule and EMA go on after a skipped step. Gradients are those of all ranks, so the ranks agree.
    """

    def __init__(self, device: torch.device):
        self.scaler = GradScaler(device.type)
        self.one = torch.ones((), device=device)
        self.skipped_steps = 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.scaler.scale(loss))

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, in place: before they are clipped and measured."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Step the optimizer unless a gradient overflowed, and update the scale.

        Returns:
            SCALER_VALUES: the scale from now on, and 1 if the step was skipped, float32 (2,) on the device.
        """
        before = self.scale(self.one)
        self.scaler.step(optimizer)
        self.scaler.update()
        after = self.scale(self.one)
        return torch.stack([after, (after < before).float()])

    def record(self, run: Run, step: int, values: dict[str, float]) -> None:
        """Count the steps that were skipped, as `skipped_steps` in the values of a step that are logged.

        A skipped step has no `grad_norm`, as it is not finite.

        Raises:
            PipelineError: the scale has become too small.
        """
        if values.pop("skipped"):
            self.skipped_steps += 1
            del values["grad_norm"]
        values["skipped_steps"] = self.skipped_steps
        if values["loss_scale"] < MIN_SCALE:
            raise PipelineError(
                f"{run.name}: step {step}",
                expected=f"gradients that are finite in float16 at a loss scale of {MIN_SCALE:g} or more",
                found=f"an overflow at {2 * values['loss_scale']:g}; {self.skipped_steps} of {step + 1} steps were skipped",
                do="lower lr, or use bfloat16 or float32; the last good checkpoint is kept",
            )

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict() | {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped_steps = int(state["skipped_steps"])
        self.scaler.load_state_dict({key: value for key, value in state.items() if key != "skipped_steps"})
