"""Searches in this process: trials on the embedded digits with tiny networks."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tuning
from cifar10_trainer import RECIPES, Config, adaptation, datasets, machine, precision, runtime
from cifar10_trainer.__main__ import read_config
from cifar10_trainer.errors import ConfigError, FolderBusyError, RunError, RunInterrupted, WriteError
from cifar10_trainer.training import train_and_evaluate
from tuning import Options, oracle, trial, tune
from tuning.figure import search_figure
from tuning.leaderboard import Row, duration
from tuning.search_folder import SearchFolder
from tuning.space import Space

pytestmark = pytest.mark.filterwarnings(
    # KerasTuner 1.4.8 asks the threading module by its old names.
    "ignore:(currentThread|getName)\\(\\) is deprecated:DeprecationWarning"
)
TINY = RECIPES["fast.digits"].override(epochs=0.5, batch_size=32, options__filters=(4,), precision="float32")


@pytest.fixture(scope="module")
def digits():
    data = datasets.load("digits")
    train = slice(None, None, 4)
    return dataclasses.replace(
        data, train_images=data.train_images[train], train_labels=data.train_labels[train]
    )


def space(hp):
    return TINY.override(
        options__dropout=hp.Float("dropout", 0.0, 0.5, step=0.1),
        optimizer__learning_rate=hp.Float("learning_rate", 0.05, 0.8, sampling="log", default=0.2),
    )


class _Without:
    """Hyperparameters of which one is not drawn."""

    def __init__(self, name, hp):
        self.name, self.hp = name, hp

    def Float(self, name, *args, **more):
        return 0.0 if name == self.name else self.hp.Float(name, *args, **more)


def board(folder):
    with open(folder / "leaderboard.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A finished search of three trials: (folder, result)."""
    folder = tmp_path_factory.mktemp("search")
    return folder, tune(
        space, digits, workdir=str(folder), tuner="random", max_trials=3, target=0.1, verbose=0
    )


def test_the_result_has_its_name_of_version_1_0_0_too():
    assert tuning.Found is tuning.SearchResult


# ---- what a search leaves --------------------------------------------------------------------------------------


def test_counts_are_exact_in_the_leaderboard():
    """And accuracies, which are float32 numbers, have seven digits."""
    assert oracle.rounded(14_848_586.0) == 14_848_586
    assert oracle.rounded(float(np.float32(0.8534))) == 0.8534


def test_the_leaderboard(finished):
    folder, found = finished
    rows = board(folder)
    assert [int(r["trial"]) for r in rows] == [r.trial for r in found.rows]
    assert sorted(r["trial"] for r in rows) == ["1", "2", "3"]
    assert {r["status"] for r in rows} == {"completed"}
    accuracies = [float(r["val_accuracy"]) for r in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    first = next(r for r in rows if r["trial"] == "1")
    assert (first["hp.dropout"], first["hp.learning_rate"]) == ("0", "0.2")
    for row in rows:
        metrics = json.loads((folder / row["folder"] / "metrics.json").read_text())
        assert float(row["val_accuracy"]) == pytest.approx(metrics["best_val_accuracy"], abs=1e-6)
        assert float(row["pflop"]) == pytest.approx(metrics["pflop"], rel=1e-6)
        assert float(row["parameters"]) == metrics["params"]
    for row, exact in zip(
        rows, found.rows, strict=True
    ):  # the file rounds the end to a tenth, the seconds not
        assert row["ended"] == f"{exact.ended:.1f}" and float(row["seconds"]) == exact.metrics["seconds"]
        assert 0 < exact.metrics["seconds"] < exact.ended


def test_no_test_image_is_scored(finished):
    folder, _ = finished
    for row in board(folder):
        metrics = json.loads((folder / row["folder"] / "metrics.json").read_text())
        assert metrics["n_test"] == 359
        assert metrics["test_accuracy"] is metrics["test_loss"] is None


def test_the_best_config_trains_again_to_the_same(finished, digits, tmp_path):
    folder, found = finished
    config = read_config(str(folder / "best_config.json"))
    assert config == found.best_config
    assert (config.dataset, config.target) == ("digits", 0.1)
    metrics = train_and_evaluate(config, tmp_path, dataset=digits, verbose=0, full_report=False)
    assert metrics["best_val_accuracy"] == pytest.approx(found.best.accuracy, abs=1e-6)


def test_tensorboard_has_the_hyperparameters_of_every_trial(finished):
    folder, found = finished
    for row in found.rows:
        events = EventAccumulator(str(folder / "tensorboard" / f"trial{row.trial:03d}")).Reload()
        content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        assert b"learning_rate" in content and b"dropout" in content
        (accuracy,) = (tf.make_ndarray(e.tensor_proto) for e in events.Tensors("val_accuracy"))
        assert accuracy == pytest.approx(row.accuracy, abs=1e-6)


def test_tensorboard_logs_that_a_kill_cut_short_are_written_anew(digits, tmp_path, monkeypatch):
    folder = tmp_path / "tensorboard" / "trial001"
    written = tf.summary.scalar

    def kill(*_, **__):
        raise KeyboardInterrupt

    def search():
        return tune(space, digits, workdir=str(tmp_path), tuner="random", max_trials=1, target=0.1, verbose=0)

    monkeypatch.setattr(tf.summary, "scalar", kill)
    with pytest.raises((KeyboardInterrupt, RunInterrupted)):
        search()
    assert not folder.exists()
    monkeypatch.setattr(tf.summary, "scalar", written)
    found = search()
    (accuracy,) = EventAccumulator(str(folder)).Reload().Tensors("val_accuracy")
    assert tf.make_ndarray(accuracy.tensor_proto) == pytest.approx(found.best.accuracy, abs=1e-6)
    assert [path.name for path in folder.parent.iterdir()] == ["trial001"]


def test_the_figure(finished):
    folder, _ = finished
    png = tf.io.decode_png((folder / "search.png").read_bytes()).numpy()
    assert png.shape[0] > 500 and png.shape[1] > 1000 and len(np.unique(png.reshape(-1, 3), axis=0)) > 10


def test_a_finished_search_only_logs_its_result(finished, digits, capsys, monkeypatch):
    folder, found = finished
    monkeypatch.setattr(trial, "train_and_evaluate", None)  # not to be called
    again = tune(space, digits, workdir=str(folder), tuner="random", max_trials=3, target=0.1)
    assert again.rows == found.rows
    out = capsys.readouterr().out
    assert "resumed: 3 trials are done" in out
    assert f"best: trial {found.best.trial} with {100 * found.best.accuracy:.2f}%" in out
    assert "target 10.00%: first passed by trial" in out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tuner": "bayesian"}, "tuner was 'random', now 'bayesian'"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"space": lambda hp: space(hp).override(epochs=2)}, "epochs was 0.5, now 2.0"),
        (
            {"space": lambda hp: TINY.override(options__dropout=hp.Float("dropout", 0, 0.4))},
            "max_value was 0.5",
        ),
        (
            {"space": lambda hp: space(_Without("dropout", hp))},
            "dropout was {.*}, now None",
        ),
    ],
)
def test_another_search_in_the_folder_is_refused(finished, digits, change, says):
    folder, _ = finished
    options = {"workdir": str(folder), "tuner": "random", "max_trials": 3, "verbose": 0, **change}
    with pytest.raises(ConfigError, match=says):
        tune(options.pop("space", space), digits, **options)


