"""Confidence intervals of accuracies, and of differences between two models on the same images."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A share or a difference of shares, with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def accuracy_interval(correct: np.ndarray) -> Estimate:
    """Estimate an accuracy from bool (samples,), one or more, with Wilson's score interval (1927)."""
    samples, share = len(correct), float(correct.mean())
    center = (share + Z**2 / (2 * samples)) / (1 + Z**2 / samples)
    half = Z / (1 + Z**2 / samples) * sqrt(share * (1 - share) / samples + (Z / (2 * samples)) ** 2)
    # rounding must not exclude 0 or 1 where no or every sample is correct
    return Estimate(share, max(0.0, min(center - half, share)), min(1.0, max(center + half, share)))


def difference_interval(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Estimate the accuracy of `first` minus that of `second`, both bool (samples,) for the same samples.

    The interval is Bonett and Price's adjusted Wald interval (2012) for paired proportions: only the samples that
    exactly one of both classifies correctly count, as in McNemar's test.
    """
    samples = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    one, other = (only_first + 1) / (samples + 2), (only_second + 1) / (samples + 2)
    half = Z * sqrt((one + other - (one - other) ** 2) / (samples + 2))
    center = one - other
    return Estimate((only_first - only_second) / samples, max(-1.0, center - half), min(1.0, center + half))
