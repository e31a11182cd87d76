"""One run, from a Config to a folder with the trained model, its scores and its report."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from . import (
    cluster,
    datasets,
    keras_state,
    machine,
    measures,
    models,
    preparation,
    process,
    report,
    runtime,
    scoring,
    summary,
)
from .config import Config
from .datasets import Dataset
from .engine import Engine
from .errors import ConfigError, check_number, check_type, interrupted
from .files import cannot_write, new_workdir
from .hooks import check_callbacks
from .loop import SAVE_SECONDS, TrainingLoop
from .model_file import load_model
from .models import own
from .process import Log, line_printer
from .run_folder import RunFolder

SCORES = (
    "test_loss",
    "test_accuracy",
    "test_accuracy_views",
    "test_balanced_accuracy",
    "test_smallest_class_recall",
)


@keras_state.keras_defaults()
@process.enduring_output()
def train_and_evaluate(
    config: Config,
    workdir: str | os.PathLike | None = None,
    *,
    data: Any = None,
    validation_data: Any = None,
    test_data: Any = None,
    class_names: Sequence[str] | None = None,
    model: keras.Model | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    dataset: Dataset | None = None,
    overwrite: bool = False,
    callbacks: Iterable[keras.callbacks.Callback] | keras.callbacks.Callback | None = (),
    verbose: int | str = "auto",
    full_report: bool = True,
    score_test: bool = True,
    hdf5: bool = False,
    since: float | None = None,
    folder_options: Mapping[str, Any] | None = None,
    save_seconds: float = SAVE_SECONDS,
    cluster_timeout: float = cluster.TIMEOUT,
    allow_replica_change: bool = False,
) -> dict[str, Any]:
    """Trains `config` to its end, scores the result on the test images once, and fills the run folder.

    The kept weights are those with the best validation accuracy, of equal ones those with the lowest validation loss; where
    nothing is held out, the last. An unfinished run of the same config in `workdir` is resumed, exactly. SIGINT, SIGTERM and
    SIGHUP end it after the steps in progress, with everything saved. If stdout breaks, the training continues without it.

    Args:
        config: what to do.
        workdir: the run folder; None: runs/<recipe>-<time>.
        data: images to train on: (images uint8 [n, height, width, 3], labels), a `Dataset`, or a finite `tf.data.Dataset`;
            see `datasets.from_arrays`. None: the data set that the config names. Version 1.0.0 called it `dataset`.
        validation_data, test_data: the same, beside arrays. Without validation data the config's share of the training
            images is held out; without test data there is no test score.
        class_names: of the arrays, one for each class; None: numbers.
        model: your own functional Keras classifier of raw pixels, to be trained instead of the config's model. At the end it
            holds the kept weights.
        data_dir: where the images of the config's data set are; see `datasets.load`.
        overwrite: whether an earlier run in `workdir` may be replaced.
        callbacks: further Keras callbacks, one or several. Their `model` shares the plain model's layers, with the weights of now.
        verbose: 0: nothing is printed; 1: messages and a progress bar; 2: messages and one line per epoch; "auto": 1 on a
            terminal, else 2.
        full_report: whether to draw figures and report.html, and to write TensorBoard logs.
        score_test: whether to score the test images; a search does not.
        hdf5: whether to write the model in the older format as well, as model.h5.
        folder_options: `strict` and `max_bad` of a folder of images, see `datasets.load`.
        since: when this run's clock began, by `time.monotonic()` or `time.time()`; None: with this call.
        save_seconds: the most seconds of training that a killed process loses; on a disk so slow that a save takes over a
            quarter of it, about four times what a save takes. 0: the state is saved after every call.
        cluster_timeout: seconds to wait for the other workers of a cluster.
        allow_replica_change: whether a run may resume on another number of replicas or workers, at the same global batch.

    Returns:
        the contents of metrics.json.
    Raises:
        ConfigError: for a wrong argument.
        RunError: for what failed, and for an interrupted run.
    """
    since, verbose = machine.monotonic(since), runtime.verbosity(verbose)
    log = line_printer(verbose)
    beside = validation_data, test_data, class_names
    preparation.check_arguments(config, data, dataset, data_dir, beside)
    callbacks = check_callbacks(callbacks, config)
    check_number("save_seconds", save_seconds, Real, 0, 86_400, words="from 0 to 86,400")
    models.check_options(config.architecture, config.options)

    # ---- strategy, folder, precision
    flags = {"overwrite": overwrite, "allow_replica_change": allow_replica_change}
    team, strategy = runtime.choose_devices(config, cluster_timeout, log, flags)
    chief = runtime.is_chief(strategy)
    folder = _folder(workdir, config, strategy)

    alone, locked = _only_run(config, model, log), folder.lock() if chief else contextlib.nullcontext()
    interruptible = _interruptible(folder, overwrite, chief)
    with alone, runtime.reporting_errors(team), locked, interruptible as training_is_over:
        config, saved = (config, None) if overwrite else folder.resume(config, log, allow_replica_change)
        policy = preparation.agree_on_precision(config, model, saved, team, log)
        # ---- data and model
        given, resumed = dataset if data is None else data, saved is not None
        found = preparation.load(config, given, beside, data_dir, folder, resumed, folder_options, log)
        config = preparation.adapt(config, found, strategy, log)
        fingerprint = datasets.fingerprint(found)
        preparation.agree_on_data(team, found, fingerprint, model, saved)
        engine, found, validation = preparation.prepare(config, found, model, strategy, policy, log)
        digest = None if model is None else own.digest(engine.model)
        record = preparation.describe_run(config, found, data_dir, engine, fingerprint, digest)
        if overwrite and chief:
            folder.remove_run()  # not sooner, so that a failure until here costs nothing
        loop = TrainingLoop(
            engine, folder, fingerprint, chief=chief, callbacks=callbacks, verbose=verbose, full_report=full_report,
            since=since, overwrite=overwrite, model_digest=digest, save_seconds=save_seconds,
        )  # fmt: skip
        if saved:
            changed = loop.restore(saved, allow_replica_change, _of_chief(team, folder.model_digest()))
            log(f"resumed at step {engine.step:,} of {engine.steps:,}{changed}")
        if chief:
            folder.write_config(record, resumed=bool(saved))
            folder.write_split(datasets.file_rows(found))

        # ---- train
        _train(loop, validation, folder, training_is_over)
        trained = loop.metrics()
        log("trained: {epochs} epochs in {train_seconds:,.1f} s; kept epoch {best_epoch}".format(**trained))

        # ---- evaluate
        samples = report.choose_samples(found) if chief and full_report else {}
        found = _release(engine, found)
        kept = _kept_model(team, folder, engine, model, log, hdf5=hdf5 and chief)
        probabilities, scores = _score(kept if score_test else None, found, validation, config)
        metrics = _metrics(config, found, engine, trained, scores, loop.elapsed())
        if chief and full_report:
            run = dict[str, Any](config=record, metrics=metrics, history=loop.history, samples=samples)
            report.write_report(folder, dataset=found, probabilities=probabilities, **run)
        with runtime.Signals():  # one that comes now does not make a finished run an interrupted one
            if chief:
                folder.write_metrics(metrics)  # last of all: it makes the run a finished one
            summary.conclude(log, metrics, folder, loop.history, found, kept if verbose else None, config)
    return metrics


@contextlib.contextmanager
def _only_run(config: Config, model: keras.Model | None, log: Log) -> Iterator[None]:
    """No other run of the process trains meanwhile, and the global random generators are afterwards as before.

    A user's own model may draw from all of them; else it is only Keras that draws seeds, for each layer that it makes.
    """
    draws = keras_state.seeded if model is None else keras_state.global_seeds
    with keras_state.only_run(log), draws(config.seed):
        yield


@contextlib.contextmanager
def _interruptible(folder: RunFolder, overwrite: bool, chief: bool) -> Iterator[Callable[[], None]]:
    """Turns an interruption of the scoring or the report into an error that shows how to continue.

    Gives the function to call when the training is over.
    """
    over: list[bool] = []
    try:
        yield lambda: over.append(True)
    except KeyboardInterrupt as error:
        if not over or folder.is_finished():
            raise
        how = "stopped after the training, before everything was scored"
        raise interrupted(how, folder, overwrite, chief=chief) from error


def _train(
    loop: TrainingLoop,
    validation: tuple[np.ndarray, np.ndarray],
    folder: RunFolder,
    is_over: Callable[[], None],
) -> None:
    """Runs the loop, and calls `is_over`. Turns TensorFlow's errors into RunErrors of one line."""
    try:
        with runtime.Signals() as signals, runtime.at_work(loop.engine.strategy):
            loop.run(validation, signals)
            is_over()
    except (*runtime.LOST_WORKER, *runtime.MAYBE_LOST_WORKER) as error:
        raise runtime.lost_worker(error) from error
    except tf.errors.ResourceExhaustedError as error:
        if "No space left" in str(error):  # what the TensorBoard callback meets
            full = OSError(errno.ENOSPC, "No space left on device")
            raise cannot_write(folder.path, full) from error
        raise runtime.out_of_memory(error) from error


