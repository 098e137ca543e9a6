"""Checks across sections of the configuration, which no section can make by itself."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.config.types import NAME

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.config.training_sections import Training

RESERVED = ("class", "images", "teacher", "truth")
"""Names in the report beside those of students."""


def conflicting_settings(config: "Config") -> Iterator[str]:
    """Yield a message for each conflict between settings, with the keys' full names."""
    yield from _views(config)
    yield from _batches(config)
    yield from _compiled(config)
    yield from _names(config)
    yield from _val_fraction(config)
    yield from _torchvision(config)
    yield from _shards(config)
    yield from _finetuned_students(config)
    yield from _unlabelled(config)
    yield from _students(config)
    yield from _sample_tau(config)
    yield from _reuse_view(config)
    yield from _teacher_sizes(config)
    yield from _teacher_head(config)
    yield from _ensemble(config)


def _views(config: "Config") -> Iterator[str]:
    block = config.recipe.block
    for section in ("teacher_logits", "finetune"):
        views = getattr(config, section).views
        if views % block:
            yield f"{section}.views must be a multiple of recipe.block: {views} views, block {block}"


def _trainings(config: "Config") -> dict[str, "Training"]:
    runs = {"teacher": config.teacher, "student": config.student, "finetune": config.finetune}
    runs |= {f"variants.{name}": config.student_named(name) for name in config.variants}
    if config.teacher_finetune.epochs:
        runs["teacher_finetune"] = config.teacher_finetune
    return runs


def _batches(config: "Config") -> Iterator[str]:
    group = config.recipe.group_size
    for key, run in _trainings(config).items():
        groups, rest = divmod(run.batch_size, group)
        if rest:
            yield f"{key}.batch_size must be a multiple of recipe.group_size: {run.batch_size}, group_size {group}"
        elif groups % run.accumulation:
            yield f"{key}.accumulation must divide the {groups} groups of a batch: {run.accumulation}"


def _compiled(config: "Config") -> Iterator[str]:
    for key, run in _trainings(config).items():
        if run.compile and run.checkpoint_activations:
            yield f"{key}.checkpoint_activations must be false with {key}.compile: found true"


def _names(config: "Config") -> Iterator[str]:
    for name in config.variants:
        if name in RESERVED or name.endswith("finetuned") or not re.fullmatch(NAME, name):
            yield (
                f"variants.{name}: the name must consist of letters, digits and ._-, must not begin with . or - or end in"
                f" `finetuned`, and must be none of {', '.join(RESERVED)}"
            )


def _val_fraction(config: "Config") -> Iterator[str]:
    data = config.data
    if data.val_fraction and data.source in ("digits", "shards"):
        yield f"data.val_fraction must be 0 with data.source {data.source}, which has its own split: {data.val_fraction}"
    if data.val_fraction and data.val:
        yield f"data.val must be empty with data.val_fraction, which divides data.train: found {data.val!r}"


def _torchvision(config: "Config") -> Iterator[str]:
    data, wanted = config.data, config.data.source == "torchvision"
    if wanted and not data.dataset:
        yield "data.dataset must be the name of a data set with data.source torchvision: found none"
    if data.dataset and not wanted:
        yield f"data.dataset must be empty with data.source {data.source}: found {data.dataset}"
    if data.download and not wanted:
        yield f"data.download must be false with data.source {data.source}: found true"
    if wanted and data.val:
        yield f"data.val must be empty with data.source torchvision, whose files are in data.train: found {data.val!r}"


def _shards(config: "Config") -> Iterator[str]:
    if config.data.source != "shards":
        for key in ("label_key", "class_names"):
            if value := getattr(config.data, key):
                yield f"data.{key} must be empty unless data.source is shards: found {value!r}, {config.data.source}"
        return
    for split in ("train", "val"):
        text = getattr(config.data, split)
        if not _balanced(text):
            yield f"data.{split} must have balanced braces, as in train-{{0000..1023}}.tar: found {text!r}"


