"""The benchmark's parts: how it measures, its sections on a few synthetic images, and its baselines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import results.frontier
import tensorflow as tf
from bench import baselines, cpu, gpu, limit, record, scale_out, timing
from bench.timing import Options
from results.records import ROOT

from cifar10_trainer import RECIPES, models, scoring
from cifar10_trainer.accelerate import make_training_model
from cifar10_trainer.datasets import Dataset
from cifar10_trainer.engine import Engine
from cifar10_trainer.errors import RunError
from cifar10_trainer.pipeline import tuned_by_hand
from results import records

TINY = Options(quick=True, rounds=1, batches=1, images=1024, seeds=2)


def synthetic_dataset(n=96, n_test=20, seed=0):
    rng = np.random.default_rng(seed)

    def part(n):
        return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)

    return Dataset("cifar10", *part(n), *part(n_test), tuple("abcdefghij"), "synthetic")


# --- measuring ------------------------------------------------------------------------------------------


def test_candidates_run_interleaved_and_the_first_round_does_not_count():
    order = []

    def candidate(name):
        def measure():
            order.append(name)
            return 10 * len(order) + (name == "b")

        return measure

    found = timing.interleaved({"a": candidate("a"), "b": candidate("b")}, 2)
    assert "".join(order) == "ababab"
    assert found == {"a": [30, 50], "b": [41, 61]}


def test_rows_by_hand():
    rows = timing.rows_of({"a": [2.0, 8.0, 4.0], "b": [1.0, 1.0, 5.0]}, "ms", "a")
    assert rows["a"] == {"unit": "ms", "median": 4, "min": 2, "max": 8, "samples": [2, 8, 4], "ratio": 1}
    assert (rows["b"]["median"], rows["b"]["ratio"]) == (1, 0.25)
    assert "ratio" not in timing.rows_of({"a": [1.0]}, "s")["a"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4, "0.40"), (9.994, "9.99"), (12.34, "12.3"), (160_000.4, "160,000"), (-21.1, "-21.1"), (3, "3")],
)
def test_numbers_for_people(value, text):
    assert timing.number(value) == text


def test_the_memory_of_a_command_is_its_own():
    ours = np.ones(60_000_000)  # 480 MB that this process holds, and has touched
    need = "x = b'1' * 200_000_000"
    peak, bare = (timing.peak_memory([sys.executable, "-c", code]) for code in (need, "pass"))
    assert peak - bare == pytest.approx(200e6 / 2**20, rel=0.05)
    assert bare < 100 < ours.nbytes / 2**20


def test_a_command_that_fails_is_one_line():
    with pytest.raises(RunError, match="gave exit status 3: so it is"):
        timing.output_of(
            [sys.executable, "-c", "import sys; print('a\\nso it is', file=sys.stderr); sys.exit(3)"]
        )
    assert timing.output_of([sys.executable, "-c", "print(5)"]) == "5\n"


def test_a_command_whose_memory_is_measured_fails_with_its_own_line():
    with pytest.raises(RunError, match="gave exit status 4: no data"):
        timing.peak_memory(
            [sys.executable, "-c", "import sys; print('no data', file=sys.stderr); sys.exit(4)"]
        )


def test_a_stopped_measurement_leaves_no_process(tmp_path):
    pid = tmp_path / "pid"
    measured = (
        f"import os, time; print(os.getpid(), file=open({str(pid)!r}, 'w'), flush=True); time.sleep(60)"
    )
    (tmp_path / "measured.py").write_text(measured)
    program = "import sys; from bench import timing; timing.peak_memory([sys.executable, sys.argv[1]])"
    command = [sys.executable, "-c", program, str(tmp_path / "measured.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not (pid.exists() and pid.read_text().endswith("\n")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    until = time.monotonic() + 10
    while Path("/proc", pid.read_text().strip(), "cmdline").exists():  # it is nobody's zombie: init reaps it
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_first_step_is_when_the_progress_bar_shows_it():
    started = time.perf_counter()
    program = (
        "import time; print('accuracy', flush=True); time.sleep(1); print('1/9 accuracy: 0.1', flush=True); "
    )
    seconds = timing.first_step([sys.executable, "-c", program + "time.sleep(60)"])
    assert 1 < seconds < 20
    assert time.perf_counter() - started < 30  # and it did not wait for the end
    with pytest.raises(RunError, match="ended before its first step: oh no"):
        timing.first_step([sys.executable, "-c", "import sys; sys.exit('oh no')"])


def test_what_other_processes_take(monkeypatch):
    texts = iter(["cpu 100 0 50 800 50 0 0 0 9 9\ncpu0 1", "cpu 150 0 60 830 60 0 0 0 9 9\ncpu0 1"])
    monkeypatch.setattr(timing.Path, "read_text", lambda self: next(texts))
    # 100 ticks more, of which 40 idle or waiting for disks.
    assert timing.others_share(0) == pytest.approx(0.6)
    monkeypatch.setattr(timing.Path, "read_text", lambda self: "")
    assert timing.others_share(0) is None


@pytest.mark.slow
def test_the_training_command_shows_its_first_step_in_a_pipe(tmp_path, monkeypatch):
    """The progress bar of the command that `start_rows` measures, on the digits."""
    commands = []
    monkeypatch.setattr(timing, "first_step", lambda words: commands.append(words) or 1.0)
    cpu.start_rows(TINY)
    monkeypatch.undo()
    (ours,) = [words for words in commands if "cifar10_trainer" in words]
    changes = {"--recipe": "--dataset=digits", "--workdir": f"--workdir={tmp_path}/run"}
    words = [changes.get(word.partition("=")[0], word) for word in ours]
    assert 0 < timing.first_step([*words, "--epochs=200"]) < 120
    assert not (tmp_path / "run" / "history.csv").exists()  # it was in the first epoch, not after it


@pytest.mark.slow
def test_a_training_in_a_process_of_its_own():
    found = timing.trained("--dataset=digits", "--epochs=2", "--set", "options.filters=[4,8]")
    assert found["dataset"] == "digits" and len(found["history"]) == found["epochs"] == 2
    assert 0 < sum(row["seconds"] for row in found["history"]) < found["total_seconds"]


# --- the sections ---------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The recipes that the sections take, with few FLOPs."""
    tiny = {
        "leaky.baseline": {"options": {"blocks": ((4,), (4,)), "dense": 8, "dropout": 0.1}},
        "fast.85": {"options__filters": (4, 8), "sizes": (20, 32)},
        "fast.default": {"options__filters": (4, 8)},
    }
    for name, changes in tiny.items():
        monkeypatch.setitem(RECIPES, name, RECIPES[name].override(**changes))


