"""The oracles, which choose the hyperparameters of the next trial: KerasTuner's three, and successive halving.

The whole state of a search is in one file, which is replaced atomically. So a search that is killed at any moment
resumes from its last event, the begin or the end of a trial.

A trial may train for a share of the full number of epochs. It is then a complete run of that length, from new weights,
and its learning rate anneals to the end. KerasTuner's `HyperbandOracle` would load the weights of a shorter trial and
continue to train them, which does not fit such a schedule. The share is in the trial's values as "tuner/share".
"""

from __future__ import annotations

import functools
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import keras_tuner as kt
import numpy as np
from keras_tuner import oracles
from keras_tuner.engine import hyperparameters
from keras_tuner.engine.trial import Trial, TrialStatus
from keras_tuner.src.engine import conditions
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits  # scikit-learn brings it

from cifar10_trainer.errors import RunError, one_line
from cifar10_trainer.files import read_json, write_atomic

Method = TypeVar("Method", bound=Callable[..., Any])

SHARE, FAILURE, SEARCH = "tuner/share", "tuner/failure", "tuner/search"  # values that are not hyperparameters
MAX_RETRIES = 2  # of a trial whose report to the chief failed
# KerasTuner takes 0 for no seed, and counts its seed up by one for each value that it draws: with seeds 1 and 4, a search of
# three hyperparameters would have the same trials, one later. So its seeds are far apart.
SEED_STEP, SEEDS = 1_000_003, 2**32 - 1  # NumPy's seeds have 32 bits
# Draws of known trials before the space counts as exhausted. KerasTuner's 20 would end a search of 50 points after some 45.
MAX_COLLISIONS = 10_000

# Workers and chief send one another the conditions of a space, and KerasTuner 1.4.8 prints a value of each that it sends.
vars(conditions)["print"] = lambda *values: None


def _ignore(trial: Trial) -> None: ...


def rounded(value: float) -> float:
    """A metric to seven digits, but for counts: it came through gRPC as a float32, where 0.9 is 0.89999998."""
    return float(value) if float(value).is_integer() else float(f"{value:.7g}")


def _noting_failure(method: Method) -> Method:
    """Decorates a method of an oracle, which a server's thread may call: its error stays in `failure`, too, as a RunError."""

    @functools.wraps(method)
    def call(oracle: Any, *arguments: Any) -> Any:
        try:
            return method(oracle, *arguments)
        except Exception as error:
            text = f"{type(error).__name__}: {one_line(error)}"
            oracle.failure = error if isinstance(error, RunError) else RunError(text)
            raise

    return cast(Method, call)


class Float(hyperparameters.Float):
    """KerasTuner's, but with its upper limit: there, 0 to 0.5 in steps of 0.05 are 10 values, because 0.5 // 0.05 is 9.

    The name is KerasTuner's, too, because a saved state contains it.
    """

    def _get_n_values(self) -> int:
        if self.sampling != "linear":
            return super()._get_n_values()
        return 1 + math.floor((self.max_value - self.min_value) / self.step + 1e-6)

    def _to_prob_with_step(self, value: float) -> float:
        if self.sampling != "linear":
            return super()._to_prob_with_step(value)
        return (round((value - self.min_value) / self.step) + 0.5) / self._get_n_values()


