"""Local copies of shards at URLs: what is read, what is downloaded, what is deleted, and what may go wrong."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import full_disk, picture, small_config
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.cli import doctor, prune
from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.lock import kernel_lock
from pipeline.common.wording import size_of
from pipeline.config.params import dump
from pipeline.config.schema import Student
from pipeline.shards import cache as cache_module
from pipeline.shards.cache import ShardCache
from pipeline.shards.index import Index
from pipeline.shards.indexing import index_shard, write_index, write_shard
from pipeline.shards.published import check_cache, open_index
from pipeline.training.identity import configured_student

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Remote:
    """Three shards of five images in memory, at a URL; counts the requests of this process."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.files = root, MemoryFileSystem()
        self.location, self.copies = f"memory://{root.name}", root / "copies"
        self.images = [[picture(10 * shard + n) for n in range(5)] for shard in range(3)]
        shards = []
        for number, images in enumerate(self.images):
            path = root / "shards" / f"{number}.tar"
            write_shard(path, [(f"{number}_{n}", "png", data, n) for n, data in enumerate(images)])
            self.files.pipe_file(self.url(number), path.read_bytes())
            shards.append(index_shard(str(path.parent), path.name))
        self.size = shards[0].bytes
        assert {shard.bytes for shard in shards} == {self.size}
        write_index(root / "index.json", self.location, [*"01234"], shards)
        self.downloads, self.ranges = [], 0
        self._count(monkeypatch)
        monkeypatch.setattr(cache_module, "_warned", set())

    def _count(self, monkeypatch) -> None:
        get_file, cat_file = MemoryFileSystem.get_file, MemoryFileSystem.cat_file

        def count_download(files, path, *args, **kwargs):
            self.downloads.append(int(Path(path).stem))
            return get_file(files, path, *args, **kwargs)

        def count_range(*args, **kwargs):
            self.ranges += 1
            return cat_file(*args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, "get_file", count_download)
        monkeypatch.setattr(MemoryFileSystem, "cat_file", count_range)

    def url(self, shard: int) -> str:
        return f"{self.location}/{shard}.tar"

    def open(self, shards: float = 3) -> Index:
        """The index, with room for this many copies."""
        return Index(self.root / "index.json", ShardCache(self.copies, int(shards * self.size)))

    def held(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.copies.iterdir()}


@pytest.fixture
def remote(tmp_path, monkeypatch):
    made = Remote(tmp_path, monkeypatch)
    yield made
    made.files.rm(made.location, recursive=True)


def read_all(index: Index) -> list[list[bytes]]:
    return [[index.read(shard, n) for n in range(5)] for shard in range(3)]


def make_older(path: Path, seconds: float = 3600) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_every_shard_is_downloaded_once(remote):
    index = remote.open()
    for _ in range(2):
        assert read_all(index) == remote.images
    assert read_all(remote.open()) == remote.images
    assert (remote.downloads, remote.ranges) == ([0, 1, 2], 0)
    assert [*remote.held().values()] == [remote.size] * 3


def test_without_a_cache_every_image_is_a_request(remote):
    assert read_all(Index(remote.root / "index.json")) == remote.images
    assert (remote.downloads, remote.ranges) == ([], 15)


@pytest.mark.parametrize("failed", [False, True])
def test_without_copies_a_group_is_read_with_several_requests_at_a_time(remote, monkeypatch, failed):
    def cat_ranges(files, paths, starts, ends, batch_size):
        assert batch_size > 1
        found = [files.cat_file(*place) for place in zip(paths, starts, ends, strict=True)]
        return [*found[:-1], OSError("busy")] if failed else found

    monkeypatch.setattr(MemoryFileSystem, "async_impl", True)
    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", cat_ranges)
    index = remote.open(0.5)
    if failed:
        with pytest.raises(PipelineError, match="busy"):
            index.read_many(1, [4, 0, 2])
    else:
        assert index.read_many(1, [4, 0, 2]) == [remote.images[1][n] for n in (4, 0, 2)]


def test_shards_used_least_recently_are_deleted_first(remote):
    index = remote.open(2.5)
    index.read(0, 0), index.read(1, 0)
    for path in remote.copies.iterdir():
        make_older(path)
    index.read(0, 1)  # from now on 1 is the older one
    index.read(2, 0)
    assert len(remote.held()) == 2
    index.read(0, 2)
    assert remote.downloads == [0, 1, 2]
    index.read(1, 0)
    assert remote.downloads == [0, 1, 2, 1]


