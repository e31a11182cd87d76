"""Workers that meet, agree and watch one another, without TensorFlow: threads and small processes on loopback."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cifar10_trainer import __version__, cluster
from cifar10_trainer.cluster import Place, Team, meeting, place_in_tf_config
from cifar10_trainer.cluster.connection import LONGEST, connect
from cifar10_trainer.errors import ConfigError, RunError, RunInterrupted


def free_addresses(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return tuple(f"127.0.0.1:{one.getsockname()[1]}" for one in sockets)


def together(*calls):
    """What each call returns or raises, all at the same time."""

    def result(call):
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(result, calls))


@pytest.fixture
def meet():
    """Makes one Team for each place, at the same time; what could not meet is its error. All are closed at the end."""
    made = []

    def meet(*places, first_timeout=20.0, logs=None):
        logs = logs or [lambda text: None] * len(places)
        timeouts = [first_timeout, *[20.0] * (len(places) - 1)]
        found = together(*(lambda x=x: Team(*x) for x in zip(places, timeouts, logs, strict=True)))
        made.extend(x for x in found if isinstance(x, Team))
        return found

    yield meet
    for one in made:
        one.close()


@pytest.fixture
def places():
    def places(n):
        addresses = free_addresses(n)
        return [Place(addresses, i) for i in range(n)]

    return places


def agree(teams, *terms):
    return together(*(lambda t=t, x=x: t.agree(**x) for t, x in zip(teams, terms, strict=True)))


def eventually(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


# ---- TF_CONFIG

GOOD = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}


def changed(**parts):
    return json.dumps({**GOOD, **parts})


@pytest.mark.parametrize("text", [None, "", "{}"])
def test_no_cluster(text, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    assert place_in_tf_config() is None


def test_a_place_among_workers(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", json.dumps(GOOD))
    assert place_in_tf_config() == Place(("a:1", "b:2"), 1)


@pytest.mark.parametrize(("kind", "index", "place"), [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)])
def test_a_chief_comes_first(kind, index, place, monkeypatch):
    jobs = {"worker": ["b:1", "[::1]:2"], "chief": ["a:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": jobs, "task": {"type": kind, "index": index}}))
    assert place_in_tf_config() == Place(("a:1", "b:1", "[::1]:2"), place, "chief and worker")


WRONG = {
    "{": "it is not JSON",
    "[" * 100_000: "it is not JSON",
    "[1]": "it has no 'cluster'",
    '"x"': "it has no 'cluster'",
    '{"task": {"type": "worker", "index": 0}}': "it has no 'cluster'",
    '{"cluster": {}}': "it has no 'cluster'",
    '{"cluster": 5}': "it has no 'cluster'",
    json.dumps({"cluster": GOOD["cluster"]}): "it has no 'task' with 'type' and 'index'",
    changed(task={"type": "worker"}): "it has no 'task' with 'type' and 'index'",
    changed(task={"index": 0}): "it has no 'task' with 'type' and 'index'",
    changed(task={"type": "worker", "index": 2}): "the index is 2, but 'cluster' lists 2 of type 'worker'",
    changed(task={"type": "worker", "index": -1}): "the index is -1",
    changed(task={"type": "chief", "index": 0}): "the index is 0, but 'cluster' lists 0 of type 'chief'",
    changed(task={"type": "worker", "index": "0"}): "the index is '0', not an integer",
    changed(task={"type": "worker", "index": True}): "the index is True, not an integer",
    changed(task={"type": "worker", "index": None}): "the index is None, not an integer",
    changed(task={"type": "evaluator", "index": 0}): "the task type 'evaluator'",
    changed(task={"type": "ps", "index": 0}): "the task type 'ps'",
    changed(task={"type": "boss", "index": 0}): "the task type 'boss'",
    changed(cluster={"worker": ["a:1", "b:1"], "ps": ["c:1"]}): "parameter servers do not work with Keras 3",
    changed(cluster={"worker": ["a:1", "b:1"], "evaluator": ["c:1"]}): "the task type 'evaluator'",
    changed(cluster={"worker": ["a:1", "b:1"], "chief": ["c:1", "d:1"]}): "a cluster has one chief, or none",
    changed(cluster={"worker": "a:1"}): "each task type of 'cluster' needs a list of HOST:PORT",
    changed(cluster={"worker": [1, 2]}): "each task type of 'cluster' needs a list of HOST:PORT",
    changed(cluster={"worker": ["a:1", "a:1"]}): "names a:1 twice",
    changed(cluster={"worker": ["a:1", "b"]}): "names the address 'b'; allowed: HOST:PORT",
    changed(cluster={"worker": ["a:1", "b:70000"]}): "names the address 'b:70000'",
    changed(cluster={"worker": ["a:1", "10.0.0..1:1"]}): "names the address '10.0.0..1:1'",  # IDNA refuses it
    changed(cluster={"worker": ["a:1", f"{'b' * 64}:1"]}): f"names the address '{'b' * 64}:1'",
    changed(cluster={"worker": ["a:1", "http://b:1"]}): "names the address 'http://b:1'",
    changed(cluster={"worker": ["a:1", ":5"]}): "names the address ':5'",
    changed(cluster={"worker": ["a:1", "b:05"]}): "names the address 'b:05'",
    changed(cluster={"worker": ["a:1", "b:\u0665"]}): "names the address",  # a digit five, but not of ASCII
}


@pytest.mark.parametrize("strategy", ["auto", "multi_worker"])
@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_each_wrong_tf_config_is_one_line(text, strategy, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError) as caught:
        cluster.join_workers(strategy)
    assert WRONG[text] in str(caught.value) and "allowed: " in str(caught.value)
    assert "TF_CONFIG" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("strategy", ["none", "mirrored"])
def test_other_strategies_do_not_read_it(strategy, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{")
    assert cluster.join_workers(strategy) is None


# ---- meeting


def test_workers_meet_and_agree(meet, places):
    teams = meet(*places(3))
    assert agree(teams, *[{"seed": 0, "config": {"a": [1, 2]}}] * 3) == [None] * 3
    assert agree(teams, *[{"steps": 5}] * 3) == [None] * 3
    assert not any(team.lost for team in teams)


def test_the_chief_decides_for_all(meet, places):
    """Also where it decides late or early, before and after they agree."""
    teams = meet(*places(3))

    def work(team):
        found = []
        for i, late in enumerate((0, 1, 2)):
            time.sleep(0.3 * (team.place.index == late))
            found.append(team.take_from_chief(f"{team.place.index} in round {i}"))
            team.agree(step=i)
        return found

    decided = ["0 in round 0", "0 in round 1", "0 in round 2"]
    assert together(*(lambda t=t: work(t) for t in teams)) == [decided] * 3


def test_the_chief_goes_on_when_its_word_is_sent(meet, places, monkeypatch):
    """TensorFlow's meeting follows, in which Python stands still: a word that is not sent by then, is sent after it."""
    teams, sent = meet(*places(2)), []
    send = teams[0]._send_to_all

    def late(**message):
        time.sleep(0.5)
        send(**message)
        sent.extend(message)

    monkeypatch.setattr(teams[0], "_send_to_all", late)

    def chief():
        teams[0].agree(seed=0)
        agreed = list(sent)
        teams[0].take_from_chief("mine")
        return agreed, list(sent)

    (agreed, decided), _ = together(chief, lambda: (teams[1].agree(seed=0), teams[1].take_from_chief("")))
    assert agreed == ["verdict", "round"]
    assert decided == [*agreed, "order", "round"]


