"""Trains recipes at their own settings, keeps a JSON record of each run, and rewrites the README's tables of results.

    python scripts/reproduce.py practical.baseline vgg.1      # these recipes
    python scripts/reproduce.py --source=2 --epochs=20        # all of tutorial 2, its longer recipes cut to 20 epochs
    python scripts/reproduce.py --all --seeds=3
    python scripts/reproduce.py fast.85 --epochs=7            # the project's own take any number of epochs
    python scripts/reproduce.py --record=runs/mine            # takes up a finished run of the main command
    python scripts/reproduce.py --table                       # only the tables, from the records

A run that was cut is resumed, one that has its record is not run again. Records are results/runs/<recipe>-<epochs>-<seed>.json.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from absl import flags

from cifar10_trainer import RECIPES, Config, ConfigError, RunError, cli
from cifar10_trainer.errors import unknown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "runs"
TUTORIALS = (1, 2, 3, 4, 5)

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
flags.DEFINE_boolean("all", False, "every recipe", flag_values=FLAGS)
flags.DEFINE_integer("source", None, "every recipe of this tutorial, 1-5", flag_values=FLAGS)
flags.DEFINE_integer("seeds", 1, "runs of each recipe, seeds 0 to n - 1", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float(
    "epochs",
    None,
    "at most this many epochs of a tutorial's recipe, and the table says so; of the project's own recipes that are"
    " named, this many",
    flag_values=FLAGS,
)
flags.DEFINE_string("data_dir", None, "where the images are", flag_values=FLAGS)
flags.DEFINE_string("record", None, "a finished run folder to keep a record of", flag_values=FLAGS)
flags.DEFINE_boolean("table", False, "only rewrite the tables", flag_values=FLAGS)

# What a record leaves out of config.json: where things are on one machine.
PRIVATE = ("data_dir", "data_source", "class_names", "command")
# In what a recorded run may differ from its recipe.
FREE = ("epochs", "seed", "strategy", "precision")


def chosen(names: list[str]) -> list[str]:
    """The recipes that the command line names, in the order of RECIPES."""
    for name in names:
        if name not in RECIPES:
            raise unknown("recipe", name, RECIPES)
    if FLAGS.source is not None:
        names = names + [n for n, c in RECIPES.items() if f"tutorial {FLAGS.source}," in c.origin.source]
        if not names:
            raise ConfigError(f"source is {FLAGS.source}; allowed: 1 to 5")
    if FLAGS.all:
        names = list(RECIPES)
    if not names:
        raise ConfigError(
            "no recipe; allowed: names of recipes, --source=1..5, --all, --record=RUN or --table"
        )
    return [n for n in RECIPES if n in names]


def keep(workdir: Path, command: str | None = None, at: str | None = None) -> Path:
    """Writes the record of a finished run, and returns its path.

    command: what makes such a run; None: the run's own command. at: the commit that made it; None: the present one.
    Raises RunError where the run is not finished, or not of its recipe as it is now.
    """
    from cifar10_trainer import files
    from cifar10_trainer.run_folder import RunFolder

    run = RunFolder(workdir)
    try:
        config, metrics = (json.loads(file.read_text()) for file in (run.config_file, run.metrics_file))
        ran = Config.from_record(dict(config))
    except OSError as error:
        raise RunError(f"{workdir} holds no finished run: {error.strerror}: {error.filename}") from error
    except (ValueError, TypeError) as error:
        raise RunError(f"{workdir} holds a damaged run ({error}); allowed: one that is whole") from error
    if ran.recipe not in RECIPES:
        raise unknown("recipe", ran.recipe, RECIPES)
    free = {name: getattr(ran, name) for name in FREE}
    recipe = RECIPES[ran.recipe].override(**free).to_dict()
    different = [key for key, value in ran.to_dict().items() if recipe[key] != value]
    if different:
        key = different[0]
        raise RunError(
            f"{workdir} holds a run of {ran.recipe} with {key} {getattr(ran, key)!r}, where the recipe has {recipe[key]!r};"
            f" allowed: the recipe as it is, but for {', '.join(FREE)}; delete {workdir} to run it again"
        )
    record = {
        "date": time.strftime("%Y-%m-%d", time.localtime(run.metrics_file.stat().st_mtime)),
        "commit": commit() if at is None else at,
        # Where the images are is one machine's own affair.
        "command": command or re.sub(r" --?data_dir[= ]\S+", "", config["command"]),
        "environment": config.pop("environment"),
        "metrics": metrics,
        "config": {k: v for k, v in config.items() if k not in PRIVATE},
        "history": run.read_history(),
    }
    path = RESULTS / f"{metrics['recipe']}-{config['epochs']:g}-{metrics['seed']}.json"
    if path.exists():
        before = json.loads(path.read_text())["metrics"]
        for name in ("strategy", "precision"):
            if before.get(name) != metrics.get(name):
                raise RunError(
                    f"{path.name} is of a run with {name} {before.get(name)}, {workdir} of one with {metrics.get(name)};"
                    " allowed: the same; delete the record to replace it"
                )
    RESULTS.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, json.dumps(record, indent=1) + "\n")
    return path


def commit() -> str:
    """The checkout's commit, short, with "-modified" where the code is not quite it; empty where there is none."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    try:
        modified = git("status", "--porcelain", "cifar10_trainer", "tuning", "scripts")
        return git("rev-parse", "--short", "HEAD") + ("-modified" if modified else "")
    except FileNotFoundError:  # no git on this machine
        return ""


