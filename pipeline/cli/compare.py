"""`pipeline compare`: finds training runs by what users call them, and reads what they recorded."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cli.matching import is_evaluation_of
from pipeline.cli.scan import read_json, read_log_tail
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import load_config
from pipeline.config.paths import FINGERPRINT, local_work
from pipeline.config.schema import Config, Student
from pipeline.config.validation import flatten
from pipeline.report.plots import Curve
from pipeline.report.runs import TrainedRun, aligned, comparison_json, format_comparison, numbers, plot_runs
from pipeline.report.settings import OBJECTIVE, objective
from pipeline.training.identity import VALIDATION_INDEX
from pipeline.training.log import read_curve, read_log
from pipeline.views.draw import recipe_fingerprint

NO_SETTINGS = ("name", "steps", "environment", VALIDATION_INDEX)
"""Keys of run.json that are not settings."""
LOG_ONLY = ("kind", "step", "time", "speed")
"""Keys of an epoch in a log that are not metrics."""


def run(names: tuple[str, ...], picture: Path, json: bool) -> None:
    """Print the comparison, and write the training curves.

    Raises:
        UsageError: fewer than two runs, the same one twice, or no such run.
        PipelineError: a log or a curve is damaged.
    """
    folders = [find(name) for name in names]
    if len(set(folders)) < max(2, len(names)):
        raise UsageError("pipeline compare", expected="two or more different runs", found=" ".join(names) or "none",
                         do="for example: pipeline compare outputs/NAME/students/none outputs/NAME/students/token")  # fmt: skip
    recipes = {key: each for project in map(project_of, folders) for key, each in known_recipes(project)}
    runs = [read_run(folder, name, recipes) for folder, name in zip(folders, short_names(folders), strict=True)]
    runs = aligned(runs)
    plot_runs(picture, runs)
    print(comparison_json(runs) if json else f"{format_comparison(runs)}\n\ncurves: {picture}")


def find(name: str) -> Path:
    """The folder of a training: its state folder, or that of its published weights.

    Args:
        name: such a folder, EXPERIMENT/STUDENT, STUDENT of the experiment in params.yaml, or a run's fingerprint or what
            trackers call it.

    Raises:
        UsageError: there is none, or more than one.
    """
    experiment, _, model = name.rpartition("/")
    if not experiment and Path("params.yaml").exists():
        experiment = load_config("params.yaml").name
    places = [Path(name)]
    if experiment and model:
        places += [Path("outputs", experiment, "students", model), Path("outputs", experiment, model)]
    for place in places:
        if (place / "metrics.json").exists() or (place / "run.json").exists():
            return place
    found = []
    if digits := re.fullmatch(r"(?:[\w.-]*-)?([0-9a-f]{8,32})", name):
        found = [folder for folder in list_states(Path()) if folder.name.startswith(digits[1])]
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"run {name}",
        expected="a folder such as outputs/NAME/students/STUDENT, outputs/NAME/teacher or work/state/FINGERPRINT;"
        " NAME/STUDENT; STUDENT of params.yaml; or a run's short name, such as student-token-1a2b3c4d",
        found=f"{len(found)} runs: {', '.join(map(str, found))}" if found else "no metrics.json and no run.json",
        do="train it first, or see the names in outputs/*/students and work/state",
    )  # fmt: skip


def project_of(folder: Path) -> Path:
    """The folder that commands were run in for a training: it holds outputs/ and, usually, work/."""
    parents = folder.absolute().parents
    above = [parent.parent for parent in parents if parent.name == "outputs"]
    return above[0] if above else parents[2] if (folder / "run.json").exists() and len(parents) > 2 else Path()


def list_states(project: Path) -> Iterator[Path]:
    """The state folders below the `work` of a project's experiments, and below the default one."""
    works = {project / local_work(work) for work in (Config().work, *(each.work for each in known_configs(project)))}
    for work in sorted(works):
        yield from (folder for folder in sorted((work / "state").glob("*")) if FINGERPRINT.fullmatch(folder.name))


def known_configs(project: Path) -> Iterator[Config]:
    """The configurations of a project's experiments, without those that are no longer valid."""
    for path in sorted((project / "outputs").glob("*/params.yaml")):
        with contextlib.suppress(UsageError):
            yield load_config(path)


