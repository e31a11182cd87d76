"""Several replicas, and several processes, compute what one does.

Devices are set up before TensorFlow starts, so all this runs in processes of its own. This file is their program, too:
`python test_distribution.py replicas2 OUT`, and so on.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cifar10_trainer.precision import native_flags

STEPS = 20
EVALUATED = 1234  # divides neither by the replicas nor by the batch


# --- the program of the processes -----------------------------------------------------------------------


def make_config(**changes):
    from cifar10_trainer.config import Augmentation, Averaging, Config, Optimizer

    return Config(
        architecture="fast",
        options={"filters": (4, 8)},
        optimizer=Optimizer(name="adam", learning_rate=0.005),
        augmentation=Augmentation(flip="random", shift=2),
        averaging=Averaging(every=7),
        synchronize_batch_norm=True,
        batch_size=16,
        epochs=5,
    ).override(**changes)


def pictures(n, seed):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) % 10


def make_engine(strategy, changes, policy="float32", **options):
    """An engine on 64 pictures for `make_config` with `changes`, the same whenever it is made."""
    from cifar10_trainer import models
    from cifar10_trainer.engine import Engine

    config = make_config(**changes)
    import keras

    keras.utils.set_random_seed(0)
    half = (0.5,) * 3
    model = models.build(config, input_shape=(32, 32, 3), num_classes=10, mean=half, std=half)
    return Engine(
        model, config, *pictures(64, 0), strategy=strategy, policy=policy, num_classes=10, **options
    )


def run_engine(strategy, calls=(STEPS,), **options):
    """Losses after each call, the trained engine, and what it finds in evaluation."""
    engine = make_engine(strategy, options.pop("changes", {}), **options)
    losses = []
    for count in calls:
        losses.append(engine.train(count)["loss"])
    images, labels = pictures(EVALUATED, 1)
    scores = engine.evaluate(images, labels)
    # The labels that the plain model gives: each image is right once, or one was left out or counted twice.
    logits = engine.export().predict(images, verbose=0, batch_size=617)
    counted = engine.evaluate(images, logits.argmax(1))["accuracy"] * EVALUATED
    truth = logits[np.arange(EVALUATED), labels]
    result = {
        "losses": losses,
        "accuracy": scores["accuracy"],
        "loss": scores["loss"],
        "counted": counted,
        "plain_accuracy": float(np.mean(logits.argmax(1) == labels)),
        "plain_loss": float(-np.log(truth).mean()),
        "weights": np.concatenate([w.ravel() for w in engine.model.get_weights()]).tolist(),
    }
    return result, engine


def copies_differ(strategy, engine) -> float:
    """The greatest difference between the replicas' copies of a weight."""
    most = 0.0
    for variable in engine.training_model.variables:
        first, *others = (v.numpy() for v in strategy.experimental_local_results(variable.value))
        most = max([most, *(float(np.abs(v - first).max()) for v in others if v.dtype == np.float32)])
    return most


def overflow(strategy, replica):
    """After a step in float16 whose gradients are infinite on `replica`: whether weights changed, all finite; and the scale."""
    import tensorflow as tf

    changes = {"averaging__every": 0, "synchronize_batch_norm": False}
    engine = make_engine(strategy, changes, "mixed_float16")
    engine.optimizer.dynamic_scale.assign(1024.0)
    true_gradients = engine._gradients_of

    def gradients_of(*arguments):
        gradients, *rest = true_gradients(*arguments)
        here = tf.distribute.get_replica_context().replica_id_in_sync_group
        factor = tf.where(tf.equal(here, -1 if replica is None else replica), float("inf"), 1.0)
        return [g * factor for g in gradients], *rest

    engine._gradients_of = gradients_of
    before = [v.numpy() for v in engine.training_model.trainable_variables]
    engine.train(1)
    after = [v.numpy() for v in engine.training_model.trainable_variables]
    changed = any((a != b).any() for a, b in zip(before, after, strict=True))
    finite = all(np.isfinite(a).all() for a in after)
    return changed, finite, float(np.array(engine.optimizer.dynamic_scale))


