"""The sections of the benchmark for a machine with a GPU: `python scripts/benchmark.py --gpu`. The tests run them on a CPU.

A section takes Options and returns its rows and its results ("verdicts"). The first line of its docstring is its title
in the table.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar10_trainer import RECIPES, RunError

from . import baselines, timing
from .timing import Options, Section, against_goal, interleaved, rows_of, synthetic_data

if TYPE_CHECKING:
    from cifar10_trainer.datasets import Dataset
    from cifar10_trainer.engine import Engine

AIRBENCH_RUNS = 5  # runs of each of its scripts


# ---- sections --------------------------------------------------------------------------------------------


def gpu_step(o: Options, batch: int = 512, batches: int = 96, several: int = 32) -> dict[str, Any]:
    """Training of the fourth tutorial's network, batch 512: Model.fit on its images, and this project."""
    images, labels = synthetic_data(batch * batches)
    pixels = images.astype("float32") / 255

    def fit(dtype: str = "float32", **options: Any) -> Callable[[], float]:
        seconds = baselines.tutorial_fit(pixels, labels, dtype, batch_size=batch, **options)
        return lambda: len(images) / seconds()

    def ours(strategy: str) -> Callable[[], float]:
        engine = timing.engine_for("leaky.baseline", images, labels, strategy=strategy, batch_size=batch)
        seconds = timing.seconds_of(engine, batches)
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
    rows = rows_of(interleaved(speeds, o.rounds), "images/s", default)
    goals = []
    for name in ("this project, none", "this project, mirrored"):
        goals.append(against_goal(name, rows[name]["median"], "at least 160,000", " images/s"))
        goals.append(against_goal(f"{name} / default Model.fit", rows[name]["ratio"], "at least 5"))
    return {"rows": rows, "verdicts": goals}


def gpu_94(o: Options) -> dict[str, Any]:
    """fast.94 on all training images, compiled once, scored on the test images."""
    from cifar10_trainer import datasets

    goals = {"seconds": "at most 2.0 s", "accuracy": "at least 94.0%"}
    return run_seeds("fast.94", datasets.load("cifar10", o.data_dir), o.seeds, goals)


def gpu_airbench(o: Options) -> dict[str, Any]:
    """airbench's own scripts, by their own clock, which includes whitening."""
    from cifar10_trainer import datasets

    if not o.airbench:
        print("  left out: --airbench, the folder of airbench's checkout, is not given", flush=True)
        return {}
    rows = airbench_rows(o.airbench, datasets.load("cifar10", o.data_dir), o.deadline)
    return {"rows": rows, "verdicts": []} if rows else {}


def airbench_rows(checkout: str, data: Dataset, deadline: float) -> dict[str, Any]:
    """The rows of airbench's scripts. Where a script does not run, its error is printed and it has no rows.

    deadline: by time.perf_counter(); each script gets an equal share of the time that is left.
    """
    rows: dict[str, Any] = {}
    for i, name in enumerate(baselines.AIRBENCH):
        limit = max(30.0, (deadline - time.perf_counter()) / (len(baselines.AIRBENCH) - i))
        try:
            found = baselines.airbench(checkout, name, data, AIRBENCH_RUNS, limit)
        except RunError as error:
            print(f"  {error}", flush=True)
            continue
        rows.update(rows_of({name: found["seconds"]}, "s"))
        accuracies = {f"{name}: with TTA": found["tta"], f"{name}: plain": found["plain"]}
        rows.update(rows_of({n: [100 * a for a in v] for n, v in accuracies.items()}, "%"))
    return rows


def gpu_96(o: Options) -> dict[str, Any]:
    """fast.96 on all training images, compiled once, scored on the test images; only where it is named."""
    from cifar10_trainer import datasets

    data = datasets.load("cifar10", o.data_dir)
    return run_seeds("fast.96", data, min(o.seeds, 5), {"accuracy": "from 95% to 96%"})


SECTIONS: dict[str, Section] = {s.__name__: s for s in (gpu_step, gpu_94, gpu_airbench, gpu_96)}
NAMED_ONLY = ("gpu_96",)  # so that the others fit into eight minutes


# ---- runs of a recipe, compiled once ---------------------------------------------------------------------


