"""`pipeline configure`: writes the complete configuration of an experiment to params.yaml."""

from pathlib import Path

from tabulate import tabulate

from pipeline.common.errors import UsageError
from pipeline.config.params import dump, load

CONFIGS = Path("configs")
STUDIES = CONFIGS / "studies"
KEYS = "# What the keys mean: docs/configuration.md\n"


def run(name: str, overrides: tuple[str, ...], output: Path) -> None:
    """Write the defaults with the changes of configs/`name`.yaml, or of a YAML file, and then the overrides.

    Raises:
        UsageError: there is no such experiment, or a key or value is invalid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(experiments()))
        raise UsageError(f"configuration {name!r}", expected=f"one of {known}", found=f"no {path}", do="correct the name")
    config = load(path, overrides)
    command = " ".join(["pipeline configure", name, *overrides])
    output.write_text(f"# Written by: {command}\n{KEYS}" + dump(config))
    print(f"{output}: {config.name}; now run: dvc repro")


def experiments() -> dict[str, Path]:
    """The experiments in configs/ by name; a study is none."""
    files = [path for path in CONFIGS.rglob("*.yaml") if STUDIES not in path.parents]
    return dict(sorted((str(path.relative_to(CONFIGS).with_suffix("")), path) for path in files))


def list_experiments() -> None:
    """Print each experiment's name and the first line of its file, a comment that says what it is."""
    rows = [(name, path.read_text().partition("\n")[0].removeprefix("# ")) for name, path in experiments().items()]
    print(tabulate(rows, tablefmt="plain"))
