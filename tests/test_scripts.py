"""The scripts, and the documents that they write."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifar10_trainer import RECIPES, report
from cifar10_trainer.errors import ConfigError, RunError

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reproduce():
    return script("reproduce")


def between(text, name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.S)[1]


def record(recipe, given, seed, **metrics):
    known = {
        "recipe": recipe, "params": 10, "best_val_accuracy": 0.8, "test_accuracy": 0.7, "views": 1,
        "test_accuracy_views": 0.7, "total_seconds": 100.0, "seed": seed, "epochs": given, "pflop": 1.0,
    }  # fmt: skip
    environment = {"processor": "AMD EPYC, 2 cores", "gpus": "none"}
    return {
        "command": "python scripts/reproduce.py x",
        "config": {"epochs": given},
        "metrics": {**known, **metrics},
        "environment": environment,
    }


def test_readme_results_are_those_of_the_records(reproduce):
    text = (ROOT / "README.md").read_text()
    assert between(text, "results") == reproduce.table(reproduce.load_records())
    assert between(text, "versus") == reproduce.versus(reproduce.load_records())


def test_every_record_is_complete(reproduce):
    records = reproduce.load_records()
    assert records, "no record under results/runs"
    for r in records:
        assert {"date", "commit", "command", "environment", "metrics", "config", "history"} <= set(r)
        assert r["command"].startswith("python ")
        assert not re.search(r"(^|[\s=])/", r["command"]), "a path of one machine"
        assert {"tensorflow", "keras", "python", "processor"} <= set(r["environment"])
        assert len(r["history"]) == r["metrics"]["epochs"]
        assert r["metrics"]["n_test"] in (0, 359, 10_000)


def test_table_groups_seeds_and_says_what_was_cut(reproduce):
    rows = reproduce.table(
        [
            record("leaky.baseline", 40, 0, test_accuracy=0.85),
            record("leaky.baseline", 40, 1, test_accuracy=0.87),
            record("leaky.baseline", 20, 0),
            record("practical.baseline", 30, 0, views=2, test_accuracy_views=0.75),
        ]
    ).splitlines()[2:]
    assert [r.split("|")[1].strip() for r in rows] == [
        "`practical.baseline`",
        "`leaky.baseline`",
        "`leaky.baseline`",
    ]
    assert "| 75.00 |" in rows[0]
    assert "20 of 40" in rows[1]
    # Mean 86, standard deviation sqrt(2), of two runs.
    assert "86.00 ± 1.41 (2)" in rows[2]
    claim = f"{100 * RECIPES['leaky.baseline'].origin.claim:.2f}"
    assert rows[2].split("|")[4].strip() == claim
    assert [r.split("|")[-2].strip() for r in rows[1:]] == [
        "`python scripts/reproduce.py x`",
        "`python scripts/reproduce.py x --seeds=2`",
    ]


def test_table_says_on_what_hardware(reproduce):
    gpu = record("leaky.baseline", 40, 1)
    gpu["environment"]["gpus"] = "NVIDIA H100"
    for records, expected in [
        ([record("leaky.baseline", 40, 0)] * 2, "AMD EPYC, 2 cores"),
        ([gpu], "NVIDIA H100"),
        ([record("leaky.baseline", 40, 0), gpu], "AMD EPYC, 2 cores; NVIDIA H100"),
    ]:
        row = reproduce.table(records).splitlines()[2]
        assert row.split("|")[-3].strip() == expected


@pytest.mark.parametrize(
    ("recipe", "given", "run", "expected"),
    [
        ("leaky.baseline", 40, [40], "40"),
        ("leaky.baseline", 20, [20, 20], "20 of 40"),
        ("practical.baseline", 30, [17, 14], "14-17 of 30, stopped early"),
        ("practical.baseline", 20, [14, 14], "14 of 30, stopped early"),
        ("practical.baseline", 30, [30, 12], "12-30 of 30, stopped early"),
        ("leaky.baseline", 1.5, [2], "1.5 of 40"),  # the history has a row for the half epoch, too
        ("fast.85", 1.6, [2], "1.6"),
        ("fast.85", 7, [7], "7"),
        ("not.known", 3, [3], "3"),
    ],
)
def test_epochs_run_of_epochs_claimed(reproduce, recipe, given, run, expected):
    group = [record(recipe, given, seed, epochs=n) for seed, n in enumerate(run)]
    assert reproduce.epochs_run(recipe, group) == expected


def test_versus_takes_the_best_of_our_runs_that_fits_a_tenth(reproduce):
    def cells(records):
        return [
            [c.strip() for c in row.split("|")[1:-1]] for row in reproduce.versus(records).splitlines()[2:]
        ]

    # Half of its epochs were 0.5 PFLOP, so all of them are 1.
    theirs = record("wide_head.baseline", 12.5, 0, pflop=0.5, test_accuracy=0.7)
    assert cells([theirs]) == []
    ours = [
        record("fast.85", 2, 0, pflop=0.05, best_val_accuracy=0.78, test_accuracy=0.91),
        record("fast.85", 3, 0, pflop=0.09, best_val_accuracy=0.78, test_accuracy=0.8),
        # 0.1 on average: it just fits
        record("fast.85", 3, 1, pflop=0.11, best_val_accuracy=0.80, test_accuracy=0.82),
        record("fast.85", 4, 0, pflop=0.12, best_val_accuracy=0.9, test_accuracy=0.95),
        record("fast.default", 2, 0, pflop=0.1, best_val_accuracy=0.77, test_accuracy=0.99),
        record("fast.94", 1, 0, pflop=0.1, best_val_accuracy=None, test_accuracy=0.99),
        record("fast.digits", 20, 0, pflop=0.07),
        record("leaky.three", 40, 0, pflop=0.08),
    ]
    assert cells(ours) == []
    (row,) = cells([theirs, *ours])
    assert row[:5] == ["5", "`wide_head.baseline`", "79.90", "70.00, 12.5 of 25 epochs", "1"]
    assert row[5:] == ["`fast.85`, 3 epochs", "81.00 ± 1.41 (2)", "0.1", "10.0%"]
    # Nothing is claimed in tutorial 3; the best claim of tutorial 2 is not its longest record's.
    more = [
        record("course.baseline", 10, 0, pflop=0.6),
        record("vgg.3", 100, 0, pflop=1.0),
        record("vgg.3_rising_dropout_augmented_bn", 20, 0, pflop=0.2),
    ]
    third, second = sorted(cells([*ours, *more]), reverse=True)
    assert third[:6] == ["3", "`course.baseline`", "none", "70.00", "0.6", "`fast.85`, 2 epochs"]
    assert second[:3] == ["2", "`vgg.3_rising_dropout_augmented_bn`", "88.62"]
    assert second[3:6] == ["70.00, 20 of 400 epochs", "4", "`fast.85`, 4 epochs"]


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
def test_epochs_cut_the_tutorials_and_set_our_own(reproduce, argv, expected):
    names = reproduce.FLAGS(["reproduce", *argv])[1:]
    assert {n: reproduce.length(n, n in names) for n in expected} == expected
    reproduce.FLAGS.unparse_flags()
    for flag in ("all", "epochs"):
        reproduce.FLAGS[flag].unparse()


def test_rewrite_replaces_what_is_between_the_marks(reproduce, tmp_path):
    path = tmp_path / "x.md"
    path.write_text("a\n<!-- t -->\nold\nold\n<!-- /t -->\nb\n")
    reproduce.rewrite(path, "t", "new \\1")
    assert path.read_text() == "a\n<!-- t -->\nnew \\1\n<!-- /t -->\nb\n"
    with pytest.raises(RunError, match="has no <!-- u -->"):
        reproduce.rewrite(path, "u", "")


def test_keep_refuses_an_unfinished_run(reproduce, tmp_path):
    with pytest.raises(RunError, match="holds no finished run"):
        reproduce.keep(tmp_path)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ('{"recipe": "search.best"}', (ConfigError, "unknown recipe 'search.best'; allowed: ")),
        ('{"recipe": "fast.85", "epo', (RunError, "holds a damaged run")),
        ('{"recipe": "fast.85", "epochs": -1}', (RunError, "holds a damaged run")),
        ("[1]", (RunError, "holds a damaged run")),
    ],
)
def test_keep_refuses_what_it_does_not_know(reproduce, tmp_path, config, error):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "metrics.json").write_text("{}")
    kind, message = error
    with pytest.raises(kind, match=message) as info:
        reproduce.keep(tmp_path)
    assert "\n" not in str(info.value)


def test_images_are_given_to_what_takes_them(reproduce, tmp_path, monkeypatch):
    """The embedded digits are nowhere else; and where the images are does not depend on where a command runs."""
    ran = []
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "records")
    monkeypatch.setattr(reproduce, "keep", lambda *_: tmp_path / "record.json")
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda words, **_: ran.append(words) or done)
    monkeypatch.setattr(reproduce, "commit", lambda: "aaaaaaa")
    reproduce.FLAGS(["reproduce", "--data_dir=images"])
    for name in ("fast.digits", "fast.85"):
        reproduce.run(name, 0, None)
    reproduce.FLAGS.unparse_flags()
    reproduce.FLAGS["data_dir"].unparse()
    digits, own = ran
    assert not any("data_dir" in word for word in digits)
    assert f"--data_dir={Path('images').absolute()}" in own


def test_a_record_gives_way_to_its_like_only(reproduce, tmp_path, monkeypatch):
    record = json.loads((ROOT / "results" / "runs" / "fast.85-3-0.json").read_text())
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "records")

    def finished(**metrics):
        extra = {"environment": record["environment"], "command": record["command"]}
        (tmp_path / "config.json").write_text(json.dumps({**record["config"], **extra}))
        (tmp_path / "metrics.json").write_text(json.dumps({**record["metrics"], **metrics}))
        report.write_history(tmp_path / "history.csv", record["history"])
        return tmp_path

    path = reproduce.keep(finished())
    assert reproduce.keep(finished(test_accuracy=0.5)) == path
    assert json.loads(path.read_text())["metrics"]["test_accuracy"] == 0.5
    for change in ({"precision": "float32"}, {"strategy": "mirrored"}):
        with pytest.raises(
            RunError, match=f"of a run with {next(iter(change))} .*; allowed: the same; delete"
        ):
            reproduce.keep(finished(**change))
    assert json.loads(path.read_text())["metrics"]["test_accuracy"] == 0.5


def test_the_commit_of_a_record_says_where_the_code_is_another(reproduce, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert reproduce.commit() == ""

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )

    code = tmp_path / "cifar10_trainer" / "twin.py"
    code.parent.mkdir()
    code.write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    head = git("rev-parse", "--short", "HEAD").stdout.strip()
    (tmp_path / "README.md").write_text("a table of results")
    assert reproduce.commit() == head
    code.write_text("b")
    assert reproduce.commit() == f"{head}-modified"


def test_choice_of_recipes(reproduce):
    flags = reproduce.FLAGS
    flags(["reproduce"])
    with pytest.raises(ConfigError, match=r"Did you mean 'leaky.baseline'"):
        reproduce.chosen(["leaky.baselin"])
    with pytest.raises(ConfigError, match="no recipe; allowed"):
        reproduce.chosen([])
    flags(["reproduce", "--source=3"])
    assert reproduce.chosen([]) == ["course.baseline"]
    flags(["reproduce", "--source=9"])
    with pytest.raises(ConfigError, match="source is 9; allowed: 1 to 5"):
        reproduce.chosen([])


def outputs(notebook):
    """For each code cell that shows something the kinds of its outputs, and all the text shown."""
    kinds, text = [], ""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and cell["outputs"]:
            kinds.append([sorted(o.get("data", [o.get("name", o["output_type"])])) for o in cell["outputs"]])
            text += "".join(line for o in cell["outputs"] for line in o.get("text", []))
    return kinds, text


def read_notebook(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_the_notebook_shows_what_was_executed():
    path = ROOT / "scripts" / "tutorial1.ipynb"
    notebook, raw = read_notebook(path), path.read_text(encoding="utf-8")
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds, text = outputs(notebook)
    assert len(kinds) == len(code) - 1  # all but the first, the imports
    assert sum(["image/png", "text/plain"] in kind for kind in kinds) == 5
    assert "Traceback" not in raw and not any("error" in kind for cell in kinds for kind in cell)
    assert not re.search(r"/(home|root|tmp|usr|opt|work|mnt|Users)/", raw), "a path of one machine"
    assert len(raw) < 300_000
    for step in ("test accuracy", "precision    recall", "kept: epoch", "the same from HDF5: True"):
        assert step in text


@pytest.mark.slow
def test_the_notebook_executes_on_the_embedded_data(tmp_path):
    script = ROOT / "scripts" / "notebook.py"
    done = subprocess.run(
        [sys.executable, script, "--output=executed.ipynb"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [p.name for p in tmp_path.iterdir()] == ["executed.ipynb"]
    found, committed = (
        read_notebook(tmp_path / "executed.ipynb"),
        read_notebook(ROOT / "scripts/tutorial1.ipynb"),
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
        assert re.search(rf"<!-- ci: {name} -->\n```bash\n.+\n```", text)
