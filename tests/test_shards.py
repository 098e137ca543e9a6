"""Shards: what is written is what is read, by us and by webdataset; damage of any kind is found."""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import timm
import webdataset
from conftest import full_disk, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.common.errors import PipelineError
from pipeline.common.files import atomic_write
from pipeline.config.validation import fingerprint
from pipeline.shards.images import Undecodable, decode, decode_trusted
from pipeline.shards.index import Index
from pipeline.shards.index_file import MAX_CLASSES, samples_fingerprint
from pipeline.shards.indexing import index_shard, shard_signature, write_index, write_shard
from pipeline.shards.patterns import expand
from pipeline.shards.tar import Tar

property_settings = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example replaces the file of the last
)

# webdataset leaves the shards it has read to the garbage collector
leaky = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

PICTURES = [(kind, picture(i, kind, 3 + i, 9 - i)) for i, kind in enumerate(["jpg", "png", "webp", "jpeg"])]

keys = st.lists(st.text("abcXYZ019_-", min_size=1, max_size=60), min_size=1, max_size=4).map("/".join)
sample_lists = st.lists(
    st.tuples(keys, st.sampled_from(PICTURES), st.integers(0, MAX_CLASSES - 1)),
    max_size=12,
    unique_by=lambda sample: sample[0],
).map(lambda samples: [(key, *image, label) for key, image, label in samples])

FEW = [
    ("a/0", "png", picture(0), 2),
    ("a/1", "jpg", picture(1, "jpg"), 0),
    ("b/2", "webp", picture(2, "webp"), 1),
]


def indexed(folder: Path, samples=FEW, name="000000.tar", location=None) -> Index:
    """An index of one shard with the samples, in `folder`."""
    write_shard(folder / name, samples)
    shard = index_shard(str(folder), name)
    write_index(folder / "index.json", location or str(folder), ["0", "1", "2"], [shard])
    return Index(folder / "index.json")


def contents(index: Index) -> list[tuple]:
    return [
        (row["key"].decode(), index.read(shard, position), int(row["label"]))
        for shard in range(len(index.names))
        for position, row in enumerate(index.rows(shard))
    ]


def tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    """A tar by other hands."""
    with tarfile.open(path, "w", **options) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def refusal(call, *arguments) -> str:
    with pytest.raises(PipelineError) as caught:
        call(*arguments)
    return str(caught.value)


# round trip


@property_settings
@given(sample_lists.filter(bool))
def test_every_sample_is_read_as_it_was_written(tmp_path, samples):
    write_shard(tmp_path / "s.tar", samples)
    shard = index_shard(str(tmp_path), "s.tar")
    write_index(tmp_path / "index.json", str(tmp_path), [""] * MAX_CLASSES, [shard])
    index = Index(tmp_path / "index.json")
    assert contents(index) == [(key, image, label) for key, _, image, label in samples]
    assert index.labels().tolist() == [label for *_, label in samples]


@property_settings
@given(sample_lists)
def test_same_samples_make_the_same_bytes(tmp_path, samples):
    write_shard(tmp_path / "one.tar", samples)
    write_shard(tmp_path / "other.tar", iter(samples))
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "other.tar").read_bytes()


@leaky
@property_settings
@given(sample_lists)
def test_webdataset_reads_the_same_samples(tmp_path, samples):
    write_shard(tmp_path / "s.tar", samples)
    # an empty shard is an error to webdataset unless told otherwise
    read = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False, empty_check=False))
    assert [(s["__key__"], next(s[t] for t in s if t in dict(PICTURES)), int(s["cls"])) for s in read] == [
        (key, image, label) for key, _, image, label in samples
    ]


@leaky
def test_timm_s_webdataset_reader_reads_the_same_samples(small_set):
    _, index = small_set
    shards = f"{{000000..{len(index.names) - 1:06d}}}.tar|{len(index)}"
    read = list(timm.data.create_dataset("wds/ours", root=index.location, split=shards))
    expected = [index.image(*index.locate(row)) for row in range(len(index))]
    assert [label for _, label in read] == index.labels().tolist()
    assert all(np.array_equal(np.asarray(image), pixels) for (image, _), pixels in zip(read, expected, strict=True))


def test_samples_of_several_shards_are_read_by_shard_and_position(tmp_path):
    lots = [
        [(f"{number}-{i}", "png", picture(10 * number + i), i) for i in range(count)]
        for number, count in enumerate((3, 1, 2))
    ]
    shards = []
    for number, samples in enumerate(lots):
        write_shard(tmp_path / f"{number}.tar", samples)
        shards.append(index_shard(str(tmp_path), f"{number}.tar"))
    write_index(tmp_path / "index.json", str(tmp_path), ["0", "1", "2"], shards)
    index = Index(tmp_path / "index.json")
    assert contents(index) == [(key, image, label) for lot in lots for key, _, image, label in lot]
    assert (len(index), index.starts.tolist()) == (6, [0, 3, 4, 6])


