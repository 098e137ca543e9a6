"""Models: DeiT's sizes and initial weights, both heads in every mode, weights in and out."""

import os
import random

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import interpolate

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.schema import Recipe, Student, Teacher, TeacherLogits
from pipeline.models.adapt import (
    fixres_modules,
    load_resized_weights,
    resize_position_embedding,
)
from pipeline.models.build import NormalizedModel, build, build_student, build_teacher, parameter_count
from pipeline.models.evaluation import top_k_accuracy
from pipeline.models.pretrained import replace_classifiers
from pipeline.models.teacher import TeacherForward, resize_pictures, teacher_logits
from pipeline.models.weights import load_weights, read_saved_weights, read_weights, save_weights, weights_hash

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
DISTILLED = Student(kwargs=SMALL, drop_path=0.0)
PLAIN = Student(model="deit_tiny_patch16_224", kwargs=SMALL, drop_path=0.0)


def student(section=DISTILLED, classes=5, size=32, **changes) -> NormalizedModel:
    return build_student(section.model_copy(update=changes), Recipe(), classes, size)


def pictures(count=3, size=32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255


def refusal(call, *arguments, kind=PipelineError) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    return str(caught.value)


# size and initial weights


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("deit_tiny_patch16_224", 5_717_416),
        ("deit_small_patch16_224", 22_050_664),
        ("deit_base_patch16_224", 86_567_656),
        ("deit_base_patch16_384", 86_859_496),
        ("deit_tiny_distilled_patch16_224", 5_910_800),
        ("deit_small_distilled_patch16_224", 22_436_432),
        ("deit_base_distilled_patch16_224", 87_338_192),
        ("deit_base_distilled_patch16_384", 87_630_032),
    ],
)
def test_students_have_as_many_parameters_as_deits(name, count):
    with torch.device("meta"):
        model = build(Student(model=name), 1000, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert parameter_count(model) == count


def test_fine_tuned_student_has_as_many_parameters_as_deits():
    with torch.device("meta"):
        model = build_student(Student(model="deit_base_distilled_patch16_224"), Recipe(), 1000, 384)
    assert parameter_count(model) == 87_630_032


@pytest.mark.parametrize("name", ["cls_token", "dist_token", "pos_embed"])
def test_tokens_begin_as_a_normal_of_std_002(name):
    model = build_student(Student(kwargs={"depth": 1}), Recipe(), 10, 224).model
    assert getattr(model, name).std().item() == pytest.approx(0.02, rel=0.15)
    assert abs(getattr(model, name).mean().item()) < 0.004


def test_same_seed_makes_the_same_weights_and_another_others():
    assert weights_hash(student()) == weights_hash(student())
    assert weights_hash(student()) != weights_hash(student(seed=1))


def test_building_leaves_the_global_generators_as_they_were():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    student()
    build_teacher(Teacher(model="resnet10t"), 5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_seeding_the_global_generator_changes_no_weight():
    with torch.random.fork_rng():
        torch.manual_seed(99)
        seeded = weights_hash(student())
    assert seeded == weights_hash(student())


def test_unknown_model_is_refused_with_names_near_it():
    message = refusal(student, Student(model="deit_tinny_patch16_224"), kind=UsageError)
    assert "deit_tinny_patch16_224" in message and "deit_tiny_patch16_224" in message


def test_kwargs_that_a_model_does_not_take_are_refused_by_name():
    assert "no_such_thing" in refusal(student, Student(kwargs={"no_such_thing": 1}), kind=UsageError)


# both heads, behind the model's own normalisation


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_both_heads_are_timms_in_every_mode(mode):
    model = student().train(mode)
    ours = model(pictures())
    mean, std = (torch.tensor(t)[:, None, None] for t in (Recipe().mean, Recipe().std))
    model.model.set_distilled_training(True)
    theirs = model.model.train()((pictures() / 255 - mean) / std)
    for own, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, their, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*ours, atol=1e-3)


def test_mean_of_the_heads_is_timms_output_when_evaluated():
    model = student().eval()
    ours = sum(model(pictures())) / 2
    mean, std = (torch.tensor(t)[:, None, None] for t in (Recipe().mean, Recipe().std))
    torch.testing.assert_close(ours, model.model((pictures() / 255 - mean) / std), rtol=1e-4, atol=1e-5)


def test_dropout_is_where_deits_is():
    model = student(dropout=0.25).model
    block = model.blocks[0]
    assert [part.p for part in (model.pos_drop, block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2)] == [0.25] * 4
    assert model.head_drop.p == 0 and block.attn.attn_drop.p == 0


def test_dropout_is_applied_when_training_alone():
    model = student(dropout=0.5)
    outputs = {mode: [model.train(mode)(pictures())[0] for _ in range(2)] for mode in (True, False)}
    assert not torch.equal(*outputs[True]) and torch.equal(*outputs[False])


def test_plain_student_gives_its_logits_twice():
    one, other = student(PLAIN).eval()(pictures())
    assert torch.equal(one, other) and one.shape == (3, 5)


def test_model_is_normalised_with_its_own_mean_and_std():
    teacher = build_teacher(Teacher(model="resnet10t", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)), 5).eval()
    mean, std = (torch.tensor(t)[:, None, None] for t in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    normalised = (pictures() / 255 - mean) / std
    torch.testing.assert_close(teacher(pictures())[0], teacher.model(normalised), rtol=1e-4, atol=1e-5)


def test_normalisation_is_no_part_of_the_weights():
    assert set(student().state_dict()) == {f"model.{name}" for name in student().model.state_dict()}


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_distilled_teacher_answers_with_the_mean_of_its_heads_as_timm_does(mode):
    section = Teacher(model=DISTILLED.model, kwargs=SMALL | {"img_size": 32}, drop_path=0.0)
    teacher = build_teacher(section, 5).train(mode)
    own, taught = student(DISTILLED).eval()(pictures())  # of the same seed, so with the same weights
    answered = teacher_logits(teacher, pictures(), 4, 1, "float32")
    torch.testing.assert_close(answered, (own + taught) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own, taught, atol=1e-3)


def test_teacher_answers_a_group_alone_as_among_others():
    teacher = build_teacher(Teacher(model="resnet10t"), 5).eval()
    many = pictures(12)
    together = teacher_logits(teacher, many, 4, 1, "float32")
    alone = [teacher_logits(teacher, group, 4, 1, "float32") for group in many.split(4)]
    assert torch.equal(together, torch.cat(alone)) and together.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["resnet10t", "deit_tiny_distilled_patch16_224"])
