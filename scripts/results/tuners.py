"""The records in results/tuners: the trials of a small space, searches that look them up, table and figure."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar10_trainer.files import read_json
from tuning.options import Options

from .records import ROOT
from .tables import markdown, publish

FOLDER = ROOT / "results" / "tuners"
TRIALS, SEARCHES = "trials.json", "searches.json"
FIGURE = ROOT / "docs" / "tuners.png"

ANNEALED, FIT = "annealed", "fit"
THIRDS = 3  # a short trial is one third of a full one, as in the default search: one of three epochs
HYPERPARAMETERS = ("filters", "dropout", "learning_rate")

BUDGET = Options.max_trials  # full trials
BEST_SHARE = 0.05  # of the full trials of the space: who finds one of these has searched well


@dataclass(frozen=True)
class Contender:
    """A tuner, and how its trials train: ANNEALED or FIT."""

    name: str
    tuner: str
    way: str = ANNEALED


CONTENDERS = [
    *(Contender(f"`{name}`", name) for name in ("random", "bayesian", "hyperband", "halving")),
    Contender("KerasTuner's Hyperband on `Model.fit`", "hyperband", FIT),
]

# What to train: {"way", the hyperparameters, "thirds"}; with its result "val_accuracy": one number if ANNEALED, one for each
# third if FIT.
Trial = Mapping[str, Any]
# After each trial of a search: the FLOPs spent, in those of a full trial, and the best accuracy so far.
Curve = list[tuple[float, float]]


# ---- the records -----------------------------------------------------------------------------------------


def key(trial: Trial) -> tuple[Any, ...]:
    """What distinguishes a trial from the others."""
    return (trial["way"], *(trial[name] for name in HYPERPARAMETERS), trial["thirds"])


def read(path: Path) -> dict[str, Any] | None:
    """A record, or None where there is none."""
    return read_json(path) if path.exists() else None


# ---- searches --------------------------------------------------------------------------------------------


def search(
    contender: Contender,
    seed: int,
    space: Mapping[str, Sequence[float]],
    result_of: Callable[[Trial], Trial],
    budget: float = BUDGET,
) -> Curve:
    """Runs one search.

    Args:
        contender: the tuner.
        seed: of the tuner.
        space: hyperparameter -> its values.
        result_of: trains a trial, or looks it up, and returns it with its result.
        budget: the FLOPs of so many full trials; the search ends before the trial that would spend more.

    Returns:
        The curve.
    """
    import keras_tuner as kt

    from tuning.oracle import make_oracle

    hp = kt.HyperParameters()
    for name in HYPERPARAMETERS:
        hp.Choice(name, list(space[name]), ordered=True)
    spent, best, curve = 0, 0.0, []  # spent: in thirds
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
        while (proposed := oracle.create_trial("worker")).status == "RUNNING":
            values = proposed.hyperparameters.values
            trial = {"way": contender.way, **{name: values[name] for name in HYPERPARAMETERS}}
            first, last = stretch(contender.way, values)
            spent += last - first
            if spent > THIRDS * budget:
                break
            found = result_of({**trial, "thirds": last})["val_accuracy"]
            accuracy = max(found[first:last]) if contender.way == FIT else found
            best = max(best, accuracy)
            curve.append((round(spent / THIRDS, 3), best))
            oracle.update_trial(proposed.trial_id, {"val_accuracy": accuracy})
            proposed.status = "COMPLETED"
            oracle.end_trial(proposed)
    return curve


def stretch(way: str, values: Mapping[str, Any]) -> tuple[int, int]:
    """The thirds of a full trial that a trial trains, first and last, from what an oracle adds to its values.

    An annealed trial begins anew. One of `Model.fit` continues the shorter one that it comes from.
    """
    from tuning.oracle import SHARE

    if way == FIT:
        return values["tuner/initial_epoch"], values["tuner/epochs"]
    return 0, round(THIRDS * values.get(SHARE, 1.0))


# ---- what they found -------------------------------------------------------------------------------------


def best_after(curve: Curve, spent: float) -> float:
    """The best accuracy after so many full trials' worth of PFLOP; 0 before the end of the first trial."""
    return max((accuracy for cost, accuracy in curve if cost <= spent), default=0.0)


