"""The commands in scripts/: what their flags choose, what the notebook shows, and which way their imports go."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import compare_tuners
import freeze
import measure_photos
import notebook
import numpy as np
import packaged_model
import pytest
import reproduce
from test_house import COMMANDS

from cifar10_trainer import cli, datasets
from cifar10_trainer.errors import ConfigError
from results import records

ROOT = Path(__file__).resolve().parent.parent


def imports_of(path):
    """The modules that a file imports anywhere; within a package by their full names."""
    package = path.parent.name
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{package}.{node.module or ''}" if node.level else node.module


def test_imports_go_from_the_commands_to_the_benchmark_to_the_results():
    scripts = ROOT / "scripts"
    commands = {path.stem for path in scripts.glob("*.py")}
    assert commands == set(COMMANDS)
    for path in scripts.rglob("*.py"):
        forbidden = commands | ({"bench"} if path.parent.name == "results" else set())
        found = {name.partition(".")[0] for name in imports_of(path)}
        assert not found & forbidden, path


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["practical.baseline"], {"practical.baseline": None}),
        (["practical.baseline", "--epochs=20"], {"practical.baseline": 20}),
        (["practical.baseline", "--epochs=30"], {"practical.baseline": None}),
        (["practical.baseline", "--epochs=50"], {"practical.baseline": None}),
        (["fast.85", "--epochs=7"], {"fast.85": 7}),
        (["fast.85", "--epochs=1.6"], {"fast.85": 1.6}),
        (["fast.85", "--epochs=3"], {"fast.85": None}),
        (
            ["--all", "--epochs=20"],
            {"fast.85": None, "fast.default": None, "vgg.1": 20, "course.baseline": None},
        ),
    ],
)
def test_epochs_cut_the_tutorials_and_set_our_own(argv, expected):
    names = reproduce.FLAGS(["reproduce", *argv])[1:]
    assert {n: reproduce.length(n, n in names) for n in expected} == expected
    reproduce.FLAGS.unparse_flags()
    for flag in ("all", "epochs"):
        reproduce.FLAGS[flag].unparse()


def test_images_are_given_to_what_takes_them(tmp_path, monkeypatch):
    """The embedded digits are nowhere else; and where the images are does not depend on where a command runs."""
    ran = []
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "RUNS", tmp_path / "records")
    monkeypatch.setattr(records, "keep", lambda *_: tmp_path / "record.json")
    monkeypatch.setattr(reproduce.process, "call", lambda words, **_: ran.append(words) or (0, ""))
    monkeypatch.setattr(records, "commit", lambda: "aaaaaaa")
    reproduce.FLAGS(["reproduce", "--data_dir=images"])
    for name in ("fast.digits", "fast.85"):
        reproduce.run(name, 0, None, named=True)
    reproduce.FLAGS.unparse_flags()
    reproduce.FLAGS["data_dir"].unparse()
    digits, own = ran
    assert not any("data_dir" in word for word in digits)
    assert f"--data_dir={Path('images').absolute()}" in own


def test_a_recipe_that_is_named_is_trained_and_shown_beside_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "RUNS", tmp_path / "records")
    reproduce.FLAGS(["reproduce"])
    reproduce.run("fast.digits", 0, 1, named=False)
    kept = tmp_path / "records" / "fast.digits-1-0.json"
    record = json.loads(kept.read_text())
    assert record["command"] == "python scripts/reproduce.py fast.digits --epochs=1"
    record["metrics"]["test_accuracy"] = 0.125
    kept.write_text(json.dumps(record))
    before = kept.read_bytes()
    trained = list((tmp_path / "runs").rglob("model.keras"))
    assert len(trained) == 1
    capsys.readouterr()

    reproduce.run("fast.digits", 0, 1, named=False)
    assert capsys.readouterr().out == "fast.digits, seed 0: has its record\n"
    reproduce.run("fast.digits", 0, 1, named=True)
    done, now, then = capsys.readouterr().out.splitlines()
    assert done == "runs/reproduce/fast.digits-1-0 is finished; delete it to train again"
    metrics = json.loads((trained[0].parent / "metrics.json").read_text())
    assert f"test accuracy {100 * metrics['test_accuracy']:.2f}%" in now
    assert "test accuracy 12.50%" in then and "--record=runs/reproduce/fast.digits-1-0" in then
    assert kept.read_bytes() == before

    trained[0].parent.rename(tmp_path / "away")
    reproduce.run("fast.digits", 0, 1, named=True)
    assert trained[0].exists() and kept.read_bytes() == before
    reproduce.FLAGS.unparse_flags()


def test_choice_of_recipes():
    flags = reproduce.FLAGS
    flags(["reproduce"])
    with pytest.raises(ConfigError, match=r"Did you mean 'leaky.baseline'"):
        reproduce.chosen(["leaky.baselin"])
    with pytest.raises(ConfigError, match="no recipe; allowed"):
        reproduce.chosen([])
    with pytest.raises(ConfigError, match=r"transfer\.cifar trains on a folder of pictures; allowed"):
        reproduce.chosen(["transfer.cifar"])
    flags(["reproduce", "--all"])
    names = reproduce.chosen([])
    flags.unparse_flags()
    flags["all"].unparse()
    assert "transfer.cifar" not in names and {"fast.digits", "vgg.final"} <= set(names)
    flags(["reproduce", "--source=3"])
    assert reproduce.chosen([]) == ["course.baseline"]
    flags(["reproduce", "--source=9"])
    with pytest.raises(ConfigError, match="source is 9; allowed: 1 to 5"):
        reproduce.chosen([])


@pytest.mark.parametrize(
    ("script", "argv", "says"),
    [
        (reproduce, ["--table", "vgg.1"], "--record or --table with vgg.1"),
        (reproduce, ["--record=runs/x", "--seeds=3"], "--record or --table with --seeds"),
        (reproduce, ["--record=runs/x", "--table"], "--record or --table with --table"),
        (
            measure_photos,
            ["--image_size=64", "--methods=keras"],
            "image_size is 64, but keras trains at 96 pixels",
        ),
        (measure_photos, ["--images=20,x"], "images is 20,x; allowed: whole numbers, 2 or more"),
        (measure_photos, ["--images=-3"], "images is -3; allowed"),
        (measure_photos, ["letters"], "unexpected argument 'letters'; allowed: flags"),
        (
            freeze,
            ["digits", f"--compare={ROOT / 'results' / 'packaged.json'}"],
            "allowed: a file of --out with",
        ),
        (freeze, ["digits", "--out=/nowhere/x.json"], "out is /nowhere/x.json; allowed: a file in a folder"),
        (freeze, ["digits", "--out=/tmp"], "out is /tmp; allowed: a file in a folder"),
        (packaged_model, ["mine"], "unexpected argument 'mine'"),
        (compare_tuners, ["--recipe=leaky.baseline"], "leaky.baseline, which sets no filters"),
    ],
)
def test_what_the_commands_refuse(script, argv, says, capsys):
    for name in script.FLAGS:
        script.FLAGS[name].unparse()  # what another test gave
    assert cli.run(script.main, script.FLAGS, "usage", ["command", *argv]) == 2
    assert says in capsys.readouterr().err


def test_pictures_that_score_are_not_trained_on(monkeypatch):
    digits = datasets.load("digits")
    monkeypatch.setattr(measure_photos.datasets, "load", lambda *arguments: digits)
    measure_photos.FLAGS(["measure_photos"])
    fewest = int(np.bincount(digits.test_labels).min())
    training, scored = measure_photos.images_of("cifar10", fewest - 1, 0)
    for name, images in training.items():
        of_class = digits.test_images[digits.test_labels == digits.class_names.index(name)]
        assert len(images) == fewest - 1 and len(scored[name]) == min(100, len(of_class) - fewest + 1)
        together = np.concatenate([images, scored[name]])
        assert len(np.unique(together, axis=0)) == len(together)
    with pytest.raises(
        ConfigError, match=f"images is {fewest}; allowed with cifar10: fewer than the {fewest}"
    ):
        measure_photos.images_of("cifar10", fewest, 0)


def test_a_picture_set_that_has_no_more_pictures_is_trained_on_once(tmp_path, monkeypatch):
    """The digits have 100 pictures a class to train on, so 300 and 100 are the same runs, at once or one after the other."""
    monkeypatch.setattr(measure_photos, "write_pictures", lambda *_: None)
    monkeypatch.setattr(measure_photos, "run", lambda *_: {"validation": 1.0, "test": 1.0, "seconds": 1.0})
    out = tmp_path / "photos.json"
    for images in ("300,100", "100", "300"):
        argv = ["--sets=digits", "--seeds=1", "--methods=fast.85", f"--images={images}", f"--out={out}"]
        for name in measure_photos.FLAGS:
            measure_photos.FLAGS[name].unparse()
        assert cli.run(measure_photos.main, measure_photos.FLAGS, "usage", ["x", *argv, "--nopublish"]) == 0
        assert [run["images_per_class"] for run in json.loads(out.read_text())["runs"]] == [100]


@pytest.mark.parametrize("words", [["read"], ["write"], ["read", "nowhere"], ["arguments", "--wirte"], []])
def test_model_files_shows_its_usage(words):
    command = [sys.executable, ROOT / "scripts" / "model_files.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and "model_files.py read FOLDER" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_without_models_is_no_folder_to_read(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "model_files.py", "read", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and "holds no model files with their images.npy" in done.stderr
    assert "Traceback" not in done.stderr


def outputs(found):
    """For each code cell that shows something the kinds of its outputs, and all the text shown."""
    kinds, text = [], ""
    for cell in found["cells"]:
        if cell["cell_type"] == "code" and cell["outputs"]:
            kinds.append([sorted(o.get("data", [o.get("name", o["output_type"])])) for o in cell["outputs"]])
            text += "".join(line for o in cell["outputs"] for line in o.get("text", []))
    return kinds, text


def read_notebook(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_the_notebook_shows_what_was_executed():
    path = ROOT / "examples" / "tutorial1.ipynb"
    found, raw = read_notebook(path), path.read_text(encoding="utf-8")
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds, text = outputs(found)
    assert len(kinds) == len(code) - 1  # all but the first, the imports
    assert sum(["image/png", "text/plain"] in kind for kind in kinds) == 5
    assert "Traceback" not in raw and not any("error" in kind for cell in kinds for kind in cell)
    assert not re.search(r"/(home|root|tmp|usr|opt|work|mnt|Users)/", raw), "a path of one machine"
    assert len(raw) < 300_000
    for step in ("test accuracy", "precision    recall", "kept: epoch", "the same from HDF5: True"):
        assert step in text


def test_the_notebook_executes_on_the_embedded_data(tmp_path):
    script = ROOT / "scripts" / "notebook.py"
    done = subprocess.run(
        [sys.executable, script, "--output=executed.ipynb"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [p.name for p in tmp_path.iterdir()] == ["executed.ipynb"]
    found, committed = (
        read_notebook(tmp_path / "executed.ipynb"),
        read_notebook(ROOT / "examples/tutorial1.ipynb"),
    )
    assert [cell["source"] for cell in found["cells"]] == [cell["source"] for cell in committed["cells"]]
    kinds, text = outputs(found)
    assert kinds == outputs(committed)[0]
    assert float(re.search(r"test accuracy ([\d.]+)%", text)[1]) > 90  # ten classes: 10 by chance
    accuracies = re.findall(r"accuracy(?: of the loaded model:)? ([\d.]+)%", text)
    assert accuracies[0] == accuracies[-1], "the saved model scores what training reported"
    assert "the same from HDF5: True" in text


def test_readme_commands_are_there_for_the_checks():
    text = (ROOT / "README.md").read_text()
    for name in ("demo", "tests"):
        assert re.search(rf"<!-- ci: {name} -->\n```bash\n(?:.+\n)+```", text)


def test_one_output_file_is_for_one_notebook(tmp_path, monkeypatch, capsys):
    for name in "ab":
        (tmp_path / f"{name}.ipynb").touch()
    monkeypatch.setattr(notebook, "EXAMPLES", tmp_path)
    assert cli.run(notebook.main, notebook.FLAGS, "usage", ["notebook.py", "--output=x.ipynb"]) == 2
    notebook.FLAGS["output"].unparse()
    assert "output is x.ipynb, but examples/ has 2 notebooks" in capsys.readouterr().err