def dropped(strategy, own_generator=True):
    """A step on one white image a replica, all of one class, through dropout of a half to a dense layer of zeros.

    With rate 1 it sets a weight to the mean, over the images, of (kept ? 2 : 0) * (1 - p), p = 1/2: to the share that kept.

    Args:
        own_generator: whether the dropout is Keras's layer; else a layer that draws from Keras's global generator.

    Returns:
        These shares, and the copies of the state of the dropout's random generator.
    """
    import keras

    from cifar10_trainer import RECIPES
    from cifar10_trainer.engine import make_engine

    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))

    class Drop(keras.layers.Layer):
        def call(self, x, training=False):
            return keras.random.dropout(x, 0.5) if training else x

    x = keras.layers.Dropout(0.5, seed=1)(x) if own_generator else Drop()(x)
    outputs = keras.layers.Dense(2, activation="softmax", kernel_initializer="zeros")(x)
    n = strategy.num_replicas_in_sync
    config = RECIPES["practical.baseline"].override(
        batch_size=n, epochs=1, optimizer={"name": "sgd", "learning_rate": 1.0}, schedule={"name": "constant"}
    )
    images, labels = np.full((n, 8, 8, 3), 255, np.uint8), np.zeros(n, np.int64)
    model = keras.Model(inputs, outputs)
    engine = make_engine(
        config, images, labels, num_classes=2, strategy=strategy, policy="float32", model=model
    )
    engine.train(1)
    (kernel,) = (v for v in engine.training_model.trainable_variables if v.path.endswith("kernel"))
    (state,) = engine.non_trainable
    copies = strategy.experimental_local_results(state.value)
    return {"shares": kernel.numpy()[:, 0].tolist(), "states": [c.numpy().tolist() for c in copies]}


def logical_cpus(n):
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * n)


ONE_BY_ONE = (1,) * STEPS

# Two steps with everything that could depend on the replicas: averaging after each step, another image size in each, four
# images left over at the end of the epoch. 12 images a step are shared by 1, 2, 3 or 4 replicas.
FIRST_STEPS = {
    "optimizer": {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.001},
    "averaging": {"every": 1},
    "sizes": (16, 32),
    "batch_size": 12,
    "epochs": 0.4,
}
MUON = {"name": "muon", "learning_rate": 0.02, "momentum": 0.85}
CLIPPED = {**FIRST_STEPS, "optimizer": {**FIRST_STEPS["optimizer"], "clip_norm": 0.1}}
FIRST = {  # name -> changes and precision
    "sgd": (FIRST_STEPS, "float32"),
    "muon": ({**FIRST_STEPS, "optimizer": MUON}, "float32"),
    "bfloat16": (FIRST_STEPS, "mixed_bfloat16"),
    "mixup": ({**FIRST_STEPS, "augmentation__mixup": 0.4}, "float32"),
    "clip": (CLIPPED, "float32"),
    "clip16": (CLIPPED, "mixed_float16"),
}


def first_steps(strategy, names=tuple(FIRST)):
    """Losses and weights after each of the first steps."""
    found = {}
    for name in names:
        changes, policy = FIRST[name]
        engine = make_engine(strategy, changes, policy)
        assert engine.steps == 2
        losses = [engine.train(1)["loss"] for _ in range(2)]
        weights = np.concatenate([np.ravel(v) for v in engine.training_model.get_weights()])
        found[name] = {"losses": losses, "weights": weights.tolist()}
    return found


def elastic_config(**changes):
    """13 steps with one batch norm over all replicas, so that the number of replicas changes roundings only."""
    return digits_config(batch_size=96, epochs=1.0, synchronize_batch_norm=True, **changes)


def resume(folder, config, **options):
    """The metrics of a resumed run and its last row of history, or its error; and what it printed."""
    import contextlib
    import io

    from cifar10_trainer import datasets
    from cifar10_trainer.errors import ConfigError
    from cifar10_trainer.run_folder import RunFolder
    from cifar10_trainer.training import train_and_evaluate

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            metrics = train_and_evaluate(
                config, folder, dataset=datasets.load("digits"), verbose=2, full_report=False, **options
            )
    except ConfigError as error:
        return {"refused": str(error)}
    return {"metrics": metrics, "row": RunFolder(folder).read_history()[-1], "printed": printed.getvalue()}


def elastic(folder):
    """A run of two replicas: whole, and stopped at step 5, in folders to resume from; resumed on one replica here."""
    import shutil
    import signal

    import keras

    from cifar10_trainer import loop
    from cifar10_trainer.errors import RunInterrupted

    found = {"whole": resume(f"{folder}/whole", elastic_config(strategy="mirrored"))}
    usual, loop.CALL_SECONDS = loop.CALL_SECONDS, 0.0  # one step a call

    def stop(batch, logs=None):
        if batch >= 4:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        stopper = keras.callbacks.LambdaCallback(on_train_batch_end=stop)
        resume(f"{folder}/stopped", elastic_config(strategy="mirrored"), callbacks=[stopper])
    except RunInterrupted as error:
        found["stopped"] = str(error)
    loop.CALL_SECONDS = usual
    for name in ("one", "three", "four"):
        shutil.copytree(f"{folder}/stopped", f"{folder}/{name}")
    one = elastic_config(strategy="none")
    found["refused strategy"] = resume(f"{folder}/one", one)["refused"]
    found["one"] = resume(f"{folder}/one", one, allow_replica_change=True)
    return found