def _unlabelled(config: "Config") -> Iterator[str]:
    if not config.data.unlabelled:
        return
    if config.data.source not in ("folder", "shards"):
        yield f"data.unlabelled must be false unless data.source is folder or shards: found {config.data.source}"
    if not config.teacher.weights:
        yield "teacher.weights must be set with data.unlabelled: a teacher cannot be trained on images without labels"
    if config.teacher_finetune.epochs:
        yield (
            "teacher_finetune.epochs must be 0 with data.unlabelled: a teacher cannot be trained on images without"
            f" labels; found {config.teacher_finetune.epochs}"
        )
    for name in config.trained_students:
        if (student := config.student_named(name)).uses_labels:
            yield (
                "data.unlabelled needs students that learn from the teacher alone, with soft or hard distillation and"
                f" alpha 1: student {name} has distillation {student.distillation}, alpha {student.alpha:g}"
            )


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def _students(config: "Config") -> Iterator[str]:
    if len(set(config.students)) != len(config.students):
        yield f"students must be different names: {config.students}"
    for name in config.trained_students:
        if config.student_named(name).distillation == "soft" and config.teacher_logits.kind == "argmax":
            yield (
                f"teacher_logits.kind must be topk, dense8, dense or sampled: student {name} uses soft distillation; found argmax"
            )


def _sample_tau(config: "Config") -> Iterator[str]:
    if config.teacher_logits.kind != "sampled":
        return
    tau = config.teacher_logits.sample_tau
    for name in config.trained_students:
        student = config.student_named(name)
        if student.distillation == "soft" and student.tau != tau:
            yield (
                "teacher_logits.sample_tau must be the tau of students with soft distillation, which is that of the drawn"
                f" classes: {tau:g}, student {name} has tau {student.tau:g}"
            )


def _reuse_view(config: "Config") -> Iterator[str]:
    recipe, views = config.recipe, config.teacher_logits.views
    mixed = recipe.mix_prob > 0 and (recipe.mixup_alpha > 0 or recipe.cutmix_alpha > 0)
    tuned = [name for name in config.finetune.students if name in config.variants]
    for name in dict.fromkeys([*config.students, *tuned]):
        if (view := config.student_named(name).reuse_view) is None:
            continue
        if mixed:
            yield (
                "recipe.mix_prob must be 0 with reuse_view: predictions of a mixed image belong to no single image;"
                f" found {recipe.mix_prob:g}, student {name} has reuse_view {view}"
            )
        if view >= views:
            yield f"reuse_view must be less than teacher_logits.views: student {name} has {view}, {views} views"
        if name in tuned:
            yield f"finetune.from must be of students with reuse_view null: student {name} has {view}"


def _teacher_sizes(config: "Config") -> Iterator[str]:
    others = {config.finetune.teacher_size, config.teacher.size} - {None, config.finetune.size}
    if config.teacher_finetune.epochs and others:
        yield (
            "finetune.teacher_size and teacher.size must be null when the teacher is fine-tuned at finetune.size:"
            f" found {others.pop()}, teacher_finetune.epochs {config.teacher_finetune.epochs}"
        )
    if config.teacher.size and not config.teacher.weights:
        yield (
            "teacher.size must be null without teacher.weights: the pipeline trains the teacher at recipe.size; found"
            f" {config.teacher.size}"
        )


def _teacher_head(config: "Config") -> Iterator[str]:
    teacher = config.teacher
    if teacher.head_epochs > teacher.epochs:
        yield f"teacher.head_epochs must be at most teacher.epochs: {teacher.head_epochs}, epochs {teacher.epochs}"
    if teacher.head_epochs and not teacher.weights:
        yield f"teacher.head_epochs must be 0 without teacher.weights: found {teacher.head_epochs}"
    if teacher.class_map is not None and not teacher.weights:
        yield "teacher.class_map must be null without teacher.weights: a teacher that is trained has the index's classes"
    if teacher.class_map is not None and teacher.head_epochs:
        yield f"teacher.head_epochs must be 0 with teacher.class_map, which keeps the classifier: {teacher.head_epochs}"


def _ensemble(config: "Config") -> Iterator[str]:
    if config.teacher.ensemble and config.teacher_finetune.epochs:
        yield (
            "teacher_finetune.epochs must be 0 with teacher.ensemble, as only a single teacher is adapted: found"
            f" {config.teacher_finetune.epochs}"
        )


def _finetuned_students(config: "Config") -> Iterator[str]:
    if len(set(config.finetune.students)) != len(config.finetune.students):
        yield f"finetune.from must be different names: {config.finetune.students}"
    for name in config.finetune.students:
        if config.students and not config.finetune.weights and name not in config.students:
            yield f"finetune.from must name students from {config.students}: found {name!r}"
        else:
            config.student_named(name)
