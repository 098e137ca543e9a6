"""Students of other families than DeiT: built, distilled, resumed, fine-tuned at a higher resolution, evaluated."""

import html
import shutil

import pytest
import torch
from test_training import CPU, loaded

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.paths import evaluation_folder, finetune_folder, outputs, student_folder
from pipeline.config.schema import Recipe, Student
from pipeline.models.adapt import load_resized_weights
from pipeline.models.build import NormalizedModel, build_student
from pipeline.models.description import load_model
from pipeline.models.evaluation import multiply_adds
from pipeline.models.pretrained import replace_classifiers
from pipeline.models.teacher import check_input_size
from pipeline.models.weights import read_weights
from pipeline.training.optim import ModelEma
from pipeline.training.trainer import Trainer
from stages import evaluate, finetune, teacher_logits, train_student

SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
TINY_VIT = {
    "embed_dims": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_sizes": [4, 4, 4, 4],
}  # fmt: skip
LEVIT = {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 1, 1], "key_dim": 8}
FAMILIES = {
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_byobnet": {},
    "test_nfnet": {},
    "test_vit": {},
    "test_vit3": {},
    "swin_tiny_patch4_window7_224": SWIN,
    "tiny_vit_5m_224": TINY_VIT,
    "levit_128s": LEVIT,
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "regnety_002": {"depth": 8},
    "poolformer_s12": {},
}
families = pytest.mark.parametrize("model", FAMILIES)


def built(model: str, classes: int = 5, size: int = 64, **changes) -> NormalizedModel:
    section = Student(model=model, kwargs=FAMILIES.get(model, {}), **changes)
    return build_student(section, Recipe(), classes, size)


def pictures(size: int = 64) -> torch.Tensor:
    return 255 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@families
def test_a_student_of_any_family_trains_every_parameter_through_its_class_head(model):
    student = built(model).train()
    first, second = student(pictures())
    assert first.shape == (2, 5) and first is second and not student.distilled
    first.square().sum().backward()
    assert not [name for name, parameter in student.named_parameters() if parameter.grad is None]


@families
def test_building_again_gives_the_same_weights(model):
    first, second = (built(model).model.state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@families
def test_multiply_adds_are_counted(model):
    assert multiply_adds(built(model), 64) > 100_000


@families
def test_the_classifier_is_replaced_for_another_number_of_classes(model):
    source, target = built(model, seed=1), built(model, classes=7, seed=2)
    state, replaced = replace_classifiers(target.model, source.model.state_dict())
    assert replaced and replace_classifiers(source.model, source.model.state_dict())[1] == []
    load_resized_weights(target, state, "source")
    assert target(pictures())[0].shape == (2, 7)


@pytest.mark.parametrize("model", [name for name in FAMILIES if name != "levit_128s"])
def test_weights_are_loaded_at_a_higher_resolution(model):
    source, target = built(model, seed=1), built(model, size=96, seed=2)
    load_resized_weights(target, source.model.state_dict(), "source")
    kept = {name for name in source.model.state_dict() if name != "pos_embed"}
    found = target.model.state_dict()
    assert all(torch.equal(found[name], source.model.state_dict()[name]) for name in kept)
    assert target(pictures(96))[0].shape == (2, 5)


def test_weights_that_depend_on_the_resolution_are_refused_at_another_one():
    with pytest.raises(PipelineError, match="another input size") as caught:
        load_resized_weights(built("levit_128s", size=96), built("levit_128s").model.state_dict(), "levit.pth")
    assert "levit.pth" in str(caught.value) and "attention_bias" in str(caught.value)


def test_a_model_that_does_not_take_the_size_is_refused():
    with pytest.raises(UsageError, match="efficientformer_l1 with pictures of 64 px"):
        check_input_size(built("efficientformer_l1"), 64, "choose another", "efficientformer_l1")


@pytest.mark.parametrize("model", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_a_size_that_the_patches_do_not_cover_is_refused(model):
    student = built(model)
    side = student.model.patch_embed.patch_size[0]
    check_input_size(student, 64, "choose another")
    with pytest.raises(UsageError, match=rf"(?s)a multiple of its patch size, {side}.*1 rows and columns that it would ignore"):
        check_input_size(built(model, size=64 + side), 64 + side + 1, "choose another")


def test_drop_path_of_a_model_without_it_is_refused():
    with pytest.raises(UsageError, match="set drop_path to 0"):
        built("vgg11", drop_path=0.1)


def test_dropout_of_a_convnet_is_before_its_classifier():
    assert built("test_resnet", dropout=0.25).model.drop_rate == 0.25


def test_unknown_kwargs_are_refused_even_if_a_setting_has_their_name():
    with pytest.raises(UsageError, match="img_size"):
        build_student(Student(model="test_resnet", kwargs={"img_size": 64}), Recipe(), 5, 64)


def test_ema_averages_statistics_of_batch_norm_and_copies_its_counter():
    student = built("test_resnet").train()
    ema = ModelEma(student, 0.5)
    for step in range(3):
        student(pictures())
        ema.update(step)
    own, averaged = student.model.bn1, ema.module.model.bn1
    assert averaged.num_batches_tracked == own.num_batches_tracked == 3
    assert not torch.equal(averaged.running_mean, own.running_mean) and averaged.running_mean.any()


@pytest.mark.slow
def test_a_student_with_batch_norm_is_distilled_resumed_fine_tuned_and_evaluated(taught, monkeypatch):
    config = loaded("student.model=test_resnet", "student.kwargs={}", "students=[hard]", "evaluate.sizes=[16]")
    undisturbed = config.model_copy(update={"work": "undisturbed", "name": "undisturbed"})
    shutil.copytree("work/stores", "undisturbed/stores")
    shutil.copytree(outputs(config), outputs(undisturbed))
    train_student.run(undisturbed, CPU, "hard")
    real = Trainer.train_step

    def stopping(self, batches):
        if self.step == 5:
            raise KeyboardInterrupt
        return real(self, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", stopping)
        train_student.run(config, CPU, "hard")
    train_student.run(config, CPU, "hard")
    expected, found = (
        read_weights(student_folder(each, "hard") / "weights.safetensors") for each in (undisturbed, config)
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found["bn1.running_mean"].any()
    teacher_logits.run(config, CPU, "finetune")
    finetune.run(config, CPU, "hard")
    evaluate.run(config, CPU)
    description = load_model(finetune_folder(config, "hard") / "weights.safetensors")[1]
    assert (description.model, description.kwargs, description.size) == ("test_resnet", {}, 24)
    report = (evaluation_folder(config) / "report.html").read_text()
    assert "timm.create_model('test_resnet', num_classes=len(classes))" in html.unescape(report)
    table = (evaluation_folder(config) / "table.txt").read_text()
    assert "hard-finetuned" in table and " softmax " not in table
