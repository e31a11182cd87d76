from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from cifar10_trainer import Config, cluster, machine, precision, runtime
from cifar10_trainer.errors import ConfigError, RunError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_strategies_from_before(monkeypatch):
    """A process has one strategy of a kind for good; here each test begins without."""
    caches = (runtime._mirrored, runtime._multi_worker)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(cluster, "_team", None)
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def devices(monkeypatch):
    """Pretends that there are so many GPUs: devices(gpus)."""

    def pretend(gpus, details=None):
        found = {
            kind: [SimpleNamespace(name=f"/device:{kind}:{i}") for i in range(n)]
            for kind, n in {"GPU": gpus, "CPU": 1}.items()
        }
        monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: found[kind])
        for name in ("list_physical_devices", "get_visible_devices"):
            monkeypatch.setattr(tf.config, name, lambda kind=None: found[kind])
        monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: details or {})

    return pretend


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


@pytest.fixture
def made(monkeypatch):
    """What the two strategies that need devices of their own were made with, instead of making them."""
    calls = []
    for name in ("MirroredStrategy", "MultiWorkerMirroredStrategy"):
        monkeypatch.setattr(
            tf.distribute,
            name,
            lambda *args, name=name: calls.append((name, *args)) or SimpleNamespace(num_replicas_in_sync=6),
        )
    return calls


@pytest.fixture
def all_are_there(monkeypatch):
    """As if all workers of the cluster had met."""
    monkeypatch.setattr(
        cluster.Team, "__init__", lambda team, place, timeout, log: vars(team).update(TEAM, place=place)
    )
    monkeypatch.setattr(cluster.Team, "agree", lambda team, **terms: None)


TEAM = {"lost": "", "_listener": None, "_changed": contextlib.nullcontext(), "_at_work": 0, "_since": 0.0}
CLUSTER = {"cluster": {"worker": ["a:1", "b:1", "c:1"]}, "task": {"type": "worker", "index": 0}}


# ---- strategy


def test_none_is_the_default_strategy_on_the_first_device(devices, made):
    for gpus, name in ((0, "CPU:0"), (1, "GPU:0"), (3, "GPU:0")):
        devices(gpus)
        strategy, why = runtime.choose_strategy("none")
        assert strategy is tf.distribute.get_strategy()
        assert why.endswith(name)
    assert made == []


@pytest.mark.parametrize(("gpus", "expected"), [(0, "none"), (1, "none"), (2, "mirrored"), (8, "mirrored")])
def test_auto_mirrors_where_there_are_several_gpus(gpus, expected, devices, made):
    devices(gpus)
    strategy, why = runtime.choose_strategy("auto")
    if expected == "none":
        assert strategy is tf.distribute.get_strategy()
        assert made == []
    else:
        names = [f"/device:GPU:{i}" for i in range(gpus)]
        assert made == [("MirroredStrategy", names)]
        assert why == f"{gpus} replica(s): {', '.join(names)}"


def test_mirrored_takes_the_cpu_where_there_is_no_gpu(devices, made):
    devices(0)
    runtime.choose_strategy("mirrored")
    assert made == [("MirroredStrategy", ["/device:CPU:0"])]


def test_mirrored_on_one_cpu_for_real():
    strategy, why = runtime.choose_strategy("mirrored")
    assert isinstance(strategy, tf.distribute.MirroredStrategy)
    assert strategy.num_replicas_in_sync == 1
    assert "1 replica(s)" in why


@pytest.mark.parametrize("requested", ["auto", "multi_worker"])
@pytest.mark.parametrize("gpus", [0, 4])
def test_a_cluster_is_multi_worker(requested, gpus, devices, made, monkeypatch, all_are_there):
    devices(gpus)
    monkeypatch.setenv("TF_CONFIG", json.dumps(CLUSTER))
    _, why = runtime.choose_strategy(requested)
    assert made == [("MultiWorkerMirroredStrategy",)]
    assert why == "6 replica(s) on 3 worker(s)"


def test_the_chief_of_a_cluster_is_counted(devices, made, monkeypatch, all_are_there):
    devices(0)
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "chief", "index": 0}}))
    assert runtime.choose_strategy("auto")[1].endswith("on 3 worker(s)")


def test_a_cluster_does_not_matter_where_another_strategy_is_asked_for(devices, made, monkeypatch):
    devices(2)
    monkeypatch.setenv("TF_CONFIG", json.dumps(CLUSTER))
    assert runtime.choose_strategy("none")[0] is tf.distribute.get_strategy()
    runtime.choose_strategy("mirrored")
    assert made == [("MirroredStrategy", ["/device:GPU:0", "/device:GPU:1"])]


