"""Plan the shards of train and val: their names, where they are stored and what they consist of.

Samples are shuffled by a seed, so every shard is a fair sample of its split, and spread evenly over the shards.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from pipeline.common.cores import available_cores
from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.streams import permutation, stream_key
from pipeline.common.wording import count_of, size_of
from pipeline.config.paths import local_work
from pipeline.config.schema import Config, Data
from pipeline.config.validation import fingerprint
from pipeline.shards.adjacent import read_class_names
from pipeline.shards.advice import report_padding
from pipeline.shards.containers import container_digests, unpacked
from pipeline.shards.contents import digest, file_digests
from pipeline.shards.conversion import FOLDER_FORMATS
from pipeline.shards.datasets import download
from pipeline.shards.finished import indexing_settings
from pipeline.shards.images import FORMATS
from pipeline.shards.index_file import UNLABELLED, ShardIndex
from pipeline.shards.indexing import index_shard, write_shard
from pipeline.shards.listing import Listing, count_by_extension, sample_keys
from pipeline.shards.patterns import expand
from pipeline.shards.samples import Labels
from pipeline.shards.sources import SPLITS, list_splits, load_sample

SHARD_SETTINGS = {"source", "seed", "shard_samples", "max_pixels", "exif_orientation"}
"""The fields of `Data` that the contents of written shards depend on."""

Task = Callable[[], ShardIndex]


@dataclass(frozen=True)
class ShardSet(ABC):
    """A split's shards, and where their index is stored."""

    data: Data
    split: str
    root: Path
    """Folder of the index in the work folder; of the shards too if the pipeline writes them."""
    location: str
    """Folder or URL of the shards."""
    names: list[str]
    classes: list[str]
    """Class names; empty if only the labels tell how many classes there are."""

    @property
    def written_here(self) -> bool:
        return self.location == str(self.root)

    @property
    def indexing_settings(self) -> str:
        """Identifies everything that indexing a shard depends on besides its bytes."""
        return indexing_settings(self.data.max_pixels, dataclasses.astuple(self.labels))

    @property
    def labels(self) -> Labels:
        """Where the class numbers are in the shards."""
        return Labels(self.data.label_key, self.data.unlabelled and self.split == "train")

    @abstractmethod
    def tasks(self, wanted: dict[str, bool]) -> AbstractContextManager[list[Task]]:
        """The tasks that make and index the wanted shards, by name, inside the block; true: overwrite one that exists."""

    def source_file(self, key: str) -> str:
        """The image that a sample was made from; empty if only its shard is known."""
        return ""

    def describe(self, refused: dict[str, str]) -> str:
        """Where a refused image is, and the reason."""
        where = self.source_file(refused["key"]) or f"{self.location}/{refused['shard']}: sample {refused['key']!r}"
        return f"{where} ({refused['reason']})"


@dataclass(frozen=True)
class WrittenShards(ShardSet):
    """Shards that the pipeline writes, from a folder of images or the digits."""

    listing: Listing
    digests: list[str]

    @contextmanager
    def tasks(self, wanted: dict[str, bool]) -> Iterator[list[Task]]:
        samples = self._samples()
        samples = {name: samples[n :: len(self.names)] for n, name in enumerate(self.names) if name in wanted}
        with ExitStack() as stack:
            if self.listing.container and samples:
                images = {sample[1] for each in samples.values() for sample in each}
                extents = stack.enter_context(unpacked(self.listing.container, images, self.root))
                samples = {name: [(s[0], extents[s[1]], *s[2:]) for s in each] for name, each in samples.items()}
            write = partial(_write_and_index, self.data, self.listing.root)
            yield [
                partial(write, self.root / name, self.labels, each, wanted[name])
                for name, each in samples.items()
            ]

    def _samples(self) -> list[tuple[str, str, str, int]]:
        """Key, name, digest and label of every sample, in random order."""
        keys, listing = sample_keys(self.listing.names), self.listing
        return [
            (keys[i], listing.names[i], self.digests[i], listing.labels[i])
            for i in permutation(stream_key(self.data.seed, "shards", self.split), len(listing.names))
        ]

    @cached_property
    def _names_by_key(self) -> dict[str, str]:
        return dict(zip(sample_keys(self.listing.names), self.listing.names, strict=True))

    def source_file(self, key: str) -> str:
        if self.listing.container:
            return f"{self.listing.root}: image {self._names_by_key[key]}"
        return str(self.listing.root / self._names_by_key[key]) if self.listing.signatures else ""


def _write_and_index(
    data: Data, root: Path, path: Path, labels: Labels, samples: list[tuple], overwrite: bool
) -> ShardIndex:
    if overwrite or not path.exists():
        images = ((key, *load_sample(data, root, name, expected), label) for key, name, expected, label in samples)
        write_shard(path, images)
    return index_shard(str(path.parent), path.name, data.max_pixels, FOLDER_FORMATS, labels)


@dataclass(frozen=True)
class ExistingShards(ShardSet):
    """Shards that someone else wrote; they may be read-only and at a URL."""

    def tasks(self, wanted: dict[str, bool]) -> AbstractContextManager[list[Task]]:
        settings = self.data.max_pixels, FORMATS, self.labels
        return nullcontext([partial(index_shard, self.location, name, *settings) for name in wanted])


def plan_splits(config: Config, dry_run: bool, quick: bool) -> Iterator[ShardSet]:
    """Yield the shards of train, then of val, and report about them; a dry run reads no image.

    Args:
        quick: trust the cached digests of images whose size and times have not changed.

    Raises:
        UsageError, PipelineError: no data, classes that differ, a split used twice; see also pipeline.shards.sources.
    """
    return _existing_shards(config) if config.data.source == "shards" else _written_shards(config, dry_run, quick)


