"""What the figures show."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from drawing import LIME, NAMES, NAVY, RED, history, pixels, probabilities, solid, texts, where
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from cifar10_trainer import figures


def test_sample_images_has_a_row_for_each_class(tmp_path):
    images = solid([RED, LIME, RED, NAVY, RED, RED])
    labels = np.array([0, 1, 0, 2, 0, 0])
    figures.sample_images(images, labels, NAMES, tmp_path / "s.png", per_class=3)
    picture = pixels(tmp_path / "s.png")
    rows = [np.flatnonzero(where(picture, c).any(axis=1)) for c in (RED, LIME, NAVY)]
    assert rows[0].max() < rows[1].min() and rows[1].max() < rows[2].min()
    area = [where(picture, c).sum() for c in (RED, LIME, NAVY)]
    # Three of the four red images fit, one of the other colours each; edges of the drawing are not exact.
    assert area[0] == pytest.approx(3 * area[1], rel=0.05) and area[1] == pytest.approx(area[2], rel=0.05)


def test_a_figure_makes_its_folder_and_the_parents_of_that(tmp_path):
    path = tmp_path / "runs" / "mine" / "samples.png"
    figures.sample_images(np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]), ("a", "b"), path)
    assert [p.name for p in path.parent.iterdir()] == ["samples.png"]


def test_drawn_images_have_the_pixels_of_the_data(tmp_path, drawn):
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
    figures.sample_images(images, np.array([1, 0, 1, 0]), ("a", "b"), tmp_path / "s.png", per_class=2)
    mosaic = np.asarray(drawn[0].axes[0].collections[0].get_array())
    gap = 1  # a sixteenth of six pixels, but at least one
    for row, column, index in [(0, 0, 1), (0, 1, 3), (1, 0, 0), (1, 1, 2)]:
        y, x = row * (6 + gap), column * (6 + gap)
        np.testing.assert_array_equal(mosaic[y : y + 6, x : x + 6], images[index])


def test_cells_are_drawn_as_imshow_draws_them(tmp_path):
    """The same picture as from Matplotlib's own way to draw an image, but where an edge falls between two pixels."""
    mosaic = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    for name, draw in (
        ("cells", figures._cells),
        ("imshow", lambda axes, m: axes.imshow(m, interpolation="nearest")),
    ):
        figure = figures.new_figure(3, 2.5)
        axes = figure.add_subplot()
        draw(axes, mosaic)
        axes.set_axis_off()
        figures.save_figure(figure, tmp_path / name)
        assert not figure.axes, "the figure is emptied"
    differs = (pixels(tmp_path / "cells") != pixels(tmp_path / "imshow")).any(axis=-1)
    assert differs.mean() < 0.005  # one line of 375


