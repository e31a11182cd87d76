"""A plain model and images -> probabilities and scores: what training and `evaluate` both report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError, RunError

if TYPE_CHECKING:
    import keras

BATCH_SIZE = 500


def _logits(model: keras.Model) -> Any:
    """A function from images to logits [batch, classes], float32, up to a constant for each image."""
    import keras
    import tensorflow as tf

    for layer in model.layers:
        if layer.name == "logits" and layer.output.shape == model.output_shape:
            head = keras.Model(model.inputs, layer.output)
            return lambda images: tf.cast(head(images, training=False), tf.float32)

    def log_outputs(images: Any) -> Any:
        outputs = tf.cast(model(images, training=False), tf.float32)
        # Negative outputs are no probabilities: not a number, which predict_probabilities reports.
        return tf.where(outputs < 0, float("nan"), tf.math.log(tf.maximum(outputs, 1e-30)))

    return log_outputs


def _views(images: np.ndarray, views: int) -> list[tuple[float, np.ndarray]]:
    """The weighted views of images [n, height, width, 3]; the weights add up to 1."""
    mirrored = images[:, :, ::-1]
    if views == 1:
        return [(1.0, images)]
    if views == 2:
        return [(1 / 2, images), (1 / 2, mirrored)]
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = [padded[:, i : i + height, i : i + width] for i in (0, 2)]
    return [(1 / 4, images), (1 / 4, mirrored)] + [(1 / 8, v) for s in shifted for v in (s, s[:, :, ::-1])]


def predict_probabilities(
    model: keras.Model, images: np.ndarray, batch_size: int = BATCH_SIZE, views: int = 1
) -> np.ndarray:
    """The model's class probabilities of every image: float32 [n, classes].

    images: [n, height, width, 3], raw pixels 0-255, uint8 or float. views: 1; 2: the mean of the logits of
    image and mirror image; 6: a quarter of each of those and an eighth of each of two diagonal shifts by a
    pixel and their mirror images, as airbench does. Logits are the output of the layer "logits" where the
    model has one, else the logarithm of its outputs. Raises RunError when they are not numbers.
    """
    import tensorflow as tf

    if views not in (1, 2, 6):
        raise ConfigError(f"views is {views}; allowed: 1, 2, 6")
    n, size = len(images), max(1, min(batch_size, len(images)))
    # One shape, so one trace: the last batch is filled up, and the filling cut off.
    spec = tf.TensorSpec([size, *images.shape[1:]], images.dtype)
    logits = tf.function(_logits(model), input_signature=[spec])
    found = []
    for start in range(0, n, size):
        batch = images[start : start + size]
        real = len(batch)
        batch = np.concatenate([batch, np.repeat(batch[-1:], size - real, axis=0)])
        mean = tf.add_n([weight * logits(tf.constant(view)) for weight, view in _views(batch, views)])
        found.append(tf.nn.softmax(mean).numpy()[:real])
    classes = model.output_shape[-1]
    probabilities = np.concatenate(found) if found else np.zeros((0, classes), np.float32)
    assert probabilities.shape == (n, classes), f"{probabilities.shape} for {n} images of {classes} classes"
    if not np.isfinite(probabilities).all():
        raise RunError(
            "the model's outputs are not probabilities (negative or not a number);"
            " it has diverged, or lacks a softmax at its end"
        )
    return probabilities


def score(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """{"accuracy": 0-1, "loss": mean cross-entropy in nats, "n": images}, in float64.

    labels: whole numbers [n]; probabilities: [n, classes], clipped to at least 1e-7, as in Keras's loss.
    """
    n = len(labels)
    assert n == len(probabilities) > 0, f"{n} labels for {len(probabilities)} rows of probabilities"
    of_truth = probabilities[np.arange(n), labels].astype(np.float64)
    return {
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == labels)),
        "loss": float(np.mean(-np.log(np.clip(of_truth, 1e-7, 1.0)))),
        "n": n,
    }
