"""Further evaluation sets: ImageNet-ReaL's labels, and class folders such as ImageNet-V2's."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_data_set, small_config, write_folders
from test_report import mini  # noqa: F401
from timm.data import ImageNetInfo, RealLabelsImagenet

from pipeline.cli.matching import lacks_sets, sets_have_changed
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import resolve
from pipeline.config.paths import evaluation_folder, evaluation_sets_path, index_path
from pipeline.config.schema import Config, result_fields
from pipeline.report.further_sets import (
    BUNDLED,
    RealLabels,
    folder_labels,
    ilsvrc_numbers,
    number_labels,
    open_further_sets,
    open_real_labels,
    read_real_labels,
)
from pipeline.shards.index import Index
from pipeline.training.identity import configured_runs
from stages import evaluate, prepare

CPU = torch.device("cpu")
WORDNET = ImageNetInfo("imagenet-1k").label_names()
NUMBERS = [str(number) for number in range(1000)]
AS_TEXT = sorted(NUMBERS)  # as torchvision orders folders 0 to 999


# class folders


@pytest.mark.parametrize("classes", [WORDNET, NUMBERS], ids=["wordnet", "numbers"])
def test_folders_named_by_number_are_imagenet_s_classes_whatever_their_order_as_text(classes):
    assert folder_labels("v2", AS_TEXT, classes) == [int(name) for name in AS_TEXT]
    assert folder_labels("v2", [f"{number:04d}" for number in range(1000)], classes) == list(range(1000))


def test_numbers_follow_the_names_of_an_index_in_another_order():
    turned = WORDNET[::-1]
    assert folder_labels("v2", AS_TEXT, turned) == [999 - int(name) for name in AS_TEXT]
    # an index of folders 0 to 999, which prepare numbers in the order of their names
    assert folder_labels("v2", AS_TEXT, AS_TEXT) == list(range(1000))
    assert folder_labels("v2", NUMBERS, AS_TEXT) == [AS_TEXT.index(name) for name in NUMBERS]


def test_wordnet_s_names_are_the_classes_of_an_index_of_numbers():
    assert folder_labels("sketch", WORDNET[::-1], NUMBERS) == list(range(999, -1, -1))


def test_folders_with_the_names_of_the_index_need_no_imagenet():
    assert folder_labels("other", ["cat", "dog"], ["dog", "cat"]) == [1, 0]


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["0", "1"], ["cat", "dog"]),  # nothing says which of them is 0
        (NUMBERS, [f"class {number}" for number in range(1000)]),
        (NUMBERS[:-1], WORDNET),
        ([*NUMBERS, "1000"], WORDNET),
        ([*NUMBERS[:-1], "00"], WORDNET),  # 0 twice
        (WORDNET[:200], WORDNET),
        (["cat"], ["cat", "dog"]),
        (["cat", "dog", "eel"], ["cat", "dog"]),
    ],
    ids=["names", "descriptions", "too few", "too many", "twice", "subset", "no dog", "an eel"],
)
def test_folders_that_are_not_the_classes_of_the_index_are_refused(folders, classes):
    with pytest.raises(UsageError, match="(?s)class folders.*one per class of the index.*rename the folders"):
        folder_labels("v2", sorted(folders), classes)


def test_number_labels_are_known_only_from_names():
    assert number_labels(["1", "0"]) == {0: 1, 1: 0}
    assert number_labels(["cat", "dog"]) is None


# ReaL


def validation(root: Path, names: list[str], **changes) -> Index:
    """A prepared validation set of images of classes 0, 1 and 2, which are called `names` in this order."""
    write_folders(root / "train", {name: 2 for name in "012"})
    write_folders(root / "val", {name: 1 for name in "012"}, seed=1)
    for folder, name in zip("012", names, strict=True):
        (image,) = (root / "val" / folder).iterdir()
        image.rename(image.with_name(name + image.suffix))
    prepare.run(small_config(root, **changes))
    return Index(index_path(small_config(root), "val").absolute())


FILES = [f"ILSVRC2012_val_{number:08d}" for number in (2, 4, 1)]


def real_json(labels: list, name: str = "real.json") -> str:
    Path(name).write_text(json.dumps(labels))
    return name


def labels_of(val: Index) -> dict[int, int]:
    """The label of each validation image by its ILSVRC number."""
    return dict(zip(ilsvrc_numbers(val, "", 4), val.labels().tolist(), strict=True))


def by_number(real: RealLabels, val: Index) -> dict[int, set[int]]:
    """The acceptable labels of each validation image that has any, by its ILSVRC number."""
    numbers = ilsvrc_numbers(val, "", 4)
    return {numbers[row]: {*each} for row, each in zip(real.rows.tolist(), real.labels, strict=True)}


def test_labels_are_found_by_the_number_in_the_key_and_images_without_any_are_left_out(in_tmp):
    val = validation(in_tmp, FILES)
    assert labels_of(val) == {2: 0, 4: 1, 1: 2}
    real = open_real_labels(real_json([[2, 0], [0], [1], []]), val)
    assert by_number(real, val) == {1: {0, 2}, 2: {0}} and real.agreement == 1.0
    own = {number: row for row, number in enumerate(ilsvrc_numbers(val, "", 4))}
    scores = torch.zeros(3, 3)
    scores[own[1], 0] = scores[own[2], 1] = scores[own[4], 2] = 1.0  # right among [2, 0]; wrong; not counted
    assert real.top1(scores) == 0.5
    scores[own[2], 0] = 2.0
    assert real.top1(scores) == 1.0


def test_the_accuracy_is_that_of_timm_s_evaluator(in_tmp):
    val = validation(in_tmp, [f"ILSVRC2012_val_{number:08d}" for number in (3, 1, 2)])
    path = real_json([[1, 0], [], [0]])
    scores = torch.randn(20, 3, 3, generator=torch.Generator().manual_seed(0))
    files = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in ilsvrc_numbers(val, path, 3)]
    real, found = open_real_labels(path, val), set()
    for each in scores:
        theirs = RealLabelsImagenet(files, path, topk=(1,))
        theirs.add_result(each)
        found.add(real.top1(each))
        assert 100 * real.top1(each) == theirs.get_accuracy(1)
    assert found == {0.0, 0.5, 1.0}


def test_labels_follow_the_names_of_an_index_in_another_order(in_tmp):
    val = validation(in_tmp, FILES)
    val.classes = ["1", "2", "0"]  # so class number 0 has label 2
    real = open_real_labels(real_json([[0], [1], [], [2]]), val)
    assert by_number(real, val) == {1: {2}, 2: {0}, 4: {1}} and real.agreement == 1.0


def test_labels_in_another_order_than_the_images_or_classes_are_refused(in_tmp):
    val = validation(in_tmp, FILES)
    with pytest.raises(PipelineError, match="(?s)0.0% of 3: images or classes are in another order"):
        open_real_labels(real_json([[1], [2], [], [0]]), val)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a", "b", "c"], "no such number"),
        ([*FILES[:2], "ILSVRC2012_val_00000005"], "no such number"),
        ([*FILES[:2], "ILSVRC2012_val_00000000"], "no such number"),
        ([*FILES[:2], "ILSVRC2012_val_000000012"], "no such number"),
        ([*FILES[:2], "ILSVRC2012_val_00000002"], "the same number twice"),
    ],
)
def test_a_key_without_a_number_of_its_own_is_refused(in_tmp, names, found):
    val = validation(in_tmp, names)
    with pytest.raises(PipelineError, match=f"(?s)validation sample .*ILSVRC2012_val_00000001.*{found}"):
        open_real_labels(real_json([[2], [0], [], [1]]), val)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[["a"]]', "[[true]]", "[[0.5]]"])
def test_a_file_of_another_form_is_refused(in_tmp, content):
    Path("real.json").write_text(content)
    with pytest.raises(UsageError, match="a JSON list with a list of class numbers per image"):
        read_real_labels("real.json")


def test_labels_of_classes_that_the_index_lacks_and_a_missing_file_are_refused(in_tmp):
    val = validation(in_tmp, FILES)
    with pytest.raises(PipelineError, match=r"(?s)labels from 0 to 2.*\[0, 3\] of ILSVRC2012_val_00000002"):
        open_real_labels(real_json([[2], [0, 3], [], [1]]), val)
    with pytest.raises(UsageError, match="(?s)No such file.*set it to timm"):
        open_real_labels("none.json", val)


def test_timm_s_copy_has_the_labels_of_the_paper():
    lists = read_real_labels(BUNDLED)
    assert len(lists) == 50_000 and sum(map(bool, lists)) == 46_837
    assert {each for labels in lists for each in labels} == set(range(1000))


# evaluation


@pytest.fixture
def evaluated(mini):  # noqa: F811
    """The mini experiment, whose validation images are in the folder `val`."""
    yield mini
    config, _ = mini
    shutil.rmtree(evaluation_folder(config), ignore_errors=True)


def with_sets(config: Config, **values) -> Config:
    raw = config.model_dump(mode="json", by_alias=True)
    return resolve(raw | {"evaluate": raw["evaluate"] | values}, (), "test")


def test_the_validation_images_as_a_folder_have_the_accuracy_of_validation(evaluated):
    config, device = evaluated
    config = with_sets(config, sets={"again": "val"})
    evaluate.run(config, device)
    metrics = json.loads((evaluation_folder(config) / "metrics.json").read_text())
    for model in metrics.values():
        for found in model.values():
            if isinstance(found, dict):
                assert found["again_top1"] == found["top1"]
    text, page = ((evaluation_folder(config) / name).read_text() for name in ("table.txt", "report.html"))
    assert "again %" in text.splitlines()[0] and "again %" in page and "Top-1 on additional sets: again" in page
    header = (evaluation_folder(config) / "accuracy.csv").read_text().splitlines()[0]
    assert header == "model,classifier,top1,top1_low,top1_high,top5,again_top1"
    assert not lacks_sets(metrics, config)
    assert lacks_sets(metrics, with_sets(config, sets={})) and lacks_sets(
        metrics, with_sets(config, sets={"v2": "val"})
    )


def test_an_image_that_is_added_to_a_set_later_is_noticed(evaluated, tmp_path):
    config, device = evaluated
    shutil.copytree("val", tmp_path / "v2")
    config = with_sets(config, sets={"v2": str(tmp_path / "v2")})
    evaluate.run(config, device)
    metrics = json.loads((evaluation_folder(config) / "metrics.json").read_text())
    assert not sets_have_changed(metrics, config)
    shutil.copy(next(Path("train/cat").iterdir()), tmp_path / "v2/cat/another.png")
    assert sets_have_changed(metrics, config) and not lacks_sets(metrics, config)


def test_training_images_in_a_set_are_warned_of(evaluated, tmp_path, capsys):
    config, device = evaluated
    shutil.copytree("val", tmp_path / "v2")
    shutil.copy(next(Path("train/cat").iterdir()), tmp_path / "v2/cat/known.png")
    evaluate.run(with_sets(config, sets={"again": "val", "v2": str(tmp_path / "v2")}), device)
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warned == ["warning: evaluate.sets.v2: 1 of its 11 images are training images too (cat/known.png)"]


def test_pixels_of_a_folder_are_those_of_shards_in_the_order_of_its_classes(evaluated):
    config, _ = evaluated
    val = Index(index_path(config, "val"))
    found = open_further_sets(with_sets(config, sets={"v": "val"}), val).folders["v"]
    images, labels = found.images, found.labels
    keys = {key: (shard, n) for shard in range(len(val.names)) for n, key in enumerate(val.rows(shard)["key"])}
    for row, name in enumerate(images.names):
        shard, position = keys[name.removesuffix(".png").encode()]
        np.testing.assert_array_equal(images.image(*images.locate(row)), val.image(shard, position))
        assert labels[row] == val.rows(shard)["label"][position]


def test_a_damaged_image_stops_the_evaluation_and_is_named(evaluated, tmp_path):
    config, device = evaluated
    shutil.copytree("val", tmp_path / "v2")
    (tmp_path / "v2/dog/3.png").write_bytes(b"no image")
    with pytest.raises(PipelineError, match="dog/3.png: not a readable image"):
        evaluate.run(with_sets(config, sets={"v2": str(tmp_path / "v2")}), device)


def test_a_wrong_set_is_refused_by_a_dry_run(evaluated, tmp_path, capsys):
    config, device = evaluated
    (tmp_path / "v2/cat").mkdir(parents=True)
    with pytest.raises(UsageError, match="no such folder"):
        evaluate.run(with_sets(config, sets={"v2": "nowhere"}), device, dry_run=True)
    with pytest.raises(PipelineError, match="without images"):
        evaluate.run(with_sets(config, sets={"v2": str(tmp_path / "v2")}), device, dry_run=True)
    with pytest.raises(PipelineError, match="no such number"):
        evaluate.run(with_sets(config, real_labels=BUNDLED), device, dry_run=True)
    evaluate.run(with_sets(config, sets={"v2": "val"}), device, dry_run=True)
    assert "v2: 10 images in val" in capsys.readouterr().out


# configuration


@pytest.mark.parametrize("name", ["real", "V2", "v2 ", "", "a/b"])
def test_a_name_that_metrics_cannot_have_is_refused(name):
    with pytest.raises(UsageError, match="evaluate.sets"):
        resolve({"evaluate": {"sets": {name: "folder"}}}, (), "test")


def test_further_sets_are_part_of_no_identity():
    plain = Config()
    other = with_sets(plain, real_labels=BUNDLED, sets={"v2": "folder"})
    assert configured_runs(other, "index") == configured_runs(plain, "index")
    sections = ("recipe", "teacher", "teacher_logits", "student", "finetune")
    assert all(result_fields(getattr(other, name)) == result_fields(getattr(plain, name)) for name in sections)


def test_prepare_records_what_dvc_would_not_notice(in_tmp):
    config, _ = make_data_set(in_tmp, {"cat": 2, "dog": 2}, {"cat": 1, "dog": 1})
    assert json.loads(evaluation_sets_path(config).read_text()) == {}
    config = with_sets(config, real_labels="real.json", sets={"v2": "val"})
    seen = []

    def recorded() -> None:
        prepare.run(config, quick=True)
        seen.append(evaluation_sets_path(config).read_text())

    recorded()
    real_json([[0]])
    recorded()
    real_json([[1]])
    recorded()
    recorded()
    assert seen[2] == seen[3]
    image = next(Path("val/cat").iterdir())
    os.utime(image, ns=(1, 1))
    recorded()
    shutil.copy(image, image.with_stem("copy"))
    recorded()
    assert len(set(seen)) == 5
