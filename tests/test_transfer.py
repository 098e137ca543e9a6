"""A pretrained pair against training from scratch: pretrained on five classes of CIFAR-10, transferred to the others.

By hand: CIFAR10=FOLDER pytest -m campaign -s tests/test_transfer.py, which prints the figures in docs/models.md.
"""

import json
import os
import shutil
from pathlib import Path
from statistics import mean

import pytest
import safetensors.torch
import torch

from pipeline.config.params import merge, resolve
from pipeline.config.paths import student_folder, teacher_folder
from pipeline.config.schema import Config
from pipeline.models.weights import read_weights
from stages import prepare, teacher, teacher_logits, train_student

CIFAR10 = os.path.abspath(os.environ["CIFAR10"]) if "CIFAR10" in os.environ else None
"""Folder of CIFAR-10's images: train/CLASS/0000.jpg and so on, and test/CLASS/."""

CPU = torch.device("cpu")
CLASSES = "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
SOURCE, TARGET = CLASSES[::2], CLASSES[1::2]
SOURCE_IMAGES, TARGET_IMAGES, VAL_IMAGES = 5000, 50, 400
"""Training images per class of both data sets, and validation images per class."""
SEEDS = 2
PLAIN, TOKEN = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"

COMMON = {
    "precision": "float32", "batch_size": 64, "ema_decay": None, "drop_path": 0.0, "warmup_epochs": 0, "workers": 1,
}  # fmt: skip
SETTINGS = {
    "name": "pretraining",
    "data": {"source": "folder", "train": "train", "val": "val", "shard_samples": 256, "workers": 1},
    "recipe": {
        "size": 32, "scale": [0.5, 1.0], "auto_augment": None, "color_jitter": 0.2, "erase_prob": 0.0, "mix_prob": 0.2,
        "group_size": 32, "block": 9,
    },
    "teacher": {
        **COMMON, "model": "regnety_002", "kwargs": {"depth": 8, "output_stride": 8}, "epochs": 9, "lr": 0.016,
        "crop": 1.0, "min_top1": 0.5, "eval_epochs": 3,
    },
    "teacher_logits": {"views": 18, "kind": "argmax", "precision": "float32", "workers": 1},
    "student": {
        **COMMON, "model": PLAIN, "kwargs": {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
        "epochs": 18, "lr": 0.008, "eval_epochs": 6,
    },
    "students": ["plain"],
    "variants": {"plain": {"distillation": "none"}},
    "finetune": {"views": 9},
    "evaluate": {"workers": 0, "crop": 1.0},
}  # fmt: skip
TRANSFER = {
    "name": "transfer",
    "teacher": {"batch_size": 32, "epochs": 24, "lr": 0.008, "eval_epochs": 24, "min_top1": 0.35},
    "teacher_logits": {"views": 36},
    "student": {"batch_size": 32, "epochs": 36, "eval_epochs": 36},
}
STUDENTS = {
    "labels": {"distillation": "none"},
    "distilled": {"model": TOKEN, "distillation": "hard"},
}


def copy_images(folder: Path, classes: tuple[str, ...], train: range) -> None:
    """Copy the images of `classes` that `train` numbers, and the first VAL_IMAGES of the test set."""
    for split, source, numbers in (("train", "train", train), ("val", "test", range(VAL_IMAGES))):
        for name in classes:
            target = folder / split / name
            target.mkdir(parents=True)
            for path in sorted(Path(str(CIFAR10), source, name).iterdir())[numbers.start : numbers.stop]:
                shutil.copy(path, target)


def run_stages(config: Config) -> dict[str, float]:
    """Run the stages in the current folder: top-1 of the teacher and of each student."""
    prepare.run(config)
    teacher.run(config, CPU)
    if config.needs_store("train-student"):
        teacher_logits.run(config, CPU)
    for name in config.students:
        train_student.run(config, CPU, name)
    folders = {"teacher": teacher_folder(config)} | {name: student_folder(config, name) for name in config.students}
    return {name: top1(json.loads((folder / "metrics.json").read_text())) for name, folder in folders.items()}


def top1(metrics: dict[str, float]) -> float:
    """Accuracy of the teacher, or of a student: the mean of its heads if it has two."""
    return next(metrics[key] for key in ("top1", "val_top1_mean", "val_top1_class") if key in metrics)


def pretrain(folder: Path) -> dict[str, str]:
    """Train teacher and student on the classes of SOURCE, and save their weights without the classifiers.

    With their classifiers, weights of as many classes would be taken for those of the same classes.
    """
    copy_images(folder, SOURCE, range(SOURCE_IMAGES))
    os.chdir(folder)
    config = resolve(SETTINGS, (), "test")
    print("pretraining", run_stages(config))
    saved = {}
    for name, published in (("teacher", teacher_folder(config)), ("student", student_folder(config, "plain"))):
        state = read_weights(published / "weights.safetensors")
        saved[name] = str(folder / f"{name}.safetensors")
        safetensors.torch.save_file({key: at for key, at in state.items() if not key.startswith("head.")}, saved[name])
    return saved


def transfer(folder: Path, seed: int, weights: dict[str, str]) -> dict[str, float]:
    """Fine-tune the teacher on other images for each seed, and train students from pretrained weights and from scratch."""
    copy_images(folder, TARGET, range(seed * TARGET_IMAGES, (seed + 1) * TARGET_IMAGES))
    os.chdir(folder)
    values = merge(SETTINGS, TRANSFER)
    for section in ("recipe", "teacher", "student"):
        values = merge(values, {section: {"seed": seed}})
    values["teacher"]["weights"] = weights["teacher"]
    values["variants"] = {
        f"{start}-{name}": settings | {"weights": file, "lr": lr}
        for start, file, lr in (("scratch", None, 0.016), ("pretrained", weights["student"], 0.005))
        for name, settings in STUDENTS.items()
    }
    values["students"] = [*values["variants"]]
    return run_stages(resolve(values, (), "test"))


@pytest.mark.campaign
@pytest.mark.skipif(not CIFAR10, reason="set CIFAR10 to the folder of its images: train/CLASS/*.jpg, test/CLASS/*.jpg")
def test_a_pretrained_pair_beats_the_same_student_from_scratch_on_other_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # restored at the end
    weights = pretrain(tmp_path / "source")
    results = [transfer(tmp_path / f"target-{seed}", seed, weights) for seed in range(SEEDS)]
    means = {name: mean(each[name] for each in results) for name in results[0]}
    for name, found in means.items():
        print(f"{name:20} {found:.4f}:", *(f"{each[name]:.4f}" for each in results))
    best = means.pop("pretrained-distilled")
    assert best > means["scratch-labels"] + 0.08
    assert best > means["scratch-distilled"] + 0.05
