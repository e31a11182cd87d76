"""The flags of `python -m cifar10_trainer`: what each does to the Config, and how each error ends."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys

import pytest
from absl import flags

import cifar10_trainer
from cifar10_trainer import __main__ as command
from cifar10_trainer import cli, cluster, datasets, launch, runtime
from cifar10_trainer.config import ADAPTABLE, DATASETS, PRECISIONS, STRATEGIES, Config
from cifar10_trainer.errors import ConfigError, RunError
from cifar10_trainer.recipes import DEFAULT_RECIPE, RECIPES

DEFAULT = RECIPES[DEFAULT_RECIPE]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Flags at their defaults, in a folder where a run may be written by mistake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    reset()
    yield
    reset()


def reset():
    command.FLAGS.unparse_flags()
    for name in command.FLAGS:
        command.FLAGS[name].unparse()


def invoke(*argv):
    """The exit status, with flags at their defaults before."""
    reset()
    return cli.run(command.main, command.FLAGS, command.USAGE, ["cifar10_trainer", *map(str, argv)])


def config_of(*argv) -> Config:
    reset()
    command.FLAGS(["cifar10_trainer", *argv])
    return command.config_from_flags()


def error_of(capsys, *argv) -> tuple[int, str]:
    """Exit status and the error, which is one line on stderr and all there is."""
    capsys.readouterr()
    status = invoke(*argv)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in out + err
    return status, lines[0].removeprefix("error: ")


@pytest.fixture
def trained(monkeypatch):
    """What train_and_evaluate was called with, instead of training."""
    calls = []
    train = importlib.import_module("cifar10_trainer.training")

    def record(config, workdir=None, **more):
        calls.append({"config": config, "workdir": workdir, **more})

    monkeypatch.setattr(train, "train_and_evaluate", record)
    return calls


# ---- what a flag does to the Config


EFFECTS = {
    "recipe": (["--recipe=vgg.3"], RECIPES["vgg.3"]),
    "dataset": (["--dataset=folder"], DEFAULT.override(dataset="folder", adapt=ADAPTABLE)),
    "image_size": (
        ["--dataset=folder", "--image_size=24"],
        DEFAULT.override(dataset="folder", image_size=24, adapt=ADAPTABLE),
    ),
    "resize": (
        ["--dataset=folder", "--resize=pad"],
        DEFAULT.override(dataset="folder", resize="pad", adapt=ADAPTABLE),
    ),
    "class_weights": (["--class_weights=balanced"], DEFAULT.override(class_weights="balanced")),
    "epochs": (["--epochs=2.5"], DEFAULT.override(epochs=2.5)),
    "batch_size": (["--batch_size=96"], DEFAULT.override(batch_size=96)),
    "learning_rate": (["--learning_rate=0.25"], DEFAULT.override(optimizer__learning_rate=0.25)),
    "seed": (["--seed=7"], DEFAULT.override(seed=7)),
    "validation_fraction": (["--validation_fraction=0.3"], DEFAULT.override(validation_fraction=0.3)),
    "final_fit": (["--final_fit"], DEFAULT.override(validation_fraction=None)),
    "strategy": (["--strategy=mirrored"], DEFAULT.override(strategy="mirrored")),
    "cpu_replicas": (["--cpu_replicas=2"], DEFAULT.override(strategy="mirrored")),
    "precision": (["--precision=float32"], DEFAULT.override(precision="float32")),
    "sync_batch_norm": (["--sync_batch_norm"], DEFAULT.override(synchronize_batch_norm=True)),
    "set": (
        [
            "--set",
            "optimizer.momentum=0.5",
            "--set=options.filters=[8,16]",
            "--set=pixels=unit",
            "--set=views=1",
        ],
        DEFAULT.override(optimizer__momentum=0.5, options__filters=(8, 16), pixels="unit", views=1),
    ),
}
ELSEWHERE = {  # tested below: what is no part of the Config
    "allow_replica_change",
    "cluster_timeout",
    "config",
    "data_dir",
    "debug",
    "folds",
    "hdf5",
    "help",
    "list_recipes",
    "local_workers",
    "max_bad",
    "overwrite",
    "quiet",
    "save_seconds",
    "strict",
    "verbose",
    "version",
    "workdir",
    "worker_index",
    "workers",
}


def test_every_flag_is_tested():
    assert {name for name in command.FLAGS if name != "h"} == set(EFFECTS) | ELSEWHERE


def test_flags_that_are_switched_off_are_none():
    assert config_of("--final_fit=false").validation_fraction == 0.1
    command.FLAGS.unparse_flags()
    command.FLAGS(["x", "--folds=2", "--final_fit=false", "--nohdf5"])
    command.check_folds()


def test_the_config_of_a_fold_can_be_fitted_on_all_images(tmp_path):
    fold = DEFAULT.override(validation_fraction=1 / 3, validation_fold=2)
    (tmp_path / "config.json").write_text(json.dumps(fold.to_dict()))
    assert config_of(f"--config={tmp_path / 'config.json'}", "--final_fit") == DEFAULT.override(
        validation_fraction=None
    )


def test_what_a_flag_sets_for_a_folder_is_not_chosen_by_its_size():
    config = config_of("--dataset=folder", "--batch_size=16", "--set=validation_interval=3", "--final_fit")
    assert config.adapt == ("epochs",)
    assert (config.batch_size, config.validation_interval, config.validation_fraction) == (16, 3, None)
    assert config_of("--dataset=digits").adapt == config_of().adapt == ()


def test_rules_for_files_that_are_no_images(trained):
    assert invoke("--dataset=folder", "--strict", "--max_bad=0.25", "--workdir=run") == 0
    assert trained[0]["folder_options"] == {"strict": True, "max_bad": 0.25}


@pytest.mark.parametrize("flag", EFFECTS)
def test_flag_and_config(flag, trained, monkeypatch):
    monkeypatch.setattr(runtime, "split_cpu", lambda replicas: None)  # possible once in a process
    argv, expected = EFFECTS[flag]
    assert expected != DEFAULT
    assert config_of(*argv) == expected
    assert invoke(*argv) == 0
    assert [call["config"] for call in trained] == [expected]


def test_no_flags_are_the_default_recipe(trained, monkeypatch):
    monkeypatch.setattr(command, "PROCESS_START", 12.5)
    assert config_of() == DEFAULT
    assert invoke() == 0
    expected = {"config": DEFAULT, "workdir": None, "data_dir": None, "overwrite": False, "hdf5": False}
    expected |= {"cluster_timeout": 600.0, "allow_replica_change": False}
    assert trained == [{**expected, "verbose": "auto", "since": 12.5}]


def test_set_counts_where_the_recipe_of_a_folder_is_chosen(tmp_path, monkeypatch):
    size = datasets.folder.FolderSize(images=60, classes=3, validation=False)
    monkeypatch.setattr(datasets, "folder_size", lambda data_dir, workdir: size)
    assert config_of("--dataset=folder", "--data_dir=x").recipe == "transfer.cifar"
    assert config_of("--dataset=folder", "--data_dir=x", "--set=image_size=224").recipe == "fast.default"
    assert config_of("--set=dataset=folder", "--data_dir=x").recipe == "transfer.cifar"
    assert config_of("--set=dataset=digits").recipe == "fast.digits"


def test_what_the_encoding_of_stdout_lacks_is_written_as_ascii():
    code = "from cifar10_trainer import cli; from absl import flags; f = flags.FlagValues(); cli.define_common(f);"
    code += "exit(cli.run(lambda: print('50 \u00b1 2'), f, 'usage', ['x']))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"50 \\xb1 2\n"), done.stderr


def test_cpu_replicas_are_mirrored_however_the_strategy_is_set(trained, capsys):
    assert invoke("--cpu_replicas=2", "--set=strategy=none") == 2
    assert "--cpu_replicas=2 and --strategy=none; allowed: --strategy=mirrored" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "fold-1-of-3"])
def test_an_unfinished_run_on_a_folder_keeps_its_recipe(place, tmp_path, capsys):
    """More pictures may suggest another one by now."""
    run = tmp_path / "run" / place
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"recipe": "leaky.three"}')
    argv = ["--dataset=folder", f"--data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    argv += ["--folds=3"] if place else []
    assert config_of(*argv).recipe == "leaky.three"
    assert config_of(*argv, "--overwrite").recipe == DEFAULT.recipe
    assert config_of(*argv, "--recipe=fast.85").recipe == "fast.85"
    (run / "config.json").write_text('{"recipe": []}')
    assert config_of(*argv).recipe == DEFAULT.recipe
    (run / "config.json").write_text('{"recipe": "leaky.three"}')
    (tmp_path / "run" / ("folds.json" if place else "metrics.json")).write_text("{}")
    assert config_of(*argv).recipe == DEFAULT.recipe  # it is finished; what follows refuses it


@pytest.mark.parametrize("flag", ["--final_fit", "--folds=2"])
def test_a_share_that_another_flag_replaces_is_refused_however_it_is_set(flag, trained, capsys):
    shares = ["--validation_fraction=0.3", "--set=validation_fraction=0.3"]
    shares += ["--set=validation_fold=1", "--set=validation_split=last"] if "folds" in flag else []
    for share in shares:
        assert invoke("--dataset=digits", flag, share) == 2
        assert "; allowed: one of the two" in capsys.readouterr().err


# ---- several workers


@pytest.fixture
def met(monkeypatch):
    """What workers would have met with, instead of meeting; and TF_CONFIG then."""
    calls = []

    def join(strategy, timeout, log):
        calls.append((strategy, timeout, json.loads(os.environ["TF_CONFIG"])))

    monkeypatch.setattr(cluster, "join_workers", join)
    return calls


def test_workers_and_their_index_are_tf_config(met, trained, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "")
    flags = ["--workers=a:1,b:2", "--worker_index=1", "--cluster_timeout=5", "--allow_replica_change"]
    assert invoke(*flags) == 0
    task = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}
    assert met == [("auto", 5.0, task)]
    assert (trained[0]["cluster_timeout"], trained[0]["allow_replica_change"]) == (5.0, True)


def test_cpu_replicas_split_the_cpu(trained, monkeypatch):
    made = []
    monkeypatch.setattr(runtime, "split_cpu", made.append)
    assert invoke("--cpu_replicas=3") == 0 and made == [3]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--workers=a:1,b:2"], "--workers and --worker_index go together; allowed: both, neither, or"),
        (["--workers=2"], "or --local_workers=N, which starts N workers here"),
        (["--worker_index=0"], "--workers and --worker_index go together; allowed: both, neither, or"),
        (
            ["--workers=a:1", "--worker_index=1"],
            "the worker index is 1, but --workers names 1 worker(s); allowed: from 0 to 0",
        ),
        (
            ["--workers=", "--worker_index=0"],
            "--workers is empty; allowed: a value; to use the default, leave the flag out",
        ),
        (
            ["--workers=a:1,a:1", "--worker_index=0"],
            "--workers names a:1 twice; allowed: an address of its own for each worker",
        ),
        (
            ["--workers=a,b:2", "--worker_index=0"],
            "--workers names the address 'a'; allowed: HOST:PORT with a port from 1",
        ),
        (
            ["--workers=a:1,b:1", "--worker_index=0", "--strategy=none"],
            "--workers and --strategy=none; allowed: --strategy=",
        ),
        (
            ["--local_workers=2", "--cpu_replicas=2"],
            "--local_workers and --cpu_replicas; allowed: one of them",
        ),
        (
            ["--local_workers=2", "--strategy=mirrored"],
            "--local_workers and --strategy=mirrored; allowed: --strategy=multi",
        ),
        (["--local_workers=0"], "--local_workers=0"),
        (
            ["--cpu_replicas=2", "--strategy=none"],
            "--cpu_replicas=2 and --strategy=none; allowed: --strategy=mirrored",
        ),
        (["--cluster_timeout=0"], "--cluster_timeout=0"),
        (["--folds=2", "--local_workers=2"], "--folds and --local_workers; allowed: one of the two"),
        (["--strategy=multi_worker"], "strategy multi_worker found no cluster; set TF_CONFIG"),
    ],
)
def test_wrong_flags_of_workers(argv, text, capsys, trained):
    status, error = error_of(capsys, *argv)
    assert status == 2 and text in error and trained == []


def test_workers_beside_tf_config(capsys, trained, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{}")
    status, error = error_of(capsys, "--workers=a:1", "--worker_index=0")
    assert (status, error) == (2, "--workers is given, and TF_CONFIG is set; allowed: one of the two")


@pytest.mark.parametrize(
    ("argv", "rest"),
    [
        (["--local_workers=2", "--seed=1"], ["--seed=1"]),
        (["--seed=1", "--local_workers", "2", "--quiet"], ["--seed=1", "--quiet"]),
        (["-local_workers=2"], []),
    ],
)
def test_local_workers_get_the_other_arguments(argv, rest, monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "run_local_workers", lambda count, argv: calls.append((count, argv)))
    monkeypatch.setattr(sys, "argv", ["cifar10_trainer", *argv, "--workdir=x"])
    assert invoke(*argv, "--workdir=x") == 0
    assert calls == [(2, [*rest, "--workdir=x"])]
    monkeypatch.setattr(sys, "argv", ["cifar10_trainer", *argv])
    assert invoke(*argv) == 0
    assert calls[1][1][:-1] == rest and calls[1][1][-1].startswith(f"--workdir=runs/{DEFAULT_RECIPE}-")


def test_local_workers_of_a_flagfile(tmp_path, monkeypatch, capsys):
    """The workers would read the file as well."""
    file = tmp_path / "flags"
    file.write_text("--local_workers=2\n")
    monkeypatch.setattr(sys, "argv", ["cifar10_trainer", f"--flagfile={file}"])
    text = "--local_workers stands in a --flagfile; allowed: on the command line"
    assert error_of(capsys, f"--flagfile={file}") == (2, text)


@pytest.mark.parametrize(("flag", "verbose"), [("--quiet", 0), ("--verbose", 1)])
def test_quiet_and_verbose(flag, verbose, trained, capsys):
    assert invoke(flag) == 0 and trained[0]["verbose"] == verbose
    assert error_of(capsys, "--quiet", "--verbose") == (2, "--quiet and --verbose; allowed: one of the two")


def test_zero_is_a_value_and_not_the_lack_of_one():
    assert config_of("--recipe=vgg.3", "--seed=0").seed == 0
    base = RECIPES["fast.96"].override(seed=3, synchronize_batch_norm=True)
    path = "with_seed.json"
    with open(path, "w") as file:
        json.dump(base.to_dict(), file)
    assert config_of(f"--config={path}", "--seed=0").seed == 0
    assert config_of(f"--config={path}", "--nosync_batch_norm").synchronize_batch_norm is False
    assert config_of(f"--config={path}").synchronize_batch_norm is True


def test_the_digits_have_a_recipe_of_their_own():
    assert config_of("--dataset=digits") == RECIPES["fast.digits"]
    assert config_of("--dataset=digits", "--recipe=vgg.1") == RECIPES["vgg.1"].override(dataset="digits")


def test_every_recipe_and_choice_is_taken():
    for name in RECIPES:
        found = config_of(f"--recipe={name}")
        assert bool(found.adapt) == (found.dataset == "folder")
        assert found.override(adapt=()) == RECIPES[name]
    for flag, values in (("dataset", DATASETS), ("strategy", STRATEGIES), ("precision", PRECISIONS)):
        for value in values:
            assert getattr(config_of(f"--{flag}={value}"), flag) == value


def test_flags_override_a_recipe_together():
    found = config_of(
        "--recipe=leaky.baseline", "--epochs=3", "--learning_rate=0.01", "--set=schedule.name=cosine"
    )
    assert found == RECIPES["leaky.baseline"].override(
        epochs=3, optimizer__learning_rate=0.01, schedule__name="cosine"
    )


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("validation_fraction=null", {"validation_fraction": None}),
        ("whitening=false", {"whitening": False}),
        ("sizes=[]", {"sizes": ()}),
        ("sizes=[16, 32]", {"sizes": (16, 32)}),
        ("augmentation.flip=random", {"augmentation__flip": "random"}),
        ('augmentation.flip="none"', {"augmentation__flip": "none"}),
        ("optimizer.weight_decay=1e-4", {"optimizer__weight_decay": 1e-4}),
        ("early_stopping=3", {"early_stopping": 3}),
        ("options.activation=a=b", {"options__activation": "a=b"}),
    ],
)
def test_set_takes_json_or_a_word(setting, expected):
    assert config_of("--set", setting) == DEFAULT.override(**expected)
    assert DEFAULT.override(**expected) != DEFAULT


# ---- a file instead of a recipe


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"--config={path}"


def test_config_of_a_run_with_its_record(tmp_path):
    config = RECIPES["vgg.2"].override(epochs=3, seed=5)
    record = {**config.to_dict(), "class_names": ["a", "b"], "environment": {"python": "3"}, "command": "x"}
    flag = write(tmp_path / "config.json", record)
    assert config_of(flag) == config
    assert config_of(flag, "--epochs=1", "--dataset=digits") == config.override(epochs=1, dataset="digits")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"epoch": 3}, ["unknown key in the configuration 'epoch'", "Did you mean 'epochs'?"]),
        ({"optimizer": {"lr": 3}}, ["unknown key in optimizer 'lr'", "learning_rate"]),
        ({"epochs": -3}, ["epochs is -3.0", "greater than 0"]),
        ({"epochs": "many"}, ["epochs is 'many'", "type float"]),
        ("{'epochs': 3}", ["is not a JSON file", "config.json of a run"]),
        ("", ["is not a JSON file"]),
        ("[1, 2]", ["holds list", "a JSON object"]),
        ("3", ["holds int", "a JSON object"]),
    ],
)
def test_a_config_file_that_is_none(content, parts, tmp_path, capsys):
    status, text = error_of(capsys, write(tmp_path / "c.json", content))
    assert status == 2
    assert all(part in text for part in parts), text


def test_a_config_file_of_bytes(tmp_path, capsys):
    (tmp_path / "c.json").write_bytes(b"\x89PNG\xff\xfe")
    status, text = error_of(capsys, f"--config={tmp_path / 'c.json'}")
    assert status == 2
    assert "is not a JSON file" in text


def test_a_config_file_that_cannot_be_read(tmp_path, capsys):
    for path, reason in ((tmp_path / "none.json", "No such file"), (tmp_path, "it is a folder")):
        status, text = error_of(capsys, f"--config={path}")
        assert status == 2
        assert f"cannot read --config={path}" in text
        assert reason in text


# ---- what is no part of the Config


def test_workdir_data_dir_and_overwrite(trained):
    assert invoke("--workdir=here", "--data_dir=there", "--overwrite") == 0
    (call,) = trained
    assert (call["workdir"], call["data_dir"], call["overwrite"]) == ("here", "there", True)


def test_hdf5(trained):
    invoke()
    invoke("--hdf5")
    assert [call["hdf5"] for call in trained] == [False, True]


def test_save_seconds(trained):
    invoke()
    invoke("--save_seconds=5")
    assert [call.get("save_seconds") for call in trained] == [None, 5.0], "the function has the default"


def test_folds(trained, monkeypatch):
    calls = []
    monkeypatch.setattr(command, "PROCESS_START", 12.5)
    folds = importlib.import_module("cifar10_trainer.cross_validation")
    monkeypatch.setattr(folds, "cross_validate", lambda *given, **more: calls.append((*given, more)))
    assert invoke("--recipe=vgg.3", "--folds=5", "--workdir=there", "--data_dir=here", "--overwrite") == 0
    expected = {"data_dir": "here", "overwrite": True, "verbose": "auto", "since": 12.5}
    expected["allow_replica_change"] = False
    assert calls == [(RECIPES["vgg.3"], 5, "there", expected)]
    assert invoke("--folds=5", "--workdir=there", "--allow_replica_change") == 0
    assert calls[-1][-1]["allow_replica_change"] is True
    assert not trained


def test_list_recipes(capsys, trained):
    assert invoke("--list_recipes") == 0
    out, err = capsys.readouterr()
    assert err == ""
    heading, *lines = out.splitlines()
    assert heading.split() == ["recipe", "parameters", "epochs", "claim", "source"]
    assert [line.split()[0] for line in lines] == list(RECIPES)
    for line, recipe in zip(lines, RECIPES.values(), strict=True):
        _, parameters, epochs, claim, source = line.split(None, 4)
        assert int(parameters.replace(",", "")) == recipe.origin.parameters
        assert float(epochs) == recipe.epochs
        assert claim == ("-" if recipe.origin.claim is None else f"{100 * recipe.origin.claim:.2f}%")
        assert source == recipe.origin.source
    assert trained == []


def test_version_names_the_versions_that_are_installed(capsys, trained):
    assert invoke("--version") == 0
    out, err = capsys.readouterr()
    expected = f"{importlib.metadata.version('tensorflow')}, Keras {importlib.metadata.version('keras')}"
    assert out.startswith(f"cifar10-trainer {cifar10_trainer.__version__} (Python 3.")
    assert out.endswith(f"TensorFlow {expected})\n") and err == "" and trained == []
    assert importlib.metadata.version("cifar10-trainer") == cifar10_trainer.__version__


@pytest.mark.parametrize("name", ["train", "trainer", "evaluate", "predict", "search"])
def test_console_commands(name):
    """They exist beside python -m, and parse their flags as it does."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=f"cifar10-{name}")
    done = call_python(
        "-c", f"import sys; from {entry.module} import {entry.attr} as c; sys.exit(c())", "--version"
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("cifar10-trainer ")
    done = call_python(
        "-c", f"import sys; from {entry.module} import {entry.attr} as c; sys.exit(c())", "--bogus"
    )
    assert done.returncode == 2 and "Unknown command line flag 'bogus'" in done.stderr


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_usage_and_every_flag(flag, capsys, trained):
    assert invoke(flag) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("usage: python -m cifar10_trainer")
    for name in set(EFFECTS) | ELSEWHERE:
        assert f"-{name}" in out.replace("[no]", "")
    assert trained == []


# ---- errors of usage: one line, status 2


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--epoch=3"], ["Unknown command line flag 'epoch'", "--help"]),
        (["--bogus"], ["Unknown command line flag 'bogus'"]),
        (["--epochs=many"], ["--epochs=many", "could not convert"]),
        (["--batch_size=1.5"], ["--batch_size=1.5"]),
        (["--seed"], ["seed"]),
        (["train"], ["unexpected argument 'train'", "--name=value"]),
        (
            ["--recipe=fast.defualt"],
            ["unknown recipe 'fast.defualt'", "vgg.3", "Did you mean 'fast.default'?"],
        ),
        (["--recipe=x", "--config=y"], ["--recipe=x and --config=y", "one of the two"]),
        (["--recipe=vgg.3", "--config=y"], ["--recipe=vgg.3 and --config=y", "one of the two"]),
        (["--dataset=mnist"], ["unknown dataset 'mnist'", "cifar10, digits, folder"]),
        (["--strategy=tpu"], ["unknown strategy 'tpu'", "auto, none, mirrored, multi_worker"]),
        (["--precision=float16"], ["unknown precision 'float16'", "auto, float32", "mixed_float16"]),
        (["--epochs=0"], ["epochs is 0.0", "greater than 0"]),
        (["--epochs=-3"], ["epochs is -3.0", "greater than 0"]),
        (["--epochs=nan"], ["epochs is nan"]),
        (["--epochs=inf"], ["epochs is inf"]),
        (["--batch_size=0"], ["batch_size is 0", "from 1"]),
        (["--batch_size=-4"], ["batch_size is -4"]),
        (["--learning_rate=0"], ["learning_rate is 0.0", "greater than 0"]),
        (["--learning_rate=1e9"], ["learning_rate is 1000000000.0", "less than 100"]),
        (["--seed=-1"], ["seed is -1", "from 0"]),
        (["--validation_fraction=0"], ["validation_fraction is 0", "less than 1", "--final_fit"]),
        (["--validation_fraction=1"], ["validation_fraction is 1.0", "less than 1"]),
        (["--validation_fraction=-0.1"], ["validation_fraction is -0.1"]),
        (["--folds=5", "--final_fit"], ["--folds and --final_fit", "one of the two"]),
        (["--folds=5", "--validation_fraction=0.1"], ["--folds and --validation_fraction"]),
        (["--folds=5", "--hdf5"], ["--folds and --hdf5"]),
        (["--final_fit", "--validation_fraction=0.1"], ["--final_fit and --validation_fraction"]),
        (["--final_fit", "--recipe=practical.baseline"], ["validation_fraction is None", "early stopping"]),
        (["--image_size=64"], ["image_size is 64", "allowed with the dataset cifar10: 32"]),
        (["--image_size=64", "--dataset=digits"], ["image_size is 64", "dataset digits: 32"]),
        (["--recipe="], ["--recipe is empty", "leave the flag out"]),
        (["--dataset=digits", "--workdir="], ["--workdir is empty"]),
        (["--set", "recipe=../../elsewhere"], ["recipe is '../../elsewhere'", "letters, digits"]),
        (["--set", "momentum"], ["--set 'momentum'", "section.name=value"]),
        (["--set", "optimizer.mometum=1"], ["unknown key in optimizer 'mometum'", "'momentum'"]),
        (["--set", "optimzer.momentum=1"], ["unknown setting 'optimzer'", "'optimizer'"]),
        (["--set", "optimizer.momentum=big"], ["momentum is 'big'", "type float"]),
        (["--set", "epochs.x=1"], ["unknown setting 'epochs__x'"]),
        (["--set", "views=5"], ["views is 5", "1, 2, 6"]),
    ],
)
def test_wrong_usage(argv, parts, capsys, trained):
    status, text = error_of(capsys, *argv)
    assert status == 2
    assert all(part in text for part in parts), text
    assert trained == []


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--set", "options.widht=3"], ["unknown option of fast 'widht'", "filters"]),
        (["--strategy=multi_worker"], ["found no cluster", "TF_CONFIG"]),
        (["--dataset=digits", "--data_dir=/here"], ["data_dir is /here", "none, it is built in"]),
        (
            ["--dataset=digits", "--batch_size=2000"],
            ["batch_size is 2000", "at most the 1294 training images"],
        ),
        (["--dataset=digits", "--set=whitening=true", "--recipe=vgg.1"], ["whitening is True", "vgg: False"]),
        (["--dataset=folder"], ["data_dir is not set", "train/<class>"]),
        (["--dataset=folder", "--data_dir=/nowhere"], ["/nowhere, which does not exist"]),
        (["--dataset=folder", "--data_dir=.", "--max_bad=1"], ["max_bad is 1.0", "less than 1"]),
        (["--dataset=digits", "--strict"], ["strict is True", "dataset folder only"]),
        (["--dataset=digits", "--max_bad=0"], ["max_bad is 0.0", "dataset folder only"]),
        (["--dataset=folder", "--data_dir=.", "--image_size=4"], ["image_size is 4", "from 8 to 512"]),
        (["--data_dir=/nowhere"], ["/nowhere"]),
    ],
)
def test_wrong_usage_that_shows_when_the_run_begins(argv, parts, capsys):
    status, text = error_of(capsys, "--workdir=run", *argv)
    assert status == 2
    assert all(part in text for part in parts), text


