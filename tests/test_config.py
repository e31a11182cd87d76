from __future__ import annotations

import dataclasses
import inspect
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from cifar10_trainer.config import (
    RECORDED,
    Augmentation,
    Averaging,
    Config,
    Optimizer,
    Origin,
    Schedule,
    check_views,
)
from cifar10_trainer.errors import ConfigError, unknown
from cifar10_trainer.recipes import RECIPES


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert "allowed" in text
    return text


@pytest.mark.parametrize("section", [Config, Augmentation, Optimizer, Schedule, Averaging, Origin])
def test_help_describes_every_field(section):
    described = [
        line.partition(":")[0] for line in inspect.getdoc(section).partition("Attributes:\n")[2].splitlines()
    ]
    names = [f"    {f.name}" for f in dataclasses.fields(section)]
    assert [line for line in described if line in names] == names  # each once, in their order


# ---- to and from JSON


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name):
    recipe = RECIPES[name]
    text = json.dumps(recipe.to_dict())
    again = Config.from_dict(json.loads(text))
    assert again == recipe
    assert json.dumps(again.to_dict()) == text


def test_a_config_with_everything_set_survives_json():
    config = Config(
        recipe="mine",
        origin=Origin(source="me", claim=0.5, parameters=7),
        validation_fraction=None,
        options={
            "filters": (1, 2),
            "blocks": ((1, 2), (3,)),
            "name": "x",
            "rate": 0.5,
            "on": True,
            "no": None,
        },
        sizes=(16, 32),
        augmentation=Augmentation(flip="alternating", cutmix=1.0),
        optimizer=Optimizer(name="muon", clip_norm=2.0),
        schedule=Schedule(name="step", drops=(0.1, 0.2, 0.9)),
        averaging=Averaging(every=3, decay=0.5),
        views=6,
    )
    values = config.to_dict()
    # plain JSON, so nothing of ours in it
    assert values == json.loads(json.dumps(values))
    again = Config.from_dict(values)
    assert again == config
    assert again.options["blocks"] == ((1, 2), (3,))


def test_missing_keys_have_their_defaults():
    assert Config.from_dict({}) == Config()
    assert Config.from_dict({"optimizer": {"momentum": 0.5}}).optimizer == Optimizer(momentum=0.5)


def test_a_record_holds_more_than_the_config():
    config = RECIPES["fast.85"]
    record = {**config.to_dict(), **dict.fromkeys(RECORDED, "found")}
    assert Config.from_record(record) == config
    assert "class_names" in error_of(Config.from_dict, record)
    assert "unknown key in the configuration 'foreign'" in error_of(
        Config.from_record, {**record, "foreign": 1}
    )


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optimizer.momentum = 0.5