def test_a_search_resumes_with_its_own_images_only(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.8], []))
    options = {"workdir": str(tmp_path), "tuner": "random", "max_trials": 1, "verbose": 0}
    tune(space, digits, **options)
    relabelled = dataclasses.replace(digits, train_labels=digits.train_labels[::-1].copy())
    with pytest.raises(ConfigError, match="holds another search: images have been added, removed or changed"):
        tune(space, relabelled, **options)


def test_overwrite_begins_anew(digits, tmp_path):
    (tmp_path / "trials").mkdir()
    (tmp_path / "search.json").write_text('{"tuner": "bayesian"}')
    (tmp_path / "mine.txt").write_text("not the search's")
    tune(space, digits, workdir=str(tmp_path), tuner="random", max_trials=1, overwrite=True, verbose=0)
    assert len(board(tmp_path)) == 1
    assert (tmp_path / "mine.txt").exists()


def test_one_search_at_a_time_in_a_folder(finished, digits):
    folder, _ = finished
    code = (
        "import fcntl, os, sys, time; d = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(d, fcntl.LOCK_EX);"
        " print('locked', flush=True); time.sleep(60)"
    )
    before = sorted(folder.iterdir())
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"locked\n"
        with pytest.raises(FolderBusyError, match="another process is searching"):
            tune(space, digits, workdir=str(folder), tuner="random", verbose=0)
        other.kill()
    assert sorted(folder.iterdir()) == before, "neither the refused search nor a lock leaves a file"
    assert not (folder / ".lock").exists()


def test_a_search_keeps_the_folder_locked_until_its_end(digits, tmp_path, monkeypatch):
    refused = []
    train = fake_training([0.8], [])

    def another_search_meanwhile(config, folder, **options):
        with pytest.raises(FolderBusyError), SearchFolder(tmp_path).lock():
            pass
        refused.append(True)
        return train(config, folder, **options)

    monkeypatch.setattr(trial, "train_and_evaluate", another_search_meanwhile)
    tune(space, digits, workdir=str(tmp_path), max_trials=1, verbose=0)
    assert refused == [True]
    with SearchFolder(tmp_path).lock():
        pass


def test_a_search_of_version_1_0_0_is_resumed(tmp_path):
    """Two of its three trials are done; the third had been drawn. Its search.json must be that of today's code."""
    root, folder = Path(__file__).parents[1], tmp_path / "search"
    shutil.copytree(root / "tests" / "data" / "search-1.0.0", folder)
    before = {row["trial"]: row for row in board(folder)}
    assert sorted(before) == ["1", "2"]
    done = {path: path.read_bytes() for path in folder.glob("trials/trial_[01]/*")}
    command = "-m tuning.search --dataset=digits --epochs=3 --max_trials=3 --space=dropout,learning_rate"
    words = [sys.executable, *command.split(), f"--workdir={folder}"]
    process = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "resumed: 2 trials are done" in process.stdout
    after = {row["trial"]: row for row in board(folder)}
    assert sorted(after) == ["1", "2", "3"]
    assert {trial: after[trial] for trial in before} == before
    assert {path: path.read_bytes() for path in done} == done, "they are not trained again"
    third = after["3"]
    assert third["status"] == "completed" and float(third["val_accuracy"]) > 0.5
    assert (third["hp.dropout"], third["hp.learning_rate"]) == ("0.1", "0.096205572")  # as it had been drawn
    assert (folder / "search.png").exists()


# ---- progress, target, resume ----------------------------------------------------------------------------------


def fake_training(accuracies, calls):
    """A stand-in for a training: gives one accuracy after the other; raises those that are exceptions."""

    def train(config, folder, **options):
        assert options["score_test"] is options["full_report"] is False
        calls.append(config)
        result = accuracies[len(calls) - 1]
        if isinstance(result, BaseException):
            raise result
        (folder / "history.csv").write_text(
            "epoch,loss,accuracy,val_loss,val_accuracy,learning_rate,seconds\n"
            f"1,1.0,0.5,{1 - result},{result},0.1,2.0\n"
        )
        metrics = {"best_val_accuracy": result, "best_epoch": 1, "epochs": 1, "params": 100, "pflop": 0.5}
        record = {**config.to_dict(), "fingerprint": datasets.fingerprint(options["dataset"])}
        (folder / "config.json").write_text(json.dumps(record))
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return metrics

    return train


