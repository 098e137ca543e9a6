"""Train students from the shards and, unless --teacher online, from stored predictions."""

import torch

from pipeline.common.errors import UsageError
from pipeline.config.paths import checksums_folder, student_folder
from pipeline.config.schema import Config, Student
from pipeline.models.build import NormalizedModel, build_student
from pipeline.models.pretrained import load_student_weights
from pipeline.models.provenance import student_start
from pipeline.models.teacher import check_input_size
from pipeline.models.weights import weights_hash
from pipeline.shards.published import open_index
from pipeline.training.completion import train_and_publish
from pipeline.training.identity import configured_student
from pipeline.training.run import NoTeacher, describe_run, prepare_run, print_if_not_ready
from pipeline.training.teachers import create_teacher


def run(
    config: Config,
    device: torch.device,
    name: str,
    student: Student | None = None,
    teacher: str = "stored",
    store: str | None = None,
    dry_run: bool = False,
) -> None:
    """Write outputs/NAME/students/STUDENT/weights.safetensors, with model.json, metrics.json and curve.csv.

    Args:
        name: what the run and its folder are called.
        student: its settings; None: those of the variant `name`.
        teacher: `stored`, or `online`: the teacher runs in the loop over the same groups.
        store: the path of a store to use instead of the published one.

    Raises:
        PipelineError, UsageError: no complete store, another recipe's store, damaged data, ...
    """
    settings = student or config.student_named(name)
    if settings.distillation == "soft" and teacher == "stored" and config.teacher_logits.kind == "argmax":
        raise UsageError(
            f"student {name}: soft distillation", expected="teacher_logits.kind topk, dense8, dense or sampled",
            found="argmax",
            do="run teacher-logits with such a kind; or use hard distillation, or --teacher online",
        )  # fmt: skip
    train, val = (open_index(config, split) for split in ("train", "val"))
    model = build_student(settings, config.recipe, len(train.classes), config.recipe.size)
    check_input_size(model, config.recipe.size, "choose another recipe.size, or another model", settings.model)
    if dry_run and settings.timm_tag:
        print(f"student {name}: starts from {settings.timm_tag}, which a dry run does not download")
        return
    start = load_start(config, name, settings, model, train.classes) if settings.weights else {}
    teaching, teacher_identity = NoTeacher(), None
    with print_if_not_ready(dry_run):
        teaching, teacher_identity = create_teacher(config, settings, "train-student", train, device, teacher, store)
    student_run = prepare_run(
        config, f"student {name}", configured_student(config, settings, train.fingerprint),
        {"teacher": teacher_identity, **start}, settings=settings, recipe=config.recipe, views=config.teacher_logits.views,
        train=train, val=val, model=model, crop=config.evaluate.crop, teacher=teaching, distillation=settings,
        device=device,
    )  # fmt: skip
    print(describe_run(student_run))
    if not dry_run:
        train_and_publish(student_run, student_folder(config, name), student_start(config, settings))


def load_start(
    config: Config, name: str, settings: Student, model: NormalizedModel, classes: list[str]
) -> dict[str, str]:
    """Load `student.weights` into the model; returns their part of the run's identity."""
    new = load_student_weights(settings, model, classes, checksums_folder(config))
    print(
        f"student {name}: starts from {settings.weights}"
        + (f"; initialized from scratch: {', '.join(new)}" if new else "")
    )
    return {"start": weights_hash(model.model)}
