"""README and docs: their commands run, their examples compute what they say, and what they name exists.

A shell block starts with ```bash. A command in it is run here, or is listed in ELSEWHERE with the place that runs it,
or ends with a comment that says what it needs: `# needs a GPU`. In a job's script that comment has a line of its own
and counts for the whole block.
"""

import re
import shlex
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import write_folders

from pipeline.cli.main import main
from pipeline.config.schema import Config
from pipeline.store.encoding import decode_logits

ROOT = Path(__file__).parent.parent
FILES = {path.name: path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")) if path.name != "BENCHMARKS.md"}
TEXTS = {name: path.read_text() for name, path in FILES.items()}
every_file = pytest.mark.parametrize("name", sorted(FILES))

NEEDS = re.compile(r"# needs (a GPU|\d+ GPUs|a cluster|a network|a browser|the released weights|CIFAR-10)$")
ELSEWHERE = {  # command: a file, and what in it runs the command or makes it work
    "make install": ("Makefile", "demo: install"),
    "make demo": (".ci/run", "make demo"),
    "make lint": (".ci/run", "make lint"),
    "make slow": (".ci/run", "make slow"),
    "make test": (".ci/run", "make test"),
    "source .venv/bin/activate": ("Makefile", "-m venv .venv"),
    "dvc repro": ("tests/test_dag.py", '"dvc", "repro"'),
    "dvc metrics show": ("tests/test_dag.py", '"dvc", "metrics", "show"'),
    "dvc plots show": ("tests/test_dag.py", '"dvc", "plots", "show"'),
    "pipeline study digits-quick run": ("tests/test_study.py", '"study", "tiny.yaml", "run"'),
    "pipeline study --from docs/study": ("tests/test_study_document.py", '"study", "--from", str(RESULTS)'),
    "pipeline compare digits/none digits/token": ("tests/test_compare.py", 'call("digits/none", "digits/token")'),
    "git add params.yaml dvc.lock": ("tests/test_dag.py", '"git", "add", "params.yaml", "dvc.lock"'),
    "git commit -m baseline": ("tests/test_dag.py", '"git", "commit", "-m", "baseline"'),
    "dvc exp run --set-param student.epochs=5": ("tests/test_dag.py", '"dvc", "exp", "run", "--set-param", "student.epochs='),
    "dvc params diff": ("tests/test_dag.py", '"dvc", "params", "diff"'),
    "dvc metrics diff": ("tests/test_dag.py", '"dvc", "metrics", "diff"'),
    "dvc plots diff": ("tests/test_dag.py", '"dvc", "plots", "diff"'),
    "dvc exp show": ("tests/test_dag.py", '"dvc", "exp", "show"'),
    'dvc stage add --name study --always-changed --deps configs/studies/digits-quick.yaml --outs-no-cache outputs/studies/digits-quick "pipeline study digits-quick run && pipeline study digits-quick"': ("tests/test_dag.py", 'line.startswith("dvc stage add")'),
    "dvc repro study": ("tests/test_dag.py", '"dvc", "repro", "study"'),
    "dvc dag": ("tests/test_dag.py", '"dvc", "dag"'),
}


def blocks(name: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXTS[name], re.S | re.M)
    return [block for found, block in fenced if found == language]


def commands(name: str) -> list[str]:
    """The commands of a file's shell blocks, without those that need what a test does not have."""
    found = []
    for block in blocks(name, "bash"):
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        if not any(line.startswith("#") and NEEDS.search(line) for line in lines):
            found += [line.split(" #")[0].strip() for line in lines if line and not NEEDS.search(line)]
    return found


def inline(name: str) -> list[str]:
    """What stands between backticks, in tables and text."""
    text = re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.S | re.M)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]


SMALL = [
    "recipe.size=16", "teacher.model=regnety_002", "teacher.kwargs={depth: 8, output_stride: 8}", "teacher.epochs=1",
    "teacher.precision=float32", "teacher.min_top1=0", "teacher.workers=0", "teacher_logits.workers=0",
    "teacher_logits.views=12", "teacher_logits.precision=float32", "teacher_logits.top_k=2", "data.workers=1",
    "evaluate.workers=0", "finetune.views=12", "student.epochs=1", "student.warmup_epochs=0", "student.workers=0",
]  # fmt: skip


def run(*command: str) -> str:
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, (command, result.output)
    return result.output


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A project as cloned, with images under the names that the docs use, and a small store that holds every kind."""
    root = tmp_path_factory.mktemp("docs") / "project"
    root.mkdir()
    for name in ("configs", "dvc.yaml", "Makefile"):
        (root / name).symlink_to(ROOT / name)
    write_folders(root / "photos/train", {"cat": 3, "dog": 3, "eel": 2})
    write_folders(root / "photos/val", {"cat": 1, "dog": 1, "eel": 1})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        run("configure", "cifar10", "data.train=photos/train", "data.val=photos/val", "name=photos", *SMALL)
        run("prepare")
        run("teacher")
        for kind in ("topk", "dense8", "dense"):
            run("teacher-logits", "--set", f"teacher_logits.kind={kind}")
    return root


@pytest.fixture
def project(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is the current folder."""
    copy = Path(shutil.copytree(prepared, tmp_path / "project", symlinks=True))
    monkeypatch.chdir(copy)
    monkeypatch.setattr("pipeline.cli.durations._seconds", lambda *_: 0.01)
    monkeypatch.setattr("pipeline.cli.init.missing_weights", lambda tag, offline: "no download in tests")
    return copy