# ---- runs that are there already


def start_of_a_run(folder, *argv, finished=False):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(*argv).to_dict()))
    if finished:
        (folder / "metrics.json").write_text("{}")


def test_a_finished_run_is_kept(tmp_path, capsys):
    argv = ["--dataset=digits", f"--workdir={tmp_path / 'run'}"]
    start_of_a_run(tmp_path / "run", *argv, finished=True)
    before = {p.name: p.read_text() for p in (tmp_path / "run").iterdir()}
    for more in ([], ["--epochs=1"]):
        status, text = error_of(capsys, *argv, *more)
        assert status == 2
        assert "holds a finished run" in text
        assert "--overwrite" in text
    assert {p.name: p.read_text() for p in (tmp_path / "run").iterdir()} == before


def test_another_unfinished_run_is_kept(tmp_path, capsys):
    argv = ["--dataset=digits", f"--workdir={tmp_path / 'run'}"]
    start_of_a_run(tmp_path / "run", *argv, "--seed=3")
    before = {p.name: p.read_text() for p in (tmp_path / "run").iterdir()}
    status, text = error_of(capsys, *argv, "--seed=4")
    assert status == 2
    assert "holds an unfinished run of another configuration (seed 3, now 4)" in text
    assert "--overwrite" in text
    status, text = error_of(capsys, *argv, "--seed=3", "--learning_rate=0.7")
    assert status == 2
    assert "(optimizer " in text
    assert {p.name: p.read_text() for p in (tmp_path / "run").iterdir()} == before


