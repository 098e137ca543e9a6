"""Differences between the rows of a study's table, paired by seed, with confidence intervals over the seeds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import nan, sqrt
from statistics import fmean, stdev

from pipeline.report.study import Value, is_share

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A metric minus that of the reference with the same seed."""

    levels: dict[str, str]
    """By axis."""
    metric: str
    values: tuple[float, ...]
    """One per seed that both have."""

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def half_width(self) -> float:
        """Of the 95 % confidence interval of the mean, from Student's t; NaN of a single seed."""
        count = len(self.values)
        if count < 2:
            return nan
        from scipy.stats import t  # takes half a second

        return float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * stdev(self.values) / sqrt(count)

    def show(self) -> str:
        """For example `-0.31 (-0.82 to 0.20)`; of accuracies, in percentage points."""
        scale, half = 100 if is_share(self.metric) else 1, self.half_width
        mean, low, high = (f"{scale * each:.2f}" for each in (self.mean, self.mean - half, self.mean + half))
        return mean if len(self.values) < 2 else f"{mean} ({low} to {high})"


def differences(values: Iterable[Value], reference: Mapping[str, str]) -> list[Difference]:
    """Compare every row with the one that has the levels of `reference`, and its own on all other axes.

    The reference itself, and rows without one, are left out.
    """
    found: dict[tuple, dict[int, Value]] = {}
    for each in values:
        found.setdefault(_key(each.metric, each.levels), {})[each.seed] = each
    compared = []
    for key, seeds in found.items():
        first = next(iter(seeds.values()))
        others = found.get(_key(first.metric, {**first.levels, **reference}), {})
        paired = tuple(each.value - others[seed].value for seed, each in seeds.items() if seed in others)
        if paired and others is not found[key]:
            compared.append(Difference(first.levels, first.metric, paired))
    return compared


def _key(metric: str, levels: Mapping[str, str]) -> tuple:
    return metric, *levels.items()
