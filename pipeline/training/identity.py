"""The identity of a run: everything that its weights depend on; its fingerprint names the run's state folder.

The configuration and the index determine one part of it, the weights and the store that the run uses the other.
`pipeline status` and `pipeline prune` recognize runs by the first part, which run.json holds.
No module imported here needs torch.
"""

from typing import Any

from pipeline.config.schema import Config, Recipe, Student, Training, finetune_fields, result_fields
from pipeline.config.store_spec import ARGMAX_UNITS
from pipeline.config.validation import fingerprint
from pipeline.models.provenance import code_of, teacher_architecture
from pipeline.views.draw import recipe_fingerprint

TRAINING_VERSION = 4  # bump on any change of what a step computes: otherwise runs finished before would be reused

INHERITED_FIELDS = ("model", "kwargs", "distillation", "alpha", "tau", "soft_reduction")
"""What fine-tuning keeps of a student's own settings."""
SUMMARY_FIELDS = ("teacher_settings", "teacher_finetune", "student", "finetune", "recipe", "index")


def configured_teacher(config: Config, index: str | None) -> dict[str, Any]:
    """The configuration's part of the identity of `teacher`, where it is trained.

    Args:
        index: fingerprint of the training index.
    """
    settings = result_fields(config.teacher)
    for other in ("min_top1", "crop", "ensemble"):  # of evaluation; the ensemble's other members do not teach this one
        del settings[other]
    for key in ("head_epochs", "class_map"):
        if not settings[key]:
            del settings[key]  # as before this key existed
    if config.teacher.weights and not config.teacher.timm_tag:
        del settings["weights"]  # a run's identity has the initial weights themselves
    return {"teacher_settings": settings | code_of(config.teacher.model), **_views(config.teacher_recipe(), index)}


def configured_teacher_finetune(config: Config, index: str | None) -> dict[str, Any]:
    """The configuration's part of the identity of `teacher-finetune`, where it is trained."""
    settings = result_fields(config.teacher_finetune)
    return {"teacher_finetune": settings, **_views(config.teacher_finetune_recipe(), index)}


def configured_student(config: Config, student: Student, index: str | None) -> dict[str, Any]:
    """The configuration's part of the identity of `train-student`, with the settings of one student."""
    settings = result_fields(student)
    if student.weights is None:
        del settings["weights"]  # as before this key existed
    elif not student.timm_tag:
        settings["weights"] = "file"  # a run's identity has the initial weights themselves
    if student.reuse_view is None:
        del settings["reuse_view"]  # as before this key existed
    return {"student": settings | code_of(student.model), "views": config.teacher_logits.views, **_views(config.recipe, index)}


def configured_finetune(config: Config, student: Student, index: str | None) -> dict[str, Any]:
    """The configuration's part of the identity of `finetune`, with the settings of one student."""
    inherited = {key: getattr(student, key) for key in INHERITED_FIELDS} | code_of(student.model)
    settings = finetune_fields(config.finetune)
    return {"finetune": settings, "student": inherited, **_views(config.finetune_recipe(), index)}


def teacher_fingerprint(config: Config, index: str | None, purpose: str) -> str:
    """Fingerprint of everything that a configuration specifies about a store's teacher.

    Args:
        purpose: train-student or finetune.
    """
    weights = [member.weights for member in config.teacher.members]
    settings = [configured_teacher(config, index), weights, teacher_architecture(config.teacher)]
    return fingerprint([*settings, configured_teacher_finetune(config, index)] if purpose == "finetune" else settings)


def _views(recipe: Recipe, index: str | None) -> dict[str, Any]:
    return {"recipe": recipe_fingerprint(recipe), "index": index}


def run_identity(configured: dict[str, Any], settings: Training, batch_norm: bool, **dependencies: Any) -> dict[str, Any]:
    """Everything that a run's weights depend on, TRAINING_VERSION included.

    Args:
        configured: the configuration's part.
        batch_norm: whether a batch norm is in training mode. It takes its statistics over a slice of the batch, so
            accumulation counts, which otherwise changes only rounding. So does the number of ranks, but it is not a
            setting: a run cannot be resumed with a different number, see `Run.checkpoint_identity`.
        dependencies: the weights that the run starts from, the teacher and its store, as JSON values.
    """
    identity = configured | dependencies | {"training_version": TRAINING_VERSION}
    return identity | {"accumulation": settings.accumulation} if batch_norm else identity


