"""The oracles: which hyperparameters to try next. KerasTuner's own, made to survive, and successive halving.

Everything that a search remembers is in one file, written whole or not at all, so a search that is killed at any
moment goes on as of its last event.

A trial may train for a share of the full number of epochs. It is then a complete run of that length, from scratch,
whose learning rate anneals to the end: `HyperbandOracle`'s way of loading earlier weights and training on would
tear the schedule apart. The share is in the trial's values as "tuner/share".
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras_tuner as kt
from keras_tuner import oracles
from keras_tuner.engine.trial import Trial, TrialStatus
from threadpoolctl import threadpool_limits  # scikit-learn brings it

from cifar10_trainer.files import read_json, write_atomic

SHARE, FAILURE, SEARCH = "tuner/share", "tuner/failure", "tuner/search"  # values that are no hyperparameters
MAX_RETRIES = 2  # of a trial whose report to the chief failed; a trial that fails by itself fails again


def _ignore(trial: Trial) -> None: ...


class SearchOracle(kt.Oracle):
    """What every oracle here has: memory in one file, a first trial at the defaults, takeover, a stop at the target.

    Args:
        file: where the state is kept.
        search: a digest of what is searched, which goes along with every trial, so that a worker can tell whether
            it was started for the same.
        baseline: whether the first trial has the space's default values.
        stop_at: validation accuracy at which the search is over; None: never.
        lease: seconds without a sign of life after which a worker's trial is given to another.
        seed: 0 is a seed like any other. (To KerasTuner it is none.)
    """

    def __init__(
        self,
        *,
        file: Path,
        search: str = "",
        baseline: bool = True,
        stop_at: float | None = None,
        lease: float = 60.0,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(
            seed=seed + 1,
            max_retries_per_trial=MAX_RETRIES,
            max_consecutive_failed_trials=10**9,  # failed trials are recorded, and the search goes on
            **options,
        )
        self.verbose = 0
        self.file, self.search, self.baseline, self.stop_at, self.lease = (
            file,
            search,
            baseline,
            stop_at,
            lease,
        )
        self.on_begin: Callable[[Trial], None] = _ignore
        self.on_end: Callable[[Trial], None] = _ignore
        self.stopped = False  # no further trial will begin
        self.ended: dict[str, float] = {}  # trial -> seconds of the search at its end
        self._last_heartbeat: dict[str, float] = {}  # worker -> when it last gave a sign of life
        self._former_heartbeat = -math.inf  # that time, for workers from before a restart
        self._started, self._elapsed_before = time.time(), 0.0

    # -- what is asked of it --------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Seconds that the search has run, over all its processes."""
        return self._elapsed_before + time.time() - self._started

    def best_accuracy(self) -> float | None:
        """The best validation accuracy so far, 0-1."""
        done = [t for t in list(self.trials.values()) if t.status == TrialStatus.COMPLETED]
        return max((t.metrics.get_best_value("val_accuracy") for t in done), default=None)

    def live_workers(self) -> set[str]:
        """Those that have yet to be told that the search is over, as far as they live."""
        return {w for w in set(self.tuner_ids) if not self._is_silent(w)}

    def wait_for_former_workers(self) -> None:
        """Gives the workers of a former chief, which may still be training, as much time as any other."""
        self._former_heartbeat = time.time()

    def _is_silent(self, worker: str) -> bool:
        return time.time() - self._last_heartbeat.get(worker, self._former_heartbeat) > self.lease

    # -- KerasTuner's extension points ----------------------------------------------------------------------------

    @kt.synchronized
    def create_trial(self, tuner_id: str) -> Trial:
        self._last_heartbeat[tuner_id] = time.time()
        self.tuner_ids.add(tuner_id)
        if self.stop_at is not None and (self.best_accuracy() or 0) >= self.stop_at:
            self.stopped = True
            self.tuner_ids.discard(tuner_id)
            return Trial(self.get_space(), status=TrialStatus.STOPPED)
        if tuner_id not in self.ongoing_trials:
            for other in list(self.ongoing_trials):
                if self._is_silent(other):
                    self.ongoing_trials[tuner_id] = self.ongoing_trials.pop(other)
                    self.tuner_ids.discard(other)
                    break
        trial = super().create_trial(tuner_id)
        if trial.status == TrialStatus.STOPPED and self.ongoing_trials:
            trial.status = TrialStatus.IDLE  # a worker may yet die, and leave its trial to this one
            self.tuner_ids.add(tuner_id)  # KerasTuner has taken it off
        self.stopped = trial.status == TrialStatus.STOPPED
        if trial.status == TrialStatus.RUNNING:
            self.on_begin(trial)
        return trial

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        if self.baseline and not self.trials:
            hp = kt.HyperParameters()
            for parameter in self.hyperparameters.space:
                hp.merge([parameter])
                if hp.is_active(parameter):
                    hp.values[parameter.name] = parameter.default
            response = {"status": TrialStatus.RUNNING, "values": hp.values}
        else:
            response = super().populate_space(trial_id)
        if response.get("values"):
            response["values"] = {**response["values"], SEARCH: self.search}
        return response

    def get_trial(self, trial_id: str) -> Trial:
        """The trial; a worker asks for its own as a sign of life."""
        for worker, trial in list(self.ongoing_trials.items()):
            if trial.trial_id == trial_id:
                self._last_heartbeat[worker] = time.time()
        return super().get_trial(trial_id)

    @kt.synchronized
    def end_trial(self, trial: Trial) -> None:
        if trial.trial_id in self.end_order:
            return  # reported again, by a worker that had been taken for dead
        # A trial's message does not travel from worker to chief, but its values do.
        reason = trial.hyperparameters.values.pop(FAILURE, None)
        if reason:
            trial.status, trial.message = TrialStatus.FAILED, reason
        self.ended[trial.trial_id] = self.elapsed()
        super().end_trial(trial)
        if trial.trial_id in self.end_order:
            self.on_end(self.trials[trial.trial_id])

    def _compute_values_hash(self, values: dict[str, Any]) -> str:
        return super()._compute_values_hash({k: v for k, v in values.items() if not k.startswith("tuner/")})

    # -- memory ---------------------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        trials = [t.get_state() for t in self.trials.values()]
        return {**super().get_state(), "trials": trials, "elapsed": self.elapsed(), "ended": self.ended}

    def set_state(self, state: dict[str, Any]) -> None:
        self.trials = {t["trial_id"]: Trial.from_state(t) for t in state["trials"]}
        super().set_state(state)
        self._elapsed_before, self._started, self.ended = state["elapsed"], time.time(), state["ended"]
        # A trial stays with its worker, which may have outlived the chief; if not, another one takes it over.
        ended = [w for w, t in self.ongoing_trials.items() if t.status != TrialStatus.RUNNING]
        for worker in ended:
            del self.ongoing_trials[worker]

    def save(self) -> None:
        write_atomic(self.file, json.dumps(self.get_state()))

    def reload(self) -> None:
        if self.file.exists():
            self.set_state(read_json(self.file))


