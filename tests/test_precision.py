"""Whether bfloat16 is faster here: what is measured, once a machine, and what becomes of a cache that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorflow as tf

from cifar10_trainer import files, machine, precision
from cifar10_trainer.errors import RunError

NOT_KEPT = "; the cache cannot be written, so it is not kept"


@pytest.fixture(autouse=True)
def new_machine(monkeypatch, tmp_path):
    """A processor with native bfloat16, whose user has an empty cache."""
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"fpu", "avx512_bf16"})
    monkeypatch.setattr(machine, "processor", lambda: "Fast CPU")
    monkeypatch.setattr(machine, "cpu_count", lambda: 2)
    monkeypatch.setattr(precision, "_ratios", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in precision.SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def measured(monkeypatch):
    """What each measurement found: 0.5, 0.51, 0.52 and so on."""
    found = []

    def measure():
        found.append(round(0.5 + len(found) / 100, 2))
        return found[-1]

    monkeypatch.setattr(precision, "measure", measure)
    return found


def next_process(monkeypatch):
    monkeypatch.setattr(precision, "_ratios", {})


# ---- the measurement


@pytest.fixture
def timed(monkeypatch):
    """A clock that TensorFlow's convolutions alone move on: timed(milliseconds by dtype, slowness by call from 0)."""

    def timed(cost, slowness=lambda call: 1.0):
        clock = SimpleNamespace(now=0.0, calls=0)

        def convolution(**arguments):
            dtype = next(x.dtype.name for x in arguments.values() if tf.is_tensor(x))
            clock.now += cost[dtype] / 1000 * slowness(clock.calls)
            clock.calls += 1

        for name in ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter"):
            monkeypatch.setattr(tf.raw_ops, name, convolution)
        monkeypatch.setattr(precision.time, "perf_counter", lambda: clock.now)
        return clock

    return timed


@pytest.mark.parametrize(("bfloat16", "ratio"), [(5, 0.5), (9.5, 0.95), (16, 1.6)])
def test_the_ratio_is_that_of_the_times(bfloat16, ratio, timed):
    timed({"float32": 10, "bfloat16": bfloat16})
    assert precision.measure() == pytest.approx(ratio)


def test_preparation_and_another_process_do_not_change_the_ratio(timed):
    """The first time of each layer is twenty times as long, and then every other round is three times as long."""
    a_round = 3 * len(precision.LAYERS) * 2
    timed(
        {"float32": 1, "bfloat16": 1.6},
        lambda call: 20.0 if call < a_round else (1.0, 3.0)[call // a_round % 2],
    )
    assert precision.measure() == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("milliseconds", "rounds"), [(0.1, 1 + precision.MAX_ROUNDS), (50, 1 + precision.MIN_ROUNDS)]
)
def test_a_slow_processor_measures_fewer_rounds(milliseconds, rounds, timed):
    clock = timed({"float32": milliseconds, "bfloat16": milliseconds})
    precision.measure()
    assert clock.calls == rounds * 3 * len(precision.LAYERS) * 2


@pytest.mark.parametrize("error", [tf.errors.AbortedError, tf.errors.UnimplementedError])
def test_where_bfloat16_fails_it_is_slowest(error, monkeypatch):
    def convolution(**arguments):
        if any(tf.is_tensor(x) and x.dtype == tf.bfloat16 for x in arguments.values()):
            raise error(None, None, "could not create a primitive descriptor")

    for name in ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter"):
        monkeypatch.setattr(tf.raw_ops, name, convolution)
    assert precision.measure() == precision.SLOWEST
    precision.keep(precision.SLOWEST)
    next_process(monkeypatch)
    assert precision.bfloat16_ratio()[0] == precision.SLOWEST


def test_real_convolutions_are_measured(monkeypatch):
    """The bounds are wide: other tests run beside it."""
    monkeypatch.undo()  # back to the processor that is there
    if not precision.native_flags():
        pytest.skip("needs a processor with native bfloat16")
    assert 0.05 < precision.measure() < 20


# ---- the cache


def test_a_machine_measures_once(measured, monkeypatch, tmp_path):
    ratio, source = precision.bfloat16_ratio()
    (file,) = (tmp_path / "cache").rglob("*.*")
    assert ratio == 0.5 and file == precision.cache_file()
    assert source == f"measured just now in 0.0 s; kept in {file}"
    assert precision.bfloat16_ratio() == (0.5, "measured before in this process")
    next_process(monkeypatch)
    assert precision.bfloat16_ratio() == (0.5, f"measured before; kept in {file}")
    assert measured == [0.5]


def test_a_deleted_cache_measures_again(measured, monkeypatch):
    precision.bfloat16_ratio()
    precision.cache_file().unlink()
    next_process(monkeypatch)
    assert precision.bfloat16_ratio()[0] == 0.51