def test_shard_larger_than_the_limit_is_read_by_ranges(remote):
    assert read_all(remote.open(0.9)) == remote.images
    assert (remote.downloads, remote.ranges) == ([], 15)


def test_files_of_others_in_the_folder_are_left_alone(remote):
    remote.copies.mkdir()
    others = [remote.copies / name for name in ("train-0000.tar", "x.partial", f"{'0' * 32}.tar.gz")]
    for path in others:
        path.write_bytes(bytes(3 * remote.size))
        make_older(path)
    assert read_all(remote.open(1)) == remote.images
    assert remote.downloads == [0, 1, 2]
    assert all(path.stat().st_size == 3 * remote.size for path in others)


def test_failed_download_is_tried_again_later(remote, monkeypatch, capsys):
    index = remote.open()
    with monkeypatch.context() as busy:
        busy.setattr(MemoryFileSystem, "get_file", lambda *_: (_ for _ in ()).throw(OSError("busy")))
        assert index.read(0, 0) == remote.images[0][0]
    assert "busy" in capsys.readouterr().err
    assert index.read(0, 1) == remote.images[0][1]
    assert (remote.downloads, remote.ranges) == ([], 2)
    monkeypatch.setattr(cache_module, "RETRY_SECONDS", 0.0)
    assert index.read(0, 2) == remote.images[0][2]
    assert (remote.downloads, remote.ranges) == ([0], 2)


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_damaged_copy_is_replaced(remote, damage, capsys):
    index = remote.open()
    index.read(0, 0)
    (copy,) = remote.copies.iterdir()
    data = copy.read_bytes()
    copy.write_bytes(data[:-1] if damage == "cut" else bytes(len(data)))
    assert index.read(0, 0) == remote.images[0][0]
    assert remote.downloads == [0, 0] and remote.ranges == 0
    assert copy.read_bytes() == data
    assert ("damaged copy" in capsys.readouterr().err) == (damage == "altered")


@pytest.mark.parametrize("change", [lambda data: data[:-512], lambda data: data[:-1] + b"x"], ids=["cut", "altered"])
def test_shard_that_is_not_the_indexed_one_is_not_copied(remote, change, capsys):
    remote.files.pipe_file(remote.url(1), change(remote.files.cat_file(remote.url(1))))
    index, remote.ranges = remote.open(), 0
    assert [index.read(1, n) for n in range(5)] == remote.images[1]  # their bytes are as indexed
    assert (remote.downloads, remote.ranges) == ([1], 5)
    assert remote.held() == {}
    warning = capsys.readouterr().err
    assert warning.count("warning:") == 1 and remote.url(1) in warning and "replaced" in warning


def test_damaged_sample_at_the_url_is_refused(remote):
    data = bytearray(remote.files.cat_file(remote.url(1)))
    index = remote.open()
    data[int(index.rows(1)["offset"][2]) + 20] ^= 1
    remote.files.pipe_file(remote.url(1), bytes(data))
    assert index.read(1, 1) == remote.images[1][1]
    with pytest.raises(PipelineError, match=f"{remote.url(1)}: sample '1_2'"):
        index.read(1, 2)


def test_full_disk_is_reported_once_and_images_are_read_by_ranges(remote, capsys):
    index = remote.open()
    with full_disk():
        assert read_all(index) == remote.images
    assert remote.ranges == 15 and remote.held() == {}
    assert capsys.readouterr().err.count("no local copy") == 1


def test_disk_without_room_is_left_alone(remote, monkeypatch, capsys):
    full = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    assert read_all(remote.open()) == remote.images
    assert (remote.downloads, remote.ranges) == ([], 15)
    assert "0.00 GB free" in capsys.readouterr().err


def test_folder_that_cannot_be_made_is_reported_once(remote, capsys):
    remote.copies.write_text("a file")
    assert read_all(remote.open()) == remote.images
    assert remote.ranges == 15 and capsys.readouterr().err.count("warning:") == 1


def _die_in_download(index: Index, monkeypatch) -> None:
    def write_some(files, path, target):
        Path(target).write_bytes(b"some")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(MemoryFileSystem, "get_file", write_some)
    index.read(0, 0)


def test_killed_download_leaves_nothing_that_looks_complete(remote, monkeypatch):
    with monkeypatch.context() as inside:
        process = FORK.Process(target=_die_in_download, args=(remote.open(), inside))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = remote.held()
    assert left.endswith(".partial")
    assert remote.open().read(0, 0) == remote.images[0][0]
    assert [*remote.held().values()] == [remote.size]