def test_a_workdir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    for workdir in (tmp_path / "run", tmp_path / "run" / "below"):
        status, text = error_of(capsys, "--dataset=digits", f"--workdir={workdir}")
        assert status == 1
        assert f"cannot write to {workdir}" in text
        assert "--workdir" in text
    assert (tmp_path / "run").read_text() == "mine"


# ---- how a command ends


def simple(main, *argv):
    values = flags.FlagValues()
    cli.define_common(values)
    return cli.run(main, values, "usage: simple", ["simple", *argv])


def failing(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("x is 3; allowed: 4"), 2, "error: x is 3; allowed: 4"),
        (RunError("the disk is full; make room"), 1, "error: the disk is full; make room"),
        (RunError("two\n  lines"), 1, "error: two lines"),
        (ValueError("odd"), 1, "error: ValueError: odd (--debug shows the traceback)"),
        (KeyError("key"), 1, "error: KeyError: 'key' (--debug shows the traceback)"),
        (ValueError(), 1, "error: ValueError: ValueError (--debug shows the traceback)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_a_status(error, status, line, capsys):
    assert simple(failing(error)) == status
    out, err = capsys.readouterr()
    assert (out, err) == ("", line + "\n")


def test_a_pipe_that_breaks_elsewhere_is_an_error(capsys):
    assert simple(failing(BrokenPipeError(32, "Broken pipe"))) == 1
    assert capsys.readouterr().err.startswith("error: BrokenPipeError: [Errno 32] Broken pipe")


def test_a_long_error_of_somebody_elses_is_cut(capsys):
    assert simple(failing(ValueError("x" * 5000))) == 1
    assert len(capsys.readouterr().err) < 600


@pytest.mark.parametrize("flag", ["--debug", "--debug=true", "-debug"])
def test_debug_shows_the_traceback(flag, capsys):
    assert simple(failing(RunError("the disk is full")), flag) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "in main" in err
    assert err.endswith("\nerror: the disk is full\n")
    assert simple(failing(RunError("the disk is full")), "--nodebug") == 1
    assert "Traceback" not in capsys.readouterr().err


def test_positional_arguments_reach_main(capsys):
    received = []
    assert simple(received.extend, "a", "--nodebug", "b") == 0
    assert received == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_a_failing_import_of_tensorflow_tells_what_it_said(monkeypatch, capfd):
    import tensorflow as tf

    def fail():
        os.write(2, b"a device is broken\n")
        raise RuntimeError("no devices")

    def find_devices_by(function):
        for name in ("list_physical_devices", "list_logical_devices"):
            monkeypatch.setattr(tf.config, name, function)

    find_devices_by(fail)
    with pytest.raises(RuntimeError, match="no devices"):
        cli.import_tensorflow()
    assert capfd.readouterr().err == "a device is broken\n"
    find_devices_by(lambda: os.write(2, b"a dozen lines\n"))
    cli.import_tensorflow()
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "later\n"


def test_sigterm_interrupts(capsys):
    """Once, so that what was begun is tidied up; the second one ends the process."""
    handlers = []

    def main(argv):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    assert simple(main) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert handlers == [signal.SIG_DFL] and signal.getsignal(signal.SIGTERM) == before


def test_sighup_interrupts_unless_the_process_ignores_it(capsys):
    def main(argv):
        os.kill(os.getpid(), signal.SIGHUP)
        print("ignored")

    assert simple(main) == 130
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert simple(main) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr() == ("ignored\n", "interrupted\n")


def test_what_looks_as_if_it_were_not_installed():
    sys.modules.pop("colorsys", None)
    with cli._not_installed("colorsys", "json"):
        with pytest.raises(ImportError):
            import colorsys
        import json as again

        assert again is json
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0) and sys.modules["json"] is json