def test_under_autocast_a_teachers_head_computes_in_float32(name, precision):
    asked, half = TeacherLogits(precision=precision), getattr(torch, precision)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2} if "deit" in name else {}
    teacher = build_teacher(Teacher(model=name, kwargs=size), 50).eval()
    logits = TeacherForward(teacher, asked).logits(pictures(), 3)
    with torch.no_grad(), torch.autocast("cpu", half):
        features = teacher.model.forward_features((pictures() - teacher.mean) / teacher.std)
    with torch.no_grad():
        assert torch.equal(logits, teacher.heads(features.float())[0])
    assert (logits != logits.to(half)).float().mean() > 0.9


def test_a_teacher_that_is_asked_answers_in_float32_as_its_model_does():
    teacher = build_teacher(Teacher(model="resnet10t"), 5).eval()
    with torch.no_grad():
        expected = teacher.model((pictures() - teacher.mean) / teacher.std)
    assert torch.equal(TeacherForward(teacher, TeacherLogits(precision="float32")).logits(pictures(), 3), expected)


def test_a_teacher_that_is_asked_gets_its_pictures_as_the_settings_say(monkeypatch):
    teacher, seen = build_teacher(Teacher(model="resnet10t"), 5).eval(), []
    teacher.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    TeacherForward(teacher, TeacherLogits(channels_last=True, compile=True, batch_groups=2), 16).logits(pictures(6), 2)
    assert [tuple(x.shape) for x in seen] == [(4, 3, 16, 16), (2, 3, 16, 16)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    weights = [w for w in teacher.parameters() if w.ndim == 4 and w.shape[2] > 1]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert compiled == [teacher]


def test_pictures_of_the_teachers_own_size_are_not_resized():
    many = pictures()
    assert resize_pictures(many, None) is many and resize_pictures(many, 32) is many
    assert resize_pictures(many, 16).shape == (3, 3, 16, 16)


# position embeddings


def test_position_embeddings_are_resized_by_plain_bicubic():
    embedding = torch.randn(1, 2 + 14 * 14, 8, generator=torch.Generator().manual_seed(0))
    resized = resize_position_embedding(embedding, 24, 2)
    grid = embedding[:, 2:].transpose(1, 2).reshape(1, 8, 14, 14)
    expected = interpolate(grid, (24, 24), mode="bicubic", align_corners=False, antialias=False)
    assert torch.equal(resized[:, :2], embedding[:, :2])
    torch.testing.assert_close(resized[:, 2:], expected.reshape(1, 8, 576).transpose(1, 2))


@pytest.mark.parametrize("prefix", [1, 2])
def test_position_embeddings_of_the_same_grid_stay_as_they_are(prefix):
    embedding = torch.randn(1, prefix + 49, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_position_embedding(embedding, 7, prefix), embedding)


@pytest.mark.parametrize("section", [DISTILLED, PLAIN], ids=["distilled", "plain"])
def test_student_of_another_resolution_takes_every_weight_but_the_positions(section):
    small, large = student(section), student(section, size=48, seed=1)
    state = small.model.state_dict()
    load_resized_weights(large, state, "trial")
    prefix = small.model.num_prefix_tokens
    expected = state | {"pos_embed": resize_position_embedding(state["pos_embed"], 6, prefix)}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in large.model.state_dict().items())


