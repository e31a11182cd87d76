"""Keras callbacks in a run: each class that Keras ships, and what users write, beside the same in `Model.fit`.

Both train the same small model from the same weights, on the batches of `make_dataset`, so the results are comparable.
"""

from __future__ import annotations

import csv
import json
import os
import signal
from collections import defaultdict

import keras
import numpy as np
import pytest

from cifar10_trainer import (
    Averaging,
    Config,
    ConfigError,
    Optimizer,
    RunError,
    RunInterrupted,
    Schedule,
    hooks,
    load_data,
    make_dataset,
    train,
)
from cifar10_trainer.run_folder import RunFolder

BATCH, STEPS, EPOCHS, RATE = 40, 6, 3, 0.05
CONFIG = Config(
    recipe="callbacks",
    epochs=EPOCHS,
    batch_size=BATCH,
    optimizer=Optimizer(name="sgd", learning_rate=RATE, momentum=0, nesterov=False, weight_decay=0),
    schedule=Schedule(name="constant"),
    averaging=Averaging(every=0),
    validation_fraction=None,
    label_smoothing=0,
    whitening=False,
    precision="float32",
    strategy="none",
)


@pytest.fixture(scope="module")
def data():
    digits = load_data("digits")
    n = BATCH * STEPS
    return (
        (digits.train_images[:n], digits.train_labels[:n]),
        (digits.test_images[:120], digits.test_labels[:120]),
    )


def small_model():
    """Equal weights each time."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Rescaling(1 / 255),
            layers.AveragePooling2D(4),
            layers.Flatten(),
            layers.Dense(
                10, activation="softmax", kernel_initializer=keras.initializers.GlorotUniform(seed=1)
            ),
        ]
    )
    return model


def in_train(data, workdir, callbacks, config=CONFIG, **options):
    """Trains by `train`. Returns the model."""
    model = small_model()
    training, validation = data
    options = {"verbose": 0, "full_report": False, "validation_data": validation, **options}
    train(config, workdir, data=training, model=model, callbacks=callbacks, score_test=False, **options)
    return model


def in_fit(data, callbacks, epochs=EPOCHS):
    """The same by `Model.fit`. Returns the model."""
    model = small_model()
    model.compile(keras.optimizers.SGD(RATE), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    (images, labels), validation = data
    model.fit(
        make_dataset(images, labels, BATCH, seed=CONFIG.seed),
        epochs=epochs,
        shuffle=False,
        validation_data=validation,
        validation_batch_size=500,
        callbacks=callbacks,
        verbose=0,
    )
    return model


class Last(keras.callbacks.Callback):
    """The weights at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())


def same(found, expected, tolerance=2e-5):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)


def assert_equal_training(data, tmp_path, make, epochs=EPOCHS):
    """Trains with the callbacks that `make` returns, and so in fit; each gets a folder. Returns both lists of callbacks."""
    found, expected = [], []
    for name, there in (("train", found), ("fit", expected)):
        folder = tmp_path / name
        folder.mkdir()
        made = make(folder)
        there += [*(made if isinstance(made, list) else [made]), Last()]
    in_train(data, tmp_path / "run", found, CONFIG.override(epochs=epochs))
    in_fit(data, expected, epochs)
    assert len(found[-1].weights) == len(expected[-1].weights) > 0
    for one, other in zip(found[-1].weights, expected[-1].weights, strict=True):
        same(one, other)
    return found, expected


def test_without_callbacks_train_and_fit_do_the_same(data, tmp_path):
    """So what follows compares callbacks, not trainers."""
    assert_equal_training(data, tmp_path, lambda folder: [])


# --- each class that Keras ships ----------------------------------------------------------------------------


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def check_csv_logger(data, tmp_path):
    assert_equal_training(data, tmp_path, lambda folder: keras.callbacks.CSVLogger(folder / "log.csv"))
    found, expected = (read_csv(tmp_path / name / "log.csv") for name in ("train", "fit"))
    for row, wanted in zip(found, expected, strict=True):
        assert set(row) - set(wanted) == {"learning_rate"}
        for key, value in wanted.items():
            assert float(row[key]) == pytest.approx(float(value), abs=1e-4), key


