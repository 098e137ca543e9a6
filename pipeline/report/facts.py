"""Facts about an experiment for the report."""

import platform
from typing import Any

import torch

from pipeline.common.versions import library_versions
from pipeline.common.wording import count_of, size_of
from pipeline.config.paths import FINETUNED, teacher_folder
from pipeline.config.schema import Config, Recipe, Student
from pipeline.report.settings import objective, trained_run
from pipeline.shards.index import Index
from pipeline.store.reader import Store
from pipeline.views.draw import recipe_fingerprint

Terms = dict[str, str]


def describe_experiment(
    config: Config, train: Index, val: Index, store: Store | None, summary: dict[str, Any], device: torch.device
) -> dict[str, Terms]:
    """Sections of the report: headings, each with terms and their descriptions.

    Args:
        store: where the teacher's predictions are; None without a teacher.
        summary: the store's.
    """
    sections = {"Students": _describe_students(config)}
    if store:
        sections["Teacher"] = _describe_teacher(config, store)
        sections["Store of teacher predictions"] = _describe_store(store, summary)
    return sections | {
        "Recipe": _describe_recipe(config.recipe),
        "Data": {
            "classes": f"{len(train.classes):,}",
            "training": f"{len(train):,} images in {count_of(len(train.names), 'shard')}",
            "validation": f"{len(val):,} images",
            "fingerprint": train.fingerprint,
        },
        "Evaluation": _describe_evaluation(config, device),
    }


def _describe_teacher(config: Config, store: Store) -> Terms:
    """The teacher of the students' store: the configured one, or that of a published store."""
    if published := config.fetch_source("train-student"):
        return {"model": str(store.attributes["teacher"].get("model")), "predictions": f"published at {published}"}
    here = not config.teacher.weights or trained_run(teacher_folder(config))
    trained = f"by the pipeline, epochs: {config.teacher.epochs}" if here else "elsewhere"
    return {"model": config.teacher.title, "trained": trained}


def _describe_students(config: Config) -> Terms:
    students = {name: _describe_student(config.student_named(name)) for name in config.students}
    tuned = config.finetune
    if students or tuned.weights:
        about = f"at {tuned.size} px, epochs: {tuned.epochs}"
        students |= {f"{name}-{FINETUNED}": f"{tuned.weights or name} {about}" for name in tuned.students}
    return students


def _describe_student(student: Student) -> str:
    return f"{student.model}, {objective(student)}, epochs: {student.epochs}"


def _describe_store(store: Store, summary: dict[str, Any]) -> Terms:
    rows, views, size = summary["rows"], summary["views"], summary["bytes"]
    agreement = summary["agreement_with_labels"]
    agrees = "unknown: no image has a label"
    if agreement is not None:
        agrees = f"{agreement:.1%} of predicted classes are the image's own label"
    return {
        "images": f"{rows:,}",
        "views per image": f"{views:,}",
        "kind": summary["kind"],
        "size": f"{size_of(size)}, {size / (rows * views):.1f} bytes per view",
        "precision": str(store.attributes["precision"]),
        "agreement": agrees,
        "fingerprint": store.fingerprint,
    }


def _describe_recipe(recipe: Recipe) -> Terms:
    return {
        "views": f"{recipe.size} px, crops of {recipe.scale[0]:g} to {recipe.scale[1]:g} of the image",
        "augmentation": f"{recipe.auto_augment or f'color jitter {recipe.color_jitter:g}'}, flip {recipe.hflip:g},"
        f" erasing {recipe.erase_prob:g}",
        "mixing": f"{recipe.mix_prob:.0%} of the groups of {recipe.group_size}: mixup {recipe.mixup_alpha:g},"
        f" cutmix {recipe.cutmix_alpha:g}",
        "repeats": f"{recipe.repeats}, in blocks of {recipe.block} views",
        "seed": str(recipe.seed),
        "fingerprint": recipe_fingerprint(recipe),
    }


def _describe_evaluation(config: Config, device: torch.device) -> Terms:
    settings, cpu = config.evaluate, f"CPU, threads: {torch.get_num_threads()}"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "batch size": f"{settings.batch_size}, throughput over {settings.throughput_seconds:g} s",
        **({"ReaL's labels": settings.real_labels} if settings.real_labels else {}),
        **{f"set {name}": folder for name, folder in settings.sets.items()},
        "crop": f"{settings.crop:g}, fine-tuned {settings.crop_finetuned:g}, teacher {config.teacher.crop:g}",
        "python": platform.python_version(),
        **library_versions(),
    }
