"""`pipeline status`: what it makes of a stage's files, done, half-done, damaged or absent."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from conftest import tree
from test_training import CPU, Stop, loaded

from pipeline.cli import scan, status
from pipeline.cli.main import main
from pipeline.cli.status_table import RECENT, StageFacts, best_top1, log_summary, row_of, short, table, write_rate
from pipeline.common.lease import lease
from pipeline.common.lock import kernel_lock
from pipeline.config.params import dump
from pipeline.config.paths import DATA_LOCK, RUN_LOCK, index_path, student_folder
from pipeline.shards.index import Index
from pipeline.store.reader import Store
from pipeline.training.log import read_log
from pipeline.training.trainer import Trainer
from stages import evaluate, train_student

ROOT = Path(__file__).parent.parent
NOW = 1_000_000.0


def row(now: float = NOW, **facts):
    return row_of(StageFacts("finetune", "steps", **facts), now)


# pure


def test_a_stage_without_files_has_not_begun():
    assert row(total=100).state == "not begun"


def test_a_stage_that_published_is_done_though_its_state_is_gone():
    assert row(done=100, total=100, published=True).state == "done"


def test_what_another_configuration_published_is_told_as_such():
    told = row(total=100, published=True, foreign=True)
    assert told.state == "outdated"
    assert "of another configuration" in table([told])


def test_work_under_way_counts_before_what_was_published_earlier():
    assert row(done=3, total=100, begun=True, published=True, modified=NOW - 5).state == "running"


def test_a_training_that_moved_lately_runs_and_later_counts_as_stopped():
    facts = {"done": 3, "total": 100, "begun": True}
    assert row(**facts, modified=NOW - RECENT + 1).state == "running"
    assert row(**facts, modified=NOW - RECENT - 1).state == "stopped"


def test_a_store_runs_while_a_lease_is_held_however_long_ago_it_moved():
    facts = {"done": 3, "total": 100, "begun": True}
    assert row(**facts, modified=NOW - 3600, writers=1).state == "running"
    assert row(**facts, modified=NOW - 1, writers=0).state == "stopped"


def test_a_stopped_training_has_done_what_its_checkpoint_holds():
    assert row(done=80, kept=60, total=100, begun=True, modified=0.0).done == 60
    assert row(done=80, kept=60, total=100, begun=True, modified=NOW).done == 80


def test_what_is_complete_but_not_published_says_so():
    assert "not published" in table([row(done=100, total=100, begun=True, modified=0.0)])


def test_the_time_left_is_what_is_missing_at_the_rate_of_late():
    told = row(done=40, total=100, begun=True, modified=NOW, rate=2.0, images_per_unit=8.0)
    assert (told.percent, told.seconds_left, told.images_per_second) == (40.0, 30.0, 16.0)


def test_all_but_one_of_many_is_not_yet_a_hundred_percent():
    told = row(done=375_299, total=375_300, begun=True, modified=NOW)
    assert told.percent < 100 and " 99 " in table([told])


def test_a_clock_that_runs_behind_gives_no_negative_age():
    assert row(done=1, total=2, begun=True, modified=NOW + 30).updated_seconds_ago == 0


def test_a_rate_is_of_the_last_minutes_so_a_pause_before_them_does_not_count():
    before, since = [0.0, 10.0], [5000.0, 5010.0, 5020.0]
    assert write_rate(before + since) == pytest.approx(0.1)
    assert write_rate([]) is write_rate([5.0]) is None


def test_the_log_tells_step_loss_top1_and_the_mean_speed_of_late():
    steps = [
        {"kind": "step", "step": number, "loss": 2.0, "samples_per_s": speed, "seconds": seconds}
        for number, speed, seconds in ((0, 100, 1), (50, 400, 3))
    ]
    epoch = {"kind": "epoch", "step": 50, "loss": 3.0, "val_top1_class": 0.5, "val_top1_mean": 0.6}
    assert log_summary([steps[0], epoch, steps[1]]) == {"done": 51, "loss": 2.0, "top1": 0.6, "samples": 325}


def test_a_log_of_an_earlier_version_has_no_speed():
    assert log_summary([{"kind": "step", "step": 0, "loss": 2.0}])["samples"] is None


def test_an_experiment_of_imagenets_size_fits_into_100_columns():
    late = {"begun": True, "modified": NOW - 55}
    facts = [
        StageFacts("prepare", "shards", 1065, 1065, published=True, modified=0.0, note="50k images"),
        StageFacts("teacher-logits-finetune", "units", 5119, 10240, **late, writers=8, rate=0.13, images_per_unit=37530),
        StageFacts("train-student@hard", "steps", 123456, 375300, **late, rate=1.1, images_per_unit=1024, loss=3.456, top1=0.6543),
        StageFacts("train-student@none", "steps", 0, 375300),
    ]
    assert max(len(line) for line in table([row_of(fact, NOW) for fact in facts]).splitlines()) <= 100


def test_what_is_counted_agrees_with_its_number():
    facts = [StageFacts("teacher-logits", "units", done, total, modified=0.0) for done, total in ((1, 1), (2, 2), (1, 5))]
    printed = table([row_of(fact, NOW) for fact in facts])
    assert "1 unit " in printed and "2 units" in printed and "1/5 units" in printed


def test_numbers_are_short():
    assert [short(x) for x in (0.25, 7, 9999, 12_345, 375_300, 1_281_167)] == [
        "0.25", "7", "9,999", "12.3k", "375k", "1.28M",
    ]  # fmt: skip


# from files


def told(*overrides: str) -> dict[str, status.Row]:
    return {row.stage: row for row in status.survey(loaded(*overrides), time.time())}


def age(seconds: float) -> None:
    """Make all of the work so old."""
    for path in Path("work").rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def the_store() -> Path:
    (path,) = Path("work/stores").glob("*.zarr")
    return path


def stop_at(step: int, monkeypatch, name: str = "hard", *overrides: str) -> None:
    """Train a student and stop it there, as a kill would."""
    real = Trainer.train_step

    def stopping(self, batches):
        if self.step == step:
            raise Stop
        return real(self, batches)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "train_step", stopping)
        train_student.run(loaded(*overrides), CPU, name)


def test_the_stages_are_those_of_dvc_in_their_order(taught):
    stages = [stage.partition("@") for stage in told()]
    assert [student for _, at, student in stages if at] == [*taught.students, "hard"]
    assert {name for name, _, _ in stages} == {*yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]} - {"needed"}


def test_nothing_has_begun_where_there_is_nothing(taught, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    shutil.copy("params.yaml", tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    assert {row.state for row in told().values()} == {"not begun"}


def test_data_teacher_and_store_are_done_once_they_are_published(taught):
    rows = told()
    assert [rows[stage].state for stage in ("prepare", "teacher", "teacher-logits")] == ["done"] * 3
    assert (rows["prepare"].done, rows["prepare"].note) == (5, "20 + 4 images")
    assert rows["teacher"].top1 == json.loads(Path("outputs/small/teacher/metrics.json").read_text())["top1"]


def test_what_is_published_is_done_though_work_is_gone(taught):
    shutil.rmtree("work")
    rows = told()
    assert [rows[stage].percent for stage in ("prepare", "teacher", "teacher-logits")] == [100.0] * 3
    assert {rows[stage].state for stage in ("prepare", "teacher", "teacher-logits")} == {"done"}


def test_shards_are_counted_before_there_is_an_index(taught):
    shutil.rmtree("outputs")
    next(Path("work/data").glob("*/train/index.json")).unlink()
    with kernel_lock(Path("work/data") / DATA_LOCK):
        row = told()["prepare"]
    assert (row.state, row.done, row.total) == ("running", 5, None)
    assert told()["prepare"].state == "stopped"


def test_units_of_a_partial_store_are_those_that_it_lacks_none_of(taught):
    for unit in ("0/1", "1/2"):
        (the_store() / "argmax/c" / unit).unlink()
    shutil.rmtree(the_store() / "dense/c/1/3")
    store = Store.open(str(the_store()), Index(index_path(taught, "train")), taught.recipe)
    row = told()["teacher-logits"]
    assert row.total - row.done == len(store.missing(8, "dense")) == 3
    assert row.state == "stopped"


def test_a_store_runs_while_its_lease_is_held(taught):
    (the_store() / "argmax/c/0/1").unlink()
    with lease(f"{the_store()}.part-0-of-1.lock", "a test"):
        assert told()["teacher-logits"].state == "running"
    assert told()["teacher-logits"].state == "stopped"


def test_a_dead_writers_lease_is_no_running_store(taught):
    (the_store() / "argmax/c/0/1").unlink()
    Path(f"{the_store()}.part-0-of-1.lock").write_text("{}")
    age(3600)
    assert told()["teacher-logits"].state == "stopped"


def test_more_views_leave_a_store_begun(taught):
    row = told("teacher_logits.views=12")["teacher-logits"]
    assert (row.state, row.done, row.total) == ("stopped", 8, 12)


def test_a_store_of_another_recipe_is_of_another_configuration(taught):
    assert told("recipe.seed=5")["teacher-logits"].state == "outdated"


def test_a_teacher_of_other_settings_is_of_another_configuration(taught):
    rows = told("teacher.lr=0.5")
    assert {rows[stage].state for stage in ("teacher", "teacher-logits")} == {"outdated"}


def test_a_teacher_that_was_trained_here_is_not_one_from_weights(taught):
    assert told("teacher.weights=regnety_160.deit_in1k")["teacher"].state == "outdated"


def state_of(name: str) -> Path:
    """A student's state folder."""
    states = Path("work/state").glob("*/run.json")
    return next(path.parent for path in states if json.loads(path.read_text())["name"] == f"student {name}")


