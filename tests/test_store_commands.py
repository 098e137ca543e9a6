"""`pipeline store` and `pipeline prune`: what they find, repair, print and leave alone."""

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import zarr
from click.testing import CliRunner
from conftest import tree
from test_training import CPU, loaded

from pipeline.cli import prune
from pipeline.cli.find_store import find_store
from pipeline.cli.main import main
from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.lease import lease, part_lease_path
from pipeline.common.lock import kernel_lock
from pipeline.config.params import dump
from pipeline.config.paths import DATA_LOCK, RUN_LOCK, index_path, state_folder, student_folder
from pipeline.config.schema import Config
from pipeline.config.store_spec import store_spec
from pipeline.models.teacher import TeacherForward
from pipeline.shards.index import Index
from pipeline.store import maintenance
from pipeline.store.manifest import publish
from pipeline.store.reader import Store
from pipeline.store.writer import StoreWriter
from stages import teacher_logits, train_student

WANTED = "train-student"


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def the_store(root: Path = Path()) -> Path:
    (path,) = (root / "work" / "stores").glob("*.zarr")
    return path


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def delete(path: Path, _: random.Random) -> None:
    path.unlink()


# verify


def test_a_complete_store_is_verified(taught):
    assert "every checksum as recorded" in call("store", "verify")


def test_units_computed_again_are_the_same(taught):
    said = call("store", "verify", "--teacher", "2", "--device", "cpu")
    assert said.count(" 0 of ") == 2 and said.count("predictions differ, 0 checks, logits by at most 0") == 2


def test_a_store_that_was_killed_before_its_manifest_is_published_as_a_whole_later(taught, monkeypatch):
    config = loaded("teacher_logits.kind=argmax", "students=[hard]")
    path = store_spec(taught, WANTED).folder / "manifest.json"
    before = path.read_bytes()

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.store.manifest.write_summary", killed)
        teacher_logits.run(config, CPU)
    assert path.read_bytes() == before
    teacher_logits.run(config, CPU)
    assert json.loads(path.read_text())["kind"] == "argmax"


def test_another_teacher_s_predictions_are_found(taught, monkeypatch):
    right = TeacherForward.logits
    monkeypatch.setattr(TeacherForward, "logits", lambda *arguments: -right(*arguments))
    said = call("store", "verify", "--teacher", "1", "--device", "cpu", code=1)
    assert "a different teacher?" in said
    assert "move the store away" in said and "store repair" not in said  # which finds nothing damaged


def verify(config: Config) -> None:
    spec = store_spec(config, WANTED)
    maintenance.verify(config, spec, find_store(config, spec), spec.folder / "manifest.json", 0, CPU)


FILES = ("store", "shard", "table", "index", "val", "manifest")


def files_of(kind: str) -> list[Path]:
    data = Path("outputs/small/data/train/index.json")
    index = Index(data)
    return {
        "store": lambda: [path for path in sorted(the_store().rglob("*")) if path.is_file()],
        "shard": lambda: sorted(Path(index.location).glob("*.tar")),
        "table": lambda: [Path(index.table)],
        "index": lambda: [data],
        "val": lambda: [Path("outputs/small/data/val/index.json")],
        "manifest": lambda: [Path("outputs/small/teacher-logits/manifest.json")],
    }[kind]()


def damaged_and_verified(kind: str, damage, count: int, chance: random.Random) -> list[str]:
    """Damage random files, one at a time; what verify did not find."""
    unfound, files = [], files_of(kind)
    for _ in range(count):
        path = chance.choice(files)
        whole = path.read_bytes()
        damage(path, chance)
        try:
            if not path.exists() or path.read_bytes() != whole:
                verify(loaded())
                unfound.append(f"{damage.__name__} of {path}")
        except PipelineError:
            pass
        path.write_bytes(whole)
    return unfound


# a store without a manifest is not damaged
DAMAGE = [(kind, damage) for kind in FILES for damage in (flip, cut, delete) if (kind, damage) != ("manifest", delete)]


@pytest.mark.parametrize(("kind", "damage"), DAMAGE)
def test_verify_finds_damage(kind, damage, taught):
    assert damaged_and_verified(kind, damage, 6, random.Random(3)) == []


