"""Whole runs on the embedded digits: the run folder, resuming, callbacks, folders of images."""

from __future__ import annotations

import csv
import dataclasses
import functools
import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cifar10_trainer import __main__ as command
from cifar10_trainer import (
    cli,
    datasets,
    evaluate,
    loop,
    machine,
    precision,
    predict,
    runtime,
    summary,
    training,
)
from cifar10_trainer.config import Averaging, Config, Optimizer, Schedule
from cifar10_trainer.engine import Engine
from cifar10_trainer.errors import ConfigError, RunError, RunInterrupted
from cifar10_trainer.models.initial import pixel_statistics
from cifar10_trainer.recipes import RECIPES
from cifar10_trainer.run_folder import RunFolder
from cifar10_trainer.training import train_and_evaluate

# 1,294 images to train on: 12 steps an epoch.
TINY = RECIPES["fast.digits"].override(
    options__filters=(4, 8),
    epochs=3,
    batch_size=100,
    optimizer=Optimizer(name="adam", learning_rate=0.02),
    precision="float32",
)
PER_EPOCH = 12


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def train_quietly(config, workdir, dataset, **options):
    options = {"verbose": 0, "full_report": False, **options}
    return train_and_evaluate(config, workdir, dataset=dataset, **options)


def read_history(workdir):
    with open(workdir / "history.csv", newline="") as file:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


def saved_weights(workdir):
    return keras.models.load_model(workdir / "model.keras").get_weights()


def assert_same_weights(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


class Recorder(keras.callbacks.Callback):
    """What was called, and the weights after each epoch."""

    def __init__(self):
        super().__init__()
        self.calls, self.weights, self.logs = [], [], []

    def on_train_begin(self, logs=None):
        self.calls.append("train begin")

    def on_epoch_begin(self, epoch, logs=None):
        self.calls.append(f"epoch {epoch} begin")

    def on_train_batch_begin(self, batch, logs=None):
        self.calls.append("batch begin")

    def on_train_batch_end(self, batch, logs=None):
        assert set(logs) == {"loss", "accuracy"}
        self.calls.append(f"batch end {batch}")

    def on_test_begin(self, logs=None):
        self.calls.append("test begin")

    def on_test_end(self, logs=None):
        self.calls.append("test end")

    def on_epoch_end(self, epoch, logs=None):
        self.calls.append(f"epoch {epoch} end")
        self.logs.append(dict(logs))
        self.weights.append(self.model.get_weights())

    def on_train_end(self, logs=None):
        self.calls.append("train end")


class At(keras.callbacks.Callback):
    """Does `action` once, after `step` steps of the run (or at the end of the epoch that ends there)."""

    def __init__(self, step, action, moment="batch"):
        super().__init__()
        self.step, self.action, self.moment = step, action, moment

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.moment == "batch" and self.epoch * PER_EPOCH + batch + 1 == self.step:
            self.action()

    def on_epoch_end(self, epoch, logs=None):
        if self.moment == "epoch" and (epoch + 1) * PER_EPOCH == self.step:
            self.action()


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def step_by_step(monkeypatch):
    """One step in each call of the graph, so that every step can be interrupted."""
    monkeypatch.setattr(loop, "CALL_SECONDS", 0.0)


def script_validation(monkeypatch, losses, accuracies=None):
    """Lets the validation after epoch i find losses[i] and accuracies[i]."""

    def scripted(engine, images, labels, on_batch):
        epoch = -(-engine.step // engine.steps_per_epoch) - 1
        return {"loss": losses[epoch], "accuracy": accuracies[epoch] if accuracies else 0.1}

    monkeypatch.setattr(Engine, "evaluate", scripted)


# --- what a run prints ----------------------------------------------------------------------------------


def test_into_a_pipe_each_epoch_is_one_plain_line(tmp_path, digits, capsys):
    train_quietly(TINY, tmp_path / "auto", digits, verbose="auto")
    out = capsys.readouterr().out
    assert "\r" not in out and "\x1b" not in out and "\b" not in out
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    rows = read_history(tmp_path / "auto")
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    for line, row in zip(lines, rows, strict=True):
        assert f"val_accuracy {row['val_accuracy']:.4f}" in line and f"loss {row['loss']:.4f}" in line


def test_on_a_terminal_there_is_a_bar_and_quietly_nothing(tmp_path, digits, capsys, monkeypatch):
    train_quietly(TINY.override(epochs=1), tmp_path / "quiet", digits, verbose=0)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    train_quietly(TINY.override(epochs=2), tmp_path / "terminal", digits, verbose="auto")
    out = capsys.readouterr().out
    assert "Epoch 2/2" in out and "━" in out and "epoch 2/2" not in out


@pytest.mark.parametrize("verbose", [3, "loud", None, -1])
def test_other_words_for_verbose(tmp_path, digits, verbose):
    with pytest.raises(ConfigError, match=r"verbose is .*; allowed: 'auto', 0, 1, 2"):
        train_quietly(TINY, tmp_path / "run", digits, verbose=verbose)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["validation accuracy  50.00% (epoch 2)", "test accuracy        40.00%"]),
        ({}, ["balanced accuracy    30.00%, smallest class's recall 10.00%"]),
        ({"views": 6}, ["test accuracy        40.00%, 45.00% with TTA of 6 views"]),
        (
            {"views": 6, "views_share": 0.25},
            ["40.00%, 45.00% with TTA of 6 views of the 25% of the images that are least sure"],
        ),
        ({"test_accuracy": None}, ["test accuracy        not scored"]),
        ({"test_accuracy": None, "views": 6}, ["test accuracy        not scored"]),
        ({"test_accuracy": None, "n_test": 0}, ["test accuracy        no test images"]),
        ({"best_val_accuracy": None}, ["validation accuracy  no images held out"]),
        ({}, ["target 85.00%        not reached"]),
        ({"seconds_to_target": 3.0, "epoch_at_target": 1}, ["target 85.00%        after 3.0 s (epoch 1)"]),
    ],
)
def test_the_summary_has_no_gaps(changes, expected):
    metrics = {"recipe": "r", "epochs": 2, "train_seconds": 1.0, "best_val_accuracy": 0.5, "best_epoch": 2}
    metrics |= {"views": 1, "test_accuracy": 0.4, "test_accuracy_views": 0.45, "n_test": 1000, "target": 0.85}
    metrics |= {
        "dataset": "folder",
        "n_validation": 1000,
        "test_balanced_accuracy": 0.3,
        "test_smallest_class_recall": 0.1,
    }
    metrics |= {"seconds_to_target": None, "epoch_at_target": None}
    lines = []
    summary.summarize(lines.append, {**metrics, **changes}, RunFolder("there"))
    text = "\n".join(lines)
    for part in expected:
        assert f"{part}\n" in text, text
    assert ("target" in text) == ("best_val_accuracy" not in changes)
    assert "-" not in text.replace("not reached", "")

    few = {**metrics, "n_validation": 10, "n_test": 10, "test_accuracy": 0.5}  # Wilson's interval of 5 in 10
    summary.summarize(lines.append, few, RunFolder("there"))
    for what in ("validation accuracy  50.00% (epoch 2)", "test accuracy        50.00%"):
        assert f"{what}, 95% interval 23.7-76.3%\n" in "\n".join(lines)


