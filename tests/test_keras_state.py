"""What a process keeps - Keras's settings, random generators, other runs - changes no result, and is not changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from cifar10_trainer import (
    RECIPES,
    Augmentation,
    ConfigError,
    RandomCutout,
    RandomFlip,
    RandomRotation,
    RandomShift,
    build_model,
    cross_validate,
    cross_validation,
    evaluate_model,
    keras_state,
    load_data,
    load_model,
    make_dataset,
    predict_images,
    train,
)
from cifar10_trainer.datasets import from_arrays

ROOT = Path(__file__).parents[1]
TINY = RECIPES["fast.digits"].override(
    options__filters=(4,), options__dropout=0.2, epochs=1, batch_size=50, precision="float32", views=1
)


def digest(arrays):
    """Of the dtypes and the bytes of arrays."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(str(array.dtype).encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:12]


def images_and_labels():
    digits = load_data("digits")
    return digits.train_images[:250], digits.train_labels[:250]


def run(folder, config=TINY, **options):
    """Trains, evaluates and predicts. Returns digests of the weights and of the predictions, and the scores."""
    images, labels = images_and_labels()
    metrics = train(config, folder, data=(images, labels), verbose=0, full_report=False, **options)
    model = load_model(folder / "model.keras")
    scores = evaluate_model(model, (images[:60], labels[:60]), views=2)
    predictions = [result["probability"] for result in predict_images(model, images[:5])]
    return digest(model.get_weights()), metrics["best_val_accuracy"], scores, predictions


def parts():
    """What needs no run: a model, a data set, augmented images."""
    keras.utils.set_random_seed(5)
    model = build_model(filters=(4, 8), dropout=0.1)
    dtypes = [layer.dtype_policy.name for layer in model.layers]
    images, labels = images_and_labels()
    dataset = make_dataset(images, labels, 50, augmentation=Augmentation(shift=2, cutout=4), epochs=1)
    layers = [RandomShift(2), RandomFlip(), RandomCutout(8), RandomRotation(0.1)]
    augmented = [
        layer(x, seed=(7, 0)).numpy() for layer in layers for x in (images[:4], images[:4].astype(np.float32))
    ]
    return (
        digest(model.get_weights()),
        dtypes,
        digest([x.numpy() for x in next(iter(dataset))]),
        digest(augmented),
    )


SETTINGS = {
    "floatx float16": (keras.config.set_floatx, keras.config.floatx, "float16"),
    "floatx float64": (keras.config.set_floatx, keras.config.floatx, "float64"),
    "epsilon": (keras.config.set_epsilon, keras.config.epsilon, 0.1),
    "image_data_format": (
        keras.config.set_image_data_format,
        keras.config.image_data_format,
        "channels_first",
    ),
    "max_epochs": (
        getattr(keras.config, "set_max_epochs", None),
        getattr(keras.config, "max_epochs", None),
        1,
    ),
    "max_steps_per_epoch": (
        getattr(keras.config, "set_max_steps_per_epoch", None),
        getattr(keras.config, "max_steps_per_epoch", None),
        1,
    ),
    "mixed policy": (
        keras.config.set_dtype_policy,
        lambda: keras.config.dtype_policy().name,
        "mixed_float16",
    ),
    "16-bit policy": (keras.config.set_dtype_policy, lambda: keras.config.dtype_policy().name, "bfloat16"),
    "quantized policy": (
        keras.config.set_dtype_policy,
        lambda: keras.config.dtype_policy().name,
        "int8_from_float32",
    ),
    "flash attention": (
        lambda on: (keras.config.enable_flash_attention if on else keras.config.disable_flash_attention)(),
        keras.config.is_flash_attention_enabled,
        False,
    ),
    "eager functions": (tf.config.run_functions_eagerly, tf.config.functions_run_eagerly, True),
}


@pytest.fixture
def with_setting():
    """Sets one of SETTINGS, and sets it back after the test."""
    undo = []

    def apply(name):
        write, read, value = SETTINGS[name]
        if write is None:
            pytest.skip(f"this version of Keras has no {name}")
        before = read()
        undo.append(lambda: write(before))
        write(value)
        return read, value

    yield apply
    for action in undo:
        action()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return run(tmp_path_factory.mktemp("expected")), parts()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_changes_a_result_and_each_is_kept(name, with_setting, expected, tmp_path):
    read, value = with_setting(name)
    assert run(tmp_path / "run") == expected[0]
    assert read() == value
    assert parts() == expected[1]
    assert read() == value


