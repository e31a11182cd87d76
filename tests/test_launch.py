"""`--local_workers`: processes that are started, watched and ended together. The workers are small stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cifar10_trainer import launch
from cifar10_trainer.errors import ConfigError, RunError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(launch.__file__)))
HEAD = """
import json, os, signal, sys, time
task = json.loads(os.environ["TF_CONFIG"])
index, addresses = task["task"]["index"], task["cluster"]["worker"]
"""


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """Writes the program that stands in for `python -m cifar10_trainer`."""

    def write(program):
        (tmp_path / "cifar10_trainer").mkdir()
        (tmp_path / "cifar10_trainer" / "__main__.py").write_text(HEAD + program)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return write


def test_each_worker_has_its_place_and_the_first_is_shown(workers, tmp_path, capfd):
    workers("""
print("out", index, sys.argv[1:], os.environ["CUDA_VISIBLE_DEVICES"])
print("err", index, file=sys.stderr)
open(f"place{index}", "w").write(json.dumps(addresses))
""")
    launch.run_local_workers(3, ["--seed=1"])
    out, err = capfd.readouterr()
    assert out == "out 0 ['--seed=1'] -1\n"
    assert sorted(err.splitlines()) == ["err 0", "worker 1: err 1", "worker 2: err 2"]
    places = [json.loads((tmp_path / f"place{i}").read_text()) for i in range(3)]
    assert places[0] == places[1] == places[2]
    assert len(set(places[0])) == 3 and all(address.startswith("127.0.0.1:") for address in places[0])


@pytest.mark.parametrize(("status", "kind"), [(2, ConfigError), (1, RunError)])
def test_one_workers_failure_ends_the_others(status, kind, workers, monkeypatch, capfd):
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    workers(f"""
if index == 1:
    print("error: no images here", file=sys.stderr)
    sys.exit({status})
if index == 2:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(100)
""")
    began = time.monotonic()
    with pytest.raises(kind, match=r"^worker 1: no images here$"):
        launch.run_local_workers(3, [])
    assert time.monotonic() - began < 30
    assert capfd.readouterr().err == ""


def test_a_killed_worker(workers, monkeypatch):
    workers("os.kill(os.getpid(), signal.SIGKILL) if index == 1 else time.sleep(1)")
    with pytest.raises(RunError, match=r"^worker 1: it ended with signal SIGKILL$"):
        launch.run_local_workers(2, [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("early", [0, 1])
def test_a_signal_while_the_workers_are_started(early, number, monkeypatch):
    started = []

    def start(argv, place, first):
        if len(started) == early:
            os.kill(os.getpid(), number)
        started.append(subprocess.Popen(["sleep", "100"]))
        return started[-1]

    monkeypatch.setattr(launch, "_start", start)
    with pytest.raises(KeyboardInterrupt):
        launch.run_local_workers(3, [])
    assert len(started) == early + 1
    assert all(worker.returncode for worker in started)


def test_workers_that_were_interrupted_before_they_began(workers):
    workers("print('interrupted', file=sys.stderr); sys.exit(130)")
    with pytest.raises(KeyboardInterrupt):
        launch.run_local_workers(2, [])


WAITING = """
def end(number, frame):
    open(f"caught{index}", "w").write(signal.Signals(number).name)
    print("error: stopped, all is saved", file=sys.stderr)
    sys.exit(1)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as cli.run does
open(f"ready{index}", "w").close()
time.sleep(100)
"""
LAUNCHER = f"""
import sys
sys.path.insert(0, {ROOT!r})
from absl import flags
from cifar10_trainer import cli, launch
values = flags.FlagValues()
cli.define_common(values)
sys.exit(cli.run(lambda argv: launch.run_local_workers(2, []), values, ""))
"""


def eventually(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_each_worker_once(by, workers, tmp_path):
    """Also when the parent is killed: then the kernel sends SIGTERM."""
    workers(WAITING)
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER], stderr=subprocess.PIPE, text=True)
    try:
        assert eventually(lambda: all((tmp_path / f"ready{i}").exists() for i in range(2)))
        process.send_signal(by)
        assert eventually(lambda: all((tmp_path / f"caught{i}").exists() for i in range(2)))
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    if by != signal.SIGKILL:
        assert process.returncode == 1
        assert len(err.splitlines()) == 1 and err.startswith("error: worker ")
        assert err.endswith(": stopped, all is saved\n")
    expected = "SIGTERM" if by == signal.SIGKILL else by.name
    assert {(tmp_path / f"caught{i}").read_text() for i in range(2)} == {expected}


# Python imports this module while it starts. A worker stays here until a SIGINT waits, or another signal ends it.
SLOW_START = """
import os, signal, time
if "TF_CONFIG" in os.environ:
    open(f"starting{os.getpid()}", "w").close()
    end = time.monotonic() + 60
    while signal.SIGINT not in signal.sigpending() and time.monotonic() < end:
        time.sleep(0.05)
"""


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_workers_python_starts(by, tmp_path):
    """Real workers: no traceback of their start-up, and the status of an interruption."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_START)
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar10_trainer", "--dataset=digits", "--workdir=run", "--local_workers=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), ROOT])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert eventually(lambda: len(list(tmp_path.glob("starting*"))) == 2, 60)
        process.send_signal(by)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "interrupted\n")
    assert not (tmp_path / "run").exists()