# --- a whole run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits):
    """A run with everything: its folder, metrics and callbacks."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    recorder, seen = Recorder(), []
    extra = tmp_path_factory.mktemp("callbacks")
    callbacks = [
        recorder,
        keras.callbacks.CSVLogger(extra / "log.csv"),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch)),
        keras.callbacks.ModelCheckpoint(
            extra / "{epoch}.keras", monitor="val_accuracy", mode="max", save_best_only=True
        ),
    ]
    metrics = train_and_evaluate(
        TINY.override(epochs=3.5, target=0.2), workdir, dataset=digits, callbacks=callbacks
    )
    return workdir, metrics, recorder, extra, seen


def test_the_folder_is_complete(whole):
    workdir, *_ = whole
    assert {p.name for p in workdir.iterdir()} == {
        "config.json",
        "history.csv",
        "metrics.json",
        "model.keras",
        "classification_report.txt",
        "report.html",
        "figures",
        "tensorboard",
    }
    figures = ["sample_images", "random_samples", "class_distribution", "training_curves"]
    for name in (*figures, "confusion_matrix", "misclassified_examples"):
        with Image.open(workdir / "figures" / f"{name}.png") as image:
            assert min(image.size) > 100
    events = [p for p in (workdir / "tensorboard").rglob("*") if "tfevents" in p.name]
    assert {p.parent.name for p in events} == {"train", "validation"}
    assert all(p.stat().st_size > 100 for p in events)


def test_the_document_explains_every_metric(whole):
    """The first column of the table under "What `train` returns" in docs/library.md holds the keys of metrics.json."""
    text = (Path(__file__).parents[1] / "docs" / "library.md").read_text()
    table = text.partition("## What `train` returns")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    _, metrics, *_ = whole
    assert sorted(
        name for cell in cells for name in cell.replace("`", "").replace(",", " ").split()
    ) == sorted(metrics)


def test_the_history_has_a_row_an_epoch(whole):
    workdir, metrics, recorder, *_ = whole
    rows = read_history(workdir)
    assert list(rows[0]) == [
        "epoch",
        "loss",
        "accuracy",
        "val_loss",
        "val_accuracy",
        "learning_rate",
        "seconds",
    ]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and metrics["epochs"] == 4
    for row, logs in zip(rows, recorder.logs, strict=True):
        assert {k: row[k] for k in logs} == logs
        assert row["seconds"] > 0 and 0 < row["loss"] < 5
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_metrics_are_complete_and_agree(whole, digits):
    workdir, metrics, *_ = whole
    assert json.loads((workdir / "metrics.json").read_text()) == metrics
    rows = read_history(workdir)
    expected = {
        "recipe": "fast.digits",
        "dataset": "digits",
        "n_train": 1294,
        "n_validation": 144,
        "n_test": len(digits.test_labels),
        "params": keras.models.load_model(workdir / "model.keras").count_params(),
        "epochs": 4,
        "best_val_accuracy": max(row["val_accuracy"] for row in rows),
        "target": 0.2,
        "epoch_at_target": next(row["epoch"] for row in rows if row["val_accuracy"] >= 0.2),
        "strategy": "none",
        "replicas": 1,
        "precision": "float32",
        "seed": 0,
    }
    assert {k: metrics[k] for k in expected} == expected
    assert rows[metrics["best_epoch"] - 1]["val_accuracy"] == metrics["best_val_accuracy"]
    # 3.5 epochs of 12 steps of 100 images
    assert metrics["images_per_second"] > 0 and 0 < metrics["train_seconds"] < metrics["total_seconds"]
    assert 0 < metrics["seconds_to_target"] < metrics["total_seconds"]
    assert metrics["pflop"] > 0 and metrics["test_loss"] > 0


def test_the_kept_weights_are_those_of_the_best_epoch(whole):
    workdir, metrics, recorder, *_ = whole
    kept = saved_weights(workdir)
    assert_same_weights(kept, recorder.weights[metrics["best_epoch"] - 1])
    assert not np.array_equal(kept[0], recorder.weights[0][0]) or metrics["best_epoch"] == 1


def test_the_scores_are_those_of_the_saved_model(whole, digits):
    """Keras's own predict and three lines of NumPy; test and best validation accuracy to the last image."""
    workdir, metrics, *_ = whole
    model = keras.models.load_model(workdir / "model.keras")
    probabilities = model.predict(digits.test_images, verbose=0).astype(np.float64)
    right = probabilities.argmax(1) == digits.test_labels
    assert metrics["test_accuracy"] == pytest.approx(right.mean(), abs=1e-12)
    truth = probabilities[np.arange(len(right)), digits.test_labels]
    assert metrics["test_loss"] == pytest.approx(-np.log(truth).mean(), rel=1e-4)
    *_, val_images, val_labels = datasets.split(digits, 0.1, "stratified", 0)
    right = model.predict(val_images, verbose=0).argmax(1) == val_labels
    assert metrics["best_val_accuracy"] == pytest.approx(right.mean(), abs=1e-6)  # a float32 quotient
    report = (workdir / "classification_report.txt").read_text()
    assert f"{metrics['test_accuracy']:.4f}" in report


def test_a_run_as_on_one_gpu(tmp_path, digits, monkeypatch, capsys):
    """Images and whole steps compiled by XLA on the device, which is a CPU: the same run, but for rounding."""
    config = TINY.override(epochs=2)
    usual = train_quietly(config, tmp_path / "usual", digits)
    made = functools.partial(Engine, on_device=True, compiled=True)
    monkeypatch.setattr("cifar10_trainer.engine.Engine", made)
    found = train_and_evaluate(config, tmp_path / "compiled", dataset=digits, full_report=False)
    assert "XLA compiles 1 program(s) on the way" in capsys.readouterr().out
    one, other = read_history(tmp_path / "usual"), read_history(tmp_path / "compiled")
    assert len(one) == len(other) == 2
    assert float(other[0]["loss"]) == pytest.approx(float(one[0]["loss"]), rel=0.02)
    assert found["test_accuracy"] == pytest.approx(usual["test_accuracy"], abs=0.1)


def test_hdf5_is_the_same_model_once_more(tmp_path, digits, caplog):
    """Both formats open by Keras, by evaluate and by predict, and say the same."""
    train_quietly(TINY.override(epochs=0.5), tmp_path, digits, hdf5=True)
    assert not [record for record in caplog.records if "HDF5" in record.getMessage()]  # quiet is quiet
    image = tmp_path / "digit.png"
    Image.fromarray(digits.test_images[0]).save(image)
    answers = []
    for path in (tmp_path / "model.keras", tmp_path / "model.h5"):
        model = evaluate.load_model(path)
        names = predict.info_beside(path).class_names
        answers.append(
            (model.predict(digits.test_images, verbose=0), predict.predict_images(model, [image], names))
        )
    np.testing.assert_array_equal(answers[0][0], answers[1][0])
    assert answers[0][1] == answers[1][1]
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_clock_begins_where_it_is_told_to(tmp_path, digits):
    now = time.time()
    metrics = train_quietly(TINY.override(epochs=0.25), tmp_path, digits, since=now - 1000)
    assert 1000 < metrics["total_seconds"] < 1000 + time.time() - now + 0.01


def test_the_config_can_be_read_back(whole):
    workdir, *_ = whole
    record = json.loads((workdir / "config.json").read_text())
    assert Config.from_record(record) == TINY.override(epochs=3.5, target=0.2)
    assert record["class_names"] == [str(i) for i in range(10)]
    assert record["environment"]["keras"] == keras.__version__
    assert command.read_config(workdir / "config.json") == TINY.override(epochs=3.5, target=0.2)


