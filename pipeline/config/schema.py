"""The typed configuration of an experiment.

The defaults are the paper's (Touvron et al. 2020, arXiv 2012.12877, Table 9). Unknown keys, wrong types and conflicting
settings are refused with the full name of the key. Each key is documented next to its definition, in
pipeline.config.sections and pipeline.config.training_sections.
"""

from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.common.errors import UsageError
from pipeline.config.consistency import conflicting_settings
from pipeline.config.sections import Data, Evaluate, Logging, Recipe, TeacherLogits
from pipeline.config.training_sections import Finetune, Student, Teacher, TeacherFinetune, Training
from pipeline.config.types import NAME, Work, is_custom_model
from pipeline.config.validation import Section, validate

__all__ = [
    "EXECUTION_ONLY", "PURPOSES", "Config", "Data", "Evaluate", "Finetune", "Logging", "Recipe", "Student", "Teacher",
    "TeacherFinetune", "TeacherLogits", "Training", "changed_fields", "changed_student", "finetune_fields", "result_fields",
]  # fmt: skip

PURPOSES = ("train-student", "finetune")
"""Stages that read teacher predictions, each from a store of its own."""


class Config(Section):
    """A complete experiment, as stored in params.yaml."""

    name: Annotated[str, Field(pattern=NAME)] = "imagenet-deit-tiny"
    """Outputs are written to outputs/NAME/."""
    work: Work = "work"
    """Folder for shards, stores and training state, each in a subfolder named by its fingerprint. If it is a URL, only
    stores are kept there; everything else is in the local folder `work`."""
    data: Data = Data()
    recipe: Recipe = Recipe()
    teacher: Teacher = Teacher()
    teacher_finetune: TeacherFinetune = TeacherFinetune()
    teacher_logits: TeacherLogits = TeacherLogits()
    student: Student = Student()
    students: list[str] = ["hard"]
    """The students of this experiment, each a name from `variants`."""
    variants: dict[str, dict[str, Any]] = {"hard": {}}
    """Overrides of `student` for each named student; kwargs are merged key by key (null: timm's default)."""
    finetune: Finetune = Finetune()
    evaluate: Evaluate = Evaluate()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _consistent(self):
        for problem in conflicting_settings(self):
            raise ValueError(problem)
        return self

    def student_named(self, name: str) -> Student:
        """`student` with the overrides of `variants[name]`.

        Raises:
            UsageError: no such variant, or an override that is not a valid key or value of `student`.
        """
        if name not in self.variants:
            raise UsageError(
                f"student {name!r}",
                expected=f"one of {', '.join(self.variants)}",
                found="no such entry in `variants`",
                do=f"add `variants.{name}: {{}}` to params.yaml or correct the name",
            )
        return changed_student(self.student, self.variants[name], f"variants.{name}")

    @property
    def trained_students(self) -> list[str]:
        """The students that are trained or fine-tuned, each once."""
        return list(dict.fromkeys([*self.students, *self.finetune.students]))

    def needs_store(self, purpose: str) -> bool:
        """Whether any student of train-student or finetune is distilled."""
        names = self.students if purpose == "train-student" else self.finetune.students
        return any(self.student_named(name).distillation != "none" for name in names)

    def needs_teacher(self, purpose: str) -> bool:
        """Whether train-student or finetune needs a store that is not fetched."""
        return self.needs_store(purpose) and not self.fetch_source(purpose)

    def runs_teacher(self, purpose: str) -> bool:
        """Whether the teacher for train-student or finetune is needed; that for finetune starts from the other."""
        return self.needs_teacher("finetune") or (purpose == "train-student" and self.needs_teacher(purpose))

    def fetch_source(self, purpose: str) -> str | None:
        """Path or URL of the store to fetch for train-student or finetune; None: the teacher is run."""
        return self.finetune.fetch if purpose == "finetune" else self.teacher_logits.fetch

    def custom_models(self) -> list[str]:
        """The custom models that teachers and students name, sorted."""
        students = [self.student, *map(self.student_named, self.variants)]
        return sorted({each.model for each in [*self.teacher.members, *students] if is_custom_model(each.model)})

    def weight_files(self) -> list[str]:
        """The local files of weights that teachers and students start from, sorted."""
        sections = [*self.teacher.members, self.student, *map(self.student_named, self.variants)]
        named = {each.weights for each in sections if each.weights and not each.timm_tag}
        return sorted(named | ({self.finetune.weights} if self.finetune.weights else set()))

    def teacher_size(self, purpose: str) -> int:
        """Height and width of the teacher's input in pixels, for the store of train-student or finetune."""
        if purpose == "finetune":
            adapted = self.finetune.size if self.teacher_finetune.epochs else None
            return self.finetune.teacher_size or adapted or self.teacher_size("train-student")
        return self.teacher.size or self.recipe.size

    def teacher_recipe(self) -> Recipe:
        """The recipe of the views that the teacher is trained on, which have the size of its input."""
        return self.recipe.model_copy(update={"size": self.teacher_size("train-student")})

    def finetune_student(self, name: str) -> Student:
        """The model settings of a student during fine-tuning: with the dropout and drop-path of `finetune`."""
        student = self.student_named(name)
        return student.model_copy(update={"drop_path": self.finetune.drop_path, "dropout": self.finetune.dropout})

    def finetune_recipe(self) -> Recipe:
        """The recipe of the views for fine-tuning: only their size differs."""
        return self.recipe.model_copy(update={"size": self.finetune.size})

    def teacher_finetune_recipe(self) -> Recipe:
        """The recipe for adapting the teacher to the fine-tuning size: close to the centre crop of its evaluation."""
        area = self.teacher_finetune.area
        plain = {"scale": (area, area), "ratio": (1.0, 1.0), "auto_augment": None, "color_jitter": 0.0}
        off = {"erase_prob": 0.0, "mix_prob": 0.0, "repeats": 1}
        return self.finetune_recipe().model_copy(update=plain | off)


def changed_student(student: Student, own: dict[str, Any], section: str) -> Student:
    """A student with some keys changed; kwargs are merged.

    Args:
        section: the name of `own`, for messages.

    Raises:
        UsageError: a key or value is not valid for a student.
    """
    values = student.model_dump()
    if isinstance(own.get("kwargs"), dict):
        own = own | {"kwargs": values["kwargs"] | own["kwargs"]}
    return validate(Student, values | own, section=section)


# How a run is carried out: not part of any fingerprint. These change rounding at most, but accumulation also what dropout and
# drop-path draw (where it changes batch norm, run_identity adds it). A fetched store counts by its own fingerprint.
EXECUTION_ONLY = {
    "workers", "accumulation", "checkpoint_minutes", "checkpoint_steps", "stop_above", "log_steps", "eval_epochs",
    "compile", "channels_last", "checkpoint_activations", "deterministic", "fetch",
}  # fmt: skip


def result_fields(section: Section) -> dict[str, Any]:
    """A section as JSON values, without the keys that only affect how the work is carried out."""
    return section.model_dump(mode="json", by_alias=True, exclude=EXECUTION_ONLY)


def changed_fields(section: Section) -> dict[str, Any]:
    """`result_fields` without the keys at their defaults: it stays the same when a later version adds keys."""
    return section.model_dump(mode="json", by_alias=True, exclude=EXECUTION_ONLY, exclude_defaults=True)


def finetune_fields(section: Finetune) -> dict[str, Any]:
    """`result_fields` of fine-tuning, without its starting point: a run's identity has the initial weights themselves."""
    return {key: value for key, value in result_fields(section).items() if key not in ("from", "weights")}
