"""`pipeline views`: draws a contact sheet, to look at what a recipe produces."""

from pathlib import Path

import numpy as np

from pipeline.config.paths import index_path
from pipeline.config.schema import Config
from pipeline.report.contact_sheet import draw_sheet, find_sample, group_cells, op_cells, sample_cells
from pipeline.shards.index import Index


def run(
    config: Config,
    split: str,
    key: str | None,
    seed: int,
    views: range,
    members: int,
    ops: bool,
    zoom: float,
    output: Path,
) -> None:
    """Draw one sample's sheet to `output`, a PNG.

    Raises:
        PipelineError: there is no index yet.
        UsageError: there is no sample with that key.
    """
    index = Index(index_path(config, split))
    if key is None:
        place = int(np.random.default_rng(seed).integers(len(index)))
        shard = int(np.searchsorted(index.starts, place, side="right")) - 1
        position = place - int(index.starts[shard])
    else:
        shard, position = find_sample(index, key)
    name = index.rows(shard)["key"][position].decode()
    title = f"{name} in {index.names[shard]}, recipe of {config.recipe.size} px"
    if ops:
        parts = [(f"{title}: every op", op_cells(index, config.recipe, shard, position))]
    else:
        parts = [(title, sample_cells(index, config.recipe, shard, position, list(views)))]
        if members:
            parts.append(group_cells(index, config.recipe, shard, position, views[0], members))
    draw_sheet(output, parts, zoom)
    print(f"{output}: {title}")
