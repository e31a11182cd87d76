"""One run, from a Config to a folder with the trained model, its scores and its report."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from . import (
    adaptation,
    cluster,
    datasets,
    keras_state,
    machine,
    measures,
    models,
    process,
    report,
    runtime,
    scoring,
)
from .config import Config
from .datasets import Dataset
from .engine import Engine, make_engine
from .errors import ConfigError, interrupted
from .files import cannot_write
from .hooks import check_callbacks
from .loop import SAVE_SECONDS, TrainingLoop
from .machine import check_fits
from .model_file import ModelInfo, load_model
from .models import own
from .run_folder import RunFolder

Log = Callable[[str], None]
SCORES = (
    "test_loss",
    "test_accuracy",
    "test_accuracy_views",
    "test_balanced_accuracy",
    "test_smallest_class_recall",
)
FEW_IMAGES = 10  # of a class to train on, below which a run warns
MAX_SAVE_SECONDS = 86_400


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
    data_dir: str | None = None,
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

    The kept weights are those with the best validation accuracy, or the last where nothing is held out. An
    unfinished run of the same config in `workdir` is resumed, exactly. SIGINT, SIGTERM and SIGHUP end it after the
    steps in progress, with everything saved. If stdout breaks, the training continues without it.

    Args:
        config: what to do.
        workdir: the run folder; None: runs/<recipe>-<time>.
        data: images to train on: (images uint8 [n, height, width, 3], labels), a `Dataset`, or a finite `tf.data.Dataset`;
            see `datasets.from_arrays`. None: the data set that the config names.
        validation_data, test_data: the same, beside arrays. Without validation data the config's share of the training
            images is held out; without test data there is no test score.
        class_names: of the arrays, one for each class; None: numbers.
        model: your own functional Keras classifier of raw pixels, to be trained instead of the config's model. At the end it
            holds the kept weights.
        data_dir: where the images of the config's data set are; see `datasets.load`.
        dataset: as `data`, the name in version 1.0.0.
        overwrite: whether an earlier run in `workdir` may be replaced.
        callbacks: further Keras callbacks, one or several. Their `model` shares the plain model's layers, with the weights of now.
        verbose: 0: nothing is printed; 1: messages and a progress bar; 2: messages and one line per epoch; "auto": 1 on a
            terminal, else 2.
        full_report: whether to draw figures and report.html, and to write TensorBoard logs.
        score_test: whether to score the test images; a search does not.
        hdf5: whether to write the model in the older format as well, as model.h5.
        folder_options: `strict` and `max_bad` of a folder of images, see `datasets.load`.
        since: when this run's clock began, by `time.monotonic()` or `time.time()`; None: with this call.
        save_seconds: the most seconds of training that a killed process loses; 0: the state is saved after every call.
        cluster_timeout: seconds to wait for the other workers of a cluster.
        allow_replica_change: whether a run may resume on another number of replicas or workers, at the same global batch.

    Returns:
        the contents of metrics.json.
    Raises:
        ConfigError: for a wrong argument.
        RunError: for what failed, and for an interrupted run.
    """
    since = machine.monotonic(since)
    verbose = runtime.verbosity(verbose)
    log = _log_of(verbose)
    callbacks = check_callbacks(callbacks, config)
    _check_sources(data, dataset, data_dir, (validation_data, test_data, class_names))
    _check_save_seconds(save_seconds)

    # ---- strategy, precision, folder
    models.check_options(config.architecture, config.options)
    flags = {"overwrite": overwrite, "allow_replica_change": allow_replica_change}
    team, strategy, policy = _choose_devices(config, cluster_timeout, log, flags)
    chief = runtime.is_chief(strategy)
    folder = RunFolder(workdir or _new_folder(config, strategy))

    locked = folder.lock() if chief else contextlib.nullcontext()
    with (
        _only_run(config, model, log),
        _reporting_errors(team),
        locked,
        _interruptible(folder, overwrite) as training_is_over,
    ):
        config, saved = (config, None) if overwrite else folder.resume(config, log, allow_replica_change)
        # ---- data and model
        given = data if data is not None else dataset
        if given is None:
            given = _load(config, data_dir, folder if saved else None, folder_options, log)
        found = datasets.as_dataset(given, validation_data, test_data, class_names)
        config = _adapt(config, found, strategy, log)
        fingerprint = datasets.fingerprint(found)
        _agree_on_data(team, found, fingerprint, model, saved)
        engine, found, validation = _prepare(config, found, model, strategy, policy, log)
        digest = None if model is None else own.digest(engine.model)
        record = _record(config, found, data_dir, engine.model.count_params(), fingerprint, digest)
        if overwrite and chief:
            folder.remove_run()  # not sooner, so that a failure until here costs nothing
        loop = TrainingLoop(
            engine, folder, fingerprint,
            chief=chief, callbacks=callbacks, verbose=verbose, full_report=full_report, since=since, overwrite=overwrite,
            model_digest=digest, save_seconds=save_seconds,
        )  # fmt: skip
        if saved:
            changed = loop.restore(saved, allow_replica_change)
            log(f"resumed at step {engine.step:,} of {engine.steps:,}{changed}")
        if chief:
            folder.write_config(record, resumed=bool(saved))
            folder.write_split(datasets.file_rows(found))

        # ---- train
        _train(loop, validation, folder)
        training_is_over()
        trained = loop.metrics()
        log("trained: {epochs} epochs in {train_seconds:,.1f} s; kept epoch {best_epoch}".format(**trained))

        # ---- evaluate
        if not folder.model_file.exists():  # only the chief writes
            log(f"no scores here: {folder} is not the chief's folder; give all workers the same --workdir")
        kept = _kept_model(folder, engine, model)
        if kept is not None and hdf5 and chief:
            folder.save_model(kept, folder.hdf5_file)
        probabilities, scores = _score(kept if score_test else None, found, validation, config.views)
        metrics = _metrics(config, found, engine, trained, scores, loop.elapsed())
        if chief:
            if full_report:
                report.write_report(
                    folder, config=record, metrics=metrics, history=loop.history, dataset=found,
                    test_probabilities=probabilities,
                )  # fmt: skip
            folder.write_metrics(metrics)  # last of all: it makes the run a finished one
    _summarize(log, metrics, folder)
    _warn_at_chance(log, loop.history, found, metrics["best_val_accuracy"])
    return metrics


