"""Several teachers whose probabilities are averaged: one store, one teacher."""

import json
from pathlib import Path

import pytest
import torch
from test_pretrained import BRIEF, offline_equals_online
from test_training import CPU, loaded

from pipeline.cli.dry_run import check
from pipeline.cli.matching import foreign_teachers
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import dump, parse_yaml, resolve
from pipeline.config.paths import index_path, teacher_folder
from pipeline.config.schema import Config
from pipeline.models.build import NormalizedModel, build_teacher
from pipeline.models.description import load_model
from pipeline.models.ensemble import mean_logits, resize_pictures
from pipeline.models.export import export
from pipeline.models.provenance import teacher_architecture
from pipeline.models.teacher import describe_teacher, load_teacher
from pipeline.models.weights import save_weights
from pipeline.shards.index import Index
from pipeline.training.identity import configured_teacher
from stages import evaluate, teacher, teacher_logits

VIT = "model: deit_tiny_patch16_224, kwargs: {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3, img_size: 24}"
MEMBERS = (
    "{model: regnety_002, kwargs: {depth: 8, output_stride: 8}, weights: seven.safetensors, class_map: [6, 0, 3]}",
    f"{{{VIT}, weights: vit.safetensors, size: 24, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}",
)


def several(*members: str, **changes) -> Config:
    return loaded(*BRIEF, f"teacher.ensemble=[{', '.join(members or MEMBERS)}]", *changes.get("overrides", ()))


@pytest.fixture
def sources(taught) -> dict[str, NormalizedModel]:
    """Weights of a RegNet of seven classes and of a ViT of 24 px, in files, and the models."""
    models = {}
    for name, section, classes in zip(("seven", "vit"), several().teacher.members[1:], (7, 3), strict=True):
        models[name] = build_teacher(section.model_copy(update={"seed": 9}), classes).eval()
        save_weights(Path(f"{name}.safetensors"), models[name].model)
    return models


def published(config: Config) -> NormalizedModel:
    return load_teacher(config, Index(index_path(config, "train")).classes, CPU)


def test_the_predicted_probabilities_are_the_mean_of_the_members(taught, sources):
    first, config = published(taught), several()
    teacher.run(config, CPU)
    pictures = 255 * torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = [first(pictures)[0], sources["seven"](pictures)[0][:, [6, 0, 3]]]
        logits.append(sources["vit"](resize_pictures(pictures, 24))[0])
        found = published(config)(pictures)[0]
    assert torch.allclose(found.exp(), torch.stack([part.softmax(1) for part in logits]).mean(0), atol=1e-6)
    assert torch.equal(found, mean_logits(logits)) and found.std() > 1e-3


def test_stored_predictions_of_an_ensemble_are_the_online_ones(taught, sources):
    config = several()
    teacher.run(config, CPU)
    offline_equals_online(config)


@pytest.mark.slow
def test_each_members_accuracy_is_published_and_the_ensembles_has_to_suffice(taught, sources, capsys):
    config = several(overrides=["teacher.min_top1=1.0"])
    with pytest.raises(PipelineError, match=r"regnety_002 \+ seven.safetensors \+ vit.safetensors at 16 px"):
        teacher.run(config, CPU)
    teacher.run(several(), CPU)
    metrics = json.loads((teacher_folder(config) / "metrics.json").read_text())
    assert list(metrics["members"]) == ["0: regnety_002", "1: seven.safetensors", "2: vit.safetensors"]
    assert metrics["members"]["0: regnety_002"]["top1"] == pytest.approx(first_top1(), abs=1e-9)
    assert metrics["parameters"] > sum(each["parameters"] for each in metrics["members"].values()) - 10
    assert "teacher 2, vit.safetensors: top-1" in capsys.readouterr().out


def first_top1() -> float:
    teacher.run(loaded(), CPU)
    return json.loads((teacher_folder(loaded()) / "metrics.json").read_text())["top1"]


def test_a_published_ensemble_describes_itself(taught, sources, tmp_path):
    config, pictures = several(), 255 * torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    teacher.run(config, CPU)
    model, description, _ = load_model(teacher_folder(config) / "weights.safetensors")
    assert torch.equal(model(pictures)[0], published(config)(pictures)[0])
    assert [each["size"] for each in description.members or []] == [None, None, 24]
    with pytest.raises(UsageError, match="an ensemble"):
        export(model, description, pictures, tmp_path, ("timm",))


