"""What a kill, a power failure, a signal or a broken output costs: no wrong result, and at most save_seconds of work."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from cifar10_trainer import (
    cross_validate,
    datasets,
    loop,
    machine,
    process,
    run_folder,
    runtime,
    summary,
)
from cifar10_trainer.config import Optimizer
from cifar10_trainer.engine import Engine
from cifar10_trainer.errors import ConfigError, RunError, RunInterrupted
from cifar10_trainer.recipes import RECIPES
from cifar10_trainer.run_folder import RunFolder
from cifar10_trainer.training import train_and_evaluate
from tuning.search_folder import SearchFolder

ROOT = Path(__file__).parents[1]
TINY = RECIPES["fast.digits"].override(
    options__filters=(4, 8),
    epochs=2,
    batch_size=100,
    optimizer=Optimizer(name="adam", learning_rate=0.02),
    precision="float32",
)
PER_EPOCH = 12
LONG = [  # of a run that lasts until a signal comes
    "--dataset=digits",
    "--set=options.filters=[4,8]",
    "--epochs=90000",
    "--precision=float32",
]


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture
def step_by_step(monkeypatch):
    monkeypatch.setattr(loop, "CALL_SECONDS", 0.0)


def train_quietly(config, workdir, dataset, **options):
    options = {"verbose": 0, "full_report": False, **options}
    return train_and_evaluate(config, workdir, dataset=dataset, **options)


def stop_at(monkeypatch, step, action=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    """Lets every run do `action` after this step, once."""
    train = Engine.train

    def stopping(engine, steps):
        logs = train(engine, steps)
        if engine.step == step:
            action()
        return logs

    monkeypatch.setattr(Engine, "train", stopping)


def without_seconds(workdir):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder(workdir).read_history()]


# ---- kills


@pytest.mark.parametrize("what", ["run", "search"])
def test_a_kill_before_any_step_on_the_disk_never_mixes_two_runs(what, tmp_path):
    words = [sys.executable, str(ROOT / "tests" / "killing.py"), what, str(tmp_path / "folder")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 20, "steps"


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory, digits):
    """A run of two epochs that was stopped at step 9 with two states, of steps 8 and 9; and the whole run."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(loop, "CALL_SECONDS", 0.0)
        stop_at(monkeypatch, 9)
        with pytest.raises(RunInterrupted, match="step 9 of 24"):
            train_quietly(TINY, folder / "run", digits, save_seconds=0)
    train_quietly(TINY, folder / "whole", digits)
    return folder


@pytest.fixture
def begun(unfinished, tmp_path):
    return Path(shutil.copytree(unfinished / "run", tmp_path / "run"))


def step_of(path):
    with np.load(path) as arrays:
        return int(arrays["engine"][0])


