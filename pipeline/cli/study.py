"""`pipeline study`: the cells of a study, the commands that they take, and which of them are done."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from pipeline.cli.configure import CONFIGS, STUDIES
from pipeline.cli.matching import have_changed, lacks_sets, sets_have_changed
from pipeline.cli.runs import Experiment
from pipeline.cli.scan import read_json
from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.signals import raise_on_sigterm
from pipeline.common.wording import count_of
from pipeline.config.cells import Cell, expand
from pipeline.config.params import load_config, record_config
from pipeline.config.paths import evaluated_models, evaluation_folder, recorded_params
from pipeline.config.schema import PURPOSES, Config
from pipeline.config.study import Study, load_study
from pipeline.config.validation import fingerprint
from pipeline.models.provenance import START, finetune_start, student_start
from pipeline.shards.prepared import data_settings, other_settings
from pipeline.training.identity import validation_fingerprint

Execute = Callable[[list[str]], int]
"""Runs a command of `pipeline`, given without that word; returns its exit code."""


@dataclass(frozen=True)
class Matrix:
    """A study with its cells."""

    name: str
    study: Study
    cells: list[Cell]
    argument: str
    """How the command line names it: its name, or its file."""

    @property
    def configs(self) -> list[Config]:
        """The configurations, in the order in which they are needed."""
        return list({cell.config.name: cell.config for cell in self.cells}.values())


def find(name: str, overrides: tuple[str, ...]) -> Matrix:
    """The study configs/studies/`name`.yaml, or a YAML file, over its base with `overrides`.

    Raises:
        UsageError: there is no such study or base, or a key or value is invalid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(studies())
        raise UsageError(f"study {name!r}", expected=f"one of {known}, or a YAML file", found=f"no {path}")
    study = load_study(path)
    base = study.base if study.base.endswith((".yaml", ".yml")) else CONFIGS / f"{study.base}.yaml"
    if not Path(base).exists():
        raise UsageError(f"{path}: base", expected="a configuration in configs/, or a YAML file", found=f"no {base}")
    return Matrix(path.stem, study, expand(study, path.stem, load_config(base, overrides), str(path)), name)


def studies() -> dict[str, Path]:
    """The files in configs/studies/ by name; table2 before table10."""
    return {path.stem: path for path in sorted(STUDIES.glob("*.yaml"), key=lambda path: natural_order(path.stem))}


def natural_order(name: str) -> list[tuple[str, int]]:
    """A key that sorts numbers in names by their value."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def list_studies() -> None:
    """Print each study's name and the first line of its file, a comment that says what it is."""
    rows = [(name, path.read_text().partition("\n")[0].removeprefix("# ")) for name, path in studies().items()]
    print(tabulate(rows, tablefmt="plain"))


# commands


def setup_commands(config: Config, finetune: bool | str) -> list[list[str]]:
    """What the students of a configuration need: shards, teachers and stores."""
    options = ["--config", str(recorded_params(config))]
    commands = [["prepare", "--quick", *options]]
    for purpose in PURPOSES[: 1 + bool(finetune)]:
        chosen = ["--for", purpose] * (purpose == "finetune")
        if config.runs_teacher(purpose):
            commands.append(["teacher", *chosen, *options])
        if config.needs_store(purpose):
            commands.append(["teacher-logits", *chosen, *options])
    return commands


def cell_command(cell: Cell) -> list[str]:
    """What trains a cell's student."""
    stage, _, student = cell.stage.partition("@")
    return [stage, "--student", student, "--config", str(recorded_params(cell.config))]


def print_commands(matrix: Matrix) -> None:
    """Print every command, after writing the configurations that they name."""
    for config in matrix.configs:
        record_config(config)
    print("# shards, teachers and stores: one after the other")
    setup = [command for config in matrix.configs for command in setup_commands(config, matrix.study.finetune)]
    _print(setup)
    for tuned in sorted({cell.finetuned for cell in matrix.cells}):
        print(f"# {'fine-tuned ' * tuned}students: in any order, or at the same time")
        _print(cell_command(cell) for cell in matrix.cells if cell.finetuned == tuned)
    if matrix.study.evaluate:
        print("# evaluation: when the students are trained")
        _print(["evaluate", "--config", str(recorded_params(config))] for config in matrix.configs)


def _print(commands: Iterable[list[str]]) -> None:
    for command in commands:
        print(shlex.join(["pipeline", *command]))


def run(matrix: Matrix, names: tuple[str, ...], dry_run: bool, execute: Execute) -> None:
    """Run what is missing for the cells, all of the first seed before those of the next.

    Args:
        names: of cells; none: all.
        dry_run: only print the commands.

    Raises:
        UsageError: no such cell.
        PipelineError: a command failed.
    """
    chosen, tried, ready = _chosen(matrix, names), set[str](), set[str]()
    if not names and not dry_run:
        for experiment in _differing(_experiments(matrix.cells).values()):
            _run(setup_commands(experiment.config, matrix.study.finetune)[0], experiment.config, dry_run, execute)
    while missing := _missing(matrix, chosen, tried):  # a second time where `prepare` finds that the images have changed
        for cell in missing:
            if cell.config.name not in ready:
                for command in setup_commands(cell.config, matrix.study.finetune):
                    _run(command, cell.config, dry_run, execute)
                ready.add(cell.config.name)
            _run(cell_command(cell), cell.config, dry_run, execute)
            tried.add(cell.name)
    for config in matrix.configs if matrix.study.evaluate and not names else []:
        if not _is_evaluated(config):
            _run(["evaluate", "--config", str(recorded_params(config))], config, dry_run, execute)


