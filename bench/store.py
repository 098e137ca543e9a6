"""The store of answers beside a memory map of the same numbers and records read by a sample's name.

50,000 rows in 50 shards of 1,000, random answers over 1,000 classes; a store of one block, so a unit is
1,000 rows in `--block` views. 30 views as in the recipe are too many of the dense kinds for a benchmark,
so all kinds are measured at 3; argmax and topk also at `--narrow-block`.

ours: pipeline.store.reader.Store, which compares the CRC-32C and the checksum of all it reads. memmap: the same
argmax and payload as raw `np.memmap`, nothing checked; the limit. keyed: a file a view of fixed-size
records (int32 seed, int16 classes, then the values), a list of the samples' names beside it, each record
sought and read by its name; topk keeps 10 classes and 10 float16, argmax one of each, the dense kinds the
argmax and the row. Keyed is given its best: whole units written at once, one decoding for all records of
a read, read through a buffer in tar order and without one in training's.

\b
* written: from nothing until every file and folder is synced, by the same function for all;
* then every answer that a method gives is compared with what was written, which fills the page cache;
* one view of a shard: the Store's cache is emptied before each;
* shard order: all views of a shard, then the next; by view of 1,000 rows;
* training order: pipeline.batches.plan's with 16 open shards, a step of 16 groups at a time. `read_predictions` is
  what training calls: it compares the groups' checks too, and makes tensors.

Methods take turns at every piece of work and change places; ratios are taken within a round.

\b
    python bench/store.py [--rounds 5] [--loader-rate 1000]
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything starts a thread pool

import collections
import contextlib
import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch
from machine import conditions, filesystem, spread

from pipeline.batches.plan import Item, Plan, Unit
from pipeline.config.schema import Recipe
from pipeline.store.encoding import DTYPES, KINDS, payload_width
from pipeline.store.reader import Store, StoreIdentity
from pipeline.store.writer import StoreWriter
from pipeline.training.teachers import read_predictions
from pipeline.views.draw import group_count

SHARDS, SAMPLES, CLASSES, TOP_K = 50, 1000, 1000, 10
STEP = 16  # groups
NARROW = ("argmax", "topk")


class Rows:
    """Stands for an index: what a store asks of one."""

    def __init__(self):
        self.fingerprint = "f" * 32
        self.names = [f"{shard:06d}.tar" for shard in range(SHARDS)]
        self.samples = np.full(SHARDS, SAMPLES)
        self.classes = [str(label) for label in range(CLASSES)]
        self.shards = [{"name": name, "samples": SAMPLES} for name in self.names]
        self.keys = [[f"n{shard:08d}/n{shard:08d}_{number}" for number in range(SAMPLES)] for shard in range(SHARDS)]


ROWS = Rows()


@dataclasses.dataclass(frozen=True)
class Case:
    """What is stored and read: a kind in a number of views; its random answers, the same for every method."""

    kind: str
    views: int

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(block=self.views)

    @property
    def width(self) -> int:
        return payload_width(self.kind, CLASSES, TOP_K)

    @property
    def rows(self) -> int:
        return SHARDS * SAMPLES * self.views

    @cached_property
    def argmax(self) -> np.ndarray:
        """uint16 (shards, views, samples)."""
        return np.random.default_rng(0).integers(0, CLASSES, (SHARDS, self.views, SAMPLES), np.uint16)

    @cached_property
    def payload(self) -> np.ndarray | None:
        """(shards, views, samples, width): any bits, but a top k's classes are classes, its first the argmax."""
        if not self.width:
            return None
        rng, dtype = np.random.default_rng(1), np.dtype(DTYPES[self.kind])
        shape = (SHARDS, self.views, SAMPLES, self.width)
        payload = np.frombuffer(bytearray(rng.bytes(int(np.prod(shape)) * dtype.itemsize)), dtype).reshape(shape)
        if self.kind == "topk":
            payload[..., :TOP_K] %= CLASSES
            payload[..., 0] = self.argmax
        return payload

    @cached_property
    def checks(self) -> np.ndarray:
        """uint64 (shards, views, groups)."""
        shape = (SHARDS, self.views, group_count(SAMPLES, self.recipe.group_size))
        return np.random.default_rng(2).integers(0, 2**63, shape, np.uint64)

    @cached_property
    def plan(self) -> Plan:
        return Plan(self.recipe, tuple(ROWS.names), (SAMPLES,) * SHARDS, self.views, STEP)

    def right(self, shard: int, view: int, argmax: np.ndarray, payload: np.ndarray | None) -> bool:
        """Whether these bits are what was written; of a payload, as many columns as there are."""
        if payload is None:
            return np.array_equal(argmax, self.argmax[shard, view])
        own = self.payload[shard, view, :, : payload.shape[1]]
        return np.array_equal(argmax, self.argmax[shard, view]) and own.tobytes() == payload.tobytes()


