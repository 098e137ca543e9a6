"""A published store: its manifest, and whether it belongs to local images and a local recipe.

A publication is a folder at a path or URL, or a tar of one:

* `README.md`: a card that says what the store is, how it was made and how to use it;
* `manifest.json`: everything that identifies the store, and a hash of every other file; written last;
* `samples.npy`: key, size, label and CRC-32C of every sample, in the order of the rows;
* `packs/*.tar`: the predictions, see `pipeline.store.packs`.

Nothing in it depends on where it was made, and its bytes are deterministic.
"""

import hashlib
import io
import json
from typing import Any

import fsspec
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.common.errors import Damaged, PipelineError, UsageError, unreadable
from pipeline.config.schema import Recipe
from pipeline.config.store_spec import StoreSpec
from pipeline.config.validation import differences, fingerprint
from pipeline.shards.index import Index
from pipeline.store.encoding import KINDS, payload_width
from pipeline.store.reader import StoreIdentity
from pipeline.views.draw import recipe_fingerprint

FORMAT = 1
MANIFEST, SAMPLES, CARD = "manifest.json", "samples.npy", "README.md"
SAMPLE_FIELDS = ("key", "size", "label", "crc32c")


class Entry(BaseModel):
    """Part of a publication's manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class File(Entry):
    """A file of a publication."""

    name: str
    bytes: int
    sha256: str


class PackFile(File):
    """A pack: the predictions of one block for the shards first..last."""

    array: str
    """`argmax` (with the group checks), or the kind whose payload it holds."""
    block: int
    first: int
    last: int


class Publication(Entry):
    """The manifest of a published store."""

    format: int
    fingerprint: str
    """The store's; see pipeline.store.reader.StoreIdentity."""
    index: str
    recipe: str
    recipe_settings: dict[str, Any]
    teacher: dict[str, Any]
    teacher_metrics: dict[str, Any]
    """Accuracy of the teacher on the publisher's validation images; empty if unknown."""
    precision: str
    kind: str
    width: int
    """Numbers per row of the kind's payload, 0 for argmax."""
    views: int
    classes: list[str]
    shards: list[dict[str, Any]]
    """Name and number of samples."""
    units: dict[str, dict[str, list[str]]]
    """For argmax and the kind: the hashes of each shard's units, as the store's own manifest has them."""
    versions: dict[str, str]
    """Of the libraries that wrote the store."""
    files: list[File]
    packs: list[PackFile]

    @property
    def top_k(self) -> int:
        """Classes per view, for topk."""
        return max(1, (self.width - 2) // 2)

    def describe(self) -> str:
        """Images, views, kind and bytes, as text."""
        samples, size = sum(shard["samples"] for shard in self.shards), sum(pack.bytes for pack in self.packs)
        return f"{samples:,} images x {self.views} views as {self.kind}, {size / 1e6:,.1f} MB in {len(self.packs)} packs"


def to_json(publication: Publication) -> bytes:
    """The manifest's bytes: JSON with a checksum of itself. Keys keep their order, so that a store's metadata do too."""
    content = publication.model_dump(mode="json")
    return (json.dumps(content | {"digest": fingerprint(content)}, indent=1) + "\n").encode()


def parse(data: bytes) -> Publication:
    """Invert `to_json`.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    try:
        content = json.loads(data)
        claimed = content.pop("digest")
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        if fingerprint(content) != claimed:
            raise ValueError("it does not match its checksum")
        publication = Publication.model_validate(content)
        identity = StoreIdentity(publication.index, Recipe.model_validate_json(json.dumps(publication.recipe_settings)),
                                 publication.teacher)  # fmt: skip
    except (ValidationError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)[:500]) from error
    width = payload_width(publication.kind, len(publication.classes), publication.top_k) if publication.kind in KINDS else -1
    if width != publication.width:
        raise ValueError(f"kind {publication.kind} of width {publication.width}")
    if recipe_fingerprint(identity.recipe) == publication.recipe and identity.fingerprint != publication.fingerprint:
        raise ValueError("the store's fingerprint does not match index, recipe and teacher")
    return publication


class Source:
    """A publication open for reading: a folder or a tar, at a path or URL."""

    def __init__(self, where: str):
        """
        Raises:
            PipelineError: there is no publication, it is damaged or cannot be read.
        """
        self.where = where
        try:
            if is_archive(where):
                self._filesystem, self._root = fsspec.filesystem("tar", fo=where), ""
            else:
                self._filesystem, root = fsspec.core.url_to_fs(where)
                self._root = root.rstrip("/") + "/"
            self.publication = parse(self._filesystem.cat_file(self._root + MANIFEST))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PipelineError(
                f"{where}: no published store", expected=MANIFEST, found="nothing",
                do="name the folder, URL or .tar that pipeline store publish wrote",
            ) from error  # fmt: skip
        except ValueError as error:
            raise self._damaged(MANIFEST, str(error)) from error
        except Exception as error:  # servers' clients raise nearly anything
            raise unreadable(where, error) from error

    def read(self, file: File) -> bytes:
        """Read a file and compare its hash.

        Raises:
            Damaged: it is missing, or other bytes than were published.
            Unreadable: a disk or server did not answer.
        """
        try:
            data = self._filesystem.cat_file(self._root + file.name)
        except (FileNotFoundError, KeyError):
            raise self._damaged(file.name, "nothing") from None
        except Exception as error:  # servers' clients raise nearly anything
            raise unreadable(f"{self.where}: {file.name}", error) from error
        if len(data) != file.bytes or hashlib.sha256(data).hexdigest() != file.sha256:
            raise self._damaged(file.name, f"{len(data):,} bytes, not the {file.bytes:,} with the published SHA-256")
        return data

    def _damaged(self, name: str, found: str) -> Damaged:
        return Damaged(
            f"{self.where}: {name}", expected="the bytes that were published", found=found,
            do="fetch again; if it stays so, ask the publisher to publish again",
        )  # fmt: skip


def is_archive(where: str) -> bool:
    """Whether a path or URL means a single file rather than a folder."""
    return where.endswith(".tar")


def sample_table(index: Index) -> np.ndarray:
    """Key, size, label and CRC-32C of every sample of an index, in the order of its rows."""
    rows = np.concatenate([index.rows(shard) for shard in range(len(index.shards))])
    dtype = np.dtype([(name, rows.dtype[name]) for name in SAMPLE_FIELDS])
    table = np.empty(len(rows), dtype)
    for name in SAMPLE_FIELDS:
        table[name] = rows[name]
    return table


def check_belongs(source: Source, index: Index, spec: StoreSpec) -> None:
    """Refuse a publication of another recipe, of other images, or without the configured views or kind.

    Raises:
        UsageError: names what differs: a setting of the recipe, a shard, or the first sample.
    """
    published = source.publication
    refuse = _Refusal(source.where)
    settings = spec.recipe.model_dump(mode="json")
    if published.recipe != recipe_fingerprint(spec.recipe):
        found = differences(published.recipe_settings, settings, "recipe")
        raise refuse("its recipe", "; ".join(found[:5]) or "another version of the views", "as published, as configured",
                     "configure the recipe that the store was made with, or compute your own store")  # fmt: skip
    if published.index != index.fingerprint:
        found = index_difference(source, index)
        raise refuse("its images", found, "the local training images", "use the images that the teacher saw")
    if spec.kind not in ("argmax", published.kind):
        raise refuse("its kind", published.kind, f"teacher_logits.kind {spec.kind}",
                     f"set teacher_logits.kind to {published.kind} or argmax")  # fmt: skip
    if spec.views > published.views:
        key = "finetune.views" if spec.purpose == "finetune" else "teacher_logits.views"
        raise refuse("its views", f"{published.views} per image", f"{spec.views}, as configured", f"lower {key}")


class _Refusal:
    def __init__(self, where: str):
        self.where = where

    def __call__(self, what: str, found: str, expected: str, do: str) -> UsageError:
        return UsageError(f"{self.where}: {what}", expected=expected, found=found, do=do)


def index_difference(source: Source, index: Index) -> str:
    """The first difference between the published samples and the local ones, as text.

    Raises:
        Damaged, Unreadable: the published table cannot be read.
    """
    published = source.publication
    were = {shard["name"]: shard["samples"] for shard in published.shards}
    here = dict(zip(index.names, index.samples.tolist(), strict=True))
    for name in [*were, *here]:
        if were.get(name) != here.get(name):
            counts = [f"{count:,} samples" if count is not None else "missing" for count in (were.get(name), here.get(name))]
            return f"shard {name}: published {counts[0]}, here {counts[1]}"
    if list(were) != list(here):
        return "the same shards in another order"
    file = next(file for file in published.files if file.name == SAMPLES)
    try:
        table = np.load(io.BytesIO(source.read(file)), allow_pickle=False)
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
    return "the same samples, but another version of the index"


def _sample(row: np.void) -> str:
    return f"{row['key'].decode()!r}, label {row['label']}, {row['size']:,} bytes, crc32c {row['crc32c']:08x}"
