"""k-fold cross-validation on the embedded digits: the parts, the summary, resuming, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import statistics

import numpy as np
import pytest
from PIL import Image

from cifar10_trainer import __main__ as command
from cifar10_trainer import (
    cli,
    cross_validate,
    cross_validation,
    datasets,
    evaluate,
    machine,
    precision,
    runtime,
)
from cifar10_trainer.config import Config, Optimizer
from cifar10_trainer.errors import ConfigError, FolderBusyError, RunError, RunInterrupted
from cifar10_trainer.recipes import RECIPES
from cifar10_trainer.run_folder import FoldsFolder, RunFolder
from cifar10_trainer.training import train_and_evaluate

TINY = RECIPES["fast.digits"].override(
    options__filters=(4, 8),
    epochs=1,
    batch_size=100,
    optimizer=Optimizer(name="adam", learning_rate=0.02),
    precision="float32",
)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture
def scripted(monkeypatch):
    """Runs that find 0.5, 0.6, 0.7 ... and leave what a run leaves, without training; what they were called with."""
    calls = []

    def train(config, workdir, **more):
        calls.append({"config": config, "workdir": workdir, **more})
        metrics = {"best_val_accuracy": 0.5 + config.validation_fold / 10, "n_validation": 7, "epochs": 1}
        metrics |= {"best_epoch": 1, "train_seconds": 2.0}
        metrics["precision"], _ = runtime.choose_precision(config.precision)
        workdir.mkdir(parents=True, exist_ok=True)
        found = {"command": "x", "fingerprint": datasets.fingerprint(more["dataset"])}
        (workdir / "config.json").write_text(json.dumps({**config.to_dict(), **found}))
        (workdir / "metrics.json").write_text(json.dumps(metrics))
        return metrics

    monkeypatch.setattr(cross_validation, "train_and_evaluate", train)
    return calls


def quietly(folds, workdir, dataset, config=TINY, **options):
    return cross_validate(config, folds, workdir, dataset=dataset, verbose=0, **options)


def test_two_folds_from_end_to_end(tmp_path, digits, capsys):
    argv = [
        "cifar10_trainer",
        "--config",
        str(tmp_path / "tiny.json"),
        "--folds=2",
        "--workdir",
        str(tmp_path / "cv"),
    ]
    (tmp_path / "tiny.json").write_text(json.dumps(TINY.to_dict()))
    command.FLAGS.unparse_flags()
    assert cli.run(command.main, command.FLAGS, command.USAGE, argv) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "cv" / "folds.json").read_text())
    found = []
    for fold in (1, 2):
        folder = tmp_path / "cv" / f"fold-{fold}-of-2"
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["n_train"] + metrics["n_validation"] == len(digits.train_labels) == summary["n_train"]
        assert metrics["n_test"] == 0 and metrics["test_accuracy"] is None
        assert (folder / "report.html").exists()
        # What it was scored on is the part that its config.json names, as the saved model sees it.
        config = Config.from_record(json.loads((folder / "config.json").read_text()))
        assert config == TINY.override(validation_fraction=0.5, validation_fold=fold - 1)
        images, labels = evaluate.select(digits, "validation", config.to_dict())
        model = evaluate.load_model(folder / "model.keras")
        right = (model.predict(images, verbose=0).argmax(1) == labels).mean()
        assert metrics["best_val_accuracy"] == pytest.approx(right, abs=1e-6)
        found.append(metrics["best_val_accuracy"])
    assert [run["val_accuracy"] for run in summary["runs"]] == found
    assert summary["val_accuracy_mean"] == pytest.approx(sum(found) / 2)
    assert summary["val_accuracy_std"] == pytest.approx(abs(found[0] - found[1]) / np.sqrt(2))
    assert f"2 folds: validation accuracy {50 * sum(found):.2f}% ± " in out


@pytest.mark.parametrize("after", [1, 2])
def test_a_folder_that_is_removed_meanwhile_ends_it(after, tmp_path, digits, scripted, monkeypatch):
    """Otherwise it would be made again, with folds.json over runs that are gone."""
    row = cross_validation._row

    def removing(number, run):
        if number == after:
            shutil.rmtree(tmp_path / "cv")
        return row(number, run)

    monkeypatch.setattr(cross_validation, "_row", removing)
    with pytest.raises(RunError, match="cv: it was removed or replaced meanwhile"):
        quietly(2, tmp_path / "cv", digits)
    assert not (tmp_path / "cv").exists()


def test_the_summary_is_mean_and_spread(tmp_path, digits, scripted, capsys):
    summary = cross_validate(TINY, 3, tmp_path, dataset=digits)
    assert json.loads((tmp_path / "folds.json").read_text()) == summary
    # 0.5, 0.6, 0.7: mean 0.6, standard deviation of the sample 0.1.
    assert summary["val_accuracy_mean"] == pytest.approx(0.6)
    assert summary["val_accuracy_std"] == pytest.approx(0.1)
    assert [run["fold"] for run in summary["runs"]] == [1, 2, 3]
    assert "3 folds: validation accuracy 60.00% ± 10.00 (50.00, 60.00, 70.00)" in capsys.readouterr().out


def test_no_run_is_given_the_test_images_or_the_clock_of_another(tmp_path, digits, scripted):
    quietly(3, tmp_path, digits, overwrite=True, data_dir="here")
    for call in scripted:
        assert len(call["dataset"].test_images) == len(call["dataset"].test_labels) == 0
        np.testing.assert_array_equal(call["dataset"].train_images, digits.train_images)
        assert call["overwrite"] and call["data_dir"] == "here"
    starts = [call["since"] for call in scripted]
    assert starts == sorted(starts) and len(set(starts)) == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_cross_validation_in_the_folder_is_refused_before_it_changes_anything(
    overwrite, tmp_path, digits, scripted
):
    (tmp_path / "fold-1-of-2").mkdir()
    (tmp_path / "fold-1-of-2" / "model.keras").write_text("of the other one")
    with (
        FoldsFolder(tmp_path).lock(),
        pytest.raises(FolderBusyError, match="another cross-validation is at work in"),
    ):
        quietly(2, tmp_path, digits, overwrite=overwrite)
    assert (tmp_path / "fold-1-of-2" / "model.keras").read_text() == "of the other one" and scripted == []


def test_a_split_of_the_recipe_does_not_matter(tmp_path, digits, scripted):
    quietly(2, tmp_path, digits, TINY.override(validation_split="last", validation_fraction=0.3))
    assert [call["config"] for call in scripted] == [
        TINY.override(validation_fraction=0.5, validation_fold=fold) for fold in (0, 1)
    ]


def test_a_fold_of_the_config_does_not_matter(tmp_path, digits, scripted):
    """Also one that these folds do not have, in a config that is adapted to the number of images."""
    config = TINY.override(validation_fraction=0.1, validation_fold=5, adapt=("validation_interval",))
    quietly(3, tmp_path, digits, config)
    assert [call["config"].validation_fold for call in scripted] == [0, 1, 2]


def test_finished_folds_of_other_images_are_refused(tmp_path, digits, scripted):
    quietly(2, tmp_path, digits)
    (tmp_path / "folds.json").unlink()
    images = digits.train_images.copy()
    images[0, 0, 0] ^= 1
    with pytest.raises(ConfigError, match=r"fold-1-of-2 holds a run on other images; .*--overwrite"):
        quietly(2, tmp_path, dataclasses.replace(digits, train_images=images))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_signal_too_late_for_one_fold_stops_before_the_next(
    tmp_path, digits, scripted, monkeypatch, overwrite
):
    once = cross_validation.train_and_evaluate

    def late(config, workdir, **more):
        with runtime.Signals():  # as in a run whose last step is done
            os.kill(os.getpid(), signal.SIGTERM)
        return once(config, workdir, **more)

    monkeypatch.setattr(cross_validation, "train_and_evaluate", late)
    before = signal.getsignal(signal.SIGTERM)
    way_on = r"and without --overwrite$" if overwrite else rf"--workdir={tmp_path}$"
    with pytest.raises(RunInterrupted, match=f"stopped by SIGTERM before fold 2; .*{way_on}"):
        quietly(3, tmp_path, digits, overwrite=overwrite)
    assert len(scripted) == 1 and signal.getsignal(signal.SIGTERM) == before


def test_what_is_finished_is_not_run_again(tmp_path, digits, scripted, monkeypatch):
    once = cross_validation.train_and_evaluate

    def stopped(config, workdir, **more):
        if config.validation_fold == 1:
            raise RunInterrupted(f"stopped; go on with --workdir={workdir}")
        return once(config, workdir, **more)

    monkeypatch.setattr(cross_validation, "train_and_evaluate", stopped)
    with pytest.raises(RunInterrupted, match=rf"stopped in fold-2-of-3; .* --workdir={tmp_path}$"):
        quietly(3, tmp_path, digits)
    assert not (tmp_path / "folds.json").exists()
    monkeypatch.setattr(cross_validation, "train_and_evaluate", once)
    summary = quietly(3, tmp_path, digits)
    assert [call["config"].validation_fold for call in scripted] == [0, 1, 2]
    accuracies = [run["val_accuracy"] for run in summary["runs"]]
    assert accuracies == [0.5, 0.6, 0.7] and summary["val_accuracy_mean"] == statistics.mean(accuracies)


def test_all_folds_have_the_precision_of_the_first(tmp_path, digits, scripted, monkeypatch):
    """Also where the cross-validation is resumed on a machine that would choose another one."""
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_bf16"})
    config = TINY.override(precision="auto")

    def folds(folder):
        found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"{folder}/*/metrics.json"))]
        return [metrics["precision"] for metrics in found]

    for was, then, now in (("mixed_bfloat16", 0.5, 1.6), ("float32", 1.6, 0.5)):
        monkeypatch.setattr(precision, "bfloat16_ratio", lambda ratio=then: (ratio, "measured"))
        quietly(3, tmp_path / was, digits, config)
        for file in (tmp_path / was / "folds.json", *tmp_path.glob(f"{was}/fold-[23]-of-3/metrics.json")):
            file.unlink()
        monkeypatch.setattr(precision, "bfloat16_ratio", lambda ratio=now: (ratio, "measured"))
        quietly(3, tmp_path / was, digits, config)
        assert folds(was) == [was] * 3
        assert runtime.choose_precision("auto")[0] != was  # outside, nothing has changed


def test_a_finished_or_different_cross_validation_is_kept(tmp_path, digits, scripted):
    quietly(2, tmp_path, digits)
    with pytest.raises(ConfigError, match=r"holds a finished cross-validation; .*--overwrite"):
        quietly(2, tmp_path, digits)
    assert len(scripted) == 2
    quietly(2, tmp_path, digits, overwrite=True)
    assert len(scripted) == 4
    (tmp_path / "folds.json").unlink()
    with pytest.raises(
        ConfigError,
        match=r"fold-1-of-2 holds a run of another configuration \(seed 0, now 1\); .*--overwrite$",
    ):
        quietly(2, tmp_path, digits, TINY.override(seed=1))
    (tmp_path / "fold-1-of-2" / "metrics.json").write_text("{")
    with pytest.raises(RunError, match=r"fold-1-of-2 is damaged .*; delete it"):
        quietly(2, tmp_path, digits)


def test_folds_of_another_number_of_replicas_where_that_is_allowed(tmp_path, digits, scripted):
    """A finished fold counts as it is; the others are trained with the new strategy, and know that it may be new."""
    quietly(3, tmp_path, digits)
    for file in (tmp_path / "folds.json", tmp_path / "fold-2-of-3" / "metrics.json"):
        file.unlink()
    mirrored = TINY.override(strategy="mirrored")
    with pytest.raises(
        ConfigError,
        match=r"fold-1-of-3 holds a run .* \(strategy 'auto', now 'mirrored'\); .* or allow it with --allow_replica_change$",
    ):
        quietly(3, tmp_path, digits, mirrored)
    del scripted[:]
    quietly(3, tmp_path, digits, mirrored, allow_replica_change=True)
    (again,) = scripted
    assert again["workdir"] == tmp_path / "fold-2-of-3" and again["config"].strategy == "mirrored"
    assert again["allow_replica_change"] is True
    (tmp_path / "folds.json").unlink()
    with pytest.raises(ConfigError, match=r"fold-1-of-3 holds a run of another configuration"):
        quietly(3, tmp_path, digits, mirrored.override(seed=1), allow_replica_change=True)


def test_folds_of_other_replicas_are_not_mixed_in_silence(tmp_path, digits, scripted):
    """The same strategy by name, as auto on another machine."""
    quietly(2, tmp_path, digits)
    (tmp_path / "folds.json").unlink()
    file = tmp_path / "fold-1-of-2" / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "replicas": 3}))
    with pytest.raises(
        ConfigError, match=r"\(strategy of 3 replicas, now 1\); .* or allow it with --allow_replica"
    ):
        quietly(2, tmp_path, digits)
    assert quietly(2, tmp_path, digits, allow_replica_change=True)["folds"] == 2


def test_what_the_first_fold_chose_holds_for_all(tmp_path, digits, scripted):
    """Also where today's number of replicas would choose another batch."""
    config = TINY.override(adapt=("batch_size",))
    quietly(2, tmp_path, digits, config)
    for file in (tmp_path / "folds.json", tmp_path / "fold-2-of-2" / "metrics.json"):
        file.unlink()
    file = tmp_path / "fold-1-of-2" / "config.json"
    there = json.loads(file.read_text())
    file.write_text(json.dumps({**there, "batch_size": 6}))
    quietly(2, tmp_path, digits, config)
    assert there["batch_size"] != 6 and scripted[-1]["config"].batch_size == 6
    assert scripted[-1]["workdir"] == tmp_path / "fold-2-of-2"