def test_settings_come_back_after_an_error_and_after_a_cleared_session(with_setting, tmp_path):
    with_setting("floatx float16")
    with_setting("mixed policy")
    with pytest.raises(ConfigError):
        build_model(filters=-1)
    assert (keras.config.floatx(), keras.config.dtype_policy().name) == ("float16", "mixed_float16")

    keras.config.disable_traceback_filtering()
    try:
        with keras_state.keras_defaults():
            keras.utils.clear_session()  # as a user may
        assert not keras.config.is_traceback_filtering_enabled()
    finally:
        keras.config.enable_traceback_filtering()
    assert keras.config.dtype_policy().name == "mixed_float16"
    assert hasattr(cross_validate, "__wrapped__")


def test_blocks_that_overlap_in_threads_restore_when_the_last_ends(with_setting):
    with_setting("epsilon")
    inside, leave = threading.Event(), threading.Event()

    def other():
        with keras_state.keras_defaults():
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    with keras_state.keras_defaults():
        thread.start()
        assert inside.wait(20)
    assert keras.config.epsilon() == 1e-7, "the other thread still needs the default"
    leave.set()
    thread.join()
    assert keras.config.epsilon() == 0.1


def test_a_setting_that_is_set_meanwhile_stays(with_setting):
    with_setting("epsilon")
    with keras_state.keras_defaults():
        keras.config.set_epsilon(1e-3)
    assert keras.config.epsilon() == 1e-3


def test_warnings_of_retracing_are_hidden_within_a_call_alone(caplog):
    """They are true of a user's own functions, and of those of a call mean nothing to him."""
    text = "5 out of the last 5 calls to f triggered tf.function retracing. Tracing is expensive"
    logger = tf.get_logger()
    before = list(logger.filters)
    with keras_state.keras_defaults(), keras_state.keras_defaults():
        logger.warning(text)
        logger.warning("another one")
    logger.warning(text)
    assert [record.getMessage() for record in caplog.records] == ["another one", text]
    assert logger.filters == before


def test_a_call_leaves_the_log_of_absl_as_it_was(tmp_path):
    """Keras warns in it of the older format of files, which somebody asked for."""
    logger = logging.getLogger("absl")
    before = logger.level, list(logger.filters)
    run(tmp_path, hdf5=True)
    assert (logger.level, list(logger.filters)) == before


@pytest.mark.filterwarnings("error")
def test_a_model_is_built_where_warnings_are_errors():
    assert build_model(filters=(4, 8)).count_params() > 0


def test_every_setting_of_keras_is_known():
    """A new one must be looked at: does a result depend on it?"""
    known = {name for _, name, _ in keras_state.PROCESS_SETTINGS}
    known |= {"set_dtype_policy", "enable_flash_attention", "disable_flash_attention"}
    known |= {
        "set_backend",
        "enable_unsafe_deserialization",
    }  # refused; of `load_model`, which asks for safe mode
    for name in keras_state.FORGOTTEN_SETTINGS:
        known |= {f"enable_{name}", f"disable_{name}"}
    setters = {name for name in dir(keras.config) if name.startswith(("set_", "enable_", "disable_"))}
    assert setters <= known


SCRIPT = """
import sys, json
from pathlib import Path
sys.path.insert(0, {tests!r})
import keras
assert keras.config.floatx() == "float16" and keras.config.max_steps_per_epoch() == 1
from test_keras_state import parts, run
print(json.dumps([run(Path({folder!r})), parts()]))
assert keras.config.floatx() == "float16" and keras.config.image_data_format() == "channels_first"
"""


def python(arguments, home, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
        | {"KERAS_HOME": str(home)}
        | environment,
    )


