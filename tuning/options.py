"""How a search goes, as opposed to what it searches: checked values, no TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass

from cifar10_trainer.errors import ConfigError, unknown

TUNERS = {
    "random": "values at random",
    "hyperband": "KerasTuner's brackets of short and of long trials",
    "bayesian": "a Gaussian process proposes",
    "halving": "asynchronous successive halving: many short trials, the best third of them longer",
}
DEFAULT_TUNER = "bayesian"
OBJECTIVES = {"val_accuracy": "max", "val_loss": "min"}
ROLES = ("alone", "chief", "worker")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `tune`. Raises ConfigError on a value that cannot be."""

    workdir: str = "searches/search"
    tuner: str = DEFAULT_TUNER
    max_trials: int = 20
    target: float = 0.85  # validation accuracy
    stop_at_target: bool = False
    objective: str = "val_accuracy"
    seed: int = 0
    baseline: bool = True  # the first trial has the space's defaults
    workers: int | None = None  # processes on this machine; None: this one alone, or none beside a chief
    role: str = "alone"  # "chief": hands out trials at `chief`; "worker": takes them from there
    chief: str | None = None  # HOST:PORT
    lease: float = 60.0  # seconds without a sign of life after which another worker gets a worker's trial
    chief_timeout: float = 300.0  # seconds that a worker waits for its chief's answer
    overwrite: bool = False
    verbose: int = 1  # 0: nothing is printed

    def __post_init__(self) -> None:
        choices = {"tuner": tuple(TUNERS), "objective": tuple(OBJECTIVES), "role": ROLES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if not 0 < self.target <= 1:
            raise ConfigError(
                f"target is {self.target}; allowed: an accuracy greater than 0, up to 1 (85% is 0.85)"
            )
        for name, low in (("max_trials", 1), ("seed", 0), ("lease", 1), ("chief_timeout", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: {low} or more")
        if self.workers is not None and (self.workers < 1 or self.role == "worker"):
            how = "none with --role=worker" if self.role == "worker" else "1 or more"
            raise ConfigError(f"workers is {self.workers}; allowed: {how}")
        if (self.role == "alone") != (self.chief is None):
            raise ConfigError(
                f"role is {self.role} and chief is {self.chief};"
                " allowed: --role=chief or --role=worker together with --chief=HOST:PORT, or neither"
            )
        if self.chief is not None:
            host, _, port = self.chief.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ConfigError(f"chief is {self.chief!r}; allowed: HOST:PORT, as in {LOOPBACK}:5000")

    @property
    def local_workers(self) -> int:
        """Processes to start beside this one; 0: none, and where it is alone it trains itself."""
        alone = self.role == "alone" and self.workers in (None, 1)
        return 0 if alone or self.workers is None else self.workers
