"""A teacher from pretrained weights of other classes: its classifier is replaced and trained."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from conftest import small_config, write_folders
from test_ranks import launch
from test_training import CHANGES, CPU, Stop, loaded

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import dump
from pipeline.config.paths import index_path, student_folder, teacher_folder
from pipeline.config.schema import Config
from pipeline.models import pretrained
from pipeline.models.build import build_student, build_teacher
from pipeline.models.pretrained import classifier_modules, load_pretrained, replace_classifiers
from pipeline.models.provenance import teacher_architecture
from pipeline.models.weights import read_weights, save_weights
from pipeline.shards.index import Index
from pipeline.training.identity import configured_teacher
from pipeline.training.trainer import Trainer
from stages import prepare, teacher, teacher_logits, train_student

BRIEF = "student.epochs=1", "student.eval_epochs=1"
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 16}


def transferred(*overrides: str, classes: int = 5) -> Config:
    """Weights of a tiny RegNet of other classes, with statistics of batch norm that are not the initial ones."""
    config = loaded(*BRIEF, "teacher.weights=source.safetensors", "teacher.epochs=2", *overrides)
    source = build_teacher(config.teacher.model_copy(update={"seed": 9}), classes)
    source.train()(torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255)
    save_weights(Path("source.safetensors"), source.model)
    return config


def changed_names(config: Config) -> set[str]:
    """Parameters and buffers of the published teacher that are not the source's."""
    before, after = read_weights("source.safetensors"), published(config)
    return {name for name in after if not torch.equal(before[name], after[name])}


def published(config: Config) -> dict[str, torch.Tensor]:
    return read_weights(teacher_folder(config) / "weights.safetensors")


def state_folder_of(config: Config) -> str:
    return json.loads((teacher_folder(config) / "metrics.json").read_text())["run"]


def test_weights_of_other_classes_get_a_new_classifier_and_are_trained(taught, capsys):
    config = transferred()
    teacher.run(config, CPU)
    assert "its classifier is replaced, and it is trained for 2 epochs" in capsys.readouterr().out
    assert published(config)["head.fc.weight"].shape[0] == 3
    changed = changed_names(config)
    assert "stem.conv.weight" in changed and "stem.bn.running_mean" in changed


def test_weights_of_as_many_classes_are_used_as_they_are(taught):
    config = transferred(classes=3)
    teacher.run(config, CPU)
    assert not changed_names(config)
    assert "run" not in json.loads((teacher_folder(config) / "metrics.json").read_text())


def test_the_classifier_alone_is_trained_where_head_epochs_are_all(taught):
    config = transferred("teacher.head_epochs=2")
    teacher.run(config, CPU)
    assert changed_names(config) == {"head.fc.weight", "head.fc.bias"}


def test_the_classifier_is_trained_first_and_then_everything(taught, monkeypatch):
    seen, real = [], Trainer.train_step

    def watched(self, batches):
        model = self.run.model.model
        head = {part for module in classifier_modules(model) for part in module.modules()}
        training = {part for part in self.run.model.modules() if part.training}
        learning = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        seen.append((training == head, learning == {"head.fc"}))
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", watched)
    config = transferred("teacher.head_epochs=1", "teacher.eval_epochs=1")
    teacher.run(config, CPU)
    half = len(seen) // 2
    assert half and seen == [(True, True)] * half + [(False, False)] * half
    assert "stem.conv.weight" in changed_names(config)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_that_is_stopped_in_either_phase_ends_with_the_same_weights(taught, monkeypatch, optimizer):
    options = "teacher.head_epochs=1", f"teacher.optimizer={optimizer}", "teacher.checkpoint_minutes=0"
    config = transferred(*options, "teacher.ema_decay=0.9")
    teacher.run(config, CPU)
    expected, steps, real = published(config), [], Trainer.train_step
    for path in Path("work/state", state_folder_of(config)).iterdir():
        path.unlink()

    def stopping(self, batches):
        if len(steps) < self.step + 1:  # each step is tried twice: every resume is from another one
            steps.append(self.step)
            raise Stop
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    while True:
        try:
            teacher.run(config, CPU)
            break
        except Stop:
            pass
    assert len(steps) > 3
    assert all(torch.equal(expected[name], tensor) for name, tensor in published(config).items())


def test_stored_predictions_of_a_transferred_teacher_are_the_online_ones(taught):
    config = transferred("teacher.head_epochs=1")
    teacher.run(config, CPU)
    offline_equals_online(config)


