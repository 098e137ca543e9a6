"""Whether the published indices were made from the configured data: `prepare` records its settings beside them."""

from typing import Any

from pipeline.common.errors import NotReady
from pipeline.common.files import read_json_object, write_json
from pipeline.config.paths import data_settings_path, index_path
from pipeline.config.schema import Config, Data
from pipeline.config.validation import differences

UNRELATED = {"download", "max_bad", "workers", "cache", "cache_gb"}
"""Keys of `data` that change no index."""
OF_WRITTEN_SHARDS = {"exif_orientation", "max_per_class", "seed", "shard_samples", "val_fraction"}
"""Keys that change no index of existing shards."""
INCOMPLETE = {"complete": False}
"""What is recorded while one index may be another configuration's."""


def data_settings(data: Data, source: str) -> dict[str, Any]:
    """The settings that an index depends on, besides the images."""
    return data.model_dump(mode="json", exclude=UNRELATED | (OF_WRITTEN_SHARDS if source == "shards" else set()))


def record_settings(config: Config, complete: bool) -> None:
    """Record the settings of the indices, when they are complete."""
    settings = data_settings(config.data, config.data.source) if complete else INCOMPLETE
    path = data_settings_path(config)
    if read_json_object(path) != settings:
        write_json(path, settings)


def other_settings(config: Config) -> list[str]:
    """A line for each setting that differs; none if an earlier version recorded none. A key that it did not know counts as
    the default."""
    if not data_settings_path(config).exists():
        return []
    recorded = read_json_object(data_settings_path(config))
    if recorded == INCOMPLETE:
        return ["prepare was interrupted"]
    source = config.data.source
    lines = differences(data_settings(Data(), source) | recorded, data_settings(config.data, source), "data")
    return [f"{line} (prepared, configured)" for line in lines]


def require_prepared(config: Config, split: str) -> None:
    """Refuse indices that were made with other settings of `data`.

    Raises:
        NotReady: names the settings that differ.
    """
    if found := other_settings(config):
        raise NotReady(
            f"{index_path(config, split)}: images of another configuration", expected="prepared as configured",
            found="; ".join(found[:5]), do="run: pipeline prepare --quick; or set the configuration back",
        )  # fmt: skip
