"""The last failure of each stage, kept next to its outputs for `pipeline status` until the stage succeeds."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cli.scan import read_json
from pipeline.common.errors import NotReady, PipelineError
from pipeline.common.files import write_json
from pipeline.common.signals import Interrupted
from pipeline.config.paths import outputs
from pipeline.config.schema import Config
from pipeline.config.validation import fingerprint


def failure_path(config: Config, stage: str) -> Path:
    return outputs(config) / "failed" / f"{stage}.json"


def read_failure(config: Config, stage: str) -> dict[str, Any]:
    """The last failure of a stage with these settings; empty if there is none."""
    failure = read_json(failure_path(config, stage))
    return failure if failure and failure.get("settings") == fingerprint(config) else {}


@contextlib.contextmanager
def recorded(config: Config, stage: str) -> Iterator[None]:
    """Record a failure of the block, which runs a stage of dvc.yaml; forget an earlier one if the block succeeds."""
    path = failure_path(config, stage)
    try:
        yield
    except (Interrupted, NotReady):  # what is not ready has a row of its own
        raise
    except Exception as error:
        if stage.partition("@")[2] not in ("", *config.variants):
            raise  # there is no such student
        with contextlib.suppress(PipelineError):
            write_json(path, {"time": time.time(), "what": _one_line(error)[:500], "settings": fingerprint(config)})
        raise
    path.unlink(missing_ok=True)


def _one_line(error: Exception) -> str:
    """What failed, what was expected and what was found, each up to its first line break."""
    if not isinstance(error, PipelineError):
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    parts = {"expected ": error.expected, "found ": error.found}
    said = [name + text.splitlines()[0] for name, text in parts.items() if text]
    return error.what.splitlines()[0] + (f": {', '.join(said)}" if said else "")
