"""Annotated types of configuration keys, and the checks that pydantic's own constraints cannot express."""

import json
import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from pipeline.config.validation import short_repr

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$"
"""Names of experiments and students: they must work as a folder name and never look like a command-line option."""
CUSTOM_MODEL = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
"""A function that builds a custom model: module, colon, name."""
FORBIDDEN_ARGUMENTS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def check_custom_model(model: str, kwargs: dict[str, Any], tag: str | None) -> None:
    """Check what applies to custom models only.

    Raises:
        ValueError: timm's weights for a custom model, or an argument that is passed anyway.
    """
    if is_custom_model(model) and tag:
        raise InvalidValue("weights in a local file with a custom model", tag)
    if is_custom_model(model) and "num_classes" in kwargs:
        raise InvalidValue("kwargs without num_classes, which is passed anyway", kwargs)


class InvalidValue(ValueError):
    """A value that fails a check: `expected` becomes the message, `found` shows the value."""

    def __init__(self, expected: str, value: Any):
        super().__init__(expected)
        self.found = short_repr(value)


def _check_alpha(value: float) -> float:
    if 0 < value < 0.05:
        raise ValueError(f"0 or at least 0.05, not {value}")
    return value


def _check_arguments(value: dict[str, Any]) -> dict[str, Any]:
    """Accept only what JSON, and so a fingerprint, can represent: no dates, sets, bytes or NaN, only string keys."""
    if FORBIDDEN_ARGUMENTS & value.keys():
        raise InvalidValue(f"no {', '.join(sorted(FORBIDDEN_ARGUMENTS))}: use the key `weights` instead", value)
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise InvalidValue("argument names with plain values: numbers, strings, booleans, null, lists", value)
    return value


def _check_class_map(value: str | list[int] | dict[str, int]) -> str | list[int] | dict[str, int]:
    numbers = list(value.values() if isinstance(value, dict) else value) if not isinstance(value, str) else None
    if numbers is not None and (not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers)):
        raise InvalidValue("different class numbers from 0, at least one", value)
    return value


def _check_set_name(value: str) -> str:
    if value == "real" or not re.fullmatch("[a-z][a-z0-9_]{0,30}", value):
        raise InvalidValue("a name of lower-case letters, digits and _ other than real, such as v2", value)
    return value


def _check_work(value: str) -> str:
    value = _expand_user(value)
    if "::" in value or "%" in value:
        raise InvalidValue("a folder or a URL without :: and %, which have a special meaning in URLs", value)
    scheme, url, _ = value.partition("://")
    if url:
        from fsspec import available_protocols  # takes half the time of `pipeline --help`; only URLs need it

        if scheme not in available_protocols():
            raise InvalidValue("a folder, or a URL with a scheme that fsspec supports, such as s3:// or gs://", value)
    return value


def is_custom_model(model: str) -> bool:
    """Whether it is the dotted path of a function that builds a custom model, not the name of a timm model."""
    return ":" in model


def _check_local_folder(value: str) -> str:
    value = _expand_user(value)
    if "://" in value:
        raise InvalidValue("a local folder", value)
    return value


def _check_model(value: str) -> str:
    # hf-hub:NAME would be downloaded each time
    if (":" in value or "/" in value) and not re.fullmatch(CUSTOM_MODEL, value):
        raise InvalidValue("the name of a model built into timm, or a function of your own, mypackage.models:build", value)
    return value


def _expand_user(value: str) -> str:
    if not value or not value.isprintable():
        raise InvalidValue("a path of printable characters", value)
    return os.path.expanduser(value)


# 0 disables; smaller positive parameters would make the rejection sampling of Beta practically endless
Alpha = Annotated[float, Field(ge=0, le=4), AfterValidator(_check_alpha)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Count = Annotated[int, Field(ge=1, le=100_000)]
"""A number of epochs or views, for each of which a list entry is kept in memory."""
CountOrZero = Annotated[int, Field(ge=0, le=100_000)]
Pixels = Annotated[int, Field(ge=8, le=4096)]
"""Height and width of a square image."""
SetName = Annotated[str, AfterValidator(_check_set_name)]
"""The name of an additional evaluation set, which prefixes its metrics."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Workers = Annotated[int, Field(ge=0, le=1024)] | None
"""Loader workers per process; null: chosen for the machine, see pipeline.common.cores."""
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt")
"""Suffixes of weights files; any other value of `teacher.weights` is a timm tag."""
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
Range = Annotated[tuple[float, float], Field(strict=False)]
Arguments = Annotated[dict[str, Any], AfterValidator(_check_arguments)]
"""Keyword arguments of timm.create_model."""
File = Annotated[str, AfterValidator(_expand_user)]
LocalFolder = Annotated[str, AfterValidator(_check_local_folder)]
Model = Annotated[str, AfterValidator(_check_model)]
ClassMap = Annotated[str | list[int] | dict[str, int], AfterValidator(_check_class_map)]
"""Class numbers of the teacher: in the index's order, by class name, or by the name of a label set that timm knows."""
Work = Annotated[str, AfterValidator(_check_work)]
