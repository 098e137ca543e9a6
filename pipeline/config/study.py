"""A study: a matrix of configurations and students over a base configuration, expanded into cells.

A cell is one student of an ordinary configuration. Levels that change only `student` become variants of one
configuration, whose cells share its teacher and store; all other levels become configurations of their own, named after
their levels and the fingerprint of their settings. So an edited study never takes earlier results for its own.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.common.errors import UsageError
from pipeline.config.params import override_key, parse_yaml, read_text, resolve
from pipeline.config.paths import finetune_folder, student_folder
from pipeline.config.schema import Config, Student, changed_fields, changed_student
from pipeline.config.types import NAME, Seed
from pipeline.config.validation import Section, fingerprint, validate

Changes = dict[str, Any]
"""Values by `section.key`."""
STUDENT, SEED = "student", "seed"
"""The axes that every study has."""
OWN_STUDENT_KEY = f"{STUDENT}."
DIGITS = 6
"""Of a configuration's fingerprint, in its name."""


class Figure(Section):
    """What the figure shows: the first metric against an axis or against another metric, with a line for each combination
    of the other axes."""

    x: str
    """An axis with numbers as levels, or another of `metrics`, such as throughput.images_per_second."""
    along: str | None = None
    """With a metric as x: the axis whose levels are the points of a line, next to which they are written."""
    log: bool = False
    """Whether the horizontal axis is logarithmic."""