def test_image_is_the_decoded_one(tmp_path):
    assert np.array_equal(indexed(tmp_path).image(0, 1), decode(FEW[1][2]))


def test_index_goes_to_another_process_and_reads_there(tmp_path):
    index = indexed(tmp_path)
    before = contents(index)
    assert contents(pickle.loads(pickle.dumps(index))) == before


def test_pickled_index_does_not_grow_with_what_was_read(tmp_path):
    index = indexed(tmp_path)
    fresh = len(pickle.dumps(Index(tmp_path / "index.json")))
    contents(index)
    assert len(pickle.dumps(index)) <= fresh + 200


def test_index_may_lie_elsewhere_than_its_read_only_shards(tmp_path):
    shards, elsewhere = tmp_path / "shards", tmp_path / "elsewhere"
    write_shard(shards / "s.tar", FEW)
    shards.chmod(0o500)
    try:
        shard = index_shard(str(shards), "s.tar")
        write_index(elsewhere / "index.json", str(shards), ["0", "1", "2"], [shard])
        assert len(contents(Index(elsewhere / "index.json"))) == 3
        assert os.listdir(shards) == ["s.tar"]
    finally:
        shards.chmod(0o700)


@pytest.mark.parametrize("scheme", ["file://", "memory://"])
def test_shards_at_a_url_are_indexed_and_read(tmp_path, scheme):
    import fsspec

    local = indexed(tmp_path)
    location = f"{scheme}{tmp_path}/remote"
    (tmp_path / "remote").mkdir()
    with fsspec.open(f"{location}/000000.tar", "wb") as file:
        file.write((tmp_path / "000000.tar").read_bytes())
    write_index(tmp_path / "at-url.json", location, ["0", "1", "2"], [index_shard(location, "000000.tar")])
    remote = Index(tmp_path / "at-url.json")
    assert contents(remote) == contents(local)
    assert remote.fingerprint == local.fingerprint


def test_fingerprint_says_nothing_of_where_things_lie(tmp_path):
    assert indexed(tmp_path / "here").fingerprint == indexed(tmp_path / "there").fingerprint


@pytest.mark.parametrize(
    "other",
    [
        [("a/9", *FEW[0][1:]), *FEW[1:]],
        [(*FEW[0][:3], 1), *FEW[1:]],
        [("a/0", "png", picture(9), 2), *FEW[1:]],
        FEW[::-1],
        FEW[:2],
    ],
    ids=["key", "label", "image", "order", "fewer"],
)
def test_fingerprint_changes_with_what_the_data_is(tmp_path, other):
    assert indexed(tmp_path / "a").fingerprint != indexed(tmp_path / "b", other).fingerprint


# shards by other hands

FOREIGN = [
    ("./train/n01/x_1.jpg", picture(1, "jpg")),
    ("./train/n01/x_1.cls", b"1\n"),
    ("./train/n01/x_1.json", b"{}"),
    ("./train/n02/x_1.JSON", b"{}"),
    ("./train/n02/x_1.CLS", b" 2 "),
    ("./train/n02/x_1.PNG", picture(2)),
]


@leaky
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_by_other_hands_is_indexed(tmp_path, form):
    long = "./train/" + 150 * "y"
    more = [(f"{long}.png", picture(3)), (f"{long}.cls", b"0")] if form != tarfile.USTAR_FORMAT else []
    tar(tmp_path / "s.tar", FOREIGN + more, format=form)
    shard = index_shard(str(tmp_path), "s.tar")
    write_index(tmp_path / "index.json", str(tmp_path), ["0", "1", "2"], [shard])
    found = contents(Index(tmp_path / "index.json"))
    theirs = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False))
    images = [(sample["__key__"], sample.get("jpg") or sample["png"]) for sample in theirs]
    assert [(key, image) for key, image, _ in found] == images
    assert [label for *_, label in found] == [1, 2, 0][: len(found)]


def test_folders_in_a_tar_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as file:
        for name in ("train", "train/n01"):
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            file.addfile(folder)
        for name, data in FOREIGN[:2]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    assert len(index_shard(str(tmp_path), "s.tar").rows) == 1


def test_folder_at_the_end_of_a_tar_is_no_damage(tmp_path):
    tar(tmp_path / "s.tar", FOREIGN)
    with tarfile.open(tmp_path / "s.tar", "a") as file:
        folder = tarfile.TarInfo("train/empty")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
    assert len(index_shard(str(tmp_path), "s.tar").rows) == 2


def test_pickle_in_a_shard_is_never_opened(tmp_path):
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR."
    tar(tmp_path / "s.tar", [*FOREIGN, ("./train/n02/x_1.pyd", bomb), ("./train/n02/x_1.pickle", bomb)])
    index_shard(str(tmp_path), "s.tar")
    assert not (tmp_path / "opened").exists()


