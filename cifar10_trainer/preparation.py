"""What a run needs before its first step: images, the engine, and what its folder records of them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from . import accelerate, adaptation, cluster, datasets, runtime, summary
from .config import Config
from .datasets import Dataset
from .engine import Engine, make_engine
from .errors import ConfigError, shown
from .files import expanded
from .loop import saved_precision
from .machine import check_fits
from .model_file import ModelInfo
from .models import own, transfer
from .process import Log
from .run_folder import RunFolder


def check_arguments(
    config: Any, data: Any, dataset: Any, data_dir: Any, beside: tuple[Any, ...] = ()
) -> None:
    """Raises ConfigError without a Config, and where the arguments name several sources of images, or parts of none."""
    if not isinstance(config, Config):
        raise ConfigError(f"config is {shown(config)}; allowed: a Config, such as RECIPES['fast.85']")
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


def has_depthwise(config: Config, model: keras.Model | None = None) -> bool:
    """Whether the network has depthwise convolutions. model: the user's own; None: the config's, which is not built for this."""
    if model is not None:  # what is no model is refused later
        return isinstance(model, keras.Model) and accelerate.has_depthwise(model)
    backbone = transfer.BACKBONES.get(str(config.options.get("backbone")))
    return config.architecture == "transfer" and backbone is not None and backbone.depthwise


def agree_on_precision(
    config: Config, model: keras.Model | None, saved: Any, team: cluster.Team | None, log: Log
) -> str:
    """`runtime.agree_on_precision` for a run of `config`. model: the user's own; saved: the state that it resumes."""
    depthwise = has_depthwise(config, model)
    return runtime.agree_on_precision(
        config.precision, saved_precision(saved), team, log, depthwise=depthwise
    )


def load(
    config: Config,
    given: Any,
    beside: tuple[Any, ...],
    data_dir: str | os.PathLike[str] | None,
    folder: RunFolder,
    resumed: bool,
    options: Mapping[str, Any] | None,
    log: Log,
) -> Dataset:
    """The data set that the caller has given or, where that is None, the one of the config.

    Where the data set is loaded here, the caller must keep no second reference to it: its images would stay in memory beside
    the parts that `prepare` splits off. beside: what `datasets.as_dataset` takes beside `given`. folder: of the run. resumed:
    whether the run resumes, and so reads the files that it began with.
    """
    if given is not None:
        return datasets.as_dataset(given, *beside)
    own: dict[str, Any] = {"log": log, **(options or {})}
    if config.dataset == "folder":
        files = folder.read_split() if resumed else None
        # The data set, and the table that batches come from; `prepare` looks again when it knows whether it splits.
        own |= {"files": files, "workdir": folder.path, "copies": 2}
    data = datasets.load(config.dataset, data_dir, config.image_size, config.resize, **own)
    fraction = None if "validation_fraction" in config.adapt else config.validation_fraction
    if data.validation is not None and fraction is not None and not resumed:
        log(
            f"validation_fraction ({fraction}) is not used: {data.source} has validation images of its own; move them to its"
            " training images to use it"
        )
    return data


def adapt(config: Config, data: Dataset, strategy: tf.distribute.Strategy, log: Log) -> Config:
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


def prepare(
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
    # The table that batches come from, and where images are held out the part that trains.
    splits = data.validation is None and config.validation_fraction is not None
    size = (1 + splits) * data.train_images.nbytes
    check_fits(size, f"training on {len(data.train_images):,} images of {data.source}")
    images, labels, *held_out = _split(config, data)
    validation = (held_out[0], held_out[1])
    if not len(validation[1]) and (config.early_stopping is not None or config.schedule.name == "plateau"):
        raise ConfigError(
            "there are no validation images, but early stopping and the plateau schedule watch val_loss; allowed:"
            " validation data, or neither of them"
        )
    replicas, mixes = strategy.num_replicas_in_sync, config.augmentation.mixes
    runtime.check_batch(config.batch_size, len(images), replicas, mixes=mixes)
    log(
        f"data: {data.name} from {data.source}: {len(images):,} images to train on, "
        f"{len(validation[0]):,} to validate, {len(data.test_images):,} to test"
    )
    with runtime.at_work(strategy):
        engine = make_engine(
            config,
            images,
            labels,
            num_classes=data.num_classes,
            strategy=strategy,
            policy=policy,
            model=model,
        )
    engine.model.info = ModelInfo(tuple(data.class_names), data.resize)
    log(
        f"model: {config.recipe if model is None else model.name}, {engine.model.count_params():,} parameters; "
        f"{engine.steps:,} steps of {config.batch_size}"
    )
    if not engine.resumes_exactly:
        log(
            "note: a layer of the model draws from tf.random, whose state cannot be saved; if this run is interrupted, it resumes"
            " with other random numbers (those of keras.random are saved)"
        )
    if engine.compiled:
        programs = max(1, len(set(engine.sizes)))
        log(f"XLA compiles {programs} program(s) on the way, which takes about half a minute each")
    del images
    files = _split_files(config, data)
    data = dataclasses.replace(
        data, train_images=engine.images, train_labels=labels, validation=validation, files=files
    )
    summary.warn_of_few(data, log)
    return engine, data, validation


def agree_on_data(
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


def recorded_path(data_dir: str | os.PathLike[str] | None) -> str | None:
    """`data_dir` as config.json has it: from anywhere the same folder."""
    return str(expanded(data_dir).absolute()) if data_dir else None


def describe_run(
    config: Config,
    data: Dataset,
    data_dir: str | os.PathLike[str] | None,
    engine: Engine,
    fingerprint: str,
    own_model: str | None,
) -> dict[str, Any]:
    """What config.json holds: the config, and what the run found (`config.RECORDED`). own_model: its digest."""
    return {
        **config.to_dict(),
        "class_names": list(data.class_names),
        "data_dir": recorded_path(data_dir or (data.source if data.name == "folder" else None)),
        "data_name": data.name,
        "data_source": data.source,
        "fingerprint": fingerprint,
        "parameters": engine.model.count_params(),
        **({} if own_model is None else {"own_model": own_model}),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "environment": {**runtime.describe(), "precision": engine.policy},  # what "auto" became
    }
