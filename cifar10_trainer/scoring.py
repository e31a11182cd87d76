"""A plain model and images -> probabilities and scores, the same for training and `evaluate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import check_views
from .errors import ConfigError, RunError
from .keras_state import keras_defaults
from .model_file import maps_images_to_classes

if TYPE_CHECKING:
    import keras

# of images of 32x32 pixels, and smaller ones; it divides CIFAR-10's 10,000 and 5,000: little padding
BATCH_SIZE = 500
SMALLEST = float(np.finfo(np.float32).tiny)  # probability that float32 holds in full, 87 nats


def check_model(model: Any) -> None:
    """Raises ConfigError where it is no Keras model of images that returns a row of numbers for each."""
    input_shape: Any = getattr(model, "input_shape", None)
    output_shape: Any = getattr(model, "output_shape", None)
    if not maps_images_to_classes(input_shape, output_shape, fixed=False):
        maps = f", which maps {input_shape} to {output_shape}" if input_shape and output_shape else ""
        raise ConfigError(
            f"model is {type(model).__name__}{maps}; allowed: a built Keras model that maps (batch, height, width, 3) to"
            " (batch, classes), with two classes or more"
        )


def takes(model: keras.Model, shape: Sequence[int]) -> bool:
    """Whether the model takes images of this shape, [height, width, channels]; it may take sides of any length."""
    own = model.input_shape[1:]
    return len(own) == len(shape) and all(a in (None, b) for a, b in zip(own, shape, strict=True))


def default_batch(images: np.ndarray) -> int:
    """Images in a batch of an evaluation or a prediction: fewer where they are larger, so that the memory is the same.

    Args:
        images: [n, height, width, channels].

    Returns:
        as many as have the pixels of BATCH_SIZE images of 32x32; 1 to BATCH_SIZE.
    """
    height, width = images.shape[1:3]
    return max(1, min(BATCH_SIZE, BATCH_SIZE * 32 * 32 // (height * width)))


def _logits(model: keras.Model) -> Any:
    """A function: images -> logits float32 [batch, classes], up to a constant for each image."""
    import keras
    import tensorflow as tf

    from .models.own import SUM_TOLERANCE, logits_before_softmax

    logits = logits_before_softmax(model) if getattr(model, "outputs", None) else None
    if logits is not None:
        head = keras.Model(model.inputs[0], logits)
        return lambda images: tf.cast(head(images, training=False), tf.float32)

    def log_outputs(images: Any) -> Any:
        outputs = tf.cast(model(images, training=False), tf.float32)
        # What are no probabilities becomes NaN, which predict_probabilities reports.
        sums = tf.reduce_sum(outputs, axis=-1, keepdims=True)
        bad = (outputs < 0) | (tf.abs(sums - 1) > SUM_TOLERANCE)
        return tf.where(bad, float("nan"), tf.math.log(tf.maximum(outputs, 1e-30)))

    return log_outputs


def _other_views(images: np.ndarray, views: int) -> list[tuple[float, np.ndarray]]:
    """(weight, images) of the views of images [n, height, width, 3] beside the images themselves, which have the rest of 1."""
    mirrored = images[:, :, ::-1]
    if views == 2:
        return [(1 / 2, mirrored)]
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = [padded[:, i : i + height, i : i + width] for i in (0, 2)]
    return [(1 / 4, mirrored)] + [(1 / 8, v) for s in shifted for v in (s, s[:, :, ::-1])]


def predict_probabilities(
    model: keras.Model,
    images: np.ndarray,
    batch_size: int | None = None,
    views: int = 1,
    views_share: float = 1.0,
) -> np.ndarray:
    """The class probabilities of every image, with test-time augmentation (TTA) where `views` is above 1.

    TTA averages the logits over several views of each image. Logits are the input of the softmax that the model ends in,
    else the logarithm of its outputs.

    Args:
        model: maps [batch, height, width, 3] to probabilities [batch, classes].
        images: uint8 or float [n, height, width, 3], raw pixels 0-255.
        batch_size: images in a batch; None: `default_batch`.
        views: 1: the image alone. 2: the image and its mirror image, half each. 6: these with a quarter each, and an
            eighth each for two diagonal shifts by one pixel and their mirror images (Jordan 2024, arXiv:2404.00498).
        views_share: the share of the images, above 0 and up to 1, that get the further views: those of which the model is
            least sure, by the highest probability of the image alone. The others keep the prediction of the image alone.

    Returns:
        float32 [n, classes].
    Raises:
        ConfigError: on another number of views or another share.
        RunError: if the outputs are not probabilities.
    """
    return predict_with_and_without(model, images, batch_size, views, views_share)[1]


@keras_defaults()
def predict_with_and_without(
    model: keras.Model,
    images: np.ndarray,
    batch_size: int | None = None,
    views: int = 1,
    views_share: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The class probabilities of every image without TTA, and with it. Arguments and errors as of `predict_probabilities`."""
    import tensorflow as tf

    check_views(views, views_share)
    n, size = len(images), max(1, min(batch_size or default_batch(images), len(images)))
    # One shape, so one trace: the last batch is padded, and the padding is cut off.
    spec = tf.TensorSpec([size, *images.shape[1:]], images.dtype)
    function = tf.function(_logits(model), input_signature=[spec])
    plain = np.zeros((n, model.output_shape[-1]), np.float32)
    for start in range(0, n, size):
        part = images[start : start + size]
        plain[start : start + size] = function(tf.constant(_padded(part, size))).numpy()[: len(part)]
    averaged = plain
    if views > 1:
        averaged, chosen = plain.copy(), least_sure(plain, views_share)
        for start in range(0, len(chosen), size):
            now = chosen[start : start + size]
            others = _other_views(_padded(images[now], size), views)
            first = (1 - sum(weight for weight, _ in others)) * _padded(plain[now], size)
            mean = tf.add_n([first, *(weight * function(tf.constant(view)) for weight, view in others)])
            averaged[now] = mean.numpy()[: len(now)]
    without, with_views = (tf.nn.softmax(logits).numpy() for logits in (plain, averaged))
    if not (np.isfinite(without).all() and np.isfinite(with_views).all()):
        raise RunError(
            "the model's outputs are not probabilities (negative, NaN, or of another sum than 1);"
            " its training diverged, or it has no softmax at its end"
        )
    return without, with_views