DAMAGES = {
    "truncated": lambda content: content[: len(content) * 2 // 3],
    "zeros": lambda content: bytes(len(content)),
    "a bit": lambda content: (
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :]
    ),
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_state_falls_back_to_the_one_before(damage, begun, unfinished, digits, capsys):
    assert (step_of(begun / "state.npz"), step_of(begun / "state.previous.npz")) == (9, 8)
    state = begun / "state.npz"
    state.write_bytes(DAMAGES[damage](state.read_bytes()))
    with pytest.MonkeyPatch.context() as monkeypatch:  # the damaged one must not replace the whole one
        stop_at(monkeypatch, 10)
        monkeypatch.setattr(loop, "CALL_SECONDS", 0.0)
        with pytest.raises(RunInterrupted):
            train_quietly(TINY, begun, digits, verbose=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line or "resumed" in line]
    assert re.fullmatch(r".*state\.npz is damaged \(.*\); resuming from the state before it, .*", lines[0])
    assert lines[1] == "resumed at step 8 of 24"
    assert (step_of(begun / "state.npz"), step_of(begun / "state.previous.npz")) == (10, 8)
    train_quietly(TINY, begun, digits)
    assert without_seconds(begun) == without_seconds(unfinished / "whole")
    assert not list(begun.glob("state*"))


def test_two_damaged_states_are_one_line(begun, digits):
    for name in ("state.npz", "state.previous.npz"):
        (begun / name).write_bytes(b"")
    reason = (
        r"state\.npz and .*state\.previous\.npz are damaged, or of other data \(.*\); delete both to begin"
    )
    with pytest.raises(RunError, match=reason) as info:
        train_quietly(TINY, begun, digits)
    assert "\n" not in str(info.value)
    for path in begun.glob("state*"):
        path.unlink()
    assert train_quietly(TINY, begun, digits)["epochs"] == 2


def test_a_state_of_another_config_is_refused(begun, digits):
    """config.json and the state may come from two runs, as where somebody copied one of them."""
    other = TINY.override(seed=5)
    record = json.loads((begun / "config.json").read_text())
    (begun / "config.json").write_text(json.dumps({**record, "seed": 5}))
    with pytest.raises(
        RunError, match=r"state\.npz is of another configuration \(seed 0, now 5\), so it is not"
    ):
        train_quietly(other, begun, digits)
    (begun / "config.json").unlink()
    with pytest.raises(
        RunError, match=r"state\.npz has no config\.json beside it, so it is not .*--overwrite"
    ):
        train_quietly(TINY, begun, digits)
    assert step_of(begun / "state.npz") == 9
    assert train_quietly(other, begun, digits, overwrite=True)["seed"] == 5
    assert not list(begun.glob("state*"))


def test_a_write_that_reads_back_damaged_keeps_the_states(begun, digits, monkeypatch):
    before = {path.name: path.read_bytes() for path in begun.glob("state*")}
    save = np.savez

    def flipped(path, **arrays):
        save(path, **arrays)
        path.write_bytes(DAMAGES["a bit"](path.read_bytes()))

    monkeypatch.setattr(run_folder.np, "savez", flipped)
    with pytest.raises(RunError, match=r"cannot write .*state\.npz: what was written reads back damaged"):
        train_quietly(TINY, begun, digits, save_seconds=0)
    assert {path.name: path.read_bytes() for path in begun.glob("*state*")} == before
    assert not list(begun.glob(".*"))


@pytest.mark.slow
def test_an_overwriting_cross_validation_that_is_interrupted_can_be_resumed(tmp_path, digits, monkeypatch):
    """Without --overwrite, as the line says: the folds of before must not be in the way."""
    one = TINY.override(epochs=0.25)
    cross_validate(one, 2, tmp_path, dataset=digits, verbose=0)
    other = one.override(seed=3)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        patch.setattr(loop, "CALL_SECONDS", 0.0)
        with pytest.raises(RunInterrupted, match="without --overwrite"):
            cross_validate(other, 2, tmp_path, dataset=digits, verbose=0, overwrite=True)
    assert not (tmp_path / "folds.json").exists() and not list((tmp_path / "fold-2-of-2").iterdir())
    assert cross_validate(other, 2, tmp_path, dataset=digits, verbose=0)["seed"] == 3


# ---- time


def test_no_more_than_save_seconds_are_ever_unsaved(tmp_path, digits, monkeypatch, step_by_step):
    """A clock on which a step takes 7 s, a validation 20 s and a save 2 s: epochs of 104 s."""
    now, saved, gaps, steps = [0.0], [0.0], [], []
    monkeypatch.setattr(
        loop, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0], time=None)
    )

    def taking(seconds, function):
        def slow(*arguments, **options):
            now[0] += seconds
            gaps.append(now[0] - saved[0])
            return function(*arguments, **options)

        return slow

    write = RunFolder.write_state

    def save(folder, config, arrays):
        taken = now[0]
        taking(2, write)(folder, config, arrays)
        saved[0] = taken
        steps.append(int(arrays["engine"][0]))

    monkeypatch.setattr(Engine, "train", taking(7, Engine.train))
    monkeypatch.setattr(Engine, "evaluate", taking(20, Engine.evaluate))
    monkeypatch.setattr(RunFolder, "write_state", save)
    train_quietly(TINY.override(epochs=4), tmp_path, digits, save_seconds=60)
    assert 40 < max(gaps[PER_EPOCH + 1 :]) <= 60, "once it knows how long a validation takes"
    assert max(gaps) <= 60 + 20
    assert any(step % PER_EPOCH for step in steps) and len(steps) < 14


def test_slow_saves_leave_time_for_training(tmp_path, digits, monkeypatch, step_by_step):
    """A clock on which a step takes 5 s and a save 40 s, of 60: saves take a third of the time at most."""
    now, spent = [0.0], {"train": 0.0, "save": 0.0}
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0], time=None)
    monkeypatch.setattr(loop, "time", clock)

    def taking(seconds, kind, function):
        def slow(*arguments, **options):
            now[0] += seconds
            spent[kind] += seconds
            return function(*arguments, **options)

        return slow

    monkeypatch.setattr(Engine, "train", taking(5, "train", Engine.train))
    monkeypatch.setattr(RunFolder, "write_state", taking(40, "save", RunFolder.write_state))
    train_quietly(TINY.override(epochs=12), tmp_path, digits, save_seconds=60)
    saves = spent["save"] / 40
    assert saves > 4 and (spent["save"] - 40) <= 1 / 3 * (spent["save"] + spent["train"])


