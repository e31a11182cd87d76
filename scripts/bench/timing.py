"""How the benchmark measures: interleaved rounds, processes of their own, medians, ratios and goals."""

from __future__ import annotations

import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from results.records import ROOT

from cifar10_trainer import RECIPES, RunError

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from cifar10_trainer.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much a section measures."""

    quick: bool = False
    rounds: int = 7  # rounds that count, after one that does not
    batches: int = 20  # batches of 128 images in one measurement
    images: int = 50_000  # size of a synthetic data set
    seeds: int = 5  # runs of what is trained
    data_dir: str | None = None  # the folder of CIFAR-10
    airbench: str | None = None  # a checkout of airbench
    deadline: float = math.inf  # when airbench's scripts are stopped, by time.perf_counter()


# What a section of the benchmark is: its rows and, as "verdicts", its results with their goals; maybe its "runs".
Section = Callable[[Options], dict[str, Any]]


# ---- measuring -------------------------------------------------------------------------------------------


def interleaved(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measures all candidates once in each round, A B A B, after a first round that is not counted.

    Returns:
        name -> the values of the `rounds` rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        for name, measure in candidates.items():
            value = measure()
            if round_:
                samples[name].append(value)
        print(f"  round {round_} of {rounds}" if round_ else "  warm-up", flush=True)
    return samples


def rows_of(samples: Mapping[str, Sequence[float]], unit: str, base: str | None = None) -> dict[str, Any]:
    """Prints the rows of a section and returns them.

    Returns:
        name -> unit, median, range, samples and, with `base`, the ratio to the median of that row.
    """
    rows = {}
    for name, values in samples.items():
        median = statistics.median(values)
        row = {
            "unit": unit,
            "median": median,
            "min": min(values),
            "max": max(values),
            "samples": list(values),
        }
        if base:
            row["ratio"] = median / statistics.median(samples[base])
        rows[name] = row
        ratio = f"   {row['ratio']:.2f}" if base else ""
        print(f"  {name:55s} {number(median):>9} ({min_to_max(row)}) {unit}{ratio}", flush=True)
    return rows


def ratio_of_rounds(samples: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """The median over the rounds of one / other: the speed of a processor changes between rounds, less within one."""
    return statistics.median(a / b for a, b in zip(samples[one], samples[other], strict=True))


def against_goal(what: str, value: float, goal: str = "", unit: str = "") -> dict[str, Any]:
    """Prints a result of a section with its goal, and returns both."""
    print(f"  => {what}: {number(value)}{unit}" + (f" (goal: {goal})" if goal else ""), flush=True)
    return {"what": what, "value": value, "unit": unit, "goal": goal}


def number(value: float) -> str:
    """Two decimals below 10, one below 100, and none from there on; integers as they are."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def min_to_max(row: Mapping[str, Any]) -> str:
    """The range of a row's samples."""
    return f"{number(row['min'])} - {number(row['max'])}"


def others_share(seconds: float = 1.0) -> float | None:
    """The share of all processors' time, 0-1, that other processes take while this one waits; None where unknown.

    Contention does not slow all baselines alike: PyTorch's threads wait for one another at every operation.
    """

    def ticks() -> tuple[int, int]:
        values = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(values), values[3] + values[4]  # all; idle and waiting for disks

    try:
        before, idle_before = ticks()
        time.sleep(seconds)
        after, idle_after = ticks()
    except (OSError, ValueError, IndexError):
        return None
    return 1 - (idle_after - idle_before) / max(after - before, 1)


# ---- this project ----------------------------------------------------------------------------------------


