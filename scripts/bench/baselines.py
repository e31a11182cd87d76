"""The baselines: other people's code, written as its author or its documentation shows it. Nothing here is tuned.

The fourth tutorial's code is also a command, because memory and start-up time need a process of its own:

    python scripts/bench/baselines.py               # trains one epoch, and prints its seconds as JSON
    python scripts/bench/baselines.py --steps=20    # trains 20 steps of it

PyTorch and airbench are used where they are installed; nothing depends on them.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from cifar10_trainer import RunError, cli

if TYPE_CHECKING:
    import keras
    import torch

    from cifar10_trainer.datasets import Dataset

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
flags.DEFINE_integer("steps", None, "steps to train; default: one epoch", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "folder or archive of CIFAR-10", flag_values=FLAGS)

# ---- the fourth tutorial ---------------------------------------------------------------------------------

TUTORIAL_BATCH = 128


def tutorial_four(dtype: str = "float32", **compile_options: Any) -> keras.Model:
    """The fourth tutorial's network as its own code builds it: plain Keras, compiled; takes float pixels, 0-1."""
    import keras
    from keras import layers

    keras.config.set_dtype_policy(dtype)
    x = images = keras.Input((32, 32, 3))
    for filters, rate in ((32, 0.2), (64, 0.3), (128, 0.4)):
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same")(x)
            x = layers.LeakyReLU(negative_slope=0.1)(x)
            x = layers.BatchNormalization()(x)
        x = layers.MaxPooling2D()(x)
        x = layers.Dropout(rate)(x)
    x = layers.Dense(512)(layers.Flatten()(x))
    x = layers.LeakyReLU(negative_slope=0.1)(x)
    x = layers.Dropout(0.4)(layers.BatchNormalization()(x))
    model = keras.Model(images, layers.Dense(10, activation="softmax", dtype="float32")(x))
    keras.config.set_dtype_policy("float32")
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"], **compile_options)
    return model


def tutorial_fit(
    images: np.ndarray, labels: np.ndarray, dtype: str = "float32", **compile_options: Any
) -> Callable[[], float]:
    """A function that trains that network for one epoch with `Model.fit` and returns the seconds.

    images: float [n, 32, 32, 3], 0-1. compile_options: for `Model.compile`; batch_size: other than the tutorial's.
    """
    batch = compile_options.pop("batch_size", TUTORIAL_BATCH)
    return fit_seconds(tutorial_four(dtype, **compile_options), images, labels, batch)


def fit_seconds(
    model: keras.Model, images: np.ndarray, labels: np.ndarray, batch: int
) -> Callable[[], float]:
    """A function that trains a compiled model for one epoch with `Model.fit` and returns the seconds."""
    return lambda: seconds_of_epoch(model, images, labels, batch_size=batch, verbose=0)


def seconds_of_epoch(model: keras.Model, *args: Any, **options: Any) -> float:
    """The seconds of one epoch of `Model.fit` with these arguments, validation included.

    They end with the epoch, not with `fit`: at its end `fit` may wait for the thread that tunes its tf.data pipeline, once for
    all epochs, for as long as one epoch takes (docs/measurements.md).
    """
    import keras

    ends: list[float] = []
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter()))
    start = time.perf_counter()
    model.fit(*args, callbacks=[clock], **options)
    return ends[0] - start


