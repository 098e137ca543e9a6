"""Complete stores: their manifest and summary, damaged units, bytes on disk."""

import hashlib
import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from pipeline.batches.plan import Unit
from pipeline.common.errors import Damaged, NotReady, PipelineError, unreadable
from pipeline.common.files import read_json_object, write_json
from pipeline.common.progress import progress
from pipeline.common.wording import count_of, size_of
from pipeline.config.paths import FINGERPRINT, NOT_NEEDED
from pipeline.config.store_spec import ARGMAX_UNITS, COMPUTED_WITH, FETCHED, StoreSpec
from pipeline.config.validation import fingerprint
from pipeline.store.kinds import KINDS
from pipeline.store.layout import FORMAT, MAKE_STORE
from pipeline.store.reader import Store
from pipeline.store.writer import sweep_store


def damaged_units(store: Store, units: list[Unit], kind: str) -> list[tuple[Unit, str]]:
    """Read all of the units; returns those that are missing or damaged, each with what was found.

    Raises:
        Unreadable: a disk or server did not answer, or memory ran out, which is not damage.
    """
    found = []
    with progress(len(units), "reading the store", "unit", enabled=bool(units)) as bar:
        for unit in units:
            try:
                store.check_unit(unit, kind)
            except Damaged as error:
                found.append((unit, str(error)))
            bar.update()
    return found


def require_complete(store: Store, views: int, kind: str) -> None:
    """Check that no unit of views 0..views-1 is missing.

    Raises:
        PipelineError: one is.
    """
    if missing := store.missing(views, kind):
        raise PipelineError(
            f"{store.path}: incomplete",
            expected=f"{views} views of {count_of(len(store.index.names), 'shard')} as {kind}",
            found=f"{count_of(len(missing), 'unit')} missing, the first: shard {missing[0].shard}, block {missing[0].block}",
            do=f"run: {MAKE_STORE}, which resumes",
        )


def build_manifest(store: Store, views: int, kind: str) -> dict[str, Any]:
    """Build the JSON that stands for a complete store: its identity, and a hash of every unit's checksums.

    Deterministic: neither times nor paths.

    Raises:
        PipelineError: units are missing; Damaged: the checksums of one are damaged.
    """
    require_complete(store, views, kind)
    hashes: dict[str, dict[str, list[str]]] = {each: {name: [] for name in store.index.names} for each in (kind, "argmax")}
    for unit in store.units(views):
        check = store.read_check(unit)
        for each, units in hashes.items():
            units[store.index.names[unit.shard]].append(hash_check(store, check, each))
    return {
        "format": FORMAT,
        "fingerprint": store.fingerprint,
        "kind": kind,
        "views": views,
        "rows": len(store.index),
        "units": hashes[kind],
        ARGMAX_UNITS: fingerprint(hashes["argmax"]),
    }


def is_manifest_of(published: dict[str, Any], built: dict[str, Any]) -> bool:
    """Whether a published manifest is that of the store for which `built` was built; it may lack keys that are new."""
    return published.items() <= built.items()


def hash_check(store: Store, check: np.ndarray, kind: str) -> str:
    """The hash of a unit in manifests.

    Of group checks and checksums of this kind alone, so that adding another kind changes nothing.

    Args:
        check: uint64 (block, groups + kinds).
    """
    chosen = [*range(store.groups), *(store.checksum_slot(name) for name in sorted({"argmax", kind}))]
    return hashlib.blake2b(np.ascontiguousarray(check[:, chosen]).data, digest_size=8).hexdigest()


def store_bytes(path: str) -> int:
    """Bytes of all files of a store."""
    filesystem, root = fsspec.core.url_to_fs(path)
    return sum(info["size"] for info in filesystem.find(root, detail=True).values())


def kind_bytes(store: Store, views: int, kind: str) -> int:
    """Bytes of the chunks of views 0..views-1 that a kind needs; the store may hold more views, and other kinds."""
    filesystem, root = fsspec.core.url_to_fs(store.path)
    blocks, total = {unit.block for unit in store.units(views)}, 0
    for name in {"argmax", "check", kind}:
        folder = f"{root}/{name}/c"
        for path, info in filesystem.find(folder, detail=True).items():
            block = path[len(folder) + 1 :].partition("/")[0]
            total += info["size"] if block.isdigit() and int(block) in blocks else 0
    return total


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest; equal manifests have equal bytes."""
    write_json(path, manifest, sort_keys=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        NotReady: there is none.
        PipelineError: it is damaged.
    """
    try:
        found = json.loads(path.read_bytes())
        if found == NOT_NEEDED:
            raise NotReady(
                f"{path}: no store is complete",
                found="a placeholder of dvc repro: no configured student is distilled",
                do=f"run: {_maker(path)}",
            )
        if not isinstance(found, dict) or MANIFEST.keys() - found.keys():
            raise ValueError(f"not an object with {', '.join(sorted(MANIFEST))}")
        for key, valid in MANIFEST.items():
            if not valid(found[key]):
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