def validation_fingerprint(index: str | None, crop: float) -> str:
    """Fingerprint of what a model is validated on; not part of a run's identity, as no weight depends on it.

    Args:
        index: fingerprint of the validation index.
        crop: share of the image's shorter side in the centre crop.
    """
    return fingerprint([index, crop])


def run_summary(identity: dict[str, Any]) -> dict[str, Any]:
    """The part of an identity that run.json holds: what configuration and index determine, and the store's fingerprint."""
    teacher = identity.get("teacher")
    store = {"store": teacher["store"]} if isinstance(teacher, dict) and "store" in teacher else {}
    return {key: identity[key] for key in SUMMARY_FIELDS if key in identity} | store


def run_dependencies(identity: dict[str, Any]) -> dict[str, Any]:
    """The other part of an identity, with a fingerprint in place of a store's units, which may be many."""
    found = {key: value for key, value in identity.items() if key not in SUMMARY_FIELDS}
    teacher = found.get("teacher")
    if isinstance(teacher, dict) and "units" in teacher:
        found["teacher"] = teacher | {"units": fingerprint(teacher["units"])}
    return found


def configured_runs(config: Config, index: str | None) -> dict[str, dict[str, Any]]:
    """What run.json holds for each run that a configuration can start, by the stage's name in dvc.yaml.

    Its `dependencies` include only those that the configuration determines.

    Every entry of `variants` counts as a student. Several runs may match a stage: they may use different stores or
    start from different weights.

    Args:
        index: fingerprint of the training index.
    """
    runs = {
        "teacher": configured_teacher(config, index),
        "teacher-finetune": configured_teacher_finetune(config, index),
    }
    for name in config.variants:
        student = config.student_named(name)
        runs[f"train-student@{name}"] = configured_student(config, student, index)
        runs[f"finetune@{name}"] = configured_finetune(config, student, index)
    version, accumulations = {"training_version": TRAINING_VERSION}, _accumulations(config)
    return {
        stage: run_summary(configured)
        | {"dependencies": run_dependencies(configured) | version | {"accumulation": accumulations[stage]}}
        for stage, configured in runs.items()
    }


def _accumulations(config: Config) -> dict[str, int]:
    """`accumulation` by the stage's name in dvc.yaml. A run records its own only where it counts, see `run_identity`."""
    found = {"teacher": config.teacher.accumulation, "teacher-finetune": config.teacher_finetune.accumulation}
    for name in config.variants:
        found |= {f"train-student@{name}": config.student_named(name).accumulation}
        found |= {f"finetune@{name}": config.finetune.accumulation}
    return found


def is_run_of(configured: dict[str, Any], described: dict[str, Any]) -> bool:
    """Whether a run.json, `described`, belongs to a run of `configured_runs`.

    Dependencies that it does not name are not compared: it was written by an earlier version, or the run does not
    depend on them.
    """
    settings = dict(configured)
    expected, known = settings.pop("dependencies", {}), _dependencies(described)
    return all(described.get(key) == value for key, value in settings.items()) and all(
        known.get(key, value) == value for key, value in expected.items()
    )


VALIDATION_INDEX = "validation_index"
"""Key of run.json: the fingerprint of the validation images, on which the weights do not depend."""


def used_other_predictions(described: dict[str, Any], kind: str, views: int, manifest: dict[str, Any]) -> bool:
    """Whether a run.json names predictions other than the published ones: of another kind, or since recomputed.

    Args:
        kind: what the student reads: argmax, or the configured kind.
        views: the configured number.
        manifest: the store's manifest.json; {} if there is none.
    """
    teacher = _dependencies(described).get("teacher")
    if not isinstance(teacher, dict):
        return False
    if teacher.get("kind", kind) != kind:
        return True
    if manifest.get("views") != views or not isinstance(teacher.get("units"), str):
        return False
    published = manifest.get(ARGMAX_UNITS) if kind == "argmax" else None
    if manifest.get("kind") == kind:
        published = fingerprint(manifest.get("units"))
    return published is not None and teacher["units"] != published


def _dependencies(described: dict[str, Any]) -> dict[str, Any]:
    found = described.get("dependencies")
    return found if isinstance(found, dict) else {}
