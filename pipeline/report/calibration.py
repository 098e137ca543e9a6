"""Calibration: whether a classifier that is 80 % confident is correct for 80 % of such images."""

import math
from dataclasses import dataclass

import numpy as np

BINS = 15
"""Bins of equal width, as in Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017, arXiv 1706.04599)."""


@dataclass(frozen=True)
class Calibration:
    """A classifier's accuracy by its confidence, the probability of the predicted class; bin i is (i / B, (i + 1) / B]."""

    images: np.ndarray
    """int64 (B,): images per bin."""
    confidence: np.ndarray
    """float64 (B,): their mean confidence; NaN in an empty bin."""
    accuracy: np.ndarray
    """float64 (B,): the share of them that is classified correctly; NaN in an empty bin."""
    chance: float
    """The ECE to expect of a perfectly calibrated classifier with these confidences on this number of images; above 0,
    since accuracies over few images scatter."""

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean of |accuracy - confidence| over bins, weighted by their images."""
        return float(np.nansum(self.images * np.abs(self.accuracy - self.confidence)) / self.images.sum())

    @property
    def mean_confidence(self) -> float:
        return float(np.nansum(self.images * self.confidence) / self.images.sum())

    @property
    def mean_accuracy(self) -> float:
        return float(np.nansum(self.images * self.accuracy) / self.images.sum())


def calibrate(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """Divide images into bins of equal width by confidence.

    Args:
        confidence: in 0..1, (images,).
        correct: bool (images,).
    """
    confidence = confidence.astype(np.float64)
    number = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    images = np.bincount(number, minlength=bins)
    sums, hits = (np.bincount(number, values, minlength=bins) for values in (confidence, correct))
    # the mean absolute value of a normal variable is sqrt(2 / pi) standard deviations
    variance = np.bincount(number, confidence * (1 - confidence), minlength=bins)
    chance = math.sqrt(2 / math.pi) * np.sqrt(variance.clip(min=0)).sum() / len(confidence)
    filled = np.where(images > 0, images, np.nan)
    return Calibration(images, sums / filled, hits / filled, float(chance))
