"""Where everything lies, as pure functions of the configuration.

Outputs that DVC knows lie under `outputs/<name>/`; what resumes lies under `<work>/`, in folders named
by the fingerprint of all that they depend on.
"""

import re
from pathlib import Path

from pipeline.config.schema import PURPOSES, Config

FINGERPRINT = re.compile(r"[0-9a-f]{32}")
"""The name of a store (before `.zarr`), of a training's state and of a data set below `work`."""
TEACHER, FINETUNED = "teacher", "finetuned"
NOT_NEEDED = {"needed": False}
"""What stands in place of a teacher's metrics, a manifest and a summary where no student listens to a teacher."""
RUN_LOCK = "running"
"""In a training's state folder: the lock of the process that trains it."""


DATA_LOCK = "preparing"
"""In `work/data`: the lock of the process that prepares data there."""


def outputs(config: Config) -> Path:
    return Path("outputs") / config.name


def used_params(config: Config) -> Path:
    """The configuration that the experiment's last command used, overrides included."""
    return outputs(config) / "params.yaml"


def needed_path(config: Config) -> Path:
    """Of what says which teachers and stores are needed."""
    return outputs(config) / "needed.json"


def index_path(config: Config, split: str) -> Path:
    return outputs(config) / "data" / split / "index.json"


def teacher_folder(config: Config, purpose: str = "train-student") -> Path:
    """Of the teacher that answers for a purpose: train-student or finetune."""
    return outputs(config) / ("teacher" if purpose == "train-student" else "teacher-finetune")


def teacher_logits_folder(config: Config, purpose: str) -> Path:
    """Of a store's manifest and summary; purpose is train-student or finetune."""
    return outputs(config) / ("teacher-logits" if purpose == "train-student" else "teacher-logits-finetune")


def student_folder(config: Config, name: str) -> Path:
    return outputs(config) / "students" / name


def finetune_folder(config: Config, name: str) -> Path:
    """Beside the students, on whose folder `evaluate` depends: there may be none of these."""
    return student_folder(config, f"{name}-{FINETUNED}")


def evaluated_models(config: Config) -> dict[str, Path]:
    """The models that `pipeline evaluate` names, in the order of its tables, each with its weights' folder."""
    models = {}
    if any(map(config.needs_teacher, PURPOSES)):
        models[TEACHER] = teacher_folder(config)
    models |= {name: student_folder(config, name) for name in config.students}
    if config.students or config.finetune.weights:
        models |= {f"{name}-{FINETUNED}": finetune_folder(config, name) for name in config.finetune.students}
    return models


def evaluation_folder(config: Config) -> Path:
    return outputs(config) / "evaluation"


def local_work(work: str) -> Path:
    """Where shards and training state lie: `work`, or the folder `work` where that is a URL, for stores alone."""
    return Path("work" if "://" in work else work)


def digests_folder(config: Config) -> Path:
    """Of the digests of foreign weights, as they were first read."""
    return local_work(config.work) / "weights"


def store_path(config: Config, fingerprint: str) -> str:
    """`work` may be a URL."""
    return f"{config.work}/stores/{fingerprint}.zarr"


def state_folder(config: Config, fingerprint: str) -> Path:
    return local_work(config.work) / "state" / fingerprint
