"""Images without labels: a student learns from the teacher alone; whatever would need their labels is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import picture, small_config, write_folders
from test_foreign_shards import img2dataset, write_tar
from test_loader import NO_BOX, random_batch
from test_prepare import index_of, refusal, samples, shards_config
from test_training import CHANGES, CPU

from pipeline.batches.batch import targets
from pipeline.cli import dry_run
from pipeline.cli.main import main
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import dump, merge, resolve
from pipeline.config.paths import student_folder, teacher_logits_folder
from pipeline.config.schema import Config, Student
from pipeline.models.build import build_teacher
from pipeline.models.weights import read_saved_weights, save_weights
from pipeline.report import contact_sheet
from pipeline.report.examples import training_examples
from pipeline.report.facts import _describe_store
from pipeline.shards.advice import sortedness
from pipeline.shards.index import Index
from pipeline.shards.index_file import UNLABELLED
from pipeline.shards.indexing import index_shard, write_index, write_shard
from pipeline.shards.samples import Labels
from pipeline.store import manifest
from pipeline.training.losses import base_loss, distillation_losses
from pipeline.training.run import TeacherOutput
from stages import prepare, teacher, teacher_logits, train_student

PLAIN, TOKEN = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
ALONE = {"distillation": "hard", "alpha": 1.0, "model": PLAIN}
NEEDED = {
    "data": {"unlabelled": True}, "teacher": {"weights": "t.safetensors"}, "students": ["alone"],
    "variants": {"alone": ALONE},
}  # fmt: skip


def config_of(root: Path, *changes: dict) -> Config:
    """A configuration that images without labels can be trained on, with `changes`."""
    values = NEEDED
    for change in changes:
        values = merge(values, change)
    return small_config(root, **values)


def labels_of(config: Config, split: str = "train") -> dict[str, int]:
    return {key: label for key, _, label in samples(index_of(config, split))}


# class folders


@pytest.fixture
def folders(in_tmp) -> Path:
    write_folders(in_tmp / "train", {"cat": 3, "unlabelled": 4, "zebra": 2})
    write_folders(in_tmp / "val", {"cat": 1, "zebra": 1}, seed=1)
    return in_tmp


def test_folder_named_unlabelled_is_no_class(folders, capsys):
    config = config_of(folders)
    prepare.run(config)
    index = index_of(config)
    assert index.classes == ["cat", "zebra"] and (len(index), index.unlabelled) == (9, 4)
    expected = {"cat": 0, "unlabelled": UNLABELLED, "zebra": 1}
    assert all(label == expected[key.partition("/")[0]] for key, label in labels_of(config).items())
    assert index_of(config, "val").unlabelled == 0
    assert "train: 4 of 9 images have no label" in capsys.readouterr().out
    prepare.run(config)  # what was indexed is valid


def test_it_is_a_class_unless_the_configuration_says_otherwise(folders):
    write_folders(folders / "val" / "..", {"val/unlabelled": 1})
    config = config_of(folders, {"data": {"unlabelled": False}})
    prepare.run(config)
    assert index_of(config).classes == ["cat", "unlabelled", "zebra"] and index_of(config).unlabelled == 0


def test_no_unlabelled_image_is_chosen_for_validation(folders):
    config = config_of(folders, {"data": {"val": "", "val_fraction": 0.5}})
    prepare.run(config)
    assert sorted(labels_of(config, "val").values()) == [0, 0, 1]
    assert sorted(labels_of(config).values()) == [-1, -1, -1, -1, 0, 1]


def test_classes_are_those_of_validation_where_no_training_image_has_a_label(in_tmp):
    write_folders(in_tmp / "train", {"unlabelled": 4})
    write_folders(in_tmp / "val", {"cat": 1, "zebra": 1}, seed=1)
    config = config_of(in_tmp)
    prepare.run(config)
    assert index_of(config).classes == ["cat", "zebra"] and index_of(config).unlabelled == 4


def test_missing_folder_of_unlabelled_images_is_named(in_tmp):
    write_folders(in_tmp / "train", {"cat": 3})
    write_folders(in_tmp / "val", {"cat": 1})
    with pytest.raises(UsageError, match="a folder unlabelled of images without labels"):
        prepare.run(config_of(in_tmp), dry_run=True)


def test_images_without_labels_are_refused_for_validation(folders):
    write_folders(folders / "val" / "..", {"val/unlabelled": 1})
    assert "not in training: ['unlabelled']" in refusal(config_of(folders))


# shards


def mixed_shards(root: Path) -> Config:
    """Shards with samples of a label, of -1 and without a label."""
    one, two = ("a.png", picture(1)), ("b.png", picture(2))
    write_tar(root / "in" / "train-0000.tar", [one, ("a.cls", b"1"), two, ("b.cls", b"-1"), ("c.png", picture(3))])
    write_tar(root / "in" / "val-0000.tar", [("v.png", picture(4)), ("v.cls", b"0")])
    return shards_config(root, train="train-0000.tar")


def unlabelled(config: Config, **data) -> Config:
    """The same configuration with `data.unlabelled`, and what it needs."""
    return resolve(merge(merge(config.model_dump(mode="json", by_alias=True), NEEDED), {"data": data}), (), "test")


def test_samples_of_shards_without_a_label_or_with_minus_one_are_unlabelled(in_tmp):
    config = unlabelled(mixed_shards(in_tmp))
    prepare.run(config)
    assert labels_of(config) == {"a": 1, "b": UNLABELLED, "c": UNLABELLED}
    assert index_of(config).classes == ["0", "1"]


def test_they_are_refused_unless_the_configuration_allows_them(in_tmp):
    message = refusal(mixed_shards(in_tmp))
    assert "sample 'b'" in message and "set data.unlabelled" in message


def test_validation_sample_without_a_label_is_refused(in_tmp):
    config = unlabelled(mixed_shards(in_tmp))
    write_tar(in_tmp / "in" / "val-0000.tar", [("v.png", picture(4))])
    assert "val-0000.tar: sample 'v'" in refusal(config)


@pytest.mark.parametrize("label", [None, -1, float("nan")], ids=str)
def test_field_of_json_that_holds_no_label_is_none(in_tmp, label):
    img2dataset(in_tmp / "in" / "train-0000.tar", [0, label, 1])
    img2dataset(in_tmp / "in" / "val-0000.tar", [0], 1)
    config = unlabelled(shards_config(in_tmp, train="train-0000.tar", label_key="label"))
    prepare.run(config)
    assert list(labels_of(config).values()) == [0, UNLABELLED, 1]


def test_label_that_is_no_number_is_refused_all_the_same(in_tmp):
    write_tar(in_tmp / "a.tar", [("a.png", picture(1)), ("a.cls", b"cat")])
    with pytest.raises(PipelineError, match="sample 'a'") as caught:
        index_shard(str(in_tmp), "a.tar", labels=Labels(optional=True))
    assert "data.unlabelled" not in str(caught.value)


def test_number_of_classes_has_to_be_known_where_no_training_sample_has_a_label(in_tmp):
    img2dataset(in_tmp / "in" / "train-0000.tar", [None, None])
    img2dataset(in_tmp / "in" / "val-0000.tar", [0], 1)
    config = unlabelled(shards_config(in_tmp, train="train-0000.tar", label_key="label"))
    assert "set data.class_names" in refusal(config, UsageError)
    Path("names").write_text("cat\ndog\n")
    config = unlabelled(config, class_names="names")
    prepare.run(config)
    assert index_of(config).classes == ["cat", "dog"] and index_of(config).unlabelled == 2


def test_index_without_unlabelled_samples_is_what_it_was(in_tmp):
    config = mixed_shards(in_tmp)
    write_tar(in_tmp / "in" / "train-0000.tar", [("a.png", picture(1)), ("a.cls", b"1")])
    prepare.run(config)
    before = index_of(config)
    prepare.run(unlabelled(config))
    assert index_of(config).fingerprint == before.fingerprint
    assert "unlabelled" not in json.loads(Path(before.path).read_text())


def test_table_with_a_missing_label_that_the_index_does_not_count_is_refused(in_tmp):
    write_shard(in_tmp / "s.tar", [("a", "png", picture(1), 0)])
    shard = index_shard(str(in_tmp), "s.tar")
    write_index(in_tmp / "index.json", str(in_tmp), ["0"], [shard])
    index = Index(in_tmp / "index.json")
    rows = index.rows(0).copy()
    rows["label"] = UNLABELLED
    assert "label -1" in index._invalid_row(0, rows)


# training


def test_target_of_an_unlabelled_image_has_only_its_partners_share():
    batch = random_batch([(0.75, NO_BOX)], slots=4)
    batch.labels[0] = torch.tensor([1, UNLABELLED, 2, UNLABELLED])  # partners: 3, 2, 1, 0
    found = targets(batch, 5, 0.0)
    expected = torch.zeros(4, 5)
    expected[0, 1], expected[1, 2], expected[2, 2], expected[3, 1] = 0.75, 0.25, 0.75, 0.25
    assert torch.equal(found, expected)
    batch.labels[0] = UNLABELLED
    assert torch.equal(targets(batch, 5, 0.1), torch.zeros(4, 5))


def test_unlabelled_image_adds_nothing_to_the_loss_of_labels():
    batch = random_batch([(1.0, NO_BOX)], slots=4)
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    before = base_loss(logits[:2], targets(batch, 5, 0.1)[:2], torch.ones(2))
    batch.labels[0, 2:] = UNLABELLED
    assert torch.allclose(base_loss(logits, targets(batch, 5, 0.1), torch.ones(4)), before)


@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_gradient_of_distillation_alone_is_that_of_labelled_images(distillation):
    generator, batch = torch.Generator().manual_seed(0), random_batch([(0.75, NO_BOX)], slots=4)
    start, logits = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    student = Student(**(ALONE | {"distillation": distillation}))
    gradients = []
    for labels in (batch.labels.clone(), torch.full((1, 4), UNLABELLED)):
        batch.labels, own = labels, start.clone().requires_grad_()
        output = TeacherOutput(logits.argmax(1), logits)
        losses = distillation_losses(own, own, targets(batch, 5, 0.1), torch.ones(4), output, student)
        losses[0].backward()
        gradients.append(own.grad)
        assert torch.isfinite(losses).all()
    assert torch.equal(gradients[0], gradients[1]) and gradients[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"variants": {"alone": {"alpha": 0.5}}}, "student alone has distillation hard, alpha 0.5"),
        ({"variants": {"alone": {"distillation": "none"}}}, "student alone has distillation none"),
        ({"finetune": {"from": "alone"}, "variants": {"alone": {"alpha": 0.9}}}, "alpha 0.9"),
        ({"teacher": {"weights": None}}, "teacher.weights must be set with data.unlabelled"),
        ({"teacher_finetune": {"epochs": 1, "batch_size": 64}}, "teacher_finetune.epochs must be 0 with data.unlabelled"),
        ({"data": {"source": "digits"}}, "data.unlabelled must be false unless data.source is folder or shards"),
    ],
)
def test_configuration_that_needs_labels_is_refused(in_tmp, changes, expected):
    with pytest.raises(UsageError, match=expected):
        config_of(in_tmp, changes)


def trainable(root: Path, labels: list[int], name: str, **data) -> Config:
    """A prepared data set of shards with these labels, a pretrained teacher, and a student that learns from it alone."""
    (root / name / "in").mkdir(parents=True)
    lot = [(f"{i}", "png", picture(i), label) for i, label in enumerate(labels)]
    write_shard(root / name / "in" / "train-0000.tar", lot)
    write_shard(root / name / "in" / "val-0000.tar", [(f"v{i}", "png", picture(90 + i), i) for i in range(3)])
    Path("names").write_text("cat\ndog\neel\n")
    where = {split: f"{root}/{name}/in/{split}-0000.tar" for split in ("train", "val")}
    own = {"name": name, "data": {"source": "shards", "class_names": "names", **where, **data}, "finetune": {"from": []}}
    student = CHANGES["student"] | {"epochs": 2, "eval_epochs": 2}
    changed = merge(CHANGES | {"student": student, "variants": {}}, own)
    config = config_of(root, changed | {"students": ["alone"], "variants": {"alone": ALONE}})
    model = build_teacher(config.teacher, 3)
    save_weights(Path("t.safetensors"), model.model)
    prepare.run(config)
    return config


def trained(config: Config) -> dict[str, torch.Tensor]:
    """The weights of the student."""
    teacher.run(config, CPU)
    teacher_logits.run(config, CPU)
    train_student.run(config, CPU, "alone")
    return read_saved_weights(student_folder(config, "alone") / "weights.safetensors")[0]


def agreement(config: Config) -> float | None:
    return json.loads((teacher_logits_folder(config, "train-student") / "summary.json").read_text())["agreement_with_labels"]


LABELS = [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.slow
def test_student_of_images_without_labels_is_the_one_that_ignores_labels(in_tmp, capsys):
    with_labels = trainable(in_tmp, LABELS, "with", unlabelled=False)
    expected = trained(with_labels)
    without = trainable(in_tmp, [UNLABELLED] * 8, "without")
    found = trained(without)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert agreement(with_labels) is not None and agreement(without) is None
    assert "the teacher agrees" not in capsys.readouterr().out.rpartition("store complete")[2]


def test_teacher_agrees_on_the_labelled_images_only(in_tmp):
    config = unlabelled(mixed_shards(in_tmp))
    prepare.run(config)  # the labels are 1, -1, -1
    predictions = {0: np.array([[1, 0, 1], [0, 0, 1]]), 1: np.array([[1, 1, 1], [1, 1, 0]])}
    store = SimpleNamespace(
        index=index_of(config),
        units=lambda views: [SimpleNamespace(shard=0, block=block) for block in range(views // 2)],
        read_unit=lambda unit: predictions[unit.block],
    )
    assert manifest._agreement(cast(Any, store), 4) == 3 / 4


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ({"model": TOKEN}, "without a distillation token"),
        ({"alpha": 0.5}, "distillation hard, alpha 0.5"),
        ({"distillation": "none"}, "distillation none"),
    ],
)
def test_student_that_needs_labels_is_refused_and_in_the_dry_run_too(in_tmp, variant, expected):
    config = trainable(in_tmp, [UNLABELLED] * 4 + LABELS[:4], "without")
    student = Student(**(config.student_named("alone").model_dump() | variant))
    with pytest.raises(UsageError, match=expected):
        dry_run.check_student(config, student, 3, 16, student)
    with pytest.raises(UsageError, match="4 training images have no label") as caught:
        train_student.run(config, CPU, "alone", student, dry_run=True)
    assert expected in str(caught.value)


def test_teacher_that_would_be_trained_on_them_is_refused_and_in_the_dry_run_too(in_tmp):
    config = trainable(in_tmp, [UNLABELLED] * 4 + LABELS[:4], "without")
    save_weights(Path("t.safetensors"), build_teacher(config.teacher, 7).model)  # of other classes
    with pytest.raises(UsageError, match="trained with a new classifier: 4 training images have no label"):
        dry_run.check_teacher(config, index_of(config).classes)
    with pytest.raises(UsageError, match="a teacher, which learns from labels"):
        teacher.run(config, CPU)


def test_dry_run_of_the_command_line_refuses_a_token_before_anything_is_prepared(folders):
    config = config_of(folders, {"variants": {"alone": ALONE | {"model": TOKEN}}, "recipe": {"size": 224}})
    Path("params.yaml").write_text(dump(config))
    result = CliRunner().invoke(main, ["train-student", "--student", "alone", "--dry-run"])
    assert result.exit_code == 2 and "without a distillation token" in result.output


# pictures and reports


def test_pictures_name_images_without_a_label(folders):
    config = config_of(folders)
    prepare.run(config)
    index = index_of(config)
    labels = index.rows(0)["label"]
    position = int(np.flatnonzero(labels == UNLABELLED)[0])
    section = contact_sheet.sample_section(index, config.recipe, 0, position, range(1))
    assert section.rows[0][0].caption.startswith("unlabelled, ")
    named = contact_sheet.group_section(index, config.recipe, 0, position, 0, 4)
    assert "unlabelled" in named.rows[0][0].caption
    shown = training_examples(config, index)
    assert {example.label for example in shown} <= {"unlabelled", "cat", "zebra"}


def test_order_of_unlabelled_images_counts_as_that_of_a_class(in_tmp):
    for number, label in enumerate((UNLABELLED, 0)):
        write_shard(in_tmp / f"{number}.tar", [(f"{number}/{i}", "png", picture(i), label) for i in range(5)])
    shards = [index_shard(str(in_tmp), f"{number}.tar", labels=Labels(optional=True)) for number in range(2)]
    write_index(in_tmp / "index.json", str(in_tmp), ["0"], shards)
    assert sortedness(Index(in_tmp / "index.json")) == 1


def test_report_says_that_agreement_is_unknown():
    summary = {"rows": 1, "views": 1, "bytes": 1, "kind": "argmax", "agreement_with_labels": None}
    store = type("Store", (), {"attributes": {"precision": "float32"}, "fingerprint": "f"})()
    assert _describe_store(store, summary)["agreement"] == "unknown: no image has a label"
