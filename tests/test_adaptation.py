"""Settings by the number of images, and the measures of small and unequal data, each against numbers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from cifar10_trainer import measures
from cifar10_trainer.adaptation import adapt, in_words
from cifar10_trainer.config import ADAPTABLE, Augmentation, Config, Schedule
from cifar10_trainer.errors import ConfigError
from cifar10_trainer.recipes import RECIPES

DEFAULT = RECIPES["fast.default"].override(dataset="folder", adapt=ADAPTABLE)


@pytest.mark.parametrize("n", [2, 5, 24, 30, 100, 144, 999, 1000, 5000, 50_000, 300_000])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_every_number_of_images_can_be_trained_on(n, replicas):
    config = adapt(DEFAULT, n, False, replicas)
    left = n - round(n * config.validation_fraction)
    assert config.adapt == () and config.batch_size % replicas == 0
    if left >= replicas:
        assert replicas <= config.batch_size <= max(left, replicas)
    steps = left // config.batch_size * config.epochs
    assert steps >= 500 or left < replicas
    assert config.epochs * left <= max(2.1e6, 8 * left)
    assert config.epochs / config.validation_interval <= 50


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (
            30,
            {"batch_size": 8, "validation_fraction": 0.2, "epochs": 167, "validation_interval": 4},
        ),  # 3 steps of 24 images
        (180, {"batch_size": 8, "validation_fraction": 0.2, "epochs": 40, "validation_interval": 1}),
        (1000, {"batch_size": 64, "validation_fraction": 0.2}),
        (1500, {"batch_size": 128, "validation_fraction": 0.1333}),  # 200 images
        (2000, {"batch_size": 128, "validation_fraction": 0.1}),
        (3000, {"batch_size": 256, "validation_fraction": 0.1, "epochs": 50, "validation_interval": 1}),
        (50_000, {"batch_size": 512, "validation_fraction": 0.1, "epochs": 40, "validation_interval": 1}),
        (300_000, {"batch_size": 512, "validation_fraction": 0.1, "epochs": 8, "validation_interval": 1}),
    ],
)
def test_what_is_chosen(n, expected):
    config = adapt(DEFAULT, n, False)
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_recipe_that_holds_less_out_still_validates_on_200_images():
    found = [
        adapt(DEFAULT.override(validation_fraction=0.05), n, False).validation_fraction
        for n in (30, 1000, 3000, 4000)
    ]
    assert found == [0.2, 0.2, 0.06667, 0.05]


def test_what_is_not_to_be_adapted_stays():
    config = DEFAULT.override(adapt=("epochs",), batch_size=4)
    assert adapt(config, 40, False).batch_size == 4
    assert adapt(config.override(adapt=()), 40, False) == config.override(adapt=())
    plateau = DEFAULT.override(schedule=Schedule(name="plateau"))
    assert adapt(plateau, 30, False).validation_interval == 1  # it watches each epoch
    found = adapt(DEFAULT, 100, True)  # of all 100, because the folder has validation images
    assert (found.batch_size, found.validation_fraction) == (8, DEFAULT.validation_fraction)
    assert adapt(DEFAULT.override(validation_fraction=None), 100, False).validation_fraction is None


def test_the_run_says_what_it_chose():
    assert in_words(DEFAULT, adapt(DEFAULT, 30, False), 30) == (
        "adapted to 30 images: batch_size 8 (recipe: 512), epochs 167 (recipe: 40), validation_fraction 0.2 (recipe: 0.1),"
        " validation_interval 4 (recipe: 1); --set NAME=VALUE sets another"
    )
    assert in_words(DEFAULT, adapt(DEFAULT, 50_000, False), 50_000) is None


def test_younger_settings_are_written_only_where_they_are_used():
    """So that runs and searches of version 1.0.0 are recognised."""
    values = Config().to_dict()
    assert not {"resize", "class_weights", "adapt", "views_share"} & set(values)
    assert "cutout_warmup" not in values["augmentation"]
    warmed = Augmentation(cutout_warmup=3)
    used = Config(
        dataset="folder", resize="pad", class_weights="balanced", adapt=("epochs",), augmentation=warmed
    )
    assert used.to_dict()["augmentation"]["cutout_warmup"] == 3
    assert {
        "resize": "pad",
        "class_weights": "balanced",
        "adapt": ["epochs"],
    }.items() <= used.to_dict().items()
    assert Config.from_dict(used.to_dict()) == used


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"resize": "stretch"}, "unknown resize 'stretch'; allowed: squash, crop, pad"),
        ({"resize": "pad"}, "resize is 'pad'; allowed with the dataset cifar10: squash"),
        ({"class_weights": "auto"}, "unknown class_weights 'auto'; allowed: none, balanced"),
        ({"adapt": ["seed"]}, "unknown setting in adapt 'seed'"),
    ],
)
def test_values_that_are_not_allowed(values, text):
    with pytest.raises(ConfigError, match=text):
        Config(**values)


# ---- measures


def test_recalls_and_balanced_accuracy():
    labels, predicted = np.array([0, 0, 0, 0, 1, 1, 3]), np.array([0, 0, 0, 1, 1, 3, 3])
    np.testing.assert_array_equal(measures.recalls(labels, predicted, 5), [0.75, 0.5, np.nan, 1, np.nan])
    assert measures.balanced_accuracy(labels, predicted, 5) == pytest.approx(0.75)
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(0, 7, 200), generator.integers(0, 7, 200)
    expected = balanced_accuracy_score(labels, predicted)
    assert measures.balanced_accuracy(labels, predicted, 7) == pytest.approx(expected)


def test_the_recall_of_the_smallest_class():
    labels, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 2])
    train = np.repeat([0, 1, 2, 3], [9, 5, 7, 1])
    assert (
        measures.smallest_class_recall(labels, predicted, train, 4) == 1.0
    )  # class 3 has no image here; class 1
    assert (
        measures.smallest_class_recall(labels, predicted, np.repeat([0, 1, 2], 5), 3) == 0.5
    )  # the lowest of equals


@pytest.mark.parametrize(
    ("accuracy", "n", "expected"),
    [
        (0.5, 10, (0.2366, 0.7634)),
        (1.0, 29, (0.8830, 1.0)),
        (0.0, 4, (0.0, 0.4899)),
        (0.81, 263, (0.7583, 0.8528)),
    ],
)
def test_wilsons_interval(accuracy, n, expected):
    """Its ends are the shares p from which the accuracy is 1.96 deviations away: (accuracy - p)**2 = z**2 p (1 - p) / n."""
    low, high = measures.wilson_interval(accuracy, n)
    assert (low, high) == pytest.approx(expected, abs=2e-4)
    for p in (low, high):
        assert (accuracy - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-7)
    assert math.isclose(*measures.wilson_interval(0.5, 10**12), rel_tol=1e-5)


def test_the_interval_stands_beside_accuracies_of_few_images():
    assert measures.interval_in_words(0.5, 10) == "95% interval 23.7-76.3%"
    assert measures.interval_in_words(0.5, 1000) == measures.interval_in_words(0.5, 0) == ""