def test_workers_whose_chief_ends_wait_no_longer_for_its_decision(meet, places):
    where = places(3)
    chief, *others = meet(*where)
    chief.close()
    for error in together(*(lambda t=t: t.take_from_chief("mine") for t in others)):
        assert isinstance(error, RunError) and str(error).startswith(f"{where[0].name()} has ended")


def test_a_worker_alone_waits_for_nobody(meet, places):
    (team,) = meet(*places(1))
    team.agree(seed=0)
    assert team.take_from_chief("mine") == "mine"
    assert team.alone and not team.lost


def test_what_differs_is_one_line_with_values_and_workers(meet, places):
    where = places(3)
    teams = meet(*where)
    found = agree(
        teams, {"config": {"seed": 0, "a": 1}}, {"config": {"seed": 0, "a": 1}}, {"config": {"seed": 1}}
    )
    expected = (
        f"the workers differ in config.seed: 0 on {where[0].name()}, 1 on {where[2].name()}; config.a: 1 on"
        f" {where[0].name()}, nothing on {where[2].name()}; give all workers the same flags, data and versions"
    )
    assert [(type(error), str(error)) for error in found] == [(ConfigError, expected)] * 3


def test_versions_are_compared_when_workers_meet(monkeypatch, places):
    """One place answers as another version of the package would."""
    where = places(2)
    monkeypatch.setenv("TF_CONFIG", cluster.set_tf_config(where[0].addresses, 0, "the test"))
    monkeypatch.setattr(cluster, "_team", None)
    others = []

    def older():
        others.append(Team(where[1], 20, print))
        others[0].agree(**{"cifar10-trainer": "0.9"})

    mine, theirs = together(lambda: cluster.join_workers("auto"), older)
    try:
        assert str(mine) == str(theirs)
        assert f"the workers differ in cifar10-trainer: {__version__} on worker 0" in str(mine)
        assert "0.9 on worker 1" in str(mine)
        assert cluster.team() is None, "another call meets and compares again"
    finally:
        for team in others:
            team.close()


