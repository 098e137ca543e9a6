"""Whether a published store belongs to the local images and the configured recipe; if not, what differs."""

import json
from functools import partial

import numpy as np

from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.wording import count_of
from pipeline.config.store_spec import StoreSpec, store_section
from pipeline.config.validation import differences
from pipeline.shards.index import Index
from pipeline.store.packs import parse_array
from pipeline.store.publication import SAMPLE_FIELDS, SAMPLES, Source
from pipeline.views.draw import recipe_fingerprint


def check_belongs(source: Source, index: Index, spec: StoreSpec) -> None:
    """Refuse a publication with a different recipe or different images, or without the configured views or kind.

    Raises:
        UsageError: names what differs: a setting of the recipe, a shard, or the first sample.
    """
    published = source.publication
    refuse = partial(_refusal, source.where)
    settings = spec.recipe.model_dump(mode="json")
    if published.recipe != recipe_fingerprint(spec.recipe):
        found = differences(published.recipe_settings, settings, "recipe")
        raise refuse("its recipe", "; ".join(found[:5]) or "a different version of the views", "the same (each setting: published, here)",
                     "configure the recipe that the store was made with, or compute your own store")  # fmt: skip
    shards = [(shard.name, shard.samples) for shard in published.shards]
    described = len(published.classes) == len(index.classes) and shards == [*zip(index.names, index.samples, strict=True)]
    if published.index != index.fingerprint or not described:
        found = index_difference(source, index)
        raise refuse("its images", found, "the local training images", "use the images that the teacher saw")
    if spec.kind not in ("argmax", published.kind):
        raise refuse("its kind", published.kind, f"teacher_logits.kind {spec.kind}",
                     f"set teacher_logits.kind to {published.kind} or argmax")  # fmt: skip
    if spec.sampling is not None and spec.sampling != published.sampling:
        raise refuse("its drawn classes", json.dumps(published.sampling), f"as configured, {json.dumps(spec.sampling)}",
                     "set teacher_logits.samples and teacher_logits.sample_tau to those published")  # fmt: skip
    if spec.views > published.views:
        key = f"{store_section(spec.purpose)}.views"
        raise refuse("its views", f"{published.views} per image", f"{spec.views}, as configured", f"lower {key}")


def _refusal(where: str, what: str, found: str, expected: str, do: str) -> UsageError:
    return UsageError(f"{where}: {what}", expected=expected, found=found, do=do)


def index_difference(source: Source, index: Index) -> str:
    """The first difference between the published samples and the local ones, as text.

    Raises:
        Damaged, Unreadable: the published table cannot be read.
    """
    published = source.publication
    if len(published.classes) != len(index.classes):
        return f"published {count_of(len(published.classes), 'class')}, here {len(index.classes):,}"
    were = {shard.name: shard.samples for shard in published.shards}
    here = dict(zip(index.names, index.samples.tolist(), strict=True))
    for name in [*were, *here]:
        if were.get(name) != here.get(name):
            counts = [f"{count:,} samples" if count is not None else "missing" for count in (were.get(name), here.get(name))]
            return f"shard {name}: published {counts[0]}, here {counts[1]}"
    if list(were) != list(here):
        return "the same shards in a different order"
    file = next(file for file in published.files if file.name == SAMPLES)
    try:
        table = parse_array(source.read(file))
        start = 0
        for number, name in enumerate(index.names):
            rows = index.rows(number)
            there = table[start : start + len(rows)]
            differs = np.zeros(len(rows), bool)
            for field in SAMPLE_FIELDS:
                differs |= there[field] != rows[field]
            if differs.any():
                first = int(differs.argmax())
                return f"shard {name}, sample {first}: published {_sample(there[first])}, here {_sample(rows[first])}"
            start += len(rows)
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # a damaged header makes numpy raise almost anything
        return f"other samples ({SAMPLES}: {error})"
    return "the same samples, but a different version of the index"


def _sample(row: np.void) -> str:
    return f"{row['key'].decode()!r}, label {row['label']}, {row['size']:,} bytes, crc32c {row['crc32c']:08x}"