def replicas2(out):
    """No strategy, one and two replicas. (Synchronised batch norm allows one number of replicas a process.)"""
    import tensorflow as tf

    logical_cpus(2)
    none, found = tf.distribute.get_strategy(), {}
    mirrored1 = tf.distribute.MirroredStrategy(["CPU:0"])
    mirrored2 = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    found["none"], _ = run_engine(none, ONE_BY_ONE)
    found["mirrored 1"], _ = run_engine(mirrored1, ONE_BY_ONE)
    found["mirrored 2"], engine = run_engine(mirrored2, ONE_BY_ONE)
    found["copies differ"] = copies_differ(mirrored2, engine)
    found["many steps a call"], _ = run_engine(mirrored2, (5, 11, 4))
    found["on the device"], _ = run_engine(mirrored2, ONE_BY_ONE, on_device=True)
    own = {"synchronize_batch_norm": False, "averaging__every": 0}
    found["own statistics"], engine = run_engine(mirrored2, (1,), changes=own)
    found["copies of own differ"] = copies_differ(mirrored2, engine)
    found["one's statistics"], _ = run_engine(none, (1,), changes=own)
    # Wide enough for FastConv2D, whose maps are small in the first half of the steps and not in the second.
    wide = {"options__filters": (64, 64), "sizes": (16, 32), "epochs": 1}
    found["wide"], _ = run_engine(none, (2, 2), changes=wide)
    found["wide, mirrored 2"], engine = run_engine(mirrored2, (2, 2), changes=wide)
    found["fast convolutions"] = sum(
        type(layer).__name__ == "FastConv2D" for layer in engine.training_model.layers
    )
    muon = {"optimizer": {"name": "muon", "learning_rate": 0.02, "momentum": 0.85}}
    found["muon"], _ = run_engine(none, ONE_BY_ONE, changes=muon)
    found["muon, mirrored 2"], engine = run_engine(mirrored2, ONE_BY_ONE, changes=muon)
    found["copies of muon differ"] = copies_differ(mirrored2, engine)
    weighted = {"class_weights": "balanced"}
    found["weighted"], _ = run_engine(none, ONE_BY_ONE, changes=weighted)
    found["weighted, mirrored 2"], _ = run_engine(mirrored2, ONE_BY_ONE, changes=weighted)
    found["overflows"] = [overflow(mirrored2, replica) for replica in (None, 0, 1)]
    found["dropped"] = [dropped(mirrored2, own_generator) for own_generator in (True, False)]
    found["first none"] = first_steps(none)
    found["first mirrored 2"] = first_steps(mirrored2)
    found["elastic"] = elastic(f"{out}.elastic")
    Path(out).write_text(json.dumps(found))


def replicas4(out):
    from cifar10_trainer import datasets, runtime
    from cifar10_trainer.errors import ConfigError
    from cifar10_trainer.training import train_and_evaluate

    found = {}
    logical_cpus(4)
    mirrored, found["why"] = runtime.choose_strategy("mirrored")
    found["mirrored 4"], _ = run_engine(mirrored, ONE_BY_ONE)
    found["first mirrored 4"] = first_steps(mirrored, ("sgd", "muon"))
    four, config = f"{Path(out).parent}/replicas2.elastic/four", elastic_config(strategy="mirrored")
    found["elastic refused"] = resume(four, config)["refused"]
    found["elastic four"] = resume(four, config, allow_replica_change=True)
    found["chosen"] = mirrored.num_replicas_in_sync, type(runtime.choose_strategy("auto")[0]).__name__
    digits = datasets.load("digits")
    config = digits_config(strategy="mirrored", epochs=0.5)
    found["digits"] = train_and_evaluate(config, f"{out}.run", dataset=digits, verbose=0, full_report=False)
    try:
        train_and_evaluate(
            config.override(batch_size=90), f"{out}.refused", dataset=digits, verbose=0, full_report=False
        )
    except ConfigError as error:
        found["refused"] = str(error)
    Path(out).write_text(json.dumps(found))


def digits_config(**changes):
    from cifar10_trainer.recipes import RECIPES

    options = {"options__filters": (4, 8), "precision": "float32", "batch_size": 100, "epochs": 2.0}
    return RECIPES["fast.digits"].override(**{**options, **changes})