class Random(SearchOracle, oracles.RandomSearchOracle):
    """Values at random."""


class Bayesian(SearchOracle, oracles.BayesianOptimizationOracle):
    """A Gaussian process that has seen a few random trials, and knows that accuracies are noisy."""

    def __init__(self, **options: Any):
        dimensions = len(options["hyperparameters"].space)
        super().__init__(num_initial_points=dimensions + 2, alpha=1e-2, **options)

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        with threadpool_limits(
            1
        ):  # its matrices have a dozen rows: threads would only get in each other's way
            response = super().populate_space(trial_id)
        if response.get("values") and self._duplicate(response["values"]):
            # On a grid, or where every trial has failed, the process asks for the same again.
            response["values"] = self._random_values()
            if response["values"] is None:
                return {"status": TrialStatus.STOPPED}
            response["values"][SEARCH] = self.search
        return response


class Hyperband(SearchOracle, oracles.HyperbandOracle):
    """KerasTuner's brackets; each round trains from scratch, for all of its epochs."""

    def __init__(self, *, max_trials: int, epochs: float, **options: Any):
        super().__init__(max_epochs=max(1, round(epochs)), hyperband_iterations=None, **options)
        self.max_trials = max_trials

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        response = super().populate_space(trial_id)
        values = response.get("values") or {}
        if "tuner/epochs" in values:
            values[SHARE] = values["tuner/epochs"] / self.max_epochs
        return response


class HalvingOracle(kt.Oracle):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934): many short runs, the best of them longer.

    A trial on rung k of n trains for factor**(k - n) of the epochs; the lowest rung is the last with an epoch at
    least. Whenever the best 1/factor of a rung's trials have one that was not promoted, it goes a rung up; else a new
    one starts at the bottom. No worker ever waits, and there is nothing to remember beside the trials.
    """

    def __init__(self, *, epochs: float, factor: int = 3, **options: Any):
        super().__init__(**options)
        rungs = max(0, math.floor(math.log(max(epochs, 1), factor) + 1e-9))
        self.factor, self.shares = factor, [float(factor) ** -k for k in range(rungs, -1, -1)]

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        for rung in reversed(range(len(self.shares) - 1)):
            here, above = (
                [t for t in self.trials.values() if self._share(t) == s] for s in self.shares[rung : rung + 2]
            )
            promoted = {t.hyperparameters.values.get("tuner/from") for t in above}
            done = [t for t in here if t.status == TrialStatus.COMPLETED]
            done.sort(key=lambda t: t.score, reverse=self.objective.direction == "max")
            for trial in done[: len(done) // self.factor]:
                if trial.trial_id not in promoted:
                    values = {**trial.hyperparameters.values, "tuner/from": trial.trial_id}
                    return {"status": TrialStatus.RUNNING, "values": {**values, SHARE: self.shares[rung + 1]}}
        values = self._random_values()
        if values is None:
            return {"status": TrialStatus.STOPPED}
        return {"status": TrialStatus.RUNNING, "values": {**values, SHARE: self.shares[0]}}

    @staticmethod
    def _share(trial: Trial) -> float | None:
        return trial.hyperparameters.values.get(SHARE)


class Halving(SearchOracle, HalvingOracle):
    """Successive halving whose every rung is a complete annealed schedule."""


def make_oracle(tuner: str, *, epochs: float, **options: Any) -> SearchOracle:
    """The oracle of a name in `options.TUNERS`. epochs: of a full run."""
    if tuner in ("hyperband", "halving"):
        options["epochs"] = epochs
    kinds = {"random": Random, "bayesian": Bayesian, "hyperband": Hyperband, "halving": Halving}
    return kinds[tuner](**options)
