"""The comparison of tuners: searches from made-up trials by hand, the document that shows it, and the whole in miniature."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import statistics
from pathlib import Path

import compare_tuners
import pytest

from cifar10_trainer import RECIPES, cli
from cifar10_trainer.__main__ import read_config
from results import tuners
from tuning.options import DEFAULT_TUNER

pytestmark = pytest.mark.filterwarnings(
    # KerasTuner 1.4.8 asks the threading module by its old names.
    "ignore:(currentThread|getName)\\(\\) is deprecated:DeprecationWarning"
)


ROOT = Path(__file__).resolve().parent.parent
SPACE = {"filters": [8], "dropout": [0.0], "learning_rate": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}


def search(tuner, budget, way="annealed"):
    """A search in which a trial has the accuracy learning rate x share of a full trial; with `fit`, one for each third."""
    asked = []

    def result_of(trial):
        asked.append(trial)
        after = [trial["learning_rate"] * n / 3 for n in range(1, trial["thirds"] + 1)]
        return {**trial, "val_accuracy": after if way == "fit" else after[-1]}

    curve = tuners.search(tuners.Contender(tuner, tuner, way), 0, SPACE, result_of, budget)
    return curve, asked


def costs(curve):
    spent = [0, *(s for s, _ in curve)]
    return [round(b - a, 2) for a, b in itertools.pairwise(spent)]


def test_random_search_spends_a_full_trial_on_each_point():
    curve, asked = search("random", 4)
    assert costs(curve) == [1, 1, 1, 1]
    rates = [trial["learning_rate"] for trial in asked[:4]]
    assert [accuracy for _, accuracy in curve] == pytest.approx(list(itertools.accumulate(rates, max)))
    whole, asked = search("random", 20)
    assert len(whole) == 6 and whole[-1][1] == pytest.approx(0.6)  # nothing twice, and it ends with the space


def test_halving_spends_a_third_on_a_short_trial_and_trains_the_best_of_three_anew():
    curve, asked = search("halving", 2)
    assert costs(curve)[:4] == [0.33, 0.33, 0.33, 1]
    assert [trial["thirds"] for trial in asked[:4]] == [1, 1, 1, 3]
    assert asked[3]["learning_rate"] == max(trial["learning_rate"] for trial in asked[:3])


def test_hyperband_with_fit_continues_a_promoted_trial():
    curve, asked = search("hyperband", 2, "fit")
    # a bracket of three short trials, of which the best goes on for the other two thirds
    assert costs(curve)[:4] == [0.33, 0.33, 0.33, 0.67]
    assert [trial["thirds"] for trial in asked[:4]] == [1, 1, 1, 3]
    assert curve[3][1] == pytest.approx(max(trial["learning_rate"] for trial in asked[:3]))


def test_a_continued_trial_has_the_accuracies_of_its_own_part_only():
    values = {"tuner/initial_epoch": 1, "tuner/epochs": 3}
    assert tuners.stretch("fit", values) == (1, 3)
    assert tuners.stretch("annealed", values | {"tuner/share": 1 / 3}) == (0, 1)  # begins anew
    assert tuners.stretch("annealed", {}) == (0, 3)


def test_numbers_of_a_curve():
    curve = [(1.0, 0.5), (2.0, 0.5), (3.0, 0.8)]
    assert [tuners.best_after(curve, spent) for spent in (0.5, 1, 2.5, 3, 9)] == [0.0, 0.5, 0.5, 0.8, 0.8]
    assert tuners.spent_until(curve, 0.8) == 3.0 and tuners.spent_until(curve, 0.9) == math.inf
    assert tuners.share_ahead([1, 2], [1, 3]) == pytest.approx((0.5 + 0 + 1 + 0) / 4)


def test_the_target_is_what_the_best_twentieth_of_the_space_reaches():
    trials = [
        {
            "way": "annealed",
            "filters": n,
            "dropout": 0,
            "learning_rate": 1,
            "thirds": 3,
            "val_accuracy": n / 100,
        }
        for n in range(1, 41)
    ]
    short = {**trials[-1], "thirds": 1, "val_accuracy": 0.99}
    assert tuners.hard_target([*trials, short]) == 0.39  # the second best of 40


def test_the_table():
    curves = {
        "`random`": [[(1, 0.5), (11, 0.7)], [(1, 0.6), (11, 0.6)], [(1, 0.4), (11, 0.8)]],
        "other": [[(1, 0.6), (11, 0.9)], [(1, 0.6), (12, 0.9)], [(1, 0.6), (13, 0.95)]],
    }
    _, _, random, other = (
        re.split(r"\s*\|\s*", line)[1:-1] for line in tuners.table(curves, 0.9).splitlines()
    )
    assert random == ["`random`", "3", "50.00% (45.00-55.00)", "0.50", "70.00% (65.00-75.00)", "0.50", "-"]
    assert other == ["other", "3", "60.00% (60.00-60.00)", "0.83", "90.00% (90.00-92.50)", "1.00", "12.0"]


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


def test_the_document_shows_the_record():
    record = tuners.read(tuners.FOLDER / tuners.TRIALS)
    curves = tuners.read(tuners.FOLDER / tuners.SEARCHES)["curves"]
    assert list(curves) == [c.name for c in tuners.CONTENDERS]
    table = tuners.table(curves, tuners.hard_target(record["trials"]))
    assert table in (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    found = {tuners.key(trial): trial for trial in record["trials"]}
    space = compare_tuners.space(RECIPES["fast.85"])
    for contender in tuners.CONTENDERS:
        if contender.tuner != "bayesian":  # its process takes half a minute
            curve = tuners.search(contender, 1, space, lambda trial: found[tuners.key(trial)])
            assert [list(point) for point in curve] == curves[contender.name][1]


def test_the_default_tuner_is_the_one_ahead():
    curves = tuners.read(tuners.FOLDER / tuners.SEARCHES)["curves"]
    target = tuners.hard_target(tuners.read(tuners.FOLDER / tuners.TRIALS)["trials"])
    reached = {
        n: sum(tuners.spent_until(c, target) <= tuners.BUDGET for c in own) for n, own in curves.items()
    }
    share = 100 * reached["`random`"] / len(curves["`random`"])
    assert reached[f"`{DEFAULT_TUNER}`"] == len(curves[f"`{DEFAULT_TUNER}`"])
    text = " ".join((ROOT / "docs" / "search.md").read_text(encoding="utf-8").split())
    assert f"after 20, all of its searches have one, and {share:.0f}% of `random`'s" in text
    for spent in (tuners.BUDGET / 2, tuners.BUDGET):
        medians = {
            name: statistics.median(tuners.best_after(curve, spent) for curve in own)
            for name, own in curves.items()
        }
        assert medians[f"`{DEFAULT_TUNER}`"] == max(medians.values())


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
    command = [
        "compare",
        "--recipe=fast.digits",
        "--epochs=1",
        "--seeds=2",
        "--fit_seeds=2",
        f"--out={tmp_path}",
    ]
    assert cli.run(compare_tuners.main, compare_tuners.FLAGS, compare_tuners.USAGE, command) == 0
    out = capsys.readouterr().out
    assert all(f"| {c.name} |" in out for c in tuners.CONTENDERS)
    record = json.loads((tmp_path / "trials.json").read_text())
    ways = [(t["way"], t["thirds"]) for t in record["trials"]]
    assert ways == [("annealed", 3), ("annealed", 1), ("fit", 1)]  # a space of one point: nothing is promoted
    (session,) = record["sessions"]
    assert session["environment"]["tensorflow"] and record["dataset"] == "digits"
    assert {t["session"] for t in record["trials"]} == {0}
    full, *short = (t["pflop"] for t in record["trials"])
    assert short == pytest.approx([full / 3, full / 3], rel=0.1)  # of some 7 steps, so half of one is 7%
    accuracies = [t["val_accuracy"] for t in record["trials"]]
    assert all(0 < a < 1 for a in (*accuracies[:2], *accuracies[2])) and len(accuracies[2]) == 1

    # again: nothing is left to train, and another length does not mix with the record
    monkeypatch.setattr(compare_tuners, "train", None)
    monkeypatch.setattr(compare_tuners, "fit", None)
    assert cli.run(compare_tuners.main, compare_tuners.FLAGS, compare_tuners.USAGE, command) == 0
    other = [*command, "--epochs=2"]
    assert cli.run(compare_tuners.main, compare_tuners.FLAGS, compare_tuners.USAGE, other) == 2
    assert "is of epochs 1.0, not 2.0" in capsys.readouterr().err