def least_sure(logits: np.ndarray, share: float) -> np.ndarray:
    """The images whose highest probability is lowest.

    Args:
        logits: float [n, classes].
        share: of the images, above 0 and up to 1.

    Returns:
        numbers from 0 to n - 1, ascending: share times n of them, rounded up.
    """
    import tensorflow as tf

    highest = tf.nn.softmax(logits).numpy().max(axis=1, initial=0)
    # rounded, because 0.07 * 100 is a little more than 7
    count = max(1, math.ceil(round(share * len(logits), 6)))
    return np.sort(np.argsort(highest, kind="stable")[:count])


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    """`rows`, of which there is at least one, with the last one repeated up to `size`."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def score(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Accuracy and loss, computed in float64.

    Args:
        labels: integers [n].
        probabilities: float [n, classes]; clipped to at least SMALLEST. Keras's loss clips at 1e-7, 16 nats, which hides how
            wrong an overfitted model is.

    Returns:
        {"accuracy": 0-1, "loss": the mean cross-entropy in nats, "n": the number of images}.
    """
    n = len(labels)
    assert n == len(probabilities) > 0, f"{n} labels for {len(probabilities)} rows of probabilities"
    true_class = probabilities[np.arange(n), labels].astype(np.float64)
    return {
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == labels)),
        "loss": float(np.mean(-np.log(np.maximum(true_class, SMALLEST)))),
        "n": n,
    }