def test_callbacks_are_called_as_keras_does(whole):
    _, _, recorder, _, seen = whole
    assert seen == [0, 1, 2, 3]
    calls = [call for call in recorder.calls if not call.startswith("batch")]
    around = [c for e in range(4) for c in (f"epoch {e} begin", "test begin", "test end", f"epoch {e} end")]
    assert calls == ["train begin", *around, "train end"]
    ends = [int(call.split()[-1]) for call in recorder.calls if call.startswith("batch end")]
    assert ends[-1] == 5 and ends.count(11) == 3  # the last epoch is half
    assert recorder.calls.count("batch begin") == len(ends)
    assert set(recorder.logs[0]) == {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"}


def test_keras_own_callbacks_work(whole):
    workdir, metrics, recorder, extra, _ = whole
    with open(extra / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in read_history(workdir)]
    best = max(int(p.stem) for p in extra.glob("*.keras"))
    # Of equal accuracies Keras's ModelCheckpoint keeps the first, and the run the one with the lowest loss.
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert best == 1 + int(np.argmax(accuracies)) and accuracies[best - 1] == metrics["best_val_accuracy"]
    assert_same_weights(
        keras.models.load_model(extra / f"{best}.keras").get_weights(), recorder.weights[best - 1]
    )


# --- the folder is taken --------------------------------------------------------------------------------


def test_a_finished_run_is_not_overwritten(whole, digits):
    workdir, *_ = whole
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    with pytest.raises(ConfigError, match=r"holds a finished run; .*--workdir, .*--overwrite"):
        train_quietly(TINY.override(epochs=3.5, target=0.2), workdir, digits)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 7}, r"another configuration \(seed 0, now 7\)"),
        ({"optimizer__learning_rate": 0.5}, r"another configuration \(optimizer .*0\.02.*, now .*0\.5"),
        ({"epochs": 4}, r"another configuration \(epochs 3\.0, now 4\.0\)"),
    ],
)
def test_another_configuration_is_not_resumed(tmp_path, digits, change, reason):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    with pytest.raises(ConfigError, match=reason) as info:
        train_quietly(TINY.override(**change), tmp_path, digits)
    assert "--overwrite" in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "model.keras",
        "metrics.json",
        "history.csv",
        "report.html",
        "split.csv",
        "model.h5",
        "config.json",
        "figures",
    ],
)
def test_somebodys_own_files_stay(name, overwrite, tmp_path, digits):
    """A folder that holds no run, but files with the names that a run gives to its own."""
    (tmp_path / name).write_text("{}" if name == "config.json" else "precious")
    before = (tmp_path / name).read_text()
    with pytest.raises(ConfigError, match=f"holds {name}, but no run, .*; choose another --workdir, or move"):
        train_quietly(TINY, tmp_path, digits, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == before
    (tmp_path / "history.csv").touch()
    (tmp_path / "model.keras").touch()
    with pytest.raises(ConfigError, match=r"holds .*model\.keras.*but no run"):
        train_quietly(TINY, tmp_path, digits)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"save_seconds": "60"}, "save_seconds is '60'; allowed: from 0"),
        ({"save_seconds": None}, "save_seconds is None; allowed"),
        ({"workdir": 123}, "workdir is 123; allowed: a folder"),
    ],
)
def test_arguments_of_other_types_are_one_line(arguments, text, tmp_path, digits):
    with pytest.raises(ConfigError, match=text):
        train_and_evaluate(TINY, dataset=digits, verbose=0, **{"workdir": tmp_path, **arguments})


def test_an_augmentation_that_does_not_fit_costs_no_earlier_run(tmp_path, digits):
    images, test_images = (x[:, ::2, ::2].copy() for x in (digits.train_images, digits.test_images))
    small = dataclasses.replace(digits, train_images=images, test_images=test_images)
    train_quietly(TINY.override(epochs=0.25), tmp_path / "old", small)
    before = (tmp_path / "old" / "metrics.json").read_text()
    too_far = TINY.override(augmentation__shift=16)
    for name, overwrite in (("old", True), ("new", False)):
        with pytest.raises(ConfigError, match="shift is 16 pixels of 16x16"):
            train_quietly(too_far, tmp_path / name, small, overwrite=overwrite)
    assert (tmp_path / "old" / "metrics.json").read_text() == before
    assert not (tmp_path / "new").exists()


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path, digits):
    for name in ("config.json", "metrics.json", "state.npz", "report.html", "notes.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.png").touch()
    metrics = train_quietly(TINY.override(epochs=0.25), tmp_path, digits, overwrite=True)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"config.json", "history.csv", "metrics.json", "model.keras", "notes.txt"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert len(read_history(tmp_path)) == 1


# --- resuming -------------------------------------------------------------------------------------------

# Early stopping and plateau both count epochs; dropout, augmentation, averaging and Adam all have a memory.
EVENTFUL = TINY.override(
    epochs=6,
    options__dropout=0.3,
    averaging=Averaging(every=5),
    early_stopping=3,
    schedule=Schedule(name="plateau", drop=0.5, patience=2, end=0.01),
)
# The third is better than the second by less than counts; the rate drops after the fourth.
LOSSES = [1.0, 0.9, 0.89995, 0.96, 0.85, 0.9]
ACCURACIES = [0.1, 0.3, 0.2, 0.2, 0.25, 0.2]


def without_seconds(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, digits, monkeypatch, step_by_step):
    script_validation(monkeypatch, LOSSES, ACCURACIES)
    expected = train_quietly(EVENTFUL, tmp_path / "whole", digits)
    rows = read_history(tmp_path / "whole")
    assert [round(row["learning_rate"], 6) for row in rows] == [0.02, 0.02, 0.02, 0.02, 0.01, 0.01]

    workdir = tmp_path / "parts"
    stops = [
        (7, "batch", send(signal.SIGTERM), "SIGTERM at step 7 of 72"),
        (24, "batch", send(signal.SIGINT), "SIGINT at step 24 of 72"),  # the last step of an epoch
        (45, "batch", send(signal.SIGTERM), "SIGTERM at step 45 of 72"),
        (48, "epoch", send(signal.SIGTERM), "SIGTERM at step 48 of 72"),
    ]
    for step, moment, action, message in stops:
        began = time.time()
        with pytest.raises(RunError, match=f"stopped by {message}; everything is saved in .*--workdir="):
            train_quietly(EVENTFUL, workdir, digits, callbacks=[At(step, action, moment)], since=began - 1000)
        assert (workdir / "state.npz").exists() and not (workdir / "metrics.json").exists()
        assert len(read_history(workdir) if step >= PER_EPOCH else []) == step // PER_EPOCH
        assert (workdir / "model.keras").exists()
    began = time.time()
    found = train_quietly(EVENTFUL, workdir, digits, since=began - 1000)

    assert without_seconds(read_history(workdir)) == without_seconds(rows)
    assert_same_weights(saved_weights(workdir), saved_weights(tmp_path / "whole"))
    assert not (workdir / "state.npz").exists()
    timing = {"train_seconds", "total_seconds", "images_per_second", "seconds_to_target"}
    same = expected.keys() - timing
    assert {k: found[k] for k in same} == {k: expected[k] for k in same}
    # The five starts took 1,000 s each, which are none of the training's.
    assert 5000 < found["total_seconds"] < 5600 and 0 < found["train_seconds"] < 600


KILLED = """
import signal, sys
sys.path[:0] = {path!r}
import test_training as t
t.loop.CALL_SECONDS = 0.0
digits = t.datasets.load("digits")
t.train_quietly(t.DROPOUT, {workdir!r}, digits, save_seconds=0, callbacks=[t.At(31, t.send(signal.SIGKILL))])
"""
DROPOUT = TINY.override(options__dropout=0.3, epochs=3.25)


def test_a_killed_run_goes_on_from_its_last_save(tmp_path, digits):
    expected = train_quietly(DROPOUT, tmp_path / "whole", digits)
    workdir = tmp_path / "killed"
    script = KILLED.format(path=[os.path.dirname(__file__), os.getcwd()], workdir=str(workdir))
    status = subprocess.run([sys.executable, "-c", script], timeout=500, capture_output=True)
    assert status.returncode == -signal.SIGKILL, status.stderr.decode()[-2000:]
    assert not (workdir / "metrics.json").exists()
    with np.load(workdir / "state.npz") as arrays:
        assert arrays["engine"][0] == 30  # it died in the third epoch, after step 31
    found = train_quietly(DROPOUT, workdir, digits)
    assert without_seconds(read_history(workdir)) == without_seconds(read_history(tmp_path / "whole"))
    assert_same_weights(saved_weights(workdir), saved_weights(tmp_path / "whole"))
    assert found["test_loss"] == expected["test_loss"]