def check_early_stopping(data, tmp_path):
    def make(folder):
        # Nothing improves by 10, so the first epoch stays the best one.
        return keras.callbacks.EarlyStopping(
            "val_accuracy", min_delta=10, patience=2, restore_best_weights=True
        )

    found, expected = assert_equal_training(data, tmp_path, make, epochs=6)
    assert found[0].stopped_epoch == expected[0].stopped_epoch == 2
    assert found[0].best == pytest.approx(expected[0].best) and found[0].monitor_op is keras.ops.greater
    # Nothing held out: the run keeps the last weights, and those are what the callback has restored.
    callback = keras.callbacks.EarlyStopping("loss", min_delta=10, patience=2, restore_best_weights=True)
    first = Last()
    model = in_train((data[0], None), tmp_path / "restored", [callback, first], CONFIG.override(epochs=6))
    same(model.get_weights(), first.weights[0], 0)
    assert not np.array_equal(first.weights[-1][0], first.weights[0][0])


def check_model_checkpoint(data, tmp_path):
    def make(folder):
        kind = keras.callbacks.ModelCheckpoint
        return [
            kind(folder / "{epoch}-{batch}.weights.h5", save_weights_only=True, save_freq=4),
            kind(folder / "best.keras", monitor="val_accuracy", save_best_only=True),
        ]

    assert_equal_training(data, tmp_path, make)
    names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("train", "fit")]
    assert names[0] == names[1] and len(names[0]) == 5
    for name in names[0][:-1]:
        models = []
        for folder in ("train", "fit"):
            models.append(small_model())
            models[-1].load_weights(tmp_path / folder / name)
        same(*(model.get_weights() for model in models))
    found, expected = (
        keras.models.load_model(tmp_path / folder / "best.keras") for folder in ("train", "fit")
    )
    same(found.get_weights(), expected.get_weights())
    same([found.predict(data[1][0], verbose=0)], [expected.predict(data[1][0], verbose=0)])


def check_learning_rate_scheduler(data, tmp_path):
    def make(folder):
        return keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)

    found, expected = assert_equal_training(data, tmp_path, make)
    rates = [float(callbacks[0].model.optimizer.learning_rate) for callbacks in (found, expected)]
    assert rates == [pytest.approx(RATE / 8)] * 2
    linear = CONFIG.override(schedule__name="linear")
    with pytest.raises(ConfigError, match=r"LearningRateScheduler, but the schedule linear sets .*constant"):
        in_train(data, tmp_path / "no", make(None), linear)


def check_reduce_lr_on_plateau(data, tmp_path):
    def make(folder):
        return keras.callbacks.ReduceLROnPlateau("val_accuracy", factor=0.1, patience=1, min_delta=10)

    found, expected = assert_equal_training(data, tmp_path, make)
    rates = [float(callbacks[0].model.optimizer.learning_rate) for callbacks in (found, expected)]
    assert rates == [pytest.approx(RATE / 100)] * 2
    with pytest.raises(ConfigError, match=r"ReduceLROnPlateau, but the schedule cosine with warmup"):
        in_train(
            data, tmp_path / "no", make(None), CONFIG.override(schedule=Schedule(name="cosine", warmup=0.1))
        )


def check_lambda_callback(data, tmp_path):
    def make(folder):
        (seen,) = lists[folder.name] = [[]]
        return keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: seen.append((batch, round(logs["accuracy"], 4))),
            on_train_end=lambda logs: seen.append(sorted(logs)),
        )

    lists = {}
    assert_equal_training(data, tmp_path, make)
    (found,), (expected,) = lists["train"], lists["fit"]
    assert found[:-1] == expected[:-1] and len(found) == STEPS * EPOCHS + 1
    assert found[-1] == sorted([*expected[-1], "learning_rate"])


def check_history(data, tmp_path):
    found, expected = assert_equal_training(data, tmp_path, lambda folder: keras.callbacks.History())
    assert found[0].params == {**expected[0].params} and found[0].epoch == expected[0].epoch
    assert found[0].model.history is found[0]
    for key, values in expected[0].history.items():
        assert found[0].history[key] == pytest.approx(values, abs=1e-4), key


