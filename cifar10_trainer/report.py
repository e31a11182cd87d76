"""The numbers and arrays of a finished run -> figures, classification_report.txt and report.html.

No TensorFlow here; scikit-learn is imported where it is used.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import measures
from .cluster.meeting import flatten
from .figures import (
    class_distribution,
    confusion_matrix,
    misclassified_examples,
    random_samples,
    reads_from_right,
    sample_images,
    training_curves,
)
from .files import write_atomic
from .run_folder import HISTORY_COLUMNS, RunFolder

if TYPE_CHECKING:
    from .datasets import Dataset

NO_TEST_IMAGES = (
    "This data set has no test images. The scores are on the validation images, which also chose the best"
    " weights, so expect a little less on new images."
)

Tile = tuple[str, str, str]  # value, what it is, detail
NOT_SCORED = "its images were not scored"
NOTHING_TO_SCORE = "there are neither test nor validation images"
FIGURES = {
    "training_curves": "Training",
    "confusion_matrix": "Confusion matrix",
    "misclassified_examples": "Misclassified",
    "class_distribution": "Classes",
    "sample_images": "Images of each class",
    "random_samples": "Images at random",
}
# data sets whose classes are of one size, so that accuracy is balanced accuracy
BALANCED = ("cifar10", "digits")
PER_CLASS, RANDOM = 10, 25  # training images that the report shows: of each class, and at random
SCORED_FIGURES = ("confusion_matrix", "misclassified_examples")


def classification_report(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> str:
    """scikit-learn's table of precision, recall and F1 of each class, with 4 digits; 0 where undefined."""
    from sklearn import metrics

    classes = list(range(len(class_names)))
    # After a name that reads from right to left, a mark keeps the numbers in their order.
    names = [f"{name}\u200e" if reads_from_right(name) else name for name in class_names]
    table = metrics.classification_report(
        labels, predicted, labels=classes, target_names=names, digits=4, zero_division=0
    )
    absent = [name for k, name in enumerate(names) if not np.any(labels == k)]
    if absent:
        more = f" and {len(absent) - 10} more classes" if len(absent) > 10 else ""
        table += f"\nNo images of {', '.join(absent[:10])}{more}: macro avg counts their recall as 0.\n"
    return table


