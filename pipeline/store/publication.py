"""A published store: its manifest and its files.

A publication is a folder at a path or URL, or a tar of one:

* `README.md`: a card that says what the store is, how it was made and how to use it;
* `manifest.json`: everything that identifies the store, and a hash of every other file; written last;
* `samples.npy`: key, size, label and CRC-32C of every sample, in the order of the rows;
* `packs/*.tar`: the predictions, see `pipeline.store.packs`.

Nothing in it depends on where it was made, and its bytes are deterministic.
"""

import hashlib
import json
import re
import tarfile
from typing import Annotated, Any

import fsspec
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.common.errors import Damaged, PipelineError, Unreadable, unreadable
from pipeline.common.wording import size_of
from pipeline.config.schema import Recipe
from pipeline.config.validation import fingerprint, short_repr
from pipeline.shards.index import Index
from pipeline.store.kinds import KINDS, classes_per_row, payload_width
from pipeline.store.reader import StoreIdentity
from pipeline.views.draw import recipe_fingerprint

FORMAT = 1
MANIFEST, SAMPLES, CARD = "manifest.json", "samples.npy", "README.md"
FILE_NAME = re.compile(r"(packs/)?[A-Za-z0-9][A-Za-z0-9._-]*")
SAMPLE_FIELDS = ("key", "size", "label", "crc32c")


class Entry(BaseModel):
    """Part of a publication's manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class File(Entry):
    """A file of a publication."""

    name: str
    bytes: int
    sha256: str


class Shard(Entry):
    """A shard of the training images."""

    name: str
    samples: Annotated[int, Field(ge=0)]


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
    """The store's fingerprint; see pipeline.store.reader.StoreIdentity."""
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
    shards: list[Shard]
    units: dict[str, dict[str, list[str]]]
    """For argmax and the kind: the hashes of each shard's units, as the store's own manifest has them."""
    versions: dict[str, str]
    """Versions of the libraries that wrote the store."""
    sampling: dict[str, Any] | None = None
    """See pipeline.config.store_spec.sampling_identity."""
    files: list[File]
    packs: list[PackFile]

    @property
    def k(self) -> int:
        """Classes per view, for topk and sampled."""
        return max(1, classes_per_row(self.kind, self.width))

    def describe(self) -> str:
        """Images, views, kind and bytes, as text."""
        samples, size = sum(shard.samples for shard in self.shards), sum(pack.bytes for pack in self.packs)
        return f"{samples:,} images x {self.views} views as {self.kind}, {size_of(size)} in {len(self.packs)} packs"


def to_json(publication: Publication) -> bytes:
    """The manifest's bytes: JSON with a checksum of itself. Keys keep their order, so that a store's metadata do too."""
    content = publication.model_dump(mode="json")
    if publication.sampling is None:
        del content["sampling"]  # as before this key existed
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
                                 publication.teacher, publication.sampling)  # fmt: skip
    except (ValidationError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if invalid := _invalid_value(publication, identity.recipe.block):
        raise ValueError(f"invalid: {invalid}")
    if recipe_fingerprint(identity.recipe) == publication.recipe and identity.fingerprint != publication.fingerprint:
        raise ValueError("the store's fingerprint does not match index, recipe, teacher and sampling")
    return publication


def _invalid_value(publication: Publication, block: int) -> str:
    """A value that no publication has, even if the manifest matches its checksum; empty if there is none."""
    kind, views, shards = publication.kind, publication.views, publication.shards
    width = payload_width(kind, len(publication.classes), publication.k) if kind in KINDS else -1
    if width != publication.width:
        return f"kind {kind} of width {publication.width}"
    if kind == "sampled" and (publication.sampling or {}).get("samples") != publication.width:
        return f"kind sampled of width {publication.width} with sampling {json.dumps(publication.sampling)}"
    if views < 1 or views % block:
        return f"{views} views in blocks of {block}"
    blocks = {shard.name: views // block if shard.samples else 0 for shard in shards}
    if len(blocks) < len(shards) or publication.units.keys() != {"argmax", kind}:
        return "shards, or kinds of units"
    if any({name: len(hashes) for name, hashes in units.items()} != blocks for units in publication.units.values()):
        return "units"
    for pack in publication.packs:
        places = 0 <= pack.block < views // block and 0 <= pack.first <= pack.last < len(shards)
        if not places or pack.array not in publication.units:
            return f"pack {pack.name}"
    names = [file.name for file in [*publication.files, *publication.packs]]
    if SAMPLES not in names or not all(FILE_NAME.fullmatch(name) for name in names):
        return f"file names: {', '.join(map(short_repr, names))}"
    return ""


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
                self._filesystem, self._root = fsspec.filesystem("tar", fo=where, skip_instance_cache=True), ""
            else:
                self._filesystem, root = fsspec.core.url_to_fs(where)
                self._root = root.rstrip("/") + "/"
            data = self._filesystem.cat_file(self._root + MANIFEST)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PipelineError(
                f"{where}: no published store", expected=MANIFEST, found="nothing",
                do="name the folder, URL or .tar that pipeline store publish wrote",
            ) from error  # fmt: skip
        except tarfile.TarError as error:
            raise self._damaged("the archive", str(error)) from error
        except Exception as error:  # servers' clients raise nearly anything
            raise self._unreadable("", error) from error
        try:
            self.publication = parse(data)
        except ValueError as error:
            raise self._damaged(MANIFEST, str(error)) from error

    def read(self, file: File) -> bytes:
        """Read a file and compare its hash.

        Raises:
            Damaged: it is missing, or its bytes are not those that were published.
            Unreadable: a disk or server did not answer.
        """
        try:
            data = self._filesystem.cat_file(self._root + file.name)
        except (FileNotFoundError, KeyError):
            raise self._damaged(file.name, "nothing") from None
        except Exception as error:  # servers' clients raise nearly anything
            raise self._unreadable(f": {file.name}", error) from error
        if len(data) != file.bytes or hashlib.sha256(data).hexdigest() != file.sha256:
            raise self._damaged(file.name, f"{len(data):,} bytes, not the {file.bytes:,} with the published SHA-256")
        return data

    def _unreadable(self, name: str, error: Exception) -> Unreadable:
        if not (is_archive(self.where) and isinstance(error, ValueError)):
            return unreadable(self.where + name, error)
        return Unreadable(
            f"{self.where}{name}: cannot be read", expected="a server that gives parts of a file (HTTP range requests)",
            found=str(error), do="download the archive, and fetch it from there",
        )  # fmt: skip

    def _damaged(self, name: str, found: str) -> Damaged:
        return Damaged(
            f"{self.where}: {name}", expected="the bytes that were published", found=found,
            do="fetch again; if this does not help, ask the publisher to publish it again",
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
