"""Random damage to every kind of file: it is found, or the result is the same; a reader raises only our own errors.

By hand, `CORRUPTIONS=1000 MUTATIONS=10000 pytest -m slow tests/test_damage.py`.
"""

import contextlib
import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_report import mini  # noqa: F401

from pipeline.cli import status
from pipeline.cli.find_store import find_store
from pipeline.common.errors import PipelineError
from pipeline.config.params import load_config
from pipeline.config.store_spec import store_spec
from pipeline.models.weights import read_saved_weights, read_weights
from pipeline.shards.images import Undecodable, decode
from pipeline.shards.index import Index
from pipeline.shards.indexing import index_shard
from pipeline.store import maintenance
from pipeline.store.manifest import read_manifest
from pipeline.store.reader import Store
from pipeline.training.log import Log, read_curve, read_log, write_curve
from stages import evaluate

ROOT = Path(__file__).parent.parent
CORRUPTIONS = int(os.environ.get("CORRUPTIONS", "12"))
MUTATIONS = int(os.environ.get("MUTATIONS", "280"))
RESULTS = ("metrics.json", "accuracy.csv", "disagreement.csv", "classes.csv")
TOKENS = (
    b"{", b"}", b"[", b"]", b"null", b"-1", b"1e999", b"99999999999999999999", b'"', b"\x00", b"\xff\xfe", b"../..",
    b"NaN", b"&a", b"*a", b": ", b"\n", b"true", b"[]", b"{}",
)  # fmt: skip


def results(config) -> list[bytes]:
    """Results of the commands that read what is stored."""
    spec = store_spec(config, "train-student")
    with contextlib.redirect_stdout(io.StringIO()):
        status.run(config, True, None)
        maintenance.verify(
            config, spec, find_store(config, spec), spec.folder / "manifest.json", 0, torch.device("cpu")
        )
        evaluate.run(config, torch.device("cpu"))
    return [(Path("outputs") / config.name / "evaluation" / name).read_bytes() for name in RESULTS]


def corrupted(data: bytes, other: bytes, draw: random.Random) -> bytes | None:
    """A flipped bit, a cut, zeros, another file's bytes, or None: deleted."""
    how, place = draw.choice(["flip", "cut", "zero", "delete", "swap"]), draw.randrange(len(data))
    if how == "flip":
        return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    if how == "zero":
        return data[:place] + bytes(len(data[place : place + 16])) + data[place + 16 :]
    return {"cut": data[:place], "swap": other, "delete": None}[how]


@pytest.fixture
def experiment(mini, tmp_path, monkeypatch):  # noqa: F811
    """A copy of a small finished experiment, as the current folder."""
    copy = Path(shutil.copytree(Path.cwd(), tmp_path / "copy"))
    monkeypatch.chdir(copy)
    return mini[0]


@pytest.mark.slow
def test_a_corrupted_file_is_found_or_changes_no_result(experiment, tmp_path):
    draw, expected, silent = random.Random(0), results(experiment), []
    for top in ("work", "outputs"):
        shutil.copytree(top, tmp_path / "good" / top)
    files = sorted(
        path
        for top in ("work", "outputs")
        for path in Path(top).rglob("*")
        if path.is_file() and path.stat().st_size and "evaluation" not in path.parts
    )
    for _ in range(CORRUPTIONS):
        path = draw.choice(files)
        data = corrupted(path.read_bytes(), draw.choice(files).read_bytes(), draw)
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        with contextlib.suppress(PipelineError):
            if results(experiment) != expected:
                silent.append(str(path))
        for top in ("work", "outputs"):
            shutil.rmtree(top)
            shutil.copytree(tmp_path / "good" / top, top)
    assert not silent


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few random edits."""
    edited = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        if not edited:
            break
        place, how = draw.randrange(len(edited)), draw.random()
        if how < 0.3:
            edited[place] ^= 1 << draw.randrange(8)
        elif how < 0.5:
            del edited[place : place + draw.randint(0, 40)]
        elif how < 0.75:
            edited[place : place + draw.randint(0, 12)] = draw.choice(TOKENS)
        elif how < 0.85:
            edited[place:place] = edited[max(0, place - draw.randint(1, 400)) : place] * draw.randint(1, 4)
        elif how < 0.92:
            del edited[place:]
        else:
            edited[place : place + 8] = draw.randbytes(8)
    return bytes(edited)


def read_all(index: Index) -> None:
    for shard in range(len(index.names)):
        for position in range(len(index.rows(shard))):
            index.image(shard, position)


Reader = tuple[Path, Callable[[Path], object]]


def readers(config, folder: Path) -> dict[str, Reader]:
    """A good file of each kind, and what reads it."""
    outputs = Path("outputs") / config.name
    train, path = outputs / "data/train/index.json", next(Path("work").glob("stores/*.zarr"))
    index, log, curve, pth = Index(train), folder / "log.jsonl", folder / "curve.csv", folder / "weights.pth"
    shard, weights, params = Path(index.location) / index.names[0], outputs / "students/plain/weights.safetensors", folder / "p"
    written = Log(log)
    for step in range(6):
        written.write("step", step, epoch=0, loss=1.0, lr=0.1)
    last = {"epoch": 1, "loss": 1.0, "lr": 0.1}
    written.write("epoch", 6, **last, speed={})
    write_curve(curve, log, last)
    torch.save({"model": read_weights(weights)}, pth)
    shutil.copy(ROOT / "params.yaml", params)
    image = folder / "image.png"
    image.write_bytes(index.read(0, 0))
    return {
        "params.yaml": (params, lambda path: load_config(path)),
        "index": (train, lambda path: read_all(Index(path))),
        "table": (Path(index.table), lambda _: read_all(Index(train))),
        "shard, read": (shard, lambda _: read_all(Index(train))),
        "shard, indexed": (shard, lambda path: index_shard(str(path.parent), path.name)),
        "image": (image, lambda path: decode(path.read_bytes())),
        "manifest": (outputs / "teacher-logits/manifest.json", read_manifest),
        "store": (path / "zarr.json", lambda _: Store.open(str(path), index, config.recipe)),
        "array": (path / "argmax/zarr.json", lambda _: Store.open(str(path), index, config.recipe).read(0, 0)),
        "log": (log, read_log),
        "curve": (curve, read_curve),
        "safetensors": (weights, lambda path: read_saved_weights(path)[0]),
        "pth": (pth, read_weights),
        "status": (train, lambda _: status.run(config, True, None)),
    }


@pytest.mark.slow
def test_a_mutated_file_gives_an_error_of_ours_or_is_read(experiment, tmp_path):
    draw, found = random.Random(5), []
    for name, (path, read) in readers(experiment, tmp_path).items():
        good = path.read_bytes()
        with contextlib.redirect_stdout(io.StringIO()):
            read(path)
            for _ in range(MUTATIONS // 14):
                path.write_bytes(mutated(good, draw))
                try:
                    read(path)
                except (PipelineError, Undecodable):
                    pass
                except BaseException as error:
                    found.append(f"{name}: {type(error).__name__}: {error}")
        path.write_bytes(good)
    assert not found