# ---- types


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        ({"epochs": 3}, "epochs", 3.0),
        ({"batch_size": 64.0}, "batch_size", 64),
        ({"sizes": [16, 32.0]}, "sizes", (16, 32)),
        ({"early_stopping": 3.0}, "early_stopping", 3),
        ({"early_stopping": None}, "early_stopping", None),
        ({"validation_fraction": None}, "validation_fraction", None),
        (
            {"options": {"filters": [[1, 2], [3]], "dense": 8}},
            "options",
            {"filters": ((1, 2), (3,)), "dense": 8},
        ),
        ({"optimizer": {"learning_rate": 1}}, "optimizer", Optimizer(learning_rate=1.0)),
        ({"schedule": {"drops": [0.25, 0.5]}}, "schedule", Schedule(drops=(0.25, 0.5))),
        ({"whitening": True}, "whitening", True),
        ({"batch_size": np.int64(32)}, "batch_size", 32),
        ({"epochs": np.float32(2.5)}, "epochs", 2.5),
        ({"sizes": np.array([16, 32])}, "sizes", (16, 32)),
        (
            {"options": {"filters": tuple(np.array([16, 32])), "dropout": np.float64(0.1)}},
            "options",
            {"filters": (16, 32), "dropout": 0.1},
        ),
    ],
)
def test_values_take_the_type_of_their_field(given, name, expected):
    json.dumps(Config.from_dict(given).to_dict())
    value = getattr(Config.from_dict(given), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({"epochs": "3"}, "epochs is '3'; allowed: a value of type float"),
        ({"epochs": True}, "epochs is True; allowed: a value of type float"),
        ({"epochs": None}, "epochs is None; allowed: a value of type float"),
        ({"batch_size": 64.5}, "batch_size is 64.5; allowed: a value of type int"),
        ({"batch_size": True}, "batch_size is True; allowed: a value of type int"),
        ({"whitening": 1}, "whitening is 1; allowed: a value of type bool"),
        ({"whitening": "false"}, "whitening is 'false'; allowed: a value of type bool"),
        ({"recipe": 5}, "recipe is 5; allowed: a value of type str"),
        ({"sizes": 32}, "sizes is 32; allowed: a value of type tuple"),
        ({"sizes": "32"}, "sizes is '32'; allowed: a value of type tuple"),
        ({"sizes": [32, "x"]}, "sizes is 'x'; allowed: a value of type int"),
        ({"options": [1]}, "options is [1]; allowed: a value of type Mapping"),
        ({"optimizer": None}, "optimizer is None; allowed: a value of type Optimizer"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; allowed: a value of type Optimizer"),
        ({"optimizer": {"learning_rate": "fast"}}, "learning_rate is 'fast'; allowed: a value of type float"),
        ({"schedule": {"drops": 0.5}}, "drops is 0.5; allowed: a value of type tuple"),
        (
            {"options": {"filters": {1}}},
            "options.filters is {1}; allowed: a number, a text, true, false, null, or a list of these",
        ),
    ],
)
def test_a_value_of_another_type_is_refused(given, start):
    assert error_of(Config.from_dict, given) == start


