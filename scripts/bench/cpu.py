"""The sections of the benchmark for a machine without a GPU.

A section takes Options and returns its rows and its results ("verdicts"). The first line of its docstring is its title
in the table.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import results.frontier
from results.records import ROOT

from cifar10_trainer import RECIPES, process
from cifar10_trainer.precision import native_flags
from results import records

from . import baselines, timing
from .limit import limit
from .scale_out import scale_out
from .timing import Options, Section, against_goal, interleaved, rows_of, synthetic_data

TUTORIAL, OURS = "tutorial 4, its own code", "this project"
OURS_FLOAT32 = "this project, float32"
TUTORIAL_BFLOAT16 = "tutorial 4, bfloat16"  # where the processor has bfloat16
# A median over the rounds, because the speed of a processor changes between rounds.
SHARE_OF_DATA = "share of data in a step (median over the rounds' shares)"


# ---- step ------------------------------------------------------------------------------------------------


def step(o: Options) -> dict[str, Any]:
    """A training step of the fourth tutorial's network, batch 128."""
    images, labels = synthetic_data(o.batches * baselines.TUTORIAL_BATCH)
    pixels = images.astype("float32") / 255

    def ours(precision: str) -> Callable[[], float]:
        engine = timing.engine_for("leaky.baseline", images, labels, precision=precision)
        return timing.seconds_of(engine, o.batches)

    # A processor without bfloat16 of its own takes many times as long with it.
    bfloat16 = bool(native_flags())
    tutorial = {TUTORIAL: baselines.tutorial_fit(pixels, labels)}
    if bfloat16:
        tutorial[TUTORIAL_BFLOAT16] = baselines.tutorial_fit(pixels, labels, "mixed_bfloat16")
    torch = baselines.torch_steps(
        pixels,
        labels,
        bfloat16=(False, True) if bfloat16 else (False,),
        compiled=(False,) if o.quick else (False, True),
    )
    passes = {
        **tutorial,
        OURS_FLOAT32: ours("float32"),
        OURS: ours("auto"),
        **torch,
    }
    samples = interleaved(passes, o.rounds)
    rows = rows_of({n: [1e3 * s / o.batches for s in v] for n, v in samples.items()}, "ms", TUTORIAL)
    goals = [against_goal("this project / the tutorial's own code", rows[OURS]["ratio"], "at most 0.40")]
    if torch:
        best = min(torch, key=lambda n: rows[n]["median"])
        ratio = rows[OURS]["median"] / rows[best]["median"]
        goals.append(against_goal(f"this project / the best PyTorch ({best})", ratio, "at most 0.75"))
    return {"rows": rows, "verdicts": goals}


# ---- own models ------------------------------------------------------------------------------------------


def own_model(o: Options) -> dict[str, Any]:
    """A training step of other people's Keras models, batch 128: Model.fit, and `train(model=...)`."""
    import keras

    images, labels = synthetic_data(o.batches * baselines.TUTORIAL_BATCH)
    pixels = images.astype("float32") / 255

    def mobilenet() -> keras.Model:
        return keras.applications.MobileNetV2(input_shape=(32, 32, 3), weights=None, classes=10)

    def on_raw_pixels(inner: keras.Model) -> keras.Model:
        inputs = keras.Input((32, 32, 3))
        return keras.Model(inputs, inner(keras.layers.Rescaling(1 / 255)(inputs)))

    passes: dict[str, Callable[[], float]] = {}
    for name, build in (("tutorial 4's network", baselines.tutorial_four), ("MobileNetV2", mobilenet)):
        fitted = build()
        fitted.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        passes[f"{name}: Model.fit"] = baselines.fit_seconds(fitted, pixels, labels, baselines.TUTORIAL_BATCH)
        for label, precision in (("float32", "float32"), ("precision auto", "auto")):
            own = on_raw_pixels(build())
            engine = timing.engine_for("leaky.baseline", images, labels, precision=precision, model=own)
            passes[f"{name}: this project, {label}"] = timing.seconds_of(engine, o.batches)
    samples = interleaved(passes, o.rounds)
    rows: dict[str, Any] = {}
    goals = []
    for name in ("tutorial 4's network", "MobileNetV2"):
        part = {n: [1e3 * s / o.batches for s in v] for n, v in samples.items() if n.startswith(name)}
        rows |= rows_of(part, "ms", f"{name}: Model.fit")
        ratio = rows[f"{name}: this project, precision auto"]["ratio"]
        goals.append(against_goal(f"{name}: this project / Model.fit", ratio))
    return {"rows": rows, "verdicts": goals}


