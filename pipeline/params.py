"""params.yaml and configs/*.yaml: read, override, write.

`params.yaml` holds a whole configuration; `configs/*.yaml` hold only what differs from the defaults.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.strict import validate


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (5e-4 is a number) and no duplicate keys."""


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
        list("-+0123456789."),
    )


def _unique_mapping(loader, node, deep=False):
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def parse_yaml(text: str, source: str) -> Any:
    """Raises UsageError with line and column where `text` is no YAML."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        raise UsageError(f"{source}: not readable as YAML", found=" ".join(str(error).split()), do="mend it") from None


def merge(base: dict, over: dict) -> dict:
    """`base` with `over` laid on it, sections recursively; kwargs and variants are replaced whole."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both and key not in ("kwargs", "variants") else value
    return result


def load(path: str | Path = "params.yaml", overrides: tuple[str, ...] = ()) -> Config:
    """The configuration in a file, `section.key=value` overrides laid on it.

    Raises:
        UsageError: missing file, no YAML, unknown key, wrong type, impossible combination.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: the configuration cannot be read",
            expected="a text file such as params.yaml or one of configs/",
            found=getattr(error, "strerror", None) or str(error),
            do="name it with --config, or write one: pipeline configure digits",
        ) from None
    return resolve(parse_yaml(text, str(path)), overrides, str(path))


def resolve(values: Any, overrides: tuple[str, ...], source: str) -> Config:
    """The defaults with `values` and `overrides` laid on them, validated."""
    if values is not None and not isinstance(values, dict):
        raise UsageError(source, expected="a mapping of sections", found=type(values).__name__)
    values = merge({"variants": Config().variants}, values or {})
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {override}", expected="section.key=value", do="for example student.lr=1e-3")
        value = parse_yaml(text, f"--set {override}")
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return validate(Config, values, source)


def dump(config: Config) -> str:
    """The whole configuration as YAML; `resolve(parse_yaml(dump(c)))` is c again."""
    values = config.model_dump(mode="json", by_alias=True)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)
