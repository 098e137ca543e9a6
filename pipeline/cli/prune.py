"""Stores, training state and data that nothing needs any more: list them, or delete them.

What is needed: what a configuration names, what a file under outputs/ refers to by its fingerprint, what a process
works on or may work on, and the data of all that. What nothing tells whose it is stays too, and so does what lies
elsewhere and is only linked to.
"""

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

from pipeline.cli.glance import files_below, list_stores, newest, read_json, read_tail
from pipeline.cli.progress import is_store_of
from pipeline.common.errors import UsageError, unwritable
from pipeline.common.files import is_local
from pipeline.common.lease import modified, part_lease, part_leases, possibly_held
from pipeline.common.lock import is_held, kernel_lock
from pipeline.config.params import load
from pipeline.config.paths import DATA_LOCK, FINGERPRINT, RUN_LOCK, index_path, local_work
from pipeline.training.identity import configured_runs, is_run_of

DAY = 86400.0  # seconds: data that moved so lately may be what `prepare` writes
TEXTS = {".json", ".jsonl", ".yaml", ".csv", ".txt", ".html"}
DELETED = ".deleted-"  # before the name of what is being deleted
OPTIONS = ("distillation", "alpha", "tau")  # of a student, that train-student may be given


@dataclass(frozen=True)
class Found:
    """Something below `work`."""

    kind: str
    """`stores`, `states` or `data sets`."""
    path: str
    what: str
    """In words."""
    size: int
    moved: float
    indices: set[str] = field(default_factory=set)
    """Fingerprints of the data that it is of, or is."""
    needed: bool = False
    """By a configuration or by a file under outputs/."""
    stays: str = ""
    """Why it is kept though nothing names it."""


class Known:
    """What configurations and outputs tell."""

    def __init__(self, files: list[Path]):
        self.configs = [load(str(path), ()) for path in files]
        self.own = [(config, _fingerprint(index_path(config, "train"))) for config in self.configs]
        texts = [path.read_text(errors="replace") for path in [*files, *_texts()]]
        self.words = {word for text in texts for word in re.findall(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", text)}
        self.curves = [path.read_text(errors="replace") for path in _texts() if path.name == "curve.csv"]
        self.indices = {_fingerprint(path) for path in Path("outputs").glob("*/data/train/index.json")}

    def names_store(self, attributes: dict[str, Any]) -> bool:
        """Whether a configuration has this recipe, and its data may be the store's."""
        found = attributes.get("index")
        return any(
            is_store_of(recipe, found, attributes) and (own is None or found in self.indices)
            for config, own in self.own
            for recipe in (config.recipe, config.finetune_recipe())
        )

    def names_run(self, described: dict[str, Any]) -> bool:
        """Whether a configuration has these settings, and its data may be the run's."""
        found = described.get("index")
        return any(
            is_run_of(_without_options(run), _without_options(described)) and (own is None or found in self.indices)
            for config, own in self.own
            for run in configured_runs(config, found).values()
        )

    def published(self, state: Path) -> bool:
        """Whether a curve under outputs/ ends with this state's last loss, which no two trainings share."""
        losses = [line.get("loss") for line in read_tail(state / "log.jsonl") if line.get("kind") == "epoch"]
        return bool(losses) and any(repr(losses[-1]) in curve for curve in self.curves)


def _texts() -> list[Path]:
    return [path for path in files_below(Path("outputs")) if path.suffix in TEXTS and path.is_file()]


def _fingerprint(index: Path) -> str | None:
    found = read_json(index).get("fingerprint")
    return found if isinstance(found, str) else None


def _without_options(run: dict[str, Any]) -> dict[str, Any]:
    student = run.get("student")
    if not isinstance(student, dict):
        return run
    return {**run, "student": {key: value for key, value in student.items() if key not in OPTIONS}}


def run(config_files: list[Path], work: str, delete: bool) -> None:
    """List, or delete, stores, training state and data below `work` that nothing needs.

    Raises:
        UsageError: there is no configuration to go by, or one cannot be read.
        PipelineError: a folder cannot be read or deleted.
    """
    if not config_files:
        raise UsageError(
            "prune: no configuration here", expected="params.yaml or configs/*.yaml, which name what is needed",
            found="neither", do="run it in the folder of the experiments",
        )  # fmt: skip
    known = Known(config_files)
    found = [*_stores(work, known), *_states(work, known)]
    kept: set[str] = set().union(*(each.indices for each in found if each.needed or each.stays))
    found += _data_sets(work, known, kept)
    counts, total = Counter(), 0
    for each in found:
        if not each.needed:
            stays = each.stays or (_delete(each) if delete else "")
            counts[each.kind] += not stays
            total += 0 if stays else each.size
            did = "kept" if stays else "deleted" if delete else "unneeded"
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.moved))
            print(f"{did:<9}{when}{each.size / 1e6:10,.1f} MB  {each.path}: {each.what}" + (f"; {stays}" * bool(stays)))
    if delete:
        _sweep(work)
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("stores", "states", "data sets"))
    print(
        f"{told} that nothing needs, by {len(known.configs)} configurations and outputs/: {total / 1e6:,.1f} MB"
        + ("" if delete or not total else "; delete them with --yes")
    )


