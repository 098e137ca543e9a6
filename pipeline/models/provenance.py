"""Where a teacher comes from and what a student starts from, as configured. No module imported here needs torch."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.common.code import source_digest
from pipeline.common.files import file_sha256, read_json_object
from pipeline.config.paths import checksums_folder, student_folder
from pipeline.config.schema import Config, Student, Teacher
from pipeline.config.types import is_custom_model
from pipeline.config.validation import differences, fingerprint

START = "started_from"
"""Key of a student's metrics.json: what `student_start` or `finetune_start` was when it was trained."""


def teacher_architecture(section: Teacher) -> dict[str, Any]:
    """Model, arguments and normalization, as JSON values: the same weights may fit other arguments."""
    model = section.architecture
    described = {"model": model, "kwargs": section.kwargs, "mean": section.mean, "std": section.std, **code_of(model)}
    if section.class_map is not None:
        described["class_map"] = section.class_map
    if section.ensemble:
        described["ensemble"] = [
            teacher_architecture(member) | {"size": member.size} for member in section.members[1:]
        ]
    return json.loads(json.dumps(described))


def architecture_differences(section: Teacher, recorded: Mapping[str, Any]) -> list[str]:
    """A line `key: recorded, configured` for each part of `teacher_architecture` in which a recorded teacher differs."""
    configured = {"class_map": None, "ensemble": None, "code": None, **teacher_architecture(section)}
    return differences({key: recorded.get(key) for key in configured}, configured)


def code_of(model: str) -> dict[str, str | None]:
    """The digest of the source of a custom model, for identities; nothing for timm's models."""
    return {"code": source_digest(model)} if is_custom_model(model) else {}


def teacher_source(section: Teacher, checksums: Path) -> str | list[str | None] | None:
    """What `teacher.weights` names, a list of these for an ensemble.

    Args:
        checksums: see `weights_source`.

    Raises:
        OSError: a file does not exist or cannot be read.
    """
    sources = [weights_source(member, checksums) for member in section.members]
    return sources if section.ensemble else sources[0]


def is_other_source(section: Teacher, checksums: Path, published: Mapping[str, Any]) -> bool:
    """Whether a teacher was published from weights other than those configured; False while their file cannot be read.

    Args:
        checksums: see `weights_source`.
        published: metrics.json of the published teacher.
    """
    if "source" not in published:
        return False
    try:
        return published["source"] != teacher_source(section, checksums)
    except OSError:
        return False


def weights_source(section: Teacher, checksums: Path) -> str | None:
    """What the `weights` of one teacher name: a timm tag, or `sha256:` and the digest of a file. None: initial weights.

    Args:
        checksums: folder of the checksums of external files. A file is not read if its size and modification time are
            those of its record.

    Raises:
        OSError: the file does not exist or cannot be read.
    """
    return section.timm_tag if section.weights is None or section.timm_tag else file_source(Path(section.weights), checksums)


def file_source(path: Path, checksums: Path) -> str:
    """What identifies a file of weights: `sha256:` and its digest; arguments and errors as for `weights_source`."""
    recorded, stat = None, path.stat()
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):  # a damaged record counts as none
        record = json.loads(checksum_record(path, checksums).read_bytes())
        if (record["size"], record["time_ns"]) == (stat.st_size, stat.st_mtime_ns):
            recorded = record["sha256"]
    return f"sha256:{recorded or file_sha256(path)}"


def checksum_record(path: Path, checksums: Path) -> Path:
    """The JSON file with the path, size, modification time (ns) and SHA-256 of an external file."""
    return checksums / f"{fingerprint(str(path.resolve()))}.json"


def student_start(config: Config, student: Student) -> str | None:
    """What `student.weights` is: `sha256:` and a digest; None unless it is a file, or while it cannot be read."""
    return None if student.timm_tag else _file(config, student.weights)


def finetune_start(config: Config, name: str) -> str | None:
    """What a fine-tuning starts from: `finetune.weights` (`sha256:` and a digest), or the run of the student `name`."""
    if config.finetune.weights:
        return _file(config, config.finetune.weights)
    return read_json_object(student_folder(config, name) / "metrics.json").get("run")


def _file(config: Config, weights: str | None) -> str | None:
    with contextlib.suppress(OSError):
        return file_source(Path(weights), checksums_folder(config)) if weights else None
