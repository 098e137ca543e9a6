"""Stores and training state that no configuration names: list them, or delete them."""

import contextlib
import json
from pathlib import Path
from typing import Any

import fsspec

from pipeline.audit import store_bytes
from pipeline.config import Config
from pipeline.layout import RUN_LOCK, index_path, local_work
from pipeline.lease import leases_beside
from pipeline.lock import held
from pipeline.params import load
from pipeline.progress import is_run_of, is_store_of, list_stores, wanted_runs
from pipeline.shards import Index


def run(config_files: list[Path], work: str, delete: bool) -> None:
    """List, or delete, stores and training state below `work` that none of the configurations names.

    What a process writes now is named by somebody: it stays.
    """
    configs = [load(str(path), ()) for path in config_files]
    here = [config for config in configs if config.work == work]
    beside = [config for config in configs if local_work(config.work) == local_work(work)]
    stores = [
        path for path, attributes in list_stores(work) if not any(_names_store(config, attributes) for config in here)
    ]
    states = [
        folder
        for folder in sorted((local_work(work) / "state").glob("*"))
        if not any(_names_state(config, folder) for config in beside)
    ]
    used = {path for path in stores if any(leases_beside(path).values())}
    used |= {folder for folder in states if held(folder / RUN_LOCK)}
    sizes = {path: store_bytes(path) for path in stores} | {folder: _bytes(folder) for folder in states}
    for path, size in sizes.items():
        doing = "in use" if path in used else "deleted" if delete else "unnamed"
        print(f"{doing:<8}{size / 1e6:10,.1f} MB  {path}")
        if delete and path not in used:
            _remove(str(path))
    total = sum(size for path, size in sizes.items() if path not in used)
    print(
        f"{len(set(stores) - used)} stores and {len(set(states) - used)} states"
        f" that none of {len(beside)} configurations names: {total / 1e6:,.1f} MB"
        + ("" if delete or not total else "; delete them with --yes")
    )


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _index_of(config: Config) -> str | None:
    path = index_path(config, "train")
    return Index(path).fingerprint if path.exists() else None


def _names_store(config: Config, attributes: dict[str, Any]) -> bool:
    recipes = (config.recipe, config.finetune_recipe())
    return any(is_store_of(recipe, _index_of(config), attributes) for recipe in recipes)


def _names_state(config: Config, folder: Path) -> bool:
    try:
        described = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return False
    return any(is_run_of(run, described) for run in wanted_runs(config, _index_of(config)).values())


def _remove(path: str) -> None:
    """A store with what its parts' writers left beside it, or a state."""
    filesystem, root = fsspec.core.url_to_fs(path)
    beside = [name for lock in leases_beside(path) for name in (lock, f"{lock}.kernel")]
    filesystem.rm(root, recursive=True)
    for name in beside:
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(name)
