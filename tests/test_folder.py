"""Folders of pictures as people have them: layouts, stray files, links, damaged pictures, and the record of a run's files."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cifar10_trainer import datasets
from cifar10_trainer.datasets import folder, images
from cifar10_trainer.errors import ConfigError, RunError
from cifar10_trainer.run_folder import RunFolder

COLOURS = {"apple": (200, 30, 30), "lemon": (230, 220, 40), "plum": (90, 20, 90)}


def draw(path, colour, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), tuple(max(0, c - shade) for c in colour)).save(path)


@pytest.fixture
def fruit(tmp_path):
    """<class>/*: 10 apples, 20 lemons and 5 plums, each picture in a shade of its own."""
    root = tmp_path / "fruit"
    for (name, colour), count in zip(COLOURS.items(), (10, 20, 5), strict=True):
        for i in range(count):
            draw(root / name / f"{i}.png", colour, i)
    return root


def load(root, **options):
    """The data set of 8x8 pixels, and what was said."""
    said = []
    return datasets.load("folder", root, 8, log=said.append, **options), said


def colours(pixels):
    return {tuple(image[0, 0].tolist()) for image in pixels}


def test_unknown_options_are_refused_before_anything_is_read(fruit):
    for options, text in (
        ({"resize": "stretch"}, "unknown resize 'stretch'; allowed: squash, crop, pad"),
        ({"resize": None}, "unknown resize None"),
        ({"only": "tst"}, "unknown only 'tst'; allowed: train, validation, test. Did you mean 'test'"),
        ({"image_size": "32"}, "image_size is '32'; allowed: a whole number from 8 to 512"),
    ):
        with pytest.raises(ConfigError, match=text):
            datasets.load("folder", fruit, **options)


def test_pictures_of_fewer_bits_than_their_files_are_nearly_black_and_a_line_says_so(tmp_path):
    """A camera of 12 bits writes 0-4095 into files of 16: 4095 / 257 rounds to 16 of 255."""
    for brightest, text in ((4095, "the brightest value of all pictures in .* is 16 of 255"), (65535, None)):
        root = tmp_path / str(brightest)
        for name in ("cells", "dust"):
            for i in range(3):
                values = np.linspace(0, brightest, 81, dtype=np.uint16).reshape(9, 9)
                (root / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.roll(values, i)).save(root / name / f"{i}.png")
        _, said = load(root)
        assert len(said) == (text is not None)
        if text:
            assert re.search(text, said[0]) and "scale the values to 0-65535" in said[0]


# ---- layouts


def run_in(path):
    """A run folder as it is on the disk, with a figure in it; a picture for who does not know."""
    draw(path / "figures" / "sample_images.png", (1, 2, 3))
    (path / "config.json").write_text("{}")
    (path / "history.csv").write_text("")


def test_runs_among_the_pictures_are_no_class(fruit):
    """Runs, cross-validations and searches, and the folder in which the run works that reads the pictures."""
    expected, _ = load(fruit)
    run_in(fruit / "runs" / "one")
    run_in(fruit / "runs" / "folds" / "fold-1-of-2")
    (fruit / "runs" / "folds" / "folds.json").write_text("{}")
    draw(fruit / "searches" / "mine" / "search.png", (1, 2, 3))
    (fruit / "searches" / "mine" / "search.json").write_text("{}")
    run_in(fruit / "apple" / "two")
    (fruit / "out" / "begins").mkdir(parents=True)
    data, said = load(fruit, workdir=fruit / "out" / "begins")
    assert data.class_names == expected.class_names
    np.testing.assert_array_equal(data.train_images, expected.train_images)
    assert "4 run folder(s)" in said[0]  # the one that reads them does not count
    with pytest.raises(RunError, match=r"the class folder .*out holds no pictures"):
        load(fruit)


@pytest.mark.parametrize("layout", ["", "train"])
def test_the_folder_of_the_run_itself_is_nothing_strange(fruit, tmp_path, layout):
    root = tmp_path / "root"
    root.mkdir()
    shutil.move(fruit, root / layout if layout else root / "fruit")
    root = root if layout else root / "fruit"
    (root / "runs" / "begins").mkdir(parents=True)
    data, said = load(root, workdir=root / "runs" / "begins", strict=True)
    assert len(data.class_names) == 3 and said == []
    assert folder.size_of(root, root / "runs" / "begins").classes == 3
    assert layout or folder.size_of(root) is None  # an empty class


def test_a_folder_that_may_hold_a_run_keeps_its_pictures(fruit):
    run_in(fruit)
    draw(fruit / "search.png", (1, 2, 3))  # of a search
    assert list(folder.find_pictures(fruit)) == []
    found = list(folder.find_pictures(fruit, may_hold_run=True))
    assert len(found) == 35 and not any("figures" in path or "search" in path for path in found)


def test_a_run_among_the_classes_themselves(fruit):
    expected, _ = load(fruit)
    run_in(fruit)
    (fruit / "tensorboard").mkdir()
    for workdir in (None, fruit):
        data, _ = load(fruit, workdir=workdir)
        assert data.class_names == expected.class_names
    for path in (fruit / "config.json", fruit / "history.csv"):
        path.unlink()
    data, _ = load(fruit, workdir=fruit)
    assert data.class_names == expected.class_names


def test_a_class_with_a_file_of_another_program_stays_a_class(fruit):
    (fruit / "apple" / "config.json").write_text("{}")
    (fruit / "apple" / "metrics.json").write_text("{}")
    (fruit / "apple" / "figures").mkdir()
    data, _ = load(fruit)
    assert data.class_names == ("apple", "lemon", "plum") and np.bincount(data.train_labels)[0] == 8


def test_runs_beside_train_are_left_out(fruit, tmp_path):
    (tmp_path / "root").mkdir()
    shutil.move(fruit, tmp_path / "root" / "train")
    run_in(tmp_path / "root" / "runs" / "one")
    data, said = load(tmp_path / "root")
    assert len(data.class_names) == 3 and "folder runs" in said[0]


def test_pictures_that_are_all_to_be_scored(fruit):
    data, _ = load(fruit, cut=False)
    assert np.bincount(data.test_labels).tolist() == [10, 20, 5] and len(data.train_labels) == 0
    assert folder.is_cut(data) and data.class_names == ("apple", "lemon", "plum")


def test_of_simple_class_folders_a_fifth_of_each_class_is_for_the_test(fruit):
    data, said = load(fruit)
    assert data.class_names == ("apple", "lemon", "plum") and data.validation is None and said == []
    assert np.bincount(data.test_labels).tolist() == [2, 4, 1]
    assert np.bincount(data.train_labels).tolist() == [8, 16, 4]
    assert not colours(data.train_images) & colours(data.test_images)
    again, _ = load(fruit)
    np.testing.assert_array_equal(data.test_images, again.test_images)


def test_a_class_of_one_or_two_images_keeps_them_for_training(tmp_path):
    for name in ("a", "b", "c", "d", "e"):
        for i in range(2 if name < "e" else 30):
            draw(tmp_path / name / f"{i}.png", (9, 9, 9), i)
    data, _ = load(tmp_path)
    assert np.bincount(data.train_labels)[:4].tolist() == [2, 2, 2, 2] and set(data.test_labels) == {4}


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Train", "VALID", "Testing"),
        ("training", "validation", "TEST"),
        ("TRAIN", "dev", "test"),
    ],
)
def test_the_usual_names_of_the_parts(tmp_path, names):
    for part, (name, shade) in enumerate(zip(names, (0, 10, 20), strict=True)):
        for k in COLOURS:
            for i in range(3 - part):
                draw(tmp_path / name / k / f"{i}.PNG", COLOURS[k], shade + i)
    data, _ = load(tmp_path)
    assert (len(data.train_labels), len(data.validation[1]), len(data.test_labels)) == (9, 6, 3)
    assert (200 - 10, 20, 20) in colours(data.validation[0])


def test_train_alone_is_for_training_alone(fruit, tmp_path):
    (tmp_path / "all").mkdir()
    fruit.rename(tmp_path / "all" / "train")
    data, _ = load(tmp_path / "all")
    assert len(data.train_labels) == 35 and len(data.test_labels) == 0 and data.validation is None


@pytest.mark.parametrize(
    ("further", "text"),
    [
        ("Valid/apple/1.png", "has Valid/ and val/, both for validation images; allowed: one of them"),
        ("holdout/apple/1.png", "has holdout/ with classes beside train/; allowed: train, val and test"),
    ],
)
def test_folders_that_would_be_ignored_in_silence_are_refused(tmp_path, further, text):
    for file in ("train/apple/1.png", "train/plum/1.png", "val/apple/1.png", further):
        draw(tmp_path / file, (1, 2, 3))
    with pytest.raises(ConfigError, match=text):
        load(tmp_path)


def test_a_folder_without_classes_beside_train_is_left_out_and_named(tmp_path):
    for file in ("train/apple/1.png", "train/plum/1.png", "screenshots/1.png"):
        draw(tmp_path / file, (1, 2, 3))
    (tmp_path / "docs").mkdir()
    data, said = load(tmp_path)
    assert len(data.train_labels) == 2
    assert (
        "are not used: 1 folder docs beside train/, 1 folder screenshots with pictures beside train/"
        in said[0]
    )


def test_a_class_that_is_called_train_is_named(tmp_path):
    for file in ("car/1.png", "train/1.png", "bus/1.png"):
        draw(tmp_path / file, (1, 2, 3))
    with pytest.raises(
        RunError,
        match=r"train/1\.png is not in the folder of a class .*; a class of such a name needs another",
    ):
        load(tmp_path)


def test_a_class_in_two_forms_of_unicode_is_named(tmp_path):
    """As macOS and Linux write an accent."""
    for file in ("train/caf\u00e9/1.png", "train/b/1.png", "test/cafe\u0301/1.png"):
        draw(tmp_path / file, (1, 2, 3))
    with pytest.raises(ConfigError, match="in two forms of Unicode; allowed: one; rename one of the folders"):
        load(tmp_path)


def test_the_folder_within_is_suggested_where_it_is_meant(fruit, tmp_path):
    (tmp_path / "archive").mkdir()
    fruit.rename(tmp_path / "archive" / "fruit")
    with pytest.raises(RunError, match=rf"1 class folder \(fruit\).*--data_dir={tmp_path}/archive/fruit"):
        load(tmp_path / "archive")


def test_nested_folders_and_links(fruit, tmp_path):
    deep = fruit / "plum" / "2019" / "May"
    draw(deep / "a.jpeg", (1, 1, 1))
    os.symlink(fruit / "plum", deep / "round_and_round")
    os.symlink("../..", fruit / "plum" / "2019" / "up")  # the other classes are not plums
    outside = tmp_path / "elsewhere"
    draw(outside / "b.png", (2, 2, 2))
    os.symlink(outside, fruit / "plum" / "link")
    os.symlink(outside / "b.png", fruit / "plum" / "file.png")
    os.symlink("itself", fruit / "plum" / "itself")
    data, said = load(fruit)
    plums = [file for part in ("train", "test") for file in data.files[part] if file.startswith("plum")]
    assert sorted(plums) == sorted(
        [f"plum/{i}.png" for i in range(5)] + ["plum/2019/May/a.jpeg", "plum/file.png", "plum/link/b.png"]
    )
    assert len(said) == 1 and "1 without an ending" in said[0]  # the link to itself


# ---- what is no picture, and what cannot be read


def litter(root):
    """Nine files and folders that are no pictures."""
    for name in (
        "Thumbs.db",
        "plum/Thumbs.db",
        "plum/.DS_Store",
        "apple/notes.txt",
        "apple/clip.MP4",
        "README",
    ):
        (root / name).write_bytes(b"\x89 no picture")
    (root / "apple" / ".hidden").mkdir()
    draw(root / "__MACOSX" / "apple" / "._1.png", (1, 1, 1))
    draw(root / "lemon" / ".thumbnails" / "1.png", (1, 1, 1))


def test_stray_files_are_left_out_and_counted_by_their_endings(fruit):
    clean, _ = load(fruit)
    litter(fruit)
    data, said = load(fruit)
    np.testing.assert_array_equal(data.train_images, clean.train_images)
    (line,) = said
    assert line.startswith(f"left out: 9 files or folders in {fruit} are not used: 3 hidden, 2 .db")
    for part in ("1 .txt", "1 .mp4", "1 without an ending", "1 __MACOSX"):
        assert part in line
    with pytest.raises(RunError, match=r"9 files or folders in .* are not used: .*remove them"):
        load(fruit, strict=True)


def test_a_picture_without_an_ending_is_known_by_its_first_bytes(fruit):
    shutil.copy(fruit / "plum" / "0.png", fruit / "plum" / "IMG_0001")
    os.mkfifo(fruit / "plum" / "pipe")
    data, said = load(fruit)
    assert len(data.train_labels) + len(data.test_labels) == 36 and "1 without an ending" in said[0]


def test_pictures_that_cannot_be_read_are_all_named_up_to_a_share(fruit):
    (fruit / "lemon" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    os.mkfifo(fruit / "apple" / "pipe.png")
    os.symlink("nowhere", fruit / "apple" / "gone.png")
    data, said = load(fruit, max_bad=0.1)
    assert len(data.train_labels) + len(data.test_labels) == 35
    (line,) = said
    assert line.startswith("left out: 3 of 38 pictures cannot be read as an image: ")
    for part in ("lemon/cut.jpg (no format", "apple/pipe.png (it is a FIFO", "apple/gone.png (No such file"):
        assert f"{fruit}/{part}" in line
    for options, advice in (
        ({}, "than 0.05 with --max_bad"),
        ({"strict": True, "max_bad": 0.1}, "remove them$"),
    ):
        with pytest.raises(RunError, match=rf"^3 of 38 pictures cannot be read .*{advice}"):
            load(fruit, **options)


def test_many_unreadable_pictures_are_counted_after_ten(fruit):
    for i in range(14):
        (fruit / "plum" / f"bad{i}.png").write_bytes(b"text")
    with pytest.raises(RunError, match=r"14 of 49 pictures .* and 4 more; repair"):
        load(fruit)


def test_a_class_whose_pictures_cannot_be_read_is_refused(fruit):
    shutil.rmtree(fruit / "plum")
    (fruit / "plum").mkdir()
    (fruit / "plum" / "1.png").write_bytes(b"text")
    with pytest.raises(RunError, match="no picture to train on that can be read in class plum"):
        load(fruit, max_bad=0.5)


def test_names_that_are_not_utf_8(fruit):
    name = os.fsdecode(b"caf\xe9")
    (fruit / "apple").rename(fruit / name)
    (fruit / name / "0.png").rename(fruit / name / os.fsdecode(b"gr\xfcn.png"))
    (fruit / name / os.fsdecode(b"caf\xe9.png")).write_bytes(b"text")
    data, said = load(fruit)
    assert data.class_names == ("caf?", "lemon", "plum") and "caf?/caf?.png" in said[0]
    run = RunFolder(fruit.parent / "run")
    run.write_split(folder.rows(data))
    again, _ = load(fruit, files=run.read_split())
    np.testing.assert_array_equal(again.train_images, data.train_images)
    assert again.class_names == data.class_names


def test_classes_that_read_alike_are_refused_before_anything_is_trained(fruit):
    (fruit / "apple").rename(fruit / os.fsdecode(b"caf\xe8"))
    (fruit / "lemon").rename(fruit / os.fsdecode(b"caf\xe9"))
    with pytest.raises(RunError, match=r"names differ, but not in UTF-8: caf\?; rename them"):
        load(fruit)


def test_progress_is_said_of_large_folders(fruit, monkeypatch):
    monkeypatch.setattr(folder, "PROGRESS_SECONDS", -1.0)
    monkeypatch.setattr(folder, "_BLOCK", 10)
    _, said = load(fruit)
    assert said == [
        "read 10 of 28 pictures",
        "read 20 of 28 pictures",
        "read 28 of 28 pictures",
        "read 7 of 7 pictures",
    ]


def test_without_a_log_it_is_said_on_stderr(fruit, capsys):
    (fruit / "Thumbs.db").touch()
    datasets.load("folder", fruit, 8)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "1 .db" in err


def test_find_pictures_counts_what_it_passes_by(fruit):
    litter(fruit)
    left_out: Counter[str] = Counter()
    assert len(list(folder.find_pictures(fruit / "apple", left_out))) == 10
    assert left_out == {".txt": 1, ".mp4": 1, "hidden": 1}


def test_the_rule_of_resizing_reaches_the_pictures(tmp_path):
    for name in ("a", "b"):
        for i in range(3):
            draw(tmp_path / name / f"{i}.png", (250, 250, 250))
    padded = datasets.load("folder", tmp_path, 18, "pad").train_images
    assert (padded[:, :2] == 0).all() and (padded[:, 2:16] == 250).all()  # 18 x 14 of 18 x 18 pixels
    assert (datasets.load("folder", tmp_path, 18, "crop").train_images == 250).all()
    assert datasets.load("folder", tmp_path, 18, "crop").resize == "crop"  # for the model's file
    with pytest.raises(ConfigError, match="resize is pad; allowed with the dataset digits: squash"):
        datasets.load("digits", resize="pad")


# ---- the record of a run's files


def test_a_recorded_split_is_read_again_after_files_came_and_in_the_same_order(fruit, tmp_path):
    draw(fruit / "plum" / "sub" / "a.png", (7, 7, 7))
    data, _ = load(fruit)
    held_out = {
        "train": data.files["train"][::2],
        "validation": data.files["train"][1::2],
        "test": data.files["test"],
    }
    split = datasets.Dataset(
        "folder", data.train_images[::2], data.train_labels[::2], data.test_images, data.test_labels, data.class_names,
        data.source, (data.train_images[1::2], data.train_labels[1::2]), held_out,
    )  # fmt: skip
    run = RunFolder(tmp_path / "run")
    run.write_split(folder.rows(split))
    for i in range(20):
        draw(fruit / "apple" / f"0{i}.png", (1, 2, 3))
    again, _ = load(fruit, files=run.read_split())
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
    assert again.validation is None and datasets.fingerprint(again) == datasets.fingerprint(data)
    only, _ = load(fruit, files=run.read_split(), only="test")
    np.testing.assert_array_equal(only.test_images, data.test_images)
    assert len(only.train_labels) == 0 and only.class_names == data.class_names
    (fruit / "plum" / "sub" / "a.png").unlink()
    gone = (
        r"1 of 36 pictures cannot be read as an image: .*sub/a.png .*; the run began with them: put them back"
    )
    with pytest.raises(RunError, match=gone):
        load(fruit, files=run.read_split())


def test_a_row_of_a_split_that_fits_no_part_is_one_line():
    rows = [
        (os.path.join("train", "a", "1.png"), "a", "train"),
        (os.path.join("other", "2.png"), "b", "train"),
    ]
    with pytest.raises(RunError, match=r"split.csv names 'other.2.png', which is in none of the folders"):
        folder._recorded(rows)


@pytest.mark.parametrize("dataset", ["folder", "cifar10"])
def test_the_home_of_nobody_is_a_folder_that_does_not_exist(dataset):
    with pytest.raises((ConfigError, RunError), match="does not exist"):
        datasets.load(dataset, "~nobody-of-this-name/x")


def test_a_recorded_folder_with_parts_of_its_own(tmp_path):
    for part, count in (("training", 4), ("valid", 2), ("test", 1)):
        for k, colour in COLOURS.items():
            for i in range(count):
                draw(tmp_path / "data" / part / k / f"{i}.png", colour, i)
    data, _ = load(tmp_path / "data")
    again, _ = load(tmp_path / "data", files=folder.rows(data))
    assert again.files == data.files and len(again.validation[1]) == 6
    np.testing.assert_array_equal(again.validation[0], data.validation[0])


@pytest.mark.parametrize("text", ["", "file,class\na,b\n", "file,class,part\na,b\n"])
def test_a_damaged_record_is_one_line(tmp_path, text):
    run = RunFolder(tmp_path)
    assert run.read_split() is None
    run.split_file.write_text(text)
    with pytest.raises(RunError, match=r"cannot read .*split\.csv"):
        run.read_split()


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(fruit, monkeypatch):
    monkeypatch.setattr("cifar10_trainer.machine.available_memory", lambda: 1000)
    monkeypatch.setattr(images, "decode", None)  # would fail
    with pytest.raises(RunError, match=r"35 pictures of 8 x 8 pixels: needs .* of memory"):
        load(fruit)