def test_a_run_is_not_resumed_on_other_images(tmp_path, digits, step_by_step):
    config = TINY.override(epochs=1)
    with pytest.raises(RunError, match="stopped by SIGTERM"):
        train_quietly(config, tmp_path, digits, callbacks=[At(3, send(signal.SIGTERM))])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    others = dataclasses.replace(digits, train_images=255 - digits.train_images)
    with pytest.raises(
        ConfigError, match=r"unfinished run on other images; .*--workdir, .*--overwrite"
    ) as info:
        train_quietly(config, tmp_path, others)
    assert "\n" not in str(info.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    copies = dataclasses.replace(digits, train_images=digits.train_images.copy(), source="elsewhere")
    assert train_quietly(config, tmp_path, copies)["epochs"] == 1


def test_what_on_train_begin_changes_is_changed_once(tmp_path, digits):
    """Also in a run that is stopped before its first step, and calls it again."""

    class Double(keras.callbacks.Callback):
        def __init__(self, stop=False):
            super().__init__()
            self.stop = stop

        def on_train_begin(self, logs=None):
            self.model.set_weights([2 * w for w in self.model.get_weights()])
            if self.stop:
                os.kill(os.getpid(), signal.SIGTERM)

    config = TINY.override(epochs=1)
    train_quietly(config, tmp_path / "whole", digits, callbacks=[Double()])
    with pytest.raises(RunError, match="stopped by SIGTERM at step 0 of"):
        train_quietly(config, tmp_path / "parts", digits, callbacks=[Double(stop=True)])
    train_quietly(config, tmp_path / "parts", digits, callbacks=[Double()])
    assert_same_weights(saved_weights(tmp_path / "parts"), saved_weights(tmp_path / "whole"))


def test_a_run_that_lost_its_best_model_is_not_resumed(tmp_path, digits, step_by_step):
    """It would keep the best of the epochs that are left, which may be worse."""
    config, whole, workdir = TINY.override(epochs=3), tmp_path / "whole", tmp_path / "run"
    expected = train_quietly(config, whole, digits)
    steps = len(digits.train_labels) * 9 // 10 // config.batch_size
    with pytest.raises(RunError, match="stopped by SIGTERM"):
        train_quietly(config, workdir, digits, callbacks=[At(2 * steps + 1, send(signal.SIGTERM))])
    (workdir / "model.keras").rename(tmp_path / "moved")
    with pytest.raises(
        ConfigError,
        match=r"unfinished run without model.keras, its model of epoch [12]; .*, or put the file back",
    ):
        train_quietly(config, workdir, digits)
    (tmp_path / "moved").rename(workdir / "model.keras")
    found = train_quietly(config, workdir, digits)
    assert (found["best_epoch"], found["test_loss"]) == (expected["best_epoch"], expected["test_loss"])


def test_two_runs_do_not_share_a_folder(tmp_path, digits):
    """Not while one is at work in it; the lock leaves no trace."""
    seen = []

    def second():
        # As another process would; in this one, runs take turns.
        with (
            pytest.raises(RunError, match=r"another run is at work in .*; wait for its end, .*--workdir"),
            RunFolder(tmp_path).lock(),
        ):
            pass
        seen.append({p.name for p in tmp_path.iterdir()})

    metrics = train_quietly(TINY.override(epochs=1), tmp_path, digits, callbacks=[At(2, second)])
    assert metrics["epochs"] == 1 and seen == [{"config.json"}]
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "history.csv",
        "metrics.json",
        "model.keras",
    }


def test_the_seconds_of_training_are_without_the_scoring(tmp_path, digits, monkeypatch):
    before, scored = training.scoring.predict_with_and_without, []

    def slow(*args, **options):
        scored.append(time.time())
        time.sleep(2)
        return before(*args, **options)

    monkeypatch.setattr(training.scoring, "predict_with_and_without", slow)
    began = time.time()
    metrics = train_quietly(TINY.override(epochs=1), tmp_path, digits)
    (row,) = read_history(tmp_path)
    assert row["seconds"] <= metrics["train_seconds"] <= scored[0] - began
    assert metrics["total_seconds"] >= metrics["train_seconds"] + 2


def test_workers_of_a_cluster_need_a_folder_that_they_share():
    cluster = object.__new__(tf.distribute.MultiWorkerMirroredStrategy)
    with pytest.raises(ConfigError, match="workdir is None; allowed with several workers: a folder that all"):
        training._folder(None, TINY, cluster)
    assert str(training._folder(None, TINY, tf.distribute.get_strategy())).startswith("runs/fast.digits-2")


def test_an_unfinished_run_without_a_state_begins_again(tmp_path, digits):
    (tmp_path / "config.json").write_text(json.dumps(TINY.override(epochs=0.5).to_dict()))
    (tmp_path / "model.keras").write_text("of the dead run")
    metrics = train_quietly(TINY.override(epochs=0.5), tmp_path, digits)
    assert metrics["epochs"] == 1 and saved_weights(tmp_path)


def test_the_way_on_from_an_overwriting_run_is_without_overwrite(tmp_path, digits, step_by_step):
    with pytest.raises(RunError, match=rf"--workdir={tmp_path} and without --overwrite$"):
        train_quietly(TINY, tmp_path, digits, callbacks=[At(3, send(signal.SIGTERM))], overwrite=True)


def test_a_signal_before_the_loop_stops_its_first_step(tmp_path, digits, step_by_step):
    with runtime.Signals() as enclosing:
        send(signal.SIGTERM)()
        with pytest.raises(RunError, match="stopped by SIGTERM at step 0 of 72"):
            train_quietly(TINY.override(epochs=6), tmp_path, digits)
    assert enclosing.caught == "SIGTERM"


@pytest.fixture
def measured(monkeypatch):
    """Pretends a processor with native bfloat16 and an empty cache: measured(ratio) is what it measures from now on."""

    def measured(ratio):
        monkeypatch.setattr(precision, "_ratios", {})
        monkeypatch.setattr(precision, "_read", lambda file, here: None)
        monkeypatch.setattr(precision, "measure", lambda: ratio)

    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_bf16"})
    return measured


def precision_lines(printed):
    return [line for line in printed.out.splitlines() if line.startswith("precision")]


@pytest.mark.parametrize(("was", "then", "now"), [("float32", 1.6, 0.5), ("mixed_bfloat16", 0.5, 1.6)])
def test_a_resumed_run_keeps_its_precision_whatever_is_measured_now(
    tmp_path, digits, measured, step_by_step, capsys, was, then, now
):
    config = TINY.override(precision="auto", epochs=2)
    measured(then)
    whole = train_quietly(config, tmp_path / "whole", digits, verbose=2)
    (line,) = precision_lines(capsys.readouterr())
    assert line.startswith(f"precision: {was}: convolutions take {then:.2f} of ")
    assert "(measured just now in 0.0 s; kept in " in line
    with pytest.raises(RunError):
        train_quietly(config, tmp_path / "parts", digits, callbacks=[At(15, send(signal.SIGTERM))])
    measured(now)
    resumed = train_quietly(config, tmp_path / "parts", digits, verbose=2)
    assert precision_lines(capsys.readouterr()) == [f"precision: {was}: this run began with it"]
    assert resumed["precision"] == whole["precision"] == was
    for folder in ("whole", "parts"):
        record = json.loads((tmp_path / folder / "config.json").read_text())
        assert (record["precision"], record["environment"]["precision"]) == ("auto", was)
    assert_same_weights(saved_weights(tmp_path / "parts"), saved_weights(tmp_path / "whole"))
    # A new run takes what is measured now.
    new = train_quietly(config.override(epochs=0.25), tmp_path / "parts", digits, overwrite=True)
    assert new["precision"] == {"float32": "mixed_bfloat16"}.get(was, "float32")


def test_an_unfinished_run_is_not_resumed_in_another_precision_that_is_asked_for(
    tmp_path, digits, measured, step_by_step
):
    measured(0.5)
    config = TINY.override(precision="auto")
    with pytest.raises(RunError):
        train_quietly(config, tmp_path, digits, callbacks=[At(3, send(signal.SIGTERM))])
    with pytest.raises(
        ConfigError, match=r"another configuration \(precision 'auto', now 'float32'\); .*--overwrite"
    ):
        train_quietly(config.override(precision="float32"), tmp_path, digits)