@pytest.mark.slow
def test_a_campaign_of_damage_is_found_by_verify_and_never_trains_another_loss(taught, capsys):
    train_student.run(loaded(), CPU, "soft")
    expected = (student_folder(loaded(), "soft") / "weights.safetensors").read_bytes()
    chance, counts, trained = random.Random(0), {}, 0
    for kind, damage in DAMAGE:
        share = {flip: 72, cut: 15, delete: 18}[damage] * (3 if kind == "store" else 1)
        assert damaged_and_verified(kind, damage, share, chance) == []
        counts[damage.__name__] = counts.get(damage.__name__, 0) + share
        for _ in range(2):
            trained += trains_the_same_or_stops(kind, damage, chance, expected)
    with capsys.disabled():
        print(f"\ndamage found by verify: {counts}; of {2 * len(DAMAGE)} damaged trainings {trained} went unhurt")


def trains_the_same_or_stops(kind: str, damage, chance: random.Random, expected: bytes) -> bool:
    """Train from damaged files: the same weights, or an error of our own. Returns whether it trained."""
    path = chance.choice(files_of(kind))
    whole = path.read_bytes()
    damage(path, chance)
    shutil.rmtree("work/state", ignore_errors=True)
    try:
        train_student.run(loaded(), CPU, "soft")
    except PipelineError:
        return False
    else:
        assert (student_folder(loaded(), "soft") / "weights.safetensors").read_bytes() == expected, path
        return True
    finally:
        path.write_bytes(whole)


# several writers


def test_a_plain_run_beside_a_part_is_refused_and_both_leave_its_files(taught):
    next(path for path in the_store().glob("argmax/c/*/*") if path.is_file()).unlink()
    partial = the_store() / "argmax" / "c" / "0" / "1.0123abc.partial"
    partial.write_bytes(b"half")
    with lease(part_lease_path(str(the_store()), 0, 4), "a test"):
        with pytest.raises(UsageError, match="part-0-of-4.lock: a job that divides the store into a number of parts other than"):
            teacher_logits.run(loaded(), CPU)
        assert partial.exists()
    teacher_logits.run(loaded(), CPU)
    assert not partial.exists()


def test_publishing_leaves_the_files_of_who_adds_views(taught):
    partial = the_store() / "argmax" / "c" / "2" / "1.0123abc.partial"
    partial.parent.mkdir()
    partial.write_bytes(b"half")
    store = Store.open(str(the_store()), Index(index_path(taught, "train")), taught.recipe)
    with lease(part_lease_path(str(the_store()), 0, 4), "a test"):
        publish(store_spec(taught, WANTED), store, None)
    assert partial.exists()


# publishing


def test_a_store_is_published_only_when_all_of_it_is_read_back_as_written(taught):
    chunk = next(path for path in sorted(the_store().glob("dense/c/*/*/*")) if path.is_file())
    whole = tree(the_store())
    manifest = Path("outputs/small/teacher-logits/manifest.json")
    manifest.unlink()
    flip(chunk, random.Random(1))
    store = Store.open(str(the_store()), Index(index_path(taught, "train")), taught.recipe)
    with pytest.raises(PipelineError, match="1 damaged unit"):
        publish(store_spec(taught, WANTED), store, None)
    assert not manifest.exists()
    teacher_logits.run(taught, CPU)
    assert manifest.exists() and tree(the_store()) == whole


def test_a_unit_that_the_disk_does_not_give_back_is_not_published(taught, monkeypatch):
    next(path for path in the_store().glob("argmax/c/*/*") if path.is_file()).unlink()
    real = StoreWriter.write_unit

    def lossy(self, unit, *arguments):
        real(self, unit, *arguments)
        flip(Path(self._chunk_path("dense", unit.shard, unit.block)), random.Random(1))

    monkeypatch.setattr(StoreWriter, "write_unit", lossy)
    with pytest.raises(PipelineError, match="1 damaged unit"):
        teacher_logits.run(taught, CPU)


