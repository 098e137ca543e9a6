"""`pipeline views`: draws a contact sheet, to look at what a recipe produces."""

from pathlib import Path

from pipeline.config.schema import Config
from pipeline.report.contact_sheet import (
    MIN_SIDE,
    find_sample,
    group_section,
    mixed_view,
    op_section,
    random_sample,
    sample_section,
)
from pipeline.report.grid import draw_grid
from pipeline.shards.published import open_index


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
    """Draw one sample's sheet to `output`, a PNG; `zoom` is screen pixels per pixel.

    Raises:
        PipelineError: there is no index yet.
        UsageError: there is no sample with that key.
    """
    index, recipe = open_index(config, split), config.recipe
    shard, position = random_sample(index, seed) if key is None else find_sample(index, key)
    if ops:
        sections = [op_section(index, recipe, shard, position)]
    else:
        sections = [sample_section(index, recipe, shard, position, views)]
        if members:
            view = mixed_view(index, recipe, shard, position, views)
            sections.append(group_section(index, recipe, shard, position, view, members))
    draw_grid(output, sections, max(recipe.size * zoom / 100, MIN_SIDE))
    print(f"{output}: {sections[0].title}")
