"""A study, as stored in configs/studies/NAME.yaml: a matrix of configurations and students over a base configuration."""

import itertools
import re
from collections.abc import Set
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.common.errors import UsageError
from pipeline.config.params import parse_yaml, read_text
from pipeline.config.types import NAME, Seed
from pipeline.config.validation import Section, short_repr, validate

Changes = dict[str, Any]
"""Values by `section.key`."""
STUDENT, SEED = "student", "seed"
"""The axes that every study has."""
FINETUNED_COLUMN = "fine-tuned"
"""The column, yes or no, of studies that fine-tune."""
RESERVED = {STUDENT, SEED, FINETUNED_COLUMN, "cell", "run", "metric", "value", "mean", "standard_deviation", "seeds"}
"""Columns of a study's files, which no axis may be called."""


class Figure(Section):
    """What the figure shows: the first metric against an axis or against another metric, with a line for each combination
    of the other axes."""

    x: str
    """An axis with numbers as levels, or another of `metrics`, such as throughput.images_per_second."""
    along: str | None = None
    """With a metric as x: the axis whose levels are the points of a line; each point is labelled with its level."""
    log: bool = False
    """Whether the horizontal axis is logarithmic."""


class Study(Section):
    """A matrix of experiments, as stored in configs/studies/NAME.yaml."""

    base: str
    """The base configuration: a name in configs/, or a file."""
    set: Changes = {}
    """Changes to it in every cell, as `section.key: value`."""
    students: Annotated[list[str], Field(min_length=1)] | None = None
    """Names from the base's `variants`; null: its `students`."""
    axes: dict[str, dict[str, Changes]] = {}
    """Levels of each axis, and what each changes. An axis that is named `section.key` may be a list of its values."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    """Values of `student.seed`; with finetune: only, also of `finetune.seed`."""
    skip: list[dict[str, list[str]]] = []
    """Combinations to leave out: levels of some axes, `student` included."""
    finetune: bool | Literal["only"] = False
    """Whether every student is fine-tuned too; only: from `finetune.weights`, without training students first."""
    evaluate: bool = False
    """Whether `pipeline evaluate` runs for every configuration, for metrics from its files."""
    metrics: Annotated[list[str], Field(min_length=1)] = ["top1"]
    """Columns of the table: top1 (of both heads' mean, if there are two), a key of the student's metrics.json, or
    teacher.KEY, evaluation.KEY, throughput.KEY or details.KEY (of the evaluation) from these files. The first is in the figure."""
    reference: list[dict[str, str]] = []
    """Levels of some axes, `student` included: every row is compared, by the first metric, with the row that has these
    levels and otherwise its own. Several: one table for each."""
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
            name = str(axis)
            if isinstance(levels, list) and "." in name:
                levels = {_label(value): {name: value} for value in levels}
                name = name.rpartition(".")[2]
            elif isinstance(levels, dict):
                levels = {_label(label): changes for label, changes in levels.items()}
            elif not isinstance(levels, dict | list):
                raise ValueError(f"axes.{name} must be a list of values, or named levels: found {levels!r}")
            if name in read:
                raise ValueError(f"axes with different names, not two called {name}: name one yourself, with a mapping of levels")
            read[name] = levels
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
        """Read one as a list of one, and numbers as names of levels."""
        found = [reference] if isinstance(reference, dict) else reference
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            return reference
        return [{axis: _label(level) for axis, level in each.items()} for each in found]

    @model_validator(mode="after")
    def _consistent(self):
        for axis, levels in self.axes.items():
            if axis in RESERVED or not re.fullmatch(NAME, axis):
                reserved = ", ".join(sorted(RESERVED))
                raise ValueError(f"an axis name of letters, digits and ._-, other than {reserved}: found {axis}")
            if not levels:
                raise ValueError(f"at least one level of axes.{axis}")
        self._check_keys()
        self._check_changes()
        named = [("skip", axis, level) for each in self.skip for axis, levels in each.items() for level in levels]
        referred = [("reference", axis, level) for each in self.reference for axis, level in each.items()]
        for key, axis, level in [*named, *referred]:
            known = self.students or [level] if axis == STUDENT else [*self.axes.get(axis, ())]
            if level not in known:
                raise ValueError(f"{key}: levels of an axis ({', '.join(known) or 'no such axis'}), not {axis} {level}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different: {self.seeds}")
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"metrics must be different: {self.metrics}")
        if self.figure:
            self._check_figure(self.figure)
        return self

    def _changed_keys(self) -> dict[str, Set[str]]:
        """The keys that the levels of each axis change."""
        return {axis: {key for changes in levels.values() for key in changes} for axis, levels in self.axes.items()}

    def _check_changes(self) -> None:
        """Refuse a key that two axes change: one of them would have no effect."""
        for (one, first), (other, second) in itertools.combinations(self._changed_keys().items(), 2):
            for a, b in itertools.product(sorted(first), sorted(second)):
                if any(_overlap(*pair) for pair in [(a, b), (_of_student(a), b), (a, _of_student(b))]):
                    both = a if a == b else f"{a} and {b}"
                    raise ValueError(f"axes that change different keys: both {one} and {other} change {both}; make them one axis,"
                                     " or name single entries, as student.kwargs.depth")  # fmt: skip

    def _check_keys(self) -> None:
        """Refuse changes of keys that a study sets itself, and of more than one key: it would change others unnoticed."""
        own = {f"{STUDENT}.{SEED}": "seeds", "finetune.from": "finetune"}
        if self.finetune == "only":
            own["finetune.seed"] = "seeds"
        for where, keys in {"set": {*self.set}, **self._changed_keys()}.items():
            for key in sorted(keys):
                if key in own:
                    raise ValueError(f"the study's key `{own[key]}` in place of {key} in {where}")
                if "." not in key and key != "work":
                    raise ValueError(f"changes of single keys, as section.key: found {key} in {where}")

    def _check_figure(self, figure: Figure) -> None:
        by_metric = figure.x in self.metrics[1:]
        if not by_metric and not all(map(is_number, self.axes.get(figure.x, ["no such axis"]))):
            raise ValueError(f"figure.x must be an axis with numbers as levels, or a metric other than the first: found {figure.x}")
        if figure.along is not None and not (by_metric and figure.along in (STUDENT, *self.axes)):
            raise ValueError(f"figure.along must be an axis, and figure.x a metric: found {figure.along}")
        if figure.log and any(float(level) <= 0 for level in self.axes.get(figure.x, ())):
            raise ValueError(f"figure.log needs levels above 0: found {figure.x} {', '.join(self.axes[figure.x])}")


def _overlap(a: str, b: str) -> bool:
    """Whether two keys are the same, or one is part of the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _of_student(key: str) -> str:
    """The key of `student` that a key of a variant replaces; any other key itself."""
    return re.sub(r"^variants\.[^.]+", STUDENT, key)


def load_study(path: Path) -> Study:
    """Read a study.

    Raises:
        UsageError: the file cannot be read, or has an unknown key or an invalid value.
    """
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise UsageError(str(path), expected="a mapping with the key `base`", found=short_repr(values), do="correct the file")
    return validate(Study, values, str(path))


def _label(value: Any) -> str:
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value}"


def is_number(label: str) -> bool:
    """Whether a level is a number."""
    try:
        float(label)
    except ValueError:
        return False
    return True
