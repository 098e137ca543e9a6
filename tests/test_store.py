"""The store: what is written is read; what is missing, damaged or another experiment's is refused."""

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import full_disk, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.batches.plan import Unit, all_units
from pipeline.cli.scan import written_units
from pipeline.common.errors import PipelineError, Unreadable, UsageError
from pipeline.common.lease import lease, part_lease_path
from pipeline.config.schema import Config, Recipe
from pipeline.config.store_spec import store_spec
from pipeline.store import encoding as kinds
from pipeline.store import layout as store_files
from pipeline.store import writer as store_writer
from pipeline.store.encoding import to_numpy
from pipeline.store.estimate import equal_shards, estimate
from pipeline.store.kinds import KINDS, payload_width
from pipeline.store.maintenance import remove_damaged
from pipeline.store.manifest import (
    build_manifest,
    damaged_units,
    kind_bytes,
    read_manifest,
    store_bytes,
    write_manifest,
)
from pipeline.store.reader import Store, StoreIdentity
from pipeline.store.sampling import draw_classes
from pipeline.store.writer import StoreWriter, sweep_store
from pipeline.views.draw import group_count

property_settings = settings(derandomize=True, deadline=None, max_examples=25)

RECIPE = Recipe(size=16, group_size=4, repeats=1, block=2)
BLOCK, CLASSES, TOP_K, VIEWS = 2, 7, 3, 4
SAMPLES = (6, 5, 3)  # three shards; the last is ragged in its groups too
TEACHER = {"model": "toy", "weights": "0" * 32}
DRAWS = {"samples": TOP_K, "tau": 1.0, "version": 1}


class Rows:
    """Stands for an index: what a store asks of one."""

    def __init__(self, samples=SAMPLES, fingerprint="f" * 32):
        self.fingerprint = fingerprint
        self.names = [f"{i:06d}.tar" for i in range(len(samples))]
        self.samples = np.array(samples)
        self.classes = [str(i) for i in range(CLASSES)]
        self.shards = [{"name": n, "samples": s} for n, s in zip(self.names, samples, strict=True)]

    def __len__(self):
        return int(self.samples.sum())


def create(path, kind="argmax", views=VIEWS, top_k=TOP_K, precision="float32", **identity) -> Store:
    recipe, index = identity.get("recipe", RECIPE), identity.get("index", Rows())
    sampling = identity.get("sampling", DRAWS if kind == "sampled" else None)
    named = StoreIdentity(index.fingerprint, recipe, identity.get("teacher", TEACHER), sampling)
    return StoreWriter.create(str(path), named, index, views, kind, top_k, precision)


def opened(path) -> Store:
    return Store.open(str(path), Rows(), RECIPE)


def encode(kind: str, logits: torch.Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray | None]:
    """As the store keeps them."""
    offsets = torch.linspace(0.01, 0.99, len(logits), dtype=torch.float64)
    samples = draw_classes(logits, offsets, top_k, 1.0) if kind == "sampled" else None
    argmax, payload = kinds.encode(kind, logits, top_k, samples)
    return to_numpy("argmax", argmax), None if payload is None else to_numpy(kind, payload)


