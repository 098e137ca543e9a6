"""Fine-tuning at a higher resolution, with both heads distilled from a second store.

DeiT's own code raises NotImplementedError for distilled models here; this follows the paper's
section 4: label and teacher, the teacher at the same resolution, position embeddings by plain bicubic.
"""

from pathlib import Path

import torch

from pipeline.batches.plan import training_plan
from pipeline.common.errors import NotReady, UsageError
from pipeline.config.paths import digests_folder, finetune_folder, index_path, state_folder, student_folder
from pipeline.config.schema import Config
from pipeline.config.validation import fingerprint
from pipeline.models.adapt import load_resized_weights, replace_mismatched_heads
from pipeline.models.build import NormalizedModel, build_student
from pipeline.models.weights import read_external_weights, read_weights, weights_hash
from pipeline.shards.index import Index
from pipeline.training.completion import finish
from pipeline.training.identity import configured_finetune, run_identity
from pipeline.training.run import NoTeacher, Run, describe_run, has_batch_norm
from pipeline.training.teachers import make_teacher


def run(config: Config, device: torch.device, name: str, teacher: str = "stored", dry_run: bool = False) -> None:
    """Write outputs/<name>/students/<student>-finetuned/weights.safetensors, metrics.json and curve.csv.

    Args:
        name: the student, one of `finetune.from`.
        teacher: `stored`, or `online`: the teacher in the loop over the same groups.

    Raises:
        PipelineError: what it starts from is not there; else as train-student.
    """
    settings, recipe = config.finetune, config.finetune_recipe()
    train_index, val_index = (Index(index_path(config, split)) for split in ("train", "val"))
    student = config.finetune_student(name)
    source = Path(settings.weights or student_folder(config, name) / "weights.safetensors")
    model = build_student(student, config.recipe, len(train_index.classes), settings.size)
    try:
        if not source.exists():
            kind = UsageError if settings.weights else NotReady
            raise kind(
                f"{source}: no student to start from",
                do="correct finetune.weights"
                if settings.weights
                else f"run: pipeline train-student --student {name}",
            )
        start(model, source, digests_folder(config) if settings.weights else None)
        teaching, teacher_identity = make_teacher(config, student, "finetune", train_index, device, teacher)
    except NotReady as error:
        if not dry_run:
            raise
        print(f"not yet: {error.what}")
        teaching, teacher_identity = NoTeacher(), None
    identity = run_identity(
        configured_finetune(config, student, train_index.fingerprint),
        settings,
        settings.train_mode and has_batch_norm([model]),
        start=weights_hash(model.model),
        teacher=teacher_identity,
    )
    training = Run(
        name=f"finetune {name} at {settings.size}",
        folder=state_folder(config, fingerprint(identity)),
        identity=identity,
        settings=settings,
        plan=training_plan(train_index, recipe, settings, settings.views),
        train=train_index,
        val=val_index,
        model=model,
        size=settings.size,
        crop=config.evaluate.crop_finetuned,
        teacher=teaching,
        distillation=student,
        device=device,
        train_mode=settings.train_mode,
    )
    print(describe_run(training))
    if not dry_run:
        finish(training, finetune_folder(config, name))


def start(model: NormalizedModel, source: Path, notes: Path | None) -> None:
    """Load what fine-tuning starts from; onto another data set (paper, section 5.4), with heads of its own.

    Args:
        notes: where the digests of foreign files are kept; None: it is a student of this experiment.
    """
    state = read_external_weights(source, notes) if notes else read_weights(source, own=True)
    if notes:
        state, anew = replace_mismatched_heads(model, state)
        print(f"{source}: " + (f"{', '.join(anew)} begin anew" if anew else "heads kept, the classes being as many"))
    load_resized_weights(model, state, str(source))
