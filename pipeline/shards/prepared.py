"""Whether the published indices are of the configured data: `prepare` records its settings beside them."""

import json
from typing import Any

from pipeline.common.errors import NotReady
from pipeline.common.files import atomic_write, read_json_object
from pipeline.config.paths import data_settings_path, index_path
from pipeline.config.schema import Config
from pipeline.config.validation import differences

UNRELATED = {"download", "max_bad", "workers", "cache", "cache_gb"}
"""Keys of `data` that change no index."""


def data_settings(config: Config) -> dict[str, Any]:
    """What an index depends on, but the images themselves. Defaults are left out, as a later version adds keys."""
    return config.data.model_dump(mode="json", exclude=UNRELATED, exclude_defaults=True)


def record_settings(config: Config, complete: bool) -> None:
    """Record the settings of the indices; before they are `complete`, of no settings, as one index may be another's."""
    settings, path = data_settings(config) if complete else {"prepare": "not complete"}, data_settings_path(config)
    if read_json_object(path) != settings or not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")


def other_settings(config: Config) -> list[str]:
    """`key: prepared, configured` of each setting that differs; empty too if an earlier version recorded none."""
    path = data_settings_path(config)
    return differences(read_json_object(path), data_settings(config), "data") if path.exists() else []


def require_prepared(config: Config, split: str) -> None:
    """Refuse indices of other data than the configured ones.

    Raises:
        NotReady: names the settings that differ.
    """
    if found := other_settings(config):
        raise NotReady(
            f"{index_path(config, split)}: images of another configuration", expected="prepared as configured",
            found=f"{'; '.join(found[:5])} (prepared, configured)", do="run: pipeline prepare; or set the configuration back",
        )  # fmt: skip