# ---- ranges


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"dataset": "mnist"}, ["unknown dataset 'mnist'", "cifar10, digits, folder"]),
        ({"dataset": "cifar"}, ["Did you mean 'cifar10'?"]),
        ({"validation_split": "first"}, ["unknown validation_split 'first'", "stratified, last"]),
        ({"pixels": "raw"}, ["unknown pixels 'raw'", "unit, centred, standardised"]),
        ({"strategy": "tpu"}, ["unknown strategy 'tpu'", "auto, none, mirrored, multi_worker"]),
        ({"precision": "float16"}, ["unknown precision 'float16'", "mixed_float16"]),
        ({"epochs": 0}, ["epochs is 0.0", "greater than 0 and less than 100000"]),
        ({"epochs": -1}, ["epochs is -1.0", "greater than 0"]),
        ({"epochs": math.inf}, ["epochs is inf"]),
        ({"epochs": math.nan}, ["epochs is nan", "a finite number"]),
        ({"batch_size": 0}, ["batch_size is 0", "from 1 to 1000000"]),
        ({"validation_fraction": 0}, ["validation_fraction is 0.0", "greater than 0 and less than 1"]),
        ({"validation_fraction": 1}, ["validation_fraction is 1.0", "greater than 0 and less than 1"]),
        ({"label_smoothing": 1}, ["label_smoothing is 1.0", "from 0 to 0.99"]),
        ({"validation_interval": 0}, ["validation_interval is 0", "from 1"]),
        ({"target": 1.1}, ["target is 1.1", "from 0 to 1"]),
        ({"seed": -1}, ["seed is -1", "from 0 to 2147483647"]),
        ({"seed": 2**31}, ["seed is 2147483648"]),
        ({"views": 3}, ["views is 3", "1, 2, 6"]),
        ({"views_share": 0}, ["views_share is 0", "above 0, up to 1"]),
        ({"views_share": float("nan")}, ["views_share is nan", "allowed"]),
        ({"early_stopping": 0}, ["early_stopping is 0", "from 1"]),
        ({"sizes": [32, 4]}, ["sizes is (32, 4)", "from 8 to 512"]),
        ({"sizes": [513]}, ["sizes is (513,)"]),
        (
            {"early_stopping": 3, "validation_fraction": None},
            ["validation_fraction is None", "early stopping"],
        ),
        (
            {"schedule": {"name": "plateau"}, "validation_fraction": None},
            ["validation_fraction is None", "plateau"],
        ),
        (
            {"early_stopping": 3, "validation_interval": 2},
            ["validation_interval is 2", "early stopping", "allowed: 1"],
        ),
        (
            {"schedule": {"name": "plateau"}, "validation_interval": 5},
            ["validation_interval is 5", "plateau"],
        ),
        (
            {"dataset": "folder", "validation_fraction": None, "early_stopping": 3, "validation_interval": 2},
            ["validation_interval is 2", "early stopping", "allowed: 1"],
        ),
        ({"validation_fraction": 0.2, "validation_fold": 5}, ["validation_fold is 5", "from 0 to 4"]),
        ({"validation_fraction": 0.3, "validation_fold": 3}, ["validation_fold is 3", "from 0 to 2"]),
        ({"validation_fold": -1}, ["validation_fold is -1", "from 0 to 9"]),
        ({"validation_split": "last", "validation_fold": 1}, ["validation_fold is 1", "last", "from 0 to 0"]),
        ({"validation_fraction": None, "validation_fold": 1}, ["validation_fold is 1", "None"]),
        ({"augmentation": {"flip": "both"}}, ["unknown flip 'both'", "none, random, alternating"]),
        ({"augmentation": {"fill": "wrap"}}, ["unknown fill 'wrap'", "reflect, nearest, constant"]),
        ({"augmentation": {"shift": -1}}, ["shift is -1", "from 0 to 16"]),
        ({"augmentation": {"rotation": 0.6}}, ["rotation is 0.6", "from 0 to 0.5"]),
        ({"augmentation": {"zoom": 1}}, ["zoom is 1.0", "from 0 to 0.9"]),
        ({"augmentation": {"cutout": 33}}, ["cutout is 33", "from 0 to 32"]),
        ({"augmentation": {"cutout_warmup": -1}}, ["cutout_warmup is -1", "from 0 to 100000"]),
        ({"augmentation": {"brightness": 1.5}}, ["brightness is 1.5", "from 0 to 1"]),
        ({"augmentation": {"contrast": -0.1}}, ["contrast is -0.1", "from 0 to 1"]),
        ({"augmentation": {"mixup": -0.1}}, ["mixup is -0.1", "from 0 to 10"]),
        ({"augmentation": {"cutmix": 11}}, ["cutmix is 11.0", "from 0 to 10"]),
        ({"augmentation": {"mixup": 0.1, "cutmix": 1}}, ["mixup is 0.1 and cutmix is 1.0", "one of the two"]),
        ({"optimizer": {"name": "adamax"}}, ["unknown name 'adamax'", "sgd, adam, adamw, muon"]),
        ({"optimizer": {"learning_rate": 0}}, ["learning_rate is 0.0", "greater than 0 and less than 100"]),
        ({"optimizer": {"learning_rate": 100}}, ["learning_rate is 100.0"]),
        ({"optimizer": {"learning_rate": math.nan}}, ["learning_rate is nan", "a finite number"]),
        ({"optimizer": {"momentum": 1}}, ["momentum is 1.0", "from 0 to 0.9999"]),
        ({"optimizer": {"weight_decay": -1}}, ["weight_decay is -1.0", "from 0 to 1"]),
        ({"optimizer": {"bias_multiplier": -1}}, ["bias_multiplier is -1.0", "from 0 to 1000"]),
        ({"optimizer": {"clip_norm": 0}}, ["clip_norm is 0.0", "greater than 0"]),
        (
            {"schedule": {"name": "poly"}},
            ["unknown name 'poly'", "constant, linear, cosine, step, cyclic, plateau"],
        ),
        ({"schedule": {"warmup": 0.95}}, ["warmup is 0.95", "from 0 to 0.9"]),
        ({"schedule": {"start": 2}}, ["start is 2.0", "from 0 to 1"]),
        ({"schedule": {"end": -1}}, ["end is -1.0", "from 0 to 1"]),
        ({"schedule": {"drop": 1}}, ["drop is 1.0", "less than 1"]),
        ({"schedule": {"cycles": 0}}, ["cycles is 0", "from 1 to 1000"]),
        ({"schedule": {"patience": 0}}, ["patience is 0", "from 1 to 1000"]),
        ({"schedule": {"drops": [0.5, 0.25]}}, ["drops is (0.5, 0.25)", "rising"]),
        ({"schedule": {"drops": [0.5, 1.0]}}, ["drops is (0.5, 1.0)", "between 0 and 1"]),
        ({"schedule": {"name": "plateau", "warmup": 0.1}}, ["warmup is 0.1", "plateau schedule: 0"]),
        ({"averaging": {"every": -1}}, ["every is -1", "from 0 to 10000"]),
        ({"averaging": {"decay": 1.5}}, ["decay is 1.5", "from 0 to 1"]),
    ],
)
def test_errors_name_what_was_received_and_what_is_allowed(given, parts):
    text = error_of(Config.from_dict, given)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "given",
    [
        {"seed": 2**31 - 1},
        {"sizes": [8, 512]},
        {"optimizer": {"momentum": 0.9999, "weight_decay": 1, "learning_rate": 99.9}},
        {"schedule": {"start": 1, "end": 1, "warmup": 0.9}},
        {"augmentation": {"shift": 16, "rotation": 0.5, "zoom": 0.9, "cutout": 32, "mixup": 10}},
        {"augmentation": {"cutout_warmup": 100_000, "brightness": 1, "contrast": 1}},
        {"target": 1, "label_smoothing": 0.99, "views": 2},
        {"validation_fraction": 1 / 49, "validation_fold": 48},  # 49 * (1 / 49) is a little less than 1
        {"validation_interval": 3},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(given):
    assert Config.from_dict(given) != Config()


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"epoch": 3}, ["unknown key in the configuration 'epoch'", "Did you mean 'epochs'?"]),
        ({"optimizer": {"lr": 1}}, ["unknown key in optimizer 'lr'", "learning_rate"]),
        ({"augmentation": {"shifts": 1}}, ["unknown key in augmentation 'shifts'", "'shift'"]),
        ({"origin": {"claims": 1}}, ["unknown key in origin 'claims'"]),
    ],
)
def test_unknown_keys_are_refused(given, parts):
    text = error_of(Config.from_dict, given)
    assert all(part in text for part in parts), text


