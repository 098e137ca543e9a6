"""The teacher: read from weights, or trained on the shards; evaluated and, if it is poor, refused.

For fine-tuning at a higher resolution it is evaluated there, after its own fine-tuning if that is asked for.
"""

import json
from typing import Any

import torch
from torch import nn

from pipeline.batches.plan import Plan, training_plan
from pipeline.common.distributed import Rank
from pipeline.common.errors import NotReady, PipelineError
from pipeline.common.files import atomic_write
from pipeline.config.paths import NOT_NEEDED, digests_folder, index_path, state_folder, teacher_folder
from pipeline.config.schema import Config, Recipe, Training
from pipeline.config.validation import fingerprint
from pipeline.models.adapt import fixres_modules
from pipeline.models.build import NormalizedModel, build_teacher, parameter_count
from pipeline.models.evaluation import classifiers, predict, top_k_accuracy
from pipeline.models.teacher import check_input_size, describe_teacher, load_teacher, pretrained_teacher, save_teacher
from pipeline.models.weights import save_weights, weights_hash
from pipeline.shards.index import Index
from pipeline.training.completion import complete
from pipeline.training.identity import configured_teacher, configured_teacher_finetune, run_identity
from pipeline.training.log import write_curve
from pipeline.training.run import Run, describe_run, has_batch_norm


def run(config: Config, device: torch.device, purpose: str = "train-student", dry_run: bool = False) -> None:
    """Write outputs/<name>/teacher/ or teacher-finetune/: weights.safetensors and metrics.json, if it is good enough.

    Raises:
        PipelineError: its top-1 on val is below `teacher.min_top1`; nothing is published then.
    """
    train, val = Index(index_path(config, "train")), Index(index_path(config, "val"))
    size = config.teacher_size(purpose)
    try:
        training = _training(config, purpose, train, val, device)
    except NotReady as error:
        if not dry_run:
            raise
        print(f"not yet: {error.what}")
        return
    print(describe_run(training) if training else f"teacher: {config.teacher.weights or 'as it is'}, {size} px")
    if training:
        check_input_size(training.model, size, _size_key(config, purpose))
    if dry_run:
        return
    told: dict[str, Any] = {}
    if training:
        told = complete(training)
        teacher = training.model
    elif purpose == "finetune":
        teacher = load_teacher(config, len(train.classes), device)
    else:
        assert config.teacher.weights, "without weights it is trained"
        notes = digests_folder(config)
        teacher = pretrained_teacher(config.teacher, config.teacher.weights, len(train.classes), notes)
    check_input_size(teacher, size, _size_key(config, purpose))
    publish(config, purpose, teacher, val, size, training, told, device)


def mark_unneeded(config: Config, purpose: str) -> None:
    """In the place of weights, curve and metrics, for DVC: no student listens, so there is no teacher."""
    folder = teacher_folder(config, purpose)
    with atomic_write(folder / "weights.safetensors") as temporary:
        save_weights(temporary, nn.Module(), NOT_NEEDED)
    write_curve(folder / "curve.csv", None)
    with atomic_write(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(NOT_NEEDED) + "\n")
    print(f"teacher for {purpose}: not needed, no student listens to one")


def _size_key(config: Config, purpose: str) -> str:
    """What to do about a teacher that does not take the pictures."""
    if purpose == "train-student" and not config.teacher.weights:
        return "set recipe.size to the size that it takes, or teacher.kwargs so that it takes this one"
    key = "teacher.size" if purpose == "train-student" else "finetune.teacher_size"
    return f"set {key} to the size that it takes: pictures are resized to it"