def test_step(small, monkeypatch):
    monkeypatch.setattr(cpu, "native_flags", lambda: ["avx512_bf16"])
    monkeypatch.setattr(
        baselines, "torch_steps", lambda *_, **__: {"PyTorch": lambda: 1e6, "worse": lambda: 2e6}
    )
    found = cpu.step(TINY)
    rows = found["rows"]
    assert list(rows)[:4] == [
        "tutorial 4, its own code", "tutorial 4, bfloat16", "this project, float32", "this project",
    ]  # fmt: skip
    assert rows["PyTorch"]["median"] == 1e9  # ms, of one batch a pass
    own, best = found["verdicts"]
    expected = rows["this project"]["median"] / rows["tutorial 4, its own code"]["median"]
    assert own["value"] == pytest.approx(expected)
    assert best["what"].endswith("(PyTorch)")
    assert best["value"] == pytest.approx(rows["this project"]["median"] / 1e9)


def test_sections_of_a_processor_without_bfloat16(small, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(cpu, "native_flags", lambda: [])
    monkeypatch.setattr(baselines, "torch_steps", lambda *_, **variants: asked.update(variants) or {})
    found = cpu.step(TINY)
    assert list(found["rows"]) == ["tutorial 4, its own code", "this project, float32", "this project"]
    assert asked["bfloat16"] == (False,)
    # The README's row names a precision only where there are two.
    assert "float32" not in record._step({"step": found})[1]
    assert cpu.precision(TINY) == {}
    assert "no bfloat16" in capsys.readouterr().out


def test_step_without_pytorch(small, monkeypatch):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    assert baselines.torch_steps(None, None, (False,), (False,)) == {}


def test_limit(small, monkeypatch):
    monkeypatch.setattr(limit, "GOALS", {"course.baseline": "at most 1.5", "fast.85": ""})
    times = iter([9e9, 9e9, 9e9, 9e9, *(x for r in (2, 3, 4) for x in (r, 2.0, 2 * r, 2.0))])
    monkeypatch.setattr(timing, "in_milliseconds", lambda *_: lambda: next(times))
    found = limit.limit(dataclasses.replace(TINY, quick=False, rounds=3))
    assert [row["median"] for row in found["rows"].values()] == [3, 2, 6, 2]
    assert [(v["value"], v["goal"]) for v in found["verdicts"]] == [(1.5, "at most 1.5"), (3, "")]
    assert [name.partition(":")[0] for name in found["rows"]][::2] == [
        "course.baseline, batch 32",
        "fast.85, batch 256",
    ]


def products_of(recipe):
    model = models.build(RECIPES[recipe], input_shape=(32, 32, 3), num_classes=10)
    if RECIPES[recipe].whitening:
        model.get_layer("whitening").trainable = False
    return model, limit.products(make_training_model(model, "mixed_bfloat16"))


def test_the_products_of_the_networks():
    _, found = products_of("course.baseline")
    assert [(p.inputs, p.kernel) for p in found] == [
        ((32, 32, 3), (3, 3, 3, 32)), ((15, 15, 32), (3, 3, 32, 64)), ((6, 6, 64), (3, 3, 64, 128)),
        ((512,), (512, 128)), ((128,), (128, 10)),
    ]  # fmt: skip
    assert [p.dtype for p in found] == 4 * ["bfloat16"] + ["float32"]
    assert [p.to_input for p in found] == [False, True, True, True, True]
    assert all(p.to_kernel for p in found)
    _, (whitening, first, *others) = products_of("fast.85")
    assert (whitening.kernel, whitening.to_kernel, whitening.to_input) == ((2, 2, 3, 24), False, False)
    assert (first.inputs, first.to_kernel, first.to_input) == ((31, 31, 24), True, False)
    assert len(others) == 6 and all(p.to_kernel and p.to_input for p in others)


def flops_of(product, batch):
    """Of all its passes, two for each multiply-add, by the shapes alone."""
    positions = 1
    if product.strides is not None:
        lost = (0, 0) if product.padding == "SAME" else (n - 1 for n in product.kernel[:2])
        sides = zip(product.inputs, lost, product.strides, strict=False)
        positions = math.prod(-(-(n - k) // s) for n, k, s in sides)
    passes = 1 + product.to_kernel + product.to_input
    return 2 * batch * positions * math.prod(product.kernel) * passes


@pytest.mark.parametrize("recipe", sorted(limit.GOALS))
def test_the_products_have_the_flops_of_a_step_without_the_passes_that_it_skips(recipe):
    model, found = products_of(recipe)
    skipped = sum(
        2 - p.to_kernel - p.to_input for p in found
    )  # the whitening's two, and one of the first trained layer
    assert skipped == (3 if RECIPES[recipe].whitening else 1)
    whole = sum(flops_of(dataclasses.replace(p, to_kernel=True, to_input=True), 7) for p in found)
    assert whole == 3 * 7 * models.forward_flops(model)
    assert sum(flops_of(p, 7) for p in found) < whole


@pytest.mark.parametrize(
    "product",
    [
        limit.Product((6, 6, 4), (3, 3, 4, 5), "float32", (1, 1), "SAME"),
        limit.Product((7, 7, 4), (3, 3, 4, 5), "float32", (1, 1), "VALID"),
        limit.Product((9, 9, 4), (3, 3, 4, 5), "float32", (2, 2), "SAME"),
        limit.Product((6,), (6, 5), "float32"),
    ],
    ids=["same", "valid", "strided", "dense"],
)
def test_the_passes_are_the_gradients_of_a_layer(product, monkeypatch):
    drawn, draw = [], tf.random.normal
    monkeypatch.setattr(tf.random, "normal", lambda shape: drawn.append(draw(shape)) or drawn[-1])
    forward, to_kernel, to_input = product.passes(3)
    x, w, dy = drawn
    with tf.GradientTape() as tape:
        tape.watch([x, w])
        y = (
            tf.matmul(x, w)
            if product.strides is None
            else tf.nn.conv2d(x, w, product.strides, product.padding)
        )
    dx, dw = tape.gradient(y, [x, w], dy)
    for ways, expected in ((forward, y), (to_kernel, dw), (to_input, dx)):
        for way in ways:
            np.testing.assert_allclose(way(), expected, rtol=1e-4, atol=1e-4)
    assert len(to_kernel) == (2 if (product.strides, product.padding) == ((1, 1), "SAME") else 1)


def test_the_fastest_way_counts_and_every_operation_runs_each_time(monkeypatch):
    calls = []

    def operation(name):
        def run():
            return tf.numpy_function(lambda: calls.append(name) or np.float32(0), [], tf.float32)

        return run

    a, b = operation("a"), operation("b")
    limit.seconds_of([a, b], 3)()
    assert sorted(calls) == ["a"] * 3 + ["b"] * 3
    seconds = {a: iter([0.0, 5.0, 4.0, 5.0]), b: iter([9.0, 9.0, 3.0, 9.0])}  # the first does not count
    monkeypatch.setattr(limit, "seconds_of", lambda ways, times: lambda: next(seconds[ways[0]]))
    assert limit.fastest([a, b]) is b
    assert limit.fastest([a]) is a


# Keras's ImageDataGenerator asks SciPy for it by its old name.
@pytest.mark.filterwarnings("ignore:Please import `affine_transform`:DeprecationWarning")
def test_loader():
    found = cpu.loader(TINY)
    rows = found["rows"]
    assert [n.partition(":")[0] for n in rows] == [
        "Keras layers in map", "ImageDataGenerator", *["this project"] * 4,
    ]  # fmt: skip
    assert all(row["median"] > 0 for row in rows.values())
    ours, cast, keras_, old = (
        rows[n]["median"]
        for n in (
            "this project: flip, shift, cutout", "this project: flip, shift, cutout, as float32",
            "Keras layers in map: flip, shift", "ImageDataGenerator: flip, shift",
        )
    )  # fmt: skip
    assert [v["value"] for v in found["verdicts"]] == pytest.approx(
        [ours / keras_, cast / keras_, ours / old]
    )


def test_waiting(small):
    found = cpu.waiting(TINY)
    assert len(found["rows"]) == 4 and all(row["median"] > 0 for row in found["rows"].values())
    assert len(found["verdicts"]) == 2 and all(v["value"] < 100 for v in found["verdicts"])


def test_waiting_is_what_data_add(small, monkeypatch):
    """Data that take 0.1 s a batch, and steps that take next to nothing: nearly all is waiting."""
    batches = Engine._batches

    def slow(engine, end, size):
        batch = next(batches(engine, end, size))

        def made(_):
            with tf.control_dependencies([tf.py_function(lambda: time.sleep(0.1), [], [])]):
                return tf.nest.map_structure(tf.identity, batch)

        return iter(tf.data.Dataset.range(1000).map(made).with_options(tuned_by_hand()))  # nothing runs ahead

    monkeypatch.setattr(Engine, "_batches", slow)
    whole = timing.engine_for("leaky.baseline", *timing.synthetic_data(64), batch_size=16)
    bare = cpu.with_one_batch(timing.engine_for("leaky.baseline", *timing.synthetic_data(64), batch_size=16))
    seconds = []
    for engine in (whole, bare):
        engine.train(1)
        seconds.append(timing.seconds_of(engine, 4)())
    assert seconds[0] >= 0.4  # four batches
    assert seconds[1] < seconds[0]


def fake_runs(monkeypatch, runs):
    """Lets `timing.trained` return these metrics, one after the other. Returns the flags of each call."""
    asked, left = [], iter(runs)

    def trained(*flags, data_dir=None):
        asked.append(flags)
        return next(left)

    monkeypatch.setattr(timing, "trained", trained)
    return asked


def test_target(monkeypatch):
    asked = fake_runs(
        monkeypatch,
        [
            {"seconds_to_target": 50.0, "best_val_accuracy": 0.86},
            {"seconds_to_target": 70.0, "best_val_accuracy": 0.85},
            {"seconds_to_target": None, "best_val_accuracy": 0.84},
        ],
    )
    epochs, words = iter([100.0, 120.0, 130.0]), []

    def output(command):
        words.append(command)
        return "bar\n" + json.dumps({"seconds_an_epoch": next(epochs), "steps": 10, "steps_an_epoch": 352})

    monkeypatch.setattr(timing, "output_of", output)
    tutorial = [run_of("leaky.baseline", 40, epoch_at_target=e) for e in (18, None, 20)]
    tutorial += [run_of("leaky.baseline", 20, epoch_at_target=3), run_of("leaky.sgd", 40, epoch_at_target=4)]
    monkeypatch.setattr(records, "load", lambda: tutorial)
    found = cpu.target(Options(quick=True, seeds=3, data_dir="d"))
    assert [flags[1] for flags in asked] == ["--seed=0", "--seed=1", "--seed=2"]
    assert words[0][-2:] == ["--steps=10", "--data_dir=d"]
    rows = found["rows"]
    assert rows["fast.85: to 85%"]["samples"] == [50, 70]
    assert rows["fast.85: validation accuracy"]["samples"] == pytest.approx([86, 85, 84])
    assert rows["tutorial 4, its own code: an epoch, from 10 of 352 steps"]["median"] == 120
    # 19 epochs of 120 s, in 60 s.
    assert [v["value"] for v in found["verdicts"]] == [60, 2, 38]
    assert len(found["runs"]) == 3

    # No record of the tutorial's recipe: no factor. No seed that reaches the target: no time.
    monkeypatch.setattr(records, "load", lambda: [])
    fake_runs(monkeypatch, [{"seconds_to_target": 50.0, "best_val_accuracy": 0.86}])
    epochs = iter([100.0, 100.0])
    assert [v["value"] for v in cpu.target(Options(seeds=1))["verdicts"]] == [50, 1]
    fake_runs(monkeypatch, [{"seconds_to_target": None, "best_val_accuracy": 0.8}])
    found = cpu.target(Options(seeds=1))
    assert [v["value"] for v in found["verdicts"]] == [0] and "fast.85: to 85%" not in found["rows"]
    json.dumps(found, allow_nan=False)


def test_precision(monkeypatch):
    monkeypatch.setattr(cpu, "native_flags", lambda: ["avx512_bf16"])
    accuracies = [0.85, 0.86, 0.86, 0.84]  # float32, bfloat16 of seed 0; of seed 1
    asked = fake_runs(monkeypatch, [{"best_val_accuracy": a, "train_seconds": 9.0} for a in accuracies])
    found = cpu.precision(Options(seeds=2))
    assert [flags[1:] for flags in asked] == [
        (f"--precision={p}", f"--seed={seed}") for seed in (0, 1) for p in ("float32", "mixed_bfloat16")
    ]
    assert found["rows"]["mixed_bfloat16: validation accuracy"]["samples"] == pytest.approx([86, 84])
    (difference,) = found["verdicts"]
    # +1 and -2 points: mean -0.5, standard deviation 3 / sqrt(2), of the mean of two 1.5.
    assert difference["value"] == pytest.approx(-0.5)
    assert difference["goal"] == "0 within two standard errors of 1.50"
    assert [r["best_val_accuracy"] for r in found["runs"]["float32"]] == [0.85, 0.86]


def test_scaling(small, monkeypatch):
    runs = [{"history": [{"seconds": s}, {"seconds": 1.0}]} for s in (9.0, 20.0) * 3]
    asked = fake_runs(monkeypatch, runs)
    monkeypatch.setattr(timing, "first_step", lambda words: 7.0 if "cifar10_trainer" in words else 8.0)
    monkeypatch.setattr(cpu, "BATCH_SIZES", (8, 16))
    found = cpu.scaling(Options(rounds=1, batches=1))
    assert [flags[1] for flags in asked] == ["--epochs=3", "--epochs=6"] * 3
    rows = found["rows"]
    assert rows["this project: start to first step"]["median"] == 7
    assert rows["tutorial 4, its own code: start to first step"]["median"] == 8
    assert [v["value"] for v in found["verdicts"]] == [2.1]
    assert all(rows[f"fast.85, batch {b}"]["median"] > 0 for b in (8, 16))


def test_scale_out(monkeypatch):
    asked = []

    def run_processes(what, o, count):
        asked.append((what, count))
        if what == "worker":
            return [{"samples": [7.0, 9.0, 8.0] if count == 1 else [12.0]}] * count
        times = {scale_out.NONE: [10.0], scale_out.ONE: [10.2], scale_out.TWO: [11.22]}
        return [{"samples": times, "gradient_bytes": 5_000_000}]

    monkeypatch.setattr(scale_out, "run_processes", run_processes)
    found = scale_out.scale_out(Options())
    assert asked == [("replicas", 1)] + [("worker", 1), ("worker", 2)] * 3
    values = [v["value"] for v in found["verdicts"]]
    assert values[:4] == pytest.approx([1.02, 1.1, 1.5, 5.0])
    assert 1 < values[4] < 8 and values[4] < values[5] < 32
    papers = [v["what"] for v in found["verdicts"][4:]]
    assert all(what.startswith("on paper, not measured: ") for what in papers)


def test_the_model_on_paper_by_hand(monkeypatch):
    """Without anything to send, n GPUs are n times as fast; with as much to send as a step takes, half of that."""
    monkeypatch.setattr(scale_out, "LATENCY", 0.0)
    assert scale_out.on_paper(8, 4, 0.0, 1.0) == pytest.approx(32)
    assert scale_out.on_paper(8, 1, 0.0, 1.25) == pytest.approx(6.4)
    step = scale_out.GPU_BATCH / scale_out.GPU_IMAGES_PER_SECOND
    as_long = step * scale_out.NVLINK / (2 * 7 / 8)
    assert scale_out.on_paper(8, 1, as_long, 1.0) == pytest.approx(4)


@pytest.mark.slow
def test_the_processes_of_scale_out_for_real():
    (found,) = scale_out.run_processes("replicas", TINY, 1)
    assert {n: len(v) for n, v in found["samples"].items()} == dict.fromkeys(
        (scale_out.NONE, scale_out.ONE, scale_out.TWO), 1
    )
    weights = 4 * RECIPES[scale_out.RECIPE].origin.parameters
    assert 0.99 * weights < found["gradient_bytes"] <= weights  # batch norm's statistics have no gradient
    assert [len(one["samples"]) for one in scale_out.run_processes("worker", TINY, 2)] == [1, 1]


def test_memory(monkeypatch):
    seen = []

    def peak(words):
        seen.append(words)
        return 1000.0 if "cifar10_trainer" in words else 2500.0

    monkeypatch.setattr(timing, "peak_memory", peak)
    found = cpu.memory(Options(data_dir="d"))
    assert len(seen) == 6 and all(words[-1] == "--data_dir=d" for words in seen)
    assert [v["value"] for v in found["verdicts"]] == [0.4]
    # Eight steps, by the default recipe's batch.
    (epochs,) = [float(w.partition("=")[2]) for w in seen[1] if w.startswith("--epochs=")]
    assert round(epochs * (45_000 // 512)) == 8


def run_of(recipe, epochs, **metrics):
    """The record of a run; `metrics`: those that a section reads."""
    known = {"recipe": recipe, "dataset": "cifar10", "epochs": epochs, "best_val_accuracy": 0.8, "views": 1}
    known |= {"test_accuracy": 0.7, "total_seconds": 100.0, "pflop": 0.1, "epoch_at_target": None}
    source = RECIPES[recipe].origin.source
    return {"config": {"epochs": epochs, "origin": {"source": source}}, "metrics": {**known, **metrics}}


def test_the_frontier_trains_what_has_no_record(monkeypatch):
    found = [run_of("fast.default", 40.0), run_of("fast.default", 4.0), run_of("leaky.baseline", 2)]
    monkeypatch.setattr(results.frontier, "EPOCHS", (2, 4, 40))
    found += [run_of("fast.95", 2.0), run_of("fast.95", 40.0)]
    monkeypatch.setattr(records, "load", lambda: found)
    commands, published = [], []
    result = [0, ""]
    monkeypatch.setattr(cpu.process, "call", lambda words, **_: commands.append(words) or result)
    monkeypatch.setattr(results.frontier, "publish_points", published.append)
    assert cpu.frontier(Options(quick=True)) == {}
    assert (commands, published) == ([], [found])
    cpu.frontier(Options(data_dir="d"))
    assert [words[2:] for words in commands] == [
        ["fast.default", "--epochs=2", "--data_dir=d"],
        ["fast.95", "--epochs=4", "--data_dir=d"],
    ]
    for result[:], how in (([1, ""], "failed"), ([0, "SIGINT"], "was stopped by SIGINT")):
        with pytest.raises(RunError, match=rf"fast\.default with 2 epochs {how}; its own line"):
            cpu.frontier(Options())


# --- the baselines ------------------------------------------------------------------------------------------


def test_tutorial_four_is_the_recipe():
    theirs = baselines.tutorial_four()
    ours = models.build(RECIPES["leaky.baseline"], input_shape=(32, 32, 3), num_classes=10)
    assert theirs.count_params() == ours.count_params() == 1_345_066
    assert [w.shape for w in theirs.weights] == [w.shape for w in ours.weights]


def test_pytorch_has_the_same_network():
    pytest.importorskip("torch")
    # Keras counts the moving means and variances, too: two for each of 2 * (32 + 64 + 128) + 512 channels.
    parameters = sum(p.numel() for p in baselines.torch_network().parameters())
    assert parameters == 1_345_066 - 2 * (2 * (32 + 64 + 128) + 512)


@pytest.mark.slow
def test_pytorch_variants_train():
    pytest.importorskip("torch")
    images, labels = timing.synthetic_data(8)
    found = baselines.torch_steps(images.astype(np.float32) / 255, labels, (False, True), (False,))
    assert len(found) == 4 and len({n.partition(",")[2] for n in found}) == 4
    assert all(0 < measure() < 60 for measure in found.values())


def test_the_clock_of_fit_stops_where_the_epoch_ends():
    class Waiting:
        def fit(self, *args, callbacks, **options):
            self.asked = args, options
            for callback in callbacks:
                callback.on_epoch_end(0, {})
            time.sleep(0.5)  # as for tf.data's tuning thread

    model = Waiting()
    assert 0 <= baselines.seconds_of_epoch(model, "x", "y", verbose=0) < 0.4
    assert model.asked == (("x", "y"), {"verbose": 0})


def test_the_tutorials_code_is_a_command_too():
    assert "steps to train" in timing.output_of(timing.baseline_command("--help"))


def test_a_run_of_the_tutorial(capsys):
    # 333 images to train on: three steps of 128 an epoch. (37 are held out.)
    data = synthetic_dataset(370, 10)
    found = baselines.tutorial_run(data, None)
    assert (found["steps"], found["steps_an_epoch"]) == (3, 3)
    assert "val_accuracy" in capsys.readouterr().out.splitlines()[-1]
    part = baselines.tutorial_run(data, 1)
    assert (part["steps"], part["steps_an_epoch"]) == (1, 3)
    assert "val_accuracy" not in capsys.readouterr().out.splitlines()[-1]
    assert min(found["seconds_an_epoch"], part["seconds_an_epoch"]) > 0


AIRBENCH_SCRIPT = """
print("|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |")
import os
assert sorted(os.listdir("cifar10")) == ["images"]
def main(run):
    print(f"|       {run}  |      0  |     0.9000  |   0.8000  |               |          3.0  |")
    print(f"|          |   eval  |     0.9000  |   0.930{run}  |       0.940{run}  |          3.{run}  |", flush=True)
    if run == 3 and SLOW:
        import time; time.sleep(60)
for run in [main(run) for run in range(25)]: pass
"""


def test_airbench_by_its_own_clock(tmp_path, monkeypatch):
    def images(folder, data):
        folder.mkdir()
        (folder / "images").touch()

    monkeypatch.setattr(baselines, "_airbench_images", images)
    script = tmp_path / "legacy" / "airbench94.py"
    script.parent.mkdir()
    script.write_text(AIRBENCH_SCRIPT.replace("SLOW", "False"))
    found = baselines.airbench(str(tmp_path), "airbench94.py", None, 2, 60)
    # Three runs, the first of which warms.
    assert found == {"seconds": [3.1, 3.2], "plain": [0.9301, 0.9302], "tta": [0.9401, 0.9402]}

    script.write_text(AIRBENCH_SCRIPT.replace("SLOW", "True"))
    found = baselines.airbench(str(tmp_path), "airbench94.py", None, 9, 5)
    assert found["seconds"] == [3.1, 3.2, 3.3]  # what it had when its time was over

    script.write_text("for run in range(2): raise ValueError('no GPU')")
    rows = gpu.airbench_rows(str(tmp_path), None, time.perf_counter())
    assert rows == {}  # its error is printed, and it has no rows
    with pytest.raises(RunError, match="printed no scores; its last line: ValueError: no GPU"):
        baselines.airbench(str(tmp_path), "airbench94.py", None, 1, 60)
    with pytest.raises(RunError, match=r"has no airbench94_muon\.py"):
        baselines.airbench(str(tmp_path), "airbench94_muon.py", None, 1, 60)
    script.write_text("print('another')")
    with pytest.raises(RunError, match="is not as expected"):
        baselines.airbench(str(tmp_path), "airbench94.py", None, 1, 60)


def test_airbench_finds_its_images(tmp_path):
    torch = pytest.importorskip("torch")
    data = synthetic_dataset(6, 3)
    baselines._airbench_images(tmp_path / "cifar10", data)
    found = torch.load(tmp_path / "cifar10" / "train.pt")
    np.testing.assert_array_equal(found["images"], data.train_images)
    np.testing.assert_array_equal(found["labels"], data.train_labels)
    assert found["classes"] == list("abcdefghij")
    assert len(torch.load(tmp_path / "cifar10" / "test.pt")["images"]) == 3


# --- on a GPU, tried on a CPU ---------------------------------------------------------------------------

FEW = {"options__filters": (4, 8), "sizes": (16, 32), "batch_size": 16, "epochs": 2.0, "precision": "float32"}


def test_the_next_seed_is_a_run_of_its_own():
    data = synthetic_dataset()
    engine, _ = gpu.start("fast.94", data, 0, **FEW)
    gpu.train(engine)
    gpu.restart(engine, "fast.94", data, 1, **FEW)
    assert engine.step == 0
    gpu.train(engine)
    alone, _ = gpu.start("fast.94", data, 1, **FEW)
    gpu.train(alone)
    found, expected = engine.state(), alone.state()
    assert found.keys() == expected.keys() and engine.step == engine.steps == 12
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_nothing_is_traced_for_the_next_seed():
    data = synthetic_dataset()
    engine, _ = gpu.start("fast.94", data, 0, **FEW)
    traced, gradients = [], engine._gradients_of
    engine._gradients_of = lambda *args: traced.append(1) or gradients(*args)
    gpu.train(engine)
    assert len(traced) == 1  # for both sizes
    gpu.restart(engine, "fast.94", data, 1, **FEW)
    gpu.train(engine)
    assert len(traced) == 1


@pytest.mark.parametrize("views", [1, 6])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "xla"])
def test_the_test_is_that_of_the_package(views, compiled):
    data = synthetic_dataset(n_test=30)
    engine, _ = gpu.start("fast.94", data, 0, **FEW)
    engine.compiled = compiled
    gpu.train(engine)
    probabilities = scoring.predict_probabilities(engine.export(), data.test_images, views=views)
    # Against the labels that the package gives, and against ones of which it gives a known share.
    given = probabilities.argmax(1)
    place = 0 if views == 1 else 1
    assert gpu.tester(engine, data.test_images, given)()[place] == 1
    wrong = np.where(np.arange(30) < 12, (given + 1) % 10, given)
    assert gpu.tester(engine, data.test_images, wrong)()[place] == pytest.approx(18 / 30)


def test_the_recipe_for_96_runs_as_that_for_94_does(monkeypatch):
    monkeypatch.setattr("cifar10_trainer.datasets.load", lambda *_: synthetic_dataset())
    monkeypatch.setitem(RECIPES, "fast.96", RECIPES["fast.96"].override(**FEW))
    found = gpu.gpu_96(Options(seeds=1))
    assert [v["goal"] for v in found["verdicts"]] == ["", "from 95% to 96%", ""]
    assert all(name.startswith("fast.96: ") for name in found["rows"])


def test_seeds_in_one_process():
    found = gpu.run_seeds("fast.94", synthetic_dataset(), 2, **FEW)
    rows = found["rows"]
    training, test, both, whole = (
        rows[f"fast.94: {n}"]["samples"]
        for n in ("training", "test with TTA", "training and test", "whitening, training and test")
    )
    assert both == pytest.approx([a + b for a, b in zip(training, test, strict=True)])
    assert all(a < b for a, b in zip(both, whole, strict=True))
    averaged = rows["fast.94: test accuracy, with TTA"]["samples"]
    assert found["verdicts"][1]["value"] == pytest.approx(sum(averaged) / 2)
    assert len(rows["fast.94: compiling, once"]["samples"]) == 1


def test_airbench_is_a_section(monkeypatch):
    monkeypatch.setattr("cifar10_trainer.datasets.load", lambda *_: None)

    def airbench(checkout, name, data, runs, limit):
        if "compiled" in name:
            raise RunError("it does not run here")
        return {"seconds": [4.4], "plain": [0.93], "tta": [0.94]}

    monkeypatch.setattr(baselines, "airbench", airbench)
    assert gpu.gpu_airbench(Options(airbench=None)) == {}
    rows = gpu.gpu_airbench(Options(airbench="x", deadline=0))["rows"]
    assert [n for n, row in rows.items() if row["unit"] == "s"] == ["airbench94.py", "airbench94_muon.py"]
    assert rows["airbench94_muon.py"]["median"] == 4.4
    assert rows["airbench94_muon.py: with TTA"]["median"] == 94


@pytest.mark.slow
def test_images_a_second_of_both(small):
    found = gpu.gpu_step(Options(rounds=1), batch=8, batches=2, several=2)
    rows = found["rows"]
    assert len(rows) == 6 and all(row["median"] > 0 for row in rows.values())
    ratio = rows["this project, mirrored"]["median"] / rows["Model.fit, default settings"]["median"]
    assert found["verdicts"][-1]["value"] == pytest.approx(ratio)


@pytest.mark.slow
def test_other_peoples_models_beside_fit():
    found = cpu.own_model(TINY)
    for name in ("tutorial 4's network", "MobileNetV2"):
        assert found["rows"][f"{name}: Model.fit"]["ratio"] == 1
        assert found["rows"][f"{name}: this project, float32"]["ratio"] > 0
    assert len(found["verdicts"]) == 2