def _release(engine: Engine, data: Dataset) -> Dataset:
    """The data set without its training images, whose memory scoring and report can use."""
    engine.release_images()
    return dataclasses.replace(data, train_images=data.train_images[:0].copy())


def _of_chief(team: cluster.Team | None, digest: str | None) -> str | None:
    """The chief's digest of its model file, which may be in another folder. Without a cluster: this one."""
    return digest if team is None else team.take_from_chief(digest or "") or None


def _kept_model(
    team: cluster.Team | None,
    folder: RunFolder,
    engine: Engine,
    model: keras.Model | None,
    log: Log,
    *,
    hdf5: bool,
) -> keras.Model | None:
    """The model with the kept weights; None where the folder does not hold it, because it is not the chief's.

    A model of the config is read from the file, so that what is scored is what was saved. A user's own model gets the
    weights of the file: it may hold layers that Keras cannot make without their code. hdf5: whether to write it in the
    older format as well.
    """
    if team is not None and (own := folder.model_digest()) != _of_chief(team, own):
        what = "" if model is None else ", and the model keeps the last weights, not the best ones"
        log(
            f"no scores here{what}: {folder} does not hold worker 0's model; give all workers the same --workdir"
        )
        return None
    if model is None:
        kept = load_model(folder.model_file)
    else:
        kept = engine.model
        kept.load_weights(folder.model_file)
    if hdf5:
        folder.save_model(kept, folder.hdf5_file)
    return kept


