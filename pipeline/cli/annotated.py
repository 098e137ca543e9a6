"""A complete params.yaml in which every choice has its reason as a comment."""

import textwrap
from typing import Any

from pipeline.cli.choices import Choices
from pipeline.config.params import dump_key
from pipeline.config.schema import Config

WIDTH = 110
DEFAULTS = "# the defaults"


def annotate(config: Config, choices: Choices) -> str:
    """The configuration as YAML; `resolve(parse_yaml(annotate(c, ...)))` equals c.

    Args:
        choices: by section.key; each section's come first, each below its reason, then its other keys.
    """
    parts = []
    for name, value in config.model_dump(mode="json", by_alias=True).items():
        chosen = {key.partition(".")[2]: choice for key, choice in choices.items() if key.startswith(f"{name}.")}
        if name in choices:
            parts.append(_comment(choices[name].reason, "") + dump_key(name, value))
        elif not chosen:
            parts.append(dump_key(name, value))
        else:
            parts.append(f"{name}:\n" + _section(value, chosen))
    return "".join(parts)


def _section(values: dict[str, Any], chosen: Choices) -> str:
    lines = [_comment(choice.reason, "  ") + _indented(key, values[key]) for key, choice in chosen.items()]
    rest = [_indented(key, value) for key, value in values.items() if key not in chosen]
    return "".join([*lines, f"  {DEFAULTS}\n", *rest] if rest else lines)


def _comment(reason: str, indent: str) -> str:
    return textwrap.fill(reason, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ") + "\n"


def _indented(key: str, value: Any) -> str:
    return textwrap.indent(dump_key(key, value), "  ")