# ---- loader ----------------------------------------------------------------------------------------------


def loader(o: Options) -> dict[str, Any]:
    """The input pipeline alone, batch 512, one epoch: from uint8 images in memory to model input."""
    import tensorflow as tf

    from cifar10_trainer import augment
    from cifar10_trainer.config import Augmentation
    from cifar10_trainer.pipeline import BatchMaker, EpochSampler, training_data

    images, labels = synthetic_data(o.images)
    batch, count = 512, o.images // 512
    table, targets = augment.image_table(tf.constant(images)), tf.constant(labels, tf.int32)

    def ours(*, as_float32: bool = False, **augmentation: Any) -> Callable[[], float]:
        changes = Augmentation(**augmentation)
        sampler, batch_maker = EpochSampler(len(images), batch, 0, changes), BatchMaker(changes, 10)
        data = training_data(sampler, 0, count, table=table, labels=targets, batch_maker=batch_maker)
        if as_float32:  # as Keras's layers yield them; in training, the cast is the first layer of the model
            data = data.map(lambda x, y: (tf.cast(x, tf.float32), y)).prefetch(tf.data.AUTOTUNE)

        def measure() -> float:
            start = time.perf_counter()
            for _ in data:
                pass
            return count * batch / (time.perf_counter() - start)

        return measure

    keras_layers, generator = "Keras layers in map: flip, shift", "ImageDataGenerator: flip, shift"
    all_three = "this project: flip, shift, cutout"
    cast = f"{all_three}, as float32"
    candidates = {
        keras_layers: baselines.keras_layers(images, labels, batch, count),
        generator: baselines.image_data_generator(images, labels, batch, min(8, count)),
        "this project: no augmentation": ours(),
        "this project: flip, shift": ours(flip="random", shift=2),
        all_three: ours(flip="random", shift=2, cutout=8),
        cast: ours(flip="random", shift=2, cutout=8, as_float32=True),
    }
    samples = interleaved(candidates, o.rounds)
    rows = rows_of({n: [x / 1e3 for x in v] for n, v in samples.items()}, "thousand images/s", keras_layers)
    against_generator = rows[all_three]["median"] / rows[generator]["median"]
    return {
        "rows": rows,
        "verdicts": [
            against_goal("with cutout / Keras layers without", rows[all_three]["ratio"], "at least 8"),
            against_goal("with cutout, as float32 / Keras layers without", rows[cast]["ratio"]),
            against_goal("with cutout / ImageDataGenerator without", against_generator),
        ],
    }


# ---- waiting ---------------------------------------------------------------------------------------------


def waiting(o: Options) -> dict[str, Any]:
    """What the data add to a training step: its time beside that of the same step on one batch already in memory."""
    images, labels = synthetic_data(o.images)
    passes: dict[str, Callable[[], float]] = {}
    names = ("leaky.baseline", "fast.85")  # fast.85 at its first image size, where a step is shortest
    for name in names:
        steps = o.batches * 256 // RECIPES[name].batch_size
        usual, bare = (timing.engine_for(name, images, labels) for _ in range(2))
        for kind, engine in (("as in training", usual), ("one batch", with_one_batch(bare))):
            passes[f"{name}: a step, {kind}"] = timing.step_of(engine, steps)
    samples = interleaved(passes, o.rounds)
    goals = []
    for name in names:
        usual_ms, bare_ms = (samples[f"{name}: a step, {kind}"] for kind in ("as in training", "one batch"))
        share = 100 * statistics.median(1 - b / u for u, b in zip(usual_ms, bare_ms, strict=True))
        goals.append(against_goal(f"{SHARE_OF_DATA} of {name}", share, "at most 3%", "%"))
    return {"rows": rows_of(samples, "ms"), "verdicts": goals}


def with_one_batch(engine: Any) -> Any:
    """The engine, changed so that every step takes its first batch again."""
    end, size = engine._phase(0)
    batch = next(engine._batches(end, size))
    engine._next = lambda iterator: batch
    return engine


# ---- memory ----------------------------------------------------------------------------------------------


