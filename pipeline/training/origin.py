"""Whether published weights were trained as configured. Stages refuse weights that were not; `dvc repro` retrains them.

Weights that earlier versions published do not say how they were trained, and are accepted.
"""

from pathlib import Path
from typing import Any

from pipeline.common.errors import NotReady
from pipeline.common.files import read_json_object
from pipeline.config.paths import FINETUNED, checksums_folder, finetune_folder, student_folder, teacher_folder
from pipeline.config.schema import Config
from pipeline.config.store_spec import store_spec
from pipeline.config.validation import differences
from pipeline.models.provenance import START, finetune_start, is_other_source, student_start, teacher_architecture
from pipeline.models.weights import TRAINED, read_metadata
from pipeline.training.identity import configured_runs, is_run_of, run_dependencies, run_summary, used_other_predictions


def describe_training(identity: dict[str, Any]) -> dict[str, Any]:
    """What published weights say about their run's identity: what `is_run_of` compares."""
    return run_summary(identity) | {"dependencies": run_dependencies(identity)}


def require_teacher(config: Config, index: str, purpose: str = "train-student") -> None:
    """Refuse a published teacher whose training or source differs from the configuration; a missing teacher is accepted.

    Args:
        index: fingerprint of the training index.
        purpose: train-student or finetune.

    Raises:
        NotReady: names the settings that differ.
    """
    folder = teacher_folder(config)
    first = read_json_object(folder / "metrics.json")
    if is_other_source(config.teacher, checksums_folder(config), first):
        expected, found = (f"weights from {source or 'training on the shards'}" for source in (config.teacher.weights, first["source"]))
        raise _refusal(folder, expected, found, "teacher")
    architecture = teacher_architecture(config.teacher)
    if found := differences(first.get("architecture", architecture), architecture, "teacher"):
        raise _refusal(folder, "the configured model", f"{'; '.join(found[:5])} (published, configured)", "teacher")
    _require(config, index, "teacher", folder, "teacher")
    if purpose == "finetune":
        folder, command = teacher_folder(config, purpose), "teacher --for finetune"
        trained = _require(config, index, "teacher-finetune", folder, command)
        second = read_json_object(folder / "metrics.json")
        adapted, epochs = "run" in second, config.teacher_finetune.epochs
        if second and adapted != bool(epochs):
            raise _refusal(folder, f"teacher_finetune.epochs {epochs}", f"{'trained' if adapted else 'not trained'} further", command)
        start = trained.get("dependencies", {}).get("start") if adapted else second
        weights = start.get("weights") if isinstance(start, dict) else None
        if None not in (weights, first.get("weights")) and weights != first["weights"]:
            raise _refusal(folder, f"made from weights {first['weights']}", f"made from weights {weights}", command)


def require_student(config: Config, index: str, name: str) -> None:
    """Refuse a published student trained with other settings, or from a store other than the published one.

    Args:
        index: fingerprint of the training index.
        name: a student of the configuration, with the suffix -finetuned for a fine-tuned one.

    Raises:
        NotReady: names the settings that differ.
    """
    source = name.removesuffix(f"-{FINETUNED}")
    command, folder, purpose = f"train-student --student {name}", student_folder(config, name), "train-student"
    if source != name:
        command, folder, purpose = f"finetune --student {source}", finetune_folder(config, source), "finetune"
    trained = _require(config, index, f"{purpose}@{source}", folder, command)
    spec, student = store_spec(config, purpose), config.student_named(source)
    manifest = read_json_object(spec.folder / "manifest.json")
    published = manifest.get("fingerprint")
    if trained and None not in (trained.get("store"), published) and trained["store"] != published:
        raise _refusal(folder, f"trained from the store {published}", f"trained from the store {trained['store']}", command)
    kind = spec.kind_for(student.distillation)
    if used_other_predictions(trained, kind, spec.views, manifest):
        raise _refusal(folder, f"trained from the published predictions, as {kind}", "trained from other predictions", command)
    start = student_start(config, student) if source == name else finetune_start(config, source)
    started = read_json_object(folder / "metrics.json").get(START)
    if None not in (start, started) and start != started:
        raise _refusal(folder, f"trained from the weights {start}", f"trained from the weights {started}", command)


def _require(config: Config, index: str, stage: str, folder: Path, command: str) -> dict[str, Any]:
    """The training that published weights name, if any.

    Raises:
        NotReady: it differs from the one that the configuration specifies for the stage.
    """
    path = folder / "weights.safetensors"
    trained = read_metadata(path).get(TRAINED) if path.exists() else None
    if not isinstance(trained, dict):
        return {}
    configured = configured_runs(config, index)[stage]
    if not is_run_of(configured, trained):
        was, now = ({key: found.get(key) for key in configured} for found in (trained, configured))
        known, now_known = was.pop("dependencies") or {}, now.pop("dependencies") or {}
        expected = {key: value for key, value in now_known.items() if key in known}
        named = {"recipe": "another recipe", "index": "other training images"}  # in an identity they are fingerprints
        found = [text for key, text in named.items() if was.pop(key, None) != now.pop(key, None)]
        lines = differences(was, now) + differences({key: known[key] for key in expected}, expected)
        found += [f"{line.replace('teacher_settings.', 'teacher.')} (trained, configured)" for line in lines[:5]]
        raise _refusal(folder, "trained as configured", "; ".join(found), command)
    return trained


def _refusal(folder: Path, expected: str, found: str, command: str) -> NotReady:
    model = "teacher" if command.startswith("teacher") else "student"
    keep = "; or, to keep this teacher, name a copy of the file in teacher.weights" if command == "teacher" else ""
    return NotReady(
        f"{folder / 'weights.safetensors'}: the {model} of another configuration",
        expected=expected, found=found,
        do=f"run: pipeline {command} (or dvc repro); or set the configuration back{keep}",
    )  # fmt: skip
