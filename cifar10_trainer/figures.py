"""Arrays and numbers -> figures, as PNG files.

No TensorFlow here. Matplotlib is used through its object interface, and with its own default settings (`matplotlib_defaults`). It is
imported where it is used, because commands that draw nothing should not wait for it.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any colour vision, and in grey.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, FAINT = "#24292f", "#d8dee4"
DPI = 150
LONGEST = 50.0  # inches of a figure's side; of long, narrow images it would be a thousand, and need gigabytes
MAX_CLASSES_SHOWN = 100  # in sample_images; more would be too small to see

_drawing = threading.RLock()  # Matplotlib's settings are those of the process


@contextlib.contextmanager
def matplotlib_defaults() -> Iterator[None]:
    """Within the block, or in a function that it decorates, Matplotlib has its own default settings, and the user's again after it.

    A user's style might hide parts of a figure, and one with LaTeX ends in an error where that is missing.
    """
    import matplotlib

    defaults: dict[Any, Any] = {k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"}
    with _drawing, matplotlib.rc_context(defaults):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A white figure of `width` by `height` inches, at most LONGEST, independent of pyplot."""
    from matplotlib.figure import Figure

    return Figure(
        figsize=(min(width, LONGEST), min(height, LONGEST)), dpi=DPI, facecolor="white", layout="constrained"
    )


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the PNG file `path`, whole or not at all, and empties the figure. Makes its folder."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        # To images a hundred times as long as wide.
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        figure.savefig(png, format="png", dpi=DPI, facecolor="white")
    write_atomic(path, png.getvalue())
    figure.clear()  # its parts refer to one another, so their memory would wait for the garbage collector