def test_progress_for_people(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        trial, "train_and_evaluate", fake_training([0.8, RunError("the loss is nan"), 0.9], [])
    )
    tune(space, digits, workdir=str(tmp_path), tuner="random", max_trials=3)
    out = capsys.readouterr().out
    assert "trial 1 of 3: dropout=0 learning_rate=0.2, 0.5 epochs (the starting point)" in out
    assert (
        "trial 1 of 3: 80.00% in 0 s; best 80.00% (trial 1), short of the target 85.00%; 2 to go, about 0 s"
        in out
    )
    assert "trial 2 of 3: failed: the loss is nan; best 80.00% (trial 1)" in out
    assert "trial 3 of 3: 90.00% in 0 s; best 90.00% (trial 3), past the target 85.00%\n" in out
    assert re.search(r"target 85.00%: first passed by trial 3, after \d+ s and 1 PFLOP\n", out)
    assert "starting point: trial 1 with 80.00%; beaten by 10.00 points" in out
    assert "1 of 3 trials failed" in out


def test_it_says_when_nothing_beats_the_starting_point(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.8, 0.7], []))
    tune(space, digits, workdir=str(tmp_path), tuner="random", max_trials=2)
    out = capsys.readouterr().out
    assert "starting point: trial 1 with 80.00%; no trial beats it" in out
    assert "target 85.00%: not reached" in out


def test_the_best_loss_may_have_a_lower_accuracy(digits, tmp_path, monkeypatch, capsys):
    train = fake_training([0.9, 0.8], [])

    def overconfident(config, folder, **options):
        metrics = train(config, folder, **options)
        if metrics["best_val_accuracy"] == 0.9:
            history = (folder / "history.csv").read_text()
            (folder / "history.csv").write_text(history.replace(f",{1 - 0.9},", ",5.0,"))
        return metrics

    monkeypatch.setattr(trial, "train_and_evaluate", overconfident)
    tune(space, digits, workdir=str(tmp_path), tuner="random", max_trials=2, objective="val_loss")
    out = capsys.readouterr().out
    assert "best 80.00% (trial 2), past the target 85.00%" in out  # trial 1 is
    assert "trial 1 with 90.00%; 10.00 points more than the best, whose val_loss is better" in out


def test_stop_at_target(digits, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.8, 0.86, 0.9], calls))
    options = {"workdir": str(tmp_path), "tuner": "random", "max_trials": 3, "verbose": 0}
    assert len(tune(space, digits, stop_at_target=True, **options).rows) == 2
    assert len(tune(space, digits, stop_at_target=True, **options).rows) == 2
    assert len(tune(space, digits, **options).rows) == 3  # on to the budget
    assert len(calls) == 3


def test_val_loss_as_objective(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.8, 0.9, 0.7], []))
    found = tune(space, digits, workdir=str(tmp_path), max_trials=3, objective="val_loss", verbose=0)
    assert [round(r.metrics["val_loss"], 6) for r in found.rows] == [0.1, 0.2, 0.3]


def test_the_loss_of_a_trial_is_that_of_its_kept_epoch(digits, tmp_path, monkeypatch):
    """Later epochs may have a lower loss and a lower accuracy; the saved model has neither."""
    train = fake_training([0.8], [])

    def longer(config, folder, **options):
        metrics = train(config, folder, **options)
        with open(folder / "history.csv", "a") as file:
            file.write("2,0.9,0.6,,,0.1,2.0\n3,0.8,0.6,0.01,0.7,0.1,2.0\n")
        return {**metrics, "epochs": 3}

    monkeypatch.setattr(trial, "train_and_evaluate", longer)
    (row,) = tune(space, digits, workdir=str(tmp_path), max_trials=1, verbose=0).rows
    assert row.metrics["val_loss"] == pytest.approx(0.2)


def test_rungs_are_complete_runs_of_their_length(digits, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.5, 0.1, 0.2, 0.3, 0.6], calls))
    tune(
        lambda hp: space(hp).override(epochs=6),
        digits,
        workdir=str(tmp_path),
        tuner="halving",
        max_trials=5,
        verbose=0,
    )
    assert [c.epochs for c in calls] == [6, 2, 2, 2, 6]
    assert calls[4] == calls[3].override(epochs=6)  # the best of the three


def test_the_seconds_of_an_interrupted_trial_count(digits, tmp_path, monkeypatch):
    def slow(config, folder, **options):
        time.sleep(0.5)
        raise KeyboardInterrupt

    options = {"workdir": str(tmp_path), "tuner": "random", "max_trials": 1, "verbose": 0}
    monkeypatch.setattr(trial, "train_and_evaluate", slow)
    with pytest.raises(RunInterrupted):
        tune(space, digits, **options)
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.8], []))
    (row,) = tune(space, digits, **options).rows
    assert row.ended >= 0.5


def test_of_equally_good_trials_the_one_with_the_lowest_validation_loss_is_best(
    digits, tmp_path, monkeypatch
):
    calls, losses = [], iter([0.5, 0.3, 0.4])
    right = fake_training([0.8, 0.8, 0.8], calls)

    def train(config, folder, **options):
        metrics = right(config, folder, **options)
        history = (folder / "history.csv").read_text()
        (folder / "history.csv").write_text(history.replace(str(1 - 0.8), str(next(losses))))
        return metrics

    monkeypatch.setattr(trial, "train_and_evaluate", train)
    found = tune(space, digits, workdir=str(tmp_path), tuner="random", max_trials=3, verbose=0)
    assert [row.trial for row in found.rows] == [2, 3, 1]
    assert found.best_config.options == calls[1].options


def test_a_second_ctrl_c_does_not_claim_that_all_is_saved(digits, tmp_path, monkeypatch):
    for error, saved in (
        (KeyboardInterrupt(), "everything up to the last save of the trial"),
        (RunInterrupted("x"), "everything"),
    ):
        monkeypatch.setattr(trial, "train_and_evaluate", fake_training([error], []))
        with pytest.raises(RunInterrupted, match=f"0 of 2 trials are done; {saved} is saved in"):
            tune(space, digits, workdir=str(tmp_path), tuner="random", max_trials=2, verbose=0)


