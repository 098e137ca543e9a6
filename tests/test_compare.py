"""`pipeline compare`: finding runs, what differs between them, and equal settings with different results."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_training import CPU, loaded

from pipeline.cli import compare
from pipeline.cli.main import main
from pipeline.common.errors import UsageError
from pipeline.config.params import dump, load_config
from pipeline.config.schema import Config
from pipeline.config.validation import fingerprint, flatten
from pipeline.report.plots import Curve
from pipeline.report.runs import TrainedRun, aligned, differing, differing_settings, remarks
from pipeline.training.identity import configured_runs, is_run_of
from pipeline.training.log import Log, read_log, write_curve
from stages import train_student

ROOT = Path(__file__).parent.parent
DIGITS = load_config(ROOT / "configs/digits.yaml")
ENVIRONMENT = {"device": "cpu", "ranks": 1, "torch": "2.15.0"}


def call(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["compare", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def write_run(
    config: Config, student: str, loss: float = 1.5, top1: float = 0.9, project: Path = Path(), **described
) -> Path:
    """Write what a finished training of two epochs leaves, and return the folder of its weights."""
    settings = configured_runs(config, "index1")[f"train-student@{student}"]
    record = {"name": f"student {student}", "steps": 20, **settings, "dependencies": {"teacher": None}}
    record |= {"environment": ENVIRONMENT} | described
    run = fingerprint([settings, described])
    state, folder = project / config.work / "state" / run, project / "outputs" / config.name / "students" / student
    log = Log(state / "log.jsonl")
    last = {"epoch": 2, "loss": loss, "val_top1_class": top1, "validation": described.get("validation", "images")}
    log.write("epoch", 10, **last | {"epoch": 1, "loss": loss + 1})
    log.write("epoch", 20, **last, speed={"seconds": 3.0})
    (state / "run.json").write_text(json.dumps(record))
    (state / "final.safetensors").touch()
    folder.mkdir(parents=True, exist_ok=True)
    write_curve(folder / "curve.csv", log.path, last)
    (folder / "metrics.json").write_text(json.dumps(last | {"run": run}))
    (project / "outputs" / config.name / "params.yaml").write_text(dump(config))
    return folder


def changed(config: Config = DIGITS, **sections) -> Config:
    updates = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=updates)


# finding runs


def test_a_run_is_found_by_its_folder_its_short_form_its_state_folder_and_what_trackers_call_it(in_tmp):
    folder = write_run(DIGITS, "none")
    run = json.loads((folder / "metrics.json").read_text())["run"]
    state = Path("work/state") / run
    assert compare.find(str(folder)) == compare.find("digits/none") == folder
    assert compare.find(str(state)) == compare.find(f"student-none-{run[:8]}") == compare.find(run) == state


def test_the_name_alone_is_a_student_of_the_experiment_in_params_yaml(in_tmp):
    folder = write_run(DIGITS, "none")
    with pytest.raises(UsageError):
        compare.find("none")
    Path("params.yaml").write_text(dump(DIGITS))
    assert compare.find("none") == folder


def test_a_name_of_no_run_or_of_two_is_refused(in_tmp):
    write_run(DIGITS, "none")
    for name in ("digits/nobody", "digits", "student-none-00000000", "outputs/digits"):
        with pytest.raises(UsageError, match="no metrics.json and no run.json"):
            compare.find(name)
    for end in "01":
        folder = Path("work/state") / (end * 32)
        folder.mkdir()
        (folder.with_name("a" * 8 + end * 24)).mkdir()
    with pytest.raises(UsageError, match="2 runs"):
        compare.find("student-none-aaaaaaaa")


def test_fewer_than_two_different_runs_are_refused(in_tmp):
    write_run(DIGITS, "none")
    for names in ((), ("digits/none",), ("digits/none", "outputs/digits/students/none")):
        assert "two or more different runs" in call(*names, code=2)


# what differs


def test_metrics_stand_side_by_side_and_only_differing_settings_are_listed(in_tmp):
    write_run(DIGITS, "none", loss=1.25, top1=0.9123)
    write_run(changed(student={"lr": 0.5}), "token", top1=0.95)
    lines = [" ".join(line.split()) for line in call("digits/none", "digits/token").splitlines()]
    assert "metric none token" in lines and "loss 1.25 1.5" in lines and "val_top1_class, % 91.23 95.00" in lines
    assert "student.distillation none hard" in lines
    assert any(line.startswith("student.lr ") and line.endswith(" 0.5") for line in lines)
    assert not any(line.startswith(("student.warmup_epochs", "recipe", "index", "name")) for line in lines)
    assert "curves: outputs/comparison.png" in lines


def test_the_keys_of_a_recipe_are_named_if_an_experiment_has_it_and_else_its_fingerprint(in_tmp):
    first, second = (
        write_run(DIGITS, "none"),
        write_run(changed(DIGITS.model_copy(update={"name": "b"}), recipe={"hflip": 0.25}), "none"),
    )
    found = json.loads(call(str(first), str(second), "--json"))
    assert found["differing_settings"] == {"recipe.hflip": [DIGITS.recipe.hflip, 0.25]}
    Path("outputs/b/params.yaml").unlink()
    shown = json.loads(call(str(first), str(second), "--json"))["differing_settings"]
    assert len(shown["recipe"][1]) == 32


def test_an_epoch_of_a_running_training_is_compared_and_said_to_be_unfinished(in_tmp):
    write_run(DIGITS, "none")
    folder = write_run(DIGITS, "hard")
    run = json.loads((folder / "metrics.json").read_text())["run"]
    (Path("work/state") / run / "final.safetensors").unlink()
    assert "not finished, 20 of 20 steps" in call("digits/none", f"work/state/{run}")


def test_a_model_whose_state_is_gone_has_metrics_but_no_known_settings(in_tmp):
    write_run(DIGITS, "none")
    write_run(DIGITS, "hard")
    shutil.rmtree("work")
    said = call("digits/none", "digits/hard")
    assert said.count("its settings are unknown") == 2 and "no setting differs" not in said and "loss" in said


def test_the_evaluation_of_the_same_weights_is_shown_and_that_of_others_is_not(in_tmp):
    folders = write_run(DIGITS, "none"), write_run(DIGITS, "hard")
    run = json.loads((folders[0] / "metrics.json").read_text())["run"]
    Path("outputs/digits/evaluation").mkdir()
    evaluated = {"none": {"run": run, "class": {"top1": 0.5}}, "hard": {"run": "another", "class": {"top1": 0.1}}}
    Path("outputs/digits/evaluation/metrics.json").write_text(json.dumps(evaluated))
    said = [" ".join(line.split()) for line in call("digits/none", "digits/hard").splitlines()]
    assert "evaluation.class.top1, % 50.00 -" in said


def test_an_evaluation_on_other_images_than_the_published_metrics_are_of_is_not_shown(in_tmp):
    folder = write_run(DIGITS, "none")
    published = json.loads((folder / "metrics.json").read_text())
    Path("outputs/digits/evaluation").mkdir()
    for images, shown in (("images", True), ("others", False)):
        evaluated = {"none": {"run": published["run"], "validation": images, "ece": 0.1}}
        Path("outputs/digits/evaluation/metrics.json").write_text(json.dumps(evaluated))
        assert bool(compare.evaluation_of(folder, published)) is shown


def test_the_training_settings_of_a_student_and_of_its_fine_tuning_are_set_side_by_side():
    student = run_of("a", settings={"student.epochs": 3, "student.lr": 1.0, "student.model": "deit"})
    tuned = run_of("a-finetuned", settings={"finetune.epochs": 2, "finetune.lr": 1.0, "finetune.size": 24, "student.model": "deit"})
    assert differing_settings(aligned([student, tuned])) == {"training.epochs": [3, 2], "finetune.size": [None, 24]}
    assert aligned([student, student]) == [student, student]


def test_runs_of_the_same_name_in_two_copies_of_the_project_are_named_after_these(in_tmp):
    folders = [write_run(DIGITS, name, project=Path(project)) for project in ("here", "there") for name in ("none", "hard")]
    assert compare.short_names(folders) == [f"{p}:digits/{name}" for p in ("here", "there") for name in ("none", "hard")]
    assert compare.short_names(folders[:2]) == ["none", "hard"]


# equal settings


def test_equal_settings_with_different_results_are_said_with_what_differs_between_the_machines(in_tmp):
    for name, loss, version in (("here", 1.5, "2.15.0"), ("there", 1.25, "2.11.0")):
        write_run(DIGITS, "none", loss, project=Path(name), environment=ENVIRONMENT | {"torch": version})
    said = call("here/outputs/digits/students/none", "there/outputs/digits/students/none")
    assert "no setting differs" in said
    assert "different results: loss 1.5 and 1.25 (torch 2.15.0 and 2.11.0" in said


def test_equal_settings_with_equal_results_are_said_too(in_tmp):
    for name in ("here", "there"):
        write_run(DIGITS, "none", project=Path(name))
    assert "the same run, equal results" in call(
        "here/outputs/digits/students/none", "there/outputs/digits/students/none"
    )


def run_of(name: str, **changes) -> TrainedRun:
    given = {
        "run": "1",
        "metrics": {"loss": 1.0, "val_top1_class": 0.5},
        "settings": {"lr": 1},
        "environment": {},
        "validation": "a",
    }
    return TrainedRun(name=name, curve=Curve("labels", []), **given | changes)


def test_accuracies_on_other_images_are_no_other_result():
    first, second = run_of("a"), run_of("b", metrics={"loss": 1.0, "val_top1_class": 0.9}, validation="b")
    said = remarks([first, second])
    assert "not comparable" in said[0] and "equal results" in said[1]
    calibrated = [run_of(name, metrics={"evaluation.ece": ece}, validation=name) for name, ece in (("a", 0.1), ("b", 0.2))]
    assert "equal results" in remarks(calibrated)[1]
    assert "different results" in remarks([first, run_of("b", metrics={"loss": 1.0, "val_top1_class": 0.9})])[0]


def test_equal_settings_of_different_fingerprints_are_pointed_out():
    said = remarks([run_of("a"), run_of("b", run="2", metrics={"loss": 2.0})])
    assert "their fingerprints differ" in said[0]


def test_dependencies_that_an_earlier_version_did_not_record_are_no_difference():
    first, second = run_of("a"), run_of("b", settings={"lr": 1, "dependencies.start": "x"})
    assert "equal settings" in remarks([first, run_of("b", run="2", settings=second.settings)])[0]
    assert remarks([run_of("a", settings={"lr": 1, "dependencies.start": "y"}), second]) == []


def test_dependencies_that_one_run_did_not_record_are_still_compared_between_the_others():
    first, second = (run_of(name, settings={"lr": 1, "dependencies.views": views}) for name, views in (("a", 10), ("b", 30)))
    assert differing_settings([first, second, run_of("c")]) == {"dependencies.views": [10, 30, None]}


def test_a_run_that_goes_on_has_no_other_result_yet():
    first, second = (run_of(name, metrics={"epoch": epoch, "loss": 3.0 - epoch}) for name, epoch in (("a", 2), ("b", 1)))
    assert remarks([first, second]) == []


def test_a_missing_value_differs_from_any_other():
    assert differing([flatten({"a": {"b": 1, "c": {}}}), {"a.b": 1}]) == {"a.c": [{}, None]}


# trained for real


def test_trained_students_record_what_compare_shows(taught):
    config = loaded("student.epochs=1", "student.eval_epochs=1")
    for name in ("hard", "none"):
        train_student.run(config, CPU, name)
    found = json.loads(call("small/hard", "small/none", "--json"))
    hard, none = found["runs"]
    assert (
        hard["settings"]["dependencies.teacher.kind"] == "argmax"
        and len(hard["settings"]["dependencies.teacher.units"]) == 32
    )
    assert hard["environment"].keys() >= {"device", "ranks", "torch", "timm"} and hard["environment"]["device"] == "cpu"
    assert found["differing_settings"]["student.distillation"] == ["hard", "none"]
    assert not any(key.startswith("recipe") for key in found["differing_settings"])
    logs = {each["run"]: read_log(Path("work/state") / each["run"] / "log.jsonl")[-1]["loss"] for each in found["runs"]}
    assert [run["metrics"]["loss"] for run in (hard, none)] == [logs[hard["run"]], logs[none["run"]]]
    described = json.loads((Path("work/state") / hard["run"] / "run.json").read_text())
    assert is_run_of(configured_runs(config, described["index"])["train-student@hard"], described)
