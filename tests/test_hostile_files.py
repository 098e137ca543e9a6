"""Whatever a file holds that `status`, `prune` or a store reads: only errors of our own."""

import contextlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training import CPU, loaded

from pipeline.cli import prune, status
from pipeline.cli.status_table import as_json, table
from pipeline.common.errors import PipelineError
from pipeline.config.paths import index_path
from pipeline.shards.index import Index
from pipeline.store.manifest import read_manifest
from pipeline.store.metadata import _checksum
from pipeline.store.reader import Store
from stages import train_student

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from([10**400, 2**63, -1, "../..", "0" * 32, [[]] * 3, {"model": 1}, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FEW = settings(
    derandomize=True, deadline=None, max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(taught_template, tmp_path_factory):
    """An experiment with a trained student; each test gives back the files that it changes."""
    root = tmp_path_factory.mktemp("hostile") / "taught"
    shutil.copytree(taught_template, root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        train_student.run(loaded(), CPU, "hard")
        folder = Path("outputs/small/evaluation")
        folder.mkdir()
        (folder / "table.txt").write_text("")
        (folder / "metrics.json").write_text(json.dumps({"finetuned": {"mean": {"top1": 0.5}}}))
        (Path("outputs/small/failed")).mkdir()
        (Path("outputs/small/failed/evaluate.json")).write_text(json.dumps({"time": 0.0, "what": "it"}))
        yield root


def read_files() -> list[Path]:
    """All that is parsed."""
    found = [path for root in ("outputs", "work") for path in sorted(Path(root).rglob("*")) if path.is_file()]
    return [path for path in found if path.suffix in (".json", ".jsonl", ".csv") and "seen" not in path.parts]


@contextlib.contextmanager
def holding(path: Path, data: bytes):
    """The file holds something else for so long."""
    whole, times = path.read_bytes(), path.stat()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def changed(value: Any, data: st.DataObject) -> Any:
    """A JSON value with something in it put in place of something else."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 4)):
        keys = sorted(value) if isinstance(value, dict) else list(range(min(len(value), 3)))
        key = data.draw(st.sampled_from(keys))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if isinstance(copy, dict) and not data.draw(st.integers(0, 5)):
            del copy[key]
        else:
            copy[key] = changed(copy[key], data)
        return copy
    return data.draw(JSON)


def resealed(path: Path, value: Any) -> bytes:
    """As a stranger would write it who knows the checksums."""
    if path.suffix == ".jsonl" and isinstance(value, dict):
        value = {key: value[key] for key in value if key != "check"}
        value["check"] = f"{zlib.crc32(json.dumps(value).encode()):08x}"
    if path.name == "zarr.json" and isinstance(value, dict) and isinstance(value.get("attributes"), dict):
        with contextlib.suppress(ValueError):  # of a number that is none
            value["attributes"]["digest"] = _checksum(value)
    return json.dumps(value).encode() + b"\n"


def hostile(path: Path, data: st.DataObject) -> bytes:
    """Another content: bytes of any kind, deep nesting, or JSON with something else in it."""
    whole = path.read_bytes()
    how = data.draw(st.sampled_from(["json", "json", "json", "bytes", "nested", "cut", "flip"]))
    if how == "bytes":
        return data.draw(st.binary(max_size=60))
    if how == "nested":
        return data.draw(st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe{}"]))
    place = data.draw(st.integers(0, len(whole) - 1))
    if how == "cut":
        return whole[:place]
    if how == "flip" or path.suffix == ".csv":
        return whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) + whole[place + 1 :]
    lines = whole.splitlines(keepends=True) if path.suffix == ".jsonl" else [whole]
    number = data.draw(st.integers(0, len(lines) - 1))
    return b"".join([*lines[:number], resealed(path, changed(json.loads(lines[number]), data)), *lines[number + 1 :]])


def survives(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(read_files()))
    with holding(path, hostile(path, data)):
        rows = status.survey(loaded(), 2e9)
    assert table(rows) and json.loads(as_json(rows))


def deletes_nothing(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(read_files()))
    before = sorted(Path(".").rglob("*"))
    with holding(path, hostile(path, data)), contextlib.suppress(PipelineError):
        prune.run([Path("params.yaml")], "work", delete=True)
    assert sorted(Path(".").rglob("*")) == before


def opens_or_refuses(data: st.DataObject) -> None:
    (store,) = Path("work/stores").glob("*.zarr")
    manifest = Path("outputs/small/teacher-logits/manifest.json")
    path = data.draw(st.sampled_from([manifest, *sorted(store.rglob("zarr.json"))]))
    config = loaded()
    index = Index(index_path(config, "train"))
    with holding(path, hostile(path, data)), contextlib.suppress(PipelineError):
        assert read_manifest(manifest)["fingerprint"]
        Store.open(str(store), index, config.recipe).read(0, 0, "dense")


@settings(FEW, max_examples=60)
@given(data=st.data())
def test_status_survives_any_file(finished, data):
    survives(data)


@settings(FEW, max_examples=40)
@given(data=st.data())
def test_prune_deletes_nothing_for_any_file(finished, data):
    deletes_nothing(data)


@settings(FEW, max_examples=60)
@given(data=st.data())
def test_manifest_and_descriptions_raise_our_own_errors(finished, data):
    opens_or_refuses(data)


@pytest.mark.slow
@pytest.mark.parametrize("check", [survives, deletes_nothing, opens_or_refuses])
def test_many_files_are_survived(check, finished):
    @settings(FEW, max_examples=300)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        check(data)

    run()
