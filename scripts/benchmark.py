"""Times this project and its peers side by side, in one run.

    python scripts/benchmark.py                   # every comparison
    python scripts/benchmark.py --quick           # smaller, under five minutes; leaves out what needs many whole trainings
    python scripts/benchmark.py step loader       # only these
    python scripts/benchmark.py --gpu             # those for a machine with a GPU, under eight minutes
    python scripts/benchmark.py --gpu --airbench=PATH    # airbench's own scripts, too, from its checkout
    python scripts/benchmark.py --gpu gpu_96      # the recipe for 95-96%, too long for the eight minutes
    python scripts/benchmark.py --record=results/benchmark-xeon.json step    # another machine's record, not the README's

The rules of the clock:
- What is compared runs in turn, A B A B, in one process or each in its own, after a round that does not count; a number
  is a median, with its range; a ratio is the ratio of medians; a share is the median of the rounds' shares, because a
  processor's own speed differs from round to round. So tracing and compiling do not count unless it is said.
- A training step includes its data: the time is of a whole pass, over random images that are in memory.
- GFLOP count as the speed records do: two a multiply-add of convolutions and dense layers, three forward passes a
  step. That counts gradients that no one computes, to the first trained convolution's input and of the whitening:
  2 to 4% of a step, 7% of that of fast.85.
- Time to target counts from the start of the process: imports, data, tracing and validation are in it. The first
  number that reaches the target must be of the 10% of the training images held out.
- On a GPU, training and test with averaged views are timed, from weights and images that are there to the number of
  right answers; compiling is a row of its own, and so is whitening, which airbench's clock includes.
- The machine does nothing else: contention slows some peers ten times as much as others. What other processes took
  just before a section is in its record, and the table says so where it was more than 5% of the processors.
- Nobody else's code is tuned by us beyond what stands in peers.py; each peer is the way its documentation shows.
- The record, results/benchmark.json, holds every sample, and for each section its date, versions, hardware and commit.

PyTorch is compared where it is installed. Nothing here depends on it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clock
import frontier as frontier_of
import gpu
import peers
import reproduce
from absl import flags
from clock import ROOT, Options, in_turn, made_up, number, rows_of, verdict

from cifar10_trainer import RECIPES, ConfigError, RunError, cli
from cifar10_trainer.errors import unknown

RECORD = ROOT / "results" / "benchmark.json"
FIGURE = ROOT / "docs" / "benchmark.png"
QUIET = 0.05  # of the processors' time that other processes may take
GPU_SECONDS = 460  # airbench's scripts are stopped then, with what they have

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
flags.DEFINE_boolean("quick", False, "fewer rounds and seeds, shorter runs", flag_values=FLAGS)
flags.DEFINE_boolean("gpu", False, "the comparisons for a machine with a GPU", flag_values=FLAGS)
flags.DEFINE_integer(
    "seeds", None, "runs of what is trained; default: 5, on a GPU 20, with --quick 1 and 3", lower_bound=1,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("data_dir", None, "where CIFAR-10 is", flag_values=FLAGS)
flags.DEFINE_string("airbench", None, "with --gpu: the folder of airbench's checkout", flag_values=FLAGS)
flags.DEFINE_string(
    "record", None, "where the numbers go; default: results/benchmark.json, which the README shows", flag_values=FLAGS
)  # fmt: skip

TUTORIAL, OURS = "tutorial 4, its own code", "this project"


def step(o: Options) -> dict[str, Any]:
    """A training step of the fourth tutorial's network, batch 128."""
    images, labels = made_up(o.batches * peers.TUTORIAL_BATCH)
    pixels = images.astype("float32") / 255

    def ours(precision: str) -> Callable[[], float]:
        return clock.seconds_of(
            clock.engine_for("leaky.baseline", images, labels, precision=precision), o.batches
        )

    torch = peers.torch_steps(pixels, labels, compiled=(False,) if o.quick else (False, True))
    passes = {
        TUTORIAL: peers.tutorial_fit(pixels, labels),
        "tutorial 4, bfloat16": peers.tutorial_fit(pixels, labels, "mixed_bfloat16"),
        "this project, float32": ours("float32"),
        OURS: ours("auto"),
        **torch,
    }
    samples = in_turn(passes, o.rounds)
    rows = rows_of({n: [1e3 * s / o.batches for s in v] for n, v in samples.items()}, "ms", TUTORIAL)
    verdicts = [verdict("this project / the tutorial's own code", rows[OURS]["ratio"], "at most 0.40")]
    if torch:
        best = min(torch, key=lambda n: rows[n]["median"])
        ratio = rows[OURS]["median"] / rows[best]["median"]
        verdicts.append(verdict(f"this project / the best PyTorch ({best})", ratio, "at most 0.75"))
    return {"rows": rows, "verdicts": verdicts}


