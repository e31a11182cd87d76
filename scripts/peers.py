"""Other people's code, the way its author or its documentation has it: what benchmark.py compares this project with.

    python scripts/peers.py               # an epoch of the fourth tutorial's own code, and its seconds as JSON
    python scripts/peers.py --steps=20    # only so many steps of it

Nothing here is tuned. PyTorch and airbench are used where they are installed; nothing depends on them.
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
from typing import Any

import numpy as np
from absl import flags

from cifar10_trainer import RunError, cli

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
flags.DEFINE_integer("steps", None, "of training; default: an epoch", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "where CIFAR-10 is", flag_values=FLAGS)

# ---- the fourth tutorial ---------------------------------------------------------------------------------

TUTORIAL_BATCH = 128


def tutorial_four(dtype: str = "float32", **compile_options):
    """The fourth tutorial's network as its own code builds it: plain Keras, compiled, float pixels in."""
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


def tutorial_fit(images, labels, dtype: str = "float32", **compile_options) -> Callable[[], float]:
    """What measures the seconds of `Model.fit` of that network over float images; batch_size as the tutorial's."""
    batch = compile_options.pop("batch_size", TUTORIAL_BATCH)
    model = tutorial_four(dtype, **compile_options)

    def measure() -> float:
        start = time.perf_counter()
        model.fit(images, labels, batch_size=batch, verbose=0)
        return time.perf_counter() - start

    return measure


def tutorial_run(data, steps: int | None) -> dict[str, float]:
    """What the tutorial's notebook does with the images: all as float32, the last tenth held out, `fit`.

    Returns the seconds of an epoch with its validation or, of `steps` steps, as many epochs' as they are; and the
    steps. Two steps and their validation come first and do not count, so that tracing does not.
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
    start = time.perf_counter()
    model.fit(x, y, TUTORIAL_BATCH, **part)
    seconds = time.perf_counter() - start
    assert len(x_test) == len(data.test_labels)
    return {"seconds_an_epoch": seconds * whole / steps, "steps": steps, "steps_an_epoch": whole}


# ---- input pipelines -------------------------------------------------------------------------------------


def keras_layers(images, labels, batch: int, batches: int) -> Callable[[], float]:
    """Images a second of Keras's preprocessing layers in `map`, as Keras's documentation has it: flip and shift."""
    import keras
    import tensorflow as tf

    layers = [
        keras.layers.RandomFlip("horizontal", dtype="float32"),
        keras.layers.RandomTranslation(2 / 32, 2 / 32, "reflect", dtype="float32"),
    ]

    def change(x, y):
        for layer in layers:
            x = layer(x, training=True)
        return x, y

    data = tf.data.Dataset.from_tensor_slices((images, labels)).cache().shuffle(len(images)).batch(batch)
    data = data.map(change, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    def measure() -> float:
        start = time.perf_counter()
        seen = sum(len(y) for _, y in data.take(batches))
        return seen / (time.perf_counter() - start)

    return measure


def image_data_generator(images, labels, batch: int, batches: int) -> Callable[[], float]:
    """Images a second of the old ImageDataGenerator: flip and shift, image by image."""
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


def torch_network():
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


def torch_steps(images, labels, compiled: tuple[bool, ...]) -> dict[str, Callable[[], float]]:
    """name -> what measures the seconds of a pass of that network; none where PyTorch is not installed.

    images: float32 [n, 32, 32, 3]. float32 or bfloat16, NCHW or channels last, and `compiled` or not.
    """
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(labels)

    def variant(bfloat16: bool, last: bool, compiled: bool) -> Callable[[], float]:
        form = torch.channels_last if last else torch.contiguous_format
        model: Any = torch_network()
        model = model.to(memory_format=form)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        run = torch.compile(model) if compiled else model

        def measure() -> float:
            start = time.perf_counter()
            for i in range(0, len(x), TUTORIAL_BATCH):
                batch = slice(i, i + TUTORIAL_BATCH)
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    outputs = run(x[batch].to(memory_format=form))
                    loss = torch.nn.functional.cross_entropy(outputs, y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return time.perf_counter() - start

        return measure

    found = {}
    for bfloat16 in (False, True):
        for last in (False, True):
            for compile_ in compiled:
                words = ["bfloat16" if bfloat16 else "float32", "channels last" if last else "NCHW"]
                words += ["compiled"] if compile_ else []
                name = f"PyTorch {torch.__version__.split('+')[0]}, {', '.join(words)}"
                found[name] = variant(bfloat16, last, compile_)
    return found


# ---- airbench --------------------------------------------------------------------------------------------

AIRBENCH = ("airbench94.py", "airbench94_muon.py", "airbench94_compiled.py")


def airbench(checkout: str, name: str, data, runs: int, limit: float) -> dict[str, list[float]]:
    """Seconds and accuracies, plain and with averaged views, of `runs` runs of one of airbench's own scripts.

    The script runs as it is but for how many runs it makes; its own clock and scores are read from the table that it
    prints, and its first run, which warms it, is left out. What it has printed after `limit` seconds counts.
    Raises RunError where that is nothing.
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
        with open(Path(folder, "said"), "w+") as said:
            try:
                subprocess.run(
                    [sys.executable, "-u", name],
                    cwd=folder,
                    stdout=said,
                    stderr=said,
                    timeout=limit,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                print(f"  {name}: stopped after {limit:.0f} s", flush=True)
            said.seek(0)
            lines = said.read().splitlines()
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if "|" in line]
    scores = [[float(cell) for cell in row[-3:]] for row in table if row[0] == "eval"][1:]
    if not scores:
        raise RunError(f"{name} printed no scores; its last line: {(lines or ['none'])[-1][:300]}")
    plain, views, seconds = (list(column) for column in zip(*scores, strict=True))
    return {"seconds": seconds, "plain": plain, "views": views}


def _airbench_images(folder: Path, data) -> None:
    """The files that airbench's loader leaves behind once it has downloaded the images."""
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


def main(argv: list[str]) -> None:
    cli.import_tensorflow()
    from cifar10_trainer import datasets

    print(json.dumps(tutorial_run(datasets.load("cifar10", FLAGS.data_dir), FLAGS.steps)))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