def check_remote_monitor(data, tmp_path):
    posted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "requests.post", lambda url, data, headers: posted.append((url, json.loads(data["data"])))
        )
        assert_equal_training(data, tmp_path, lambda folder: keras.callbacks.RemoteMonitor("http://here"))
    for (url, found), (wanted_url, wanted) in zip(posted[:EPOCHS], posted[EPOCHS:], strict=True):
        assert url == wanted_url and set(found) - set(wanted) == {"learning_rate"}
        assert all(found[key] == pytest.approx(value, abs=1e-4) for key, value in wanted.items())


def read_events(folder):
    """Tag -> steps, of all event files in a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = defaultdict(list)
    for path in sorted(folder.rglob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found[f"{path.parent.name}/{value.tag}"].append(event.step)
    return dict(found)


def check_tensorboard(data, tmp_path):
    def make(folder):
        return keras.callbacks.TensorBoard(
            folder, update_freq=2, histogram_freq=1, write_graph=False, write_steps_per_second=True
        )

    assert_equal_training(data, tmp_path, make)
    found, expected = (read_events(tmp_path / name) for name in ("train", "fit"))
    found = {tag.replace("sequential_1", "sequential"): steps for tag, steps in found.items()}
    by_part = [
        {tag: steps for tag, steps in events.items() if "histogram" not in tag}
        for events in (found, expected)
    ]
    assert by_part[0] == by_part[1]
    assert by_part[0]["train/batch_loss"] == list(range(2, STEPS * EPOCHS + 1, 2))
    histograms = [sorted(steps for tag, steps in e.items() if "histogram" in tag) for e in (found, expected)]
    assert histograms[0] == histograms[1] == [[0, 1, 2]] * 2


def check_progbar_logger(data, tmp_path):
    callback = keras.callbacks.ProgbarLogger()
    in_train(data, tmp_path, callback, verbose=1)
    assert callback.seen == callback.target == STEPS and callback.epochs == EPOCHS


def check_terminate_on_nan(data, tmp_path):
    """A run whose loss is not finite ends by itself, with an error of one line, before the callback sees it."""
    callback, weights = keras.callbacks.TerminateOnNaN(), Last()
    in_train(data, tmp_path / "fine", [callback, weights])
    assert len(weights.weights) == EPOCHS
    spoil = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: spoil.model.set_weights(nan))
    nan = [np.nan * w for w in small_model().get_weights()]
    with pytest.raises(RunError, match=r"the loss is nan at step 1: training diverged"):
        in_train(data, tmp_path / "run", [spoil, callback])


def check_callback_list(data, tmp_path):
    inner = Last()
    in_train(data, tmp_path, keras.callbacks.CallbackList([inner]))
    assert len(inner.weights) == EPOCHS and inner.params["epochs"] == EPOCHS


def check_backup_and_restore(data, tmp_path):
    with pytest.raises(ConfigError, match="BackupAndRestore, but a run saves its own state"):
        in_train(data, tmp_path / "run", keras.callbacks.BackupAndRestore(tmp_path / "backup"))
    assert not (tmp_path / "run").exists()


def check_swap_ema_weights(data, tmp_path):
    """In fit, too, it is an error without an optimizer that has `use_ema`."""
    with pytest.raises(ValueError, match="use_ema"):
        in_fit(data, keras.callbacks.SwapEMAWeights())
    with pytest.raises(ConfigError, match="SwapEMAWeights, but no optimizer here keeps an EMA"):
        in_train(data, tmp_path / "run", keras.callbacks.SwapEMAWeights())


def check_orbax_checkpoint(data, tmp_path):
    """It needs a package of its own. Keras says so before any training could know the callback."""
    try:
        import orbax.checkpoint  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="orbax"):
            keras.callbacks.OrbaxCheckpoint(tmp_path)
        return
    assert_equal_training(data, tmp_path, lambda folder: keras.callbacks.OrbaxCheckpoint(folder))
    assert any((tmp_path / "train").iterdir())


class Recorder(keras.callbacks.Callback):
    """Every hook that is called, with its number and the names in its logs."""

    def __init__(self):
        super().__init__()
        self.calls = []


def _record(hook, numbered):
    if numbered:
        return lambda self, number, logs=None: self.calls.append((hook, number, sorted(logs or {})))
    return lambda self, logs=None: self.calls.append((hook, sorted(logs or {})))


for _part in ("train", "test", "predict", "epoch", "train_batch", "test_batch", "predict_batch"):
    for _moment in ("begin", "end"):
        _hook = f"on_{_part}_{_moment}"
        setattr(Recorder, _hook, _record(_hook, "batch" in _part or _part == "epoch"))


def check_callback(data, tmp_path):
    """All hooks come in the order of fit, with the same numbers and logs; "learning_rate" is one more at an epoch's end."""
    found, expected = assert_equal_training(data, tmp_path, lambda folder: Recorder())
    without_rate = [
        tuple([n for n in part if n != "learning_rate"] if isinstance(part, list) else part for part in call)
        for call in found[0].calls
    ]
    assert without_rate == expected[0].calls
    assert found[0].params == expected[0].params