@pytest.mark.parametrize("text", [None, "", "{}"])
def test_multi_worker_without_a_cluster(text, devices, made, monkeypatch):
    devices(0)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError, match=r"found no cluster; set TF_CONFIG.*--strategy=mirrored"):
        runtime.choose_strategy("multi_worker")
    assert runtime.choose_strategy("auto")[0] is tf.distribute.get_strategy()
    assert made == []


@pytest.mark.parametrize("text", ["garbage", "{", "[]"])
def test_mirrored_does_not_read_what_tf_config_was_left_with(text, monkeypatch):
    """TensorFlow's own strategy does."""
    monkeypatch.setenv("TF_CONFIG", text)
    strategy = runtime._mirrored.__wrapped__(("/device:CPU:0",))
    assert strategy.num_replicas_in_sync == 1 and os.environ["TF_CONFIG"] == text


def test_a_cluster_of_one_worker_says_what_it_means(devices, made, monkeypatch):
    """As one that was left over from another run."""
    devices(0)
    alone = {"cluster": {"worker": ["localhost:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(alone))
    _, why = runtime.choose_strategy("auto")
    assert why.endswith(
        "on 1 worker(s); TF_CONFIG names this worker alone; unset it to train as without a cluster"
    )
    cluster.team().close()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RuntimeError("Collective ops must be configured at program startup"),
            "call .*choose_strategy.* before you make",
        ),
        (
            tf.errors.UnknownError(None, None, "Could not start gRPC server"),
            "server did not start .Could not start gRPC",
        ),
    ],
)
def test_a_server_that_cannot_start_is_one_line(error, text, devices, monkeypatch, all_are_there):
    def fail():
        raise error

    devices(0)
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", fail)
    monkeypatch.setattr(cluster.Team, "reporting_errors", lambda team: contextlib.nullcontext())
    monkeypatch.setenv("TF_CONFIG", json.dumps(CLUSTER))
    with pytest.raises((ConfigError, RunError), match=text):
        runtime.choose_strategy("auto")


def test_the_cpu_cannot_be_split_late():
    tf.constant(0)  # initializes the devices
    with pytest.raises(ConfigError, match="the CPU cannot be split any more"):
        runtime.split_cpu(2)


@pytest.mark.parametrize(
    ("jobs", "task", "expected"),
    [
        (None, None, True),  # no cluster at all
        (["worker"], ("worker", 0), True),
        (["worker"], ("worker", 1), False),
        (["worker"], (None, None), True),
        (["chief", "worker"], ("chief", 0), True),
        (["chief", "worker"], ("worker", 0), False),  # one process writes, not two
        (["chief", "worker"], ("worker", 1), False),
    ],
)
def test_one_process_is_the_chief(jobs, task, expected):
    resolver = None
    if jobs is not None:
        resolver = SimpleNamespace(
            task_type=task[0],
            task_id=task[1],
            cluster_spec=lambda: tf.train.ClusterSpec({job: ["a:1", "b:1"] for job in jobs}),
        )
    assert runtime.is_chief(SimpleNamespace(cluster_resolver=resolver)) is expected


def test_a_strategy_of_one_machine_has_its_chief_here():
    assert runtime.is_chief(tf.distribute.get_strategy())
    assert runtime.is_chief(tf.distribute.MirroredStrategy(["CPU:0"]))


# ---- precision