class Ours:
    """pipeline.store.reader.Store."""

    def __init__(self, folder: Path, case: Case):
        self.folder, self.case = folder, case

    def write(self) -> None:
        case, identity = self.case, StoreIdentity(ROWS.fingerprint, self.case.recipe, {"model": "none"})
        store = StoreWriter.create(str(self.folder), identity, ROWS, case.views, case.kind, TOP_K, "float32")
        for shard in range(SHARDS):
            buffers = {"argmax": case.argmax[shard]}
            if case.payload is not None:
                buffers[case.kind] = case.payload[shard]
            store.write_unit(Unit(shard, 0), buffers, case.checks[shard])

    def open(self) -> "Ours":
        self.store = Store.open(str(self.folder), ROWS, self.case.recipe)
        return self

    def forget(self) -> None:
        self.store._cache.clear()

    def view(self, shard: int, view: int) -> tuple[np.ndarray, np.ndarray | None]:
        answers = self.store.read(shard, view, self.case.kind)
        return answers.argmax, answers.payload

    def right(self, shard: int, view: int) -> bool:
        return self.case.right(shard, view, *self.view(shard, view))

    def step(self, items: list[Item], members: list[np.ndarray]) -> None:
        for item, chosen in zip(items, members, strict=True):
            argmax, payload = self.view(item.shard, item.view)
            _ = argmax[chosen], payload if payload is None else payload[chosen]


class AsTrained(Ours):
    """The same, in training order as a training asks for it."""

    def step(self, items: list[Item], members: list[np.ndarray]) -> None:
        checks = [int(self.case.checks[item.shard, item.view, item.group]) for item in items]
        labels = np.empty((len(items), self.case.recipe.group_size))
        batch = SimpleNamespace(items=items, members=members, checks=checks, labels=labels)
        read_predictions(self.store, batch, self.case.kind)


class Mapped:
    """The same argmax and payload, row after row of a view, as raw memory maps; copied out, not checked."""

    def __init__(self, folder: Path, case: Case):
        self.folder, self.case = folder, case

    def _maps(self, mode: str) -> list[np.memmap]:
        shape, dtype = (self.case.views, SHARDS * SAMPLES), DTYPES[self.case.kind]
        maps = [np.memmap(self.folder / "argmax", np.uint16, mode, shape=shape)]
        if self.case.width:
            maps.append(np.memmap(self.folder / "payload", dtype, mode, shape=(*shape, self.case.width)))
        return maps

    def write(self) -> None:
        self.folder.mkdir()
        maps = self._maps("w+")
        for shard in range(SHARDS):
            rows = slice(shard * SAMPLES, (shard + 1) * SAMPLES)
            for mapped, answers in zip(maps, (self.case.argmax, self.case.payload), strict=False):
                mapped[:, rows] = answers[shard]
        for mapped in maps:
            mapped.flush()

    def open(self) -> "Mapped":
        self.maps = self._maps("r")
        return self

    def forget(self) -> None:
        pass

    def view(self, shard: int, view: int) -> list[np.ndarray]:
        return [np.array(mapped[view, shard * SAMPLES : (shard + 1) * SAMPLES]) for mapped in self.maps]

    def right(self, shard: int, view: int) -> bool:
        return self.case.right(shard, view, *[*self.view(shard, view), None][:2])

    def step(self, items: list[Item], members: list[np.ndarray]) -> None:
        for item, chosen in zip(items, members, strict=True):
            _ = [np.asarray(mapped[item.view])[item.shard * SAMPLES + chosen] for mapped in self.maps]


