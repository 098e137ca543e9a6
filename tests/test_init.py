"""`pipeline init`: what it finds in a folder, what it chooses and why, and what it writes."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import picture, write_folders
from huggingface_hub.errors import EntryNotFoundError

from pipeline.cli.annotated import annotate
from pipeline.cli.choices import Choice, choose, released_student
from pipeline.cli.durations import Hardware, Rates, bytes_written, stage_seconds
from pipeline.cli.find_data import find_data
from pipeline.cli.init import configuration, gather, parse_overrides, scratch_warnings
from pipeline.cli.main import main
from pipeline.cli.photos import Photos, experiment_name, look, warnings
from pipeline.cli.plan import InitFacts, make_plan
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import load_config, parse_yaml, resolve
from pipeline.config.schema import Config, Data
from pipeline.models import hub
from pipeline.models.build import build_student, build_teacher
from pipeline.shards.listing import Listing

ROOT = Path(__file__).parent.parent
TYPICAL = InitFacts(images=2_000, classes=10, short_side=375, majority=0.1)


def facts(**changes) -> InitFacts:
    return InitFacts(**{**vars(TYPICAL), **changes})


def config(found: InitFacts, *overrides: str) -> Config:
    choices = choose(found, parse_overrides(overrides))
    return configuration({"data.train": Choice("train", ""), "data.val": Choice("val", "")} | choices, overrides)


SETS = [
    facts(images=images, classes=classes, short_side=side, gpu=gpu, precision="bfloat16" if gpu else "float32",
          pretrained=side in (8, 128), pretrained_student=side in (8, 3000))
    for images, classes in ((20, 2), (100, 10), (400, 4), (1_649, 17), (2_000, 10), (12_345, 100), (200_000, 5_000))
    for side in (8, 64, 128, 3000)
    for gpu in (False, True)
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("found", SETS, ids=str)
def test_what_is_chosen_is_a_valid_configuration_whose_models_can_be_built(found):
    chosen = config(found)
    teacher = build_teacher(chosen.teacher, found.classes)
    assert sum(parameter.numel() for parameter in teacher.parameters()) > 1e6
    for name in chosen.students:
        build_student(chosen.student_named(name), chosen.recipe, found.classes, chosen.recipe.size)
    assert chosen.teacher_logits.views == chosen.student.epochs
    assert chosen.student.warmup_epochs < chosen.student.epochs


@pytest.mark.parametrize("found", SETS[:: len(SETS) // 3], ids=str)
def test_the_models_of_some_choices_can_be_built(found):
    chosen = config(found)
    build_teacher(chosen.teacher, found.classes)
    for name in chosen.students:
        build_student(chosen.student_named(name), chosen.recipe, found.classes, chosen.recipe.size)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({}, "recipe.size", 96),
        ({"gpu": True}, "recipe.size", 128),
        ({"short_side": 70}, "recipe.size", 64),
        ({"short_side": 28}, "recipe.size", 32),
        ({"short_side": 70}, "student.kwargs", {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 2}),
        ({"gpu": True}, "student.kwargs", {"patch_size": 8}),
        ({"short_side": 32}, "teacher.kwargs", {"output_stride": 8}),
        ({}, "student.epochs", 15),
        ({"images": 100}, "student.epochs", 90),
        ({"images": 10_000_000}, "student.epochs", 15),
        ({"gpu": True, "images": 10_000}, "student.epochs", 300),
        ({}, "teacher.batch_size", 64),
        ({"gpu": True}, "teacher.batch_size", 128),
        ({"gpu": True, "images": 50_000}, "teacher.batch_size", 256),
        ({}, "teacher.lr", 0.008),
        ({"gpu": True, "precision": "bfloat16"}, "student.precision", "bfloat16"),
        ({"gpu": True, "precision": "float16"}, "teacher_logits.precision", "float16"),
        ({"gpu": True}, "student.precision", "float32"),
        ({}, "teacher_logits.kind", "dense"),
        ({"images": 100_000, "classes": 1_000}, "teacher_logits.kind", "argmax"),
        ({"classes": 2, "majority": 0.5}, "teacher.min_top1", 0.55),
        ({"majority": 0.9}, "teacher.min_top1", 0.91),
        ({"gpu": True, "majority": 0.9}, "teacher.min_top1", 0.92),
        ({"pretrained": True}, "teacher.weights", "regnety_008_tv.tv2_in1k"),
        ({"pretrained": True, "gpu": True}, "teacher.weights", "regnety_160.deit_in1k"),
        ({"pretrained": True}, "teacher.model", "regnety_008_tv"),
        ({"pretrained": True}, "teacher.epochs", 9),
        ({"pretrained": True}, "teacher.head_epochs", 1),
        ({"pretrained": True, "images": 1_000_000}, "teacher.epochs", 4),
        ({"pretrained": True, "classes": 2, "majority": 0.5}, "teacher.min_top1", 0.7),
        ({}, "student.workers", 0),
        ({"images": 100}, "teacher.batch_size", 16),
        ({"images": 300}, "teacher.batch_size", 32),
        ({"images": 100}, "recipe.group_size", 8),
        ({"images": 100, "majority": 0.1}, "teacher.min_top1", 0.19),
        ({"images": 200, "classes": 100, "majority": 0.01}, "teacher.min_top1", 0.02),
        ({"images": 60, "classes": 2, "majority": 0.5}, "teacher.min_top1", 0.55),
        ({"images": 60, "classes": 3, "majority": 0.33}, "teacher.min_top1", 0.4),
        ({"images": 100, "pretrained": True}, "teacher.min_top1", 0.46),
        ({"pretrained_student": True}, "student.weights", "deit_tiny_patch16_224.fb_in1k"),
        ({"pretrained_student": True, "gpu": True}, "student.weights", "deit_small_patch16_224.fb_in1k"),
        ({"pretrained_student": True, "gpu": True}, "student.model", "deit_small_distilled_patch16_224"),
        ({"pretrained_student": True}, "student.epochs", 12),
        ({"pretrained_student": True}, "teacher_logits.views", 12),
        ({"pretrained_student": True}, "student.lr", 0.0008),
        ({"pretrained_student": True}, "recipe.size", 128),
        ({"pretrained_student": True, "gpu": True}, "recipe.size", 224),
        ({"images": 2_000}, "data.max_bad", 20),
        ({"images": 20}, "data.max_bad", 1),
    ],
)
def test_choices(changes, key, value):
    choice = choose(facts(**changes))[key]
    assert choice.value == value and choice.reason


@pytest.mark.parametrize("found", SETS, ids=str)
def test_a_training_has_enough_steps(found):
    chosen = config(found)
    for section, pretrained in ((chosen.teacher, found.pretrained), (chosen.student, found.pretrained_student)):
        groups = -(-found.images // chosen.recipe.group_size)
        steps = section.epochs * max(1, round(groups / (section.batch_size // chosen.recipe.group_size)))
        assert steps >= (250 if pretrained else 400)


@pytest.mark.parametrize("overrides", [
    ("recipe.size=32",), ("recipe.size=100",), ("recipe.size=224",), ("recipe.size=28",), ("recipe.size=384",),
    ("student.epochs=300",), ("student.epochs=1", "teacher.epochs=1"), ("student.epochs=100",), ("student.epochs=31",),
    ("student.batch_size=32",), ("teacher.batch_size=50",), ("student.batch_size=48", "teacher.batch_size=64"),
    ("recipe.block=15",), ("teacher_logits.views=10", "recipe.repeats=1"), ("recipe.repeats=4",),
    ("teacher_logits.views=9",), ("recipe.group_size=24",), ("student.weights=null", "teacher.weights=null"),
    ("recipe={size: 48}", "student={epochs: 20}"),
], ids=" ".join)  # fmt: skip
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("images", [100, 2_000])
def test_choices_suit_what_is_given(overrides, gpu, images):
    chosen = config(facts(images=images, gpu=gpu, pretrained="teacher.weights=null" in overrides), *overrides)
    size, patch = chosen.recipe.size, chosen.student.kwargs["patch_size"]
    assert size % patch == 0 and 4 <= size // patch <= 24
    assert chosen.teacher_logits.views <= 1.2 * chosen.student.epochs + 3
    assert chosen.teacher_logits.views >= chosen.student.epochs or "views" in overrides[0]
    for section in (chosen.teacher, chosen.student):
        assert section.batch_size >= 2 * chosen.recipe.group_size or chosen.recipe.group_size == 24
        assert section.warmup_epochs < section.epochs


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (("recipe.size=32",), "student.kwargs", "4 x 4 patches of"),
        (("recipe.size=100",), "student.kwargs", "10 x 10 patches of"),
        (("recipe.size=48", "student.kwargs.patch_size=4"), "student.kwargs", "12 x 12 patches of"),
        (("recipe.size=32",), "teacher.kwargs", "4 x 4"),
        (("student.epochs=300",), "student.warmup_epochs", "5 at most"),
        (("student.epochs=100",), "teacher_logits.views", "about one view per epoch"),
        (("student.epochs=90",), "teacher_logits.views", "one view per epoch"),
        (("student.batch_size=20",), "student.lr", "0.001 at this batch size"),
        (("teacher.batch_size=20",), "student.batch_size", "100 steps per epoch"),
        (("student.batch_size=2",), "recipe.group_size", "a divisor"),
    ],
)
def test_reasons_are_true_of_what_is_given(overrides, key, reason):
    assert f" {reason}" in f" {choose(TYPICAL, parse_overrides(overrides))[key].reason}"


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({}, ("recipe.size=97",), "recipe.size=112 or 96"),
        ({"pretrained_student": True}, ("recipe.size=100",), "recipe.size=112 or 96"),
        ({}, ("recipe.size=96", "student.kwargs.patch_size=20"), "recipe.size=100 or 80"),
    ],
)
def test_a_size_that_is_no_multiple_of_the_patch_size_is_refused(changes, overrides, said):
    with pytest.raises(UsageError, match=said):
        choose(facts(**changes), parse_overrides(overrides))


@pytest.mark.parametrize("text", ["recipe.size=abc", "student.epochs=-3", "student.batch_size=true", "recipe=3", "recipe.size=1.5"])
def test_values_that_are_invalid_are_refused_by_the_configuration(text):
    with pytest.raises(UsageError, match=text.partition("=")[0]):
        config(TYPICAL, text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": 400}, "everything is trained from scratch on 40 images per class, which is hopeless"),
        ({"images": 400, "pretrained": True}, "use pretrained weights (student.weights)"),
        ({"images": 400, "pretrained_student": True}, "use pretrained weights (teacher.weights)"),
        ({}, "everything is trained from scratch. A DeiT learns little"),
        ({"pretrained": True}, "the students are trained from scratch. A DeiT learns little"),
    ],
)
def test_training_from_scratch_on_few_images_is_warned_of(changes, said):
    found = facts(**changes)
    assert said in scratch_warnings(found, make_plan(found, {}))[0]


@pytest.mark.parametrize(
    "changes", [{"images": 400, "pretrained": True, "pretrained_student": True}, {"pretrained_student": True}]
)
def test_pretrained_students_are_not_warned_of(changes):
    found = facts(**changes)
    assert not scratch_warnings(found, make_plan(found, {}))


@pytest.mark.parametrize("gpu", [False, True])
def test_the_weights_of_students_exist_in_timm(gpu):
    chosen = config(facts(gpu=gpu, pretrained_student=True))
    assert chosen.student.weights == released_student(gpu) in timm.list_pretrained("deit*")
    for name in chosen.variants:
        student = chosen.student_named(name)
        assert student.model.replace("_distilled", "") == released_student(gpu).partition(".")[0]
        assert student.weights == chosen.student.weights  # students are compared only with others of the same weights


def test_without_pretrained_weights_there_are_none():
    assert "teacher.weights" not in choose(TYPICAL) and config(TYPICAL).teacher.weights is None


def test_large_images_and_gpus_have_loader_workers():
    assert "student.workers" not in choose(facts(megapixels=12.0))
    assert "student.workers" not in choose(facts(gpu=True))


@pytest.mark.parametrize("images", [20, 1_281, 1_649, 9_999, 123_456])
def test_shards_waste_few_slots(images):
    samples = choose(facts(images=images))["data.shard_samples"].value
    assert samples <= 1_280
    unused = float(choose(facts(images=images))["data.shard_samples"].reason.split("; ")[1].partition("%")[0])
    assert unused <= (40 if images == 20 else 2.5)


@pytest.mark.parametrize("found", SETS, ids=str)
def test_what_is_written_reads_back_and_has_every_reason(found):
    chosen, choices = config(found), choose(found)
    text = annotate(chosen, choices)
    assert resolve(parse_yaml(text, ""), (), "") == chosen
    flat = " ".join(line.strip().removeprefix("# ") for line in text.splitlines())
    for choice in choices.values():
        assert choice.reason in flat
    assert max(map(len, text.splitlines())) <= 120


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project as cloned, next to two folders of images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    write_folders(tmp_path / "My photos/Train", {"cat": 6, "dog": 5})
    write_folders(tmp_path / "My photos/test", {"cat": 2, "dog": 2})
    return tmp_path


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return result.output


TINY = ("student.kwargs={patch_size: 16, embed_dim: 64, depth: 1, num_heads: 1}", "student.batch_size=32")


def init(*arguments: str, code: int = 0) -> str:
    return call("init", *arguments, "--device", "cpu", "--no-estimate", "--offline", code=code)


def test_it_writes_params_yaml_and_names_the_next_command(project):
    said = init("My photos")
    assert "11 training images" in said and "2 classes with 5 to 6" in said and "run: dvc repro" in said
    written = load_config()
    assert written.name == "My-photos"
    assert (written.data.train, written.data.val) == ("My photos/Train", "My photos/test")
    assert "pipeline init 'My photos'" in (project / "params.yaml").read_text()


def test_what_it_writes_can_be_prepared_and_trained(project):
    init("My photos")
    call("prepare", "--set", "data.workers=1")
    call("teacher", "--dry-run", "--device", "cpu")
    call("train-student", "--dry-run", "--device", "cpu")


def test_training_from_scratch_is_warned_of(project):
    said = init("My photos")
    assert "everything is trained from scratch" in said and "regnety_008_tv.tv2_in1k are not used" in said


def test_models_are_pretrained_where_weights_can_be_had(project, monkeypatch):
    monkeypatch.setattr("pipeline.cli.init.missing_weights", lambda tag, offline: "")
    assert "from scratch" not in init("My photos")
    assert load_config().teacher.weights == "regnety_008_tv.tv2_in1k"
    assert load_config().student.weights == "deit_tiny_patch16_224.fb_in1k"
    call("prepare", "--set", "data.workers=1")
    call("teacher", "--dry-run", "--device", "cpu")
    call("train-student", "--dry-run", "--device", "cpu")


def test_weights_that_the_user_chose_are_warned_of_and_not_replaced_where_they_cannot_be_had(project, monkeypatch):
    monkeypatch.setattr("pipeline.cli.init.missing_weights", lambda tag, offline: "not here")
    said = init("My photos", "teacher.weights=regnety_016.tv2_in1k", "student.weights=null")
    assert "warning: teacher.weights regnety_016.tv2_in1k: not here; training stops without them" in said
    assert "not used" not in said
    assert load_config().teacher.weights == "regnety_016.tv2_in1k" and load_config().student.weights is None


@pytest.mark.parametrize(("size", "reason"), [(96, "a small crop shows too little"), (224, "a run this short")])
def test_the_reason_for_mild_crops_suits_the_size(size, reason):
    assert reason in choose(facts(), {"recipe.size": size})["recipe.scale"].reason


def test_weights_for_as_many_classes_as_imagenet_are_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.cli.init.missing_weights", lambda tag, offline: "")
    found = photos([1] * 1_000, [1] * 1_000)
    assert not gather(found, torch.device("cpu"), False).pretrained
    assert "as many classes as ImageNet" in capsys.readouterr().out
    assert gather(photos([1] * 999, [1] * 999), torch.device("cpu"), False).pretrained


def test_weights_are_looked_for_in_the_cache_and_then_at_the_hub(monkeypatch):
    asked, tag = [], "regnety_008_tv.tv2_in1k"
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repository, name, revision: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: asked.append(url))
    assert "local cache" in hub.missing_weights(tag, offline=True) and not asked
    assert hub.missing_weights(tag, offline=False) == "" and tag in asked[0]

    def unreachable(url: str, timeout: float) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    assert "ConnectionError" in hub.missing_weights(tag, offline=False)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repository, name, revision: f"/cache/{name}")
    assert hub.missing_weights(tag, offline=True) == ""


@pytest.mark.parametrize(("tag", "files", "found"), [
    ("regnety_008_tv.tv2_in1k", ["model.safetensors"], ""),
    ("hf-hub:somebody/model", ["pytorch_model.bin"], ""),
    ("hf-hub:somebody/model", [], "neither in the local cache nor in somebody/model on the hub"),
    ("local-dir:somewhere", [], ""),
    ("regnety_160.deit_in1kk", [], "timm has no such weights"),
    ("hf-hub:somebody/model@main", ["model.safetensors"], ""),

])  # fmt: skip
def test_weights_are_at_the_hub_in_either_of_timms_files(monkeypatch, tag, files, found):
    def metadata(url: str, timeout: float) -> None:
        if url.rpartition("/")[2] not in files:
            raise EntryNotFoundError(url)

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repository, name, revision: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", metadata)
    assert hub.missing_weights(tag) == found


def test_a_name_that_no_repository_can_have_is_told_so():
    assert hub.missing_weights("hf-hub:some/body/model") == "'some/body/model' is not a repository name"


def test_an_override_takes_the_place_of_a_choice_and_is_marked(project):
    init("My photos", "recipe.size=48")
    assert load_config().recipe.size == 48
    assert "  # given on the command line\n  size: 48\n" in (project / "params.yaml").read_text()


def test_a_part_of_a_choice_that_is_given_is_marked(project):
    init("My photos", "student.kwargs.depth=2", "recipe={size: 48}")
    assert load_config().student.kwargs == {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
    written = (project / "params.yaml").read_text()
    assert "  # in part given on the command line\n  kwargs:" in written
    assert "  # given on the command line\n  size: 48\n" in written


def test_an_override_that_is_none_is_refused_and_nothing_is_written(project):
    before = (project / "params.yaml").read_text()
    assert "recipe.sise" in init("My photos", "recipe.sise=48", code=2)
    assert (project / "params.yaml").read_text() == before


def test_a_changed_params_yaml_is_kept_without_force(project):
    call("configure", "digits")
    before = (project / "params.yaml").read_text().replace("\n  hflip: 0.0\n", "\n  hflip: 0.25\n")
    (project / "params.yaml").write_text(before)
    assert "--force" in init("My photos", code=2) and "--force" in call("configure", "cifar10", code=2)
    assert (project / "params.yaml").read_text() == before
    call("configure", "cifar10", "--force")
    assert load_config().name == "cifar10"


def test_a_configuration_in_another_file_is_not_said_to_be_what_dvc_runs(project):
    said = call("configure", "digits", "--output", "other.yaml")
    assert "--config other.yaml" in said and "dvc repro" not in said


def test_what_configure_wrote_may_be_overwritten(project):
    call("configure", "digits", "student.lr=1e-3")
    call("configure", "digits", "student.lr=2e-3")
    init("My photos")
    assert load_config().name == "My-photos"


def test_a_params_yaml_that_cannot_be_read_is_kept_without_force(project):
    (project / "params.yaml").write_text("name: [")
    init("My photos", code=2)


def test_its_own_params_yaml_is_written_again(project):
    init("My photos")
    init("My photos")


def test_an_unchanged_params_yaml_of_other_choices_is_written_again_and_a_changed_one_is_kept(project):
    init("My photos", "student.epochs=33", "teacher_logits.views=33", "recipe.block=33")
    init("My photos")
    written = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(written.replace("max_pixels: 50000000", "max_pixels: 40000000"))
    assert "--force" in init("My photos", "student.epochs=7", "teacher_logits.views=30", code=2)
    assert "max_pixels: 40000000" in (project / "params.yaml").read_text()


def test_the_estimate_names_every_stage(project, monkeypatch):
    monkeypatch.setattr("pipeline.cli.durations.MEASURE", 0.0)
    said = call("init", "My photos", "--device", "cpu", "--offline", "recipe.size=32", *TINY)
    for stage in ("prepare", "teacher ", "teacher-logits", "train-student none", "train-student token", "evaluate", "disk"):
        assert stage in said


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "VALIDATION"), ("train", "test")])
def test_splits_are_found_by_their_usual_names(tmp_path, names):
    for name in names:
        write_folders(tmp_path / name, {"cat": 1})
    data = find_data(tmp_path)
    assert (Path(data.train).name, Path(data.val).name) == names


def test_val_is_preferred_to_test(tmp_path):
    for name in ("train", "test", "val"):
        write_folders(tmp_path / name, {"cat": 1})
    assert Path(find_data(tmp_path).val).name == "val"


@pytest.mark.parametrize(
    "files", [[], ["a.png"], ["cat/a.png"], ["val/cat/a.png"], ["train/a.png", "val/a.png"], ["cat/a.png", "Test/a.png"]]
)
def test_a_folder_without_class_folders_is_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match="one folder of images per class, either here or in"):
        find_data(tmp_path)


@pytest.mark.parametrize("where", ["", "train"])
def test_without_a_folder_for_validation_a_part_of_each_class_is_used(project, where):
    write_folders(project / "flat" / where, {"cat": 6, "dog": 10})
    said = init("flat")
    assert "13 training images" in said and "3 for validation: 20% of each class" in said
    data = load_config().data
    assert (Path(data.train), data.val, data.val_fraction) == (Path("flat") / where, "", 0.2)
    call("prepare", "--set", "data.workers=1", "--dry-run")


def test_tables_are_found(project):
    write_folders(project / "flat/images", {"cat": 6, "dog": 10})
    rows = [f"images/{path.parent.name}/{path.name},{path.parent.name}" for path in (project / "flat/images").rglob("*.*")]
    (project / "flat/train.csv").write_text("\n".join(["path,label", *rows]))
    said = init("flat")
    assert "13 training images" in said and "2 classes" in said
    data = load_config().data
    assert (data.source, data.train, data.val_fraction) == ("table", "flat/train.csv", 0.2)
    (project / "flat/list.csv").write_text("\n".join(["path,label,split", *(f"{row},{'test' if i % 4 else 'train'}" for i, row in enumerate(rows))]))
    init("flat/list.csv", "--force")
    assert (load_config().name, load_config().data.train, load_config().data.val_fraction) == ("list", "flat/list.csv", 0.0)
    call("prepare", "--dry-run")


def test_parquet_files_are_found(project):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (project / "hub/data").mkdir(parents=True)
    for split, count in (("train", 8), ("test", 4)):
        table = pa.table({"image": [picture(n) for n in range(count)], "label": [n % 2 for n in range(count)]})
        pq.write_table(table, project / f"hub/data/{split}-00000-of-00001.parquet")
    assert "8 training images" in init("hub")
    data = load_config().data
    assert (data.source, data.train, data.val) == ("parquet", "hub/data/train-*.parquet", "hub/data/test-*.parquet")
    init("hub/data/train-00000-of-00001.parquet", "--force")
    assert (load_config().data.source, load_config().data.val_fraction) == ("parquet", 0.2)


def test_a_table_that_lacks_a_column_is_refused_with_its_columns(project):
    Path("list.csv").write_text("filename,class\na.png,cat\n")
    with pytest.raises(PipelineError, match="(?s)columns path .or file_name. and label.*columns: filename, class"):
        find_data(Path("list.csv"))


def test_metadata_of_captions_is_no_table_of_images(tmp_path):
    for split in ("train", "validation"):
        write_folders(tmp_path / split, {"cat": 1, "dog": 1})
        (tmp_path / split / "metadata.csv").write_text("file_name,text\ncat/000.png,a cat\n")
    assert find_data(tmp_path).source == "folder"


def test_a_class_folder_called_unlabelled_is_warned_of(tmp_path):
    write_folders(tmp_path, {"cat": 4, "unlabelled": 4})
    assert any("data.unlabelled" in line for line in warnings(look(tmp_path)))


def test_of_many_images_a_smaller_part_is_for_validation(tmp_path, monkeypatch):
    write_folders(tmp_path, {"cat": 10, "dog": 10})
    monkeypatch.setattr("pipeline.cli.photos.MANY", 20)
    found = look(tmp_path)
    assert (found.data.val_fraction, len(found.val.names)) == (0.1, 2)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        look(tmp_path / "absent")


def test_classes_that_differ_are_named(tmp_path):
    write_folders(tmp_path / "train", {"cat": 1, "dog": 1})
    write_folders(tmp_path / "val", {"cat": 1, "emu": 1})
    with pytest.raises(PipelineError, match="dog, emu"):
        look(tmp_path)


def test_sizes_come_from_headers_and_broken_files_are_passed_over(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for number, (width, height) in enumerate([(40, 20), (60, 30), (30, 90)]):
            (tmp_path / split / f"cat/{number}.png").write_bytes(picture(number, "png", width, height))
        (tmp_path / split / "cat/broken.png").write_bytes(b"none")
    found = look(tmp_path)
    assert found.short_side == 30 and len(found.sizes) == 3


def test_a_folder_of_broken_files_is_refused(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat/broken.png").write_bytes(b"none")
    with pytest.raises(PipelineError, match="no image could be read"):
        look(tmp_path)


def photos(train: list[int], val: list[int], size: tuple[int, int] = (400, 300)) -> Photos:
    splits = [
        Listing([f"class{c}" for c in range(len(counts))], ["x"] * sum(counts),
                [c for c, count in enumerate(counts) for _ in range(count)], [], [])
        for counts in (train, val)
    ]  # fmt: skip
    return Photos(Data(), *splits, np.array([size]))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (photos([100, 100], [50, 50]), "one validation image is 1 points"),
        (photos([100, 5], [500, 500]), "class1 has 5 training images"),
        (photos([300, 25], [500, 500]), "over ten times"),
        (photos([100, 100], [500, 500], (4000, 3000)), "large photographs"),
    ],
)
def test_what_limits_results_or_speed_is_warned_of(found, said):
    assert [line for line in warnings(found) if said in line]


def test_a_good_set_is_not_warned_of():
    assert not warnings(photos([100, 100], [500, 500]))


@pytest.mark.parametrize(("folder", "name"), [("a b/c d", "c-d"), ("photos", "photos"), (".hidden", "hidden"), ("é", "-")])
def test_a_folder_name_becomes_a_valid_experiment_name(folder, name):
    made = experiment_name(Path("/data") / folder)
    assert made == (name.lstrip("-") or "photos")
    Config(name=made)


def test_the_preset_for_photographs_holds_these_choices():
    preset = load_config(ROOT / "configs/photos.yaml", ("data.train=train", "data.val=val"))
    assert preset == config(TYPICAL).model_copy(update={"name": "photos"})


def test_options_that_are_not_repeated_are_named(project):
    assert "not repeated" not in init("My photos", "recipe.size=48", "student.epochs=30")
    said = init("My photos", "student.epochs=60")
    assert "dropped, although the command that wrote params.yaml had them: recipe.size=48; repeat them to keep them" in said


@pytest.mark.parametrize(("overrides", "wanted"), [
    (("teacher_logits.views=100",), "choose 102 or 99, or give student.epochs alone"),
    (("teacher_logits.views=2",), "choose 3, or give student.epochs alone"),
    (("teacher_logits.views=100", "recipe.block=30"), "choose 120 or 90"),
])  # fmt: skip
def test_views_that_no_block_divides_are_refused_with_some_that_one_does(overrides, wanted):
    with pytest.raises(UsageError, match="teacher_logits.views") as found:
        config(TYPICAL, *overrides)
    assert wanted in str(found.value)


RATES = Rates(
    decode=0.003, render=0.001, forward={"teacher": 0.01, "none": 0.02, "token": 0.02},
    step={"teacher": 0.03, "none": 0.05, "token": 0.06}, parameters={"teacher": 1_000_000, "none": 500_000, "token": 600_000},
)  # fmt: skip


def test_durations_add_up_work_per_view():
    chosen = config(TYPICAL)
    seconds = stage_seconds(chosen, RATES, 2_000, 100, Hardware(2, gpu=False))
    assert seconds["teacher"] == pytest.approx(10 + 2_000 * 13 * (0.03 + 0.001 + 0.003 / 3))
    assert seconds["teacher-logits"] == pytest.approx(10 + 2_000 * 15 * (0.01 + 0.001 + 0.003 / 15))
    assert seconds["train-student token"] > seconds["train-student none"]


def test_workers_render_beside_the_model_and_take_cores_from_it():
    values = {"data": {"train": "a", "val": "b"}, "teacher": {"workers": 1, "epochs": 1}, "variants": {"none": {}, "token": {}},
              "students": ["none", "token"]}  # fmt: skip
    chosen = resolve(values, (), "test")
    cpu = stage_seconds(chosen, RATES, 1_000, 100, Hardware(2, gpu=False))
    assert cpu["teacher"] == pytest.approx(10 + 1_000 * 0.06)
    gpu = stage_seconds(chosen, RATES, 1_000, 100, Hardware(2, gpu=True))
    assert gpu["teacher"] == pytest.approx(10 + 1_000 * 0.03)


def test_bytes_are_those_of_shards_store_and_checkpoints():
    sizes = bytes_written(config(TYPICAL), RATES, 2_000, 10, 12_345)
    assert sizes["shards"] == 12_345 and sizes["checkpoints"] == 24 * 2_100_000
    assert sizes["store"] >= 2_000 * 15 * (2 * 10 + 2)


def test_the_table_of_the_faq_shows_what_is_chosen_on_a_gpu():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (ROOT / "docs/faq.md").read_text().splitlines()]
    rows = [row for row in rows if len(row) == 6 and row[1] in ("pretrained", "from scratch")]
    assert len(rows) == 6
    for photographs, weights, *chosen in rows:
        pretrained = weights == "pretrained"
        found = config(
            facts(images=int(photographs.replace(",", "")), classes=20, majority=0.05, gpu=True, precision="bfloat16",
                  pretrained=pretrained, pretrained_student=pretrained)
        )  # fmt: skip
        student, logits = found.student, found.teacher_logits
        assert chosen == [
            f"{found.recipe.size} px",
            f"{found.teacher.model}, {found.teacher.epochs}",
            f"{student.model.removesuffix('_distilled_patch16_224')}, {student.epochs}",
            f"{logits.views}, {logits.kind}",
        ]
