"""Numbers and arrays -> figures, history.csv, classification_report.txt and report.html.

No TensorFlow here. Matplotlib is used through its object interface only, so nothing global changes and
threads may draw at the same time; it and scikit-learn are imported where they are used, because
training writes `history.csv` long before there is anything to draw. Files appear complete or not at all.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import html
import io
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .errors import RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .datasets import Dataset

HISTORY_COLUMNS = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")
NO_TEST_IMAGES = (
    "This data set has no test images. The scores are on the validation images, which also chose the best"
    " weights, so expect a little less on new images."
)

# Okabe and Ito's colours: told apart with any colour vision, and in grey.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, FAINT = "#24292f", "#d8dee4"
DPI = 150
FIGURES = {
    "training_curves": "Training",
    "confusion_matrix": "Confusion matrix",
    "misclassified_examples": "Misclassified",
    "class_distribution": "Classes",
    "sample_images": "Images of each class",
    "random_samples": "Images at random",
}
SCORED_FIGURES = ("confusion_matrix", "misclassified_examples")
MAX_CLASSES_SHOWN = 100  # in sample_images; more would be too small to see


# ---- files -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` to write to; in the end it becomes `path`, whole or not at all. Makes the folder.

    It ends as `path` does, since formats are told by that. Raises RunError where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) to `path`, whole or not at all. Makes the folder. Raises RunError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_history(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes history.csv, one row an epoch; the keys are HISTORY_COLUMNS, and None or a missing key is empty.

    Numbers are written so that `read_history` gives back the same ones. Raises ValueError on another key.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        # int() and float() because a NumPy number's repr is not its value
        writer.writerow({k: v if v is None or isinstance(v, int) else repr(float(v)) for k, v in row.items()})
    write_atomic(path, text.getvalue())


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of `write_history`: numbers, None where empty. Raises RunError when it is no such file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.reader(file, strict=True)
            columns = next(rows, [])
            if tuple(columns) != HISTORY_COLUMNS:
                raise ValueError(f"its columns are {columns}, not {', '.join(HISTORY_COLUMNS)}")
            return [{k: _number(v) for k, v in zip(columns, row, strict=True)} for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise RunError(f"cannot read {path}: {error}") from error


def _number(text: str) -> int | float | None:
    try:
        return int(text) if text else None
    except ValueError:
        return float(text)


# ---- drawing ---------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """A white figure of so many inches, apart from pyplot and its state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the PNG file `path`, whole or not at all, and empties the figure."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, facecolor="white")
    write_atomic(path, png.getvalue())
    figure.clear()  # its parts refer to one another: their memory would stay until the garbage collector comes by


def style_axes(axes: Axes, title: str = "", grid: Literal["x", "both"] | None = None) -> None:
    """The house's look. title: at the top left; grid: the lines behind the data; None: neither lines nor frame."""
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
    axis.set_ticklabels([_shorten(n) for n in names], fontsize=size, parse_math=False, **style)


def _shorten(name: str, length: int = 16) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


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
    """Draws numbers [h, w] or pixels [h, w, 3], a square each, whose centres are whole numbers; y goes down.

    The same picture as `imshow` without interpolation, for CIFAR-10's images in half its time, and without its
    floating-point copies of the whole figure.
    """
    edges = (np.arange(n + 1) - 0.5 for n in values.shape[1::-1])
    drawn = axes.pcolormesh(*edges, values, antialiased=False, **style)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    return drawn


