from __future__ import annotations

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

from cifar10_trainer import cli, evaluate_model, predict
from cifar10_trainer.errors import ConfigError, RunError
from cifar10_trainer.model_file import ModelInfo, write_model

NAMES = ("blue", "green", "red")
SURE = np.exp(5) / (np.exp(5) + 2)  # the model's probability of a pure colour, see below


def colour_model():
    """Its logits are the mean blue, green and red of an image, over 51: 5 for a full colour, else 0."""
    inputs = keras.Input((6, 4, 3), name="images")  # higher than wide, so that a mix-up of the two shows
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    x = keras.layers.Dense(3, use_bias=False, name="logits")(x)
    model = keras.Model(inputs, keras.layers.Activation("softmax", name="probabilities")(x))
    model.set_weights([np.eye(3)[::-1] / 51])
    return model


@pytest.fixture
def folder(tmp_path):
    """model.keras, config.json, and images/ with one picture of each colour, in three formats and sizes."""
    colour_model().save(tmp_path / "model.keras")
    (tmp_path / "config.json").write_text(
        json.dumps({"recipe": "mine", "dataset": "folder", "class_names": NAMES})
    )
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (50, 20), (255, 0, 0)).save(images / "a.png")
    Image.new("RGB", (4, 6), (0, 255, 0)).save(images / "b.BMP")
    Image.new("RGB", (3, 90), (0, 0, 255)).save(images / "c.gif")
    (images / "notes.txt").write_text("no image, and not asked for")
    (images / "deeper").mkdir()
    return tmp_path


def run(argv):
    """The exit status of the command with `argv`, its flags at their defaults before."""
    predict.FLAGS.unparse_flags()
    for name in predict.FLAGS:
        predict.FLAGS[name].unparse()
    return cli.run(predict.main, predict.FLAGS, predict.USAGE, ["predict", *map(str, argv)])


def test_predict_as_a_function(folder):
    paths = [folder / "images" / name for name in ("c.gif", "a.png")]
    blue, red = predict.predict_images(colour_model(), paths, NAMES)
    assert (blue["file"], blue["label"]) == (str(paths[0]), "blue")
    assert (red["file"], red["label"]) == (str(paths[1]), "red")
    assert (
        red["probability"] == red["probabilities"]["red"] == pytest.approx(SURE, rel=1e-5)
    )  # six digits are kept
    assert list(red["probabilities"]) == ["red", "blue", "green"]  # likeliest first, equals in their order
    assert red["probabilities"]["blue"] == pytest.approx((1 - SURE) / 2, rel=1e-4)  # six digits
    assert predict.predict_images(colour_model(), paths[:1])[0]["label"] == "0"
    assert predict.predict_images(colour_model(), []) == []
    with pytest.raises(ConfigError, match=r"unknown resize 'fit'.*squash, crop, pad"):
        predict.predict_images(colour_model(), paths, resize="fit")
    with pytest.raises(ConfigError, match="class_names is 'ab'; allowed: a list of names"):
        predict.predict_images(colour_model(), paths, class_names="ab")
    for one in (paths[1], str(paths[1])):
        assert predict.predict_images(colour_model(), one, NAMES) == [red]


def test_entropy_is_zero_where_one_class_has_all_and_log_n_where_all_are_equal():
    assert predict.entropy(np.array([0.0, 1.0, 0.0])) == 0
    assert predict.entropy(np.full(10, 0.1, np.float32)) == pytest.approx(np.log(10), rel=1e-6)
    assert predict.entropy(np.array([0.5, 0.5, 0])) == pytest.approx(np.log(2))


def test_json_is_one_object_a_line(folder, capsys):
    files = [folder / "images" / "b.BMP", folder / "images" / "a.png"]
    assert run(["--model", folder / "model.keras", "--json", *files]) == 0
    green, red = map(json.loads, capsys.readouterr().out.splitlines())
    assert set(green) == {"file", "label", "probability", "probabilities"}
    assert (green["file"], green["label"], red["label"]) == (str(files[0]), "green", "red")
    assert set(red["probabilities"]) == set(NAMES)
    assert sum(red["probabilities"].values()) == pytest.approx(1, abs=1e-5)  # of six digits each


def test_a_picture_that_looks_like_none_of_the_classes_is_marked(folder, capsys):
    model = colour_model()
    model.info = ModelInfo(NAMES, none_above=1.0)
    write_model(model, folder / "sure.keras")
    Image.new("RGB", (9, 9), (90, 90, 90)).save(folder / "grey.png")  # all classes alike: entropy log(3)
    argv = ["--model", folder / "sure.keras", folder / "images" / "a.png", folder / "grey.png"]
    assert run(argv) == 0
    _, red, grey = capsys.readouterr().out.splitlines()
    assert "looks like none" not in red and grey.endswith("looks like none of the classes")
    assert run([*argv, "--json"]) == 0
    found = [json.loads(line)["none_of_the_classes"] for line in capsys.readouterr().out.splitlines()]
    assert found == [False, True]