def test_a_training_runs_while_its_lock_is_held_however_long_ago_it_moved(taught, monkeypatch):
    stop_at(5, monkeypatch)
    assert told()["train-student@hard"].state == "stopped"
    age(3600)
    with kernel_lock(state_of("hard") / RUN_LOCK):
        assert told()["train-student@hard"].state == "running"


def test_a_training_of_another_machine_runs_while_its_files_move(taught, monkeypatch):
    stop_at(5, monkeypatch)
    (state_of("hard") / RUN_LOCK).write_text("another")
    assert told()["train-student@hard"].state == "running"
    age(3600)
    row = told()["train-student@hard"]
    assert (row.state, row.done) == ("stopped", 5)
    assert row.updated_seconds_ago == pytest.approx(3600, abs=60)


def test_a_running_training_tells_loss_and_speed_of_its_log(taught, monkeypatch):
    stop_at(5, monkeypatch)
    with kernel_lock(state_of("hard") / RUN_LOCK):
        row = told()["train-student@hard"]
    assert row.loss in [read_log(path)[-1]["loss"] for path in Path("work/state").glob("*/log.jsonl")]
    assert row.images_per_second > 0 and row.seconds_left > 0


def test_a_training_that_has_not_begun_tells_the_steps_that_it_will_have(taught):
    before = told()["train-student@hard"].total
    train_student.run(taught, CPU, "hard")
    runs = [json.loads(path.read_text()) for path in Path("work/state").glob("*/run.json")]
    assert before == next(run["steps"] for run in runs if run["name"] == "student hard")