class SearchOracle(kt.Oracle):
    """The base of all oracles of this project.

    It saves its state in one file, begins with the default values, stops at the target, and gives the trial of a worker
    without heartbeats to another worker.

    Args:
        file: the file of the state.
        search: the digest of what is searched. Each trial carries it, so that a worker refuses the trials of another
            search.
        baseline: whether the first trial has the default values of the space.
        stop_at: the validation accuracy, 0-1, at which the search ends; None: it does not end early.
        lease: seconds without a heartbeat after which another worker gets a worker's trial.
        seed: of the random numbers, 0 or more.
        options: those of the KerasTuner oracle: objective, max_trials, hyperparameters and so on.
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
            seed=1 + seed * SEED_STEP % SEEDS,
            max_retries_per_trial=MAX_RETRIES,
            max_consecutive_failed_trials=10**9,  # failed trials are recorded, and the search continues
            **options,
        )
        self._max_collisions = MAX_COLLISIONS
        self._count_steps_exactly()
        self.verbose = 0
        self.file, self.search, self.baseline = file, search, baseline
        self.stop_at, self.lease = stop_at, lease
        self.check: Callable[[], None] = lambda: None  # raises an error if the search's folder has gone
        self.on_begin: Callable[[Trial], None] = _ignore
        self.on_end: Callable[[Trial], None] = _ignore
        self.stopped = False  # whether the search is over
        self.failure: RunError | None = None  # what ended a call of a worker, as an error of one line
        self.ended: dict[str, float] = {}  # trial id -> seconds of the search at its end
        self._last_heartbeat: dict[str, float] = {}  # worker id -> time of its last heartbeat
        self._former_heartbeat = -math.inf  # the same for workers without one since this process started
        self._started, self._elapsed_before = time.monotonic(), 0.0

    def update_space(self, hyperparameters: kt.HyperParameters) -> None:
        """Takes in new hyperparameters, as those under a condition."""
        super().update_space(hyperparameters)
        self._count_steps_exactly()

    def _save_trial(self, trial: Trial) -> None:
        """Writes no trial.json, which would hold nothing that the state does not."""

    def _count_steps_exactly(self) -> None:
        for parameter in self.hyperparameters.space:
            if type(parameter) is hyperparameters.Float:
                parameter.__class__ = Float

    # ---- queries

    def elapsed(self) -> float:
        """Seconds that the search has run, including those before it was resumed."""
        return self._elapsed_before + time.monotonic() - self._started

    def best_accuracy(self) -> float | None:
        """The best validation accuracy so far, 0-1."""
        done = [t for t in list(self.trials.values()) if t.status == TrialStatus.COMPLETED]
        return max((rounded(t.metrics.get_best_value("val_accuracy")) for t in done), default=None)

    def live_workers(self) -> set[str]:
        """The workers that send heartbeats, and do not know yet that the search is over."""
        return {w for w in set(self.tuner_ids) if not self._is_silent(w)}

    def wait_for_former_workers(self) -> None:
        """Gives the workers of an earlier chief, which may still be training, one lease to send a heartbeat."""
        self._former_heartbeat = time.monotonic()

    def _is_silent(self, worker: str) -> bool:
        return time.monotonic() - self._last_heartbeat.get(worker, self._former_heartbeat) > self.lease

    # ---- KerasTuner's extension points

    @_noting_failure
    @kt.synchronized
    def create_trial(self, tuner_id: str) -> Trial:
        """Gives a worker its next trial.

        Args:
            tuner_id: the worker's id.

        Returns:
            A trial with one of these statuses. RUNNING: to train; a trial that this worker has already, a trial of a worker
            without heartbeats, or a new one. IDLE: ask again later. STOPPED: the search is over.
        """
        self.check()
        self._last_heartbeat[tuner_id] = time.monotonic()
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
            trial.status = TrialStatus.IDLE  # if another worker dies, this one gets its trial
            self.tuner_ids.add(tuner_id)  # KerasTuner has removed it
        self.stopped = trial.status == TrialStatus.STOPPED
        if trial.status == TrialStatus.RUNNING:
            self.on_begin(trial)
        return trial

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """The status and the values of a new trial: the default values for the first one, if `baseline`."""
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
        """The trial with this id. A worker's request for its own trial is its heartbeat."""
        for worker, trial in list(self.ongoing_trials.items()):
            if trial.trial_id == trial_id:
                self._last_heartbeat[worker] = time.monotonic()
        return super().get_trial(trial_id)

    @_noting_failure
    @kt.synchronized
    def end_trial(self, trial: Trial) -> None:
        """Records a completed or failed trial. Ignores the second report of a trial that two workers have trained."""
        if trial.trial_id in self.end_order:
            return
        # gRPC carries the values of a trial from a worker to the chief, but not its message.
        reason = trial.hyperparameters.values.pop(FAILURE, None)
        if reason:
            trial.status, trial.message = TrialStatus.FAILED, reason
        self.ended[trial.trial_id] = self.elapsed()
        self.check()
        if trial.status == TrialStatus.COMPLETED and not self._has_score(self.trials[trial.trial_id]):
            # A worker sends the metrics first. If the chief died between the two, the trial is given out again, and its folder,
            # which holds a finished run, is only read.
            trial.status = TrialStatus.INVALID
        super().end_trial(trial)
        if trial.trial_id in self.end_order:
            self.on_end(self.trials[trial.trial_id])

    def _has_score(self, trial: Trial) -> bool:
        return trial.metrics.exists(self.objective.name)

    def _compute_values_hash(self, values: dict[str, Any]) -> str:
        return super()._compute_values_hash({k: v for k, v in values.items() if not k.startswith("tuner/")})

    # ---- state

    def get_state(self) -> dict[str, Any]:
        """KerasTuner's state with all trials and times, as JSON values."""
        trials = [t.get_state() for t in self.trials.values()]
        return {**super().get_state(), "trials": trials, "elapsed": self.elapsed(), "ended": self.ended}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores a state from `get_state`."""
        self.trials = {t["trial_id"]: Trial.from_state(t) for t in state["trials"]}
        super().set_state(state)
        self._count_steps_exactly()
        self._elapsed_before, self._started, self.ended = state["elapsed"], time.monotonic(), state["ended"]
        # A running trial stays with its worker, which may still be training. Otherwise another worker gets it later.
        ended = [w for w, t in self.ongoing_trials.items() if t.status != TrialStatus.RUNNING]
        for worker in ended:
            del self.ongoing_trials[worker]
        for trial in self.trials.values():
            # an older version saved trials without a score as completed
            if trial.status == TrialStatus.COMPLETED and not self._has_score(trial):
                trial.status = TrialStatus.INVALID
                self._retry_queue.append(trial.trial_id)

    def save(self) -> None:
        """Writes the state to the file, atomically."""
        write_atomic(self.file, json.dumps(self.get_state()), durable=True)

    def reload(self) -> None:
        """Restores the state from the file, if it exists. Raises RunError if it is damaged."""
        if not self.file.exists():
            return
        state = read_json(self.file)
        try:
            self.set_state(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"cannot read {self.file}: it is not the state of a search ({one_line(error)}); choose another --workdir, or"
                " replace the search with --overwrite"
            ) from error


class Random(SearchOracle, oracles.RandomSearchOracle):
    """Random values."""


class Bayesian(SearchOracle, oracles.BayesianOptimizationOracle):
    """A Gaussian process, as soon as there are two more trials than hyperparameters; random values until then.

    The process assumes that the normalized scores are noisy, with a variance of 0.01.

    Args:
        options: as for `SearchOracle`.
    """

    def __init__(self, **options: Any):
        dimensions = len(options["hyperparameters"].space)
        super().__init__(num_initial_points=dimensions + 2, alpha=1e-2, **options)

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """The values that the process proposes, or random values if it proposes a trial a second time."""
        # KerasTuner does not save this generator, and a resumed search is to propose what an uninterrupted one does.
        self._random_state = np.random.RandomState((self.seed + len(self.trials)) % SEEDS)
        # Its matrices have a dozen rows, for which threads take longer. So few trials often leave a length scale of the
        # process at its limit, of which scikit-learn warns: that is no fault of the search.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            response = super().populate_space(trial_id)
        if response.get("values") and self._duplicate(response["values"]):
            # This happens on a grid, and if all trials have failed.
            response["values"] = self._random_values()
            if response["values"] is None:
                return {"status": TrialStatus.STOPPED}
            response["values"][SEARCH] = self.search
        return response


class Hyperband(SearchOracle, oracles.HyperbandOracle):
    """KerasTuner's brackets. Each round of a bracket trains new weights, for all epochs of the round.

    Args:
        max_trials: the budget.
        epochs: of a full run; rounded to a whole number.
        options: as for `SearchOracle`.
    """

    def __init__(self, *, max_trials: int, epochs: float, **options: Any):
        super().__init__(max_epochs=max(1, round(epochs)), hyperband_iterations=None, **options)
        self.max_trials = max_trials

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """The values that the bracket determines, with the share of the epochs."""
        response = super().populate_space(trial_id)
        values = response.get("values") or {}
        if "tuner/epochs" in values:
            values[SHARE] = values["tuner/epochs"] / self.max_epochs
        return response


class HalvingOracle(kt.Oracle):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934): many short runs, and longer runs of the best.

    A trial on rung k of 0..n trains for 3**(k - n) of the epochs. Rung 0 has at least one epoch. If the best third of the
    completed trials of a rung include one that was not promoted, the next trial repeats it one rung up; otherwise it has
    random values, on rung 0. So no worker waits, and the trials are the whole state.

    Args:
        epochs: of a full run.
        options: as for `SearchOracle`.
    """

    def __init__(self, *, epochs: float, **options: Any):
        super().__init__(**options)
        rungs = math.floor(math.log(max(epochs, 1), 3) + 1e-9)
        self.shares = [3.0**-k for k in range(rungs, -1, -1)]

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """The values of a trial to promote, from the highest rung that has one; otherwise random values."""
        for rung in reversed(range(len(self.shares) - 1)):
            here, above = (
                [t for t in self.trials.values() if self._share(t) == s] for s in self.shares[rung : rung + 2]
            )
            promoted = {t.hyperparameters.values.get("tuner/from") for t in above}
            done = [t for t in here if t.status == TrialStatus.COMPLETED]
            done.sort(key=lambda t: t.score, reverse=self.objective.direction == "max")
            for trial in done[: len(done) // 3]:
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
    """Successive halving with what `SearchOracle` does before it, as Keras's own oracles have it."""


def make_oracle(tuner: str, *, epochs: float, **options: Any) -> SearchOracle:
    """Makes an oracle.

    Args:
        tuner: a key of `options.TUNERS`.
        epochs: of a full run.
        options: as for `SearchOracle`.

    Returns:
        A new oracle without trials.
    """
    if tuner in ("hyperband", "halving"):
        options["epochs"] = epochs
    kinds = {"random": Random, "bayesian": Bayesian, "hyperband": Hyperband, "halving": Halving}
    return kinds[tuner](**options)