def test_an_interrupted_search_resumes(digits, tmp_path, monkeypatch):
    calls = []
    events = [0.8, RunInterrupted("stopped by SIGTERM at step 7"), 0.7, KeyboardInterrupt(), 0.9]
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training(events, calls))
    options = {"workdir": str(tmp_path), "tuner": "random", "max_trials": 3, "verbose": 0}
    with pytest.raises(RunInterrupted, match="1 of 3 trials are done"):
        tune(space, digits, **options)
    with pytest.raises(RunInterrupted, match="2 of 3 trials are done"):
        tune(space, digits, **options)
    found = tune(space, digits, **options)
    assert sorted(r.accuracy for r in found.rows) == [0.7, 0.8, 0.9]
    assert calls[1] == calls[2] and calls[3] == calls[4]


def test_all_trials_have_one_precision_also_on_other_machines(digits, tmp_path, monkeypatch):
    """The search is interrupted, and resumed on a machine that would choose another precision."""
    found, calls = [], []
    train = fake_training([0.8, KeyboardInterrupt(), 0.7, 0.9, 0.6], calls)

    def choosing(config, folder, **options):
        found.append((config.precision, runtime.choose_precision(config.precision)[0]))
        return train(config, folder, **options)

    monkeypatch.setattr(trial, "train_and_evaluate", choosing)
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(precision, "bfloat16_ratio", lambda: (0.5, "measured"))
    options = {"workdir": str(tmp_path), "tuner": "random", "max_trials": 3, "verbose": 0}

    def automatic(hp):
        return space(hp).override(precision="auto")

    with pytest.raises(RunInterrupted):
        tune(automatic, digits, **options)
    monkeypatch.setattr(precision, "bfloat16_ratio", lambda: (1.6, "measured"))
    tune(automatic, digits, **options)
    assert found == [("auto", "mixed_bfloat16")] * 4
    tune(automatic, digits, **{**options, "overwrite": True, "max_trials": 1})
    assert found[4:] == [("auto", "float32")]


@pytest.mark.parametrize("text", ["", "{}", '{"auto": "auto"}', '{"auto": ["float32"]}', '["float32"]'])
def test_a_damaged_record_of_the_precision_is_written_again(text, tmp_path):
    folder = SearchFolder(tmp_path)
    assert folder.precision(lambda: "float32") == "float32"
    folder.precision_file.write_text(text)
    assert folder.precision(lambda: "mixed_bfloat16") == "mixed_bfloat16"
    assert folder.precision(lambda: "float32") == "mixed_bfloat16"


def test_a_trial_that_was_finished_but_not_reported_is_not_run_again(digits, tmp_path, monkeypatch):
    calls = []
    train = fake_training([0.8, 0.9], calls)

    def killed(config, folder, **options):
        train(config, folder, **options)
        raise KeyboardInterrupt

    options = {"workdir": str(tmp_path), "tuner": "random", "max_trials": 1, "verbose": 0}
    monkeypatch.setattr(trial, "train_and_evaluate", killed)
    with pytest.raises(RunInterrupted):
        tune(space, digits, **options)
    found = tune(space, digits, **options)
    assert len(calls) == 1
    assert found.best.accuracy == 0.8
    assert found.best.metrics["seconds"] >= 2  # of its history


def test_a_trial_waits_for_the_process_that_still_has_its_folder(digits, tmp_path, monkeypatch):
    calls, waits = [], []
    events = [FolderBusyError("another run is at work"), FolderBusyError("another run is at work"), 0.8]
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training(events, calls))
    monkeypatch.setattr(trial.time, "sleep", waits.append)
    found = tune(space, digits, workdir=str(tmp_path), max_trials=1, verbose=0)
    assert found.best.accuracy == 0.8
    assert len(calls) == 3 and waits == [1, 1]


def test_a_trial_that_another_process_finishes_meanwhile_is_taken_as_it_is(digits, tmp_path, monkeypatch):
    """Between the look whether the run is finished, and the lock of its folder."""
    finish = fake_training([0.8], [])

    def train(config, folder, **options):
        finish(config, folder, **options)
        raise ConfigError(f"{folder} holds a finished run")

    monkeypatch.setattr(trial, "train_and_evaluate", train)
    found = tune(space, digits, workdir=str(tmp_path), max_trials=1, verbose=0)
    assert found.best.accuracy == 0.8 and [r["status"] for r in board(tmp_path)] == ["completed"]


def test_a_trial_waits_as_long_as_the_process_lives_and_a_signal_ends_that(digits, tmp_path, monkeypatch):
    calls, waits = [], []
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([FolderBusyError("busy")] * 1000, calls))

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 900:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trial.time, "sleep", sleep)
    with pytest.raises(RunInterrupted, match="0 of 2 trials are done"):
        tune(space, digits, workdir=str(tmp_path), max_trials=2, lease=2, verbose=0)
    assert len(waits) == 900


def test_a_trial_may_resume_on_another_number_of_replicas(digits, tmp_path, monkeypatch):
    given, train = [], fake_training([0.8], [])

    def noting(config, folder, **options):
        given.append(options)
        return train(config, folder, **options)

    monkeypatch.setattr(trial, "train_and_evaluate", noting)
    tune(space, digits, workdir=str(tmp_path), max_trials=1, verbose=0)
    assert given[0]["allow_replica_change"] is True


def test_a_history_that_a_power_failure_emptied_does_not_fail_its_trial(digits, tmp_path, monkeypatch):
    train = fake_training([KeyboardInterrupt(), 0.8], [])

    def emptied(config, folder, **options):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history.csv").write_text("")
        return train(config, folder, **options)

    monkeypatch.setattr(trial, "train_and_evaluate", emptied)
    options = {"workdir": str(tmp_path), "max_trials": 1, "verbose": 0}
    with pytest.raises(RunInterrupted):
        tune(space, digits, **options)
    assert tune(space, digits, **options).best.accuracy == 0.8


