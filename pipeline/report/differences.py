"""Differences between the rows of a study's table, paired by seed, with confidence intervals over the seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from statistics import fmean, stdev

from pipeline.common.wording import count_of
from pipeline.report.study import Table, Value, is_share, short_number

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
        """Half the width of the mean's 95 % confidence interval, from Student's t; NaN for a single seed."""
        count = len(self.values)
        if count < 2:
            return nan
        from scipy.stats import t  # takes half a second

        return float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * stdev(self.values) / sqrt(count)

    def show(self) -> str:
        """For example `-0.31 (-0.82 to 0.20, 3 seeds)`; of accuracies, in percentage points."""
        # + 0.0 makes zero of negative zero
        number = (lambda value: f"{round(100 * value, 2) + 0.0:.2f}") if is_share(self.metric) else short_number
        half, seeds = self.half_width, count_of(len(self.values), "seed")
        mean, low, high = map(number, (self.mean, self.mean - half, self.mean + half))
        return f"{mean} ({seeds})" if len(self.values) < 2 else f"{mean} ({low} to {high}, {seeds})"


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


def difference_table(found: Sequence[Difference], reference: Mapping[str, str]) -> Table:
    """A row per difference, all of one metric, with the levels of every axis."""
    metric = f"{found[0].metric}, points" if is_share(found[0].metric) else found[0].metric
    other = ", ".join(f"{axis} {level}" for axis, level in reference.items())
    heading = f"{metric}: difference from {other} (95 % interval)"
    return [*found[0].levels, heading], [[*each.levels.values(), each.show()] for each in found]


def _key(metric: str, levels: Mapping[str, str]) -> tuple:
    return metric, *levels.items()