def test_unknown_names_the_nearest_where_there_is_one():
    assert str(unknown("fruit", "aple", ["apple", "pear"])) == (
        "unknown fruit 'aple'; allowed: apple, pear. Did you mean 'apple'?"
    )
    assert str(unknown("fruit", 7, ["apple"])) == "unknown fruit 7; allowed: apple."


# ---- overriding


def test_override_reaches_into_sections_and_options():
    base = RECIPES["fast.85"]
    changed = base.override(
        epochs=2,
        optimizer__learning_rate=0.5,
        optimizer__momentum=0.1,
        options__depth=3,
        schedule__drops=[0.1, 0.2],
    )
    assert changed.epochs == 2
    assert changed.optimizer == dataclasses.replace(base.optimizer, learning_rate=0.5, momentum=0.1)
    assert changed.options == {"filters": (32, 128, 128), "activation": "relu", "depth": 3}
    assert changed.schedule.drops == (0.1, 0.2)
    same = ("augmentation", "averaging", "batch_size", "sizes", "recipe")
    assert [getattr(changed, name) for name in same] == [getattr(base, name) for name in same]
    assert base == RECIPES["fast.85"]
    assert base.options == {"filters": (32, 128, 128), "activation": "relu"}
    assert base.override() == base


def test_override_replaces_a_section_and_then_a_value_in_it():
    changed = RECIPES["fast.85"].override(
        optimizer__learning_rate=0.7, optimizer=Optimizer(name="adam"), options={}, options__depth=1
    )
    assert changed.optimizer == Optimizer(name="adam", learning_rate=0.7)
    assert changed.options == {"depth": 1}
    assert Config().override(optimizer={"name": "adam"}, optimizer__learning_rate=1).optimizer == Optimizer(
        name="adam", learning_rate=1
    )