class Keyed:
    """A file a view of fixed-size records: a sample's record is sought and read by its name."""

    def __init__(self, folder: Path, case: Case):
        self.folder, self.case, self.files, self.stack = folder, case, {}, contextlib.ExitStack()
        classes = TOP_K if case.kind == "topk" else 1
        values = {"argmax": ("<f2", 1), "topk": ("<f2", TOP_K)}.get(case.kind, (DTYPES[case.kind], case.width))
        self.record = np.dtype([("seed", "<i4"), ("classes", "<i2", classes), ("values", *values)])

    def write(self) -> None:
        paths = [self.folder / str(view) for view in range(self.case.views)]
        for path in paths:
            path.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            keys = [stack.enter_context(open(path / "keys.txt", "wb")) for path in paths]
            values = [stack.enter_context(open(path / "values.bin", "wb")) for path in paths]
            for shard in range(SHARDS):
                names = "".join(f"{key}\n" for key in ROWS.keys[shard]).encode()
                for view in range(self.case.views):
                    keys[view].write(names)
                    values[view].write(self._records(shard, view).tobytes())

    def _records(self, shard: int, view: int) -> np.ndarray:
        records, kind = np.zeros(SAMPLES, self.record), self.case.kind
        records["seed"] = view
        if kind == "topk":
            payload = self.case.payload[shard, view]
            records["classes"] = payload[:, :TOP_K]
            records["values"] = payload[:, TOP_K : 2 * TOP_K].view(np.float16)
        else:
            records["classes"][:, 0] = self.case.argmax[shard, view]
            if kind != "argmax":
                records["values"] = self.case.payload[shard, view]
        return records

    def open(self) -> "Keyed":
        self._file(0)
        return self

    def close(self) -> None:
        self.stack.close()

    def _file(self, view: int):
        """Names to record numbers; the records buffered, and unbuffered."""
        if view not in self.files:
            names = (self.folder / str(view) / "keys.txt").read_text().split()
            path = self.folder / str(view) / "values.bin"
            buffered = self.stack.enter_context(open(path, "rb"))
            unbuffered = self.stack.enter_context(open(path, "rb", buffering=0))
            self.files[view] = {name: number for number, name in enumerate(names)}, buffered, unbuffered
        return self.files[view]

    def forget(self) -> None:
        pass

    def _read(self, names: Iterable[str], numbers: dict[str, int], file) -> np.ndarray:
        size, found = self.record.itemsize, []
        for name in names:
            file.seek(numbers[name] * size)
            found.append(file.read(size))
        return np.frombuffer(b"".join(found), self.record)

    def view(self, shard: int, view: int) -> np.ndarray:
        numbers, buffered, _ = self._file(view)
        return self._read(ROWS.keys[shard], numbers, buffered)

    def right(self, shard: int, view: int) -> bool:
        records, kind = self.view(shard, view), self.case.kind
        parts = {"argmax": [], "topk": [records["classes"].astype(np.uint16), records["values"].view(np.uint16)]}
        payload = parts.get(kind, [records["values"]])
        payload = np.concatenate(payload, axis=1) if payload else None
        return self.case.right(shard, view, records["classes"][:, 0], payload)

    def step(self, items: list[Item], members: list[np.ndarray]) -> None:
        for item, chosen in zip(items, members, strict=True):
            numbers, _, unbuffered = self._file(item.view)
            names = ROWS.keys[item.shard]
            self._read((names[position] for position in chosen.tolist()), numbers, unbuffered)


METHODS = {"ours": Ours, "memmap": Mapped, "keyed": Keyed}
PEERS = ("memmap", "keyed")
Seconds = dict[str, list[float]]
"""By method, one a round."""


def take_turns(methods: dict, jobs: list[tuple], turn: int, work: Callable, forget: bool = False) -> dict[str, float]:
    """Seconds that each method takes for all jobs; they change places from job to job.

    With `forget`, a method's Python caches are emptied before every job, which is not timed.
    """
    spent, names = collections.Counter(), list(methods)
    for number, job in enumerate(jobs):
        first = (turn + number) % len(names)
        for name in names[first:] + names[:first]:
            if forget:
                methods[name].forget()
            start = time.perf_counter()
            work(methods[name], *job)
            spent[name] += time.perf_counter() - start
    return dict(spent)


def collect(rounds: list[dict[str, float]]) -> Seconds:
    return {name: [spent[name] for spent in rounds] for name in rounds[0]}