def style_axes(axes: Axes, title: str = "", grid: Literal["x", "both"] | None = None) -> None:
    """The style of all figures. title: at the top left; grid: the lines behind the data, None for no lines and no frame."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=8, parse_math=False)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(grid is not None and side in ("left", "bottom"))
        spine.set_color(FAINT)
    if grid is not None:
        axes.grid(axis=grid, color=FAINT, linewidth=0.7)


def _name_ticks(
    axis: Any, positions: Sequence[float], names: Sequence[str], inches: float, **style: Any
) -> None:
    """Class names along an axis on which a class takes `inches`; numbers stay where names do not fit."""
    size = min(9.0, inches * 72 * 0.9)
    if size < 4:
        return
    axis.set_ticks(positions)
    axis.set_ticklabels(names, fontsize=size, parse_math=False, **style)


def _short(class_names: Sequence[str], length: int = 16) -> list[str]:
    """The names as figures show them: long ones without their middle.

    Where two would look alike, as those that differ in the middle, the class number stands at their end; where the fonts
    lack a letter, it stands instead.
    """
    letters = _letters()
    lacking = {c for c in set().union(*class_names) if not any(ord(c) in font for font in letters)}
    names = [f"class {k}" if lacking & set(n) else _shorten(n, length) for k, n in enumerate(class_names)]
    count = Counter(names)
    return [_shorten(class_names[k], length, f" #{k}") if count[n] > 1 else n for k, n in enumerate(names)]


def _shorten(name: str, length: int, end: str = "") -> str:
    """At most `length` letters of a name and the end: the first ones, and without an end its last ones, too."""
    if len(name) + len(end) <= length:
        return name + end
    kept = length - 1 - len(end)
    last = 0 if end else kept // 3
    return name[: kept - last] + "…" + name[len(name) - last :] + end


def _letters() -> list[Container[int]]:
    """The characters of each font in which Matplotlib would draw a name."""
    from matplotlib import rcParams
    from matplotlib.font_manager import findfont, get_font

    settings: Any = rcParams
    families = [
        name for family in settings["font.family"] for name in settings.get(f"font.{family}", [family])
    ]
    letters: list[Container[int]] = []
    for name in [*families, "DejaVu Sans"]:  # the last one is Matplotlib's own
        with contextlib.suppress(ValueError):  # it is not installed
            letters.append(get_font(findfont(name, fallback_to_default=False)).get_charmap())
    return letters


def _isolated(name: str) -> str:
    """A name, which if it reads from right to left does not turn what stands beside it."""
    return f"\u2068{name}\u2069" if reads_from_right(name) else name


def reads_from_right(name: str) -> bool:
    """Whether a name has letters that are written from right to left."""
    return any(unicodedata.bidirectional(character) in ("R", "AL") for character in name)


def _mosaic(images: np.ndarray, columns: int, gap: tuple[int, int]) -> np.ndarray:
    """Tiles uint8 [n, h, w, 3] onto white, row by row; gap: pixels (below, right of) each image."""
    n, height, width, _ = images.shape
    rows = math.ceil(n / columns)
    cells = np.full((rows * columns, height + gap[0], width + gap[1], 3), 255, np.uint8)
    cells[:n, :height, :width] = images
    cells = cells.reshape(rows, columns, height + gap[0], width + gap[1], 3).swapaxes(1, 2)
    return cells.reshape(rows * (height + gap[0]), columns * (width + gap[1]), 3)


def _show(axes: Axes, mosaic: np.ndarray, height: int) -> None:
    """Draws small images pixel by pixel, not blurred; larger ones are shrunk smoothly."""
    if height <= 64:
        _cells(axes, mosaic)
    else:
        # With an alpha given, Matplotlib resamples in float32, not in float64: 50 MB less.
        axes.imshow(mosaic, alpha=1)


def _cells(axes: Axes, values: np.ndarray, **style: Any) -> Any:
    """Draws numbers [h, w] or pixels [h, w, 3] as squares with their centres at integers; y points down.

    This is the picture of `imshow` without interpolation. For CIFAR-10's images it takes half the time, and no
    floating-point copy of the whole figure.
    """
    edges = (np.arange(n + 1) - 0.5 for n in values.shape[1::-1])
    drawn = axes.pcolormesh(*edges, values, antialiased=False, **style)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    return drawn


@matplotlib_defaults()
def _captioned(images: np.ndarray, captions: Sequence[str], title: str, path: str | os.PathLike[str]) -> None:
    """A grid of five columns, a caption below each image."""
    columns, (height, width) = 5, images.shape[1:3]
    lines = max(caption.count("\n") + 1 for caption in captions)
    longest = max(len(line) for caption in captions for line in caption.split("\n"))
    right = max(1, round(width * 0.12))
    # 0.14 inches of 8, in pixels of the images
    line = max(0.1 * height, 0.14 * columns * (width + right) / 8)
    below = round(0.08 * height + lines * line)
    mosaic = _mosaic(images, columns, (below, right))
    figure = new_figure(8, 8 * mosaic.shape[0] / mosaic.shape[1] + 0.35)
    axes = figure.add_subplot()
    style_axes(axes, title)
    _show(axes, mosaic, height)
    axes.set_axis_off()
    for i, caption in enumerate(captions):
        x = i % columns * (width + right) + width / 2
        y = i // columns * (height + below) + height + lines * line  # of the last line
        size = min(8.5, 170 / longest)
        style: dict[str, Any] = {"fontsize": size, "color": INK, "linespacing": 1.15, "parse_math": False}
        axes.text(x, y, caption, ha="center", va="baseline", **style)
    save_figure(figure, path)


@matplotlib_defaults()
def sample_images(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    per_class: int = 10,
) -> None:
    """Draws the first images of each class, one row for each class, to the PNG file `path`.

    More than 25 classes stand in several columns with fewer images each. Of more than MAX_CLASSES_SHOWN classes the first
    ones are shown, and the title says so.

    Args:
        images: uint8 [n, height, width, 3].
        labels: integers [n].
        class_names: one for each class.
        path: the file to write.
        per_class: images in a row, at most.
    """
    shown = min(len(class_names), MAX_CLASSES_SHOWN)
    blocks = math.ceil(shown / 25)
    rows = math.ceil(shown / blocks)
    per_class = per_class if blocks == 1 else min(per_class, max(3, 12 // blocks))
    height, width = images.shape[1:3]
    gap = max(1, round(height / 16)), max(1, round(width / 16))
    cell = 0.6 if blocks == 1 else 0.36
    names = _short(class_names)
    names_width = 0.085 * max(map(len, names)) + 0.15
    figure = new_figure(blocks * (per_class * cell * width / height + names_width), rows * cell + 0.35)
    of_all = "" if shown == len(class_names) else f", the first {shown} of {len(class_names)} classes"
    for block, axes in enumerate(figure.subplots(1, blocks, squeeze=False)[0]):
        classes = range(block * rows, min((block + 1) * rows, shown))
        tiles = np.full((len(classes), per_class, height, width, 3), 255, np.uint8)
        for row, c in enumerate(classes):
            chosen = images[np.flatnonzero(labels == c)[:per_class]]
            tiles[row, : len(chosen)] = chosen
        style_axes(axes, f"Training images{of_all}" if block == 0 else "")
        _show(axes, _mosaic(tiles.reshape(-1, height, width, 3), per_class, gap), height)
        axes.set_anchor("NW")
        axes.set_xticks([])
        centres = [row * (height + gap[0]) + height / 2 for row in range(len(classes))]
        _name_ticks(axes.yaxis, centres, [names[c] for c in classes], cell)
    save_figure(figure, path)


def random_samples(
    images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Draws images that were chosen at random in a labelled grid. Arguments as in `sample_images`."""
    names = _short(class_names)
    captions = [names[c] for c in labels]
    _captioned(images, captions, "Training images, chosen at random", path)


