"""`pipeline configure`: writes the complete configuration of an experiment to params.yaml."""

from pathlib import Path

from pipeline.common.errors import UsageError
from pipeline.config.params import dump, load

CONFIGS = Path("configs")


def run(name: str, overrides: tuple[str, ...], output: Path) -> None:
    """Write the defaults with the changes of configs/`name`.yaml, or of a YAML file, and then the overrides.

    Raises:
        UsageError: there is no such experiment, or a key or value is invalid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.exists():
        known = sorted(str(file.relative_to(CONFIGS).with_suffix("")) for file in CONFIGS.rglob("*.yaml"))
        raise UsageError(f"configuration {name!r}", expected=f"one of {', '.join(known)}", found=f"no {path}")
    config = load(path, overrides)
    command = " ".join(["pipeline configure", name, *overrides])
    header = f"# Written by: {command}\n# What the keys mean: sections.py and training_sections.py in pipeline/config/\n"
    output.write_text(header + dump(config))
    print(f"{output}: {config.name}; now run: dvc repro")
