"""The cells of a study.

A cell is one student of an ordinary configuration. Levels that change only `student` become variants of one
configuration, whose cells share its teacher and store; all other levels become configurations of their own, named after
their levels and the fingerprint of their settings. So an edited study never takes earlier results for its own.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.common.errors import UsageError
from pipeline.config.params import override_key, resolve
from pipeline.config.paths import finetune_folder, student_folder
from pipeline.config.schema import PURPOSES, Config, Student, changed_fields, changed_student
from pipeline.config.store_spec import store_spec
from pipeline.config.study import SEED, STUDENT, Changes, Study, is_number
from pipeline.config.validation import fingerprint, flatten, validate

OWN_STUDENT_KEY = f"{STUDENT}."
DIGITS = 6
"""Number of digits of its fingerprint in a configuration's name."""


@dataclass(frozen=True)
class Cell:
    """One student of one configuration."""

    config: Config = field(repr=False)
    """The complete configuration, with the students of its other cells."""
    variant: str
    """The student's name in the configuration."""
    levels: dict[str, str]
    """The level of each axis, `student` first."""
    seed: int
    finetuned: bool = False
    """Whether it is the student after fine-tuning."""

    @property
    def name(self) -> str:
        """The name of its folder below outputs/, without `students/`."""
        return f"{self.config.name}/{self.folder.name}"

    @property
    def folder(self) -> Path:
        return (finetune_folder if self.finetuned else student_folder)(self.config, self.variant)

    @property
    def stage(self) -> str:
        """Its stage's name in dvc.yaml."""
        return f"{'finetune' if self.finetuned else 'train-student'}@{self.variant}"


@dataclass(frozen=True)
class _Member:
    """What one cell has of its own in a configuration that several share."""

    settings: dict[str, Any]
    """The configuration's."""
    student_changes: dict[str, Any]
    """To the variant's settings, with the seed."""
    levels: dict[str, str]
    """By axis."""
    seed: int


def expand(study: Study, name: str, base: Config, source: str) -> list[Cell]:
    """The cells of a study called `name`, in the order in which they are run: all of one seed, then those of the next.

    Raises:
        UsageError: a level changes an unknown key or sets an invalid value, a change in every cell has no effect on
            a student, or two cells are the same.
    """
    settings = _changed(base.model_dump(mode="json", by_alias=True), study.set)
    _check_set(study, settings["variants"], study.students or base.students, source)
    shared: dict[str, list[_Member]] = {}
    for levels, changes in _points(study, study.students or base.students):
        own = {key.removeprefix(OWN_STUDENT_KEY): value for key, value in changes.items() if key.startswith(OWN_STUDENT_KEY)}
        others = {key: value for key, value in changes.items() if not key.startswith(OWN_STUDENT_KEY)}
        values = _changed(settings, others)
        title = _title(study, levels, student=False)
        for seed in study.seeds:
            # students that all start from the same weights differ only in this
            seeded = _changed(values, {"finetune.seed": seed}) if study.finetune == "only" else values
            key = "-".join(filter(None, [name, title, f"{SEED}{seed}" * (study.finetune == "only")]))
            shared.setdefault(key, []).append(_Member(seeded, own | {SEED: seed}, levels, seed))
            if shared[key][0].settings != seeded:
                raise UsageError(f"{source}: {key}", expected="levels whose names differ in letters, digits or ._-",
                                 found="two that do not", do="rename one")  # fmt: skip
    cells = [cell for key, members in shared.items() for cell in _configuration(study, key, members, source)]
    if not cells:
        raise UsageError(source, expected="at least one cell", found="skip leaves out every cell", do="correct skip")
    _check_stores([cell.config for cell in cells], source)
    return sorted(cells, key=lambda cell: study.seeds.index(cell.seed))


def _check_set(study: Study, variants: dict[str, dict], students: list[str], source: str) -> None:
    """Refuse a change of `student` in every cell that a student's own settings override."""
    for key, value in study.set.items():
        wanted = flatten(override_key({}, key.removeprefix(OWN_STUDENT_KEY), value))
        for name in students if key.startswith(OWN_STUDENT_KEY) else ():
            own = flatten(variants.get(name, {}))
            for leaf in [leaf for leaf in wanted if own.get(leaf, wanted[leaf]) != wanted[leaf]]:
                raise UsageError(
                    f"{source}: set: {key}", expected=f"a key that the base's variant {name} does not set",
                    found=f"{leaf}: {own[leaf]} there", do=f"set variants.{name}.{leaf}, or make {key} an axis",
                )  # fmt: skip


def _points(study: Study, students: list[str]) -> Iterator[tuple[dict[str, str], Changes]]:
    """Every combination of levels that is not left out, with its changes; students vary fastest."""
    for chosen in itertools.product(*study.axes.values(), students):
        levels = {STUDENT: chosen[-1], **dict(zip(study.axes, chosen[:-1], strict=True))}
        if not any(all(levels.get(axis) in found for axis, found in each.items()) for each in study.skip):
            changes: Changes = {}
            for axis, level in zip(study.axes, chosen[:-1], strict=True):
                changes |= study.axes[axis][level]
            yield levels, changes


