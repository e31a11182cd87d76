"""The records in results/runs: how one is made from a run folder, how they are read and how they are grouped.

A record is a JSON file <recipe>-<epochs>-<seed>.json: the date, commit and command of a finished run, its environment,
its configuration, its metrics and its history.
"""

from __future__ import annotations

import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar10_trainer import RECIPES, Config, RunError
from cifar10_trainer.datasets.arrays import SOURCE as ARRAYS
from cifar10_trainer.files import read_json

if TYPE_CHECKING:
    from cifar10_trainer.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]  # the checkout
RUNS = ROOT / "results" / "runs"

# Keys of config.json that the config of a record leaves out: they only describe the machine of the run.
PRIVATE = ("data_dir", "data_name", "data_source", "class_names", "command", "environment")
# Fields in which a recorded run may differ from its recipe.
FREE = ("epochs", "seed", "strategy", "precision")
# What runs of version 1.0.0 call a strategy -> its name now.
STRATEGIES = {
    "_DefaultDistributionStrategy": "none",
    "MirroredStrategy": "mirrored",
    "CollectiveAllReduceStrategy": "multi_worker",
}

Record = dict[str, Any]
Group = list[Record]  # the records of one recipe with one number of epochs


# ---- one record ------------------------------------------------------------------------------------------


def path_of(recipe: str, epochs: float, seed: int) -> Path:
    """The file of the record of one run."""
    return RUNS / f"{recipe}-{epochs:g}-{seed}.json"


def keep(workdir: Path, command: str | None = None, at: str | None = None) -> Path:
    """Writes the record of a finished run.

    Args:
        workdir: the run folder.
        command: the command that makes such a run. None: the run's own command.
        at: the commit of the code that made the run. None: the present commit.

    Returns:
        The file of the record.

    Raises:
        RunError: the run is not finished, differs from its recipe, or is of another strategy or precision than the
            record that it would replace.
    """
    from cifar10_trainer import files
    from cifar10_trainer.run_folder import RunFolder

    run = RunFolder(workdir)
    config, metrics = read_run(run)
    record = record_of(run, config, metrics, command, commit() if at is None else at)
    path = path_of(metrics["recipe"], config["epochs"], metrics["seed"])
    if path.exists():
        before = files.read_json(path)["metrics"]
        for name in ("strategy", "precision"):
            was, now = (STRATEGIES.get(str(m.get(name)), m.get(name)) for m in (before, metrics))
            if was != now:
                raise RunError(
                    f"{path.name} is of a run with {name} {before.get(name)}, {workdir} of one with {metrics.get(name)};"
                    " allowed: the same; delete the record to replace it"
                )
    RUNS.mkdir(parents=True, exist_ok=True)
    files.write_json(path, record, indent=1)
    return path


def record_of(
    run: RunFolder, config: dict[str, Any], metrics: Record, command: str | None, at: str
) -> Record:
    """The record of a finished run. config, metrics: those in its folder; command, at: as for `keep`."""
    return {
        "date": time.strftime("%Y-%m-%d", time.localtime(run.metrics_file.stat().st_mtime)),
        "commit": at,
        # The path of the images means nothing on another machine.
        "command": command or without_data_dir(config["command"]),
        "environment": config["environment"],
        "metrics": metrics,
        "config": {k: v for k, v in config.items() if k not in PRIVATE},
        "history": run.read_history(),
    }


