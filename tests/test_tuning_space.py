"""The space: hyperparameters -> Config, without training anything."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys

import keras_tuner as kt
import pytest

from cifar10_trainer import load_data
from cifar10_trainer.config import Augmentation, ConfigError
from cifar10_trainer.recipes import RECIPES
from tuning import tune
from tuning.space import DEFAULT_SPACE, SPACE, Space, parse

FAST = RECIPES["fast.85"]


def drawn(space, **values):
    """The Config of `space` at these values, the others at their defaults."""
    hp = kt.HyperParameters()
    space(hp)
    hp.values.update(values)
    return space(hp)


def ranges(*names):
    return dict.fromkeys(names)


def test_importing_costs_no_tensorflow():
    code = "import sys, tuning, tuning.space, tuning.search, tuning.chief, tuning.worker; print('tensorflow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fast.85", {"filters": (32, 128, 128), "dropout": 0.0}),
        ("leaky.baseline", {"blocks": ((32, 32), (64, 64), (128, 128)), "dropout": (0.2, 0.3, 0.4)}),
        ("vgg.3_rising_dropout", {"filters": (32, 64, 128), "dropout": (0.2, 0.3, 0.4, 0.5)}),
        ("practical.baseline", {"filters": (32, 64, 128), "dropout": 0.5}),
    ],
)
def test_the_defaults_are_the_recipe(name, options):
    base = RECIPES[name]
    assert Space(base, ranges(*DEFAULT_SPACE))(kt.HyperParameters()) == base.override(
        options={**base.options, **options}
    )


def test_every_hyperparameter_reaches_its_setting():
    space = Space(FAST, ranges(*SPACE))
    config = drawn(
        space,
        filters=48,
        dropout=0.25,
        learning_rate=0.5,
        weight_decay=0.001,
        batch_size=128,
        label_smoothing=0.1,
        augmentation=1.5,
        epochs=4.5,
    )
    assert config == FAST.override(
        options__filters=(48, 192, 192),  # 48/32 of (32, 128, 128)
        options__dropout=0.25,
        optimizer__learning_rate=0.5,
        optimizer__weight_decay=0.001,
        batch_size=128,
        label_smoothing=0.1,
        augmentation=Augmentation(flip="alternating", shift=3),  # 1.5 times 2 pixels
        epochs=4.5,
    )


def test_nested_widths_and_rates_keep_their_proportion():
    config = drawn(Space(RECIPES["leaky.baseline"], ranges("filters", "dropout")), filters=16, dropout=0.4)
    assert config.options["blocks"] == ((16, 16), (32, 32), (64, 64))
    assert config.options["dropout"] == pytest.approx((0.4, 0.6, 0.8))


def test_ranges_of_the_recipe_and_of_ones_own():
    hp = kt.HyperParameters()
    Space(FAST, {"learning_rate": None, "dropout": (0.1, 0.3), "batch_size": None})(hp)
    limits = {p.name: (p.min_value, p.max_value) for p in hp.space}
    assert limits == {"learning_rate": (0.03, 0.48), "dropout": (0.1, 0.3), "batch_size": (128, 512)}
    # the recipe's own 0 is outside of the range: its end is the nearest
    assert hp.get("dropout") == 0.1
    assert {p.name: p.sampling for p in hp.space} == {
        "learning_rate": "log",
        "dropout": "linear",
        "batch_size": "log",
    }


def test_values_read_well():
    config = drawn(
        Space(FAST, ranges("dropout", "learning_rate")), dropout=0.1 + 0.2, learning_rate=0.123456789
    )
    assert config.options["dropout"] == 0.3
    assert config.optimizer.learning_rate == 0.12346


def test_it_can_be_sent_to_a_process():
    space = Space(FAST, ranges("dropout"))
    assert pickle.loads(pickle.dumps(space)) == space


def test_parse():
    assert parse(["dropout", " learning_rate = 0.1:2"]) == {"dropout": None, "learning_rate": (0.1, 2.0)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("filter", "Did you mean 'filters'"),
        ("dropout=0.5:0.1", "low < high"),
        ("dropout=0.5:0.5", "low < high"),
        ("filters=8:inf", "two finite numbers"),
        ("epochs=-inf:1e400", "two finite numbers"),
        ("dropout=0.5", "low:high"),
        ("dropout=a:b", "low:high"),
        ("dropout=nan:1", "low < high"),
    ],
)
def test_what_parse_refuses(text, says):
    with pytest.raises(ConfigError, match=says) as error:
        parse([text])
    assert "\n" not in str(error.value)


def test_large_whole_numbers_stay_whole():
    space = Space(FAST, {"batch_size": (1000, 200_000)})
    hp = kt.HyperParameters()
    space(hp)
    hp.values["batch_size"] = 128_000
    assert space(hp).batch_size == 128_000


def test_an_empty_space_is_refused():
    with pytest.raises(ConfigError, match="the space is empty"):
        parse([])


@pytest.mark.parametrize(
    ("base", "asked", "says"),
    [
        (FAST, {"weight_decay": (0.0, 0.1)}, "logarithm"),
        (FAST, {"dropout": (0.0, 1.5)}, "dropout is 0:1.5; allowed: rates from 0 to less than 1"),
        (FAST, {"dropout": (-0.1, 0.5)}, "dropout is -0.1:0.5"),
        (FAST, {"filters": (0, 64)}, "filters begins at 0; allowed: whole numbers from 1"),
        (FAST, {"filters": (-8, 64)}, "filters begins at -8"),
        (FAST, {"label_smoothing": (0.5, 1.5)}, "label_smoothing is 1.5"),
        (
            FAST,
            {"dropout": (0.33, 0.34)},
            "0.33:0.34, narrower than its step; allowed: 0.05 or more from low",
        ),
        (
            FAST,
            {"batch_size": (100, 150)},
            "100:150, but its values grow by the factor 2; allowed: from low to 2 times",
        ),
        (FAST, {"filters": (9, 10)}, "filters is 9:10, narrower than its step; allowed: 8 or more from low"),
        (RECIPES["practical.baseline"], {"weight_decay": None}, "weight_decay"),  # it has none to multiply
        (RECIPES["practical.baseline"], {"augmentation": None}, "augmentation changes nothing"),
        (RECIPES["transfer.vgg16"], {"filters": None}, "unknown option of transfer 'filters'"),
        (
            RECIPES["transfer.cifar"],
            dict.fromkeys(DEFAULT_SPACE),
            "or leave filters out: --space=dropout,learning_rate",
        ),
    ],
)
def test_what_a_recipe_cannot_do(base, asked, says):
    with pytest.raises(ConfigError, match=says):
        Space(base, asked)


@pytest.mark.parametrize(
    ("recipe", "options", "name", "says"),
    [
        ("practical.baseline", {"options__dense": ()}, "dropout", "dropout changes nothing in practical.baseline: 0 and 0.5"),
        ("transfer.cifar", {}, "dropout", "dropout changes nothing in transfer.cifar"),
        ("practical.baseline", {}, "dropout", None),
        ("practical.baseline", {"options__dense": ()}, "filters", None),
        ("fast.85", {}, "dropout", None),
    ],
)  # fmt: skip
def test_an_option_that_changes_no_network_is_refused(recipe, options, name, says):
    space = Space(RECIPES[recipe].override(**options), {name: None})
    refused = pytest.raises(ConfigError, match=says) if says else contextlib.nullcontext()
    with refused:
        space.check_networks((32, 32, 3), 10)


def test_a_search_refuses_an_option_that_changes_no_network(tmp_path):
    digits = load_data("digits")
    space = Space(RECIPES["practical.baseline"].override(options__dense=()), {"dropout": None})
    with pytest.raises(ConfigError, match="dropout changes nothing"):
        tune(space, digits, workdir=tmp_path / "search", verbose=0)
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("filters", {"options__filters": (8.0, 16.0)}, r"options.filters is \(8.0, 16.0\); allowed in a search over filters: whole numbers"),
        ("filters", {"options__filters": ()}, r"options.filters is \(\); allowed in a search over filters: whole numbers"),
        ("filters", {"options__filters": None}, "options.filters is None; allowed in a search over filters: whole numbers"),
        ("dropout", {"options__dropout": "x"}, "options.dropout is 'x'; allowed in a search over dropout: numbers"),
        ("dropout", {"options__dropout": (0, 0.1, 0.2)}, "begins with 0, to which the other numbers have no ratio"),
        ("augmentation", {"augmentation__cutout": 20}, "cutout is 40; .*; the range of augmentation ends there; another one: --space=augmentation=LOW:HIGH"),
        ("learning_rate", {"optimizer__learning_rate": 50}, "learning_rate is 200.0; .*; the range of learning_rate ends there"),
    ],
)  # fmt: skip
def test_a_setting_without_a_range_around_it_is_refused(name, changes, says):
    with pytest.raises(ConfigError, match=says):
        Space(FAST.override(**changes), {name: None})


@pytest.mark.parametrize("own", [0, 1e-9, 0.25])
def test_a_dropout_of_zero_is_a_rate_as_any_other(own):
    space = Space(FAST.override(options__dropout=own), {"dropout": None})
    assert space._range("dropout") == (0.0, 0.5, 0.05)
    assert drawn(space, dropout=0.35).options["dropout"] == 0.35
