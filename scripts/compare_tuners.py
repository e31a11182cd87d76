"""Compares what the tuners spend until a trial passes a target: the same space and images for each, several seeds.

    python scripts/compare_tuners.py --target=0.86 --out=results/tuners-86

Writes the JSON record of each search into --out when the search ends, and then prints the table of all records there.
Started again, it resumes. The searches do not begin with the recipe itself, because that trial would be the same for
every tuner.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from cifar10_trainer import cli
from cifar10_trainer.config import DATASETS
from cifar10_trainer.errors import ConfigError, unknown
from cifar10_trainer.recipes import RECIPES
from results import tuners
from tuning import TUNERS
from tuning.space import DEFAULT_SPACE, Space, parse

if TYPE_CHECKING:
    from cifar10_trainer.datasets import Dataset

USAGE = __doc__ or ""
FLAGS = flags.FlagValues()
cli.define_common(FLAGS)


_define = cli.definer(FLAGS, "compare_tuners.py")

_define(flags.DEFINE_list, "tuners", "the tuners to compare", list(TUNERS))
_define(flags.DEFINE_list, "seeds", "seeds of the searches", ["0", "1", "2"])
_define(flags.DEFINE_integer, "max_trials", "trials of a search", 12)
_define(flags.DEFINE_float, "target", "validation accuracy to pass, 0-1", 0.85)
_define(
    flags.DEFINE_boolean,
    "stop_at_target",
    "end a search at the target; otherwise it spends its whole budget",
    True,
)
_define(flags.DEFINE_list, "space", "hyperparameters, as for python -m tuning.search", list(DEFAULT_SPACE))
_define(flags.DEFINE_string, "recipe", "the recipe around which the tuners search", "fast.85")
_define(flags.DEFINE_float, "epochs", "epochs of a full trial; default: the recipe's", None)
_define(flags.DEFINE_string, "dataset", f"one of {', '.join(DATASETS)}; default: the recipe's", None)
_define(flags.DEFINE_string, "data_dir", "where the images are", None)
_define(flags.DEFINE_string, "out", "folder of the records", "results/tuners")
_define(flags.DEFINE_string, "workdir", "folder of the searches themselves", "searches/compare")


def search(settings: dict[str, Any], space: Space, data: Dataset) -> dict[str, Any]:
    """Runs one search, and returns its record."""
    from cifar10_trainer import runtime
    from tuning import tune

    found = tune(
        space,
        data,
        workdir=str(Path(FLAGS.workdir) / name_of(settings)),
        tuner=settings["tuner"],
        seed=settings["seed"],
        baseline=False,
        **{n: settings[n] for n in ("target", "max_trials", "stop_at_target")},
    )
    assert found  # only a worker's search finds nothing
    return {**tuners.make_record(settings, found.rows), "environment": runtime.describe()}


def name_of(settings: dict[str, Any]) -> str:
    """The name of a search's folder and of its record."""
    return f"{settings['tuner']}-{settings['seed']}"


def main(argv: list[str]) -> None:
    # ---- the flags
    if argv:
        raise ConfigError(
            f"unexpected argument {argv[0]!r}; allowed: flags, as --name=value (--help shows them)"
        )
    for tuner in FLAGS.tuners:
        if tuner not in TUNERS:
            raise unknown("tuner", tuner, TUNERS)
    if not all(s.isdecimal() for s in FLAGS.seeds):
        raise ConfigError(f"seeds is {','.join(FLAGS.seeds)}; allowed: whole numbers, as 0,1,2")
    if FLAGS.recipe not in RECIPES:
        raise unknown("recipe", FLAGS.recipe, RECIPES)
    ranges = parse(FLAGS.space)
    names = ("dataset", "epochs")
    base = RECIPES[FLAGS.recipe].override(**{n: FLAGS[n].value for n in names if FLAGS[n].value is not None})
    common = {"recipe": FLAGS.recipe, "dataset": base.dataset, "epochs": base.epochs, "space": FLAGS.space}
    common |= {n: FLAGS[n].value for n in ("target", "max_trials", "stop_at_target")}
    out = Path(FLAGS.out)
    for record in tuners.read(out):  # a table compares searches of one kind
        for key, value in common.items():
            if record.get(key) != value:
                raise ConfigError(
                    f"{out} has a record of {key} {record.get(key)!r}, not {value!r}; choose another --out"
                )

    # ---- the searches
    cli.import_tensorflow()
    from cifar10_trainer import datasets, files

    data = None
    for seed in map(int, FLAGS.seeds):
        for tuner in FLAGS.tuners:
            settings = {"tuner": tuner, "seed": seed, **common}
            path = out / f"{name_of(settings)}.json"
            if path.exists():
                continue
            data = data or datasets.load(base.dataset, FLAGS.data_dir)
            print(f"\n== {tuner}, seed {seed}")
            record = search(settings, Space(base.override(seed=seed), ranges), data)
            files.write_json(path, record, indent=1)

    # ---- the table
    print(f"\n{tuners.table(tuners.read(out))}")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, USAGE))
