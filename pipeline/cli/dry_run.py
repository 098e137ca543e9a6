"""What a dry run checks of a configuration without computing: models and their arguments, weights, what answers are for.

It needs no data set: where there is no index yet, the number of classes is not known, and not compared.
"""

import torch

from pipeline.config.paths import index_path
from pipeline.config.schema import PURPOSES, Config, Student
from pipeline.models.build import build_student, build_teacher
from pipeline.models.weights import SUFFIXES, check_timm_tag, load_weights, read_weights
from pipeline.shards.index import Index


def check(config: Config, command: str) -> None:
    """Check what a command would come to use; `command` is its name on the command line.

    Raises:
        UsageError, PipelineError: of the first thing that would stop it later.
    """
    path = index_path(config, "train")
    classes = len(Index(path).classes) if path.exists() else None
    if command in ("teacher", "teacher-logits", "evaluate") and any(map(config.needs_teacher, PURPOSES)):
        check_teacher(config, classes)
    if command in ("train-student", "evaluate"):
        for name in config.students:
            check_student(config, config.student_named(name), classes, config.recipe.size)
    if command in ("finetune", "evaluate"):
        for name in config.finetune.students:
            check_student(config, config.finetune_student(name), classes, config.finetune.size)
        if config.finetune.weights and config.finetune.students:
            read_weights(config.finetune.weights)


def check_teacher(config: Config, classes: int | None) -> None:
    """That it can be built, that its weights are there, and that they are this model's and of as many classes."""
    section, weights = config.teacher, config.teacher.weights
    local = weights and weights.endswith(SUFFIXES)
    state = read_weights(weights) if weights and local else None
    if weights and not local and ":" not in weights:
        check_timm_tag(weights, classes)
        section = section.model_copy(update={"model": weights})
    with torch.device("meta"):  # shapes alone
        teacher = build_teacher(section, classes or 1000)
    if state is not None and classes:
        load_weights(teacher.model.to_empty(device="cpu"), state, str(weights))


def check_student(config: Config, student: Student, classes: int | None, size: int) -> None:
    """That it can be built."""
    with torch.device("meta"):
        build_student(student, config.recipe, classes or 1000, size)