def synthetic_data(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images, uint8 [n, 32, 32, 3], and labels, int64 [n]. The time of a step does not depend on them."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)


def engine_for(
    recipe: str,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    strategy: str | tf.distribute.Strategy = "none",
    model: keras.Model | None = None,
    **changes: Any,
) -> Engine:
    """An Engine that trains a recipe with `changes` on `images`, in the precision that suits the device.

    It trains for so many epochs that no benchmark reaches the end. model: somebody's own, instead of the recipe's.
    """
    from cifar10_trainer import preparation, runtime
    from cifar10_trainer.engine import make_engine

    config = RECIPES[recipe].override(**{"epochs": 10_000, **changes})
    chosen = runtime.choose_strategy(strategy)[0] if isinstance(strategy, str) else strategy
    depthwise = preparation.has_depthwise(config, model)
    policy, _ = runtime.choose_precision(config.precision, depthwise=depthwise)
    return make_engine(config, images, labels, num_classes=10, strategy=chosen, policy=policy, model=model)


def seconds_of(engine: Engine, steps: int) -> Callable[[], float]:
    """A function that trains `steps` steps and returns their seconds."""

    def measure() -> float:
        start = time.perf_counter()
        engine.train(steps)
        return time.perf_counter() - start

    return measure


def in_milliseconds(seconds: Callable[[], float], steps: int) -> Callable[[], float]:
    """A function that returns the milliseconds of one of the `steps` steps that `seconds` measures."""
    return lambda: 1e3 * seconds() / steps


def step_of(engine: Engine, steps: int) -> Callable[[], float]:
    """A function that trains `steps` steps and returns the milliseconds of one."""
    return in_milliseconds(seconds_of(engine, steps), steps)


# ---- processes of their own ------------------------------------------------------------------------------


def training_command(*flags: str, data_dir: str | None = None) -> list[str]:
    """The command line that trains with this project."""
    return [sys.executable, "-m", "cifar10_trainer", *flags, *_data(data_dir)]


def baseline_command(*flags: str, data_dir: str | None = None) -> list[str]:
    """The command line that trains with the fourth tutorial's own code."""
    return [sys.executable, str(Path(__file__).with_name("baselines.py")), *flags, *_data(data_dir)]


def _data(data_dir: str | None) -> list[str]:
    return [f"--data_dir={data_dir}"] if data_dir else []


def output_of(words: Sequence[str]) -> str:
    """What a command prints. Raises RunError with the last line of its errors where it fails.

    Where this process is stopped meanwhile, the command ends too, with all that it has started.
    """
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True, **pipe) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise RunError(
            f"{' '.join(words[1:4])} ... gave exit status {process.returncode}: {last_line(errors)}"
        )
    return output


def last_line(errors: str) -> str:
    """The last line of what a failed process has printed on stderr."""
    return (errors.strip().splitlines() or ["it printed no error"])[-1][:300]


def trained(*flags: str, data_dir: str | None = None) -> dict[str, Any]:
    """Runs the training command; the contents of its metrics.json, and "history", the rows of its history.csv."""
    from cifar10_trainer.run_folder import RunFolder

    with tempfile.TemporaryDirectory() as folder:
        output_of(training_command(*flags, f"--workdir={folder}/run", data_dir=data_dir))
        run = RunFolder(f"{folder}/run")
        return {**run.read_metrics(), "history": run.read_history()}


def peak_memory(words: Sequence[str]) -> float:
    """Peak resident memory of a command, MB.

    A small process starts the command, because Linux counts the memory of the parent at that moment as the child's,
    and this process holds TensorFlow.
    """
    between = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    )
    return int(output_of([sys.executable, "-c", between, *words]).split()[-1]) / 1024


def first_step(words: Sequence[str]) -> float:
    """Seconds from the start of a training command until its progress bar shows an accuracy; ends the command then."""
    start = time.perf_counter()
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        output = b""
        try:
            while part := os.read(process.stdout.fileno(), 4096):
                output += part
                if b"accuracy: " in output:
                    return time.perf_counter() - start
            errors = process.stderr.read().decode(errors="replace")[-300:]
        finally:
            process.kill()
    raise RunError(f"{' '.join(words[1:4])} ... ended before its first step: {' '.join(errors.split())}")
