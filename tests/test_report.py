from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cifar10_trainer import report
from cifar10_trainer.datasets import Dataset
from cifar10_trainer.errors import RunError

NAMES = ("cat", "dog", "owl")
RED, LIME, NAVY = (250, 10, 10), (10, 250, 10), (10, 10, 120)


def solid(colours, size=8):
    """One image a colour, uint8 [n, size, size, 3]."""
    return np.tile(np.array(colours, np.uint8)[:, None, None], (1, size, size, 1))


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def where(picture, colour):
    """Boolean map of the pixels within 2 of `colour` (exact but for the rounding of the drawing)."""
    if isinstance(colour, str):
        colour = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (abs(picture - np.array(colour)) <= 2).all(axis=-1)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, to look at their contents; they are saved as usual, but not emptied."""
    figures, save = [], report.save_figure

    def keep(figure, path):
        monkeypatch.setattr(figure, "clear", lambda: None)
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(report, "save_figure", keep)
    return figures


def texts(axes):
    return [text.get_text() for text in axes.texts]


# ---- files


def test_history_survives_a_round_trip_exactly(tmp_path):
    rows = [
        {"epoch": 1, "loss": 0.1 + 0.2, "accuracy": np.float32(0.7), "val_loss": None, "val_accuracy": None},
        {"epoch": 2.9, "loss": float("inf"), "accuracy": 1.0, "val_loss": 1e-300, "learning_rate": 0.1},
    ]
    report.write_history(tmp_path / "history.csv", rows)
    first, second = report.read_history(tmp_path / "history.csv")
    assert tuple(first) == (
        "epoch",
        "loss",
        "accuracy",
        "val_loss",
        "val_accuracy",
        "learning_rate",
        "seconds",
    )
    assert first["epoch"] == 1 and isinstance(first["epoch"], int)
    assert first["loss"] == 0.1 + 0.2 and first["accuracy"] == float(np.float32(0.7))
    assert first["val_loss"] is None and first["seconds"] is None
    assert second["epoch"] == 2.9 and second["loss"] == float("inf") and second["val_loss"] == 1e-300
    text = (tmp_path / "history.csv").read_text()
    assert text.splitlines()[0] == "epoch,loss,accuracy,val_loss,val_accuracy,learning_rate,seconds"
    assert text.splitlines()[1] == "1,0.30000000000000004,0.699999988079071,,,,"


def test_history_without_rows(tmp_path):
    report.write_history(tmp_path / "history.csv", [])
    assert report.read_history(tmp_path / "history.csv") == []


def test_history_refuses_other_columns_and_leaves_the_file_alone(tmp_path):
    path = tmp_path / "history.csv"
    report.write_history(path, [{"epoch": 1}])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="speed"):
        report.write_history(path, [{"epoch": 1, "speed": 3}])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"epoch,loss\n1,2\n", b"\xff\xfe\x00", None])
def test_history_that_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "history.csv").write_bytes(content)
    with pytest.raises(RunError, match=r"cannot read .*history\.csv"):
        report.read_history(tmp_path / "history.csv")


def test_history_with_a_word_or_a_torn_row(tmp_path):
    path = tmp_path / "history.csv"
    head = ",".join(report.HISTORY_COLUMNS)
    for row in ("1,high,,,,,", "1,0.5"):
        path.write_text(f"{head}\n{row}\n")
        with pytest.raises(RunError, match="cannot read"):
            report.read_history(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    files.write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(RunError, match="No space left"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---- figures


def test_sample_images_has_a_row_for_each_class(tmp_path):
    images = solid([RED, LIME, RED, NAVY, RED, RED])
    labels = np.array([0, 1, 0, 2, 0, 0])
    report.sample_images(images, labels, NAMES, tmp_path / "s.png", per_class=3)
    picture = pixels(tmp_path / "s.png")
    rows = [np.flatnonzero(where(picture, c).any(axis=1)) for c in (RED, LIME, NAVY)]
    assert rows[0].max() < rows[1].min() and rows[1].max() < rows[2].min()
    area = [where(picture, c).sum() for c in (RED, LIME, NAVY)]
    # Three of the four red images fit, one of the other colours each; edges of the drawing are not exact.
    assert area[0] == pytest.approx(3 * area[1], rel=0.05) and area[1] == pytest.approx(area[2], rel=0.05)


def test_drawn_images_have_the_pixels_of_the_data(tmp_path, drawn):
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
    report.sample_images(images, np.array([1, 0, 1, 0]), ("a", "b"), tmp_path / "s.png", per_class=2)
    mosaic = np.asarray(drawn[0].axes[0].collections[0].get_array())
    gap = 1  # a sixteenth of six pixels, but at least one
    for row, column, index in [(0, 0, 1), (0, 1, 3), (1, 0, 0), (1, 1, 2)]:
        y, x = row * (6 + gap), column * (6 + gap)
        np.testing.assert_array_equal(mosaic[y : y + 6, x : x + 6], images[index])


def test_cells_are_drawn_as_imshow_draws_them(tmp_path):
    """The same picture as from Matplotlib's own way to draw an image, but where an edge falls between two pixels."""
    mosaic = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    for name, draw in (
        ("cells", report._cells),
        ("imshow", lambda axes, m: axes.imshow(m, interpolation="nearest")),
    ):
        figure = report.new_figure(3, 2.5)
        axes = figure.add_subplot()
        draw(axes, mosaic)
        axes.set_axis_off()
        report.save_figure(figure, tmp_path / name)
        assert not figure.axes, "the figure is emptied"
    differs = (pixels(tmp_path / "cells") != pixels(tmp_path / "imshow")).any(axis=-1)
    assert differs.mean() < 0.005  # one line of 375