def memory(o: Options) -> dict[str, Any]:
    """Peak memory of a process that trains a few steps on CIFAR-10: the default recipe's command, and the tutorial's code."""
    steps = 2 if o.quick else 8
    flags = [f"--epochs={steps / (45_000 // RECIPES['fast.default'].batch_size)}"]
    flags += ["--set", "views=1"] if o.quick else []
    samples: dict[str, list[float]] = {TUTORIAL: [], OURS: []}
    for _ in range(1 if o.quick else 3):
        words = timing.baseline_command(f"--steps={steps}", data_dir=o.data_dir)
        samples[TUTORIAL].append(timing.peak_memory(words))
        with tempfile.TemporaryDirectory() as folder:
            words = timing.training_command(*flags, f"--workdir={folder}/run", data_dir=o.data_dir)
            samples[OURS].append(timing.peak_memory(words))
    rows = rows_of(samples, "MB", TUTORIAL)
    ratio = against_goal("this project / the tutorial's code", rows[OURS]["ratio"], "at most 0.5")
    return {"rows": rows, "verdicts": [ratio]}


# ---- scaling ---------------------------------------------------------------------------------------------

BATCH_SIZES_QUICK = (32, 256, 2048)
BATCH_SIZES = (32, 64, 128, 256, 512, 1024, 2048)


def scaling(o: Options) -> dict[str, Any]:
    """How fast.85 scales: time to its first step, with the epochs (not with --quick), and with the batch size, 32x32 images."""
    rows, goals = start_rows(o), []
    if not o.quick:
        once, twice = "fast.85, 3 epochs", "fast.85, 6 epochs"
        spent: dict[str, list[float]] = {once: [], twice: []}
        for seed in range(3):
            for name, epochs in ((once, 3), (twice, 6)):
                flags = ["--recipe=fast.85", f"--epochs={epochs}", f"--seed={seed}"]
                history = timing.trained(*flags, data_dir=o.data_dir)["history"]
                spent[name].append(sum(row["seconds"] for row in history))
        rows.update(rows_of(spent, "s of training", once))
        goals = [against_goal("twice the epochs / once", rows[twice]["ratio"], "2 within 5%")]

    sizes = BATCH_SIZES_QUICK if o.quick else BATCH_SIZES
    images, labels = synthetic_data(max(*sizes, o.batches * 128))

    def speed(batch: int) -> Callable[[], float]:
        steps = len(images) // batch
        engine = timing.engine_for("fast.85", images, labels, sizes=(), batch_size=batch)
        seconds = timing.seconds_of(engine, steps)
        return lambda: steps * batch / seconds()

    speeds = interleaved({f"fast.85, batch {b:,}": speed(b) for b in sizes}, o.rounds)
    return {"rows": {**rows, **rows_of(speeds, "images/s")}, "verdicts": goals}


def start_rows(o: Options) -> dict[str, Any]:
    """The rows of the time from the start of a process to its first step."""
    starts: dict[str, list[float]] = {TUTORIAL: [], OURS: []}
    for _ in range(1 if o.quick else 3):
        starts[TUTORIAL].append(timing.first_step(timing.baseline_command("--steps=8", data_dir=o.data_dir)))
        with tempfile.TemporaryDirectory() as folder:
            # --verbose: the progress bar, into a pipe
            flags = ["--recipe=fast.85", f"--workdir={folder}/run", "--verbose"]
            words = timing.training_command(*flags, data_dir=o.data_dir)
            starts[OURS].append(timing.first_step(words))
    return rows_of({f"{n}: start to first step": v for n, v in starts.items()}, "s")


# ---- precision and target --------------------------------------------------------------------------------


