"""The teacher: read from weights, or trained on the shards; evaluated, and refused if it is poor.

For fine-tuning at a higher resolution it is evaluated there, after its own fine-tuning if that is configured.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.batches.plan import training_plan
from pipeline.common.distributed import Rank
from pipeline.common.errors import PipelineError
from pipeline.config.paths import NOT_NEEDED, checksums_folder, teacher_folder
from pipeline.config.schema import Config, Recipe, Teacher, Training
from pipeline.models.adapt import fixres_modules
from pipeline.models.build import NormalizedModel, build_teacher, parameter_count
from pipeline.models.description import describe_model
from pipeline.models.ensemble import Ensemble, join, load_members
from pipeline.models.evaluation import classifiers, predict, top_k_accuracy
from pipeline.models.pretrained import classifier_modules, load_pretrained
from pipeline.models.provenance import teacher_architecture, teacher_source
from pipeline.models.teacher import check_input_size, describe_teacher, load_teacher, save_teacher
from pipeline.models.weights import check_timm_tag, save_weights, weights_hash
from pipeline.shards.index import Index
from pipeline.shards.published import open_index
from pipeline.training.completion import publish, train_to_completion
from pipeline.training.identity import configured_teacher, configured_teacher_finetune
from pipeline.training.origin import describe_training, require_teacher
from pipeline.training.run import Run, describe_run, prepare_run, print_if_not_ready


def run(config: Config, device: torch.device, purpose: str = "train-student", dry_run: bool = False) -> None:
    """Write outputs/NAME/teacher/ or teacher-finetune/: weights.safetensors, model.json, metrics.json and curve.csv.

    Args:
        purpose: the stage that the teacher is for, train-student or finetune.

    Raises:
        PipelineError: its top-1 on val is below `teacher.min_top1`; nothing is published then.
    """
    train, val = (open_index(config, split) for split in ("train", "val"))
    size, found = config.teacher_size(purpose), None
    if dry_run and purpose == "train-student" and config.teacher.timm_tag:
        print(describe_tag(config, len(train.classes)), *describe_members(config.teacher), sep="\n")  # no download
        return
    with print_if_not_ready(dry_run):
        found = teacher_or_run(config, purpose, train, val, device)
    if found is None:
        return
    training, teacher = (found, found.model) if isinstance(found, Run) else (None, found)
    source = config.teacher.weights or "not trained further"
    lines = [describe_run(training) if training else f"teacher: {source}, {size} px", *describe_members(config.teacher)]
    print(*lines, sep="\n")
    check_input_size(teacher, size, _size_advice(config, purpose))
    if not dry_run:
        about = describe_source(config, purpose)  # the file may be replaced during training
        others = further_teachers(config, train.classes) if purpose == "train-student" else []  # else part of it
        last_epoch = train_to_completion(training) if training else None
        teacher = join(config.teacher, [teacher, *others]) if others else teacher
        evaluate_and_publish(config, purpose, teacher, val, device, about, training, last_epoch)


def describe_members(section: Teacher) -> list[str]:
    """A line about each additional teacher of the ensemble."""
    return [f"  averaged with {member.weights}" for member in section.ensemble]


def further_teachers(config: Config, classes: list[str]) -> list[NormalizedModel]:
    """The additional teachers of the ensemble, checked to take pictures of their size.

    Raises:
        UsageError, PipelineError: as `load_members`, or one does not take them.
    """
    models = load_members(config.teacher, classes, checksums_folder(config))
    for number, (member, model) in enumerate(zip(config.teacher.ensemble, models, strict=True)):
        key, size = f"teacher.ensemble[{number}]", member.size or config.teacher_size("train-student")
        check_input_size(model, size, f"set {key}.size to the size that it takes", f"{key} {member.weights}")
    return models


def mark_unneeded(config: Config, purpose: str) -> None:
    """Write placeholders for weights, curve and metrics, as DVC expects them: no student learns from a teacher."""
    folder = teacher_folder(config, purpose)
    publish(folder, lambda path: save_weights(path, nn.Module(), NOT_NEEDED), NOT_NEEDED, NOT_NEEDED)
    fetched = config.needs_store(purpose)
    why = "the predictions are fetched" if fetched else "no student learns from one"
    print(f"teacher for {purpose}: not needed, {why}")


def teacher_or_run(
    config: Config, purpose: str, train: Index, val: Index, device: torch.device
) -> NormalizedModel | Run:
    """The teacher as it is, or the run that trains or fine-tunes it.

    Raises:
        NotReady: for finetune, there is no teacher yet.
        UsageError, PipelineError: no such weights, or weights of another model.
    """
    section = config.teacher
    if purpose == "finetune":
        require_teacher(config, train.fingerprint)
        adapted = config.teacher_finetune.epochs
        return _finetuning_run(config, train, val, device) if adapted else load_teacher(config, train.classes, device)
    if not section.weights:
        return _training_run(config, train, val, device, build_teacher(section, len(train.classes)), {})
    teacher, fits = load_pretrained(section, train.classes, checksums_folder(config))
    if fits:
        return teacher
    print(describe_transfer(section, len(train.classes)))
    start = {"start": weights_hash(teacher.model)}
    return _training_run(config, train, val, device, teacher, start, section.head_epochs)


def _training_run(
    config: Config,
    train: Index,
    val: Index,
    device: torch.device,
    model: NormalizedModel,
    dependencies: dict[str, Any],
    head_epochs: int = 0,
) -> Run:
    """The training on the shards: the classifier alone in the first `head_epochs`, then the entire model."""
    settings, recipe = config.teacher, config.teacher_recipe()
    return prepare_run(
        config, "teacher", configured_teacher(config, train.fingerprint), dependencies, settings=settings,
        recipe=recipe, views=_views(train, recipe, settings), train=train, val=val, model=model, crop=settings.crop,
        device=device, trainable=classifier_modules(model.model) if head_epochs else [],
        thaw_epoch=head_epochs if 0 < head_epochs < settings.epochs else None,
    )  # fmt: skip


def describe_tag(config: Config, classes: int) -> str:
    """What would be done with the weights of a timm tag, as text."""
    tag = str(config.teacher.timm_tag)
    if ":" in tag:
        return f"teacher: {tag}, {config.teacher_size('train-student')} px; its classes are known once it is downloaded"
    if check_timm_tag(tag) != classes and config.teacher.class_map is None:
        return describe_transfer(config.teacher, classes)
    return f"teacher: {tag}, {config.teacher_size('train-student')} px"


def describe_transfer(section: Teacher, classes: int) -> str:
    """That the classifier of `teacher.weights` is replaced, and what is trained then, as text."""
    alone = f", the first {section.head_epochs} of the classifier alone" if section.head_epochs else ""
    return (
        f"teacher: {section.weights} has a different number of classes from the index ({classes:,}): its classifier is"
        f" replaced, and it is trained for {section.epochs} epochs{alone}"
    )


def _finetuning_run(config: Config, train: Index, val: Index, device: torch.device) -> Run:
    """FixRes: the classifier and the last batch norm are trained at the higher resolution, nothing else."""
    settings, recipe = config.teacher_finetune, config.teacher_finetune_recipe()
    teacher = load_teacher(config, train.classes, device)
    return prepare_run(
        config, f"teacher at {recipe.size}", configured_teacher_finetune(config, train.fingerprint),
        {"start": describe_teacher(config.teacher, teacher, recipe.size)}, settings=settings, recipe=recipe,
        views=_views(train, recipe, settings), train=train, val=val, model=teacher, crop=config.teacher.crop,
        device=device, trainable=fixres_modules(teacher.model),
    )  # fmt: skip


def _views(train: Index, recipe: Recipe, settings: Training) -> int:
    """Views per image: as many as the epochs use, in whole blocks, since nothing is stored for a teacher's training."""
    needed = training_plan(train, recipe, settings, recipe.block).views_seen(settings.epochs)
    return -(-needed // recipe.block) * recipe.block


def evaluate_and_publish(
    config: Config,
    purpose: str,
    teacher: NormalizedModel,
    val: Index,
    device: torch.device,
    about: dict[str, Any],
    training: Run | None = None,
    last_epoch: dict[str, Any] | None = None,
) -> None:
    """Evaluate the teacher; refuse it, or write weights, curve and metrics.

    Args:
        about: what metrics.json says in addition; see `describe_source`.
        training: the run that trained it, with the metrics of its last epoch.
    """
    size, finetune_size = config.teacher_size(purpose), config.teacher_size("finetune")
    metrics: dict[str, Any] = dict(accuracy_or_refusal(config, teacher, val, size, device))
    if isinstance(teacher, Ensemble):
        metrics["members"] = evaluate_members(config, teacher, val, size, device)
    reused = purpose == "train-student" and config.needs_teacher("finetune") and not config.teacher_finetune.epochs
    if reused and finetune_size != size:  # refuse before students are trained, not after
        check_input_size(teacher, finetune_size, _size_advice(config, "finetune"))
        accuracy_or_refusal(config, teacher, val, finetune_size, device)
    if Rank.current(device).rank:
        return  # rank 0 publishes
    print(f"teacher: top-1 {metrics['top1']:.4f}, top-5 {metrics['top5']:.4f} on {len(val):,} images at {size} px")
    description = describe_model(teacher, val.classes, size, config.teacher.crop).as_json()
    trained = describe_training(training.identity) if training else None
    publish(
        teacher_folder(config, purpose), lambda path: save_teacher(path, config.teacher, teacher, description, trained),
        description, metrics | about, training, last_epoch,
    )  # fmt: skip


def evaluate_members(
    config: Config, teacher: Ensemble, val: Index, size: int, device: torch.device
) -> dict[str, dict[str, float | str | int]]:
    """Each member's accuracy on the pictures that the ensemble is evaluated on, by its number and weights."""
    found = {}
    pairs = zip(config.teacher.members, teacher.members, teacher.sizes, strict=True)
    for number, (section, member, own_size) in enumerate(pairs):
        metrics, name = _evaluate(config, Ensemble([member], [own_size]), val, size, device), section.title
        if Rank.current(device).rank == 0:
            low = "; below teacher.min_top1" * (float(metrics["top1"]) < config.teacher.min_top1)
            print(f"teacher {number}, {name}: top-1 {metrics['top1']:.4f}, top-5 {metrics['top5']:.4f}{low}")
        found[f"{number}: {name}"] = {key: metrics[key] for key in ("top1", "top5", "parameters")}
    return found


def describe_source(config: Config, purpose: str) -> dict[str, Any]:
    """The configured architecture and source of the weights, by which `pipeline status` recognizes the teacher.

    A teacher for fine-tuning comes from the one of train-student, whose metrics.json has its origin.
    """
    if purpose == "finetune":
        return {}
    source = teacher_source(config.teacher, checksums_folder(config))
    return {"architecture": teacher_architecture(config.teacher), "source": source}


def _size_advice(config: Config, purpose: str) -> str:
    """What to do if the teacher does not take images of its configured size."""
    if purpose == "train-student" and not config.teacher.weights:
        return "set recipe.size to the size that it takes, or teacher.kwargs so that it takes this one"
    key = "teacher.size" if purpose == "train-student" else "finetune.teacher_size"
    return f"set {key} to the size that it takes: pictures are resized to it"


def accuracy_or_refusal(
    config: Config, teacher: NormalizedModel, val: Index, size: int, device: torch.device
) -> dict[str, float | str | int]:
    """The teacher's metrics on `val` at `size` pixels.

    Raises:
        PipelineError: its top-1 is below `teacher.min_top1`.
    """
    section, trained = config.teacher, config.teacher_size("train-student")
    metrics = _evaluate(config, teacher, val, size, device)
    largest = np.bincount(val.labels()).max() / len(val)
    if float(metrics["top1"]) >= section.min_top1:
        if metrics["top1"] <= largest:
            print(
                f"warning: the teacher is no better than always predicting the most frequent class, which gives {largest:.4f}"
            )
        return metrics
    longer = "train it longer (teacher.epochs)"
    do = f"check that its classes are in the index's order; {longer}" if section.weights else longer
    do += "; or lower teacher.min_top1"
    if size != trained and not config.teacher_finetune.epochs:
        do = f"it is poor at a size other than its own: set finetune.teacher_size to {trained} or null, or adapt it"
        do += " with teacher_finetune.epochs"
    raise PipelineError(
        f"teacher {section.title} at {size} px: top-1 on {val.path}",
        expected=f"at least {section.min_top1:.4f} (teacher.min_top1)",
        found=f"{metrics['top1']:.4f}; always predicting the most frequent class gives {largest:.4f}",
        do=do,
    )


def _evaluate(
    config: Config, teacher: NormalizedModel, val: Index, size: int, device: torch.device
) -> dict[str, float | str | int]:
    section, evaluate = config.teacher, config.evaluate
    heads = predict(
        teacher, val, size, section.crop, evaluate.batch_size, evaluate.workers, device, section.precision
    )
    scores, labels = classifiers(heads, False)["class"], torch.from_numpy(val.labels())
    return {
        "top1": top_k_accuracy(scores, labels, 1),
        "top5": top_k_accuracy(scores, labels, 5),
        "size": size,
        "parameters": parameter_count(teacher.model),
        "weights": weights_hash(teacher.model),
    }