@pytest.mark.parametrize("text", ["{", "{}", '{"environment": {"precision": ["float32"]}}'])
def test_a_state_that_does_not_name_its_precision_is_damaged(tmp_path, digits, step_by_step, text):
    config = TINY.override(precision="auto")
    with pytest.raises(RunError):
        train_quietly(config, tmp_path, digits, callbacks=[At(3, send(signal.SIGTERM))])
    with np.load(tmp_path / "state.npz") as file:
        arrays = {**file, "meta": np.array(text)}
    np.savez(tmp_path / "state.npz", **arrays)
    with pytest.raises(RunError, match=r"is damaged, or of other data .* to begin this run again"):
        train_quietly(config, tmp_path, digits)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, digits, step_by_step):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    twice = [At(3, send(signal.SIGINT)), At(3, send(signal.SIGINT))]
    with pytest.raises(KeyboardInterrupt):
        train_quietly(TINY, tmp_path, digits, callbacks=twice)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_in_the_last_step_ends_the_run_before_it_is_scored(tmp_path, digits, step_by_step):
    config = TINY.override(epochs=1)
    with pytest.raises(RunInterrupted, match=f"stopped by SIGTERM at step {PER_EPOCH} of {PER_EPOCH}; every"):
        train_quietly(config, tmp_path, digits, callbacks=[At(PER_EPOCH, send(signal.SIGTERM))])
    assert not (tmp_path / "metrics.json").exists()
    recorder = Recorder()
    metrics = train_quietly(config, tmp_path, digits, callbacks=[recorder])
    assert metrics["epochs"] == 1 and recorder.calls == ["train begin", "train end"]


# --- what ends a run, and what is kept ------------------------------------------------------------------


@pytest.mark.parametrize("late", [None, signal.SIGTERM])
def test_early_stopping(tmp_path, digits, monkeypatch, step_by_step, late):
    """Patience 2 after the best loss in epoch 2; kept is the best accuracy, epoch 3's. A signal in the end changes nothing."""
    script_validation(monkeypatch, [1.0, 0.5, 0.7, 0.6, 0.1, 0.1], [0.1, 0.2, 0.4, 0.3, 0.9, 0.9])
    config = TINY.override(early_stopping=2, epochs=6, target=0.4)
    recorder = Recorder()
    if late is not None:
        with pytest.raises(RunInterrupted):
            late_signal = At(4 * PER_EPOCH, send(late), "epoch")
            train_quietly(config, tmp_path, digits, callbacks=[recorder, late_signal])
    metrics = train_quietly(config, tmp_path, digits, callbacks=[recorder])
    assert metrics["epochs"] == len(read_history(tmp_path)) == 4
    assert (metrics["best_epoch"], metrics["best_val_accuracy"], metrics["epoch_at_target"]) == (3, 0.4, 3)
    assert_same_weights(saved_weights(tmp_path), recorder.weights[2])


def test_a_stop_that_another_worker_asked_for_is_remembered(tmp_path, digits, monkeypatch):
    """The other one's callback asks in epoch 2, and a signal comes in the end of that epoch."""
    mean = runtime.mean_over_workers

    def with_another(strategy, *values):
        asked = len(read_history(tmp_path)) if (tmp_path / "history.csv").exists() else 0
        return [1.0] if len(values) == 1 and asked == 2 else mean(strategy, *values)

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "mean_over_workers", with_another)
        with pytest.raises(RunInterrupted):
            train_quietly(
                TINY, tmp_path, digits, callbacks=[At(2 * PER_EPOCH, send(signal.SIGTERM), "epoch")]
            )
    assert train_quietly(TINY, tmp_path, digits)["epochs"] == 2


@pytest.mark.parametrize(
    ("losses", "accuracies", "best"),
    [
        ([0.9, 0.5, 0.3, 0.4], [0.5, 1.0, 1.0, 1.0], 3),  # of equal accuracies the lowest loss
        ([0.9, 0.5, 0.3, 0.2], [0.5, 1.0, 0.9, 0.9], 2),
        ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], 1),
        ([0.5, float("nan"), 0.6, float("nan")], [0.5, 0.5, 0.5, 0.5], 1),
    ],
)
def test_which_epoch_is_the_best(tmp_path, digits, monkeypatch, losses, accuracies, best):
    recorder = Recorder()
    config = TINY.override(epochs=4)
    script_validation(monkeypatch, losses, accuracies)
    metrics = train_quietly(config, tmp_path / "run", digits, callbacks=[recorder])
    assert (metrics["best_epoch"], metrics["best_val_accuracy"]) == (best, accuracies[best - 1])
    assert_same_weights(saved_weights(tmp_path / "run"), recorder.weights[best - 1])


def test_the_best_epoch_of_a_run_that_resumes(tmp_path, digits, monkeypatch):
    """It is stopped after the second of three epochs of equal accuracy, of which that one has the lowest loss."""
    config = TINY.override(epochs=3)
    script_validation(monkeypatch, [0.5, 0.3, 0.4], [1.0, 1.0, 1.0])
    with pytest.raises(RunInterrupted):
        train_quietly(config, tmp_path, digits, callbacks=[At(2 * PER_EPOCH, send(signal.SIGTERM), "epoch")])
    assert train_quietly(config, tmp_path, digits)["best_epoch"] == 2


