"""What `from cifar10_trainer import ...` gives: every name, in any order, typed, and without TensorFlow until it is needed."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cifar10_trainer

ROOT = Path(__file__).parents[1]
PROMISED = [
    "Config",
    "Augmentation",
    "Optimizer",
    "Schedule",
    "Averaging",
    "RECIPES",
    "Dataset",
    "load_data",
    "build_model",
    "load_model",
    "train",
    "evaluate_model",
    "predict_images",
    "cross_validate",
    "make_dataset",
    "make_training_model",
    "RandomFlip",
    "RandomShift",
    "RandomRotation",
    "RandomZoom",
    "RandomColorJitter",
    "RandomCutout",
    "Muon",
    "RunSchedule",
    "Engine",
    "ConfigError",
    "RunError",
    "RunInterrupted",
    "FolderBusyError",
    "load",
]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_everything_promised_is_there_and_in_dir():
    assert set(PROMISED) <= set(cifar10_trainer.__all__) <= set(dir(cifar10_trainer))
    for name in cifar10_trainer.__all__:
        assert getattr(cifar10_trainer, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        cifar10_trainer.trian  # noqa: B018


def test_no_module_bears_the_name_of_something_public():
    modules = {module.name for module in pkgutil.iter_modules(cifar10_trainer.__path__)}
    assert not modules & set(cifar10_trainer.__all__)


@pytest.mark.parametrize("seed", range(3))
def test_names_can_be_imported_in_any_order(seed):
    """In processes of their own: an import may set a submodule as an attribute of the package."""
    names = list(cifar10_trainer.__all__)
    random.Random(seed).shuffle(names)
    code = (
        f"from cifar10_trainer import {', '.join(names)}\n"
        "import inspect\n"
        f"for name in {names!r}: assert not inspect.ismodule(eval(name)), name\n"
        "import cifar10_trainer\n"
        f"for name in {names!r}: assert getattr(cifar10_trainer, name) is eval(name), name\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("one", "two"), [("train", "cross_validate"), ("cross_validate", "train")])
def test_the_two_names_that_used_to_get_in_each_others_way(one, two):
    done = python(f"from cifar10_trainer import {one}, {two}; print({one}.__name__, {two}.__name__)")
    functions = {"train": "train_and_evaluate", "cross_validate": "cross_validate"}
    assert done.stdout.split() == [functions[one], functions[two]]


def test_importing_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, cifar10_trainer; from cifar10_trainer import Config, RECIPES, Augmentation\n"
        "dir(cifar10_trainer); heavy = {'tensorflow', 'keras', 'numpy', 'matplotlib', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    began = time.monotonic()
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30  # a hang; speed is the benchmark's matter


def test_type_checkers_and_the_lazy_imports_agree():
    """Each lazy name stands in the TYPE_CHECKING block, from the same module under the same name."""
    tree = ast.parse(Path(cifar10_trainer.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {a.asname or a.name: (n.module, a.name) for n in block.body for a in n.names}
    assert typed == cifar10_trainer._LAZY


CONSUMER = """
from cifar10_trainer import RECIPES, Config, build_model, load_data, make_dataset, train

config: Config = RECIPES["fast.85"].override(epochs=2)
metrics: dict[str, object] = train(config, "run", data=load_data("digits"))
wrong: int = load_data("digits").class_names
train(config, folder="run")
"""


@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is in the extra dev")
def test_a_consumers_type_checker_sees_the_types(tmp_path):
    (tmp_path / "consumer.py").write_text(CONSUMER)
    words = [
        sys.executable,
        "-m",
        "mypy",
        "--ignore-missing-imports",
        f"--cache-dir={tmp_path / 'cache'}",
        "consumer.py",
    ]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, env={"MYPYPATH": str(ROOT), "PATH": ""}
    )
    lines = [line.partition(": error: ")[0] for line in done.stdout.splitlines() if ": error: " in line]
    assert [line for line in lines if line.startswith("consumer")] == ["consumer.py:6", "consumer.py:7"], (
        done.stdout
    )


def test_the_modules_evaluate_and_predict_stay_commands():
    for name in ("evaluate", "predict"):
        module = importlib.import_module(f"cifar10_trainer.{name}")
        assert callable(module.command) and module.FLAGS