def choose_samples(dataset: Dataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Chooses the training images that the report shows, so that the others need not stay in memory until then.

    Args:
        dataset: as the run split it.

    Returns:
        the figure's name -> its images and their labels.
    """
    images, labels = dataset.train_images, dataset.train_labels
    first = np.concatenate([np.flatnonzero(labels == c)[:PER_CLASS] for c in range(dataset.num_classes)])
    random = np.random.default_rng(0).permutation(len(labels))[:RANDOM]
    return {
        "sample_images": (images[first], labels[first]),
        "random_samples": (images[random], labels[random]),
    }


def write_report(
    folder: RunFolder,
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    dataset: Dataset,
    samples: Mapping[str, tuple[np.ndarray, np.ndarray]],
    probabilities: np.ndarray,
) -> None:
    """Writes classification_report.txt, figures/*.png and, last, report.html into the run folder.

    Args:
        folder: the run folder.
        config, metrics, history: the contents of config.json, metrics.json and history.csv.
        dataset, samples: as the run split it, its training images may be gone; and what `choose_samples` chose of them.
        probabilities: float [n, classes] of `dataset.test_images`; of the validation images where the data set has no
            test images, and the report says so; empty where it has neither, and the report leaves the scores out.
    """
    folder.check_there()
    names, train_labels = dataset.class_names, dataset.train_labels
    val_images, val_labels = dataset.validation or (dataset.train_images[:0], train_labels[:0])

    # ---- the parts that every run has
    drawn = {name: folder.figures / f"{name}.png" for name in FIGURES}
    sample_images(*samples["sample_images"], names, drawn["sample_images"], PER_CLASS)
    random_samples(*samples["random_samples"], names, drawn["random_samples"])
    splits = {"training": train_labels, "validation": val_labels, "test": dataset.test_labels}
    class_distribution(splits, names, drawn["class_distribution"])
    training_curves(history, drawn["training_curves"], metrics.get("target"), metrics.get("best_epoch"))

    # ---- the parts about the score
    scored, note, text, accuracy = "test", "", "", None
    balance: list[Tile] = []
    images, labels = dataset.test_images, dataset.test_labels
    if len(labels) == 0:
        scored, note, images, labels = "validation", NO_TEST_IMAGES, val_images, val_labels
    n = len(probabilities)
    averaged = _has_tta(metrics)
    if n == 0:
        note = f"This run has no test score: {NOT_SCORED if len(labels) else NOTHING_TO_SCORE}."
        drawn = {name: path for name, path in drawn.items() if name not in SCORED_FIGURES}
    else:
        assert n == len(labels), f"{n} rows of probabilities for {len(labels)} {scored} images"
        predicted = probabilities.argmax(axis=1)
        accuracy = float((predicted == labels).mean())
        if dataset.name not in BALANCED:
            balance = _balance(labels, predicted, train_labels, len(names), averaged)
        called = f"{scored} images{' with TTA' * averaged}"
        text = f"{n:,} {called}\n\n" + classification_report(labels, predicted, names)
        confusion_matrix(labels, predicted, names, drawn["confusion_matrix"], called)
        path = drawn["misclassified_examples"]
        misclassified_examples(images, labels, probabilities, names, path, called=called)

    folder.check_there()  # drawing takes seconds, and makes the folder
    text = "\n\n".join(filter(None, (note, text.rstrip()))) + "\n"
    write_atomic(folder.classification_report_file, text, parents=False)
    tiles = _tiles(metrics, scored, n, accuracy, balance)
    page = _page(tiles, note, drawn, text, config=config, metrics=metrics, history=history)
    write_atomic(folder.report_file, page, parents=False)


def _has_tta(metrics: Mapping[str, Any]) -> bool:
    """Whether the probabilities of the run are means over several views."""
    return metrics.get("views") not in (None, 1)


def _balance(
    labels: np.ndarray, predicted: np.ndarray, train_labels: np.ndarray, classes: int, averaged: bool
) -> list[Tile]:
    """The balanced accuracy and the smallest class's recall. averaged: whether TTA predicted."""
    balanced = measures.balanced_accuracy(labels, predicted, classes)
    recall = measures.smallest_class_recall(labels, predicted, train_labels, classes)
    detail = f"{'with TTA, ' * averaged}smallest class's recall {recall:.2%}"
    return [(f"{balanced:.2%}", "balanced accuracy", detail)]


def _tiles(
    metrics: Mapping[str, Any],
    scored: str,
    n: int,
    accuracy: float | None,
    balance: Sequence[Tile] = (),
) -> list[Tile]:
    """The key figures at the head of the page, without those that the run lacks. balance: to stand beside the accuracy."""
    get = metrics.get
    tiles: list[Tile] = []
    if accuracy is not None:
        averaged = _has_tta(metrics)
        tta = f", TTA of {measures.views_in_words(metrics)}" if averaged else ""
        interval = measures.interval_in_words(accuracy, n)
        detail = ", ".join(filter(None, (f"{n:,} images{tta}", interval)))
        tiles.append((f"{accuracy:.2%}", f"{scored} accuracy", detail))
        tiles += balance
        if averaged and get("test_accuracy") is not None:
            tiles.append((f"{get('test_accuracy'):.2%}", "test accuracy", "without TTA"))
    best, target, seconds = get("best_val_accuracy"), get("target"), get("seconds_to_target")
    if best is not None:
        # With TTA, a score on the same images stands beside it, and differs.
        without = ", without TTA" if scored == "validation" and _has_tta(metrics) else ""
        interval = measures.interval_in_words(best, get("n_validation") or 0)
        detail = f"epoch {_text(get('best_epoch'))}{without}" + (f", {interval}" if interval else "")
        tiles.append((f"{best:.2%}", "best validation accuracy", detail))
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
    """report.html: one file that opens offline, without any other."""
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
        "<h2>Numbers</h2>\n" + _table(flatten(metrics).items(), ("metric", "value")),
        "<h2>Configuration</h2>\n" + _table(flatten(config).items(), ("setting", "value")),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{recipe} on {dataset}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