@pytest.mark.parametrize("folds", [-1, 0, 1, 1000])
def test_folds_that_cannot_be(tmp_path, digits, scripted, folds):
    smallest = np.bincount(digits.train_labels).min()
    with pytest.raises(ConfigError, match=f"folds is {folds}; allowed: from 2 to the {smallest} images"):
        quietly(folds, tmp_path, digits)
    assert not scripted and not any(tmp_path.iterdir())


@pytest.mark.parametrize("folds", ["3", 2.5, None])
def test_folds_are_a_whole_number(tmp_path, digits, scripted, folds):
    with pytest.raises(ConfigError, match=f"folds is {folds!r}; allowed: a whole number from 2 on"):
        quietly(folds, tmp_path, digits)


def test_folds_in_the_folder_of_the_pictures_are_no_class(tmp_path, scripted):
    for name in ("dark", "light"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (8, 8), (i, 10 * len(name), 0)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "runs").mkdir()
    config = TINY.override(dataset="folder", image_size=8)
    cross_validate(config, 2, tmp_path / "runs", data_dir=str(tmp_path), verbose=0)
    assert scripted[0]["dataset"].class_names == ("dark", "light")


def test_a_folder_that_grew_does_not_change_the_folds_that_are_left(tmp_path, scripted):
    """They take the files of the first one."""
    pictures = tmp_path / "pictures"
    for name, level in (("dark", 30), ("light", 220)):
        (pictures / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (level + i, level, level)).save(pictures / name / f"{i}.png")
    config = TINY.override(dataset="folder", image_size=8)
    options = {"data_dir": str(pictures), "verbose": 0}
    cross_validate(config, 2, tmp_path / "whole", **options)
    first = scripted[0]["dataset"]
    half = RunFolder(tmp_path / "half" / "fold-1-of-2")
    half.path.mkdir(parents=True)
    half.write_config({**config.to_dict(), "data_dir": str(pictures)}, resumed=False)
    half.write_split(datasets.file_rows(first))
    half.write_state(config, {})
    Image.new("RGB", (8, 8), (1, 2, 3)).save(pictures / "dark" / "new.png")
    cross_validate(config, 2, tmp_path / "half", **options)
    np.testing.assert_array_equal(scripted[2]["dataset"].train_images, first.train_images)
    for path in half.path.glob("state*"):
        path.unlink()  # a fold that has not trained
    cross_validate(config, 2, tmp_path / "half", overwrite=True, **options)
    cross_validate(config, 2, tmp_path / "new", **options)
    for call in scripted[4:]:
        assert len(call["dataset"].train_images) > len(first.train_images)


