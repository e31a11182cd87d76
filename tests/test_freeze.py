"""What must not change by itself: the results of a dozen small runs, and that earlier runs and searches resume."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from cifar10_trainer import runtime

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
# Of scripts/freeze.py's record, what results depend on. The kernel is not among it.
SAME = ("python", "tensorflow", "keras", "numpy", "processor", "gpus")


def run(*words):
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_results_of_a_dozen_runs_are_those_that_were_recorded(tmp_path):
    """Digests differ between machines and versions, so this compares only on the kind of machine that made the record."""
    record = json.loads((DATA / "freeze.json").read_text())
    here = runtime.describe()
    different = [name for name in SAME if here[name] != record["environment"][name]]
    if different:
        pytest.skip(
            f"tests/data/freeze.json is of another {', '.join(different)}; make one with scripts/freeze.py"
        )
    run("scripts/freeze.py", f"--out={tmp_path / 'now.json'}")
    assert json.loads((tmp_path / "now.json").read_text())["runs"] == record["runs"]


def test_a_run_of_version_1_0_0_resumes(tmp_path):
    """It was stopped at step 80 of 600. The epochs it had stay as they are, and the rest follow."""
    folder = tmp_path / "run"
    shutil.copytree(DATA / "run-1.0.0", folder)
    before = rows(folder / "history.csv")
    flags = [
        "--set",
        "options.filters=[4,8,8]",
        "--set",
        "averaging.every=3",
        "--epochs=30",
        "--precision=float32",
    ]
    out = run("-m", "cifar10_trainer", "--dataset=digits", *flags, f"--workdir={folder}")
    after = rows(folder / "history.csv")
    assert "resumed at step 80 of 600" in out and len(before) == 4
    assert after[:4] == before and [row["epoch"] for row in after] == [str(i) for i in range(1, 31)]
    # Trained from the start, this run reaches 100% validation accuracy; a lost optimizer or schedule would show.
    assert max(float(row["val_accuracy"]) for row in after) > 0.97
    assert json.loads((folder / "metrics.json").read_text())["test_accuracy"] > 0.95
    assert keras.models.load_model(folder / "model.keras").count_params() == 3512
