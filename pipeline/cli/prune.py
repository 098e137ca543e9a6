"""`pipeline prune`: lists, or deletes, stores, state folders and data sets that nothing refers to any longer.

It keeps what a configuration can use, what a file under outputs/ names by its fingerprint, what a process may be working
on, the data of all these, what cannot be attributed to anything, and what is stored elsewhere and only linked to.
"""

import contextlib
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from pipeline.cli.scan import files_below, is_store_of, list_stores, newest, read_json
from pipeline.common.errors import UsageError, unwritable
from pipeline.common.files import is_local, modification_time
from pipeline.common.lease import part_lease, part_leases, possibly_held
from pipeline.common.lock import is_held, kernel_lock
from pipeline.common.wording import count_of, size_of
from pipeline.config.params import load_config
from pipeline.config.paths import DATA_LOCK, FINGERPRINT, RUN_LOCK, index_path, local_work, shard_cache_folder
from pipeline.config.schema import PURPOSES, Config
from pipeline.config.store_spec import store_spec
from pipeline.training.identity import VALIDATION_INDEX, configured_runs, is_run_of

DAY = 86400.0  # seconds: `prepare` may still be writing data that changed within them
TEXTS = {".json", ".jsonl", ".yaml", ".csv", ".txt", ".html"}
DELETED = ".deleted-"  # prefix of what is being deleted
OPTIONS = ("distillation", "alpha", "tau")  # settings of a student that train-student also takes as options


@dataclass(frozen=True)
class Found:
    """Something below `work`."""

    kind: str
    """store, state folder or data set."""
    path: str
    what: str
    """A description."""
    size: int
    """Bytes."""
    modified: float
    """When it was last modified, in seconds since 1970."""
    indices: set[str] = field(default_factory=set)
    """Fingerprints of the data sets that it uses, or is."""
    store: str | None = None
    """Fingerprint of the store that it reads."""
    needed: bool = False
    """A configuration or a file under outputs/ refers to it."""
    kept: str = ""
    """Why it is kept although nothing refers to it."""


class References:
    """The runs, stores and data sets that configurations and outputs refer to."""

    def __init__(self, files: list[Path]):
        self.configs = [load_config(str(path), ()) for path in files]
        self.prepared = [(config, _fingerprint(index_path(config, "train"))) for config in self.configs]
        self.indices = {_fingerprint(path) for path in Path("outputs").glob("*/data/train/index.json")}
        texts = [_text(path) for path in [*files, *_texts()]]
        named = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
        self.fingerprints = {fingerprint for text in texts for fingerprint in named.findall(text)}

    def include_store(self, attributes: dict[str, Any]) -> bool:
        """Whether a configuration has the store's recipe and draws, and may have its data."""
        index = attributes["index"]
        return any(
            is_store_of(store_spec(config, purpose), index, attributes)
            for config in self._configs_of(index)
            for purpose in PURPOSES
        )

    def include_run(self, described: dict[str, Any]) -> bool:
        """Whether a configuration has the run's settings, and may have its data."""
        index = described["index"]
        return any(
            is_run_of(_without_options(configured), _without_options(described))
            for config in self._configs_of(index)
            for configured in configured_runs(config, index).values()
        )

    def _configs_of(self, index: str) -> list[Config]:
        """The configurations that may use a data set. Until `prepare` has written its index, any may."""
        return [config for config, own in self.prepared if own is None or index in self.indices]


def _texts() -> list[Path]:
    return [path for path in files_below(Path("outputs")) if path.suffix in TEXTS and path.is_file()]