def _score(
    model: keras.Model | None, data: Dataset, validation: Sequence[np.ndarray], config: Config
) -> tuple[np.ndarray, dict[str, float | None]]:
    """Probabilities [n, classes] of the test images, and their scores for metrics.json.

    Without test images: the probabilities of the validation images, and scores of None. Without a model: neither.
    """
    scores: dict[str, float | None] = dict.fromkeys(SCORES)
    has_test = len(data.test_labels) > 0
    images, labels = (data.test_images, data.test_labels) if has_test else validation
    if model is None or len(labels) == 0:
        return np.zeros((0, data.num_classes), np.float32), scores
    plain, averaged = scoring.predict_with_and_without(
        model, images, views=config.views, views_share=config.views_share
    )
    if has_test:
        one, several = (scoring.score(labels, p) for p in (plain, averaged))
        predicted, k = plain.argmax(axis=1), data.num_classes
        scores = {
            "test_loss": one["loss"],
            "test_accuracy": one["accuracy"],
            "test_accuracy_views": several["accuracy"],
            "test_balanced_accuracy": measures.balanced_accuracy(labels, predicted, k),
            "test_smallest_class_recall": measures.smallest_class_recall(
                labels, predicted, data.train_labels, k
            ),
        }
    return averaged, scores


def _metrics(
    config: Config,
    data: Dataset,
    engine: Engine,
    trained: dict[str, Any],
    scores: dict[str, float | None],
    seconds: float,
) -> dict[str, Any]:
    """What metrics.json holds."""
    assert data.validation is not None  # `preparation.prepare` set it
    return {
        "recipe": config.recipe,
        "dataset": data.name,
        "n_train": len(data.train_labels),
        "n_validation": len(data.validation[1]),
        "n_test": len(data.test_labels),
        "params": engine.model.count_params(),
        **trained,
        **scores,
        "views": config.views,
        "views_share": config.views_share,
        "pflop": engine.pflop(),
        "strategy": runtime.strategy_name(engine.strategy),
        "replicas": engine.replicas,
        "precision": engine.policy,
        "seed": config.seed,
        "total_seconds": round(seconds, 2),
    }


def _folder(workdir: str | os.PathLike | None, config: Config, strategy: tf.distribute.Strategy) -> RunFolder:
    """The run folder; for None runs/<recipe>-<time>. Raises ConfigError for None in a cluster: each worker would have another."""
    if workdir:
        check_type("workdir", workdir, (str, os.PathLike), "a folder, or None")
        return RunFolder(workdir)
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise ConfigError("workdir is None; allowed with several workers: a folder that all of them share")
    return RunFolder(new_workdir(config.recipe))
