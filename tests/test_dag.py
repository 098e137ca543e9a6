"""The whole DAG under DVC, on the bundled digits, and what a change runs again."""

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

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

SETTINGS = (
    "name=dag", "recipe.block=2", "teacher.epochs=2", "teacher.warmup_epochs=1", "teacher.min_top1=0",
    "teacher_logits.views=2", "student.kwargs={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}",
    "student.epochs=2", "student.warmup_epochs=1", "students=[none, soft, token]", "finetune.views=2",
    "finetune.epochs=1", "finetune.warmup_epochs=0", "evaluate.throughput_seconds=0.1",
)  # fmt: skip


def environment(project: Path) -> dict[str, str]:
    """With the tests' own `pipeline` and `dvc` first, on the copy's code."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(project)}


def call(project: Path, *command: str, code: int = 0) -> str:
    done = subprocess.run(
        command, cwd=project, env=environment(project), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A fresh copy of the project, reproduced once."""
    root = copy_project(tmp_path_factory.mktemp("dag") / "project")
    call(root, "pipeline", "configure", "digits", *SETTINGS)
    call(root, "dvc", "repro")
    return root


def copy_project(root: Path) -> Path:
    """A fresh copy of the project."""
    root.mkdir()
    for name in ("pipeline", "stages", "configs", "dvc.yaml", ".dvc/config", ".dvcignore", ".gitignore"):
        target = root / name
        target.parent.mkdir(exist_ok=True)
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    call(root, "git", "init", "-q")
    return root


def change(project: Path, **values) -> None:
    """Set `section__key`s of params.yaml."""
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for key, value in values.items():
        *sections, last = key.split("__")
        here = params
        for section in sections:
            here = here[section]
        here[last] = value
    path.write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture
def params(project):
    """params.yaml and dvc.lock as they were, put back afterwards."""
    kept = {name: (project / name).read_bytes() for name in ("params.yaml", "dvc.lock")}
    yield
    for name, data in kept.items():
        (project / name).write_bytes(data)


def would_run(project: Path) -> list[str]:
    """Stages whose own dependencies or parameters changed, and `prepare`."""
    return ran(call(project, "dvc", "repro", "--dry"))


def ran(said: str) -> list[str]:
    return [line.split("'")[1] for line in said.splitlines() if "Running stage" in line]


def computed(said: str) -> list[str]:
    """The stages that ran but `prepare`, which always looks for changed images, and `needed`, which counts students."""
    return [stage for stage in ran(said) if stage not in ("prepare", "needed")]


def test_the_whole_dag_makes_every_output(project):
    folder = project / "outputs/dag/evaluation"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"teacher", "none", "soft", "token", "token-finetuned"}
    assert all((folder / name).stat().st_size > 10_000 for name in ("report.html", "views.png", "curves.png"))


def test_a_second_repro_only_looks_for_changed_images(project):
    assert ran(call(project, "dvc", "repro")) == ["prepare"]


def test_metrics_plots_and_dag_are_shown(project):
    assert "token" in call(project, "dvc", "metrics", "show")
    assert "teacher-logits" in call(project, "dvc", "dag")
    assert "index.html" in call(project, "dvc", "plots", "show")


def test_a_students_learning_rate_runs_students_and_no_teacher(project, params):
    change(project, student__lr=2e-3)
    stages = set(would_run(project))
    assert {"train-student@none", "train-student@soft", "train-student@token", "finetune@token"} <= stages
    assert not {"teacher", "teacher-logits", "teacher-logits-finetune"} & stages


def test_a_further_evaluation_set_runs_the_evaluation_alone(project, params):
    change(project, evaluate__sets={"v2": "elsewhere"})
    assert would_run(project) == ["prepare", "evaluate"]


def test_a_student_added_to_the_list_is_the_only_one_to_run(project, params):
    change(project, students=["none", "soft", "token", "hard"])
    assert computed(call(project, "dvc", "repro")) == ["train-student@hard", "evaluate"]
    assert "hard" in json.loads((project / "outputs/dag/evaluation/metrics.json").read_text())


def test_a_student_removed_from_the_list_leaves_the_report(project, params):
    change(project, students=["soft", "token"])
    assert computed(call(project, "dvc", "repro")) == ["evaluate"]
    assert "none" not in json.loads((project / "outputs/dag/evaluation/metrics.json").read_text())


def test_another_recipe_fills_another_store_and_going_back_computes_nothing(project, params):
    stores = project / "work/stores"
    before = sorted(path.name for path in stores.glob("*.zarr"))
    kept = (project / "params.yaml").read_bytes()
    change(project, recipe__hflip=0.25)
    call(project, "dvc", "repro", "teacher-logits")
    assert len(list(stores.glob("*.zarr"))) == len(before) + 1
    files = {path: path.stat().st_mtime_ns for path in stores.rglob("c/*/*") if path.is_file()}
    (project / "params.yaml").write_bytes(kept)
    said = call(project, "dvc", "repro", "teacher-logits")
    assert "goes on" not in said and "view/s" not in said
    assert files == {path: path.stat().st_mtime_ns for path in stores.rglob("c/*/*") if path.is_file()}


