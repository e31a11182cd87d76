"""The report of a run: its page, its text and what it says where something is missing."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from drawing import LIME, NAVY, RED, history, probabilities, solid

from cifar10_trainer import report
from cifar10_trainer.datasets import Dataset
from cifar10_trainer.run_folder import RunFolder


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
    text = report.classification_report(labels, predicted, ("cat", "dog", "owl", "yak"))
    rows = table(text)
    assert rows["cat"] == ["0.5000", "0.5000", "0.5000", "2"]
    assert rows["dog"] == ["0.6667", "0.6667", "0.6667", "3"]
    assert rows["owl"] == ["1.0000", "1.0000", "1.0000", "1"]
    assert rows["yak"] == ["0.0000", "0.0000", "0.0000", "0"]
    assert rows["accuracy"] == ["0.6667", "6"]
    assert text.endswith("No images of yak: macro avg counts their recall as 0.\n")
    assert "No images" not in report.classification_report(labels, predicted, ("cat", "dog", "owl"))


def test_after_a_name_from_right_to_left_numbers_keep_their_order():
    labels = np.array([0, 0, 1, 1])
    text = report.classification_report(labels, labels, ("שלום", "cat"))
    (line,) = (line for line in text.splitlines() if "שלום" in line)
    assert line.split()[0] == "שלום\u200e"  # the mark: what follows reads from left to right
    assert "cat\u200e" not in text


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
        "probabilities": probabilities(*[0, 1, 2, 1][: n_test or n_validation]),
    }
    values |= changes
    samples = report.choose_samples(values["dataset"])
    report.write_report(RunFolder(workdir), samples=samples, **values)
    return Page((workdir / "report.html").read_text(encoding="utf-8"))


def test_images_at_random_are_the_same_ones_each_time_and_none_twice():
    images, labels = solid([(i, 0, 0) for i in range(40)]), np.arange(40) % 3
    data = Dataset("folder", images, labels, images[:0], labels[:0], ("cat", "dog", "owl"), "here")
    (shown, classes), (again, _) = (report.choose_samples(data)["random_samples"] for _ in range(2))
    reds = shown[:, 0, 0, 0]
    assert len(set(reds.tolist())) == 25 and (again == shown).all() and (classes == reds % 3).all()


def test_write_run_writes_everything(tmp_path):
    page = write_run(tmp_path)
    figures = {"sample_images", "random_samples", "class_distribution", "training_curves", "confusion_matrix"}
    figures |= {"misclassified_examples"}
    assert {p.name for p in tmp_path.iterdir()} == {"figures", "classification_report.txt", "report.html"}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {f"{name}.png" for name in figures}
    text = (tmp_path / "classification_report.txt").read_text()
    assert table(text)["accuracy"] == ["0.7500", "4"] and "validation" not in text
    assert text.startswith("4 test images")

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
    assert "2 validation images,\n100.00% correct" in titles
    assert "All 2 validation images are right." in [t.get_text() for figure in drawn for t in figure.texts]


def test_test_time_augmentation_is_named(tmp_path):
    metrics = {"views": 6, "test_accuracy": 0.5}
    page = write_run(tmp_path, metrics=metrics)
    assert (
        "75.00%test accuracy4 images, TTA of 6 views" in page.text
        and "50.00%test accuracywithout TTA" in page.text
    )


def test_without_test_and_validation_images_there_is_no_score(tmp_path):
    page = write_run(tmp_path, n_test=0, n_validation=0, probabilities=probabilities())
    assert "no test score" in (tmp_path / "classification_report.txt").read_text()
    assert "no test score" in page.text and "test accuracy" not in page.text
    assert not (tmp_path / "figures" / "confusion_matrix.png").exists()


def test_probabilities_must_cover_every_image(tmp_path):
    with pytest.raises(AssertionError, match="3 rows of probabilities for 4 test images"):
        write_run(tmp_path, probabilities=probabilities(0, 1, 2))
    assert not (tmp_path / "report.html").exists()