def _written_shards(config: Config, dry_run: bool, quick: bool) -> Iterator[ShardSet]:
    data = config.data
    if data.download and not dry_run:
        download(data)
    listings = list_splits(data)
    _check_classes(data, listings)
    shared = len({listing.root.resolve() for listing in listings.values()}) == 1
    if data.source == "folder" and shared and not data.val_fraction:
        raise _same_split(data, str(listings["val"].root))
    digests: dict[str, list[str]] = {}
    for split, listing in listings.items():
        count = -(-len(listing.names) // data.shard_samples)
        size = f", {size_of(listing.bytes)}" if listing.signatures else ""
        summary = f"{split}: {count_of(len(listing.names), 'image')} of"
        summary += f" {count_of(len(listing.classes), 'class')} in {count_of(count, 'shard')}{size}"
        if unlabelled := listing.labels.count(UNLABELLED):
            summary += f", {unlabelled:,} of them unlabelled"
        if listing.ignored:
            print(f"{split}: left out, not read as images: {count_by_extension(listing.ignored)}")
        for text in listing.left_out:
            print(f"{split}: left out: {text}")
        if split == "train":
            report_padding(len(listing.names), count, config.recipe.group_size)
        if dry_run:
            print(summary)
            continue
        digests[split] = _digests(config, listing, f"{data.dataset} {split}".strip() if shared else "", quick)
        if split == "val":
            _warn_of_copies(listing.names, digests)
        # of this split alone, and of nothing that shards do not depend on
        identity = data.model_dump(include=SHARD_SETTINGS)
        content = [identity, split, listing.names, listing.labels, digest("".join(digests[split]).encode())]
        root = local_work(config.work) / "data" / fingerprint(content) / split
        print(f"{summary}: {root}")
        names = [f"{number:06d}.tar" for number in range(count)]
        yield WrittenShards(data, split, root, str(root), names, listing.classes, listing, digests[split])


def cache_file(config: Config, folder: Path, part: str = "") -> Path:
    """What is known of a folder's files, for `quick`; may be deleted at any time.

    Args:
        part: what of the folder, if it holds several data sets or splits.
    """
    of = [str(folder.absolute()), part] if part else str(folder.absolute())
    return local_work(config.work) / "data" / "seen" / f"{fingerprint(of)}.json"


def _digests(config: Config, listing: Listing, part: str, quick: bool) -> list[str]:
    """The digest of every image; empty ones for the digits, which never change."""
    if not listing.signatures:
        return [""] * len(listing.names)
    cache, threads = cache_file(config, listing.root, part), config.data.workers or available_cores()
    if listing.container:
        return container_digests(listing.container, listing.names, listing.signatures, cache, quick)
    return file_digests(listing.root, listing.names, listing.signatures, cache, quick, threads)


def _warn_of_copies(names: list[str], digests: dict[str, list[str]]) -> None:
    if copies := set(digests["val"]) & set(digests["train"]) - {""}:
        example = next(name for name, held in zip(names, digests["val"], strict=True) if held in copies)
        print(f"val: warning: {len(copies):,} of its images are training images too, byte for byte ({example})")


def _check_classes(data: Data, listings: dict[str, Listing]) -> None:
    train, val = (listings[split].classes for split in SPLITS)
    extra = sorted(set(val) - set(train))
    if extra or train != val:
        missing = sorted(set(train) - set(val))
        raise PipelineError(
            f"{data.val}: classes of validation",
            expected=f"the {len(train)} classes of {data.train}",
            found=f"not in training: {extra[:5]}" if extra else f"missing: {missing[:5]}",
            do="give both folders the same class folders",
        )


def _same_split(data: Data, found: str) -> UsageError:
    return UsageError(
        f"data.val: {data.val}",
        expected="images other than those of data.train: accuracy on training images says nothing about a model",
        found=f"{found} in both",
        do="name a separate folder or separate shards for validation",
    )


def _existing_shards(config: Config) -> Iterator[ShardSet]:
    train_paths: set[str] = set()
    class_names = read_class_names(config.data.class_names) if config.data.class_names else []
    for split in SPLITS:
        paths = _shard_paths(config.data, split)
        if split == "train":
            train_paths = set(paths)
        elif both := sorted(train_paths & set(paths)):
            raise _same_split(config.data, ", ".join(both[:5]))
        location, names = paths[0].rpartition("/")[0] or ".", [path.rpartition("/")[2] for path in paths]
        print(f"{split}: {count_of(len(paths), 'shard')} at {location}")
        shards = ExistingShards(config.data, split, Path(), location, names, class_names)
        identity = [paths, config.data.max_pixels]
        if shards.labels != Labels():
            identity.append(dataclasses.astuple(shards.labels))
        yield dataclasses.replace(shards, root=local_work(config.work) / "data" / fingerprint(identity) / split)


def _shard_paths(data: Data, split: str) -> list[str]:
    """The shards of a split: all in one folder, each once."""
    pattern = getattr(data, split)
    if not pattern:
        raise UsageError(
            f"data.{split}: empty",
            expected="a path or URL of tars, for example shards/train-{0000..0127}.tar",
            do=f"set data.{split} in params.yaml",
        )
    paths = expand(f"data.{split}", pattern)
    folders = {path.rpartition("/")[0] or "." for path in paths}
    if len(folders) > 1:
        raise UsageError(
            f"data.{split}: {pattern}",
            expected="shards of one folder",
            found=", ".join(sorted(folders)),
            do="move or link them into one folder",
        )
    names = [path.rpartition("/")[2] for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"data.{split}: {pattern}",
            expected="every shard once",
            found=f"twice: {', '.join(twice[:5])}",
            do="name each once",
        )
    return paths
