"""What a classification is worth beside its accuracy: recalls, balanced accuracy, confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

FEW_SCORED = 1000  # images, below which an accuracy is shown with its interval
_Z = 1.959963984540054  # of the normal distribution: 95% lie within so many deviations


def recalls(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """The share of each class's images that is found: float64 [classes], 0-1; NaN where a class has no image.

    Args:
        labels, predicted: integers [n].
        num_classes: the number of classes.
    """
    counts = np.bincount(labels, minlength=num_classes)
    found = np.bincount(labels[labels == predicted], minlength=num_classes)
    return np.where(counts > 0, found / np.maximum(counts, 1), np.nan)


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> float:
    """The mean recall of the classes that have images, 0-1. Arguments as of `recalls`; at least one image."""
    return float(np.nanmean(recalls(labels, predicted, num_classes)))


def smallest_class_recall(
    labels: np.ndarray, predicted: np.ndarray, train_labels: np.ndarray, num_classes: int
) -> float:
    """The recall of the class with the fewest training images, of those with images here; of several the lowest.

    Args:
        labels, predicted: integers [n], at least one.
        train_labels: of the training images.
        num_classes: the number of classes.
    """
    found = recalls(labels, predicted, num_classes)
    sizes = np.where(np.isnan(found), np.inf, np.bincount(train_labels, minlength=num_classes))
    return float(found[sizes == sizes.min()].min())


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95% confidence interval of an accuracy on n images (Wilson 1927): low and high, 0-1.

    It is for images that had no part in choosing the weights; the best of several epochs is a little too high.
    """
    middle = accuracy + _Z * _Z / (2 * n)
    half = _Z * math.sqrt(accuracy * (1 - accuracy) / n + _Z * _Z / (4 * n * n))
    scale = 1 + _Z * _Z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def interval_in_words(accuracy: float, n: int) -> str:
    """The interval of an accuracy on few images, as in "95% interval 78.1-95.2%"; empty on FEW_SCORED or more."""
    if not 0 < n < FEW_SCORED:
        return ""
    low, high = wilson_interval(accuracy, n)
    return f"95% interval {100 * low:.1f}-{100 * high:.1f}%"


def views_in_words(metrics: Mapping[str, Any]) -> str:
    """The TTA of metrics.json, as in "6 views" or "6 views of the 25% of the images that are least sure"."""
    share = metrics.get("views_share", 1) if metrics["views"] > 1 else 1
    views = f"{metrics['views']} view{'' if metrics['views'] == 1 else 's'}"
    return views if share == 1 else f"{views} of the {100 * share:.4g}% of the images that are least sure"
