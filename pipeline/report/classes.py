"""Accuracy per class, and which classes are mistaken for which."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassResult:
    """How well models recognize one class."""

    name: str
    images: int
    top1: dict[str, float]
    """By model: share in 0..1 of the class's images."""


@dataclass(frozen=True)
class Confusion:
    """How many images of one class are classified as another, or correctly."""

    label: str
    prediction: str
    images: int
    share: float
    """Share of the images with that label, in 0..1."""


def class_results(
    classes: list[str], labels: np.ndarray, predictions: Mapping[str, np.ndarray], by: str
) -> list[ClassResult]:
    """The classes that have images, those that the model `by` recognizes worst first.

    Args:
        labels: int64 (samples,).
        predictions: for each model, the predicted classes, int64 (samples,).
    """
    images = np.bincount(labels, minlength=len(classes))
    correct = {
        name: np.bincount(labels[predicted == labels], minlength=len(classes))
        for name, predicted in predictions.items()
    }
    present = np.flatnonzero(images)
    order = present[np.argsort(correct[by][present] / images[present], kind="stable")]
    return [
        ClassResult(classes[n], int(images[n]), {name: int(own[n]) / int(images[n]) for name, own in correct.items()})
        for n in order
    ]


def confusions(classes: list[str], labels: np.ndarray, predicted: np.ndarray) -> list[Confusion]:
    """The entries of the confusion matrix that are not zero, most images first; the diagonal is among them."""
    images = np.bincount(labels, minlength=len(classes))
    pairs, counts = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        Confusion(classes[label], classes[guess], int(count), int(count) / int(images[label]))
        for (label, guess), count in zip(pairs.T[order], counts[order], strict=True)
    ]