def test_a_keras_json_changes_no_result(expected, tmp_path):
    settings = {"floatx": "float16", "epsilon": 0.1, "image_data_format": "channels_first"}
    (tmp_path / "keras.json").write_text(json.dumps({**settings, "backend": "tensorflow"}))
    script = SCRIPT.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "run"))
    done = python(["-c", script], tmp_path, KERAS_MAX_STEPS_PER_EPOCH="1", KERAS_MAX_EPOCHS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(json.dumps(expected))


# --- another backend ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["file", "environment"])
def test_a_command_refuses_another_backend_in_one_line(source, tmp_path):
    if source == "file":
        (tmp_path / "keras.json").write_text('{"backend": "torch"}')
        done = python(["-m", "cifar10_trainer", "--dataset=digits"], tmp_path)
        assert f"the backend in {tmp_path}/keras.json is 'torch'" in done.stderr
    else:
        done = python(["-m", "cifar10_trainer", "--dataset=digits"], tmp_path, KERAS_BACKEND="jax")
        assert "the backend in KERAS_BACKEND is 'jax'" in done.stderr
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "allowed: 'tensorflow'; set the environment variable KERAS_BACKEND=tensorflow" in done.stderr


def test_an_import_refuses_another_backend_before_tensorflow(tmp_path):
    code = (
        "import sys, cifar10_trainer\n"
        "from cifar10_trainer import Config, load_data\n"
        "assert len(load_data('digits').train_labels)\n"
        "try:\n    from cifar10_trainer import train\n"
        "except cifar10_trainer.ConfigError as error:\n    print(error)\n"
        "assert not {'keras', 'tensorflow'} & set(sys.modules)\n"
    )
    done = python(["-c", code], tmp_path, KERAS_BACKEND="jax")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the backend in KERAS_BACKEND is 'jax'; allowed: 'tensorflow'")


def test_the_backend_is_looked_for_where_keras_looks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    keras_state.check_backend()  # no file
    (tmp_path / ".keras").mkdir()
    file = tmp_path / ".keras" / "keras.json"
    for text in ('{"backend": "tensorflow"}', "{", "[]", "{}"):  # Keras ignores what is no JSON
        file.write_text(text)
        keras_state.check_backend()
    file.write_text('{"backend": "jax"}')
    with pytest.raises(ConfigError, match="jax"):
        keras_state.check_backend()
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")  # goes before the file
    keras_state.check_backend()
    monkeypatch.setitem(sys.modules, "keras", keras)
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # too late: Keras is imported, with TensorFlow
    keras_state.check_backend()
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with (
        pytest.raises(ConfigError, match="of Keras, which is imported, is 'torch'"),
        keras_state.keras_defaults(),
    ):
        pass


# --- random numbers -----------------------------------------------------------------------------------------


def draws():
    """The next numbers of each global generator."""
    return [random.random(), np.random.rand(), float(keras.random.uniform([])), float(tf.random.uniform([]))]


def test_seeds_of_a_block_are_those_of_set_random_seed():
    def weights():
        layers = [keras.layers.Dense(3), keras.layers.Dropout(0.5), keras.layers.Conv2D(2, 3)]
        layers[0].build((None, 2))
        layers[2].build((None, 8, 8, 3))
        return [np.array(v) for layer in layers for v in layer.variables]

    keras.utils.set_random_seed(11)
    expected_weights = digest(weights())
    random.seed(1)
    state = random.getstate()
    with keras_state.seeded(11):
        assert digest(weights()) == expected_weights
    assert random.getstate() == state
    assert digest(weights()) != expected_weights
    random.seed(11)
    assert digest(weights()) == expected_weights, "outside of the block it is Python's generator as ever"


class Noise(keras.layers.Layer):
    """Adds numbers from the generators that layers should not use, but some do."""

    def call(self, x, training=False):
        drawn = tf.random.normal(tf.shape(x)) + keras.random.normal(keras.ops.shape(x))
        return x + 0.1 * drawn + np.random.rand() + random.random() if training else x


def noisy_model():
    layers = keras.layers
    start = keras.initializers.GlorotUniform(seed=1)
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Rescaling(1 / 255),
            layers.AveragePooling2D(8),
            layers.Flatten(),
            Noise(),
            layers.Dropout(0.2),
            layers.Dense(10, kernel_initializer=start),
        ]
    )