def predictions_of(unit: Unit, kind: str, seed=0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Seeded buffers and checks of a unit."""
    rng = np.random.default_rng([seed, unit.shard, unit.block])
    samples = SAMPLES[unit.shard]
    logits = torch.from_numpy(rng.normal(0, 3, (BLOCK * samples, CLASSES)).astype(np.float32))
    argmax, payload = encode(kind, logits, TOP_K)
    buffers = {"argmax": argmax.reshape(BLOCK, samples)}
    if payload is not None:
        buffers[kind] = payload.reshape(BLOCK, samples, -1)
    return buffers, rng.integers(0, 2**63, (BLOCK, group_count(samples, 4)), np.uint64)


def fill(store: Store, kind: str, views=VIEWS, seed=0, units=None) -> Store:
    for unit in units or all_units(len(SAMPLES), views, RECIPE):
        store.write_unit(unit, *predictions_of(unit, kind, seed))
    return store


def chunks(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name != "zarr.json")


def unit_of(chunk: Path, path: Path) -> Unit:
    """Of ARRAY/c/BLOCK/SHARD/..."""
    parts = chunk.relative_to(path).parts
    return Unit(shard=int(parts[3]), block=int(parts[2]))


def damage_in(path: Path, kind: str, views=VIEWS) -> list[Unit]:
    store = opened(path)
    return [unit for unit, _ in damaged_units(store, store.units(views), kind)]


def refusal(call, *arguments, kind=PipelineError) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A complete store of a kind, made once; give it to `copy` before changing it."""
    made = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "s.zarr"
            fill(create(made[kind], kind), kind)
        return made[kind]

    return make


@pytest.fixture
def copy(filled, tmp_path):
    return lambda kind: Path(shutil.copytree(filled(kind), tmp_path / f"{kind}.zarr"))


every_kind = pytest.mark.parametrize("kind", KINDS)
DIMENSION = {"topk": "packed", "dense": "class", "dense8": "class", "sampled": "sample"}


# write and read


@st.composite
def whole_units(draw, kind: str):
    unit = Unit(draw(st.integers(0, 2)), draw(st.integers(0, 1)))
    samples, width = SAMPLES[unit.shard], payload_width(kind, CLASSES, TOP_K)
    buffers = {"argmax": draw(hnp.arrays(np.uint16, (BLOCK, samples), elements=st.integers(0, CLASSES - 1)))}
    bits = hnp.arrays(np.uint16, (BLOCK, samples, width), elements=st.integers(0, 65535))
    if kind != "argmax":
        payload = draw(bits)
        # any bits, NaN and infinity too
        buffers[kind] = payload.astype(np.uint8) if kind == "dense8" else payload.view(KINDS[kind].dtype)
    shape = (BLOCK, group_count(samples, 4))
    return unit, buffers, draw(hnp.arrays(np.uint64, shape, elements=st.integers(0, 2**64 - 1)))


@every_kind
def test_predictions_are_read_as_they_were_written(kind, tmp_path):
    store = create(tmp_path / "s.zarr", kind)

    @property_settings
    @given(whole_units(kind))
    def holds(written):
        unit, buffers, checks = written
        store.write_unit(unit, buffers, checks)
        reader = opened(tmp_path / "s.zarr")
        for place in range(BLOCK):
            found = reader.read(unit.shard, BLOCK * unit.block + place, kind)
            assert np.array_equal(found.argmax, buffers["argmax"][place])
            assert np.array_equal(found.check, checks[place])
            assert kind == "argmax" or found.payload.tobytes() == buffers[kind][place].tobytes()
        assert np.array_equal(reader.read_unit(unit), buffers["argmax"])

    holds()


@every_kind
def test_units_do_not_touch_one_another(kind, filled):
    reader = opened(filled(kind))
    for unit in all_units(len(SAMPLES), VIEWS, RECIPE):
        buffers, checks = predictions_of(unit, kind)
        for place in range(BLOCK):
            found = reader.read(unit.shard, BLOCK * unit.block + place, kind)
            assert np.array_equal(found.argmax, buffers["argmax"][place])
            assert np.array_equal(found.check, checks[place])
            assert kind == "argmax" or np.array_equal(found.payload, buffers[kind][place])


@pytest.mark.parametrize("kind", ["topk", "dense", "dense8"])
def test_argmax_is_in_every_kind(kind, filled):
    expected = predictions_of(Unit(1, 1), kind)[0]["argmax"][1]
    assert np.array_equal(opened(filled(kind)).read(1, 3).argmax, expected)


def test_kind_that_was_not_stored_is_refused_with_what_there_is(filled):
    message = refusal(opened(filled("argmax")).read, 0, 0, "dense")
    assert "no dense" in message and "argmax" in message and "teacher_logits.kind" in message


def test_predictions_whose_bits_are_the_fill_value_are_stored(tmp_path):
    store = create(tmp_path / "s.zarr", "topk")
    buffers, checks = predictions_of(Unit(0, 0), "topk")
    buffers["topk"][:] = 65535
    store.write_unit(Unit(0, 0), buffers, checks)
    assert (opened(tmp_path / "s.zarr").read(0, 1, "topk").payload == 65535).all()


def test_store_at_a_url_is_written_listed_and_read():
    path = "memory://stores/s.zarr"
    store = create(path, "topk")
    assert len(store.missing(VIEWS, "topk")) == 6
    fill(store, "topk")
    reader = opened(path)
    assert reader.missing(VIEWS, "topk") == []
    assert reader.read(2, 3, "topk").argmax.tolist() == predictions_of(Unit(2, 1), "topk")[0]["argmax"][1].tolist()


@every_kind
def test_xarray_opens_it_with_named_dimensions(kind, filled):
    import xarray

    with xarray.open_zarr(filled(kind), consolidated=False) as data:
        assert data["argmax"].dims == ("view", "row") and data["check"].dims == ("view", "shard", "slot")
        if kind != "argmax":
            assert data[kind].dims == ("view", "row", DIMENSION[kind])
        row = 1 * max(SAMPLES) + 4  # shard by shard, with equal capacity
        assert int(data["argmax"][3, row]) == predictions_of(Unit(1, 1), kind)[0]["argmax"][1, 4]


@pytest.mark.parametrize(("kind", "checksums"), [("argmax", 4), ("topk", 4), ("sampled", 2)])
def test_a_store_has_a_checksum_for_each_kind_that_it_may_hold(kind, checksums, filled):
    store = opened(filled(kind))
    assert store.array_metadata("check")["shape"] == [VIEWS, len(SAMPLES), store.groups + checksums]


def test_attributes_say_what_the_store_is_of(filled):
    attributes = opened(filled("dense")).group.attrs
    assert attributes["recipe_settings"] == RECIPE.model_dump(mode="json")
    assert attributes["teacher"] == TEACHER
    assert (attributes["classes"], attributes["precision"]) == (CLASSES, "float32")
    assert attributes["versions"]["numpy"] == np.__version__


# missing and resuming


def test_a_store_that_another_process_makes_at_the_same_moment_is_shared(tmp_path, monkeypatch):
    fill(create(tmp_path / "s.zarr", "topk"), "topk")
    with monkeypatch.context() as stale:  # neither group nor array was there when this process looked
        stale.setattr("pipeline.store.writer.store_exists", lambda path: False)
        stale.setattr(StoreWriter, "arrays", lambda self: [])
        create(tmp_path / "s.zarr", "topk")
    assert create(tmp_path / "s.zarr", "topk").missing(VIEWS, "topk") == []


def test_unit_that_was_never_written_is_an_error_not_a_fill_value(tmp_path):
    create(tmp_path / "s.zarr")
    message = refusal(opened(tmp_path / "s.zarr").read, 1, 3)
    assert "000001.tar" in message and "block 1" in message and "missing" in message and "do:" in message


def test_unit_that_was_never_written_is_an_error_when_it_is_read_whole(tmp_path):
    create(tmp_path / "s.zarr")
    assert "000001.tar" in refusal(opened(tmp_path / "s.zarr").read_unit, Unit(1, 1))


def test_view_beyond_the_store_is_an_error(filled):
    assert "view 4" in refusal(opened(filled("argmax")).read, 0, 4)


@every_kind
def test_list_of_missing_units_shrinks_by_what_is_written(kind, tmp_path):
    store = create(tmp_path / "s.zarr", kind)
    left = all_units(len(SAMPLES), VIEWS, RECIPE)
    assert store.missing(VIEWS, kind) == left
    for unit in random.Random(3).sample(left, len(left)):
        store.write_unit(unit, *predictions_of(unit, kind))
        left.remove(unit)
        assert store.missing(VIEWS, kind) == opened(tmp_path / "s.zarr").missing(VIEWS, kind) == left
    assert left == []


def test_fewer_views_miss_fewer_units(tmp_path):
    store = fill(create(tmp_path / "s.zarr"), "argmax", views=2)
    assert store.missing(2, "argmax") == []
    assert store.missing(4, "argmax") == [Unit(shard, 1) for shard in range(3)]


def test_shard_without_a_sample_misses_nothing(tmp_path):
    store = create(tmp_path / "s.zarr", index=Rows((6, 0, 3)))
    assert [unit.shard for unit in store.missing(VIEWS, "argmax")] == [0, 2, 0, 2]


def test_an_array_whose_width_was_never_used_is_created_again(tmp_path):
    create(tmp_path / "s.zarr", "topk", top_k=4)
    store = fill(create(tmp_path / "s.zarr", "topk"), "topk")
    assert store.missing(VIEWS, "topk") == [] == damage_in(tmp_path / "s.zarr", "topk")


def test_of_fewer_classes_than_top_k_all_are_kept(tmp_path):
    store = create(tmp_path / "s.zarr", "topk", top_k=CLASSES + 3)
    logits = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0))
    argmax, payload = encode("topk", logits, CLASSES + 3)
    assert payload.shape[1] == store.group["topk"].shape[2] == 2 * CLASSES + 2
    assert np.allclose(decode_logits("topk", payload, CLASSES), logits.numpy(), atol=1e-2)
    assert argmax.tolist() == logits.argmax(1).tolist()