# ---- failure ---------------------------------------------------------------------------------------------------


def failing(hp):
    kind = hp.Choice("kind", ["fine", "diverges", "too deep", "too large"])
    if kind == "diverges":  # no batch norm, and weights that every step multiplies by 1 - 99
        plain = RECIPES["vgg.1"].override(epochs=1, batch_size=32, options={"filters": (4,), "dense": 8})
        return plain.override(optimizer__learning_rate=99, optimizer__weight_decay=1)
    return TINY.override(
        options__filters=(4,) * 6 if kind == "too deep" else (4,),
        batch_size=10**6 if kind == "too large" else 32,
    )


def test_hyperparameters_under_conditions_are_described_alike_in_every_process(digits):
    """Also where a value under a condition decides what else is drawn. A name alone stands for one hyperparameter."""

    def draw(hp):
        kind = hp.Choice("kind", ["a", "b"])
        with hp.conditional_scope("kind", ["b"]):
            deep = hp.Float("rate", 0.0, 0.5, default=0.1) if kind == "b" else 0.0
            if deep > 0.2:
                hp.Int("more", 1, 3)
        return TINY.override(options__dropout=deep)

    described = [trial.describe_search(draw, digits)[0]["hyperparameters"] for _ in range(8)]
    assert [list(one) for one in described] == [["kind", "rate"]] * 8
    assert described[0]["rate"]["conditions"][0]["config"]["values"] == ["b"]


def test_a_wrong_range_under_a_condition_is_one_line(digits):
    def draw(hp):
        if hp.Choice("kind", ["a", "b"]) == "b":
            with hp.conditional_scope("kind", ["b"]):
                hp.Float("rate", 0.5, 0.1)
        with hp.conditional_scope("kind", ["b"]):
            return TINY

    with pytest.raises(ConfigError, match="the space is invalid: "):
        trial.describe_search(draw, digits)


@pytest.mark.parametrize("changed", ["high", "second"])
def test_a_changed_range_under_a_condition_is_another_search(digits, tmp_path, monkeypatch, changed):
    def conditional(high, second=0.2):
        def draw(hp):
            kind = hp.Choice("kind", ["plain", "dropout", "both"])
            rate = 0.0
            with hp.conditional_scope("kind", ["dropout"]):
                if kind == "dropout":
                    rate = hp.Float("rate", 0.0, high, step=0.05)
            with hp.conditional_scope("kind", ["both"]):
                if kind == "both":
                    rate = hp.Float("rate", 0.0, second, step=0.05)
            return TINY.override(options__dropout=rate)

        return draw

    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.5] * 4, []))
    options = {"workdir": str(tmp_path), "tuner": "random", "max_trials": 2, "verbose": 0}
    tune(conditional(0.5), digits, **options)
    tune(conditional(0.5), digits, **{**options, "max_trials": 3})
    with pytest.raises(ConfigError, match="another search"):
        tune(conditional(0.4) if changed == "high" else conditional(0.5, 0.3), digits, **options)


def test_a_failed_trial_is_recorded_and_the_search_continues(digits, tmp_path):
    found = tune(failing, digits, workdir=str(tmp_path), tuner="random", max_trials=4, verbose=0)
    reasons = {r["hp.kind"]: r["reason"] for r in board(tmp_path)}
    assert reasons["fine"] == ""
    assert "training diverged" in reasons["diverges"]
    assert "6 blocks need images of 65x65" in reasons["too deep"]
    assert "batch_size is 1000000" in reasons["too large"]
    assert [r.status for r in found.rows] == ["completed", "failed", "failed", "failed"]
    assert found.best.values == {"kind": "fine"}


def test_a_full_disk_ends_the_search_which_then_resumes(digits, tmp_path, monkeypatch):
    full = WriteError("cannot write model.keras: No space left on device; make room")
    calls = []
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.8, full, 0.7, 0.9], calls))
    options = {"workdir": str(tmp_path), "tuner": "random", "max_trials": 3, "verbose": 0}
    with pytest.raises(RunError, match="No space left on device; make room"):
        tune(space, digits, **options)
    found = tune(space, digits, **options)
    assert sorted(r.accuracy for r in found.rows) == [0.7, 0.8, 0.9]
    assert calls[1] == calls[2]


def test_an_objective_that_is_no_number_is_a_failure_at_once(digits, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([float("nan"), 0.8], calls))
    found = tune(space, digits, workdir=str(tmp_path), tuner="random", max_trials=2, verbose=0)
    assert [r.status for r in found.rows] == ["completed", "failed"] and len(calls) == 2
    assert found.rows[1].reason == "its val_accuracy is nan"


@pytest.mark.parametrize(
    "error", [tf.errors.ResourceExhaustedError(None, None, "OOM when allocating"), MemoryError()]
)
def test_out_of_memory(error, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([error, 0.8], []))
    found = tune(space, digits, workdir=str(tmp_path), tuner="random", max_trials=2, verbose=0)
    assert [r.status for r in found.rows] == ["completed", "failed"]
    assert "out of memory" in found.rows[1].reason


def test_all_trials_failing_is_an_error(digits, tmp_path, monkeypatch):
    errors = [ValueError("of no\nuse"), RunError("b"), RunError("c"), RunError("d")]
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training(errors, []))
    with pytest.raises(RunError, match="all 4 trials failed; the first: ValueError: of no use"):
        tune(space, digits, workdir=str(tmp_path), tuner="random", max_trials=4, verbose=0)
    assert [r["status"] for r in board(tmp_path)] == ["failed"] * 4


