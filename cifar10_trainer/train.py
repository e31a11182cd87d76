"""One run, from a Config to a folder with the trained model, its numbers and its pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from . import datasets, models, report, runtime, scoring
from .config import Config
from .datasets import Dataset
from .engine import Progress, prepare
from .errors import Busy, ConfigError, RunError, interrupted

WRITTEN = (  # what a run writes, and --overwrite removes
    "config.json",
    "history.csv",
    "metrics.json",
    "model.keras",
    "model.h5",
    "state.npz",
    "classification_report.txt",
    "report.html",
    "figures",
    "tensorboard",
)
# What EarlyStopping and ReduceLROnPlateau learn; the rest are settings, of which one changes its sign in use.
REMEMBERED = ("best", "best_epoch", "wait", "stopped_epoch", "cooldown_counter")
SAVE_SECONDS = 30  # between two saves of the state, when nothing asks for one sooner
WAY_OUT = "choose another --workdir, or replace it with --overwrite"
CALL_SECONDS = 0.5  # of steps in one call of the graph: how often progress shows and signals are seen


def train_and_evaluate(
    config: Config,
    workdir: str | os.PathLike | None = None,
    *,
    data_dir: str | None = None,
    dataset: Dataset | None = None,
    overwrite: bool = False,
    callbacks: Iterable[keras.callbacks.Callback] = (),
    verbose: int = 1,
    full_report: bool = True,
    score_test: bool = True,
    hdf5: bool = False,
    since: float | None = None,
) -> dict[str, Any]:
    """Trains `config` to its end, scores the result on the test images once, and fills the run folder.

    The kept weights are those with the best validation accuracy, or the last where nothing is held out. An
    unfinished run of the same config in `workdir` is resumed, exactly. SIGINT and SIGTERM end it after the step
    in progress, with everything saved.

    Args:
        config: what to do.
        workdir: the run folder; None: runs/<recipe>-<time>.
        data_dir: where the images are; see `datasets.load`.
        dataset: images already loaded, instead.
        overwrite: whether an earlier run in `workdir` may be replaced.
        callbacks: further Keras callbacks. Their `model` is the plain model, with its weights as of the last epoch.
        verbose: 1: words and a progress bar; 0: nothing.
        full_report: whether to draw figures and report.html, and to write TensorBoard logs.
        score_test: whether to score the test images; a search does not.
        hdf5: whether to leave the model in the older format as well, as model.h5.
        since: when this run's clock began, as from `time.time()`; None: with this call.

    Returns: the contents of metrics.json.
    Raises: ConfigError for what cannot be; RunError for what failed, and for an interrupted run.
    """
    since = time.time() if since is None else since
    say = print if verbose else (lambda *_: None)

    # ---- where and how ------------------------------------------------------------------------------------------
    models.check_options(config.architecture, config.options)
    strategy, why = runtime.choose_strategy(config.strategy)
    chief, replicas = runtime.is_chief(strategy), strategy.num_replicas_in_sync
    workdir = Path(workdir or _new_folder(config, strategy))
    say(f"strategy: {why}")
    policy, why = runtime.choose_precision(config.precision)
    say(f"precision: {policy}: {why}")

    with _held(workdir) if chief else contextlib.nullcontext():
        saved = None if overwrite else _unfinished(workdir, config)

        # ---- data -----------------------------------------------------------------------------------------------
        data = dataset or datasets.load(config.dataset, data_dir, config.image_size)
        fraction, kind = config.validation_fraction, config.validation_split
        images, labels, *validation = datasets.split(
            data, fraction, kind, config.seed, config.validation_fold
        )
        n_train, n_validation, n_test = len(images), len(validation[0]), len(data.test_images)
        runtime.check_batch(config.batch_size, n_train, replicas)
        say(
            f"data: {data.name} from {data.source}: {n_train:,} images to train on, "
            f"{n_validation:,} to validate, {n_test:,} to test"
        )

        # ---- model ----------------------------------------------------------------------------------------------
        engine = prepare(
            config, images, labels, num_classes=data.num_classes, strategy=strategy, policy=policy
        )
        parameters = engine.model.count_params()
        say(
            f"model: {config.recipe}, {parameters:,} parameters; "
            f"{engine.steps:,} steps of {config.batch_size}"
        )
        if engine.compiled:
            programs = max(1, len(set(engine.sizes)))
            say(f"XLA compiles {programs} program(s) on the way, which takes about half a minute each")
        record = _record(config, data, data_dir, parameters)
        # The engine has its own copy of the images. Where they were loaded here, the run now holds no other.
        del images
        data = dataclasses.replace(
            data, train_images=engine.images, train_labels=labels, validation=(validation[0], validation[1])
        )
        if overwrite and chief:
            remove(workdir, "config.json", WRITTEN)  # not sooner, so that a failure until here costs nothing
        run = _Run(
            engine,
            workdir,
            record["fingerprint"],
            chief=chief,
            callbacks=callbacks,
            verbose=verbose,
            full_report=full_report,
            since=since,
            overwrite=overwrite,
        )
        if saved:
            run.restore(saved)
            say(f"resumed at step {engine.step:,} of {engine.steps:,}")
        if chief:
            report.write_atomic(workdir / "config.json", json.dumps(record, indent=2) + "\n")

        # ---- train ----------------------------------------------------------------------------------------------
        try:
            with runtime.Signals() as signals:
                run.loop(validation, signals)
        except (tf.errors.UnavailableError, tf.errors.AbortedError) as error:
            raise runtime.lost_worker(error) from error
        except tf.errors.ResourceExhaustedError as error:
            if "No space left" in str(error):  # what the TensorBoard callback meets
                raise _unwritable(workdir, OSError(errno.ENOSPC, "No space left on device")) from error
            raise runtime.out_of_memory(error) from error
        trained = run.metrics()
        say(
            f"trained: {trained['epochs']} epochs in {trained['train_seconds']:,.1f} s; "
            f"kept epoch {trained['best_epoch']}"
        )

        # ---- evaluate -------------------------------------------------------------------------------------------
        kept = workdir / "model.keras"
        if not kept.exists():  # only the chief writes
            say(f"no scores here: {workdir} is not the folder of the chief; give all workers the same")
        elif hdf5 and chief:
            _write_model(keras.models.load_model(kept, compile=False), workdir / "model.h5")
        probabilities, scores = _score(kept, data, validation, config.views, score_test)
        metrics = {
            "recipe": config.recipe,
            "dataset": data.name,
            "n_train": n_train,
            "n_validation": n_validation,
            "n_test": n_test,
            "params": parameters,
            **trained,
            **scores,
            "views": config.views,
            "pflop": engine.pflop(),
            "strategy": type(strategy).__name__,
            "replicas": replicas,
            "precision": policy,
            "seed": config.seed,
            "total_seconds": round(run.elapsed(), 2),
        }
        if chief:
            if full_report:
                report.write_run(
                    workdir,
                    config=record,
                    metrics=metrics,
                    history=run.history,
                    dataset=data,
                    test_probabilities=probabilities,
                )
            # Last of all: a run is finished when it has its metrics.
            report.write_atomic(workdir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
            (workdir / "state.npz").unlink(missing_ok=True)
    _summarise(say, metrics, workdir)
    return metrics


def _record(config: Config, data: Dataset, data_dir: str | None, parameters: int) -> dict[str, Any]:
    """What config.json holds: the config, and what the run found (`config.RECORDED`)."""
    return {
        **config.to_dict(),
        "class_names": list(data.class_names),
        "data_dir": data_dir and str(data_dir),
        "data_source": data.source,
        "fingerprint": datasets.fingerprint(data),
        "parameters": parameters,
        "command": "python " + " ".join(sys.orig_argv[1:]),
        "environment": runtime.describe(),
    }


def _score(
    kept: Path, data: Dataset, validation: Sequence[np.ndarray], views: int, wanted: bool
) -> tuple[np.ndarray, dict[str, float | None]]:
    """Probabilities [n, classes] of the test images by the model file `kept`, and their scores for metrics.json.

    Without test images: the probabilities of the validation images, and scores of None. Where they are not
    `wanted`, or there is no model file, which only a chief writes: neither.
    """
    scores: dict[str, float | None] = {"test_loss": None, "test_accuracy": None, "test_accuracy_views": None}
    tested = len(data.test_labels) > 0
    images, labels = (data.test_images, data.test_labels) if tested else validation
    if not (wanted and len(labels) and kept.exists()):
        return np.zeros((0, data.num_classes), np.float32), scores
    model = keras.models.load_model(kept, compile=False)
    averaged = scoring.predict_probabilities(model, images, views=views)
    if tested:
        plain = scoring.predict_probabilities(model, images) if views > 1 else averaged
        one, several = (scoring.score(labels, p) for p in (plain, averaged))
        scores = {
            "test_loss": one["loss"],
            "test_accuracy": one["accuracy"],
            "test_accuracy_views": several["accuracy"],
        }
    return averaged, scores


def _new_folder(config: Config, strategy: tf.distribute.Strategy) -> str:
    """runs/<recipe>-<time>. Raises ConfigError in a cluster, whose workers would each have another."""
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise ConfigError("workdir is None; allowed with several workers: a folder that all of them share")
    return f"runs/{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


@contextlib.contextmanager
def _held(workdir: Path) -> Iterator[None]:
    """Makes the run folder, and keeps other runs out of it. A folder that was made and left empty goes again.

    Raises RunError where it cannot be written to, or another run is at work in it.
    """

    def busy() -> None:
        raise Busy(
            f"another run is at work in {workdir}; wait for its end, or choose another folder with --workdir"
        )

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(datasets.hold(workdir, busy))
            (workdir / ".writable").touch()
            (workdir / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(workdir, error) from error
        yield


def remove(workdir: Path, marker: str, written: Iterable[str]) -> None:
    """Removes `written`, files and folders, from where the file `marker` tells that they lie. Raises RunError."""
    if not (workdir / marker).exists():
        return
    try:
        for path in (workdir / name for name in written):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(workdir, error) from error


def _unwritable(workdir: Path, error: OSError) -> RunError:
    return RunError(f"cannot write to {workdir}: {error.strerror}; choose another folder with --workdir")


def _unfinished(workdir: Path, config: Config) -> dict | None:
    """The state of an unfinished run of `config` in the folder, if any. Raises ConfigError where it is taken."""
    if not (workdir / "config.json").exists():
        return None
    if (workdir / "metrics.json").exists():
        raise ConfigError(f"{workdir} holds a finished run; {WAY_OUT}")
    try:
        there = Config.from_record(
            dict(json.loads((workdir / "config.json").read_text(encoding="utf-8")))
        ).to_dict()
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{workdir / 'config.json'} is damaged ({error}); {WAY_OUT}") from error
    ours = config.to_dict()
    different = [key for key in ours if there.get(key) != ours[key]]
    if different:
        key = different[0]
        raise ConfigError(
            f"{workdir} holds an unfinished run of another configuration ({key} {there.get(key)!r}, now {ours[key]!r});"
            f" {WAY_OUT}"
        )
    if not (workdir / "state.npz").exists():
        return None
    try:
        with open(workdir / "state.npz", "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(_damaged(workdir, error)) from error


def _damaged(workdir: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"{workdir / 'state.npz'} is damaged, or of other data ({reason}); delete it to begin this run again"
    )


def _write_model(model: keras.Model, path: Path) -> None:
    """Saves `model` in the format that the name of `path` ends in, whole or not at all. Raises RunError."""
    with report.replacing(path) as temporary:
        model.save(temporary)


class _Run:
    """The loop over epochs, and what it remembers."""

    def __init__(
        self, engine, workdir, fingerprint, *, chief, callbacks, verbose, full_report, since, overwrite
    ):
        self.engine, self.config, self.workdir = engine, engine.config, workdir
        self.fingerprint, self.chief, self.full_report = fingerprint, chief, full_report
        self.overwrite = overwrite
        self.history: list[dict[str, Any]] = []
        self.best, self.best_epoch, self.target = None, None, None
        self.images, self.step_seconds = 0, 0.0
        self._memories: list[dict[str, Any]] = []  # of callbacks, from before this process
        self._since = since  # the clock of this process's part of the run
        self._began = self._saved = time.time()  # the loop, in this process; the last save
        self._before = {"seconds": 0.0, "elapsed": 0.0, "epoch_seconds": 0.0}  # of earlier processes
        self._epoch_began = 0.0
        # The callbacks' model shares the plain model's layers, so that an optimizer attached to it is not saved.
        self._face = keras.Model(engine.model.input, engine.model.output, name=engine.model.name)
        self._face.optimizer = engine.optimizer
        self._face.stop_training = False
        self._recipe_callbacks = self._make_callbacks()
        self.callbacks = keras.callbacks.CallbackList(
            [*self._recipe_callbacks, *callbacks],
            add_history=False,
            add_progbar=chief and bool(verbose),
            model=self._face,
            epochs=self.epochs,
            steps=engine.steps_per_epoch,
            verbose=verbose if chief else 0,
        )

    def metrics(self) -> dict[str, Any]:
        """What the loop knows of metrics.json."""
        epoch, seconds = self.target or (None, None)
        return {
            "epochs": self.history[-1]["epoch"],
            "best_epoch": self.best_epoch,
            "best_val_accuracy": self.best,
            "target": self.config.target,
            "epoch_at_target": epoch,
            "seconds_to_target": seconds and round(seconds, 2),
            "train_seconds": round(self.seconds(), 2),
            "images_per_second": round(self.images / self.step_seconds, 1) if self.step_seconds else None,
        }

    @property
    def epochs(self) -> int:
        return -(-self.engine.steps // self.engine.steps_per_epoch)

    def _make_callbacks(self) -> list[keras.callbacks.Callback]:
        c, found = self.config, []
        if c.early_stopping is not None:
            found.append(keras.callbacks.EarlyStopping(monitor="val_loss", patience=c.early_stopping))
        if c.schedule.name == "plateau":
            found.append(
                keras.callbacks.ReduceLROnPlateau(
                    monitor="val_loss",
                    factor=c.schedule.drop,
                    patience=c.schedule.patience,
                    min_lr=c.schedule.end * c.optimizer.learning_rate,
                )
            )
        if self.chief and self.full_report:
            found.append(keras.callbacks.TensorBoard(self.workdir / "tensorboard", write_graph=False))
        return found

    def seconds(self) -> float:
        """Spent in the loop by all processes of this run: training, validation, saving."""
        return self._before["seconds"] + time.time() - self._began

    def elapsed(self) -> float:
        """Spent in this run by all its processes, each from its very start, imports included."""
        return self._before["elapsed"] + time.time() - self._since

    def loop(self, validation, signals) -> None:
        """Trains from where the engine stands to the end, or until a callback or a signal stops it."""
        engine, per_epoch = self.engine, self.engine.steps_per_epoch
        (mean_step,) = runtime.mean_over_workers(engine.strategy, engine.step)
        if mean_step != engine.step:
            raise RunError(
                f"this worker is at step {engine.step}, others are not; resume with a --workdir that all share"
            )
        count, self._began = 1, time.time()
        self.callbacks.on_train_begin()
        # Keras's callbacks forget in on_train_begin.
        for callback, memory in zip(self._recipe_callbacks, self._memories, strict=False):
            vars(callback).update(memory)
        while engine.step < engine.steps and not self._face.stop_training:
            epoch = engine.step // per_epoch
            end = min((epoch + 1) * per_epoch, engine.steps)
            self._epoch_began = time.time() - self._before["epoch_seconds"]
            self._before["epoch_seconds"] = 0.0
            self.callbacks.on_epoch_begin(epoch)
            while engine.step < end:
                # All workers of a cluster take as many steps a call, and stop together.
                wanted, caught = runtime.mean_over_workers(engine.strategy, count, bool(signals.caught))
                if caught:
                    self._interrupted(signals.caught or "a signal to another worker")
                count = int(wanted)
                before, start = engine.step, time.perf_counter()
                self.callbacks.on_train_batch_begin(before - epoch * per_epoch)
                logs = engine.train(min(count, end - before))
                self.callbacks.on_train_batch_end(engine.step - 1 - epoch * per_epoch, logs)
                done, spent = engine.step - before, time.perf_counter() - start
                self.images += done * self.config.batch_size
                self.step_seconds += spent
                # As many steps a call as fit the time: the results do not depend on it.
                count = int(np.clip(CALL_SECONDS / (spent / done), 1, min(2 * count, 1024)))
            self._end_epoch(epoch, validation)
        self.callbacks.on_train_end()
        if self.best_epoch is None:
            self.best_epoch = self.history[-1]["epoch"]
            self._save_model()
        if self.chief:
            self.save()  # what comes now may be interrupted, too, and the training be kept
        runtime.mean_over_workers(engine.strategy, 0)  # now the chief has saved the model

    def _end_epoch(self, epoch, validation) -> None:
        engine, logs = self.engine, dict(self.engine.progress.logs())
        last = engine.step >= engine.steps
        rate = float(np.asarray(engine.optimizer.learning_rate))
        if len(validation[0]) and (last or (epoch + 1) % self.config.validation_interval == 0):
            self.callbacks.on_test_begin()
            scores = engine.evaluate(*validation)
            logs.update({f"val_{k}": v for k, v in scores.items()})
            self.callbacks.on_test_end(scores)
        row = {
            "epoch": epoch + 1,
            **{k: logs.get(k) for k in ("loss", "accuracy", "val_loss", "val_accuracy")},
        }
        seconds = round(time.time() - self._epoch_began, 3)
        self.history.append({**row, "learning_rate": rate, "seconds": seconds})
        engine.export()
        reached = logs.get("val_accuracy")
        if reached is not None:
            if self.best is None or reached > self.best:
                self.best, self.best_epoch = reached, epoch + 1
                self._save_model()
            if self.target is None and reached >= self.config.target:
                self.target = (epoch + 1, self.elapsed())
        self.callbacks.on_epoch_end(epoch, {**logs, "learning_rate": rate})
        engine.progress = Progress()
        if self.chief:
            report.write_history(self.workdir / "history.csv", self.history)
            ends = last or self._face.stop_training  # then `loop` saves
            if not ends and time.time() - self._saved > SAVE_SECONDS:
                self.save()

    def _interrupted(self, by: str) -> None:
        self.callbacks.on_train_end()
        if self.best_epoch is None:
            self.engine.export()
            self._save_model()
        if self.chief:
            self.save()
        runtime.mean_over_workers(self.engine.strategy, 0)  # no worker leaves, or resumes, before that
        how = f"stopped by {by} at step {self.engine.step:,} of {self.engine.steps:,}"
        raise interrupted(how, self.workdir, self.overwrite)

    def _save_model(self) -> None:
        if self.chief:
            _write_model(self.engine.model, self.workdir / "model.keras")

    # -- resuming ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes all that the rest of the run depends on: variables, step, callbacks, history."""
        within = self.engine.step % self.engine.steps_per_epoch  # an epoch
        meta = {
            "data": self.fingerprint,
            "environment": self._environment(),
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "target": self.target,
            "images": self.images,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds(),
            "elapsed": self.elapsed(),
            "epoch_seconds": time.time() - self._epoch_began if within else 0.0,
            "stopped": self._face.stop_training and not within,
            "callbacks": [
                {k: v for k, v in vars(c).items() if k in REMEMBERED} for c in self._recipe_callbacks
            ],
        }
        with report.replacing(self.workdir / "state.npz") as temporary:
            np.savez(temporary, meta=np.array(json.dumps(meta)), **self.engine.state())
        self._saved = time.time()

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes up what `save` wrote. Raises ConfigError where the run was another, RunError on a damaged state."""
        try:
            meta = json.loads(str(arrays["meta"]))
            now = self._environment()
            data, before = meta["data"], {name: meta["environment"][name] for name in now}
            self.history, self.best, self.best_epoch = meta["history"], meta["best"], meta["best_epoch"]
            self.target = meta["target"] and tuple(meta["target"])
            self.images, self.step_seconds = meta["images"], meta["step_seconds"]
            self._before = {name: meta[name] for name in self._before}
            self._face.stop_training = meta["stopped"]
            self._memories = meta["callbacks"]
        except (KeyError, ValueError, TypeError) as error:
            raise RunError(_damaged(self.workdir, error)) from error
        if data != self.fingerprint:
            raise ConfigError(
                f"{self.workdir} holds an unfinished run on other images; {WAY_OUT}, or give it its own images"
            )
        for name, was in before.items():
            if was != now[name]:
                raise ConfigError(
                    f"{self.workdir} holds an unfinished run with {name} {was}, now {now[name]}; {WAY_OUT}, or"
                    f" give it what it had"
                )
        try:
            self.engine.restore(arrays)
        except (KeyError, ValueError) as error:
            raise RunError(_damaged(self.workdir, error)) from error
        self.engine.export()

    def _environment(self) -> dict[str, str | int]:
        """What "auto" and the machine decide, and results depend on."""
        return {"precision": self.engine.policy, "replicas": self.engine.replicas}


def _summarise(say, metrics: dict[str, Any], workdir: Path) -> None:
    def percent(x: float | None) -> str:
        return "-" if x is None else f"{100 * x:.2f}%"

    say(f"\n{metrics['recipe']}, {metrics['epochs']} epochs, {metrics['train_seconds']:,.1f} s")
    say(f"  validation accuracy  {percent(metrics['best_val_accuracy'])} (epoch {metrics['best_epoch']})")
    views = metrics["views"]
    more = f", {percent(metrics['test_accuracy_views'])} averaged over {views} views" if views > 1 else ""
    say(f"  test accuracy        {percent(metrics['test_accuracy'])}{more}")
    goal, at = percent(metrics["target"]), metrics["seconds_to_target"]
    reached = f"after {at:,.1f} s (epoch {metrics['epoch_at_target']})" if at else "not reached"
    say(f"  target {goal:<13} {reached}")
    say(f"  files                {workdir}/  (report.html, model.keras, metrics.json)")
