"""The oracles, with made-up accuracies: what they propose, what they save, which worker gets a trial."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import keras_tuner as kt
import numpy as np
import pytest
import tensorflow as tf
from keras_tuner.engine.trial import TrialStatus

from cifar10_trainer.errors import RunError
from tuning import TUNERS
from tuning.leaderboard import Leaderboard
from tuning.oracle import FAILURE, SEARCH, SHARE, make_oracle
from tuning.search_folder import SearchFolder

pytestmark = pytest.mark.filterwarnings(
    # KerasTuner 1.4.8 asks the threading module by its old names.
    "ignore:(currentThread|getName)\\(\\) is deprecated:DeprecationWarning"
)


def new(path, tuner="random", epochs=9.0, max_trials=10, hp=None, **options):
    if hp is None:
        hp = kt.HyperParameters()
        hp.Float("x", 0.0, 1.0, default=0.25)
        hp.Int("n", 8, 64, step=8, default=32)
    objective = kt.Objective("val_accuracy", "max")
    options = {"lease": 1000.0, "search": "digest", **options}
    oracle = make_oracle(
        tuner,
        epochs=epochs,
        objective=objective,
        max_trials=max_trials,
        hyperparameters=hp,
        file=path / "state.json",
        **options,
    )
    oracle._set_project_dir(str(path), "trials")
    oracle.reload()
    return oracle


def end(oracle, trial, accuracy=None):
    """Reports a trial with this accuracy, or as failed."""
    if accuracy is None:
        trial.hyperparameters.values[FAILURE] = "it had to fail"
    oracle.update_trial(trial.trial_id, {"val_accuracy": accuracy or 0.0})
    trial.status = TrialStatus.COMPLETED
    oracle.end_trial(trial)


def run(oracle, accuracy, worker="w"):
    """Runs the search to its end; gives the trials in their order."""
    trials = []
    while (trial := oracle.create_trial(worker)).status == TrialStatus.RUNNING:
        trials.append(trial)
        end(oracle, trial, accuracy(trial.hyperparameters.values))
    assert trial.status == TrialStatus.STOPPED
    assert oracle.stopped
    return trials


def values(trials):
    return [{k: v for k, v in t.hyperparameters.values.items() if not k.startswith("tuner/")} for t in trials]


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_tuner_spends_its_budget_from_the_defaults_on(tuner, tmp_path):
    trials = run(new(tmp_path, tuner, max_trials=6), lambda v: 1 - abs(v["x"] - 0.7))
    assert len(trials) == 6
    assert values(trials)[0] == {"x": 0.25, "n": 32}
    assert SHARE not in trials[0].hyperparameters.values  # a full run
    assert all(t.hyperparameters.values[SEARCH] == "digest" for t in trials)


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_seed_is_a_seed_even_if_it_is_0(tuner, tmp_path):
    accuracy = lambda v: 1 - abs(v["x"] - 0.7)  # noqa: E731
    first, again, other = (
        values(run(new(tmp_path / str(i), tuner, seed=seed, max_trials=6), accuracy))
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == again
    assert first[1:] != other[1:]


def test_without_baseline_the_first_trial_is_drawn_too(tmp_path):
    assert values(run(new(tmp_path, baseline=False), lambda v: 0.5))[0] != {"x": 0.25, "n": 32}


def test_searches_with_different_seeds_have_no_trial_in_common(tmp_path):
    drawn = []
    for seed in (*range(8), 2**32 - 2, 2**40):  # the last two: KerasTuner's seed stays within NumPy's
        trials = run(new(tmp_path / str(seed), seed=seed, baseline=False, max_trials=6), lambda v: 0.5)
        drawn += [v["x"] for v in values(trials)]
    assert len(set(drawn)) == len(drawn)


def test_bayesian_finds_the_hill(tmp_path):
    hp = kt.HyperParameters()
    hp.Float("x", 0.0, 1.0)
    trials = run(new(tmp_path, "bayesian", hp=hp, max_trials=13), lambda v: 0.9 - (v["x"] - 0.7) ** 2)
    late = [v["x"] for v in values(trials)[-6:]]
    assert sum(abs(x - 0.7) < 0.1 for x in late) >= 5  # at random 1 in 5 is


def test_bayesian_is_silent_about_hyperparameters_that_few_trials_do_not_determine(tmp_path):
    hp = kt.HyperParameters()
    for name in "abc":
        hp.Choice(name, [1, 2, 3])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(
            new(tmp_path, "bayesian", hp=hp, max_trials=9), lambda v: 0.5 + 0.01 * ((v["a"] * 7 + v["b"]) % 3)
        )
    assert not [w for w in caught if "length_scale" in str(w.message)]


def test_bayesian_proposes_nothing_twice(tmp_path):
    hp = kt.HyperParameters()
    hp.Choice("n", [1, 2, 3, 4, 5, 6, 7, 8])
    trials = run(new(tmp_path, "bayesian", hp=hp, max_trials=8), lambda v: v["n"] / 10)
    assert sorted(v["n"] for v in values(trials)) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("tuner", ["random", "halving", "bayesian"])
def test_a_space_can_be_exhausted(tuner, tmp_path):
    hp = kt.HyperParameters()
    hp.Boolean("b")
    oracle = new(tmp_path, tuner, hp=hp, max_trials=10, epochs=1)
    assert len(run(oracle, lambda v: 0.5)) == 2


# ---- rungs -----------------------------------------------------------------------------------------------------


def test_halving_promotes_the_best_third(tmp_path):
    """Nine trials of a ninth of the epochs, three of a third, one in full, the best each time."""
    oracle = new(tmp_path, "halving", epochs=9.0, max_trials=13, baseline=False)
    trials = run(oracle, lambda v: v["x"])
    by_share = {
        share: [t for t in trials if t.hyperparameters.values[SHARE] == share]
        for share in (1 / 9, 1 / 3, 1.0)
    }
    low, middle, full = ([v["x"] for v in values(by_share[s])] for s in (1 / 9, 1 / 3, 1.0))
    assert (len(low), len(middle), len(full)) == (9, 3, 1)
    # Promoted as soon as three are there to choose from: the best of the first three is among them.
    assert max(low[:3]) in middle
    assert set(middle) <= set(low)
    assert full == [max(middle)]
    assert len(set(low)) == 9


def test_halving_of_a_short_run_is_random_search(tmp_path):
    trials = run(new(tmp_path, "halving", epochs=2.5), lambda v: 0.5)
    assert {t.hyperparameters.values.get(SHARE, 1.0) for t in trials} == {1.0}


def test_halving_does_not_promote_what_failed(tmp_path):
    oracle = new(tmp_path, "halving", epochs=3.0, max_trials=6, baseline=False)
    trials = run(oracle, lambda v: None)
    assert {t.hyperparameters.values[SHARE] for t in trials} == {1 / 3}


def test_hyperband_gives_every_round_its_share_of_a_full_run(tmp_path):
    trials = run(new(tmp_path, "hyperband", epochs=9.0, max_trials=30), lambda v: v["x"])
    shares = {round(t.hyperparameters.values[SHARE], 4) for t in trials[1:]}
    assert shares == {0.1111, 0.3333, 1.0}


# ---- its end ---------------------------------------------------------------------------------------------------


def test_it_stops_at_the_target(tmp_path):
    accuracies = iter([0.5, 0.84, 0.85, 0.9])
    oracle = new(tmp_path, stop_at=0.85)
    assert len(run(oracle, lambda v: next(accuracies))) == 3
    assert oracle.best_accuracy() == 0.85


def test_a_target_is_reached_whatever_float32_made_of_it(tmp_path):
    """gRPC carries metrics as float32, where 0.9 is 0.89999998."""
    oracle = new(tmp_path, stop_at=0.9)
    assert len(run(oracle, lambda v: float(np.float32(0.9)))) == 1
    assert oracle.best_accuracy() == 0.9


def test_failures_in_a_row_do_not_end_it(tmp_path):
    oracle = new(tmp_path)
    ended = []
    oracle.on_end = ended.append
    run(oracle, lambda v: None)
    assert [t.status for t in ended] == [TrialStatus.FAILED] * 10
    assert {t.message for t in ended} == {"it had to fail"}
    assert oracle.best_accuracy() is None


# ---- the space ------------------------------------------------------------------------------------------------


def stepped():
    hp = kt.HyperParameters()
    hp.Float("a", 0.0, 0.5, step=0.05)  # KerasTuner: 0.5 // 0.05 is 9, so it never draws 0.5
    hp.Int("b", 1, 4)
    return hp


def test_a_small_space_is_searched_to_its_last_point(tmp_path):
    trials = run(new(tmp_path, hp=stepped(), max_trials=100), lambda v: 0.5)
    found = {(round(v["a"], 6), v["b"]) for v in values(trials)}
    assert found == {(k / 20, b) for k in range(11) for b in range(1, 5)}
    assert len(trials) == 44  # each once


def test_a_value_stands_at_its_own_place_for_the_gaussian_process(tmp_path):
    run(new(tmp_path, "bayesian", hp=stepped(), max_trials=1), lambda v: 0.5)
    for oracle in (new(tmp_path / "b", "bayesian", hp=stepped()), new(tmp_path, "bayesian", hp=stepped())):
        a = next(p for p in oracle.hyperparameters.space if p.name == "a")
        for k in range(11):  # the middle of the k-th of eleven parts, also in a search that resumes
            assert a.value_to_prob(k * 0.05) == pytest.approx((k + 0.5) / 11)
            assert a.prob_to_value((k + 0.5) / 11) == pytest.approx(k * 0.05)


# ---- state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", TUNERS)
def test_it_can_be_killed_after_any_event(tuner, tmp_path):
    """A fresh oracle from the file after every call: each trial ends once, none is lost, and the same are drawn."""
    accuracy = lambda v: 1 - abs(v["x"] - 0.7)  # noqa: E731
    undisturbed = values(run(new(tmp_path / "a", tuner, max_trials=6), accuracy))
    ended = []
    for _ in range(100):
        trial = new(tmp_path / "b", tuner, max_trials=6).create_trial("w")
        if trial.status != TrialStatus.RUNNING:
            break
        again = new(tmp_path / "b", tuner, max_trials=6).create_trial("w")
        assert again.trial_id == trial.trial_id  # killed in the middle: the same trial
        oracle = new(tmp_path / "b", tuner, max_trials=6)
        again = oracle.create_trial("w")
        end(oracle, again, accuracy(again.hyperparameters.values))
        ended.append(again)
    assert [t.trial_id for t in ended] == [f"{i}" for i in range(6)]
    assert values(ended) == undisturbed


def test_a_file_that_is_being_written_is_not_read(tmp_path):
    oracle = new(tmp_path)
    end(oracle, oracle.create_trial("w"), 0.5)
    (tmp_path / ".state.json.tmp").write_text('{"half of')
    assert not (tmp_path / "trials").exists()  # KerasTuner's own file, which is not atomic
    assert [t.score for t in new(tmp_path).trials.values()] == [0.5]


def test_a_report_whose_metrics_the_chief_lost_is_asked_for_again(tmp_path):
    """A worker sends the metrics, the chief dies, and the worker ends its trial at the chief that comes back."""
    first = new(tmp_path)
    trial = first.create_trial("w")
    first.update_trial(trial.trial_id, {"val_accuracy": 0.5})
    second = new(tmp_path)
    trial.status = TrialStatus.COMPLETED
    second.end_trial(trial)
    assert second.end_order == [] and second.best_accuracy() is None
    again = new(tmp_path).create_trial("w")
    assert (again.trial_id, again.status) == (trial.trial_id, TrialStatus.RUNNING)
    third = new(tmp_path)
    end(third, third.create_trial("w"), 0.5)
    assert third.best_accuracy() == 0.5 and third.end_order == [trial.trial_id]


def test_a_state_with_a_trial_that_ended_without_metrics_is_mended(tmp_path):
    oracle = new(tmp_path)
    trial = oracle.create_trial("w")
    oracle.trials[trial.trial_id].status = TrialStatus.COMPLETED  # as an older version left it
    oracle.ongoing_trials.clear()
    oracle.save()
    again = new(tmp_path).create_trial("w")
    assert (again.trial_id, again.status) == (trial.trial_id, TrialStatus.RUNNING)


def test_any_error_of_the_oracle_is_kept_for_the_chief(tmp_path, monkeypatch):
    oracle = new(tmp_path)

    def full():
        raise tf.errors.ResourceExhaustedError(None, None, "No space\nleft on device")

    monkeypatch.setattr(oracle, "save", full)
    with pytest.raises(tf.errors.ResourceExhaustedError):
        oracle.create_trial("w")
    assert isinstance(oracle.failure, RunError)
    assert str(oracle.failure) == "ResourceExhaustedError: No space left on device"


def test_conditions_that_are_sent_print_nothing(capfd):
    hp = kt.HyperParameters()
    hp.Choice("kind", ["a", "b"])
    with hp.conditional_scope("kind", ["b"]):
        hp.Float("x", 0.0, 0.5)
    sent = hp.to_proto()
    assert [c.values[0].string_value for c in (c.parent for c in sent.space.float_space[0].conditions)] == [
        "b"
    ]
    assert capfd.readouterr() == ("", "")


def test_steps_of_a_conditional_hyperparameter_reach_its_upper_limit(tmp_path):
    """KerasTuner finds it later than the others. Of 0, 0.25 and 0.5 each is drawn."""
    hp = kt.HyperParameters()
    hp.Choice("kind", ["a", "b"])
    oracle = new(tmp_path, hp=hp, max_trials=40)
    with hp.conditional_scope("kind", ["b"]):
        hp.Float("x", 0.0, 0.5, step=0.25)
    oracle.update_space(hp)
    drawn = {v["x"] for v in values(run(oracle, lambda v: 0.5)) if v["kind"] == "b"}
    assert drawn == {0.0, 0.25, 0.5}


def test_time_adds_up_over_restarts(tmp_path):
    oracle = new(tmp_path)
    oracle._started -= 100
    end(oracle, oracle.create_trial("w"), 0.5)
    again = new(tmp_path)
    assert 100 <= again.elapsed() < 110
    assert 100 <= again.ended["00"] < 110


def test_more_trials_can_be_added(tmp_path):
    run(new(tmp_path, max_trials=3), lambda v: 0.5)
    assert len(run(new(tmp_path, max_trials=5), lambda v: 0.5)) == 2
    assert len(json.loads((tmp_path / "state.json").read_text())["trials"]) == 5


# ---- workers ---------------------------------------------------------------------------------------------------


def test_a_worker_gets_its_own_trial_back(tmp_path):
    oracle = new(tmp_path)
    first, other = oracle.create_trial("a"), oracle.create_trial("b")
    assert first.trial_id != other.trial_id
    assert oracle.create_trial("a").trial_id == first.trial_id


def test_the_trial_of_a_silent_worker_goes_to_the_next_that_asks(tmp_path):
    oracle = new(tmp_path, lease=10.0)
    lost, kept = oracle.create_trial("silent"), oracle.create_trial("alive")
    oracle._last_heartbeat = {worker: then - 11 for worker, then in oracle._last_heartbeat.items()}
    oracle.get_trial(kept.trial_id)  # a heartbeat
    assert oracle.create_trial("next").trial_id == lost.trial_id
    assert oracle.create_trial("another").trial_id not in (lost.trial_id, kept.trial_id)
    assert oracle.live_workers() == {"alive", "next", "another"}


def test_a_late_report_of_a_trial_that_was_given_away_counts_once(tmp_path):
    oracle = new(tmp_path, lease=10.0)
    trial = oracle.create_trial("slow")
    oracle._last_heartbeat["slow"] -= 11
    again = oracle.create_trial("next")
    end(oracle, again, 0.6)
    end(oracle, trial, 0.6)
    assert oracle.end_order == [trial.trial_id]
    assert oracle.create_trial("slow").trial_id != trial.trial_id


def test_a_worker_waits_for_the_last_trials_of_others(tmp_path):
    oracle = new(tmp_path, max_trials=1)
    trial = oracle.create_trial("a")
    assert oracle.create_trial("b").status == TrialStatus.IDLE
    assert not oracle.stopped
    end(oracle, trial, 0.5)
    assert oracle.create_trial("b").status == TrialStatus.STOPPED
    assert oracle.live_workers() == {"a"}


def test_a_chief_that_comes_back_leaves_trials_to_their_workers(tmp_path):
    trial = new(tmp_path).create_trial("a")
    chief = new(tmp_path)
    chief.wait_for_former_workers()
    assert chief.create_trial("b").trial_id != trial.trial_id
    end(chief, trial, 0.7)  # by a, which had never noticed
    assert chief.trials[trial.trial_id].score == 0.7


def test_a_search_that_comes_back_alone_takes_over_at_once(tmp_path):
    trial = new(tmp_path).create_trial("worker2")
    assert new(tmp_path).create_trial("tuner0").trial_id == trial.trial_id


def test_the_time_that_is_left_is_shared_by_the_workers_that_live(tmp_path):
    oracle = new(tmp_path, max_trials=9)
    board = Leaderboard(oracle, SearchFolder(tmp_path), lambda hp: None, target=0.85, max_trials=9)
    rows = [SimpleNamespace(status="completed", metrics={"seconds": seconds}) for seconds in (20.0, 40.0)]
    rows.append(SimpleNamespace(status="failed", metrics={}))
    rows.append(SimpleNamespace(status="unfinished", metrics={}))
    assert board.time_left(rows[2:]) is None, "nothing has been completed"
    assert board.time_left(rows) == 6 * 30  # of nine trials three have ended
    for worker in ("here", "elsewhere"):
        oracle.create_trial(worker)
    assert board.time_left(rows) == 6 * 30 / 2
