"""Run a command of the pipeline as one rank that may die: for tests under torchrun.

`python ranks.py DIE ARGUMENT...`: unless DIE is `-`, rank 1 kills itself before training step DIE, once.
"""

import os
import signal
import sys
from pathlib import Path

from pipeline.cli import main
from pipeline.training import Trainer


def dying(train_step, step: int):
    def call(self, *arguments):
        marker = Path("died")
        if self.step == step and os.environ["RANK"] == "1" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, *arguments)

    return call


if __name__ == "__main__":
    if sys.argv[1] != "-":
        Trainer.train_step = dying(Trainer.train_step, int(sys.argv[1]))
    main(sys.argv[2:])
