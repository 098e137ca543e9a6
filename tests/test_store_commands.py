"""`pipeline store` and `pipeline prune`: what they find, mend, tell and leave alone."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import tree
from test_training import CPU, loaded, taught, taught_template  # noqa: F401  (fixtures)

from pipeline.cli import main
from pipeline.errors import PipelineError, UsageError
from pipeline.layout import RUN_LOCK, index_path, state_folder, student_folder
from pipeline.lease import lease, part_lock
from pipeline.lock import kernel_lock
from pipeline.params import dump
from pipeline.shards import Index
from pipeline.store import Store
from stages import store as stage
from stages import teacher_logits, train_student

WANTED = "train-student"


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def the_store() -> Path:
    (path,) = Path("work/stores").glob("*.zarr")
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


def test_a_whole_store_is_verified(taught):  # noqa: F811
    assert "every checksum as recorded" in call("store", "verify")


def test_units_computed_again_are_the_same(taught):  # noqa: F811
    said = call("store", "verify", "--teacher", "2", "--device", "cpu")
    assert said.count(" 0 of ") == 2 and said.count("answers differ, 0 checks, logits differ by 0 at most") == 2


def test_another_teacher_s_answers_are_found(taught, monkeypatch):  # noqa: F811
    from pipeline import models

    right = models.teacher_logits
    monkeypatch.setattr(teacher_logits, "teacher_logits", lambda *arguments: -right(*arguments))
    said = call("store", "verify", "--teacher", "1", "--device", "cpu", code=1)
    assert "another teacher?" in said


FILES = ("store", "shard", "table", "index", "manifest")


def files_of(kind: str) -> list[Path]:
    data = Path("outputs/small/data/train/index.json")
    index = json.loads(data.read_text())
    return {
        "store": lambda: [path for path in sorted(the_store().rglob("*")) if path.is_file()],
        "shard": lambda: sorted(Path(index["location"]).glob("*.tar")),
        "table": lambda: [Path(index["table"])],
        "index": lambda: [data],
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
                stage.verify(loaded(), WANTED, None, 0, CPU)
                unfound.append(f"{damage.__name__} of {path}")
        except PipelineError:
            pass
        path.write_bytes(whole)
    return unfound


# a store without a manifest is not damaged
DAMAGE = [(kind, damage) for kind in FILES for damage in (flip, cut, delete) if (kind, damage) != ("manifest", delete)]


@pytest.mark.parametrize(("kind", "damage"), DAMAGE)
def test_verify_finds_damage(kind, damage, taught):  # noqa: F811
    assert damaged_and_verified(kind, damage, 6, random.Random(3)) == []


@pytest.mark.slow
def test_a_campaign_of_damage_is_found_by_verify_and_never_trains_another_loss(taught, capsys):  # noqa: F811
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


def test_a_plain_run_beside_a_part_is_refused_and_both_leave_its_files(taught):  # noqa: F811
    next(path for path in the_store().glob("argmax/c/*/*") if path.is_file()).unlink()
    partial = the_store() / "argmax" / "c" / "0" / "1.0123abc.partial"
    partial.write_bytes(b"half")
    with lease(part_lock(str(the_store()), 0, 4), "a test"):
        with pytest.raises(UsageError, match="part-0-of-4.lock: another division"):
            teacher_logits.run(loaded(), CPU)
        assert partial.exists()
    teacher_logits.run(loaded(), CPU)
    assert not partial.exists()


def test_publishing_leaves_the_files_of_who_adds_views(taught):  # noqa: F811
    partial = the_store() / "argmax" / "c" / "2" / "1.0123abc.partial"
    partial.parent.mkdir()
    partial.write_bytes(b"half")
    store = Store.open(str(the_store()), Index(index_path(taught, "train")), taught.recipe)
    with lease(part_lock(str(the_store()), 0, 4), "a test"):
        teacher_logits.publish(taught, WANTED, store, 8)
    assert partial.exists()


# repair


def test_repair_drops_what_is_damaged_and_teacher_logits_mends_it(taught):  # noqa: F811
    whole = tree(the_store())
    chunk = next(path for path in sorted(the_store().glob("dense/c/*/*/*")) if path.is_file())
    flip(chunk, random.Random(1))
    said = call("store", "repair")
    assert "dropped" in said and "1 units are missing" in said
    teacher_logits.run(loaded(), CPU)
    assert tree(the_store()) == whole


def test_repair_of_a_whole_store_changes_nothing(taught):  # noqa: F811
    whole = tree(the_store())
    assert "complete" in call("store", "repair") and tree(the_store()) == whole


# info and estimate


def test_info_of_a_partial_store_says_what_is_missing(taught):  # noqa: F811
    next(path for path in the_store().glob("argmax/c/*/*") if path.is_file()).unlink()
    said = call("store", "info")
    assert "1 units are missing" in said and "pipeline teacher-logits" in said


def test_info_names_recipe_teacher_and_versions(taught):  # noqa: F811
    said = call("store", "info")
    assert "regnety_002" in said and "16 px" in said and "zarr" in said and "complete: 8 views as dense" in said


def test_a_store_is_found_without_its_manifest(taught):  # noqa: F811
    Path("outputs/small/teacher-logits/manifest.json").unlink()
    assert str(the_store().name) in call("store", "info")


def test_no_store_says_what_to_run(taught):  # noqa: F811
    shutil.rmtree("work/stores")
    Path("outputs/small/teacher-logits/manifest.json").unlink()
    assert "pipeline teacher-logits" in call("store", "info", code=1)


def test_estimate_counts_the_bytes_of_a_view(taught):  # noqa: F811
    said = call("store", "estimate")
    # the argmax, and three classes in float16
    assert "20 images x 8 views as dense" in said and " 8 a view" in said


def test_estimate_of_imagenet_needs_no_data(taught):  # noqa: F811
    said = call(
        "store", "estimate", "--config", str(Path(__file__).parent.parent / "configs/imagenet-deit-tiny.yaml"),
        "--images", "1281167", "--views-per-second", "5000",
    )  # fmt: skip
    assert "1,281,167 images x 300 views" in said and "after 1.00 students" in said
    files = int(said.split("files  ")[1].split(":")[0].replace(",", ""))
    assert files < 50_000


# prune


def test_prune_lists_what_no_configuration_names_and_deletes_it_only_when_told(taught):  # noqa: F811
    kept, state = tree(the_store()), sorted(Path("work/state").iterdir())
    (stray := Path("work/stores/0123.zarr")).mkdir()
    (stray / "zarr.json").write_text("{}")
    said = call("prune")
    assert "1 stores and 0 states" in said and stray.exists()
    call("prune", "--yes")
    assert not stray.exists() and tree(Path(next(Path("work/stores").glob("*.zarr")))) == kept
    assert sorted(Path("work/state").iterdir()) == state


def test_prune_keeps_a_student_s_state_and_drops_that_of_other_settings(taught):  # noqa: F811
    train_student.run(loaded(), CPU, "hard")
    assert "0 states" in call("prune")
    Path("params.yaml").write_text(dump(loaded("student.lr=0.01")))
    assert "1 states" in call("prune")


def test_prune_leaves_what_a_process_works_on(taught):  # noqa: F811
    train_student.run(loaded(), CPU, "hard")
    Path("params.yaml").write_text(dump(loaded("student.lr=0.01", "recipe.seed=5")))
    runs = {path: json.loads(path.read_text())["name"] for path in Path("work/state").glob("*/run.json")}
    state = next(path.parent for path, name in runs.items() if name == "student hard")
    store = the_store()
    with lease(part_lock(str(store), 0, 1), "a test"), kernel_lock(state / RUN_LOCK):
        said = call("prune", "--yes")
    assert store.exists() and state.exists() and said.count("in use") == 2 and "deleted" in said


def test_prune_removes_the_locks_beside_a_store(taught):  # noqa: F811
    with lease(part_lock(str(the_store()), 0, 1), "a test"):
        pass
    Path("params.yaml").write_text(dump(loaded("recipe.seed=5")))
    assert list(Path("work/stores").glob("*.kernel"))
    call("prune", "--yes")
    assert not list(Path("work/stores").iterdir())


def test_another_recipe_s_store_is_unnamed(taught):  # noqa: F811
    Path("params.yaml").write_text(dump(loaded("recipe.seed=5")))
    assert "1 stores" in call("prune")


def test_states_stay_in_a_folder_where_work_is_a_url(taught):  # noqa: F811
    config = taught.model_copy(update={"work": "memory://bucket/work"})
    assert state_folder(config, "f" * 32) == Path("work/state") / ("f" * 32)


def test_a_url_whose_library_is_missing_is_told_without_a_traceback(taught, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "s3fs", None)
    result = CliRunner().invoke(main, ["store", "info", "--set", "work=s3://bucket/work"])
    assert result.exit_code == 1 and "s3fs" in result.output and "Traceback" not in result.output