def test_random_samples_are_drawn_with_their_classes(tmp_path, drawn):
    images, labels = solid([(i, 0, 0) for i in range(25)]), np.arange(25) % 3
    figures.random_samples(images, labels, NAMES, tmp_path / "r.png")
    mosaic = np.asarray(drawn[0].axes[0].collections[0].get_array())
    reds = [mosaic[y, x, 0] for y in range(0, len(mosaic), len(mosaic) // 5) for x in range(0, 45, 9)]
    assert reds == list(range(25))
    assert texts(drawn[0].axes[0]) == [NAMES[red % 3] for red in reds]


@pytest.mark.parametrize("shape", [(512, 1), (1, 512)])
def test_figures_of_long_narrow_images_are_of_bounded_size(shape, tmp_path, drawn):
    images, labels = np.zeros((30, *shape, 3), np.uint8), np.arange(30) % 3
    figures.random_samples(images, labels, NAMES, tmp_path / "r.png")
    figures.sample_images(images, labels, NAMES, tmp_path / "s.png")
    assert all(max(figure.get_size_inches()) <= 50 for figure in drawn)
    for name in "rs":
        assert max(pixels(tmp_path / f"{name}.png").shape) <= 50 * figures.DPI


def test_class_distribution_draws_bars_to_scale(tmp_path, drawn):
    labels = np.repeat([0, 1, 2], [40, 20, 10])
    splits = {"training": labels, "validation": labels[:0], "test": np.array([0, 1, 1])}
    figures.class_distribution(splits, NAMES, tmp_path / "d.png")
    blue = where(pixels(tmp_path / "d.png"), figures.BLUE)
    lengths = sorted({int(n) for n in blue.sum(axis=1) if n})
    longest = lengths[-1]
    assert [n / longest for n in lengths[-3:]] == pytest.approx(
        [0.25, 0.5, 1], abs=0.02
    )  # a pixel or two of edge
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["training: 70 images", "test: 3 images"]
    assert texts(drawn[0].axes[0]) == ["40", "20", "10"] and texts(drawn[0].axes[1]) == ["1", "2", "0"]


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_training_curves_mark_the_best_epoch_and_the_target(tmp_path, drawn):
    rows = history(
        (1, 2.0, 0.3, None, None), (2, 1.0, 0.6, 1.1, 0.5), (3, 0.5, 0.8, 1.2, 0.7), (4, 0.4, 0.9, 1.3, 0.7)
    )
    figures.training_curves(rows, tmp_path / "t.png", target=0.85, best_epoch=3)
    loss, accuracy = (lines(axes) for axes in drawn[0].axes)
    assert loss["training"] == ([1, 2, 3, 4], [2.0, 1.0, 0.5, 0.4])
    assert loss["validation"] == ([2, 3, 4], [1.1, 1.2, 1.3])
    assert accuracy["validation"] == ([2, 3, 4], [0.5, 0.7, 0.7])
    assert accuracy["best epoch, 3: 70.00%"] == ([3], [0.7])
    assert loss["best epoch, 3: 1.2000"] == ([3], [1.2])  # though the loss was lower at 2
    assert accuracy["target: 85%"][1] == [0.85, 0.85] and not any("target" in label for label in loss)
    picture = pixels(tmp_path / "t.png")
    half = picture.shape[1] // 2
    for side in (picture[:, :half], picture[:, half:]):
        assert where(side, figures.BLUE).sum() > 500 and where(side, figures.VERMILION).sum() > 500


def test_training_curves_mark_the_epoch_that_they_are_told(tmp_path, drawn):
    rows = history((1, 2.0, 0.3, 1.5, 0.5), (2, 1.0, 0.6, 1.1, 0.6))
    figures.training_curves(rows, tmp_path / "t.png", best_epoch=1)
    assert lines(drawn[0].axes[1])["best epoch, 1: 50.00%"] == ([1], [0.5])


@pytest.mark.parametrize(("first", "scale"), [(3e6, "log"), (20.0, "linear"), (np.inf, "linear")])
def test_training_curves_survive_a_wild_start(tmp_path, drawn, first, scale):
    rows = history((1, 2.3, 0.1, first, 0.1), (2, 1.0, 0.6, 1.1, 0.6))
    figures.training_curves(rows, tmp_path / "t.png")
    assert drawn[0].axes[0].get_yscale() == scale
    assert where(pixels(tmp_path / "t.png"), figures.BLUE).sum() > 500  # the other line is still there


@pytest.mark.parametrize(
    "rows", [[], history((1, 2.0, None, None, None)), history((0.5, np.nan, 0.1, None, None))]
)
def test_training_curves_without_validation_or_anything(tmp_path, drawn, rows):
    figures.training_curves(rows, tmp_path / "t.png", target=0.85)
    assert not any(
        "best" in label or "validation" in label for axes in drawn[0].axes for label in lines(axes)
    )
    assert pixels(tmp_path / "t.png").std() > 0


def test_one_epoch_has_one_tick(tmp_path, drawn):
    figures.training_curves(history((1, 2.0, 0.3, 1.5, 0.5)), tmp_path / "t.png")
    low, high = drawn[0].axes[0].get_xlim()
    assert [t for t in drawn[0].axes[0].get_xticks() if low <= t <= high] == [1]


def test_long_names_stay_different():
    corn = [f"Corn_(maize)___{what}" for what in ("Common_rust_", "healthy", "Northern_Leaf_Blight")]
    assert figures._short(["cat", *corn]) == [
        "cat",
        "Corn_(maiz…rust_",
        "Corn_(maiz…althy",
        "Corn_(maiz…light",
    ]
    alike = [f"a_very_long_name_{i}_in_the_middle" for i in range(11)]
    short = figures._short(alike, 12)
    assert short[1] == "a_very_l… #1" and short[10] == "a_very_… #10"
    assert len(set(short)) == 11 and max(map(len, short)) == 12
    assert figures._short(["x" * 12, "x" * 13], 12) == ["x" * 12, "xxxxxxxx…xxx"]


def test_a_name_that_the_fonts_lack_is_a_number(tmp_path, drawn, recwarn):
    """Matplotlib's own font has no Chinese; boxes would all look alike."""
    names = ("cat", "日本語の犬", "שלום")
    figures.confusion_matrix(np.array([0, 1, 2]), np.array([0, 1, 1]), names, tmp_path / "c.png")
    ticks = [tick.get_text() for tick in drawn[0].axes[0].get_yticklabels()]
    assert ticks[0] == "cat" and ticks[2] == "שלום"
    assert ticks[1] == ("日本語の犬" if any(ord("語") in font for font in figures._letters()) else "class 1")
    assert not recwarn.list


def test_confusion_matrix_rows_are_the_truth(tmp_path, drawn):
    labels, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 1])
    figures.confusion_matrix(labels, predicted, NAMES, tmp_path / "c.png", called="validation images")
    axes = drawn[0].axes[0]
    # Written down by hand; the owl has no images, so its row is empty rather than not a number.
    np.testing.assert_allclose(axes.collections[0].get_array(), [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "3", (1, 0): "1", (1, 1): "2"}  # (column, row)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(NAMES)
    assert axes.get_title(loc="left") == "6 validation images,\n83.33% correct"
    assert where(pixels(tmp_path / "c.png"), "#f7fbff").sum() > 1000  # the palest blue: the empty cells


def test_misclassified_examples_are_the_first_wrong_ones(tmp_path, drawn):
    images = solid([(200, i, 0) for i in range(6)])
    labels = np.array([0, 0, 1, 2, 1, 0])
    p = probabilities(0, 1, 1, 0, 2, 2)
    figures.misclassified_examples(images, labels, p, NAMES, tmp_path / "m.png", count=3)
    axes = drawn[0].axes[0]
    assert texts(axes) == ["cat → dog\np=0.93", "owl → cat\np=0.93", "dog → owl\np=0.93"]
    assert axes.get_title(loc="left") == "The first 3 of 4 wrong among 6 test images: true → predicted"
    mosaic = np.asarray(axes.collections[0].get_array())
    assert [tuple(mosaic[0, x]) for x in (0, 9, 18)] == [(200, 1, 0), (200, 3, 0), (200, 4, 0)]


def test_an_arrow_reads_from_the_truth_to_the_prediction_in_any_script(tmp_path, drawn):
    names = ("שלום", "dog", "owl")
    figures.misclassified_examples(
        solid([RED]), np.array([0]), probabilities(1), names, tmp_path / "m.png", count=3
    )
    assert texts(drawn[0].axes[0]) == ["\u2068שלום\u2069 → dog\np=0.93"]


def test_captions_and_titles_have_room(tmp_path, drawn):
    """Pictures that are four times as wide as high, and two classes with long names."""
    wide = np.zeros((6, 32, 128, 3), np.uint8)
    figures.misclassified_examples(wide, np.zeros(6, int), probabilities(*[1] * 6), NAMES, tmp_path / "m.png")
    figures.confusion_matrix(
        np.array([0, 1] * 5000),
        np.array([0, 1] * 5000),
        ["a name of sixteen", "another long name"],
        tmp_path / "c.png",
        "validation",
    )
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
    captions, matrix = (figure.axes[0] for figure in drawn)
    text, picture = (
        captions.texts[0].get_window_extent(),
        captions.transData.transform([(0, 0), (0, 32)])[:, 1],
    )
    lines = [captions.transData.transform(captions.texts[i].get_position())[1] for i in (0, 5)]
    assert text.height + picture[0] - picture[1] <= lines[0] - lines[1]  # a caption, and the picture below it
    assert matrix._left_title.get_window_extent().x1 <= drawn[1].bbox.x1


def test_misclassified_examples_when_all_are_right(tmp_path, drawn):
    p = probabilities(0, 1)
    figures.misclassified_examples(solid([RED, RED]), np.array([0, 1]), p, NAMES, tmp_path / "m.png")
    assert [text.get_text() for text in drawn[0].texts] == ["All 2 test images are right."]
    assert pixels(tmp_path / "m.png").std() > 0


@pytest.mark.parametrize("n", [2, 30, 101])
def test_any_number_of_classes_fits(tmp_path, n):
    rng = np.random.default_rng(n)
    names = [f"$\\frac$ {i}, a rather long name" for i in range(n)]  # dollars are no formulas
    images = rng.integers(0, 256, (3 * n, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(3 * n) % n
    p = rng.dirichlet(np.ones(n), 3 * n).astype(np.float32)
    figures.sample_images(images, labels, names, tmp_path / "1.png")
    figures.class_distribution({"training": labels, "test": labels}, names, tmp_path / "2.png")
    figures.confusion_matrix(labels, p.argmax(1), names, tmp_path / "3.png")
    figures.misclassified_examples(images, labels, p, names, tmp_path / "4.png")
    for path in sorted(tmp_path.iterdir()):
        height, width, _ = pixels(path).shape
        assert 200 < height < 2500 and 300 < width < 2500, (path, width, height)


def test_two_threads_draw_what_one_draws(tmp_path):
    rows = history((1, 2.0, 0.3, 1.5, 0.5), (2, 1.0, 0.6, 1.1, 0.6))
    figures.training_curves(rows, tmp_path / "alone.png")
    threads = [
        threading.Thread(target=figures.training_curves, args=(rows, tmp_path / f"{i}.png")) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = (tmp_path / "alone.png").read_bytes()
    assert all((tmp_path / f"{i}.png").read_bytes() == alone for i in range(2))


def test_the_style_of_a_user_changes_no_figure_and_comes_back(tmp_path):
    """Not even LaTeX, which need not be there."""
    import matplotlib

    rows = history((1, 2.0, 0.3, 1.5, 0.5), (2, 1.0, 0.6, 1.1, 0.6))

    def draw(folder):
        folder.mkdir()
        figures.training_curves(rows, folder / "curves.png")
        figures.confusion_matrix(np.array([0, 1]), np.array([0, 0]), ("a", "b"), folder / "matrix.png")
        figures.sample_images(solid([RED]), np.array([0]), ("cat",), folder / "samples.png")
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    expected = draw(tmp_path / "plain")
    style = {"text.usetex": True, "font.size": 30.0, "axes.facecolor": "black", "savefig.bbox": "tight"}
    with matplotlib.rc_context(style):
        assert draw(tmp_path / "styled") == expected
        assert {name: matplotlib.rcParams[name] for name in style} == style
    assert len(expected) == 3


def test_png_is_what_it_says(tmp_path):
    figures.sample_images(solid([RED]), np.array([0]), ("cat",), tmp_path / "s.png")
    with Image.open(io.BytesIO((tmp_path / "s.png").read_bytes())) as image:
        image.verify()
