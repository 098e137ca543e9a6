"""The format of an index: the entries of index.json, the rows of its table, and what identifies the samples."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.config.validation import fingerprint

MAX_CLASSES = 65535  # class numbers are uint16 in the store, whose fill value is 65535
UNLABELLED = -1  # the label of a sample that has none
FORMAT = 2
PATHS = ("location", "table")  # the keys of index.json that hold paths


def row_type(key_length: int) -> np.dtype:
    """A row of the table: where a sample's image is in its shard, its label and its checksum."""
    return np.dtype(
        [("key", f"S{key_length}"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("crc32c", "<u4")]
    )


@dataclass
class ShardIndex:
    """What indexing one shard yields."""

    name: str
    rows: np.ndarray
    bytes: int
    sha256: str
    content: str
    """BLAKE2b of the samples in tar order: key, label and image bytes of each."""
    refused: list[dict[str, str]] = field(default_factory=list)
    """Shard, key and reason of each image that does not decode. These have no row."""


def invalid_value(content: dict[str, Any]) -> str:
    """A value that no index has, even if its checksum matches; empty if there is none."""
    shards = content["shards"]
    numbers = {"bytes": 2**63, "samples": 2**31, "rows_crc32c": 2**32}

    def number(value: Any, limit: int) -> bool:
        return type(value) is int and 0 <= value < limit

    def name(value: Any) -> bool:
        return isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\0"} & set(value)

    for position, shard in enumerate(shards):
        if not name(shard["name"]):
            return f"shards[{position}].name: {shard['name']!r}"
        for key, limit in numbers.items():
            if not number(shard[key], limit):
                return f"shards[{position}].{key}: {shard[key]!r}"
        for key in ("sha256", "content"):
            if not isinstance(shard[key], str):
                return f"shards[{position}].{key}: {shard[key]!r}"
    if len({shard["name"] for shard in shards}) < len(shards):
        return "a duplicate shard"
    if content["samples"] != sum(shard["samples"] for shard in shards) or not 0 < content["samples"] < 2**31:
        return f"samples: {content['samples']!r}"
    if not 0 < len(content["classes"]) <= MAX_CLASSES or not all(isinstance(c, str) for c in content["classes"]):
        return "classes"
    if not number(content.get("unlabelled", 0), content["samples"] + 1):
        return f"unlabelled: {content['unlabelled']!r}"
    if not all(isinstance(bad[key], str) for bad in content["refused"] for key in ("shard", "key", "reason")):
        return "refused"
    return ""


def samples_fingerprint(content: dict[str, Any]) -> str:
    """The fingerprint of an index.json: of the samples (key, label, image bytes), their order in named shards, and the
    number of classes.

    It is the same for the same images whatever their source: class names, the place of the shards and the layout of
    their tars are not part of it.
    """
    shards = [[shard["name"], shard["samples"], shard["content"]] for shard in content["shards"]]
    named = {"keys": content["keys"]} if "keys" in content else {}
    return fingerprint({"format": FORMAT, "classes": len(content["classes"]), "shards": shards, **named})