def test_removed_unit_is_missing(copy):
    path = copy("topk")
    create(path, "topk").remove_unit(Unit(1, 0))
    assert opened(path).missing(VIEWS, "topk") == [Unit(1, 0)]
    assert "missing" in refusal(opened(path).read, 1, 0)


def test_removing_a_unit_that_is_not_there_changes_nothing(tmp_path):
    store = create(tmp_path / "s.zarr")
    before = tree(tmp_path)
    store.remove_unit(Unit(1, 0))
    assert tree(tmp_path) == before


def die_after(name, store, monkeypatch):
    """Let the process die when a store has written this part of a unit: `check`, then the payload, then `argmax`."""
    real = store._sync

    def sync(unit, written):
        real(unit, written)
        if written == name:
            raise KeyboardInterrupt

    monkeypatch.setattr(store, "_sync", sync)
    return store


@pytest.mark.parametrize("kind", ["topk", "dense", "dense8"])
@pytest.mark.parametrize("rewriting", [False, True])
def test_unit_of_a_writer_that_died_is_missing(kind, rewriting, copy, tmp_path, monkeypatch):
    path = copy(kind) if rewriting else tmp_path / "s.zarr"
    store = die_after(kind, create(path, kind), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        store.write_unit(Unit(1, 1), *predictions_of(Unit(1, 1), kind, seed=8))
    assert Unit(1, 1) in {unit_of(chunk, path) for chunk in chunks(path / kind)}  # there already
    assert Unit(1, 1) in opened(path).missing(VIEWS, kind)
    refusal(opened(path).read, 1, 2, kind)


@every_kind
@pytest.mark.parametrize("last", ["check", "payload"])
def test_unit_of_a_writer_that_died_is_written_again(kind, last, copy, monkeypatch):
    path = copy(kind)
    store = die_after(kind if last == "payload" else last, create(path, kind), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        store.write_unit(Unit(1, 1), *predictions_of(Unit(1, 1), kind, seed=8))
    fill(create(path, kind), kind, units=[Unit(1, 1)])
    assert damage_in(path, kind) == []


@pytest.mark.parametrize("last", ["check", "topk"])
def test_a_writer_that_died_adding_a_kind_leaves_the_other_whole_and_its_own_to_be_resumed(last, copy, monkeypatch):
    path = copy("dense")
    store = die_after(last, create(path, "topk"), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        store.add_kind(Unit(1, 1), *predictions_of(Unit(1, 1), "topk"))
    assert damage_in(path, "dense") == []
    fill(create(path, "topk"), "topk", units=opened(path).missing(VIEWS, "topk"))
    assert damage_in(path, "dense") == damage_in(path, "topk") == []


@pytest.mark.parametrize("seed", [0, 1])  # of the teacher that is asked again; 0: it answers the same
def test_a_unit_can_be_read_all_the_while_that_another_kind_is_added(seed, copy, monkeypatch):
    path, unit, looked = copy("argmax"), Unit(1, 1), []

    def looking(real):
        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            looked.append(opened(path).read_unit(unit))
            return result

        return call

    store = create(path, "topk")
    for name in ("remove_unit", "_sync", "_array"):
        monkeypatch.setattr(store, name, looking(getattr(store, name)))
    store.add_kind(unit, predictions_of(unit, "topk", seed=seed)[0], predictions_of(unit, "topk")[1])
    assert len(looked) > 4 and all(np.array_equal(argmax, looked[0]) for argmax in looked)


@every_kind
def test_more_views_add_blocks_and_keep_the_old_bytes(kind, tmp_path):
    path = tmp_path / "s.zarr"
    fill(create(path, kind, views=2), kind, views=2)
    before = {name: data for name, data in tree(path).items() if "/c/" in name}
    store = create(path, kind, views=4)
    assert store.missing(4, kind) == [Unit(shard, 1) for shard in range(3)]
    assert {name: data for name, data in tree(path).items() if "/c/" in name} == before
    fill(store, kind, units=store.missing(4, kind))
    assert before.items() < tree(path).items()
    assert damage_in(path, kind) == []


def test_fewer_views_keep_the_further_ones(copy):
    path = copy("topk")
    before = tree(path)
    assert create(path, "topk", views=2).views == 4
    assert tree(path) == before


def test_another_kind_is_added_beside_the_first(copy):
    path = copy("argmax")
    store = create(path, "topk")
    assert store.missing(VIEWS, "argmax") == [] and len(store.missing(VIEWS, "topk")) == 6
    fill(store, "topk")
    assert damage_in(path, "argmax") == damage_in(path, "topk") == []


def test_a_kind_that_is_added_leaves_the_argmax_whatever_the_teacher_answers_now(copy):
    path = copy("argmax")
    before = opened(path).read_unit(Unit(0, 0)).copy()
    buffers, checks = predictions_of(Unit(0, 0), "topk")
    create(path, "topk").add_kind(Unit(0, 0), buffers | {"argmax": (buffers["argmax"] + 1) % CLASSES}, checks)
    after = opened(path).read_unit(Unit(0, 0))
    assert np.array_equal(after, before) and damage_in(path, "topk") != damage_in(path, "argmax") == []


def test_a_kind_for_other_pictures_is_refused(copy):
    path = copy("argmax")
    before = tree(path)
    buffers, checks = predictions_of(Unit(0, 0), "topk")
    message = refusal(create(path, "topk").add_kind, Unit(0, 0), buffers, checks + 1)
    assert "rendered differently" in message and "numpy" in message
    assert before.items() <= tree(path).items()


@pytest.mark.parametrize("kept", ["argmax", "no argmax"])
def test_predictions_for_other_pictures_leave_no_other_kind_behind(kept, copy):
    path = copy("topk")
    store, unit = create(path, "dense"), Unit(0, 0)
    if kept == "no argmax":
        store.remove_unit(unit)
    buffers, checks = predictions_of(unit, "dense")
    store.write_unit(unit, buffers, checks + 1)
    assert unit in opened(path).missing(VIEWS, "topk") and unit not in opened(path).missing(VIEWS, "dense")


def test_removing_a_damaged_kind_leaves_the_others_readable_and_their_manifest_as_it_was(copy):
    path, unit = copy("topk"), Unit(0, 0)
    fill(create(path, "dense"), "dense")
    before = build_manifest(opened(path), VIEWS, "topk")
    chunk = path / "dense/c/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    remove_damaged(create(path, "dense"), "dense", [unit])
    assert damage_in(path, "topk") == [] and opened(path).missing(VIEWS, "dense") == [unit]
    other = predictions_of(unit, "dense", seed=1)[0]
    create(path, "dense").add_kind(unit, other, predictions_of(unit, "dense")[1])
    assert build_manifest(opened(path), VIEWS, "topk") == before and damage_in(path, "dense") == []


def test_bytes_of_a_kind_do_not_depend_on_other_kinds_and_further_views(copy):
    path = copy("topk")
    before = kind_bytes(opened(path), VIEWS, "topk")
    fill(create(path, "dense", views=VIEWS + 2), "dense", views=VIEWS + 2)
    assert kind_bytes(opened(path), VIEWS, "topk") == before < store_bytes(str(path))


def test_a_unit_dates_from_the_kind_that_was_added_to_it(copy):
    path = copy("dense")
    for chunk in path.glob("argmax/c/*/*"):
        os.utime(chunk, (1000, 1000))
    for place in path.glob("dense/c/*/*"):
        os.utime(place, (2000, 2000))
    assert written_units(str(path), "dense", 1).times == [2000] * 3
    assert written_units(str(path), "argmax", 1).times == [1000] * 3


def test_writing_the_argmax_again_leaves_the_payload_valid(copy):
    path = copy("topk")
    buffers, checks = predictions_of(Unit(0, 0), "topk")
    create(path, "argmax").write_unit(Unit(0, 0), {"argmax": buffers["argmax"]}, checks)
    assert damage_in(path, "topk") == []


# another's


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipe": RECIPE.model_copy(update={"seed": 1})}, ["store's recipe", "recipe.seed: 0, 1"]),
        ({"recipe": RECIPE.model_copy(update={"mixup_alpha": 0.7})}, ["store's recipe", "recipe.mixup_alpha: 0.8, 0.7"]),
        ({"index": Rows(fingerprint="e" * 32)}, ["store's index", "f" * 32, "e" * 32, "images or labels"]),
        ({"teacher": TEACHER | {"model": "other"}}, ["store's teacher", 'teacher.model: "toy", "other"']),
        ({"teacher": TEACHER | {"weights": "1" * 32}}, ["store's teacher", "0" * 32, "1" * 32]),
        ({"precision": "bfloat16"}, ["precision", "float32", "bfloat16"]),
        ({"top_k": 4}, ["top_k", "width 8", "10"]),
    ],
)
def test_store_of_another_experiment_is_refused_with_both_values(changes, told, copy):
    path = copy("topk")
    before = tree(path)
    with pytest.raises(UsageError) as caught:
        create(path, "topk", **changes)
    message = str(caught.value)
    assert str(path) in message and all(part in message for part in told), message
    assert tree(path) == before


@pytest.mark.parametrize(
    ("index", "recipe", "told"),
    [
        (Rows(fingerprint="e" * 32), RECIPE, ["store's index", "f" * 32, "e" * 32]),
        (Rows(), RECIPE.model_copy(update={"size": 32}), ["store's recipe"]),
    ],
)
def test_another_experiment_does_not_open_the_store(index, recipe, told, filled):
    message = refusal(Store.open, str(filled("argmax")), index, recipe, kind=UsageError)
    assert all(part in message for part in told)


def test_no_store_says_what_to_run(tmp_path):
    message = refusal(opened, tmp_path / "none.zarr")
    assert f"{tmp_path}/none.zarr: no store" in message and "pipeline teacher-logits" in message


def test_opening_to_read_changes_nothing(copy):
    path = copy("topk")
    before = tree(path)
    opened(path).read(0, 0, "topk")
    assert tree(path) == before


# damage


@every_kind
def test_store_as_written_has_no_damage(kind, filled):
    assert damage_in(filled(kind), kind) == []


@every_kind
def test_any_flipped_bit_of_a_chunk_is_found_in_its_unit(kind, copy):
    path, rng = copy(kind), random.Random(5)
    files = chunks(path)
    for number in range(30):
        chunk = files[number % len(files)]
        whole = chunk.read_bytes()
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        chunk.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        assert damage_in(path, kind) == [unit_of(chunk, path)], f"bit {bit} of byte {place} of {chunk}"
        chunk.write_bytes(whole)


@every_kind
@pytest.mark.parametrize("damage", ["cut", "half", "empty", "longer", "deleted"])
def test_cut_or_deleted_chunk_is_found_in_its_unit(kind, damage, copy):
    path = copy(kind)
    for chunk in (c for c in chunks(path) if unit_of(c, path) == Unit(1, 1)):
        whole = chunk.read_bytes()
        match damage:
            case "deleted":
                chunk.unlink()
            case "longer":
                chunk.write_bytes(whole + bytes(4))
            case _:
                chunk.write_bytes(whole[: {"cut": -1, "half": len(whole) // 2, "empty": 0}[damage]])
        assert damage_in(path, kind) == [unit_of(chunk, path)], chunk
        chunk.write_bytes(whole)


@every_kind
def test_deleted_chunk_makes_its_unit_missing(kind, copy):
    path = copy(kind)
    for chunk in chunks(path):
        whole = chunk.read_bytes()
        chunk.unlink()
        assert opened(path).missing(VIEWS, kind) == [unit_of(chunk, path)]
        chunk.write_bytes(whole)


@every_kind
def test_chunk_of_another_unit_is_found(kind, copy):
    path = copy(kind)
    for name in {"argmax", "check", kind}:
        own, other = ({unit_of(c, path): c for c in chunks(path / name)}[Unit(0, block)] for block in (0, 1))
        whole = own.read_bytes()
        shutil.copyfile(other, own)
        assert damage_in(path, kind) == [Unit(0, 0)], name
        own.write_bytes(whole)


@every_kind
def test_damaged_chunk_is_found_when_the_view_is_read_or_the_unit(kind, copy):
    path = copy(kind)
    chunk = next(c for c in chunks(path / "argmax") if unit_of(c, path) == Unit(2, 1))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\x99")
    for read in (lambda s: s.read(2, 2, kind), lambda s: s.read_unit(Unit(2, 1))):
        message = refusal(read, opened(path))
        assert f"{path}/argmax" in message and "block 1 of shard 000002.tar" in message and "do:" in message


@every_kind
@pytest.mark.parametrize("name", ["argmax", "check", "payload"])
def test_damaged_unit_is_repaired_by_writing_it_again(kind, name, copy):
    path = copy(kind)
    name = kind if name == "payload" else name
    chunk = next(c for c in chunks(path / name) if unit_of(c, path) == Unit(1, 0))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\x99")
    assert damage_in(path, kind) == [Unit(1, 0)]
    store = create(path, kind)
    store.remove_unit(Unit(1, 0))
    fill(store, kind, units=[Unit(1, 0)])
    assert damage_in(path, kind) == []


@every_kind
def test_bit_flipped_in_the_metadata_is_refused_or_changes_no_prediction(kind, copy):
    path, rng = copy(kind), random.Random(7)
    expected = [opened(path).read(2, view, kind) for view in range(VIEWS)]
    unfound = []
    for number in range(75):
        file = (path / "zarr.json", path / "argmax" / "zarr.json", path / kind / "zarr.json")[number % 3]
        whole = file.read_bytes()
        place = rng.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(7)]) + whole[place + 1 :])
        try:
            for view, predictions in enumerate(expected):
                found = opened(path).read(2, view, kind)
                for name, value in vars(predictions).items():
                    if value is not None and getattr(found, name).tobytes() != value.tobytes():
                        unfound.append(f"{file.parent.name} {place}: another {name}")
        except PipelineError:
            pass
        except Exception as error:
            unfound.append(f"{file.parent.name} {place}: {error!r}")
        file.write_bytes(whole)
    assert not unfound


# what is no damage

SHORTAGES = [
    MemoryError(), RuntimeError("can't start new thread"), OSError(errno.EMFILE, "Too many open files"),
    ConnectionResetError("gone"), type("ClientError", (Exception,), {"__module__": "aiohttp"})("503"),
]  # fmt: skip


@pytest.mark.parametrize("error", SHORTAGES, ids=repr)
@pytest.mark.parametrize("name", ["check", "argmax", "dense"])
def test_unit_that_cannot_be_read_now_is_not_damaged(name, error, copy, monkeypatch):
    store, real = opened(copy("dense")), Store._bytes

    def short(self, path, *place):
        if f"/{name}/c/1/1" in path:
            raise error
        return real(self, path, *place)

    monkeypatch.setattr(Store, "_bytes", short)
    with pytest.raises(Unreadable):
        damaged_units(store, store.units(VIEWS), "dense")


@pytest.mark.parametrize("error", SHORTAGES, ids=repr)
def test_metadata_that_cannot_be_read_now_is_not_damaged(error, copy, monkeypatch):
    path = copy("dense")

    def short(*_):
        raise error

    monkeypatch.setattr(store_files, "read_metadata", short)
    with pytest.raises(Unreadable):
        opened(path)


def test_a_unit_is_damaged_only_when_it_is_read_so_twice(copy, monkeypatch):
    store, real, asked = opened(copy("dense")), Store._bytes, []

    def once(self, path, *place):
        asked.append((path, place))
        data = real(self, path, *place)
        return data if asked.count((path, place)) > 1 else data[:-1]

    monkeypatch.setattr(Store, "_bytes", once)
    assert damaged_units(store, store.units(VIEWS), "dense") == []


def test_a_chunk_that_cannot_be_read_now_takes_no_other_kind_back(copy, monkeypatch):
    path = copy("dense")
    before = tree(path)
    store = create(path, "argmax")

    def short(*_):
        raise MemoryError

    monkeypatch.setattr(Store, "_bytes", short)
    with pytest.raises(Unreadable):
        store.write_unit(Unit(1, 1), *predictions_of(Unit(1, 1), "argmax"))
    assert tree(path) == before


SHORT = """
import resource, sys, threading
from pathlib import Path
sys.path[:0] = {paths!r}
from test_store import VIEWS, opened
from pipeline.store.manifest import damaged_units
from pipeline.common.errors import Unreadable
store = opened(Path({store!r}))
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + {room}, -1))
try:
    print(damaged_units(store, store.units(VIEWS), "dense"))
except (Unreadable, MemoryError):
    print([])
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 500_000])
def test_too_little_memory_is_no_damage(room, tmp_path):
    index = Rows()
    index.classes = ["some"] * 60_000
    store = create(tmp_path / "s.zarr", "dense", index=index)
    for unit in store.units(VIEWS):
        samples = SAMPLES[unit.shard]
        buffers = {"argmax": np.zeros((BLOCK, samples), np.uint16)}
        buffers["dense"] = np.zeros((BLOCK, samples, len(index.classes)), np.float16)
        store.write_unit(unit, buffers, np.zeros((BLOCK, group_count(samples, 4)), np.uint64))
    code = SHORT.format(paths=sys.path, store=store.path, room=room)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert said.stdout.strip() == "[]", said.stderr


# disk


def test_full_disk_is_told_plainly_and_leaves_the_unit_missing(tmp_path):
    store = create(tmp_path / "s.zarr", "dense")
    with full_disk(100):
        message = refusal(store.write_unit, Unit(0, 0), *predictions_of(Unit(0, 0), "dense"))
    assert f"{tmp_path}/s.zarr: the store cannot be written" in message and "make room" in message
    assert Unit(0, 0) in opened(tmp_path / "s.zarr").missing(VIEWS, "dense")


def test_a_distribution_that_is_not_installed_is_no_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.common.versions.VERSIONS", ("numpy", "no-such-thing"))
    assert list(create(tmp_path / "s.zarr").group.attrs["versions"]) == ["numpy"]


def test_a_library_that_is_missing_is_no_full_disk(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("no module named codec")

    monkeypatch.setattr(store_writer, "create_group", missing)
    message = refusal(create, tmp_path / "s.zarr")
    assert "no module named codec" in message and "make room" not in message


def test_store_that_cannot_be_made_is_told_plainly(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(create, tmp_path / "file" / "s.zarr")


def test_sweep_removes_what_killed_writers_left_and_nothing_else(copy):
    path = copy("argmax")
    before = tree(path)
    (path / "argmax" / "c" / "0" / "1.0123abc.partial").write_bytes(b"half")
    Path(f"{part_lease_path(str(path), 0, 1)}.0123.partial").write_bytes(b"half")
    sweep_store(str(path))
    assert tree(path) == before and not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize(("part", "own"), [((0, 4), (0, 1)), ((0, 1), None), ((3, 4), (1, 4))])
def test_sweep_leaves_what_another_writer_may_be_writing(part, own, copy):
    path = copy("argmax")
    partial = path / "argmax" / "c" / "0" / "1.0123abc.partial"
    partial.write_bytes(b"half")
    with lease(part_lease_path(str(path), *part), "work"):
        sweep_store(str(path), part_lease_path(str(path), *own) if own else "")
        assert partial.exists()
    sweep_store(str(path), part_lease_path(str(path), *own) if own else "")
    assert not partial.exists()


def test_sweep_leaves_what_another_machine_may_be_writing(copy):
    path = copy("argmax")
    partial = path / "argmax" / "c" / "0" / "1.0123abc.partial"
    partial.write_bytes(b"half")
    holder = {"host": "another", "process": 7, "token": "x", "renewed": 0.0}
    Path(part_lease_path(str(path), 0, 1)).write_text(json.dumps(holder))
    sweep_store(str(path))
    assert partial.exists()


def test_bytes_of_a_store_are_those_on_disk(filled):
    path = filled("dense")
    assert store_bytes(str(path)) == sum(len(data) for data in tree(path).values())


@every_kind
@pytest.mark.parametrize("samples", [SAMPLES, (6, 0, 3)], ids=["all", "one without samples"])
def test_an_estimate_has_the_bytes_and_files_of_the_chunks(kind, samples, tmp_path):
    store, rng = create(tmp_path / "s.zarr", kind, index=Rows(samples)), np.random.default_rng(0)
    for unit in store.units(VIEWS):
        count = samples[unit.shard]
        buffers = {"argmax": np.zeros((BLOCK, count), np.uint16)}
        if kind != "argmax":
            buffers[kind] = rng.integers(0, 99, (BLOCK, count, payload_width(kind, CLASSES, TOP_K))).astype(KINDS[kind].dtype)
        store.write_unit(unit, buffers, np.zeros((BLOCK, group_count(count, 4)), np.uint64))
    spec = store_spec(Config(), "train-student")
    draws = DRAWS if kind == "sampled" else None
    spec = replace(spec, recipe=RECIPE, views=VIEWS, kind=kind, k=TOP_K, sampling=draws)
    found, files = estimate(spec, samples, CLASSES), chunks(tmp_path / "s.zarr")
    assert (found.files, found.bytes) == (len(files), sum(file.stat().st_size for file in files))
    assert found.rows == sum(samples)


@given(st.integers(1, 9999), st.integers(1, 300))
def test_equal_shards_hold_every_image_and_differ_by_one_at_most(images, capacity):
    shards = equal_shards(images, capacity)
    assert sum(shards) == images and max(shards) <= capacity and max(shards) - min(shards) <= 1


# the manifest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fingerprint", "../.."), ("fingerprint", 7), ("fingerprint", "a" * 31 + "/"), ("kind", "soft"), ("kind", []),
        ("views", "8"), ("views", -1), ("views", True), ("rows", None), ("units", []),
    ],
)  # fmt: skip
def test_manifest_of_a_stranger_is_refused(key, value, filled, tmp_path):
    whole = build_manifest(opened(filled("topk")), VIEWS, "topk")
    write_manifest(tmp_path / "manifest.json", whole | {key: value})
    assert f"{key} " in refusal(read_manifest, tmp_path / "manifest.json")



@every_kind
def test_manifest_is_the_same_bytes_whatever_the_order_of_writing(kind, filled, tmp_path):
    units = all_units(len(SAMPLES), VIEWS, RECIPE)
    other = fill(create(tmp_path / "s.zarr", kind), kind, units=units[::-1])
    write_manifest(tmp_path / "one.json", build_manifest(opened(filled(kind)), VIEWS, kind))
    write_manifest(tmp_path / "other.json", build_manifest(other, VIEWS, kind))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()


@every_kind
def test_manifest_lists_every_unit(kind, filled):
    units = build_manifest(opened(filled(kind)), VIEWS, kind)["units"]
    assert {name: len(blocks) for name, blocks in units.items()} == {f"{i:06d}.tar": 2 for i in range(3)}
    assert len({digest for blocks in units.values() for digest in blocks}) == 6


@every_kind
def test_manifest_changes_in_the_unit_whose_predictions_change(kind, copy):
    path = copy(kind)
    before = build_manifest(opened(path), VIEWS, kind)["units"]
    fill(create(path, kind), kind, seed=1, units=[Unit(1, 0)])
    after = build_manifest(opened(path), VIEWS, kind)["units"]
    assert [(n, b) for n in before for b in range(2) if before[n][b] != after[n][b]] == [("000001.tar", 0)]


def test_manifest_of_fewer_views_is_that_of_a_smaller_store(filled, tmp_path):
    small = fill(create(tmp_path / "s.zarr", views=2), "argmax", views=2)
    assert build_manifest(opened(filled("argmax")), 2, "argmax") == build_manifest(small, 2, "argmax")


def test_manifest_of_a_kind_does_not_change_when_another_kind_is_added(copy):
    path = copy("argmax")
    before = build_manifest(opened(path), VIEWS, "argmax")
    fill(create(path, "topk"), "topk")
    assert build_manifest(opened(path), VIEWS, "argmax") == before


@every_kind
def test_incomplete_store_has_no_manifest_and_names_the_missing_unit(kind, copy):
    path = copy(kind)
    create(path, kind).remove_unit(Unit(2, 1))
    message = refusal(build_manifest, opened(path), VIEWS, kind)
    assert "1 unit missing" in message and "shard 2, block 1" in message
    assert "pipeline teacher-logits (--for finetune: the second store)" in message


def test_manifest_is_read_as_it_was_written(filled, tmp_path):
    written = build_manifest(opened(filled("topk")), VIEWS, "topk")
    write_manifest(tmp_path / "manifest.json", written)
    assert read_manifest(tmp_path / "manifest.json") == written


def test_missing_manifest_says_what_to_run(tmp_path):
    assert "pipeline teacher-logits" in refusal(read_manifest, tmp_path / "manifest.json")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe"])
def test_damaged_manifest_is_named(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(data)
    assert f"{tmp_path}/manifest.json" in refusal(read_manifest, tmp_path / "manifest.json")


# encoding

logits = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=9),
    elements=st.floats(-60, 60, width=32),
)


@property_settings
@given(logits)
def test_argmax_is_that_of_the_unrounded_logits(values):
    for kind in KINDS:
        argmax = encode(kind, torch.from_numpy(values), 2)[0]
        assert argmax.dtype == np.uint16
        assert np.array_equal(values[np.arange(len(values)), argmax], values.max(1))


@pytest.mark.parametrize("number", [0, 32767, 32768, 65534])
def test_every_class_number_of_16_bits_is_kept(number):
    logits = torch.zeros(1, 65535)
    logits[0, number] = 1
    assert encode("topk", logits, 1)[0].item() == encode("topk", logits, 1)[1][0, 0] == number


def test_argmax_tells_apart_what_float16_does_not():
    close = torch.tensor([[30.0, 30.001]])
    assert close.half()[0, 0] == close.half()[0, 1]
    assert [encode(kind, close, 1)[0].item() for kind in KINDS] == [1] * len(KINDS)


def decode_logits(kind: str, payload: np.ndarray, classes: int) -> np.ndarray:
    return kinds.decode_logits(kind, torch.from_numpy(payload), classes).numpy()


def decoded_by_numpy(kind: str, payload: np.ndarray, classes: int) -> np.ndarray:
    """What a payload says, written down in numpy."""
    if kind == "dense":
        return payload.astype(np.float32)
    if kind == "dense8":
        ends = np.ascontiguousarray(payload[:, classes:]).view(np.float32)
        return ends[:, :1] + payload[:, :classes] * ((ends[:, 1:] - ends[:, :1]) / np.float32(255))
    top_k = (payload.shape[1] - 2) // 2
    values = np.ascontiguousarray(payload[:, top_k : 2 * top_k]).view(np.float16).astype(np.float32)
    rest = np.ascontiguousarray(payload[:, 2 * top_k :]).view(np.float32)
    logits = np.repeat(rest - np.float32(math.log(max(classes - top_k, 1))), classes, axis=1)
    np.put_along_axis(logits, payload[:, :top_k].astype(np.int64), values, axis=1)
    return logits


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["topk", "dense8", "dense"])
@property_settings
@given(st.integers(1, 40), st.integers(2, 70), st.integers(0, 99), st.sampled_from([0.01, 3.0, 60.0]))
def test_a_payload_is_decoded_to_numpys_bits_on_every_device(device, kind, rows, classes, seed, spread):
    values = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * spread
    payload = encode(kind, values, min(5, classes))[1]
    found = kinds.decode_logits(kind, torch.from_numpy(payload).to(device), classes).cpu().numpy()
    assert found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), decoded_by_numpy(kind, payload, classes).view(np.uint32))


@pytest.mark.parametrize("device", DEVICES)
def test_classes_beyond_32767_are_decoded_on_every_device(device):
    values = torch.zeros(1, 65535)
    values[0, [32768, 65534]] = torch.tensor([2.0, 1.0])
    payload = torch.from_numpy(encode("topk", values, 2)[1]).to(device)
    assert kinds.decode_logits("topk", payload, 65535)[0].topk(2).indices.tolist() == [32768, 65534]


@property_settings
@given(logits)
def test_dense_keeps_every_logit_as_float16(values):
    payload = encode("dense", torch.from_numpy(values), 1)[1]
    decoded = decode_logits("dense", payload, values.shape[1])
    assert np.array_equal(decoded, values.astype(np.float16).astype(np.float32))


@property_settings
@given(logits)
def test_a_byte_a_class_keeps_every_logit_to_half_a_step(values):
    payload = encode("dense8", torch.from_numpy(values), 1)[1]
    assert payload.dtype == np.uint8 and payload.shape == (len(values), payload_width("dense8", values.shape[1], 1))
    decoded = decode_logits("dense8", payload, values.shape[1])
    step = (values.max(1, keepdims=True) - values.min(1, keepdims=True)) / 255
    assert (np.abs(decoded - values) <= 0.501 * step + 1e-5).all()


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["topk", "dense8", "dense"])
def test_decoded_probabilities_at_a_tau_are_those_of_the_logits(kind, tau):
    values = torch.from_numpy(np.random.default_rng(3).normal(0, 2, (20, 6)).astype(np.float32))
    found = torch.from_numpy(decode_logits(kind, encode(kind, values, 6)[1], 6))
    distance = ((found / tau).log_softmax(1) - (values / tau).log_softmax(1)).abs().max()
    assert distance < (0.06 if kind == "dense8" else 0.02)


@property_settings
@given(logits)
def test_top_k_of_all_classes_keeps_every_logit_as_float16(values):
    classes = values.shape[1]
    payload = encode("topk", torch.from_numpy(values), classes)[1]
    assert payload.shape == (len(values), payload_width("topk", classes, classes))
    decoded = decode_logits("topk", payload, classes)
    assert np.array_equal(decoded, values.astype(np.float16).astype(np.float32))


@property_settings
@given(logits, st.data())
def test_top_k_keeps_the_largest_and_the_mass_of_the_tail(values, data):
    classes = values.shape[1]
    k = data.draw(st.integers(1, classes - 1))
    payload = encode("topk", torch.from_numpy(values), k)[1]
    decoded = decode_logits("topk", payload, classes).astype(np.float64)
    for row, true in zip(decoded, np.sort(values.astype(np.float64), 1), strict=True):
        tail = np.log(np.exp(true[:-k]).sum())
        # the k largest, rounded, aside, all others are equal and have the tail's mass
        others = row.tolist()
        for value in true[-k:].astype(np.float16).tolist():
            others.remove(value)
        assert len(set(others)) == 1
        assert math.log(len(others)) + others[0] == pytest.approx(tail, rel=1e-5, abs=1e-5)


def test_top_k_has_the_probabilities_of_the_rounded_logits_at_tau_1():
    values = torch.randn(50, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
    values = values.half().float()
    decoded = torch.from_numpy(decode_logits("topk", encode("topk", values, 3)[1], CLASSES)).double()
    top = values.topk(3, 1).indices
    assert torch.allclose(
        decoded.softmax(1).gather(1, top), values.double().softmax(1).gather(1, top), rtol=1e-6, atol=0
    )
