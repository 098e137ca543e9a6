"""`pipeline estimate`: what an experiment costs on this machine, and when a store pays."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_store_commands import call

from pipeline.cli.durations import Hardware, Rates, stage_seconds
from pipeline.cli.estimate import Images, StudentTimes, generate_picture, table_by_kind, table_by_views
from pipeline.common.wording import duration, size_of
from pipeline.config.params import resolve
from pipeline.config.paths import index_path
from pipeline.config.store_spec import store_spec
from pipeline.shards.images import decode
from pipeline.shards.index import Index
from pipeline.store.estimate import describe_break_even, estimate

RATES = Rates(
    decode=0.006, render=0.002, forward={"teacher": 0.1, "hard": 0.01}, step={"teacher": 0.3, "hard": 0.03},
    parameters={"teacher": 10, "hard": 5},
)  # fmt: skip
IMAGES = Images([100, 100], 10, 20, None, [], "")


def config_of(*overrides: str):
    values = {"data": {"train": "a", "val": "b"}, "students": ["hard"], "recipe": {"size": 32}}
    for section in ("teacher", "student", "teacher_logits", "evaluate"):
        values[section] = {"workers": 0}
    return resolve(values, ("student.epochs=60", "teacher_logits.views=60", *overrides), "test")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("pipeline.cli.durations._seconds", lambda *_: 0.01)
    monkeypatch.setattr("pipeline.cli.durations.MEASURE", 0.0)


def test_every_stage_and_both_tables_are_printed_for_the_prepared_images(taught, quick):
    said = call("estimate", "--device", "cpu")
    for text in ("20 images, 3 classes", "20 of the images", "prepare", "teacher-logits", "train-student hard", "disk",
                 "student hard", "with the teacher in the loop", "8 *", "dense *", "argmax"):  # fmt: skip
        assert text in said
    assert "the shards" not in said


def test_numbers_of_images_and_classes_need_no_data(taught, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call("estimate", "--config", "taught/params.yaml", "--device", "cpu", "--images", "1281167", "--classes", "7")
    assert "1,281,167 images, 7 classes" in said and "generated pictures" in said and "not included: the shards" in said


def test_without_an_index_the_number_of_images_is_asked_for(taught, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--images N" in call("estimate", "--config", "taught/params.yaml", "--device", "cpu", code=2)


@pytest.mark.parametrize("class_map", ["imagenet-1k", "{n01440764: 0, n01443537: 1}", "[0, 1]"])
def test_a_class_map_needs_no_names_of_assumed_images(taught, quick, tmp_path, monkeypatch, class_map):
    monkeypatch.chdir(tmp_path)
    changes = "--set", "teacher.weights=regnety_004.tv2_in1k", "--set", f"teacher.class_map={class_map}", "--set", "teacher.kwargs={}"
    said = call("estimate", "--config", "taught/params.yaml", "--device", "cpu", "--images", "900", "--classes", "2", *changes)
    assert "900 images, 2 classes" in said


def test_existing_shards_take_no_further_space(taught, quick):
    places = {split: f"{Index(index_path(taught, split)).location}/*.tar" for split in ("train", "val")}
    shards = [f"--set=data.{split}={place}" for split, place in places.items()]
    for command in ("prepare", "teacher", "estimate"):
        said = call(command, "--set", "data.source=shards", *shards)
    assert "disk" in said and "shards " not in said.partition("disk")[2].partition("\n")[0]


def test_nothing_is_written(taught, quick):
    before = {path: path.stat().st_mtime_ns for path in taught_files()}
    call("estimate", "--device", "cpu")
    assert {path: path.stat().st_mtime_ns for path in taught_files()} == before


def taught_files() -> list[Path]:
    return [path for path in Path().rglob("*") if path.is_file()]


def test_without_distillation_no_store_is_compared(taught, quick):
    said = call("estimate", "--device", "cpu", "--set", "students=[none]", "--set", "finetune.from=[]")
    assert "no store is needed" in said and "teacher-logits" not in said and "pays off" not in said


def test_a_published_store_takes_the_place_of_the_teacher_s_stages(taught, quick):
    said = call("estimate", "--device", "cpu", "--set", "teacher_logits.fetch=elsewhere")
    assert "fetching the published store" in said and "teacher-logits  " not in said


def test_a_store_of_a_view_per_epoch_pays_off_after_about_one_student():
    rows = table_by_views(config_of(), IMAGES, RATES, Hardware(2, False), store_spec(config_of(), "train-student"),
                          student(), 60).splitlines()  # fmt: skip
    views = {row.split()[0]: row for row in rows[2:-1]}
    assert [*views] == ["30", "60"] and "60 *" in views["60"]
    after = {number: float(row.split(" students")[0].split()[-1]) for number, row in views.items()}
    assert 0.5 < after["30"] < after["60"] < 1.1


def student() -> StudentTimes:
    config, machine = config_of(), Hardware(2, False)
    each = (machine.training(config, config.student_named("hard"), RATES, step, 200) for step in (0.13, 0.03))
    return StudentTimes(*each)


def test_a_store_never_pays_where_rendering_is_slower_than_the_teacher():
    config, machine, slow = config_of("student.workers=1"), Hardware(2, True), replace(RATES, render=0.5)
    online, offline = (machine.training(config, config.student_named("hard"), slow, step, 200) for step in (0.13, 0.03))
    assert StudentTimes(online, offline).pays_after(3600) is None
    assert StudentTimes(7200, 3600).pays_after(3600) == 1.0


def test_kinds_have_the_bytes_of_their_estimates():
    table = table_by_kind(config_of("teacher_logits.top_k=3"), IMAGES.samples, IMAGES.classes)
    for kind, size in {"argmax": 2, "topk": 18, "dense8": 20, "dense": 22, "sampled": 10}.items():
        row = next(line for line in table.splitlines() if line.startswith(f"{kind} "))
        spec = store_spec(config_of(f"teacher_logits.kind={kind}", "teacher_logits.top_k=3"), "train-student")
        found = estimate(spec, IMAGES.samples, 10)
        assert found.row_bytes == size and {f"{size}", f"{found.files:,}"} <= set(row.split())
        assert f" {size_of(found.bytes)} " in row


def test_a_store_pays_off_by_the_epochs_of_a_distilled_student():
    config = config_of("variants.hard.epochs=30", "variants.none.distillation=none", "students=[none,hard]")
    assert "pays   after 2.00 students of 30 epochs" in describe_break_even(config, store_spec(config, "train-student"), 10)


def test_a_teacher_that_is_used_as_it_is_is_only_evaluated():
    machine = Hardware(2, False)
    used = replace(RATES, step={"hard": 0.03})
    seconds = stage_seconds(config_of(), used, 200, 20, machine)
    assert seconds["teacher"] == pytest.approx(10 + 20 * (0.1 + 0.006 + 0.002))
    assert stage_seconds(config_of(), RATES, 200, 20, machine)["teacher"] > 10 * seconds["teacher"]


def test_generated_pictures_have_the_bytes_of_a_photograph():
    for seed in range(2):
        data = generate_picture(seed).getvalue()
        assert decode(data).shape == (375, 500, 3) and 30_000 < len(data) < 200_000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (12.2, "12 s"), (300, "5 min"), (7200, "2.0 h"), (400_000, "4.6 d"), (999_999_999, "11,574 d")],
)
def test_durations_have_a_unit_that_suits(seconds, text):
    assert duration(seconds) == text
