"""Expand patterns of shards to their paths or URLs."""

import glob
import os
import re
from itertools import islice

import fsspec
from braceexpand import braceexpand

from pipeline.common.errors import PipelineError, UsageError, is_io_error, reason

MAX_SHARDS = 1_000_000


def expand(key: str, pattern: str) -> list[str]:
    """Expand braces {0000..1023}, wildcards *, ?, [] (their matches sorted) and `~` in a pattern of shards.

    Args:
        key: the configuration key of the pattern, for messages.

    Raises:
        UsageError: nothing matches, or the braces are unbalanced or expand to too many.
    """
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    try:
        # expanding makes a list of each range at once
        if any(abs(int(last) - int(first)) > MAX_SHARDS for first, last in ranges):
            raise ValueError(f"a range of more than {MAX_SHARDS:,}")
        named = list(islice(braceexpand(os.path.expanduser(pattern)), MAX_SHARDS + 1))
    except ValueError as error:
        raise UsageError(
            f"{key}: {pattern}", expected="braces such as {0000..1023}", found=str(error), do="correct the braces"
        ) from None
    if len(named) > MAX_SHARDS:
        raise UsageError(f"{key}: {pattern}", expected=f"at most {MAX_SHARDS:,} shards", found="more", do="correct the braces")
    paths: list[str] = []
    for path in named:
        found = _matching(path) if set("*?[") & set(path.partition("://")[2] or path) else [path]
        if not found:
            raise UsageError(
                f"{key}: {path}", expected="names of shards", found="no file that matches", do=f"correct {key}"
            )
        paths += found
    return paths


def _matching(pattern: str) -> list[str]:
    if "://" not in pattern:
        return sorted(glob.glob(pattern))
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        return sorted(filesystem.unstrip_protocol(found) for found in filesystem.glob(path))
    except Exception as error:
        if not is_io_error(error):
            raise
        raise PipelineError(f"{pattern}: cannot be listed", found=reason(error), do="name the shards") from error