def test_task_types_that_differ(monkeypatch, places):
    """The addresses are the same, but TensorFlow's servers would not find one another."""
    first, second = places(2)
    chief, worker = first.addresses
    tf_config = {"cluster": {"chief": [chief], "worker": [worker]}, "task": {"type": "chief", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(tf_config))
    monkeypatch.setattr(cluster, "_team", None)
    others = []

    def of_another_list():
        others.append(Team(second, 20, print))
        packages = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "numpy")}
        python = ".".join(platform.python_version_tuple()[:2])
        types = {"task types of TF_CONFIG": "worker"}
        others[0].agree(**{"cifar10-trainer": __version__, "Python": python, **packages, **types})

    mine, theirs = together(lambda: cluster.join_workers("auto"), of_another_list)
    try:
        assert str(mine) == str(theirs)
        assert "the workers differ in task types of TF_CONFIG: chief and worker on worker 0" in str(mine)
        assert f", worker on {second.name()};" in str(mine)
    finally:
        for team in others:
            team.close()


def test_lists_that_differ(meet, places):
    first, second = places(2)
    third = free_addresses(1)[0]
    found = meet(first, Place((*second.addresses, third), 1))
    assert [type(error) for error in found] == [ConfigError] * 2 and str(found[0]) == str(found[1])
    assert "the workers' lists differ" in str(found[0]) and third in str(found[0])


def test_a_port_in_use(meet, places):
    second = places(2)[1]
    with socket.create_server(("127.0.0.1", int(second.addresses[1].split(":")[1]))):
        (error,) = meet(second)
    assert isinstance(error, ConfigError)
    assert f"{second.name()} cannot listen on its address: another process uses the port" in str(error)


def test_an_address_of_another_machine(meet):
    (error,) = meet(Place(("192.0.2.1:5000", "127.0.0.1:5001"), 0))
    assert isinstance(error, ConfigError) and "it is no address of this machine" in str(error)


def test_two_workers_with_one_index(meet, places, monkeypatch):
    """On two machines; on one machine the port is in use. Here the second one listens nowhere."""
    where = places(3)
    real = meeting.listen
    taken = []

    def listen(place):
        if place.index == 1 and taken:
            return socket.socket()
        taken.append(place.index) if place.index == 1 else None
        return real(place)

    monkeypatch.setattr(meeting, "listen", listen)
    found = meet(where[0], where[1], where[1], first_timeout=3.0)
    errors = [str(error) for error in found]
    assert (
        sum(f"there is another {where[1].name()} already; give each process an index" in e for e in errors)
        == 1
    )
    assert f"{where[0].name()} has waited 3 s for {where[2].name()}" in errors[0]


def test_waiting_is_printed_with_names_and_ends(meet, places, monkeypatch):
    monkeypatch.setattr(meeting, "SPEAK", 0.5)
    where, lines = places(3), [[], []]
    found = meet(where[0], where[1], first_timeout=3.0, logs=[x.append for x in lines])
    assert all(isinstance(error, RunError) for error in found)
    assert (
        str(found[1])
        == f"{where[0].name()} has failed: {found[0]}; when that is mended, start all workers again"
    )
    assert f"{where[0].name()} has waited 3 s for {where[2].name()}; start all workers" in str(found[0])
    assert "--cluster_timeout" in str(found[0])
    for seen in lines:
        assert seen[-1] == f"waiting for {where[2].name()}", seen  # the other worker learns it from the first


