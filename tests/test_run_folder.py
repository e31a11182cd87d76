"""The run folder: what its files hold."""

from __future__ import annotations

import numpy as np
import pytest

from cifar10_trainer.errors import ConfigError, RunError
from cifar10_trainer.run_folder import HISTORY_COLUMNS, FoldsFolder, RunFolder
from tuning.search_folder import SearchFolder


def test_a_run_that_begins_anew_has_no_curves_of_the_one_before(tmp_path):
    """As after a kill before the first state: TensorBoard would draw both."""
    folder = RunFolder(tmp_path)
    folder.tensorboard.joinpath("train").mkdir(parents=True)
    folder.tensorboard.joinpath("train", "events").write_text("x")
    folder.write_config({}, resumed=True)
    assert (folder.tensorboard / "train" / "events").exists()
    folder.write_config({}, resumed=False)
    assert not folder.tensorboard.exists()


@pytest.mark.parametrize("name", ["figures", "tensorboard"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_the_training(name, tmp_path):
    (tmp_path / name).write_text("")
    (tmp_path / "config.json").write_text('{"recipe": "mine"}')
    with pytest.raises(ConfigError, match=f"{name} is a file; choose another"), RunFolder(tmp_path).lock():
        pytest.fail("locked")
    assert (tmp_path / name).read_text() == ""


def test_history_survives_a_round_trip_exactly(tmp_path):
    rows = [
        {"epoch": 1, "loss": 0.1 + 0.2, "accuracy": np.float32(0.7), "val_loss": None, "val_accuracy": None},
        {"epoch": 2.9, "loss": float("inf"), "accuracy": 1.0, "val_loss": 1e-300, "learning_rate": 0.1},
    ]
    RunFolder(tmp_path).write_history(rows)
    first, second = RunFolder(tmp_path).read_history()
    assert tuple(first) == (
        "epoch",
        "loss",
        "accuracy",
        "val_loss",
        "val_accuracy",
        "learning_rate",
        "seconds",
    )
    assert first["epoch"] == 1 and isinstance(first["epoch"], int)
    assert first["loss"] == 0.1 + 0.2 and first["accuracy"] == float(np.float32(0.7))
    assert first["val_loss"] is None and first["seconds"] is None
    assert second["epoch"] == 2.9 and second["loss"] == float("inf") and second["val_loss"] == 1e-300
    text = (tmp_path / "history.csv").read_text()
    assert text.splitlines()[0] == "epoch,loss,accuracy,val_loss,val_accuracy,learning_rate,seconds"
    assert text.splitlines()[1] == "1,0.30000000000000004,0.699999988079071,,,,"


def test_history_without_rows(tmp_path):
    RunFolder(tmp_path).write_history([])
    assert RunFolder(tmp_path).read_history() == []


def test_history_refuses_other_columns_and_leaves_the_file_alone(tmp_path):
    path = tmp_path / "history.csv"
    RunFolder(tmp_path).write_history([{"epoch": 1}])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="speed"):
        RunFolder(tmp_path).write_history([{"epoch": 1, "speed": 3}])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"epoch,loss\n1,2\n", b"\xff\xfe\x00", None])
def test_history_that_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "history.csv").write_bytes(content)
    with pytest.raises(RunError, match=r"cannot read .*history\.csv"):
        RunFolder(tmp_path).read_history()


def test_history_with_a_word_or_a_torn_row(tmp_path):
    path = tmp_path / "history.csv"
    head = ",".join(HISTORY_COLUMNS)
    for row in ("1,high,,,,,", "1,0.5"):
        path.write_text(f"{head}\n{row}\n")
        with pytest.raises(RunError, match="cannot read"):
            RunFolder(tmp_path).read_history()


def test_names_of_files_may_hold_any_character(tmp_path):
    rows = [
        ("a/x\r.png", "a", "train"),
        ('b/"y", z\n.png', "b\r", "test"),
        ("c/\udcff.png", "c", "validation"),
    ]
    folder = RunFolder(tmp_path)
    folder.write_split(rows)
    assert folder.read_split() == rows


@pytest.mark.parametrize(
    ("folder", "own", "files", "held"),
    [
        (RunFolder, "run", ["folds.json"], "cross-validation"),
        (RunFolder, "run", ["fold-1-of-3/config.json"], "cross-validation"),
        (RunFolder, "run", ["search.json"], "search"),
        (FoldsFolder, "cross-validation", ["config.json", "metrics.json"], "run"),
        (FoldsFolder, "cross-validation", ["search.json"], "search"),
        (SearchFolder, "search", ["config.json", "metrics.json"], "run"),
        (SearchFolder, "search", ["folds.json"], "cross-validation"),
    ],
)
def test_a_folder_holds_one_kind_of_thing(folder, own, files, held, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"recipe": "fast.85"}')
    with (
        pytest.raises(ConfigError, match=f"holds a {held}; choose another --workdir for a {own}"),
        folder(tmp_path).lock(),
    ):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(name.split("/")[0] for name in files)
