"""Which teachers and stores the configured students need, so that `dvc repro` makes no others.

The stage graph is the same for every configuration. So this stage writes what is needed to a file that changes only
when the needs change; a stage whose teacher or store is not needed writes a placeholder and returns at once.
"""

import json

from pipeline.common.files import atomic_write
from pipeline.config.paths import needed_path
from pipeline.config.schema import PURPOSES, Config


def run(config: Config) -> None:
    """Write outputs/<name>/needed.json: whether train-student and finetune need a teacher and a store."""
    needed = {purpose: config.needs_teacher(purpose) for purpose in PURPOSES}
    with atomic_write(needed_path(config)) as temporary:
        temporary.write_text(json.dumps(needed, indent=1) + "\n")
    for purpose, is_needed in needed.items():
        print(f"{purpose}: " + ("a teacher and a store" if is_needed else "no student learns from a teacher"))