# weights in and out


@pytest.mark.parametrize("section", [DISTILLED, PLAIN])
def test_heads_of_another_number_of_classes_begin_anew_and_the_rest_is_kept(section):
    source, model = student(section, classes=5, size=32, seed=1), student(section, classes=7, size=48, seed=2)
    fresh = {name: value.clone() for name, value in model.model.state_dict().items()}
    state, anew = replace_classifiers(model.model, source.model.state_dict())
    load_resized_weights(model, state, "source")
    found = model.model.state_dict()
    heads = {f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")} & set(found)
    assert set(anew) == heads
    assert all(torch.equal(found[name], fresh[name]) for name in heads)
    kept = found.keys() - heads - {"pos_embed"}
    assert all(torch.equal(found[name], source.model.state_dict()[name]) for name in kept)


def test_heads_of_as_many_classes_are_kept():
    source, model = student(seed=1), student(seed=2)
    state, anew = replace_classifiers(model.model, source.model.state_dict())
    assert not anew and torch.equal(state["head.weight"], source.model.head.weight)


def test_plain_students_weights_are_refused_by_a_distilled_one_without_a_traceback():
    message = refusal(load_resized_weights, student(), student(PLAIN).model.state_dict(), "plain.pth")
    assert "plain.pth" in message and "dist_token" in message


def test_what_fixres_adapts_is_the_classifier_and_the_batch_norms_that_make_the_output():
    model = timm.create_model("regnety_002", num_classes=3)
    classifier, *norms = fixres_modules(model)
    assert classifier is model.head.fc
    last = model.s4.b7  # its shortcut is the identity
    assert norms == [last.conv3.bn]
    model = timm.create_model("regnety_160", num_classes=3)
    assert fixres_modules(model)[1:] == [model.s4.b1.conv3.bn, model.s4.b1.downsample.bn]


def test_model_without_batch_norm_cannot_be_adapted():
    assert "batch norm" in refusal(fixres_modules, student().model, kind=UsageError)


def test_linears_begin_as_a_normal_of_std_002_and_the_patches_as_torch_has_them():
    model = build_student(Student(kwargs={"depth": 2}, drop_path=0.0), Recipe(), 10, 224).model
    for part in (model.blocks[0].attn.qkv, model.blocks[1].mlp.fc1):
        assert part.weight.std().item() == pytest.approx(0.02, rel=0.05) and not part.bias.any()
    bound = (3 * 16 * 16) ** -0.5  # kaiming_uniform(a=sqrt(5)), as timm 0.3.2 leaves it
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)