def offline_equals_online(config: Config) -> None:
    """A student's weights are the same to the bit from the store and with the teacher in the loop."""
    teacher_logits.run(config, CPU)
    weights = []
    for how in ("stored", "online"):
        train_student.run(config, CPU, "hard", teacher=how)
        weights.append(read_weights(student_folder(config, "hard") / "weights.safetensors"))
    offline, online = weights
    assert all(torch.equal(offline[name], online[name]) for name in offline)


def test_a_teacher_with_a_token_gets_two_new_heads(taught):
    changes = "teacher.model=deit_tiny_distilled_patch16_224", "teacher.weights=vit.safetensors", "teacher.epochs=1"
    config = loaded(*BRIEF, *changes, "teacher.head_epochs=1", "finetune.teacher_size=16")
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"kwargs": VIT})})
    source = build_teacher(config.teacher, 7).model
    save_weights(Path("vit.safetensors"), source)
    teacher.run(config, CPU)
    weights, before = published(config), source.state_dict()
    assert weights["head.weight"].shape[0] == weights["head_dist.weight"].shape[0] == 3
    different = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert different == {f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")}
    offline_equals_online(config)


def test_a_vit_of_a_fixed_size_is_trained_at_its_own_size(taught):
    changes = "teacher.model=deit_tiny_patch16_224", "teacher.weights=vit.safetensors", "teacher.epochs=1"
    config = loaded(*BRIEF, *changes, "teacher.size=24")
    section = config.teacher.model_copy(update={"kwargs": VIT | {"img_size": 24}})
    config = config.model_copy(update={"teacher": section})
    save_weights(Path("vit.safetensors"), build_teacher(config.teacher, 7).model)
    teacher.run(config, CPU)
    assert json.loads((teacher_folder(config) / "metrics.json").read_text())["size"] == 24
    offline_equals_online(config)


@pytest.mark.slow
def test_a_pretrained_pair_in_float16_on_a_folder_without_validation_images(in_tmp):
    half, brief = {"precision": "float16"}, {"epochs": 1, "eval_epochs": 1}
    config = small_config(
        in_tmp, work="work", data={"val": "", "val_fraction": 0.25}, evaluate=CHANGES["evaluate"],
        teacher={**CHANGES["teacher"], **half, **brief, "weights": "source.safetensors"},
        teacher_logits={**CHANGES["teacher_logits"], **half},
        student={**CHANGES["student"], **half, **brief, "weights": "student.safetensors"},
    )  # fmt: skip
    save_weights(Path("source.safetensors"), build_teacher(config.teacher, 5).model)
    save_weights(Path("student.safetensors"), build_student(config.student, config.recipe, 5, 24).model)
    write_folders(in_tmp / "train", {"cat": 8, "dog": 6, "eel": 6})
    prepare.run(config)
    assert [len(Index(index_path(config, split))) for split in ("train", "val")] == [14, 6]
    teacher.run(config, CPU)
    assert "stem.conv.weight" in changed_names(config)
    offline_equals_online(config)


# identity


def test_source_weights_and_head_epochs_are_in_the_runs_identity(taught):
    runs = []
    for overrides in ([], ["teacher.head_epochs=1"], ["teacher.seed=4"]):
        config = transferred(*overrides)
        teacher.run(config, CPU)
        runs.append(state_folder_of(config))
    state = read_weights("source.safetensors")
    torch.save({name: tensor * 1.5 for name, tensor in state.items()}, "source.pth")
    config = loaded(*BRIEF, "teacher.weights=source.pth", "teacher.epochs=2")
    teacher.run(config, CPU)
    assert len({*runs, state_folder_of(config)}) == 4


def test_the_path_of_the_source_weights_is_not_in_the_runs_identity(taught):
    config = transferred()
    teacher.run(config, CPU)
    first = state_folder_of(config)
    Path("source.safetensors").rename("moved.safetensors")
    teacher.run(loaded(*BRIEF, "teacher.weights=moved.safetensors", "teacher.epochs=2"), CPU)
    assert state_folder_of(config) == first


def test_a_teacher_without_weights_keeps_the_identity_that_it_had(taught):
    settings = configured_teacher(taught, None)["teacher_settings"]
    assert "head_epochs" not in settings and settings["weights"] is None


# refusals, and weights of several models


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.head_epochs=1"], "teacher.head_epochs must be 0 without teacher.weights"),
        (["teacher.weights=a.pth", "teacher.epochs=2", "teacher.head_epochs=3"], "must be at most teacher.epochs"),
    ],
)
def test_head_epochs_that_make_no_sense_are_refused(taught, overrides, message):
    with pytest.raises(UsageError, match=message):
        loaded(*overrides)