def test_a_finished_student_is_done_with_its_top1(taught):
    train_student.run(taught, CPU, "hard")
    row = told()["train-student@hard"]
    metrics = json.loads((student_folder(taught, "hard") / "metrics.json").read_text())
    assert (row.state, row.done, row.top1) == ("done", row.total, metrics["val_top1_mean"])


def test_a_student_of_other_settings_is_of_another_configuration_until_it_is_trained(taught):
    train_student.run(taught, CPU, "hard")
    assert told("student.lr=0.01")["train-student@hard"].state == "outdated"
    train_student.run(loaded("student.lr=0.01"), CPU, "hard")
    assert told("student.lr=0.01")["train-student@hard"].state == "done"
    assert told()["train-student@hard"].state == "outdated"


def test_what_is_published_is_known_by_its_run_alone(taught):
    train_student.run(taught, CPU, "hard")
    (student_folder(taught, "hard") / "curve.csv").unlink()
    (state_of("hard") / "log.jsonl").unlink()
    assert told()["train-student@hard"].state == "done"
    assert told("student.lr=0.01")["train-student@hard"].state == "outdated"


def test_a_student_is_done_though_its_run_was_trained_under_another_name(taught):
    twin = loaded("students=[hard, twin]", "variants.twin={distillation: hard}")
    for name in ("hard", "twin"):
        train_student.run(twin, CPU, name)
    rows = {row.stage: row for row in status.survey(twin, time.time())}
    assert [rows[f"train-student@{name}"].state for name in ("hard", "twin")] == ["done", "done"]


