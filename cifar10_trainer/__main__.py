"""python -m cifar10_trainer: flags -> Config -> train_and_evaluate or cross_validate."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from . import cli, cluster, datasets, launch
from .config import ADAPTABLE, CLASS_WEIGHTS, DATASETS, PRECISIONS, RESIZES, STRATEGIES, Config
from .errors import ConfigError, RunError, cut, reason_of
from .files import new_workdir, parse_json, regular_file
from .machine import PROCESS_START
from .process import Log, line_printer
from .recipes import DEFAULT_FOR, DEFAULT_RECIPE, RECIPES, recipe_for_folder

USAGE = """usage: python -m cifar10_trainer [flags]

Trains a recipe on CIFAR-10, or on images of your own, and evaluates it.
Examples:
  python -m cifar10_trainer --epochs=40 --strategy=mirrored
  python -m cifar10_trainer --dataset=digits --epochs=10          (offline, a minute)
  python -m cifar10_trainer --dataset=folder --data_dir=pictures  (pictures/<class>/*)"""

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
_define = cli.definer(FLAGS, "python -m cifar10_trainer")

_define(
    flags.DEFINE_string,
    "recipe",
    f"a name that --list_recipes prints; default: {DEFAULT_RECIPE}, for the digits fast.digits, for a folder by the number"
    " of its images and --image_size",
)
_define(
    flags.DEFINE_string, "config", "config.json of a run or best_config.json of a search, instead of --recipe"
)
_define(flags.DEFINE_boolean, "list_recipes", "print the recipes and exit", False)
_define(flags.DEFINE_string, "dataset", f"one of {', '.join(DATASETS)}; default: the recipe's")
_define(
    flags.DEFINE_string,
    "data_dir",
    "a TFDS directory, an official archive, its extracted folder, or a folder of images; default, for CIFAR-10: "
    "$CIFAR10_TRAINER_DATA, then the caches of TFDS, Keras and torchvision, then a download",
)
_define(
    flags.DEFINE_float,
    "epochs",
    "passes over the training images; default: the recipe's, for a folder by its number of images",
)
_define(
    flags.DEFINE_integer,
    "batch_size",
    "images in a step, over all replicas; default: the recipe's, for a folder by its number of images",
)
_define(flags.DEFINE_float, "learning_rate", "peak learning rate; default: the recipe's")
_define(
    flags.DEFINE_integer,
    "seed",
    "the seed of validation split, initial weights, order and augmentation; default: the recipe's",
)
_define(
    flags.DEFINE_float,
    "validation_fraction",
    "share of the training images held out; default: the recipe's, of a small folder up to a fifth",
)
_define(
    flags.DEFINE_boolean,
    "final_fit",
    "hold out nothing: train on all training images and keep the last weights; where a folder has val/, keep those that are best on it",
    False,
)
_define(
    flags.DEFINE_integer,
    "folds",
    "k-fold cross-validation: train K times, each time with another part of the training images held out",
)
_define(
    flags.DEFINE_string,
    "resize",
    f"how a folder's images are resized, one of {', '.join(RESIZES)}: squash the whole image, crop to its middle, or pad "
    "with black; default: squash",
)
_define(
    flags.DEFINE_string,
    "class_weights",
    f"one of {', '.join(CLASS_WEIGHTS)}; balanced: all classes count the same in the loss, whatever their numbers of images",
)
cli.define_folder_options(_define)
_define(flags.DEFINE_integer, "image_size", "side that a folder's images are resized to; default: 32")
_define(
    flags.DEFINE_string,
    "strategy",
    f"one of {', '.join(STRATEGIES)}; default: the recipe's, auto: multi_worker with TF_CONFIG, mirrored with several GPUs, else none",
)
_define(
    flags.DEFINE_list,
    "workers",
    "HOST:PORT of each worker, separated by commas, the same list for all; they train one run together. Instead of TF_CONFIG",
)
_define(flags.DEFINE_integer, "worker_index", "with --workers: which of them this process is, from 0")
_define(
    flags.DEFINE_integer,
    "local_workers",
    "start so many workers on this machine's CPU, as a cluster of their own, and wait for them",
    lower_bound=1,
)
_define(
    flags.DEFINE_integer,
    "cpu_replicas",
    "train with --strategy=mirrored on so many logical devices of this machine's CPU",
    lower_bound=1,
    upper_bound=64,
)
_define(
    flags.DEFINE_float,
    "cluster_timeout",
    "seconds that workers wait for one another at the start",
    cluster.TIMEOUT,
    lower_bound=1,
)
_define(
    flags.DEFINE_boolean,
    "allow_replica_change",
    "resume a run on another number of replicas or workers, at the same --batch_size over all of them",
    False,
)
_define(
    flags.DEFINE_string,
    "precision",
    f"one of {', '.join(PRECISIONS)}; default: the recipe's, auto: on GPUs bfloat16 where they have it, float16 where they only "
    "have that; on a CPU bfloat16 where it is measured to be faster (once a machine; the run prints the file with the "
    "answer; delete it to measure again); else float32",
)
_define(flags.DEFINE_boolean, "sync_batch_norm", "compute batch-norm statistics over all replicas", None)
cli.define_set(
    _define,
    "--set early_stopping=null --set optimizer.momentum=0.9 --set 'options.filters=[32,128,128]'",
)
_define(
    flags.DEFINE_string,
    "workdir",
    "the run folder; an unfinished run of the same configuration in it is resumed; default: runs/<recipe>-<time>",
)
_define(flags.DEFINE_boolean, "overwrite", "replace the run that is in --workdir", False)
_define(
    flags.DEFINE_float,
    "save_seconds",
    "the most seconds of training that a killed process or a power failure loses, more where a save takes over a quarter of them; default: 60",
    lower_bound=0,
    upper_bound=86_400,
)
_define(flags.DEFINE_boolean, "quiet", "print nothing but errors", False)
_define(flags.DEFINE_boolean, "verbose", "show the progress bar in a file or a pipe, too", False)
_define(flags.DEFINE_boolean, "hdf5", "write the model as model.h5, too", False)


# of the largest --config; the class names of a run with thousands of classes are in it
CONFIG_BYTES = 4 << 20


def read_config(path: str) -> Config:
    """The Config in a JSON file: config.json of a run, or best_config.json of a search. Raises ConfigError."""
    name = f"--config={cut(path)}"
    try:
        values = parse_json(regular_file(path, CONFIG_BYTES).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {reason_of(error)}") from error
    except ValueError as error:
        raise ConfigError(
            f"{name} is not a JSON file: {error}; allowed: config.json of a run, or best_config.json of a search"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} holds {type(values).__name__}; allowed: a JSON object")
    if "own_model" in values:
        raise ConfigError(
            f"{name} is of a run with a model of its own; allowed: train(config, model=...) in Python"
        )
    return Config.from_record(values)


def default_recipe(changes: Mapping[str, Any], log: Log) -> str:
    """The recipe where no flag names one. For a folder it depends on the images in it, and `log` receives why.

    changes: what the flags set.
    """
    dataset, side = changes.get("dataset"), changes.get("image_size") or 32
    begun = _unfinished_recipe() if dataset == "folder" else None
    if begun is not None:
        log(f"recipe: {begun}: that of the unfinished run in {FLAGS.workdir}")
        return begun
    size = datasets.folder_size(FLAGS.data_dir, FLAGS.workdir) if dataset == "folder" else None
    if size is None or not isinstance(side, int):  # what it is not, the Config refuses
        return DEFAULT_FOR.get(str(dataset), DEFAULT_RECIPE)
    name, reason = recipe_for_folder(size.images / size.classes, side)
    log(f"recipe: {name}: {reason}")
    return name


def _unfinished_recipe() -> str | None:
    """The recipe of the unfinished run on a folder in --workdir, which its pictures of today might not suggest."""
    if FLAGS.workdir is None or FLAGS.overwrite:
        return None
    from .run_folder import FOLDS_FILE, RunFolder, fold_folder

    run = RunFolder(FLAGS.workdir)
    finished = run.is_finished()
    if FLAGS.folds is not None:
        finished, run = (run.path / FOLDS_FILE).exists(), fold_folder(run.path, FLAGS.folds, 0)
    recipe = None
    with contextlib.suppress(RunError, OSError):
        recipe = run.read_config().get("recipe")
    return recipe if isinstance(recipe, str) and recipe in RECIPES and not finished else None


def _changes() -> dict[str, Any]:
    """What the flags change in a recipe or a file, as `Config.override` takes it. Raises ConfigError."""
    changes: dict[str, Any] = {
        name: FLAGS[flag].value
        for flag, name in {
            "dataset": "dataset",
            "image_size": "image_size",
            "resize": "resize",
            "class_weights": "class_weights",
            "epochs": "epochs",
            "batch_size": "batch_size",
            "seed": "seed",
            "learning_rate": "optimizer__learning_rate",
            "validation_fraction": "validation_fraction",
            "strategy": "strategy",
            "precision": "precision",
            "sync_batch_norm": "synchronize_batch_norm",
        }.items()
        if FLAGS[flag].value is not None
    }
    if FLAGS.final_fit:
        if "validation_fraction" in changes or _is_set("validation_fraction"):
            raise ConfigError("--final_fit and --validation_fraction; allowed: one of the two")
        changes |= {"validation_fraction": None, "validation_fold": 0}  # --config may be that of a fold
    elif changes.get("validation_fraction") == 0:
        raise ConfigError(
            "validation_fraction is 0; allowed: greater than 0 and less than 1, or --final_fit to train on every image"
        )
    changes.update(cli.parse_settings(FLAGS.set))
    if FLAGS.cpu_replicas is not None and changes.setdefault("strategy", "mirrored") != "mirrored":
        raise ConfigError(
            f"--cpu_replicas={FLAGS.cpu_replicas} and --strategy={changes['strategy']}; allowed: --strategy=mirrored"
        )
    return changes


def config_from_flags(log: Log = lambda text: None) -> Config:
    """The recipe or the file, with the changes that the flags ask for. Raises ConfigError."""
    if FLAGS.recipe and FLAGS.config:
        raise ConfigError(
            f"--recipe={cut(FLAGS.recipe)} and --config={cut(FLAGS.config)}; allowed: one of the two"
        )
    changes = _changes()
    if FLAGS.config:
        config = read_config(FLAGS.config)
    else:
        config = RECIPES[FLAGS.recipe or default_recipe(changes, log)]
    if changes.get("dataset", config.dataset) == "folder" and not FLAGS.config:
        # Whoever has 30 images, or 300,000, should not have to know what suits them. What a flag sets is not changed.
        changes.setdefault("adapt", [name for name in ADAPTABLE if name not in changes])
    return config.override(**changes)


def list_recipes() -> None:
    """Prints one line for each recipe: name, parameters, epochs, claim, source."""
    rows = [("recipe", "parameters", "epochs", "claim", "source")]
    for name, c in RECIPES.items():
        claim = "-" if c.origin.claim is None else f"{100 * c.origin.claim:.2f}%"
        rows.append((name, f"{c.origin.parameters:,}", f"{c.epochs:g}", claim, c.origin.source))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]
        print("  ".join(cells))


def _is_set(name: str) -> bool:
    """Whether --set sets this field of the Config."""
    return any(setting.partition("=")[0] == name for setting in FLAGS.set)


def check_folds() -> None:
    """Raises ConfigError where a flag is given that cross-validation does not have."""
    if FLAGS.folds is None:
        return
    several = ("workers", "local_workers")
    given = [name for name in ("final_fit", "hdf5") if FLAGS[name].value]
    given += [name for name in ("validation_fraction", *several) if FLAGS[name].present]
    fields = ("validation_fraction", "validation_split", "validation_fold")
    given += [f"set {name}" for name in fields if _is_set(name)]
    if given:
        raise ConfigError(f"--folds and --{given[0]}; allowed: one of the two")


def join_flags(config: Config) -> None:
    """Turns --workers and --worker_index into TF_CONFIG, which TensorFlow reads. Raises ConfigError."""
    several = [
        f"--{name}" for name in ("workers", "local_workers", "cpu_replicas") if FLAGS[name].value is not None
    ]
    if len(several) > 1:
        raise ConfigError(f"{' and '.join(several)}; allowed: one of them")
    if (FLAGS.workers is None) != (FLAGS.worker_index is None):
        raise ConfigError(
            "--workers and --worker_index go together; allowed: both, neither, or --local_workers=N, which starts N workers here"
        )
    if FLAGS.workers is None and FLAGS.local_workers is None:
        return
    if os.environ.get("TF_CONFIG"):
        raise ConfigError(f"{several[0]} is given, and TF_CONFIG is set; allowed: one of the two")
    if config.strategy not in ("auto", "multi_worker"):
        raise ConfigError(
            f"{several[0]} and --strategy={config.strategy}; allowed: --strategy=multi_worker, or auto"
        )
    if FLAGS.workers is not None:
        os.environ["TF_CONFIG"] = cluster.set_tf_config(FLAGS.workers, FLAGS.worker_index, "--workers")


def meet_workers(config: Config) -> None:
    """Meets the other workers of a cluster, before TensorFlow's import, so that nobody waits for a wrong flag."""

    def log(text: str) -> None:
        left_over = config.strategy == "auto" and FLAGS.workers is None
        if not FLAGS.quiet:
            print(
                f"{text} (named by TF_CONFIG; --strategy=none ignores it)" if left_over else text, flush=True
            )

    team = cluster.join_workers(config.strategy, FLAGS.cluster_timeout, log)
    if team is not None:
        team.agree(config=config.to_dict())


def start_local_workers(config: Config) -> None:
    """The command again, in --local_workers processes. Raises their error."""
    argv = launch.arguments_without(sys.argv[1:], "local_workers")
    if len(argv) == len(sys.argv) - 1:  # the workers would read it again
        raise ConfigError("--local_workers stands in a --flagfile; allowed: on the command line")
    if FLAGS.workdir is None:  # one for all
        argv.append(f"--workdir={new_workdir(config.recipe)}")
    launch.run_local_workers(FLAGS.local_workers, argv)


def import_tensorflow() -> None:
    """Imports it, and makes the devices that --cpu_replicas asks for."""
    cli.import_tensorflow()
    if FLAGS.cpu_replicas is not None:
        from . import runtime

        runtime.split_cpu(FLAGS.cpu_replicas)


def main() -> None:
    if FLAGS.list_recipes:
        list_recipes()
        return
    if FLAGS.quiet and FLAGS.verbose:
        raise ConfigError("--quiet and --verbose; allowed: one of the two")
    config = config_from_flags(line_printer(not FLAGS.quiet))
    check_folds()
    join_flags(config)
    if FLAGS.local_workers is not None:
        start_local_workers(config)
        return
    verbose = 0 if FLAGS.quiet else 1 if FLAGS.verbose else "auto"
    where: dict[str, Any] = {"data_dir": FLAGS.data_dir, "overwrite": FLAGS.overwrite, "verbose": verbose}
    if FLAGS.save_seconds is not None:
        where["save_seconds"] = FLAGS.save_seconds
    if options := cli.folder_options(FLAGS):
        where["folder_options"] = options
    where["allow_replica_change"] = FLAGS.allow_replica_change
    datasets.read_ahead(config.dataset, FLAGS.data_dir)
    if FLAGS.folds is None:
        meet_workers(config)
        import_tensorflow()
        from .training import train_and_evaluate

        for name in ("hdf5", "cluster_timeout"):
            where[name] = FLAGS[name].value
        train_and_evaluate(config, FLAGS.workdir, since=PROCESS_START, **where)
        return
    import_tensorflow()
    from .cross_validation import cross_validate

    cross_validate(config, FLAGS.folds, FLAGS.workdir, since=PROCESS_START, **where)


def command() -> int:
    return cli.run(main, FLAGS, USAGE)


if __name__ == "__main__":
    sys.exit(command())
