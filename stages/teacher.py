"""The teacher: read from weights, or trained on the shards; evaluated and, if it is poor, refused."""

import json
from pathlib import Path

import torch

from pipeline.config import Config, result_fields
from pipeline.errors import PipelineError
from pipeline.evaluation import classifiers, predict, top_k_accuracy
from pipeline.files import replacing
from pipeline.layout import index_path, state_folder, teacher_folder
from pipeline.models import (
    Normalised,
    build_teacher,
    parameter_count,
    pretrained_teacher,
    save_weights,
    weights_hash,
)
from pipeline.plan import plan_of
from pipeline.ranks import Rank
from pipeline.recipe import recipe_fingerprint
from pipeline.runlog import write_curve
from pipeline.shards import Index
from pipeline.strict import fingerprint
from pipeline.training import Run, complete, describe_run, run_identity


def run(config: Config, device: torch.device, dry_run: bool = False) -> None:
    """Write outputs/<name>/teacher/weights.safetensors and metrics.json, if the teacher is good enough.

    Raises:
        PipelineError: its top-1 on val is below `teacher.min_top1`; nothing is published then.
    """
    train_index, val_index = (Index(index_path(config, split)) for split in ("train", "val"))
    section, classes = config.teacher, len(train_index.classes)
    if section.weights:
        print(f"teacher: {section.weights}")
        if dry_run:
            return
        teacher = pretrained_teacher(section, classes)
    else:
        training = _training(config, train_index, val_index, device)
        print(describe_run(training))
        if dry_run:
            return
        complete(training)
        teacher = training.model
    metrics = _evaluate(config, teacher, val_index, device)
    if metrics["top1"] < section.min_top1:
        raise PipelineError(
            f"teacher {section.weights or section.model}: top-1 on {val_index.path}",
            expected=f"at least {section.min_top1:.4f} (teacher.min_top1)",
            found=f"{metrics['top1']:.4f}",
            do="check that its classes are in the index's order; train it longer; or lower teacher.min_top1",
        )
    if Rank.start(device).rank:
        return  # rank 0 publishes
    print(f"teacher: top-1 {metrics['top1']:.4f}, top-5 {metrics['top5']:.4f} on {len(val_index):,} images")
    folder = teacher_folder(config)
    with replacing(folder / "weights.safetensors") as temporary:
        save_weights(temporary, teacher.model)
    write_curve(folder / "curve.csv", Path("none") if section.weights else training.folder / "log.jsonl")
    with replacing(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")


def _training(config: Config, train_index: Index, val_index: Index, device: torch.device) -> Run:
    section, block = config.teacher, config.recipe.block
    plan = plan_of(train_index, config.recipe, section, block)
    # a teacher stores nothing, so it sees as many views as its epochs want
    plan = plan_of(train_index, config.recipe, section, -(-plan.views_seen(section.epochs) // block) * block)
    identity = run_identity(
        teacher_settings={k: v for k, v in result_fields(section).items() if k not in ("min_top1", "crop")},
        recipe=recipe_fingerprint(config.recipe),
        index=train_index.fingerprint,
    )
    return Run(
        name="teacher",
        folder=state_folder(config, fingerprint(identity)),
        identity=identity,
        settings=section,
        plan=plan,
        train=train_index,
        val=val_index,
        model=build_teacher(section, len(train_index.classes)),
        size=config.recipe.size,
        crop=section.crop,
        device=device,
    )


def _evaluate(config: Config, teacher: Normalised, val: Index, device: torch.device) -> dict[str, float | str | int]:
    section, evaluate = config.teacher, config.evaluate
    heads = predict(
        teacher, val, config.recipe.size, section.crop, evaluate.batch_size, evaluate.workers, device,
        section.precision,
    )  # fmt: skip
    scores, labels = classifiers(heads, False)["class"], torch.from_numpy(val.labels())
    return {
        "top1": top_k_accuracy(scores, labels, 1),
        "top5": top_k_accuracy(scores, labels, 5),
        "parameters": parameter_count(teacher.model),
        "weights": weights_hash(teacher.model),
    }
