"""Reading, overriding and writing params.yaml and configs/*.yaml.

`params.yaml` holds a complete configuration; `configs/*.yaml` hold only what differs from the defaults. Before any
object is built, the size, the depth and the expansion of aliases are checked, since a file may be hostile.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.errors import UsageError, reason
from pipeline.common.files import write_if_changed
from pipeline.config.paths import recorded_params
from pipeline.config.schema import Config
from pipeline.config.validation import short_repr, validate

MAX_CHARACTERS = 100_000
"""Longest configuration; params.yaml has about 4,000 characters."""
MAX_DEPTH = 20
"""Levels of nested mappings and lists."""
MAX_VALUES = 20_000
"""Values of a configuration, counting each use of an alias."""


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2 floats (5e-4 is a number) and refuses duplicate keys."""


class _Dumper(yaml.SafeDumper):
    """Quotes strings that the loader would read as numbers."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
        list("-+0123456789."),
    )


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else id(key_node)
        if key in seen:
            problem = f"duplicate key {short_repr(key_node.value)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML into plain values.

    Raises:
        UsageError: not valid YAML, with line and column where they are known; too long, too deep or too many values.
    """
    if len(text) > MAX_CHARACTERS:
        raise _unreadable(source, f"more than {MAX_CHARACTERS:,} characters", f"{MAX_CHARACTERS:,} characters at most")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, source)
        return loader.construct_document(node)
    except RecursionError:
        raise _unreadable(source, "deeper nesting", f"at most {MAX_DEPTH} levels of mappings and lists") from None
    # besides YAMLError, its constructors raise these: a date such as 2024-13-45, a list as a key, !!bool x, !!int ""
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, LookupError, AttributeError) as error:
        raise _unreadable(source, " ".join(str(error).split())) from None


def _unreadable(source: str, found: str, expected: str = "") -> UsageError:
    return UsageError(f"{source}: invalid YAML", expected=expected, found=found, do="correct it")


def _check_size(root: yaml.Node, source: str) -> None:
    """Count values before aliases are expanded: a few bytes of nested aliases can expand to millions of values."""
    todo, count = [(root, 1)], 0
    while todo:
        node, depth = todo.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise _unreadable(source, "deeper nesting", f"at most {MAX_DEPTH} levels of mappings and lists")
        if count > MAX_VALUES:
            raise _unreadable(source, "more values, aliases included", f"at most {MAX_VALUES:,} values")
        if isinstance(node, yaml.MappingNode):
            todo += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(child, depth + 1) for child in node.value]


REPLACED = ("kwargs", "variants")  # never merged: their value in a file replaces the default


def merge(base: dict, over: dict) -> dict:
    """`base` updated with `over`, section by section; kwargs and variants are replaced, not merged."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both and key not in REPLACED else value
    return result


def override(values: dict, text: str) -> dict:
    """`values` with one `section.key=value` override; all other keys stay, in kwargs and variants too.

    Raises:
        UsageError: not of that form, or the value is not valid YAML.
    """
    name, equals, written = text.partition("=")
    keys = name.split(".")
    if not equals or not all(keys) or len(keys) > MAX_DEPTH:
        raise UsageError(
            f"override {short_repr(text)}", expected="section.key=value", do="for example student.lr=1e-3"
        )
    return _set(values, keys, parse_yaml(written, f"override {name}"))


def override_key(values: dict, name: str, value: Any) -> dict:
    """`values` with one key, `section.key`, set to a value; all other keys stay, in kwargs and variants too.

    Raises:
        UsageError: the name is not of that form.
    """
    keys = name.split(".")
    if not all(keys) or len(keys) > MAX_DEPTH:
        raise UsageError(f"key {short_repr(name)}", expected="section.key", do="for example student.lr")
    return _set(values, keys, value)


def _set(values: dict, keys: list[str], value: Any) -> dict:
    first, *rest = keys
    here = values.get(first)
    if rest:
        inner = here if isinstance(here, dict) else {}
        return {**values, first: _set(inner, rest, value)}
    return merge(values, {first: value})


def read_text(path: str | Path) -> str:
    """The text of a configuration file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(4 * MAX_CHARACTERS + 1).decode()  # at most four bytes per character; /dev/zero never ends
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(
            f"{path}: the configuration cannot be read",
            expected="a text file such as params.yaml or a file in configs/",
            found=reason(error),
            do="choose it with --config, or write one: pipeline configure digits",
        ) from None


def load_config(path: str | Path = "params.yaml", overrides: tuple[str, ...] = ()) -> Config:
    """Load a configuration file and apply `section.key=value` overrides.

    Raises:
        UsageError: missing file, invalid YAML, unknown key, wrong type, conflicting settings.
    """
    return resolve(parse_yaml(read_text(path), str(path)), overrides, str(path))


def resolve(values: Any, overrides: tuple[str, ...], source: str) -> Config:
    """The defaults updated with `values` and `overrides`, validated; errors name the file or the command line."""
    if values is not None and not isinstance(values, dict):
        raise UsageError(source, expected="a mapping of sections", found=short_repr(values), do="correct the file")
    written = merge({"variants": Config().variants}, values or {})
    final = written
    for text in overrides:
        final = override(final, text)
    try:
        return validate(Config, final, source)
    except UsageError:
        if not overrides:
            raise
        validate(Config, written, source)  # raises if the mistake is in the file
    return validate(Config, final, f"command line ({' '.join(overrides)})")


def dump(config: Config) -> str:
    """The complete configuration as YAML; `resolve(parse_yaml(dump(c)))` equals c."""
    values = config.model_dump(mode="json", by_alias=True)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=88)


def dump_key(key: str, value: Any) -> str:
    """One key with its value, as lines of YAML."""
    style = None if isinstance(value, dict | list) else False
    return yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, default_flow_style=style, width=88)


def record_config(config: Config) -> None:
    """Save the configuration with its outputs, so that `pipeline prune` knows it when params.yaml has changed."""
    write_if_changed(recorded_params(config), dump(config))