def test_a_transferred_teacher_below_min_top1_is_refused(taught):
    (teacher_folder(taught) / "weights.safetensors").unlink()
    with pytest.raises(PipelineError, match=r"(?s)at least 1\.0000 \(teacher\.min_top1\).*predicting the most frequent class gives 0\."):
        teacher.run(transferred("teacher.min_top1=1", "teacher.lr=0"), CPU)
    assert not (teacher_folder(taught) / "weights.safetensors").exists()


MODELS = "test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet"


@pytest.mark.parametrize("name", MODELS)
def test_only_the_classifier_of_a_model_is_replaced(name):
    source, own = (timm.create_model(name, num_classes=classes) for classes in (7, 3))
    state, new = replace_classifiers(own, source.state_dict())
    own.load_state_dict(state)
    assert len(new) == 2
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items() if key not in new)
    assert replace_classifiers(own, own.state_dict())[1] == []


def test_a_file_without_a_classifier_gets_a_new_one():
    own = timm.create_model("test_resnet", num_classes=3)
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    assert replace_classifiers(own, state)[1] == ["fc.weight", "fc.bias"]


@pytest.fixture
def tagged(taught, monkeypatch):
    """A teacher of a timm tag with initial weights, and its own normalization."""
    real = timm.create_model
    monkeypatch.setattr(pretrained.timm, "create_model", lambda name, pretrained=False, **kwargs: real(name, **kwargs))
    monkeypatch.setattr(pretrained, "missing_weights", lambda tag: "")
    teacher = loaded("teacher.weights=test_resnet.r160_in1k", "teacher.kwargs={}").teacher
    return teacher.model_copy(update={"kwargs": {}, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})


@pytest.mark.parametrize(("classes", "fits"), [(1000, True), (3, False)])
def test_a_timm_tag_is_fitted_like_a_file(tagged, classes, fits):
    model, fitting = load_pretrained(tagged, [str(number) for number in range(classes)], Path("checksums"))
    assert fitting is fits and model.model.num_classes == classes


def test_a_timm_tag_that_is_used_as_it_is_needs_its_own_normalization(tagged):
    other = tagged.model_copy(update={"mean": (0.485, 0.456, 0.406)})
    with pytest.raises(PipelineError, match=r"(?s)another normalization.*mean \[0\.5, 0\.5, 0\.5\]"):
        load_pretrained(other, [str(number) for number in range(1000)], Path("checksums"))
    assert not load_pretrained(other, ["a", "b"], Path("checksums"))[1]  # it is trained further, so it may adapt


def test_weights_on_the_hub_are_those_of_the_configured_model(tagged):
    teacher = tagged.model_copy(update={"model": "test_resnet", "weights": "hf-hub:somebody/model"})
    names = {"hf-hub:somebody/model": "test_resnet"}
    real = pretrained.timm.create_model
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pretrained.timm, "create_model", lambda name, **kwargs: real(names.get(name, name), **kwargs))
        model, fitting = load_pretrained(teacher, ["a", "b"], Path("checksums"))
    assert not fitting and model.model.num_classes == 2
    assert teacher_architecture(teacher)["model"] == "test_resnet"


def test_a_timm_tag_builds_its_own_model_whatever_model_says(tagged):
    built = build_teacher(tagged.model_copy(update={"model": "test_vit"}), 3).model
    assert type(built) is type(timm.create_model("test_resnet"))


def test_a_student_whose_distillation_head_was_not_trained_is_no_teacher(tagged, monkeypatch):
    monkeypatch.setattr(pretrained, "_expected_input", lambda model: {"heads": "class"})
    with pytest.raises(PipelineError, match="distillation head was not trained"):
        load_pretrained(tagged, [str(number) for number in range(1000)], Path("checksums"))


@pytest.mark.slow
def test_two_ranks_train_the_classifier_and_then_everything_as_one_does(taught):
    options = "teacher.model=deit_tiny_patch16_224", "teacher.weights=vit.safetensors", "teacher.epochs=2"
    options += "teacher.head_epochs=1", "teacher.warmup_epochs=0", "teacher.optimizer=sgd", "teacher.lr=1"
    config = loaded(*options, "finetune.teacher_size=16")
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"kwargs": VIT})})
    source = build_teacher(config.teacher, 7).model
    save_weights(Path("vit.safetensors"), source)
    Path("params.yaml").write_text(dump(config))
    weights = []
    for ranks in (1, 2):
        shutil.rmtree("work/state")
        process = launch("teacher", nodes=("--standalone", f"--nproc-per-node={ranks}"))
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        weights.append(published(config))
    one, two = weights
    assert all(torch.allclose(tensor, two[name], rtol=0, atol=1e-5) for name, tensor in one.items())
    assert not torch.allclose(one["pos_embed"], source.state_dict()["pos_embed"], rtol=0, atol=1e-3)
