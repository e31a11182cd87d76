"""k-fold cross-validation: one Config -> k runs, each validated on another part -> mean and spread.

Each training image is a validation image of exactly one run. The test images are not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import numbers
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from . import cluster, datasets, machine, preparation, process, runtime
from .adaptation import adapt, in_words
from .config import Config
from .datasets import Dataset
from .errors import ConfigError, RunError, RunInterrupted, check_type, interrupted
from .files import new_workdir
from .keras_state import keras_defaults
from .loop import SAVE_SECONDS
from .run_folder import FOLDS_FILE, FoldsFolder, RunFolder, difference, fold_folder, or_allow_it
from .training import train_and_evaluate

# what it takes over from the metrics of each run
TAKEN = ("n_validation", "epochs", "best_epoch", "train_seconds")


@keras_defaults()
@process.enduring_output()
def cross_validate(
    config: Config,
    folds: int,
    workdir: str | os.PathLike | None = None,
    *,
    data: Any = None,
    class_names: Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    dataset: Dataset | None = None,
    overwrite: bool = False,
    verbose: int | str = "auto",
    since: float | None = None,
    folder_options: Mapping[str, Any] | None = None,
    save_seconds: float = SAVE_SECONDS,
    allow_replica_change: bool = False,
) -> dict[str, Any]:
    """Splits the training images into stratified parts, and trains once for each part, validated on it.

    Each run is an ordinary one, in `workdir`/fold-<i>-of-<folds>. A finished run is kept, an unfinished one is resumed.
    Its accuracy is that of its best epoch on its part: a little too high where accuracy still varies at the end.

    Args:
        config: what to train; its own validation split is replaced.
        folds: the number of parts, 2 to the number of images of the smallest class.
        workdir: the folder of all runs; None: runs/<recipe>-folds-<time>.
        data and what follows it: as for `train`.

    Returns:
        The contents of folds.json: recipe, dataset, folds, seed, n_train, val_accuracy_mean, val_accuracy_std (of the
        sample) and the list `runs` (fold, n_validation, val_accuracy, epochs, best_epoch, train_seconds).

    Raises:
        as `train`.
    """
    preparation.check_arguments(config, data, dataset, data_dir, (class_names,))
    log, since = process.line_printer(runtime.verbosity(verbose)), machine.monotonic(since)
    folder = _place(config, workdir, overwrite)
    first, given, beside = fold_folder(folder.path, folds, 0), dataset or data, (None, None, class_names)
    resumed = not overwrite and _has_these_files(first, data_dir)
    found = preparation.load(config, given, beside, data_dir, first, resumed, folder_options, log)
    data = _without_test_images(found, folds)
    config = _adapted(config, folds, len(data.train_labels), None if overwrite else folder.path, log)
    more = dict[str, Any](data_dir=data_dir, dataset=data, save_seconds=save_seconds, policy=None)
    more |= {"overwrite": overwrite, "verbose": verbose, "allow_replica_change": allow_replica_change}
    runs = []
    with folder.lock(), runtime.Signals() as signals:
        for i in range(folds):
            if signals.caught:  # after the last step of the fold before
                raise interrupted(f"stopped by {signals.caught} before fold {i + 1}", folder, overwrite)
            log(f"-- fold {i + 1} of {folds}")
            more["callbacks"] = [_remove_the_others(folder.path, folds)] if overwrite and i == 0 else []
            run = _run(_fold(config, folds, i), folder.fold(folds, i).path, since=since, **more)
            more["policy"] = run["precision"]
            log(f"   {100 * run['best_val_accuracy']:.2f}%\n")
            runs.append(_row(i + 1, run))
            since = time.monotonic()
        summary = _summary(config, data, runs)
        folder.write(summary)
    log(f"{_in_words(summary)}\n  files  {folder}/  ({FOLDS_FILE})")
    return summary


def _adapted(config: Config, folds: int, n: int, begun: Path | None, log: process.Log) -> Config:
    """The config with what its `adapt` names chosen for n images, of which each fold holds out its share.

    begun: the folder of all runs, whose first fold has chosen already; None: it may not be used.
    """
    if not config.adapt:
        return config
    free = tuple(name for name in config.adapt if name != "validation_fraction")
    first = None if begun is None else fold_folder(begun, folds, 0)
    if first is not None and first.has_trained():
        with contextlib.suppress(RunError, ValueError, TypeError):  # what is damaged, the fold reports
            there = Config.from_record(first.read_config())
            return config.override(**{name: getattr(there, name) for name in free}, adapt=())
    before = config.override(validation_fraction=1 / folds, validation_fold=0, adapt=free)
    after = adapt(before, n, False, runtime.choose_strategy(config.strategy)[0].num_replicas_in_sync)
    text = in_words(before, after, n)
    if text:
        log(text)
    return after


def _place(config: Config, workdir: str | os.PathLike | None, overwrite: bool) -> FoldsFolder:
    """The folder of all runs. Raises ConfigError on a cluster, and where a finished cross-validation is there to be kept."""
    if config.strategy in ("auto", "multi_worker") and cluster.place_in_tf_config() is not None:
        raise ConfigError(
            "TF_CONFIG names a cluster, but a cross-validation runs on one machine; allowed: unset TF_CONFIG, or --strategy=none"
        )
    if workdir:
        check_type("workdir", workdir, (str, os.PathLike), "a folder, or None")
    folder = FoldsFolder(workdir or new_workdir(f"{config.recipe}-folds"))
    if folder.file.exists() and not overwrite:
        raise ConfigError(
            f"{folder} holds a finished cross-validation; choose another --workdir, or replace it with --overwrite"
        )
    return folder


def _fold(config: Config, folds: int, i: int) -> Config:
    """`config` with part i of the training images held out, from 0."""
    return config.override(validation_fraction=1 / folds, validation_split="stratified", validation_fold=i)


def _has_these_files(first: RunFolder, data_dir: str | os.PathLike[str] | None) -> bool:
    """Whether the first fold has trained on this folder, so that the other folds take its files."""
    here = preparation.recorded_path(data_dir)
    with contextlib.suppress(RunError):  # what follows reports it
        return first.has_trained() and first.read_config().get("data_dir") == here
    return False


def _remove_the_others(workdir: Path, folds: int) -> keras.callbacks.Callback:
    """A callback of the first fold that removes what is left of a cross-validation before, as soon as this fold trains.

    Not sooner, so that a failure until there costs nothing. And not when their turn comes, since an interrupted
    cross-validation is resumed without --overwrite.
    """

    def remove(logs: Any = None) -> None:
        (workdir / FOLDS_FILE).unlink(missing_ok=True)
        for folder in sorted(workdir.glob("fold-*-of-*")):
            run = RunFolder(folder)
            if folder != fold_folder(workdir, folds, 0).path and run.has_run():
                with run.lock():
                    run.remove_run()

    return keras.callbacks.LambdaCallback(on_train_begin=remove)


def _run(config: Config, folder: Path, *, overwrite: bool, policy: str | None, **more: Any) -> dict[str, Any]:
    """The metrics of one fold: of the finished run in its folder, or of a run that is trained or resumed now.

    policy: the precision of the folds before, which may have trained on another machine.
    """
    metrics = None if overwrite else _finished(folder, config, more["dataset"], more["allow_replica_change"])
    if metrics is not None:
        return metrics
    try:
        with runtime.auto_precision(policy):
            return train_and_evaluate(config, folder, overwrite=overwrite, **more)
    except RunInterrupted as error:
        raise interrupted(f"stopped in {folder.name}", folder.parent, overwrite) from error
    finally:
        gc.collect()  # the parts of a fold's model refer to one another, and would wait for it


def _row(fold: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """What folds.json holds of a run."""
    return {"fold": fold, "val_accuracy": metrics["best_val_accuracy"], **{k: metrics[k] for k in TAKEN}}


def _summary(config: Config, data: Dataset, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What folds.json holds."""
    accuracies = [run["val_accuracy"] for run in runs]
    return {
        "recipe": config.recipe,
        "dataset": data.name,
        "folds": len(runs),
        "seed": config.seed,
        "n_train": len(data.train_labels),
        "val_accuracy_mean": statistics.mean(accuracies),
        "val_accuracy_std": statistics.stdev(accuracies),
        "runs": runs,
    }


