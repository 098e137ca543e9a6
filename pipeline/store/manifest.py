"""Whole stores: what is damaged, the manifest that stands for a complete one, bytes on disk."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from tqdm import tqdm

from pipeline.batches.plan import Unit
from pipeline.common.errors import Damaged, NotReady, PipelineError, unreadable
from pipeline.common.files import atomic_write
from pipeline.config.paths import FINGERPRINT, NOT_NEEDED
from pipeline.config.validation import fingerprint
from pipeline.store.encoding import KINDS
from pipeline.store.layout import FORMAT
from pipeline.store.reader import Store

MANIFEST = {"format", "fingerprint", "kind", "views", "rows", "units"}


def damaged_units(store: Store, units: list[Unit], kind: str) -> list[tuple[Unit, str]]:
    """Read units whole; those that are missing or damaged, each with what was found.

    Raises:
        Unreadable: disk or server do not answer, or memory is short, which is no damage.
    """
    found = []
    for unit in tqdm(units, desc="reading the store", unit="unit", mininterval=1, leave=False, disable=not units):
        try:
            store.check_unit(unit, kind)
        except Damaged as error:
            found.append((unit, str(error)))
    return found


def build_manifest(store: Store, views: int, kind: str) -> dict[str, Any]:
    """A small JSON that stands for a complete store: what it is, and a digest of every unit.

    Deterministic: no times, no paths. Raises PipelineError naming the missing units.
    """
    missing = store.missing(views, kind)
    if missing:
        raise PipelineError(
            f"{store.path}: incomplete",
            expected=f"{views} views of {len(store.index.names)} shards as {kind}",
            found=f"{len(missing)} units missing, the first: shard {missing[0].shard}, block {missing[0].block}",
            do="run teacher-logits again: it goes on where it was",
        )
    # the groups' checks and what this kind consists of: another kind beside it changes nothing
    chosen = [*range(store.slots), *(store.slots + KINDS.index(name) for name in sorted({"argmax", kind}))]
    digests: dict[str, list[str]] = {name: [] for name in store.index.names}
    for unit in store.units(views):
        slots = np.ascontiguousarray(store.read_check(unit)[:, chosen])
        digests[store.index.names[unit.shard]].append(hashlib.blake2b(slots.data, digest_size=8).hexdigest())
    return {
        "format": FORMAT,
        "fingerprint": store.fingerprint,
        "kind": kind,
        "views": views,
        "rows": len(store.index),
        "units": digests,
    }


def store_bytes(path: str) -> int:
    """Bytes on disk of everything below a store."""
    filesystem, root = fsspec.core.url_to_fs(path)
    return sum(info["size"] for info in filesystem.find(root, detail=True).values())


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(manifest, sort_keys=True, indent=1) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """A complete store's manifest. Raises PipelineError where there is none, or it is damaged."""
    try:
        found = json.loads(path.read_bytes())
        if found == NOT_NEEDED:
            raise NotReady(
                f"{path}: no store is complete",
                found="a mark of dvc repro: no configured student listens to a teacher",
                do=f"run: {_maker(path)}",
            )
        if not isinstance(found, dict) or MANIFEST - found.keys():
            raise ValueError(f"not an object with {', '.join(sorted(MANIFEST))}")
        for key, told in MANIFEST_TYPES.items():
            if not told(found[key]):
                raise ValueError(f"{key} {str(found[key])[:100]!r}")
        return found
    except FileNotFoundError:
        raise NotReady(f"{path}: no store is complete", do=f"run: {_maker(path)}") from None
    except OSError as error:
        raise unreadable(str(path), error) from error
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path}: damaged", found=str(error), do=f"run: {_maker(path)}") from error


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


MANIFEST_TYPES: dict[str, Callable[[Any], bool]] = {
    "fingerprint": lambda value: isinstance(value, str) and FINGERPRINT.fullmatch(value) is not None,
    "kind": lambda value: value in KINDS,
    "views": _is_count,
    "rows": _is_count,
    "units": lambda value: isinstance(value, dict),
}


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Figures of a complete store for people, under a digest."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(summary | {"digest": fingerprint(summary)}, indent=1) + "\n")


def read_summary(path: Path) -> dict[str, Any]:
    """What `write_summary` wrote. Raises PipelineError where there is nothing, or it is damaged."""
    try:
        found = json.loads(path.read_bytes())
        if found.pop("digest") != fingerprint(found):
            raise ValueError("it is not what its digest says")
        return found
    except FileNotFoundError:
        raise PipelineError(f"{path}: missing", do=f"run: {_maker(path)}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise PipelineError(
            f"{path}: damaged", expected="figures of a store under a digest", found=str(error),
            do=f"run: {_maker(path)}",
        ) from error  # fmt: skip


def _maker(path: Path) -> str:
    """The command that writes a manifest or a summary."""
    return "pipeline teacher-logits" + " --for finetune" * path.parent.name.endswith("finetune")