CHECKS = {
    "BackupAndRestore": check_backup_and_restore,
    "CSVLogger": check_csv_logger,
    "Callback": check_callback,
    "CallbackList": check_callback_list,
    "EarlyStopping": check_early_stopping,
    "History": check_history,
    "LambdaCallback": check_lambda_callback,
    "LearningRateScheduler": check_learning_rate_scheduler,
    "ModelCheckpoint": check_model_checkpoint,
    "OrbaxCheckpoint": check_orbax_checkpoint,
    "ProgbarLogger": check_progbar_logger,
    "ReduceLROnPlateau": check_reduce_lr_on_plateau,
    "RemoteMonitor": check_remote_monitor,
    "SwapEMAWeights": check_swap_ema_weights,
    "TensorBoard": check_tensorboard,
    "TerminateOnNaN": check_terminate_on_nan,
}
SHIPPED = [name for name in dir(keras.callbacks) if isinstance(getattr(keras.callbacks, name), type)]


@pytest.mark.parametrize("name", SHIPPED)
def test_what_keras_ships_works_as_in_fit_or_is_refused(name, data, tmp_path):
    assert name in CHECKS, f"a callback of Keras without a test: {name}"
    CHECKS[name](data, tmp_path)


# --- what users write ---------------------------------------------------------------------------------------


class Halve(keras.callbacks.Callback):
    """Halves the weights at one moment."""

    def __init__(self, hook, epoch=1, batch=2):
        super().__init__()
        self.epoch, self.now = epoch, -1
        if "batch" in hook:
            setattr(self, hook, lambda number, logs=None: self.act(number == batch))
        elif "epoch" in hook:
            setattr(self, hook, lambda number, logs=None: self.act(number == epoch, always=True))
        else:
            setattr(self, hook, lambda logs=None: self.act(True, always=hook != "on_test_end"))

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def act(self, due, always=False):
        if due and (always or self.now == self.epoch):
            self.model.set_weights([w / 2 for w in self.model.get_weights()])


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_begin",
        "on_epoch_begin",
        "on_train_batch_begin",
        "on_train_batch_end",
        "on_test_batch_begin",
        "on_test_end",
        "on_epoch_end",
    ],
)
def test_weights_that_a_callback_sets_are_trained_on(hook, data, tmp_path):
    batch = 0 if "test" in hook else 2
    found, _ = assert_equal_training(data, tmp_path, lambda folder: Halve(hook, batch=batch))
    plain = Last()
    in_train(data, tmp_path / "plain", plain)
    assert not np.allclose(plain.weights[-1][0], found[-1].weights[-1][0], atol=1e-3)


class Swap(keras.callbacks.Callback):
    """Validates other weights than it trains, as the averages of weights that people write."""

    def on_test_begin(self, logs=None):
        self.kept = self.model.get_weights()
        self.model.set_weights([0 * w for w in self.kept])

    def on_test_end(self, logs=None):
        self.model.set_weights(self.kept)


def test_weights_may_be_others_during_a_validation(data, tmp_path):
    found, _ = assert_equal_training(data, tmp_path, lambda folder: [Swap(), keras.callbacks.History()])
    assert found[1].history["val_loss"] == pytest.approx([np.log(10)] * EPOCHS, abs=1e-5)


