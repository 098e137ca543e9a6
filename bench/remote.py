"""Reading images of shards at a URL in the plan's order, against streaming them with webdataset.

An HTTP server in a process of its own waits `--latency` milliseconds before it answers a request, and then sends at
most `--bandwidth` MB/s per connection. Shards have 256 images of 94 kB (noise). Measured is reading in one process:
encoded bytes, no decoding, one cycle of a plan with 4 open shards.

\b
* copies, cold: data.cache, empty before;
* copies, warm: the same a cycle later, when all shards have copies;
* ranges, one by one: without a cache, a request per image;
* ranges, 16 at a time: the same, a group at a time, as where the cache has no room;
* webdataset: `WebDataset(urls)`, its own order: shard after shard.

Every image that is read in the plan's order is compared with its CRC-32C.

\b
    python bench/remote.py [--rounds 3]
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything starts a thread pool

import collections
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import fsspec
from experiment import make_index, photographs
from machine import conditions
from results import head, ratios, rotated, row, spread
from webdataset.compat import WebDataset

from pipeline.batches.plan import Plan
from pipeline.config.schema import Recipe
from pipeline.shards.cache import ShardCache
from pipeline.shards.index import Index
from pipeline.shards.indexing import index_shard, write_index

SHARDS, SAMPLES, OPEN_SHARDS = 12, 256, 4
RECIPE = Recipe()
CHUNK = 2**18


def serve(folder: Path, latency: float, bandwidth: float, counts: Any, port: Any) -> None:
    """Serve a folder's files and ranges of them; counts requests and bytes."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def do_GET(self) -> None:
            time.sleep(latency)
            data = (folder / self.path[1:]).read_bytes() if "Range" not in self.headers else None
            if data is None:
                first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
                with open(folder / self.path[1:], "rb") as file:
                    data = os.pread(file.fileno(), last + 1 - first, first)
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with counts.get_lock():
                counts[0], counts[1] = counts[0] + 1, counts[1] + len(data)
            start = time.perf_counter()
            for sent in range(0, len(data), CHUNK):
                time.sleep(max(0.0, start + sent / bandwidth - time.perf_counter()))
                self.wfile.write(data[sent : sent + CHUNK])

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.put(server.server_port)
    server.serve_forever()


def visits(plan: Plan) -> list:
    """The first view of every visit of one cycle: what is decoded for all its views."""
    return [plan.item(number) for number in range(0, plan.groups * RECIPE.repeats, RECIPE.repeats)]


def one_by_one(index: Index, plan: Plan) -> int:
    return sum(len(index.read(item.shard, int(n))) > 0 for item in visits(plan) for n in plan.members(item))


def by_groups(index: Index, plan: Plan) -> int:
    return sum(len(index.read_many(item.shard, plan.members(item).tolist())) for item in visits(plan))


def streamed(urls: list[str]) -> int:
    return sum(len(sample["jpg"]) > 0 for sample in WebDataset(urls, shardshuffle=False))


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True)
@click.option("--latency", default=20.0, show_default=True, help="Milliseconds per request.")
@click.option("--bandwidth", default=80.0, show_default=True, help="MB/s per connection.")
def main(rounds: int, latency: float, bandwidth: float):
    print(conditions())
    print(f"* fsspec {fsspec.__version__}, webdataset {version('webdataset')}; {latency:g} ms, {bandwidth:g} MB/s\n")
    context = multiprocessing.get_context("spawn")
    counts, port = context.Array("q", 2), context.Queue()
    with tempfile.TemporaryDirectory() as temporary:
        root, copies = Path(temporary), Path(temporary) / "copies"
        local = make_index(root / "shards", photographs(50), [SAMPLES] * SHARDS, 10)
        arguments = (root / "shards", latency / 1e3, bandwidth * 1e6, counts, port)
        server = context.Process(target=serve, args=arguments, daemon=True)
        server.start()
        location = f"http://127.0.0.1:{port.get()}"
        shards = [index_shard(local.location, name) for name in local.names]
        write_index(root / "at-url.json", location, local.classes, shards)
        plan = Plan(RECIPE, tuple(local.names), (SAMPLES,) * SHARDS, RECIPE.block, 16, open_shards=OPEN_SHARDS)
        cache = ShardCache(copies, 10**12)
        cold = partial(by_groups, Index(root / "at-url.json", cache), plan)
        without = Index(root / "at-url.json")
        ways: dict[str, Callable[[], int]] = {
            "copies, cold": lambda: (shutil.rmtree(copies, ignore_errors=True), cold())[1],
            "copies, warm": cold,
            "ranges, one by one": partial(one_by_one, without, plan),
            "ranges, 16 at a time": partial(by_groups, without, plan),
            "webdataset": partial(streamed, [f"{location}/{name}" for name in local.names]),
        }
        rates, used = collections.defaultdict(list), {}
        for turn in range(rounds):
            for name in rotated(["copies", *list(ways)[2:]], turn):
                for way in [name] if name in ways else ["copies, cold", "copies, warm"]:
                    counts[0] = counts[1] = 0
                    start = time.perf_counter()
                    assert ways[way]() == SHARDS * SAMPLES
                    rates[way].append(SHARDS * SAMPLES / (time.perf_counter() - start))
                    used[way] = counts[0], counts[1]
        server.terminate()
    head(f"{SHARDS * SAMPLES:,} images, {rounds} rounds", "samples/s", "/ webdataset", "requests", "MB")
    for way, found in rates.items():
        times = spread(ratios(found, rates["webdataset"]))
        row(way, spread(found), times, f"{used[way][0]:,}", f"{used[way][1] / 1e6:,.1f}")


if __name__ == "__main__":
    main()