@pytest.mark.parametrize(
    ("oom_kills", "starts", "says"),
    [(0, 10, "died 10 times, for an unknown reason"), (1, 2, "out of memory")],
)
def test_a_trial_that_kills_its_process_is_given_up(oom_kills, starts, says, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "_oom_kills", lambda: 0)
    for n in range(starts):
        with trial.count_starts(tmp_path):
            text = (tmp_path / "starts").read_text()
        (tmp_path / "starts").write_text(text)  # as if killed within
        assert text.split()[0] == str(n + 1)
    monkeypatch.setattr(trial, "_oom_kills", lambda: oom_kills)
    with pytest.raises(RunError, match=says), trial.count_starts(tmp_path):
        pass
    (tmp_path / "state.npz").write_text("progress")
    with trial.count_starts(tmp_path):
        assert (tmp_path / "starts").read_text().split()[0] == "1"


@pytest.mark.parametrize("text", ["", "1", "x y z"])
def test_a_count_of_starts_that_a_power_failure_damaged_begins_anew(text, tmp_path):
    (tmp_path / "starts").write_text(text)
    with trial.count_starts(tmp_path):
        assert (tmp_path / "starts").read_text().split()[0] == "1"
    assert not (tmp_path / "starts").exists()


def test_a_count_of_starts_of_1_0_0_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "_oom_kills", lambda: 0)
    (tmp_path / "starts").write_text("4 0")
    with trial.count_starts(tmp_path):
        assert (tmp_path / "starts").read_text().split()[0] == "5"


# ---- wrong arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda hp: TINY, "draws no hyperparameter"),
        (lambda hp: TINY.override(options__dropout=hp.Float("dropout", 0.5, 0.1)), "the space is invalid: "),
        (lambda hp: {"dropout": hp.Float("dropout", 0.1, 0.5)}, "the space returns a dict"),
        (lambda hp: TINY.override(options__drop=hp.Float("d", 0.1, 0.5)), "unknown option of fast 'drop'"),
        (lambda hp: space(hp).override(validation_fraction=None), "holds out no validation images"),
    ],
)
def test_invalid_spaces(bad, says, digits, tmp_path):
    with pytest.raises(ConfigError, match=says):
        tune(bad, digits, workdir=str(tmp_path / "w"), verbose=0)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_trial": 3}, "unknown setting 'max_trial'; allowed: .* Did you mean 'max_trials'"),
        ({"max_trials": "3"}, "max_trials is '3'; allowed: a whole number, 1 or more"),
        ({"max_trials": 1.5}, "max_trials is 1.5; allowed"),
        ({"seed": None}, "seed is None; allowed: a whole number, 0 or more"),
        ({"target": "0.8"}, "target is '0.8'; allowed: an accuracy"),
        ({"workdir": None}, "workdir is None; allowed: a folder"),
        ({"workers": 2, "space": lambda hp: TINY}, "space is <function.*no worker process can import"),
        ({"dataset": "digits"}, "train data is str; allowed"),
    ],
)
def test_wrong_settings_are_one_line(settings, says, digits, tmp_path):
    arguments = {"space": space, "dataset": digits, "workdir": str(tmp_path / "w"), "verbose": 0, **settings}
    with pytest.raises(ConfigError, match=says):
        tune(**arguments)
    assert not (tmp_path / "w").exists()


def test_a_function_that_was_typed_in_is_refused_with_workers(digits, tmp_path, monkeypatch):
    """Pickle finds it by its name, but a worker process would not."""
    main = types.ModuleType("__main__")
    main.typed = types.FunctionType(space.__code__, space.__globals__, "typed")
    main.typed.__module__, main.typed.__qualname__ = "__main__", "typed"
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(ConfigError, match=r"space is <function typed.*no worker process can import"):
        tune(main.typed, digits, workdir=str(tmp_path / "w"), verbose=0, workers=2)


def test_numbers_of_numpy_are_python_numbers_in_the_record(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.8], []))
    settings = {"seed": np.int64(3), "max_trials": np.int32(1), "target": np.float32(0.5)}
    tune(space, digits, workdir=str(tmp_path), verbose=0, **settings)
    assert json.loads((tmp_path / "search.json").read_text())["seed"] == 3


def test_a_search_over_arrays(digits, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.8, 0.8], calls))
    pair = digits.train_images, digits.train_labels
    for dataset in (pair, lambda: pair):
        tune(space, dataset, workdir=str(tmp_path / str(len(calls))), max_trials=1, verbose=0)
    assert len(calls) == 2


STATE = "trials/search_state.json"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("search.json", '{"half of'),
        (STATE, '{"half of'),
        (STATE, "[1]"),
        (STATE, '{"trials": []}'),
        (STATE, '{"trials": 3}'),
        (STATE, '{"trials": [{"trial_id": "0"}]}'),
    ],
)
def test_a_damaged_file_is_named(name, text, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.8], []))
    options = {"workdir": str(tmp_path), "max_trials": 1, "verbose": 0}
    tune(space, digits, **options)
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=f"cannot read .*{name}"):
        tune(space, digits, **options)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["leaderboard.csv", "trials", "tensorboard"])
def test_somebodys_own_files_stay(name, overwrite, digits, tmp_path):
    file = tmp_path / name if "." in name else tmp_path / name / "mine"
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    with pytest.raises(
        ConfigError, match=f"holds {name}, but no search, which has a search.json; choose another"
    ):
        tune(space, digits, workdir=str(tmp_path), overwrite=overwrite, verbose=0)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert file.read_text() == "precious"


def test_the_empty_folder_of_a_worker_that_came_first_is_no_obstacle(digits, tmp_path, monkeypatch):
    (tmp_path / "trials").mkdir()  # KerasTuner makes it in the worker's process
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.8], []))
    assert tune(space, digits, workdir=str(tmp_path), max_trials=1, verbose=0).best.accuracy == 0.8