def spent_until(curve: Curve, target: float) -> float:
    """The cost until the first trial that reaches the target; infinite where none does."""
    return next((cost for cost, accuracy in curve if accuracy >= target), math.inf)


def share_ahead(own: Sequence[float], others: Sequence[float]) -> float:
    """How often a number of `own` is greater than one of `others`, over all pairs; equal ones count one half."""
    wins = sum((a > b) + (a == b) / 2 for a in own for b in others)
    return wins / len(own) / len(others)


def hard_target(trials: Sequence[Trial]) -> float:
    """The accuracy that the best 5% of the space's full trials reach."""
    full = [t["val_accuracy"] for t in trials if (t["way"], t["thirds"]) == (ANNEALED, THIRDS)]
    return sorted(full, reverse=True)[math.ceil(BEST_SHARE * len(full)) - 1]


def table(curves: Mapping[str, Sequence[Curve]], target: float) -> str:
    """A row for each contender: medians and quartiles of the best accuracy after half and after all of the budget."""
    rows = []
    for name, own in curves.items():
        row = [name, str(len(own))]
        for spent in (BUDGET / 2, BUDGET):
            best, random = ([best_after(c, spent) for c in some] for some in (own, curves["`random`"]))
            low, median, high = (100 * q for q in statistics.quantiles(best, n=4, method="inclusive"))
            row += [f"{median:.2f}% ({low:.2f}-{high:.2f})", f"{share_ahead(best, random):.2f}"]
        until = statistics.median(spent_until(c, target) for c in own)
        rows.append([*row, f"{until:.1f}" if math.isfinite(until) else "-"])
    head = [
        "tuner",
        "searches",
        f"best after {BUDGET // 2} trials",
        "ahead of `random`",
        f"best after {BUDGET} trials",
        "ahead of `random` then",
        f"trials until {100 * target:.2f}%",
    ]
    return markdown(head, ["tuner"], rows)


def publish_comparison(curves: Mapping[str, Sequence[Curve]], target: float) -> None:
    """Draws the figure, and replaces the table in its document."""
    draw(curves, target, FIGURE)
    publish("tuners", table(curves, target))


def draw(curves: Mapping[str, Sequence[Curve]], target: float, path: Path) -> None:
    """Draws, for this project's tuners, the share of searches at the target over the FLOPs spent, to the PNG file `path`."""
    from cifar10_trainer import figures

    figure = figures.new_figure(7.5, 4.2)
    axes = figure.subplots()
    title = (
        f"Searches with a trial past {100 * target:.2f}%, which the best {BEST_SHARE:.0%} of the space reach"
    )
    figures.style_axes(axes, title, grid="both")
    own = [c.name for c in CONTENDERS if c.way == ANNEALED]
    colours = (figures.INK, figures.BLUE, figures.GREEN, figures.VERMILION)
    for name, colour in zip(own, colours, strict=True):
        until = sorted(spent_until(curve, target) for curve in curves[name])
        reached = [x for x in until if math.isfinite(x)]
        shares = [100 * n / len(until) for n in range(len(reached) + 1)]
        axes.step(
            [0, *reached, BUDGET], [*shares, shares[-1]], where="post", color=colour, label=name.strip("`")
        )
    axes.set_xlabel("FLOPs spent, in those of a full trial", fontsize=9, color=figures.INK)
    axes.set_xticks(range(0, BUDGET + 1, BUDGET // 4))
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter("{x:g}%")
    axes.legend(fontsize=8, labelcolor=figures.INK, frameon=False, loc="upper left")
    figures.save_figure(figure, path)
