"""The options of a search, with their ranges. This module does not import TensorFlow."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from dataclasses import dataclass

from cifar10_trainer.cluster.place import host_and_port
from cifar10_trainer.config import python_value
from cifar10_trainer.errors import ConfigError, check_number, check_type, unknown

TUNERS = {
    "random": "random values",
    "hyperband": "KerasTuner's brackets of short and long trials",
    "bayesian": "a Gaussian process, after a few random trials",
    "halving": "asynchronous successive halving: many short trials, and the best third of them longer",
}
DEFAULT_TUNER = "bayesian"
OBJECTIVES = {"val_accuracy": "max", "val_loss": "min"}
ROLES = ("alone", "chief", "worker")
LOOPBACK = "127.0.0.1"
MAX_SECONDS = 86_400


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `tune`.

    Attributes:
        workdir: the search's folder.
        tuner: how the next trial is chosen; a key of TUNERS.
        max_trials: the budget: the number of trials, at least 1. Failed trials count.
        target: the validation accuracy to reach, greater than 0 and at most 1.
        stop_at_target: whether the search ends at the first trial that reaches the target.
        objective: what the tuner optimizes; a key of OBJECTIVES.
        seed: of the tuner's random numbers, 0 or more.
        baseline: whether the first trial has the default values of the space.
        workers: the number of processes that train on this machine, at least 1. None: this process alone; beside a
            chief, no process.
        role: "alone": this process runs the search. "chief": it hands out trials at the address `chief`. "worker": it
            trains trials of the chief at that address.
        chief: the chief's address, HOST:PORT; None for the role "alone".
        lease: seconds, 1 to MAX_SECONDS, without a heartbeat of a worker after which another worker gets its trial.
        chief_timeout: seconds, 1 to MAX_SECONDS, that a worker waits for an answer of its chief.
        overwrite: whether to replace the search that is in `workdir`.
        verbose: 1: print progress; 0: print nothing.

    Raises:
        ConfigError: if a value is not allowed.
    """

    workdir: str = "searches/search"
    tuner: str = DEFAULT_TUNER
    max_trials: int = 20
    target: float = 0.85
    stop_at_target: bool = False
    objective: str = "val_accuracy"
    seed: int = 0
    baseline: bool = True
    workers: int | None = None
    role: str = "alone"
    chief: str | None = None
    lease: float = 60.0
    chief_timeout: float = 300.0
    overwrite: bool = False
    verbose: int = 1

    def __post_init__(self) -> None:
        check_type("workdir", self.workdir, (str, os.PathLike), "a folder")
        check_number("max_trials", self.max_trials, numbers.Integral, 1)
        check_number("seed", self.seed, numbers.Integral, 0)
        accuracy = "an accuracy greater than 0 and at most 1 (85% is 0.85)"
        check_number("target", self.target, numbers.Real, math.nextafter(0, 1), 1, words=accuracy)
        for name in ("lease", "chief_timeout"):
            words = f"1 to {MAX_SECONDS} seconds"
            check_number(name, getattr(self, name), numbers.Real, 1, MAX_SECONDS, words=words)
        if self.workers is not None:
            check_number(
                "workers", self.workers, numbers.Integral, 1, words="a whole number, 1 or more, or None"
            )
        for field in dataclasses.fields(self):  # search.json takes no numbers of NumPy
            object.__setattr__(self, field.name, python_value(getattr(self, field.name)))
        choices = {"tuner": tuple(TUNERS), "objective": tuple(OBJECTIVES), "role": ROLES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.workers is not None and self.role == "worker":
            raise ConfigError(f"workers is {self.workers}; allowed: none with --role=worker")
        if (self.role == "alone") != (self.chief is None):
            raise ConfigError(
                f"role is {self.role} and chief is {self.chief};"
                " allowed: --role=chief or --role=worker together with --chief=HOST:PORT, or neither"
            )
        if self.chief is not None:
            host_and_port(self.chief, "--chief")

    @property
    def local_workers(self) -> int:
        """The number of worker processes to start on this machine. With 0, a process with the role "alone" trains."""
        alone = self.role == "alone" and self.workers in (None, 1)
        return 0 if alone or self.workers is None else self.workers
