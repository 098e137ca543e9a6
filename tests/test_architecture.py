"""The rules of the layout: who imports whom, what DVC depends on, what `--help` may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config import Config
from pipeline.params import parse_yaml

ROOT = Path(__file__).parent.parent

# A module imports only modules listed above it.
ORDER = (
    "errors", "bars", "cores", "files", "contents", "signals", "lock", "lease", "strict", "policies", "config", "layout", "params",
    "recipe", "ops", "views", "tar", "shards", "sources", "plan", "sealed", "answers", "store_files", "store",
    "store_writer", "audit", "pool", "groups", "loader", "linear", "compiling", "weights", "models", "teaching", "losses",
    "optim", "checkpoint", "ranks", "evaluation", "arithmetic", "runlog", "meters", "run", "training", "completion",
    "contact_sheet", "plots", "report", "glance", "failures", "progress", "options", "cli_store", "cli",
)  # fmt: skip

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
    """Modules of the project that a module imports at its top level."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
                file = ROOT / (name.replace(".", "/") + ".py")
                if name.split(".")[0] in ("pipeline", "stages") and file.exists():
                    found.add(file)
    return found


def closure(path: Path) -> set[str]:
    seen, todo = {path}, [path]
    while todo:
        new = imports(todo.pop()) - seen
        seen |= new
        todo += new
    return {str(file.relative_to(ROOT)) for file in seen}


def stages() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_modules_listed_above_it(name):
    below = {f"pipeline/{later}.py" for later in ORDER[ORDER.index(name) :]}
    direct = {str(file.relative_to(ROOT)) for file in imports(ROOT / f"pipeline/{name}.py")}
    assert not direct & below
    assert not any(file.startswith("stages/") for file in direct)


def test_every_module_has_its_place_in_the_order():
    assert {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__", "__main__"} == set(ORDER)


@pytest.mark.parametrize("stage", STAGE_MODULES)
def test_a_stage_depends_on_the_exact_closure_of_its_imports(stage):
    declared = {dep for dep in stages()[stage]["deps"] if dep.endswith(".py")}
    assert declared == closure(ROOT / f"stages/{STAGE_MODULES[stage]}.py")


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
        "import sys; from click.testing import CliRunner; from pipeline.cli import main\n"
        "for command in ['', *main.commands]:\n"
        "    assert CliRunner().invoke(main, [*command.split(), '--help']).exit_code == 0\n"
        "heavy = {'torch', 'timm', 'zarr', 'cv2', 'webdataset', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_params_yaml_is_the_digits_experiment():
    written, experiment = (parse_yaml((ROOT / p).read_text(), p) for p in ("params.yaml", "configs/digits.yaml"))
    from pipeline.params import resolve

    assert resolve(written, (), "params.yaml") == resolve(experiment, (), "digits")


def test_every_command_teaches_with_an_example():
    from pipeline.cli import main

    for name, command in main.commands.items():
        assert "Example" in command.help, name


def test_no_tracked_file_is_large():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    large = [name for name in listed.stdout.split("\0") if name and (ROOT / name).stat().st_size > 1_000_000]
    assert not large
