"""How benchmark.py measures: candidates in turn, processes of their own, medians, ratios and goals."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar10_trainer import RECIPES, RunError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much a section does."""

    quick: bool = False
    rounds: int = 7  # that count; one more goes before
    batches: int = 20  # of 128 images, in what is timed at once
    images: int = 50_000  # of a made-up data set
    seeds: int = 5  # of what is trained
    data_dir: str | None = None
    airbench: str | None = None  # a checkout of airbench
    deadline: float = math.inf  # of its scripts, by time.perf_counter()


# ---- measuring -------------------------------------------------------------------------------------------


def in_turn(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """name -> `rounds` samples of each candidate, A B A B, after one round that is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        for name, measure in candidates.items():
            value = measure()
            if round_:
                samples[name].append(value)
        print(f"  round {round_} of {rounds}" if round_ else "  warm", flush=True)
    return samples


def rows_of(samples: Mapping[str, Sequence[float]], unit: str, base: str | None = None) -> dict[str, Any]:
    """name -> median, range, samples, and the ratio to the median of the row `base`; printed, too."""
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
        print(f"  {name:55s} {number(median):>9} ({spread(row)}) {unit}{ratio}", flush=True)
    return rows


def verdict(what: str, value: float, goal: str = "", unit: str = "") -> dict[str, Any]:
    """A number that a section comes to, and what it should be; printed, too."""
    print(f"  => {what}: {number(value)}{unit}" + (f" (goal: {goal})" if goal else ""), flush=True)
    return {"what": what, "value": value, "unit": unit, "goal": goal}


def number(value: float) -> str:
    """Three digits that count, or all before the point; whole numbers as they are."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def spread(row: Mapping[str, Any]) -> str:
    return f"{number(row['min'])} - {number(row['max'])}"


def others_share(seconds: float = 1.0) -> float | None:
    """The share of all processors' time, 0-1, that others take while this process waits; None where unknown.

    Contention does not slow all peers alike: PyTorch's threads wait for one another at every operation.
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


def made_up(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images [n, 32, 32, 3] and labels: what a step takes does not depend on them."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)


def engine_for(recipe: str, images, labels, *, strategy: str = "none", **changes):
    """An Engine on `images` for a recipe with `changes`, in the precision that suits the device; it does not end."""
    from cifar10_trainer import runtime
    from cifar10_trainer.engine import make_engine

    config = RECIPES[recipe].override(**{"epochs": 10_000, **changes})
    chosen, _ = runtime.choose_strategy(strategy)
    policy, _ = runtime.choose_precision(config.precision)
    return make_engine(config, images, labels, num_classes=10, strategy=chosen, policy=policy)


def seconds_of(engine, steps: int) -> Callable[[], float]:
    """What measures the seconds of `steps` steps of an engine."""

    def measure() -> float:
        start = time.perf_counter()
        engine.train(steps)
        return time.perf_counter() - start

    return measure


# ---- processes of their own ------------------------------------------------------------------------------


def command(*flags: str, data_dir: str | None = None) -> list[str]:
    """The command line of this project's training."""
    return [sys.executable, "-m", "cifar10_trainer", *flags, *_data(data_dir)]


def peer(*flags: str, data_dir: str | None = None) -> list[str]:
    """The command line of the fourth tutorial's own code."""
    return [sys.executable, str(ROOT / "scripts" / "peers.py"), *flags, *_data(data_dir)]


def _data(data_dir: str | None) -> list[str]:
    return [f"--data_dir={data_dir}"] if data_dir else []


def output_of(words: Sequence[str]) -> str:
    """What a command prints. Raises RunError with the last line of its errors where it fails."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"{' '.join(words[1:4])} ... gave exit status {done.returncode}: {last[:300]}")
    return done.stdout


def trained(*flags: str, data_dir: str | None = None) -> dict[str, Any]:
    """metrics.json of a run of the training command, with "history", the rows of its history.csv."""
    from cifar10_trainer.run_folder import RunFolder

    with tempfile.TemporaryDirectory() as folder:
        output_of(command(*flags, f"--workdir={folder}/run", data_dir=data_dir))
        run = RunFolder(f"{folder}/run")
        return {**run.read_metrics(), "history": run.read_history()}


def peak_memory(words: Sequence[str]) -> float:
    """Peak resident memory of a command, MB.

    A process between the two starts it: what a child is said to have used includes its parent's memory
    at the time, and this one holds TensorFlow.
    """
    between = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    return int(output_of([sys.executable, "-c", between, *words]).split()[-1]) / 1024


def first_step(words: Sequence[str]) -> float:
    """Seconds from the start of a command that trains to its progress bar's first accuracy; then ends it."""
    start = time.perf_counter()
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        seen = b""
        try:
            while part := os.read(process.stdout.fileno(), 4096):
                seen += part
                if b"accuracy: " in seen:
                    return time.perf_counter() - start
            said = process.stderr.read().decode(errors="replace")[-300:]
        finally:
            process.kill()
    raise RunError(f"{' '.join(words[1:4])} ... ended before its first step: {' '.join(said.split())}")