def tutorial_run(data: Dataset, steps: int | None) -> dict[str, float]:
    """Trains as the tutorial's notebook does: all images as float32, the last tenth held out, `Model.fit`.

    Two steps and their validation come first and are not counted, so that tracing is not.

    Args:
        data: CIFAR-10.
        steps: how many steps to train. None: a whole epoch and its validation.

    Returns:
        The seconds of an epoch, from `steps` steps those that a whole epoch would take; and both numbers of steps.
    """
    x, y = data.train_images.astype("float32") / 255, data.train_labels
    x_test = data.test_images.astype("float32") / 255  # as the notebook, which holds them while it trains
    held_out = len(x) // 10
    (x, x_val), (y, y_val) = (x[:-held_out], x[-held_out:]), (y[:-held_out], y[-held_out:])
    whole = -(-len(x) // TUTORIAL_BATCH)
    steps = min(steps or whole, whole)
    model = tutorial_four()
    model.fit(x, y, TUTORIAL_BATCH, steps_per_epoch=2, validation_data=(x_val, y_val), validation_steps=1)
    part: dict[str, Any] = (
        {"steps_per_epoch": steps} if steps < whole else {"validation_data": (x_val, y_val)}
    )
    seconds = seconds_of_epoch(model, x, y, TUTORIAL_BATCH, **part)
    assert len(x_test) == len(data.test_labels)
    return {"seconds_an_epoch": seconds * whole / steps, "steps": steps, "steps_an_epoch": whole}


# ---- input pipelines -------------------------------------------------------------------------------------


def keras_layers(images: np.ndarray, labels: np.ndarray, batch: int, batches: int) -> Callable[[], float]:
    """A function that measures images per second of Keras's preprocessing layers: flip and shift in `map`."""
    import keras
    import tensorflow as tf

    layers = [
        keras.layers.RandomFlip("horizontal", dtype="float32"),
        keras.layers.RandomTranslation(2 / 32, 2 / 32, "reflect", dtype="float32"),
    ]

    def augment(x: Any, y: Any) -> tuple[Any, Any]:
        for layer in layers:
            x = layer(x, training=True)
        return x, y

    data = tf.data.Dataset.from_tensor_slices((images, labels)).cache().shuffle(len(images)).batch(batch)
    data = data.map(augment, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    def measure() -> float:
        start = time.perf_counter()
        # Its end may wait for tf.data's tuning, which is not the pipeline's time.
        rest = iter(data.take(batches))
        seen = sum(len(y) for _, y in rest)
        return seen / (time.perf_counter() - start)

    return measure


def image_data_generator(
    images: np.ndarray, labels: np.ndarray, batch: int, batches: int
) -> Callable[[], float]:
    """A function that measures images per second of Keras's old ImageDataGenerator: flip and shift, image by image."""
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    generator = ImageDataGenerator(
        horizontal_flip=True, width_shift_range=2, height_shift_range=2, fill_mode="reflect"
    )
    flow = generator.flow(images, labels, batch_size=batch)

    def measure() -> float:
        start = time.perf_counter()
        seen = sum(len(next(flow)[1]) for _ in range(batches))
        return seen / (time.perf_counter() - start)

    return measure


# ---- PyTorch ---------------------------------------------------------------------------------------------


def torch_network() -> torch.nn.Module:
    """The fourth tutorial's network in PyTorch."""
    from torch import nn

    parts: list[nn.Module] = []
    before = 3
    for filters, rate in ((32, 0.2), (64, 0.3), (128, 0.4)):
        for _ in range(2):
            norm = nn.BatchNorm2d(filters)
            parts += [nn.Conv2d(before, filters, 3, padding="same"), nn.LeakyReLU(0.1), norm]
            before = filters
        parts += [nn.MaxPool2d(2), nn.Dropout(rate)]
    parts += [nn.Flatten(), nn.Linear(2048, 512), nn.LeakyReLU(0.1), nn.BatchNorm1d(512), nn.Dropout(0.4)]
    return nn.Sequential(*parts, nn.Linear(512, 10))


def torch_steps(
    images: np.ndarray, labels: np.ndarray, bfloat16: tuple[bool, ...], compiled: tuple[bool, ...]
) -> dict[str, Callable[[], float]]:
    """PyTorch's variants of that network: float32 or `bfloat16`, NCHW or channels last, `compiled` or not.

    Args:
        images: float32 [n, 32, 32, 3], 0-1.
        labels: integers [n].
        bfloat16: (False,), or (False, True) for bfloat16 too.
        compiled: (False,), or (False, True) for `torch.compile` too.

    Returns:
        name -> a function that trains one epoch and returns its seconds; empty where PyTorch is not installed.
    """
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(labels)

    def variant(half: bool, last: bool, compiled: bool) -> Callable[[], float]:
        form = torch.channels_last if last else torch.contiguous_format
        model: Any = torch_network()
        model = model.to(memory_format=form)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        run = torch.compile(model) if compiled else model

        def measure() -> float:
            start = time.perf_counter()
            for i in range(0, len(x), TUTORIAL_BATCH):
                batch = slice(i, i + TUTORIAL_BATCH)
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    outputs = run(x[batch].to(memory_format=form))
                    loss = torch.nn.functional.cross_entropy(outputs, y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return time.perf_counter() - start

        return measure

    found = {}
    for half in bfloat16:
        for last in (False, True):
            for compile_ in compiled:
                words = ["bfloat16" if half else "float32", "channels last" if last else "NCHW"]
                words += ["compiled"] if compile_ else []
                name = f"PyTorch {torch.__version__.split('+')[0]}, {', '.join(words)}"
                found[name] = variant(half, last, compile_)
    return found


# ---- airbench --------------------------------------------------------------------------------------------

AIRBENCH = ("airbench94.py", "airbench94_muon.py", "airbench94_compiled.py")


def airbench(checkout: str, name: str, data: Dataset, runs: int, limit: float) -> dict[str, list[float]]:
    """Runs one of airbench's own scripts, and reads its times and scores from the table that it prints.

    Only the number of runs is changed in the script. Its first run, a warm-up, is left out.

    Args:
        checkout: the folder of airbench's checkout.
        name: the script's file name.
        data: CIFAR-10.
        runs: how many runs count.
        limit: seconds after which the script is stopped; the runs that it has printed until then count.

    Returns:
        Of each run the seconds, and the test accuracies, 0-1: "plain", and "tta" with test-time augmentation.

    Raises:
        RunError: the script is not there, is not as expected, or has printed no scores.
    """
    found = sorted(Path(checkout).rglob(name))
    if not found:
        raise RunError(f"{checkout} has no {name}; give --airbench the folder of its checkout")
    text, changed = re.subn(r"for run in range\(\d+\)", f"for run in range({runs + 1})", found[0].read_text())
    if not changed:
        raise RunError(f"{found[0]} is not as expected: it has no 'for run in range(...)'")
    with tempfile.TemporaryDirectory() as folder:
        _airbench_images(Path(folder, "cifar10"), data)
        Path(folder, name).write_text(text)
        with open(Path(folder, "output"), "w+") as output:
            try:
                subprocess.run(
                    [sys.executable, "-u", name],
                    cwd=folder,
                    stdout=output,
                    stderr=output,
                    timeout=limit,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                print(f"  {name}: stopped after {limit:.0f} s", flush=True)
            output.seek(0)
            lines = output.read().splitlines()
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if "|" in line]
    scores = [[float(cell) for cell in row[-3:]] for row in table if row[0] == "eval"][1:]
    if not scores:
        raise RunError(f"{name} printed no scores; its last line: {(lines or ['none'])[-1][:300]}")
    plain, tta, seconds = (list(column) for column in zip(*scores, strict=True))
    return {"seconds": seconds, "plain": plain, "tta": tta}


def _airbench_images(folder: Path, data: Dataset) -> None:
    """Writes the files that airbench's loader keeps after it has downloaded the images."""
    import torch

    folder.mkdir()
    for name, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        content = {
            "images": torch.tensor(images),
            "labels": torch.tensor(np.asarray(labels, np.int64)),
            "classes": list(data.class_names),
        }
        torch.save(content, folder / f"{name}.pt")


def main() -> None:
    """Trains the fourth tutorial's code as a process of its own."""
    cli.import_tensorflow()
    from cifar10_trainer import datasets

    print(json.dumps(tutorial_run(datasets.load("cifar10", FLAGS.data_dir), FLAGS.steps)))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