def worker(out):
    """Trains the engine; then digits, with an interruption of one worker and without."""
    from cifar10_trainer import datasets, runtime
    from cifar10_trainer.errors import RunError
    from cifar10_trainer.training import train_and_evaluate

    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    strategy, why = runtime.choose_strategy("auto")
    found = {"why": why, "chief": runtime.is_chief(strategy)}
    found["engine"], _ = run_engine(strategy, (1,) * STEPS)
    found["first"] = first_steps(strategy)

    import signal

    import keras

    # The number of steps a call differs between the workers as far as it may, and a worker is late.
    train = sys.modules["cifar10_trainer.training"]
    train.CALL_SECONDS = (0.0, 100.0)[index]
    digits = datasets.load("digits")
    run = {"dataset": digits, "verbose": 0, "full_report": False, "save_seconds": 0}
    config = digits_config(early_stopping=1)
    folder = os.path.dirname(out)
    found["whole"] = train_and_evaluate(config, f"{folder}/whole", **run)

    def stop(batch, logs=None):
        if index == 1 and batch >= 4 and not found.get("sent"):
            found["sent"] = True
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train_and_evaluate(
            config,
            f"{folder}/parts",
            callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=stop)],
            **run,
        )
    except RunError as error:
        found["stopped"] = str(error)
    found["parts"] = train_and_evaluate(config, f"{folder}/parts", **run)
    # Their processors differ, and the chief's decides.
    runtime.choose_precision = lambda *_, **more: (("mixed_bfloat16", "float32")[index], "it is faster here")
    again = digits_config(epochs=0.25, seed=3, precision="auto")
    found["again"] = train_and_evaluate(again, f"{folder}/parts", overwrite=True, **run)
    Path(out).write_text(json.dumps(found))


def three(out):
    """One of three workers: the first steps, and a run of two replicas that is resumed."""
    from cifar10_trainer import runtime

    strategy, _ = runtime.choose_strategy("auto")
    found = {"first": first_steps(strategy, ("sgd", "muon"))}
    folder = f"{Path(out).parent}/elastic/three"
    found["elastic"] = resume(folder, elastic_config(strategy="multi_worker"), allow_replica_change=True)
    found["own"] = own_model(0, f"{Path(out).parent}/own")
    found["other weights"] = own_model(json.loads(os.environ["TF_CONFIG"])["task"]["index"], f"{out}.other")
    Path(out).write_text(json.dumps(found))


def own_model(seed, folder):
    """The metrics of a run with a user's own model, whose initial weights depend on the seed; or its error."""
    import keras

    from cifar10_trainer import datasets
    from cifar10_trainer.errors import ConfigError
    from cifar10_trainer.training import train_and_evaluate

    keras.utils.set_random_seed(seed)
    layers = [keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten()]
    model = keras.Sequential([*layers, keras.layers.Dense(10, "softmax")])
    config = digits_config(epochs=0.25, batch_size=96, whitening=False)
    try:
        digits = datasets.load("digits")
        return train_and_evaluate(config, folder, data=digits, model=model, verbose=0, full_report=False)
    except ConfigError as error:
        return str(error)


def seeds(out):
    """Accuracies of five seeds without a strategy and on two replicas, each with batch-norm statistics of its own."""
    import tensorflow as tf

    from cifar10_trainer import datasets
    from cifar10_trainer.training import train_and_evaluate

    tf.config.experimental.enable_op_determinism()
    logical_cpus(2)
    digits, found = datasets.load("digits"), {"none": [], "mirrored": []}
    for seed in range(5):
        for strategy, accuracies in found.items():
            config = digits_config(strategy=strategy, seed=seed, epochs=4.0, options__filters=(16, 32))
            metrics = train_and_evaluate(
                config, f"{out}.{strategy}{seed}", dataset=digits, verbose=0, full_report=False
            )
            accuracies.append(metrics["test_accuracy"])
    Path(out).write_text(json.dumps(found))


def doomed(out):
    """The second worker dies in the middle of the run; the first should not wait for it for ever."""
    import keras

    from cifar10_trainer import datasets
    from cifar10_trainer.training import train_and_evaluate

    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]

    def die(batch, logs=None):
        if index == 1:
            os._exit(7)

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=die)
    train_and_evaluate(
        digits_config(strategy="multi_worker"),
        os.path.dirname(out) + "/doomed",
        dataset=datasets.load("digits"),
        callbacks=[callback],
        verbose=0,
        full_report=False,
    )


def outcome(out, name, callbacks, **changes):
    """The epochs of a worker's run with these callbacks, or its error. A validation takes several batches a worker."""
    from cifar10_trainer import datasets
    from cifar10_trainer.errors import RunError
    from cifar10_trainer.training import train_and_evaluate

    digits = datasets.load("digits")
    data = (digits.train_images, digits.train_labels)
    config = digits_config(strategy="multi_worker", batch_size=100, **changes)
    options = {"validation_data": data, "test_data": data, "verbose": 0, "full_report": False}
    try:
        folder = f"{Path(out).parent}/{name}"
        return train_and_evaluate(config, folder, data=data, callbacks=callbacks, **options)["epochs"]
    except RunError as error:
        return str(error)