@pytest.mark.parametrize("requested", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_precision_as_asked(requested, devices):
    devices(1, {"compute_capability": (9, 0)})
    assert runtime.choose_precision(requested) == (requested, "as asked")
    devices(0, {})
    slow = "; slow on a CPU" if requested == "mixed_float16" else ""
    assert runtime.choose_precision(requested) == (requested, f"as asked{slow}")


@pytest.mark.parametrize(
    ("details", "expected", "reason"),
    [
        ({"compute_capability": (9, 0)}, "mixed_bfloat16", "9.0 has bfloat16"),
        ({"compute_capability": (8, 0)}, "mixed_bfloat16", "8.0 has bfloat16"),
        ({"compute_capability": (10, 0)}, "mixed_bfloat16", "10.0 has bfloat16"),
        ({"compute_capability": (7, 5)}, "mixed_float16", "7.5 has float16, not bfloat16"),
        ({"compute_capability": (7, 0)}, "mixed_float16", "7.0 has float16"),
        ({"compute_capability": (6, 1)}, "float32", "6.1 has no fast 16-bit arithmetic"),
        ({}, "float32", "this GPU names no compute capability"),
    ],
)
def test_precision_by_the_gpu(details, expected, reason, devices, monkeypatch):
    devices(1, details)
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_bf16"})  # the CPU does not matter then
    policy, why = runtime.choose_precision("auto")
    assert policy == expected
    assert reason in why
    keras.dtype_policies.get(policy)


@pytest.mark.parametrize(
    ("flags", "onednn"),
    [({"avx2", "avx512f", "f16c"}, "1"), (set(), "1"), ({"avx512_bf16"}, "0"), ({"amx_bf16"}, "False")],
)
def test_without_native_bfloat16_nothing_is_measured(flags, onednn, devices, monkeypatch):
    devices(0)
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", onednn)
    monkeypatch.setattr(machine, "cpu_flags", lambda: flags)
    monkeypatch.setattr(precision, "bfloat16_ratio", lambda: 1 / 0)
    assert runtime.choose_precision("auto") == ("float32", "no native bfloat16 here")


@pytest.mark.parametrize(
    ("ratio", "expected", "reason"),
    [
        (0.56, "mixed_bfloat16", "convolutions take 0.56 of float32's time here (measured so)"),
        (0.9, "mixed_bfloat16", "convolutions take 0.90 of float32's time here (measured so)"),
        (
            0.91,
            "float32",
            "convolutions take 0.91 of its time in bfloat16 here; at most 0.90 would be worth it",
        ),
        (
            1.6,
            "float32",
            "convolutions take 1.60 of its time in bfloat16 here; at most 0.90 would be worth it",
        ),
    ],
)
@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
def test_precision_by_what_was_measured(flag, ratio, expected, reason, devices, monkeypatch):
    devices(0)
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"fpu", flag})
    monkeypatch.setattr(precision, "bfloat16_ratio", lambda: (ratio, "measured so"))
    policy, why = runtime.choose_precision("auto")
    assert policy == expected
    assert why.startswith(reason) and why.endswith("(measured so)")


def test_a_network_with_depthwise_convolutions_stays_in_float32_on_a_cpu(devices, monkeypatch):
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(precision, "bfloat16_ratio", lambda: (0.5, "measured so"))
    devices(0)
    policy, why = runtime.choose_precision("auto", depthwise=True)
    assert policy == "float32" and "depthwise convolutions" in why
    assert runtime.choose_precision("mixed_bfloat16", depthwise=True)[0] == "mixed_bfloat16", "as asked"
    devices(1, {"compute_capability": (9, 0)})
    assert runtime.choose_precision("auto", depthwise=True)[0] == "mixed_bfloat16"


@pytest.mark.parametrize(
    ("requested", "before", "expected", "why"),
    [
        ("auto", None, "float32", "chosen here"),
        ("auto", "mixed_bfloat16", "mixed_bfloat16", "this run began with it"),
        ("auto", "float32", "float32", "this run began with it"),
        ("mixed_float16", None, "mixed_float16", "as asked"),
    ],
)
def test_a_run_keeps_the_precision_that_it_began_with(requested, before, expected, why, monkeypatch):
    choices = {"auto": ("float32", "chosen here"), "mixed_float16": ("mixed_float16", "as asked")}
    monkeypatch.setattr(runtime, "choose_precision", lambda name, **more: choices[name])
    lines = []
    assert runtime.agree_on_precision(requested, before, None, lines.append) == expected
    assert lines == [f"precision: {expected}: {why}"]


# ---- the rest


@pytest.mark.parametrize(("gpus", "without", "said"), [(0, True, True), (0, False, False), (1, True, False)])
def test_a_run_without_onednn_says_what_to_do(gpus, without, said, devices, monkeypatch):
    devices(gpus)
    monkeypatch.setattr(machine, "without_onednn", lambda: without)
    monkeypatch.setattr(runtime, "choose_strategy", lambda requested: (None, "chosen"))
    lines: list[str] = []
    runtime.choose_devices(Config(), 1.0, lines.append, {})
    assert lines[0] == "strategy: chosen"
    assert [line.startswith("oneDNN: off, because TensorFlow was imported before") for line in lines[1:]] == [
        True
    ] * said
    assert all("TF_ENABLE_ONEDNN_OPTS=1" in line for line in lines[1:])


def test_describe_is_a_record_of_texts():
    record = runtime.describe()
    assert json.loads(json.dumps(record)) == record
    assert set(record) == {"python", "tensorflow", "keras", "numpy", "platform", "processor", "gpus"}
    assert all(isinstance(text, str) and text for text in record.values())
    assert record["tensorflow"] == tf.__version__
    assert record["keras"] == keras.__version__
    assert record["numpy"] == np.__version__
    assert " core" in record["processor"]