def _configuration(study: Study, title: str, members: list[_Member], source: str) -> list[Cell]:
    """The cells of one configuration: its variants are their students."""
    values, variants, cells = members[0].settings, {}, []
    for member in members:
        student = member.levels[STUDENT]
        if student not in values["variants"]:
            known = ", ".join(values["variants"])
            raise UsageError(f"{source}: student {student}", expected=f"one of the base's variants: {known}", found="none of them")
        changed = _changed(values["variants"][student], member.student_changes)
        # what a fine-tuned student started from is in no file that names its run
        digest = _student_digest(values["student"], changed, source, title)[:DIGITS] if study.finetune else ""
        variant = "-".join(filter(None, [student, _title(study, member.levels, student=True), f"{SEED}{member.seed}", digest]))
        if variant in variants:
            raise UsageError(f"{source}: {title}", expected="cells of different names", found=f"{variant} twice", do="rename a level")
        variants[variant] = changed
        cells.append((variant, member))
    last = {"students": [] if study.finetune == "only" else [*variants], "variants": variants}
    values = {**values, **last, "finetune": {**values["finetune"], "from": [*variants] if study.finetune else []}}
    config = resolve(values, (), f"{source}: {title}")
    if study.finetune == "only" and not config.finetune.weights:
        raise UsageError(f"{source}: {title}", expected="finetune.weights with finetune: only", found="null", do="set it to a file")
    name = f"{title}-{_digest(config)[:DIGITS]}"
    config = resolve({**values, "name": name}, (), f"{source}: {title}")
    return [
        Cell(config, variant, member.levels, member.seed, tuned)
        for variant, member in cells
        for tuned in {False: (False,), True: (False, True), "only": (True,)}[study.finetune]
    ]


def _check_stores(configs: list[Config], source: str) -> None:
    """Refuse two precisions, or two numbers of classes of kind topk, for one store: it has one of each."""
    found: dict[tuple[str, str], dict[Any, None]] = {}
    for config, purpose in itertools.product(configs, PURPOSES):
        settings, spec = config.teacher_logits, store_spec(config, purpose)
        if config.needs_store(purpose) and not spec.fetch:
            values = [each.model_dump(mode="json") for each in (config.data, spec.recipe, config.teacher, config.teacher_finetune)]
            store = fingerprint([config.work, *values, spec.sampling])
            found.setdefault((store, "precision"), {})[settings.precision] = None
            if settings.kind == "topk":
                found.setdefault((store, "top_k"), {})[settings.top_k] = None
    for (_, key), values in found.items():
        if len(values) > 1:
            raise UsageError(
                f"{source}: teacher_logits.{key}", expected="one value for each store",
                found=", ".join(map(str, values)), do="set `work` in each of these levels, too, to folders of their own",
            )  # fmt: skip


def levels_before_finetuning(study: Study, levels: dict[str, str]) -> dict[str, str] | None:
    """The levels of a student in the table before it is fine-tuned; None if it is in the table with other levels.

    An axis that changes nothing but fine-tuning is left empty, and of an axis with some such levels, these are left out.
    """
    shown = dict(levels)
    for axis, known in study.axes.items():
        tuning = [level for level, changes in known.items() if changes and all(key.startswith("finetune.") for key in changes)]
        if levels[axis] in tuning:
            if levels[axis] != tuning[0] or not all(known.values()):
                return None
            shown[axis] = "" if len(tuning) == len(known) else levels[axis]
    return shown


def _digest(config: Config) -> str:
    """Fingerprint of every setting that can change a result but is in neither the run's settings nor the index.

    Defaults are left out, so that a new key does not rename the configurations of earlier studies.
    """
    sections = ("recipe", "teacher", "teacher_finetune", "teacher_logits", "student", "finetune")
    values = {name: changed_fields(getattr(config, name)) for name in sections}
    values["finetune"].pop("from", None)
    if fetched := {name: section.fetch for name in ("teacher_logits", "finetune") if (section := getattr(config, name)).fetch}:
        values["fetch"] = fetched  # for a fetched store, no setting here names the teacher
    return fingerprint(values)


def _student_digest(base: Any, changed: dict, source: str, title: str) -> str:
    """Fingerprint of one student's settings."""
    student = validate(Student, base, f"{source}: {title}", "student")
    return fingerprint(changed_fields(changed_student(student, changed, f"{source}: {title}: student")))


def _title(study: Study, levels: dict[str, str], student: bool) -> str:
    """The levels of the axes that change only `student`, or of all others, as part of a name."""
    parts = []
    for axis, level in levels.items():
        if axis != STUDENT and _changes_student(study.axes[axis]) == student:
            text = re.sub(r"[^A-Za-z0-9._-]", "_", level)
            parts.append(f"{axis}{text}" if is_number(level) else text)
    return "-".join(parts)


def _changes_student(levels: dict[str, Changes]) -> bool:
    """Whether no level of an axis changes anything but `student`."""
    return all(key.startswith(OWN_STUDENT_KEY) for changes in levels.values() for key in changes)


def _changed(values: dict, changes: Changes) -> dict:
    for key, value in changes.items():
        values = override_key(values, key, value)
    return values