def known_recipes(project: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings of every recipe of a project's experiments, by fingerprint: run.json holds only that."""
    for config in known_configs(project):
        adapted = config.finetune_recipe(), config.teacher_finetune_recipe()
        for recipe in (config.recipe, config.teacher_recipe(), *adapted):
            yield recipe_fingerprint(recipe), recipe.model_dump(mode="json")


def short_names(folders: list[Path]) -> list[str]:
    """Names for the runs: EXPERIMENT/MODEL, or MODEL within one experiment; for a state folder, that used by trackers."""
    found = []
    for folder in folders:
        described = read_json(folder / "run.json")
        parts = [part for part in folder.absolute().parts[-3:] if part != "students"][-2:]
        label = f"{described.get('name')}-{folder.name[:8]}".replace(" ", "-")
        found.append(label if described else "/".join(parts))
    alone = [name.rpartition("/")[2] for name in found]
    short = alone if len({name.rpartition("/")[0] for name in found}) == 1 and len({*alone}) == len(alone) else found
    if len({*short}) < len(short):  # in several copies of the project
        short = [f"{project_of(folder).absolute().name}:{name}" for folder, name in zip(folders, found, strict=True)]
    return short if len({*short}) == len(short) else [str(folder) for folder in folders]


def read_run(folder: Path, name: str, recipes: dict[str, dict[str, Any]]) -> TrainedRun:
    """What a training recorded, in its state folder and where its weights are published.

    Args:
        recipes: settings by fingerprint.

    Raises:
        PipelineError: its log or its curve is damaged.
    """
    published, metrics = read_json(folder / "metrics.json"), dict[str, Any]()
    run = published.get("run") if published else folder.name
    state = (
        folder if not published else next((each for each in list_states(project_of(folder)) if each.name == run), None)
    )
    if published:
        metrics |= published | {"evaluation": evaluation_of(folder, published)}
        epochs = read_curve(folder / "curve.csv") if (folder / "curve.csv").exists() else []
    else:
        logged = [line for line in read_log(folder / "log.jsonl") if line["kind"] == "epoch"]
        metrics |= {key: value for key, value in (logged or [{}])[-1].items() if key not in LOG_ONLY}
        epochs = [{key: "" if value is None else str(value) for key, value in line.items()} for line in logged]
    described = read_json(state / "run.json") if state else {}
    settings = settings_of(described, recipes) if run else _origin(published)
    environment = flatten(described.get("environment", {}))
    curve = Curve(_objective(described), epochs)
    note = _note(state, described) if run else "not trained by the pipeline"
    return TrainedRun(name, run, numbers(metrics), settings, environment, metrics.get("validation"), curve, note)


def _note(state: Path | None, described: dict[str, Any]) -> str:
    """What a training lacks; empty if nothing."""
    if state is None or not described:
        return "its state folder is gone, so its settings are unknown"
    if (state / "final.safetensors").exists():
        return ""
    steps = max((line["step"] for line in read_log_tail(state / "log.jsonl")), default=0)
    return f"not finished, {steps:,} of {described.get('steps'):,} steps"


def settings_of(described: dict[str, Any], recipes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings in a run.json, with those of its recipe in place of the fingerprint if they are known."""
    settings = {key: value for key, value in described.items() if key not in NO_SETTINGS}
    recipe = settings.get("recipe")
    if isinstance(recipe, str) and recipe in recipes:
        settings["recipe"] = recipes[recipe]
    return flatten({"teacher" if key == "teacher_settings" else key: value for key, value in settings.items()})


def _origin(published: dict[str, Any]) -> dict[str, Any]:
    """What a teacher that the pipeline did not train consists of, from its metrics.json."""
    return flatten(
        {key: value for key, value in published.items() if key in ("source", "architecture", "weights", "size")}
    )


def evaluation_of(folder: Path, published: dict[str, Any]) -> dict[str, Any]:
    """What `pipeline evaluate` measured of a model, if it is still the published one, on the same images."""
    root = folder.parent.parent if folder.parent.name == "students" else folder.parent
    found = read_json(root / "evaluation" / "metrics.json").get(folder.name)
    if not isinstance(found, dict) or found.keys().isdisjoint(("run", "weights")):
        return {}
    return found if is_evaluation_of(found, published) else {}


def _objective(described: dict[str, Any]) -> str:
    """What a run's loss measures; for a run.json of unknown settings, labels."""
    student = described.get("student")
    if not isinstance(student, dict):
        return objective(None)
    with contextlib.suppress(UsageError, PipelineError, ValueError):
        return objective(Student(**{key: student[key] for key in OBJECTIVE if key in student}))
    return objective(None)