def test_a_folder_with_validation_images_of_its_own_has_no_folds(tmp_path, digits, scripted):
    own = dataclasses.replace(digits, validation=(digits.test_images, digits.test_labels))
    with pytest.raises(ConfigError, match="validation images of its own; allowed: a folder without val/"):
        quietly(2, tmp_path, own)
    assert not scripted


def test_a_folder_that_is_none(digits, scripted):
    with pytest.raises(ConfigError, match="workdir is 3; allowed: a folder, or None"):
        quietly(2, 3, digits)


def test_a_cluster_is_refused(tmp_path, digits, scripted, monkeypatch):
    """Before the workers of TF_CONFIG are waited for."""
    cluster = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    with pytest.raises(
        ConfigError, match="TF_CONFIG names a cluster, but a cross-validation runs on one machine"
    ):
        quietly(2, tmp_path, digits)
    assert not scripted


def test_folds_of_arrays(tmp_path, digits, scripted):
    summary = quietly(2, tmp_path, (digits.train_images, digits.train_labels))
    assert summary["dataset"] == "arrays" and summary["n_train"] == len(digits.train_labels)


def test_folds_of_named_classes_of_arrays_as_train_takes_them(tmp_path, scripted):
    arrays = np.zeros((8, 16, 16, 3), np.uint8), np.arange(8) % 2
    cross_validate(TINY, 2, tmp_path, data=arrays, class_names=("cat", "owl"), verbose=0)
    assert [call["dataset"].class_names for call in scripted] == [("cat", "owl")] * 2
    with pytest.raises(ConfigError, match="data and data_dir are set; allowed: one of them"):
        cross_validate(TINY, 2, tmp_path / "other", data=arrays, data_dir=str(tmp_path))


