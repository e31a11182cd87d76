"""Training steps on several replicas and in several processes, and what 8 GPUs and more would make of them on paper.

Devices are split, and workers meet, before TensorFlow starts. So each measurement is a process of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from results.records import ROOT

from cifar10_trainer import RunError

from . import timing
from .timing import Options, against_goal, interleaved, ratio_of_rounds, rows_of, synthetic_data

RECIPE, BATCH = "leaky.baseline", 128
NONE, ONE, TWO = "no strategy", "mirrored, one device", "mirrored, two logical devices"
PROCESS, PROCESSES = "one process", "two processes"
# For the model on paper. An NVIDIA H200 trains this recipe's network so fast (results/benchmark.json, gpu_step).
GPU_IMAGES_PER_SECOND, GPU_BATCH = 275_541, 512
NVLINK, ETHERNET = 300e9, 12.5e9  # bytes a second in one direction: within a host; 100 Gbit/s between hosts
LATENCY = 50e-6  # seconds of one all-reduce; a step has one for the gradients


def scale_out(o: Options) -> dict[str, Any]:
    """A training step of tutorial 4's network, global batch 128, on replicas and workers that share the two cores; more GPUs on paper."""
    (found,) = run_processes("replicas", o, 1)
    rows = rows_of(found["samples"], "ms", NONE)
    samples: dict[str, list[float]] = {PROCESS: [], PROCESSES: []}
    for _ in range(1 if o.quick else 3):
        for name, count in ((PROCESS, 1), (PROCESSES, 2)):
            samples[name].append(statistics.median(run_processes("worker", o, count)[0]["samples"]))
    rows |= rows_of(samples, "ms", PROCESS)
    mirrored = ratio_of_rounds(found["samples"], ONE, NONE)
    size = found["gradient_bytes"]
    goals = [
        against_goal("mirrored with one device / no strategy", mirrored, "at most 1.03"),
        against_goal("two logical devices / one", ratio_of_rounds(found["samples"], TWO, ONE)),
        against_goal("two processes / one", ratio_of_rounds(samples, PROCESSES, PROCESS)),
        against_goal("gradients of a step, each replica", size / 1e6, unit=" MB"),
    ]
    for gpus, hosts in ((8, 1), (8, 4)):
        factor = on_paper(gpus, hosts, size, overhead=max(1.0, mirrored))
        where = f"{gpus} GPUs" if hosts == 1 else f"{hosts} hosts of {gpus} GPUs"
        what = f"on paper, not measured: {where}, {GPU_BATCH} images each / one GPU, images a second"
        goals.append(against_goal(what, factor))
    return {"rows": rows, "verdicts": goals}


def on_paper(gpus: int, hosts: int, gradient_bytes: float, overhead: float) -> float:
    """How many times as many images a second `hosts` of `gpus` GPUs train as one GPU, by a model.

    Each GPU keeps its batch, so a step takes as long as on one GPU, times the `overhead` of a strategy; then a ring sends
    2 (n - 1) / n of the gradients over the slowest link. Nothing overlaps, and no GPU waits for data: both are assumptions.
    """
    n, link = gpus * hosts, NVLINK if hosts == 1 else ETHERNET
    step = GPU_BATCH / GPU_IMAGES_PER_SECOND
    return n * step / (overhead * step + 2 * (n - 1) / n * gradient_bytes / link + LATENCY)


# ---- processes -------------------------------------------------------------------------------------------


def run_processes(what: str, o: Options, count: int) -> list[dict[str, Any]]:
    """What `count` processes of the function `what` print as JSON; several are the workers of a cluster."""
    code = f"import sys; sys.path.insert(0, 'scripts'); from bench import scale_out; scale_out.{what}({o.rounds}, {o.batches})"
    usual = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"} | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    environments = [usual] if count == 1 else [usual | {"TF_CONFIG": c} for c in cluster_of(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=e,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for e in environments
    ]
    try:
        outputs = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()  # those that are left where something interrupts the benchmark
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            last = timing.last_line(errors)
            raise RunError(f"scale_out.{what} gave exit status {process.returncode}: {last}")
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def cluster_of(count: int) -> list[str]:
    """TF_CONFIG of each worker of a cluster on free ports of this machine."""
    from cifar10_trainer import cluster, launch

    addresses = launch.free_addresses(count)
    return [cluster.set_tf_config(addresses, i, "the benchmark") for i in range(count)]


def replicas(rounds: int, steps: int) -> None:
    """Prints milliseconds a step without a strategy and on one and two logical devices, interleaved."""
    import tensorflow as tf

    from cifar10_trainer import runtime

    runtime.split_cpu(2)
    devices: dict[str, Sequence[str] | None] = {NONE: None, ONE: ["CPU:0"], TWO: ["CPU:0", "CPU:1"]}
    engines = {}
    for name, names in devices.items():
        strategy = tf.distribute.get_strategy() if names is None else tf.distribute.MirroredStrategy(names)
        engines[name] = timing.engine_for(
            RECIPE, *synthetic_data(steps * BATCH), strategy=strategy, batch_size=BATCH
        )
    samples = interleaved({n: timing.step_of(e, steps) for n, e in engines.items()}, rounds)
    weights = engines[NONE].training_model.trainable_variables
    size = sum(v.value.dtype.size * v.value.shape.num_elements() for v in weights)
    print(json.dumps({"samples": samples, "gradient_bytes": size}))


def worker(rounds: int, steps: int) -> None:
    """Prints milliseconds a step of one worker of the cluster, or of a process alone."""
    from cifar10_trainer import runtime

    strategy, _ = runtime.choose_strategy("auto")
    engine = timing.engine_for(RECIPE, *synthetic_data(steps * BATCH), strategy=strategy, batch_size=BATCH)
    measure = timing.step_of(engine, steps)
    print(json.dumps({"samples": interleaved({"step": measure}, rounds)["step"]}))
