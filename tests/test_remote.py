"""Shards, stores and leases at s3:// URLs, against a real S3 server (moto's) on the loopback.

The tests put, alter and remove objects with boto3, as another machine would: s3fs hears nothing of it.
"""

import contextlib
import gc
import http.client
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.asyn
import numpy as np
import pytest
import torch
from conftest import small_config, tree
from test_prepare import index_of, samples, write_shards
from test_store import (
    SAMPLES,
    VIEWS,
    create,
    every_kind,
    fill,
    filled,  # noqa: F401  (fixture)
    opened,
    predictions_of,
    refusal,
)
from test_store_commands import call
from test_training import loaded
from torch.utils.data import DataLoader, Dataset

from pipeline.batches.loader import _start_worker, evaluation_loader
from pipeline.batches.plan import Unit
from pipeline.cli.find_store import find_store
from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.lease import LEASE_SECONDS, lease
from pipeline.config.paths import index_path, student_folder, teacher_folder, teacher_logits_folder
from pipeline.config.schema import Config
from pipeline.config.store_spec import store_spec
from pipeline.models.weights import read_weights, state_dict_hash
from pipeline.shards.cache import ShardCache
from pipeline.shards.index import Index
from pipeline.shards.indexing import index_shard
from pipeline.shards.splits import SPLITS
from pipeline.store import maintenance
from pipeline.store.maintenance import remove_damaged
from pipeline.store.manifest import build_manifest, damaged_units, read_manifest, store_bytes
from stages import prepare, teacher_logits, train_student

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
ABSENT = [name for name in ("boto3", "flask", "moto", "s3fs") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"no {', '.join(ABSENT)}: install moto[server] and s3fs"),
    # Python 3.12 warns whenever a process with threads forks; that this works is tested here
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

# moto's application behind HTTP/1.1: its own server closes every connection, S3 keeps them open, and open
# ones are what forked processes share. It ends with its standard input: with this process however that ends
SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.datastructures import Headers
from werkzeug.test import EnvironBuilder, run_wsgi_app

application = DomainDispatcherApplication(create_backend_app)

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    busy = ""

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "GET" and Handler.busy and Handler.busy in self.path:
            return self.say(503, Headers(), b"<Error><Code>SlowDown</Code><Message>Wait.</Message></Error>")
        base, own = f"http://{self.headers['Host']}", list(self.headers.items())
        request = EnvironBuilder(self.path, base, method=self.command, headers=own, data=body)
        parts, status, headers = run_wsgi_app(application, request.get_environ(), buffered=True)
        self.say(int(status.split()[0]), headers, b"".join(parts))

    def say(self, status, headers, content):
        headers.setdefault("Content-Length", str(len(content)))
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_BUSY(self):
        Handler.busy = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.say(200, Headers(), b"")

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port, flush=True)
sys.stdin.read()
"""
KEPT = []  # zarr's filesystems never close their connections, and would warn of it when they are collected


class Server:
    """A process that serves S3 on the loopback, on a free port; its objects are in memory."""

    def __init__(self):
        self.port = 0
        self.start()

    def start(self) -> None:
        """Again on the port that it had, empty."""
        command = [sys.executable, "-c", SERVER, str(self.port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline() or 0)
        assert self.port, "the server did not start"

    def stop(self) -> None:
        with self.process:  # closes its standard input, then waits
            self.process.stdin.close()

    def _let_be_busy(self, place: str) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request("BUSY", "/", place.encode())
            assert connection.getresponse().status == 200

    @contextlib.contextmanager
    def busy(self, place: str) -> Iterator[None]:
        """Inside, whoever wants to read an object with `place` in its name is told to slow down."""
        self._let_be_busy(place)
        try:
            yield
        finally:
            self._let_be_busy("")

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            # nothing of the machine's own
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",  # where no server answers, say so at once
            "NO_PROXY": "127.0.0.1",
        }


class Bucket:
    """A bucket as another machine sees it."""

    def __init__(self, client, name: str):
        self.client, self.name, self.url = client, name, f"s3://{name}"
        client.create_bucket(Bucket=name)

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def upload(self, folder: Path, prefix: str) -> None:
        for name, data in tree(folder).items():
            self.put(f"{prefix}/{name}", data)

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    def tree(self, prefix: str) -> dict[str, bytes]:
        """Every object below a prefix, as conftest.tree has every file."""
        return {key.removeprefix(f"{prefix}/"): self.get(key) for key in self.keys(f"{prefix}/")}

    def tag(self, key: str) -> None:
        """Mark an object until it is written again."""
        tags = [{"Key": "written", "Value": "before"}]
        self.client.put_object_tagging(Bucket=self.name, Key=key, Tagging={"TagSet": tags})

    def tagged(self, key: str) -> bool:
        return bool(self.client.get_object_tagging(Bucket=self.name, Key=key)["TagSet"])

    def flip(self, key: str, seed: int = 0) -> None:
        """Turn one bit of one byte round."""
        data, chance = bytearray(self.get(key)), np.random.default_rng(seed)
        data[chance.integers(len(data))] ^= 1 << int(chance.integers(8))
        self.put(key, bytes(data))


@pytest.fixture(scope="session")
def server():
    started = Server()
    yield started
    started.stop()


def connect_anew() -> None:
    """What this process opens from now on at s3:// is where, and as, the environment says now."""
    from s3fs import S3FileSystem

    KEPT.extend(S3FileSystem._cache.values())
    S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def client_of(server: Server):
    """Another machine's way to it; inside, s3:// is there for this process too."""
    import boto3

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        connect_anew()
        with contextlib.closing(boto3.client("s3")) as client:
            yield client
    connect_anew()


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


