"""Write images to WebDataset shards and index them, or index existing shards.

A split's shards are stored in `WORK/data/FINGERPRINT/SPLIT/`, where the fingerprint covers the settings and the
contents of all the split's images, so nothing is ever overwritten; `outputs/NAME/data/{train,val}/index.json` refers
to them.
"""

import contextlib
import json
from pathlib import Path

from pipeline.common.code import source_digest
from pipeline.common.files import file_sha256, read_json_object, write_if_changed
from pipeline.common.signals import raise_on_sigterm
from pipeline.config.paths import evaluation_sets_path, external_path, index_path
from pipeline.config.schema import Config
from pipeline.shards.advice import report_counts, report_order
from pipeline.shards.build import build
from pipeline.shards.evaluation_sets import describe_sets
from pipeline.shards.indexing import publish_index
from pipeline.shards.prepared import other_settings, record_settings
from pipeline.shards.splits import plan_splits


def run(config: Config, dry_run: bool = False, quick: bool = False) -> None:
    """Write what is missing of both splits' shards, index them, and publish the indices.

    Args:
        quick: files whose size and times have not changed since the last run count as unchanged; without it every
            image and every shard is read. Either way, only shards that have changed are decoded again, and none that an
            interrupted run had completed.

    Raises:
        UsageError, PipelineError: see pipeline.shards.splits and pipeline.shards.build.
    """
    classes: list[str] = []
    for shards in plan_splits(config, dry_run, quick):
        if dry_run:
            continue
        with raise_on_sigterm():
            index = build(config, shards, shards.classes or classes, quick)
            for image in index.refused:
                print(f"{shards.split}: refused {shards.describe(image)}")
            if index.unlabelled:
                print(f"{shards.split}: {index.unlabelled:,} of {len(index):,} images have no label")
            if not shards.written_here:
                report_counts(shards.split, index)
            if shards.split == "train" and not shards.written_here:
                report_order(index, config.recipe.group_size)
            published = read_json_object(index_path(config, shards.split)).get("fingerprint")
            if other_settings(config) or published not in (None, index.fingerprint):
                record_settings(config, complete=False)
            publish_index(index, index_path(config, shards.split))
        classes = index.classes
    if not dry_run:
        record_settings(config, complete=True)
        record_external_files(config)
        write_if_changed(evaluation_sets_path(config), json.dumps(describe_sets(config.evaluate), indent=1) + "\n")


def record_external_files(config: Config) -> None:
    """Write the digests of weights and of custom models' source, as DVC does not track these by itself."""
    digests = {model: source_digest(model) for model in config.custom_models()}
    for weights in config.weight_files():
        digests[weights] = None  # the stage that reads the file reports that it is missing
        with contextlib.suppress(OSError):
            digests[weights] = file_sha256(Path(weights))
    write_if_changed(external_path(config), json.dumps(digests, indent=1) + "\n")
