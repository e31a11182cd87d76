from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cifar10_trainer import cli, datasets, evaluate, scoring
from cifar10_trainer.errors import ConfigError, RunError
from cifar10_trainer.model_file import ModelInfo, write_model

SIZE, CLASSES = 5, 3


def linear_model(size=SIZE, classes=CLASSES, logits=True, seed=0):
    """probabilities = softmax(flat pixels @ kernel + bias), with random weights; the kernel and the bias."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(size * size * 3, classes)).astype(np.float32) / 500
    bias = rng.normal(size=classes).astype(np.float32)
    inputs = keras.Input((size, size, 3), name="images")
    flat = keras.layers.Flatten()(inputs)
    if logits:
        x = keras.layers.Dense(classes, name="logits")(flat)
        outputs = keras.layers.Activation("softmax", name="probabilities")(x)
    else:
        outputs = keras.layers.Dense(classes, activation="softmax")(flat)
    model = keras.Model(inputs, outputs)
    model.set_weights([kernel, bias])
    return model, kernel.astype(np.float64), bias.astype(np.float64)


def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def some_images(n, size=SIZE, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def run(argv):
    """The exit status of the command with `argv`, its flags at their defaults before."""
    evaluate.FLAGS.unparse_flags()
    for name in evaluate.FLAGS:
        evaluate.FLAGS[name].unparse()
    return cli.run(evaluate.main, evaluate.FLAGS, evaluate.USAGE, ["evaluate", *map(str, argv)])


# ---- predict_probabilities


@pytest.mark.parametrize("logits", [True, False])
def test_probabilities_of_a_linear_model(logits):
    model, kernel, bias = linear_model(logits=logits)
    images = some_images(7)
    expected = softmax(images.reshape(7, -1) @ kernel + bias)
    found = evaluate.predict_probabilities(model, images)
    assert found.dtype == np.float32 and found.shape == (7, CLASSES)
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # float32 sums of 75 products
    np.testing.assert_allclose(found, model(images.astype(np.float32)), rtol=1e-5)


def twin_views(image):
    """(weight, view) of one image, pixel by pixel: what the sixfold average is, written out."""
    n = len(image)

    def reflected(i):
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    def shift(by):
        return np.array([[image[reflected(i + by), reflected(j + by)] for j in range(n)] for i in range(n)])

    def mirror(view):
        return np.array([row[::-1] for row in view])

    whole = [(0.25, image), (0.25, mirror(image))]
    return whole + [(0.125, view) for by in (-1, 1) for view in (shift(by), mirror(shift(by)))]


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("views", [2, 6])
def test_views_against_a_pixelwise_twin(views, logits):
    model, kernel, bias = linear_model(logits=logits)
    images = some_images(4)
    expected = []
    for image in images:
        weighted = twin_views(image) if views == 6 else [(0.5, v) for _, v in twin_views(image)[:2]]
        expected.append(sum(weight * (view.reshape(-1) @ kernel + bias) for weight, view in weighted))
    found = evaluate.predict_probabilities(model, images, views=views)
    np.testing.assert_allclose(found, softmax(np.array(expected)), rtol=1e-4)  # float32 sums of 75 products
    plain = evaluate.predict_probabilities(model, images)
    assert abs(found - plain).max() > 0.01, "the views of these images make a difference"


@pytest.mark.parametrize("views", [2, 6])
@pytest.mark.parametrize(("share", "count"), [(0.25, 6), (0.001, 1), (1.0, 23)])
def test_further_views_of_the_least_sure(views, share, count):
    model, kernel, bias = linear_model()
    images = some_images(23)
    plain = softmax(images.reshape(23, -1) @ kernel + bias)
    everywhere = evaluate.predict_probabilities(model, images, views=views)
    least = np.argsort(plain.max(axis=1))[:count]  # 0.25 * 23, rounded up
    for batch_size in (23, 4):
        found = evaluate.predict_probabilities(model, images, batch_size, views, share)
        np.testing.assert_allclose(found[least], everywhere[least], rtol=1e-5)  # other batches
        others = np.setdiff1d(np.arange(23), least)
        np.testing.assert_allclose(found[others], plain[others], rtol=1e-4)  # float32 sums of 75 products
    assert abs(everywhere - plain)[least].max() > 0.01, "the views of these images make a difference"


@pytest.mark.parametrize(
    ("share", "n", "count"), [(0.07, 100, 7), (0.55, 100, 55), (0.14, 50, 7), (0.141, 50, 8)]
)
def test_a_share_of_the_images_is_no_image_more_for_its_rounding(share, n, count):
    """In floating point 0.07 * 100 is a little more than 7."""
    assert len(scoring.least_sure(np.eye(n, 10), share)) == count


def test_fewer_views_take_fewer_passes():
    model, _, _ = linear_model()
    passes = []

    class Counting(keras.layers.Layer):
        def call(self, x):
            tf.py_function(lambda y: passes.append(len(y)), [x], [])
            return x

    inputs = keras.Input((SIZE, SIZE, 3))
    counting = keras.Model(inputs, model(Counting()(inputs)))
    evaluate.predict_probabilities(counting, some_images(20), 5, views=6, views_share=0.25)
    assert sum(passes) == 20 + 5 * 5, "the image itself, and five further views of a quarter"
    del passes[:]
    evaluate.predict_probabilities(counting, some_images(20), 5, views=6)
    assert sum(passes) == 20 * 6


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_the_share_of_the_views_is_checked(share):
    with pytest.raises(ConfigError, match=r"views_share is .*; allowed: above 0, up to 1"):
        evaluate.predict_probabilities(linear_model()[0], some_images(1), views=6, views_share=share)


def test_the_batch_size_does_not_matter():
    model, _, _ = linear_model()
    images = some_images(23)
    reference = evaluate.predict_probabilities(model, images, batch_size=23)
    for batch_size in (1, 7, 22, 500):
        found = evaluate.predict_probabilities(model, images, batch_size, views=2)
        np.testing.assert_allclose(
            found, evaluate.predict_probabilities(model, images, 23, views=2), rtol=1e-5
        )  # sums in another order
        found = evaluate.predict_probabilities(model, images, batch_size)
        np.testing.assert_allclose(found, reference, rtol=1e-5)
        assert evaluate.score(np.arange(23) % 3, found)["n"] == 23


def test_no_images_give_no_rows():
    model, _, _ = linear_model()
    assert evaluate.predict_probabilities(model, some_images(0)).shape == (0, CLASSES)


def test_batch_norm_and_dropout_are_at_rest():
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.BatchNormalization()(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.Dropout(0.9)(keras.layers.Flatten()(x))
    model = keras.Model(inputs, keras.layers.Activation("softmax")(keras.layers.Dense(3, name="logits")(x)))
    images = some_images(6)
    before = model.get_weights()
    found = evaluate.predict_probabilities(model, images)
    np.testing.assert_array_equal(found, evaluate.predict_probabilities(model, images))
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_no_probability_is_reported():
    model, kernel, bias = linear_model()
    model.set_weights([kernel * np.nan, bias])
    with pytest.raises(RunError, match="diverged"):
        evaluate.predict_probabilities(model, some_images(2))
    inputs = keras.Input((SIZE, SIZE, 3))
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(inputs))
    no_softmax = keras.Model(inputs, outputs)
    no_softmax.set_weights([np.full((75, 2), -1.0), np.zeros(2)])
    with pytest.raises(RunError, match="softmax"):
        evaluate.predict_probabilities(no_softmax, some_images(2))


@pytest.mark.parametrize(
    ("classes", "activation", "bias"),
    [(1, "sigmoid", [0.3]), (2, "sigmoid", [0.03, 0.3]), (2, None, [19.4, 19.9])],
)
def test_outputs_that_are_no_probabilities_are_no_scores(classes, activation, bias):
    inputs = keras.Input((SIZE, SIZE, 3))
    outputs = keras.layers.Dense(classes, activation=activation)(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, outputs)
    model.set_weights([np.zeros((75, classes)), np.array(bias)])
    with pytest.raises(RunError, match="of another sum than 1"):
        evaluate.predict_probabilities(model, some_images(2))


def test_views_must_be_one_of_three():
    with pytest.raises(ConfigError, match="views is 3; allowed: 1, 2, 6"):
        evaluate.predict_probabilities(linear_model()[0], some_images(1), views=3)


# ---- score


def test_score_by_hand():
    p = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], np.float32)
    numbers = evaluate.score(np.array([0, 1, 2, 1]), p)
    # The last is certain and wrong: its probability of 0 counts as 2^-126, float32's smallest in full precision.
    loss = (np.log(2) - np.log(0.8) + 0 + 126 * np.log(2)) / 4
    assert numbers == {"accuracy": 0.75, "loss": pytest.approx(loss, rel=1e-7), "n": 4}


def test_score_agrees_with_keras():
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(10), 100).astype(np.float32), rng.integers(0, 10, 100)
    expected = float(np.mean(keras.losses.sparse_categorical_crossentropy(labels, p)))
    assert evaluate.score(labels, p)["loss"] == pytest.approx(expected, rel=1e-5)  # Keras sums in float32


def test_score_counts_every_image():
    p = np.full((3, 2), 0.5, np.float32)
    for labels in (np.zeros(4, int), np.zeros(2, int)):
        with pytest.raises(AssertionError, match="labels for 3 rows"):
            evaluate.score(labels, p)
    with pytest.raises(AssertionError):
        evaluate.score(np.zeros(0, int), p[:0])


# ---- load_model


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_load_model(tmp_path, suffix):
    model, _, _ = linear_model()
    model.save(tmp_path / f"model{suffix}")
    loaded = evaluate.load_model(tmp_path / f"model{suffix}")
    images = some_images(3)
    np.testing.assert_array_equal(
        evaluate.predict_probabilities(loaded, images), evaluate.predict_probabilities(model, images)
    )


def test_load_model_refuses(tmp_path):
    with pytest.raises(ConfigError, match="no model file"):
        evaluate.load_model(tmp_path / "none.keras")
    with pytest.raises(ConfigError, match=r"is a folder; allowed: a \.keras or .h5 file, such as"):
        evaluate.load_model(tmp_path)
    for name in ("text.keras", "text.h5"):
        (tmp_path / name).write_text("not a model")
        reason = "not a .keras file, which is a zip archive" if name.endswith(".keras") else ""
        with pytest.raises(RunError, match=f"does not open as a Keras model .*{reason}"):
            evaluate.load_model(tmp_path / name)
    (tmp_path / "model.onnx").write_text("another kind")
    with pytest.raises(ConfigError, match=r"ends in \.keras"):
        evaluate.load_model(tmp_path / "model.onnx")


@pytest.mark.parametrize("shape", [(5, 5, 1), (75,), (None, None, 3)])
def test_load_model_refuses_other_inputs(tmp_path, shape):
    inputs = keras.Input(shape)
    x = keras.layers.GlobalAveragePooling2D()(inputs) if len(shape) == 3 else inputs
    keras.Model(inputs, keras.layers.Dense(2)(x)).save(tmp_path / "model.keras")
    with pytest.raises(ConfigError, match=r"allowed: one that maps \(batch, height, width, 3\)"):
        evaluate.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_safe_mode_stays_on(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Lambda(lambda x: x * 2.0, output_shape=(SIZE, SIZE, 3))(inputs)
    keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x))).save(path)
    keras.models.load_model(path, compile=False, safe_mode=False)  # opens for those who ask for it
    with pytest.raises(RunError, match="does not open"):
        evaluate.load_model(path)


# ---- the command


COLOURS = {
    "blue": (0, 0, 250),
    "green": (0, 250, 0),
    "red": (250, 0, 0),
}  # classes in the order of their names


def colour_model(size=8):
    """Its logits are the mean blue, green and red of an image, over 50: 5 for the colour itself, else 0."""
    inputs = keras.Input((size, size, 3), name="images")
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    x = keras.layers.Dense(3, use_bias=False, name="logits")(x)
    model = keras.Model(inputs, keras.layers.Activation("softmax", name="probabilities")(x))
    model.set_weights([np.eye(3)[::-1] / 50])
    return model


SURE = np.exp(5) / (np.exp(5) + 2)  # the probability of the colour that is there


def paint(folder, colour, count):
    """The first image has the colour itself, the others are a little darker each."""
    folder.mkdir(parents=True)
    for i in range(count):
        shade = tuple(max(0, value - i) for value in COLOURS[colour])
        Image.new("RGB", (12, 12), shade).save(folder / f"{i}.png")


@pytest.fixture
def run_folder(tmp_path):
    """A run on a folder of colours: 20 training images a class; 4 test images, one red called green."""
    data = tmp_path / "data"
    for name in COLOURS:
        paint(data / "train" / name, name, 20)
    paint(data / "test" / "blue", "blue", 1)
    paint(data / "test" / "green", "green", 1)
    paint(data / "test" / "red", "red", 1)
    Image.new("RGB", (12, 12), COLOURS["red"]).save(data / "test" / "green" / "wrong.png")
    workdir = tmp_path / "run"
    workdir.mkdir()
    colour_model().save(workdir / "model.keras")
    config = {
        "dataset": "folder",
        "data_dir": str(data),
        "validation_fraction": 0.25,
        "validation_split": "stratified",
    }
    config |= {"seed": 3, "views": 1, "class_names": list(COLOURS)}
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def change_config(workdir, **values):
    path = workdir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_evaluate_a_run(run_folder, capsys):
    assert run(["--workdir", run_folder]) == 0
    out = capsys.readouterr().out
    loss = (-3 * np.log(SURE) - np.log((1 - SURE) / 2)) / 4
    # Wilson's interval of 3 in 4, as R's binom.confint gives it, and the mean of the recalls 1, 1/2 and 1.
    text = f"accuracy 0.7500 (95% interval 30.1-95.4%)   loss {loss:.4f}   balanced accuracy 0.8333"
    assert "4 test images" in out and text in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    assert rows["blue"] == ["1.0000", "1.0000", "1.0000", "1"]
    assert rows["green"] == ["1.0000", "0.5000", "0.6667", "2"]  # 1 of 2 found; F1 = 2 * 1 * 0.5 / (1 + 0.5)
    assert rows["red"] == ["0.5000", "1.0000", "0.6667", "1"]  # 1 of 2 right


def test_a_run_on_arrays_has_no_data_set_of_its_own(run_folder, tmp_path, capsys):
    """Its config names cifar10, which it did not see."""
    change_config(run_folder, data_source="arrays in memory", dataset="cifar10")
    assert run(["--workdir", run_folder]) == 2
    assert "was trained on arrays in memory" in capsys.readouterr().err
    assert run(["--workdir", run_folder, "--dataset=folder", f"--data_dir={tmp_path / 'data'}"]) == 0


def test_a_run_is_scored_on_the_data_that_it_was_given(run_folder, tmp_path, capsys):
    """In Python, train(config, data=load_data("folder", ...)): the config names cifar10, which the run did not see."""
    change_config(run_folder, data_name="folder", dataset="cifar10")
    assert run(["--workdir", run_folder]) == 0
    assert "4 test images of folder" in capsys.readouterr().out
    # Names that are numbers, as those of arrays without names; but they are names.
    for name in ("digits", "folder"):
        change_config(run_folder, data_name=name, class_names=["0", "1", "2"])
        assert run(["--workdir", run_folder, "--dataset=folder", f"--data_dir={tmp_path / 'data'}"]) == 2
        assert "but the model was trained on 0, 1, 2" in capsys.readouterr().err


def test_a_home_in_a_flag_is_that_of_the_shell(run_folder, tmp_path, capsys, monkeypatch):
    """bash leaves the ~ of --data_dir=~/data as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["--workdir=~/run", "--data_dir=~/data", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 4


@pytest.mark.parametrize("flag", [True, False])
def test_of_a_folder_that_has_lost_pictures_only_the_runs_own_test_pictures_are_scored(
    flag, run_folder, tmp_path, capsys
):
    """Otherwise a picture that the model was trained on might be one of a new fifth. Of blue, the first class, one is left."""
    rows = [f"train/{name}/{i}.png,{name},train" for name in COLOURS for i in range(20)]
    rows += [f"test/{name}/0.png,{name},test" for name in COLOURS] + ["test/green/wrong.png,green,test"]
    (run_folder / "split.csv").write_text("\n".join(["file,class,part", *rows]) + "\n")
    argv = ["--workdir", run_folder, *([f"--data_dir={tmp_path / 'data'}"] if flag else [])]
    (tmp_path / "data" / "test" / "red" / "0.png").unlink()
    for i in range(19):
        (tmp_path / "data" / "train" / "blue" / f"{i}.png").unlink()
    paint(tmp_path / "data" / "train" / "green" / "later", "red", 30)
    assert run(argv) == 0
    captured = capsys.readouterr()
    assert "lacks 20 of the run's 64 pictures; of the others each stays in its part" in captured.err
    assert (
        "3 test images" in captured.out and "accuracy 0.6667" in captured.out
    )  # blue and green, and the wrong one
    shutil.rmtree(tmp_path / "data" / "test")
    change_config(run_folder, fingerprint="of all 64")
    assert run(argv) == 2
    assert "there are no such images" in capsys.readouterr().err


def test_a_copy_without_a_class_is_scored_with_the_classes_of_the_run(run_folder, tmp_path, capsys):
    """The copy holds the test pictures of all classes but blue, the first one."""
    rows = [f"train/{name}/{i}.png,{name},train" for name in COLOURS for i in range(20)]
    rows += [f"test/{name}/0.png,{name},test" for name in COLOURS]
    (run_folder / "split.csv").write_text("\n".join(["file,class,part", *rows]) + "\n")
    for name in ("green", "red"):
        shutil.copytree(tmp_path / "data" / "test" / name, tmp_path / "copy" / "test" / name)
    assert run(["--workdir", run_folder, f"--data_dir={tmp_path / 'copy'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 2


@pytest.mark.parametrize(
    ("part", "split"), [("val", None), ("val", "validation"), ("val", "train"), (None, "train")]
)
def test_the_parts_of_a_folder_that_the_run_never_saw_are_its_own(run_folder, tmp_path, capsys, part, split):
    (run_folder / "split.csv").write_text("file,class,part\ntrain/red/0.png,red,train\n")
    change_config(run_folder, fingerprint="of others", validation_fraction=0.1)
    for name in COLOURS:
        paint(tmp_path / "new" / "train" / name / "deep", name, 3)
        if part:
            paint(tmp_path / "new" / part / name / "deep", name, 2)
    flags = [f"--split={split}"] if split else []
    assert run(["--workdir", run_folder, f"--data_dir={tmp_path / 'new'}", "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["n"]) == (("train", 9) if split == "train" else ("validation", 6))


def test_advice_names_parts_that_there_are():
    digits = datasets.load("digits")
    untested = dataclasses.replace(
        digits, test_images=digits.test_images[:0], test_labels=digits.test_labels[:0]
    )
    for settings, parts in (({}, "train"), ({"validation_fraction": 0.1}, "validation, train")):
        with pytest.raises(ConfigError, match=f"no such images in 'digits'; allowed: {parts}$"):
            evaluate.select(untested, "test", settings)


def test_unreadable_pictures_of_a_new_folder(run_folder, tmp_path, capsys):
    """Of 12 pictures 3 cannot be read."""
    for name in COLOURS:
        paint(tmp_path / "new" / name, name, 3)
        (tmp_path / "new" / name / "broken.png").write_text("no picture")
    argv = ["--workdir", run_folder, f"--data_dir={tmp_path / 'new'}"]
    (run_folder / "split.csv").write_text("file,class,part\ntrain/red/0.png,red,train\n")
    assert run(argv) == 1
    assert "3 of 12 pictures cannot be read" in capsys.readouterr().err
    assert run([*argv, "--max_bad=0.3"]) == 0
    assert "9 test images" in capsys.readouterr().out
    assert run([*argv, "--max_bad=0.3", "--strict"]) == 1


def test_new_pictures_are_all_scored_and_those_of_a_folder_without_a_run_a_fifth(
    run_folder, tmp_path, capsys
):
    for name in COLOURS:
        paint(tmp_path / "new" / name, name, 10)
    new = ["--workdir", run_folder, f"--data_dir={tmp_path / 'new'}"]
    (run_folder / "split.csv").write_text("file,class,part\ntrain/red/0.png,red,train\n")
    assert run(new) == 0
    assert "30 test images" in capsys.readouterr().out
    argv = ["--model", run_folder / "model.keras", "--dataset=folder", f"--data_dir={tmp_path / 'new'}"]
    assert run(argv) == 0
    captured = capsys.readouterr()
    assert "6 test images" in captured.out and "a fifth of each class is scored" in captured.err
    (tmp_path / "parts" / "train").mkdir(parents=True)
    shutil.copytree(tmp_path / "new", tmp_path / "parts" / "train", dirs_exist_ok=True)
    shutil.copytree(tmp_path / "new", tmp_path / "parts" / "test")
    argv[-1] = f"--data_dir={tmp_path / 'parts'}"
    assert run(argv) == 0
    captured = capsys.readouterr()
    assert "30 test images" in captured.out and "a fifth" not in captured.err


def test_evaluate_model_takes_a_tf_data_set_and_refuses_other_things():
    model, _, _ = linear_model()
    images, labels = some_images(4), np.arange(4) % CLASSES
    pairs = tf.data.Dataset.from_tensor_slices((images, labels))
    expected = evaluate.evaluate_model(model, (images, labels))
    assert evaluate.evaluate_model(model, pairs.batch(3)) == expected
    for data in (None, {"x": images}, (images, labels, labels)):
        with pytest.raises(ConfigError, match=r"evaluation data is .*; allowed: \(images, labels\)"):
            evaluate.evaluate_model(model, data)
    with pytest.raises(ConfigError, match="batch_size is '5'; allowed: 1 or more, or None"):
        evaluate.evaluate_model(model, (images, labels), batch_size="5")


def test_evaluate_model_refuses():
    model, _, _ = linear_model()
    images, labels = some_images(4), np.arange(4) % CLASSES
    for size in (0, -3):
        with pytest.raises(ConfigError, match=f"batch_size is {size}; allowed: 1 or more"):
            evaluate.evaluate_model(model, (images, labels), batch_size=size)
    with pytest.raises(ConfigError, match="arrays in memory has no test images; allowed: a Dataset that has"):
        evaluate.evaluate_model(model, datasets.from_arrays((images, labels)))


def test_without_test_images_the_validation_images_are_scored_and_it_says_so(run_folder, tmp_path, capsys):
    shutil.rmtree(tmp_path / "data" / "test")
    assert run(["--workdir", run_folder, "--json"]) == 0
    captured = capsys.readouterr()
    numbers = json.loads(captured.out)
    assert (numbers["split"], numbers["n"]) == ("validation", 15) and "has no test images" in captured.err
    assert run(["--workdir", run_folder, "--split=test"]) == 2  # asked for, so not replaced
    assert "split is 'test', but there are no such images" in capsys.readouterr().err
    change_config(run_folder, validation_fraction=None)
    assert run(["--workdir", run_folder]) == 2
    assert "split is 'test', but there are no such images" in capsys.readouterr().err


def test_evaluate_as_json(run_folder, capsys):
    assert run(["--workdir", run_folder, "--json", "--views=6", "--batch_size=2"]) == 0
    captured = capsys.readouterr()
    numbers = json.loads(captured.out)
    loss = (-3 * np.log(SURE) - np.log((1 - SURE) / 2)) / 4  # the views of one colour are all equal
    assert numbers.pop("loss") == pytest.approx(loss, rel=1e-5)  # float32 logits
    assert numbers.pop("balanced_accuracy") == pytest.approx(5 / 6)
    assert numbers.pop("accuracy_interval") == pytest.approx([0.30064, 0.95441], abs=1e-5)
    assert numbers == {
        "model": str(run_folder / "model.keras"), "dataset": "folder",
        "source": str(run_folder.parent / "data"), "split": "test", "views": 6, "views_share": 1, "accuracy": 0.75, "n": 4,
    }  # fmt: skip


def test_evaluate_with_a_share_that_is_none(run_folder, capsys):
    assert run(["--workdir", run_folder, "--views=6", "--views_share=0"]) == 2
    assert "views_share is 0.0; allowed: above 0, up to 1" in capsys.readouterr().err


def test_evaluate_refuses_a_resize_of_images_that_have_one_size(run_folder, capsys):
    assert run(["--workdir", run_folder, "--dataset=digits", "--resize=pad"]) == 2
    assert "resize is pad; allowed with the dataset digits: squash" in capsys.readouterr().err


def test_evaluate_shows_the_first_images(run_folder, capsys):
    # In the order of the classes and files: blue/0, green/0, green/wrong (which is red), red/0.
    assert run(["--workdir", run_folder, "--show=3"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("image ")]
    assert shown == [
        f"image 0: blue, predicted blue ({SURE:.4f})",
        f"image 1: green, predicted green ({SURE:.4f})",
        f"image 2: green, predicted red ({SURE:.4f})",
    ]
    assert run(["--workdir", run_folder, "--show=9", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["first"]
    assert [(a["image"], a["true"], a["predicted"]) for a in first] == [
        (0, "blue", "blue"), (1, "green", "green"), (2, "green", "red"), (3, "red", "red"),
    ]  # fmt: skip
    assert [a["probability"] for a in first] == pytest.approx([SURE] * 4, rel=1e-5)
    assert run(["--workdir", run_folder]) == 0
    assert "image 0" not in capsys.readouterr().out


@pytest.mark.parametrize("fold", [0, 2])
def test_evaluate_parts_the_training_images_as_the_run_did(run_folder, capsys, monkeypatch, fold):
    data = datasets.load("folder", run_folder.parent / "data", 8)
    parts = datasets.split(data, 0.25, "stratified", 3, fold)
    seen = []

    def look(model, images, batch_size, views, views_share):
        seen.append((images, (views, views_share)))
        return np.full((len(images), 3), 1 / 3)

    monkeypatch.setattr(evaluate, "predict_probabilities", look)
    change_config(
        run_folder, views=2, views_share=0.5, **({"validation_fold": fold} if fold else {})
    )  # older runs have none
    for name, expected in (("train", parts[0]), ("validation", parts[2])):
        assert run(["--workdir", run_folder, "--split", name, "--json"]) == 0
        images, views = seen.pop()
        np.testing.assert_array_equal(images, expected)
        assert views == (2, 0.5), "the run's own, unless a flag says otherwise"
        assert (
            run(["--workdir", run_folder, "--split", name, "--json", "--views=6", "--views_share=0.1"]) == 0
        )
        assert seen.pop()[1] == (6, 0.1)
    assert len(parts[2]) == 15


def test_evaluate_a_model_file(run_folder, capsys):
    data = run_folder.parent / "data"
    argv = ["--model", run_folder / "model.keras", "--dataset=folder", "--data_dir", data, "--json"]
    assert run(argv) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 0.75
    assert run([*argv, "--split=train"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 60
    assert run([*argv, "--split=validation"]) == 2
    assert "--workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ([], 2, "exactly one of"),
        (["--workdir=a", "--model=b"], 2, "exactly one of"),
        (["--workdir=nowhere"], 2, "no run folder at nowhere"),
        (["--model=nothing.keras"], 2, "no model file at nothing.keras"),
        (["--model=x.keras", "stray"], 2, "unexpected argument 'stray'"),
        (["--split=all"], 2, "split"),
        (["--views=3"], 2, "views"),
        (["--batch_size=0"], 2, "batch_size"),
        (["--spilt=test"], 2, "spilt"),
    ],
)
def test_wrong_usage_is_one_line(argv, status, message, capsys):
    assert run(argv) == status
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def failure(argv, capsys):
    status = run(argv)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return status, captured.err


def test_a_run_that_is_not_finished(run_folder, capsys):
    (run_folder / "model.keras").rename(run_folder / "model.h5")
    status, message = failure(["--workdir", run_folder], capsys)
    assert status == 1 and "has no model.keras" in message and "finish the run" in message
    (run_folder / "config.json").unlink()
    assert "has no config.json" in failure(["--workdir", run_folder], capsys)[1]


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_config_that_is_none(run_folder, capsys, content):
    (run_folder / "config.json").write_text(content)
    status, message = failure(["--workdir", run_folder], capsys)
    assert status == 1 and "config.json" in message


def test_a_model_that_does_not_fit(run_folder, capsys):
    status, message = failure(["--workdir", run_folder, "--dataset=digits"], capsys)
    assert status == 2 and "(8, 8, 3) of 3 classes" in message and "(32, 32, 3) of 10 classes" in message
    change_config(run_folder, class_names=["blue", "red", "green"])
    status, message = failure(["--workdir", run_folder], capsys)
    assert status == 2 and "trained on blue, red, green" in message


def test_only_the_images_of_a_run_can_be_split_again(run_folder, capsys):
    folder = run_folder.parent / "data"
    change_config(run_folder, fingerprint=datasets.fingerprint(datasets.load("folder", folder, 8)))
    assert run(["--workdir", run_folder, "--split=validation"]) == 0
    capsys.readouterr()
    Image.new("RGB", (12, 12), COLOURS["red"]).save(folder / "train" / "red" / "another.png")
    status, message = failure(["--workdir", run_folder, "--split=validation"], capsys)
    assert status == 2 and str(folder) in message and "--model" in message
    assert run(["--workdir", run_folder]) == 0, "test images may be any"
    other_data = ["--dataset=folder", "--data_dir", folder, "--split=train"]
    assert run(["--model", run_folder / "model.keras", *other_data]) == 0


def test_a_split_without_images(run_folder, capsys):
    change_config(run_folder, validation_fraction=None)
    status, message = failure(["--workdir", run_folder, "--split=validation"], capsys)
    assert status == 2 and "split is 'validation'" in message and "test, train" in message
    for path in sorted((run_folder.parent / "data" / "test").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (run_folder.parent / "data" / "test").rmdir()
    status, message = failure(["--workdir", run_folder], capsys)
    assert status == 2 and "split is 'test'" in message and message.endswith("allowed: train\n")


def test_help_needs_no_tensorflow():
    code = """
import sys
from cifar10_trainer import cli, evaluate, predict
for module in (evaluate, predict):
    assert cli.run(module.main, module.FLAGS, module.USAGE, ["x", "--help"]) == 0
print([m for m in ("tensorflow", "keras", "matplotlib", "sklearn") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--workdir" in done.stdout and "--class_names" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_model_file_alone_refuses_images_of_other_classes(run_folder, tmp_path, capsys):
    model = colour_model()
    for names, expected in ((tuple(COLOURS), 0), (("cat", "dog", "emu"), 2), (("0", "1", "2"), 0)):
        model.info = ModelInfo(names)
        write_model(model, tmp_path / "copy.keras")
        argv = [
            f"--model={tmp_path / 'copy.keras'}",
            "--dataset=folder",
            f"--data_dir={run_folder.parent / 'data'}",
        ]
        assert run(argv) == expected
        assert ("trained on cat, dog, emu" in capsys.readouterr().err) == (expected == 2)


@pytest.mark.parametrize("names", [("red", "green", "blue"), ("0", "1", "2")])
def test_a_model_file_of_other_images_asks_for_them_before_cifar10_is_sought(
    names, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("CIFAR-10 is sought"))
    monkeypatch.setattr(datasets, "read_ahead", lambda *_: None)
    model = colour_model()
    model.info = ModelInfo(names)
    write_model(model, tmp_path / "model.keras")
    status, message = failure([f"--model={tmp_path / 'model.keras'}"], capsys)
    assert (
        status == 2 and f"was trained on {', '.join(names)}, not on CIFAR-10; allowed: --dataset" in message
    )


def test_a_folder_that_is_no_run(tmp_path, capsys):
    (tmp_path / "folds.json").write_text("{}")
    status, message = failure([f"--workdir={tmp_path}"], capsys)
    assert status == 2 and "is no run folder: it has no config.json" in message
    assert "of a cross-validation one of its folds" in message