@pytest.fixture
def bucket(client, request) -> Bucket:
    """An empty one, of the test's own."""
    request.session.buckets = getattr(request.session, "buckets", 0) + 1
    return Bucket(client, f"bucket-{request.session.buckets}")


# shards


def config_of(location: str, name: str, **data: Any):
    """Of shards at a location, prepared below the current folder."""
    shards = {"train": f"{location}/train-{{0000..0002}}.tar", "val": f"{location}/val-0000.tar"}
    return small_config(Path(), name=name, data={"source": "shards", **shards, **data})


@pytest.fixture
def uploaded(in_tmp, bucket) -> list[tuple[str, bytes, int]]:
    """Shards in ./in and the same ones at S3; the samples of training."""
    written = write_shards(in_tmp / "in", [4, 3, 5])
    write_shards(in_tmp / "in", [3], "val")
    bucket.upload(in_tmp / "in", "in")
    return written


@pytest.mark.parametrize("workers", [1, 2])
def test_indices_of_shards_at_s3_are_those_of_local_ones_but_for_their_location(workers, uploaded, bucket):
    described, tables = [], []
    for location, name in (("in", "local"), (f"{bucket.url}/in", "remote")):
        config = config_of(location, name, workers=workers)
        prepare.run(config)
        read = [Index(index_path(config, split)) for split in SPLITS]
        assert {index.location for index in read} == {location if "://" in location else str(Path(location).absolute())}
        tables.append([Path(index.table).read_bytes() for index in read])
        described.append([(index.fingerprint, index.shards) for index in read])
    assert described[0] == described[1]
    assert tables[0] == tables[1]


def test_shards_at_s3_are_left_as_they_were(uploaded, bucket):
    before = bucket.tree("in")
    config = config_of(f"{bucket.url}/in", "remote")
    prepare.run(config)
    samples(index_of(config))
    assert bucket.tree("in") == before and len(bucket.keys()) == len(before)


def test_shard_that_is_not_at_s3_is_named(uploaded, bucket):
    bucket.delete("in/train-0001.tar")
    message = refusal(prepare.run, config_of(f"{bucket.url}/in", "remote"))
    assert f"{bucket.url}/in/train-0001.tar" in message and "do:" in message


def test_bucket_that_is_not_there_is_told_plainly(uploaded, bucket):
    assert "s3://nowhere/in/train-0000.tar" in refusal(prepare.run, config_of("s3://nowhere/in", "remote"))


def test_shard_changed_at_s3_is_noticed_when_preparing_again(uploaded, in_tmp, bucket):
    config = config_of(f"{bucket.url}/in", "remote")
    prepare.run(config)
    before = index_of(config).fingerprint
    theirs = write_shards(in_tmp / "in", [4, 3, 6])
    bucket.upload(in_tmp / "in", "in")
    prepare.run(config)
    assert index_of(config).fingerprint != before
    assert samples(index_of(config)) == theirs


@pytest.mark.parametrize("damage", ["replaced", "cut", "deleted"])
def test_shard_damaged_at_s3_is_refused_when_a_sample_is_read(damage, uploaded, bucket):
    config = config_of(f"{bucket.url}/in", "remote")
    prepare.run(config)
    index = index_of(config)
    index.read(1, 2)
    data, key = bucket.get("in/train-0001.tar"), "in/train-0001.tar"
    if damage == "deleted":
        bucket.delete(key)
    else:
        end = int(index.rows(1)["offset"][2]) + 20
        bucket.put(key, data[:end] + (b"" if damage == "cut" else bytes(20) + data[end + 20 :]))
    assert f"{bucket.url}/in/train-0001.tar" in refusal(index.read, 1, 2)