def test_a_folder_that_cannot_be_written(digits, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write to"):
        tune(space, digits, workdir=str(tmp_path / "file" / "w"), verbose=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tuner": "grid"}, "unknown tuner 'grid'"),
        ({"objective": "acc"}, "unknown objective 'acc'; allowed: val_accuracy, val_loss"),
        ({"target": 85}, "target is 85"),
        ({"target": 0}, "target is 0"),
        ({"max_trials": 0}, "max_trials is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"lease": 0.5}, "lease is 0.5; allowed: 1 to 86400 seconds"),
        ({"lease": float("nan")}, "lease is nan; allowed: 1 to 86400 seconds"),
        ({"lease": float("inf")}, "lease is inf"),
        ({"chief_timeout": 0}, "chief_timeout is 0; allowed: 1 to 86400 seconds"),
        ({"chief_timeout": 1e12}, "chief_timeout is 1000000000000.0; allowed: 1 to 86400 seconds"),
        ({"role": "worker", "chief": "10.0.0..1:5000"}, "--chief names the address '10.0.0..1:5000'"),
        ({"role": "worker"}, "--chief=HOST:PORT"),
        ({"chief": "localhost:80"}, "--role=chief"),
        ({"role": "worker", "chief": "localhost"}, "HOST:PORT"),
        ({"role": "worker", "chief": "localhost:80", "workers": 2}, "none with --role=worker"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(ConfigError, match=says):
        Options(**options)


def test_the_old_name_of_the_chiefs_timeout(digits, tmp_path):
    """`patience`, as a flag and as an argument, is `chief_timeout`."""
    from tuning import search

    try:
        search.FLAGS(["search", "--patience=7"])
        assert search.options_from_flags("recipe").chief_timeout == 7
        search.FLAGS(["search", "--chief_timeout=8"])
        assert search.options_from_flags("recipe").chief_timeout == 8
    finally:
        restore_flags(search.FLAGS)
    with pytest.raises(ConfigError, match="chief_timeout is 0"):
        tune(space, digits, workdir=str(tmp_path), patience=0)


def test_the_flags_of_a_folder_reach_its_reader(tmp_path, capsys):
    """Six of twenty pictures cannot be read: more than usual, and as many as the flag allows."""
    from cifar10_trainer import cli
    from tuning import search

    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            path = tmp_path / "pictures" / name / f"{i}.png"
            if i < 6:
                path.write_text("no picture")
            else:
                Image.new("RGB", (8, 8), (i, 100 * (name == "a"), 0)).save(path)
    argv = [
        "search",
        "--dataset=folder",
        f"--data_dir={tmp_path / 'pictures'}",
        f"--workdir={tmp_path / 'pictures' / 'out'}",  # which is no class
    ]
    argv += ["--max_trials=1", "--epochs=1", "--recipe=fast.digits", "--space=learning_rate"]
    for further, status, text in (
        ([], 1, "a larger share than 0.05 with --max_bad"),
        (["--max_bad=0.5", "--strict"], 1, "cannot be read as an image"),
        (["--max_bad=0.5"], 0, "best"),
    ):
        assert cli.run(search.main, search.FLAGS, search.USAGE, [*argv, *further]) == status
        out, err = capsys.readouterr()
        assert text in out + err
        restore_flags(search.FLAGS)
    # A trial's record names the folder, so that evaluate finds the pictures.
    record = json.loads((tmp_path / "pictures" / "out" / "trials" / "trial_0" / "config.json").read_text())
    assert record["data_dir"] == str(tmp_path / "pictures")


def restore_flags(values):
    """Gives every flag its default again."""
    values.unparse_flags()
    for name in values:
        values[name].unparse()


@pytest.mark.parametrize(
    "flag",
    [
        "--target=1.2",
        "--objective=f1",
        "--space=dropout=0.5:0.1",
        "--space=foo",
        "--max_trials=many",
        "--tuner=x",
        "--set=precision",
        "--set=precisoin=float32",
        "--set=precision=half",
        "--set=target=0.9",
        '--set=adapt=["epochs"]',
        "--set=options.filters=null",
        "--set=self=1",
        "x",
    ],
)
def test_bad_flags_are_one_line_and_status_2(flag, capsys):
    from cifar10_trainer import cli
    from tuning import search

    assert cli.run(search.main, search.FLAGS, search.USAGE, ["search", flag]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    restore_flags(search.FLAGS)


# ---- numbers and figure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "text"), [(12.3, "12 s"), (150, "2 min"), (7200, "2.0 h")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_figure_of_every_kind_of_trial(tmp_path):
    """Names and numbers, short, low, failed and unfinished trials, and a hyperparameter that some trials lack."""

    def row(trial, accuracy, epochs=3.0, status="completed", **values):
        metrics = {"val_accuracy": accuracy, "epochs": epochs, "seconds": 60.0, "pflop": 0.1}
        done = status == "completed"
        return Row(
            trial,
            status,
            "",
            values,
            metrics if done else {},
            60.0 * trial if status != "unfinished" else None,
        )

    rows = [
        row(1, 0.86, kind="a", rate=0.1, on=True),
        row(2, 0.84, 1.0, kind="b", rate=1.0, on=False),
        row(3, 0.10, kind="b", rate=4.0, on=False),
        row(4, 0.0, status="failed", kind="a", rate=9.0, on=True),
        row(5, 0.0, status="unfinished", kind="a", rate=2.0, on=True),
        row(6, 0.85, kind="a", on=True),
    ]
    search_figure(rows, ["rate"], 0.85, tmp_path / "search.png")
    assert tf.io.decode_png((tmp_path / "search.png").read_bytes()).shape[2] == 4


def test_conditional_hyperparameters(digits, tmp_path, monkeypatch):
    def conditional(hp):
        if hp.Choice("optimizer", ["sgd", "adam"]) == "adam":
            with hp.conditional_scope("optimizer", ["adam"]):
                rate = hp.Float("adam_rate", 1e-4, 1e-2, sampling="log")
            return TINY.override(optimizer__name="adam", optimizer__learning_rate=rate)
        return TINY

    calls = []
    monkeypatch.setattr(trial, "train_and_evaluate", fake_training([0.5] * 6, calls))
    found = tune(conditional, digits, workdir=str(tmp_path), tuner="random", max_trials=6, verbose=0)
    assert {r.values["optimizer"]: len(r.values) for r in found.rows} == {"sgd": 1, "adam": 2}


def test_a_trial_of_a_folder_has_its_images_size(digits):
    import keras_tuner as kt

    small = digits.train_images[:, ::2, ::2]
    folder = dataclasses.replace(digits, name="folder", train_images=small, resize="crop")
    found = trial.make_config(space, kt.HyperParameters(), folder)
    assert (found.image_size, found.resize) == (16, "crop")
    assert trial.make_config(space, kt.HyperParameters(), digits).image_size == 32


def test_a_trial_whose_settings_adapt_is_that_of_the_adapted_ones(digits, tmp_path):
    """Also for a share of the epochs. Its run records the same settings, so a search that is resumed knows it."""
    import keras_tuner as kt

    few = dataclasses.replace(
        digits, train_images=digits.train_images[:40], train_labels=digits.train_labels[:40]
    )

    wanted, hp = TINY.override(batch_size=32, epochs=2, adapt=("batch_size", "epochs")), kt.HyperParameters()
    found = trial.make_config(lambda hp: wanted, hp, few)
    assert found == adaptation.adapt(wanted, 40, False) and found.epochs > 2 and not found.adapt
    hp.values[oracle.SHARE] = 0.5
    assert trial.make_config(lambda hp: wanted, hp, few).epochs == found.epochs / 2

    train_and_evaluate(found.override(epochs=1), tmp_path, data=few, verbose=0, full_report=False)
    assert Config.from_record(json.loads((tmp_path / "config.json").read_text())) == found.override(epochs=1)


@pytest.mark.parametrize(
    ("config", "says"),
    [({}, "TF_CONFIG names a cluster, but a trial"), ({"strategy": "multi_worker"}, "strategy is multi_worker, but a trial")],
)  # fmt: skip
def test_a_search_does_not_wait_for_a_cluster(config, says, tmp_path, digits, monkeypatch):
    cluster = {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 0}}))
    base = RECIPES["fast.digits"].override(**config)
    with pytest.raises(ConfigError, match=says):
        tune(Space(base, {"learning_rate": None}), digits, workdir=tmp_path / "search", verbose=0)
    assert not (tmp_path / "search").exists()


def test_set_changes_the_recipe_that_is_searched():
    from tuning import search

    try:
        search.FLAGS(["search", "--epochs=2", "--set=precision=float32", "--set=augmentation.cutout=4"])
        changes = {"epochs": 2, "precision": "float32", "augmentation__cutout": 4}
        assert search.base_from_flags() == RECIPES["fast.85"].override(**changes)
        restore_flags(search.FLAGS)
        search.FLAGS(["search", "--set=dataset=digits"])
        assert search.base_from_flags() == RECIPES["fast.digits"], "as with --dataset"
    finally:
        restore_flags(search.FLAGS)


def test_a_set_batch_of_a_folder_stays(tmp_path):
    from tuning import search

    pictures = folder_of(tmp_path / "pictures", 75)
    try:
        search.FLAGS(
            [
                "search",
                "--dataset=folder",
                f"--data_dir={pictures}",
                f"--workdir={tmp_path}",
                "--set=batch_size=30",
            ]
        )
        base = search.base_from_flags()
        suited = search.suited_to_folder(base, search.options_from_flags(base.recipe))
        assert suited.batch_size == 30 and suited.epochs > base.epochs
    finally:
        restore_flags(search.FLAGS)


def folder_of(path, count):
    for name in ("cat", "dog"):
        (path / name).mkdir(parents=True)
        for i in range(count):
            (path / name / f"{i}.png").touch()  # they are only counted
    return path


def test_a_search_of_a_folder_suits_its_number_of_images(tmp_path, capsys):
    from tuning import search

    pictures = folder_of(tmp_path / "pictures", 75)
    work = pictures / "searches" / "one"  # which is no class
    argv = ["search", "--dataset=folder", f"--data_dir={pictures}", f"--workdir={work}"]
    try:
        search.FLAGS([*argv, "--validation_fraction=0.25"])
        base = search.base_from_flags()
        suited = search.suited_to_folder(base, search.options_from_flags(base.recipe))
        # A fifth is cut off for the test: 120 images, of which 30 are held out. A batch of 8 gives 11 steps an epoch.
        assert (base.batch_size, base.epochs) == (256, 3)
        assert (suited.batch_size, suited.epochs, suited.validation_fraction) == (8, 46, 0.25)
        assert not suited.adapt
        assert "adapted to 120 images: batch_size 8 (recipe: 256)" in capsys.readouterr().out
        assert search.Space(suited, {"epochs": None})._range("epochs")[:2] == (23, 92), (
            "relative to what suits"
        )

        search.FLAGS([*argv, "--epochs=5"])
        base = search.base_from_flags()
        assert search.suited_to_folder(base, search.options_from_flags(base.recipe)).epochs == 5

        work.mkdir(parents=True)  # a search that version 1.0.0 began
        (work / "search.json").write_text(json.dumps({"defaults": base.to_dict()}))
        assert search.suited_to_folder(base, search.options_from_flags(base.recipe)) == base
        (work / "search.json").write_text(json.dumps({"defaults": suited.to_dict()}))
        assert search.suited_to_folder(base, search.options_from_flags(base.recipe)).batch_size == 8

        # What is adapted may leave batch and epochs as they are, and change the share that is held out.
        (work / "search.json").unlink()
        search.FLAGS["validation_fraction"].value = None
        search.FLAGS([*argv, "--epochs=5", "--recipe=transfer.cifar"])
        base = search.base_from_flags().override(batch_size=8)
        suited = search.suited_to_folder(base, search.options_from_flags(base.recipe))
        assert (suited.batch_size, suited.epochs) == (base.batch_size, base.epochs)
        assert suited.validation_fraction == 0.2 != base.validation_fraction
        (work / "search.json").write_text(json.dumps({"defaults": suited.to_dict()}))
        assert search.suited_to_folder(base, search.options_from_flags(base.recipe)) == suited
    finally:
        restore_flags(search.FLAGS)
