"""Times this project and its peers side by side, in one run.

    python scripts/benchmark.py                   # every comparison
    python scripts/benchmark.py --quick           # fewer rounds and seeds, under five minutes
    python scripts/benchmark.py step loader       # only these

The rules of the clock:
- What is compared runs in turn, A B A B, in one process each or one process for all; a ratio is the ratio of medians.
- A step's time is of a whole pass over 40 batches (20 with --quick), data loading included, after a pass that is not counted.
- Time to target counts from the start of the process: imports, data, tracing and validation are in it. The
  first number that reaches the target must be of the 10% of the training images held out.
- Nobody else's code is tuned by us beyond what is written here; each peer is the way its documentation shows.
- The record, results/benchmark.json, holds every sample, with versions, hardware and commit.

PyTorch is compared where it is installed. Nothing here depends on it.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from cifar10_trainer import RECIPES, ConfigError, cli
from cifar10_trainer.errors import unknown

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "results" / "benchmark.json"

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
flags.DEFINE_boolean("quick", False, "fewer rounds and seeds", flag_values=FLAGS)
flags.DEFINE_integer("seeds", 5, "runs of each time to target", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "where CIFAR-10 is", flag_values=FLAGS)


def in_turn(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples of each candidate, taken in turn after one round that is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        for name, measure in candidates.items():
            value = measure()
            if round_:
                samples[name].append(value)
                print(f"  round {round_} {name}: {value:,.1f}", flush=True)
    return samples


def tutorial_four(dtype: str = "float32"):
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
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def made_up(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels: what a step takes does not depend on them."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)


def engine_for(recipe: str, images, labels, **changes):
    """An Engine on `images` for a recipe, in the precision that suits the device."""
    from cifar10_trainer import models, runtime
    from cifar10_trainer.engine import Engine

    config = RECIPES[recipe].override(epochs=100_000 / (len(images) // 128), **changes)
    strategy, _ = runtime.choose_strategy("none")
    policy, _ = runtime.choose_precision(config.precision)
    model = models.build(config, input_shape=images.shape[1:], num_classes=10)
    return Engine(model, config, images, labels, strategy=strategy, policy=policy, num_classes=10)


def step(quick: bool) -> dict[str, Any]:
    """Milliseconds a step of the fourth tutorial's network, batch 128."""
    batches, batch = 20 if quick else 40, 128
    images, labels = made_up(batches * batch)
    pixels = images.astype(np.float32) / 255

    def keras_fit(dtype: str) -> Callable[[], float]:
        model = tutorial_four(dtype)

        def measure() -> float:
            start = time.perf_counter()
            model.fit(pixels, labels, batch_size=batch, verbose=0)
            return (time.perf_counter() - start) / batches * 1e3

        return measure

    def ours(precision: str) -> Callable[[], float]:
        engine = engine_for("leaky.baseline", images, labels, precision=precision)

        def measure() -> float:
            start = time.perf_counter()
            engine.train(batches)
            return (time.perf_counter() - start) / batches * 1e3

        return measure

    candidates = {
        "tutorial 4, its own code": keras_fit("float32"),
        "tutorial 4, bfloat16": keras_fit("mixed_bfloat16"),
        "this project, float32": ours("float32"),
        "this project": ours("auto"),
    }
    if importlib.util.find_spec("torch"):
        candidates.update(torch_steps(pixels, labels, batch, quick))
    return report_of("ms a step", in_turn(candidates, 3 if quick else 5), "tutorial 4, its own code")