EFFICIENCY_QUICK = ("fast.default", "leaky.baseline")
EFFICIENCY: tuple[str, ...] = (*EFFICIENCY_QUICK, "fast.85", "fast.94", "vgg.3")
EFFICIENCY += ("practical.baseline", "course.baseline", "wide_head.baseline")


def efficiency(o: Options) -> dict[str, Any]:
    """Arithmetic of training, 32x32 images, over the best that the networks' 3x3 convolutions reach alone."""
    from cifar10_trainer import models, runtime

    names = EFFICIENCY_QUICK if o.quick else EFFICIENCY
    images, labels = made_up(max(o.batches * 128, *(RECIPES[n].batch_size for n in names)))

    def recipe(name: str) -> Callable[[], float]:
        engine = clock.engine_for(name, images, labels, sizes=())
        steps = max(1, o.batches * 128 // engine.config.batch_size)
        gflop = 3 * steps * engine.config.batch_size * models.forward_flops(engine.model) / 1e9
        seconds = clock.seconds_of(engine, steps)
        return lambda: gflop / seconds()

    engines = {f"{name}, batch {RECIPES[name].batch_size}": recipe(name) for name in names}
    policy, _ = runtime.choose_precision("auto")
    dtype = "bfloat16" if policy == "mixed_bfloat16" else "float32"
    alone = {
        f"convolution alone, {dtype}: {side}x{side}, {into} to {out}, {padding}": convolution_gflops(
            side, into, out, padding, dtype
        )
        for side, into, out, padding in sorted({shape for name in names for shape in convolutions(name)})
    }
    samples = in_turn({**alone, **engines}, o.rounds)
    peak = max(alone, key=lambda n: statistics.median(samples[n]))
    rows = rows_of({n: samples[n] for n in (peak, *engines)}, "GFLOP/s", peak)
    shares = {
        n: 100 * statistics.median(a / b for a, b in zip(samples[n], samples[peak], strict=True))
        for n in engines
    }
    verdicts = [verdict(f"share of the peak: {n}", share, "70%", "%") for n, share in shares.items()]
    return {"rows": rows, "verdicts": verdicts}


def convolutions(recipe: str) -> set[tuple[int, int, int, str]]:
    """(side of the input, channels in, channels out, padding) of a recipe's 3x3 convolutions of 32x32 images."""
    import keras

    from cifar10_trainer import models

    layers = models.build(RECIPES[recipe], input_shape=(32, 32, 3), num_classes=10).layers
    return {
        (layer.input.shape[1], layer.input.shape[-1], layer.filters, layer.padding)
        for layer in layers
        if isinstance(layer, keras.layers.Conv2D) and layer.kernel_size == (3, 3)
    }


def convolution_gflops(
    side: int, into: int, out: int, padding: str, dtype: str, batch: int = 512, times: int = 2
) -> Callable[[], float]:
    """GFLOP/s of one convolution: forward, and both gradients."""
    import tensorflow as tf

    x = tf.cast(tf.random.normal([batch, side, side, into]), dtype)
    kernel = tf.cast(tf.random.normal([3, 3, into, out]), dtype)
    shape = tf.nn.conv2d(x, kernel, 1, padding.upper()).shape
    seeds = tf.cast(tf.random.normal(shape), dtype)
    gflop = times * 3 * 2 * 9 * into * out * shape[0] * shape[1] * shape[2] / 1e9

    @tf.function
    def run(x, kernel, seeds):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = tf.nn.conv2d(x, kernel, 1, padding.upper())
        return y, *tape.gradient(y, [x, kernel], seeds)

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(times):
            done = run(x, kernel, seeds)
        done[-1].numpy()  # waits
        return gflop / (time.perf_counter() - start)

    return measure


def loader(o: Options) -> dict[str, Any]:
    """The input pipeline alone, batch 512, an epoch: uint8 images in memory in, model input out."""
    import tensorflow as tf

    from cifar10_trainer import augment
    from cifar10_trainer.config import Augmentation
    from cifar10_trainer.pipeline import BatchMaker, EpochSampler, training_data

    images, labels = made_up(o.images)
    batch, count = 512, o.images // 512
    table, targets = augment.image_table(tf.constant(images)), tf.constant(labels, tf.int32)

    def ours(**augmentation) -> Callable[[], float]:
        changes = Augmentation(**augmentation)
        order, fetcher = EpochSampler(len(images), batch, 0, changes), BatchMaker(changes, 10)
        data = training_data(order, 0, count, table=table, labels=targets, batch_maker=fetcher)

        def measure() -> float:
            start = time.perf_counter()
            for _ in data:
                pass
            return count * batch / (time.perf_counter() - start)

        return measure

    keras_layers, generator = "Keras layers in map: flip, shift", "ImageDataGenerator: flip, shift"
    all_three = "this project: flip, shift, cutout"
    candidates = {
        keras_layers: peers.keras_layers(images, labels, batch, count),
        generator: peers.image_data_generator(images, labels, batch, min(8, count)),
        "this project: no augmentation": ours(),
        "this project: flip, shift": ours(flip="random", shift=2),
        all_three: ours(flip="random", shift=2, cutout=8),
    }
    samples = in_turn(candidates, o.rounds)
    rows = rows_of({n: [x / 1e3 for x in v] for n, v in samples.items()}, "thousand images/s", keras_layers)
    against_old = rows[all_three]["median"] / rows[generator]["median"]
    return {
        "rows": rows,
        "verdicts": [
            verdict("with cutout / Keras layers without", rows[all_three]["ratio"], "at least 8"),
            verdict("with cutout / ImageDataGenerator without", against_old),
        ],
    }


def waiting(o: Options) -> dict[str, Any]:
    """What data add to a training step: how much longer it is than the same step on one batch that is there already."""
    images, labels = made_up(o.images)
    passes: dict[str, Callable[[], float]] = {}
    names = ("leaky.baseline", "fast.85")  # fast.85 at its first size, where a step is shortest
    for name in names:
        steps = o.batches * 256 // RECIPES[name].batch_size
        usual, bare = (clock.engine_for(name, images, labels) for _ in range(2))
        passes[f"{name}: a step, as in training"] = milliseconds_of(usual, steps)
        passes[f"{name}: a step, one batch"] = milliseconds_of(with_one_batch(bare), steps)
    samples = in_turn(passes, o.rounds)
    verdicts = []
    for name in names:
        whole, bare = (samples[f"{name}: a step, {kind}"] for kind in ("as in training", "one batch"))
        share = 100 * statistics.median(1 - b / w for w, b in zip(whole, bare, strict=True))
        verdicts.append(verdict(f"share of data in a step of {name}", share, "at most 3%", "%"))
    return {"rows": rows_of(samples, "ms"), "verdicts": verdicts}


def milliseconds_of(engine: Any, steps: int) -> Callable[[], float]:
    """What measures the milliseconds of each of `steps` steps."""
    seconds = clock.seconds_of(engine, steps)
    return lambda: 1e3 * seconds() / steps


def with_one_batch(engine: Any) -> Any:
    """The engine, changed to take its first batch at every step."""
    _, end, size = engine._phase(0)
    batch = next(engine._batches(end, size))
    engine._next = lambda iterator: batch
    return engine


def memory(o: Options) -> dict[str, Any]:
    """Peak memory of a process that trains a few steps on CIFAR-10: the default recipe's command, and the tutorial's code."""
    steps = 2 if o.quick else 8
    flags = [f"--epochs={steps / (45_000 // RECIPES['fast.default'].batch_size)}"]
    flags += ["--set", "views=1"] if o.quick else []
    samples: dict[str, list[float]] = {TUTORIAL: [], OURS: []}
    for _ in range(1 if o.quick else 3):
        samples[TUTORIAL].append(clock.peak_memory(clock.peer(f"--steps={steps}", data_dir=o.data_dir)))
        with tempfile.TemporaryDirectory() as folder:
            words = clock.command(*flags, f"--workdir={folder}/run", data_dir=o.data_dir)
            samples[OURS].append(clock.peak_memory(words))
    rows = rows_of(samples, "MB", TUTORIAL)
    ratio = verdict("this project / the tutorial's code", rows[OURS]["ratio"], "at most 0.5")
    return {"rows": rows, "verdicts": [ratio]}


BATCH_SIZES_QUICK = (32, 256, 2048)
BATCH_SIZES = (32, 64, 128, 256, 512, 1024, 2048)


def scaling(o: Options) -> dict[str, Any]:
    """How fast.85 grows: to its first step, with the epochs (not with --quick), and with the batch size, 32x32 images."""
    starts: dict[str, list[float]] = {TUTORIAL: [], OURS: []}
    for _ in range(1 if o.quick else 3):
        starts[TUTORIAL].append(clock.first_step(clock.peer("--steps=8", data_dir=o.data_dir)))
        with tempfile.TemporaryDirectory() as folder:
            words = clock.command("--recipe=fast.85", f"--workdir={folder}/run", data_dir=o.data_dir)
            starts[OURS].append(clock.first_step(words))
    rows = rows_of({f"{n}: start to first step": v for n, v in starts.items()}, "s")

    verdicts = []
    if not o.quick:
        once, twice = "fast.85, 3 epochs", "fast.85, 6 epochs"
        spent: dict[str, list[float]] = {once: [], twice: []}
        for seed in range(3):
            for name, epochs in ((once, 3), (twice, 6)):
                flags = ["--recipe=fast.85", f"--epochs={epochs}", f"--seed={seed}"]
                history = clock.trained(*flags, data_dir=o.data_dir)["history"]
                spent[name].append(sum(row["seconds"] for row in history))
        rows.update(rows_of(spent, "s of training", once))
        verdicts = [verdict("twice the epochs / once", rows[twice]["ratio"], "2 within 5%")]

    sizes = BATCH_SIZES_QUICK if o.quick else BATCH_SIZES
    images, labels = made_up(max(*sizes, o.batches * 128))

    def speed(batch: int) -> Callable[[], float]:
        steps = len(images) // batch
        engine = clock.engine_for("fast.85", images, labels, sizes=(), batch_size=batch)
        seconds = clock.seconds_of(engine, steps)
        return lambda: steps * batch / seconds()

    speeds = in_turn({f"fast.85, batch {b:,}": speed(b) for b in sizes}, o.rounds)
    return {"rows": {**rows, **rows_of(speeds, "images/s")}, "verdicts": verdicts}


def precision(o: Options) -> dict[str, Any]:
    """Validation accuracy of fast.85 in bfloat16 and in float32, the same seeds."""
    runs: dict[str, list[dict[str, Any]]] = {"float32": [], "mixed_bfloat16": []}
    for seed in range(o.seeds):
        for name, found in runs.items():
            flags = ["--recipe=fast.85", f"--precision={name}", f"--seed={seed}"]
            found.append(clock.trained(*flags, data_dir=o.data_dir))
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
    mean = verdict("bfloat16 less float32, mean of the seeds", statistics.mean(differences), goal, " points")
    return {"rows": rows, "verdicts": [mean], "runs": runs}


def target(o: Options) -> dict[str, Any]:
    """From the start of the process to 85% of the validation images: fast.85, in turn with the fourth tutorial's own code."""
    runs, epochs = [], []
    for seed in range(o.seeds):
        run = clock.trained("--recipe=fast.85", f"--seed={seed}", data_dir=o.data_dir)
        words = clock.peer(*(["--steps=10"] if o.quick else []), data_dir=o.data_dir)
        peer = json.loads(clock.output_of(words).splitlines()[-1])
        print(
            f"  seed {seed}: {run['seconds_to_target']} s, {run['best_val_accuracy']:.4f};"
            f" tutorial {peer['seconds_an_epoch']:.0f} s an epoch", flush=True,
        )  # fmt: skip
        runs.append(run)
        epochs.append(peer)
    reached = [r["seconds_to_target"] for r in runs if r["seconds_to_target"]]
    steps, whole = epochs[0]["steps"], epochs[0]["steps_an_epoch"]
    measured = "" if steps == whole else f", from {steps} of {whole} steps"
    epoch = f"{TUTORIAL}: an epoch{measured}"
    rows = {
        **(rows_of({"fast.85: to 85%": reached}, "s") if reached else {}),
        **rows_of({"fast.85: validation accuracy": [100 * r["best_val_accuracy"] for r in runs]}, "%"),
        **rows_of({epoch: [e["seconds_an_epoch"] for e in epochs]}, "s"),
    }
    verdicts = [verdict("seeds that reach 85%", len(reached), f"all {len(runs)}")]
    if reached:
        median = statistics.median(reached)
        verdicts.insert(0, verdict("median time to 85%", median, "at most 60 s", " s"))
        needed = tutorial_epochs(reproduce.load_records())
        if needed:
            factor = needed * rows[epoch]["median"] / median
            what = f"the tutorial's code to 85% (epoch {needed:g} in the record of leaky.baseline) / fast.85"
            verdicts.append(verdict(what, factor, "at least 38"))
    return {"rows": rows, "verdicts": verdicts, "runs": runs}


def tutorial_epochs(records: list[dict[str, Any]]) -> float | None:
    """The epoch at which the fourth tutorial's recipe reaches 85% validation accuracy: the records' median."""
    found = [
        r["metrics"]["epoch_at_target"]
        for r in records
        if r["metrics"]["recipe"] == "leaky.baseline" and r["config"]["epochs"] == 40
    ]
    found = [epoch for epoch in found if epoch]
    return statistics.median(found) if found else None


def frontier(o: Options) -> dict[str, Any]:
    """Accuracy of the default recipe at 2 to 40 epochs, from their records; trains what has none, but for --quick."""
    for n in () if o.quick else frontier_of.missing(reproduce.load_records()):
        words = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "fast.default", f"--epochs={n}"]
        words += [f"--data_dir={o.data_dir}"] if o.data_dir else []
        if subprocess.run(words, cwd=ROOT, check=False).returncode:
            raise RunError(f"fast.default with {n} epochs did not end well; its own line above says why")
    frontier_of.publish(reproduce.load_records())
    return {}  # its numbers are the records'


