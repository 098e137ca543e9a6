"""Digests of the files of the additional evaluation sets, by which changes are noticed."""

import contextlib
from pathlib import Path

from pipeline.common.errors import PipelineError
from pipeline.common.files import file_sha256
from pipeline.config.schema import Evaluate
from pipeline.config.validation import fingerprint
from pipeline.shards.folders import list_class_folders

CONTENTS = "sets_contents"
"""Key of an evaluation's metrics.json: `sets_fingerprint` of the sets that it read."""


def describe_sets(settings: Evaluate) -> dict[str, str | None]:
    """By path, the digest of a file of labels, or of the names, sizes and times of a folder's images; None if it cannot be
    read, which `evaluate` reports."""
    found = dict[str, str | None]()
    if settings.real_labels:
        found[settings.real_labels] = None
        with contextlib.suppress(OSError):
            found[settings.real_labels] = file_sha256(Path(settings.real_labels))
    for name, folder in settings.sets.items():
        found[folder] = None
        with contextlib.suppress(OSError, PipelineError):
            listing = list_class_folders(Path(folder), f"evaluate.sets.{name}")
            found[folder] = fingerprint([listing.names, [signature[:2] for signature in listing.signatures]])
    return found


def sets_fingerprint(settings: Evaluate) -> dict[str, str]:
    """The entry of metrics.json that identifies the sets' contents; empty without additional sets."""
    return {CONTENTS: fingerprint(describe_sets(settings))} if settings.further_sets else {}
