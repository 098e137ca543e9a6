"""`compile: true` on a CPU: losses and predictions are those of plain torch up to rounding."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from test_ranks import two_ranks
from test_training import CPU, loaded, losses, trained_losses

from pipeline.config.params import dump
from pipeline.config.paths import index_path, store_path, teacher_logits_folder
from pipeline.config.schema import Config
from pipeline.shards.index import Index
from pipeline.store.manifest import read_manifest
from pipeline.store.reader import Store
from stages import teacher_logits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for a CPU"),
    pytest.mark.filterwarnings("default"),  # those of the compiler are not ours
]
SETTINGS = "student.drop_path=0", "student.batch_size=16", "student.accumulation=2"


def test_a_compiled_student_has_the_losses_of_a_plain_one(taught):
    plain = trained_losses(loaded(*SETTINGS), "hard", "stored")
    assert trained_losses(loaded(*SETTINGS, "student.compile=true"), "hard", "stored") == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("name", ["hard", "none"])
def test_two_ranks_of_a_compiled_student_have_them_too(taught, name):
    plain = trained_losses(loaded(*SETTINGS), name, "stored")
    shutil.rmtree("work/state")
    Path("params.yaml").write_text(dump(loaded(*SETTINGS, "student.compile=true")))
    two_ranks("train-student", "--student", name)
    assert losses(loaded()) == pytest.approx(plain, rel=1e-4)


def all_logits(config: Config) -> np.ndarray:
    index = Index(index_path(config, "train"))
    manifest = read_manifest(teacher_logits_folder(config, "train-student") / "manifest.json")
    store = Store.open(store_path(config, manifest["fingerprint"]), index, config.recipe)
    shards, views = range(len(index.names)), range(manifest["views"])
    return np.concatenate([store.read(shard, view, "dense").payload for shard in shards for view in views])


def test_a_compiled_teacher_predicts_as_a_plain_one(taught):
    plain = all_logits(taught)
    shutil.rmtree("work/stores")
    teacher_logits.run(loaded("teacher_logits.compile=true"), CPU)
    np.testing.assert_allclose(all_logits(taught), plain, rtol=2e-3, atol=2e-3)
