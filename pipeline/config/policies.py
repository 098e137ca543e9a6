"""RandAugment and AutoAugment policies as plain data, parsed from timm's config strings.

Semantics are those of timm.data.auto_augment. AutoAugment chooses one of several sub-policies, each a sequence of ops
with probabilities and magnitudes; RandAugment chooses several ops from one set.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

# timm.data.auto_augment._RAND_INCREASING_TRANSFORMS, in its order
INCREASING_OPS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing",
    "SolarizeAdd", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing",
    "SharpnessIncreasing", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip

# Sub-policies of two ops with probability and magnitude: table 9 of arXiv 1805.09501.
_ORIGINAL_TEXT = """
    Posterize 0.4 8, Rotate 0.6 9;       Solarize 0.6 5, AutoContrast 0.6 5;  Equalize 0.8 8, Equalize 0.6 3
    Posterize 0.6 7, Posterize 0.6 6;    Equalize 0.4 7, Solarize 0.2 4;      Equalize 0.4 4, Rotate 0.8 8
    Solarize 0.6 3, Equalize 0.6 7;      Posterize 0.8 5, Equalize 1.0 2;     Rotate 0.2 3, Solarize 0.6 8
    Equalize 0.6 8, Posterize 0.4 6;     Rotate 0.8 8, Color 0.4 0;           Rotate 0.4 9, Equalize 0.6 2
    Equalize 0.0 7, Equalize 0.8 8;      Invert 0.6 4, Equalize 1.0 8;        Color 0.6 4, Contrast 1.0 8
    Rotate 0.8 8, Color 1.0 2;           Color 0.8 8, Solarize 0.8 7;         Sharpness 0.4 7, Invert 0.6 8
    ShearX 0.6 5, Equalize 1.0 9;        Color 0.4 0, Equalize 0.6 3;         Equalize 0.4 7, Solarize 0.2 4
    Solarize 0.6 5, AutoContrast 0.6 5;  Invert 0.6 4, Equalize 1.0 8;        Color 0.6 4, Contrast 1.0 8
    Equalize 0.8 8, Equalize 0.6 3
"""

FACTOR = 1 << 12  # enhancement factors are multiples of 1 / FACTOR, so that blending with them is exact
MAX_MAGNITUDE = 60  # its factor is below 8, up to which blending is exact

SubPolicy = tuple[tuple[str, float, float], ...]
"""Ops applied in order: name, probability, magnitude."""


@dataclass(frozen=True)
class RandAugment:
    """`layers` ops from INCREASING_OPS, drawn with replacement; each is applied with probability `prob`."""

    magnitude: float = 10.0
    std: float = 0.0
    """Standard deviation of the magnitude, which is normal; inf: uniform up to `magnitude`."""
    layers: int = 2
    prob: float = 0.5
    magnitude_max: float = 10.0


@dataclass(frozen=True)
class AutoAugment:
    """One sub-policy per view, chosen uniformly."""

    policy: tuple[SubPolicy, ...]
    std: float = 0.0
    """Standard deviation of each magnitude, which is normal; 0: the policy's own magnitude."""


ORIGINAL = tuple(
    tuple((name, float(p), float(m)) for name, p, m in map(str.split, pair.split(",")))
    for pair in re.split(r"[;\n]", _ORIGINAL_TEXT.strip().replace("Posterize", "PosterizeOriginal"))
)
"""AutoAugment's policy for ImageNet."""


def parse_policy(text: str) -> RandAugment | AutoAugment:
    """Parse a timm config string.

    `rand-m9-mstd0.5-inc1` is RandAugment: m magnitude, mstd its standard deviation (> 100: uniform), mmax its upper
    bound, n ops per view, p their probability, inc1 the increasing set (the only one supported). `original`, with or
    without `-mstd0.5`, is AutoAugment.

    Raises:
        ValueError: names the part that is invalid.
    """
    name, *parts = text.split("-")
    if name == "original":
        return AutoAugment(ORIGINAL, **_auto_fields(text, parts))
    if name != "rand":
        raise ValueError(f"a timm string such as rand-m9-mstd0.5-inc1 or original, not {text!r}")
    return RandAugment(**_rand_fields(text, parts))


def _auto_fields(text: str, parts: list[str]) -> dict[str, float]:
    fields = {}
    for part in parts:
        match = re.fullmatch(r"mstd(\d+(?:\.\d+)?)", part)
        if not match:
            raise ValueError(f"AutoAugment takes mstd with a number and nothing else, not {part!r} in {text!r}")
        fields["std"] = float(match[1])
    return fields


def _rand_fields(text: str, parts: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    increasing = False
    for part in parts:
        match = re.fullmatch(r"(mstd|p)(\d+(?:\.\d+)?)|(mmax|inc|m|n)(\d+)", part)
        if not match:
            raise ValueError(f"parts m, mstd, mmax, n, p, inc with a number, not {part!r} in {text!r}")
        key, value = match[1] or match[3], float(match[2] or match[4])
        if key == "inc":
            increasing = bool(value)
        elif key == "mstd":
            fields["std"] = math.inf if value > 100 else value
        elif key == "n":
            fields["layers"] = int(value)
        elif key == "mmax":
            fields["magnitude_max"] = value or 10.0  # as in timm
            if value > MAX_MAGNITUDE:
                raise ValueError(f"mmax at most {MAX_MAGNITUDE}, not {value:g} in {text!r}")
        else:
            fields[{"m": "magnitude", "p": "prob"}[key]] = value
    if not increasing:
        raise ValueError(f"only the increasing set is supported: add -inc1 to {text!r}")
    return fields


def _factor(value: float) -> float:
    return round(value * FACTOR) / FACTOR


def op_argument(name: str, magnitude: float, negate: bool) -> float | None:
    """The argument of an op for a magnitude in 0..10 (timm.data.auto_augment.LEVEL_TO_ARG).

    Degrees for Rotate, bits to keep for Posterize, a threshold for Solarize, an addend for SolarizeAdd, a factor for
    enhancements and shears, a fraction of the side for translations; None for an op without an argument.
    """
    level, sign = magnitude / 10, -1.0 if negate else 1.0
    match name:
        case "Rotate":
            return sign * level * 30
        case "PosterizeIncreasing":
            return 4 - int(level * 4)
        case "PosterizeOriginal":
            return int(level * 4) + 4
        case "Solarize":
            return min(256, int(level * 256))
        case "SolarizeIncreasing":
            return 256 - min(256, int(level * 256))
        case "SolarizeAdd":
            return min(128, int(level * 110))
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return _factor(level * 1.8 + 0.1)
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            return _factor(max(0.1, 1.0 + sign * level * 0.9))
        case "ShearX" | "ShearY":
            return sign * level * 0.3
        case "TranslateXRel" | "TranslateYRel":
            return sign * level * 0.45
    return None