# ---- for real: processes


def call(*argv, **more):
    return call_python("-m", "cifar10_trainer", *argv, **more)


def call_python(*argv, **more):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=300, **more)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Processes of this package start in another folder."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(command.__file__)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]))


def test_what_is_quick_needs_no_tensorflow():
    """TensorFlow takes seconds to import: help, the list of recipes and errors of usage must not wait for it."""
    script = """
import sys
from cifar10_trainer import __main__ as command
for argv in (["--help"], ["--list_recipes"], ["--version"], ["--recipe=none"], ["--bogus"], ["--epochs=0"], ["--config=/none"]):
    command.FLAGS.unparse_flags()
    for name in command.FLAGS:
        command.FLAGS[name].unparse()
    sys.argv = ["cifar10_trainer", *argv]
    status = command.command()
    assert status == (0 if argv[0] in ("--help", "--list_recipes", "--version") else 2), (argv, status)
    heavy = {"tensorflow", "keras", "sklearn", "matplotlib", "kagglehub"} & set(sys.modules)
    assert not heavy, (argv, heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_closed_output_is_no_error():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m cifar10_trainer --version >&-"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_config_of_a_run_with_its_own_model_is_refused(tmp_path, capsys, trained):
    (tmp_path / "config.json").write_text(json.dumps({**DEFAULT.to_dict(), "own_model": "1a2b3c4d"}))
    status, text = error_of(capsys, f"--config={tmp_path / 'config.json'}")
    assert status == 2 and "is of a run with a model of its own" in text and trained == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("flag", ["--help", "--list_recipes", "--version"])
def test_output_that_nobody_reads(flag, unbuffered):
    """As in `| head`: no word, and the status that a shell gives to SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "cifar10_trainer", flag]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_as_a_process():
    done = call("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m cifar10_trainer")
    assert "--recipe" in done.stdout


def test_list_recipes_as_a_process():
    done = call("--list_recipes")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1 + len(RECIPES)


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--bogus=1", "bogus"),
        ("--recipe=none", "unknown recipe 'none'"),
        ("--dataset=none", "unknown dataset 'none'"),
        ("--strategy=none_at_all", "unknown strategy"),
        ("--precision=half", "unknown precision 'half'"),
        ("--epochs=0", "epochs is 0.0"),
        ("--epochs=-1", "epochs is -1.0"),
    ],
)
def test_wrong_usage_as_a_process(flag, part):
    done = call(flag)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert part in done.stderr


def test_divergence_as_a_process(tmp_path):
    """An absurd learning rate ends in one line that says what to do; TensorFlow's own lines stay away."""
    done = call(
        "--dataset=digits",
        "--recipe=vgg.1",
        "--set=options.filters=[4]",
        "--set=optimizer.weight_decay=0.05",  # else every ReLU dies, and a dead network's loss is a number
        "--learning_rate=99",
        "--epochs=2",
        "--precision=float32",
        f"--workdir={tmp_path / 'run'}",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "training diverged; use a lower --learning_rate" in done.stderr
    assert not (tmp_path / "run/metrics.json").exists()
