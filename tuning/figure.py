"""search.png: validation accuracy over time and over each hyperparameter, in the style of the reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar10_trainer.figures import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    VERMILION,
    matplotlib_defaults,
    new_figure,
    save_figure,
    style_axes,
)

from .leaderboard import Row, in_epochs

MARGIN_BELOW_BEST = 0.15  # accuracies further below the best are drawn at the lower edge


@matplotlib_defaults()
def search_figure(rows: Sequence[Row], logarithmic: Sequence[str], target: float, path: Path) -> None:
    """Draws the trials of a search.

    Args:
        rows: all trials, the best first. At least one must be completed.
        logarithmic: the hyperparameters with a logarithmic axis.
        target: the validation accuracy to reach, 0-1.
        path: the PNG file to write.
    """
    from matplotlib.ticker import LogLocator, PercentFormatter

    done = [r for r in rows if r.status == "completed"]
    accuracies = [r.accuracy for r in done]
    lowest = max(min(accuracies), max(accuracies) - MARGIN_BELOW_BEST)
    floor = lowest - 0.06 * (max(*accuracies, target) - lowest) - 0.002
    names = list(dict.fromkeys(name for row in done for name in row.values))
    columns = 2 if len(names) in (1, 3) else 3
    lines = math.ceil((1 + len(names)) / columns)
    figure = new_figure(3.9 * columns, 3.0 * lines + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, name in zip(grid.flat, ["", *names], strict=False):
        style_axes(axes, name or "Time", grid="both")
        _draw_trials(axes, [(r.values.get(name) if name else _minutes(r), r) for r in rows], floor)
        label = f"target: {100 * target:.4g}%"
        axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (5, 4)), label=label)
        if name in logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    first = grid.flat[0]
    by_time = sorted(done, key=_minutes)
    best = [max(r.accuracy for r in by_time[: i + 1]) for i in range(len(by_time))]
    first.step(
        [_minutes(r) for r in by_time], best, where="post", color=GREEN, linewidth=1.4, label="best so far"
    )
    first.set_xlim(0, 1.05 * max(map(_minutes, rows)))
    first.set_xlabel("minutes", fontsize=9, color=INK)
    first.set_ylim(floor, None)
    first.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    for line in grid:
        line[0].set_ylabel("validation accuracy", fontsize=9, color=INK)
    for axes in list(grid.flat)[1 + len(names) :]:
        axes.set_axis_off()
    handles, labels = first.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9, labelcolor=INK
    )
    save_figure(figure, path)


def _minutes(row: Row) -> float:
    return (row.ended or 0) / 60


def _draw_trials(axes: Any, points: Sequence[tuple[Any, Row]], floor: float) -> None:
    """Draws a marker for each trial at (x, accuracy), different for full, short, low and failed trials and for the best.

    Args:
        axes: where to draw.
        points: (x, trial); a trial whose x is None is left out.
        floor: the accuracy at the lower edge, where low and failed trials are drawn.
    """
    done = [(x, r) for x, r in points if r.status == "completed"]
    full = max(r.metrics["epochs"] for _, r in done)
    best = done[0][1]  # the rows are sorted by the objective

    def kind(row: Row) -> str:
        if row.status == "failed" or row.accuracy < floor:
            return "failed" if row.status == "failed" else "lower"
        return "short" if row.metrics["epochs"] < 0.99 * full else "full"

    kinds = [(x, r, kind(r)) for x, r in points if r.status != "unfinished" and x is not None]
    kinds += [(x, r, "best") for x, r in done if r is best and x is not None]
    for name, marker, size, colour, label in (
        ("short", "o", 5.5, FAINT, f"fewer than {in_epochs(full)}"),
        ("full", "o", 5.5, BLUE, in_epochs(full)),
        ("lower", "v", 6, BLUE, "lower"),
        ("failed", "X", 7, VERMILION, "failed"),
        ("best", "*", 14, GREEN, f"best, trial {best.trial}: {best.accuracy:.2%}"),
    ):
        some = [(x, r.accuracy) for x, r, k in kinds if k == name]
        if some:
            across = [str(x) if isinstance(x, str | bool) else x for x, _ in some]
            up = [a if a >= floor else floor for _, a in some]  # also for nan, the accuracy of a failed trial
            style = {"color": colour, "markeredgecolor": INK, "markeredgewidth": 0.5, "clip_on": False}
            axes.plot(across, up, marker, markersize=size, label=label, zorder=3, **style)
