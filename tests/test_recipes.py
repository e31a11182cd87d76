from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from cifar10_trainer import models
from cifar10_trainer.config import Augmentation, Config, Optimizer
from cifar10_trainer.errors import ConfigError
from cifar10_trainer.recipes import DEFAULT_RECIPE, RECIPES

ADAM = Optimizer(name="adam", learning_rate=0.001)
MOMENTUM = Optimizer(name="sgd", learning_rate=0.001, momentum=0.9)


def built(config: Config):
    if config.architecture == "transfer":  # its pretrained weights are a download
        config = config.override(options__weights=None)
    return models.build(config, input_shape=(32, 32, 3), num_classes=10)


# name: parameters, optimizer, batch, epochs, claim, as the tutorials state them
TUTORIALS = {
    "practical.baseline": (2_195_146, ADAM, 64, 30, 0.75),
    "practical.augmented": (2_195_146, ADAM, 64, 30, 0.80),
    "vgg.1": (1_060_138, MOMENTUM, 64, 100, 0.6707),
    "vgg.2": (591_274, MOMENTUM, 64, 100, 0.7108),
    "vgg.3": (550_570, MOMENTUM, 64, 100, 0.7350),
    "vgg.3_dropout": (550_570, MOMENTUM, 64, 100, 0.8345),
    "vgg.3_l2": (550_570, MOMENTUM, 64, 100, 0.7255),
    "vgg.3_augmented": (550_570, MOMENTUM, 64, 100, 0.8447),
    "vgg.3_rising_dropout": (550_570, MOMENTUM, 64, 100, 0.8469),
    "vgg.3_dropout_augmented": (550_570, MOMENTUM, 64, 200, 0.8588),
    "vgg.3_rising_dropout_augmented_bn": (552_874, MOMENTUM, 64, 400, 0.8862),
    "vgg.final": (552_874, MOMENTUM, 64, 400, 0.8862),
    "course.baseline": (161_610, ADAM, 32, 10, None),
    "leaky.baseline": (1_345_066, ADAM, 128, 40, 0.8584),
    "leaky.three": (1_150_410, ADAM, 128, 40, 0.76),
    "leaky.five_relu": (1_196_970, ADAM, 128, 40, 0.836),
    "wide_head.baseline": (2_915_114, ADAM, 64, 25, 0.7990),
}


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial_settings(name):
    recipe = RECIPES[name]
    received = (
        recipe.origin.parameters,
        recipe.optimizer,
        recipe.batch_size,
        recipe.epochs,
        recipe.origin.claim,
    )
    assert received == TUTORIALS[name]
    assert recipe.pixels == "unit"
    assert recipe.schedule.name == "constant"
    assert recipe.label_smoothing == 0
    assert recipe.averaging.every == 0
    assert recipe.views == 1


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_with_the_parameters_it_states(name):
    assert built(RECIPES[name]).count_params() == RECIPES[name].origin.parameters


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_named_and_says_where_it_comes_from(name):
    recipe = RECIPES[name]
    assert recipe.recipe == name
    architecture, dot, variant = name.partition(".")
    assert recipe.architecture == architecture
    assert dot
    assert variant
    assert recipe.origin.source
    models.check_options(recipe.architecture, recipe.options)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json(name):
    recipe = RECIPES[name]
    assert Config.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_default_recipe_is_one_of_them():
    assert DEFAULT_RECIPE in RECIPES


def test_every_architecture_has_a_recipe_and_no_two_recipes_are_the_same_run():
    assert {recipe.architecture for recipe in RECIPES.values()} == set(models.ARCHITECTURES)
    runs = Counter(
        json.dumps({**recipe.to_dict(), "recipe": "", "origin": {}}, sort_keys=True)
        for recipe in RECIPES.values()
    )
    assert max(runs.values()) == 1


@pytest.mark.parametrize(
    ("prefix", "fraction", "split"),
    [
        ("practical.", 0.2, "last"),
        ("vgg.", 0.1, "stratified"),
        ("course.", 0.1, "stratified"),
        ("leaky.", 0.1, "last"),
        ("wide_head.", 0.1, "stratified"),
    ],
)
def test_validation_images_are_training_images_held_out(prefix, fraction, split):
    chosen = [r for name, r in RECIPES.items() if name.startswith(prefix) and name != "vgg.final"]
    assert {(r.validation_fraction, r.validation_split) for r in chosen} == {(fraction, split)}
    assert RECIPES["vgg.final"].validation_fraction is None


def test_early_stopping_is_where_the_tutorials_have_it():
    stopping = {name: recipe.early_stopping for name, recipe in RECIPES.items() if recipe.early_stopping}
    stopping = {name: patience for name, patience in stopping.items() if not name.startswith("fast.")}
    practical = {name: 5 for name in RECIPES if name.startswith("practical.")}
    assert stopping == {**practical, "leaky.early_stopping": 5}


def test_augmentation_is_where_the_tutorials_have_it():
    shifted = Augmentation(flip="random", shift=3, fill="nearest")
    turned = Augmentation(flip="random", rotation=0.1, zoom=0.1)
    expected = {
        "practical.augmented": turned,
        "practical.augmented_plateau": turned,
        "vgg.3_augmented": shifted,
        "vgg.3_dropout_augmented": shifted,
        "vgg.3_rising_dropout_augmented_bn": shifted,
        "vgg.final": shifted,
        "leaky.augmented": shifted,
    }
    ours = ("fast.", "transfer.")
    received = {n: r.augmentation for n, r in RECIPES.items() if r.augmentation != Augmentation()}
    assert {n: a for n, a in received.items() if not n.startswith(ours)} == expected


def test_extensions_that_readers_ask_for_are_there():
    pixels = {recipe.pixels for recipe in RECIPES.values()}
    assert {"unit", "centred", "standardised"} <= pixels
    schedules = {(recipe.optimizer.name, recipe.schedule.name) for recipe in RECIPES.values()}
    assert {("sgd", "step"), ("sgd", "cosine"), ("adam", "cyclic"), ("adam", "plateau")} <= schedules
    # the plateau must have its chance before early stopping ends the run
    for recipe in RECIPES.values():
        if recipe.schedule.name == "plateau" and recipe.early_stopping:
            assert recipe.schedule.patience < recipe.early_stopping


def test_transfer_recipe_takes_no_statistics_of_the_data():
    for recipe in RECIPES.values():
        if recipe.architecture == "transfer":
            assert recipe.pixels == "unit"
            with pytest.raises(ConfigError, match="brings its own"):
                models.build(recipe, input_shape=(32, 32, 3), num_classes=10, mean=(0.5,) * 3)


def test_recipes_and_the_names_of_architectures_cost_no_tensorflow():
    script = """
import sys
from cifar10_trainer import models
from cifar10_trainer.recipes import RECIPES
assert "vgg.3" in RECIPES and "vgg" in models.ARCHITECTURES
heavy = {"tensorflow", "keras", "sklearn", "matplotlib", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_unknown_recipe_names_the_nearest():
    allowed = r"unknown recipe 'fast.defualt'; allowed: .*fast.85, .*Did you mean 'fast.default'"
    with pytest.raises(ConfigError, match=allowed):
        RECIPES["fast.defualt"]
    assert RECIPES.get("fast.defualt") is None and "fast.defualt" not in RECIPES
