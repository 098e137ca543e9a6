"""Whether what is published or stored is a configuration's own, from files alone: for status, study and compare.

Fields that an earlier version did not write are not compared.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.cli.scan import read_json
from pipeline.config.paths import checksums_folder, teacher_folder
from pipeline.config.schema import PURPOSES, Config
from pipeline.config.store_spec import StoreSpec, store_spec
from pipeline.models.provenance import architecture_differences, is_other_source, teacher_architecture


def is_foreign(published: object, own: Collection[str], known: Collection[str]) -> bool:
    """Whether a published fingerprint, if it is one, belongs to another configuration, or is not what this one has computed
    since.

    Args:
        own: the fingerprints below `work` that are this configuration's, out of all that are `known`.
    """
    return isinstance(published, str) and published not in own and (bool(own) or published in known)


def foreign_teachers(config: Config, own: Collection[str] = (), known: Collection[str] = ()) -> set[str]:
    """The purposes whose published teacher, according to its metrics.json, is not the configured one.

    Args:
        own, known: trainings of the teacher below `work`, as for `is_foreign`.
    """
    found = _foreign_teachers(config, own, known)
    return {purpose for purpose in found if not store_spec(config, purpose).fetch}  # there the teacher's is elsewhere


def _foreign_teachers(config: Config, own: Collection[str], known: Collection[str]) -> set[str]:
    published = {purpose: read_json(teacher_folder(config, purpose) / "metrics.json") for purpose in PURPOSES}
    first, second = published.values()
    if _differ({"architecture": teacher_architecture(config.teacher)}, first) or is_other_source(config.teacher, checksums_folder(config), first):
        return {*PURPOSES}
    if is_foreign(first.get("run"), own, known):
        return {*PURPOSES}
    found = {purpose for purpose in PURPOSES if _differ({"size": config.teacher_size(purpose)}, published[purpose])}
    if "weights" in first and not config.teacher_finetune.epochs and _differ({"weights": first["weights"]}, second):
        found.add("finetune")  # it was published from another one
    return found


def is_own_store(config: Config, spec: StoreSpec, attributes: dict[str, Any]) -> bool:
    """Whether a store was written in the configured precision by the teacher in outputs/; before there is one, by a teacher
    of the configured architecture."""
    if spec.fetch:
        return True  # which teacher it has is known where it is published
    teacher = attributes.get("teacher")
    if not isinstance(teacher, dict) or attributes.get("precision") != spec.precision:
        return False
    weights = read_json(spec.teacher_folder / "metrics.json").get("weights")
    configured = teacher.get("size") == spec.teacher_size and not architecture_differences(config.teacher, teacher)
    return configured and weights in (None, teacher.get("weights"))


def is_evaluation_of(evaluated: object, published: dict[str, Any]) -> bool:
    """Whether a model was evaluated with the weights that are published, on the images and the crop of their metrics.

    Args:
        evaluated: the model's entry in the evaluation's metrics.json.
        published: metrics.json next to the weights; a teacher's names no images.
    """
    expected = {key: published.get(key) for key in ("run", "weights")}
    if "validation" in published:
        expected["validation"] = published["validation"]
    return isinstance(evaluated, dict) and not _differ(expected, evaluated)


def have_changed(evaluated: dict[str, Any], models: dict[str, Path]) -> bool:
    """Whether a model's weights were replaced or removed since the evaluation, or validated on other images.

    Args:
        evaluated: the evaluation's metrics.json.
        models: the folder of each model.
    """
    for name, folder in models.items():
        then = evaluated.get(name)
        if isinstance(then, dict) and not is_evaluation_of(then, read_json(folder / "metrics.json")):
            return True
    return False


def lacks_sets(evaluated: dict[str, Any], config: Config) -> bool:
    """Whether an evaluation's additional sets differ from the configured ones, in name or in location.

    Args:
        evaluated: the evaluation's metrics.json.
    """
    configured = {f"{name}_top1" for name in config.evaluate.further_sets}
    models = [found for found in evaluated.values() if isinstance(found, dict)]
    heads = [found.get("class") for found in models]
    return any(_differ(config.evaluate.sets_identity(config.data), found) for found in models) or any(
        {key for key in head if key.endswith("_top1")} != configured for head in heads if isinstance(head, dict)
    )


def sets_have_changed(evaluated: dict[str, Any], config: Config) -> bool:
    """Whether files of the additional sets were replaced, added or removed since an evaluation. Lists their folders."""
    from pipeline.shards.evaluation_sets import sets_fingerprint  # it loads OpenCV, which `pipeline status` must not

    contents = sets_fingerprint(config.evaluate)
    return any(_differ(contents, found) for found in evaluated.values() if isinstance(found, dict))


def _differ(expected: dict[str, Any], published: dict[str, Any]) -> bool:
    """Whether fields are published with other values."""
    return any(published.get(key, value) != value for key, value in expected.items())