@pytest.mark.parametrize("own", [False, True])
def test_a_run_leaves_the_generators_of_its_user_alone(own, tmp_path):
    found = []
    for i in range(2):
        keras.utils.set_random_seed(3)
        wanted = draws(), draws()
        keras.utils.set_random_seed(3)
        assert draws() == wanted[0]
        model = noisy_model() if own else None
        state = random.getstate(), np.random.get_state()[1].tolist()
        train(
            TINY.override(whitening=False),
            tmp_path / str(i),
            data=images_and_labels(),
            model=model,
            verbose=0,
            full_report=False,
            score_test=False,
            callbacks=None,
        )
        assert (random.getstate(), np.random.get_state()[1].tolist()) == state
        if own:
            found.append(digest(model.get_weights()))
        assert np.random.rand() == wanted[1][1] and float(tf.random.uniform([])) == wanted[1][3]
        np.random.seed(i)  # another stream before the second run changes nothing in it
    assert len(set(found)) == own


def test_a_cross_validation_leaves_the_keras_of_all_threads_alone(tmp_path):
    """Its seeds, its numbers in the names of layers, and the settings of another thread."""
    keras.utils.set_random_seed(3)
    keras.random.uniform([])
    expected = float(keras.random.uniform([]))
    keras.utils.set_random_seed(3)
    keras.random.uniform([])
    name = keras.layers.Dense(1).name
    config = TINY.override(options__dropout=0.0)

    def cross():
        cross_validate(config, 2, tmp_path, data=images_and_labels(), verbose=0)

    keras.config.set_dtype_policy("mixed_float16")
    try:
        thread = threading.Thread(target=cross)
        thread.start()
        thread.join()
        assert keras.config.dtype_policy().name == "mixed_float16"
    finally:
        keras.config.set_dtype_policy("float32")
    assert float(keras.random.uniform([])) == expected
    assert keras.layers.Dense(1).name != name


def test_the_folds_of_a_cross_validation_leave_no_model_in_memory(tmp_path):
    config = TINY.override(options__dropout=0.0)
    made = []
    watch = keras.callbacks.LambdaCallback(on_train_end=lambda logs: None)
    watch.set_model = lambda model: made.append(weakref.ref(model))
    for fold in range(2):
        cross_validation._run(
            config.override(validation_fraction=0.5, validation_fold=fold),
            tmp_path / str(fold),
            overwrite=False,
            policy=None,
            dataset=from_arrays(images_and_labels()),
            allow_replica_change=False,
            callbacks=[watch],
            verbose=0,
        )
        assert len(made) == fold + 1 and made[fold]() is None


# --- several runs in a process ------------------------------------------------------------------------------


def test_runs_in_threads_are_equal_to_a_run_alone(expected, tmp_path, monkeypatch, capsys):
    """While the main thread builds models and sets seeds."""
    monkeypatch.setattr(keras_state, "WAIT_SECONDS", 0.05)
    data = images_and_labels()

    def one(name):
        train(TINY, tmp_path / name, data=data, verbose=2, full_report=False, score_test=False)

    threads = [threading.Thread(target=one, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        keras.utils.set_random_seed(7)
        build_model(filters=(4,), dropout=0.1)
        threads[0].join(0.05)
    assert "waiting for another run of this process to end" in capsys.readouterr().out
    for name in "ab":
        weights = keras.models.load_model(tmp_path / name / "model.keras").get_weights()
        assert digest(weights) == expected[0][0]


def test_a_run_inside_a_run_is_refused(tmp_path):
    data = images_and_labels()

    def nested(epoch, logs):
        train(TINY, tmp_path / "inner", data=data, verbose=0)

    outer = keras.callbacks.LambdaCallback(on_epoch_begin=nested)
    with pytest.raises(
        ConfigError, match="train is called inside of train, as by a callback; allowed: after"
    ):
        train(TINY, tmp_path / "outer", data=data, verbose=0, callbacks=outer)
    assert not (tmp_path / "inner").exists()
    assert train(TINY, tmp_path / "after", data=data, verbose=0, full_report=False)["epochs"] == 1


@pytest.mark.parametrize("classes", [1, 0, -3, True, False, 2.5, "10", None])
def test_a_number_of_classes_that_cannot_be(classes):
    with pytest.raises(ConfigError, match=r"num_classes is .*; allowed: ") as error:
        build_model(num_classes=classes)
    assert "\n" not in str(error.value)


def test_images_of_one_class_are_refused(tmp_path):
    images, labels = images_and_labels()
    with pytest.raises(ConfigError, match=r"has no image of 1; allowed: at least one image of each") as error:
        train(TINY, tmp_path / "run", data=(images, 0 * labels), verbose=0)
    assert "\n" not in str(error.value)