# samples that are refused


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.png", FEW[0][2])], "'a'"),
        ([("a.cls", b"1")], "'a'"),
        ([("a.png", FEW[0][2]), ("a.cls", b"")], "None"),
        ([("a.png", FEW[0][2]), ("a.cls", b"cat")], "None"),
        ([("a.png", FEW[0][2]), ("a.cls", b"-1")], "class -1"),
        ([("a.png", FEW[0][2]), ("a.cls", b"1.5")], "None"),
        ([("a.png", FEW[0][2]), ("a.cls", str(MAX_CLASSES).encode())], "None"),
        ([("a.png", FEW[0][2]), ("a.cls", b"9" * 5000)], "None"),
        ([("a.png", FEW[0][2]), ("a.jpg", FEW[1][2]), ("a.cls", b"1")], "'jpg', 'png'"),
        ([(f"{key}.{t}", d) for key in "aba" for t, d in (("png", FEW[0][2]), ("cls", b"1"))], "duplicate key"),
        ([(f"{key}.{t}", d) for key in "aa" for t, d in (("png", FEW[0][2]), ("cls", b"1"))], "'a'"),
        ([("a.png", FEW[0][2]), ("a.cls", b"1"), ("a.png", FEW[0][2])], "'a'"),
    ],
    ids=[
        "no label", "no image", "empty label", "word", "negative", "fraction", "65535", "5,000 digits",
        "two images", "key twice", "key twice in a row", "image twice",
    ],
)  # fmt: skip
def test_sample_that_is_not_one_image_and_one_class_is_refused_by_name(tmp_path, members, expected):
    message = refusal(index_shard, str(tar(tmp_path / "s.tar", members).parent), "s.tar")
    assert f"{tmp_path}/s.tar" in message and "'a'" in message and expected in message


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "empty"),
        (b"no image", "no image of the formats"),
        (FEW[1][2][:-200], "truncated"),
        (FEW[0][2][:-30], "truncated"),
    ],
)
def test_image_that_does_not_decode_is_named_with_its_reason_and_has_no_row(tmp_path, image, reason):
    index = indexed(tmp_path, [FEW[0], ("bad", "jpg", image, 1), FEW[2]])
    assert [key for key, *_ in contents(index)] == ["a/0", "b/2"]
    assert index.refused[0] | {"reason": ""} == {"shard": "000000.tar", "key": "bad", "reason": ""}
    assert reason in index.refused[0]["reason"].lower()


def test_label_beyond_the_classes_is_refused(tmp_path):
    write_shard(tmp_path / "s.tar", [*FEW, ("far", "png", picture(5), 3)])
    shard = index_shard(str(tmp_path), "s.tar")
    message = refusal(write_index, tmp_path / "index.json", str(tmp_path), ["0", "1", "2"], [shard])
    assert "'far'" in message and "below 3" in message
    assert not (tmp_path / "index.json").exists()


def test_index_without_a_sample_is_refused(tmp_path):
    write_shard(tmp_path / "s.tar", [])
    shard = index_shard(str(tmp_path), "s.tar")
    assert "no sample" in refusal(write_index, tmp_path / "index.json", str(tmp_path), ["0"], [shard])


# damage


def image_bytes(index: Index) -> np.ndarray:
    """Which bytes of the only shard are an image's."""
    inside = np.zeros(index.shards[0]["bytes"], bool)
    for row in index.rows(0):
        inside[row["offset"] : row["offset"] + row["size"]] = True
    return inside


def test_bit_flipped_in_an_image_is_found_when_it_is_read(tmp_path):
    index = indexed(tmp_path)
    path, whole = tmp_path / "000000.tar", (tmp_path / "000000.tar").read_bytes()
    places = np.flatnonzero(image_bytes(index))
    assert len(places) > 1000
    with open(path, "r+b", buffering=0) as file:
        for place in places.tolist():
            os.pwrite(file.fileno(), bytes([whole[place] ^ 1 << place % 8]), place)
            number = int(np.searchsorted(index.rows(0)["offset"], place, side="right")) - 1
            key = index.rows(0)["key"][number].decode()
            with pytest.raises(PipelineError, match=f"000000.tar: sample '{key}'"):
                index.read(0, number)
            os.pwrite(file.fileno(), whole[place : place + 1], place)
    assert len(contents(index)) == 3


