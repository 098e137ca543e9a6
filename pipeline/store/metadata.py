"""zarr metadata (zarr.json) with a checksum, so that damage is detected.

zarr reads metadata with a flipped bit as best it can: another shape, another fill value, a missing codec. So the
attributes of every group and array hold a checksum of everything else in its metadata but the shape, which grows.
"""

import contextlib
import json
from typing import Any

import zarr
from zarr.errors import ContainsArrayError, ContainsGroupError

from pipeline.config.validation import fingerprint


def create_group(path: str, attributes: dict[str, Any]) -> None:
    """Create a group; one that another process created meanwhile is left as it is."""
    memory: dict[str, Any] = {}
    zarr.create_group(memory, attributes=attributes)
    with contextlib.suppress(ContainsGroupError):
        zarr.create_group(path, attributes=attributes | {"digest": _checksum(_parse(memory))})


def create_array(group: zarr.Group, name: str, settings: dict[str, Any]) -> None:
    """Create an array; one that another process created meanwhile is left as it is."""
    memory: dict[str, Any] = {}
    zarr.create_array(memory, **settings)
    with contextlib.suppress(ContainsArrayError):
        group.create_array(name, **settings, attributes={"digest": _checksum(_parse(memory))})


def read_metadata(filesystem: Any, folder: str) -> dict[str, Any]:
    """Read and parse the zarr.json of a group or array.

    Raises:
        ValueError: it did not match its checksum in two reads.
        Exception: whatever the file system raises where it cannot be read.
    """
    for _ in range(2):
        data = filesystem.cat_file(f"{folder}/zarr.json")
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            metadata = json.loads(data)
            if metadata["attributes"]["digest"] == _checksum(metadata):
                return metadata
    raise ValueError("it does not match its checksum")


def _checksum(metadata: dict[str, Any]) -> str:
    attributes = {key: value for key, value in metadata["attributes"].items() if key != "digest"}
    return fingerprint({**metadata, "attributes": attributes, "shape": None})


def _parse(memory: dict[str, Any]) -> dict[str, Any]:
    return json.loads(memory["zarr.json"].to_bytes())
