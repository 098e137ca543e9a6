"""The checks of a dry run, which computes nothing: models and their arguments, and weights.

No data set is needed: before there is an index, the number of classes is unknown and is not checked.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.config.paths import index_path
from pipeline.config.schema import Config, Finetune, Student, Teacher, Training
from pipeline.config.types import is_custom_model
from pipeline.models.activation_checkpointing import checkpoint_activations
from pipeline.models.build import build_student, build_teacher
from pipeline.models.class_map import check_range, class_numbers
from pipeline.models.ensemble import other_classes
from pipeline.models.pretrained import fit_student_weights, fit_weights
from pipeline.models.teacher import check_input_size
from pipeline.models.weights import check_timm_tag, read_weights
from pipeline.shards.index import Index
from pipeline.training.trackers import check_trackers
from pipeline.training.unlabelled import check_unlabelled


def check(config: Config, command: str) -> None:
    """Check what a command would use.

    Args:
        command: its name on the command line.

    Raises:
        UsageError, PipelineError: for the first thing that would make the command fail.
    """
    path = index_path(config, "train")
    names = Index(path).classes if path.exists() else None
    classes = len(names) if names else None
    if command in ("teacher", "train-student", "finetune"):
        check_trackers(config.logging)
    if command in ("teacher", "teacher-logits", "evaluate") and config.runs_teacher("train-student"):
        check_teacher(config, names)
    if command in ("train-student", "evaluate"):
        for name in config.students:
            student = config.student_named(name)
            check_student(config, student, classes, config.recipe.size, student)
            check_student_weights(config, student, classes)
    if command in ("finetune", "evaluate"):
        for name in config.finetune.students:
            check_student(config, config.finetune_student(name), classes, config.finetune.size, config.finetune)
        if config.finetune.weights and config.finetune.students:
            read_weights(config.finetune.weights)


def check_teacher(config: Config, classes: Sequence[str] | None) -> None:
    """Check every teacher of the ensemble, and that additional ones have the classes of the index."""
    first, *others = config.teacher.members
    size = config.teacher_size("train-student")
    if not check_one_teacher(first, classes, size):
        check_unlabelled(unlabelled_images(config), f"teacher {first.weights}: trained with a new classifier", None, False)
    for number, member in enumerate(others):
        if not check_one_teacher(member, classes, member.size or size):
            raise other_classes(number, str(member.weights), len(classes or ()))


def check_one_teacher(section: Teacher, classes: Sequence[str] | None, size: int) -> bool:
    """Check that it can be built, and that its weights exist and fit the model, but for its classifier.

    Returns:
        Whether the classifier of its weights, if it has any, fits the index, as far as is known.
    """
    weights, tag, fits = section.weights, section.timm_tag, True
    state = read_weights(weights) if weights and not tag else None
    if tag and ":" not in tag:
        has = check_timm_tag(tag)
        if section.class_map is not None and classes:
            check_range(class_numbers(section.class_map, classes), has)
        fits = section.class_map is not None or not classes or has == len(classes)
    with only_shapes(section.architecture):
        teacher = build_teacher(section, len(classes or range(1000)))
    if is_custom_model(section.architecture):
        check_input_size(teacher, size, "correct the model, or choose another size", section.architecture)
    if section.checkpoint_activations and not weights:
        checkpoint_activations(teacher, [teacher])
    if state is not None and classes:
        fits = fit_weights(section, teacher.model.to_empty(device="cpu"), state, classes)
    return fits


def only_shapes(model: str) -> contextlib.AbstractContextManager[Any]:
    """Within the block, tensors have no contents; but a custom model is built in full, as its code may need them."""
    return contextlib.nullcontext() if is_custom_model(model) else torch.device("meta")


def unlabelled_images(config: Config) -> int:
    """The number of training images without a label; before there is an index, 1 if there may be any."""
    path = index_path(config, "train")
    return Index(path).unlabelled if path.exists() else int(config.data.unlabelled)


def check_student(config: Config, student: Student, classes: int | None, size: int, training: Training) -> None:
    """Check that it can be built, takes pictures of this size, and can be trained as `training` says."""
    with only_shapes(student.model):
        model = build_student(student, config.recipe, classes or 1000, size)
        check_input_size(model, size, "choose another size, or another model", student.model)
    if training.checkpoint_activations:
        trained = not isinstance(training, Finetune) or training.train_mode
        checkpoint_activations(model, [model] if trained else [])
    check_unlabelled(unlabelled_images(config), f"student {student.model}", student, model.distilled)


def check_student_weights(config: Config, student: Student, classes: int | None) -> None:
    """Check that the weights that a student starts from exist, and local ones that they fit the model."""
    if student.timm_tag and ":" not in student.timm_tag:
        check_timm_tag(student.timm_tag, "student.weights")
    elif student.weights and not student.timm_tag:
        model = build_student(student, config.recipe, classes or 1000, config.recipe.size)
        fit_student_weights(student, model, read_weights(student.weights))
