"""Fine-tune students at a higher resolution, distilling from a second store.

DeiT's own code raises NotImplementedError for distilled models here; this follows section 4 of the
paper: labels and a teacher at the same resolution, position embeddings by plain bicubic interpolation.
"""

from pathlib import Path

import torch

from pipeline.common.errors import NotReady, UsageError
from pipeline.config.paths import checksums_folder, finetune_folder, student_folder
from pipeline.config.schema import Config
from pipeline.models.adapt import load_resized_weights
from pipeline.models.build import NormalizedModel, build_student
from pipeline.models.pretrained import has_other_classes, replace_classifiers
from pipeline.models.provenance import finetune_start
from pipeline.models.teacher import check_input_size
from pipeline.models.weights import read_external_weights, read_saved_weights, weights_hash
from pipeline.shards.published import open_index
from pipeline.training.completion import train_and_publish
from pipeline.training.identity import configured_finetune
from pipeline.training.origin import require_student
from pipeline.training.run import NoTeacher, describe_run, prepare_run, print_if_not_ready
from pipeline.training.teachers import create_teacher


def run(config: Config, device: torch.device, name: str, teacher: str = "stored", dry_run: bool = False) -> None:
    """Write outputs/NAME/students/STUDENT-finetuned/weights.safetensors, with model.json, metrics.json and curve.csv.

    Args:
        name: the student, one of `finetune.from`.
        teacher: `stored`, or `online`: the teacher runs in the loop over the same groups.

    Raises:
        PipelineError: there are no weights to start from; otherwise as train-student.
    """
    settings, recipe, student = config.finetune, config.finetune_recipe(), config.finetune_student(name)
    train, val = (open_index(config, split) for split in ("train", "val"))
    model = build_student(student, config.recipe, len(train.classes), settings.size)
    check_input_size(model, settings.size, "choose another finetune.size, or another model", student.model)
    start, teaching, teacher_identity = None, NoTeacher(), None
    with print_if_not_ready(dry_run):
        if not settings.weights:
            require_student(config, train.fingerprint, name)
        load_initial_weights(model, config, name, train.classes)
        start = finetune_start(config, name)
        teaching, teacher_identity = create_teacher(config, student, "finetune", train, device, teacher)
    finetuning = prepare_run(
        config, f"finetune {name} at {settings.size}", configured_finetune(config, student, train.fingerprint),
        {"start": weights_hash(model.model), "teacher": teacher_identity}, settings=settings, recipe=recipe,
        views=settings.views, train=train, val=val, model=model, crop=config.evaluate.crop_finetuned,
        teacher=teaching, distillation=student, device=device, train_mode=settings.train_mode,
    )  # fmt: skip
    print(describe_run(finetuning))
    if not dry_run:
        train_and_publish(finetuning, finetune_folder(config, name), start)


def load_initial_weights(model: NormalizedModel, config: Config, name: str, classes: list[str]) -> None:
    """Load the weights that fine-tuning starts from: `finetune.weights`, or those of the student.

    Heads of other classes, as for another data set (paper, section 5.4), are initialized from scratch.

    Args:
        classes: class names of the index.

    Raises:
        UsageError: there is no such file.
        NotReady: the student is not trained yet.
    """
    external = config.finetune.weights
    source = Path(external or student_folder(config, name) / "weights.safetensors")
    if not source.exists():
        kind, do = NotReady, f"run: pipeline train-student --student {name}"
        if external:
            kind, do = UsageError, "correct finetune.weights"
        raise kind(f"{source}: no student to start from", do=do)
    if external:
        read = read_external_weights(source, checksums_folder(config))
        state, new = replace_classifiers(model.model, read, has_other_classes(source, classes))
        print(f"{source}: " + (f"{', '.join(new)} initialized from scratch" if new else "heads kept"))
    else:
        state, _ = read_saved_weights(source)
    load_resized_weights(model, state, str(source))
