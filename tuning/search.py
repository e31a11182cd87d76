"""The command `python -m tuning.search`: flags -> space and options -> `tune`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from absl import flags

from cifar10_trainer import adaptation, cli, datasets
from cifar10_trainer.config import ADAPTABLE, DATASETS, Config
from cifar10_trainer.errors import ConfigError, shown
from cifar10_trainer.files import read_json
from cifar10_trainer.recipes import DEFAULT_FOR, RECIPES

from .options import DEFAULT_TUNER, LOOPBACK, OBJECTIVES, ROLES, TUNERS, Options
from .search_folder import SearchFolder
from .space import DEFAULT_SPACE, SPACE, Space, parse
from .worker import environment

USAGE = """usage: python -m tuning.search [flags]

Searches for the configuration with the best validation accuracy, around a recipe. The same command resumes a search
that was stopped.

Examples:
  python -m tuning.search --target=0.87 --stop_at_target
  python -m tuning.search --space=filters,learning_rate=0.05:0.2,weight_decay --max_trials=30 --workers=2
  python -m tuning.search --dataset=digits --epochs=2 --max_trials=4      (offline, a minute)"""
BASE_RECIPE = "fast.85"  # its trials take a minute each

COMMAND = "python -m tuning.search"
FLAGS = flags.FlagValues()
cli.define_common(FLAGS)


_define = cli.definer(FLAGS, COMMAND)

_define(
    flags.DEFINE_string,
    "tuner",
    "how to choose the next trial: " + "; ".join(f"{name}: {text}" for name, text in TUNERS.items()),
    DEFAULT_TUNER,
)
_define(flags.DEFINE_integer, "max_trials", "number of trials, including failed ones", Options.max_trials)
_define(
    flags.DEFINE_float,
    "epochs",
    "epochs of a full trial; default: the recipe's, for a folder by its number of images",
)
_define(
    flags.DEFINE_float, "target", "validation accuracy to reach, greater than 0 and at most 1", Options.target
)
_define(flags.DEFINE_boolean, "stop_at_target", "end the search at the first trial that reaches it", False)
_define(flags.DEFINE_string, "objective", f"what to optimize: {' or '.join(OBJECTIVES)}", Options.objective)
_define(
    flags.DEFINE_list,
    "space",
    f"hyperparameters to search, each as name or name=low:high; names: {', '.join(SPACE)}",
    list(DEFAULT_SPACE),
)
_define(
    flags.DEFINE_string,
    "recipe",
    f"recipe to start from; default: {BASE_RECIPE}, or fast.digits for digits",
)
_define(
    flags.DEFINE_boolean,
    "baseline",
    "train the recipe itself, or the nearest point of the space, as the first trial",
    True,
)
_define(flags.DEFINE_string, "dataset", f"one of {', '.join(DATASETS)}; default: the recipe's")
_define(flags.DEFINE_string, "data_dir", "folder or archive of the images, as for python -m cifar10_trainer")
_define(
    flags.DEFINE_integer,
    "image_size",
    "side in pixels to which the images of a folder are resized; default: 32",
)
_define(
    flags.DEFINE_float,
    "validation_fraction",
    "share of the training images to hold out; default: the recipe's, of a small folder up to a fifth",
)
cli.define_folder_options(_define)
cli.define_set(_define, "--set precision=float32 --set augmentation.cutout=8")
_define(flags.DEFINE_integer, "seed", "seed of the search and of every trial", Options.seed)
_define(
    flags.DEFINE_integer,
    "workers",
    "number of processes on this machine that train at the same time; default: 1, beside --role=chief none",
)
_define(
    flags.DEFINE_string,
    "role",
    f"one of {', '.join(ROLES)}; a chief hands out trials at the address --chief, and workers on any machine, with the"
    " same other flags, train them",
    "alone",
)
_define(
    flags.DEFINE_string,
    "chief",
    f"HOST:PORT of the chief; it has no password, so use a private network, or {LOOPBACK} for this machine only",
)
_define(
    flags.DEFINE_float,
    "lease",
    "seconds without a heartbeat of a worker before another worker gets its trial",
    Options.lease,
)
_define(
    flags.DEFINE_float,
    "chief_timeout",
    "seconds that a worker waits for an answer of its chief; the old name --patience still works",
    Options.chief_timeout,
)
flags.DEFINE_alias("patience", "chief_timeout", flag_values=FLAGS, module_name=COMMAND)
_define(flags.DEFINE_string, "workdir", "folder of the search; default: searches/<recipe>-<tuner>")
_define(flags.DEFINE_boolean, "overwrite", "replace the search that is in --workdir", False)


def base_from_flags() -> Config:
    """The recipe to start from, with the settings that flags override. Raises ConfigError on an unknown recipe."""
    changes = _changes()
    recipe = FLAGS.recipe or DEFAULT_FOR.get(str(changes.get("dataset")), BASE_RECIPE)
    return RECIPES[recipe].override(**changes)


def _changes() -> dict[str, Any]:
    """What the flags change in the recipe, as `Config.override` takes it. Raises ConfigError."""
    names = ("dataset", "image_size", "epochs", "validation_fraction", "seed")
    given = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    settings = cli.parse_settings(FLAGS.set)
    for name, instead in (("target", "--target"), ("adapt", "what a search of a folder adapts by itself")):
        if name in settings:
            raise ConfigError(f"--set {name}={shown(settings[name])}; allowed in a search: {instead}")
    return {**given, **settings}


def suited_to_folder(base: Config, options: Options) -> Config:
    """The recipe with the batch, the epochs and the held-out share that suit the number of images, and a line about it.

    What a flag sets stays. A search that began without this, in version 1.0.0, continues as it began.
    """
    size = datasets.folder_size(FLAGS.data_dir, options.workdir)
    begun = SearchFolder(options.workdir).search_file
    if size is None:
        return base
    given = _changes()
    free = [name for name in ADAPTABLE if name not in given]
    before = base.override(adapt=free)
    suited = adaptation.adapt(before, size.images, size.validation)
    if begun.exists() and not options.overwrite:
        had = read_json(begun).get("defaults", {})
        if _has(had, base, free) and not _has(had, suited, free):
            return base
    advice = "--epochs, --validation_fraction and --space set others"
    if options.verbose and (text := adaptation.in_words(before, suited, size.images, advice)):
        print(text)
    return suited


def _has(had: Mapping[str, Any], config: Config, names: Sequence[str]) -> bool:
    """Whether the settings of a search are those of `config`, as far as `names` goes; 1.0.0 did not record all of them."""
    return all(had[name] == getattr(config, name) for name in names if name in had)


def options_from_flags(recipe: str) -> Options:
    """The options of the search.

    Args:
        recipe: for the default name of the search's folder.

    Returns:
        The options that the flags determine.

    Raises:
        ConfigError: if a flag has a value that is not allowed.
    """
    values: dict[str, Any] = {f.name: FLAGS[f.name].value for f in fields(Options) if f.name in FLAGS}
    values["workdir"] = FLAGS.workdir or f"searches/{recipe}-{FLAGS.tuner}"
    return Options(**values)


def main() -> None:
    """Runs a search, or a worker of one."""
    ranges = parse(FLAGS.space)
    base = base_from_flags()
    options = options_from_flags(base.recipe)
    if base.dataset == "folder":
        base = suited_to_folder(base, options)

    # A chief trains nothing and leaves the GPUs to its workers.
    is_chief = options.local_workers or options.role == "chief"
    with environment({"CUDA_VISIBLE_DEVICES": "-1"} if is_chief else {}):
        cli.import_tensorflow()
    from .tuner import tune

    options_of_folder = cli.folder_options(FLAGS)
    if base.dataset == "folder":
        options_of_folder["workdir"] = options.workdir
    load = partial(
        datasets.load, base.dataset, FLAGS.data_dir, base.image_size, base.resize, **options_of_folder
    )
    result = tune(Space(base, ranges), load, **vars(options))
    if result:
        command = [
            "python",
            "-m",
            "cifar10_trainer",
            f"--config={SearchFolder(result.workdir).best_config_file}",
        ]
        if FLAGS.data_dir:
            command.append(f"--data_dir={FLAGS.data_dir}")
        print(f"to train the best configuration: {shlex.join(command)}")


def command() -> int:
    """Runs the command with the flags of `sys.argv`, and returns its exit status."""
    return cli.run(main, FLAGS, USAGE)


if __name__ == "__main__":
    sys.exit(command())
