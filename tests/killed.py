"""Run a command of the pipeline with its writes marked: for tests that kill it.

`python killed.py FOLDER ARGUMENT...` appends a line to FOLDER/marks at the start and at the end of every
unit's write and every training step, so that a test can tell what a SIGKILL hit, and slows them down
a little so that kills hit them.
"""

import sys
import time
from pathlib import Path

from pipeline.cli.main import main
from pipeline.store.writer import StoreWriter
from pipeline.training.trainer import Trainer


def marked(function, name: str, marks: Path, pause_seconds: float = 0.03):
    def call(*arguments):
        with open(marks, "a") as file:
            file.write(f"{name} begins\n")
        time.sleep(pause_seconds)
        result = function(*arguments)
        time.sleep(pause_seconds)
        with open(marks, "a") as file:
            file.write(f"{name} ends\n")
        return result

    return call


if __name__ == "__main__":
    marks = Path(sys.argv[1]) / "marks"
    StoreWriter.write_unit = marked(StoreWriter.write_unit, "write", marks)
    StoreWriter.remove_unit = marked(StoreWriter.remove_unit, "removal", marks, 0.15)  # in the midst of a unit's write
    Trainer.train_step = marked(Trainer.train_step, "step", marks)
    Trainer.save = marked(Trainer.save, "save", marks)
    main(sys.argv[2:])