def _missing(matrix: Matrix, chosen: list[Cell], tried: set[str]) -> list[Cell]:
    """The chosen cells that are not done, besides those that were tried; says how many are done."""
    done = done_runs(matrix.cells)
    missing = [cell for cell in chosen if cell.name not in done and cell.name not in tried]
    if missing or not tried:
        print(f"{matrix.name}: {len(chosen) - len(missing)} of {count_of(len(chosen), 'cell')} done", flush=True)
    return missing


def _chosen(matrix: Matrix, names: tuple[str, ...]) -> list[Cell]:
    known = {cell.name: cell for cell in matrix.cells}
    for name in names:
        if name not in known:
            raise UsageError(f"--cell {name}", expected=f"a cell of {matrix.name}", found="no such cell",
                             do=f"name one such as {', '.join([*known][:3])}")  # fmt: skip
    return [known[name] for name in dict.fromkeys(names)] if names else matrix.cells


def _run(command: list[str], config: Config, dry_run: bool, execute: Execute) -> None:
    text = shlex.join(["pipeline", *command])
    print(f"> {text}", flush=True)
    if dry_run:
        return
    record_config(config)
    if code := execute(command):
        raise PipelineError(
            f"study: {text}", expected="exit code 0", found=f"exit code {code}",
            do="see its message above; the same study resumes there",
        )  # fmt: skip


def run_subprocess(command: list[str]) -> int:
    """Run a command in a process of its own, which Ctrl-C and SIGTERM end too, after it has saved a checkpoint."""
    process = subprocess.Popen([sys.executable, "-m", "pipeline", *command])
    try:
        with raise_on_sigterm():
            return process.wait()
    except (KeyboardInterrupt, SystemExit):
        process.terminate()
        process.wait()
        raise


# what is done


def done_runs(cells: Iterable[Cell]) -> dict[str, str]:
    """The fingerprints of the runs of the cells that are done, by the cell's name.

    No cell counts as done if its configuration was prepared from other data; a line is then printed.
    """
    cells = list(cells)
    experiments = _experiments(cells)
    other = {name: "; ".join(other_settings(each.config)[:3]) for name, each in experiments.items()}
    if differing := [each.config.name for each in _differing(experiments.values())]:
        other |= dict.fromkeys(differing, f"the images of {' and '.join(differing[:3])} differ, although their settings do not")
    for name, reason in [(name, reason) for name, reason in other.items() if reason][:1]:
        print(f"{name} was prepared from other data: {reason}")
    found = {cell.name: _done_run(cell, experiments[cell.config.name]) for cell in cells if not other[cell.config.name]}
    return {name: run for name, run in found.items() if run}


def _experiments(cells: Iterable[Cell]) -> dict[str, Experiment]:
    return {name: Experiment(config) for name, config in {cell.config.name: cell.config for cell in cells}.items()}


def _differing(experiments: Iterable[Experiment]) -> list[Experiment]:
    """Those that were prepared with the same settings of `data` as another, but from images that have changed since."""
    prepared: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        data = experiment.config.data
        if experiment.index and not other_settings(experiment.config):
            prepared.setdefault(fingerprint(data_settings(data, data.source)), []).append(experiment)
    return [each for same in prepared.values() if len({each.images for each in same}) > 1 for each in same]


def _done_run(cell: Cell, experiment: Experiment) -> str | None:
    """The fingerprint of a cell's run if it is complete and published, with these settings, images, teacher and store, or None.

    The name in run.json is not compared: the run may have been trained for another student with the same settings.
    """
    config, metrics = cell.config, read_json(cell.folder / "metrics.json")
    crop = config.evaluate.crop_finetuned if cell.finetuned else config.evaluate.crop
    if metrics.get("validation") != validation_fingerprint(experiment.indices["val"].get("fingerprint"), crop):
        return None
    student = config.student_named(cell.variant)
    start = finetune_start(config, cell.variant) if cell.finetuned else student_start(config, student)
    if None not in (start, metrics.get(START)) and start != metrics[START]:
        return None
    purpose = "finetune" if cell.finetuned else "train-student"
    if student.distillation != "none" and (purpose in experiment.foreign_stores or "fingerprint" not in experiment.manifest(cell.stage)):
        return None
    complete = {state.folder.name for state in experiment.states if state.complete}
    run = metrics.get("run") if (cell.folder / "weights.safetensors").exists() else None
    return run if run in complete.intersection(experiment.published_runs(cell.stage)) else None


def _is_evaluated(config: Config) -> bool:
    """Whether the evaluation is of the models that are published, and of the configured sets."""
    metrics, models = read_json(evaluation_folder(config) / "metrics.json"), evaluated_models(config)
    changed = have_changed(metrics, models) or lacks_sets(metrics, config) or sets_have_changed(metrics, config)
    return metrics.keys() >= models.keys() and not changed
