"""Indexing that was interrupted goes on where it was, and shards that have not changed are not decoded again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import picture
from test_prepare import (  # noqa: F401
    ROOT,
    TRAIN,
    VAL,
    index_of,
    later,
    numbered_alike,
    reading_anything,
    samples,
    shards_config,
    write_shards,
    written,
)

from pipeline.config.params import dump
from pipeline.shards import build, finished, splits
from pipeline.shards.indexing import write_shard
from stages import prepare


@pytest.fixture
def theirs(in_tmp):
    """A configuration over three training shards and one for validation, not yet prepared."""
    write_shards(in_tmp / "in", [4, 3, 5])
    write_shards(in_tmp / "in", [3], "val")
    return shards_config(in_tmp)


def indexed(monkeypatch, stop_at: str = "") -> list[str]:
    """The names of the shards that are indexed from now on; before that of `stop_at` the indexing is interrupted."""
    names, index_shard = [], splits.index_shard

    def record(location, name, *arguments):
        if name == stop_at:
            raise KeyboardInterrupt
        names.append(name)
        return index_shard(location, name, *arguments)

    monkeypatch.setattr(splits, "index_shard", record)
    return names


def interrupt(config, monkeypatch, name: str) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        indexed(patch, name)
        prepare.run(config)


def from_scratch(folder: Path, config) -> str:
    """The fingerprint of the training index that is made where nothing is known."""
    prepare.run(config.model_copy(update={"name": "scratch", "work": str(folder / "scratch")}))
    return index_of(config.model_copy(update={"name": "scratch"})).fingerprint


def test_second_run_over_shards_of_others_decodes_nothing(theirs, monkeypatch):
    prepare.run(theirs)
    before = index_of(theirs).fingerprint
    monkeypatch.setattr(splits, "index_shard", reading_anything)
    prepare.run(theirs)
    assert index_of(theirs).fingerprint == before


def test_quick_run_over_shards_of_others_reads_nothing(theirs, later, monkeypatch):  # noqa: F811
    prepare.run(theirs)
    for module, name in ((splits, "index_shard"), (build, "shard_sha256")):
        monkeypatch.setattr(module, name, reading_anything)
    prepare.run(theirs, quick=True)


def test_flipped_bit_that_leaves_size_and_times_is_found_by_a_full_run(in_tmp, theirs, later, monkeypatch):  # noqa: F811
    prepare.run(theirs)
    path = in_tmp / "in" / "train-0001.tar"
    signatures, data = build.shard_signature(str(path.parent), path.name), bytearray(path.read_bytes())
    data[512] ^= 1  # the first label
    path.write_bytes(data)
    monkeypatch.setattr(
        build, "shard_signature",
        lambda location, name, get=build.shard_signature: signatures if name == path.name else get(location, name),
    )  # fmt: skip
    names = indexed(monkeypatch)
    prepare.run(theirs, quick=True)
    assert names == []
    before = index_of(theirs).fingerprint
    prepare.run(theirs)
    assert names == [path.name] and index_of(theirs).fingerprint != before


@pytest.mark.parametrize("quick", [False, True])
def test_interrupted_indexing_goes_on_with_the_shard_it_was_at(in_tmp, theirs, later, monkeypatch, quick):  # noqa: F811
    interrupt(theirs, monkeypatch, "train-0002.tar")
    names = indexed(monkeypatch)
    monkeypatch.setattr(build, "shard_sha256", reading_anything)
    prepare.run(theirs, quick=quick)
    assert names == ["train-0002.tar", "val-0000.tar"]
    assert not list(in_tmp.rglob("finished"))
    assert index_of(theirs).fingerprint == from_scratch(in_tmp, theirs)


def test_shards_too_new_for_their_times_to_tell_are_read_but_not_decoded_when_indexing_goes_on(theirs, monkeypatch):
    interrupt(theirs, monkeypatch, "train-0002.tar")
    names, read, sha256 = indexed(monkeypatch), [], build.shard_sha256
    monkeypatch.setattr(build, "shard_sha256", lambda *where: read.append(where[1]) or sha256(*where))
    prepare.run(theirs)
    assert (names, sorted(read)) == (["train-0002.tar", "val-0000.tar"], ["train-0000.tar", "train-0001.tar"])


def test_shard_that_changed_since_the_interruption_is_indexed_again(in_tmp, theirs, later, monkeypatch):  # noqa: F811
    interrupt(theirs, monkeypatch, "train-0002.tar")
    write_shard(in_tmp / "in" / "train-0000.tar", [("new", "png", picture(55), 1)])
    names = indexed(monkeypatch)
    prepare.run(theirs)
    assert names == ["train-0000.tar", "train-0002.tar", "val-0000.tar"]
    assert samples(index_of(theirs))[0] == ("new", picture(55), 1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "another version"])
def test_result_that_is_damaged_or_of_another_version_is_not_used(in_tmp, theirs, later, monkeypatch, damage):  # noqa: F811
    interrupt(theirs, monkeypatch, "train-0002.tar")
    (path,) = in_tmp.rglob("finished/train-0001.tar.json")
    data = bytearray(path.read_bytes())
    if damage == "another version":
        monkeypatch.setattr(finished, "INDEXING_VERSION", 0)
    elif damage == "cut":
        path.write_bytes(data[:-9])
    else:
        data[-40] ^= 1
        path.write_bytes(data)
    names = indexed(monkeypatch)
    prepare.run(theirs)
    expected = ["train-0000.tar"] * (damage == "another version") + ["train-0001.tar", "train-0002.tar", "val-0000.tar"]
    assert names == expected


def test_written_shards_are_not_decoded_again_when_indexing_goes_on(in_tmp, monkeypatch):
    config = written(in_tmp, TRAIN, VAL)
    interrupt(config, monkeypatch, "000002.tar")
    names = indexed(monkeypatch)
    prepare.run(config)
    assert names == ["000002.tar", "000000.tar"]  # the last is that of validation
    assert index_of(config).fingerprint == from_scratch(in_tmp, config)


def test_shard_damaged_since_the_interruption_is_written_again(in_tmp, monkeypatch):
    config = written(in_tmp, TRAIN, VAL)
    interrupt(config, monkeypatch, "000002.tar")
    (path,) = in_tmp.rglob("train/000001.tar")
    intact = path.read_bytes()
    path.write_bytes(intact[:600] + bytes([intact[600] ^ 1]) + intact[601:])
    prepare.run(config)
    assert path.read_bytes() == intact


@pytest.mark.parametrize("shared_keys", [False, True])
def test_index_after_a_change_is_that_of_an_indexing_from_scratch(in_tmp, monkeypatch, shared_keys):
    numbered_alike(in_tmp / "in", "train", range(3))
    numbered_alike(in_tmp / "in", "val", range(1))
    long = [("a-key-longer-than-those-of-the-others", "png", picture(5), 0)]
    write_shard(in_tmp / "in" / "train-0001.tar", long)
    if not shared_keys:
        write_shards(in_tmp / "in", [4, 3, 5])
        write_shard(in_tmp / "in" / "train-0001.tar", long)
    config = shards_config(in_tmp)
    prepare.run(config)
    write_shard(in_tmp / "in" / "train-0001.tar", [("short", "png", picture(6), 2)])
    names = indexed(monkeypatch)
    prepare.run(config)
    assert names == ["train-0001.tar"]
    assert index_of(config).keyed_by_shard == shared_keys
    assert index_of(config).fingerprint == from_scratch(in_tmp, config)


MARKED = """
import sys, time
from pipeline.config.params import load_config
from pipeline.shards import splits
from stages import prepare
index_shard = splits.index_shard
def marked(location, name, *arguments):
    with open("marks", "a") as file:
        file.write(name + "\\n")
    time.sleep(0.05)
    return index_shard(location, name, *arguments)
splits.index_shard = marked
prepare.run(load_config("params.yaml"))
"""


@pytest.mark.slow
def test_killed_indexing_reads_no_finished_shard_again(in_tmp):
    write_shards(in_tmp / "in", [4] * 30)
    write_shards(in_tmp / "in", [3], "val")
    config = shards_config(in_tmp, train="train-{0000..0029}.tar")
    Path("params.yaml").write_text(dump(config))
    Path("marks").touch()
    time.sleep(2.5)  # the shards' times are conclusive then
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for kill in (3, 20, None):
        done = {path.name.removesuffix(".json") for path in in_tmp.rglob("finished/train*.json")}
        before = Path("marks").read_text().split()
        process = subprocess.Popen([sys.executable, "-c", MARKED], env=environment)
        while kill is not None and len(Path("marks").read_text().split()) < kill and process.poll() is None:
            time.sleep(0.01)
        if kill is not None:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == (0 if kill is None else -signal.SIGKILL)
        begun = Path("marks").read_text().split()[len(before) :]
        assert not done & set(begun)
        assert kill is not None or len(done) > 15
    assert index_of(config).fingerprint == from_scratch(in_tmp, config)