def test_table_is_aligned(folder, capsys):
    images = folder / "images"
    assert run(["--model", folder / "model.keras", images]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "file",
        *(str(images / n) for n in ("a.png", "b.BMP", "c.gif")),
    ]
    head, red, green, _ = lines
    assert head.index("label") == red.index("red ") == green.index("green ")
    assert head.index("probability") == red.index(f"{SURE:.4f}")
    rest = f"{(1 - SURE) / 2:.4f}"
    assert red.endswith(f"blue {rest}, green {rest}") and red.index("blue ") == head.index("then")


@pytest.mark.parametrize(("top_k", "shown"), [(1, 0), (2, 1), (3, 2), (9, 2)])
def test_top_k(folder, capsys, top_k, shown):
    assert run(["--model", folder / "model.keras", f"--top_k={top_k}", folder / "images" / "a.png"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert ("then" in head) == (top_k > 1)
    assert len(row.split()) == 3 + 2 * shown


def test_top_k_of_json(folder, capsys):
    argv = ["--model", folder / "model.keras", "--json", "--top_k=2", folder / "images" / "a.png"]
    assert run(argv) == 0
    probabilities = json.loads(capsys.readouterr().out)["probabilities"]
    assert len(probabilities) == 2 and next(iter(probabilities)) == "red"


def label(argv, capsys):
    assert run([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["label"]


def test_class_names(folder, capsys):
    argv = ["--model", folder / "model.keras", folder / "images" / "a.png"]
    assert label(argv, capsys) == "red"
    assert label([*argv, "--class_names=x,y,z"], capsys) == "z"
    (folder / "config.json").write_text("{}")
    assert label(argv, capsys) == "2"
    (folder / "config.json").unlink()
    assert label(argv, capsys) == "2"


@pytest.mark.parametrize(
    "content",
    [
        '{"class_names": 3}',
        '{"class_names": "abc"}',
        '{"name": "another program\'s"}',
        '{"recipe": "cake", "class_names": 5}',
        '{"recipe": "cake", "class_names": "abc"}',
        "[1]",
        "{",
    ],
)
def test_what_another_program_has_put_beside_a_model_does_not_matter(folder, capsys, content):
    (folder / "config.json").write_text(content)
    assert predict.info_beside(folder / "model.keras") == ModelInfo()


def test_a_model_of_one_output_is_refused(folder, tmp_path, capsys):
    """Its number would be divided by itself, and every picture be of the class 0."""
    images = keras.Input((8, 8, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(images)
    model = keras.Model(images, keras.layers.Dense(1, "sigmoid", bias_initializer="ones")(pooled))
    model.save(tmp_path / "one.keras")
    assert run(["--model", tmp_path / "one.keras", folder / "images"]) == 2
    assert "to (None, 1); allowed: one that maps" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="two classes or more"):
        predict.predict_images(model, np.zeros((1, 8, 8, 3), np.uint8))


def test_many_files_are_labelled_some_at_a_time(folder, monkeypatch):
    model, paths = colour_model(), predict.find_images([folder / "images"]) * 3
    whole = list(predict.label_files(model, paths, NAMES, "squash"))
    assert len(whole) == 1
    for limit, value in (("BLOCK_PICTURES", 4), ("BLOCK_PROBABILITIES", 12), ("BLOCK_BYTES", 4 * 6 * 4 * 3)):
        with monkeypatch.context() as patch:
            patch.setattr(predict, limit, value)
            blocks = list(predict.label_files(model, paths, NAMES, "squash"))
        assert max(len(found) + len(errors) for found, errors in blocks) == 4
        assert [row for found, _ in blocks for row in found] == whole[0][0]


@pytest.mark.parametrize("flag", ["--workdir", "--model"])
def test_a_run_folder_stands_for_its_model(folder, capsys, flag):
    argv = [folder / "images" / "a.png"]
    assert (
        label([flag, folder, *argv], capsys)
        == label(["--model", folder / "model.keras", *argv], capsys)
        == "red"
    )


@pytest.mark.parametrize("names", ["a,b", "a,b,b", "a,b,c,d"])
def test_class_names_that_do_not_fit(folder, capsys, names):
    assert run(["--model", folder / "model.keras", f"--class_names={names}", folder / "images"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "allowed: 3 different ones" in captured.err


def test_what_can_be_read_is_labelled_and_the_rest_is_named(folder, capsys, monkeypatch):
    broken, pipe = folder / "images" / "broken.png", folder / "images" / "pipe.png"
    broken.write_bytes((folder / "images" / "a.png").read_bytes()[:40])
    os.mkfifo(pipe)
    os.symlink(folder / "gone.png", folder / "images" / "link.png")
    monkeypatch.setattr(predict, "BLOCK_BYTES", 2 * 6 * 4 * 3)  # two images at a time
    for form in ("--json", "--nojson"):
        assert run(["--model", folder / "model.keras", form, folder / "images"]) == 1
        out, err = capsys.readouterr()
        assert all(f"{name}" in out for name in ("a.png", "b.BMP", "c.gif")) and "broken" not in out
        *each, last = err.splitlines()
        assert [line.split()[0] for line in each] == [
            str(folder / "images" / name) for name in ("broken.png", "link.png", "pipe.png")
        ]
        assert last == "error: 3 of 6 images cannot be read; repair or remove them"
    assert run(["--model", folder / "model.keras", broken]) == 1
    assert capsys.readouterr().out == ""
    with pytest.raises(RunError):
        predict.predict_images(colour_model(), [broken])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workdir=.", "--model=model.keras", "images"], "--workdir and --model; allowed: one of the two"),
        (["--workdir=nowhere", "images"], "no run folder at nowhere; allowed: one written by"),
        (["--workdir=images", "images"], "images/model.keras; allowed: a .keras or .h5 file"),
        (["--model=model.keras"], "no IMAGE"),
        (["--model=model.keras", "nothing.png"], "no image at nothing.png"),
        (["--model=model.keras", ""], "an IMAGE is empty; allowed: image files and folders"),
        (["--model=model.keras", "--class_names=", "images"], "--class_names is empty; allowed: a value"),
        (["--model=model.keras", "images/deeper"], "no images in"),
        (["--model=other.keras", "images"], "no model file at other.keras"),
        (["--model=model.keras", "--top_k=0", "images"], "top_k"),
    ],
)
def test_wrong_usage_is_one_line(folder, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(folder)
    assert run(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_a_file_that_is_no_model(folder, capsys):
    (folder / "model.keras").write_text("torn")
    assert run(["--model", folder / "model.keras", folder / "images"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "does not open" in captured.err


def test_the_rule_of_resizing_is_that_of_the_run(folder, capsys):
    """A picture of which only the middle is red: it is red where the rest is cropped away."""
    picture = Image.new("RGB", (400, 60), (0, 0, 255))
    picture.paste((255, 0, 0), (180, 0, 220, 60))
    picture.save(folder / "wide.png")
    argv = ["--model", folder / "model.keras", folder / "wide.png"]
    assert label(argv, capsys) == "blue"
    assert label([*argv, "--resize=crop"], capsys) == "red"
    (folder / "config.json").write_text(
        json.dumps({"recipe": "mine", "class_names": NAMES, "resize": "crop"})
    )
    assert label(argv, capsys) == "red"
    assert label([*argv, "--resize=squash"], capsys) == "blue"


def test_find_images_looks_into_folders(folder):
    images = folder / "images"
    Image.new("RGB", (2, 2)).save(images / "deeper" / "d.jpeg")
    os.symlink("..", images / "deeper" / "up")
    assert predict.find_images([str(images / "c.gif"), str(images)]) == [
        images / name for name in ("c.gif", "a.png", "b.BMP", "c.gif", "deeper/d.jpeg")
    ]
    with pytest.raises(ConfigError, match="no image at"):
        predict.find_images([str(folder / "none.png")])


def test_a_process_says_one_line(folder):
    """Not what TensorFlow says when it is imported."""
    (folder / "images" / "text.png").write_text("no image")
    command = [sys.executable, "-m", "cifar10_trainer.predict", f"--model={folder / 'model.keras'}"]
    done = subprocess.run(
        [*command, folder / "images" / "text.png"], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (1, "")
    line, last = done.stderr.splitlines()
    assert line.startswith(f"{folder / 'images' / 'text.png'} cannot be read as an image")
    assert last.startswith("error: 1 of 1 images cannot be read")


def test_arrays_of_images_are_checked_as_everywhere():
    model = colour_model()
    grey = np.zeros((2, *model.input_shape[1:3]), np.uint8)
    alike = predict.predict_images(model, grey), predict.predict_images(model, np.stack([grey] * 3, axis=-1))
    assert alike[0] == alike[1]
    for images, text in (
        (grey / 255, "images has dtype float64 and values from 0 to 0; allowed: uint8"),
        (grey.astype(np.int64), r"convert pixels 0-255 with images.astype\('uint8'\)"),
        (grey[:, 1:], r"images has shape \(2, 5, 4\); allowed"),
        ([grey[0], grey[1]], "an image is array.*; allowed: files, or one array"),
        (None, "an image is None; allowed: files, or one array"),
    ):
        with pytest.raises(ConfigError, match=text):
            predict.predict_images(model, images)


def two_inputs():
    a, b = (keras.Input((6, 4, 3)) for _ in range(2))
    return keras.Model([a, b], keras.layers.Dense(3)(keras.layers.Flatten()(keras.layers.Add()([a, b]))))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("model.keras", "model is str; allowed: a built Keras model"),
        (None, "model is NoneType; allowed"),
        (keras.Sequential([keras.layers.Dense(3)]), "model is Sequential; allowed: a built Keras model"),
        (two_inputs(), r"which maps \[\(None, 6, 4, 3\), \(None, 6, 4, 3\)\] to \(None, 3\); allowed"),
    ],
)
def test_what_is_no_image_classifier_is_one_line(model, text):
    images = np.zeros((2, 6, 4, 3), np.uint8)
    with pytest.raises(ConfigError, match=text):
        predict.predict_images(model, images)
    with pytest.raises(ConfigError, match=text):
        evaluate_model(model, (images, np.array([0, 1])))