Section = Callable[[Options], dict[str, Any]]
SECTIONS: dict[str, Section] = {
    s.__name__: s for s in (step, efficiency, loader, waiting, memory, scaling, precision, target, frontier)
}
NOT_QUICK = ("precision",)  # accuracy after a part of a run says nothing
GPU_SECTIONS: dict[str, Section] = {
    s.__name__: s for s in (gpu.gpu_step, gpu.gpu_94, gpu.gpu_airbench, gpu.gpu_96)
}
NAMED_ONLY = ("gpu_96",)  # so that the others fit into eight minutes


# ---- the record ------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """The README's table of the record."""
    lines = ["| | median | from - to | ratio |", "|---|--:|--:|--:|"]
    made: dict[str, list[str]] = {}
    for name, section in {**SECTIONS, **GPU_SECTIONS}.items():
        if name not in record["sections"]:
            continue
        part = record["sections"][name]
        lines.append(f"| **{name}**: {(section.__doc__ or '').strip().rstrip('.')} | | | |")
        for row_name, row in part["rows"].items():
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
            lines.append(
                f"| {row_name} | {number(row['median'])} {row['unit']} | {clock.spread(row)} | {ratio} |"
            )
        for v in part["verdicts"]:
            goal = f"goal: {v['goal']}" if v["goal"] else ""
            lines.append(f"| *{v['what']}* | **{number(v['value'])}{v['unit']}** | {goal} | |")
        where = part["environment"]
        device = where["processor"] + ("" if where["gpus"] == "none" else f", {where['gpus']}")
        versions = f"TensorFlow {where['tensorflow']}, Keras {where['keras']}"
        quick = ", with --quick" if part["quick"] else ""
        quick += ", beside other work" if (part["others_share"] or 0) > QUIET else ""
        made.setdefault(f"{device}; {versions}; {part['date']}{quick}", []).append(name)
    return "\n".join([*lines, "", *(f"{', '.join(names)}: {how}." for how, names in made.items())])