@matplotlib_defaults()
def class_distribution(
    splits: Mapping[str, np.ndarray], class_names: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Draws how many images of each class each split has. splits: name -> labels; empty ones are left out."""
    n = len(class_names)
    counts = {name: np.bincount(labels, minlength=n) for name, labels in splits.items() if len(labels)}
    colours = dict(zip(splits, (BLUE, VERMILION, GREEN, INK), strict=False))
    inches = min(0.3, 12 / n)
    figure = new_figure(9, max(1.6, n * inches + 0.9))
    panels = figure.subplots(1, max(1, len(counts)), sharey=True, squeeze=False)[0]
    positions = np.arange(n)
    for axes, (name, count) in zip(panels, counts.items(), strict=True):
        style_axes(axes, f"{name}: {count.sum():,} images", grid="x")
        axes.barh(positions, count, color=colours[name], height=0.72)
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(0, count.max() * 1.2)
        if inches > 0.2:
            for y, value in zip(positions, count, strict=True):
                style = {"va": "center", "fontsize": 8, "color": INK}
                axes.annotate(f"{value:,}", (value, y), (3, 0), textcoords="offset points", **style)
    _name_ticks(panels[0].yaxis, list(positions), _short(class_names), inches)
    panels[0].set_ylim(n - 0.4, -0.6)
    save_figure(figure, path)


@matplotlib_defaults()
def training_curves(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    target: float | None = None,
    best_epoch: float | None = None,
) -> None:
    """Draws loss and accuracy over the epochs, training and validation, with the best epoch and the target.

    Args:
        history: rows as in history.csv; values may be None.
        path: the PNG file to write.
        target: a validation accuracy, 0-1.
        best_epoch: the epoch to mark; None: none.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = new_figure(10, 3.8)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        style_axes(axes, quantity.capitalize(), grid="both")
        lines = (quantity, "training", BLUE), (f"val_{quantity}", "validation", VERMILION)
        for column, name, colour in lines:
            points = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) <= 30 else None
            axes.plot(x, y, color=colour, label=name, linewidth=1.8, marker=marker, markersize=3.5)
            if name == "validation" and best_epoch in dict(points):
                value = dict(points)[best_epoch]
                text = f"{value:.2%}" if quantity == "accuracy" else f"{value:.4f}"
                style = {"color": colour, "markeredgecolor": INK, "zorder": 3, "linestyle": "none"}
                label = f"best epoch, {best_epoch:g}: {text}"
                axes.plot([best_epoch], [value], marker="*", markersize=13, label=label, **style)
        drawn = [y for line in axes.lines for y in line.get_ydata() if y > 0 and math.isfinite(y)]
        if quantity == "loss" and drawn and max(drawn) > 100 * min(drawn):
            axes.set_yscale("log")
            axes.minorticks_off()
        if quantity == "accuracy":
            if target is not None:
                label = f"target: {100 * target:.4g}%"
                axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (5, 4)), label=label)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch", fontsize=9, color=INK)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=9, labelcolor=INK)
    save_figure(figure, path)


@matplotlib_defaults()
def confusion_matrix(
    labels: np.ndarray,
    predicted: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    called: str = "test images",
) -> None:
    """Draws the confusion matrix: rows are true classes, columns predicted ones, and a number counts images.

    The colour is the share of the row, on a square-root scale, so that rare errors are visible.

    Args:
        labels, predicted: integers [n].
        class_names: one for each class.
        path: the PNG file to write.
        called: what the title calls the images.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    n = len(class_names)
    counts = np.bincount(np.asarray(labels) * n + predicted, minlength=n * n).reshape(n, n)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    inches = max(min(0.58, 9 / n), 2.5 / n)  # the side of a cell
    figure = new_figure(n * inches + 2.4, n * inches + 1.6)
    axes = figure.add_subplot()
    accuracy = np.trace(counts) / max(1, counts.sum())
    between = " " if n * inches > 4 else "\n"  # so that the title has room
    style_axes(axes, f"{counts.sum():,} {called},{between}{accuracy:.2%} correct")
    drawn = _cells(axes, shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    if inches > 0.35:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.35 else INK
                size = min(9, inches * 72 / max(3.2, len(str(count)) * 0.75))
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=size, color=colour)
    names = _short(class_names)
    _name_ticks(axes.yaxis, range(n), names, inches)
    _name_ticks(axes.xaxis, range(n), names, inches, rotation=90 if inches < 0.4 else 45, ha="center")
    if inches >= 0.4:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_xlabel("predicted", fontsize=10, color=INK)
    axes.set_ylabel("true", fontsize=10, color=INK)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7, aspect=25, pad=0.02, format=PercentFormatter(1, 0))
    bar.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    bar.set_label("share of the true class", fontsize=9, color=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    save_figure(figure, path)


def misclassified_examples(
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    count: int = 20,
    called: str = "test images",
) -> None:
    """Draws the first misclassified images: true class, predicted class and its probability.

    Args:
        images: uint8 [n, height, width, 3].
        labels: integers [n].
        probabilities: float [n, classes].
        class_names: one for each class.
        path: the PNG file to write.
        count: images to draw, at most.
        called: what the title calls the images.
    """
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    first = wrong[:count]
    of = f"{len(labels):,} {called}"
    title = f"The first {len(first)} of {len(wrong):,} wrong among {of}: true → predicted"
    if len(wrong) == 0:
        figure = new_figure(8, 1)
        figure.text(0.5, 0.5, f"All {of} are right.", ha="center", va="center", color=INK)
        return save_figure(figure, path)
    names = list(map(_isolated, _short(class_names, 12)))
    captions = [
        f"{names[labels[i]]} → {names[predicted[i]]}\np={probabilities[i, predicted[i]]:.2f}" for i in first
    ]
    _captioned(images[first], captions, title, path)