@contextlib.contextmanager
def _only_run(config: Config, model: keras.Model | None, log: Log) -> Iterator[None]:
    """No other run of the process trains meanwhile. A user's own model may draw from the global random generators."""
    with keras_state.only_run(log), keras_state.global_seeds(None if model is None else config.seed):
        yield


def _log_of(verbose: int) -> Log:
    """Prints, at once even into a pipe, or does not."""
    return functools.partial(print, flush=True) if verbose else (lambda text: None)


def _reporting_errors(team: cluster.Team | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if team is None else team.reporting_errors()


def _at_work(strategy: tf.distribute.Strategy) -> contextlib.AbstractContextManager[None]:
    """While inside, a lost worker of the cluster ends this process. See `cluster.Team.at_work`."""
    team = cluster.team()
    if team is None or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return contextlib.nullcontext()
    return team.at_work()


def _choose_devices(
    config: Config, cluster_timeout: float, log: Log, flags: Mapping[str, bool]
) -> tuple[cluster.Team | None, tf.distribute.Strategy, str]:
    """The workers of the cluster, who agree on config and `flags` here; the strategy, and the precision's policy."""
    policy, why = runtime.choose_precision(config.precision)
    team = cluster.join_workers(config.strategy, cluster_timeout, log)
    if team is not None:
        gpus = len(tf.config.get_visible_devices("GPU"))
        team.agree(config=config.to_dict(), precision=policy, GPUs=gpus, **flags)
    strategy, reason = runtime.choose_strategy(config.strategy)
    log(f"strategy: {reason}")
    log(f"precision: {policy}: {why}")
    return team, strategy, policy


def _agree_on_data(
    team: cluster.Team | None,
    data: Dataset,
    fingerprint: str,
    model: keras.Model | None,
    saved: Mapping[str, np.ndarray] | None,
) -> None:
    """Compares with the other workers what the number of steps and the results follow from, beside the config."""
    if team is None:
        return
    common: dict[str, Any] = {
        "data": f"{len(data.train_labels):,} training images, fingerprint {fingerprint}"
    }
    if isinstance(model, keras.Model):
        weights = hashlib.sha256(b"".join(np.ascontiguousarray(w).tobytes() for w in model.get_weights()))
        common["model"] = own.digest(model)
        common["initial weights of the model"] = weights.hexdigest()[:8]
    resumed = None if saved is None or "engine" not in saved else int(saved["engine"][0])
    team.agree(**common, **{"step to resume from, in the workdir": resumed})


def _check_sources(data: Any, dataset: Any, data_dir: Any, beside: tuple[Any, ...]) -> None:
    """Raises ConfigError where the arguments name several sources of images, or parts of none."""
    names = [
        name
        for name, value in (("data", data), ("dataset", dataset), ("data_dir", data_dir))
        if value is not None
    ]
    if "data" in names and len(names) > 1:
        raise ConfigError(f"{' and '.join(names)} are set; allowed: one of them")
    if data is None and any(value is not None for value in beside):
        raise ConfigError(
            "validation_data, test_data or class_names is set without data; allowed: beside data=(images, labels)"
        )


def _load(
    config: Config,
    data_dir: str | None,
    resumed: RunFolder | None,
    options: Mapping[str, Any] | None,
    log: Log,
) -> Dataset:
    """The data set of the config. resumed: the folder of the run that goes on, with the files that it began with."""
    own: dict[str, Any] = {"log": log, **(options or {})}
    if config.dataset == "folder":
        own |= {"files": resumed and resumed.read_split(), "copies": datasets.TRAINING_COPIES}
    return datasets.load(config.dataset, data_dir, config.image_size, config.resize, **own)


def _adapt(config: Config, data: Dataset, strategy: tf.distribute.Strategy, log: Log) -> Config:
    """The config with what `config.adapt` names chosen for the data set."""
    if not config.adapt:
        return config
    n = len(data.train_labels)
    chosen = adaptation.adapt(config, n, data.validation is not None, strategy.num_replicas_in_sync)
    text = adaptation.in_words(config, chosen, n)
    if text:
        log(text)
    return chosen


def _split_files(config: Config, data: Dataset) -> Mapping[str, tuple[str, ...]] | None:
    """The files of a folder in the parts in which the run uses them; of other data None."""
    if data.files is None or data.validation is not None:
        return data.files
    numbers = dataclasses.replace(data, train_images=np.arange(len(data.train_labels)))
    train, _, held_out, _ = _split(config, numbers)
    files = data.files["train"]
    return {
        **data.files,
        "train": tuple(files[i] for i in train),
        "validation": tuple(files[i] for i in held_out),
    }


def _split(config: Config, data: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`datasets.split` as the config asks for it."""
    kind, fraction = config.validation_split, config.validation_fraction
    return datasets.split(data, fraction, kind, config.seed, config.validation_fold)


def _log_few(data: Dataset, log: Log) -> None:
    """Warns of classes with few images, or without validation images."""
    assert data.validation is not None  # `_prepare` set it
    names, classes = data.class_names, range(data.num_classes)
    training, held_out = (
        np.bincount(labels, minlength=data.num_classes) for labels in (data.train_labels, data.validation[1])
    )
    few = [f"{names[k]} ({training[k]})" for k in classes if training[k] < FEW_IMAGES]
    none = [names[k] for k in classes if len(data.validation[1]) and not held_out[k]]
    for what, found in (("few images to train on", few), ("no validation image", none)):
        if found:
            more = f" and {len(found) - 10} more classes" if len(found) > 10 else ""
            log(f"warning: {what} of {', '.join(found[:10])}{more}")


def _check_save_seconds(seconds: float) -> None:
    if not 0 <= seconds <= MAX_SAVE_SECONDS:
        raise ConfigError(f"save_seconds is {seconds}; allowed: from 0 to {MAX_SAVE_SECONDS:,}")


@contextlib.contextmanager
def _interruptible(folder: RunFolder, overwrite: bool) -> Iterator[Callable[[], None]]:
    """Turns an interruption of the scoring or the report into an error that shows how to continue.

    Gives the function to call when the training is over.
    """
    over: list[bool] = []
    try:
        yield lambda: over.append(True)
    except KeyboardInterrupt as error:
        if not over or folder.is_finished():
            raise
        raise interrupted(
            "stopped after the training, before everything was scored", folder, overwrite
        ) from error


def _prepare(
    config: Config,
    data: Dataset,
    model: keras.Model | None,
    strategy: tf.distribute.Strategy,
    policy: str,
    log: Log,
) -> tuple[Engine, Dataset, tuple[np.ndarray, np.ndarray]]:
    """The engine at the start of a run, the data set as the run splits it, and its validation images and labels.

    The training images of the data set that it returns are the engine's own. So where the caller keeps no other data
    set, memory holds them once.
    """
    size = datasets.TRAINING_COPIES * data.train_images.nbytes
    check_fits(size, f"training on {len(data.train_images):,} images of {data.source}")
    images, labels, *held_out = _split(config, data)
    validation = (held_out[0], held_out[1])
    if not len(validation[1]) and (config.early_stopping is not None or config.schedule.name == "plateau"):
        raise ConfigError(
            "there are no validation images, but early stopping and the plateau schedule watch val_loss; allowed:"
            " validation data, or neither of them"
        )
    runtime.check_batch(config.batch_size, len(images), strategy.num_replicas_in_sync)
    log(
        f"data: {data.name} from {data.source}: {len(images):,} images to train on, "
        f"{len(validation[0]):,} to validate, {len(data.test_images):,} to test"
    )
    with _at_work(strategy):
        engine = make_engine(
            config,
            images,
            labels,
            num_classes=data.num_classes,
            strategy=strategy,
            policy=policy,
            model=model,
        )
    engine.model.info = ModelInfo(tuple(data.class_names), config.resize)
    log(
        f"model: {config.recipe if model is None else model.name}, {engine.model.count_params():,} parameters; "
        f"{engine.steps:,} steps of {config.batch_size}"
    )
    if engine.compiled:
        programs = max(1, len(set(engine.sizes)))
        log(f"XLA compiles {programs} program(s) on the way, which takes about half a minute each")
    del images
    files = _split_files(config, data)
    data = dataclasses.replace(
        data, train_images=engine.images, train_labels=labels, validation=validation, files=files
    )
    _log_few(data, log)
    return engine, data, validation


def _train(loop: TrainingLoop, validation: tuple[np.ndarray, np.ndarray], folder: RunFolder) -> None:
    """Runs the loop. Turns TensorFlow's errors into RunErrors of one line."""
    try:
        with runtime.Signals() as signals, _at_work(loop.engine.strategy):
            loop.run(validation, signals)
    except (*runtime.LOST_WORKER, *runtime.MAYBE_LOST_WORKER) as error:
        raise runtime.lost_worker(error) from error
    except tf.errors.ResourceExhaustedError as error:
        if "No space left" in str(error):  # what the TensorBoard callback meets
            full = OSError(errno.ENOSPC, "No space left on device")
            raise cannot_write(folder.path, full) from error
        raise runtime.out_of_memory(error) from error


def _record(
    config: Config,
    data: Dataset,
    data_dir: str | None,
    parameters: int,
    fingerprint: str,
    own_model: str | None,
) -> dict[str, Any]:
    """What config.json holds: the config, and what the run found (`config.RECORDED`). own_model: its digest."""
    return {
        **config.to_dict(),
        "class_names": list(data.class_names),
        "data_dir": data_dir and str(Path(data_dir).expanduser().absolute()),
        "data_source": data.source,
        "fingerprint": fingerprint,
        "parameters": parameters,
        **({} if own_model is None else {"own_model": own_model}),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "environment": runtime.describe(),
    }


def _kept_model(folder: RunFolder, engine: Engine, model: keras.Model | None) -> keras.Model | None:
    """The model with the kept weights; None where there is no model file, which only a chief writes.

    A model of the config is read from the file, so that what is scored is what was saved. A user's own model gets the
    weights of the file: it may hold layers that Keras cannot make without their code.
    """
    if not folder.model_file.exists():
        return None
    if model is None:
        return load_model(folder.model_file)
    engine.model.load_weights(folder.model_file)
    return engine.model


def _score(
    model: keras.Model | None, data: Dataset, validation: Sequence[np.ndarray], views: int
) -> tuple[np.ndarray, dict[str, float | None]]:
    """Probabilities [n, classes] of the test images, and their scores for metrics.json.

    Without test images: the probabilities of the validation images, and scores of None. Without a model: neither.
    """
    scores: dict[str, float | None] = dict.fromkeys(SCORES)
    has_test = len(data.test_labels) > 0
    images, labels = (data.test_images, data.test_labels) if has_test else validation
    if model is None or len(labels) == 0:
        return np.zeros((0, data.num_classes), np.float32), scores
    averaged = scoring.predict_probabilities(model, images, views=views)
    if has_test:
        plain = scoring.predict_probabilities(model, images) if views > 1 else averaged
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
    assert data.validation is not None  # `_prepare` set it
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
        "pflop": engine.pflop(),
        "strategy": runtime.strategy_name(engine.strategy),
        "replicas": engine.replicas,
        "precision": engine.policy,
        "seed": config.seed,
        "total_seconds": round(seconds, 2),
    }


def _new_folder(config: Config, strategy: tf.distribute.Strategy) -> str:
    """runs/<recipe>-<time>. Raises ConfigError in a cluster, whose workers would each have another."""
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise ConfigError("workdir is None; allowed with several workers: a folder that all of them share")
    return f"runs/{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def _summarize(log: Log, metrics: dict[str, Any], folder: RunFolder) -> None:
    best = metrics["best_val_accuracy"]
    validation = "no images held out"
    if best is not None:
        interval = measures.interval_in_words(best, metrics["n_validation"])
        validation = ", ".join(filter(None, (f"{best:.2%} (epoch {metrics['best_epoch']})", interval)))
    log(f"\n{metrics['recipe']}, {metrics['epochs']} epochs, {metrics['train_seconds']:,.1f} s")
    log(f"  validation accuracy  {validation}")
    log(f"  test accuracy        {_test_in_words(metrics)}")
    if metrics["test_balanced_accuracy"] is not None and metrics["dataset"] not in report.BALANCED:
        recall = metrics["test_smallest_class_recall"]
        log(
            f"  balanced accuracy    {metrics['test_balanced_accuracy']:.2%}, smallest class's recall {recall:.2%}"
        )
    goal, at = f"{metrics['target']:.2%}", metrics["seconds_to_target"]
    reached = f"after {at:,.1f} s (epoch {metrics['epoch_at_target']})" if at else "not reached"
    log(f"  target {goal:<13} {reached}")
    files = ", ".join(
        f.name for f in (folder.report_file, folder.model_file, folder.metrics_file) if f.exists()
    )
    log(f"  files                {folder}/  ({files})")


def _warn_at_chance(
    log: Log, history: Sequence[Mapping[str, Any]], data: Dataset, best_val_accuracy: float | None
) -> None:
    """Logs a line where the accuracy is no better than that of always guessing the largest class.

    It is better where it exceeds the share of that class by more than 2.33 standard deviations of a share of so many
    images (a one-sided test at 1%). The accuracy is the best validation accuracy, or the last training accuracy.
    """
    labels = data.train_labels if data.validation is None else data.validation[1]
    accuracy, images = best_val_accuracy, "validation images"
    if accuracy is None:
        labels, accuracy, images = data.train_labels, history[-1]["accuracy"], "training images"
    share = float(np.bincount(labels).max()) / len(labels)
    if accuracy <= share + 2.33 * math.sqrt(share * (1 - share) / len(labels)):
        log(
            f"  at chance level      {accuracy:.2%} of the {len(labels):,} {images}; to guess the largest class gives"
            f" {share:.2%}: the network has learned nothing that these images show; try a smaller --learning_rate"
        )


def _test_in_words(metrics: dict[str, Any]) -> str:
    """The test accuracy for people, or why there is none."""
    if metrics["test_accuracy"] is None:
        return "not scored" if metrics["n_test"] else "no test images"
    text = f"{metrics['test_accuracy']:.2%}"
    interval = measures.interval_in_words(metrics["test_accuracy"], metrics["n_test"])
    text += f", {interval}" if interval else ""
    if metrics["views"] > 1:
        text += f", {metrics['test_accuracy_views']:.2%} with TTA of {metrics['views']} views"
    return text