def torch_steps(pixels, labels, batch: int, quick: bool) -> dict[str, Callable[[], float]]:
    """The same network in PyTorch: float32 or bfloat16, NCHW or channels last, eager or compiled."""
    import torch
    from torch import nn

    x = torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(labels)

    def network() -> nn.Module:
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

    def variant(bfloat16: bool, last: bool, compiled: bool) -> Callable[[], float]:
        form = torch.channels_last if last else torch.contiguous_format
        model: Any = network().to(memory_format=form)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        run = torch.compile(model) if compiled else model

        def measure() -> float:
            start = time.perf_counter()
            for i in range(0, len(x), batch):
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    loss = nn.functional.cross_entropy(
                        run(x[i : i + batch].to(memory_format=form)), y[i : i + batch]
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return (time.perf_counter() - start) / (len(x) // batch) * 1e3

        return measure

    found = {}
    for bfloat16 in (False, True):
        for last in (False, True):
            for compiled in (False,) if quick else (False, True):
                words = ["bfloat16" if bfloat16 else "float32", "channels last" if last else "NCHW"]
                name = f"PyTorch {torch.__version__}, {', '.join(words)}{', compiled' if compiled else ''}"
                found[name] = variant(bfloat16, last, compiled)
    return found


def loader(quick: bool) -> dict[str, Any]:
    """Thousands of images a second of the input pipeline alone, batch 512: uint8 in, model input out."""
    import keras
    import tensorflow as tf

    from cifar10_trainer import augment
    from cifar10_trainer.config import Augmentation
    from cifar10_trainer.pipeline import Fetcher, Order, training_data

    images, labels = made_up(50_000)
    batch, count = 512, 97
    table, targets = augment.pixel_table(tf.constant(images)), tf.constant(labels, tf.int32)

    def ours(augmentation: Augmentation) -> Callable[[], float]:
        order = Order(len(images), batch, 0, augmentation)
        fetcher = Fetcher(augmentation, 10, (32, 32))

        def measure() -> float:
            start = time.perf_counter()
            for _ in training_data(order, 0, count, table=table, labels=targets, fetcher=fetcher):
                pass
            return count * batch / (time.perf_counter() - start) / 1e3

        return measure

    def keras_layers() -> float:
        layers = [
            keras.layers.RandomFlip("horizontal", dtype="float32"),
            keras.layers.RandomTranslation(2 / 32, 2 / 32, "reflect", dtype="float32"),
        ]

        def change(x, y):
            for layer in layers:
                x = layer(x, training=True)
            return x, y

        data = tf.data.Dataset.from_tensor_slices((images, labels)).cache().shuffle(50_000).batch(batch)
        data = data.map(change, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
        start = time.perf_counter()
        seen = sum(len(y) for _, y in data.take(20))
        return seen / (time.perf_counter() - start) / 1e3

    candidates = {
        "Keras layers in map: flip, shift": keras_layers,
        "this project: no augmentation": ours(Augmentation()),
        "this project: flip, shift": ours(Augmentation(flip="random", shift=2)),
        "this project: flip, shift, cutout": ours(Augmentation(flip="random", shift=2, cutout=8)),
    }
    samples = in_turn(candidates, 3 if quick else 5)
    return report_of("thousand images/s", samples, "Keras layers in map: flip, shift")


def target(quick: bool) -> dict[str, Any]:
    """Seconds from the start of the process to 85% validation accuracy, of fast.85."""
    samples: dict[str, list[float]] = {"fast.85, seconds": [], "fast.85, validation accuracy": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1 if quick else FLAGS.seeds):
            run = Path(folder) / str(seed)
            command = [sys.executable, "-m", "cifar10_trainer", "--recipe=fast.85", f"--seed={seed}"]
            command += [f"--workdir={run}"] + ([f"--data_dir={FLAGS.data_dir}"] if FLAGS.data_dir else [])
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            metrics = json.loads((run / "metrics.json").read_text())
            print(f"  seed {seed}: {metrics['seconds_to_target']} s, {metrics['best_val_accuracy']:.4f}")
            samples["fast.85, seconds"].append(metrics["seconds_to_target"] or float("nan"))
            samples["fast.85, validation accuracy"].append(100 * metrics["best_val_accuracy"])
    return report_of("s and %", samples, None)


def report_of(unit: str, samples: dict[str, list[float]], base: str | None) -> dict[str, Any]:
    """Medians, ranges and ratios to `base`'s median, printed and returned."""
    rows = {}
    for name, values in samples.items():
        median = statistics.median(values)
        rows[name] = {"median": median, "min": min(values), "max": max(values), "samples": values}
        if base:
            rows[name]["ratio"] = median / statistics.median(samples[base])
        ratio = f"   {rows[name]['ratio']:.2f}" if base else ""
        print(f"{name:45s} {median:9.1f} ({min(values):.1f}-{max(values):.1f}) {unit}{ratio}", flush=True)
    return {"unit": unit, "base": base, "rows": rows}


SECTIONS: dict[str, Callable[[bool], dict[str, Any]]] = {"step": step, "loader": loader, "target": target}


def table(record: dict[str, Any]) -> str:
    """The README's table of the record."""
    lines = ["| comparison | median | from - to | ratio |", "|---|--:|--:|--:|"]
    for section in record["sections"].values():
        for name, row in section["rows"].items():
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
            lines.append(
                f"| {name} | {row['median']:.1f} {section['unit']} | {row['min']:.1f} - {row['max']:.1f} | {ratio} |"
            )
    where = record["environment"]
    lines += [
        "",
        f"{where['processor']}; TensorFlow {where['tensorflow']}, Keras {where['keras']}; {record['date']}.",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    for name in argv:
        if name not in SECTIONS:
            raise unknown("section", name, SECTIONS)
    if not (ROOT / "README.md").exists():
        raise ConfigError("the benchmark runs in a checkout; its README.md is not there")
    cli.import_tensorflow()
    from reproduce import commit, rewrite

    from cifar10_trainer import report, runtime

    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"sections": {}}
    for name in argv or SECTIONS:
        print(f"== {name}: {SECTIONS[name].__doc__}")
        record["sections"][name] = SECTIONS[name](FLAGS.quick)
    record.update(
        date=time.strftime("%Y-%m-%d"), commit=commit(), environment=runtime.describe(),
        command="python " + " ".join(sys.orig_argv[1:]),
    )  # fmt: skip
    RECORD.parent.mkdir(exist_ok=True)
    report.write_atomic(RECORD, json.dumps(record, indent=1) + "\n")
    rewrite(ROOT / "README.md", "benchmark", table(record))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