class Study(Section):
    """A matrix of experiments, as stored in configs/studies/NAME.yaml."""

    base: str
    """The configuration that everything else is changed in: a name in configs/, or a file."""
    set: Changes = {}
    """Changes of it in every cell, as `section.key: value`."""
    students: Annotated[list[str], Field(min_length=1)] | None = None
    """Names from the base's `variants`; null: its `students`."""
    axes: dict[str, dict[str, Changes]] = {}
    """Levels of each axis, and what each changes. An axis that is named `section.key` may be a list of its values."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    """Values of `student.seed`; with finetune: only, also of `finetune.seed`."""
    skip: list[dict[str, list[str]]] = []
    """Combinations to leave out: levels of some axes, `student` included."""
    finetune: bool | Literal["only"] = False
    """Whether every student is fine-tuned too; only: from `finetune.weights`, and no student is trained before."""
    evaluate: bool = False
    """Whether `pipeline evaluate` runs for every configuration, for metrics from its files."""
    metrics: Annotated[list[str], Field(min_length=1)] = ["top1"]
    """Columns of the table: top1 (of both heads' mean, if there are two), a key of the student's metrics.json, or
    teacher.KEY, evaluation.KEY, throughput.KEY or details.KEY (of the evaluation) from these files. The first is in the figure."""
    reference: dict[str, str] = {}
    """Levels of some axes, `student` included: every row is compared with the one that has these and its own other levels,
    by the first metric."""
    figure: Figure | None = None
    """The figure; null: a dot for every row of the table."""

    @field_validator("axes", mode="before")
    @classmethod
    def _levels(cls, axes: Any) -> Any:
        """Read a list of values of `section.key` as levels, and numbers as names of levels."""
        if not isinstance(axes, dict):
            return axes
        read = {}
        for axis, levels in axes.items():
            if isinstance(levels, list) and "." in str(axis):
                levels = {_label(value): {str(axis): value} for value in levels}
                axis = str(axis).rpartition(".")[2]
            elif isinstance(levels, dict):
                levels = {_label(label): changes for label, changes in levels.items()}
            read[str(axis)] = levels
        return read

    @field_validator("skip", mode="before")
    @classmethod
    def _skipped(cls, skip: Any) -> Any:
        """Read one level as a list of one."""
        if not isinstance(skip, list) or not all(isinstance(each, dict) for each in skip):
            return skip
        lists = [{axis: found if isinstance(found, list) else [found] for axis, found in each.items()} for each in skip]
        return [{axis: [_label(level) for level in found] for axis, found in each.items()} for each in lists]

    @field_validator("reference", mode="before")
    @classmethod
    def _reference(cls, reference: Any) -> Any:
        """Read numbers as names of levels."""
        return {axis: _label(level) for axis, level in reference.items()} if isinstance(reference, dict) else reference

    @model_validator(mode="after")
    def _consistent(self):
        for axis, levels in self.axes.items():
            if axis in (STUDENT, SEED) or not re.fullmatch(NAME, axis):
                raise ValueError(f"a name of letters, digits and ._- other than student and seed for an axis, not {axis}")
            if not levels:
                raise ValueError(f"at least one level of axes.{axis}")
        named = [("skip", axis, level) for each in self.skip for axis, levels in each.items() for level in levels]
        for key, axis, level in [*named, *(("reference", *each) for each in self.reference.items())]:
            known = self.students or [level] if axis == STUDENT else [*self.axes.get(axis, ())]
            if level not in known:
                raise ValueError(f"{key}: levels of an axis, of {', '.join(known) or 'no such axis'}, not {axis} {level}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different: {self.seeds}")
        if self.figure:
            self._check_figure(self.figure)
        return self

    def _check_figure(self, figure: Figure) -> None:
        by_metric = figure.x in self.metrics[1:]
        if not by_metric and not all(map(_is_number, self.axes.get(figure.x, ["no such axis"]))):
            raise ValueError(f"figure.x must be an axis with numbers as levels, or a metric but the first: found {figure.x}")
        if figure.along is not None and not (by_metric and figure.along in (STUDENT, *self.axes)):
            raise ValueError(f"figure.along must be an axis, and figure.x a metric: found {figure.along}")


@dataclass(frozen=True)
class Cell:
    """One student of one configuration."""

    config: Config = field(repr=False)
    """Complete: with the students of its other cells."""
    variant: str
    """The student's name there."""
    levels: dict[str, str]
    """By axis, `student` first."""
    seed: int
    finetuned: bool = False
    """Whether it is the student after fine-tuning."""

    @property
    def name(self) -> str:
        """Its folder's name below outputs/, without `students/`."""
        return f"{self.config.name}/{self.folder.name}"

    @property
    def folder(self) -> Path:
        return (finetune_folder if self.finetuned else student_folder)(self.config, self.variant)

    @property
    def stage(self) -> str:
        """Its stage's name in dvc.yaml."""
        return f"{'finetune' if self.finetuned else 'train-student'}@{self.variant}"


def load_study(path: Path) -> Study:
    """Read a study.

    Raises:
        UsageError: the file cannot be read, or has an unknown key or an invalid value.
    """
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise UsageError(str(path), expected="a mapping with the key `base`", found=type(values).__name__)
    return validate(Study, values, str(path))


def expand(study: Study, name: str, base: Config, source: str) -> list[Cell]:
    """The cells of a study called `name`, in the order in which they are run: all of one seed, then those of the next.

    Raises:
        UsageError: a level changes an unknown key or sets an invalid value, or two cells are the same.
    """
    settings = _changed(base.model_dump(mode="json", by_alias=True), study.set)
    shared: dict[str, list[tuple[dict, dict, dict[str, str], int]]] = {}
    for levels, changes in _points(study, study.students or base.students):
        own = {key.removeprefix(OWN_STUDENT_KEY): value for key, value in changes.items() if key.startswith(OWN_STUDENT_KEY)}
        others = {key: value for key, value in changes.items() if not key.startswith(OWN_STUDENT_KEY)}
        values = _changed(settings, others)
        title = _title(study, levels, student=False)
        for seed in study.seeds:
            # students that all start from the same weights differ by nothing else
            seeded = _changed(values, {"finetune.seed": seed}) if study.finetune == "only" else values
            key = "-".join(filter(None, [name, title, f"{SEED}{seed}" * (study.finetune == "only")]))
            shared.setdefault(key, []).append((seeded, own | {SEED: seed}, levels, seed))
            if shared[key][0][0] != seeded:
                raise UsageError(f"{source}: {key}", expected="levels whose names differ in letters, digits or ._-",
                                 found="two that do not", do="rename one")  # fmt: skip
    cells = [cell for key, members in shared.items() for cell in _configuration(study, key, members, source)]
    if not cells:
        raise UsageError(source, expected="at least one cell", found="skip leaves out all", do="correct skip")
    return sorted(cells, key=lambda cell: study.seeds.index(cell.seed))


def _points(study: Study, students: list[str]) -> Iterator[tuple[dict[str, str], Changes]]:
    """Every combination of levels that is not left out, with its changes; students vary fastest."""
    for chosen in itertools.product(*study.axes.values(), students):
        levels = {STUDENT: chosen[-1], **dict(zip(study.axes, chosen[:-1], strict=True))}
        if not any(all(levels.get(axis) in found for axis, found in each.items()) for each in study.skip):
            changes: Changes = {}
            for axis, level in zip(study.axes, chosen[:-1], strict=True):
                changes |= study.axes[axis][level]
            yield levels, changes


def _configuration(
    study: Study, title: str, members: list[tuple[dict, dict, dict[str, str], int]], source: str
) -> list[Cell]:
    """The cells of one configuration: its variants are their students."""
    values, variants, cells = members[0][0], {}, []
    for _, own, levels, seed in members:
        student = levels[STUDENT]
        if student not in values["variants"]:
            known = ", ".join(values["variants"])
            raise UsageError(f"{source}: student {student}", expected=f"one of the base's variants: {known}", found="none of them")
        changed = _changed(values["variants"][student], own)
        # what a fine-tuned student started from is in no file that names its run
        digest = _student_digest(values["student"], changed, source, title)[:DIGITS] if study.finetune else ""
        variant = "-".join(filter(None, [student, _title(study, levels, student=True), f"{SEED}{seed}", digest]))
        if variant in variants:
            raise UsageError(f"{source}: {title}", expected="cells of different names", found=f"{variant} twice", do="rename a level")
        variants[variant] = changed
        cells.append((variant, levels, seed))
    last = {"students": [] if study.finetune == "only" else [*variants], "variants": variants}
    values = {**values, **last, "finetune": {**values["finetune"], "from": [*variants] if study.finetune else []}}
    config = resolve(values, (), f"{source}: {title}")
    if study.finetune == "only" and not config.finetune.weights:
        raise UsageError(f"{source}: {title}", expected="finetune.weights with finetune: only", found="null", do="set it to a file")
    name = f"{title}-{_digest(config)[:DIGITS]}"
    config = resolve({**values, "name": name}, (), f"{source}: {title}")
    return [
        Cell(config, variant, levels, seed, tuned)
        for variant, levels, seed in cells
        for tuned in {False: (False,), True: (False, True), "only": (True,)}[study.finetune]
    ]


def _digest(config: Config) -> str:
    """Fingerprint of all that may change a result and that neither a run's own settings nor its data's index say.

    Defaults are left out, so that a further key does not rename the configurations of earlier studies.
    """
    sections = ("recipe", "teacher", "teacher_finetune", "teacher_logits", "student", "finetune")
    values = {name: changed_fields(getattr(config, name)) for name in sections}
    values["finetune"].pop("from", None)
    return fingerprint(values)


def _student_digest(base: Any, changed: dict, source: str, title: str) -> str:
    """The same of one student's settings."""
    student = validate(Student, base, f"{source}: {title}", "student")
    return fingerprint(changed_fields(changed_student(student, changed, f"{source}: {title}: student")))


def _title(study: Study, levels: dict[str, str], student: bool) -> str:
    """The levels of the axes that change only `student`, or of all others, as part of a name."""
    parts = []
    for axis, level in levels.items():
        if axis != STUDENT and _changes_student(study.axes[axis]) == student:
            text = re.sub(r"[^A-Za-z0-9._-]", "_", level)
            parts.append(f"{axis}{text}" if _is_number(level) else text)
    return "-".join(parts)


def _changes_student(levels: dict[str, Changes]) -> bool:
    """Whether no level of an axis changes anything but `student`."""
    return all(key.startswith(OWN_STUDENT_KEY) for changes in levels.values() for key in changes)


def _changed(values: dict, changes: Changes) -> dict:
    for key, value in changes.items():
        values = override_key(values, key, value)
    return values


def _label(value: Any) -> str:
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value}"


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True
