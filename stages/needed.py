"""Which teachers and stores the configured students need, so that `dvc repro` makes no others.

The stage graph is the same for every configuration. So this stage writes what is needed to a file that changes only
when the needs change; a stage whose teacher or store is not needed writes a placeholder and returns at once.
"""

from pipeline.common.files import write_json
from pipeline.config.paths import needed_path
from pipeline.config.schema import PURPOSES, Config


def run(config: Config) -> None:
    """Write outputs/NAME/needed.json: whether train-student and finetune need a teacher and a store.

    A published store that is fetched instead is named.
    """
    needed: dict[str, bool | dict[str, str]] = {}
    for purpose in PURPOSES:
        published = config.fetch_source(purpose)
        fetched = published and config.needs_store(purpose)
        needed[purpose] = {"fetch": published} if published and fetched else config.needs_teacher(purpose)
        without = "no student learns from a teacher"
        if purpose == "finetune" and not config.finetune.students:
            without = "no student is fine-tuned"
        what = "a teacher and a store" if needed[purpose] else without
        print(f"{purpose}: " + (f"the store published at {published}" if fetched else what))
    write_json(needed_path(config), needed)
