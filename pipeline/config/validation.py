"""Strict, immutable settings: their validation, with errors that name the key, and fingerprints."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.common.errors import UsageError

MAX_REPR = 120  # characters of a value in a message


class Section(BaseModel):
    """A group of settings: immutable, without type coercion, unknown keys or infinite numbers."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        populate_by_name=True,
        allow_inf_nan=False,
    )


def fingerprint(value: Any) -> str:
    """128-bit BLAKE2b, in hex, of the canonical JSON of a value: sorted keys, no spaces, floats by repr."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", by_alias=True)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def differences(was: Any, now: Any, key: str = "") -> list[str]:
    """List `key: was, now` for each leaf in which two JSON values differ; a missing key counts as null."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        return [line for k in keys for line in differences(was.get(k), now.get(k), f"{key}.{k}" if key else k)]
    return [] if was == now else [f"{key}: {json.dumps(was)}, {json.dumps(now)}"]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with their keys joined by dots; an empty one is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def validate(kind: type[Section], values: Any, source: str = "", section: str = "") -> Any:
    """Build a section from plain values.

    Raises:
        UsageError: invalid values; names the full key and, for an unknown one, the most similar valid key.
    """
    try:
        return kind.model_validate(values)
    except UsageError as error:  # raised by a nested validation, of a variant
        raise UsageError(f"{source}: {error}" if source else str(error)) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join([section] * bool(section) + location)
    where = ": ".join(part for part in (source, key) if part)
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(kind, location)
        similar = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.4)
        hint = f"did you mean {similar[0]}? " if similar else ""
        raise UsageError(
            where,
            expected=f"{hint}valid keys: {', '.join(sorted(valid))}",
            found=f"an unknown key, {location[-1]}",
            do="correct the key or remove it",
        )
    if first["type"] == "value_error":
        problem = first.get("ctx", {}).get("error", first["msg"])
        raise UsageError(where, expected=str(problem), found=getattr(problem, "found", ""), do="change it")
    raise UsageError(
        where,
        expected=first["msg"].removeprefix("Input should be "),
        found=f"{short_repr(first['input'])} ({type(first['input']).__name__})",
        do="correct the value",
    )


def short_repr(value: Any) -> str:
    """A value's repr for a message, truncated if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python refuses to print integers of more than 4,300 digits
        return "a value too large to print"
    return text if len(text) <= MAX_REPR else f"{text[:MAX_REPR]}..."


def _valid_keys(kind: type[BaseModel], location: list[str]) -> list[str]:
    """The keys of the section that contains `location`."""
    for part in location[:-1]:
        if part.isdigit():
            continue  # an item of the list
        by_name = {(field.alias or name): field for name, field in kind.model_fields.items()}
        annotation = by_name[part].annotation
        kind = cast(type[BaseModel], next(iter(get_args(annotation)), annotation))
    return [field.alias or name for name, field in kind.model_fields.items()]