@every_file
def test_a_command_is_run_by_a_test_or_says_what_it_needs(name):
    for command in commands(name):
        if not command.startswith("pipeline "):
            assert command in ELSEWHERE, command
            file, text = ELSEWHERE[command]
            assert text in (ROOT / file).read_text(), command


SHELL = [name for name in sorted(FILES) if any("pipeline" in line for line in commands(name))]
TRAINING = {"models.md", "tutorial.md"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in TRAINING)) for name in SHELL])
def test_the_commands_of_the_pipeline_run_in_their_order(name, project):
    small = Path("params.yaml").read_text()
    shutil.copy(next(Path("photos/train").rglob("*.jpg")), "photo.jpg")
    for command in commands(name):
        if command.startswith("pipeline init "):
            shutil.copy(ROOT / "params.yaml", "params.yaml")  # as in a clone; a changed one is not overwritten
        if command.startswith("pipeline ") and command not in ELSEWHERE:
            run(*shlex.split(command)[1:])
        if command == "dvc repro" and name in TRAINING:  # the stages for which the project is not prepared
            Path("params.yaml").write_text(small)
            run("prepare", "--quick")
            run("train-student", "--student", "token")
    if name in TRAINING:
        (example,) = blocks("README.md", "python")
        assert example in blocks("models.md", "python")
        exec(example, {})


@every_file
def test_commands_are_in_blocks_that_are_marked_as_shell(name):
    for block in blocks(name, ""):
        assert not re.search(r"^(make|pipeline|dvc|torchrun|pytest|srun) ", block, re.M), block


def test_the_examples_in_python_read_what_the_store_holds(project):
    found: dict = {}
    for block in blocks("store.md", "python"):
        exec(block, found)
    store, rows, view = found["store"], found["rows"], found["view"]
    for kind in ("dense", "dense8"):
        stored = torch.from_numpy(store[kind][view, rows])
        np.testing.assert_array_equal(found[kind], decode_logits(kind, stored, 3).numpy())
    logits = decode_logits("topk", torch.from_numpy(store["topk"][view, rows]), 3).numpy()
    expected = np.tile(found["others"][:, None], (1, 3))
    np.put_along_axis(expected, found["top_classes"].astype(int), found["top_logits"], 1)
    np.testing.assert_array_equal(logits, expected)
    assert (found["top_classes"][:, 0] == found["argmax"]).all() and (found["dense"].argmax(1) == found["argmax"]).all()
    assert sorted(found["keys"].tolist()) == sorted(found["table"]["key"].tolist()) and len(found["labels"]) == 8
    assert found["histogram"].sum() == 8 and len(found["histogram"]) == 3


def test_the_example_of_another_training_loop_trains(project):
    found: dict = {}
    (block,) = blocks("python.md", "python")
    exec(block, found)
    assert found["batch"].step == 1 and found["loss"].isfinite()


def test_python_stands_where_it_is_run():
    assert {name for name in FILES if blocks(name, "python")} == {"README.md", "store.md", "models.md", "python.md"}


@every_file
def test_a_command_in_the_text_is_a_real_one_with_its_options(name):
    for text in inline(name):
        if not re.match(r"(python -m )?pipeline [a-z]", text):
            continue
        words, command = text.split("pipeline ", 1)[1].split(), main
        while words and isinstance(command, click.Group):
            assert words[0] in command.commands, text
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, text


@every_file
def test_a_target_of_make_exists(name):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join([*commands(name), *inline(name)]), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


@every_file
def test_a_configuration_key_in_the_text_exists(name):
    sections = Config().model_dump(by_alias=True)
    for section, key in re.findall(r"^(\w+)\.(\w+)", "\n".join(inline(name)), re.M):
        if isinstance(sections.get(section), dict) and section != "variants":
            assert key in sections[section], f"{section}.{key}"


@every_file
def test_a_path_that_is_named_exists(name):
    for path in re.findall(r"(?<![\w/.-])(?:pipeline|stages|configs|docs|tests|bench|examples|\.ci)/[\w./-]*", TEXTS[name]):
        assert (ROOT / path.rstrip(".")).exists(), path


@every_file
def test_files_of_slow_tests_have_slow_tests(name):
    for command in inline(name):
        if command.startswith("pytest -m slow"):
            for file in command.split()[3:]:
                assert "mark.slow" in (ROOT / file).read_text(), file


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@every_file
def test_what_is_linked_to_exists(name):
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[name]):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = FILES[name].parent / file if file else FILES[name]
        assert path.exists(), target
        if anchor:
            assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.*)", path.read_text(), re.M)}, target


def test_the_readme_is_short_begins_with_the_two_commands_and_maps_the_packages():
    readme = TEXTS["README.md"]
    assert len(readme.splitlines()) <= 150
    assert commands("README.md")[:2] == ["make demo", "make test"]
    for package in (ROOT / "pipeline").glob("*/__init__.py"):
        assert f"`pipeline/{package.parent.name}`" in readme, package


def test_every_file_in_docs_is_linked_to_from_the_readme():
    for path in (ROOT / "docs").glob("*.*"):
        assert f"docs/{path.name}" in TEXTS["README.md"], path.name


def test_every_picture_of_the_docs_is_shown():
    for path in (ROOT / "docs/images").iterdir():
        assert any(f"images/{path.name})" in text for text in TEXTS.values()), path.name