def test_a_clock_that_is_set_changes_no_duration(tmp_path, digits, monkeypatch, step_by_step):
    true, calls = time.time, []

    def jumping():
        calls.append(None)
        return true() + (-3600, 86_400)[len(calls) % 2]

    monkeypatch.setattr(time, "time", jumping)
    saves = []
    write = RunFolder.write_state
    monkeypatch.setattr(RunFolder, "write_state", lambda *given: saves.append(write(*given)))
    began = time.monotonic()
    metrics = train_quietly(TINY, tmp_path, digits, save_seconds=0, since=machine.PROCESS_START)
    lasted = time.monotonic() - began
    rounded = 0.005  # metrics.json has two decimals
    assert 0 < metrics["train_seconds"] <= lasted + rounded
    since_start = time.monotonic() - machine.PROCESS_START
    assert metrics["train_seconds"] < metrics["total_seconds"] <= since_start + rounded
    assert all(0 <= row["seconds"] <= lasted for row in RunFolder(tmp_path).read_history())
    assert len(saves) > PER_EPOCH


def test_a_start_by_either_clock():
    now = time.monotonic()
    assert machine.monotonic(None) == pytest.approx(now, abs=1)
    assert machine.monotonic(now - 5) == now - 5
    assert machine.monotonic(time.time() - 5) == pytest.approx(now - 5, abs=1)
    assert machine.monotonic(time.time() + 5000) == pytest.approx(now, abs=1), "no negative seconds"


@pytest.mark.parametrize("seconds", [-1, float("nan"), 1e6])
def test_save_seconds_out_of_range(tmp_path, digits, seconds):
    with pytest.raises(ConfigError, match=r"save_seconds is .*; allowed: from 0 to 86,400"):
        train_quietly(TINY, tmp_path / "run", digits, save_seconds=seconds)
    assert not (tmp_path / "run").exists()


# ---- chance


def line_about_chance(labels, accuracy, training_accuracy=0.9, class_weights="none"):
    lines = []
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    none = (images[:0], labels[:0])
    data = datasets.Dataset("digits", images, labels, *none, tuple("abcdefghij"), "here")
    data = dataclasses.replace(data, validation=none if accuracy is None else (images, labels))
    summary.warn_at_chance(lines.append, [{"accuracy": training_accuracy}], data, accuracy, class_weights)
    return lines


def test_a_run_at_chance_level_is_told():
    """300 of 1,000 images are of one class: the deviation of the share is 1.45 points, 2.33 of them 3.4."""
    labels = np.repeat(np.arange(8), [300, 100, 100, 100, 100, 100, 100, 100])
    (line,) = line_about_chance(labels, 0.30)
    assert line.startswith(
        "  at chance level      30.00% of the 1,000 validation images; to guess the largest"
    )
    assert line_about_chance(labels, 0.333) and not line_about_chance(labels, 0.335)
    (line,) = line_about_chance(labels, None, 0.31)
    assert "31.00% of the 1,000 training images" in line
    assert not line_about_chance(labels, None, 0.5)


def test_with_balanced_weights_chance_is_a_guess_at_random():
    """Of 1,000 images and ten classes 10%, with a deviation of 0.95 points, 2.33 of them 2.2; 85% are of one class."""
    labels = np.repeat(np.arange(8), [850, 30, 20, 20, 20, 20, 20, 20])
    assert line_about_chance(labels, 0.85) and not line_about_chance(labels, 0.85, class_weights="balanced")
    assert not line_about_chance(labels, 0.123, class_weights="balanced")
    (line,) = line_about_chance(labels, 0.121, class_weights="balanced")
    assert "to guess at random gives 10.00%" in line


@pytest.mark.parametrize("labels", [[0], [0, 0, 1, 1], [0] * 20])
def test_images_that_can_all_be_right_by_luck_tell_nothing(labels):
    assert not line_about_chance(np.array(labels), 0.5) and not line_about_chance(np.array(labels), 1.0)


def test_the_last_line_of_a_run_that_learned_nothing(tmp_path, digits, monkeypatch, capsys):
    monkeypatch.setattr(Engine, "evaluate", lambda *_: {"loss": 2.3, "accuracy": 0.1})
    train_quietly(TINY.override(epochs=0.25), tmp_path, digits, verbose=2)
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("  at chance level      10.00% of the 144 valid")
    )