def test_a_complete_store_needs_no_lock(taught, monkeypatch):
    """It may lie on a disk that is read-only."""
    shutil.rmtree("outputs/small/teacher-logits")
    before = tree(Path("work"))
    monkeypatch.setattr(teacher_logits, "part_lease", None)
    teacher_logits.run(taught, CPU)
    assert tree(Path("work")) == before and Path("outputs/small/teacher-logits/manifest.json").exists()


def test_fewer_classes_than_top_k_are_told_and_stored(taught):
    arguments = ("teacher-logits", "--device", "cpu", "--set", "teacher_logits.kind=topk")
    assert "top_k 10: there are 3 classes, and all are stored" in call(*arguments, "--dry-run")
    assert "store complete" in call(*arguments)


def test_further_views_that_another_configuration_has_not_finished_are_no_problem(taught):
    views = loaded().teacher_logits.views
    for array in zarr.open_group(the_store(), mode="r+").array_values():
        array.resize((2 * views, *array.shape[1:]))
    said = call("store", "verify")
    assert f"room for {2 * views} views" in said and "every checksum as recorded" in said


# repair


def test_repair_drops_what_is_damaged_and_teacher_logits_computes_it_again(taught):
    whole = tree(the_store())
    chunk = next(path for path in sorted(the_store().glob("dense/c/*/*/*")) if path.is_file())
    flip(chunk, random.Random(1))
    said = call("store", "repair")
    assert "removed a damaged unit" in said and "1 unit missing" in said
    teacher_logits.run(loaded(), CPU)
    assert tree(the_store()) == whole


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")], ids=repr)
def test_repair_and_teacher_logits_keep_what_they_cannot_read(error, taught, monkeypatch):
    whole = tree(Path("work"))

    def short(self, path, *_):
        raise error

    monkeypatch.setattr(Store, "_bytes", short)
    call("store", "repair", code=1)
    call("teacher-logits", "--device", "cpu", code=1)
    assert tree(Path("work")) == whole


def test_repair_deletes_nothing_outside_work(taught, tmp_path):
    manifest = Path("outputs/small/teacher-logits/manifest.json")
    shutil.copytree(the_store(), tmp_path / "outside.zarr")
    for path in (tmp_path / "outside.zarr").glob("argmax/c/*/*"):
        path.write_bytes(b"damaged")
    before = tree(tmp_path / "outside.zarr")
    outside = os.path.relpath(tmp_path / "outside", "work/stores")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"fingerprint": outside}))
    assert "damaged" in call("store", "repair", code=1)
    assert tree(tmp_path / "outside.zarr") == before


def test_repair_of_a_whole_store_changes_nothing(taught):
    whole = tree(the_store())
    assert "complete" in call("store", "repair") and tree(the_store()) == whole


# info and estimate


def test_info_of_a_partial_store_says_what_is_missing(taught):
    next(path for path in the_store().glob("argmax/c/*/*") if path.is_file()).unlink()
    said = call("store", "info")
    assert "1 unit missing" in said and "pipeline teacher-logits" in said


def test_info_names_recipe_teacher_and_versions(taught):
    said = call("store", "info")
    assert "regnety_002" in said and "16 px" in said and "zarr" in said and "complete: 8 views as dense" in said


def test_a_store_is_found_without_its_manifest(taught):
    Path("outputs/small/teacher-logits/manifest.json").unlink()
    assert str(the_store().name) in call("store", "info")


def test_no_store_says_what_to_run(taught):
    shutil.rmtree("work/stores")
    Path("outputs/small/teacher-logits/manifest.json").unlink()
    assert "pipeline teacher-logits" in call("store", "info", code=1)


def test_estimate_counts_the_bytes_of_a_view(taught):
    said = call("store", "estimate")
    # the argmax, and three classes in float16
    assert "20 images x 8 views as dense" in said and ": 8 bytes per view" in said


def test_estimate_without_data_is_for_the_given_number_of_classes(taught):
    said = call("store", "estimate", "--images", "600", "--classes", "10")
    assert "600 images x 8 views as dense" in said and ": 22 bytes per view" in said