def precision(o: Options) -> dict[str, Any]:
    """Validation accuracy of fast.85 in bfloat16 and in float32, with the same seeds."""
    if not native_flags():
        print("  left out: this processor has no bfloat16")
        return {}
    runs: dict[str, list[dict[str, Any]]] = {"float32": [], "mixed_bfloat16": []}
    for seed in range(o.seeds):
        for name, found in runs.items():
            flags = ["--recipe=fast.85", f"--precision={name}", f"--seed={seed}"]
            found.append(timing.trained(*flags, data_dir=o.data_dir))
            print(f"  seed {seed}, {name}: {found[-1]['best_val_accuracy']:.4f}", flush=True)
    accuracies = {n: [100 * r["best_val_accuracy"] for r in found] for n, found in runs.items()}
    rows = {
        **rows_of({f"{n}: validation accuracy": v for n, v in accuracies.items()}, "%"),
        **rows_of({f"{n}: training": [r["train_seconds"] for r in v] for n, v in runs.items()}, "s"),
    }
    differences = [b - a for a, b in zip(*accuracies.values(), strict=True)]
    goal = "0"
    if o.seeds > 1:
        goal += f" within two standard errors of {statistics.stdev(differences) / o.seeds**0.5:.2f}"
    what = "bfloat16 less float32, mean of the seeds"
    mean = against_goal(what, statistics.mean(differences), goal, " points")
    return {"rows": rows, "verdicts": [mean], "runs": runs}


def target(o: Options) -> dict[str, Any]:
    """From the start of the process to 85% of the validation images: fast.85, interleaved with the fourth tutorial's own code."""
    runs, epochs = [], []
    for seed in range(o.seeds):
        run = timing.trained("--recipe=fast.85", f"--seed={seed}", data_dir=o.data_dir)
        words = timing.baseline_command(*(["--steps=10"] if o.quick else []), data_dir=o.data_dir)
        tutorial = json.loads(timing.output_of(words).splitlines()[-1])
        print(
            f"  seed {seed}: {run['seconds_to_target']} s, {run['best_val_accuracy']:.4f};"
            f" tutorial {tutorial['seconds_an_epoch']:.0f} s an epoch", flush=True,
        )  # fmt: skip
        runs.append(run)
        epochs.append(tutorial)
    reached = [r["seconds_to_target"] for r in runs if r["seconds_to_target"]]
    steps, whole = epochs[0]["steps"], epochs[0]["steps_an_epoch"]
    measured = "" if steps == whole else f", from {steps} of {whole} steps"
    epoch = f"{TUTORIAL}: an epoch{measured}"
    rows = {
        **(rows_of({"fast.85: to 85%": reached}, "s") if reached else {}),
        **rows_of({"fast.85: validation accuracy": [100 * r["best_val_accuracy"] for r in runs]}, "%"),
        **rows_of({epoch: [e["seconds_an_epoch"] for e in epochs]}, "s"),
    }
    goals = [against_goal("seeds that reach 85%", len(reached), f"all {len(runs)}")]
    if reached:
        median = statistics.median(reached)
        goals.insert(0, against_goal("median time to 85%", median, "at most 60 s", " s"))
        needed = tutorial_epochs(records.load())
        if needed:
            factor = needed * rows[epoch]["median"] / median
            what = f"the tutorial's code to 85% (epoch {needed:g} in the record of leaky.baseline) / fast.85"
            goals.append(against_goal(what, factor, "at least 38"))
    return {"rows": rows, "verdicts": goals, "runs": runs}


def tutorial_epochs(runs: list[records.Record]) -> float | None:
    """The epoch in which the fourth tutorial's recipe reaches 85% validation accuracy, the median of its records."""
    found = [
        r["metrics"]["epoch_at_target"]
        for r in runs
        if r["metrics"]["recipe"] == "leaky.baseline" and r["config"]["epochs"] == 40
    ]
    found = [epoch for epoch in found if epoch]
    return statistics.median(found) if found else None


# ---- frontier --------------------------------------------------------------------------------------------


def frontier(o: Options) -> dict[str, Any]:
    """Accuracy of two recipes at 2 to 40 epochs, from their records; without --quick it trains the missing ones."""
    for recipe, n in () if o.quick else results.frontier.missing(records.load()):
        words = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), recipe, f"--epochs={n}"]
        words += [f"--data_dir={o.data_dir}"] if o.data_dir else []
        status, stopped_by = process.call(words, cwd=ROOT)
        if status or stopped_by:
            raise process.failure(f"{recipe} with {n} epochs", stopped_by)
    results.frontier.publish_points(records.load())
    return {}  # its numbers are those of the records


SECTIONS: dict[str, Section] = {
    s.__name__: s
    for s in (
        step,
        own_model,
        limit,
        loader,
        waiting,
        memory,
        scaling,
        scale_out,
        precision,
        target,
        frontier,
    )
}
NOT_QUICK = ("precision",)  # the accuracy after a part of a run means nothing