def test_partial_file_of_a_killed_process_makes_room_but_no_other(remote):
    remote.copies.mkdir()
    partial = remote.copies / f"{'0' * 32}.{remote.size}.partial"
    partial.touch()
    make_older(partial)
    with kernel_lock(partial):
        make_older(partial)
        assert remote.open(1).read(0, 0) == remote.images[0][0]
        assert (remote.downloads, remote.ranges) == ([], 1)
    make_older(partial)
    assert remote.open(1).read(0, 0) == remote.images[0][0]
    assert remote.downloads == [0] and not partial.exists()


def _read_often(index: Index, expected: list[list[bytes]], seed: int) -> None:
    for number in range(40):
        shard, position = (seed + number) % 3, number % 5
        assert index.read(shard, position) == expected[shard][position]


@pytest.mark.parametrize("room", [1, 2, 3])
def test_processes_share_copies_that_are_deleted_all_the_time(remote, room):
    processes = [FORK.Process(target=_read_often, args=(remote.open(room), remote.images, n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sum(remote.held().values()) <= room * remote.size
    assert all(name.endswith(".tar") for name in remote.held())


@pytest.mark.parametrize(("room", "open_shards", "words", "copied"), [
    (3, 3, "", True), (2.9, 3, "no local copies", False), (2.9, 2, "several times", True), (2, 1, "", True),
    (1.9, 1, "several times", True), (0.9, 1, "no local copies", False),
])  # fmt: skip
def test_cache_that_is_too_small_for_the_plan_is_named(remote, room, open_shards, words, copied, capsys):
    index = remote.open(room)
    check_cache(index, open_shards)
    note = capsys.readouterr().out
    assert words in note and bool(words) == bool(note)
    assert (index.files.cache is not None) == copied


@pytest.mark.parametrize(("location", "copied"), [
    ("s3://bucket/x", True), ("https://host/x", True), ("file:///x", False), ("/x", False), ("simplecache::s3://b", False),
])  # fmt: skip
def test_only_shards_at_a_url_are_copied(remote, location, copied):
    write_index(remote.root / "other.json", location, [*"01234"], [index_shard(str(remote.root / "shards"), "0.tar")])
    index = Index(remote.root / "other.json", ShardCache(remote.copies, 1))
    assert (index.files.cache is not None) == copied


@pytest.fixture
def published(remote, monkeypatch):
    """The remote shards as the training data of small_config, in the current folder."""
    monkeypatch.chdir(remote.root)
    (remote.root / "outputs/small/data").mkdir(parents=True)
    os.symlink(remote.root, "outputs/small/data/train")
    return remote


def test_prune_names_the_folder_of_copies_and_leaves_it(published, capsys):
    config = small_config(published.root, work="work")
    Path("params.yaml").write_text(dump(config))
    open_index(config, "train").read(0, 0)
    prune.run([Path("params.yaml")], "work", delete=True)
    assert f"work/cache: {size_of(published.size)}" in capsys.readouterr().out
    assert len(list(Path("work/cache").glob("*.tar"))) == 1


@pytest.mark.parametrize(("data", "expected"), [({}, 3), ({"cache_gb": 0.0}, 0)])
def test_doctor_counts_the_room_that_copies_take(published, data, expected):
    config = small_config(published.root, data=data, student__distillation="none")
    assert doctor.needed_bytes(config) == expected * published.size


def test_configured_cache_is_used_and_changes_no_identity(published, capsys):
    remote = published
    default, own, none, tiny = (
        small_config(remote.root, data=data) for data in ({}, {"cache": "mine"}, {"cache_gb": 0.0}, {"cache_gb": 1e-6})
    )
    indices = [open_index(config, "train") for config in (default, own, none)]
    assert [index.files.cache and index.files.cache.folder for index in indices] == [
        remote.root / "work/cache", remote.root / "mine", None,
    ]  # fmt: skip
    assert capsys.readouterr().out == ""
    open_index(tiny, "train")
    assert "3 of 3 shards" in capsys.readouterr().out
    identities = [configured_student(config, Student(), "0" * 32) for config in (default, own, none)]
    assert identities[0] == identities[1] == identities[2]


@pytest.mark.parametrize("data", [{"cache": "s3://bucket"}, {"cache": ""}, {"cache_gb": -1.0}])
def test_settings_that_make_no_sense_are_refused(remote, data):
    with pytest.raises(UsageError, match=r"data\.cache"):
        small_config(remote.root, data=data)
