"""Images to WebDataset shards and their index.

Samples are shuffled by a seed, so every shard is a fair sample of the whole, and spread evenly.
A split's shards lie in `<work>/data/<fingerprint>/<split>/`, the fingerprint being of the settings and of all that
the split's images hold, so nothing is overwritten; `outputs/<name>/data/{train,val}/index.json` names them.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.common.cores import available_cores
from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.files import file_sha256, remove_partial_files
from pipeline.common.lock import kernel_lock
from pipeline.common.signals import exit_with_parent, raise_on_sigterm
from pipeline.common.streams import permutation, stream_key
from pipeline.config.paths import DATA_LOCK, index_path, local_work
from pipeline.config.schema import Config, Data
from pipeline.config.validation import fingerprint
from pipeline.shards.contents import digest, file_digests, recall, remember
from pipeline.shards.index import Index, ShardIndex
from pipeline.shards.indexing import index_shard, publish_index, shard_stamp, write_index, write_shard
from pipeline.shards.sources import Listing, expand, kinds, list_split, load_sample, sample_keys, split_folder

SPLITS = ("train", "val")
SHARDS_DEPEND_ON = {"source", "seed", "shard_samples", "max_pixels", "exif_orientation"}
WASTED, SORTED = 0.01, 0.2  # above which padding and shards sorted by class are warned of
REQUESTS = 8  # files asked about at a time


@dataclass(frozen=True)
class Part:
    """A split's shards, written here or another's, and where their index goes."""

    split: str
    root: Path
    """Of the index in the work folder; of the shards too if they are written here."""
    location: str
    """Of the shards."""
    names: list[str]
    classes: list[str]
    """Empty if labels alone tell how many there are."""
    files: Callable[[str], str]
    """Where the sample of a key came from, for messages; empty if its shard is all that is known."""
    jobs: Callable[[dict[str, bool]], list[tuple]]
    """Arguments of `work` for shards by name; true: one that is there is written again all the same."""
    work: Callable[[tuple], ShardIndex]

    @property
    def own(self) -> bool:
        return self.location == str(self.root)


def run(config: Config, dry_run: bool = False, quick: bool = False) -> None:
    """Write what is missing of both splits' shards, index them, publish the index.

    Args:
        quick: files whose size and times are those of the last time are taken for unchanged; without it
            every image and every shard is read.

    Raises:
        UsageError, PipelineError: see pipeline.shards.sources and pipeline.shards.index.
    """
    parts = _foreign_parts(config) if config.data.source == "shards" else _own_parts(config, dry_run, quick)
    classes: list[str] = []
    for part in parts:
        if not dry_run:
            with raise_on_sigterm():
                classes = _prepare(config, part, part.classes or classes, quick)


def _own_parts(config: Config, dry_run: bool, quick: bool) -> Iterator[Part]:
    listings = {split: list_split(config.data, split) for split in SPLITS}
    _check_classes(config.data, listings)
    if config.data.source == "folder" and len({split_folder(config.data, split).resolve() for split in SPLITS}) == 1:
        _same_split(config.data, str(split_folder(config.data, "val")))
    everything: dict[str, list[str]] = {}
    for split, listing in listings.items():
        count = -(-len(listing.names) // config.data.shard_samples)
        size = f", {sum(at[0] for at in listing.stamps) / 1e6:,.1f} MB" if listing.stamps else ""
        about = f"{split}: {len(listing.names):,} images of {len(listing.classes)} classes in {count} shards{size}"
        if listing.left_out:
            print(f"{split}: left out, no images that are read: {kinds(listing.left_out)}")
        if split == "train":
            _tell_padding(config, listing, count)
        if dry_run:
            print(about)
            continue
        held = everything[split] = _contents(config, split, listing, quick)
        if both := set(held) & set(everything["train"]) - {""} if split == "val" else ():
            twice = next(name for name, digest in zip(listing.names, held, strict=True) if digest in both)
            print(f"val: warning: {len(both):,} of its images are training images too, byte for byte ({twice})")
        # of this split alone, and of nothing that shards do not depend on
        identity = config.data.model_dump(include=SHARDS_DEPEND_ON)
        content = [identity, split, listing.names, listing.labels, digest("".join(held).encode())]
        root = local_work(config.work) / "data" / fingerprint(content) / split
        print(f"{about}: {root}")
        yield _own_part(config.data, split, listing, held, root, count)


def _contents(config: Config, split: str, listing: Listing, quick: bool) -> list[str]:
    """The digest of every image; of digits, which never change, an empty one."""
    if not listing.stamps:
        return [""] * len(listing.names)
    folder = split_folder(config.data, split)
    memory = _memory(config) / f"{fingerprint(str(folder.absolute()))}.json"
    return file_digests(folder, listing.names, listing.stamps, memory, quick, config.data.workers or available_cores())


def _memory(config: Config) -> Path:
    """Of what is remembered of files, to be quick; whatever it holds may be deleted."""
    return local_work(config.work) / "data" / "seen"


def _own_part(data: Data, split: str, listing: Listing, held: list[str], root: Path, count: int) -> Part:
    def jobs(wanted: dict[str, bool]) -> list[tuple]:
        order = permutation(stream_key(data.seed, "shards", split), len(listing.names))
        keys = sample_keys(listing.names)
        samples = [(keys[i], listing.names[i], held[i], listing.labels[i]) for i in order]
        return [
            (data, split, root / name, samples[number::count], wanted[name])
            for number, name in enumerate(names)
            if name in wanted
        ]

    @cache
    def names_of_keys() -> dict[str, str]:
        return dict(zip(sample_keys(listing.names), listing.names, strict=True))

    def file(key: str) -> str:
        return str(split_folder(data, split) / names_of_keys()[key]) if listing.stamps else ""

    names = [f"{number:06d}.tar" for number in range(count)]
    return Part(split, root, str(root), names, listing.classes, file, jobs, _write_and_index)


def _check_classes(data: Data, listings: dict[str, Listing]) -> None:
    train, val = (listings[split].classes for split in SPLITS)
    extra = sorted(set(val) - set(train))
    if extra or train != val:
        missing = sorted(set(train) - set(val))
        raise PipelineError(
            f"{data.val}: classes of validation",
            expected=f"the {len(train)} classes of {data.train}",
            found=f"not in training: {extra[:5]}" if extra else f"missing: {missing[:5]}",
            do="make both folders hold the same class folders",
        )


def _same_split(data: Data, found: str) -> None:
    raise UsageError(
        f"data.val: {data.val}",
        expected="other images than data.train: accuracy on those that it was trained on says nothing of a model",
        found=f"{found} in both",
        do="name a folder or shards of their own for validation",
    )


def _tell_padding(config: Config, listing: Listing, count: int) -> None:
    """What part of every forward are unused slots; a warning with a better size of the shards if there is one."""
    total, group = len(listing.names), config.recipe.group_size
    wasted = padding(total, count, group)
    print(f"train: groups of {group} samples: {wasted:.2%} of every forward are unused slots")
    best = min(range(max(1, count // 2), 2 * count + 1), key=lambda n: (padding(total, n, group), abs(n - count)))
    if wasted > WASTED and padding(total, best, group) < wasted / 2:
        size = -(-total // best)
        print(f"train: warning: data.shard_samples={size} would make that {padding(total, best, group):.2%}")


def padding(total: int, shards: int, group: int) -> float:
    """The part of the slots of all groups that no sample has, where samples are spread evenly over shards."""
    least, more = divmod(total, shards)
    groups = more * -(-(least + 1) // group) + (shards - more) * -(-least // group)
    return 1 - total / (groups * group)


def _write_and_index(job: tuple) -> ShardIndex:
    data, split, path, samples, again = job
    if again or not path.exists():
        images = ((key, *load_sample(data, split, name, held), label) for key, name, held, label in samples)
        write_shard(path, images)
    return index_shard(str(path.parent), path.name, data.max_pixels)


def _foreign_parts(config: Config) -> Iterator[Part]:
    """Shards that are there already; they may be read-only and at a URL."""
    train_paths: set[str] = set()
    for split in SPLITS:
        if not getattr(config.data, split):
            raise UsageError(
                f"data.{split}: empty",
                expected="a path or URL of tars, for example shards/train-{0000..0127}.tar",
                do=f"set data.{split} in params.yaml",
            )
        paths = expand(f"data.{split}", getattr(config.data, split))
        if split == "train":
            train_paths = set(paths)
        elif both := sorted(train_paths & set(paths)):
            _same_split(config.data, ", ".join(both[:5]))
        folders = {path.rpartition("/")[0] or "." for path in paths}
        if len(folders) > 1:
            raise UsageError(
                f"data.{split}: {getattr(config.data, split)}",
                expected="shards of one folder",
                found=", ".join(sorted(folders)),
                do="move or link them into one folder",
            )
        location = folders.pop()
        names = [path.rpartition("/")[2] for path in paths]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(
                f"data.{split}: {getattr(config.data, split)}",
                expected="every shard once",
                found=f"twice: {', '.join(twice[:5])}",
                do="name each once",
            )
        print(f"{split}: {len(paths)} shards at {location}")
        root = local_work(config.work) / "data" / fingerprint([paths, config.data.max_pixels]) / split
        yield Part(split, root, location, names, [], lambda key: "", _foreign_jobs(location, config.data), _index_one)


def _foreign_jobs(location: str, data: Data) -> Callable[[dict[str, bool]], list[tuple]]:
    return lambda wanted: [(location, name, data.max_pixels) for name in wanted]


def _index_one(job: tuple[str, str, int]) -> ShardIndex:
    return index_shard(*job)


def _prepare(config: Config, part: Part, classes: list[str], quick: bool) -> list[str]:
    """Make what is missing of a split, its index, and the copy of that in the outputs; returns the classes."""
    path = part.root / "index.json"
    memory = _memory(config) / f"{fingerprint(str(part.root.absolute()))}.json"
    now = _stamps(part)
    index = _whole_index(part, path)
    same = _unchanged(part, index, now, (recall(memory) or {}) if quick else {}) if index else set()
    if index is None or len(same) < len(part.names) or classes not in ([], index.classes):
        lock = local_work(config.work) / "data" / DATA_LOCK
        with kernel_lock(lock, f"{part.split}: waiting for another process, which prepares data there") as locked:
            if locked:
                remove_partial_files(part.root)
            _make(config.data, part, path, classes, index, same)
        index = Index(path)
    if kept := {name: at for name, at in now.items() if at is not None}:
        remember(memory, kept)
    _check_bad(config.data, index.refused, part)
    for bad in index.refused:
        print(f"{part.split}: refused {_named(bad, part)}")
    if part.split == "train" and not part.own:
        _tell_order(index, config.recipe.group_size)
    publish_index(index, index_path(config, part.split))
    return index.classes


def _tell_order(index: Index, group: int) -> None:
    """Warnings about another's shards: of sizes that groups do not fill, or sorted by class."""
    wasted = 1 - len(index) / (group * int((-(-index.samples // group)).sum()))
    print(f"train: groups of {group} samples: {wasted:.2%} of every forward are unused slots")
    if wasted > WASTED:
        print(f"train: warning: shards of a multiple of {group} samples, or a little less, would waste nothing")
    if (excess := sortedness(index)) > SORTED:
        print(
            f"train: warning: the shards seem to be sorted by class ({excess:.0%}): samples are mixed and trained on"
            " with others of their shard. Write them anew, shuffled: for example with data.source=folder"
        )


def sortedness(index: Index) -> float:
    """0 if two samples of a shard are of one class as seldom as any two; 1 if every shard holds one class."""
    labels, classes = index.labels(), len(index.classes)

    def alike(some: np.ndarray) -> float:
        """Pairs of one class, of all ordered pairs of different samples."""
        counts = np.bincount(some, minlength=classes)
        return float((counts * (counts - 1)).sum())

    pairs = float((index.samples * (index.samples - 1)).sum())
    anywhere = alike(labels) / max(len(labels) * (len(labels) - 1), 1)
    if not pairs or anywhere == 1:
        return 0.0
    ends = index.starts
    inside = sum(alike(labels[ends[n] : ends[n + 1]]) for n in range(len(index.names))) / pairs
    return (inside - anywhere) / (1 - anywhere)


def _whole_index(part: Part, path: Path) -> Index | None:
    try:
        index = Index(path)
        index.labels()
    except PipelineError:
        return None
    # an index is not to say where else to look
    location = part.location if "://" in part.location else os.path.abspath(part.location)
    there = (index.location, index.table) == (location, os.path.abspath(path.with_suffix(".npy")))
    return index if there and index.names == part.names else None


def _stamps(part: Part) -> dict[str, Any]:
    """Those of the shards that are there. Of another's, all must be."""

    def one(name: str) -> tuple[str, Any]:
        return name, shard_stamp(part.location, name)

    names = [name for name in part.names if not part.own or (part.root / name).exists()]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return dict(pool.map(one, names))


def _unchanged(part: Part, index: Index, now: dict[str, Any], remembered: dict[str, Any]) -> set[str]:
    """The shards that are as the index says: of a remembered stamp, or, for those written here, of its SHA-256."""

    def same(shard: dict[str, Any]) -> bool:
        name = shard["name"]
        if now.get(name) is not None and remembered.get(name) == now[name]:
            return True
        return part.own and name in now and file_sha256(part.root / name) == shard["sha256"]

    with ThreadPoolExecutor(REQUESTS) as pool:
        compared = tqdm(
            pool.map(same, index.shards), total=len(index.shards), desc=f"check {part.root}", unit="shard",
            leave=False, delay=1,
        )  # fmt: skip
        return {shard["name"] for shard, equal in zip(index.shards, compared, strict=True) if equal}


def _make(data: Data, part: Part, path: Path, classes: list[str], index: Index | None, same: set[str]) -> None:
    """Write and read what is not `same` as in the old index, and write the index."""
    if index is None or index.keyed_by_shard:  # whose keys are no longer those of the shards
        found: dict[str, ShardIndex] = {}
    else:
        found = {name: index.shard(number) for number, name in enumerate(index.names) if name in same}
    # one that an index names but that is not as it says is damaged
    wanted = {name: index is not None and name not in same for name in part.names if name not in found}
    with _executor(min(data.workers or available_cores(), len(wanted))) as map_jobs:
        made = map_jobs(part.work, part.jobs(wanted))
        for shard in tqdm(made, total=len(wanted), desc=f"{part.split} shards", unit="shard"):
            found[shard.name] = shard
            _check_bad(data, [bad for done in found.values() for bad in done.refused], part)
    shards = [found[name] for name in part.names]
    classes = classes or [str(n) for n in range(1 + max(shard.rows["label"].max(initial=-1) for shard in shards))]
    if alike := write_index(path, part.location, classes, shards, data.max_pixels):
        print(f"{part.split}: the key {alike}: every sample is named SHARD/KEY")


def _check_bad(data: Data, refused: list[dict[str, str]], part: Part) -> None:
    if len(refused) > data.max_bad:
        named = "; ".join(_named(bad, part) for bad in refused[:5])
        raise PipelineError(
            f"{part.split}: images that do not decode",
            expected=f"at most {data.max_bad} (data.max_bad)",
            found=f"{len(refused)}: {named}",
            do="remove or mend them, or raise data.max_bad: they are then named in index.json and left out",
        )


def _named(bad: dict[str, str], part: Part) -> str:
    where = part.files(bad["key"]) or f"{part.location}/{bad['shard']}: sample {bad['key']!r}"
    return f"{where} ({bad['reason']})"


@contextlib.contextmanager
def _executor(workers: int) -> Iterator[Callable[..., Any]]:
    """`map` in order over processes, or in this one where one is enough.

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
            "prepare: a worker process was ended from outside",
            found="most likely the system was out of memory",
            do=f"choose fewer than the {workers} processes of data.workers, then run: pipeline prepare; it goes on",
        ) from None
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
