"""The last failure of each stage, beside its outputs until the stage ends well, so that `pipeline status` tells it."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.common.errors import PipelineError
from pipeline.common.files import atomic_write
from pipeline.common.signals import Interrupted
from pipeline.config.paths import outputs
from pipeline.config.schema import Config


def failure_path(config: Config, stage: str) -> Path:
    return outputs(config) / "failed" / f"{stage}.json"


@contextlib.contextmanager
def noted(config: Config, stage: str) -> Iterator[None]:
    """Note a failure of the block, which is a stage by its name in dvc.yaml; forget an earlier one if it ends well."""
    path = failure_path(config, stage)
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        what = error.what if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(PipelineError), atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"time": time.time(), "what": what.partition("\n")[0][:500]}) + "\n")
        raise
    path.unlink(missing_ok=True)
