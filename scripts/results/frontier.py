"""Accuracy against cost: two recipes at 2 to 40 epochs beside the tutorials' recipes, as a table and a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar10_trainer.recipes import DEFAULT_RECIPE

from .records import ROOT, Record, group
from .tables import TUTORIALS, duration, epochs_run, full_length, mean_and_deviation, publish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN = (DEFAULT_RECIPE, "fast.95")  # both anneal over any number of epochs
EPOCHS = (2, 4, 8, 16, 40)
FIGURE = ROOT / "docs" / "frontier.png"


@dataclass(frozen=True)
class Point:
    """The records of one recipe with one number of epochs."""

    recipe: str
    source: str
    epochs: float
    epochs_run: str  # the epochs trained, and of how many
    cut: bool  # fewer epochs than the recipe has were asked for
    seconds: float  # of the whole process, median
    pflop: float  # mean
    validation: tuple[float, ...]  # accuracies of the seeds, 0-1; empty: the recipe holds nothing out
    test: tuple[float, ...]
    test_with_tta: tuple[float, ...]  # empty: the recipe uses no TTA


def points_of(records: Sequence[Record]) -> list[Point]:
    """A Point for each recipe and number of epochs that was scored on CIFAR-10's test images, by PFLOP."""
    scored = [
        r
        for r in records
        if r["metrics"]["dataset"] == "cifar10" and r["metrics"]["test_accuracy"] is not None
    ]
    points = []
    for (recipe, epochs), some in group(scored).items():
        runs = [r["metrics"] for r in some]
        points.append(
            Point(
                recipe,
                some[0]["config"]["origin"]["source"],
                epochs,
                epochs_run(recipe, some),
                epochs < full_length(recipe, epochs),
                statistics.median(r["total_seconds"] for r in runs),
                statistics.mean(r["pflop"] for r in runs),
                tuple(r["best_val_accuracy"] for r in runs if r["best_val_accuracy"] is not None),
                tuple(r["test_accuracy"] for r in runs),
                tuple(r["test_accuracy_views"] for r in runs if r["views"] > 1),
            )
        )
    return sorted(points, key=lambda p: p.pflop)


def points_by_epochs(points: Sequence[Point], recipe: str) -> list[Point]:
    """The points of a recipe, by epochs."""
    return sorted((p for p in points if p.recipe == recipe), key=lambda p: p.epochs)


def tutorials(points: Sequence[Point]) -> dict[str, list[Point]]:
    """ "tutorial 1" ... "tutorial 5" -> the points of its recipes at full length, the best validation accuracy first."""
    names = [f"tutorial {i}" for i in TUTORIALS]
    found = {n: [p for p in points if p.source.startswith(f"{n},") and not p.cut] for n in names}
    return {n: sorted(some, key=lambda p: -_mean(p.validation)) for n, some in found.items() if some}


def _mean(accuracies: Sequence[float]) -> float:
    """The mean, 0 of none."""
    return statistics.mean(accuracies) if accuracies else 0.0


def missing(records: Sequence[Record]) -> list[tuple[str, int]]:
    """The recipes and numbers of epochs that have no record yet."""
    there = {(p.recipe, p.epochs) for p in points_of(records)}
    return [(recipe, n) for recipe in OWN for n in EPOCHS if (recipe, n) not in there]


# ---- the table -------------------------------------------------------------------------------------------


