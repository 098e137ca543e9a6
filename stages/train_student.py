"""A DeiT student, trained from the store and the shards; the teacher is never run."""


import torch

from pipeline.batches.plan import training_plan
from pipeline.common.errors import NotReady, UsageError
from pipeline.config.paths import (
    index_path,
    state_folder,
    student_folder,
)
from pipeline.config.schema import Config, Student
from pipeline.config.validation import fingerprint
from pipeline.models.build import build_student
from pipeline.shards.index import Index
from pipeline.training.completion import finish
from pipeline.training.identity import configured_student, run_identity
from pipeline.training.run import NoTeacher, Run, describe_run, has_batch_norm
from pipeline.training.teachers import make_teacher


def run(
    config: Config,
    device: torch.device,
    name: str,
    student: Student | None = None,
    teacher: str = "stored",
    store: str | None = None,
    dry_run: bool = False,
) -> None:
    """Write outputs/<name>/students/<student>/weights.safetensors, metrics.json and curve.csv.

    Args:
        name: one of `students`.
        student: settings to use instead of those that `name` has.
        teacher: `stored`, or `online`: the teacher in the loop over the same groups.
        store: a store named by hand.

    Raises:
        PipelineError, UsageError: no complete store, another recipe's store, damaged data, ...
    """
    settings = student or config.student_named(name)
    if settings.distillation == "soft" and teacher == "stored" and config.teacher_logits.kind == "argmax":
        raise UsageError(
            f"student {name}: soft distillation", expected="teacher_logits.kind topk, dense8 or dense", found="argmax",
            do="run teacher-logits with such a kind; or use hard distillation, or --teacher online",
        )  # fmt: skip
    train_index, val_index = (Index(index_path(config, split)) for split in ("train", "val"))
    views = config.teacher_logits.views
    try:
        teaching, teacher_identity = make_teacher(config, settings, "train-student", train_index, device, teacher, store)
    except NotReady as error:
        if not dry_run:
            raise
        print(f"not yet: {error.what}")
        teaching, teacher_identity = NoTeacher(), None
    model = build_student(settings, config.recipe, len(train_index.classes), config.recipe.size)
    identity = run_identity(
        configured_student(config, settings, train_index.fingerprint),
        settings,
        has_batch_norm([model]),
        teacher=teacher_identity,
    )
    training = Run(
        name=f"student {name}",
        folder=state_folder(config, fingerprint(identity)),
        identity=identity,
        settings=settings,
        plan=training_plan(train_index, config.recipe, settings, views),
        train=train_index,
        val=val_index,
        model=model,
        size=config.recipe.size,
        crop=config.evaluate.crop,
        teacher=teaching,
        distillation=settings,
        device=device,
    )
    print(describe_run(training))
    if not dry_run:
        finish(training, student_folder(config, name))