def test_a_student_that_was_trained_online_is_not_the_stored_ones(taught):
    train_student.run(taught, CPU, "hard")
    train_student.run(taught, CPU, "hard", teacher="online")
    assert told()["train-student@hard"].state == "outdated"


def test_online_training_is_not_taken_for_the_stored_ones(taught):
    train_student.run(taught, CPU, "hard-online", taught.student_named("hard"), "online")
    assert told()["train-student@hard"].state == "not begun"


def test_an_evaluation_of_other_students_is_of_another_configuration(taught):
    folder = Path("outputs/small/evaluation")
    folder.mkdir()
    models = ("teacher", *taught.students, "hard-finetuned")
    (folder / "metrics.json").write_text(json.dumps({name: {"class": {"top1": 0.5}} for name in models}))
    (folder / "table.txt").write_text("")
    row = told()["evaluate"]
    assert (row.state, row.done, row.top1) == ("done", 5, 0.5)
    assert told("students=[hard]")["evaluate"].state == "outdated"


def evaluated(*overrides: str) -> status.Row:
    return told("students=[hard]", "finetune.from=[]", *overrides)["evaluate"]


def test_an_evaluation_is_done_until_a_model_is_trained_again(taught):
    options = "students=[hard]", "finetune.from=[]"
    train_student.run(loaded(*options), CPU, "hard")
    evaluate.run(loaded(*options), CPU)
    assert evaluated().state == "done"
    assert evaluated("student.lr=0.01").state == "outdated"
    train_student.run(loaded(*options, "student.lr=0.01"), CPU, "hard")
    assert told(*options, "student.lr=0.01")["train-student@hard"].state == "done"
    assert evaluated("student.lr=0.01").state == "outdated"
    evaluate.run(loaded(*options, "student.lr=0.01"), CPU)
    assert evaluated("student.lr=0.01").state == "done"
    shutil.rmtree("work")
    assert evaluated("student.lr=0.01").state == "done"
    shutil.rmtree(student_folder(taught, "hard"))
    assert evaluated("student.lr=0.01").state == "outdated"


def test_an_evaluation_names_the_runs_and_weights_of_its_models(taught):
    options = "students=[hard]", "finetune.from=[]"
    train_student.run(loaded(*options), CPU, "hard")
    evaluate.run(loaded(*options), CPU)
    metrics = json.loads(Path("outputs/small/evaluation/metrics.json").read_text())
    teachers = json.loads(Path("outputs/small/teacher/metrics.json").read_text())
    students = json.loads((student_folder(taught, "hard") / "metrics.json").read_text())
    assert (metrics["teacher"]["run"], metrics["teacher"]["weights"]) == (teachers["run"], teachers["weights"])
    assert metrics["hard"]["run"] == students["run"]
    assert metrics["hard"]["validation"] == students["validation"]


def test_a_stage_that_failed_says_over_what_until_it_ends_well(taught):
    said = CliRunner().invoke(main, ["train-student", "--device", "cpu", "--student", "hard", "--set", "student.lr=1e30"])
    assert said.exit_code == 1
    row = told("student.lr=1e30")["train-student@hard"]
    what, _, rest = row.note.partition(": expected ")
    assert row.state == "failed" and what in said.output and rest.partition(", found ")[0] in said.output
    assert told()["train-student@hard"].state != "failed"  # with other settings nothing has failed
    assert CliRunner().invoke(main, ["train-student", "--device", "cpu", "--student", "hard"]).exit_code == 0
    assert told()["train-student@hard"].state == "done"


def test_a_command_for_all_students_that_fails_says_nothing_of_those_that_are_done(taught):
    change = "students=[hard, late]", "variants.late={distillation: hard, lr: 1e30}"
    arguments = [text for each in change for text in ("--set", each)]
    assert CliRunner().invoke(main, ["train-student", "--device", "cpu", *arguments]).exit_code == 1
    rows = told(*change)
    assert (rows["train-student@hard"].state, rows["train-student@late"].state) == ("done", "failed")


def test_a_stage_that_fails_before_its_first_file_has_failed(taught):
    shutil.rmtree("outputs/small/students", ignore_errors=True)
    Path("outputs/small/teacher-logits/manifest.json").write_text("damaged")
    assert CliRunner().invoke(main, ["train-student", "--device", "cpu", "--student", "hard"]).exit_code == 1
    row = told()["train-student@hard"]
    assert (row.state, row.done) == ("failed", 0) and "manifest.json" in row.note