CONSTANT_RATE = {"schedule__name": "constant", "schedule__warmup": 0}


def slow_down():
    """A callback that sets the learning rate."""
    import keras

    class Slow(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.learning_rate = 0.001

    return Slow()


def unlike(out):
    """Callbacks of the first worker alone look at each validation batch; those of both, then of one, change the weights."""
    import keras

    first = json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 0

    class Count(keras.callbacks.Callback):
        batches = 0

        def on_test_batch_end(self, batch, logs=None):
            self.batches += 1

    class Halve(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                self.model.set_weights([w / 2 for w in self.model.get_weights()])

    count = Count()
    found = {"batches": outcome(out, "batches", [count] * first, epochs=1)}
    found["seen"] = count.batches
    found["all"] = outcome(out, "all", [Halve(), slow_down()], epochs=2, **CONSTANT_RATE)
    found["one"] = outcome(out, "one", [Halve()] * first, epochs=2)
    Path(out).write_text(json.dumps(found))


def unlike_rates(out):
    """A callback of one worker sets the learning rate."""
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    Path(out).write_text(json.dumps(outcome(out, "rates", [slow_down()] * index, epochs=2, **CONSTANT_RATE)))


def apart(out):
    """Each worker has a folder of its own, and the second one's holds the model of an earlier run."""
    import contextlib
    import io
    import shutil
    import signal

    import keras

    from cifar10_trainer import datasets, loop, models, runtime
    from cifar10_trainer.errors import RunError
    from cifar10_trainer.training import train_and_evaluate

    runtime.choose_strategy("multi_worker")
    keras.utils.set_random_seed(0)
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    digits, folder = datasets.load("digits"), Path(out).parent
    config = digits_config(strategy="multi_worker", epochs=3)
    model = models.build_model("fast", filters=(4, 8), num_classes=10)
    if index == 1:
        (folder / "run1").mkdir()
        model.save(folder / "run1" / "model.keras")
    found, printed = {}, io.StringIO()
    run = {"data": digits, "model": model, "full_report": False}
    with contextlib.redirect_stdout(printed):
        found["whole"] = train_and_evaluate(config, folder / f"run{index}", overwrite=True, verbose=2, **run)
    found["printed"] = printed.getvalue()
    found["accuracy"] = float(np.mean(model.predict(digits.test_images).argmax(1) == digits.test_labels))
    loop.CALL_SECONDS = 0.0  # one step a call

    def stop(epoch, logs=None):
        if index == 1 and epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    stopper = keras.callbacks.LambdaCallback(on_epoch_end=stop)
    workdir, run = folder / f"parts{index}", {"data": digits, "verbose": 0, "full_report": False}
    try:
        train_and_evaluate(config, workdir, callbacks=[stopper], **run)
    except RunError as error:
        found["stopped"] = str(error)
    if index == 1:
        shutil.copytree(folder / "parts0", workdir)
    found["parts"] = train_and_evaluate(config, workdir, **run)
    Path(out).write_text(json.dumps(found))


def dying_chief(out):
    """The chief dies while it scores the test images."""
    from cifar10_trainer import datasets, scoring
    from cifar10_trainer.training import train_and_evaluate

    if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 0:
        scoring.predict_with_and_without = lambda *_, **__: os._exit(7)
    config = digits_config(strategy="multi_worker", epochs=1)
    digits, folder = datasets.load("digits"), f"{Path(out).parent}/dying"
    train_and_evaluate(config, folder, dataset=digits, verbose=0, full_report=False)


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])


# --- the tests ------------------------------------------------------------------------------------------


