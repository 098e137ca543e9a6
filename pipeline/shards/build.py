"""Bring a split's shards and their index up to date: verify what exists, make the rest in parallel processes."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.cores import available_cores
from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.files import remove_partial_files
from pipeline.common.lock import kernel_lock
from pipeline.common.progress import progress
from pipeline.common.signals import exit_with_parent
from pipeline.config.paths import DATA_LOCK, local_work
from pipeline.config.schema import Config
from pipeline.shards.contents import load_cache, save_cache
from pipeline.shards.finished import Finished, load_finished, remove_finished, save_finished
from pipeline.shards.index import Index
from pipeline.shards.index_file import ShardIndex, row_type
from pipeline.shards.indexing import shard_sha256, shard_signature, write_index
from pipeline.shards.splits import ShardSet, Task, cache_file

REQUESTS = 8  # files that are checked at a time


def build(config: Config, shards: ShardSet, classes: list[str], quick: bool) -> Index:
    """Write the missing shards of a split and index them.

    Shards that match an existing index by their SHA-256, or that an interrupted indexing had completed, are not
    decoded again.

    Args:
        classes: those that the index must have; empty if labels decide.
        quick: trust shards whose size and times have not changed; otherwise all are read and compared.

    Raises:
        PipelineError: a shard or image cannot be read, too many images do not decode, a worker was killed.
    """
    path = shards.root / "index.json"
    cache = cache_file(config, shards.root)
    signatures = _signatures(shards)
    index = _existing_index(shards, path)
    unchanged = _unchanged(shards, index, signatures, (load_cache(cache) or {}) if quick else {}) if index else set()
    if index is None or len(unchanged) < len(shards.names) or (classes or _numbers([index.labels()])) != index.classes:
        lock = local_work(config.work) / "data" / DATA_LOCK
        with kernel_lock(lock, f"{shards.split}: waiting for another process, which prepares data there") as locked:
            if locked:
                remove_partial_files(shards.root)
            _make(shards, path, classes, index, unchanged, signatures)
        index = Index(path)
    remove_finished(_finished_folder(shards))
    if known := {name: at for name, at in signatures.items() if at is not None}:
        save_cache(cache, known)
    _check_refused(shards, index.refused)
    return index


def _finished_folder(shards: ShardSet) -> Path:
    return shards.root / "finished"


def _existing_index(shards: ShardSet, path: Path) -> Index | None:
    try:
        index = Index(path)
        index.labels()
    except PipelineError:
        return None
    # an index must not redirect to other folders
    location = shards.location if "://" in shards.location else os.path.abspath(shards.location)
    in_place = (index.location, index.table) == (location, os.path.abspath(path.with_suffix(".npy")))
    return index if in_place and index.names == shards.names else None


def _signatures(shards: ShardSet) -> dict[str, Any]:
    """The signatures of the shards that exist; shards that the pipeline does not write must all exist."""

    def one(name: str) -> tuple[str, Any]:
        return name, shard_signature(shards.location, name)

    names = [name for name in shards.names if not shards.written_here or (shards.root / name).exists()]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return dict(pool.map(one, names))


def _unchanged(shards: ShardSet, index: Index, signatures: dict[str, Any], known: dict[str, Any]) -> set[str]:
    """The shards that match the index: by a known signature or by their SHA-256."""
    entries = [(shard["name"], shard["bytes"], shard["sha256"], known.get(shard["name"])) for shard in index.shards]
    return _matching(shards, entries, signatures, f"check {shards.location}")


def _matching(
    shards: ShardSet, entries: list[tuple[str, int, str, Any]], signatures: dict[str, Any], title: str
) -> set[str]:
    """The shards that are unchanged since an earlier indexing read them.

    Args:
        entries: name, bytes, SHA-256 and trusted signature of each; the signature is None if only the contents can tell
            whether the shard changed.
        signatures: the current ones.
    """

    def matches(entry: tuple[str, int, str, Any]) -> bool:
        name, size, sha256, trusted = entry
        if name not in signatures:
            return False  # it does not exist
        current = signatures[name]
        if current is not None and current == trusted:
            return True
        if current is not None and current[0] not in (None, size):
            return False
        return shard_sha256(shards.location, name) == sha256

    found = set()
    with ThreadPoolExecutor(REQUESTS) as pool, progress(len(entries), title, "shard", enabled=bool(entries)) as bar:
        for entry, equal in zip(entries, pool.map(matches, entries), strict=True):
            bar.update()
            if equal:
                found.add(entry[0])
    return found


def _make(
    shards: ShardSet,
    path: Path,
    classes: list[str],
    index: Index | None,
    unchanged: set[str],
    signatures: dict[str, Any],
) -> None:
    """Write and index the shards that are not `unchanged` since `index`, and write the new index."""
    found: dict[str, ShardIndex] = {}
    if index is not None:
        found = {name: _indexed_before(index, n) for n, name in enumerate(index.names) if name in unchanged}
    kept = _finished_before(shards, [name for name in shards.names if name not in found])
    entries = [(name, done.shard.bytes, done.shard.sha256, done.signature) for name, done in kept.items()]
    found |= {name: kept[name].shard for name in _matching(shards, entries, signatures, "resume the indexing")}
    # overwrite those that were indexed but do not match it: they are damaged
    wanted = {name: index is not None or name in kept for name in shards.names if name not in found}
    workers = min(shards.data.workers or available_cores(), len(wanted))
    with shards.tasks(wanted) as tasks, process_map(workers) as map_tasks, progress(
        len(wanted), f"{shards.split} shards", "shard", enabled=bool(wanted)
    ) as bar:
        # of a shard that is written now, only the contents will tell whether it is unchanged
        stamps = [None if overwrite else signatures.get(name) for name, overwrite in wanted.items()]
        folder, settings = _finished_folder(shards), shards.indexing_settings
        for shard in map_tasks(_run, tasks, repeat(folder), repeat(settings), stamps):
            found[shard.name] = shard
            _check_refused(shards, [image for done in found.values() for image in done.refused])
            bar.update()
    indexed = [found[name] for name in shards.names]
    classes = classes or _numbers(shard.rows["label"] for shard in indexed)
    if not classes and any(len(shard.rows) for shard in indexed):
        raise UsageError(
            f"data.{shards.split}: no sample has a label",
            expected="class names, as the labels do not tell how many classes there are",
            do="set data.class_names to a file with the classes of the teacher",
        )
    if duplicate := write_index(path, shards.location, classes, indexed, shards.data.max_pixels):
        print(f"{shards.split}: duplicate key {duplicate}: every sample is named SHARD/KEY")


def _numbers(labels: Iterable[np.ndarray]) -> list[str]:
    """The names of classes that have none: the numbers from 0 to the largest label."""
    return [str(number) for number in range(1 + max(int(each.max(initial=-1)) for each in labels))]


def _indexed_before(index: Index, number: int) -> ShardIndex:
    """What indexing a shard yielded, as if it were indexed again: with the keys and the key length of that shard alone.

    Raises:
        PipelineError: the table is missing or damaged.
    """
    entry, rows = index.shards[number], index.rows(number)
    keys = rows["key"].tolist()
    if index.keyed_by_shard:
        keys = [key[len(entry["name"].encode()) + 1 :] for key in keys]
    alone = rows.astype(row_type(max(map(len, keys), default=1)))
    alone["key"] = keys
    refused = [bad for bad in index.refused if bad["shard"] == entry["name"]]
    return ShardIndex(entry["name"], alone, entry["bytes"], entry["sha256"], entry["content"], refused)


def _finished_before(shards: ShardSet, names: list[str]) -> dict[str, Finished]:
    """The shards that an unfinished indexing had completed, by name."""
    folder, settings = _finished_folder(shards), shards.indexing_settings
    found = {name: load_finished(folder, settings, name) for name in names}
    return {name: finished for name, finished in found.items() if finished}


def _run(task: Task, folder: Path, settings: str, signature: Any) -> ShardIndex:
    shard = task()
    save_finished(folder, settings, shard, signature)
    return shard


def _check_refused(shards: ShardSet, refused: list[dict[str, str]]) -> None:
    allowed = shards.data.max_bad
    if len(refused) > allowed:
        raise PipelineError(
            f"{shards.split}: images that do not decode",
            expected=f"at most {allowed} (data.max_bad)",
            found=f"{len(refused)}: {'; '.join(shards.describe(image) for image in refused[:5])}",
            do="remove or repair them, or raise data.max_bad: they are then listed in index.json and left out",
        )


@contextlib.contextmanager
def process_map(workers: int) -> Iterator[Callable[..., Any]]:
    """Yield a `map`, in order, over that many processes, or in this one if one is enough.

    Raises:
        PipelineError: a worker was killed.
    """
    if workers <= 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe once torch has threads
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=exit_with_parent)
    try:
        yield pool.map
    except BrokenProcessPool:
        raise PipelineError(
            "prepare: a worker process was killed",
            found="most likely the system was out of memory",
            do=f"set data.workers to fewer than {workers}, then run: pipeline prepare; it continues where it stopped",
        ) from None
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
