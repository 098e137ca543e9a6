"""What files next to existing shards say about them: class names, and numbers of samples."""

import json
from collections import Counter
from contextlib import suppress
from typing import Any

import fsspec

from pipeline.common.errors import UsageError, is_io_error, reason

COUNTS = "_info.json"
"""timm's file: {"splits": {NAME: {"filenames": [...], "shard_lengths": [...], ...}}}."""


def read_class_names(path: str) -> list[str]:
    """The class names in a local file or at a URL, in the order of their numbers.

    The file has a name per line, or is JSON: a list of names, or an object of name and number in either direction.

    Raises:
        UsageError: no such file, it does not name every class from 0 on, or two classes have the same name.
    """
    try:
        with fsspec.open(path, "rb") as file:
            text: str = file.read().decode()  # pyright: ignore[reportAttributeAccessIssue]
        names = _ordered(json.loads(text)) if text.lstrip()[:1] in ("[", "{") else text.split("\n")
        names = [name.strip() for name in names]
        if names and not names[-1]:
            names.pop()  # after the last line's end
        if not names or not all(names):
            raise ValueError("an empty name" if names else "no names")
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{repeated[0]!r} twice")
        return names
    except Exception as error:
        if not isinstance(error, ValueError | RecursionError) and not is_io_error(error):
            raise
        raise UsageError(
            f"data.class_names: {path}",
            expected="one class name per line, all different; or JSON: a list of names, or an object of names and their numbers",
            found=reason(error),
            do="correct the file or data.class_names",
        ) from error


def _ordered(content: Any) -> list[str]:
    """The names of a list, {name: number} or {number: name}.

    Raises:
        ValueError: other content; the numbers are not 0, 1, 2, ...
    """
    if isinstance(content, dict):
        if all(type(value) is int for value in content.values()):
            pairs = [(number, name) for name, number in content.items()]
        elif all(key.isdecimal() and len(key) < 10 for key in content):
            pairs = [(int(number), name) for number, name in content.items()]
        else:
            raise ValueError("an object that does not map names to numbers, or numbers to names")
        pairs.sort(key=lambda pair: pair[0])
        if [number for number, _ in pairs] != list(range(len(pairs))):
            raise ValueError(f"numbers that are not 0 to {len(pairs) - 1}, each once")
        content = [name for _, name in pairs]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError("not a list of names")
    return content


def read_sample_counts(location: str) -> dict[str, int]:
    """The number of samples of each shard that the folder's `_info.json` names; empty if there is no such file.

    A file with other content, or a server that refuses, counts as no file: only a warning depends on these numbers.
    """
    try:
        with fsspec.open(f"{location}/{COUNTS}", "rb") as file:
            content: Any = json.loads(file.read())  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:
        if not isinstance(error, ValueError | RecursionError) and not is_io_error(error):
            raise
        return {}
    counts: dict[str, int] = {}
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        for split in content["splits"].values():
            for name, count in zip(split["filenames"], split["shard_lengths"], strict=True):
                counts[name.rpartition("/")[2]] = int(count)
    return counts