def table(points: Sequence[Point]) -> str:
    """The Markdown table: our recipes by epochs, then of each tutorial the recipe with the best measured validation."""
    lines = [
        "| recipe | epochs | time | PFLOP | validation | test | test with TTA |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    own = [p for recipe in OWN for p in points_by_epochs(points, recipe)]
    for p in [*own, *(best for best, *_ in tutorials(points).values())]:
        tutorial = next((n for n, some in tutorials(points).items() if p in some), "")
        cells = [
            f"`{p.recipe}`" + (f" (best measured of {tutorial})" if tutorial else ""),
            p.epochs_run,
            duration(p.seconds),
            f"{p.pflop:.3g}",
            *(mean_and_deviation(x) for x in (p.validation, p.test, p.test_with_tta)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def publish_points(records: Sequence[Record]) -> None:
    """Draws the figure and replaces the table in its document."""
    points = points_of(records)
    draw(points, FIGURE)
    publish("frontier", table(points))


# ---- the figure ------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}


def draw(points: Sequence[Point], path: Path) -> None:
    """Draws test accuracy over time and over PFLOP to the PNG file `path`."""
    from cifar10_trainer.figures import INK, new_figure, save_figure, style_axes

    figure = new_figure(10, 4.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, cost, title in zip(
        panels,
        ("seconds", "pflop"),
        ("Seconds of the whole run, on several machines", "PFLOP of training"),
        strict=True,
    ):
        style_axes(axes, title, grid="both")
        draw_own(axes, cost, points_by_epochs(points, OWN[0]), "-")
        if cost == "pflop":  # the runs of the second recipe had one core, and others at the same time
            draw_own(axes, cost, points_by_epochs(points, OWN[1]), "--")
        draw_tutorials(axes, cost, tutorials(points))
        scale_axes(axes)
    panels[0].set_ylabel("test accuracy", fontsize=9, color=INK)
    handles, labels = panels[1].get_legend_handles_labels()
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    if handles:
        figure.legend(handles, labels, fontsize=9, labelcolor=INK, **where)
    save_figure(figure, path)


def draw_own(axes: Axes, cost: str, own: Sequence[Point], style: str) -> None:
    """Draws a recipe's two lines, with and without TTA. Of the default recipe, labels say the epochs of each point.

    A point is the mean over the seeds, its bar their standard deviation. style: Matplotlib's, of the lines.
    """
    from cifar10_trainer.figures import BLUE, GREEN

    line: dict[str, Any] = {"linewidth": 1.6, "markersize": 4, "capsize": 3, "zorder": 3}
    for quantity, colour, words in (("test_with_tta", GREEN, " with TTA"), ("test", BLUE, "")):
        shown = [
            (getattr(p, cost), [100 * a for a in getattr(p, quantity)]) for p in own if getattr(p, quantity)
        ]
        if not shown:
            continue
        costs, seeds = zip(*shown, strict=True)
        spread = [statistics.stdev(some) if len(some) > 1 else math.nan for some in seeds]
        label, means = own[0].recipe + words, [_mean(some) for some in seeds]
        axes.errorbar(costs, means, spread, fmt=f"o{style}", color=colour, label=label, **line)
    for p in own:
        if p.recipe == DEFAULT_RECIPE:
            words = f"{p.epochs:g}" + (" epochs" if p is own[0] else "")
            axes.annotate(words, (getattr(p, cost), 100 * _mean(p.test)), (0, -12), color=BLUE, **SMALL)


def draw_tutorials(axes: Axes, cost: str, others: Mapping[str, Sequence[Point]]) -> None:
    """Draws the tutorials' recipes as squares, and labels the one of each tutorial with the best measured validation."""
    from cifar10_trainer.figures import FAINT, INK, VERMILION

    style: dict[str, Any] = {"markersize": 6, "markeredgecolor": INK, "markeredgewidth": 0.5}
    best_words = "a tutorial's recipe, best measured validation"
    best = {name: (getattr(p, cost), 100 * _mean(p.test)) for name, (p, *_) in others.items()}
    rest = [(getattr(p, cost), 100 * _mean(p.test)) for _, *some in others.values() for p in some]
    for words, colour, places in (
        (best_words, VERMILION, list(best.values())),
        ("its other recipes", FAINT, rest),
    ):
        if places:
            costs, accuracies = zip(*places, strict=True)
            above = 2.2 if colour == VERMILION else 2.1
            axes.plot(costs, accuracies, "s", color=colour, label=words, zorder=above, **style)
    for name, (x, y) in best.items():
        # The label is under its point where another point would cover it.
        covered = any(x / 1.6 < u < 1.6 * x and 0 < v - y < 3 for u, v in [*best.values(), *rest])
        axes.annotate(name, (x, y), (0, -14 if covered else 7), color=INK, **SMALL)


def scale_axes(axes: Axes) -> None:
    """A logarithmic cost axis with plain numbers, and percent on the other axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.margins(x=0.12, y=0.1)
    axes.yaxis.set_major_formatter("{x:g}%")
