"""Images to WebDataset shards and their index.

Samples are shuffled by a seed, so every shard is a fair sample of the whole, and spread evenly.
The shards lie in `<work>/data/<fingerprint>/`, the fingerprint being of the settings and the listing
of files, so nothing is overwritten; `outputs/<name>/data/{train,val}/index.json` names them.
"""

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import webdataset
from tqdm import tqdm

from pipeline.config import Config, Data
from pipeline.errors import PipelineError, UsageError
from pipeline.files import file_sha256, replacing
from pipeline.layout import local_work
from pipeline.recipe import permutation, stream_key
from pipeline.shards import Index, ShardIndex, index_shard, write_index, write_shard
from pipeline.sources import Listing, list_split, load_sample, sample_keys
from pipeline.strict import fingerprint

SPLITS = ("train", "val")


def run(config: Config, dry_run: bool = False) -> None:
    """Write what is missing of both splits' shards, index them, publish the index.

    Raises:
        UsageError, PipelineError: see pipeline.sources and pipeline.shards.
    """
    if config.data.source == "shards":
        return _index_shards(config, dry_run)
    listings = {split: list_split(config.data, split) for split in SPLITS}
    _check_classes(config.data, listings)
    identity = config.data.model_dump(exclude={"workers", "train", "val"})
    content = {split: [listing.names, listing.labels, listing.sizes] for split, listing in listings.items()}
    root = local_work(config.work) / "data" / fingerprint([identity, content])
    for split, listing in listings.items():
        size = f", {sum(listing.sizes) / 1e6:,.1f} MB" if any(listing.sizes) else ""
        count = -(-len(listing.names) // config.data.shard_samples)
        print(
            f"{split}: {len(listing.names):,} images of {len(listing.classes)} classes"
            f" in {count} shards{size}: {root / split}"
        )
        if dry_run:
            continue
        names = [f"{number:06d}.tar" for number in range(count)]
        order = permutation(stream_key(config.data.seed, "shards", split), len(listing.names))
        keys = sample_keys(listing.names)
        samples = [(keys[i], listing.names[i], listing.labels[i]) for i in order]
        jobs = [
            (config.data, split, root / split / name, samples[number::count])
            for number, name in enumerate(names)
        ]
        _build(config, split, root / split, listing.classes, _write_and_index, jobs)


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


def _write_and_index(job: tuple) -> ShardIndex:
    data, split, path, samples = job
    if not path.exists():
        write_shard(path, ((key, *load_sample(data, split, name), label) for key, name, label in samples))
    return index_shard(str(path.parent), path.name)


def _index_shards(config: Config, dry_run: bool) -> None:
    """Index shards that are there already; they may be read-only and at a URL."""
    classes: list[str] = []
    for split in SPLITS:
        if not getattr(config.data, split):
            raise UsageError(
                f"data.{split}: empty",
                expected="a path or URL of tars, for example shards/train-{0000..0127}.tar",
                do=f"set data.{split} in params.yaml",
            )
        paths = webdataset.shardlists.expand_urls(getattr(config.data, split))
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
        print(f"{split}: {len(paths)} shards at {location}")
        if dry_run:
            continue
        root = local_work(config.work) / "data" / fingerprint([config.data.max_bad, paths]) / split
        jobs = [(location, name) for name in names]
        classes = _build(config, split, root, classes, _index_one, jobs, location)


def _index_one(job: tuple[str, str]) -> ShardIndex:
    return index_shard(*job)


def _build(config, split, root, classes, work, jobs, location=None) -> list[str]:
    """Run the jobs, write the index below `root`, copy index.json to the outputs."""
    path = root / "index.json"
    if not (location is None and path.exists() and _complete(path)):
        shards = []
        with _executor(min(config.data.workers, len(jobs))) as map_jobs:
            for shard in tqdm(map_jobs(work, jobs), total=len(jobs), desc=f"{split} shards", unit="shard"):
                shards.append(shard)
                _check_bad(config.data, [bad for done in shards for bad in done.refused], root)
        classes = classes or [str(n) for n in range(1 + max(s.rows["label"].max(initial=-1) for s in shards))]
        write_index(path, location or str(root), classes, shards)
    for bad in Index(path).refused:
        print(f"{split}: refused {bad['shard']} {bad['key']}: {bad['reason']}")
    published = Path("outputs") / config.name / "data" / split / "index.json"
    with replacing(published) as temporary:
        shutil.copyfile(path, temporary)
    return Index(path).classes


def _complete(path: Path) -> bool:
    """Whether an index and its shards are whole; a damaged shard is removed, to be written again."""
    try:
        index = Index(path)
        index.labels()
    except PipelineError:
        return False
    complete = True
    for shard in tqdm(index.shards, desc=f"check {path.parent}", unit="shard"):
        file = Path(index.location) / shard["name"]
        if not file.exists() or file_sha256(file) != shard["sha256"]:
            file.unlink(missing_ok=True)
            complete = False
    return complete


def _check_bad(data: Data, refused: list[dict[str, str]], root: Path) -> None:
    if len(refused) > data.max_bad:
        named = "; ".join(f"{bad['shard']} {bad['key']} ({bad['reason']})" for bad in refused[:5])
        raise PipelineError(
            f"{root}: images that do not decode",
            expected=f"at most {data.max_bad} (data.max_bad)",
            found=f"{len(refused)}: {named}",
            do="remove or mend them, or raise data.max_bad: they are then named in index.json and left out",
        )


class _executor:
    """`map` in order over processes, or in this one where one is enough."""

    def __init__(self, workers: int):
        self.pool = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")  # fork is unsafe once torch has threads
            self.pool = ProcessPoolExecutor(workers, mp_context=context)

    def __enter__(self):
        return self.pool.map if self.pool else map

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