def publish(
    config: Config,
    purpose: str,
    teacher: NormalizedModel,
    val: Index,
    size: int,
    training: Run | None,
    told: dict[str, Any],
    device: torch.device,
) -> None:
    """Evaluate; refuse, or write weights, curve and metrics.

    Args:
        training: the run that it was trained in, and what that one's last epoch told.
    """
    metrics, later = good_enough(config, teacher, val, size, device), config.teacher_size("finetune")
    answers_later = purpose == "train-student" and config.needs_teacher("finetune") and not config.teacher_finetune.epochs
    if answers_later and later != size:  # before the students are trained, not after
        check_input_size(teacher, later, _size_key(config, "finetune"))
        good_enough(config, teacher, val, later, device)
    if Rank.init_process_group(device).rank:
        return  # rank 0 publishes
    print(f"teacher: top-1 {metrics['top1']:.4f}, top-5 {metrics['top5']:.4f} on {len(val):,} images at {size} px")
    folder = teacher_folder(config, purpose)
    with atomic_write(folder / "weights.safetensors") as temporary:
        save_teacher(temporary, config.teacher, teacher)
    if training:
        write_curve(folder / "curve.csv", training.folder / "log.jsonl", told)
        metrics["run"] = fingerprint(training.identity)
    else:
        write_curve(folder / "curve.csv")
    with atomic_write(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")


def good_enough(
    config: Config, teacher: NormalizedModel, val: Index, size: int, device: torch.device
) -> dict[str, float | str | int]:
    """The teacher's metrics at a size.

    Raises:
        PipelineError: its top-1 is below `teacher.min_top1`.
    """
    section, trained = config.teacher, config.teacher_size("train-student")
    metrics = _evaluate(config, teacher, val, size, device)
    if float(metrics["top1"]) >= section.min_top1:
        return metrics
    do = "check that its classes are in the index's order; train it longer; or lower teacher.min_top1"
    if size != trained and not config.teacher_finetune.epochs:
        do = f"it is poor at another size than its own: set finetune.teacher_size to {trained} or null, or adapt it"
        do += " with teacher_finetune.epochs"
    raise PipelineError(
        f"teacher {section.weights or section.model} at {size} px: top-1 on {val.path}",
        expected=f"at least {section.min_top1:.4f} (teacher.min_top1)",
        found=f"{metrics['top1']:.4f}",
        do=do,
    )


def _training(config: Config, purpose: str, train: Index, val: Index, device: torch.device) -> Run | None:
    """What the teacher has to learn here, if anything."""
    if purpose == "finetune":
        return _finetuning(config, train, val, device) if config.teacher_finetune.epochs else None
    section = config.teacher
    if section.weights:
        return None
    model = build_teacher(section, len(train.classes))
    identity = run_identity(configured_teacher(config, train.fingerprint), section, has_batch_norm([model]))
    return Run(
        name="teacher",
        folder=state_folder(config, fingerprint(identity)),
        identity=identity,
        settings=section,
        plan=_plan(train, config.recipe, section),
        train=train,
        val=val,
        model=model,
        size=config.recipe.size,
        crop=section.crop,
        device=device,
    )


def _finetuning(config: Config, train: Index, val: Index, device: torch.device) -> Run:
    """FixRes: the classifier and the last batch norm learn at the higher resolution, the rest stays."""
    section, recipe = config.teacher_finetune, config.teacher_finetune_recipe()
    teacher = load_teacher(config, len(train.classes), device)
    learning = fixres_modules(teacher.model)
    identity = run_identity(
        configured_teacher_finetune(config, train.fingerprint),
        section,
        has_batch_norm(learning),
        start=describe_teacher(config.teacher, teacher, recipe.size),
    )
    return Run(
        name=f"teacher at {recipe.size}",
        folder=state_folder(config, fingerprint(identity)),
        identity=identity,
        settings=section,
        plan=_plan(train, recipe, section),
        train=train,
        val=val,
        model=teacher,
        size=recipe.size,
        crop=config.teacher.crop,
        device=device,
        learning=learning,
    )


def _plan(train: Index, recipe: Recipe, section: Training) -> Plan:
    """A teacher stores nothing, so it sees as many views as its epochs want."""
    views = training_plan(train, recipe, section, recipe.block).views_seen(section.epochs)
    return training_plan(train, recipe, section, -(-views // recipe.block) * recipe.block)


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