def run_seeds(
    recipe: str, data: Dataset, seeds: int, goals: Mapping[str, str] | None = None, **changes: Any
) -> dict[str, Any]:
    """Runs a recipe with the seeds 0 to `seeds` - 1, compiled once.

    Args:
        recipe: one that holds out no validation images.
        data: CIFAR-10.
        seeds: the number of runs.
        goals: for "seconds" of training and test, and for the "accuracy" with TTA.
        changes: to the recipe.

    Returns:
        The rows and results of a section.
    """
    goals = goals or {}
    first, samples = time_seeds(recipe, data, seeds, **changes)
    seconds = [a + b for a, b in zip(samples["training"], samples["test"], strict=True)]
    with_whitening = [a + b for a, b in zip(samples["whitening"], seconds, strict=True)]
    median = statistics.median(seconds)
    rows = rows_of(
        {
            f"{recipe}: training": samples["training"],
            f"{recipe}: test with TTA": samples["test"],
            f"{recipe}: training and test": seconds,
            f"{recipe}: whitening, training and test": with_whitening,
            f"{recipe}: compiling, once": [first - median],
        },
        "s",
    )
    accuracies = {"with TTA": samples["tta"], "plain": samples["plain"]}
    rows.update(rows_of({f"{recipe}: test accuracy, {k}": v for k, v in accuracies.items()}, "%"))
    mean = {k: statistics.mean(v) for k, v in accuracies.items()}
    return {
        "rows": rows,
        "verdicts": [
            against_goal("training and test, median", median, goals.get("seconds", ""), " s"),
            against_goal(
                f"mean of {seeds} seeds, with TTA", mean["with TTA"], goals.get("accuracy", ""), "%"
            ),
            against_goal(f"mean of {seeds} seeds, plain", mean["plain"], unit="%"),
        ],
    }


def time_seeds(
    recipe: str, data: Dataset, seeds: int, **changes: Any
) -> tuple[float, dict[str, list[float]]]:
    """Times the runs of `run_seeds`.

    Returns:
        The seconds of a first run, compiling included; and of each run that counts the seconds of "whitening",
        "training" and "test", and the test accuracy in percent, "plain" and with "tta".
    """
    engine, _ = start(recipe, data, 0, **changes)
    test = tester(engine, data.test_images, data.test_labels)
    began = time.perf_counter()
    train(engine)
    test()
    first = time.perf_counter() - began
    samples: dict[str, list[float]] = {k: [] for k in ("whitening", "training", "test", "plain", "tta")}
    for seed in range(seeds):
        whitening = restart(engine, recipe, data, seed, **changes)
        began = time.perf_counter()
        train(engine)
        trained = time.perf_counter()
        plain, tta = test()
        tested = time.perf_counter()
        found = whitening, trained - began, tested - trained, 100 * plain, 100 * tta
        for values, value in zip(samples.values(), found, strict=True):
            values.append(value)
        print(f"  seed {seed}: {tested - began:.2f} s, {100 * tta:.2f}%", flush=True)
    return first, samples


def start(
    recipe: str, data: Dataset, seed: int, images: int | None = None, **changes: Any
) -> tuple[Engine, float]:
    """An Engine at the start of a run, as `python -m cifar10_trainer` makes it, and the seconds of whitening.

    images: how many training images it holds, for an engine that will not train. None: all.
    """
    from cifar10_trainer import runtime
    from cifar10_trainer.engine import Engine
    from cifar10_trainer.keras_state import seeded
    from cifar10_trainer.models import fast
    from cifar10_trainer.models.initial import initial_model, pixel_statistics

    config = RECIPES[recipe].override(seed=seed, **changes)
    strategy, _ = runtime.choose_strategy(config.strategy)
    policy, _ = runtime.choose_precision(config.precision)
    with seeded(config.seed):
        model = initial_model(config, data.train_images, data.num_classes)
        whitening = 0.0
        if config.whitening:  # again, to time it
            statistics_of_pixels = pixel_statistics(config.pixels, data.train_images)
            began = time.perf_counter()
            fast.whiten(model, data.train_images, *statistics_of_pixels)
            whitening = time.perf_counter() - began
        arrays = data.train_images[:images], data.train_labels[:images]
        classes = data.num_classes
        engine = Engine(model, config, *arrays, strategy=strategy, policy=policy, num_classes=classes)
    return engine, whitening


def restart(engine: Engine, recipe: str, data: Dataset, seed: int, **changes: Any) -> float:
    """Sets an engine to the start of a run with another seed, without compiling again; the seconds of whitening."""
    other, whitening = start(recipe, data, seed, engine.config.batch_size, **changes)
    engine.config, engine.sampler = other.config, dataclasses.replace(engine.sampler, seed=seed)
    engine.restore(other.state())
    return whitening


def train(engine: Engine) -> None:
    """Trains all steps that are left."""
    while engine.step < engine.steps:
        engine.train(engine.steps)


def tester(engine: Engine, images: np.ndarray, labels: np.ndarray) -> Callable[[], tuple[float, float]]:
    """A function that scores the engine's present weights on test images that are on the device.

    XLA compiles it where XLA compiles the engine's step.

    Args:
        engine: holds the weights.
        images: uint8 [n, height, width, 3].
        labels: integers [n].

    Returns:
        () -> test accuracy without TTA, and with the TTA of six views of `scoring.predict_probabilities`; both 0-1.
    """
    import tensorflow as tf

    n = len(images)
    size = next(s for s in range(min(500, n), 0, -1) if n % s == 0)
    x = tf.constant(np.reshape(images, (n // size, size, *images.shape[1:])))
    y = tf.constant(np.reshape(labels, (n // size, size)), tf.int64)

    @tf.function(jit_compile=engine.compiled)
    def num_correct(x: Any, y: Any) -> Any:
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

    return lambda: tuple((num_correct(x, y).numpy() / n).tolist())
