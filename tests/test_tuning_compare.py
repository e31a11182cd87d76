"""The comparison of tuners: searches from made-up trials by hand, the document that shows it, and the whole in miniature."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import compare_tuners
import pytest

from cifar10_trainer import RECIPES, cli
from cifar10_trainer.__main__ import read_config
from results import tuners

pytestmark = pytest.mark.filterwarnings(
    # KerasTuner 1.4.8 asks the threading module by its old names.
    "ignore:(currentThread|getName)\\(\\) is deprecated:DeprecationWarning"
)


ROOT = Path(__file__).resolve().parent.parent
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def space(accuracy):
    """The trials of a space of six learning rates: `accuracy(rate, share)` of the annealed ones, 0.2 more with `fit`."""
    trials = []
    for rate in RATES:
        cell = {"filters": 8, "dropout": 0.0, "learning_rate": rate}
        for share in (1.0, 1 / 3):
            trials.append(
                {
                    "way": "annealed",
                    **cell,
                    "share": share,
                    "val_accuracy": accuracy(rate, share),
                    "pflop": 6 * share,
                }
            )
        after = [accuracy(rate, n / 3) + 0.2 for n in (1, 2, 3)]
        trials.append({"way": "fit", **cell, "share": 1.0, "val_accuracy": after, "pflop": 6.0})
    return trials


def contender(tuner, way="annealed"):
    return tuners.Contender(tuner, tuner, way)


def test_random_search_spends_a_full_trial_on_each_point():
    curve = tuners.replay(contender("random"), 0, space(lambda rate, share: rate * share), 4)
    assert [spent for spent, _ in curve] == [1, 2, 3, 4]
    best = [accuracy for _, accuracy in curve]
    assert best == sorted(best) and set(best) <= set(RATES)
    whole = tuners.replay(contender("random"), 0, space(lambda rate, share: rate * share), 20)
    assert len(whole) == 6 and whole[-1][1] == 0.6  # it proposes nothing twice, and ends with the space


def test_halving_spends_a_third_on_a_short_trial_and_trains_the_best_of_three_anew():
    curve = tuners.replay(contender("halving"), 0, space(lambda rate, share: rate * share), 2)
    costs = [b - a for a, b in zip([0, *(s for s, _ in curve)], [s for s, _ in curve], strict=False)]
    assert costs == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1], abs=2e-3)
    best_short = curve[2][1]
    assert curve[3][1] == pytest.approx(3 * best_short)  # the same point, at full length


def test_hyperband_with_fit_continues_a_promoted_trial():
    trials = space(lambda rate, share: rate * share)
    curve = tuners.replay(contender("hyperband", "fit"), 0, trials, 2)
    costs = [b - a for a, b in zip([0, *(s for s, _ in curve)], [s for s, _ in curve], strict=False)]
    # a bracket of three short trials, of which the best goes on for the other two thirds
    assert costs[:4] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3], abs=2e-3)
    assert curve[3][1] == pytest.approx(3 * (curve[2][1] - 0.2) + 0.2)


def test_a_trial_of_fit_has_the_best_accuracy_of_the_epochs_that_it_trains():
    trial = {"way": "fit", "filters": 8, "dropout": 0.0, "learning_rate": 0.1, "share": 1.0}
    trial |= {"val_accuracy": [0.7, 0.5, 0.6], "pflop": 6.0}
    values = {"filters": 8, "dropout": 0.0, "learning_rate": 0.1}
    found = {tuners.key(trial): trial}
    for first, last, expected in ((0, 1, (0.7, 2.0)), (1, 3, (0.6, 4.0)), (0, 3, (0.7, 6.0))):
        assert (
            tuners.look_up("fit", values | {"tuner/initial_epoch": first, "tuner/epochs": last}, found)
            == expected
        )


def test_numbers_of_a_curve():
    curve = [(1.0, 0.5), (2.0, 0.5), (3.01, 0.8)]
    assert [tuners.best_after(curve, spent) for spent in (0.5, 1, 2.5, 3, 9)] == [0.0, 0.5, 0.5, 0.8, 0.8]
    assert tuners.spent_until(curve, 0.8) == 3.01 and tuners.spent_until(curve, 0.9) == math.inf
    assert tuners.share_ahead([1, 2], [1, 3]) == pytest.approx((0.5 + 0 + 1 + 0) / 4)


def test_the_target_is_what_the_best_twentieth_of_the_space_reaches():
    trials = [
        {
            "way": "annealed",
            "filters": n,
            "dropout": 0,
            "learning_rate": 1,
            "share": 1.0,
            "val_accuracy": n / 100,
        }
        for n in range(1, 41)
    ]
    short = {**trials[-1], "share": 1 / 3, "val_accuracy": 0.99}
    assert tuners.hard_target([*trials, short]) == 0.39  # the second best of 40


def test_the_table():
    curves = {
        "`random`": [[(1, 0.5), (11, 0.7)], [(1, 0.6), (11, 0.6)], [(1, 0.4), (11, 0.8)]],
        "other": [[(1, 0.6), (11, 0.9)], [(1, 0.6), (12, 0.9)], [(1, 0.6), (13, 0.95)]],
    }
    _, _, random, other = (
        re.split(r"\s*\|\s*", line)[1:-1] for line in tuners.table(curves, 0.9).splitlines()
    )
    assert random == ["`random`", "50.00% (45.00-55.00)", "0.50", "70.00% (65.00-75.00)", "0.50", "-"]
    assert other == ["other", "60.00% (60.00-60.00)", "0.83", "90.00% (90.00-92.50)", "1.00", "12.0"]


@pytest.mark.parametrize("filters", [16, 32, 48])
def test_full_trials_have_equal_flops(filters):
    from cifar10_trainer import models

    base = RECIPES["fast.85"].override(epochs=1.0)
    cell = {"filters": filters, "dropout": 0.1, "learning_rate": 0.5}
    config = compare_tuners.configure(base, cell)
    assert config.options["filters"] == (filters, 4 * filters, 4 * filters)
    assert (config.options["dropout"], config.optimizer.learning_rate) == (0.1, 0.5)

    def work(c):
        model = models.build(c, input_shape=(32, 32, 3), num_classes=10)
        return c.epochs * sum(models.forward_flops(model, side) for side in (20, 24, 32))

    assert work(config) == pytest.approx(work(base), rel=1e-3)


def test_the_document_describes_the_search_of_the_record():
    with open(ROOT / "results" / "search" / "leaderboard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    best, recipe = rows[0], next(r for r in rows if r["trial"] == "1")
    assert len(rows) == 20 and {r["epochs"] for r in rows} == {"3"}
    assert float(best["val_accuracy"]) == max(float(r["val_accuracy"]) for r in rows)
    found, began = (100 * float(r["val_accuracy"]) for r in (best, recipe))
    text = " ".join((ROOT / "docs" / "search.md").read_text(encoding="utf-8").split())
    assert f"after {float(recipe['ended']):.0f} seconds" in text
    assert (
        f"{found:.2f}% validation accuracy, {found - began:.2f} points above the recipe's {began:.2f}%"
        in text
    )
    config = read_config(ROOT / "results" / "search" / "best_config.json")
    assert config.options["filters"][0] == int(best["hp.filters"])


def test_in_miniature(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_tuners, "FILTERS", (0.5,))
    monkeypatch.setattr(compare_tuners, "DROPOUT", (0.0,))
    monkeypatch.setattr(compare_tuners, "LEARNING_RATE", (1,))
    monkeypatch.setattr(tuners, "BUDGET", 2)
    command = ["compare", "--recipe=fast.digits", "--epochs=1", "--seeds=2", f"--out={tmp_path}"]
    assert cli.run(compare_tuners.main, compare_tuners.FLAGS, compare_tuners.USAGE, command) == 0
    out = capsys.readouterr().out
    assert all(f"| {c.name} |" in out for c in tuners.CONTENDERS)
    record = json.loads((tmp_path / "trials.json").read_text())
    ways = [(t["way"], round(t["share"], 2)) for t in record["trials"]]
    assert ways == [("annealed", 1.0), ("annealed", 0.33), ("fit", 1.0)]
    assert record["environment"]["tensorflow"] and record["dataset"] == "digits"
    full, short, fit = (t["pflop"] for t in record["trials"])
    assert [short, fit] == pytest.approx([full / 3, full], rel=0.1)  # of some 20 steps, so half of one is 3%
    for trial in record["trials"]:
        accuracies = trial["val_accuracy"] if trial["way"] == "fit" else [trial["val_accuracy"]]
        assert len(accuracies) in (1, 3) and all(0 < a < 1 for a in accuracies)

    # again: nothing is left to train, and another length does not mix with the record
    monkeypatch.setattr(compare_tuners, "train", None)
    monkeypatch.setattr(compare_tuners, "fit", None)
    assert cli.run(compare_tuners.main, compare_tuners.FLAGS, compare_tuners.USAGE, command) == 0
    other = [*command, "--epochs=2"]
    assert cli.run(compare_tuners.main, compare_tuners.FLAGS, compare_tuners.USAGE, other) == 2
    assert "is of epochs 1.0, not 2.0" in capsys.readouterr().err