def test_a_worker_that_begins_again_meets_the_others(meet, places):
    first, second = places(2)

    def late():
        connection = connect(second, 0, 5)
        connection.sendall(json.dumps({"worker": 1, "addresses": list(second.addresses)}).encode() + b"\n")
        time.sleep(0.3)
        connection.close()  # before a third worker would have come
        return Team(second, 20, print)

    addresses = (*first.addresses, *free_addresses(1))
    first, second, third = (Place(addresses, i) for i in range(3))

    def last():
        time.sleep(1.5)
        return Team(third, 20, print)

    teams = together(lambda: Team(first, 20, print), lambda: [time.sleep(0.3), late()][1], last)
    try:
        assert all(isinstance(team, Team) for team in teams), teams
        assert agree(teams, *[{"seed": 0}] * 3) == [None] * 3
    finally:
        for team in teams:
            team.close()


STRANGERS = {
    "an HTTP client": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes": bytes(range(256)) * 10 + b"\n",
    "JSON of no worker": b'[1, 2]\n"x"\n',
    "another worker's index": b'{"worker": "1", "addresses": []}\n',
    "a deep nest": b"[" * 200_000 + b"\n",
    "an endless line": b"x" * (LONGEST + 2**17),
    "nothing": b"",
}


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_at_the_port_disturbs_nobody(what, meet, places):
    first, second = places(2)
    host, port = first.addresses[0].split(":")

    def stranger():
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                found = socket.create_connection((host, int(port)), 5)
                break
            time.sleep(0.05)
        with contextlib.suppress(OSError):  # the worker closes the connection
            found.sendall(STRANGERS[what])
        return found

    def late():
        time.sleep(1)
        return meet(second)[0]

    found, team, other = together(stranger, lambda: meet(first)[0], late)
    assert agree([team, other], {"seed": 0}, {"seed": 0}) == [None, None]
    found.close()


def test_the_worker_of_a_machine_that_has_gone_gives_way_to_its_successor(meet, places, monkeypatch):
    """While the chief waits for worker 2, worker 1 falls silent without closing its connection, and starts again elsewhere."""
    monkeypatch.setattr(meeting, "HEARTBEAT", 0.5)
    where = places(3)
    host, port = where[0].addresses[0].split(":")
    waiting = ThreadPoolExecutor(1)
    chief = waiting.submit(lambda: meet(where[0])[0])
    gone = None
    while gone is None:
        with contextlib.suppress(ConnectionRefusedError):
            gone = socket.create_connection((host, int(port)), 5)
        time.sleep(0.05)
    with gone:
        gone.sendall(json.dumps({"worker": 1, "addresses": list(where[0].addresses)}).encode() + b"\n")
        time.sleep(2)
        others = meet(where[1], where[2])
        assert agree([chief.result(), *others], *[{"seed": 0}] * 3) == [None] * 3
    waiting.shutdown()


def test_many_silent_strangers_do_not_fill_the_place(meet, places, monkeypatch):
    monkeypatch.setattr(meeting, "STRANGERS", 3)
    first, second = places(2)
    host, port = first.addresses[0].split(":")
    waiting = ThreadPoolExecutor(1)
    team = waiting.submit(lambda: meet(first)[0])
    time.sleep(0.3)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection((host, int(port)), 5))
        other = meet(second)[0]
        assert agree([team.result(), other], {"seed": 0}, {"seed": 0}) == [None, None]
    waiting.shutdown()


# ---- living


def test_a_worker_that_leaves_is_named_by_all_others(meet, places):
    where = places(3)
    teams = meet(*where)
    teams[2].close()
    found = agree(teams[:2], {"seed": 0}, {"seed": 0})
    for error in found:
        assert isinstance(error, RunError)
        assert str(error).startswith(f"{where[2].name()} has ended; to resume from the last saved state")


def test_a_silent_worker_is_named_by_all_others(meet, places, monkeypatch):
    monkeypatch.setattr(meeting, "SILENCE", 3.0)
    where = places(3)
    monkeypatch.setattr(meeting, "HEARTBEAT", 0.3)
    teams = meet(*where)
    monkeypatch.setattr(teams[1], "_send_to_all", lambda **message: None)
    eventually(lambda: teams[0].lost and teams[2].lost)
    for team in (teams[0], teams[2]):
        assert team.lost == f"{where[1].name()} has been silent for 3 s"


def test_an_error_is_told_to_the_others(meet, places):
    where = places(3)
    teams = meet(*where)
    with pytest.raises(RunError, match="no space"), teams[1].reporting_errors():
        raise RunError("no space\nleft")
    eventually(lambda: teams[0].lost and teams[2].lost)
    text = f"{where[1].name()} has failed: no space left; when that is mended, start all workers again"
    assert {str(teams[0].loss()), str(teams[2].loss())} == {text}


