"""The network in the package, its record, and transfer from it."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import keras
import numpy as np
import packaged_model
import pytest
from drawn import pictures
from PIL import Image

from cifar10_trainer import __main__ as trainer
from cifar10_trainer import build_model, cli, datasets, load_model, predict
from cifar10_trainer.datasets import CIFAR10_CLASSES
from cifar10_trainer.errors import ConfigError, RunError
from cifar10_trainer.model_file import PACKAGED, ModelInfo, write_model
from cifar10_trainer.models import build
from cifar10_trainer.recipes import DEFAULT_RECIPE, RECIPES, recipe_for_folder
from cifar10_trainer.run_folder import RunFolder
from results import photos, tables

ROOT = Path(__file__).parents[1]
RECIPE = RECIPES["transfer.cifar"]


@pytest.fixture(scope="module")
def packaged():
    return load_model()


@pytest.fixture(scope="module")
def record():
    return json.loads(photos.PACKAGED.read_text())


# ---- the file and its record


def test_the_file_is_small_and_is_the_one_of_the_record(packaged, record):
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(PACKAGED)
    assert len(wheel.getvalue()) <= 4_000_000
    assert record["file"]["bytes"] == PACKAGED.stat().st_size
    assert record["file"]["weights_sha256"] == packaged_model.digest(packaged)
    assert record["test"]["n"] == 10_000 and record["test"]["accuracy"] >= 0.935
    assert not re.search(r"(^|[\s=])/", record["training"]["command"]), "a path of one machine"
    assert f"({record['test']['accuracy']:.2%} test accuracy)" in (ROOT / "README.md").read_text(
        encoding="utf-8"
    )


def test_it_is_an_ordinary_model_that_knows_its_classes(packaged, record):
    assert packaged.input_shape == (None, 32, 32, 3) and packaged.output_shape == (None, 10)
    assert packaged.info.class_names == CIFAR10_CLASSES
    assert packaged.info.none_above == record["none_of_the_ten"]["above"]
    assert {w.dtype for w in packaged.weights} == {"float32"}
    again = keras.models.load_model(PACKAGED, compile=False)
    assert all(np.array_equal(a, b) for a, b in zip(again.get_weights(), packaged.get_weights(), strict=True))


@pytest.mark.realdata
@pytest.mark.slow
def test_it_scores_on_the_test_images_what_the_record_says(packaged, record, realdata):
    data = datasets.load("cifar10", realdata)
    probabilities = packaged.predict(data.test_images, 500, verbose=0)
    accuracy = np.mean(probabilities.argmax(1) == data.test_labels)
    assert accuracy == pytest.approx(record["test"]["accuracy"], abs=3e-4)
    p = probabilities.astype(np.float64)
    alarms = np.mean(-np.sum(p * np.log(p), axis=1) > packaged.info.none_above)
    assert alarms == pytest.approx(record["none_of_the_ten"]["false_alarms_test"], abs=1e-3)


@pytest.mark.parametrize("name", ["packaged", "photos"])
def test_the_document_shows_the_record(name):
    path = {"packaged": photos.PACKAGED, "photos": photos.PHOTOS}[name]
    text = tables.document_of("photos").read_text()
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.S)[1]
    found = json.loads(path.read_text()) if path.exists() else None
    make = {
        "packaged": lambda: photos.packaged_table(found),
        "photos": lambda: photos.photos_table(found["runs"]),
    }
    assert shown == (make[name]() if found else "")


def test_predict_without_a_model_uses_it(packaged, tmp_path, capsys):
    Image.new("RGB", (50, 40), (10, 200, 30)).save(tmp_path / "green.png")
    predict.FLAGS.unparse_flags()
    for name in predict.FLAGS:
        predict.FLAGS[name].unparse()
    argv = ["predict", "--json", str(tmp_path / "green.png")]
    assert cli.run(predict.main, predict.FLAGS, predict.USAGE, argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["probabilities"]) == set(CIFAR10_CLASSES)
    p = np.array(list(found["probabilities"].values()))
    assert found["none_of_the_classes"] == (-np.sum(p * np.log(p)) > packaged.info.none_above)


# ---- how it is made


def test_kernels_are_stored_in_half_the_bytes_and_read_as_float32(tmp_path):
    model = packaged_model.rounded(build_model(filters=(64, 64)))
    model.info = ModelInfo(CIFAR10_CLASSES, none_above=1.5)
    path = tmp_path / "model.keras"
    write_model(model, path)
    before = path.stat().st_size
    packaged_model.store_as_float16(path)
    assert path.stat().st_size < 0.7 * before
    again = load_model(path)
    assert again.info == model.info and packaged_model.digest(again) == packaged_model.digest(model)
    kernels = [w for w in again.get_weights() if w.ndim > 1]
    assert all(w.dtype == np.float32 and np.array_equal(w, w.astype(np.float16)) for w in kernels)


def test_scores_are_those_of_their_definitions():
    class Logits:
        def predict(self, images, batch_size, verbose):
            return np.log(np.array([[0.5, 0.25, 0.25], [4.0, 4.0, 8.0]]))

    found = packaged_model.scores(Logits(), None)
    np.testing.assert_allclose(found["highest probability"], [0.5, 0.5])
    np.testing.assert_allclose(found["entropy, negative"], [-1.5 * np.log(2)] * 2)
    np.testing.assert_allclose(found["highest logit"], np.log([0.5, 8]))
    np.testing.assert_allclose(found["energy, negative"], np.log([1, 16]), atol=1e-12)


DRAWN = ("plain_colour", "noise", "shapes", "stripes", "clouds", "letter")


@pytest.mark.parametrize("name", DRAWN)
def test_a_seed_draws_the_same_images_and_another_one_others(name):
    kind = getattr(pictures, name)
    one, again, other = (pictures.draw(kind, 3, seed) for seed in (1, 1, 2))
    assert one.shape == (3, 32, 32, 3) and one.dtype == np.uint8
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])


def test_a_mosaic_moves_squares_and_changes_no_pixel():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    mixed = pictures.mosaics(images, 0)
    squares = [
        sorted(x[i : i + 8, j : j + 8].tobytes() for i in range(0, 32, 8) for j in range(0, 32, 8))
        for x in (images[1], mixed[1])
    ]
    assert squares[0] == squares[1] and not np.array_equal(images, mixed)


# ---- transfer.cifar


def test_transfer_starts_from_the_weights_of_a_model_file(tmp_path):
    network = build_model(filters=(8, 8), num_classes=10)
    network.get_layer("whitening").trainable = False
    write_model(network, tmp_path / "fast.keras")
    config = RECIPE.override(options__weights=str(tmp_path / "fast.keras"))
    model = build(config, input_shape=(48, 48, 3), num_classes=3)
    assert model.input_shape == (None, 48, 48, 3) and model.output_shape == (None, 3)
    for name in ("block1_conv1", "block2_norm2"):
        for ours, theirs in zip(model.get_layer(name).weights, network.get_layer(name).weights, strict=True):
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    frozen = [layer.name for layer in model.layers if layer.weights and not layer.trainable]
    assert frozen == ["whitening"]
    head = build(config.override(options__frozen=True), input_shape=(48, 48, 3), num_classes=3)
    assert [v.path for v in head.trainable_variables] == ["head/kernel"]


def test_transfer_refuses_what_does_not_fit(tmp_path):
    write_model(build_model("course"), tmp_path / "course.keras")
    for options, message in (
        ({"weights": "imagenet"}, "weights is 'imagenet'; allowed with the backbone cifar: 'packaged'"),
        ({"weights": str(tmp_path / "course.keras")}, "a network of the architecture fast"),
        ({"weights": str(tmp_path / "none.keras")}, "no model file at"),
        ({"weights": None, "image_size": 64}, "image_size is 64; allowed with the backbone cifar: None"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            build_model("transfer", backbone="cifar", **options)
    with pytest.raises(ConfigError, match="allowed: at least 9x9"):
        build_model("transfer", backbone="cifar", weights=None, input_shape=(8, 8, 3))


# ---- the default recipe of a folder


@pytest.mark.parametrize(
    ("count", "size", "recipe"),
    [
        (20, 32, "transfer.cifar"),
        (300, 16, "transfer.cifar"),
        (301, 32, DEFAULT_RECIPE),
        (20, 64, "transfer.cifar"),
        (20, 65, DEFAULT_RECIPE),
    ],
)
def test_few_pictures_start_from_the_network_in_the_package(count, size, recipe):
    name, reason = recipe_for_folder(count, size)
    assert name == recipe and f"{count:,} images a class of {size}x{size} pixels" in reason


def make_folder(root, counts):
    for name, count in counts.items():
        (root / name / "deeper").mkdir(parents=True)
        (root / name / ".hidden").touch()
        for i in range(count):
            (root / name / ("deeper" if i % 2 else "") / f"{i}.jpg").touch()


def test_the_size_of_a_folder(tmp_path):
    make_folder(tmp_path / "a" / "train", {"x": 3, "y": 5})
    make_folder(tmp_path / "a" / "test", {"x": 100})
    make_folder(tmp_path / "a" / "Valid", {"x": 2})
    make_folder(tmp_path / "b", {"x": 5, "y": 10})  # a fifth of them are test images
    assert datasets.folder_size(tmp_path / "a") == (8, 2, True)
    assert datasets.folder_size(str(tmp_path / "b")) == (12, 2, False)
    (tmp_path / "c").mkdir()
    for nothing in (None, "", tmp_path / "c", tmp_path / "none"):
        assert datasets.folder_size(nothing) is None


def test_the_command_chooses_and_prints_why(tmp_path):
    make_folder(tmp_path / "few", {"x": 3, "y": 5})
    make_folder(tmp_path / "many", {"x": 1400, "y": 1300})
    said = []
    for folder, more, recipe, lines in (
        ("few", [], "transfer.cifar", 1),
        ("many", [], DEFAULT_RECIPE, 1),
        ("few", ["--image_size=128"], DEFAULT_RECIPE, 1),
        ("few", ["--recipe=fast.85"], "fast.85", 0),
        ("none", [], DEFAULT_RECIPE, 0),
    ):
        trainer.FLAGS.unparse_flags()
        for flag in trainer.FLAGS:
            trainer.FLAGS[flag].unparse()
        said.clear()
        trainer.FLAGS(["x", "--dataset=folder", f"--data_dir={tmp_path / folder}", *more])
        assert trainer.config_from_flags(said.append).recipe == recipe
        assert len(said) == lines and all(line.startswith(f"recipe: {recipe}: ") for line in said)
    trainer.FLAGS.unparse_flags()
    for flag in trainer.FLAGS:
        trainer.FLAGS[flag].unparse()


def test_a_network_that_is_too_large_replaces_nothing(monkeypatch, tmp_path):
    out = tmp_path / "network.keras"
    out.write_bytes(b"the one before")
    model = packaged_model.rounded(build_model(filters=(4, 4)))
    model.info = ModelInfo(CIFAR10_CLASSES)
    monkeypatch.setattr(packaged_model, "LARGEST", 1000)
    with pytest.raises(RunError, match=r"network.keras stays as it is: the new file takes [\d,]+ bytes"):
        packaged_model.store(model, out)
    assert [path.name for path in tmp_path.iterdir()] == ["network.keras"]
    assert out.read_bytes() == b"the one before"
    monkeypatch.undo()
    assert packaged_model.digest(packaged_model.store(model, out)) == packaged_model.digest(model)
    assert out.stat().st_size > 1000


def test_a_signal_reaches_the_training_of_the_network(monkeypatch, tmp_path):
    """Which saves its state; its parent only passes the signal on and waits."""
    commands, result = [], [0, ""]
    monkeypatch.setattr(packaged_model.process, "call", lambda words: commands.append(words) or result)
    packaged_model.FLAGS(["packaged_model.py", "--data_dir=d"])
    packaged_model.train(RunFolder(tmp_path))
    assert commands[0][-2:] == [f"--workdir={tmp_path}", "--data_dir=d"]
    for result[:], how in (([130, "SIGINT"], "was stopped by SIGINT"), ([1, ""], "failed")):
        with pytest.raises(RunError, match=f"the training {how}; its own line above shows more"):
            packaged_model.train(RunFolder(tmp_path))
