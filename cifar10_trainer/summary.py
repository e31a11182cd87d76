"""What a run prints about its data and its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import measures, report, scoring
from .datasets import Dataset
from .process import Log
from .run_folder import RunFolder

if TYPE_CHECKING:
    import keras

    from .config import Config

FEW_IMAGES = 10  # of a class to train on, below which a run warns
PRECISION_IMAGES = 500  # validation images on which the saved model is compared with the one that trained


def warn_of_few(data: Dataset, log: Log) -> None:
    """Warns of classes with few images, or without validation images."""
    assert data.validation is not None  # `preparation.prepare` set it
    names, classes = data.class_names, range(data.num_classes)
    training, held_out = (
        np.bincount(labels, minlength=data.num_classes) for labels in (data.train_labels, data.validation[1])
    )
    few = [f"{names[k]} ({training[k]})" for k in classes if training[k] < FEW_IMAGES]
    none = [names[k] for k in classes if len(data.validation[1]) and not held_out[k]]
    for what, found in (("few images to train on", few), ("no validation image", none)):
        if found:
            more = f" and {len(found) - 10} more classes" if len(found) > 10 else ""
            log(f"warning: {what} of {', '.join(found[:10])}{more}")


def summarize(log: Log, metrics: dict[str, Any], folder: RunFolder) -> None:
    best = metrics["best_val_accuracy"]
    validation = "no images held out"
    if best is not None:
        interval = measures.interval_in_words(best, metrics["n_validation"])
        validation = ", ".join(filter(None, (f"{best:.2%} (epoch {metrics['best_epoch']})", interval)))
    log(f"\n{metrics['recipe']}, {metrics['epochs']} epochs, {metrics['train_seconds']:,.1f} s")
    log(f"  validation accuracy  {validation}")
    log(f"  test accuracy        {_test_in_words(metrics)}")
    if metrics["test_balanced_accuracy"] is not None and metrics["dataset"] not in report.BALANCED:
        recall = metrics["test_smallest_class_recall"]
        log(
            f"  balanced accuracy    {metrics['test_balanced_accuracy']:.2%}, smallest class's recall {recall:.2%}"
        )
    if best is not None:
        goal, at = f"{metrics['target']:.2%}", metrics["seconds_to_target"]
        reached = f"after {at:,.1f} s (epoch {metrics['epoch_at_target']})" if at else "not reached"
        log(f"  target {goal:<13} {reached}")
    files = ", ".join(
        f.name for f in (folder.report_file, folder.model_file, folder.metrics_file) if f.exists()
    )
    log(f"  files                {folder}/  ({files})")


def conclude(
    log: Log,
    metrics: dict[str, Any],
    folder: RunFolder,
    history: Sequence[Mapping[str, Any]],
    data: Dataset,
    model: keras.Model | None,
    config: Config,
) -> None:
    """Logs the summary of a finished run, and what is odd about it. Arguments as of the functions that it calls."""
    assert data.validation is not None  # `preparation.prepare` set it
    summarize(log, metrics, folder)
    warn_at_chance(log, history, data, metrics["best_val_accuracy"], config.class_weights)
    warn_of_precision(log, model, data.validation, metrics)


def warn_at_chance(
    log: Log,
    history: Sequence[Mapping[str, Any]],
    data: Dataset,
    best_val_accuracy: float | None,
    class_weights: str,
) -> None:
    """Logs a line where the accuracy is no better than that of always guessing the largest class.

    With balanced class weights, which do not favour that class, than that of guessing at random.

    It is better where it exceeds the share of that class by more than 2.33 standard deviations of a share of so many
    images (a one-sided test at 1%). The accuracy is the best validation accuracy, or the last training accuracy.
    """
    if best_val_accuracy is None:
        labels, accuracy, images = data.train_labels, history[-1]["accuracy"], "training images"
    else:
        assert data.validation is not None  # `preparation.prepare` set it
        labels, accuracy, images = data.validation[1], best_val_accuracy, "validation images"
    share, guess = float(np.bincount(labels).max()) / len(labels), "the largest class"
    if class_weights == "balanced":
        share, guess = 1 / data.num_classes, "at random"
    # Of so few images that all of them may be right by luck, no accuracy shows anything.
    luck = share + 2.33 * math.sqrt(share * (1 - share) / len(labels))
    if accuracy <= luck < 1:
        log(
            f"  at chance level      {accuracy:.2%} of the {len(labels):,} {images}; to guess {guess} gives"
            f" {share:.2%}: the network has learned nothing that these images show; try a smaller --learning_rate"
        )


def warn_of_precision(
    log: Log, model: keras.Model | None, validation: Sequence[np.ndarray], metrics: Mapping[str, Any]
) -> None:
    """Logs a line where the saved model, which computes in float32, is worse than the one that trained, in 16 bits.

    It is worse where its accuracy on a part of the validation images is more than 5 points and four standard deviations
    of a share of so many images below the best validation accuracy.

    Args:
        log: receives the line.
        model: what was saved; None: nothing is compared.
        validation: images uint8 [n, height, width, channels] and labels [n].
        metrics: of the run.
    """
    images, labels = (part[:: max(1, len(part) // PRECISION_IMAGES)] for part in validation)
    trained, policy = metrics["best_val_accuracy"], metrics["precision"]
    if model is None or trained is None or policy == "float32":
        return
    saved = scoring.score(labels, scoring.predict_probabilities(model, images))["accuracy"]
    if saved < trained - 0.05 - 4 * math.sqrt(trained * (1 - trained) / len(labels)):
        log(
            f"  warning: the saved model, in float32, finds {saved:.2%} of {len(labels):,} validation images, but {trained:.2%}"
            f" were found in {policy} while it trained: its network depends on rounding; train it with --precision=float32"
        )


def _test_in_words(metrics: dict[str, Any]) -> str:
    """The test accuracy for people, or why there is none."""
    if metrics["test_accuracy"] is None:
        return "not scored" if metrics["n_test"] else "no test images"
    text = f"{metrics['test_accuracy']:.2%}"
    interval = measures.interval_in_words(metrics["test_accuracy"], metrics["n_test"])
    text += f", {interval}" if interval else ""
    if metrics["views"] > 1:
        text += f", {metrics['test_accuracy_views']:.2%} with TTA of {measures.views_in_words(metrics)}"
    return text