def test_bit_flipped_outside_the_images_makes_indexing_fail_or_changes_no_sample(tmp_path):
    index = indexed(tmp_path, FEW[:2])
    path, whole = tmp_path / "000000.tar", (tmp_path / "000000.tar").read_bytes()
    rows = index.rows(0).tolist()
    labels = [whole.index(b"a/%d.cls" % i) + 512 for i in range(2)]  # a digit that becomes another is a label
    raised = 0
    for place in sorted(set(np.flatnonzero(~image_bytes(index)).tolist()[::9]) - set(labels)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert index_shard(str(tmp_path), "000000.tar").rows.tolist() == rows, place
        except PipelineError as error:
            assert "000000.tar" in str(error)
            raised += 1
    assert raised > 300


def test_any_bit_flipped_before_indexing_changes_the_fingerprint_or_is_refused(tmp_path):
    whole = indexed(tmp_path)
    path, data = tmp_path / "000000.tar", (tmp_path / "000000.tar").read_bytes()
    for place in range(0, len(data), 61):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            shard = index_shard(str(tmp_path), "000000.tar")
        except PipelineError:
            continue
        assert shard.sha256 != whole.shards[0]["sha256"]


def cuts(path: Path, rows: list) -> list[int]:
    """Lengths that a tar can be cut to without a complaint; each must give all rows."""
    whole = path.read_bytes()
    quiet = []
    for length in range(len(whole) - 1, -1, -1):
        os.truncate(path, length)
        try:
            found = index_shard(str(path.parent), path.name).rows.tolist()
        except PipelineError as error:
            assert path.name in str(error)
            continue
        assert found == rows, f"cut to {length} of {len(whole)} bytes"
        quiet.append(length)
    return quiet


def test_cut_at_any_length_is_found_unless_only_final_zeros_are_gone(tmp_path):
    write_shard(tmp_path / "s.tar", FEW[:2])
    rows = index_shard(str(tmp_path), "s.tar").rows.tolist()
    end = len((tmp_path / "s.tar").read_bytes().rstrip(b"\0"))
    os.truncate(tmp_path / "s.tar", end // 512 * 512 + 512 + 1024 + 600)  # the least end, and a little more
    quiet = cuts(tmp_path / "s.tar", rows)
    assert quiet and min(quiet) >= end + 1024


def test_cut_after_an_image_that_ends_with_zeros_is_found(tmp_path):
    padded = picture(1) + bytes(2000)
    members = [(f"{key}.{kind}", data) for key in "ab" for kind, data in (("cls", b"1"), ("png", padded))]
    tar(tmp_path / "s.tar", members)
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: whole.index(b"b.cls")])
    assert "s.tar" in refusal(index_shard, str(tmp_path), "s.tar")


@pytest.mark.parametrize("data", [b"", bytes(512), b"no tar", b"\x1f\x8b" + bytes(600)])
def test_file_that_is_no_tar_is_refused(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data)
    assert f"{tmp_path}/s.tar" in refusal(index_shard, str(tmp_path), "s.tar")


def test_missing_shard_is_named_when_it_is_indexed(tmp_path):
    assert f"{tmp_path}/none.tar" in refusal(index_shard, str(tmp_path), "none.tar")


def test_missing_shard_is_named_when_it_is_read(tmp_path):
    index = indexed(tmp_path)
    (tmp_path / "000000.tar").unlink()
    message = refusal(index.read, 0, 0)
    assert f"{tmp_path}/000000.tar" in message and "do:" in message


def test_shard_that_was_cut_after_indexing_is_named_when_it_is_read(tmp_path):
    index = indexed(tmp_path)
    os.truncate(tmp_path / "000000.tar", 600)
    assert f"{tmp_path}/000000.tar" in refusal(index.read, 0, 0)


class ClientError(Exception):
    """As some clients of servers raise: not an OSError."""

    __module__ = "gcsfs.retry"


@pytest.mark.parametrize(("method", "call"), [
    ("_open", lambda index: index_shard("memory://shards", "000000.tar")),
    ("info", lambda index: shard_signature("memory://shards", "000000.tar")),
    ("cat_file", lambda index: index.read(0, 0)),
    ("glob", lambda index: expand("data.train", "memory://shards/*.tar")),
], ids=["index", "signature", "read", "list"])  # fmt: skip
def test_error_of_a_server_s_client_is_reported_plainly(tmp_path, monkeypatch, method, call):
    from fsspec.implementations.memory import MemoryFileSystem

    indexed(tmp_path)
    shard = index_shard(str(tmp_path), "000000.tar")
    MemoryFileSystem().pipe_file("/shards/000000.tar", (tmp_path / "000000.tar").read_bytes())
    write_index(tmp_path / "at-url.json", "memory://shards", ["0", "1", "2"], [shard])
    index = Index(tmp_path / "at-url.json")

    def busy(*_, **__):
        raise ClientError("429: too many requests")

    monkeypatch.setattr(MemoryFileSystem, method, busy)
    assert "memory://shards" in (message := refusal(call, index)) and "429: too many requests" in message


