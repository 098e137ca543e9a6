"""Compare training runs: metrics, the settings that differ, and runs of equal settings with different results."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pipeline.config.paths import FINGERPRINT
from pipeline.config.schema import Training
from pipeline.config.validation import flatten
from pipeline.report.plots import Curve, plot_curves
from pipeline.report.study import heading, is_share

NOT_RESULTS = ("epoch", "images_per_second")
"""Metrics that do not result from training, by the last part of their key."""
DEPENDENCIES = "dependencies."
"""Prefix of the keys of weights and store that a run depends on."""
MAX_VALUE = 40
"""Characters of a setting in the table."""


@dataclass(frozen=True)
class TrainedRun:
    """A training and what it recorded; keys of nested values are joined by dots."""

    name: str
    run: str | None
    """Its fingerprint; None: the pipeline did not train the model."""
    metrics: dict[str, float]
    settings: dict[str, Any]
    """What its weights depend on; empty if its state folder is gone."""
    environment: dict[str, Any]
    """What may change the rounding: device, ranks, versions of libraries; empty if it was not recorded."""
    validation: str | None
    """Fingerprint of the images and the crop of validation."""
    curve: Curve = field(repr=False)
    note: str = ""
    """What is missing, if anything is."""


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among nested values, by their joined keys."""
    return {key: value for key, value in flatten(values).items() if _is_finite(value)}


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that JSON can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def differing(values: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys in which the mappings differ, with the value of each; None where there is none."""
    keys = dict.fromkeys(itertools.chain.from_iterable(values))
    found = {key: [each.get(key) for each in values] for key in keys}
    return {key: row for key, row in found.items() if any(value != row[0] for value in row)}


def aligned(runs: Sequence[TrainedRun]) -> list[TrainedRun]:
    """The runs with the keys of the training loop in one section, `training`, if they are of different ones."""
    sections = [next((key.partition(".")[0] for key in run.settings if key.endswith(".epochs")), "") for run in runs]
    if len(set(sections)) == 1:
        return [*runs]
    return [
        replace(run, settings={_aligned(key, section): value for key, value in run.settings.items()})
        for run, section in zip(runs, sections, strict=True)
    ]


def _aligned(key: str, section: str) -> str:
    own, _, name = key.partition(".")
    return f"training.{name}" if own == section and name in Training.model_fields else key


def differing_settings(runs: Sequence[TrainedRun]) -> dict[str, list[Any]]:
    """The settings in which the runs differ, as far as they are known, with the value of each run.

    Dependencies are compared among the runs that recorded them: a run.json of an earlier version has none.
    """
    known = [run.settings for run in runs if run.settings]
    recorded = [each for each in known if any(key.startswith(DEPENDENCIES) for key in each)]
    found = [key for key in differing(known) if not key.startswith(DEPENDENCIES)]
    found += [key for key in differing(recorded) if key.startswith(DEPENDENCIES)]
    return {key: [run.settings.get(key) for run in runs] for key in found}


def results(run: TrainedRun) -> dict[str, float]:
    """The metrics that training determines; accuracies on other images do not count as a different result."""
    return {key: value for key, value in run.metrics.items() if key.rpartition(".")[2] not in NOT_RESULTS}


def remarks(runs: Sequence[TrainedRun]) -> list[str]:
    """What must be said about a comparison, a sentence per line."""
    found = [f"{run.name}: {run.note}" for run in runs if run.note]
    if len({run.validation for run in runs if run.validation}) > 1:
        found.append("validated on different images or crops: accuracies are not comparable")
    for first, second in itertools.combinations(runs, 2):
        # epochs differ if one is still running
        same_length = first.metrics.get("epoch") == second.metrics.get("epoch")
        if first.settings and second.settings and same_length and not differing_settings([first, second]):
            found.append(f"{first.name} and {second.name}: {_equal_settings(first, second)}")
    return found


def _equal_settings(first: TrainedRun, second: TrainedRun) -> str:
    """A sentence about two runs of equal settings."""
    shared = results(first).keys() & results(second).keys()
    if first.validation != second.validation:
        shared = {key for key in shared if not is_share(key) and not key.startswith("evaluation.")}
    other = [key for key in results(first) if key in shared and first.metrics[key] != second.metrics[key]]
    same = "the same run" if first.run == second.run else "equal settings"
    if not other:
        return f"{same}, equal results"
    values = ", ".join(f"{key} {first.metrics[key]:.6g} and {second.metrics[key]:.6g}" for key in other[:3])
    if not (first.environment and second.environment):
        why = "no environment was recorded"
    elif changed := differing([first.environment, second.environment]):
        why = "; ".join(f"{key} {was} and {now}" for key, (was, now) in changed.items())
    else:
        why = "in equal environments: kernels of a GPU may be nondeterministic (see `deterministic`)"
    if first.run != second.run:
        why += "; their fingerprints differ, so something that run.json does not record does too"
    return f"{same}, but different results: {values}{', ...' * (len(other) > 3)} ({why})"


def format_comparison(runs: Sequence[TrainedRun]) -> str:
    """Metrics and differing settings as plain text, a column per run, and the remarks."""
    names = [run.name for run in runs]
    metrics = dict.fromkeys(itertools.chain.from_iterable(run.metrics for run in runs))
    rows = [[heading(key), *(_metric(key, run.metrics.get(key)) for run in runs)] for key in metrics]
    parts = [_table(["metric", *names], rows, "right")]
    if settings := differing_settings(runs):
        lines = [[key, *map(_setting, values)] for key, values in settings.items()]
        parts.append(_table(["setting", *names], lines, "left"))
    elif all(run.settings for run in runs):
        parts.append("no setting differs")
    if (said := differing([run.environment for run in runs])) and all(run.environment for run in runs):
        parts.append(_table(["environment", *names], [[key, *map(_setting, row)] for key, row in said.items()], "left"))
    return "\n\n".join([*parts, *(["\n".join(lines)] if (lines := remarks(runs)) else [])])


def _table(headings: list[str], rows: list[list[str]], align: str) -> str:
    columns = ["left", *[align] * (len(headings) - 1)]
    text = tabulate([headings, *rows], tablefmt="plain", disable_numparse=True, colalign=columns)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _metric(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if is_share(key):
        return f"{100 * value:.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _setting(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    if FINGERPRINT.fullmatch(text):
        return text[:8]
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 3]}..."


def comparison_json(runs: Sequence[TrainedRun]) -> str:
    """The same as a JSON object."""
    about = [{key: value for key, value in asdict(run).items() if key != "curve"} for run in runs]
    found = {"runs": about, "differing_settings": differing_settings(runs), "remarks": remarks(runs)}
    return json.dumps(found, indent=1)


def plot_runs(path: Path, runs: Sequence[TrainedRun]) -> None:
    """Plot loss and validation top-1 against the epoch, a line per run."""
    plot_curves(path, {run.name: run.curve for run in runs})
