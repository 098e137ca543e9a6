"""What several test files share: small data sets of class folders, prepared."""

import contextlib
import io
import os
import resource
import shutil
from pathlib import Path

# before torch starts its threads: for models as small as these two cost several times what they bring
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

SMALL = {
    "name": "small",
    "data": {"source": "folder", "shard_samples": 6, "workers": 1},
    "recipe": {"size": 16, "group_size": 4, "repeats": 2, "block": 4},
    "teacher_logits": {"views": 8},
    "finetune": {"views": 8},
}


def picture(seed: int, image_type: str = "png", width: int = 12, height: int = 10) -> bytes:
    """A seeded encoded image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "jpeg"}.get(image_type, image_type))
    return buffer.getvalue()


def write_folders(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """A folder of class folders with seeded images of several types and sizes."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image_type = ("png", "jpg", "webp")[i % 3]
            data = picture(1000 * seed + 100 * number + i, image_type, 12 + i % 7, 20 - i % 5)
            (root / name / f"{i:03d}.{image_type}").write_bytes(data)
    return root


def small_config(root: Path, **changes):
    """A configuration over root/train and root/val; `changes` are sections or `section__key`s."""
    from pipeline.config.params import merge, resolve

    values = merge(SMALL, {"work": str(root / "work"), "data": {s: str(root / s) for s in ("train", "val")}})
    for key, value in changes.items():
        for part in reversed(key.split("__")):
            value = {part: value}
        values = merge(values, value)
    return resolve(values, (), "test")


def make_data_set(root: Path, train: dict[str, int], val: dict[str, int], **changes):
    """Write class folders below `root`, prepare them in the current folder: configuration, training index."""
    from pipeline.config.paths import index_path
    from pipeline.shards.index import Index
    from stages import prepare

    write_folders(root / "train", train)
    write_folders(root / "val", val, seed=1)
    config = small_config(root, **changes)
    prepare.run(config)
    return config, Index(index_path(config, "train").absolute())


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    """An empty folder, which is the current one too."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def small_set(tmp_path_factory):
    """Configuration and index of 16 images of three classes in three shards, of 5 or 6; read only."""
    root = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        yield make_data_set(root, {"cat": 6, "dog": 5, "eel": 5}, {"cat": 1, "dog": 1, "eel": 1})


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@contextlib.contextmanager
def full_disk(limit: int = 2048):
    """Inside, no file grows beyond `limit` bytes; what writes more gets an OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def taught_template(tmp_path_factory) -> Path:
    """A folder with 20 images prepared, a tiny teacher, and a complete dense store."""
    from test_training import CHANGES, CPU

    from pipeline.config.params import dump
    from stages import teacher, teacher_logits

    root = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        config, _ = make_data_set(
            root, {"cat": 8, "dog": 6, "eel": 6}, {"cat": 2, "dog": 1, "eel": 1}, work="work", **CHANGES
        )
        teacher.run(config, CPU)
        teacher.run(config, CPU, "finetune")
        teacher_logits.run(config, CPU)
        Path("params.yaml").write_text(dump(config))
    return root


@pytest.fixture
def taught(taught_template, tmp_path, monkeypatch):
    """A copy of it, of one's own, as the current folder."""
    from test_training import loaded

    root = tmp_path / "taught"
    shutil.copytree(taught_template, root)
    monkeypatch.chdir(root)
    return loaded()
