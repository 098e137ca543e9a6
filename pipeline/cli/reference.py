"""docs/configuration.md: every configuration key with its type, default and meaning, read from the code.

Written by `python -m pipeline.cli.reference > docs/configuration.md`.
"""

import inspect
import json
from typing import Any

from pipeline.config.schema import Config, Teacher, Training
from pipeline.config.training_sections import TeacherMember
from pipeline.config.validation import Section

INTRODUCTION = """# Configuration keys

<!-- Written by `python -m pipeline.cli.reference > docs/configuration.md`; the text is in pipeline/config/. -->

A file in `configs/` has the keys that differ from the defaults, which are the paper's. `pipeline configure NAME
section.key=value` and `pipeline init` write `params.yaml` with a value for every key, and `--set section.key=value`
overrides a key for one command.
"""
HEADER = "| key | type | default | meaning |\n| --- | --- | --- | --- |\n"


def reference() -> str:
    """The complete page, in Markdown."""
    sections: dict[str, type[Section]] = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Section)
    }
    trained = [name for name, section in sections.items() if issubclass(section, Training)]
    parts = [INTRODUCTION, _part("Top level", Config, exclude=set(sections))]
    for name, section in sections.items():
        if name == trained[0]:
            users = ", ".join(f"`{user}`" for user in trained)
            note = f"These keys are in each of {users}, whose own defaults and additional keys are below."
            parts.append(_part("Training", Training, note))
        note = "Also the keys of [Training](#training), with these changes and additions:" * (name in trained)
        parts.append(_part(f"`{name}`", section, note, inherited=Training if name in trained else None))
        if section is Teacher:
            parts.append(_part("`teacher.ensemble`", TeacherMember))
    return "\n".join(parts)


def _part(
    heading: str,
    section: type[Section],
    note: str = "",
    exclude: set[str] | None = None,
    inherited: type[Section] | None = None,
) -> str:
    """A heading, the section's docstring and a table of its keys: only those that differ from `inherited`."""
    keys, base = _keys(section), _keys(inherited) if inherited else {}
    rows = []
    for key, found in keys.items():
        was = base.get(key, {})
        if key in (exclude or ()) or _same(found, was):
            continue
        meaning = found.get("description") or was.get("description", "")
        default = f"`{json.dumps(found['default'], ensure_ascii=False)}`" if "default" in found else "required"
        cells = (f"`{key}`", describe_type(found), default, " ".join(meaning.split()))
        rows.append("| " + " | ".join(_escape(cell) for cell in cells) + " |\n")
    text = inspect.cleandoc(section.__doc__ or "")
    return f"## {heading}\n\n{text}\n\n" + f"{note}\n\n" * bool(note) + HEADER + "".join(rows)


def _escape(text: str) -> str:
    """Text as a cell of a table: outside code, GitHub would read <name> as HTML."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def _keys(section: type[Section]) -> dict[str, dict[str, Any]]:
    return section.model_json_schema(by_alias=True)["properties"]


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(first.get(key) == second.get(key) for key in (first.keys() | second.keys()) - {"description", "title"})


def describe_type(schema: dict[str, Any]) -> str:
    """The type and range of a value in words, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(describe_type(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kind: str = schema.get("type", "any")
    if kind == "array":
        if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} numbers"
        items = schema["items"]
        return f"list of {items.get('type', 'mapping')}s{_range(items)}"
    if kind in ("integer", "number"):
        return kind + _range(schema)
    return {"object": "mapping"}.get(kind, kind)


def _range(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low == -(2**63):
        limits = ["64 bits"]
    elif low is not None and high is not None:
        limits = [f"{low:,} to {high:,}"]
    else:
        words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
        limits = [f"{word} {schema[key]:,}" for key, word in words.items() if key in schema]
    if "multipleOf" in schema:
        limits.append(f"a multiple of {schema['multipleOf']}")
    return f" ({', '.join(limits)})" if limits else ""


if __name__ == "__main__":
    print(reference(), end="")