def without_data_dir(command: str) -> str:
    """A command without its flag --data_dir, in whichever way it is written."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word in ("--data_dir", "-data_dir"):
            next(words, None)
        elif not re.match(r"--?data_dir=", word):
            kept.append(word)
    return shlex.join(kept)


def read_run(run: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of config.json and metrics.json of a finished run.

    Raises RunError where the run is not finished, or differs from its recipe in more than FREE.
    """
    if not run.is_finished():
        raise RunError(f"{run} holds no finished run")
    try:
        config, metrics = run.read_config(), run.read_metrics()
        ran = Config.from_record(config)
    except (RunError, ValueError, TypeError) as error:
        raise RunError(f"{run} holds a damaged run ({error}); allowed: one that is whole") from error
    other_data = config.get("data_name") not in (None, ran.dataset) or config.get("data_source") == ARRAYS
    if "own_model" in config or other_data:
        raise RunError(
            f"{run} holds a run on a model or images of its own; allowed: a run of a recipe on its data set"
        )
    free = {name: getattr(ran, name) for name in FREE}
    recipe = RECIPES[ran.recipe].override(**free)
    different = [f.name for f in fields(Config) if getattr(ran, f.name) != getattr(recipe, f.name)]
    if different:
        key = different[0]
        raise RunError(
            f"{run} holds a run of {ran.recipe} with {key} {getattr(ran, key)!r}, where the recipe has {getattr(recipe, key)!r};"
            f" allowed: the recipe as it is, except for {', '.join(FREE)}; delete {run} to run it again"
        )
    return config, metrics


def made_by(command: str) -> dict[str, Any]:
    """Where a record comes from that `command` writes now: date, commit, command and environment."""
    from cifar10_trainer import runtime

    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": command,
        "environment": runtime.describe(),
    }


def session(record: dict[str, Any], command: str) -> int:
    """The number of this session in `record["sessions"]`, which has one entry for all that one command adds in one state.

    So what an earlier session has added keeps its date, commit and machine. It is added where it is not the last one.
    """
    sessions = record.setdefault("sessions", [])
    now = made_by(command)
    if not sessions or sessions[-1] != now:
        sessions.append(now)
    return len(sessions) - 1


def given_command(script: str) -> str:
    """The command that runs now, without where the images are."""
    return without_data_dir(shlex.join(["python", f"scripts/{script}", *sys.argv[1:]]))


def commit() -> str:
    """The short hash of the checkout's commit, with "-modified" where the code differs from it; empty without git."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    try:
        modified = git("status", "--porcelain", "cifar10_trainer", "tuning", "scripts")
        return git("rev-parse", "--short", "HEAD") + ("-modified" if modified else "")
    except FileNotFoundError:  # git is not installed
        return ""


# ---- all records -----------------------------------------------------------------------------------------


def load() -> list[Record]:
    """All records, sorted by file name."""
    return [read_json(path) for path in sorted(RUNS.glob("*.json"))]


def group(records: Sequence[Record]) -> dict[tuple[str, float], Group]:
    """The records by recipe and epochs, in the order of RECIPES."""
    groups: dict[tuple[str, float], Group] = defaultdict(list)
    for record in records:
        groups[record["metrics"]["recipe"], record["config"]["epochs"]].append(record)
    order = {name: i for i, name in enumerate(RECIPES)}
    return dict(sorted(groups.items(), key=lambda g: (order.get(g[0][0], len(order)), g[0][1])))


def is_own(name: str) -> bool:
    """Whether this is one of the project's own recipes for CIFAR-10, which anneal over any number of epochs."""
    config = RECIPES.get(name)
    return (
        config is not None and config.dataset == "cifar10" and config.origin.source.startswith("this project")
    )


def lengths(runs: Group) -> list[float]:
    """The number of epochs that each run trained: fewer than its configuration has where it stopped early."""
    return [min(r["config"]["epochs"], r["metrics"]["epochs"]) for r in runs]


def pflop(runs: Group, epochs: float | None = None) -> float:
    """Mean PFLOP of the runs' training; `epochs`: as if each run had trained this many epochs."""
    each = [r["metrics"]["pflop"] * (epochs or n) / n for r, n in zip(runs, lengths(runs), strict=True)]
    return statistics.mean(each)


def mean_validation(runs: Group) -> float:
    """Mean validation accuracy of the runs, 0-1; 0 where they hold out no images."""
    return statistics.mean(r["metrics"]["best_val_accuracy"] or 0 for r in runs)
