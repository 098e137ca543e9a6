"""Students that start from pretrained weights: other classes, resolutions, and models with or without a token."""

import json
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from test_training import CPU, loaded

from pipeline.cli.main import main
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.paths import student_folder
from pipeline.config.schema import Recipe, Student
from pipeline.models import pretrained
from pipeline.models.adapt import resize_position_embedding
from pipeline.models.build import NormalizedModel, build_student
from pipeline.models.pretrained import load_student_weights, replace_classifiers
from pipeline.models.weights import DESCRIPTION, save_weights, weights_hash
from pipeline.training.identity import configured_student
from stages import train_student

SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TOKEN, PLAIN = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"
BRIEF = "student.epochs=1", "student.eval_epochs=1", "student.ema_decay=null"
SOURCE = "student.weights=source.safetensors"


def built(model: str, classes: int = 3, size: int = 16, seed: int = 0) -> NormalizedModel:
    kwargs = SMALL if model.startswith("deit") else {}
    return build_student(Student(model=model, kwargs=kwargs, seed=seed), Recipe(), classes, size)


CLASSES = ["ant", "bee", "cat"]


def loaded_from(
    source: NormalizedModel, target: NormalizedModel, suffix: str = "safetensors", described: dict | None = None
) -> list[str]:
    path = Path(f"source.{suffix}")
    if suffix == "pth":
        torch.save({"model": source.model.state_dict()}, path)
    else:
        save_weights(path, source.model, {DESCRIPTION: described or {}})
    return load_student_weights(Student(weights=str(path)), target, CLASSES, Path("checksums"))


def tensors(model: NormalizedModel) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.model.state_dict().items()}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("model", [TOKEN, PLAIN, "test_resnet", "test_convnext"])
def test_weights_of_the_same_model_are_loaded_as_they_are(in_tmp, model, suffix):
    source, target = built(model, seed=1), built(model, seed=2)
    assert loaded_from(source, target, suffix) == []
    assert weights_hash(target.model) == weights_hash(source.model)


@pytest.mark.parametrize(("named", "kept"), [(CLASSES, True), (["0", "1", "2"], True), (CLASSES[::-1], False), (["x", "y", "z"], False)])
def test_heads_of_as_many_other_classes_are_fresh_if_the_file_names_them(in_tmp, named, kept):
    source, target = built(TOKEN, seed=1), built(TOKEN, seed=2)
    fresh = tensors(target)
    new = loaded_from(source, target, described={"classes": named})
    assert (new == []) == kept
    assert torch.equal(target.model.head.weight, (source.model.head.weight if kept else fresh["head.weight"]))
    assert torch.equal(target.model.cls_token, source.model.cls_token)


def test_a_model_that_does_not_name_its_classifier_is_refused_for_other_classes():
    model = torch.nn.Linear(2, 3)
    assert replace_classifiers(model, model.state_dict())[1] == []
    with pytest.raises(PipelineError, match="get_classifier"):
        replace_classifiers(model, model.state_dict(), other_classes=True)


def test_heads_of_other_classes_are_fresh_and_positions_are_resized(in_tmp):
    source, target = built(TOKEN, classes=7, size=32, seed=1), built(TOKEN, seed=2)
    expected, fresh = tensors(source), tensors(target)
    heads = ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]
    assert sorted(loaded_from(source, target)) == sorted(heads)
    expected |= {name: fresh[name] for name in heads}
    expected["pos_embed"] = resize_position_embedding(expected["pos_embed"], 2, 2)
    assert all(torch.equal(each, expected[name]) for name, each in tensors(target).items())


def test_a_token_starts_as_a_copy_of_the_class_token(in_tmp):
    source, target = built(PLAIN, seed=1), built(TOKEN, seed=2)
    assert loaded_from(source, target) == []
    model = target.model
    assert torch.equal(model.dist_token, source.model.cls_token) and torch.equal(
        model.cls_token, source.model.cls_token
    )
    assert torch.equal(model.head_dist.weight, source.model.head.weight)
    assert torch.equal(model.pos_embed[:, 1], model.pos_embed[:, 0])
    assert torch.equal(model.pos_embed[:, 2:], source.model.pos_embed[:, 1:])


