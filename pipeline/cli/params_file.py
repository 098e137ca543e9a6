"""params.yaml as `pipeline init` and `pipeline configure` write it: they overwrite it unless somebody has changed it."""

import shlex
from collections.abc import Iterable
from pathlib import Path

from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.files import write_text
from pipeline.config.params import load_config
from pipeline.config.schema import Config
from pipeline.config.validation import fingerprint

WRITTEN_BY = "# Written by: "
KEYS = "# What the keys mean: docs/configuration.md\n"
CHECKSUM = "# Checksum of what follows, which may be overwritten while nothing in it is changed: "


def write_params(path: Path, words: list[str], text: str) -> None:
    """Write a configuration below a header with the command that it comes from.

    Args:
        words: of the command.
    """
    header = f"{WRITTEN_BY}{shlex.join(words)}\n{KEYS}{CHECKSUM}{fingerprint(text)}\n"
    write_text(path, header + text)


def what_next(path: Path) -> str:
    """What makes use of a configuration, as text."""
    return "now run: dvc repro" if path == Path("params.yaml") else f"use it with --config {path}, or as params.yaml"


def refuse_changed(path: Path, config: Config, experiments: Iterable[Path]) -> None:
    """Protect a params.yaml that holds more than what a command wrote or writes again.

    Args:
        config: what would be written.
        experiments: the files in configs/.

    Raises:
        UsageError: it is neither as a command wrote it, nor `config`, nor an experiment in configs/ without changes.
    """
    if not path.exists() or _is_as_written(path):
        return
    try:
        now = load_config(path)
        known = now == config or any(now == load_config(file) for file in experiments)
    except PipelineError:
        known = False
    if not known:
        raise UsageError(
            f"{path}",
            expected="no such file, or one without changes: as pipeline init or configure wrote it",
            found="a configuration with changes, which would be lost",
            do="keep it under another name, choose another file with --output, or overwrite it with --force",
        )


def dropped_options(path: Path, overrides: tuple[str, ...]) -> list[str]:
    """The section.key=value of the `pipeline init` that wrote a file whose keys are not given this time."""
    try:
        words = shlex.split(path.read_text().partition("\n")[0].removeprefix(WRITTEN_BY))
    except (OSError, ValueError):
        return []
    given = {text.partition("=")[0] for text in overrides}
    earlier = words[3:] if words[:2] == ["pipeline", "init"] else []
    return [text for text in earlier if text.partition("=")[0] not in given]


def _is_as_written(path: Path) -> bool:
    """Whether a command wrote the file and nobody changed anything below its checksum."""
    try:
        _, found, rest = path.read_text().partition(CHECKSUM)
    except (OSError, UnicodeDecodeError):
        return False
    checksum, _, text = rest.partition("\n")
    return bool(found) and checksum == fingerprint(text)
