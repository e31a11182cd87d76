"""Searches of several processes on loopback: workers that die, chiefs that come back, and their end."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import keras_tuner as kt
import numpy as np
import pytest
from keras_tuner.src import protos
from PIL import Image

import tuning
from cifar10_trainer import RECIPES, datasets
from cifar10_trainer.errors import RunError
from tuning import worker
from tuning.chief import MAX_DEATHS, WorkerPool, listening_address, run_chief, serving
from tuning.options import LOOPBACK, Options
from tuning.oracle import make_oracle
from tuning.trial import ConfigTuner
from tuning.worker import RetryingClient, project_errors, run_worker

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def started(*command, cwd=None):
    """A process in a group of its own, of which nothing is left afterwards; its output is in `.log`."""
    log = Path(os.environ["TUNING_LOGS"]) / f"{time.monotonic_ns()}.txt"
    with open(log, "w") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    process.log = log
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNING_LOGS", str(tmp_path))


def until(condition, process, seconds=240):
    """Waits for a true value of `condition`, and gives it; fails when the process ends, or the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        assert process.poll() is None, process.log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{seconds} s were not enough:\n{process.log.read_text()}")


def finish(process, seconds=240):
    """Waits for the process to end well; gives what it printed."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still there after {seconds} s:\n{process.log.read_text()}") from None
    assert status == 0, process.log.read_text()
    return process.log.read_text()


def state(folder):
    file = folder / "trials" / "search_state.json"
    return json.loads(file.read_text()) if file.exists() else {"ongoing_trials": {}, "end_order": []}


def training(folder, worker):
    """The trial that a worker is in the middle of, if it is."""
    trial = state(folder)["ongoing_trials"].get(worker)
    ended = state(folder)["end_order"]
    here = trial and trial not in ended and (folder / "trials" / f"trial_{trial}" / "config.json").exists()
    return trial if here else None


def alive(pid):
    """Whether the process runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listening(port):
    """The addresses at which somebody listens at this port, as Linux writes them."""
    lines = [
        line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    places = [line.split()[1].split(":") for line in lines if line.split()[3] == "0A"]
    return {address for address, at in places if int(at, 16) == port}


def check_leaderboard(folder, count, digits=1):
    with open(folder / "leaderboard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(r["trial"]) for r in rows) == list(range(1, count + 1))
    assert {r["status"] for r in rows} == {"completed"}
    assert sorted(state(folder)["end_order"]) == sorted(f"{i:0{digits}}" for i in range(count))  # each once


def search(folder, *flags):
    return (
        "-m",
        "tuning.search",
        "--dataset=digits",
        "--space=dropout,learning_rate",
        "--tuner=random",
        f"--workdir={folder}",
        *flags,
    )


def test_workers_that_die_and_a_chief_that_dies(tmp_path):
    """Three workers: one is killed in the middle of a trial; all are orphaned; the search resumes in one process."""
    folder = tmp_path / "search"
    # More trials than can be done before the chief is killed; then no more than have begun.
    command = search(folder, "--workers=3", "--max_trials=100", "--epochs=3")
    with started(*command) as process:
        trial = until(lambda: training(folder, "worker1"), process)
        pids = dict(re.findall(r"worker (\d): process (\d+)", process.log.read_text()))
        assert set(pids) == {"0", "1", "2"}
        os.kill(int(pids["1"]), signal.SIGKILL)
        until(lambda: "worker 1 was ended by SIGKILL" in process.log.read_text(), process)
        until(lambda: trial in state(folder)["end_order"], process)
        output = process.log.read_text()
        assert output.count(f"trial {int(trial) + 1} of 100: dropout") == 2  # begun twice, ended once
        pids = [int(p) for p in re.findall(r"process (\d+)", output)]
        assert any(map(alive, pids))
        process.kill()
        end = time.monotonic() + 90  # they end after the trial that they train; this machine may be busy
        while any(map(alive, pids)):
            assert time.monotonic() < end, "workers outlive their chief"
            time.sleep(0.1)
    before, count = state(folder)["end_order"], len(state(folder)["trials"])
    with started(*search(folder, f"--max_trials={count}", "--epochs=3")) as process:
        output = finish(process)
    assert f"resumed: {len(before)} trials are done" in output
    check_leaderboard(folder, count, digits=3)


@pytest.mark.slow
def test_a_chief_and_its_workers_started_one_by_one(tmp_path):
    """The chief is killed and comes back, one worker is killed for good, and all others end by themselves."""
    folder = tmp_path / "search"
    address = listening_address(None)
    flags = ("--max_trials=7", "--epochs=3", "--lease=4", "--chief_timeout=60", f"--chief={address}")
    chief, worker = search(folder, *flags, "--role=chief"), search(folder, *flags, "--role=worker")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(started(*chief))
        lost, *kept = (stack.enter_context(started(*worker)) for _ in range(3))
        places = until(lambda: listening(int(address.rpartition(":")[2])), first)
        assert all(place.endswith("0100007F") for place in places)  # 127.0.0.1, and nowhere else
        until(lambda: state(folder)["end_order"] and len(state(folder)["ongoing_trials"]) == 3, first)
        first.kill()
        first.wait()
        lost.kill()
        second = stack.enter_context(started(*chief))
        output = finish(second)
        assert "resumed" in output
        for worker in kept:
            assert "the search is over" in finish(worker, 20)
        assert not list(folder.glob("trials/*.tmp*"))
    check_leaderboard(folder, 7)


def test_a_worker_without_a_chief_ends(tmp_path):
    command = search(tmp_path, "--role=worker", f"--chief={listening_address(None)}", "--chief_timeout=2")
    with started(*command) as process:
        assert process.wait(60) == 1
        output = process.log.read_text()
    assert "no answer from the chief" in output
    assert "Traceback" not in output


class Answer(grpc.RpcError):
    """What gRPC raises where the chief has failed while it answered."""

    def code(self):
        return grpc.StatusCode.UNKNOWN

    def details(self):
        return "Exception calling application: disk full"


def test_an_error_of_the_chief_is_reported_as_its_own():
    options = Options(role="worker", chief="127.0.0.1:5000")
    failure = pytest.raises(RunError, match=r"the chief at 127\.0\.0\.1:5000 failed: .*disk full")
    with failure, project_errors(options):
        raise Answer


def small_oracle(folder):
    hp = kt.HyperParameters()
    hp.Float("x", 0.0, 1.0)
    options = {"epochs": 1, "hyperparameters": hp, "max_trials": 3, "file": folder / "state.json"}
    oracle = make_oracle("random", objective=kt.Objective("val_accuracy", "max"), **options)
    oracle._set_project_dir(str(folder), "trials")
    return oracle


@pytest.mark.filterwarnings(
    # KerasTuner 1.4.8 asks the threading module by its old names.
    "ignore:(currentThread|getName)\\(\\) is deprecated:DeprecationWarning"
)
def test_the_server_of_trials_ends_with_the_search(tmp_path):
    """Afterwards the port is free, and nobody reaches the oracle of a search that has returned."""
    oracle = small_oracle(tmp_path)
    address = listening_address(None)
    request = protos.get_service().CreateTrialRequest(tuner_id="late")
    with grpc.insecure_channel(address) as channel:
        stub = protos.get_service_grpc().OracleStub(channel)
        with serving(oracle, address):
            assert stub.CreateTrial(request, wait_for_ready=True, timeout=20).trial.trial_id
            with pytest.raises(RunError, match="cannot listen on"), serving(oracle, address):
                pass
        with pytest.raises(grpc.RpcError) as error:
            stub.CreateTrial(request, timeout=20)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert len(oracle.trials) == 1
    assert listening_address(address) == address
    with serving(oracle, address):  # as a search that resumes in the same process does
        pass


@pytest.mark.filterwarnings("ignore:(currentThread|getName)\\(\\) is deprecated:DeprecationWarning")
def test_a_chief_whose_folder_goes_ends_with_that_error(tmp_path):
    """The error is raised in a thread of the server, where only a worker on another machine hears of it."""
    oracle = small_oracle(tmp_path)

    def gone():
        raise RunError("the folder has gone")

    oracle.check = gone
    address = listening_address(None)
    pool = WorkerPool(None, None, Options(role="chief", chief=address), address, print)
    request = protos.get_service().CreateTrialRequest(tuner_id="elsewhere")

    def ask():
        with grpc.insecure_channel(address) as channel, contextlib.suppress(grpc.RpcError):
            protos.get_service_grpc().OracleStub(channel).CreateTrial(
                request, wait_for_ready=True, timeout=60
            )

    worker = threading.Thread(target=ask)
    worker.start()
    with pytest.raises(RunError, match="the folder has gone"):
        run_chief(oracle, pool, address)
    worker.join()


def learning_rates(hp):
    return RECIPES["fast.digits"].override(optimizer__learning_rate=hp.Float("learning_rate", 0.1, 0.4))


@pytest.mark.filterwarnings("ignore:(currentThread|getName)\\(\\) is deprecated:DeprecationWarning")
@pytest.mark.parametrize("outage", ["gone", "silent", "failed"])
def test_an_outage_of_the_chief_is_no_fault_of_the_trial(outage, tmp_path, monkeypatch, capfd):
    """The trial has been trained, and the chief cannot take its score, or not in time. It answers again after that."""
    oracle, address = small_oracle(tmp_path), listening_address(None)
    get_trial = oracle.get_trial
    says = rf"^no answer from the chief at {address} in 3 s \((unavailable|deadline exceeded)\); start"
    if outage == "failed":
        says = rf"^the chief at {address} failed: .*disk full$"

    def fail_once(trial_id):
        oracle.get_trial = get_trial
        if outage == "failed":
            raise RunError("disk full")
        time.sleep(4)
        return get_trial(trial_id)

    with contextlib.ExitStack() as chief:

        def run_trial(tuner, trial):
            if outage == "gone":
                chief.close()
            oracle.get_trial = fail_once
            return {"val_accuracy": 0.5}

        monkeypatch.setattr(ConfigTuner, "run_trial", run_trial)
        options = Options(role="worker", chief=address, chief_timeout=3, workdir=str(tmp_path))
        chief.enter_context(serving(oracle, address))
        with pytest.raises(RunError, match=says):
            run_worker(learning_rates, datasets.load("digits"), options, "worker0")
    out, err = capfd.readouterr()
    assert "Traceback" not in err and "failed" not in out
    assert [(trial.status, trial.message) for trial in oracle.trials.values()] == [("RUNNING", None)]
    assert not oracle.end_order


def test_heartbeats_go_on_after_an_outage_of_the_chief():
    sent = threading.Semaphore(0)

    class Client:
        def get_trial(self, trial_id):
            sent.release()
            raise Answer

    class Tuner:
        oracle, _lease = RetryingClient(Client(), 1), 0.06

    with ConfigTuner._heartbeats(Tuner(), "0"):
        assert all(sent.acquire(timeout=30) for _ in range(3))


def test_a_port_that_is_taken_is_not_shared():
    with socket.create_server((LOOPBACK, 0)) as other:
        address = f"{LOOPBACK}:{other.getsockname()[1]}"
        with pytest.raises(RunError, match="cannot listen on"):
            listening_address(address)
    assert listening_address(None).startswith("127.0.0.1:")


def test_the_documented_example(tmp_path):
    """The script in the package's docstring, on a folder of small images, with less to do."""
    generator = np.random.default_rng(0)
    for kind, level in (("dark", 60), ("light", 180)):
        (tmp_path / "pictures" / "train" / kind).mkdir(parents=True)
        for i in range(40):
            pixels = generator.integers(level - 50, level + 50, (20, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / "train" / kind / f"{i}.png")
    text = tuning.__doc__.partition("    from functools")
    script = "from functools" + text[2].partition("\n\nRun again")[0].replace("\n    ", "\n")
    assert "epochs=10," in script and "max_trials=10" in script
    script = script.replace("epochs=10,", "epochs=1, batch_size=16, options__filters=(8, 8), sizes=(),")
    script = script.replace("max_trials=10", "max_trials=3")
    (tmp_path / "mine.py").write_text(script)
    with started("mine.py", cwd=tmp_path) as process:
        output = finish(process)
    assert re.search(r"\n[01]\.\d+ \{'filters': \(8, 8\), .*'dropout': ", output)
    check_leaderboard(tmp_path / "searches" / "pictures", 3)


class Dead:
    """A worker's process that a signal, or its own error, has ended."""

    pid = 1

    def __init__(self, exitcode):
        self.exitcode = exitcode


def pool_of(monkeypatch, workers, exitcode):
    """A pool whose workers all end at once, and the numbers of those that it started."""
    options = Options(workers=workers)
    pool, started_ = WorkerPool(None, None, options, "127.0.0.1:5000", lambda text: None), []

    def start(number):
        started_.append(number)
        pool._processes[number] = Dead(exitcode)

    monkeypatch.setattr(pool, "start", start)
    return pool, started_


def test_workers_that_die_without_end_end_the_search(monkeypatch):
    pool, begun = pool_of(monkeypatch, 2, -signal.SIGKILL)
    pool.ensure_running(0)
    with pytest.raises(RunError, match=r"worker \d ended with status -9; try --workers=1"):
        for _ in range(1000):
            pool.ensure_running(0)
    assert len(begun) == 2 + 2 * MAX_DEATHS, "each at first, and after each death that is allowed"


def test_workers_that_die_now_and_then_do_not_end_it(monkeypatch):
    pool, begun = pool_of(monkeypatch, 2, -signal.SIGKILL)
    for trial in range(100):  # each time a trial was begun or ended in between
        pool.ensure_running(trial)
    assert len(begun) == 200


def test_a_worker_that_cannot_work_ends_the_search_at_once(monkeypatch):
    pool, begun = pool_of(monkeypatch, 2, 2)
    pool.ensure_running(0)
    with pytest.raises(RunError, match="worker 0 ended with status 2"):
        pool.ensure_running(0)
    assert begun == [0, 1]


class BrokenPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_space_may_print_where_nobody_reads(monkeypatch):
    """As `program | head` does: the worker goes on without its output."""
    done = []

    def work(*arguments):
        print("a line of the user's space", flush=True)
        done.append(arguments[-1])

    monkeypatch.setattr(worker, "run_worker", work)
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    monkeypatch.setattr(worker.os, "setpgid", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", BrokenPipe())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TF_FORCE_GPU_ALLOW_GROWTH", "true")
        worker.worker_main(3, None, None, {})
    assert done == ["worker3"]
