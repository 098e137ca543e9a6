"""Which teachers and stores the configured students need, so that `dvc repro` makes no other.

DVC's graph is the same for every configuration. So this stage writes what is needed, in a file that changes only
when that does; where a teacher or store is not, its stage leaves a mark in its place at once.
"""

import json

from pipeline.common.files import atomic_write
from pipeline.config.paths import needed_path
from pipeline.config.schema import PURPOSES, Config


def run(config: Config) -> None:
    """Write outputs/<name>/needed.json: for train-student and for finetune, whether anybody listens to a teacher."""
    needed = {purpose: config.needs_teacher(purpose) for purpose in PURPOSES}
    with atomic_write(needed_path(config)) as temporary:
        temporary.write_text(json.dumps(needed, indent=1) + "\n")
    for purpose, listens in needed.items():
        print(f"{purpose}: " + ("a teacher and a store" if listens else "no student listens to a teacher"))