def _text(path: Path) -> str:
    """A file's text; empty if a command that ran meanwhile removed it."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(errors="replace")
    return ""


def _fingerprint(index: Path) -> str | None:
    found = read_json(index).get("fingerprint")
    return found if isinstance(found, str) else None


def _without_options(run: dict[str, Any]) -> dict[str, Any]:
    student = run.get("student")
    if not isinstance(student, dict):
        return run
    return {**run, "student": {key: value for key, value in student.items() if key not in OPTIONS}}


def run(config_files: list[Path], work: str, delete: bool) -> None:
    """List, or delete, the stores, state folders and data sets below `work` that nothing refers to.

    Raises:
        UsageError: there is no configuration, or one cannot be read; there is no folder `work`.
        PipelineError: a folder cannot be read or deleted.
    """
    if not config_files:
        raise UsageError(
            "prune: no configuration here", expected="params.yaml or configs/*.yaml, which say what is needed",
            found="neither", do="run it in the project's folder",
        )  # fmt: skip
    references = References(config_files)
    if "://" not in work and not Path(work).is_dir():
        raise UsageError(
            f"--work {work}", expected="the folder of stores, state folders and data sets", found=f"no folder {work}",
            do="name the `work` of the configurations, or run prepare first",
        )  # fmt: skip
    states = [*_states(work, references)]
    readers = {each.store: each.path for each in states if each.kept and each.store}
    found = [*_stores(work, references, readers), *states]
    used: set[str] = set().union(*(each.indices for each in found if each.needed or each.kept))
    found += _data_sets(work, references, used)
    counts, total = Counter(), 0
    for each in found:
        if not each.needed:
            kept = each.kept or (_delete(each) if delete else "")
            counts[each.kind] += not kept
            total += 0 if kept else each.size
            action = "kept" if kept else "deleted" if delete else "unneeded"
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.modified))
            size, reason = f"{size_of(each.size):>10}", f"; {kept}" if kept else ""
            print(f"{action:<9}{when}{size}  {each.path}: {each.what}{reason}")  # at once: a deletion may fail
    if delete:
        _sweep(work)
    summary = ", ".join(count_of(counts[kind], kind) for kind in ("store", "state folder", "data set"))
    print(
        f"{summary} not referred to by {count_of(len(references.configs), 'configuration')} or outputs/: {size_of(total)}"
        + ("" if delete or not total else "; delete them with --yes")
    )
    for folder in sorted({shard_cache_folder(config) for config in references.configs}):
        if folder.is_dir():
            print(f"kept: {folder}: {size_of(_bytes(folder))} of copies of shards at URLs, which may be deleted at any time")


# what there is


def _stores(work: str, references: References, readers: dict[str, str]) -> Iterator[Found]:
    filesystem, _ = fsspec.core.url_to_fs(work)
    for path, attributes in list_stores(work):
        name = path.rpartition("/")[2].removesuffix(".zarr")
        if not FINGERPRINT.fullmatch(name) or (is_local(filesystem) and not _is_stored_in(Path(path), work)):
            continue
        model, recipe = (attributes.get(key) or {} for key in ("teacher", "recipe_settings"))
        valid = all(isinstance(attributes.get(key), str) for key in ("index", "recipe", "fingerprint"))
        valid = valid and isinstance(model, dict) and isinstance(recipe, dict)
        what = f"predictions of {model.get('model')} at {recipe.get('size')} px" if valid else "a store"
        _, root = fsspec.core.url_to_fs(path)
        details = filesystem.find(root, detail=True).values()
        yield Found(
            "store", path, what, sum(info["size"] for info in details), max(map(modification_time, details), default=0.0),
            indices={attributes["index"]} if valid else set(),
            needed=name in references.fingerprints or (valid and references.include_store(attributes)),
            kept=(_writer_of(path) or _reader_of(name, readers)) if valid else "its metadata is damaged",
        )  # fmt: skip


def _writer_of(store: str) -> str:
    locks = sorted(possibly_held(store))
    return f"in use, or its writer on another machine died: {locks[0]}" if locks else ""


def _reader_of(fingerprint: str, readers: dict[str, str]) -> str:
    return f"a training may be reading it: {readers[fingerprint]}" if fingerprint in readers else ""


def _states(work: str, references: References) -> Iterator[Found]:
    for folder in _folders(work, "state"):
        described = read_json(folder / "run.json")
        valid = isinstance(described.get("index"), str) and isinstance(described.get("recipe"), str)
        what, store = f"{described.get('name')}, {described.get('steps')} steps" if valid else "a run", described.get("store")
        kept = _trainer_of(folder) if valid else "its run.json is missing or damaged"
        indices = {described["index"]} | ({str(described.get(VALIDATION_INDEX))} if kept else set()) if valid else set()
        yield Found(
            "state folder", str(folder), what, _bytes(folder), newest(folder) or 0.0,
            indices=indices, store=store if isinstance(store, str) else None,
            needed=folder.name in references.fingerprints or (valid and references.include_run(described)), kept=kept,
        )  # fmt: skip


def _trainer_of(state: Path) -> str:
    lock = state / RUN_LOCK
    running = is_held(lock)
    if running:
        return "in use"
    return f"another machine may be training it: {lock}" if running is None and lock.exists() else ""


def _data_sets(work: str, references: References, used: set[str]) -> Iterator[Found]:
    unprepared = Path("params.yaml").exists() and references.prepared[0][1] is None  # that of params.yaml is the first
    for folder in _folders(work, "data"):
        indices = {split: read_json(folder / split / "index.json") for split in ("train", "val")}
        images = [f"{split} {index.get('samples')}" for split, index in indices.items() if index]
        fingerprints = {str(index["fingerprint"]) for index in indices.values() if "fingerprint" in index}
        modified = max((newest(path) or 0.0 for path in [folder, *folder.iterdir()]), default=0.0)
        kept = ""
        if is_held(folder.parent / DATA_LOCK):
            kept = "in use: prepare runs"
        elif time.time() - modified < DAY:
            kept = "modified in the last day: prepare may be writing it"
        elif unprepared:
            kept = f"{references.configs[0].name} has no index under outputs/ yet and may use it"
        yield Found(
            "data set", str(folder), f"images: {', '.join(images) or 'incomplete'}", _bytes(folder), modified,
            indices=fingerprints,
            needed=folder.name in references.fingerprints or bool(fingerprints & (used | references.indices)),
            kept=kept,
        )  # fmt: skip


def _folders(work: str, name: str) -> list[Path]:
    found = sorted((local_work(work) / name).glob("*"))
    return [path for path in found if FINGERPRINT.fullmatch(path.name) and _is_stored_in(path, work)]


def _is_stored_in(path: Path, work: str) -> bool:
    """Whether it is a folder below `work` itself, not one behind a link."""
    return path.is_dir() and path.resolve() == local_work(work).resolve() / path.parent.name / path.name


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


# deleting


def _delete(found: Found) -> str:
    """Delete it under its lock. Returns why it is kept, if another process has taken it meanwhile."""
    try:
        if found.kind == "store":
            _delete_store(found.path)
        elif found.kind == "state folder":
            with kernel_lock(Path(found.path) / RUN_LOCK):
                _delete_folder(Path(found.path))
        else:
            with kernel_lock(Path(found.path).parent / DATA_LOCK):
                _delete_folder(Path(found.path))
    except (UsageError, BlockingIOError):
        return "in use"
    except OSError as error:
        raise unwritable(f"{found.path}:", error) from error
    return ""


def _delete_store(path: str) -> None:
    """Delete a store, and the locks that its writers left next to it."""
    filesystem, root = fsspec.core.url_to_fs(path)
    with part_lease(path, 0, 1, "prune"):
        if is_local(filesystem):
            _delete_folder(Path(root))
        else:
            filesystem.rm(root, recursive=True)
        locks = part_leases(path)
    for file in [file for lock in locks for file in (lock, f"{lock}.kernel")]:
        if filesystem.exists(file):
            filesystem.rm_file(file)


def _delete_folder(folder: Path) -> None:
    """Rename it first: what is partly deleted must not look complete."""
    doomed = folder.with_name(DELETED + folder.name)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _sweep(work: str) -> None:
    """Delete what an earlier prune was killed while deleting."""
    for name in ("stores", "state", "data"):
        for path in sorted((local_work(work) / name).glob(f"{DELETED}*")):
            if FINGERPRINT.fullmatch(path.name.removeprefix(DELETED).removesuffix(".zarr")) and _is_stored_in(path, work):
                shutil.rmtree(path)