def test_the_home_is_shown_as_users_write_it(measured, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/ignored")
    _, source = precision.bfloat16_ratio()
    (file,) = (tmp_path / ".cache/cifar10-trainer").iterdir()
    assert source.endswith(f"; kept in ~/.cache/cifar10-trainer/{file.name}")
    assert not Path("relative").exists()


CHANGES = {
    "processor": lambda patch: patch.setattr(machine, "processor", lambda: "Other CPU"),
    "flags": lambda patch: patch.setattr(machine, "cpu_flags", lambda: {"amx_bf16", "avx512_bf16"}),
    "cores": lambda patch: patch.setattr(machine, "cpu_count", lambda: 4),
    "tensorflow": lambda patch: patch.setattr(precision.importlib.metadata, "version", lambda name: "3.0"),
    "version": lambda patch: patch.setattr(precision, "VERSION", precision.VERSION + 1),
    "onednn": lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_machine_with_the_same_home_measures_for_itself(what, measured, monkeypatch):
    precision.bfloat16_ratio()
    with monkeypatch.context() as patch:
        CHANGES[what](patch)
        assert precision.bfloat16_ratio()[0] == 0.51
        next_process(patch)
        assert precision.bfloat16_ratio()[0] == 0.51
    next_process(monkeypatch)
    assert precision.bfloat16_ratio()[0] == 0.5


def test_other_flags_do_not_matter(measured, monkeypatch):
    precision.bfloat16_ratio()
    next_process(monkeypatch)
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_bf16", "sse2"})
    assert precision.bfloat16_ratio()[0] == 0.5


DAMAGED = {
    "empty": lambda values: "",
    "cut": lambda values: json.dumps(values)[:-5],
    "a list": lambda values: json.dumps([values]),
    "not text": lambda values: b"\xff\xfe\x00",
    "without a ratio": lambda values: json.dumps({"machine": values["machine"]}),
    "of another machine": lambda values: json.dumps({**values, "machine": {}}),
    **{
        f"a ratio of {ratio!r}": lambda values, ratio=ratio: json.dumps({**values, "bfloat16_over_float32": ratio})
        for ratio in ("0.4", None, True, [0.4], 0.0, -0.4, 101.0, float("nan"), float("inf"))
    },
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_cache_is_measured_again_and_mended(what, measured, monkeypatch):
    precision.bfloat16_ratio()
    file, damage = precision.cache_file(), DAMAGED[what]
    content = damage(json.loads(file.read_text()))
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for expected in (0.51, 0.51):
        next_process(monkeypatch)
        assert precision.bfloat16_ratio()[0] == expected


@pytest.mark.parametrize("kind", ["folder", "FIFO"])
def test_what_is_no_file_in_the_cache_neither_hangs_nor_fails(kind, measured):
    file = precision.cache_file()
    file.parent.mkdir(parents=True)
    (os.mkfifo if kind == "FIFO" else os.mkdir)(file)
    assert precision.bfloat16_ratio()[0] == 0.5


@pytest.mark.parametrize("where", ["parent is a file", "no home", "read-only"])
def test_where_nothing_can_be_kept_a_process_measures_once(where, measured, monkeypatch, tmp_path):
    if where == "parent is a file":
        (tmp_path / "cache").write_text("")
    elif where == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(precision.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:  # a folder's mode does not stop root

        def refuse(*args, **options):
            raise RunError("cannot write")

        monkeypatch.setattr(precision, "write_json", refuse)
    ratio, source = precision.bfloat16_ratio()
    assert ratio == 0.5 and source.startswith("measured just now") and source.endswith(NOT_KEPT)
    assert precision.bfloat16_ratio() == (0.5, "measured before in this process")
    next_process(monkeypatch)
    assert precision.bfloat16_ratio()[0] == 0.51
    assert where == "no home" or not list(tmp_path.glob("cache/**/*.json"))


# ---- several processes


class Forgetful(dict):
    """What a process remembers, if each call is a process of its own."""

    def __setitem__(self, key, value):
        pass


def test_of_processes_that_start_together_one_measures_and_all_take_its_answer(monkeypatch):
    calls = []

    def measure():
        calls.append(1)
        time.sleep(0.3)
        return 0.5 + len(calls)

    monkeypatch.setattr(precision, "measure", measure)
    monkeypatch.setattr(precision, "_ratios", Forgetful())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: precision.bfloat16_ratio(), range(4)))
    assert len(calls) == 1 and {ratio for ratio, _ in found} == {1.5}
    assert sum("just now" in source for _, source in found) == 1


def test_a_process_that_hangs_while_it_measures_holds_up_nobody(measured, monkeypatch):
    monkeypatch.setattr(precision, "WAIT", 0.2)
    folder = precision.cache_file().parent
    with files.folder_lock(folder, lambda: None):
        began = time.monotonic()
        assert precision.bfloat16_ratio()[0] == 0.5
        assert 0.2 <= time.monotonic() - began < 5


def test_what_is_kept_is_read_without_tensorflow():
    """So a run whose machine is known starts no later. The cache is that of all tests, where an answer is kept."""
    code = (
        "import sys, time\n"
        "from cifar10_trainer import machine, precision\n"
        "machine.cpu_flags = lambda: {'avx512_bf16'}\n"
        "precision.keep(0.25)\n"
        "precision._ratios.clear()\n"
        "began = time.process_time()\n"
        "ratio, source = precision.bfloat16_ratio()\n"
        "assert ratio == 0.25 and 'measured before; kept in' in source, (ratio, source)\n"
        "assert time.process_time() - began < 0.1\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