def _in_words(summary: dict[str, Any]) -> str:
    mean, deviation = 100 * summary["val_accuracy_mean"], 100 * summary["val_accuracy_std"]
    each = ", ".join(f"{100 * run['val_accuracy']:.2f}" for run in summary["runs"])
    return f"{summary['folds']} folds: validation accuracy {mean:.2f}% ± {deviation:.2f} ({each})"


def _without_test_images(data: Dataset, folds: int) -> Dataset:
    """`data` without its test images. Raises ConfigError where `folds` is out of range."""
    check_type("folds", folds, numbers.Integral, "a whole number from 2 on")
    smallest = int(np.bincount(data.train_labels).min())
    if not 2 <= folds <= smallest:
        raise ConfigError(f"folds is {folds}; allowed: from 2 to the {smallest} images of the smallest class")
    if data.validation is not None:
        raise ConfigError(
            f"folds is {folds}, but {data.source} has validation images of its own; allowed: a folder without val/"
        )
    return dataclasses.replace(
        data, test_images=data.test_images[:0].copy(), test_labels=data.test_labels[:0]
    )


def _finished(folder: Path, config: Config, data: Dataset, any_strategy: bool) -> dict[str, Any] | None:
    """The metrics of the finished run of `config` on `data` in the folder; None where no run is finished.

    any_strategy: whether it may have had another strategy.

    Raises ConfigError where the run had another config or other images, RunError where its files are damaged.
    """
    run = RunFolder(folder)
    if not run.is_finished():
        return None
    try:
        there, metrics = run.read_config(), run.read_metrics()
        other = difference(Config.from_record(there), config, any_strategy)
    except (RunError, ValueError, TypeError) as error:
        raise RunError(f"{folder} is damaged ({error}); delete it to run this fold again") from error
    now = runtime.choose_strategy(config.strategy)[0].num_replicas_in_sync
    if not any_strategy and not other and metrics.get("replicas", now) != now:
        other = f"strategy of {metrics['replicas']} replicas, now {now}"
    if other or there.get("fingerprint") != datasets.fingerprint(data):
        what = f"of another configuration ({other})" if other else "on other images"
        raise ConfigError(
            f"{folder} holds a run {what}; choose another --workdir, or replace it with --overwrite{or_allow_it(other)}"
        )
    return metrics
