"""Reads files that other processes are writing, or that are damaged: what cannot be read counts as absent.

Nothing is written, and a file's contents never raise an error.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from pipeline.common.errors import is_io_error, unreadable
from pipeline.common.files import modification_time
from pipeline.common.lease import part_leases
from pipeline.config.paths import NOT_NEEDED
from pipeline.config.store_spec import StoreSpec
from pipeline.training.log import parse_line
from pipeline.views.draw import recipe_fingerprint

LOG_TAIL = 2**18  # bytes read from the end of a log: about a thousand lines
JSON_LIMIT = 2**28  # bytes; no JSON file of the pipeline is larger


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; {} for anything else, and for the placeholder of a teacher that is not needed."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and found != NOT_NEEDED else {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is none."""
    try:
        return parse_object(path.read_bytes()) if path.stat().st_size < JSON_LIMIT else {}
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return value


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def read_index(path: Path) -> dict[str, Any]:
    """An index.json; {} also if its fingerprint, samples or shards are not those of an index."""
    found = read_json(path)
    shards = found.get("shards")
    if not (isinstance(found.get("fingerprint"), str) and is_count(found.get("samples")) and isinstance(shards, list)):
        return {}
    valid = (isinstance(x, dict) and isinstance(x.get("name"), str) and is_count(x.get("samples")) for x in shards)
    return found if all(valid) else {}


NOT_NEGATIVE = ("seconds", "samples_per_s", "val_top1_mean", "val_top1_class", "top1")


def read_log_tail(path: Path) -> list[dict[str, Any]]:
    """The last lines of a run's log, without those that are damaged or cut short."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL))
            texts = file.read().split(b"\n")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return []
    return [line for line in map(parse_line, texts) if line and _is_log_line(line)]


def _is_log_line(line: dict[str, Any]) -> bool:
    numbers = [number(line[key]) for key in NOT_NEGATIVE if key in line]
    return (
        line.get("kind") in ("step", "epoch")
        and is_count(line.get("step"))
        and number(line.get("loss")) is not None
        and all(found is not None and found >= 0 for found in numbers)
    )


def modification_times(folder: Path) -> dict[str, float]:
    """When each file of a folder was written; files that are deleted meanwhile are left out."""
    found = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                found[entry.name] = entry.stat().st_mtime
    return found


def newest(folder: Path) -> float | None:
    return latest(modification_times(folder).values())


def latest(times: Iterable[float | None]) -> float | None:
    return max((when for when in times if when), default=None)


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, including those in linked folders."""
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # reached before, through a link
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root) / name for name in names)


# stores


def is_store_of(spec: StoreSpec, index: str | None, attributes: dict[str, Any]) -> bool:
    """Whether a store with these attributes is one of a recipe and an index, and of the same draws for kind sampled."""
    views = attributes.get("index") == index and attributes.get("recipe") == recipe_fingerprint(spec.recipe)
    return views and attributes.get("sampling") == spec.sampling


def list_stores(work: str) -> list[tuple[str, dict[str, Any]]]:
    """Every store below `work`, with its attributes ({} if they are damaged).

    Raises:
        Unreadable: a server does not answer, or the library for a URL's scheme is not installed.
    """
    where = f"{work}/stores"
    try:
        filesystem, root = fsspec.core.url_to_fs(where)
        filesystem.invalidate_cache()  # another machine may have written there since
        paths = sorted(filesystem.ls(root, detail=False)) if filesystem.isdir(root) else []
    except Exception as error:
        if not is_io_error(error):
            raise
        raise unreadable(where, error) from error
    stores = [path.rstrip("/") for path in paths if path.rstrip("/").endswith(".zarr")]
    return [(f"{where}/{path.rpartition('/')[2]}", _attributes(filesystem, path)) for path in stores]


def _attributes(filesystem: AbstractFileSystem, path: str) -> dict[str, Any]:
    try:
        found = parse_object(filesystem.cat_file(f"{path}/zarr.json")).get("attributes")
    except Exception as error:
        if not is_io_error(error):
            raise
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Units:
    """What a store holds of the first blocks."""

    times: list[float]
    """When each complete unit was written."""
    modified: float
    """When anything was."""
    writers: int
    """Leases held."""


def written_units(path: str, kind: str, blocks: int) -> Units:
    """The units of a store's first blocks. A unit dates from its argmax, or from a kind that was added to it later."""
    filesystem, root = fsspec.core.url_to_fs(path)
    chunks = {}
    for name in {"argmax", kind}:
        folder = f"{root}/{name}/c"
        # as deep as (block, shard), below which some arrays have one folder more
        found = filesystem.find(folder, maxdepth=2, withdirs=True, detail=True) if filesystem.exists(folder) else {}
        places = {where[len(folder) + 1 :]: modification_time(info) for where, info in found.items()}
        chunks[name] = {place: when for place, when in places.items() if re.fullmatch(r"\d+/\d+", place)}
    complete = chunks["argmax"].keys() & chunks[kind].keys()
    times = [max(of[place] for of in chunks.values()) for place in complete if int(place.partition("/")[0]) < blocks]
    writers = sum(part_leases(path).values())
    return Units(times, max([modification_time(filesystem.info(f"{root}/zarr.json")), *times]), writers)
