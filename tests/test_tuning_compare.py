"""The comparison of tuners: records and table by hand, the document that shows them, and the whole in miniature."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import compare_tuners
import pytest

from cifar10_trainer import cli
from cifar10_trainer.__main__ import read_config
from results import tuners
from tuning.leaderboard import Row

pytestmark = pytest.mark.filterwarnings(
    # KerasTuner 1.4.8 asks the threading module by its old names.
    "ignore:(currentThread|getName)\\(\\) is deprecated:DeprecationWarning"
)


ROOT = Path(__file__).resolve().parent.parent


def row(trial, accuracy, ended):
    if accuracy is None:
        return Row(trial, "failed", ended=ended)
    return Row(
        trial, "completed", metrics={"val_accuracy": accuracy, "pflop": 0.5, "epochs": 3.0}, ended=ended
    )


def test_a_record_counts_what_was_spent_until_the_target():
    rows = [row(4, 0.9, 40.0), row(3, 0.86, 30.0), row(1, 0.8, 10.0), row(2, None, 20.0)]
    record = tuners.make_record({"target": 0.85}, rows)
    assert record["reached"]
    assert record["spent"] == {"trials": 3, "pflop": 1.0, "seconds": 30.0}
    assert record["best_val_accuracy"] == 0.9
    assert [t["trial"] for t in record["runs"]] == [1, 2, 3, 4]
    assert not tuners.make_record({"target": 0.95}, rows)["reached"]


def test_the_table_is_compute_per_success():
    def record(tuner, reached, pflop):
        spent = {"trials": 4, "pflop": pflop, "seconds": 100.0}
        return {"tuner": tuner, "reached": reached, "spent": spent, "best_val_accuracy": 0.86}

    lines = tuners.table(
        [record("random", True, 1.0), record("random", False, 3.0), record("halving", False, 2.0)]
    )
    _, random, halving = (re.split(r"\s{2,}", line) for line in lines.splitlines())
    # (1 + 3) PFLOP, 8 trials and 200 seconds for the one success
    assert random == ["random", "1 of 2", "8.0", "4", "200", "1 3+", "86.00% ± 0.00"]
    assert halving == ["halving", "0 of 1", "-", "-", "-", "2+", "86.00%"]


def test_the_document_shows_the_table_of_the_records():
    records = tuners.read(ROOT / "results" / "tuners")
    assert len(records) == 12
    assert tuners.table(records) in (ROOT / "docs" / "search.md").read_text(encoding="utf-8")


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
    monkeypatch.chdir(tmp_path)
    command = (
        "compare --tuners=random,halving --seeds=0 --max_trials=2 --target=0.05 --dataset=digits --epochs=0.2"
    )
    command += " --recipe=fast.digits --space=dropout"
    assert cli.run(compare_tuners.main, compare_tuners.FLAGS, compare_tuners.USAGE, command.split()) == 0
    assert "random   1 of 1" in capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in (tmp_path / "results" / "tuners").iterdir()]
    assert {(r["tuner"], r["seed"], r["reached"], r["spent"]["trials"]) for r in records} == {
        ("random", 0, True, 1),
        ("halving", 0, True, 1),
    }
    assert all(len(r["runs"]) == 1 and r["environment"]["tensorflow"] for r in records)

    # again: nothing is left to do, and other settings do not mix with the records
    monkeypatch.setattr("tuning.trial.train_and_evaluate", None)
    assert cli.run(compare_tuners.main, compare_tuners.FLAGS, compare_tuners.USAGE, command.split()) == 0
    other = command.replace("target=0.05", "target=0.06").split()
    assert cli.run(compare_tuners.main, compare_tuners.FLAGS, compare_tuners.USAGE, other) == 2
    assert "has a record of target 0.05, not 0.06" in capsys.readouterr().err