def test_a_user_who_stops_one_worker_is_told_to_the_others(meet, places):
    where = places(2)
    teams = meet(*where)
    with pytest.raises(KeyboardInterrupt), teams[1].reporting_errors():
        raise KeyboardInterrupt
    eventually(lambda: teams[0].lost)
    assert str(teams[0].loss()).startswith(
        f"{where[1].name()} has ended: interrupted; to resume from the last"
    )


def test_an_interruption_is_no_loss(meet, places):
    """All workers stop together then, and may go on in the same processes."""
    teams = meet(*places(2))
    with pytest.raises(RunInterrupted), teams[1].reporting_errors():
        raise RunInterrupted("stopped")
    assert agree(teams, {"seed": 0}, {"seed": 0}) == [None, None]


# ---- for real: processes

ROOT = str(Path(__file__).resolve().parent.parent)


def start(*argv, **environment):
    """A process without a TF_CONFIG from outside."""
    usual = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    return subprocess.Popen(
        [sys.executable, *argv],
        env={**usual, "PYTHONPATH": ROOT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(*argv):
    return start("-m", "cifar10_trainer", "--dataset=digits", "--workdir=unused", *argv)


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_alone_prints_whom_it_waits_for_and_ends_by_a_signal(index):
    addresses = free_addresses(2)
    began = time.monotonic()
    process = train(f"--workers={','.join(addresses)}", f"--worker_index={index}")
    line = process.stdout.readline()
    spoke = time.monotonic()
    assert line.startswith(f"waiting for worker {1 - index} ({addresses[1 - index]})")
    process.send_signal((signal.SIGTERM, signal.SIGINT)[index])
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert time.monotonic() - spoke < 5
    assert spoke - began < 30  # 5 s on a machine that is not busy: 2 s of waiting, and the start of Python


def test_a_worker_alone_gives_up():
    addresses = free_addresses(2)
    process = train(f"--workers={','.join(addresses)}", "--worker_index=1", "--cluster_timeout=1", "--quiet")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err == (
        f"error: worker 1 ({addresses[1]}) has waited 1 s for worker 0 ({addresses[0]}), Connection refused; start all"
        " workers, or wait longer with --cluster_timeout\n"
    )


def test_workers_with_other_flags_end_in_one_line_each():
    addresses = free_addresses(2)
    flags = f"--workers={','.join(addresses)}"
    both = [train(flags, f"--worker_index={i}", f"--seed={i}") for i in range(2)]
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert err.startswith(
            f"error: the workers differ in config.seed: 0 on worker 0 ({addresses[0]}), 1 on worker 1"
        )
        assert len(err.splitlines()) == 1


def test_local_workers_end_in_the_error_of_one(tmp_path):
    process = train("--local_workers=2", "--recipe=none")
    assert process.communicate(timeout=60)[1].startswith("error: unknown recipe 'none'")
    assert process.returncode == 2


# A worker whose main thread never comes back to Python's signal handlers, as in TensorFlow's C++.
STUCK = """
import sys, threading
from cifar10_trainer import cluster
from cifar10_trainer.cluster import meeting
meeting.SILENCE, meeting.HEARTBEAT, meeting.GRACE = 4.0, 0.5, 1.0
team = cluster.Team(cluster.Place(tuple(sys.argv[2:]), int(sys.argv[1])), 60, lambda text: None)
team.agree(seed=0)
print("at work", flush=True)
with team.at_work():
    sys.stdin.read()
"""


@pytest.mark.parametrize(("victim", "by"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_workers_at_work_end_when_one_is_lost(victim, by):
    addresses = free_addresses(3)
    usual = {**os.environ, "PYTHONPATH": ROOT}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STUCK, str(i), *addresses],
            env=usual,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "at work\n"
        processes[victim].send_signal(by)
        began = time.monotonic()
        for i, process in enumerate(processes):
            if i == victim:
                continue
            assert process.wait(30) == 1
            how = "has been silent for 4 s" if by == signal.SIGSTOP else "has ended"
            text = process.stderr.read()
            # Where the first worker vanished, the others know no more than that.
            assert text.startswith(f"error: worker {victim} ({addresses[victim]}) {how}; to resume"), text
            assert len(text.splitlines()) == 1
        assert time.monotonic() - began < 20
    finally:
        for process in processes:
            process.kill()
            process.communicate()