class Look(keras.callbacks.Callback):
    """Evaluates and predicts in the middle of an epoch and at its end, sets the learning rate, saves and loads."""

    def __init__(self, data, folder):
        super().__init__()
        self.data, self.folder, self.found = data, folder, []

    def look(self):
        images, labels = self.data
        self.found.append(self.model.evaluate(images, labels, verbose=0))
        self.found.append(self.model.predict(images[:3], verbose=0).ravel())

    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            self.look()
            self.model.optimizer.learning_rate = 0.01 * (1 + int(self.model.optimizer.iterations))
            self.model.save_weights(self.folder / "batch.weights.h5")

    def on_epoch_end(self, epoch, logs=None):
        assert logs["val_accuracy"] == pytest.approx(self.model.evaluate(*self.data, verbose=0)[1], abs=1e-5)
        self.look()
        if epoch == 1:
            self.model.load_weights(self.folder / "batch.weights.h5")


def test_evaluate_predict_and_learning_rate_in_a_callback(data, tmp_path):
    found, expected = assert_equal_training(data, tmp_path, lambda folder: Look(data[1], folder))
    same(found[0].found, expected[0].found, 1e-4)
    assert len(found[0].found) == 4 * EPOCHS


def test_a_schedule_owns_the_learning_rate(data, tmp_path):
    class Set(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.learning_rate = 0.1

    with pytest.raises(
        ConfigError, match=r"sets the learning rate in on_epoch_begin, but the schedule linear"
    ):
        in_train(data, tmp_path, Set(), CONFIG.override(schedule__name="linear"))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (keras.callbacks.History, "class"),
        ("early", "'early'"),
        ([keras.callbacks.History(), 3], "3"),
        (5, "5"),
        (["early"], "'early'"),
    ],
)
def test_what_is_no_callback_is_refused(given, text, data, tmp_path):
    with pytest.raises(
        ConfigError, match=f"callbacks has .*{text}.*; allowed: a keras.callbacks.Callback"
    ) as error:
        in_train(data, tmp_path / "run", given)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_one_callback_several_nested_ones_or_none():
    one, two = keras.callbacks.History(), Last()
    assert hooks.check_callbacks(one, CONFIG) == [one]
    assert hooks.check_callbacks([one, (two, None)], CONFIG) == [one, two]
    assert hooks.check_callbacks((c for c in (two, one)), CONFIG) == [two, one]
    assert hooks.check_callbacks(None, CONFIG) == []


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (lambda path: keras.callbacks.EarlyStopping("val_loss"), 1),
        (lambda path: keras.callbacks.ModelCheckpoint(path / "best.keras"), 1),
        (lambda path: keras.callbacks.TensorBoard(path / "logs"), 1),
        (lambda path: keras.callbacks.ModelCheckpoint(path / "best.keras", save_freq=50), STEPS),
        (lambda path: keras.callbacks.TerminateOnNaN(), STEPS),
        (lambda path: Recorder(), STEPS),
    ],
)
def test_only_a_callback_that_needs_each_step_gets_each_step(make, calls, data, tmp_path, monkeypatch):
    """Otherwise a call of the graph takes as many steps as fit half a second."""
    from cifar10_trainer import Engine

    taken, before = [], Engine.train
    monkeypatch.setattr(Engine, "train", lambda engine, count: taken.append(count) or before(engine, count))
    monkeypatch.setattr("cifar10_trainer.loop.CALL_SECONDS", 1e6)
    in_train(data, tmp_path / "run", make(tmp_path), CONFIG.override(epochs=2))
    assert sum(taken) == 2 * STEPS and taken[-calls:] == [STEPS // calls] * calls


class Interrupt(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_whose_weights_a_callback_changes_resumes_exactly(data, tmp_path):
    """Also where a callback restores the best weights when the interrupted training ends."""
    config = CONFIG.override(averaging=Averaging(every=4, decay=0.9), optimizer__momentum=0.9)

    def changing():
        stopping = keras.callbacks.EarlyStopping("loss", min_delta=10, patience=9, restore_best_weights=True)
        return [Halve("on_train_batch_end"), stopping]

    expected = Last()
    in_train(data, tmp_path / "whole", [*changing(), expected], config)
    parts = Last()
    with pytest.raises(RunInterrupted):
        in_train(data, tmp_path / "parts", [*changing(), parts, Interrupt(STEPS + 4)], config)
    in_train(data, tmp_path / "parts", [*changing(), parts], config)
    for found, wanted in zip(parts.weights, expected.weights, strict=True):
        same(found, wanted, 0)


@pytest.mark.parametrize("step", [STEPS + 4, 2 * STEPS])
def test_a_rate_that_a_scheduler_changes_resumes_exactly(data, tmp_path, monkeypatch, step):
    """A run that resumes within an epoch begins it again, which is not to halve the rate again."""
    monkeypatch.setattr("cifar10_trainer.loop.CALL_SECONDS", 0.0)

    def halving():
        return keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)

    whole, parts = Last(), Last()
    in_train(data, tmp_path / "whole", [halving(), whole], CONFIG)
    with pytest.raises(RunInterrupted):
        in_train(data, tmp_path / "parts", [halving(), Interrupt(step)], CONFIG)
    in_train(data, tmp_path / "parts", [halving(), parts], CONFIG)
    rates = [row["learning_rate"] for row in RunFolder(tmp_path / "parts").read_history()]
    assert rates == pytest.approx([RATE / 2, RATE / 4, RATE / 8])
    same(parts.weights[-1], whole.weights[-1], 0)


def test_weights_that_on_epoch_begin_changes_resume_exactly(data, tmp_path, monkeypatch):
    """Also where another callback's hook follows at the same step, which takes what it finds changed."""
    monkeypatch.setattr("cifar10_trainer.loop.CALL_SECONDS", 0.0)

    def changing():
        return [
            Halve("on_epoch_begin"),
            keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: None),
        ]

    whole, parts = Last(), Last()
    in_train(data, tmp_path / "whole", [*changing(), whole], CONFIG)
    with pytest.raises(RunInterrupted):
        in_train(data, tmp_path / "parts", [*changing(), Interrupt(STEPS + 4)], CONFIG)
    in_train(data, tmp_path / "parts", [*changing(), parts], CONFIG)
    same(parts.weights[-1], whole.weights[-1], 0)


