"""python -m tuning.search: flags -> space and options -> tune."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from absl import flags

from cifar10_trainer import cli
from cifar10_trainer.config import DATASETS, Config
from cifar10_trainer.errors import ConfigError, unknown
from cifar10_trainer.recipes import DEFAULT_FOR, RECIPES

from .options import DEFAULT_TUNER, LOOPBACK, OBJECTIVES, ROLES, TUNERS, Options
from .search_folder import SearchFolder
from .space import DEFAULT_SPACE, SPACE, Space, parse
from .worker import environment

USAGE = """usage: python -m tuning.search [flags]

Searches for the configuration with the best validation accuracy, around a recipe. Started again, it goes on.
Examples:
  python -m tuning.search --target=0.87 --stop_at_target
  python -m tuning.search --space=filters,learning_rate=0.05:0.2,weight_decay --max_trials=30 --workers=2
  python -m tuning.search --dataset=digits --epochs=2 --max_trials=4      (offline, a minute)"""
DEFAULT_RECIPE = "fast.85"  # a trial a minute

COMMAND = "python -m tuning.search"
FLAGS = flags.FlagValues()
cli.define_common(FLAGS)


def _define(kind: Callable[..., Any], name: str, text: str, default: Any = None) -> None:
    kind(name, default, text, flag_values=FLAGS, module_name=COMMAND)


_define(flags.DEFINE_string, "tuner", f"one of {', '.join(TUNERS)}", DEFAULT_TUNER)
_define(flags.DEFINE_integer, "max_trials", "trials, the failed ones included", Options.max_trials)
_define(flags.DEFINE_float, "epochs", "of a full trial; default: the recipe's")
_define(flags.DEFINE_float, "target", "validation accuracy to pass, 0 to 1", Options.target)
_define(flags.DEFINE_boolean, "stop_at_target", "stop as soon as a trial passes the target", False)
_define(flags.DEFINE_string, "objective", f"one of {', '.join(OBJECTIVES)}", Options.objective)
_define(
    flags.DEFINE_list,
    "space",
    f"the hyperparameters to search, of {', '.join(SPACE)}, each as name or name=low:high",
    list(DEFAULT_SPACE),
)
_define(
    flags.DEFINE_string, "recipe", f"where it starts from; default: {DEFAULT_RECIPE}, for digits fast.digits"
)
_define(flags.DEFINE_boolean, "baseline", "make the recipe itself the first trial", True)
_define(flags.DEFINE_string, "dataset", f"one of {', '.join(DATASETS)}; default: the recipe's")
_define(flags.DEFINE_string, "data_dir", "where the images are, as for python -m cifar10_trainer")
_define(flags.DEFINE_integer, "image_size", "side that a folder's images are resized to; default: 32")
_define(
    flags.DEFINE_float, "validation_fraction", "share of the training images held out; default: the recipe's"
)
_define(flags.DEFINE_integer, "seed", "of the search, and of every trial", Options.seed)
_define(flags.DEFINE_integer, "workers", "processes on this machine that train at the same time; default: 1")
_define(
    flags.DEFINE_string,
    "role",
    f"one of {', '.join(ROLES)}: a chief hands out trials at --chief, and workers, started with the same flags on"
    " any machine, take them from there",
    "alone",
)
_define(
    flags.DEFINE_string,
    "chief",
    f"HOST:PORT of the chief; whoever reaches it can take part, so {LOOPBACK} keeps it to this machine",
)
_define(
    flags.DEFINE_float,
    "lease",
    "seconds without a sign of life before another worker gets a trial",
    Options.lease,
)
_define(
    flags.DEFINE_float,
    "chief_timeout",
    "seconds that a worker waits for an answer of its chief; --patience, the name of this flag in version 1.0.0,"
    " still works",
    Options.chief_timeout,
)
flags.DEFINE_alias("patience", "chief_timeout", flag_values=FLAGS, module_name=COMMAND)
_define(flags.DEFINE_string, "workdir", "the search's folder; default: searches/<recipe>-<tuner>")
_define(flags.DEFINE_boolean, "overwrite", "replace the search that is in --workdir", False)


def base_from_flags() -> Config:
    """The recipe that the search starts from, with what the flags override."""
    recipe = FLAGS.recipe or DEFAULT_FOR.get(FLAGS.dataset, DEFAULT_RECIPE)
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    changes: dict[str, Any] = {
        name: FLAGS[name].value
        for name in ("dataset", "image_size", "epochs", "validation_fraction", "seed")
        if FLAGS[name].value is not None
    }
    return RECIPES[recipe].override(**changes)


def options_from_flags(recipe: str) -> Options:
    values: dict[str, Any] = {f.name: FLAGS[f.name].value for f in fields(Options) if f.name in FLAGS}
    values["workdir"] = FLAGS.workdir or f"searches/{recipe}-{FLAGS.tuner}"
    return Options(**values)


def main(argv: list[str]) -> None:
    if argv:
        raise ConfigError(
            f"unexpected argument {argv[0]!r}; allowed: flags, as --name=value (--help shows them)"
        )
    ranges = parse(FLAGS.space)
    base = base_from_flags()
    options = options_from_flags(base.recipe)

    # A chief trains nothing: its workers shall find the GPUs free.
    leads = options.local_workers or options.role == "chief"
    with environment({"CUDA_VISIBLE_DEVICES": "-1"} if leads else {}):
        cli.import_tensorflow()
    from cifar10_trainer import datasets

    from .tuner import tune

    load = partial(datasets.load, base.dataset, FLAGS.data_dir, base.image_size)
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
        print(f"train it: {shlex.join(command)}")


def run() -> int:
    return cli.run(main, FLAGS, USAGE)


if __name__ == "__main__":
    sys.exit(run())