@pytest.mark.parametrize(
    ("name", "setting"),
    [("adam", "momentum"), ("adam", "weight_decay"), ("adam", "bias_multiplier"), ("adamw", "momentum")],
)
def test_settings_that_an_optimizer_does_not_use_are_refused(name, setting):
    with pytest.raises(ConfigError, match=rf"{setting} is 0.5, which {name} does not use"):
        Optimizer(name=name, **{setting: 0.5})


def test_all_settings_that_an_optimizer_does_not_use_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        RECIPES["fast.85"].override(optimizer__name="adam")
    assert str(error.value) == (
        "momentum is 0.85, nesterov is True, weight_decay is 0.00133, bias_multiplier is 64.0, which adam does not use; allowed:"
        ' 0.0, False, 0.0, 1.0; --set \'optimizer={"name": "adam", "learning_rate": 0.001}\' sets all of them'
    )
    adam = {"name": "adam", "learning_rate": 0.001}  # as the command line passes it
    assert RECIPES["fast.85"].override(optimizer=adam).optimizer == Optimizer(
        name="adam", learning_rate=0.001
    )


def test_image_size_is_for_folders():
    assert Config(dataset="folder", image_size=64).image_size == 64
    with pytest.raises(ConfigError, match="image_size is 64; allowed with the dataset cifar10: 32"):
        Config(image_size=64)
    with pytest.raises(ConfigError, match="image_size is 4; allowed: from 8 to 512"):
        Config(dataset="folder", image_size=4)


def test_override_checks_a_section_when_it_is_complete():
    # neither of the two alone would be right
    warm = Config(schedule=Schedule(name="linear", warmup=0.2))
    plateau = warm.override(schedule__name="plateau", schedule__warmup=0)
    assert (plateau.schedule.name, plateau.schedule.warmup) == ("plateau", 0)
    mixed = Config(augmentation=Augmentation(mixup=0.2)).override(
        augmentation__cutmix=1, augmentation__mixup=0
    )
    assert (mixed.augmentation.mixup, mixed.augmentation.cutmix) == (0, 1)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"epoch": 3}, ["unknown setting 'epoch'", "Did you mean 'epochs'?"]),
        ({"optimiser__momentum": 3}, ["unknown setting 'optimiser'", "'optimizer'"]),
        ({"optimizer__lr": 3}, ["unknown key in optimizer 'lr'", "learning_rate"]),
        ({"epochs__more": 3}, ["unknown setting 'epochs__more'"]),
        ({"validation_fraction__x": 3}, ["unknown setting 'validation_fraction__x'"]),
        ({"optimizer__momentum": 2}, ["momentum is 2.0"]),
        ({"epochs": 0}, ["epochs is 0.0"]),
    ],
)
def test_override_refuses(values, parts):
    text = error_of(Config().override, **values)
    assert all(part in text for part in parts), text


def test_the_config_costs_no_tensorflow():
    script = """
import sys
import cifar10_trainer, cifar10_trainer.config, cifar10_trainer.cli, cifar10_trainer.datasets
cifar10_trainer.Config()
heavy = {"tensorflow", "keras", "sklearn", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("value", [None, [], "fast.85", 3])
def test_what_is_no_mapping_is_no_config(value):
    assert error_of(Config.from_dict, value).startswith("the configuration is ")


@pytest.mark.parametrize("share", [None, "half", True])
def test_a_share_of_views_is_a_number(share):
    assert error_of(check_views, 2, share).endswith("; allowed: above 0, up to 1")