MANIFEST: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: True,  # the store has its own, which is compared
    "fingerprint": lambda value: isinstance(value, str) and FINGERPRINT.fullmatch(value) is not None,
    "kind": lambda value: isinstance(value, str) and value in KINDS,
    "views": _is_count,
    "rows": _is_count,
    "units": lambda value: isinstance(value, dict),
}


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write figures about a complete store, for people, with a checksum."""
    write_json(path, summary | {"digest": fingerprint(summary)})


def read_summary(path: Path) -> dict[str, Any]:
    """Read what `write_summary` wrote.

    Raises:
        PipelineError: it is missing or damaged.
    """
    try:
        found = json.loads(path.read_bytes())
        if found.pop("digest") != fingerprint(found):
            raise ValueError("it does not match its checksum")
        return found
    except FileNotFoundError:
        raise PipelineError(f"{path}: missing", do=f"run: {_maker(path)}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise PipelineError(
            f"{path}: damaged", expected="figures of a store with their checksum", found=str(error),
            do=f"run: {_maker(path)}",
        ) from error  # fmt: skip


def publish(spec: StoreSpec, store: Store, teacher: str | None, verified: Collection[Unit] = ()) -> None:
    """Read a complete store back, then write its manifest and summary into the outputs.

    Args:
        teacher: `teacher_fingerprint` of the configuration; None: the store is fetched.
        verified: units that have been read already.

    Raises:
        PipelineError: a unit is damaged, so the disk does not return what was written.
    """
    start, rows = time.monotonic(), len(store.index)
    if bad := damaged_units(store, [unit for unit in store.units(spec.views) if unit not in verified], spec.kind):
        raise PipelineError(
            f"{store.path}: {count_of(len(bad), 'damaged unit')}, so the store is not published",
            found=bad[0][1].splitlines()[0],
            do=f"run: {spec.command}, which computes them again",
        )
    sweep_store(store.path)
    manifest = build_manifest(store, spec.views, spec.kind)
    size, agreement = kind_bytes(store, spec.views, spec.kind), _agreement(store, spec.views)
    summary = {
        "rows": rows, "views": spec.views, "kind": spec.kind, "bytes": size, "agreement_with_labels": agreement,
        FETCHED: spec.fetch, COMPUTED_WITH: teacher,
    }  # fmt: skip
    write_summary(spec.folder / "summary.json", summary)
    write_manifest(spec.folder / "manifest.json", manifest)  # last: with it the store counts as published
    agrees = "" if agreement is None else f"the teacher agrees with the label on {agreement:.1%} of the (mixed) views; "
    print(
        f"store complete: {rows:,} rows x {spec.views} views, {size_of(size)}; {agrees}verified in"
        f" {time.monotonic() - start:.1f} s"
    )


def require_fetched(spec: StoreSpec) -> None:
    """Refuse the store that outputs/ names if it was not fetched from where the configuration says.

    Raises:
        NotReady: it is from elsewhere, or was computed locally.
    """
    source = read_json_object(spec.folder / "summary.json").get(FETCHED, spec.fetch)  # earlier versions did not say
    if spec.fetch and source != spec.fetch:
        raise NotReady(
            f"{spec.folder / 'manifest.json'}: the store of another configuration", expected=f"one fetched from {spec.fetch}",
            found=f"one fetched from {source}" if source else "one computed locally", do=f"run: {spec.command}",
        )  # fmt: skip


def _agreement(store: Store, views: int) -> float | None:
    """Share of the labelled samples' views whose own label is the teacher's argmax; None if no sample has a label.

    Reads every unit, comparing checksums.
    """
    agree = 0
    for unit in store.units(views):
        agree += int((store.read_unit(unit) == store.index.rows(unit.shard)["label"]).sum())
    labelled = len(store.index) - store.index.unlabelled
    return agree / (labelled * views) if labelled else None


def _maker(path: Path) -> str:
    """The command that writes the manifest or summary at `path`."""
    return "pipeline teacher-logits" + " --for finetune" * path.parent.name.endswith("finetune")