@pytest.mark.parametrize("step", [STEPS + 4, EPOCHS * STEPS])
def test_what_on_train_begin_changes_is_changed_once_in_a_run_that_resumes(data, tmp_path, monkeypatch, step):
    """As where it loads pretrained weights: at the resumed step they would take back what was trained. Also after the last step."""
    monkeypatch.setattr("cifar10_trainer.loop.CALL_SECONDS", 0.0)

    class Start(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.set_weights([w / 2 for w in self.model.get_weights()])
            self.model.optimizer.learning_rate = 0.7 * float(self.model.optimizer.learning_rate)

    kept = in_train(data, tmp_path / "whole", [Start()], CONFIG).get_weights()
    with pytest.raises(RunInterrupted):
        in_train(data, tmp_path / "parts", [Start(), Interrupt(step)], CONFIG)
    same(in_train(data, tmp_path / "parts", [Start()], CONFIG).get_weights(), kept, 0)
    rates = [row["learning_rate"] for row in RunFolder(tmp_path / "parts").read_history()]
    assert rates == pytest.approx([0.7 * RATE] * EPOCHS)


def test_on_train_end_gets_the_last_logs_of_a_run_that_resumes(data, tmp_path, monkeypatch):
    """It is stopped in its last step, or before the first epoch that it resumes has ended."""
    monkeypatch.setattr("cifar10_trainer.loop.CALL_SECONDS", 0.0)
    seen = []

    def end():
        return keras.callbacks.LambdaCallback(on_train_end=lambda logs: seen.append(dict(logs)))

    for step in (STEPS + 1, 3, EPOCHS * STEPS - STEPS - 4):
        with pytest.raises(RunInterrupted):
            in_train(data, tmp_path, [end(), Interrupt(step)], CONFIG)
    in_train(data, tmp_path, [end()], CONFIG)
    in_last_epoch, ended = seen[2], seen[3]
    assert set(ended) == {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"}
    assert ended == in_last_epoch  # nothing was left to train


def test_lookahead_starts_again_from_weights_that_a_callback_sets(data, tmp_path):
    """Otherwise its average would take them back."""

    class Zero(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.set_weights([0 * w for w in self.model.get_weights()])

    weights = Last()
    config = CONFIG.override(averaging=Averaging(every=2, decay=0.99))
    in_train(data, tmp_path, [Zero(), weights], config)
    assert all(not w.any() for w in weights.weights[-1])