# what there is


def _stores(work: str, known: Known) -> Iterator[Found]:
    filesystem, _ = fsspec.core.url_to_fs(work)
    for path, attributes in list_stores(work):
        name = path.rpartition("/")[2].removesuffix(".zarr")
        if not FINGERPRINT.fullmatch(name) or (is_local(filesystem) and not _lies_here(Path(path), work)):
            continue
        model, recipe = (attributes.get(key) or {} for key in ("teacher", "recipe_settings"))
        told = all(isinstance(attributes.get(key), str) for key in ("index", "recipe", "fingerprint"))
        told = told and isinstance(model, dict) and isinstance(recipe, dict)
        what = f"answers of {model.get('model')} at {recipe.get('size')} px" if told else "a store"
        _, root = fsspec.core.url_to_fs(path)
        details = filesystem.find(root, detail=True).values()
        yield Found(
            "stores", path, what, sum(info["size"] for info in details), max(map(modified, details), default=0.0),
            indices={attributes["index"]} if told else set(),
            needed=name in known.words or (told and known.names_store(attributes)),
            stays=_perhaps_written(path) if told else "its description is damaged",
        )  # fmt: skip


def _perhaps_written(store: str) -> str:
    locks = sorted(possibly_held(store))
    return f"in use, or another machine's writer died: {locks[0]}" if locks else ""


def _states(work: str, known: Known) -> Iterator[Found]:
    for folder in _folders(work, "state"):
        described = read_json(folder / "run.json")
        told = isinstance(described.get("index"), str) and isinstance(described.get("recipe"), str)
        what = f"{described.get('name')}, {described.get('steps')} steps" if told else "a training"
        yield Found(
            "states", str(folder), what, _bytes(folder), newest(folder) or 0.0,
            indices={described["index"]} if told else set(),
            needed=folder.name in known.words or known.published(folder) or (told and known.names_run(described)),
            stays=_perhaps_trained(folder) if told else "its run.json is missing or damaged",
        )  # fmt: skip


def _perhaps_trained(state: Path) -> str:
    lock = state / RUN_LOCK
    known = is_held(lock)
    if known:
        return "in use"
    return f"another machine may train it: {lock}" if known is None and lock.exists() else ""


def _data_sets(work: str, known: Known, kept: set[str]) -> Iterator[Found]:
    unprepared = bool(known.own) and known.own[0][1] is None
    for folder in _folders(work, "data"):
        indices = {split: read_json(folder / split / "index.json") for split in ("train", "val")}
        images = [f"{split} {index.get('samples')}" for split, index in indices.items() if index]
        prints = {str(index["fingerprint"]) for index in indices.values() if "fingerprint" in index}
        moved = max((newest(path) or 0.0 for path in [folder, *folder.iterdir()]), default=0.0)
        stays = ""
        if is_held(folder.parent / DATA_LOCK):
            stays = "in use: prepare runs"
        elif time.time() - moved < DAY:
            stays = "of the last day: prepare may be writing it"
        elif unprepared:
            stays = f"{known.configs[0].name} has no index under outputs/: it may be its"
        yield Found(
            "data sets", str(folder), f"images: {', '.join(images) or 'not complete'}", _bytes(folder), moved,
            indices=prints,
            needed=folder.name in known.words or bool(prints & (kept | known.indices)),
            stays=stays,
        )  # fmt: skip


def _folders(work: str, name: str) -> list[Path]:
    found = sorted((local_work(work) / name).glob("*"))
    return [path for path in found if FINGERPRINT.fullmatch(path.name) and _lies_here(path, work)]


def _lies_here(path: Path, work: str) -> bool:
    """Whether it is a folder below `work` itself, not one that a link leads to."""
    return path.is_dir() and path.resolve() == local_work(work).resolve() / path.parent.name / path.name


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


# deleting


def _delete(found: Found) -> str:
    """Delete it under its lock. Returns why it stays, where somebody has it by now."""
    try:
        if found.kind == "stores":
            _delete_store(found.path)
        elif found.kind == "states":
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
    """With the locks that its parts' writers left beside it."""
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
    """By another name first: what is deleted in part must not look whole."""
    going = folder.with_name(DELETED + folder.name)
    os.rename(folder, going)
    shutil.rmtree(going)


def _sweep(work: str) -> None:
    """What an earlier prune was killed over."""
    for name in ("stores", "state", "data"):
        for path in sorted((local_work(work) / name).glob(f"{DELETED}*")):
            if FINGERPRINT.fullmatch(path.name.removeprefix(DELETED).removesuffix(".zarr")) and _lies_here(path, work):
                shutil.rmtree(path)
