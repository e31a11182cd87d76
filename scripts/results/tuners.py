"""The records in results/tuners: the trials of a whole space, searches that are replayed from them, table and figure."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import ROOT
from .tables import markdown, publish

FOLDER = ROOT / "results" / "tuners"
TRIALS, SEARCHES = "trials.json", "searches.json"
FIGURE = ROOT / "docs" / "tuners.png"

ANNEALED, FIT = "annealed", "fit"
THIRDS = 3  # a short trial is one third of a full one, as in the default search: one of three epochs
WAYS = {
    ANNEALED: (1.0, 1 / THIRDS),
    FIT: (1.0,),
}  # how a trial trains -> the shares of a full trial in the record
HYPERPARAMETERS = ("filters", "dropout", "learning_rate")

BUDGET = 20  # full trials, the default of `--max_trials`
BEST_SHARE = 0.05  # of the full trials of the space: who finds one of these has searched well


@dataclass(frozen=True)
class Contender:
    """A tuner, and how its trials train."""

    name: str
    tuner: str
    way: str = ANNEALED


CONTENDERS = [
    *(Contender(f"`{name}`", name) for name in ("random", "bayesian", "hyperband", "halving")),
    Contender("KerasTuner's Hyperband on `Model.fit`", "hyperband", FIT),
]

Curve = list[
    tuple[float, float]
]  # after each trial of a search: (full trials' worth of PFLOP spent, best accuracy so far)


# ---- the record ------------------------------------------------------------------------------------------


def key(trial: Mapping[str, Any]) -> tuple[Any, ...]:
    """What distinguishes a trial from the others."""
    return (trial["way"], *(trial[name] for name in HYPERPARAMETERS), round(trial["share"], 4))


def read(path: Path) -> dict[str, Any] | None:
    """The record, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# ---- replayed searches -----------------------------------------------------------------------------------


def replay(contender: Contender, seed: int, trials: Sequence[Mapping[str, Any]], budget: float) -> Curve:
    """Runs one search whose trials are looked up.

    Args:
        contender: the tuner.
        seed: of the tuner.
        trials: those of the record.
        budget: full trials' worth of FLOPs; the search ends before the trial that would spend more.

    Returns:
        The curve.
    """
    import keras_tuner as kt

    from tuning.oracle import make_oracle

    found = {key(trial): trial for trial in trials}
    unit = statistics.mean(t["pflop"] for t in trials if t["way"] == contender.way and t["share"] == 1)
    hp = kt.HyperParameters()
    for name in HYPERPARAMETERS:
        hp.Choice(name, sorted({t[name] for t in trials}), ordered=True)
    spent, best, curve = 0.0, 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        oracle = make_oracle(
            contender.tuner,
            epochs=THIRDS,
            objective=kt.Objective("val_accuracy", "max"),
            max_trials=10**6,
            hyperparameters=hp,
            file=Path(folder) / "state.json",
            baseline=False,
            seed=seed,
        )
        oracle._set_project_dir(folder, "trials")
        oracle.save = lambda: None  # type: ignore[method-assign]  # nothing resumes
        while (trial := oracle.create_trial("replay")).status == "RUNNING":
            accuracy, cost = look_up(contender.way, trial.hyperparameters.values, found)
            spent += cost / unit
            if spent > budget + 0.1:  # the trials' FLOPs are equal to within a percent or two
                break
            best = max(best, accuracy)
            curve.append((round(spent, 3), best))
            oracle.update_trial(trial.trial_id, {"val_accuracy": accuracy})
            trial.status = "COMPLETED"
            oracle.end_trial(trial)
    return curve


def look_up(
    way: str, values: Mapping[str, Any], found: Mapping[tuple[Any, ...], Mapping[str, Any]]
) -> tuple[float, float]:
    """The validation accuracy of a trial, and the PFLOP that it spends.

    Args:
        way: a key of WAYS. With FIT, a trial continues the shorter one that it comes from.
        values: its hyperparameters and what the oracle adds to them.
        found: `key` of a trial -> the trial.
    """
    cell = {"way": way, **{name: values[name] for name in HYPERPARAMETERS}}
    if way == ANNEALED:
        trial = found[key({**cell, "share": values.get("tuner/share", 1.0)})]
        return trial["val_accuracy"], trial["pflop"]
    trial, first, last = (
        found[key({**cell, "share": 1.0})],
        values["tuner/initial_epoch"],
        values["tuner/epochs"],
    )
    return max(trial["val_accuracy"][first:last]), trial["pflop"] * (last - first) / THIRDS


