"""The comparisons for a machine with a GPU: `python scripts/benchmark.py --gpu`. Everything here runs on CPU devices, too."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import clock
import numpy as np
import peers
from clock import Options, in_turn, made_up, rows_of, verdict

from cifar10_trainer import RECIPES, RunError

AIRBENCH_RUNS = 5  # of each of its scripts


def gpu_94(o: Options) -> dict[str, Any]:
    """fast.94 on all training images, compiled once, scored on the test images."""
    from cifar10_trainer import datasets

    goals = {"seconds": "at most 2.0 s", "accuracy": "at least 94.0%"}
    return run_seeds("fast.94", datasets.load("cifar10", o.data_dir), o.seeds, goals)


def gpu_96(o: Options) -> dict[str, Any]:
    """fast.96 on all training images, compiled once, scored on the test images; only where it is named."""
    from cifar10_trainer import datasets

    data = datasets.load("cifar10", o.data_dir)
    return run_seeds("fast.96", data, min(o.seeds, 5), {"accuracy": "from 95% to 96%"})


def gpu_airbench(o: Options) -> dict[str, Any]:
    """airbench's own scripts, by their own clock, which counts whitening too."""
    from cifar10_trainer import datasets

    if not o.airbench:
        print("  not without --airbench, the folder of its checkout", flush=True)
        return {}
    rows = airbench_rows(o.airbench, datasets.load("cifar10", o.data_dir), o.deadline)
    return {"rows": rows, "verdicts": []} if rows else {}


def airbench_rows(checkout: str, data, deadline: float) -> dict[str, Any]:
    """Seconds and accuracies of airbench's scripts. One that does not run here is said, and left out.

    deadline: by time.perf_counter(); each script gets an equal share of what is left.
    """
    rows: dict[str, Any] = {}
    for i, name in enumerate(peers.AIRBENCH):
        limit = max(30.0, (deadline - time.perf_counter()) / (len(peers.AIRBENCH) - i))
        try:
            found = peers.airbench(checkout, name, data, AIRBENCH_RUNS, limit)
        except RunError as error:
            print(f"  {error}", flush=True)
            continue
        rows.update(rows_of({name: found["seconds"]}, "s"))
        accuracies = {f"{name}: averaged views": found["views"], f"{name}: plain": found["plain"]}
        rows.update(rows_of({n: [100 * a for a in v] for n, v in accuracies.items()}, "%"))
    return rows


def run_seeds(
    recipe: str, data, seeds: int, goals: Mapping[str, str] | None = None, **changes
) -> dict[str, Any]:
    """A section's rows and verdicts: runs of a recipe that validates nothing, seeds 0 to `seeds` - 1, compiled once.

    goals: of the seconds of training and test, and of the accuracy with averaged views.
    """
    goals = goals or {}
    engine, _ = start(recipe, data, 0, **changes)
    test = tester(engine, data.test_images, data.test_labels)
    began = time.perf_counter()
    train(engine)
    test()
    first = time.perf_counter() - began
    samples: dict[str, list[float]] = {k: [] for k in ("whitening", "training", "test", "plain", "views")}
    for seed in range(seeds):
        whitening = begin_again(engine, recipe, data, seed, **changes)
        began = time.perf_counter()
        train(engine)
        trained = time.perf_counter()
        plain, views = test()
        tested = time.perf_counter()
        found = whitening, trained - began, tested - trained, 100 * plain, 100 * views
        for values, value in zip(samples.values(), found, strict=True):
            values.append(value)
        print(f"  seed {seed}: {tested - began:.2f} s, {100 * views:.2f}%", flush=True)
    seconds = [a + b for a, b in zip(samples["training"], samples["test"], strict=True)]
    with_whitening = [a + b for a, b in zip(samples["whitening"], seconds, strict=True)]
    rows = rows_of(
        {
            f"{recipe}: training": samples["training"],
            f"{recipe}: test with averaged views": samples["test"],
            f"{recipe}: training and test": seconds,
            f"{recipe}: whitening, training and test": with_whitening,
            f"{recipe}: compiling, once": [first - statistics.median(seconds)],
        },
        "s",
    )
    accuracies = {"averaged views": samples["views"], "plain": samples["plain"]}
    rows.update(rows_of({f"{recipe}: test accuracy, {k}": v for k, v in accuracies.items()}, "%"))
    mean = {k: statistics.mean(v) for k, v in accuracies.items()}
    return {
        "rows": rows,
        "verdicts": [
            verdict("training and test, median", statistics.median(seconds), goals.get("seconds", ""), " s"),
            verdict(
                f"mean of {seeds} seeds, averaged views",
                mean["averaged views"],
                goals.get("accuracy", ""),
                "%",
            ),
            verdict(f"mean of {seeds} seeds, plain", mean["plain"], unit="%"),
        ],
    }