def test_a_token_is_dropped_where_the_student_has_none(in_tmp):
    source, target = built(TOKEN, size=32, seed=1), built(PLAIN, seed=2)
    assert loaded_from(source, target) == []
    positions = source.model.pos_embed
    expected = resize_position_embedding(torch.cat([positions[:, :1], positions[:, 2:]], 1), 2, 1)
    assert torch.equal(target.model.pos_embed, expected)
    assert torch.equal(target.model.head.weight, source.model.head.weight)


@pytest.mark.parametrize(("source", "target"), [("test_resnet", TOKEN), (TOKEN, "test_resnet"), (PLAIN, "test_vit")])
def test_weights_of_another_architecture_are_refused(in_tmp, source, target):
    with pytest.raises(PipelineError, match=r"source\.safetensors: weights of another model"):
        loaded_from(built(source), built(target))


def test_a_timm_tag_is_loaded_by_timm(in_tmp, monkeypatch):
    real = timm.create_model

    def downloaded(name, pretrained=False, **kwargs):
        assert pretrained
        torch.manual_seed(5)
        return real(name, **kwargs)

    target = built("test_resnet")
    monkeypatch.setattr(pretrained.timm, "create_model", downloaded)
    monkeypatch.setattr(pretrained, "missing_weights", lambda tag: "")
    new = load_student_weights(Student(weights="test_resnet.r160_in1k"), target, CLASSES, Path("checksums"))
    assert new == ["fc.weight", "fc.bias"]
    assert torch.equal(target.model.conv1[0].weight, downloaded("test_resnet", True).conv1[0].weight)


def test_a_tag_that_cannot_be_downloaded_is_refused_at_once(monkeypatch):
    target = built("test_resnet")
    monkeypatch.setattr(pretrained.timm, "create_model", None)
    monkeypatch.setattr(pretrained, "missing_weights", lambda tag: "the hub cannot be reached")
    with pytest.raises(PipelineError, match=r"(?s)student\.weights 'test_resnet\.r160_in1k'.*the hub cannot be reached.*network"):
        load_student_weights(Student(weights="test_resnet.r160_in1k"), target, CLASSES, Path("checksums"))


def test_an_unknown_tag_names_the_key():
    with pytest.raises(UsageError, match=r"student\.weights 'deit_tiny_patch16_224\.nobody'"):
        load_student_weights(Student(weights="deit_tiny_patch16_224.nobody"), built(PLAIN), CLASSES, Path("checksums"))


def run_of(config) -> str:
    return json.loads((student_folder(config, "hard") / "metrics.json").read_text())["run"]


def test_a_student_is_distilled_from_weights_which_are_in_its_identity(taught, capsys):
    config = loaded(*BRIEF, SOURCE, "student.lr=0", "student.min_lr=0", "student.warmup_lr=0")
    source = built(PLAIN, seed=1)
    save_weights(Path("source.safetensors"), source.model)
    train_student.run(config, CPU, "hard")
    assert "starts from source.safetensors" in capsys.readouterr().out
    first = run_of(config)
    Path("moved.safetensors").write_bytes(Path("source.safetensors").read_bytes())
    moved = config.student.model_copy(update={"weights": "moved.safetensors"})
    train_student.run(config.model_copy(update={"student": moved}), CPU, "hard")
    assert run_of(config) == first
    save_weights(Path("source.safetensors"), built(PLAIN, seed=2).model)
    train_student.run(config, CPU, "hard")
    assert run_of(config) != first


def test_a_student_without_weights_keeps_the_identity_that_it_had(taught):
    assert "weights" not in configured_student(taught, taught.student, "index")["student"]
    from_file = taught.student.model_copy(update={"weights": "here.pth"})
    from_tag = taught.student.model_copy(update={"weights": f"{PLAIN}.fb_in1k"})
    found = [configured_student(taught, each, "index")["student"]["weights"] for each in (from_file, from_tag)]
    assert found == ["file", f"{PLAIN}.fb_in1k"]


@pytest.mark.parametrize(
    ("weights", "code", "message"),
    [
        ("missing.pth", 1, "missing.pth: the weights cannot be read"),
        ("source.safetensors", 1, "weights of another model"),
        ("deit_tiny_patch16_224.nobody", 2, "student.weights"),
        ("deit_tiny_patch16_224.fb_in1k", 0, "which a dry run does not download"),
    ],
)
def test_a_dry_run_checks_the_weights(taught, weights, code, message):
    save_weights(Path("source.safetensors"), built("test_resnet").model)
    arguments = "train-student", "--dry-run", "--student", "hard", "--set", f"student.weights={weights}"
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code and message in result.output, result.output
