"""Paths of all files, as pure functions of the configuration.

DVC's outputs are stored in `outputs/NAME/`. What can be resumed is stored in `WORK/`, in folders named by the
fingerprint of everything that they depend on.
"""

import re
from pathlib import Path

from pipeline.config.schema import Config

FINGERPRINT = re.compile(r"[0-9a-f]{32}")
"""Names of stores (without `.zarr`), state folders and data sets in `work`."""
TEACHER, FINETUNED = "teacher", "finetuned"
NOT_NEEDED = {"needed": False}
"""Contents of a teacher's metrics, a manifest and a summary when no student is distilled."""
RUN_LOCK = "running"
"""Lock file in a state folder, held by the process that trains the run."""
DATA_LOCK = "preparing"
"""Lock file in `work/data`, held by the process that prepares data there."""


def outputs(config: Config) -> Path:
    return Path("outputs") / config.name


def recorded_params(config: Config) -> Path:
    """The configuration of the experiment's last command, overrides included."""
    return outputs(config) / "params.yaml"


def needed_path(config: Config) -> Path:
    """The file that states which teachers and stores are needed."""
    return outputs(config) / "needed.json"


def external_path(config: Config) -> Path:
    """Digests of files that DVC does not track but its stages depend on: weights, and the source of custom models."""
    return outputs(config) / "external.json"


def evaluation_sets_path(config: Config) -> Path:
    """Digests of the additional evaluation sets, which DVC does not track but `evaluate` depends on."""
    return outputs(config) / "evaluation-sets.json"


def index_path(config: Config, split: str) -> Path:
    return outputs(config) / "data" / split / "index.json"


def data_settings_path(config: Config) -> Path:
    """The settings that the published indices were made with."""
    return outputs(config) / "data" / "settings.json"


def teacher_folder(config: Config, purpose: str = "train-student") -> Path:
    """The teacher for a purpose: train-student or finetune."""
    return outputs(config) / ("teacher" if purpose == "train-student" else "teacher-finetune")


def teacher_logits_folder(config: Config, purpose: str) -> Path:
    """Manifest and summary of the store for a purpose: train-student or finetune."""
    return outputs(config) / ("teacher-logits" if purpose == "train-student" else "teacher-logits-finetune")


def student_folder(config: Config, name: str) -> Path:
    return outputs(config) / "students" / name


def finetune_folder(config: Config, name: str) -> Path:
    """A fine-tuned student; kept with the students, on whose folder `evaluate` depends, since there may be none."""
    return student_folder(config, f"{name}-{FINETUNED}")


def tensorboard_folder(config: Config, run: str) -> Path:
    """TensorBoard's event files of a run."""
    return outputs(config) / "tensorboard" / run


def evaluated_models(config: Config) -> dict[str, Path]:
    """Models in the order of the tables of `pipeline evaluate`, with the folders of their weights."""
    models = {}
    if config.runs_teacher("train-student"):
        models[TEACHER] = teacher_folder(config)
    models |= {name: student_folder(config, name) for name in config.students}
    if config.students or config.finetune.weights:
        models |= {f"{name}-{FINETUNED}": finetune_folder(config, name) for name in config.finetune.students}
    return models


def evaluation_folder(config: Config) -> Path:
    return outputs(config) / "evaluation"


def local_work(work: str) -> Path:
    """The folder of shards and training state: `work`, or the local folder `work` if that is a URL."""
    return Path("work" if "://" in work else work)


def shard_cache_folder(config: Config) -> Path:
    """Local copies of shards at URLs; may be deleted at any time."""
    return Path(config.data.cache) if config.data.cache else local_work(config.work) / "cache"


def checksums_folder(config: Config) -> Path:
    """Digests of external weight files, recorded when each was first read."""
    return local_work(config.work) / "weights"


def store_path(config: Config, fingerprint: str) -> str:
    """Path or URL of a store, as `work` is."""
    return f"{config.work}/stores/{fingerprint}.zarr"


def state_folder(config: Config, fingerprint: str) -> Path:
    return local_work(config.work) / "state" / fingerprint