def start(recipe: str, data, seed: int, images: int | None = None, **changes) -> tuple[Any, float]:
    """An Engine at the start of a run, as `python -m cifar10_trainer` makes it; and the seconds that whitening took.

    images: how many it holds, where it is not to be trained.
    """
    from cifar10_trainer import runtime
    from cifar10_trainer.engine import Engine
    from cifar10_trainer.models import fast
    from cifar10_trainer.models.initial import initial_model, pixel_statistics

    config = RECIPES[recipe].override(seed=seed, **changes)
    strategy, _ = runtime.choose_strategy(config.strategy)
    policy, _ = runtime.choose_precision(config.precision)
    model = initial_model(config, data.train_images, data.num_classes)
    whitening = 0.0
    if config.whitening:  # once more, for the clock
        statistics_of_pixels = pixel_statistics(config.pixels, data.train_images)
        began = time.perf_counter()
        fast.whiten(model, data.train_images, *statistics_of_pixels)
        whitening = time.perf_counter() - began
    arrays = data.train_images[:images], data.train_labels[:images]
    engine = Engine(model, config, *arrays, strategy=strategy, policy=policy, num_classes=data.num_classes)
    return engine, whitening


def begin_again(engine: Any, recipe: str, data, seed: int, **changes) -> float:
    """Puts an engine, with what it has compiled, at the start of a run with another seed; the seconds of whitening."""
    other, whitening = start(recipe, data, seed, engine.config.batch_size, **changes)
    engine.config, engine.sampler = other.config, dataclasses.replace(engine.sampler, seed=seed)
    engine.restore(other.state())
    return whitening


def train(engine: Any) -> None:
    """All steps that are left."""
    while engine.step < engine.steps:
        engine.train(engine.steps)


def tester(engine: Any, images, labels) -> Callable[[], tuple[float, float]]:
    """What scores the weights as they are on test images that live on the device: accuracies, 0-1.

    That of the images as they are, and that of six views averaged as `scoring.predict_probabilities` does. Compiled by
    XLA where the engine's step is.
    """
    import tensorflow as tf

    n = len(images)
    size = next(s for s in range(min(500, n), 0, -1) if n % s == 0)
    x = tf.constant(np.reshape(images, (n // size, size, *images.shape[1:])))
    y = tf.constant(np.reshape(labels, (n // size, size)), tf.int64)

    @tf.function(jit_compile=engine.compiled)
    def all_hits(x, y):
        i, total = tf.constant(0), tf.zeros(2)
        while i < n // size:
            batch, answers = tf.cast(tf.gather(x, i), tf.float32), tf.gather(y, i)
            side = batch.shape[1]
            padded = tf.pad(batch, [[0, 0], [1, 1], [1, 1], [0, 0]], "REFLECT")
            views = tf.concat([batch, padded[:, :side, :side], padded[:, 2:, 2:]], axis=0)
            logits = engine.training_model(tf.concat([views, views[:, :, ::-1]], axis=0), training=False)
            image, first, last = tf.unstack(tf.reshape(logits, [2, 3, size, -1]), axis=1)
            averaged = tf.reduce_sum(2 * image + first + last, axis=0)
            counted = [tf.argmax(values, 1) == answers for values in (image[0], averaged)]
            total += tf.reduce_sum(tf.cast(counted, tf.float32), axis=1)
            i += 1
        return total

    return lambda: tuple((all_hits(x, y).numpy() / n).tolist())


def gpu_step(o: Options, batch: int = 512, batches: int = 96, several: int = 32) -> dict[str, Any]:
    """Training of the fourth tutorial's network, batch 512: Model.fit on its images, and this project."""
    images, labels = made_up(batch * batches)
    pixels = images.astype("float32") / 255

    def fit(dtype: str = "float32", **options) -> Callable[[], float]:
        seconds = peers.tutorial_fit(pixels, labels, dtype, batch_size=batch, **options)
        return lambda: len(images) / seconds()

    def ours(strategy: str) -> Callable[[], float]:
        engine = clock.engine_for("leaky.baseline", images, labels, strategy=strategy, batch_size=batch)
        seconds = clock.seconds_of(engine, batches)
        return lambda: len(images) / seconds()

    default, compiled = "Model.fit, default settings", {"jit_compile": True, "steps_per_execution": several}
    speeds = {
        default: fit(),
        "Model.fit, bfloat16": fit("mixed_bfloat16"),
        "Model.fit, bfloat16, jit_compile=False": fit("mixed_bfloat16", jit_compile=False),
        f"Model.fit, bfloat16, jit_compile=True, steps_per_execution={several}": fit(
            "mixed_bfloat16", **compiled
        ),
        "this project, none": ours("none"),
        "this project, mirrored": ours("mirrored"),
    }
    rows = rows_of(in_turn(speeds, o.rounds), "images/s", default)
    verdicts = []
    for name in ("this project, none", "this project, mirrored"):
        verdicts.append(verdict(name, rows[name]["median"], "at least 160,000", " images/s"))
        verdicts.append(verdict(f"{name} / default Model.fit", rows[name]["ratio"], "at least 5"))
    return {"rows": rows, "verdicts": verdicts}