def start(what, out, **environment):
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "TF_CPP_MIN_LOG_LEVEL": "2", **environment}
    command = [sys.executable, __file__, what, str(out)]
    with open(f"{out}.log", "w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def start_workers(what, folder, count=2):
    """Processes of one cluster on free ports of this machine, and where each writes."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    outs = [folder / f"worker{i}.json" for i in range(count)]
    processes = []
    for i, out in enumerate(outs):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}
        processes.append(start(what, out, TF_CONFIG=json.dumps(task)))
    return processes, outs


def stop(processes):
    for process in processes:
        process.kill()
        process.wait()


def finish(processes, outs, seconds=500):
    """Waits for the processes, and reads what they found."""
    try:
        for process, out in zip(processes, outs, strict=True):
            assert process.wait(seconds) == 0, Path(f"{out}.log").read_text()[-3000:]
    finally:
        stop(processes)
    return [json.loads(out.read_text()) for out in outs]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, both = tmp_path_factory.mktemp("replicas"), {}
    for name in ("replicas2", "replicas4"):
        out = folder / name
        both.update(finish([start(name, out)], [out])[0])
    return both


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    return folder, *finish(*start_workers("worker", folder))


def test_one_mirrored_replica_is_no_strategy_bit_for_bit(found):
    assert found["mirrored 1"] == found["none"]


@pytest.mark.parametrize("n", [2, 4])
def test_several_replicas_train_as_one(found, n):
    one, several = found["none"], found[f"mirrored {n}"]
    assert len(several["losses"]) == STEPS and several["losses"][-1] != several["losses"][0]
    # Adam enlarges the rounding of another order of summation, step by step.
    np.testing.assert_allclose(several["losses"], one["losses"], atol=1e-3)
    assert found["copies differ"] == 0


def agree_at_first(several, one, name, atol):
    """Losses and weights of the first two steps; and the second loss is another one, so the steps did something."""
    ours, theirs = (np.array(x[name]["weights"]) for x in (several, one))
    assert np.isfinite(theirs).all() and one[name]["losses"][0] != one[name]["losses"][1]
    np.testing.assert_allclose(several[name]["losses"], one[name]["losses"], rtol=10 * atol)
    np.testing.assert_allclose(ours, theirs, atol=atol)


# Weights are up to 1.2 here and move by some hundredths. float32 has 24 bits: weights round by 6e-8, and so does a sum in
# another order; seen: 4e-7. Muon divides by the size of each direction of a gradient, also of small ones, in which
# roundings are a larger part; seen: 5e-7. bfloat16 has 8 bits, 4e-3 of each activation, so of a move of some
# hundredths 2e-4; seen: 2e-5, and 2.4e-4 where the processor has no bfloat16. Later steps are not compared so: in 42 steps a
# difference of 1e-7 grows to 8e-3, because training is chaotic.
TOLERANCES = {
    "sgd": 2e-6,
    "clip": 2e-6,
    "clip16": 5e-6,  # seen: 7e-7
    "muon": 1e-5,
    "bfloat16": 2e-4 if native_flags() else 5e-4,
}


@pytest.mark.parametrize(
    ("n", "name"),
    [(2, "sgd"), (4, "sgd"), (2, "muon"), (4, "muon"), (2, "bfloat16"), (2, "clip"), (2, "clip16")],
)
def test_the_first_steps_are_those_of_one_replica(found, n, name):
    agree_at_first(found[f"first mirrored {n}"], found["first none"], name, TOLERANCES[name])


def test_the_first_steps_are_clipped(found):
    losses = {name: steps["losses"] for name, steps in found["first none"].items()}
    assert losses["clip"][0] == losses["sgd"][0] and abs(losses["clip"][1] - losses["sgd"][1]) > 1e-3


def test_mixup_mixes_within_a_replica(found):
    """So it has other partners, and another loss, but of the same size."""
    one, two = (found[f"first {name}"]["mixup"]["losses"][0] for name in ("none", "mirrored 2"))
    assert one != two and one == pytest.approx(two, rel=0.2)


def resumed_as_whole(found, resumed, replicas):
    """The epoch of a resumed run is that of the whole run of two replicas, but for roundings (seen: 1e-7 in 8 steps)."""
    whole = found["elastic"]["whole"]
    assert resumed["metrics"]["replicas"] == replicas
    assert resumed["row"]["loss"] == pytest.approx(whole["row"]["loss"], rel=1e-5)
    assert "resumed at step 5 of 13" in resumed["printed"]
    expected = f"; {replicas} replica(s), 2 before: {96 // replicas} images each, of 96 in a step as before; sums round"
    assert expected in resumed["printed"]
    assert "batch norm" not in resumed["printed"]  # it is computed over all replicas


def test_a_run_resumes_on_another_number_of_replicas(found):
    assert "stopped by SIGTERM at step 5 of 13" in found["elastic"]["stopped"]
    resumed_as_whole(found, found["elastic"]["one"], 1)
    resumed_as_whole(found, found["elastic four"], 4)


def test_another_number_of_replicas_must_be_allowed(found):
    refused = found["elastic refused"]
    assert "holds an unfinished run with replicas 2, now 4" in refused
    assert refused.endswith("or allow it with --allow_replica_change")
    refused = found["elastic"]["refused strategy"]
    assert "another configuration (strategy 'mirrored', now 'none')" in refused
    assert refused.endswith("or allow it with --allow_replica_change")


def test_fast_convolutions_under_replicas(found):
    one, two = found["wide"], found["wide, mirrored 2"]
    assert found["fast convolutions"] == 3 and one["losses"][0] != one["losses"][1]
    np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-3)


def test_muon_under_replicas(found):
    one, two = found["muon"], found["muon, mirrored 2"]
    assert one["losses"][0] != one["losses"][-1]
    np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-3)
    assert found["copies of muon differ"] == 0


def test_class_weights_under_replicas(found):
    one, two = found["weighted"], found["weighted, mirrored 2"]
    assert one["losses"] != found["none"]["losses"]
    np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-3)


def test_an_overflow_on_any_replica_skips_the_step(found):
    assert found["overflows"] == [[True, True, 1024.0], [False, True, 512.0], [False, True, 512.0]]


@pytest.mark.parametrize("generator", [0, 1], ids=["the layer's", "Keras's global one"])
def test_replicas_draw_masks_of_their_own(generator, found):
    """Of 192 elements, two independent masks keep both of 48, one of 96 and none of 48, within four deviations of 6 or 7."""
    dropped = found["dropped"][generator]
    counts = {share: dropped["shares"].count(share) for share in (0.0, 0.5, 1.0)}
    assert sum(counts.values()) == 192
    assert abs(counts[0.5] - 96) < 28 and abs(counts[0.0] - 48) < 24
    first, second = dropped["states"]
    assert first == second and first[1] == 1  # the common seed again, one draw later


def test_several_steps_a_call_under_replicas(found):
    assert found["many steps a call"]["weights"] == found["mirrored 2"]["weights"]
    assert found["many steps a call"]["losses"][-1] == found["mirrored 2"]["losses"][-1]


def test_images_on_the_devices(found):
    assert found["on the device"] == found["mirrored 2"]


def test_statistics_of_ones_own_are_averaged(found):
    """Batch norm by replica normalises otherwise, so the losses differ a little; the copies agree after the step."""
    own, one = found["own statistics"], found["one's statistics"]
    assert found["copies of own differ"] == 0
    assert own["losses"][0] != one["losses"][0]
    assert own["losses"][0] == pytest.approx(one["losses"][0], rel=0.1)


@pytest.mark.parametrize("name", ["none", "mirrored 1", "mirrored 2", "mirrored 4"])
def test_evaluation_covers_every_image(found, name):
    result = found[name]
    assert result["counted"] == pytest.approx(EVALUATED, abs=0.01)  # a float32 quotient
    assert result["accuracy"] == pytest.approx(result["plain_accuracy"], abs=1e-6)
    assert result["loss"] == pytest.approx(result["plain_loss"], rel=1e-4)


def test_mirrored_takes_every_device(found):
    assert found["chosen"] == [4, "_DefaultDistributionStrategy"]
    assert found["why"].startswith("4 replica(s): ")
    assert (found["digits"]["replicas"], found["digits"]["strategy"]) == (4, "mirrored")
    assert found["digits"]["n_test"] == 359 and found["digits"]["test_accuracy"] > 0


def test_a_batch_that_the_replicas_cannot_share(found):
    assert found["refused"] == "batch_size is 90; allowed: a multiple of the 4 replicas"


@pytest.mark.slow
def test_two_workers_are_two_replicas(found, workers):
    _, first, second = workers
    assert first["why"] == second["why"] == "2 replica(s) on 2 worker(s)"
    assert (first["chief"], second["chief"]) == (True, False)
    assert first["engine"] == second["engine"]
    two = found["mirrored 2"]
    # The same sums of two numbers, whether they come from a thread or from a socket.
    np.testing.assert_allclose(first["engine"]["losses"], two["losses"], rtol=1e-5)
    np.testing.assert_allclose(first["engine"]["weights"], two["weights"], rtol=1e-3, atol=1e-4)
    assert first["engine"]["counted"] == pytest.approx(EVALUATED, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_the_first_steps_of_two_workers_are_those_of_two_replicas(found, workers, name):
    """The same sums of two numbers; so mixup is equal, too."""
    _, first, second = workers
    assert first["first"] == second["first"]
    agree_at_first(first["first"], found["first mirrored 2"], name, TOLERANCES.get(name, TOLERANCES["sgd"]))


@pytest.mark.slow
def test_three_workers(found, tmp_path_factory):
    """Their first steps are those of one replica, and they resume a run of two replicas."""
    import shutil

    folder = tmp_path_factory.mktemp("three")
    shutil.copytree(
        next(tmp_path_factory.getbasetemp().glob("replicas*/replicas2.elastic")), folder / "elastic"
    )
    results = finish(*start_workers("three", folder, 3))
    for result in results:
        assert result["first"] == results[0]["first"]
        resumed_as_whole(found, result["elastic"], 3)
        assert result["own"]["replicas"] == 3 and result["own"]["test_accuracy"] > 0
        assert result["other weights"] == results[0]["other weights"]
    assert "the workers differ in initial weights of the model: " in results[0]["other weights"]
    for name in ("sgd", "muon"):
        agree_at_first(results[0]["first"], found["first none"], name, TOLERANCES[name])


@pytest.mark.slow
def test_accuracies_over_seeds_do_not_depend_on_replicas(tmp_path):
    """Chaos makes single runs differ; their mean may not, beyond three standard errors of the paired differences."""
    (result,) = finish([start("seeds", tmp_path / "seeds")], [tmp_path / "seeds"])
    one, two = (np.array(result[name]) for name in ("none", "mirrored"))
    assert one.mean() > 0.5
    differences = two - one
    assert abs(differences.mean()) <= 3 * differences.std(ddof=1) / len(differences) ** 0.5 + 0.005


TIMES = {"train_seconds", "total_seconds", "images_per_second", "seconds_to_target"}


def without_times(metrics):
    return {k: v for k, v in metrics.items() if k not in TIMES}


@pytest.mark.slow
def test_workers_agree_and_the_chief_writes(workers):
    folder, first, second = workers
    assert without_times(first["whole"]) == without_times(second["whole"])
    assert first["whole"]["replicas"] == 2 and first["whole"]["test_accuracy"] > 0
    whole = folder / "whole"
    assert {p.name for p in whole.iterdir()} == {"config.json", "history.csv", "metrics.json", "model.keras"}
    assert json.loads((whole / "metrics.json").read_text()) == first["whole"]


@pytest.mark.slow
def test_workers_stop_and_resume_together(workers):
    _, first, second = workers
    (theirs,) = re.findall(
        r"stopped by SIGTERM (at step .*); worker 0 has saved everything;", second["stopped"]
    )
    assert f"stopped by a signal to another worker {theirs}; everything is saved in" in first["stopped"]
    for result in (first, second):
        assert without_times(result["parts"]) == without_times(first["whole"])


@pytest.mark.slow
def test_workers_overwrite_together(workers):
    _, first, second = workers
    assert without_times(first["again"]) == without_times(second["again"])
    assert (first["again"]["seed"], first["again"]["precision"]) == (3, "mixed_bfloat16")


@pytest.mark.slow
def test_a_worker_does_not_wait_for_a_dead_one_for_ever(tmp_path):
    processes, outs = start_workers("doomed", tmp_path)
    try:
        assert processes[1].wait(300) == 7
        began = time.time()
        assert processes[0].wait(300) != 0
        assert time.time() - began < 100  # a minute, on a machine that is not busy
        assert not (tmp_path / "doomed" / "metrics.json").exists()
    finally:
        stop(processes)
    assert re.search(r"worker 1 \(127.0.0.1:\d+\) has ended; to resume", Path(f"{outs[0]}.log").read_text())


def test_callbacks_of_one_worker(tmp_path):
    """They may look at what they like. What they change in rate or weights must be changed on all workers, or on none."""
    from cifar10_trainer import loop

    first, second = finish(*start_workers("unlike", tmp_path))
    assert first["batches"] == second["batches"] == 1
    assert first["seen"] > 1 and second["seen"] == 0
    assert first["all"] == second["all"] == 2
    assert first["one"] == second["one"] == loop.UNLIKE_CHANGES
    assert finish(*start_workers("unlike_rates", tmp_path)) == [loop.UNLIKE_CHANGES] * 2


def test_workers_with_folders_of_their_own(tmp_path):
    """What lies in a worker's folder is not taken for the model of the run."""
    first, second = finish(*start_workers("apart", tmp_path))
    scores = {name for name in first["whole"] if name.startswith("test_")}
    assert first["whole"]["test_accuracy"] == pytest.approx(first["accuracy"])
    assert {second["whole"][name] for name in scores} == {None}
    assert "no scores here, and the model keeps the last weights" in second["printed"]
    assert f"{tmp_path}/run1 does not hold worker 0's model" in second["printed"]
    kept = without_times(first["whole"]).keys() - scores
    assert {k: second["whole"][k] for k in kept} == {k: first["whole"][k] for k in kept}

    assert f"everything is saved in {tmp_path}/parts0; to resume, repeat" in first["stopped"]
    assert "worker 0 has saved everything; to resume, repeat the commands of all" in second["stopped"]
    kept = without_times(first["parts"]).keys() - scores
    assert {k: second["parts"][k] for k in kept} == {k: first["parts"][k] for k in kept}
    assert first["parts"]["test_accuracy"] > 0
    assert second["parts"]["test_accuracy"] in (None, first["parts"]["test_accuracy"])


def test_no_worker_reports_success_where_the_chief_has_failed(tmp_path):
    processes, outs = start_workers("dying_chief", tmp_path)
    try:
        assert [process.wait(300) for process in processes] == [7, 1]
    finally:
        stop(processes)
    assert not (tmp_path / "dying" / "metrics.json").exists()
    assert re.search(r"worker 0 \(127.0.0.1:\d+\) has ended; to resume", Path(f"{outs[1]}.log").read_text())
