"""zarr's descriptions (zarr.json) under a digest, so that a damaged one is told from a sound one.

zarr reads a description with a flipped bit as best it can: another shape, another fill value, a codec
less. Each of ours holds, among its attributes, a digest of all else in it but the shape, which grows.
"""

import contextlib
import json
from typing import Any

import zarr
from zarr.errors import ContainsArrayError, ContainsGroupError

from pipeline.config.validation import fingerprint


def create_group(path: str, attributes: dict[str, Any]) -> None:
    """Make a group; one that another process made meanwhile stays as it is."""
    made: dict[str, Any] = {}
    zarr.create_group(made, attributes=attributes)
    with contextlib.suppress(ContainsGroupError):
        zarr.create_group(path, attributes=attributes | {"digest": _digest(_parsed(made))})


def create_array(group: zarr.Group, name: str, settings: dict[str, Any]) -> None:
    """Make an array; one that another process made meanwhile stays as it is."""
    made: dict[str, Any] = {}
    zarr.create_array(made, **settings)
    with contextlib.suppress(ContainsArrayError):
        group.create_array(name, **settings, attributes={"digest": _digest(_parsed(made))})


def read_metadata(filesystem: Any, folder: str) -> dict[str, Any]:
    """The parsed zarr.json of a group or array.

    Raises:
        ValueError: it is not what was written, twice. What the file system raises: it cannot be read.
    """
    for _ in range(2):
        data = filesystem.cat_file(f"{folder}/zarr.json")
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            described = json.loads(data)
            if described["attributes"]["digest"] == _digest(described):
                return described
    raise ValueError("it is not what was written")


def _digest(described: dict[str, Any]) -> str:
    attributes = {key: value for key, value in described["attributes"].items() if key != "digest"}
    return fingerprint({**described, "attributes": attributes, "shape": None})


def _parsed(made: dict[str, Any]) -> dict[str, Any]:
    return json.loads(made["zarr.json"].to_bytes())
