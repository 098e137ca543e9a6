"""params.yaml and configs/*.yaml: read, override, write.

`params.yaml` holds a whole configuration; `configs/*.yaml` hold only what differs from the defaults.
A configuration of a stranger is bounded in size, depth and what its aliases expand to, before anything is made of it.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.errors import UsageError
from pipeline.common.files import atomic_write
from pipeline.config.paths import used_params
from pipeline.config.schema import Config
from pipeline.config.validation import short_repr, validate

LARGEST = 100_000
"""Bytes of a configuration; params.yaml has some 4,000."""
DEEPEST = 20
"""Levels of mappings and lists within one another."""
MOST = 20_000
"""Values of a configuration, those that aliases repeat counted each time."""


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


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else id(key_node)
        if key in seen:
            problem = f"the key {short_repr(key_node.value)} stands twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def parse_yaml(text: str, source: str) -> Any:
    """Raises UsageError, with line and column where there are any, if `text` is no YAML or is beyond the bounds."""
    if len(text) > LARGEST:
        raise _unreadable(source, f"more than {LARGEST:,} characters", f"{LARGEST:,} characters at most")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_bombs(node, source)
        return loader.construct_document(node)
    except RecursionError:
        raise _unreadable(source, "more levels", f"at most {DEEPEST} levels of mappings and lists") from None
    # beside YAML's own, what its constructors raise: a date such as 2024-13-45, a list as a key, !!bool x, !!int ""
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, LookupError, AttributeError) as error:
        raise _unreadable(source, " ".join(str(error).split())) from None


def _unreadable(source: str, found: str, expected: str = "") -> UsageError:
    return UsageError(f"{source}: not readable as YAML", expected=expected, found=found, do="mend it")


def _refuse_bombs(root: yaml.Node, source: str) -> None:
    """Count what the nodes expand to before they do: an alias of aliases of aliases is a few bytes, and millions."""
    todo, count = [(root, 1)], 0
    while todo:
        node, depth = todo.pop()
        count += 1
        if depth > DEEPEST:
            raise _unreadable(source, "more levels", f"at most {DEEPEST} levels of mappings and lists")
        if count > MOST:
            raise _unreadable(source, "more, or aliases that expand to more", f"at most {MOST:,} values")
        if isinstance(node, yaml.MappingNode):
            todo += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(part, depth + 1) for part in node.value]


WHOLE = ("kwargs", "variants")  # what a file says of these replaces what was there


def merge(base: dict, over: dict) -> dict:
    """`base` with `over` laid on it, sections recursively; kwargs and variants are replaced whole."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both and key not in WHOLE else value
    return result


def override(values: dict, text: str) -> dict:
    """`values` with one `section.key=value` laid on it; what lies beside the key stays, in kwargs and variants too.

    Raises:
        UsageError: no such form, or a value that is no YAML.
    """
    name, equals, written = text.partition("=")
    keys = name.split(".")
    if not equals or not all(keys) or len(keys) > DEEPEST:
        raise UsageError(
            f"override {short_repr(text)}", expected="section.key=value", do="for example student.lr=1e-3"
        )
    return _placed(values, keys, parse_yaml(written, f"override {name}"))


def _placed(values: dict, keys: list[str], value: Any) -> dict:
    first, *rest = keys
    here = values.get(first)
    if rest:
        inner = here if isinstance(here, dict) else {}
        return {**values, first: _placed(inner, rest, value)}
    return merge(values, {first: value})


def load(path: str | Path = "params.yaml", overrides: tuple[str, ...] = ()) -> Config:
    """The configuration in a file, `section.key=value` overrides laid on it.

    Raises:
        UsageError: missing file, no YAML, unknown key, wrong type, impossible combination.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            text = file.read(4 * LARGEST + 1).decode()  # a character has four bytes at most; /dev/zero has no end
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(
            f"{path}: the configuration cannot be read",
            expected="a text file such as params.yaml or one of configs/",
            found=getattr(error, "strerror", None) or str(error),
            do="name it with --config, or write one: pipeline configure digits",
        ) from None
    return resolve(parse_yaml(text, str(path)), overrides, str(path))


def resolve(values: Any, overrides: tuple[str, ...], source: str) -> Config:
    """The defaults with `values` and `overrides` laid on them, validated; a refusal says which of them it is about."""
    if values is not None and not isinstance(values, dict):
        raise UsageError(source, expected="a mapping of sections", found=type(values).__name__)
    written = merge({"variants": Config().variants}, values or {})
    final = written
    for text in overrides:
        final = override(final, text)
    try:
        return validate(Config, final, source)
    except UsageError:
        if not overrides:
            raise
        validate(Config, written, source)  # then it is the file's own
    return validate(Config, final, f"command line ({' '.join(overrides)})")


def dump(config: Config) -> str:
    """The whole configuration as YAML; `resolve(parse_yaml(dump(c)))` is c again."""
    values = config.model_dump(mode="json", by_alias=True)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def record(config: Config) -> None:
    """Leave the configuration beside its outputs, so that `pipeline prune` knows it when params.yaml is another's."""
    path, text = used_params(config), dump(config)
    if not path.exists() or path.read_bytes() != text.encode():
        with atomic_write(path) as temporary:
            temporary.write_text(text)