def test_a_stage_whose_input_does_not_exist_yet_has_not_failed(taught):
    Path("outputs/small/teacher-logits/manifest.json").unlink()
    assert CliRunner().invoke(main, ["train-student", "--device", "cpu", "--student", "hard"]).exit_code == 1
    assert told()["train-student@hard"].state != "failed"


def test_a_misspelled_student_is_no_failure_of_a_stage(taught):
    assert CliRunner().invoke(main, ["train-student", "--device", "cpu", "--student", "hrad"]).exit_code == 2
    assert not list(Path("outputs/small/failed").glob("*hrad*"))


def test_of_an_evaluation_the_best_student_is_quoted():
    entries = [{"mean": {"top1": 0.6}, "class": {"top1": 0.9}}, {"class": {"top1": 0.8}}, None, {"class": {}}]
    assert best_top1(entries) == 0.8 and best_top1([None]) is None


def test_a_dry_run_that_fails_is_no_failure_of_the_stage(taught):
    index_path(taught, "train").write_text("damaged")
    assert CliRunner().invoke(main, ["train-student", "--device", "cpu", "--dry-run"]).exit_code == 1
    assert told()["train-student@hard"].state == "not begun"


def test_a_student_of_another_teacher_s_answers_is_not_done(taught):
    train_student.run(taught, CPU, "hard")
    manifest = Path("outputs/small/teacher-logits/manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"fingerprint": "0" * 32}))
    assert told()["train-student@hard"].state == "outdated"


def test_another_configuration_s_shards_are_not_borrowed(taught):
    row = told("name=other")["prepare"]
    assert (row.state, row.done) == ("not begun", 0)


def test_another_teacher_s_store_is_not_borrowed(taught):
    shutil.rmtree("outputs/small/teacher")
    shutil.rmtree("outputs/small/teacher-logits")
    assert told()["teacher-logits"].state == "stopped"
    assert told("teacher.model=regnety_004")["teacher-logits"].state == "not begun"


def test_files_that_are_cut_short_are_no_error(taught, monkeypatch):
    stop_at(5, monkeypatch)
    for root in ("outputs", "work"):
        for path in [path for path in Path(root).rglob("*") if path.suffix in (".json", ".jsonl", ".csv")]:
            path.write_bytes(path.read_bytes()[:-5])
    assert set(told()) >= {"prepare", "evaluate"}


def test_a_folder_that_cannot_be_read_is_named(taught, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(scan.os, "scandir", forbidden)
    said = CliRunner().invoke(main, ["status"])
    assert said.exit_code == 1 and "Permission denied" in said.output and "work/" in said.output


def test_nothing_is_written(taught, monkeypatch):
    stop_at(5, monkeypatch)
    before = tree(Path("."))
    assert CliRunner().invoke(main, ["status"]).exit_code == 0
    assert tree(Path(".")) == before


def test_json_is_an_array_of_an_object_a_stage(taught):
    said = CliRunner().invoke(main, ["status", "--json"])
    rows = json.loads(said.output)
    assert [row["stage"] for row in rows] == list(told())
    assert len(said.output.splitlines()) == len(rows) + 2


def start(*arguments: str, code: str = "from pipeline.cli.main import main; main()") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, "status", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_watching_ends_well_with_ctrl_c(taught):
    # a shell that starts the tests in its background has them ignore it
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    with start("--watch", "0.1", code=heed + "from pipeline.cli.main import main; main()") as process:
        assert process.stdout.readline() == "small\n"
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")


def test_no_torch_is_loaded(taught):
    code = (
        "import sys; from pipeline.cli.main import main; main(standalone_mode=False)\n"
        "heavy = {'torch', 'timm', 'zarr', 'cv2', 'webdataset'} & set(sys.modules); assert not heavy, heavy"
    )
    said, errors = start(code=code).communicate(timeout=60)
    assert "teacher-logits" in said and errors == ""


def test_prune_keeps_what_status_counts(taught, monkeypatch):
    stop_at(5, monkeypatch)
    assert "0 stores, 0 state folders" in CliRunner().invoke(main, ["prune"]).output
    Path("params.yaml").write_text(dump(loaded("student.lr=0.5")))
    assert "0 stores, 1 state folder" in CliRunner().invoke(main, ["prune"]).output
    assert told()["train-student@hard"].state == "not begun"
