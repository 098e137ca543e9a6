"""What a GPU makes of the teacher and of a student's step: one report, meant to take seven minutes on an H200.

\b
* teacher: views/s of pipeline.store.labelling.UnitWorker, committing to a store, with groups that were rendered
  before and with the real loader, against the bare forward pass of the same teacher on pictures on the device;
* bits: a unit's float16 logits, computed again, and with other numbers of workers;
* repeats: steps of a student and of a teacher in training, done twice from the same weights, without and with
  `deterministic`: how many weights differ, and what a step takes;
* loader: the step with the store, fed by the real loader, of the first case with the student `small`;
* each of --cases, a student at a size: the step of pipeline.training.trainer.Trainer without distillation, with the
  store, and with the teacher in the loop, on batches in the host's pinned memory (copied as in training) and
  on the device; and the teacher's forward pass alone. Bound: 1 + forward / step without distillation, batches on
  the device; FLOP bound: 1 + T / (3 S), with T and S the multiply-adds of a forward pass.

bf16; distilled students, hard. Drop-path, AdamW, the EMA of the weights and, with the store, the second head's
loss are in a step. The teacher is channels_last, in the loop too; with --compile teacher and students are
compiled, before anything is timed. Seconds are means of many consecutive steps between two synchronizations; ways
take turns in changing order; ratios are taken within a round. Waits: how much of the step the host waits for
the device; near none, the host is the limit. Host: what a step costs the host without waiting. MiB: the most
that was allocated beyond what was before the way's model was made, and the teacher's weights where it is in the
loop. Data, weights and predictions are random.

\b
    python bench/gpu.py
    python bench/gpu.py --only bits,small@224 --no-compile
"""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports it

import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
from gpu_student import loader_part, repeats_part, step_part
from gpu_teacher import bits_part, teacher_part
from lab import Lab, attempt, make_lab
from machine import conditions

from pipeline.cli.options import DEVICE, find_device


def parts_of(lab: Lab, cases: str) -> dict[str, Callable[[], None]]:
    """Every part by its name, in order."""
    students = {case: (case.split("@")[0], int(case.split("@")[1])) for case in cases.split(",")}
    fed = next((student for student in students.values() if student[0] == "small"), next(iter(students.values())))
    parts = {"teacher": teacher_part, "bits": bits_part, "repeats": repeats_part}
    return {
        **{name: partial(part, lab) for name, part in parts.items()},
        "loader": partial(loader_part, lab, *fed),
        **{case: partial(step_part, lab, *student) for case, student in students.items()},
    }


@click.command(help=__doc__)
@click.option("--only", help="Parts, by their names: teacher, bits, repeats, loader, the cases.")
@click.option("--cases", default="tiny@224,small@224,base@224,base@384", show_default=True)
@click.option("--teacher", default="regnety_160", show_default=True)
@click.option("--batch", default=256, show_default=True, help="Views per step.")
@click.option("--group", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="For each way, all rounds together.")
@click.option("--minutes", default=5.0, show_default=True, help="No part begins later than this.")
@click.option("--workers", default=0, show_default=True, help="0: one less than the cores.")
@click.option("--compile/--no-compile", default=None, help="The default is to compile on a GPU.")
@DEVICE
@click.option("--tiny", is_flag=True, help="Small models and pictures, two rounds: to see that it runs.")
def main(**given: Any):
    options = SimpleNamespace(**given)
    device = find_device(options.device)
    if options.compile is None:
        options.compile = device.type == "cuda"
    if options.tiny:
        options.rounds, options.cases = 2, "tiny@32,small@48"
    deadline = time.monotonic() + 60 * options.minutes
    print(conditions())
    how = "compiled" if options.compile else "not compiled"
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if Path("/dev/shm").exists() else 0
    print(f"* {device}, {how}, {shared:.0f} GiB of shared memory free", flush=True)
    with tempfile.TemporaryDirectory() as root:
        parts = parts_of(make_lab(Path(root), device, options), options.cases)
        chosen = options.only.split(",") if options.only else list(parts)
        if unknown := set(chosen) - set(parts):
            raise click.UsageError(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
        for title in chosen:
            attempt(title, parts[title], deadline)


if __name__ == "__main__":
    main()