def settle(folder: Path) -> None:
    """Sync every file and folder below, and the folder that it lies in."""
    for path in [folder.parent, folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write(root: Path, case: Case, rounds: int) -> tuple[dict, Seconds]:
    """Write everything anew in every round, until it is durable; the last round's stays."""

    def durably(method) -> None:
        method.write()
        settle(method.folder)

    spent = []
    for turn in range(rounds):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        settle(root)
        methods = {name: method(root / name, case) for name, method in METHODS.items()}
        spent.append(take_turns(methods, [()], turn, durably))
    return methods, collect(spent)


def compare(methods: dict, case: Case) -> None:
    """Every method must give what was written, bit for bit; all its files come into the page cache."""
    for name, method in methods.items():
        wrong = [at for at in np.ndindex(SHARDS, case.views) if not method.right(*at)]
        assert not wrong, f"{name}: other answers than those written: shard and view {wrong[:3]}"


def opening(methods: dict, case: Case, turn: int) -> dict[str, float]:
    fresh = {name: type(method)(method.folder, case) for name, method in methods.items()}
    spent = take_turns(fresh, [()], turn, lambda method: method.open())
    fresh["keyed"].close()
    return spent


def first_view(methods: dict, case: Case, turn: int) -> dict[str, float]:
    fresh = {name: type(method)(method.folder, case) for name, method in methods.items()}
    spent = take_turns(fresh, [()], turn, lambda method: method.open().view(0, 0))
    fresh["keyed"].close()
    return spent


def one_view(methods: dict, case: Case, turn: int) -> dict[str, float]:
    """Of every shard, one view."""
    views = np.random.default_rng(turn).integers(case.views, size=SHARDS)
    places = [(shard, int(view)) for shard, view in enumerate(views)]
    return take_turns(methods, places, turn, lambda method, *at: method.view(*at), forget=True)


def shard_order(methods: dict, case: Case, turn: int) -> dict[str, float]:
    """All views of a shard, for about 150 views."""

    def all_views(method, shard: int) -> None:
        for view in range(case.views):
            method.view(shard, view)

    shards = np.random.default_rng(turn).permutation(SHARDS)[: in_shard_order(case)]
    return take_turns(methods, [(int(shard),) for shard in shards], turn, all_views, forget=True)


def in_shard_order(case: Case) -> int:
    return min(SHARDS, max(1, SHARDS * 3 // case.views))


def training_order(methods: dict, case: Case, turn: int) -> dict[str, float]:
    """One cycle: every group once, in three views each."""
    plan, in_cycle = case.plan, case.plan.groups * case.recipe.repeats
    items = [plan.item(number) for number in range(turn * in_cycle, (turn + 1) * in_cycle)]
    steps = [items[first : first + STEP] for first in range(0, in_cycle, STEP)]
    jobs = [(step, [plan.members(item) for item in step]) for step in steps]
    for method in methods.values():
        method.forget()
    return take_turns(methods, jobs, turn, lambda method, *step: method.step(*step))


def measure(root: Path, case: Case, rounds: int, writes: int) -> dict[str, Seconds]:
    """Seconds by operation."""
    methods, written = write(root, case, writes)
    for method in methods.values():
        method.open()
    compare(methods, case)
    trained = methods | {"read_predictions": AsTrained(root / "ours", case).open()}
    found = collections.defaultdict(list)
    for turn in range(rounds + 1):
        for operation in (opening, first_view, one_view, shard_order):
            found[operation].append(operation(methods, case, turn))
        found[training_order].append(training_order(trained, case, turn))
    methods["keyed"].close()
    # the first round warms up
    return {write: written} | {operation: collect(spent[1:]) for operation, spent in found.items()}


FIGURES = {  # an operation's title, and its figure out of the seconds
    write: ("written until durable, million rows/s", lambda s, case: case.rows / s / 1e6),
    opening: ("opened, ms", lambda s, case: s * 1e3),
    first_view: ("opened and a first view read, ms", lambda s, case: s * 1e3),
    one_view: ("one view of a shard, ms", lambda s, case: s * 1e3 / SHARDS),
    shard_order: ("shard order, ms a view", lambda s, case: s * 1e3 / (in_shard_order(case) * case.views)),
    training_order: ("training order, us a sample", lambda s, case: s * 1e6 / (SHARDS * SAMPLES * case.recipe.repeats)),
}


def figures(operation: Callable, seconds: list[float], case: Case) -> list[float]:
    return [FIGURES[operation][1](s, case) for s in seconds]


def faster(spent: Seconds, peer: str, ours: str = "ours") -> list[float]:
    """How many times as fast as a peer we are, by round."""
    return [theirs / own for theirs, own in zip(spent[peer], spent[ours], strict=True)]


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of all files below; and of the disk's blocks that files and folders take, as du counts."""
    stats = [(path.is_file(), path.stat()) for path in [folder, *folder.rglob("*")]]
    return sum(stat.st_size for is_file, stat in stats if is_file), sum(stat.st_blocks * 512 for _, stat in stats)


def report(root: Path, case: Case, found: dict[str, Seconds]) -> None:
    print(f"\n## {case.kind}, units of {SAMPLES:,} rows x {case.views} views: {case.rows / 1e6:.2f} million rows\n")
    print("| | ours | memmap | keyed | x as fast as memmap | x as fast as keyed |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for operation, spent in found.items():
        title = FIGURES[operation][0]
        cells = [spread(figures(operation, spent[name], case)) for name in METHODS]
        print_row(title, *cells, *(spread(faster(spent, peer)) for peer in PEERS))
        if "read_predictions" in spent:
            own = spread(figures(operation, spent["read_predictions"], case))
            print_row(f"{title}, `read_predictions`", own, "", "", *(
                spread(faster(spent, peer, "read_predictions")) for peer in PEERS
            ))  # fmt: skip
    taken = {name: sizes(root / name) for name in METHODS}
    for number, title in enumerate(("bytes a row, all files", "bytes a row, blocks on disk")):
        print_row(title, *(f"{taken[name][number] / case.rows:.3f}" for name in METHODS), "", "")


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def print_goal(case: Case, says: str, found: float, bound: float, least: bool = False) -> None:
    """A row that says whether a figure is at most the bound, or at least."""
    met = found >= bound if least else found <= bound
    wanted = f"{'at least' if least else 'at most'} {bound:g}"
    print_row(f"{case.kind}, {case.views} views", says, wanted, f"{found:.3g}", "met" if met else "**not met**")


def goals(root: Path, case: Case, found: dict[str, Seconds], loader_rate: float) -> None:
    """The goals of a case, checked on medians."""
    median = statistics.median
    print("\n| | goal | | found | |\n| --- | --- | ---: | ---: | --- |")
    if case.kind == "argmax":
        print_goal(case, FIGURES[one_view][0], median(figures(one_view, found[one_view]["ours"], case)), 0.6)
    if case.kind in NARROW:
        bound = 5 if case.kind == "argmax" else 4
        print_goal(case, "x as fast as keyed, shard order", median(faster(found[shard_order], "keyed")), bound, True)
    spent = median(figures(training_order, found[training_order]["read_predictions"], case))
    print_goal(case, f"`read_predictions`, % of {loader_rate:g} views/s", spent * loader_rate / 1e4, 0.5)
    if case.kind == "argmax":
        for path, what, bound in ((".", "everything", 2.6), ("argmax", "argmax alone", 2.2)):
            for taken, unit in zip(sizes(root / "ours" / path), ("files", "blocks on disk"), strict=True):
                print_goal(case, f"bytes a row, {what}, {unit}", taken / case.rows, bound)


@click.command(help=__doc__)
@click.option("--block", default=3, show_default=True, help="Views of a unit, for every kind; a multiple of 3.")
@click.option("--narrow-block", "narrow", default=30, show_default=True, help="The same again for argmax and topk.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--write-rounds", "writes", default=3, show_default=True)
@click.option("--loader-rate", default=1000.0, show_default=True, help="Views/s of the loader, for the goal.")
def main(block: int, narrow: int, rounds: int, writes: int, loader_rate: float):
    torch.set_num_threads(1)
    kinds = [(kind, block) for kind in KINDS] + [(kind, narrow) for kind in NARROW if narrow != block]
    print(conditions())
    with tempfile.TemporaryDirectory() as temporary:
        print(f"* files on {filesystem(temporary)}; {rounds} rounds of reading, {writes} of writing")
        for kind, views in kinds:
            case, root = Case(kind, views), Path(temporary) / "case"
            found = measure(root, case, rounds, writes)
            report(root, case, found)
            goals(root, case, found, loader_rate)


if __name__ == "__main__":
    main()