def test_an_ensemble_trains_its_first_teacher_as_one_alone_is_trained(taught):
    assert configured_teacher(several(), "index") == configured_teacher(taught, "index")
    assert "ensemble" not in teacher_architecture(taught.teacher)


@pytest.mark.parametrize(
    "members",
    [
        MEMBERS[:1],
        MEMBERS[::-1],
        (MEMBERS[0].replace("[6, 0, 3]", "[6, 3, 0]"), MEMBERS[1]),
        (MEMBERS[0], MEMBERS[1].replace("0.5, 0.5, 0.5", "0.5, 0.5, 0.4", 1)),
        (MEMBERS[0].replace("class_map", "size: 24, class_map"), MEMBERS[1]),
    ],
)
def test_other_members_or_another_order_are_another_teacher(taught, members):
    assert teacher_architecture(several().teacher) != teacher_architecture(several(*members).teacher)


def test_the_published_teacher_of_another_ensemble_is_refused(taught, sources):
    teacher.run(several(), CPU)
    config = several(*MEMBERS[::-1])
    foreign = ["train-student" in foreign_teachers(each) for each in (several(), config, taught)]
    assert foreign == [False, True, True]
    with pytest.raises(PipelineError, match="another configuration"):
        teacher_logits.run(config, CPU)


def test_replaced_weights_of_a_member_are_another_teacher(taught, sources):
    config = several()
    teacher.run(config, CPU)
    before = describe_teacher(config.teacher, published(config), 16)
    save_weights(Path("vit.safetensors"), build_teacher(config.teacher.members[2], 3).model)
    assert "train-student" in foreign_teachers(config)
    teacher.run(config, CPU)
    assert before["weights"] != describe_teacher(config.teacher, published(config), 16)["weights"]


def test_a_configuration_with_members_is_read_back_as_it_was_written(taught):
    assert resolve(parse_yaml(dump(several()), ""), (), "") == several()


@pytest.mark.parametrize("dry", [True, False])
def test_a_member_of_other_classes_is_refused_before_anything_is_trained(taught, sources, dry):
    config = several(MEMBERS[1], MEMBERS[0].replace(", class_map: [6, 0, 3]", ""), overrides=["teacher.seed=7"])
    with pytest.raises(UsageError, match=r"(?s)teacher.ensemble\[1\].weights seven.*3 classes.*set its class_map"):
        check(config, "teacher") if dry else teacher.run(config, CPU)


def test_a_member_that_does_not_take_the_size_is_named(taught, sources):
    with pytest.raises(UsageError, match=r"teacher.ensemble\[0\] vit.safetensors with pictures of 16 px"):
        teacher.run(several(MEMBERS[1].replace("size: 24, mean", "mean")), CPU)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.ensemble=[{model: regnety_002}]"], "teacher.ensemble.0.weights"),
        (["teacher.ensemble=[{weights: a.pth, sise: 24}]"], r"(?s)teacher.ensemble.0.sise.*did you mean size\?"),
        (["teacher.ensemble=[{weights: a.pth}]", "teacher_finetune.epochs=1", "finetune.teacher_size=null"],
         "teacher_finetune.epochs must be 0 with teacher.ensemble"),
    ],
)  # fmt: skip
def test_an_ensemble_that_makes_no_sense_is_refused(taught, overrides, message):
    with pytest.raises(UsageError, match=message):
        loaded("teacher_finetune.batch_size=8", *overrides)


def test_a_dry_run_names_every_member_and_writes_nothing(taught, sources, capsys):
    before = (teacher_folder(taught) / "weights.safetensors").read_bytes()
    check(several(), "teacher")
    teacher.run(several(), CPU, dry_run=True)
    assert "averaged with seven.safetensors\n  averaged with vit.safetensors" in capsys.readouterr().out
    assert (teacher_folder(taught) / "weights.safetensors").read_bytes() == before


@pytest.mark.slow
def test_an_ensemble_is_evaluated_next_to_its_students(taught, sources, capsys):
    config = several(overrides=["students=[hard]", "finetune.from=[]"])
    teacher.run(config, CPU)
    offline_equals_online(config)
    evaluate.run(config, CPU)
    assert "teacher" in capsys.readouterr().out
