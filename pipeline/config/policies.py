"""RandAugment and AutoAugment: what timm's config strings mean, as plain data.

Semantics are those of timm.data.auto_augment. A policy is a list of alternatives, each a sequence
of ops with a probability and a magnitude; RandAugment is written the short way, as layers that all
choose from one set.
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

# Pairs of op, probability, magnitude. `original` is table 9 of arXiv 1805.09501, `v0` the policy of
# the TPU EfficientNet code; both posterize in one of two ways, which the name's last letter decides.
_ORIGINAL = """
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
_V0 = """
    Equalize 0.8 1, ShearY 0.8 4;     Color 0.4 9, Equalize 0.6 3;           Color 0.4 1, Rotate 0.6 8
    Solarize 0.8 3, Equalize 0.4 7;   Solarize 0.4 2, Solarize 0.6 2;        Color 0.2 0, Equalize 0.8 8
    Equalize 0.4 8, SolarizeAdd 0.8 3;  ShearX 0.2 9, Rotate 0.6 8;          Color 0.6 1, Equalize 1.0 2
    Invert 0.4 9, Rotate 0.6 0;       Equalize 1.0 9, ShearY 0.6 3;          Color 0.4 7, Equalize 0.6 0
    Posterize 0.4 6, AutoContrast 0.4 7;  Solarize 0.6 8, Color 0.6 9;       Solarize 0.2 4, Rotate 0.8 9
    Rotate 1.0 7, TranslateYRel 0.8 9;  ShearX 0.0 0, Solarize 0.8 4;        ShearY 0.8 0, Color 0.6 4
    Color 1.0 0, Rotate 0.6 2;        Equalize 0.8 4, Equalize 0.0 8;        Equalize 1.0 4, AutoContrast 0.6 2
    ShearY 0.4 7, SolarizeAdd 0.6 7;  Posterize 0.8 2, Solarize 0.6 10;      Solarize 0.6 8, Equalize 0.6 1
    Color 0.8 6, Rotate 0.4 5
"""

FACTOR = 1 << 12  # enhancement factors are multiples of 1 / FACTOR, so that blending with them is exact
MAX_MAGNITUDE = 60  # whose factor is below 8, as far as blending is exact

SubPolicy = tuple[tuple[str, float, float], ...]
"""Ops that follow one another: name, probability, magnitude."""


def _policy(text: str, posterize: str) -> tuple[SubPolicy, ...]:
    pairs = re.split(r"[;\n]", text.strip().replace("Posterize", posterize))
    ops = [[op.split() for op in pair.split(",")] for pair in pairs]
    return tuple(tuple((name, float(p), float(m)) for name, p, m in pair) for pair in ops)


AUTO_AUGMENT = {
    "original": _policy(_ORIGINAL, "PosterizeOriginal"),
    "originalr": _policy(_ORIGINAL, "PosterizeIncreasing"),
    "v0": _policy(_V0, "Posterize"),
    "v0r": _policy(_V0, "PosterizeIncreasing"),
}


@dataclass(frozen=True)
class RandAugment:
    """`layers` ops out of INCREASING_OPS, with replacement; each fires with probability `prob`."""

    magnitude: float = 10.0
    std: float = 0.0
    """Of the normal that the magnitude is drawn from; inf: uniform up to the magnitude."""
    layers: int = 2
    prob: float = 0.5
    magnitude_max: float = 10.0


@dataclass(frozen=True)
class AutoAugment:
    """One sub-policy a view, each with the same chance."""

    policy: tuple[SubPolicy, ...]
    std: float = 0.0


def parse_policy(text: str) -> RandAugment | AutoAugment:
    """Read timm's config string.

    `rand-m9-mstd0.5-inc1`: m magnitude, mstd its standard deviation (> 100: uniform), mmax its
    upper bound, n ops a view, p probability of each, inc1 the increasing set (no other is known).
    `original`, `originalr`, `v0`, `v0r`, with `-mstd0.5` or without: AutoAugment.

    Raises:
        ValueError: with the part that is not understood.
    """
    name, *parts = text.split("-")
    if name in AUTO_AUGMENT:
        return AutoAugment(AUTO_AUGMENT[name], **_auto_fields(text, parts))
    if name != "rand":
        known = ", ".join(AUTO_AUGMENT)
        raise ValueError(f"a timm string such as rand-m9-mstd0.5-inc1, or one of {known}, not {text!r}")
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
            fields["magnitude_max"] = value or 10.0  # as timm takes it
            if value > MAX_MAGNITUDE:
                raise ValueError(f"mmax at most {MAX_MAGNITUDE}, not {value:g} in {text!r}")
        else:
            fields[{"m": "magnitude", "p": "prob"}[key]] = value
    if not increasing:
        raise ValueError(f"the increasing set only: add -inc1 to {text!r}")
    return fields


def _factor(value: float) -> float:
    return round(value * FACTOR) / FACTOR


def op_argument(name: str, magnitude: float, negate: bool) -> float | None:
    """What an op takes at a magnitude in 0..10 (timm.data.auto_augment.LEVEL_TO_ARG).

    Degrees for Rotate, bits to keep for Posterize, a threshold for Solarize, an addend for
    SolarizeAdd, a factor for the enhancements and shears, a fraction of the side for translations;
    None for an op that takes nothing.
    """
    level, sign = magnitude / 10, -1.0 if negate else 1.0
    match name:
        case "Rotate":
            return sign * level * 30
        case "Posterize":
            return int(level * 4)
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