@pytest.mark.parametrize("function", [train_and_evaluate, lambda config: cross_validate(config, 2)])
def test_a_name_is_no_config(function):
    with pytest.raises(
        ConfigError, match=r"config is 'fast.85'; allowed: a Config, such as RECIPES\['fast.85'\]"
    ):
        function("fast.85")


def test_overwrite_removes_the_other_folds_when_training_begins_and_not_sooner(tmp_path, digits):
    tiny = TINY.override(epochs=0.2)
    quietly(3, tmp_path, digits, tiny)
    before = (tmp_path / "folds.json").read_bytes()
    with pytest.raises(ConfigError, match="batch_size is 4096"):
        quietly(2, tmp_path, digits, tiny.override(batch_size=4096), overwrite=True)
    assert (tmp_path / "folds.json").read_bytes() == before
    assert all((tmp_path / f"fold-{i}-of-3" / "metrics.json").exists() for i in (1, 2, 3))
    quietly(2, tmp_path, digits, tiny, overwrite=True)
    assert json.loads((tmp_path / "folds.json").read_text())["folds"] == 2
    assert sorted(path.parent.name for path in tmp_path.glob("*/metrics.json")) == [
        "fold-1-of-2",
        "fold-2-of-2",
    ]


def test_a_file_in_the_place_of_the_folder(tmp_path, digits):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="file") as error:
        quietly(2, tmp_path / "file", digits)
    assert "\n" not in str(error.value) and (tmp_path / "file").read_text() == "mine"