def test_estimate_of_imagenet_needs_no_data(taught):
    said = call(
        "store", "estimate", "--config", str(Path(__file__).parent.parent / "configs/imagenet-deit-tiny.yaml"),
        "--images", "1281167", "--views-per-second", "5000",
    )  # fmt: skip
    assert "1,281,167 images x 300 views" in said and "after 1.00 students" in said
    files = int(said.split("files  ")[1].split(":")[0].replace(",", ""))
    assert files < 50_000


# prune


def change(*overrides: str) -> None:
    """The current configuration is another from now on."""
    Path("params.yaml").write_text(dump(loaded(*overrides)))


def forget(*overrides: str) -> None:
    """So is it, and nothing under outputs/ refers to what was made before but the data."""
    change(*overrides)
    for name in ("teacher", "teacher-finetune", "teacher-logits", "students"):
        shutil.rmtree(Path("outputs/small") / name, ignore_errors=True)


def age(path: Path, days: float = 2.0) -> None:
    for file in [path, *path.rglob("*")]:
        os.utime(file, (time.time() - 86400 * days,) * 2)


def state_of(name: str) -> Path:
    names = {path.parent: json.loads(path.read_text())["name"] for path in Path("work/state").glob("*/run.json")}
    return next(folder for folder, found in names.items() if found == name)


def copied(path: Path, digit: str) -> Path:
    """Beside it, as if it were another's."""
    return Path(shutil.copytree(path, path.with_name(digit * 32 + path.suffix)))


def test_prune_lists_what_nothing_needs_and_deletes_it_only_when_told(taught):
    before = tree(Path("work"))
    stray = copied(the_store(), "0")
    described = json.loads((stray / "zarr.json").read_text())
    described["attributes"]["recipe"] = "1" * 32
    (stray / "zarr.json").write_text(json.dumps(described))
    said = call("prune")
    assert "1 store, 0 state folders, 0 data sets" in said and "predictions of regnety_002 at 16 px" in said and stray.exists()
    assert "deleted" in call("prune", "--yes")
    assert tree(Path("work")) == before


def test_prune_keeps_a_student_s_state_and_drops_that_of_other_settings(taught):
    train_student.run(loaded(), CPU, "hard")
    assert "0 state folders" in call("prune")
    change("student.lr=0.01")
    shutil.rmtree("outputs/small/students")
    assert "1 state folder" in call("prune")


def test_prune_keeps_what_outputs_refer_to_whatever_is_configured(taught):
    train_student.run(loaded(), CPU, "hard")
    before = tree(Path("work"))
    change("student.lr=0.01", "recipe.seed=5", "data.seed=5", "teacher.lr=0.5")
    age(Path("work/data"))
    call("prune", "--yes")
    kept = tree(Path("work"))
    assert kept.keys() >= {name for name in before if name.startswith(("stores", "data"))}
    student = state_of("student hard").relative_to("work").as_posix()
    assert any(name.startswith(student) for name in kept)


def test_prune_keeps_the_run_that_published_metrics_name(taught):
    train_student.run(loaded(), CPU, "hard")
    state, metrics = state_of("student hard"), Path("outputs/small/students/hard/metrics.json")
    assert json.loads(metrics.read_text())["run"] == state.name
    (state / "log.jsonl").unlink()
    change("student.lr=0.01")
    call("prune", "--yes")
    assert state.exists()
    metrics.unlink()
    metrics.with_name("model.json").unlink()  # it names the run too
    call("prune", "--yes")
    assert not state.exists()


def test_prune_knows_an_interrupted_experiment_by_its_last_command(taught):
    """Its overrides are in no file of configs/, and its params.yaml was written over."""
    call("teacher-logits", "--set", "name=other", "--set", "recipe.seed=5", "--dry-run")
    assert not Path("outputs/other").exists()
    shutil.copytree("outputs/small", "outputs/other")
    for stage in ("teacher", "teacher-logits"):
        call(stage, "--set", "name=other", "--set", "recipe.seed=5", "--device", "cpu")
    shutil.rmtree("outputs/other/teacher-logits")
    stores = sorted(Path("work/stores").glob("*.zarr"))
    call("prune", "--yes")
    assert len(stores) == 2 and sorted(Path("work/stores").glob("*.zarr")) == stores
    Path("outputs/other/params.yaml").unlink()
    assert "1 store," in call("prune")


