"""Seeds of the random draws in a training step: drop-path and dropout.

They are a function of the position in the run, so a checkpoint holds no generator state.
"""

import torch

from pipeline.common.streams import stream_key


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank's draws in a step: 63 bits."""
    return int.from_bytes(stream_key(seed, "step", f"{step}\x1f{rank}")[:8], "little") >> 1


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed the CPU's generator and that of `device`; torch.manual_seed would also seed every other device's."""
    number = step_seed(seed, step, rank)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
