"""Trains recipes with their own settings, and shows each result beside its record, or keeps a record where there is none.

    python scripts/reproduce.py practical.baseline vgg.1      # these recipes
    python scripts/reproduce.py --source=2                    # the recipes of tutorial 2 that have no record
    python scripts/reproduce.py --all --seeds=3               # every recipe, its runs without a record
    python scripts/reproduce.py fast.85 --epochs=7            # the project's own recipes take any number of epochs
    python scripts/reproduce.py --record=runs/mine            # keeps the record of a finished run of the main command
    python scripts/reproduce.py --table                       # only the tables, from the records

An interrupted run is resumed. Runs are in runs/reproduce/<recipe>-<epochs>-<seed>, records in
results/runs/<recipe>-<epochs>-<seed>.json; the tables of README.md and results/README.md are made from the records.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags

from cifar10_trainer import RECIPES, Config, ConfigError, RunError, cli, process
from results import records, tables

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
flags.DEFINE_boolean("all", False, "every recipe, its runs without a record", flag_values=FLAGS)
flags.DEFINE_integer(
    "source", None, "every recipe of this tutorial, 1-5, its runs without a record", flag_values=FLAGS
)
flags.DEFINE_integer("seeds", 1, "runs of each recipe, seeds 0 to n - 1", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float(
    "epochs",
    None,
    "at most this many epochs of a tutorial's recipe, and the table shows that it was cut; exactly this many of the"
    " project's own recipes that are named",
    flag_values=FLAGS,
)
flags.DEFINE_string("data_dir", None, "where the images are", flag_values=FLAGS)
flags.DEFINE_string("record", None, "a finished run folder to keep a record of", flag_values=FLAGS)
flags.DEFINE_boolean("table", False, "only rewrite the tables", flag_values=FLAGS)


def chosen(names: list[str]) -> list[str]:
    """The recipes that the command line names, in the order of RECIPES."""
    for name in names:
        if RECIPES[name].dataset == "folder":
            raise ConfigError(
                f"{name} trains on a folder of pictures; allowed: recipes for CIFAR-10 or the digits"
            )
    if FLAGS.source is not None:
        names = names + [n for n, c in RECIPES.items() if f"tutorial {FLAGS.source}," in c.origin.source]
        if not names:
            raise ConfigError(f"source is {FLAGS.source}; allowed: 1 to 5")
    if FLAGS.all:
        names = [n for n, c in RECIPES.items() if c.dataset != "folder"]
    if not names:
        raise ConfigError(
            "no recipe; allowed: names of recipes, --source=1..5, --all, --record=RUN or --table"
        )
    return [n for n in RECIPES if n in names]


def length(name: str, named: bool) -> float | None:
    """The number of epochs that --epochs sets for a recipe. None: the recipe's own number.

    named: whether the command line names the recipe itself.
    """
    given, usual = FLAGS.epochs, RECIPES[name].epochs
    if given is None or given == usual:
        return None
    taken = named if records.is_own(name) else given < usual
    return given if taken else None


def run(name: str, seed: int, epochs: float | None, named: bool) -> None:
    """Trains one recipe with one seed, or resumes its run, and keeps its record or shows the result beside it.

    epochs: None for the recipe's own number.
    named: whether the command line names the recipe itself; if not, a run that has a record is not made again.
    """
    config: Config = RECIPES[name].override(seed=seed)
    if epochs is not None:
        config = config.override(epochs=epochs)
    record = records.path_of(name, config.epochs, seed)
    if record.exists() and not named:
        print(f"{name}, seed {seed}: has its record")
        return
    from cifar10_trainer.run_folder import RunFolder

    workdir, at = records.ROOT / "runs" / "reproduce" / record.stem, records.commit()
    if RunFolder(workdir).is_finished():
        print(f"{workdir.relative_to(records.ROOT)} is finished; delete it to train again")
        at = ""  # of the code of then
    else:
        train(config, workdir)
    if record.exists():
        print(beside(json.loads(record.read_text()), workdir))
        return
    shown = f"python scripts/reproduce.py {name}"
    if epochs is not None:
        shown += f" --epochs={epochs:g}"
    print(f"record: {records.keep(workdir, shown, at).relative_to(records.ROOT)}")


def train(config: Config, workdir: Path) -> None:
    """Trains a recipe in a process of its own, because the time of a run counts from the start of its process.

    Resumes the run in the folder `workdir`.
    """
    command = [sys.executable, "-m", "cifar10_trainer", f"--recipe={config.recipe}", f"--seed={config.seed}"]
    command += [f"--epochs={config.epochs:g}", f"--workdir={workdir}"]
    if FLAGS.data_dir and config.dataset != "digits":  # the digits are embedded
        command.append(f"--data_dir={Path(FLAGS.data_dir).absolute()}")
    status, stopped_by = process.call(command, cwd=records.ROOT)
    run = f"{config.recipe} with seed {config.seed}"
    if status:
        raise process.failure(run, stopped_by)
    if stopped_by:
        raise RunError(f"stopped by {stopped_by} when {run} was done; repeat the command")


def beside(record: records.Record, workdir: Path) -> str:
    """The result of the finished run in `workdir` beside the record of that run."""
    from cifar10_trainer.run_folder import RunFolder

    run = RunFolder(workdir)
    config, metrics = records.read_run(run)
    now = records.record_of(run, config, metrics, None, "")
    return (
        f"{metrics['recipe']}, seed {metrics['seed']}: {tables.outcome(now)}\n"
        f"its record of {record['date']}: {tables.outcome(record)}; it stays,"
        f" --record={workdir.relative_to(records.ROOT)} replaces it"
    )


def main(argv: list[str]) -> None:
    others = [f"--{name}" for name in ("all", "source", "seeds", "epochs", "data_dir") if FLAGS[name].present]
    others += argv + (["--table"] if FLAGS.record and FLAGS.table else [])
    if others and (FLAGS.record or FLAGS.table):
        raise ConfigError(
            f"--record or --table with {others[0]}; allowed: one of the two, or names of recipes and the other flags"
        )
    if FLAGS.record:  # a run of the code of then
        print(f"record: {records.keep(Path(FLAGS.record), at='').relative_to(records.ROOT)}")
    elif not FLAGS.table:
        for name in chosen(argv):
            for seed in range(FLAGS.seeds):
                run(name, seed, length(name, name in argv), name in argv)
                tables.publish_results(records.load())
    tables.publish_results(records.load())


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