def bars(record: dict[str, Any], path: Path) -> None:
    """Draws the medians and ranges of the sections step and loader, as far as there are any, to the PNG file `path`."""
    from cifar10_trainer.figures import BLUE, FAINT, INK, new_figure, save_figure, style_axes

    found = [(n, record["sections"][n]) for n in ("step", "loader") if n in record["sections"]]
    if not found:
        return
    heights = [len(section["rows"]) for _, section in found]
    figure = new_figure(9, 0.28 * sum(heights) + 0.9 * len(found))
    panels = figure.subplots(len(found), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (name, section) in zip(panels, found, strict=True):
        rows = section["rows"]
        unit = next(iter(rows.values()))["unit"]
        titles = {"step": f"A training step, {unit}", "loader": f"The input pipeline, {unit}"}
        style_axes(axes, titles[name], grid="x")
        medians = [row["median"] for row in rows.values()]
        colours = [BLUE if row_name.startswith(OURS) else FAINT for row_name in rows]
        axes.barh(range(len(rows)), medians, color=colours, height=0.72)
        for i, row in enumerate(rows.values()):
            axes.plot([row["min"], row["max"]], [i, i], color=INK, linewidth=1)
            axes.annotate(
                number(row["median"]), (row["max"], i), (4, 0), textcoords="offset points",
                va="center", fontsize=8.5, color=INK,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(row["max"] for row in rows.values()))
    save_figure(figure, path)


def read(path: Path) -> dict[str, Any]:
    """The record at `path`, empty where there is none yet. Raises ConfigError where something else is."""
    if not path.exists():
        return {"sections": {}}
    try:
        return {"sections": dict(json.loads(path.read_text())["sections"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"record is {path}, which is none; allowed: a new file, or one of this command's"
        ) from error


def keep(name: str, found: dict[str, Any]) -> None:
    """Puts a section's numbers, with when, where and by what they were made, into the record; that of the README, there, too."""
    from cifar10_trainer import files, runtime

    path = Path(FLAGS.record or RECORD)
    record = read(path)
    words = [f"XLA_FLAGS={v!r}" for v in [os.environ.get("XLA_FLAGS")] if v and FLAGS.gpu]
    words += ["python scripts/benchmark.py", name]
    words += [f"--{n}" for n in ("gpu", "quick") if FLAGS[n].value]
    words += [f"--seeds={FLAGS.seeds}"] if FLAGS.seeds else []
    words += ["--airbench=PATH"] if FLAGS.airbench else []
    words += [f"--record={FLAGS.record}"] if FLAGS.record else []
    record["sections"][name] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": reproduce.commit(),
        "command": " ".join(words),
        "quick": FLAGS.quick,
        "environment": runtime.describe(),
        **found,
    }
    files.write_atomic(path, json.dumps(record, indent=1) + "\n")
    if FLAGS.record:
        return
    reproduce.rewrite(ROOT / "README.md", "benchmark", table(record))
    if name in ("step", "loader"):
        bars(record, FIGURE)


def options() -> Options:
    """What the flags ask for."""
    usual = (3 if FLAGS.quick else 20) if FLAGS.gpu else (1 if FLAGS.quick else 5)
    less = {"rounds": 3, "batches": 5} if FLAGS.quick else {"rounds": 3} if FLAGS.gpu else {}
    return Options(
        quick=FLAGS.quick,
        seeds=FLAGS.seeds or usual,
        data_dir=FLAGS.data_dir and str(Path(FLAGS.data_dir).absolute()),  # commands run elsewhere
        airbench=FLAGS.airbench,
        deadline=time.perf_counter() + GPU_SECONDS,
        **less,
    )


def main(argv: list[str]) -> None:
    sections = GPU_SECTIONS if FLAGS.gpu else SECTIONS
    for name in argv:
        if name not in sections:
            raise unknown("section", name, sections)
    if FLAGS.airbench and not FLAGS.gpu:
        raise ConfigError(f"airbench is {FLAGS.airbench}; allowed with --gpu only")
    if not (ROOT / "README.md").exists():
        raise ConfigError("the benchmark runs in a checkout; its README.md is not there")
    read(Path(FLAGS.record or RECORD))  # not only when all is measured
    cli.import_tensorflow()
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # that many functions are traced is meant
    if FLAGS.gpu and not tf.config.list_physical_devices("GPU"):
        raise ConfigError("gpu is True, but TensorFlow sees no GPU; allowed: on a machine with one")
    began, asked = time.perf_counter(), options()
    for name in argv or [n for n in sections if n not in (*NAMED_ONLY, *(NOT_QUICK if FLAGS.quick else ()))]:
        print(f"\n== {name}: {sections[name].__doc__}", flush=True)
        busy = clock.others_share()
        if busy is not None and busy > QUIET:
            print(
                f"  other processes take {busy:.0%} of the processors: ratios will be wrong, too", flush=True
            )
        found = sections[name](asked)
        if found:
            keep(name, {"others_share": busy, **found})
        print(f"  ({time.perf_counter() - began:.0f} s so far)", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