def replay_all(trials: Sequence[Mapping[str, Any]], seeds: int) -> dict[str, list[Curve]]:
    """The name of each contender -> the curves of its searches, one for each seed."""
    return {c.name: [replay(c, seed, trials, BUDGET) for seed in range(seeds)] for c in CONTENDERS}


# ---- what they found -------------------------------------------------------------------------------------


def best_after(curve: Curve, spent: float) -> float:
    """The best accuracy after so many full trials' worth of PFLOP; 0 before the end of the first trial."""
    return max((accuracy for cost, accuracy in curve if cost <= spent + 0.1), default=0.0)


def spent_until(curve: Curve, target: float) -> float:
    """The cost until the first trial that reaches the target; infinite where none does."""
    return next((cost for cost, accuracy in curve if accuracy >= target), math.inf)


def share_ahead(own: Sequence[float], others: Sequence[float]) -> float:
    """How often a number of `own` is greater than one of `others`, over all pairs; equal ones count one half."""
    wins = sum((a > b) + (a == b) / 2 for a in own for b in others)
    return wins / len(own) / len(others)


def hard_target(trials: Sequence[Mapping[str, Any]]) -> float:
    """The accuracy that the best 5% of the space's full trials reach."""
    full = sorted(
        (t["val_accuracy"] for t in trials if t["way"] == ANNEALED and t["share"] == 1), reverse=True
    )
    return full[math.ceil(BEST_SHARE * len(full)) - 1]


def table(curves: Mapping[str, Sequence[Curve]], target: float) -> str:
    """A row for each contender: medians and quartiles of the best accuracy after half and after all of the budget."""
    rows = []
    for name, own in curves.items():
        row = [name]
        for spent in (BUDGET / 2, BUDGET):
            best, random = ([best_after(c, spent) for c in some] for some in (own, curves["`random`"]))
            low, median, high = (100 * q for q in statistics.quantiles(best, n=4, method="inclusive"))
            row += [f"{median:.2f}% ({low:.2f}-{high:.2f})", f"{share_ahead(best, random):.2f}"]
        until = statistics.median(spent_until(c, target) for c in own)
        rows.append([*row, f"{until:.1f}" if math.isfinite(until) else "-"])
    head = [
        "tuner",
        f"best after {BUDGET // 2} trials",
        "ahead of `random`",
        f"best after {BUDGET} trials",
        "ahead of `random` then",
        f"trials until {100 * target:.2f}%",
    ]
    return markdown(head, ["tuner"], rows)


def publish_comparison(curves: Mapping[str, Sequence[Curve]], target: float) -> None:
    """Draws the figure, and replaces the table in its document."""
    draw(curves, FIGURE)
    publish("tuners", table(curves, target))


def draw(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Draws the median of each contender's best accuracy, and its quartiles, to the PNG file `path`."""
    from cifar10_trainer.figures import (
        BLUE,
        FAINT,
        GREEN,
        INK,
        VERMILION,
        new_figure,
        save_figure,
        style_axes,
    )

    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    count = len(next(iter(curves.values())))
    style_axes(
        axes, f"Best validation accuracy so far: median and quartiles of {count} searches", grid="both"
    )
    spent = [0.5 * i for i in range(2, 2 * BUDGET + 1)]
    for (name, own), colour in zip(curves.items(), (FAINT, BLUE, GREEN, VERMILION, INK), strict=True):
        quartiles = [
            statistics.quantiles([100 * best_after(c, s) for c in own], n=4, method="inclusive")
            for s in spent
        ]
        low, median, high = zip(*quartiles, strict=True)
        axes.plot(spent, median, color=colour, linewidth=1.6, label=name.replace("`", ""))
        axes.fill_between(spent, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("compute spent, in full trials", fontsize=9, color=INK)
    axes.yaxis.set_major_formatter("{x:g}%")
    axes.legend(fontsize=8, labelcolor=INK, frameon=False, loc="lower right")
    save_figure(figure, path)