def test_random_samples_depend_on_the_seed_alone(tmp_path, drawn):
    images, labels = solid([(i, 0, 0) for i in range(40)]), np.arange(40) % 3
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        report.random_samples(images, labels, NAMES, tmp_path / name, count=25, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c
    mosaic = np.asarray(drawn[0].axes[0].collections[0].get_array())
    reds = [mosaic[y, x, 0] for y in range(0, len(mosaic), len(mosaic) // 5) for x in range(0, 45, 9)]
    assert len(set(reds)) == 25, "images are drawn without repetition"
    assert texts(drawn[0].axes[0]) == [NAMES[red % 3] for red in reds]


def test_class_distribution_draws_bars_to_scale(tmp_path, drawn):
    labels = np.repeat([0, 1, 2], [40, 20, 10])
    splits = {"training": labels, "validation": labels[:0], "test": np.array([0, 1, 1])}
    report.class_distribution(splits, NAMES, tmp_path / "d.png")
    blue = where(pixels(tmp_path / "d.png"), report.BLUE)
    lengths = sorted({int(n) for n in blue.sum(axis=1) if n})
    longest = lengths[-1]
    assert [n / longest for n in lengths[-3:]] == pytest.approx(
        [0.25, 0.5, 1], abs=0.02
    )  # a pixel or two of edge
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["training: 70 images", "test: 3 images"]
    assert texts(drawn[0].axes[0]) == ["40", "20", "10"] and texts(drawn[0].axes[1]) == ["1", "2", "0"]


def history(*rows):
    keys = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_training_curves_mark_the_best_epoch_and_the_target(tmp_path, drawn):
    rows = history(
        (1, 2.0, 0.3, None, None), (2, 1.0, 0.6, 1.1, 0.5), (3, 0.5, 0.8, 1.2, 0.7), (4, 0.4, 0.9, 1.3, 0.7)
    )
    report.training_curves(rows, tmp_path / "t.png", target=0.85)
    loss, accuracy = (lines(axes) for axes in drawn[0].axes)
    assert loss["training"] == ([1, 2, 3, 4], [2.0, 1.0, 0.5, 0.4])
    assert loss["validation"] == ([2, 3, 4], [1.1, 1.2, 1.3])
    assert accuracy["validation"] == ([2, 3, 4], [0.5, 0.7, 0.7])
    assert accuracy["best epoch, 3: 70.00%"] == ([3], [0.7])  # the first of two equals
    assert loss["best epoch, 3: 1.2000"] == ([3], [1.2])  # the same epoch, though the loss was lower at 2
    assert accuracy["target: 85%"][1] == [0.85, 0.85] and not any("target" in label for label in loss)
    picture = pixels(tmp_path / "t.png")
    half = picture.shape[1] // 2
    for side in (picture[:, :half], picture[:, half:]):
        assert where(side, report.BLUE).sum() > 500 and where(side, report.VERMILION).sum() > 500


def test_training_curves_mark_the_epoch_that_they_are_told(tmp_path, drawn):
    rows = history((1, 2.0, 0.3, 1.5, 0.5), (2, 1.0, 0.6, 1.1, 0.6))
    report.training_curves(rows, tmp_path / "t.png", best_epoch=1)
    assert lines(drawn[0].axes[1])["best epoch, 1: 50.00%"] == ([1], [0.5])


@pytest.mark.parametrize(("first", "scale"), [(3e6, "log"), (20.0, "linear"), (np.inf, "linear")])
def test_training_curves_survive_a_wild_start(tmp_path, drawn, first, scale):
    rows = history((1, 2.3, 0.1, first, 0.1), (2, 1.0, 0.6, 1.1, 0.6))
    report.training_curves(rows, tmp_path / "t.png")
    assert drawn[0].axes[0].get_yscale() == scale
    assert where(pixels(tmp_path / "t.png"), report.BLUE).sum() > 500  # the other line is still there


@pytest.mark.parametrize(
    "rows", [[], history((1, 2.0, None, None, None)), history((0.5, np.nan, 0.1, None, None))]
)
def test_training_curves_without_validation_or_anything(tmp_path, drawn, rows):
    report.training_curves(rows, tmp_path / "t.png", target=0.85)
    assert not any(
        "best" in label or "validation" in label for axes in drawn[0].axes for label in lines(axes)
    )
    assert pixels(tmp_path / "t.png").std() > 0


def test_confusion_matrix_rows_are_the_truth(tmp_path, drawn):
    labels, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 1])
    report.confusion_matrix(labels, predicted, NAMES, tmp_path / "c.png", split="validation")
    axes = drawn[0].axes[0]
    # Written down by hand; the owl has no images, so its row is empty rather than not a number.
    np.testing.assert_allclose(axes.collections[0].get_array(), [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "3", (1, 0): "1", (1, 1): "2"}  # (column, row)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(NAMES)
    assert axes.get_title(loc="left") == "6 validation images, 83.33% correct"
    assert where(pixels(tmp_path / "c.png"), "#f7fbff").sum() > 1000  # the palest blue: the empty cells


def probabilities(*predicted, p=0.93):
    """Rows over three classes with `p` for the predicted one and the rest in equal parts."""
    rows = np.full((len(predicted), 3), (1 - p) / 2, np.float32)
    rows[np.arange(len(predicted)), list(map(int, predicted))] = p
    return rows


def test_misclassified_examples_are_the_first_wrong_ones(tmp_path, drawn):
    images = solid([(200, i, 0) for i in range(6)])
    labels = np.array([0, 0, 1, 2, 1, 0])
    p = probabilities(0, 1, 1, 0, 2, 2)
    report.misclassified_examples(images, labels, p, NAMES, tmp_path / "m.png", count=3)
    axes = drawn[0].axes[0]
    assert texts(axes) == ["cat → dog\np=0.93", "owl → cat\np=0.93", "dog → owl\np=0.93"]
    assert axes.get_title(loc="left") == "The first 3 of 4 wrong among 6 test images: true → predicted"
    mosaic = np.asarray(axes.collections[0].get_array())
    assert [tuple(mosaic[0, x]) for x in (0, 9, 18)] == [(200, 1, 0), (200, 3, 0), (200, 4, 0)]


def test_misclassified_examples_when_all_are_right(tmp_path, drawn):
    p = probabilities(0, 1)
    report.misclassified_examples(solid([RED, RED]), np.array([0, 1]), p, NAMES, tmp_path / "m.png")
    assert [text.get_text() for text in drawn[0].texts] == ["All 2 test images are right."]
    assert pixels(tmp_path / "m.png").std() > 0


@pytest.mark.parametrize("n", [2, 30, 101])
def test_any_number_of_classes_fits(tmp_path, n):
    rng = np.random.default_rng(n)
    names = [f"$\\frac$ {i}, a rather long name" for i in range(n)]  # dollars are no formulas
    images = rng.integers(0, 256, (3 * n, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(3 * n) % n
    p = rng.dirichlet(np.ones(n), 3 * n).astype(np.float32)
    report.sample_images(images, labels, names, tmp_path / "1.png")
    report.class_distribution({"training": labels, "test": labels}, names, tmp_path / "2.png")
    report.confusion_matrix(labels, p.argmax(1), names, tmp_path / "3.png")
    report.misclassified_examples(images, labels, p, names, tmp_path / "4.png")
    for path in sorted(tmp_path.iterdir()):
        height, width, _ = pixels(path).shape
        assert 200 < height < 2500 and 300 < width < 2500, (path, width, height)


def test_two_threads_draw_what_one_draws(tmp_path):
    rows = history((1, 2.0, 0.3, 1.5, 0.5), (2, 1.0, 0.6, 1.1, 0.6))
    report.training_curves(rows, tmp_path / "alone.png")
    threads = [
        threading.Thread(target=report.training_curves, args=(rows, tmp_path / f"{i}.png")) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = (tmp_path / "alone.png").read_bytes()
    assert all((tmp_path / f"{i}.png").read_bytes() == alone for i in range(2))


def test_importing_costs_no_drawing_library():
    code = (
        "import sys, cifar10_trainer.report; print({'matplotlib', 'sklearn', 'tensorflow'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- the report


def table(text):
    """{row name: its numbers} of a classification report."""
    rows = (re.match(r"\s*(\S.*?)\s{2,}([\d.\s]+)$", line) for line in text.splitlines())
    return {row[1]: row[2].split() for row in rows if row}


def test_classification_report_by_hand():
    labels, predicted = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 2])
    rows = table(report.classification_report(labels, predicted, ("cat", "dog", "owl", "yak")))
    assert rows["cat"] == ["0.5000", "0.5000", "0.5000", "2"]
    assert rows["dog"] == ["0.6667", "0.6667", "0.6667", "3"]
    assert rows["owl"] == ["1.0000", "1.0000", "1.0000", "1"]
    assert rows["yak"] == ["0.0000", "0.0000", "0.0000", "0"]
    assert rows["accuracy"] == ["0.6667", "6"]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sources, self.text, self.attributes = [], [], [], "", set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


EVIL = "<script>alert('1')</script>"


def write_run(workdir, *, n_test=4, n_validation=2, names=("cat", EVIL, "owl"), **changes):
    images = solid([RED, LIME, NAVY, RED, LIME, NAVY])
    labels = np.array([0, 1, 2, 0, 1, 2])
    test, validation = ((images[:n], labels[:n]) for n in (n_test, n_validation))
    dataset = Dataset("folder", images, labels, *test, names, "here", validation)
    metrics = {
        "recipe": "fast.default", "dataset": "folder", "target": 0.85, "best_val_accuracy": 0.875,
        "best_epoch": 2, "epoch_at_target": 2, "seconds_to_target": 71.23, "params": 1234567,
        "test_accuracy": None, "views": 1,
    }  # fmt: skip
    values = {
        "config": {
            "recipe": "fast.default",
            "optimizer": {"name": "sgd", "learning_rate": 0.1},
            "note": "a <b> & c",
        },
        "metrics": metrics,
        "history": history((1, 2.0, 0.3, 1.5, 0.5), (2, 1.0, 0.6, None, None)),
        "dataset": dataset,
        "test_probabilities": probabilities(*[0, 1, 2, 1][: n_test or n_validation]),
    }
    report.write_run(workdir, **{**values, **changes})
    return Page((workdir / "report.html").read_text(encoding="utf-8"))


def test_write_run_writes_everything(tmp_path):
    page = write_run(tmp_path)
    figures = {"sample_images", "random_samples", "class_distribution", "training_curves", "confusion_matrix"}
    figures |= {"misclassified_examples"}
    assert {p.name for p in tmp_path.iterdir()} == {"figures", "classification_report.txt", "report.html"}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {f"{name}.png" for name in figures}
    text = (tmp_path / "classification_report.txt").read_text()
    assert table(text)["accuracy"] == ["0.7500", "4"] and "validation" not in text

    # The page: well formed, complete, and in need of nothing else.
    assert page.open == [] and "fast.default on folder" in page.text
    for expected in (
        "75.00%",
        "4 images",
        "87.50%",
        "71.2 s",
        "to 85% on validation",
        "1,234,567",
        "optimizer.learning_rate",
    ):
        assert expected in page.text, expected
    assert text.strip() in page.text and "a <b> & c" in page.text
    drawings = {p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in page.sources)
    assert {base64.b64decode(source.removeprefix(prefix)) for source in page.sources} == drawings


def test_the_page_is_self_contained_and_escaped(tmp_path):
    page = write_run(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "object", "embed", "b>"} & set(page.tags)
    assert not any(name.startswith("on") for name in page.attributes)
    assert not re.search(r"https?:|@import|url\(", text)
    assert EVIL in page.text and "&lt;script&gt;" in text  # as text, not as a tag
    assert "prefers-color-scheme: dark" in text


def test_without_test_images_everything_says_validation(tmp_path, drawn):
    page = write_run(tmp_path, n_test=0)
    text = (tmp_path / "classification_report.txt").read_text()
    assert text.startswith("This data set has no test images.") and table(text)["accuracy"] == ["1.0000", "2"]
    assert "This data set has no test images." in page.text
    assert "validation accuracy" in page.text and "test accuracy" not in page.text
    titles = [axes.get_title(loc="left") for figure in drawn for axes in figure.axes]
    assert "2 validation images, 100.00% correct" in titles
    assert "All 2 validation images are right." in [t.get_text() for figure in drawn for t in figure.texts]


def test_averaged_views_are_named(tmp_path):
    metrics = {"views": 6, "test_accuracy": 0.5}
    page = write_run(tmp_path, metrics=metrics)
    assert "75.00%test accuracy4 images, 6 views" in page.text and "50.00%test accuracyone view" in page.text


def test_without_test_and_validation_images_there_is_no_score(tmp_path):
    page = write_run(tmp_path, n_test=0, n_validation=0, test_probabilities=probabilities())
    assert "no test score" in (tmp_path / "classification_report.txt").read_text()
    assert "no test score" in page.text and "test accuracy" not in page.text
    assert not (tmp_path / "figures" / "confusion_matrix.png").exists()


def test_probabilities_must_cover_every_image(tmp_path):
    with pytest.raises(AssertionError, match="3 rows of probabilities for 4 test images"):
        write_run(tmp_path, test_probabilities=probabilities(0, 1, 2))
    assert not (tmp_path / "report.html").exists()


def test_png_is_what_it_says(tmp_path):
    report.sample_images(solid([RED]), np.array([0]), ("cat",), tmp_path / "s.png")
    with Image.open(io.BytesIO((tmp_path / "s.png").read_bytes())) as image:
        image.verify()
