"""The rules of the layout: who imports whom, what DVC depends on, what `--help` may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config.schema import Config

ROOT = Path(__file__).parent.parent

# A package imports only packages listed above it; stages stand between `report` and `cli`.
ORDER = ("common", "config", "shards", "views", "batches", "models", "store", "training", "api", "report", "cli")

MAX_MODULE, MAX_FUNCTION = 300, 50  # lines

STAGE_MODULES = {
    "prepare": "prepare",
    "needed": "needed",
    "teacher": "teacher",
    "teacher-logits": "teacher_logits",
    "train-student": "train_student",
    "teacher-finetune": "teacher",
    "teacher-logits-finetune": "teacher_logits",
    "finetune": "finetune",
    "evaluate": "evaluate",
}


def imports(path: Path) -> set[Path]:
    """Modules of the project that a module imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
                file = ROOT / (name.replace(".", "/") + ".py")
                if name.split(".")[0] in ("pipeline", "stages") and file.exists():
                    found.add(file)
    return found


def closure(path: Path) -> set[Path]:
    """A module with all that it imports, directly or not."""
    seen, todo = {path}, [path]
    while todo:
        new = imports(todo.pop()) - seen
        seen |= new
        todo += new
    return seen


def package(file: Path) -> str:
    """pipeline/PACKAGE, or the file itself where it is of none."""
    parts = file.relative_to(ROOT).parts
    return "/".join(parts[:2])


def stages() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("name", ORDER)
def test_a_package_imports_only_packages_listed_above_it(name):
    allowed = {f"pipeline/{above}" for above in ORDER[: ORDER.index(name) + 1]}
    files = (ROOT / "pipeline" / name).glob("*.py")
    imported = {package(file) for path in files for file in imports(path)}
    stages = {file for file in imported if file.startswith("stages/")}
    assert imported - stages <= allowed
    assert not stages or name == "cli"


@pytest.mark.parametrize("stage", STAGE_MODULES.values())
def test_a_stage_imports_nothing_of_the_command_line(stage):
    assert "pipeline/cli" not in {package(file) for file in imports(ROOT / f"stages/{stage}.py")}


def test_every_package_has_its_place_in_the_order_and_says_what_it_is_for():
    packages = {path.parent.name: path for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert packages.keys() == set(ORDER)
    for path in packages.values():
        body = ast.parse(path.read_text()).body
        assert len(body) == 1 and ast.get_docstring(ast.parse(path.read_text())), path


def test_every_module_is_in_a_package():
    assert {path.name for path in (ROOT / "pipeline").glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("stage", STAGE_MODULES)
def test_a_stage_depends_on_the_packages_that_it_imports_from(stage):
    declared = {dep for dep in stages()[stage]["deps"] if dep.startswith(("pipeline/", "stages/"))}
    assert declared == {package(file) for file in closure(ROOT / f"stages/{STAGE_MODULES[stage]}.py")}


def test_every_stage_of_dvc_is_covered():
    assert set(stages()) == set(STAGE_MODULES)


def test_dvc_names_only_parameters_that_the_configuration_has():
    values = Config().model_dump(by_alias=True)
    for stage in stages().values():
        for key in stage["params"]:
            here = values
            for part in key.split("."):
                if part.startswith("${"):
                    break
                assert part in here, key
                here = here[part]


def test_help_loads_no_torch():
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli.main import main\n"
        "for command in ['', *main.commands]:\n"
        "    assert CliRunner().invoke(main, [*command.split(), '--help']).exit_code == 0\n"
        "heavy = {'torch', 'timm', 'zarr', 'cv2', 'webdataset', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_params_yaml_is_the_digits_experiment():
    from pipeline.config.params import dump, load_config

    _, written = (ROOT / "params.yaml").read_text().split(" is changed: ")
    _, _, written = written.partition("\n")
    assert written == dump(load_config(ROOT / "configs/digits.yaml"))


def test_every_command_teaches_with_an_example():
    from pipeline.cli.main import main

    commands = {**main.commands, **main.commands["store"].commands}
    for name, command in commands.items():
        assert "Example" in command.help, name


def test_no_tracked_file_is_large():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    large = [name for name in listed.stdout.split("\0") if name and (ROOT / name).stat().st_size > 1_000_000]
    assert not large


def test_modules_and_functions_stay_short_enough_to_read_at_once():
    long = []
    for path in sorted(path for folder in ("pipeline", "stages", "bench") for path in (ROOT / folder).rglob("*.py")):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if (lines := len(text.splitlines())) > MAX_MODULE:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    long.append(f"{name}, {node.name}: {lines} lines")
    assert long == []