def test_a_killed_repro_goes_on_where_it_was(project, params):
    change(project, student__epochs=3, student__checkpoint_minutes=0.0, students=["token"])
    process = subprocess.Popen(["dvc", "repro"], cwd=project, env=environment(project), start_new_session=True)
    known = set((project / "work/state").glob("*/step-*.ckpt"))
    while process.poll() is None and len(set((project / "work/state").glob("*/step-*.ckpt")) - known) < 2:
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "resumes at step" in call(project, "dvc", "repro")


def test_a_commit_is_compared_with_an_experiment_and_the_files_of_both_are_found(project, params):
    target, key = "train-student@none", "outputs/dag/students/none/metrics.json"
    for setting in ("user.name=tests", "user.email=tests@example.org"):
        call(project, "git", "config", *setting.split("="))
    call(project, "git", "add", "dvc.yaml", ".dvc/config", ".dvcignore", ".gitignore", "pipeline", "stages", "configs")
    call(project, "git", "add", "params.yaml", "dvc.lock")
    call(project, "git", "commit", "-m", "baseline")
    call(project, "dvc", "checkout", "--force")  # earlier tests leave outputs of other parameters
    before = json.loads((project / key).read_text())
    assert ran(call(project, "dvc", "exp", "run", "--set-param", "student.epochs=3", target))[-1] == target
    after = json.loads((project / key).read_text())
    assert json.loads(call(project, "dvc", "params", "diff", "--json"))["params.yaml"] == {
        "student.epochs": {"old": 2, "new": 3, "diff": 1}
    }
    changed = json.loads(call(project, "dvc", "metrics", "diff", "--json"))
    assert changed.keys() == {key} and changed[key]["epoch"] == {"old": 2, "new": 3, "diff": 1}
    assert (changed[key]["loss"]["old"], changed[key]["loss"]["new"]) == (before["loss"], after["loss"])
    assert "index.html" in call(project, "dvc", "plots", "diff")
    page = (project / "dvc_plots/index.html").read_text()
    assert '"rev": "HEAD"' in page and '"rev": "workspace"' in page
    shown = call(project, "dvc", "exp", "show", "--csv")
    assert shown.count(str(after["loss"])) == 2 and str(before["loss"]) in shown  # workspace and experiment; the commit


def test_metrics_that_were_in_no_cache_before_run_nothing_again(tmp_path):
    """dvc.yaml of earlier versions kept metrics and plots out of DVC's cache."""
    call(tmp_path, "git", "init", "-q")
    call(tmp_path, "dvc", "init", "-q")
    stage = {"cmd": "cp in out", "deps": ["in"], "metrics": [{"out": {"cache": False}}]}
    (tmp_path / "in").write_text("{}")
    for metrics in ([{"out": {"cache": False}}], ["out"]):
        (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"stage": stage | {"metrics": metrics}}}))
        said = call(tmp_path, "dvc", "repro")
    assert ran(said) == [] and "didn't change" in said


def test_students_that_listen_to_nobody_pay_for_no_teacher(tmp_path):
    root = copy_project(tmp_path / "alone")
    alone = ("students=[none]", "finetune.from=[none]", "student.epochs=1", "student.warmup_epochs=0")
    call(root, "pipeline", "configure", "digits", *SETTINGS, *alone)
    call(root, "dvc", "repro")
    assert set(json.loads((root / "outputs/dag/evaluation/metrics.json").read_text())) == {"none", "none-finetuned"}
    runs = [json.loads(path.read_text())["name"] for path in (root / "work/state").glob("*/run.json")]
    assert sorted(name.split()[0] for name in runs) == ["finetune", "student"]
    assert not (root / "work/stores").exists()
    assert ran(call(root, "dvc", "repro")) == ["prepare"]


def test_compiled_bytecode_in_a_package_runs_no_stage(tmp_path):
    call(tmp_path, "git", "init", "-q")
    call(tmp_path, "dvc", "init", "-q")
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    (tmp_path / "package").mkdir()
    (tmp_path / "package/module.py").touch()
    (tmp_path / "dvc.yaml").write_text("stages: {stage: {cmd: 'true', deps: [package]}}")
    call(tmp_path, "dvc", "repro")
    (tmp_path / "package/__pycache__").mkdir()
    (tmp_path / "package/__pycache__/module.cpython-311.pyc").write_bytes(b"bytecode")
    assert would_run(tmp_path) == []
    (tmp_path / "package/module.py").write_text("changed = True")
    assert would_run(tmp_path) == ["stage"]


def test_a_study_as_a_stage_is_run_where_it_is_not_done(tmp_path):
    project = copy_project(tmp_path / "project")
    settings = {"student.epochs": 1, "student.warmup_epochs": 0, "student.kwargs": {"patch_size": 8, "embed_dim": 48, "num_heads": 3}}
    matrix = {"base": "digits", "set": settings, "students": ["none"], "metrics": ["top1"]}
    (project / "configs/studies/digits-quick.yaml").write_text(yaml.safe_dump(matrix))
    documented = (ROOT / "docs/experiments.md").read_text()
    (line,) = (line for line in documented.splitlines() if line.startswith("dvc stage add"))
    call(project, "pipeline", "configure", "digits")
    call(project, "bash", "-c", line)
    first, second = call(project, "dvc", "repro", "study"), call(project, "dvc", "repro", "study")
    assert "> pipeline train-student" in first and "> pipeline train-student" not in second
    assert "1 of 1 cell done" in second and (project / "outputs/studies/digits-quick/table.csv").exists()