# images


SIZE = 16


class Images(Dataset):
    """Every decoded image of an index."""

    def __init__(self, index: Index):
        self.index = index
        self.places = [(shard, n) for shard, count in enumerate(index.samples) for n in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.index.image(*self.places[number])


class Collecting(Images):
    """In a worker whose collector of garbage runs in the thread of s3fs, as it may in any."""

    def __getitem__(self, number: int) -> np.ndarray:
        async def collect():
            gc.collect()

        image = super().__getitem__(number)
        fsspec.asyn.sync(fsspec.filesystem("s3").loop, collect)
        return image


def by_forked_workers(images: Images) -> list[np.ndarray]:
    """What two of them read, in order."""
    # a worker that hangs is an error, not a test that never ends
    settings = dict(batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120)
    settings["worker_init_fn"] = _start_worker
    return [image.numpy() for image in DataLoader(images, **settings)]


# what two workers read of an index, in a process that did or did not use S3 before; a test's own process has
FRESH = f"""
import sys
import numpy, torch
from pipeline.batches.loader import evaluation_loader
from pipeline.shards.index import Index
path, method, used, result = sys.argv[1:]
torch.multiprocessing.set_start_method(method)
index = Index(path)
if used == "used":
    index.image(0, 0)
batches = evaluation_loader(index, range(len(index)), {SIZE}, 1.0, 4, 2, False)
numpy.save(result, torch.cat(list(batches)).numpy())
"""


@pytest.fixture
def both(uploaded, bucket) -> tuple[Index, Index]:
    """The indices of the local shards and of those at S3."""
    configs = config_of("in", "local"), config_of(f"{bucket.url}/in", "remote")
    for config in configs:
        prepare.run(config)
    return tuple(Index(index_path(config, "train").absolute()) for config in configs)


def same_images(found, expected: Index) -> bool:
    pairs = zip(found, Images(expected), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def test_samples_at_s3_are_those_written(both, uploaded):
    assert samples(both[1]) == uploaded


def test_images_at_s3_are_the_local_ones(both):
    local, remote = both
    assert same_images(Images(remote), local)


@pytest.mark.parametrize("room", [1, 10])
def test_forked_workers_read_copies_of_shards_at_s3(room, both, in_tmp):
    local, remote = both
    size = max(shard["bytes"] for shard in remote.shards)
    remote = Index(remote.path, ShardCache(in_tmp / "copies", room * size))
    remote.image(0, 0)
    assert same_images(by_forked_workers(Images(remote)), local)
    assert len(list((in_tmp / "copies").glob("*.tar"))) == min(room, 3)


def test_images_at_s3_that_are_read_at_the_same_time_are_the_local_ones(both):
    local, remote = both
    for shard, count in enumerate(local.samples):
        positions = list(range(count))[::-1]
        assert remote.read_many(shard, positions) == local.read_many(shard, positions)


def test_forked_workers_read_s3_after_their_parent_did(both):
    local, remote = both
    remote.image(0, 0)
    assert same_images(by_forked_workers(Images(remote)), local)


def test_parent_reads_s3_after_its_forked_workers_collected_garbage(both, monkeypatch):
    from s3fs import S3FileSystem

    # it would try again after a quarter of a minute, and succeed
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setattr(S3FileSystem, "read_timeout", 8)
    connect_anew()
    local, remote = both
    remote.image(0, 0)
    by_forked_workers(Collecting(remote))
    assert same_images(Images(remote), local)


@pytest.mark.parametrize("used", ["used", "unused"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_process_that_used_s3_or_not_read_it(method, used, both, in_tmp):
    local, remote = both
    command = [sys.executable, "-c", FRESH, remote.path, method, used, "found.npy"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
    expected = torch.cat(list(evaluation_loader(local, range(len(local)), SIZE, 1.0, 4, 0, False)))
    assert np.array_equal(np.load("found.npy"), expected.numpy())


# stores

each_layout = pytest.mark.parametrize("kind", ["topk", "dense"])  # chunks of a unit, shards of chunks


def damage_in(url: str, kind: str) -> list[Unit]:
    store = opened(url)
    return [unit for unit, _ in damaged_units(store, store.units(VIEWS), kind)]


def chunk_keys(bucket: Bucket) -> list[str]:
    return [key for key in bucket.keys("s.zarr/") if not key.endswith("zarr.json")]


def unit_of(key: str) -> Unit:
    """Of s.zarr/ARRAY/c/BLOCK/SHARD/..."""
    parts = key.split("/")
    return Unit(shard=int(parts[4]), block=int(parts[3]))


@pytest.fixture
def url(bucket) -> str:
    return f"{bucket.url}/s.zarr"


@pytest.fixture
def stored(filled, url, bucket):  # noqa: F811
    """A complete store of a kind at S3, put there by another machine: its URL."""

    def put(kind: str) -> str:
        bucket.upload(filled(kind), "s.zarr")
        return url

    return put


@every_kind
def test_store_at_s3_has_the_bytes_of_a_local_one(kind, filled, url, bucket):  # noqa: F811
    fill(create(url, kind), kind)
    assert bucket.tree("s.zarr") == tree(filled(kind))


@every_kind
def test_predictions_at_s3_are_read_as_they_were_written(kind, stored):
    store = opened(stored(kind))
    for unit in store.units(VIEWS):
        buffers, checks = predictions_of(unit, kind)
        for place in range(len(checks)):
            found = store.read(unit.shard, unit.block * len(checks) + place, kind)
            assert np.array_equal(found.argmax, buffers["argmax"][place])
            assert np.array_equal(found.check, checks[place])
            assert kind == "argmax" or np.array_equal(found.payload, buffers[kind][place])


@each_layout
def test_list_of_missing_units_at_s3_shrinks_by_what_is_written(kind, url):
    store = create(url, kind)
    left = store.units(VIEWS)
    assert store.missing(VIEWS, kind) == left
    for unit in list(left):
        store.write_unit(unit, *predictions_of(unit, kind))
        left.remove(unit)
        assert store.missing(VIEWS, kind) == opened(url).missing(VIEWS, kind) == left


def test_units_that_another_machine_writes_are_seen_at_once(url, filled, bucket):  # noqa: F811
    store = create(url, "topk")
    assert len(store.missing(VIEWS, "topk")) == 6
    bucket.upload(filled("topk"), "s.zarr")
    assert store.missing(VIEWS, "topk") == []
    assert store.read(1, 2, "topk").argmax.tolist() == predictions_of(Unit(1, 1), "topk")[0]["argmax"][0].tolist()


@every_kind
def test_flipped_bit_of_any_object_at_s3_is_found_in_its_unit(kind, stored, bucket):
    store = opened(stored(kind))
    for seed, key in enumerate(chunk_keys(bucket)):
        whole = bucket.get(key)
        bucket.flip(key, seed)
        assert [unit for unit, _ in damaged_units(store, store.units(VIEWS), kind)] == [unit_of(key)], key
        bucket.put(key, whole)


@each_layout
def test_flipped_bit_at_s3_is_found_by_a_store_that_was_read_before(kind, stored, bucket):
    store = opened(stored(kind))
    assert damaged_units(store, store.units(VIEWS), kind) == []
    bucket.flip(next(key for key in chunk_keys(bucket) if f"/{kind}/c/1/2" in key))
    assert [unit for unit, _ in damaged_units(store, store.units(VIEWS), kind)] == [Unit(2, 1)]


@each_layout
def test_object_deleted_at_s3_makes_its_unit_missing(kind, stored, bucket):
    store = opened(stored(kind))
    for key in chunk_keys(bucket):
        whole = bucket.get(key)
        bucket.delete(key)
        assert store.missing(VIEWS, kind) == [unit_of(key)], key
        refusal(store.check_unit, unit_of(key), kind)
        bucket.put(key, whole)


def test_unit_removed_at_s3_is_missing(stored):
    url = stored("topk")
    create(url, "topk").remove_unit(Unit(1, 0))
    assert opened(url).missing(VIEWS, "topk") == [Unit(1, 0)]
    assert "missing" in refusal(opened(url).read, 1, 0, "topk")


def test_removing_a_unit_that_is_not_at_s3_changes_nothing(url, bucket):
    store = create(url)
    before = bucket.tree("s.zarr")
    store.remove_unit(Unit(1, 0))
    assert bucket.tree("s.zarr") == before


def test_unit_written_since_the_last_listing_is_removed_from_s3(url):
    store = create(url)
    store.write_unit(Unit(0, 0), *predictions_of(Unit(0, 0), "argmax"))
    store.missing(VIEWS, "argmax")
    store.write_unit(Unit(1, 0), *predictions_of(Unit(1, 0), "argmax"))
    store.remove_unit(Unit(1, 0))
    assert Unit(1, 0) in opened(url).missing(VIEWS, "argmax")


@each_layout
def test_damaged_unit_at_s3_is_mended_by_writing_it_again(kind, stored, bucket):
    store = create(stored(kind), kind)
    before = bucket.tree("s.zarr")
    for key in chunk_keys(bucket):
        if unit_of(key) == Unit(1, 1):
            bucket.flip(key)
            fill(store, kind, units=[Unit(1, 1)])
            assert bucket.tree("s.zarr") == before, key


@each_layout
def test_more_views_at_s3_add_blocks_and_keep_the_old_bytes(kind, url, bucket):
    fill(create(url, kind, views=2), kind, views=2)
    before = {key: bucket.get(key) for key in chunk_keys(bucket)}
    store = create(url, kind, views=4)
    assert store.missing(4, kind) == [Unit(shard, 1) for shard in range(len(SAMPLES))]
    fill(store, kind, units=store.missing(4, kind))
    assert before.items() < {key: bucket.get(key) for key in chunk_keys(bucket)}.items()
    assert damage_in(url, kind) == []


def test_two_kinds_share_a_store_at_s3(stored):
    url = stored("topk")
    fill(create(url, "dense"), "dense")
    assert opened(url).arrays() == ["argmax", "check", "dense", "topk"]
    assert damage_in(url, "topk") == damage_in(url, "dense") == []


def test_manifest_and_size_of_a_store_at_s3_are_those_of_a_local_one(filled, stored):  # noqa: F811
    local, remote = (opened(path) for path in (filled("topk"), stored("topk")))
    assert build_manifest(remote, VIEWS, "topk") == build_manifest(local, VIEWS, "topk")
    assert store_bytes(remote.path) == store_bytes(local.path)


def test_store_that_is_not_at_s3_says_how_to_compute_it(url):
    message = refusal(opened, url)
    assert f"{url}: no store" in message and "do:" in message


def test_store_in_a_bucket_that_is_not_there_is_told_plainly(bucket):
    assert "s3://nowhere/s.zarr: the store cannot be written" in refusal(create, "s3://nowhere/s.zarr")


# the stages


@pytest.fixture
def remote(taught, bucket) -> tuple[str, ...]:
    """Overrides that make of the taught experiment one over shards at S3, prepared; of the same teacher."""
    overrides = ["name=remote", "data.source=shards"]
    for split in SPLITS:
        index = Index(index_path(taught, split))
        bucket.upload(Path(index.location), split)
        overrides.append(f"data.{split}={bucket.url}/{split}/{{000000..{len(index.names) - 1:06d}}}.tar")
    config = loaded(*overrides)
    shutil.copytree(teacher_folder(taught), teacher_folder(config))
    prepare.run(config)
    return tuple(overrides)


def chunks_of(objects: dict[str, bytes]) -> dict[str, bytes]:
    """By their place in the store; its name and attributes say what the classes are called."""
    return {key.partition(".zarr/")[2]: data for key, data in objects.items() if "/c/" in key}


def store_url(config) -> str:
    fingerprint = read_manifest(teacher_logits_folder(config, "train-student") / "manifest.json")["fingerprint"]
    return f"{config.work}/stores/{fingerprint}.zarr"


@pytest.fixture
def dumped(remote, bucket) -> tuple[str, ...]:
    """The overrides, with a store below work=s3://... that teacher-logits filled."""
    overrides = (*remote, f"work={bucket.url}/work")
    teacher_logits.run(loaded(*overrides), CPU)
    return overrides


@pytest.mark.parametrize("workers", [0, 2])
def test_store_at_s3_of_shards_at_s3_has_the_predictions_of_the_local_one(workers, remote, bucket):
    local = chunks_of(tree(Path("work/stores")))
    config = loaded(*remote, f"work={bucket.url}/work", f"teacher_logits.workers={workers}")
    teacher_logits.run(config, CPU)
    assert chunks_of(bucket.tree("work/stores")) == local and len(local) > 8


def test_lock_of_a_store_at_s3_is_given_back(dumped, bucket):
    assert [key for key in bucket.keys("work/") if ".lock" in key] == []


def test_units_deleted_at_s3_are_all_that_is_computed_again(dumped, bucket):
    before = {key: bucket.get(key) for key in bucket.keys("work/")}
    lost = [key for key in before if "/argmax/c/" in key][1::3]
    for key in before:
        bucket.tag(key)
    for key in lost:
        bucket.delete(key)
    teacher_logits.run(loaded(*dumped), CPU)
    assert {key: bucket.get(key) for key in bucket.keys("work/")} == before
    places = {key.partition("/c/")[2] for key in lost}
    for key in before:
        block_and_shard = "/".join(key.partition("/c/")[2].split("/")[:2])
        assert bucket.tagged(key) == (block_and_shard not in places), key


def test_unit_damaged_at_s3_is_computed_again(dumped, bucket):
    before = bucket.tree("work/stores")
    for seed, key in enumerate(sorted(bucket.keys("work/stores/"))):
        if key.endswith("/c/1/2") or key.endswith("/c/0/1/0"):
            bucket.flip(key, seed)
    assert bucket.tree("work/stores") != before
    teacher_logits.run(loaded(*dumped), CPU)
    assert bucket.tree("work/stores") == before


def test_teacher_logits_leaves_a_part_at_s3_to_the_machine_that_holds_it(dumped, bucket, monkeypatch):
    place = f"{store_url(loaded(*dumped))}.part-0-of-1.lock".removeprefix(f"{bucket.url}/")
    held_elsewhere(bucket, place, age=10)
    monkeypatch.setattr("pipeline.common.lease.time.sleep", lambda _: held_elsewhere(bucket, place, age=0))  # it is renewed
    more = loaded(*dumped, "teacher_logits.views=12")  # a complete store needs no lock
    assert "process 7 on another" in refusal(teacher_logits.run, more, CPU, kind=UsageError)


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_student_of_shards_and_store_at_s3_has_the_weights_of_a_local_one(name, taught, dumped):
    train_student.run(taught, CPU, name)
    url, config = store_url(loaded(*dumped)), loaded(*dumped[:-1])  # its training state is local
    train_student.run(config, CPU, name, store=url)
    # not the files: each names its run
    local, remote = (read_weights(student_folder(c, name) / "weights.safetensors") for c in (taught, config))
    assert state_dict_hash(local) == state_dict_hash(remote)


@pytest.mark.parametrize("name", ["published", "published.tar"])
def test_store_published_at_s3_is_fetched_as_it_was(name, taught, bucket):
    before, url = tree(Path("work/stores")), f"{bucket.url}/{name}"
    call("store", "publish", url)
    shutil.rmtree("work/stores")
    call("store", "fetch", url)
    assert tree(Path("work/stores")) == before


def test_publishing_again_at_s3_adds_what_is_missing_and_refuses_another_store(taught, bucket):
    call("store", "publish", f"{bucket.url}/published")
    before = bucket.tree("published")
    packs = [key for key in bucket.keys("published/packs/")]
    for key in packs:
        bucket.tag(key)
    bucket.delete(packs[0])
    call("store", "publish", f"{bucket.url}/published")
    assert bucket.tree("published") == before
    assert [bucket.tagged(key) for key in packs] == [False, *[True] * (len(packs) - 1)]
    more = ("--set", "teacher_logits.kind=argmax", "--set", "students=[hard]")
    assert "another store is published" in call("store", "publish", f"{bucket.url}/published", *more, code=2)


def test_pack_damaged_at_s3_is_refused_by_its_name(taught, bucket):
    call("store", "publish", f"{bucket.url}/published")
    damaged = bucket.keys("published/packs/")[1]
    bucket.flip(damaged)
    shutil.rmtree("work/stores")
    assert damaged.removeprefix("published/") in call("store", "fetch", f"{bucket.url}/published", code=1)


def test_bucket_to_publish_in_that_is_not_there_is_named(taught, bucket):
    assert "s3://no-such-bucket-here/a" in call("store", "publish", "s3://no-such-bucket-here/a", code=1)


def verify(config: Config, recomputed: int = 0) -> None:
    spec = store_spec(config, "train-student")
    maintenance.verify(config, spec, find_store(config, spec), spec.folder / "manifest.json", recomputed, CPU)


def repair(config: Config) -> None:
    spec = store_spec(config, "train-student")
    maintenance.repair(find_store(config, spec), spec)


def test_store_verify_says_that_a_store_at_s3_is_valid(dumped, capsys):
    verify(loaded(*dumped), 1)
    assert "valid" in capsys.readouterr().out


def test_store_verify_finds_what_was_damaged_at_s3_and_repair_drops_it(dumped, bucket, capsys):
    key = next(key for key in bucket.keys("work/") if key.endswith("/dense/c/1/2/0"))
    bucket.flip(key)
    config = loaded(*dumped)
    refusal(verify, config)
    repair(config)
    assert capsys.readouterr().out.count("removed a damaged unit") == 1
    left = bucket.keys("work/")
    assert key not in left and key.replace("/dense/c/1/2/0", "/argmax/c/1/2") in left  # which other kinds share


def test_store_verify_finds_a_shard_that_was_damaged_at_s3(dumped, bucket):
    bucket.flip("train/000001.tar")
    refusal(verify, loaded(*dumped))


# leases

HOLDER = """
import sys
import pipeline.common.lease
pipeline.common.lease.LEASE_SECONDS = 2.0
with pipeline.common.lease.lease(sys.argv[1], "work"):
    print("held", flush=True)
    sys.stdin.read()
"""


def held_elsewhere(bucket: Bucket, key: str, age: float) -> None:
    bucket.put(key, json.dumps({"host": "another", "process": 7, "token": "x", "renewed": time.time() - age}).encode())


@pytest.fixture
def at_once(monkeypatch):
    """A lease at a URL waits a second for a rival's; these tests have none."""
    monkeypatch.setattr("pipeline.common.lease.time.sleep", lambda _: None)


def test_lease_at_s3_refuses_a_second_holder_and_names_the_first(bucket, monkeypatch):
    monkeypatch.setattr("pipeline.common.lease.LEASE_SECONDS", 2.0)
    with lease(f"{bucket.url}/locks/a.lock", "work"):
        with pytest.raises(UsageError, match=f"process {os.getpid()} on "), lease(
            f"{bucket.url}/locks/a.lock", "work"
        ):
            pass


def test_lease_at_s3_is_free_after_its_block(bucket, at_once):
    for _ in range(2):
        with lease(f"{bucket.url}/a.lock", "work"):
            assert json.loads(bucket.get("a.lock"))["process"] == os.getpid()
        assert bucket.keys() == []


def test_lease_at_s3_is_free_after_its_block_raised(bucket, at_once):
    with pytest.raises(ValueError), lease(f"{bucket.url}/a.lock", "work"):
        raise ValueError
    with lease(f"{bucket.url}/a.lock", "work"):
        pass


def test_lease_that_another_machine_renews_at_s3_is_respected_and_left(bucket, monkeypatch):
    held_elsewhere(bucket, "a.lock", age=10)
    monkeypatch.setattr("pipeline.common.lease.time.sleep", lambda _: held_elsewhere(bucket, "a.lock", age=0))
    with pytest.raises(UsageError, match="process 7 on another"), lease(f"{bucket.url}/a.lock", "work"):
        pass
    assert json.loads(bucket.get("a.lock"))["process"] == 7


def test_lease_at_s3_that_was_not_renewed_is_dead(bucket, at_once):
    held_elsewhere(bucket, "a.lock", age=LEASE_SECONDS + 1)
    with lease(f"{bucket.url}/a.lock", "work"):
        assert json.loads(bucket.get("a.lock"))["process"] == os.getpid()


def test_lease_at_s3_is_broken_on_demand(bucket, at_once):
    held_elsewhere(bucket, "a.lock", age=10)
    with lease(f"{bucket.url}/a.lock", "work", break_lock=True):
        assert json.loads(bucket.get("a.lock"))["process"] == os.getpid()


def test_of_two_who_take_a_lease_at_s3_at_once_the_last_has_it(bucket, monkeypatch):
    monkeypatch.setattr("pipeline.common.lease.time.sleep", lambda _: held_elsewhere(bucket, "a.lock", age=0))
    with pytest.raises(UsageError, match="process 7 on another"), lease(f"{bucket.url}/a.lock", "work"):
        pass
    assert json.loads(bucket.get("a.lock"))["process"] == 7


def test_held_lease_at_s3_is_renewed(bucket, at_once, monkeypatch):
    monkeypatch.setattr("pipeline.common.lease.LEASE_SECONDS", 0.1)
    with lease(f"{bucket.url}/a.lock", "work"):
        first = json.loads(bucket.get("a.lock"))["renewed"]
        # every look asks the server, so a thousand take far longer than a renewal
        assert any(json.loads(bucket.get("a.lock"))["renewed"] > first for _ in range(1000))


def test_lease_in_a_bucket_that_is_not_there_is_told_plainly(bucket, at_once):
    with pytest.raises(PipelineError, match="cannot be written"), lease("s3://nowhere/a.lock", "work"):
        pass


@pytest.mark.parametrize("end", ["leaves", "is-killed"])
def test_lease_at_s3_of_another_process_is_refused_and_free_when_it(end, bucket, monkeypatch):
    monkeypatch.setattr("pipeline.common.lease.LEASE_SECONDS", 2.0)
    url = f"{bucket.url}/a.lock"
    command = [sys.executable, "-c", HOLDER, url]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UsageError, match=f"process {holder.pid} on "), lease(url, "work"):
                pass
        finally:
            holder.kill() if end == "is-killed" else holder.stdin.close()
            holder.wait()
    with lease(url, "work"):
        pass


# a server that does not answer, or is too busy to


@pytest.fixture
def own(client):
    """A server of the test's own, to be stopped, and a client; afterwards s3:// is the common one again."""
    started = Server()
    with client_of(started) as another:
        yield started, another
    started.stop()


@pytest.mark.parametrize("call", [
    lambda: index_shard("s3://bucket", "a.tar"),
    lambda: opened("s3://bucket/s.zarr"),
    lambda: create("s3://bucket/s.zarr"),
    lambda: lease("s3://bucket/a.lock", "work").__enter__(),
], ids=["shard", "reading", "writing", "lease"])  # fmt: skip
def test_server_that_does_not_answer_is_told_plainly(call, own):
    own[0].stop()
    refusal(call)


def test_missing_credentials_are_told_plainly(client, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    connect_anew()
    try:
        refusal(index_shard, "s3://bucket", "a.tar")
    finally:
        connect_anew()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_lease_at_s3_is_renewed_after_the_server_was_away(own, at_once, monkeypatch):
    monkeypatch.setattr("pipeline.common.lease.LEASE_SECONDS", 0.5)
    server, client = own
    Bucket(client, "bucket")
    with lease("s3://bucket/a.lock", "work"):
        server.stop()
        threading.Event().wait(1)  # several renewals; at_once has time.sleep do nothing
        server.start()
        bucket = Bucket(client, "bucket")
        # it is back without its objects: what is there now was renewed
        assert any("a.lock" in bucket.keys() for _ in range(1000))


@pytest.mark.parametrize("name", ["check", "argmax", "dense"])
def test_unit_that_s3_is_too_busy_to_give_is_not_removed_as_damaged(name, stored, bucket, server):
    store = opened(stored("dense"))
    store.check_unit(Unit(0, 0), "dense")
    before = bucket.keys()
    with server.busy(f"/{name}/c/1/1"), contextlib.suppress(PipelineError):
        remove_damaged(store, "dense", store.units(VIEWS))
    assert bucket.keys() == before


def test_unit_that_s3_is_too_busy_to_give_is_not_dropped_by_repair(dumped, bucket, server):
    before = bucket.keys("work/")
    with server.busy("/dense/c/1/2"), contextlib.suppress(PipelineError):
        repair(loaded(*dumped))
    assert bucket.keys("work/") == before


@pytest.mark.parametrize("name", ["check", "argmax", "dense"])
def test_no_unit_of_an_array_that_s3_is_too_busy_to_describe_is_removed(name, stored, bucket, server):
    store = opened(stored("dense"))  # which describes an array to itself when it first reads it
    before = bucket.keys()
    with server.busy(f"/{name}/zarr.json"), contextlib.suppress(PipelineError):
        remove_damaged(store, "dense", store.units(VIEWS))
    assert bucket.keys() == before


@pytest.mark.parametrize("place", ["/s.zarr/zarr.json", "/argmax/zarr.json"])
def test_store_that_s3_is_too_busy_to_describe_is_not_called_damaged(place, stored, server):
    url = stored("topk")
    with server.busy(place):
        assert "damaged" not in refusal(opened, url)


def test_another_kind_is_kept_while_s3_is_too_busy_to_give_its_checksums(stored, bucket, server):
    store = create(stored("dense"), "topk")
    before = bucket.keys()
    with server.busy("/check/c/1/1"), contextlib.suppress(PipelineError):
        fill(store, "topk", units=[Unit(1, 1)])
    assert set(before) <= set(bucket.keys())


def test_lease_that_s3_is_too_busy_to_show_is_not_taken(bucket, server, at_once):
    held_elsewhere(bucket, "a.lock", age=10)
    before, taken = bucket.get("a.lock"), []
    with server.busy("/a.lock"), contextlib.suppress(PipelineError), lease(f"{bucket.url}/a.lock", "work"):
        taken.append("it was")
    assert not taken and bucket.get("a.lock") == before


@pytest.mark.parametrize("call", [
    lambda store: store.missing(VIEWS, "argmax"),
    lambda store: store.arrays(),
], ids=["missing", "arrays"])  # fmt: skip
def test_server_that_goes_away_is_told_plainly_by_an_open_store(call, own):
    server, client = own
    store = create(f"{Bucket(client, 'bucket').url}/s.zarr")
    server.stop()
    refusal(call, store)
