"""Which tuner reaches a target with the least compute: the same space and images for each, several seeds.

    python scripts/compare_tuners.py --target=0.86 --out=results/tuners-86

Writes one JSON record a search into --out as soon as it is over, and prints the table of all records there. Started
again, it goes on where it was. The searches do without the recipe itself as first trial, which would be
the same for every tuner.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from cifar10_trainer import cli
from cifar10_trainer.config import DATASETS
from cifar10_trainer.errors import ConfigError, unknown
from cifar10_trainer.recipes import RECIPES
from tuning import TUNERS
from tuning.space import DEFAULT_SPACE, Space, parse

USAGE = __doc__ or ""
FLAGS = flags.FlagValues()
cli.define_common(FLAGS)


def _define(kind, name, default, text):
    kind(name, default, text, flag_values=FLAGS, module_name="compare_tuners.py")


_define(flags.DEFINE_list, "tuners", list(TUNERS), "the tuners to compare")
_define(flags.DEFINE_list, "seeds", ["0", "1", "2"], "of the searches")
_define(flags.DEFINE_integer, "max_trials", 12, "of a search")
_define(flags.DEFINE_float, "target", 0.85, "validation accuracy to pass")
_define(flags.DEFINE_boolean, "stop_at_target", True, "end a search there; otherwise it spends its budget")
_define(flags.DEFINE_list, "space", list(DEFAULT_SPACE), "hyperparameters, as for python -m tuning.search")
_define(flags.DEFINE_string, "recipe", "fast.85", "around which they are searched")
_define(flags.DEFINE_float, "epochs", None, "of a full trial; default: the recipe's")
_define(flags.DEFINE_string, "dataset", None, f"one of {', '.join(DATASETS)}; default: the recipe's")
_define(flags.DEFINE_string, "data_dir", None, "where the images are")
_define(flags.DEFINE_string, "out", "results/tuners", "folder of the records")
_define(flags.DEFINE_string, "workdir", "searches/compare", "folder of the searches themselves")


def make_record(settings: dict[str, Any], rows: Sequence[Any]) -> dict[str, Any]:
    """The record of a search, from its rows: what it spent until the target, or in all."""
    done = sorted((r for r in rows if r.ended is not None), key=lambda r: r.ended)
    trials, pflop, first = [], 0.0, None
    for r in done:
        pflop += r.metrics.get("pflop", 0.0)
        accuracy = r.metrics.get("val_accuracy")
        trials.append(
            {
                "trial": r.trial,
                "status": r.status,
                "val_accuracy": accuracy,
                "epochs": r.metrics.get("epochs"),
                "pflop": r.metrics.get("pflop"),
                "ended": round(r.ended, 2),
                "values": r.values,
            }
        )
        if first is None and accuracy is not None and accuracy >= settings["target"]:
            first = {"trials": len(trials), "pflop": pflop, "seconds": round(r.ended, 2)}
    spent = first or {"trials": len(trials), "pflop": pflop, "seconds": trials[-1]["ended"]}
    best = max((t["val_accuracy"] or 0.0 for t in trials), default=0.0)
    return {
        **settings,
        "reached": first is not None,
        "spent": spent,
        "best_val_accuracy": best,
        "runs": trials,
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row a tuner: searches that reached the target, and the compute per success.

    That is what all of its searches spent, up to the target or to the end of the budget, over the number of
    successes: what it takes on average when a search that fails is followed by another one.
    """
    lines = [["tuner", "reached", "trials", "PFLOP", "seconds", "PFLOP of each", "best accuracy"]]
    for tuner in dict.fromkeys(r["tuner"] for r in records):
        own = [r for r in records if r["tuner"] == tuner]
        hits = sum(r["reached"] for r in own)
        cost = {
            k: sum(r["spent"][k] for r in own) / hits if hits else None
            for k in ("trials", "pflop", "seconds")
        }
        each = " ".join(f"{r['spent']['pflop']:.3g}" + ("" if r["reached"] else "+") for r in own)
        best = [100 * r["best_val_accuracy"] for r in own]
        deviation = f" ± {statistics.stdev(best):.2f}" if len(best) > 1 else ""
        numbers = [
            "-" if cost[k] is None else f"{cost[k]:{f}}"
            for k, f in zip(cost, (".1f", ".3g", ".0f"), strict=True)
        ]
        lines.append(
            [tuner, f"{hits} of {len(own)}", *numbers, each, f"{statistics.fmean(best):.2f}%{deviation}"]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)).rstrip() for x in lines)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records in `folder`, in the order of TUNERS and of the seeds."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(records, key=lambda r: (list(TUNERS).index(r["tuner"]), r["seed"]))


def main(argv: list[str]) -> None:
    # ---- what is asked for
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
    for record in read_records(out):  # one table is of one kind of search
        for key, value in common.items():
            if record.get(key) != value:
                raise ConfigError(
                    f"{out} has a record of {key} {record.get(key)!r}, not {value!r}; choose another --out"
                )

    # ---- the searches
    cli.import_tensorflow()
    from cifar10_trainer import datasets, files, runtime
    from tuning import tune

    data = None
    for seed in map(int, FLAGS.seeds):
        for tuner in FLAGS.tuners:
            settings = {"tuner": tuner, "seed": seed, **common}
            path = out / f"{tuner}-{seed}.json"
            if path.exists():
                continue
            data = data or datasets.load(base.dataset, FLAGS.data_dir)
            print(f"\n== {tuner}, seed {seed}")
            found = tune(
                Space(base.override(seed=seed), ranges),
                data,
                workdir=str(Path(FLAGS.workdir) / path.stem),
                tuner=tuner,
                seed=seed,
                baseline=False,
                **{n: common[n] for n in ("target", "max_trials", "stop_at_target")},
            )
            assert found  # it is no worker
            record = {**make_record(settings, found.rows), "environment": runtime.describe()}
            files.write_atomic(path, json.dumps(record, indent=1) + "\n")

    # ---- the table
    print(f"\n{table(read_records(out))}")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, USAGE))