@pytest.mark.parametrize("work", ["work/", "./work", "work/../work", "absolute"])
def test_prune_takes_a_folder_for_the_same_however_it_is_written(work, taught):
    shutil.rmtree("outputs/small/teacher-logits")
    change(f"work={Path('work').absolute() if work == 'absolute' else work}")
    before = tree(Path("work"))
    assert "0 stores, 0 state folders, 0 data sets" in call("prune", "--yes")
    assert tree(Path("work")) == before


def test_prune_refuses_a_folder_that_does_not_exist(taught):
    assert "no folder elsewhere" in call("prune", "--work", "elsewhere", code=2)


def test_prune_refuses_without_any_configuration(taught):
    before = tree(Path("work"))
    Path("params.yaml").unlink()
    assert "no configuration here" in call("prune", "--yes", code=2)
    assert tree(Path("work")) == before


def test_prune_keeps_what_may_be_of_data_that_it_does_not_know(taught):
    train_student.run(loaded(), CPU, "hard")
    shutil.rmtree("outputs")
    age(Path("work"))
    before = tree(Path("work"))
    call("prune", "--yes")
    assert tree(Path("work")) == before


@pytest.mark.parametrize("damage", [flip, cut, delete])
def test_prune_keeps_what_nothing_tells_whose_it_is(damage, taught):
    train_student.run(loaded(), CPU, "hard")
    forget("student.lr=0.01", "recipe.seed=5")
    state, store, chance = state_of("student hard"), the_store(), random.Random(1)
    described = (state / "run.json", store / "zarr.json")
    for path in described:
        path.write_bytes(b"[]" if damage is flip else path.read_bytes())
        if damage is not flip:
            damage(path, chance)
    said = call("prune", "--yes")
    assert state.exists() and store.exists() and "0 stores" in said and "damaged" in said


def test_prune_leaves_folders_that_are_not_its_own(taught, tmp_path):
    for folder in ("stores", "state", "data"):
        for name in ("notes", "0123.zarr", "A" * 32):
            (Path("work") / folder / name).mkdir()
        (elsewhere := tmp_path / folder).mkdir()
        (elsewhere / "kept").write_text("")
        link = Path("work") / folder / ("e" * 32 + (".zarr" if folder == "stores" else ""))
        link.symlink_to(elsewhere)
    age(Path("work"))
    before = tree(Path("work"))
    call("prune", "--yes")
    assert tree(Path("work")) == before and len(list(tmp_path.glob("*/kept"))) == 3
    assert len(list(Path("work").glob("*/notes"))) == 3


def test_prune_leaves_what_only_a_link_leads_to(taught, tmp_path):
    forget("student.lr=0.01", "recipe.seed=5", "teacher.lr=0.5")
    for folder in ("stores", "state"):
        shutil.move(Path("work") / folder, tmp_path / folder)
        (Path("work") / folder).symlink_to(tmp_path / folder)
    before = tree(tmp_path)
    assert "0 stores, 0 state folders" in call("prune", "--yes")
    assert tree(tmp_path) == before


def test_prune_leaves_what_a_process_works_on(taught):
    train_student.run(loaded(), CPU, "hard")
    forget("student.lr=0.01", "recipe.seed=5")
    state, store = state_of("student hard"), the_store()
    with lease(part_lease_path(str(store), 1, 4), "a test"), kernel_lock(state / RUN_LOCK):
        said = call("prune", "--yes")
    assert store.exists() and state.exists() and said.count("in use") == 2
    call("prune", "--yes")
    assert not store.exists() and not state.exists()


def test_prune_leaves_the_store_that_a_running_training_reads(taught):
    train_student.run(loaded(), CPU, "hard")
    forget("student.lr=0.01", "recipe.seed=5")
    state, store = state_of("student hard"), the_store()
    with kernel_lock(state / RUN_LOCK):
        assert f"a training may be reading it: {state}" in call("prune", "--yes")
    assert store.exists()
    call("prune", "--yes")
    assert not store.exists()