def test_drop_path_rises_linearly_over_the_blocks():
    model = build_student(Student(drop_path=0.1), Recipe(), 10, 224).model
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.1, 12).tolist())


def test_weights_are_loaded_as_they_were_saved(tmp_path):
    model, other = student(), student(seed=1)
    save_weights(tmp_path / "w.safetensors", model.model)
    load_weights(other.model, read_weights(tmp_path / "w.safetensors"), "trial")
    assert weights_hash(other.model) == weights_hash(model.model)


def test_what_is_said_about_weights_is_read_with_them_and_under_their_digest(tmp_path):
    path, about = tmp_path / "w.safetensors", {"model": "one", "mean": [0.5]}
    save_weights(path, student().model, about)
    assert read_saved_weights(path)[1] == about
    path.write_bytes(path.read_bytes().replace(b"one", b"two"))
    assert "damaged weights" in refusal(read_saved_weights, path)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "as DeiT's"])
def test_weights_of_a_pth_file_are_read(tmp_path, wrapped):
    model, other = student(), student(seed=1)
    state = model.model.state_dict()
    torch.save({"model": state, "epoch": 3} if wrapped else state, tmp_path / "w.pth")
    load_weights(other.model, read_weights(tmp_path / "w.pth"), "trial")
    assert weights_hash(other.model) == weights_hash(model.model)


def test_hash_of_weights_changes_with_any_bit_name_or_type():
    model = student().model
    hashes = {weights_hash(model)}
    with torch.no_grad():
        model.norm.bias[0] = -0.0
    hashes.add(weights_hash(model))
    hashes.add(weights_hash(model.double()))
    hashes.add(weights_hash(student()))
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("foreign", "told"),
    [
        (lambda: student(PLAIN).model, "dist_token"),
        (lambda: student(classes=6).model, "head"),
        (lambda: timm.create_model("resnet10t", num_classes=5), "cls_token"),
    ],
    ids=["plain", "classes", "another"],
)
def test_weights_of_another_model_are_refused_with_the_names(foreign, told):
    message = refusal(load_weights, student().model, foreign().state_dict(), "file.pth")
    assert "file.pth: weights of another model" in message and told in message


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_with_code_is_refused_and_not_run(tmp_path):
    torch.save({"model": student().model.state_dict(), "args": Bomb(tmp_path / "ran")}, tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in refusal(read_weights, tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_damaged_weights_are_named(tmp_path, name, damage):
    path = tmp_path / name
    if name == "w.pth":
        torch.save(student().model.state_dict(), path)
    else:
        save_weights(path, student().model)
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(path.read_bytes()[:-1000])
        case "text":
            path.write_text("no weights")
    assert str(path) in refusal(read_weights, path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), {"model": 3}, {"model": {"epoch": 3}}], ids=str)
def test_pth_file_of_anything_but_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    refusal(lambda: load_weights(student().model, read_weights(tmp_path / "w.pth"), "w.pth"))


def test_weights_of_another_model_are_refused_with_a_few_names_and_their_number():
    source, target = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))), nn.Linear(2, 2)
    with pytest.raises(PipelineError) as caught:
        load_weights(target, source.state_dict(), "other.pth")
    assert 'Unexpected key(s) in state_dict: "0.weight", "0.bias", "1.weight" and 15 more' in str(caught.value)
    assert 'Missing key(s) in state_dict: "weight", "bias".' in str(caught.value)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 70))
def test_of_equal_scores_the_first_is_the_highest_as_for_argmax(seed, classes):
    random = np.random.default_rng(seed)
    scores = torch.from_numpy(random.integers(0, 4, (40, classes)).astype(np.float32))
    labels = torch.from_numpy(random.integers(0, classes, 40))
    assert top_k_accuracy(scores, labels, 1) == pytest.approx((scores.argmax(1) == labels).double().mean().item())
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :3]
    assert top_k_accuracy(scores, labels, 3) == pytest.approx((best == labels[:, None]).any(1).double().mean().item())


def test_a_score_that_is_no_number_counts_as_wrong():
    assert top_k_accuracy(torch.full((2, 3), torch.nan), torch.tensor([0, 2]), 3) == 0.0