def test_missing_index_says_what_to_run(tmp_path):
    message = refusal(Index, tmp_path / "index.json")
    assert f"{tmp_path}/index.json" in message and "pipeline prepare" in message


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "3", '"text"', "\x00", '{"format": 1}'])
def test_file_that_is_no_index_is_refused_by_name(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    assert f"{tmp_path}/index.json" in refusal(Index, tmp_path / "index.json")


def test_bit_flipped_in_the_index_is_found(tmp_path):
    indexed(tmp_path)
    path, whole = tmp_path / "index.json", (tmp_path / "index.json").read_bytes()
    places = whole.index(b'"location"')  # paths are not part of the fingerprint
    for place in range(places):
        for bit in (place % 8, (place + 3) % 8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert str(path) in refusal(Index, path)


def test_index_cut_anywhere_is_found(tmp_path):
    indexed(tmp_path)
    path, whole = tmp_path / "index.json", (tmp_path / "index.json").read_bytes()
    for length in range(0, len(whole) - 2, 3):
        path.write_bytes(whole[:length])
        assert str(path) in refusal(Index, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda described: described.update(format=1),
        lambda described: described.update(fingerprint="0" * 32),
        lambda described: described["shards"][0].update(samples=2),
        lambda described: described["shards"][0].update(name="other.tar"),
        lambda described: described["classes"].append("another"),
        lambda described: described.update(samples=4),
        lambda described: described.update(extra=1),
        lambda described: described.pop("refused"),
        lambda described: described.pop("location"),
        lambda described: described.pop("table"),
    ],
)
def test_altered_index_is_refused_by_name(tmp_path, change):
    indexed(tmp_path)
    path = tmp_path / "index.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    assert str(path) in refusal(Index, path)


def test_bit_flipped_in_the_table_is_found_or_changes_nothing(tmp_path):
    before = contents(indexed(tmp_path))
    path, whole = tmp_path / "index.npy", (tmp_path / "index.npy").read_bytes()
    found, unfound = 0, {}
    for place in range(len(whole)):
        for bit in range(0, 8, 1 if place < 256 else 3):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            index = Index(tmp_path / "index.json")
            try:
                if index.labels().tolist() != [2, 0, 1] or contents(index) != before:
                    unfound[place, bit] = "another table"
            except PipelineError as error:
                found += str(path) in str(error)
                if str(path) not in str(error):
                    unfound[place, bit] = str(error)
            except Exception as error:
                unfound[place, bit] = repr(error)
    assert not unfound
    assert found > 500


@pytest.mark.parametrize("cut", [0, 5, 9, 60, 130, -1, -20])
def test_table_that_was_cut_is_refused_by_name(tmp_path, cut):
    index = indexed(tmp_path)
    path = tmp_path / "index.npy"
    os.truncate(path, cut if cut >= 0 else path.stat().st_size + cut)
    message = refusal(index.rows, 0)
    assert str(path) in message and "prepare" in message


def test_missing_table_is_refused_by_name(tmp_path):
    index = indexed(tmp_path)
    (tmp_path / "index.npy").unlink()
    assert str(tmp_path / "index.npy") in refusal(index.rows, 0)


def test_table_of_another_index_is_refused_by_name(tmp_path):
    index, _ = indexed(tmp_path / "a"), indexed(tmp_path / "b", [(key, t, d, 0) for key, t, d, _ in FEW])
    (tmp_path / "b" / "index.npy").replace(tmp_path / "a" / "index.npy")
    assert "a/index.npy" in refusal(index.rows, 0)


def test_table_with_python_objects_is_never_unpickled(tmp_path):
    index = indexed(tmp_path)
    np.save(tmp_path / "index.npy", np.array([{}, {}, {}], object), allow_pickle=True)
    assert "index.npy" in refusal(index.rows, 0)


# a file appears whole or not at all


def test_file_appears_when_the_block_ends_well(tmp_path):
    with atomic_write(tmp_path / "new" / "file") as temporary:
        temporary.write_text("text")
        assert not (tmp_path / "new" / "file").exists()
    assert (tmp_path / "new" / "file").read_text() == "text"
    assert os.listdir(tmp_path / "new") == ["file"]


def test_file_is_replaced_by_name_so_a_reader_goes_on_with_the_old_one(tmp_path):
    (tmp_path / "file").write_text("old")
    with open(tmp_path / "file") as reader:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("new")
        assert (reader.read(), (tmp_path / "file").read_text()) == ("old", "new")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("old", ["old", None])
def test_block_that_raises_leaves_everything_as_it_was(tmp_path, error, old):
    if old:
        (tmp_path / "file").write_text(old)
    with pytest.raises((ValueError, KeyboardInterrupt, PipelineError)), atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise error
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"file": old} if old else {})


def test_error_of_the_block_is_not_taken_for_one_of_the_disk(tmp_path):
    with pytest.raises(PipelineError, match="repair me"), atomic_write(tmp_path / "file"):
        raise PipelineError("repair me")


