"""`pipeline configure`: writes the complete configuration of an experiment to params.yaml."""

from pathlib import Path

from tabulate import tabulate

from pipeline.cli.params_file import refuse_changed, what_next, write_params
from pipeline.common.errors import UsageError
from pipeline.config.params import dump, load_config

CONFIGS = Path("configs")
STUDIES = CONFIGS / "studies"


def run(name: str, overrides: tuple[str, ...], output: Path, force: bool = False) -> None:
    """Write the defaults with the changes of configs/`name`.yaml, or of a YAML file, and then the overrides.

    Raises:
        UsageError: there is no such experiment, a key or value is invalid, or `output` holds changes.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(experiments()))
        raise UsageError(f"configuration {name!r}", expected=f"one of {known}", found=f"no {path}", do="correct the name")
    config = load_config(path, overrides)
    if not force:
        refuse_changed(output, config, experiments().values())
    write_params(output, ["pipeline", "configure", name, *overrides], dump(config))
    print(f"{output}: {config.name}; {what_next(output)}")


def experiments() -> dict[str, Path]:
    """The experiments in configs/ by name; studies are not among them."""
    files = [path for path in CONFIGS.rglob("*.yaml") if STUDIES not in path.parents]
    return dict(sorted((str(path.relative_to(CONFIGS).with_suffix("")), path) for path in files))


def list_experiments() -> None:
    """Print each experiment's name and the first line of its file, a comment that says what it is."""
    rows = [(name, path.read_text().partition("\n")[0].removeprefix("# ")) for name, path in experiments().items()]
    print(tabulate(rows, tablefmt="plain"))