# ---- a folder that goes


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_removed_is_not_made_again(tmp_path, digits, monkeypatch, step_by_step, replaced):
    workdir = tmp_path / "runs" / "mine"

    def remove():
        shutil.rmtree(workdir)
        if replaced:
            workdir.with_name("other").mkdir()  # takes the number of the removed one
            workdir.mkdir()

    stop_at(monkeypatch, PER_EPOCH - 1, remove)
    reason = r"cannot write to .*mine: it was removed or replaced meanwhile; nothing more is written"
    with pytest.raises(RunError, match=reason):
        train_quietly(TINY, workdir, digits, full_report=True)
    assert not workdir.exists() or not list(workdir.iterdir())


def test_a_search_folder_that_is_removed_is_not_made_again(tmp_path):
    folder = SearchFolder(tmp_path / "search")
    with folder.lock():
        folder.begin({"tuner": "random"}, overwrite=False)
        folder.check_there()
        shutil.rmtree(folder.path)
        with pytest.raises(RunError, match="it was removed or replaced meanwhile"):
            folder.check_there()
    assert not folder.path.exists()


# ---- signals


def test_a_supervisors_signal_counts_once_and_a_later_one_ends_the_process():
    code = """
import os, signal, sys, time
from cifar10_trainer import runtime
first, second, pause = sys.argv[1:]
with runtime.Signals() as signals:
    os.kill(os.getpid(), getattr(signal, first))
    time.sleep(float(pause))
    os.kill(os.getpid(), getattr(signal, second))
    print("still there", signals.caught, flush=True)
"""
    cases = {
        ("SIGTERM", "SIGTERM", "0"): (0, "still there SIGTERM\n"),
        ("SIGINT", "SIGTERM", "0"): (0, "still there SIGINT\n"),
        ("SIGTERM", "SIGTERM", "1.1"): (-signal.SIGTERM, ""),
        ("SIGHUP", "SIGHUP", "1.1"): (-signal.SIGHUP, ""),
        ("SIGTERM", "SIGINT", "0"): (-signal.SIGINT, ""),
    }
    started = {
        case: subprocess.Popen([sys.executable, "-c", code, *case], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for case in cases
    }  # fmt: skip
    for case, other in started.items():
        assert (other.communicate(timeout=120)[0], other.returncode) == cases[case][::-1], case


def test_nohup_stays_in_force(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime.Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.caught == "" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def begin(workdir, *flags, **options):
    """A training process, which ends with the block."""
    words = [sys.executable, "-m", "cifar10_trainer", *LONG, "--save_seconds=0.1", f"--workdir={workdir}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen([*words, *flags], text=True, env=environment, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def until(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "too slow"
        time.sleep(0.05)


def test_sighup_of_a_run_saves_and_the_line_is_the_way_on(tmp_path):
    with begin(tmp_path / "run", stdout=subprocess.DEVNULL) as training_process:
        until((tmp_path / "run" / "state.npz").exists, training_process)
        training_process.send_signal(signal.SIGHUP)
        _, errors = training_process.communicate(timeout=60)
    assert training_process.returncode == 1
    assert re.fullmatch(
        r"error: stopped by SIGHUP at step .*; everything is saved in .*run; to resume, .*\n", errors
    )
    assert step_of(tmp_path / "run" / "state.npz") > 0


class Full:
    """A stream on a full disk."""

    closed = False

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise OSError(28, "No space left on device")

    def isatty(self):
        return False

    def fileno(self):
        raise OSError


@pytest.mark.parametrize("broken", ["stdout", "both", "closed", "none"])
def test_an_output_that_breaks_does_not_end_a_training(tmp_path, digits, monkeypatch, capsys, broken):
    closed = open(os.devnull, "w")  # noqa: SIM115
    closed.close()
    stream = {"closed": closed, "none": None}.get(broken, Full())
    monkeypatch.setattr(sys, "stdout", stream)
    if broken == "both":
        monkeypatch.setattr(sys, "stderr", Full())
    metrics = train_and_evaluate(TINY, tmp_path, dataset=digits, verbose=1, full_report=False)
    assert sys.stdout is stream
    assert metrics["epochs"] == 2 and len(RunFolder(tmp_path).read_history()) == 2
    errors = capsys.readouterr().err if broken != "both" else ""
    lines = [line for line in errors.splitlines() if "stdout" in line]
    assert len(lines) == (1 if broken in ("stdout", "closed") else 0)
    if broken == "stdout":
        assert lines[0].startswith("warning: stdout cannot be written (No space left on device); continuing")


def test_a_character_that_an_output_lacks_is_escaped(tmp_path):
    with open(tmp_path / "ascii", "w", encoding="ascii") as file:
        stream = process.EnduringStream(file, lambda error: None)
        assert stream.write("K\xe4se ± 1") == 8
        stream.flush()
    assert (tmp_path / "ascii").read_text() == "K\\xe4se \\xb1 1"


def test_an_object_that_can_only_write_is_an_output():
    class Log:
        def __init__(self):
            self.text = ""

        def write(self, text):
            if "bad" in text:
                raise OSError("gone")
            self.text += text

    log, lost = Log(), []
    stream = process.EnduringStream(log, lost.append)
    stream.write("good")
    stream.flush()
    assert not stream.isatty() and log.text == "good" and not lost
    stream.write("bad")
    assert [str(error) for error in lost] == ["gone"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reader gone", "full", "closed", "stderr closed"])
def test_a_process_whose_output_breaks_trains_to_its_end(tmp_path, kind):
    script = f"{sys.executable} -m cifar10_trainer {' '.join(LONG)} --epochs=2 --workdir={tmp_path / 'run'}"
    tail = {
        "reader gone": " | true",
        "full": " >/dev/full",
        "closed": " >&-",
        "stderr closed": " >/dev/full 2>&-",
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["bash", "-o", "pipefail", "-c", script + tail[kind]]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == 2
    warned = kind in ("reader gone", "full")
    assert len(done.stderr.splitlines()) == (1 if warned else 0), done.stderr


def test_a_full_device_is_one_line_for_other_commands():
    words = [sys.executable, "-m", "cifar10_trainer", "--list_recipes"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == "error: OSError: [Errno 28] No space left on device (--debug shows the traceback)\n"


CHILD = "import signal, sys, time\ndef stop(*_): time.sleep(0.5); print('saved', flush=True); sys.exit(3)\n"
CHILD += "signal.signal(signal.SIGTERM, stop); print('ready', flush=True); time.sleep(60)"
PARENT = "import sys; from cifar10_trainer import process; print(process.call([sys.executable, '-c', sys.argv[1]]))"


def test_a_command_within_a_command_gets_the_signal_and_is_waited_for():
    words = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(signal.SIGTERM)
        assert parent.stdout.read() == "saved\n(3, 'SIGTERM')\n"
    assert parent.returncode == 0


# ---- the saved model and the one that trained


class Fixed(keras.layers.Layer):
    """Probabilities that say class 1 where the first pixel is above 100, else class 0."""

    def call(self, x):
        above = keras.ops.cast(x[:, 0, 0, 0] > 100, "float32")
        return keras.ops.stack([1 - above, above], axis=1) * 0.8 + 0.1


@pytest.mark.parametrize(
    ("precision", "trained", "told"),
    [
        ("mixed_bfloat16", 0.95, True),  # 50% is far below
        ("mixed_bfloat16", 0.55, False),  # 5 points and four deviations, 16 points here, are chance
        ("mixed_bfloat16", None, False),
        ("float32", 0.95, False),
    ],
)
def test_a_saved_model_that_is_worse_than_the_one_that_trained_is_told(precision, trained, told):
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, Fixed()(inputs))
    images = np.full((160, 8, 8, 3), 200, np.uint8)
    metrics = {"best_val_accuracy": trained, "precision": precision}
    lines = []
    summary.warn_of_precision(lines.append, model, (images, np.arange(160) % 2), metrics)
    assert bool(lines) == told
    if told:
        assert "the saved model, in float32, finds 50.00% of 160 validation images, but 95.00%" in lines[0]
        assert "--precision=float32" in lines[0]
    summary.warn_of_precision(lines.append, None, (images, np.arange(160) % 2), metrics)
    assert len(lines) == told


def test_grey_images_of_equal_channels_score_as_they_validate(tmp_path, digits):
    """In version 1.0.0 such a network learned from bfloat16's rounding: 95% validation, 11% test accuracy."""
    config = RECIPES["fast.85"].override(
        options__filters=(16, 32, 32),
        epochs=8,
        batch_size=64,
        dataset="digits",
        precision="mixed_bfloat16",
        sizes=(),
    )
    metrics = train_quietly(config, tmp_path, digits)
    assert metrics["best_val_accuracy"] > 0.8 and metrics["test_accuracy"] > 0.8
