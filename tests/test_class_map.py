"""A teacher of more classes than the index is restricted to those of the index."""

import json
from pathlib import Path

import pytest
import torch
from test_pretrained import BRIEF, offline_equals_online
from test_training import CPU, loaded

from pipeline.cli.dry_run import check
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.paths import index_path, student_folder, teacher_folder
from pipeline.config.schema import Config
from pipeline.models.build import NormalizedModel, build_teacher
from pipeline.models.class_map import class_numbers
from pipeline.models.provenance import teacher_architecture
from pipeline.models.teacher import describe_teacher, load_teacher
from pipeline.models.weights import read_weights, save_weights
from pipeline.shards.index import Index
from stages import teacher, teacher_logits

CLASSES = ["cat", "dog", "eel"]
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 16}


def mapped(class_map: str, *overrides: str) -> tuple[Config, NormalizedModel]:
    """A configuration with a class map, and its source: a RegNet of seven classes with used batch norms."""
    config = loaded(*BRIEF, "teacher.weights=seven.safetensors", f"teacher.class_map={class_map}", *overrides)
    source = build_teacher(config.teacher.model_copy(update={"seed": 9}), 7)
    source.train()(torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255)
    save_weights(Path("seven.safetensors"), source.model)
    return config, source.eval()


@pytest.mark.parametrize("class_map", ["[6, 0, 3]", "{eel: 3, cat: 6, dog: 0}"])
def test_the_published_teachers_logits_are_the_sources_of_these_classes(taught, class_map):
    config, source = mapped(class_map)
    teacher.run(config, CPU)
    pictures = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        found, every = load_teacher(config, Index(index_path(config, "train")).classes, CPU)(pictures)[0], source(pictures)[0]
    assert torch.allclose(found, every[:, [6, 0, 3]], rtol=0, atol=1e-6) and every.std() > 1e-3
    assert "run" not in json.loads((teacher_folder(config) / "metrics.json").read_text())  # nothing was trained


def test_stored_predictions_of_a_restricted_teacher_are_the_online_ones(taught):
    config, _ = mapped("[6, 0, 3]")
    teacher.run(config, CPU)
    offline_equals_online(config)


def test_both_heads_of_a_teacher_with_a_token_are_restricted(taught):
    changes = "teacher.model=deit_tiny_distilled_patch16_224", "teacher.weights=vit.safetensors"
    config = loaded(*changes, "teacher.class_map=[5, 1, 2]", "finetune.teacher_size=16")
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"kwargs": VIT})})
    source = build_teacher(config.teacher, 7).eval()
    save_weights(Path("vit.safetensors"), source.model)
    teacher.run(config, CPU)
    pictures = torch.rand(2, 3, 16, 16) * 255
    with torch.no_grad():
        found = load_teacher(config, Index(index_path(config, "train")).classes, CPU)(pictures)[0]
        assert torch.allclose(found, source(pictures)[0][:, [5, 1, 2]], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_both_heads_of_a_levit_are_restricted_and_a_levit_learns_from_it(taught):
    levit = "{img_size: 64, embed_dim: [16, 32, 48], num_heads: [1, 2, 3], depth: [1, 1, 1], key_dim: 8}"
    config = loaded(
        *BRIEF, "teacher.model=levit_128s", "teacher.weights=levit.safetensors", f"teacher.kwargs={levit}",
        "teacher.class_map=[5, 1, 2]", "recipe.size=64", "finetune.size=64", "finetune.teacher_size=64",
        "student.model=levit_128s", "student.drop_path=0", f"student.kwargs={levit}", "variants={hard: {}}", "students=[hard]",
    )  # fmt: skip
    source = build_teacher(config.teacher, 7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        source.train()(torch.rand(8, 3, 64, 64, generator=generator) * 255)  # statistics of the batch norm before each head
    save_weights(Path("levit.safetensors"), source.eval().model)
    teacher.run(config, CPU)
    pictures = torch.rand(2, 3, 64, 64) * 255
    with torch.no_grad():
        found = load_teacher(config, Index(index_path(config, "train")).classes, CPU)(pictures)[0]
        assert torch.allclose(found, source(pictures)[0][:, [5, 1, 2]], rtol=1e-5) and found.std() > 1e-3
    offline_equals_online(config)
    weights = read_weights(student_folder(config, "hard") / "weights.safetensors")
    assert any(name.startswith("head_dist.") for name in weights)


def test_another_class_map_is_another_teacher(taught):
    described = []
    for class_map in ("[6, 0, 3]", "[6, 0, 2]"):
        config, _ = mapped(class_map)
        teacher.run(config, CPU)
        described.append(describe_teacher(config.teacher, load_teacher(config, Index(index_path(config, "train")).classes, CPU), 16))
    first, second = described
    assert first["weights"] != second["weights"] and first["class_map"] == [6, 0, 3]
    with pytest.raises(PipelineError, match=r"(?s)another configuration.*class_map.*run: pipeline teacher"):
        teacher_logits.run(mapped("[6, 0, 3]")[0], CPU)


def test_a_teacher_without_a_class_map_is_described_as_before(taught):
    assert teacher_architecture(taught.teacher).keys() == {"model", "kwargs", "mean", "std"}


def test_a_label_set_of_timms_numbers_wordnets_names():
    assert class_numbers("imagenet-1k", ["n01484850", "n01440764"]) == [2, 0]


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ([1, 2], "3 numbers, one per class of the index"),
        ({"cat": 1, "dog": 2, "elk": 3}, "no eel and also elk"),
        ("imagenet-1k", "no cat, dog, eel"),
        ("photos", "timm knows no such label set"),
    ],
)
def test_a_class_map_for_other_classes_is_refused(class_map, message):
    with pytest.raises(UsageError, match=message):
        class_numbers(class_map, CLASSES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.class_map=[1, 1, 2]"], "different class numbers"),
        (["teacher.class_map=[-1, 1, 2]"], "different class numbers"),
        (["teacher.class_map=[]"], "at least one"),
        (["teacher.weights=null"], "teacher.class_map must be null without teacher.weights"),
        (["teacher.head_epochs=1"], "teacher.head_epochs must be 0 with teacher.class_map"),
    ],
)
def test_a_class_map_that_makes_no_sense_is_refused(taught, overrides, message):
    with pytest.raises(UsageError, match=message):
        loaded("teacher.weights=a.pth", "teacher.class_map=[0, 1, 2]", *overrides)


@pytest.mark.parametrize("dry", [True, False])
def test_numbers_that_the_teacher_does_not_have_are_refused(taught, dry):
    config, _ = mapped("[6, 0, 7]")
    with pytest.raises(UsageError, match=r"(?s)numbers below 7.*found: +7"):
        check(config, "teacher") if dry else teacher.run(config, CPU)
    tag = loaded("teacher.weights=test_resnet.r160_in1k", "teacher.class_map=[0, 1, 1000]", "teacher.kwargs={}")
    with pytest.raises(UsageError, match="numbers below 1,000"):
        check(tag, "teacher")


def test_a_dry_run_with_a_class_map_announces_no_training(taught, capsys):
    teacher.run(mapped("[6, 0, 3]")[0], CPU, dry_run=True)
    teacher.run(loaded("teacher.weights=test_resnet.r160_in1k", "teacher.class_map=[0, 1, 2]"), CPU, dry_run=True)
    said = capsys.readouterr().out
    assert "seven.safetensors, 16 px" in said and "r160_in1k, 16 px" in said and "replaced" not in said
