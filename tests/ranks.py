"""Run commands of the pipeline as one rank that may die: for tests under torchrun.

`python ranks.py DIE ARGUMENT... [-- ARGUMENT...]`: unless DIE is `-`, rank 1 kills itself before training step DIE,
once. Commands follow one another in the same processes: to start these takes longer than most of the work.

In the environment: OLD_LISTING=1, rank 1 does not see the newest checkpoint in a folder, as on a network file system;
EXCHANGE_SECONDS=N, what ranks exchange fails after so long (30 minutes otherwise, 10 with nccl); FIRST_SCALE=N, the
loss scale in float16 starts there and doubles after three steps; SAVING=1, rank 1 saves after every step, as if its
clock ran ahead.
"""

import functools
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.cli.main import main
from pipeline.common.distributed import Rank
from pipeline.training import checkpoint, scaling
from pipeline.training.trainer import Trainer


def dying(train_step, step: int):
    def call(self, *arguments):
        marker = Path("died")
        if self.step == step and os.environ["RANK"] == "1" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, *arguments)

    return call


def older(listed):
    return lambda folder: listed(folder)[:-1]


def impatient(join, seconds: float):
    return lambda *given, **named: join(*given, **named, timeout=timedelta(seconds=seconds))


def commands(arguments: list[str]) -> list[list[str]]:
    split: list[list[str]] = [[]]
    for argument in arguments:
        split.append([]) if argument == "--" else split[-1].append(argument)
    return split


if __name__ == "__main__":
    if sys.argv[1] != "-":
        Trainer.train_step = dying(Trainer.train_step, int(sys.argv[1]))
    if os.environ.get("OLD_LISTING") and os.environ["RANK"] == "1":
        checkpoint._checkpoints = older(checkpoint._checkpoints)
    if os.environ.get("SAVING") and os.environ["RANK"] == "1":
        Trainer.checkpoint_due = lambda self, seconds: True
    if scale := os.environ.get("FIRST_SCALE"):
        scaling.GradScaler = functools.partial(scaling.GradScaler, init_scale=float(scale), growth_interval=3)
    if seconds := os.environ.get("EXCHANGE_SECONDS"):
        dist.init_process_group = impatient(dist.init_process_group, float(seconds))
    *first, last = commands(sys.argv[2:])
    for command in first:
        if code := main(command, standalone_mode=False):
            sys.exit(code)
        Rank.current(torch.device("cpu")).barrier()  # the ranks of the next command find all files of this one
    main(last)