def test_prune_leaves_what_a_process_takes_up_meanwhile(taught, monkeypatch):
    train_student.run(loaded(), CPU, "hard")
    forget("student.lr=0.01", "recipe.seed=5")
    state, store = state_of("student hard"), the_store()
    monkeypatch.setattr(prune, "_writer_of", lambda _: "")
    monkeypatch.setattr(prune, "_trainer_of", lambda _: "")
    with lease(part_lease_path(str(store), 1, 4), "a test"), kernel_lock(state / RUN_LOCK):
        call("prune", "--yes")
    assert store.exists() and state.exists()


def test_prune_leaves_what_another_machine_may_work_on(taught):
    train_student.run(loaded(), CPU, "hard")
    forget("student.lr=0.01", "recipe.seed=5")
    state, store = state_of("student hard"), the_store()
    (state / RUN_LOCK).write_text("another")
    lock = Path(part_lease_path(str(store), 0, 1))
    lock.write_text(json.dumps({"host": "another", "process": 7, "token": "x", "renewed": 0.0}))
    Path(f"{lock}.kernel").write_text("another")
    os.utime(lock, (0, 0))
    said = call("prune", "--yes")
    assert store.exists() and state.exists() and said.count("another machine") == 2


def test_prune_knows_data(taught):
    data = next(Path("work/data").glob("*/train")).parent
    new = copied(data, "1")
    for path in new.glob("*/index.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "3" * 32}))
    assert "in the last day" in call("prune", "--yes") and new.exists()
    age(Path("work/data"))
    with kernel_lock(Path("work/data") / DATA_LOCK):
        assert "prepare runs" in call("prune", "--yes") and new.exists()
    assert "images: train 20" in call("prune")
    assert "1 data set " in call("prune", "--yes") and not new.exists() and data.exists()


def test_prune_keeps_the_data_of_what_it_keeps(taught):
    index = index_path(loaded(), "train")
    index.write_text(json.dumps({"fingerprint": "3" * 32}))
    age(Path("work"))
    data = tree(Path("work/data"))
    call("prune", "--yes")
    assert tree(Path("work/data")) == data and the_store().exists()


def test_prune_keeps_the_validation_images_of_a_running_training(taught):
    train_student.run(taught, CPU, "none")
    for split in ("train", "val"):  # the images have changed since
        index_path(loaded(), split).write_text(json.dumps({"fingerprint": "3" * 32}))
    (state,) = (path for path in Path("work/state").iterdir() if "student none" in (path / "run.json").read_text())
    with kernel_lock(state / RUN_LOCK):
        age(Path("work"))
        call("prune", "--yes")
    assert {path.parent.name for path in Path("work/data").glob("*/*/index.json")} == {"train", "val"}


def test_a_prune_that_was_killed_is_finished_by_the_next(taught):
    before = tree(Path("work"))
    for folder in ("stores", "state", "data"):
        (Path("work") / folder / (".deleted-" + "1" * 32) / "half").mkdir(parents=True)
    call("prune")
    call("prune", "--yes")
    assert not list(Path("work").glob("*/.deleted-*")) and tree(Path("work")) == before


def test_prune_removes_the_locks_beside_a_store(taught):
    with lease(part_lease_path(str(the_store()), 0, 1), "a test"):
        pass
    forget("recipe.seed=5")
    assert list(Path("work/stores").glob("*.kernel"))
    call("prune", "--yes")
    assert not list(Path("work/stores").iterdir())


def test_another_recipe_s_store_is_unneeded(taught):
    forget("recipe.seed=5")
    assert "1 store," in call("prune")


def test_states_stay_in_a_folder_where_work_is_a_url(taught):
    config = taught.model_copy(update={"work": "memory://bucket/work"})
    assert state_folder(config, "f" * 32) == Path("work/state") / ("f" * 32)


def test_a_url_whose_library_is_missing_is_told_without_a_traceback(taught, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    result = CliRunner().invoke(main, ["store", "info", "--set", "work=s3://bucket/work"])
    assert result.exit_code == 1 and "s3fs" in result.output and "Traceback" not in result.output
