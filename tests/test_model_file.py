"""Model files: complete, plain Keras, and readable by older versions. .ci/run opens them in the oldest one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from cifar10_trainer import build_model, load_model, predict_images, train
from cifar10_trainer.config import Config
from cifar10_trainer.errors import ConfigError, RunError
from cifar10_trainer.model_file import ModelInfo, info_of, portable, write_model

NAMES = ("apple", "lemon", "plum")
SUFFIXES = (".keras", ".h5")
ENTROPY = 1.0978  # nats, a little below the logarithm of three


def small_model():
    model = build_model(filters=(8, 8), dropout=0.1, num_classes=3)
    model.info = ModelInfo(NAMES, none_above=ENTROPY)
    return model


def images_of(count):
    return np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


def configuration(path):
    """The model's configuration as it stands in the file."""
    if path.suffix == ".keras":
        return json.loads(zipfile.ZipFile(path).read("config.json"))
    with h5py.File(path) as file:
        return json.loads(file.attrs["model_config"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_copied_and_renamed_file_labels_with_its_class_names(tmp_path, suffix):
    model = small_model()
    write_model(model, tmp_path / f"model{suffix}")
    (tmp_path / "elsewhere").mkdir()
    path = shutil.move(tmp_path / f"model{suffix}", tmp_path / "elsewhere" / f"fruit 2{suffix}")
    loaded, images = load_model(path), images_of(5)
    assert info_of(loaded) == ModelInfo(NAMES, "squash", ENTROPY)
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), model.predict(images, verbose=0))
    for found, row in zip(predict_images(loaded, images), model.predict(images, verbose=0), strict=True):
        assert found["label"] == NAMES[row.argmax()]
        assert found["none_of_the_classes"] == (-np.sum(row * np.log(row)) > ENTROPY)


# What somebody without this package writes; the folder of the file is the working directory.
PLAIN = """
import json, sys, zipfile
sys.modules["cifar10_trainer"] = None  # an import of it fails, as where it is not installed
import keras, numpy as np

if sys.argv[1].endswith(".keras"):
    about = json.loads(zipfile.ZipFile(sys.argv[1]).read("metadata.json"))["image_classifier"]
else:
    import h5py
    about = json.loads(h5py.File(sys.argv[1]).attrs["image_classifier"])
model = keras.models.load_model(sys.argv[1])
np.save("found.npy", model.predict(np.load("images.npy"), verbose=0))
print(json.dumps(about))
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_opens_in_a_process_without_this_package(tmp_path, suffix):
    model, images = small_model(), images_of(4)
    write_model(model, tmp_path / f"any name{suffix}")
    np.save(tmp_path / "images.npy", images)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, f"any name{suffix}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    expected = {"class_names": list(NAMES), "image_size": [32, 32], "resize": "squash", "none_above": ENTROPY}
    assert json.loads(done.stdout) == expected
    np.testing.assert_allclose(
        np.load(tmp_path / "found.npy"), model.predict(images, verbose=0), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_run_writes_complete_files(tmp_path, suffix):
    images, labels = images_of(60), np.arange(60) % 3
    config = Config(options={"filters": (8,)}, epochs=1, batch_size=20, strategy="none")
    data = {"data": (images, labels), "class_names": NAMES}
    train(config, tmp_path, **data, verbose=0, full_report=False, hdf5=True)
    file = tmp_path / f"model{suffix}"
    assert info_of(load_model(file)).class_names == NAMES
    assert "quantization_config" not in json.dumps(configuration(file))


def test_a_file_of_keras_alone_has_no_names(tmp_path):
    model = small_model()
    model.save(tmp_path / "model.keras")
    assert info_of(load_model(tmp_path / "model.keras")) == ModelInfo()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"class_names": ["a", "b"]}, "2 class names for 3 classes"),
        ({"class_names": ["a", "b", "b"]}, "3 class names for 3 classes"),
        ({"class_names": "abc"}, "class names are abc"),
        ({"class_names": [], "resize": 3}, "resize rule is 3"),
        ({"class_names": [], "resize": "squash", "none_above": 0}, "none_above is 0"),
        ([], "attribute"),
    ],
)
def test_a_file_whose_words_about_itself_do_not_fit(tmp_path, values, words):
    write_model(small_model(), tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        file.attrs["image_classifier"] = json.dumps(values)
    with pytest.raises(RunError, match=words):
        load_model(tmp_path / "model.h5")


# ---- what a newer Keras adds


@keras.saving.register_keras_serializable("newer", "Dense")
class NewerDense(layers.Dense):
    """Keras's Dense as a later version may have it: with settings that no version knows today."""

    def __init__(self, units, speed=None, sides=(1, 2), scaler="zeros", **kwargs):
        super().__init__(units, **kwargs)
        self.speed, self.sides = speed, tuple(sides)
        self.scaler = keras.initializers.get(scaler)

    def get_config(self):
        scaler = keras.initializers.serialize(self.scaler)
        return {**super().get_config(), "speed": self.speed, "sides": self.sides, "scaler": scaler}