def test_a_run_killed_after_early_stopping_does_not_train_on(tmp_path, digits, monkeypatch):
    script_validation(monkeypatch, [0.5, 0.6, 0.1], [0.1, 0.2, 0.9])
    config = TINY.override(early_stopping=1, epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(training.scoring, "predict_with_and_without", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_quietly(config, tmp_path, digits, save_seconds=0)
    assert train_quietly(config, tmp_path, digits)["epochs"] == 2
    assert len(read_history(tmp_path)) == 2


@pytest.mark.parametrize("fraction", [0.1, None])
def test_a_run_interrupted_while_it_is_scored_does_not_train_again(tmp_path, digits, monkeypatch, fraction):
    config = TINY.override(epochs=1.5, validation_fraction=fraction)
    expected = train_quietly(config, tmp_path / "whole", digits)
    workdir = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(training, "_score", lambda *_: send(signal.SIGINT)())
        way_on = rf"stopped after the training, before .*; everything is saved in .*--workdir={workdir}$"
        with pytest.raises(RunInterrupted, match=way_on):
            train_quietly(config, workdir, digits)
    rows = read_history(workdir)
    monkeypatch.setattr(Engine, "train", lambda *_: pytest.fail("trained"))
    found = train_quietly(config, workdir, digits)
    assert read_history(workdir) == rows and len(rows) == 2
    assert_same_weights(saved_weights(workdir), saved_weights(tmp_path / "whole"))
    for name in ("epochs", "best_epoch", "best_val_accuracy", "test_loss", "test_accuracy", "pflop"):
        assert found[name] == expected[name]
    assert not (workdir / "state.npz").exists()


def test_seconds_of_an_epoch_include_those_before_an_interruption(tmp_path, digits, step_by_step):
    def slowly():
        time.sleep(3)
        send(signal.SIGINT)()

    with pytest.raises(RunError, match="at step 18 "):
        train_quietly(TINY.override(epochs=3), tmp_path, digits, callbacks=[At(18, slowly)])
    train_quietly(TINY.override(epochs=3), tmp_path, digits)
    _, second, third = (row["seconds"] for row in read_history(tmp_path))
    assert second > 3 > third


def test_a_callback_may_stop_the_run(tmp_path, digits):
    def stop(epoch, logs):
        callback.model.stop_training = epoch == 0

    callback = keras.callbacks.LambdaCallback(on_epoch_end=stop)
    assert train_quietly(TINY, tmp_path, digits, callbacks=[callback])["epochs"] == 1


@pytest.mark.parametrize("step", [5, PER_EPOCH + 5])
def test_a_signal_in_the_step_in_which_a_callback_stops_the_run(tmp_path, digits, step_by_step, step):
    """The epoch still ends with a validation, in the process that resumes."""

    def stop():
        callback.model.stop_training = True

    callback = At(step, stop)
    whole = train_quietly(TINY, tmp_path / "whole", digits, callbacks=[callback])
    callback = At(step, stop)
    with pytest.raises(RunInterrupted, match=f"at step {step} "):
        train_quietly(TINY, tmp_path / "parts", digits, callbacks=[callback, At(step, send(signal.SIGTERM))])
    parts = train_quietly(TINY, tmp_path / "parts", digits)
    epochs = -(-step // PER_EPOCH)
    assert parts["epochs"] == whole["epochs"] == len(read_history(tmp_path / "parts")) == epochs
    assert parts["best_val_accuracy"] == whole["best_val_accuracy"]
    assert_same_weights(saved_weights(tmp_path / "parts"), saved_weights(tmp_path / "whole"))


def test_a_best_model_of_epochs_that_were_lost_is_not_kept(tmp_path, digits, monkeypatch):
    """A process dies between the best model and its state, and what is trained again is not as good."""
    script_validation(monkeypatch, [0.5, 0.4, 0.3], [0.5, 0.9, 0.6])
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_history", lambda self, rows: 1 / 0 if len(rows) == 2 else None)
        with pytest.raises(ZeroDivisionError):
            train_quietly(TINY, tmp_path, digits, save_seconds=0)
    assert (tmp_path / "state.npz").exists()
    script_validation(monkeypatch, [0.5, 0.4, 0.3], [0.5, 0.4, 0.3])
    recorder = Recorder()
    metrics = train_quietly(TINY, tmp_path, digits, callbacks=[recorder])
    assert (metrics["best_epoch"], metrics["best_val_accuracy"]) == (2, 0.4)
    assert_same_weights(
        saved_weights(tmp_path), recorder.weights[0]
    )  # the first that this process saw: epoch 2's


def test_without_validation_the_last_weights_are_kept(tmp_path, digits):
    recorder = Recorder()
    metrics = train_quietly(
        TINY.override(validation_fraction=None, epochs=2), tmp_path, digits, callbacks=[recorder]
    )
    assert_same_weights(saved_weights(tmp_path), recorder.weights[-1])
    assert metrics["n_train"] == 1438 and metrics["n_validation"] == 0 and metrics["best_epoch"] == 2
    assert metrics["best_val_accuracy"] is metrics["epoch_at_target"] is metrics["seconds_to_target"] is None
    assert [row["val_loss"] for row in read_history(tmp_path)] == [None, None]
    assert "test begin" not in recorder.calls
    assert metrics["test_accuracy"] > 0


def test_validation_every_other_epoch_and_at_the_end(tmp_path, digits):
    recorder = Recorder()
    config = TINY.override(validation_interval=2, epochs=3, views=2)
    metrics = train_quietly(config, tmp_path, digits, callbacks=[recorder], score_test=False)
    rows = read_history(tmp_path)
    assert [row["val_accuracy"] is not None for row in rows] == [False, True, True]
    assert metrics["best_epoch"] in (2, 3)
    assert_same_weights(saved_weights(tmp_path), recorder.weights[metrics["best_epoch"] - 1])
    assert metrics["test_accuracy"] is metrics["test_loss"] is metrics["test_accuracy_views"] is None


def test_a_run_that_a_callback_stops_validates_its_last_epoch(tmp_path, digits, step_by_step):
    """Epoch 2 is not due, and the stop comes after it."""

    def stop():
        callback.model.stop_training = True

    callback, recorder = At(2 * PER_EPOCH, stop, "epoch"), Recorder()
    config = TINY.override(validation_interval=5, epochs=6, target=0.01)
    metrics = train_quietly(config, tmp_path, digits, callbacks=[callback, recorder])
    first, last = read_history(tmp_path)
    assert first["val_accuracy"] is None and last["val_accuracy"] == metrics["best_val_accuracy"] > 0
    assert metrics["best_epoch"] == metrics["epoch_at_target"] == metrics["epochs"] == 2
    assert recorder.calls[-4:] == ["epoch 1 end", "test begin", "test end", "train end"]
    assert_same_weights(saved_weights(tmp_path), recorder.weights[1])


def test_two_runs_are_equal_whatever_the_steps_a_call(tmp_path, digits, monkeypatch):
    config = TINY.override(epochs=1.5, options__dropout=0.2)
    train_quietly(config, tmp_path / "one", digits)
    monkeypatch.setattr(loop, "CALL_SECONDS", 0.0)
    train_quietly(config, tmp_path / "other", digits)
    assert without_seconds(read_history(tmp_path / "one")) == without_seconds(
        read_history(tmp_path / "other")
    )
    assert_same_weights(saved_weights(tmp_path / "one"), saved_weights(tmp_path / "other"))


# --- pixels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", ["unit", "centred", "standardised"])
def test_pixel_statistics(pixels):
    images = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), np.uint8)
    images[..., 2] = 9  # one level: its deviation would be zero
    mean, std = pixel_statistics(pixels, images)
    unit = images.astype(np.float64).reshape(-1, 3) / 255
    if pixels == "unit":
        assert mean is None
    else:
        np.testing.assert_allclose(mean, unit.mean(0), rtol=1e-12)
    if pixels == "standardised":
        np.testing.assert_allclose(std[:2], unit.std(0)[:2], rtol=1e-9)
        assert std[2] == 1e-3
    else:
        assert std is None


def test_the_statistics_of_the_training_images_are_in_the_model(whole, digits):
    workdir, *_ = whole
    images, *_ = datasets.split(digits, 0.1, "stratified", 0)
    layer = keras.models.load_model(workdir / "model.keras").get_layer("preprocess")
    unit = images.astype(np.float64).reshape(-1, 3) / 255
    np.testing.assert_allclose(layer.scale, 1 / (255 * unit.std(0)), rtol=1e-6)
    np.testing.assert_allclose(layer.offset, -unit.mean(0) / unit.std(0), rtol=1e-6)


# --- a folder of images, from the command line ----------------------------------------------------------


def call(module, usage, *argv):
    """The exit status of a command, its flags at their defaults before."""
    module.FLAGS.unparse_flags()
    for name in module.FLAGS:
        module.FLAGS[name].unparse()
    return cli.run(module.main, module.FLAGS, usage, ["command", *map(str, argv)])


COLOURS = {"blueberry": (20, 30, 200), "lime": (30, 200, 40), "tomato": (210, 40, 30)}


@pytest.fixture
def fruit(tmp_path):
    """Three classes of noisy colours, 20 images to train on and 4 to test each, of several sizes and kinds."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "fruit" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = generator.normal(0, 25, (20 + i, 24, 3))
                Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "fruit"


def test_a_folder_of_images_end_to_end(tmp_path, fruit, capsys):
    workdir = tmp_path / "run"
    flags = [
        "--recipe=fast.digits",
        "--dataset=folder",
        f"--data_dir={fruit}",
        "--image_size=16",
        "--set=options.filters=[4,4]",
        "--epochs=12",
        "--batch_size=9",
        "--precision=float32",
        f"--workdir={workdir}",
    ]
    assert call(command, command.USAGE, *flags) == 0
    said = capsys.readouterr()
    assert "epoch 12/12" in said.out and str(workdir) in said.out
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert (metrics["n_train"], metrics["n_validation"], metrics["n_test"]) == (
        48,
        12,
        12,
    )  # a fifth, of so few
    assert metrics["test_accuracy"] > 0.6  # colours are easy
    assert "blueberry" in (workdir / "classification_report.txt").read_text()
    assert "tomato" in (workdir / "report.html").read_text()

    assert call(evaluate, evaluate.USAGE, f"--workdir={workdir}", "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["n"] == 12 and scored["accuracy"] == pytest.approx(metrics["test_accuracy"], abs=1e-9)
    assert scored["loss"] == pytest.approx(metrics["test_loss"], rel=1e-6)

    images = [fruit / "test" / name / "0.png" for name in COLOURS]
    assert call(predict, predict.USAGE, f"--model={workdir / 'model.keras'}", "--json", *images) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in found] == [str(p) for p in images]
    assert all(set(row["probabilities"]) == set(COLOURS) for row in found)
    model = keras.models.load_model(workdir / "model.keras")
    pixels = np.stack([datasets.read_image(p, (16, 16)) for p in images])
    names = sorted(COLOURS)
    for row, truth in zip(found, model.predict(pixels, verbose=0), strict=True):
        assert row["label"] == names[truth.argmax()]
        np.testing.assert_allclose([row["probabilities"][n] for n in names], truth, atol=1e-5)


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], None),
        (
            ["--validation_fraction=0.3"],
            "validation_fraction (0.3) is not used: {} has validation images",
        ),
        (["--final_fit"], None),
        (["--final_fit", "--set=early_stopping=2"], None),
    ],
)
def test_a_share_to_validate_beside_a_folder_of_it(tmp_path, fruit, capsys, flags, said):
    (fruit / "test").rename(fruit / "val")
    workdir = f"--workdir={tmp_path / 'run'}"
    small = ["--recipe=fast.digits", "--set=options.filters=[4,4]", "--image_size=16", "--epochs=1"]
    given = [*small, "--batch_size=9", "--dataset=folder", f"--data_dir={fruit}", workdir, *flags]
    assert call(command, command.USAGE, *given) == 0
    out = capsys.readouterr().out
    assert "60 images to train on, 12 to validate, 0 to test" in out
    assert (said.format(fruit) in out) if said else ("not used" not in out)


@pytest.fixture
def drawer(tmp_path):
    """<class>/*: 20 blueberries, 8 limes and 14 tomatoes, with what lies around in folders of pictures."""
    generator = np.random.default_rng(1)
    for (name, colour), count in zip(COLOURS.items(), (20, 8, 14), strict=True):
        folder = tmp_path / "drawer" / name
        folder.mkdir(parents=True)
        for i in range(count):
            noise = generator.normal(0, 25, (20 + i, 60, 3))
            Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "drawer" / "Thumbs.db").touch()
    (tmp_path / "drawer" / "lime" / "broken.png").write_bytes(b"no image")
    return tmp_path / "drawer"


SMALL_RUN = [
    "--dataset=folder",
    "--recipe=fast.default",
    "--image_size=16",
    "--set=options.filters=[4,4]",
    "--epochs=2",
    "--precision=float32",
]


def test_a_drawer_of_pictures_end_to_end(tmp_path, drawer, capsys):
    """Every setting that the number of images should determine is chosen, said and recorded; evaluate finds the same images."""
    workdir = tmp_path / "run"
    flags = [
        *SMALL_RUN,
        f"--data_dir={drawer}",
        "--resize=crop",
        "--class_weights=balanced",
        f"--workdir={workdir}",
    ]
    assert call(command, command.USAGE, *flags) == 0
    said = capsys.readouterr().out
    for part in (
        "left out: 1 files or folders", "1 .db", "left out: 1 of 43 pictures", "lime/broken.png",
        "adapted to 33 images: batch_size 8 (recipe: 512), validation_fraction 0.2 (recipe: 0.1)",
        "26 images to train on, 7 to validate, 9 to test", "warning: few images to train on of lime (",
        "95% interval", "balanced accuracy",
    ):  # fmt: skip
        assert part in said, part
    record = json.loads((workdir / "config.json").read_text())
    assert (record["batch_size"], record["validation_fraction"], record["epochs"]) == (8, 0.2, 2)
    assert (record["resize"], record["class_weights"], "adapt" in record) == ("crop", "balanced", False)
    metrics = json.loads((workdir / "metrics.json").read_text())
    page = (workdir / "report.html").read_text()
    assert "balanced accuracy" in page and "95% interval" in page

    for i in range(9):  # what comes later is in no part
        Image.new("RGB", (30, 30), COLOURS["lime"]).save(drawer / "lime" / f"0{i}.png")
    for split, n in (("test", 9), ("validation", 7), ("train", 26)):
        assert (
            call(evaluate, evaluate.USAGE, f"--workdir={workdir}", f"--split={split}", "--views=1", "--json")
            == 0
        )
        scored = json.loads(capsys.readouterr().out)
        assert scored["n"] == n
        if split == "test":
            assert scored["accuracy"] == metrics["test_accuracy"]
            assert scored["balanced_accuracy"] == metrics["test_balanced_accuracy"]
        if split == "validation":
            assert scored["accuracy"] == metrics["best_val_accuracy"]
    (drawer / "lime" / "0.png").unlink()
    (drawer / "lime" / "1.png").unlink()
    assert call(evaluate, evaluate.USAGE, f"--workdir={workdir}", "--split=train") == 2
    err = capsys.readouterr().err
    assert "lacks 2 of the run's 42 pictures" in err and "does not hold the images of the run" in err

    again = [
        "--dataset=folder",
        f"--data_dir={drawer}",
        f"--config={workdir / 'config.json'}",
        "--batch_size=900",
    ]
    assert call(command, command.USAGE, *again) == 2
    assert "batch_size is 900; allowed: at most the" in capsys.readouterr().err


def test_a_drawer_that_grew_does_not_change_a_run_that_resumes(tmp_path, drawer):
    """The run goes on with the files and the settings that it began with, to the bit."""
    chosen = ("batch_size", "validation_fraction")
    config = TINY.override(dataset="folder", image_size=16, batch_size=64, adapt=chosen)

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                signal.raise_signal(signal.SIGINT)

    whole = train_and_evaluate(config, tmp_path / "whole", data_dir=str(drawer), verbose=0, full_report=False)
    with pytest.raises(RunError, match="everything is saved"):
        train_and_evaluate(
            config,
            tmp_path / "parts",
            data_dir=str(drawer),
            verbose=0,
            full_report=False,
            callbacks=[Interrupt()],
        )
    for i in range(30):
        Image.new("RGB", (30, 30), COLOURS["lime"]).save(drawer / "lime" / f"0{i}.png")
    parts = train_and_evaluate(config, tmp_path / "parts", data_dir=str(drawer), verbose=0, full_report=False)
    assert parts["n_train"] == whole["n_train"] == 26 and parts["epochs"] == whole["epochs"] == 3
    assert_same_weights(saved_weights(tmp_path / "parts"), saved_weights(tmp_path / "whole"))


def test_a_drawer_that_grew_before_the_first_state_is_a_new_run(tmp_path, drawer):
    """Nothing was trained, so the settings follow from the pictures of now."""
    config = TINY.override(dataset="folder", image_size=16, batch_size=64, adapt=("batch_size",))
    options = {"data_dir": str(drawer), "verbose": 0, "full_report": False}
    before = train_and_evaluate(config, tmp_path / "before", **options)

    class Killed(BaseException):
        pass

    def kill(epoch, logs):
        raise Killed

    callback = keras.callbacks.LambdaCallback(on_epoch_begin=kill)
    with pytest.raises(Killed):
        train_and_evaluate(config, tmp_path / "run", callbacks=[callback], **options)
    assert (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "state.npz").exists()
    for i in range(400):
        Image.new("RGB", (30, 30), COLOURS["lime"]).save(drawer / "lime" / f"0{i}.png")
    train_and_evaluate(config, tmp_path / "run", **options)
    train_and_evaluate(config, tmp_path / "new", **options)
    sizes = [
        json.loads((tmp_path / name / "config.json").read_text())["batch_size"] for name in ("run", "new")
    ]
    assert sizes[0] == sizes[1] != json.loads((tmp_path / "before" / "config.json").read_text())["batch_size"]
    assert before["n_train"] <= 30


def test_another_recipe_in_the_folder_of_an_adapted_run_is_named(tmp_path, digits):
    """The interval of validations that the first run chose does not fit the early stopping of the other."""
    adapted = TINY.override(adapt=("validation_interval",), recipe="one", epochs=101)
    with pytest.raises(RunInterrupted):
        train_quietly(adapted, tmp_path, digits, callbacks=[At(1, send(signal.SIGTERM))])
    file = tmp_path / "config.json"
    record = json.loads(file.read_text())
    assert record["validation_interval"] > 1
    other = TINY.override(adapt=("validation_interval",), recipe="two", early_stopping=2)
    with pytest.raises(
        ConfigError, match=r"an unfinished run of another configuration \(recipe 'one', now 'two'\)"
    ):
        train_quietly(other, tmp_path, digits)


def test_a_state_of_another_strategy_says_what_allows_it(tmp_path, digits):
    """A run whose config.json knows of the change, and whose state does not yet."""
    with pytest.raises(RunInterrupted):
        train_quietly(TINY, tmp_path, digits, callbacks=[At(1, send(signal.SIGTERM))])
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "strategy": "mirrored"}))
    with pytest.raises(RunError, match="or allow it with --allow_replica_change"):
        train_quietly(TINY.override(strategy="mirrored"), tmp_path, digits)


# --- faults that were here once -------------------------------------------------------------------------


def test_a_callback_that_fails_when_a_signal_ends_the_run_costs_no_state(tmp_path, digits):
    class Fails(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            raise KeyError("loss")

    with pytest.raises(KeyError):
        train_quietly(TINY, tmp_path, digits, callbacks=[At(5, send(signal.SIGTERM), "batch"), Fails()])
    assert (tmp_path / "state.npz").exists() and (tmp_path / "model.keras").exists()
    assert train_quietly(TINY, tmp_path, digits)["epochs"] == TINY.epochs


def test_the_images_from_before_the_split_are_gone_when_the_training_begins(tmp_path, digits, monkeypatch):
    held, alive = [], []

    def load(*args, **options):
        images = digits.train_images.copy()
        held.append(weakref.ref(images))
        return dataclasses.replace(digits, train_images=images)

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            gc.collect()
            alive.append(held[0]() is not None)

    monkeypatch.setattr(datasets, "load", load)
    options = {"verbose": 0, "full_report": False, "score_test": False, "callbacks": Look()}
    train_and_evaluate(TINY.override(epochs=1), tmp_path / "run", **options)
    assert alive == [False]


def test_the_training_images_are_gone_when_the_test_images_are_scored(
    tmp_path, digits, monkeypatch, table_bytes
):
    held, score = [], training.scoring.predict_with_and_without

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            held.append(table_bytes())

    def look(*args, **options):
        held.append(table_bytes())
        return score(*args, **options)

    monkeypatch.setattr(training.scoring, "predict_with_and_without", look)
    train_quietly(TINY.override(epochs=1), tmp_path, digits, full_report=True, callbacks=Look())
    assert held[0] > 0.8 * digits.train_images.nbytes and held[1:] == [0]
    assert (tmp_path / "figures" / "sample_images.png").exists()


def test_a_full_report_without_a_test_score(tmp_path, digits):
    metrics = train_quietly(TINY.override(epochs=1), tmp_path, digits, full_report=True, score_test=False)
    assert metrics["test_accuracy"] is None and json.loads((tmp_path / "metrics.json").read_text()) == metrics
    text = (tmp_path / "classification_report.txt").read_text()
    assert text == "This run has no test score: its images were not scored.\n"
    assert not (tmp_path / "figures" / "confusion_matrix.png").exists()


class StopAt(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            self.model.stop_training = True


def test_a_callback_stops_at_the_batch_and_the_epoch_ends_as_in_fit(tmp_path, digits, step_by_step):
    """Keras's fit leaves the epoch at that batch, validates, and calls on_epoch_end and on_train_end."""
    recorder = Recorder()
    metrics = train_quietly(TINY, tmp_path, digits, callbacks=[StopAt(PER_EPOCH + 5), recorder])
    assert recorder.calls.count("batch begin") == PER_EPOCH + 5
    assert recorder.calls[-5:] == ["batch end 4", "test begin", "test end", "epoch 1 end", "train end"]
    assert metrics["epochs"] == 2 and [row["epoch"] for row in read_history(tmp_path)] == [1, 2]

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    expected, x = Recorder(), np.zeros((PER_EPOCH, 2), np.float32)
    expected.on_train_batch_end = lambda batch, logs=None: expected.calls.append(f"batch end {batch}")
    model.fit(
        x,
        x,
        batch_size=1,
        epochs=3,
        verbose=0,
        validation_data=(x, x),
        callbacks=[StopAt(PER_EPOCH + 5), expected],
    )
    assert recorder.calls == expected.calls


def test_stopping_before_the_first_batch_trains_one_as_fit_does(tmp_path, digits, step_by_step):
    class Never(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.stop_training = True

    recorder = Recorder()
    metrics = train_quietly(TINY, tmp_path, digits, callbacks=[Never(), recorder])
    assert recorder.calls.count("batch begin") == 1 and metrics["epochs"] == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"data": "digits", "dataset": "digits"}, "data and dataset are set; allowed: one of them"),
        ({"data": "digits", "data_dir": "there"}, "data and data_dir are set; allowed: one of them"),
        ({"test_data": "digits"}, "validation_data, test_data or class_names is set without data"),
        ({"data": "digits", "test_data": "digits"}, "test_data is set beside a Dataset, which holds its own"),
    ],
)
def test_sources_of_images_that_contradict_one_another(arguments, text, tmp_path, digits):
    arguments = {k: digits if v == "digits" else v for k, v in arguments.items()}
    with pytest.raises(ConfigError, match=text):
        train_and_evaluate(TINY, tmp_path / "run", verbose=0, **arguments)
    assert not (tmp_path / "run").exists()


def test_early_stopping_needs_validation_images_of_the_run(tmp_path, digits):
    pair, none = (
        (digits.train_images, digits.train_labels),
        (digits.train_images[:0], digits.train_labels[:0]),
    )
    with pytest.raises(ConfigError, match="there are no validation images, but early stopping"):
        train_and_evaluate(
            TINY.override(early_stopping=1), tmp_path, data=pair, validation_data=none, verbose=0
        )


def test_a_run_that_a_callback_stopped_stays_stopped(tmp_path, digits, step_by_step, monkeypatch):
    """Interrupted while it is scored, it resumes with the score and not with the rest of the epochs."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(training.scoring, "predict_with_and_without", lambda *_, **__: 1 / 0)
        train_quietly(TINY, tmp_path, digits, callbacks=[StopAt(5)])
    weights = saved_weights(tmp_path)
    metrics = train_quietly(TINY, tmp_path, digits)
    assert metrics["epochs"] == 1 and metrics["test_accuracy"] is not None
    assert_same_weights(saved_weights(tmp_path), weights)


def test_a_signal_after_the_metrics_does_not_interrupt_a_finished_run(tmp_path, digits, monkeypatch):
    for name, summarize in (("before", training.summary.summarize), ("after", lambda *_: None)):
        with monkeypatch.context() as patch:
            patch.setattr(training.summary, "summarize", lambda *a: (send(signal.SIGTERM)(), summarize(*a)))  # noqa: B023
            metrics = train_quietly(TINY.override(epochs=0.5), tmp_path / name, digits)
        assert json.loads((tmp_path / name / "metrics.json").read_text()) == metrics


def test_the_recorded_command_can_be_pasted_into_a_shell(tmp_path, digits, monkeypatch):
    words = [
        "/usr/bin/python3",
        "-m",
        "cifar10_trainer",
        "--workdir=my runs",
        "--set",
        "options.filters=[4, 8]",
    ]
    monkeypatch.setattr(sys, "orig_argv", words)
    train_quietly(TINY.override(epochs=1), tmp_path, digits)
    command = json.loads((tmp_path / "config.json").read_text())["command"]
    assert shlex.split(command) == ["python", *words[1:]]


def test_a_relative_data_dir_is_found_from_anywhere(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for k in range(2):
            folder = tmp_path / "pictures" / split / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (32, 32), (100 * k, 10 * i, 0)).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    config = TINY.override(dataset="folder", batch_size=4, epochs=1, validation_fraction=0.25)
    train_and_evaluate(config, "run", data_dir="pictures", verbose=0, full_report=False)
    assert json.loads(Path("run/config.json").read_text())["data_dir"] == str(tmp_path / "pictures")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.run(evaluate.main, evaluate.FLAGS, "", ["evaluate", "--workdir=../run"]) == 0


def test_a_run_stays_where_it_began_when_the_current_folder_changes(tmp_path, digits, monkeypatch, capsys):
    """As a callback, or another thread, may do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    away = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: os.chdir(tmp_path / "elsewhere"))
    train_quietly(TINY.override(epochs=1), "runs/here", digits, callbacks=[away], verbose=2)
    assert (tmp_path / "runs" / "here" / "metrics.json").exists()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert "files                runs/here/" in capsys.readouterr().out