def test_describe_names_processor_and_gpus(devices, proc):
    devices(2, {"device_name": "Fast GPU"})
    proc({"cpuinfo": "processor : 0\nmodel name\t: Fast CPU\nflags : x\n"})
    record = runtime.describe()
    assert record["gpus"] == "Fast GPU, Fast GPU"
    assert record["processor"].startswith("Fast CPU, ")
    proc({"cpuinfo": "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: Fast CPU\n"})
    assert runtime.describe()["processor"].startswith("Fast CPU (family 25, model 17), ")


def test_describe_elsewhere(devices, proc):
    devices(0)
    proc({})
    record = runtime.describe()
    assert record["gpus"] == "none"
    assert " core" in record["processor"]


@pytest.mark.parametrize(("batch", "n", "replicas"), [(10, 10, 1), (8, 100, 4), (1, 1, 1)])
def test_a_batch_that_fits(batch, n, replicas):
    runtime.check_batch(batch, n, replicas)


@pytest.mark.parametrize(
    ("batch", "n", "replicas", "text"),
    [
        (11, 10, 1, "batch_size is 11; allowed: at most the 10 training images"),
        (10, 100, 4, "batch_size is 10; allowed: a multiple of the 4 replicas"),
        (2, 100, 4, "batch_size is 2; allowed: a multiple of the 4 replicas"),
    ],
)
def test_a_batch_that_does_not_fit(batch, n, replicas, text):
    with pytest.raises(ConfigError) as caught:
        runtime.check_batch(batch, n, replicas)
    assert str(caught.value) == text


def test_mixing_needs_two_images_in_a_replicas_part_of_the_batch():
    runtime.check_batch(8, 100, 4, mixes=True)
    for batch, replicas in ((4, 4), (1, 1)):
        with pytest.raises(ConfigError, match=f"batch_size is {batch}, .*; allowed: {2 * replicas} or more"):
            runtime.check_batch(batch, 100, replicas, mixes=True)


@pytest.mark.parametrize("entering", [True, False])
def test_a_signal_while_blocks_nest_is_not_lost(entering):
    """It comes when the handler is set already, or set back already, and before the blocks tell each other."""
    moments = []

    class Inner(runtime.Signals):
        def _enclosing(self):
            moments.append("entering" if not moments else "leaving")
            if moments[-1] == ("entering" if entering else "leaving"):
                signal.raise_signal(signal.SIGTERM)
            return super()._enclosing()

    with runtime.Signals() as outer:
        with Inner():
            pass
        assert outer.caught == "SIGTERM"
    assert moments == ["entering", "leaving"]


def test_a_signal_of_the_program_around_python_stays_its_own(monkeypatch):
    """Python knows no handler of it, and could not set it back."""
    before = signal.getsignal(signal.SIGTERM)
    known = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGINT else known(n))
    with runtime.Signals() as signals:
        assert known(signal.SIGTERM) is signals and known(signal.SIGINT) is not signals
    assert known(signal.SIGTERM) is before


def as_first_process(program):
    """Runs a program as process 1 of a container, whom no signal ends that it does not handle. Skips where none can be made."""
    words = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    with contextlib.suppress(OSError):
        if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
            command = [*words, sys.executable, "-c", program]
            return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)
    return pytest.skip("no process namespaces here")


def test_a_second_signal_ends_the_first_process_of_a_container():
    done = as_first_process(
        "import os, signal; from cifar10_trainer import runtime; runtime.SAME_REQUEST_SECONDS = 0\n"
        "with runtime.Signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('first'); os.kill(1, signal.SIGTERM); print('second')"
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "second" not in done.stdout


def test_servers_that_do_not_meet_end_the_first_process_of_a_container():
    done = as_first_process(
        "import time; from cifar10_trainer.cluster import place, servers; servers.CONNECT = 0.5\n"
        "with servers.connecting_servers(place.Place(('a:1', 'b:1'), 0)): time.sleep(60); print('still there')"
    )
    assert done.returncode == 1 and "have not found one another in 0.5 s" in done.stderr
    assert "still there" not in done.stdout


def test_an_aborted_computation_without_a_cluster_is_no_lost_worker():
    """What oneDNN raises where a processor lacks what it was asked for."""
    aborted = tf.errors.AbortedError(None, None, "could not create a primitive descriptor\nfor a convolution")
    error = runtime.lost_worker(aborted)
    assert type(error) is RunError and "worker" not in str(error)
    assert str(error).endswith("try --precision=float32") and "primitive descriptor for a" in str(error)
    unavailable = tf.errors.UnavailableError(None, None, "gone")
    assert runtime.lost_worker(unavailable) is unavailable


def test_out_of_memory_is_one_line_that_says_what_to_do():
    error = runtime.out_of_memory(RuntimeError("OOM when allocating " + "x" * 500 + "\nand a stack"))
    assert isinstance(error, RunError)
    assert "smaller --batch_size" in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 300