def _captioned(images: np.ndarray, captions: Sequence[str], title: str, path: str | os.PathLike[str]) -> None:
    """A grid of five columns, a caption below each image."""
    columns, (height, width) = 5, images.shape[1:3]
    lines = max(caption.count("\n") + 1 for caption in captions)
    longest = max(len(line) for caption in captions for line in caption.split("\n"))
    below, right = round(height * (0.08 + 0.1 * lines)), max(1, round(width * 0.12))
    mosaic = _mosaic(images, columns, (below, right))
    figure = new_figure(8, 8 * mosaic.shape[0] / mosaic.shape[1] + 0.35)
    axes = figure.add_subplot()
    style_axes(axes, title)
    _show(axes, mosaic, height)
    axes.set_axis_off()
    for i, caption in enumerate(captions):
        x = i % columns * (width + right) + width / 2
        y = i // columns * (height + below) + height * (1 + 0.1 * lines)  # of the last line
        size = min(8.5, 170 / longest)
        style: dict[str, Any] = {"fontsize": size, "color": INK, "linespacing": 1.15, "parse_math": False}
        axes.text(x, y, caption, ha="center", va="baseline", **style)
    save_figure(figure, path)


def sample_images(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    per_class: int = 10,
) -> None:
    """Draws the first `per_class` images of each class, a row a class, to the PNG file `path`.

    images: uint8 [n, height, width, 3]; labels: whole numbers [n]. More than 25 classes stand in several
    columns with fewer images each; more than MAX_CLASSES_SHOWN are not all shown, and the title says so.
    """
    shown = min(len(class_names), MAX_CLASSES_SHOWN)
    blocks = math.ceil(shown / 25)
    rows = math.ceil(shown / blocks)
    per_class = per_class if blocks == 1 else min(per_class, max(3, 12 // blocks))
    height, width = images.shape[1:3]
    gap = max(1, round(height / 16)), max(1, round(width / 16))
    cell = 0.6 if blocks == 1 else 0.36
    names_width = 0.085 * max(len(_shorten(name)) for name in class_names) + 0.15
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
        _name_ticks(axes.yaxis, centres, [class_names[c] for c in classes], cell)
    save_figure(figure, path)


def random_samples(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    count: int = 25,
    seed: int = 0,
) -> None:
    """Draws `count` images, chosen by `seed` alone, in a labelled grid. Arguments as in `sample_images`."""
    chosen = np.random.default_rng(seed).permutation(len(images))[:count]
    captions = [_shorten(class_names[c]) for c in labels[chosen]]
    _captioned(images[chosen], captions, "Training images, chosen at random", path)


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
    _name_ticks(panels[0].yaxis, list(positions), class_names, inches)
    panels[0].set_ylim(n - 0.4, -0.6)
    save_figure(figure, path)


def training_curves(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    target: float | None = None,
    best_epoch: float | None = None,
) -> None:
    """Draws loss and accuracy over the epochs, training and validation, with the best epoch and the target.

    history: rows as in history.csv; values may be None. target: a validation accuracy, 0-1.
    best_epoch: the epoch to mark; None: the first one with the highest val_accuracy, where there is any.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    validated = [row for row in history if row.get("val_accuracy") is not None]
    if best_epoch is None and validated:
        best_epoch = max(validated, key=lambda row: row["val_accuracy"])["epoch"]
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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch", fontsize=9, color=INK)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=9, labelcolor=INK)
    save_figure(figure, path)


def confusion_matrix(
    labels: np.ndarray,
    predicted: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    split: str = "test",
) -> None:
    """Draws the confusion matrix: a row a true class, a column a predicted one; numbers are images.

    The colour is the share of the row, on a square-root scale so that rare errors show.
    labels, predicted: whole numbers [n]; split: what the images are called in the title.
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
    style_axes(axes, f"{counts.sum():,} {split} images, {accuracy:.2%} correct")
    drawn = _cells(axes, shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    if inches > 0.35:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.35 else INK
                size = min(9, inches * 72 / max(3.2, len(str(count)) * 0.75))
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=size, color=colour)
    _name_ticks(axes.yaxis, range(n), class_names, inches)
    _name_ticks(axes.xaxis, range(n), class_names, inches, rotation=90 if inches < 0.4 else 45, ha="center")
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
    split: str = "test",
) -> None:
    """Draws the first `count` images that are wrong: true class, predicted class and its probability.

    images: uint8 [n, height, width, 3]; labels: [n]; probabilities: [n, classes].
    """
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    first = wrong[:count]
    of = f"{len(labels):,} {split} images"
    title = f"The first {len(first)} of {len(wrong):,} wrong among {of}: true → predicted"
    if len(wrong) == 0:
        figure = new_figure(8, 1)
        figure.text(0.5, 0.5, f"All {of} are right.", ha="center", va="center", color=INK)
        return save_figure(figure, path)
    captions = [
        f"{_shorten(class_names[labels[i]], 12)} → {_shorten(class_names[predicted[i]], 12)}\n"
        f"p={probabilities[i, predicted[i]]:.2f}"
        for i in first
    ]
    _captioned(images[first], captions, title, path)


# ---- the report ------------------------------------------------------------------------------------------


def classification_report(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> str:
    """scikit-learn's table of precision, recall and F1 of each class, with 4 digits; 0 where undefined."""
    from sklearn import metrics

    classes = list(range(len(class_names)))
    return metrics.classification_report(
        labels, predicted, labels=classes, target_names=list(class_names), digits=4, zero_division=0
    )


def write_run(
    workdir: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    dataset: Dataset,
    test_probabilities: np.ndarray,
) -> None:
    """Writes classification_report.txt, figures/*.png and, last, report.html into `workdir`.

    config, metrics: as in config.json and metrics.json; history: rows as in history.csv; dataset: parted,
    its training images are those trained on, its `validation` those held out. test_probabilities:
    [n, classes] of `dataset.test_images`, or of the validation images where the data set has no test images;
    the report then says so. Empty where there are neither: what needs them is left out.
    """
    workdir, names = Path(workdir), dataset.class_names
    train_images, train_labels = dataset.train_images, dataset.train_labels
    val_images, val_labels = dataset.validation or (train_images[:0], train_labels[:0])

    # ---- the parts that every run has
    drawn = {name: workdir / "figures" / f"{name}.png" for name in FIGURES}
    sample_images(train_images, train_labels, names, drawn["sample_images"])
    random_samples(train_images, train_labels, names, drawn["random_samples"])
    splits = {"training": train_labels, "validation": val_labels, "test": dataset.test_labels}
    class_distribution(splits, names, drawn["class_distribution"])
    training_curves(history, drawn["training_curves"], metrics.get("target"), metrics.get("best_epoch"))

    # ---- the parts about the score
    scored, note, text, accuracy = "test", "", "", None
    images, labels = dataset.test_images, dataset.test_labels
    if len(labels) == 0:
        scored, note, images, labels = "validation", NO_TEST_IMAGES, val_images, val_labels
    n = len(test_probabilities)
    assert n == len(labels), f"{n} rows of probabilities for {len(labels)} {scored} images"
    if n == 0:
        note = "This run has no test score: there are neither test nor validation images."
        drawn = {name: path for name, path in drawn.items() if name not in SCORED_FIGURES}
    else:
        predicted = test_probabilities.argmax(axis=1)
        accuracy = float((predicted == labels).mean())
        text = classification_report(labels, predicted, names)
        confusion_matrix(labels, predicted, names, drawn["confusion_matrix"], scored)
        path = drawn["misclassified_examples"]
        misclassified_examples(images, labels, test_probabilities, names, path, split=scored)

    # ---- the two texts
    text = "\n\n".join(filter(None, (note, text.rstrip()))) + "\n"
    write_atomic(workdir / "classification_report.txt", text)
    tiles = _tiles(metrics, scored, n, accuracy)
    page = _page(tiles, note, drawn, text, config=config, metrics=metrics, history=history)
    write_atomic(workdir / "report.html", page)


Tile = tuple[str, str, str]  # value, what it is, detail


def _tiles(metrics: Mapping[str, Any], scored: str, n: int, accuracy: float | None) -> list[Tile]:
    """The key numbers; those that the run does not have are left out."""
    get = metrics.get
    tiles: list[Tile] = []
    if accuracy is not None:
        averaged = get("views") not in (None, 1)
        views = f", {get('views')} views" if averaged else ""
        tiles.append((f"{accuracy:.2%}", f"{scored} accuracy", f"{n:,} images{views}"))
        if averaged and get("test_accuracy") is not None:
            tiles.append((f"{get('test_accuracy'):.2%}", "test accuracy", "one view"))
    best, target, seconds = get("best_val_accuracy"), get("target"), get("seconds_to_target")
    if best is not None:
        tiles.append((f"{best:.2%}", "best validation accuracy", f"epoch {_text(get('best_epoch'))}"))
    if best is not None and target is not None:
        what = f"to {100 * target:.4g}% on validation"
        if seconds is None:
            tiles.append(("not reached", what, ""))
        else:
            tiles.append((f"{seconds:,.1f} s", what, f"epoch {_text(get('epoch_at_target'))}"))
    if get("train_seconds") is not None:
        tiles.append((f"{get('train_seconds'):,.1f} s", "training", f"{_text(get('epochs'))} epochs"))
    if get("images_per_second") is not None:
        tiles.append((f"{get('images_per_second'):,.0f}", "images a second", _text(get("precision"))))
    if get("params") is not None:
        tiles.append((f"{get('params'):,}", "parameters", ""))
    return tiles


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> str:
    lines = ["<tr>" + "".join(f"<td>{html.escape(_text(v))}</td>" for v in row) + "</tr>" for row in rows]
    top = "<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead>{top}</thead><tbody>{body}</tbody></table></div>'


STYLE = """
:root { color-scheme: light dark;
  --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --page: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #30363d; --page: #0d1117; --card: #161b22; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem;
  color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .3rem; font-size: 1.15rem;
  border-bottom: 1px solid var(--line); }
.note { margin: 1.25rem 0; padding: .75rem 1rem; color: var(--ink); background: var(--card);
  border-left: 4px solid #d55e00; border-radius: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
.tiles div { padding: .75rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tiles small { display: block; color: var(--soft); line-height: 1.35; }
img { display: block; max-width: 100%; margin: 0 auto; padding: .5rem; background: #ffffff;
  border-radius: 8px; }
.scroll { overflow: auto; max-height: 32rem; border: 1px solid var(--line); border-radius: 8px; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); }
tbody tr:last-child td { border-bottom: 0; }
pre { overflow-x: auto; margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; font-size: .85rem; }
"""


def _page(
    tiles: Sequence[tuple[str, str, str]],
    note: str,
    figures: Mapping[str, Path],
    text: str,
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> str:
    """report.html: one file, which needs nothing else and opens offline."""
    recipe, dataset = (html.escape(_text(metrics.get(key))) for key in ("recipe", "dataset"))
    cards = "".join(
        f"<div><b>{html.escape(a)}</b><small>{html.escape(b)}</small><small>{html.escape(c)}</small></div>"
        for a, b, c in tiles
    )
    parts = [f"<h1>{recipe} on {dataset}</h1>"]
    if note:
        parts.append(f'<p class="note">{html.escape(note)}</p>')
    parts.append(f'<div class="tiles">{cards}</div>')
    for name, path in figures.items():
        heading = FIGURES[name]
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<h2>{heading}</h2>\n<img alt="{heading}" src="data:image/png;base64,{data}">')
    rows = [[row.get(column) for column in HISTORY_COLUMNS] for row in history]
    parts += [
        f"<h2>Classification report</h2>\n<pre>{html.escape(text)}</pre>",
        "<h2>History</h2>\n" + _table(rows, HISTORY_COLUMNS),
        "<h2>Numbers</h2>\n" + _table(_flat(metrics), ("metrics.json", "")),
        "<h2>Configuration</h2>\n" + _table(_flat(config), ("config.json", "")),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{recipe} on {dataset}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
