"""The scripts, and the documents that they write."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from cifar10_trainer import RECIPES
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


def record(recipe, epochs, seed, **metrics):
    known = {
        "recipe": recipe, "params": 10, "best_val_accuracy": 0.8, "test_accuracy": 0.7, "views": 1,
        "test_accuracy_views": 0.7, "total_seconds": 100.0, "seed": seed,
    }  # fmt: skip
    return {"command": "python x", "config": {"epochs": epochs}, "metrics": {**known, **metrics}}


def test_readme_results_are_those_of_the_records(reproduce):
    text = (ROOT / "README.md").read_text()
    assert between(text, "results") == reproduce.table(reproduce.load_records())


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


def test_readme_commands_are_there_for_the_checks():
    text = (ROOT / "README.md").read_text()
    for name in ("demo", "tests"):
        assert re.search(rf"<!-- ci: {name} -->\n```bash\n.+\n```", text)