def test_full_disk_is_reported_plainly_and_leaves_nothing(tmp_path):
    (tmp_path / "s.tar").write_text("old")
    samples = [(str(i), "png", picture(i, width=40, height=40), 0) for i in range(5)]
    with pytest.raises(PipelineError) as caught, full_disk():
        write_shard(tmp_path / "s.tar", samples)
    assert f"{tmp_path}/s.tar: cannot be written" in str(caught.value) and "make room" in str(caught.value)
    assert os.listdir(tmp_path) == ["s.tar"] and (tmp_path / "s.tar").read_text() == "old"


def test_full_disk_leaves_the_old_index(tmp_path):
    before = indexed(tmp_path)
    lots = [(f"{i:04d}", "png", FEW[0][2], 0) for i in range(200)]
    write_shard(tmp_path / "lots.tar", lots)
    with pytest.raises(PipelineError, match="index.npy: cannot be written"), full_disk():
        write_index(tmp_path / "index.json", str(tmp_path), ["0"], [index_shard(str(tmp_path), "lots.tar")])
    assert contents(Index(tmp_path / "index.json")) == contents(before)
    assert sorted(os.listdir(tmp_path)) == ["000000.tar", "index.json", "index.npy", "lots.tar"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_forbidden_folder_is_reported_plainly(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written" in refusal(write_shard, tmp_path / "s.tar", FEW)
    finally:
        tmp_path.chmod(0o700)


def test_file_in_the_place_of_a_folder_is_reported_plainly(tmp_path):
    (tmp_path / "folder").write_text("")
    assert "cannot be written" in refusal(write_shard, tmp_path / "folder" / "s.tar", FEW)


# shards and indices by strangers


def header(name: bytes = b"a.jpg", size: bytes = b"00000000003", kind: bytes = b"0") -> bytes:
    """A tar header with its right checksum."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)[:512])
    block[:100], block[124:136], block[156:157] = name.ljust(100, b"\0"), size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(*records: tuple[bytes, bytes]) -> bytes:
    text = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        text += b"%d %s=%s\n" % (length, key, value)
    return header(b"pax", b"%011o" % len(text), b"x") + text.ljust(-(-len(text) // 512) * 512, b"\0")


END, BODY = bytes(1024), b"abc".ljust(512, b"\0")
ODD_TARS = {
    "negative size": (header(size=b"\xff" * 11 + b"\xfd") + BODY + END, "no number"),
    "negative pax size": (pax((b"size", b"-512")) + header() + BODY + END, "an invalid pax size"),
    "size beyond the file": (header(size=b"77777777777") + BODY + END, "truncated: the member"),
    "binary size beyond the file": (header(size=b"\x80" + b"\x7f" * 11) + BODY + END, "truncated: the member"),
    "sparse": (header(kind=b"S") + BODY + END, "sparse"),
    "sparse by pax": (pax((b"GNU.sparse.major", b"1")) + header() + BODY + END, "GNU.sparse"),
    "5,000 pax headers": (pax((b"comment", b"x")) * 5000 + header() + BODY + END, "9 in a row"),
    "a huge pax header": (header(b"pax", b"%011o" % 2**21, b"x") + bytes(2**21) + END, "2097152 bytes"),
    "a name with a NUL": (pax((b"path", b"a\0.jpg")) + header() + BODY + END, "NUL"),
    "pax length of 0": (header(b"pax", b"%011o" % 9, b"x") + b"0 path=a\n".ljust(512, b"\0") + END, "pax records"),
    "gzip": (gzip.compress(header() + BODY + END), "compressed with gzip; only uncompressed"),
    "xz": (lzma.compress(header() + BODY + END), "compressed with xz"),
    "bzip2": (bz2.compress(header() + BODY + END), "compressed with bzip2"),
}


@pytest.mark.parametrize(("data", "expected"), ODD_TARS.values(), ids=ODD_TARS)
def test_tar_that_no_honest_writer_makes_is_refused_with_the_reason(tmp_path, data, expected):
    (tmp_path / "s.tar").write_bytes(data)
    message = refusal(index_shard, str(tmp_path), "s.tar")
    assert f"{tmp_path}/s.tar" in message and expected in message


member_lists = st.lists(
    st.tuples(st.text("abé/._ \n", min_size=1, max_size=300), st.binary(max_size=1500), st.booleans()), max_size=6
)


@property_settings
@given(member_lists, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_members_of_a_tar_are_those_that_tarfile_finds(members, form):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, data, regular in members:
            info = tarfile.TarInfo(name)
            info.size = len(data) if regular else 0
            info.type = tarfile.REGTYPE if regular else tarfile.SYMTYPE
            with contextlib.suppress(ValueError):  # a name too long for the form
                file.addfile(info, io.BytesIO(data))
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as file:
        expected = [(info.name, info.offset_data, info.size) for info in file if info.isreg()]
    reader = Tar(io.BytesIO(buffer.getvalue()))
    assert [(member.name, member.offset, member.size) for member in reader] == expected
    assert reader.sha256.hexdigest() == hashlib.sha256(buffer.getvalue()).hexdigest()


def test_names_that_are_no_utf8_are_keys(tmp_path):
    members = [(b"\xff.png", picture(0)), (b"\xff.cls", b"1"), (b"\xfe.png", picture(1)), (b"\xfe.cls", b"2")]
    parts = [header(name, b"%011o" % len(data)) + data.ljust(-(-len(data) // 512) * 512, b"\0") for name, data in members]
    (tmp_path / "s.tar").write_bytes(b"".join(parts) + END)
    write_index(tmp_path / "index.json", str(tmp_path), ["0", "1", "2"], [index_shard(str(tmp_path), "s.tar")])
    assert contents(Index(tmp_path / "index.json")) == [("\\xff", picture(0), 1), ("\\xfe", picture(1), 2)]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_postscript_by_another_name_starts_no_ghostscript(tmp_path, name, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("Ghostscript was started"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    tar(tmp_path / "s.tar", [(name, POSTSCRIPT), ("a.cls", b"0")])
    (refused,) = index_shard(str(tmp_path), "s.tar").refused
    assert refused["reason"] == "no image of the formats JPEG, PNG, WEBP"


def test_image_of_more_pixels_than_allowed_is_refused_with_the_limit(tmp_path):
    tar(tmp_path / "s.tar", [("a.png", picture(0, "png", 20, 21)), ("a.cls", b"0")])
    (refused,) = index_shard(str(tmp_path), "s.tar", 419).refused
    assert refused["reason"] == "20 x 21 pixels: more than 419 (data.max_pixels)"
    assert not index_shard(str(tmp_path), "s.tar", 420).refused


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_pixels_are_counted_again_when_an_image_is_read(tmp_path, kind):
    write_shard(tmp_path / "s.tar", [("a", kind, picture(0, kind, 20, 21), 0)])
    shard = index_shard(str(tmp_path), "s.tar")
    write_index(tmp_path / "index.json", str(tmp_path), ["0"], [shard], max_pixels=419)
    message = refusal(Index(tmp_path / "index.json").image, 0, 0)
    assert "data.max_pixels" in message and str(tmp_path) in message


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_image_of_more_than_8_bits_is_refused_instead_of_clipped(tmp_path, dtype):
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 5), 40_000, dtype)).save(buffer, "png" if dtype == np.uint16 else "tiff")
    formats = ("PNG", "TIFF")
    with pytest.raises(Undecodable, match="more than 8 bits"):
        decode(buffer.getvalue(), formats=formats)


def forged(path: Path, change) -> None:
    """Alter an index as a stranger would who knows how its fingerprint and checksums are made."""
    described = json.loads(path.read_text())
    rows = np.load(path.with_suffix(".npy"))
    rows = change(described, rows)
    rows = np.load(path.with_suffix(".npy")) if rows is None else rows
    np.save(path.with_suffix(".npy"), rows)
    with contextlib.suppress(KeyError):
        described["shards"][0]["rows_crc32c"] = google_crc32c.value(rows.tobytes())
    extra = {key: described.pop(key) for key in ("digest", "location", "table")}
    with contextlib.suppress(KeyError, TypeError):
        described["fingerprint"] = samples_fingerprint(described)
    extra["digest"] = fingerprint(described)
    path.write_text(json.dumps(described | extra))


def row_set(field: str, value: int):
    def change(_, rows):
        rows[field][1] = value
        return rows

    return change


FORGERIES = {
    "label beyond the classes": row_set("label", 3),
    "negative label": row_set("label", -1),
    "size of 0": row_set("size", 0),
    "negative size": row_set("size", -5),
    "size beyond the shard": row_set("size", 2**30),
    "offset beyond the shard": row_set("offset", 2**40),
    "negative offset": row_set("offset", -512),
    "offset of the sample before": row_set("offset", 0),
    "no key": row_set("key", b""),
    "samples beyond the table": lambda described, _: described["shards"][0].update(samples=7) or None,
    "counts that do not add up": lambda described, _: described.update(samples=2),
    "a shard in another folder": lambda described, _: described["shards"][0].update(name="../x.tar"),
    "a shard without a name": lambda described, _: described["shards"][0].update(name=""),
    "a fraction of a sample": lambda described, _: described["shards"][0].update(samples=3.0),
    "true samples": lambda described, _: described["shards"][0].update(samples=True),
    "a name that is a number": lambda described, _: described["shards"][0].update(name=3),
    "classes that are numbers": lambda described, _: described.update(classes=[0, 1, 2]),
    "no classes": lambda described, _: described.update(classes=[]),
    "fewer bytes than the shard has": lambda described, _: described["shards"][0].update(bytes=10_000),
    "refused without a reason": lambda described, _: described.update(refused=[{"shard": "x", "key": "y"}]),
    "shards that are a mapping": lambda described, _: described.update(shards={"0": described["shards"][0]}),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_index_whose_checksums_were_recomputed_is_compared_with_itself_and_the_shard(tmp_path, change):
    indexed(tmp_path)
    forged(tmp_path / "index.json", change)
    message = refusal(lambda: contents(Index(tmp_path / "index.json")))
    assert str(tmp_path) in message


# readers under random input

fuzz_settings = settings(property_settings, max_examples=200)


def altered(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that are nearly `whole`: some changed, some put in, some gone."""
    place = st.integers(0, len(whole))
    edits = st.lists(st.tuples(place, st.integers(0, 40), st.binary(max_size=40)), min_size=1, max_size=5)

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = whole
        for start, gone, new in edits:
            data = data[:start] + new + data[start + gone :]
        return data

    return st.one_of(edits.map(apply), st.binary(max_size=2000))


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("valid")
    indexed(folder)
    return folder


@pytest.mark.parametrize("name", ["index.json", "index.npy", "000000.tar"])
def test_any_bytes_in_place_of_a_file_are_read_or_reported(valid, tmp_path, name):
    for path in valid.iterdir():
        shutil.copy(path, tmp_path)
    # the places that index.json names are relative: they are those of the copy

    @fuzz_settings
    @given(altered((valid / name).read_bytes()))
    def read(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        with contextlib.suppress(PipelineError):
            index = Index(tmp_path / "index.json")
            for shard in range(len(index.names)):
                for position in range(len(index.rows(shard))):
                    index.image(shard, position)
        if name.endswith(".tar"):
            with contextlib.suppress(PipelineError):
                index_shard(str(tmp_path), name, max_pixels=10_000)

    read()


@pytest.mark.parametrize("image", [image for _, image in PICTURES[:3]], ids=["jpg", "png", "webp"])
def test_any_bytes_in_place_of_an_image_are_decoded_or_refused(image):
    @fuzz_settings
    @given(altered(image))
    def read(data: bytes) -> None:
        for decoder in (decode, decode_trusted):
            with contextlib.suppress(Undecodable):
                assert decoder(data, 10_000).size <= 30_000

    read()


def test_class_names_are_not_part_of_what_identifies_the_samples(tmp_path):
    indices = []
    for names in (["cat", "dog", "eel"], ["Katze", "Hund", "Aal"]):
        root = tmp_path / names[0]
        root.mkdir()
        write_shard(root / "a.tar", [(f"{n}", "png", picture(n), n % 3) for n in range(4)])
        write_index(root / "index.json", str(root), names, [index_shard(str(root), "a.tar")])
        indices.append(Index(root / "index.json"))
    assert indices[0].fingerprint == indices[1].fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda samples: samples[0].__setitem__(0, "another key"),
        lambda samples: samples[0].__setitem__(2, picture(9)),
        lambda samples: samples[0].__setitem__(3, 1),
        lambda samples: samples.reverse(),
        lambda samples: samples.pop(),
    ],
)
def test_key_image_label_and_order_identify_the_samples(change, tmp_path):
    samples = [[f"{n}", "png", picture(n), n % 3] for n in range(4)]
    found = []
    for name in ("before", "after"):
        root = tmp_path / name
        root.mkdir()
        write_shard(root / "a.tar", samples)
        write_index(root / "index.json", str(root), ["cat", "dog", "eel"], [index_shard(str(root), "a.tar")])
        found.append(Index(root / "index.json").fingerprint)
        change(samples)
    assert found[0] != found[1]


def test_the_number_of_classes_is_part_of_what_identifies_a_data_set(tmp_path):
    write_shard(tmp_path / "a.tar", [(f"{n}", "png", picture(n), n % 3) for n in range(4)])
    found = set()
    for names in (["cat", "dog", "eel"], ["cat", "dog", "eel", "fox"]):
        write_index(tmp_path / "index.json", str(tmp_path), names, [index_shard(str(tmp_path), "a.tar")])
        found.add(Index(tmp_path / "index.json").fingerprint)
    assert len(found) == 2


def test_another_layout_of_the_tar_is_the_same_data_set(tmp_path):
    found = set()
    for padding in (0, 1):
        root = tmp_path / str(padding)
        root.mkdir()
        with tarfile.open(root / "a.tar", "w") as tar:
            for n in range(3):
                members = [(f"{n}.png", picture(n)), (f"{n}.cls", b"%d" % n), *[("README", b"text")] * padding]
                for name, data in members:
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        write_index(root / "index.json", str(root), ["cat", "dog", "eel"], [index_shard(str(root), "a.tar")])
        found.add(Index(root / "index.json").fingerprint)
    assert len(found) == 1