@pytest.fixture
def newer(monkeypatch):
    monkeypatch.setattr(layers, "Dense", NewerDense)


def entry(layer):
    """The layer as it stands in a model's configuration."""
    config = json.loads(json.dumps(layer.get_config()))
    return {"module": "keras.layers", "class_name": "Dense", "config": config}


def test_new_settings_that_change_nothing_are_left_out(newer):
    """Whatever they are called: None, a tuple, and an initializer that is an object in the file."""
    before = entry(NewerDense(3, name="logits"))
    after = portable(before)["config"]
    assert set(before["config"]) - set(after) >= {"speed", "sides", "scaler"}
    assert {"units", "activation", "use_bias", "kernel_initializer", "name", "dtype"} <= set(after)
    assert NewerDense.from_config(after).get_config() == NewerDense(3, name="logits").get_config()


def test_new_settings_that_change_something_stay(newer):
    after = portable(entry(NewerDense(3, speed=2, sides=(1, 3), scaler="ones")))["config"]
    assert (after["speed"], after["sides"], after["scaler"]["class_name"]) == (2, [1, 3], "Ones")
    assert "speed" not in portable(entry(NewerDense(3, sides=(1, 3))))["config"]


def test_what_the_oldest_version_knows_stays_though_it_is_a_default():
    """So a version with another default reads what was meant."""
    layer = layers.BatchNormalization()
    item = {"module": "keras.layers", "class_name": "BatchNormalization", "config": layer.get_config()}
    after = portable(json.loads(json.dumps(item)))["config"]
    assert {"momentum", "epsilon", "center", "scale", "axis", "synchronized"} <= set(after)
    assert after["momentum"] == 0.99 and after["epsilon"] == 0.001


def test_a_class_of_somebody_else_is_left_alone():
    item = {"module": "their.package", "class_name": "Dense", "config": {"units": 3, "speed": None}}
    assert portable(item) == item and portable([item, 1, None, "x"]) == [item, 1, None, "x"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_holds_no_setting_that_the_oldest_version_lacks(tmp_path, suffix):
    """Today's three among them; the expectation is written by hand, for the layers of a small network."""
    model = build_model("vgg", num_classes=3, filters=(4,), batch_norm=True, dropout=0.1)
    write_model(model, tmp_path / f"model{suffix}")
    text = json.dumps(configuration(tmp_path / f"model{suffix}"))
    for key in ("renorm", "input_axes", "output_axes", "quantization_config", "renorm_momentum"):
        assert f'"{key}"' not in text
    for key in ("momentum", "kernel_initializer", "padding", "pool_size"):
        assert f'"{key}"' in text


@pytest.mark.parametrize("name", ["M.KERAS", "m.H5", "m.zip"])
def test_an_ending_that_keras_does_not_know_is_no_damaged_file(name, tmp_path):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ConfigError, match=r"allowed: a name that ends in \.keras, \.h5 or \.hdf5"):
        load_model(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_layer_whose_code_is_elsewhere_is_named(suffix, tmp_path):
    """The file is written by another process, which knows the layer."""
    script = """
import sys, keras

@keras.saving.register_keras_serializable("mine")
class Scale(keras.layers.Layer):
    def call(self, x):
        return 2 * x

images = keras.Input((8, 8, 3))
x = keras.layers.Flatten()(Scale()(images))
keras.Model(images, keras.layers.Dense(2, activation="softmax")(x)).save(sys.argv[1])
"""
    path = tmp_path / f"model{suffix}"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True)
    with pytest.raises(
        RunError, match=r"needs the class '(mine>)?Scale', which is not known here; in Python, import"
    ):
        load_model(path)
