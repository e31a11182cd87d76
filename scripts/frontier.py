"""How accurate the default recipe is for what it costs, beside the tutorials' recipes: a figure and a table, from records.

`python scripts/benchmark.py frontier` makes the records that are missing and both; `--quick` only both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clock import ROOT
from reproduce import duration, epochs_run, grouped, rewrite

from cifar10_trainer.recipes import DEFAULT_RECIPE

EPOCHS = (2, 4, 8, 16, 40)
FIGURE = ROOT / "docs" / "frontier.png"


@dataclass(frozen=True)
class Point:
    """What the records of one recipe at one number of epochs come to: means over the seeds, the median of the times."""

    recipe: str
    source: str
    epochs: float
    epochs_run: str  # of those that the recipe has
    runs: int
    seconds: float  # of the whole process
    pflop: float
    validation: float | None  # accuracies, 0-1
    test: float
    views: float | None  # None: the recipe does not average over views


def points_of(records: Sequence[dict[str, Any]]) -> list[Point]:
    """A Point for each recipe and number of epochs that was scored on CIFAR-10's test images, the cheapest first."""
    scored = [
        r
        for r in records
        if r["metrics"]["dataset"] == "cifar10" and r["metrics"]["test_accuracy"] is not None
    ]
    points = []
    for (recipe, epochs), group in grouped(scored).items():
        runs = [r["metrics"] for r in group]
        held_out = [r["best_val_accuracy"] for r in runs if r["best_val_accuracy"] is not None]
        averaged = [r["test_accuracy_views"] for r in runs if r["views"] > 1]
        points.append(
            Point(
                recipe,
                group[0]["config"]["origin"]["source"],
                epochs,
                epochs_run(recipe, group),
                len(runs),
                statistics.median(r["total_seconds"] for r in runs),
                statistics.mean(r["pflop"] for r in runs),
                statistics.mean(held_out) if held_out else None,
                statistics.mean(r["test_accuracy"] for r in runs),
                statistics.mean(averaged) if averaged else None,
            )
        )
    return sorted(points, key=lambda p: p.pflop)


def ours(points: Sequence[Point]) -> list[Point]:
    """The default recipe's, by epochs."""
    return sorted((p for p in points if p.recipe == DEFAULT_RECIPE), key=lambda p: p.epochs)


def tutorials(points: Sequence[Point]) -> dict[str, list[Point]]:
    """tutorial 1 ... tutorial 5 -> the points of its recipes, the best on validation images first."""
    names = [f"tutorial {i}" for i in range(1, 6)]
    found = {n: [p for p in points if p.source.startswith(f"{n},")] for n in names}
    return {n: sorted(some, key=lambda p: -(p.validation or 0)) for n, some in found.items() if some}


def missing(records: Sequence[dict[str, Any]]) -> list[int]:
    """The numbers of epochs that have no record yet."""
    there = {p.epochs for p in ours(points_of(records))}
    return [n for n in EPOCHS if n not in there]


def table(points: Sequence[Point]) -> str:
    """The Markdown table: the default recipe by epochs, then the best recipe of each tutorial."""

    def percent(x: float | None) -> str:
        return "" if x is None else f"{100 * x:.2f}"

    lines = [
        "| recipe | epochs | time | PFLOP | validation | test | averaged views |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for p in [*ours(points), *(best for best, *_ in tutorials(points).values())]:
        number = next((n for n, some in tutorials(points).items() if p in some), "")
        cells = [
            f"`{p.recipe}`" + (f" ({number})" if number else ""),
            p.epochs_run,
            duration(p.seconds),
            f"{p.pflop:.3g}",
            *(percent(x) for x in (p.validation, p.test, p.views)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path) -> None:
    """Draws test accuracy over time and over arithmetic, the best recipe of each tutorial labelled, to the PNG `path`."""
    from matplotlib.ticker import LogLocator, NullFormatter

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

    figure = new_figure(10, 4.6)
    panels = figure.subplots(1, 2, sharey=True)
    own, others = ours(points), tutorials(points)
    for axes, cost, title in zip(
        panels, ("seconds", "pflop"), ("Seconds of the whole run", "PFLOP of training"), strict=True
    ):
        style_axes(axes, title, grid="both")
        line: dict[str, Any] = {"linewidth": 1.6, "markersize": 4, "zorder": 3}
        for quantity, colour, words in (("views", GREEN, ", averaged views"), ("test", BLUE, "")):
            shown = [(getattr(p, cost), 100 * getattr(p, quantity)) for p in own if getattr(p, quantity)]
            if shown:
                axes.plot(*zip(*shown, strict=True), "o-", color=colour, label=DEFAULT_RECIPE + words, **line)
        small: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
        for p in own:
            words = f"{p.epochs:g}" + (" epochs" if p is own[0] else "")
            axes.annotate(words, (getattr(p, cost), 100 * p.test), (0, -12), color=BLUE, **small)
        style: dict[str, Any] = {"markersize": 6, "markeredgecolor": INK, "markeredgewidth": 0.5}
        for words, colour, some in (
            (
                "a tutorial's best recipe, run by this project",
                VERMILION,
                [best for best, *_ in others.values()],
            ),
            ("its others", FAINT, [p for _, *rest in others.values() for p in rest]),
        ):
            if some:
                x = [getattr(p, cost) for p in some]
                axes.plot(x, [100 * p.test for p in some], "s", color=colour, label=words, **style)
        places = {name: (getattr(best, cost), 100 * best.test) for name, (best, *_) in others.items()}
        for name, (x, y) in places.items():
            # Under its point, where another would stand on the label.
            covered = any(x / 1.5 < u < 1.5 * x and 0 < v - y < 3 for u, v in places.values())
            axes.annotate(name, (x, y), (0, -14 if covered else 7), color=INK, **small)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.margins(x=0.12, y=0.1)
        axes.yaxis.set_major_formatter("{x:g}%")
    panels[0].set_ylabel("test accuracy", fontsize=9, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "frameon": False}
    if handles:
        figure.legend(handles, labels, fontsize=9, labelcolor=INK, **where)
    save_figure(figure, path)


def publish(records: Sequence[dict[str, Any]]) -> None:
    """Rewrites the figure in docs/ and the table in the README."""
    points = points_of(records)
    draw(points, FIGURE)
    rewrite(ROOT / "README.md", "frontier", table(points))