def load_records() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


Group = list[dict[str, Any]]  # the records of one recipe at one number of epochs


def grouped(records: list[dict[str, Any]]) -> dict[tuple[str, float], Group]:
    """The records by recipe and epochs, in the order of RECIPES."""
    groups: dict[tuple[str, float], Group] = defaultdict(list)
    for record in records:
        groups[record["metrics"]["recipe"], record["config"]["epochs"]].append(record)
    order = {name: i for i, name in enumerate(RECIPES)}
    return dict(sorted(groups.items(), key=lambda g: (order.get(g[0][0], len(order)), g[0][1])))


def markdown(head: list[str], left: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the columns in `left` are texts, the others numbers."""
    rule = ["---" if name in left else "--:" for name in head]
    return "\n".join(
        ["| " + " | ".join(head) + " |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(r)} |" for r in rows)]
    )


def table(records: list[dict[str, Any]]) -> str:
    """A row for each recipe and number of epochs."""
    rows = []
    for (name, _), group in grouped(records).items():
        claim = RECIPES[name].origin.claim if name in RECIPES else None
        views = any(r["metrics"]["views"] > 1 for r in group)
        rows.append(
            [
                f"`{name}`",
                f"{group[0]['metrics']['params']:,}",
                epochs_run(name, group),
                "" if claim is None else f"{100 * claim:.2f}",
                spread([r["metrics"]["best_val_accuracy"] for r in group]),
                spread([r["metrics"]["test_accuracy"] for r in group]),
                spread([r["metrics"]["test_accuracy_views"] for r in group]) if views else "",
                duration(statistics.median(r["metrics"]["total_seconds"] for r in group)),
                "; ".join(dict.fromkeys(hardware(r) for r in group)),
                command_of(group),
            ]
        )
    head = ["recipe", "parameters", "epochs", "claimed", "validation", "test", "averaged views", "time"]
    return markdown([*head, "hardware", "command"], ["recipe", "hardware", "command"], rows)


def held_out(group: Group) -> float:
    """Mean validation accuracy of the runs, 0 where they have none."""
    return statistics.mean(r["metrics"]["best_val_accuracy"] or 0 for r in group)


def versus(records: list[dict[str, Any]]) -> str:
    """A row for each tutorial: its best claim, and the project's own recipe with a tenth of the arithmetic at most.

    Arithmetic is three forward passes of the convolutions and dense layers for each training image; the tutorial's
    is that of all its epochs. The project's own is the best on validation images of those that fit; what holds out
    none comes last. A row without records is left out.
    """
    groups, rows = grouped(records), []
    for tutorial in TUTORIALS:
        names = [n for n, c in RECIPES.items() if c.origin.source.startswith(f"tutorial {tutorial},")]
        best = max(RECIPES[n].origin.claim or 0 for n in names)
        theirs = [k for k in groups if k[0] in names and (RECIPES[k[0]].origin.claim or 0) == best]
        if not theirs:
            continue
        name, epochs = max(theirs, key=lambda k: k[1] / RECIPES[k[0]].epochs)
        of, budget = RECIPES[name].epochs, pflop(groups[name, epochs], RECIPES[name].epochs)
        run = max(lengths(groups[name, epochs]))
        fitting = {k: pflop(g) for k, g in groups.items() if is_own(k[0]) and pflop(g) <= budget / 10}
        if not fitting:
            continue
        ours = max(fitting, key=lambda k: (held_out(groups[k]), fitting[k]))
        measured = spread([r["metrics"]["test_accuracy"] for r in groups[name, epochs]])
        rows.append(
            [
                str(tutorial),
                f"`{name}`",
                f"{100 * best:.2f}" if best else "none",
                measured if run >= of else f"{measured}, {run:g} of {of:g} epochs",
                f"{budget:.3g}",
                f"`{ours[0]}`, {ours[1]:g} epochs",
                spread([r["metrics"]["test_accuracy"] for r in groups[ours]]),
                f"{fitting[ours]:.3g}",
                f"{100 * fitting[ours] / budget:.1f}%",
            ]
        )
    head = [
        "tutorial",
        "its best recipe",
        "claimed",
        "measured",
        "its PFLOP",
        "ours",
        "test",
        "our PFLOP",
        "share",
    ]
    return markdown(head, ["tutorial", "its best recipe", "ours"], rows)


def is_own(name: str) -> bool:
    """Whether the recipe is this project's own, for CIFAR-10: those anneal over any number of epochs."""
    config = RECIPES.get(name)
    return (
        config is not None and config.dataset == "cifar10" and config.origin.source.startswith("this project")
    )


def lengths(group: Group) -> list[float]:
    """How many epochs each run took: fewer than it was given where it stopped early."""
    return [min(r["config"]["epochs"], r["metrics"]["epochs"]) for r in group]


def pflop(group: Group, epochs: float | None = None) -> float:
    """Mean arithmetic of the runs, in PFLOP; as it would be over `epochs`."""
    each = [r["metrics"]["pflop"] * (epochs or n) / n for r, n in zip(group, lengths(group), strict=True)]
    return statistics.mean(each)


def epochs_run(name: str, group: Group) -> str:
    """Epochs run of epochs claimed."""
    run, given = sorted(lengths(group)), group[0]["config"]["epochs"]
    text = f"{run[0]:g}" if run[0] == run[-1] else f"{run[0]:g}-{run[-1]:g}"
    of = given if name not in RECIPES or is_own(name) else RECIPES[name].epochs
    if run[0] < of:
        text += f" of {of:g}"
    return f"{text}, stopped early" if run[0] < given else text


def hardware(record: dict[str, Any]) -> str:
    environment = record["environment"]
    return environment["processor"] if environment["gpus"] == "none" else environment["gpus"]


def command_of(group: Group) -> str:
    """What makes all the records of a row."""
    text = group[0]["command"]
    if len(group) > 1 and text.startswith("python scripts/reproduce.py"):
        text += f" --seeds={len(group)}"
    return f"`{text}`"


def spread(values: list[float | None]) -> str:
    """Mean and, where there are several, standard deviation and number of accuracies, in percent."""
    known = [100 * v for v in values if v is not None]
    if not known:
        return ""
    if len(known) == 1:
        return f"{known[0]:.2f}"
    return f"{statistics.mean(known):.2f} ± {statistics.stdev(known):.2f} ({len(known)})"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def rewrite(path: Path, name: str, content: str) -> None:
    """Puts `content` between the lines <!-- name --> and <!-- /name --> of a Markdown file."""
    from cifar10_trainer import files

    text = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise RunError(f"{path} has no <!-- {name} --> ... <!-- /{name} -->")
    files.write_atomic(path, pattern.sub(lambda m: m[1] + content + "\n" + m[2], text))


def rewrite_tables() -> None:
    records = load_records()
    rewrite(ROOT / "README.md", "results", table(records))
    rewrite(ROOT / "README.md", "versus", versus(records))


def length(name: str, named: bool) -> float | None:
    """The number of epochs that --epochs means for a recipe; None: its own."""
    given, usual = FLAGS.epochs, RECIPES[name].epochs
    if given is None or given == usual:
        return None
    taken = named if is_own(name) else given < usual
    return given if taken else None


def run(name: str, seed: int, epochs: float | None) -> None:
    """Trains one recipe with one seed, or goes on where it was cut, and keeps the record.

    epochs: None for the recipe's own. In a process of its own, because a run's clock starts with its process.
    """
    config: Config = RECIPES[name].override(seed=seed)
    if epochs is not None:
        config = config.override(epochs=epochs)
    if (RESULTS / f"{name}-{config.epochs:g}-{seed}.json").exists():
        print(f"{name}, seed {seed}: has its record")
        return
    from cifar10_trainer.run_folder import RunFolder

    workdir, at = ROOT / "runs" / "reproduce" / f"{name}-{config.epochs:g}-{seed}", commit()
    if not RunFolder(workdir).is_finished():
        command = [sys.executable, "-m", "cifar10_trainer", f"--recipe={name}", f"--seed={seed}"]
        command += [f"--epochs={config.epochs:g}", f"--workdir={workdir}"]
        if FLAGS.data_dir and config.dataset != "digits":  # those are embedded
            command.append(f"--data_dir={Path(FLAGS.data_dir).absolute()}")
        if subprocess.run(command, check=False, cwd=ROOT).returncode:
            raise RunError(f"{name} with seed {seed} did not end well; its own line above says why")
    shown = f"python scripts/reproduce.py {name}"
    if epochs is not None:
        shown += f" --epochs={epochs:g}"
    print(f"record: {keep(workdir, shown, at).relative_to(ROOT)}")


def main(argv: list[str]) -> None:
    if FLAGS.record:
        print(f"record: {keep(Path(FLAGS.record)).relative_to(ROOT)}")
    elif not FLAGS.table:
        for name in chosen(argv):
            for seed in range(FLAGS.seeds):
                run(name, seed, length(name, name in argv))
                rewrite_tables()
    rewrite_tables()


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
