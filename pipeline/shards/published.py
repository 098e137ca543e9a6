"""Open the indices that `prepare` published, and say whether the cache of remote shards is large enough."""

import numpy as np

from pipeline.config.paths import index_path, shard_cache_folder
from pipeline.config.schema import Config
from pipeline.shards.cache import GB, ShardCache
from pipeline.shards.index import Index
from pipeline.shards.prepared import require_prepared


def open_index(config: Config, split: str) -> Index:
    """The index of `train` or `val`, with the configured cache for shards at a URL.

    Raises:
        NotReady, PipelineError: see `Index`; the index was made with other settings of `data`.
    """
    require_prepared(config, split)
    limit = int(config.data.cache_gb * GB)
    index = Index(index_path(config, split), ShardCache(shard_cache_folder(config).absolute(), limit) if limit else None)
    if index.files.cache and (larger := sum(shard["bytes"] > limit for shard in index.shards)):
        print(
            f"{split}: warning: {larger} of {len(index.shards)} shards at {index.location} exceed data.cache_gb"
            f" {limit / GB:g}: each of their images is a request"
        )
    return index


def check_cache(index: Index, open_shards: int) -> None:
    """Warn where the cache has no room for remote shards of which `open_shards` are read in turns.

    Their groups are read in random order. A cache of fewer shards would download each one many times, so there are then
    no copies; as workers run ahead of one another, only twice as many are certain to be downloaded once per cycle.
    """
    if index.files.cache is None:
        return
    sizes = np.sort([shard["bytes"] for shard in index.shards])[::-1]
    needed, useful = int(sizes[:open_shards].sum()), int(sizes[: 2 * open_shards].sum())
    limit = index.files.cache.limit
    if limit >= useful:
        return
    consequence = f"some shards at {index.location} are downloaded several times per cycle"
    if limit < needed:
        consequence = f"no local copies of shards at {index.location}, each image is a request"
        index.files.cache = None
    print(
        f"train: warning: data.cache_gb is {limit / GB:g}, and {min(2 * open_shards, len(sizes))} shards have"
        f" {useful / GB:.2f} GB: {consequence}"
    )
