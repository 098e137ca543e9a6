"""`pipeline store export --parquet`: the table holds what the store does, or there is none."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_store_commands import call
from test_training import CPU, loaded

from pipeline.cli.find_store import find_store
from pipeline.config.store_spec import store_spec
from pipeline.store.encoding import decode_logits
from pipeline.store.reader import Store
from stages import teacher_logits

parquet = pytest.importorskip("pyarrow.parquet")
FILE = Path("predictions.parquet")


def exported(kind: str, *more: str) -> list[dict]:
    said = call("store", "export", "--parquet", str(FILE), "--set", f"teacher_logits.kind={kind}", *more)
    table = parquet.read_table(FILE)
    assert f"{table.num_rows} rows" in said
    return table.to_pylist()


def the_store() -> Store:
    config = loaded()
    return find_store(config, store_spec(config, "train-student"))


def stored_logits(store: Store, row: dict) -> tuple[int, int, torch.Tensor]:
    """What the dense store holds for a row of the table: label, argmax, logits."""
    shard = store.index.names.index(row["shard"])
    (place,) = np.flatnonzero(store.index.rows(shard)["key"] == row["key"].encode())
    stored = store.read(shard, row["view"], "dense")
    logits = decode_logits("dense", torch.from_numpy(stored.payload[place : place + 1].copy()), 3)[0]
    return int(store.index.rows(shard)["label"][place]), int(stored.argmax[place]), logits


@pytest.mark.parametrize("kind", ["argmax", "dense", "topk"])
def test_every_row_is_what_the_store_holds_for_this_image_and_view(taught, kind):
    override = ["--set", "teacher_logits.top_k=2", "--set", "students=[hard]"]  # soft ones need logits
    if kind == "topk":
        teacher_logits.run(loaded("teacher_logits.kind=topk", "teacher_logits.top_k=2"), CPU)
    rows, store = exported(kind, *override), the_store()
    assert len({(row["shard"], row["key"], row["view"]) for row in rows}) == len(rows) == 20 * 8
    assert ("top_classes" in rows[0]) == (kind != "argmax")
    for row in rows:
        label, argmax, logits = stored_logits(store, row)
        assert (row["label"], row["argmax"]) == (label, argmax)
        if kind != "argmax":
            values, classes = logits.topk(2)
            assert (row["top_classes"], row["top_logits"]) == (classes.tolist(), values.tolist())
            assert row["others"] == pytest.approx(float(logits.sum() - values.sum()), abs=1e-2)  # the third class


def test_drawn_classes_are_exported_as_they_are_stored(taught):
    drawn = "teacher_logits.kind=sampled", "teacher_logits.samples=3", "students=[hard]"
    teacher_logits.run(loaded(*drawn), CPU)
    rows = exported("sampled", "--set", drawn[1], "--set", drawn[2])
    store = find_store(loaded(*drawn), store_spec(loaded(*drawn), "train-student"))
    assert len(rows) == 20 * 8 and "top_classes" not in rows[0]
    for row in rows:
        shard = store.index.names.index(row["shard"])
        (place,) = np.flatnonzero(store.index.rows(shard)["key"] == row["key"].encode())
        stored = store.read(shard, row["view"], "sampled")
        assert row["sampled_classes"] == stored.payload[place].tolist() and row["argmax"] == stored.argmax[place]


def test_the_same_store_gives_the_same_file_which_names_it(taught):
    exported("dense")
    first = FILE.read_bytes()
    exported("dense")
    assert FILE.read_bytes() == first
    assert parquet.read_schema(FILE).metadata[b"store"].decode() == the_store().fingerprint


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_an_incomplete_or_damaged_store_is_not_exported(taught, damage):
    (chunk,) = Path("work/stores").glob("*.zarr/argmax/c/1/2")
    if damage == "missing":
        chunk.unlink()
    else:
        chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    said = call("store", "export", "--parquet", str(FILE), code=1)
    assert ("1 unit missing" if damage == "missing" else "CRC-32C") in said
    assert not list(Path().glob("*predictions*"))


def test_without_pyarrow_the_extra_is_named(taught, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "install the extra `parquet`" in call("store", "export", "--parquet", str(FILE), code=2)
