"""The records of runs, the tables and the figure that are made from them, and the documents that show them."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from pathlib import Path

import pytest
from bench import record as bench_record

from cifar10_trainer import RECIPES
from cifar10_trainer.errors import ConfigError, RunError
from cifar10_trainer.run_folder import RunFolder
from results import frontier, records, tables

ROOT = Path(__file__).resolve().parent.parent


def between(text, name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.S)[1]


def record(recipe, given, seed=0, **metrics):
    """The record of a run of `given` epochs; `metrics`: those that matter to a test."""
    known = {
        "recipe": recipe, "dataset": "cifar10", "params": 10, "best_val_accuracy": 0.8, "test_accuracy": 0.7,
        "views": 1, "test_accuracy_views": 0.7, "total_seconds": 100.0, "seed": seed, "epochs": given, "pflop": 1.0,
    }  # fmt: skip
    source = RECIPES[recipe].origin.source if recipe in RECIPES else "elsewhere"
    return {
        "command": "python scripts/reproduce.py x",
        "config": {"epochs": given, "origin": {"source": source}},
        "metrics": {**known, **metrics},
        "environment": {"processor": "AMD EPYC, 2 cores", "gpus": "none"},
    }


# --- records ------------------------------------------------------------------------------------------


def test_every_record_is_complete():
    found = records.load()
    assert found, "no record under results/runs"
    for r in found:
        assert {"date", "commit", "command", "environment", "metrics", "config", "history"} <= set(r)
        assert r["command"].startswith("python ")
        assert not re.search(r"(^|[\s=])/", r["command"]), "a path of one machine"
        assert {"tensorflow", "keras", "python", "processor"} <= set(r["environment"])
        assert len(r["history"]) == r["metrics"]["epochs"]
        assert r["metrics"]["n_test"] in (0, 359, 10_000)


def test_histories_are_numbers():
    paths = [*(ROOT / "results" / "runs").glob("*.json"), *(ROOT / "results" / "experiments").glob("*.json")]
    for path in paths:
        for row in json.loads(path.read_text())["history"]:
            assert all(value is None or isinstance(value, int | float) for value in row.values()), path


def test_keep_refuses_an_unfinished_run(tmp_path):
    with pytest.raises(RunError, match="holds no finished run"):
        records.keep(tmp_path)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ('{"recipe": "search.best"}', (ConfigError, "unknown recipe 'search.best'; allowed: ")),
        ('{"recipe": "fast.85", "epo', (RunError, "holds a damaged run")),
        ('{"recipe": "fast.85", "epochs": -1}', (RunError, "holds a damaged run")),
        ("[1]", (RunError, "holds a damaged run")),
        (
            '{"recipe": "fast.85", "data_name": "digits"}',
            (RunError, "images of its own; allowed: a run of a recipe"),
        ),
        ('{"recipe": "fast.85", "own_model": "0a"}', (RunError, "a model or images of its own")),
    ],
)
def test_keep_refuses_what_it_does_not_know(tmp_path, config, error):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "metrics.json").write_text("{}")
    kind, message = error
    with pytest.raises(kind, match=message) as info:
        records.keep(tmp_path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("recipe", "changes", "says"),
    [
        # A setting at its default is left out of config.json, also where the recipe has another value, and the reverse.
        ("fast.94_narrow", {"views_share": 1.0}, "with views_share 1.0, where the recipe has 0.25"),
        (
            "fast.default",
            {"class_weights": "balanced"},
            "with class_weights 'balanced', where the recipe has 'none'",
        ),
    ],
)
def test_keep_compares_all_settings(recipe, changes, says, tmp_path):
    config = {**RECIPES[recipe].override(**changes).to_dict(), "environment": {}, "command": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(RunError, match=says):
        records.read_run(RunFolder(tmp_path))


def test_a_record_gives_way_to_its_like_only(tmp_path, monkeypatch):
    record = json.loads((ROOT / "results" / "runs" / "fast.85-3-0.json").read_text())
    monkeypatch.setattr(records, "RUNS", tmp_path / "records")

    def finished(**metrics):
        extra = {"environment": record["environment"], "command": record["command"]}
        (tmp_path / "config.json").write_text(json.dumps({**record["config"], **extra}))
        (tmp_path / "metrics.json").write_text(json.dumps({**record["metrics"], **metrics}))
        RunFolder(tmp_path).write_history(record["history"])
        return tmp_path

    path = records.keep(finished())
    assert records.keep(finished(test_accuracy=0.5)) == path
    assert json.loads(path.read_text())["metrics"]["test_accuracy"] == 0.5
    assert record["metrics"]["strategy"] == "_DefaultDistributionStrategy"  # as version 1.0.0 calls it
    assert records.keep(finished(strategy="none")) == path
    for change in ({"precision": "float32"}, {"strategy": "mirrored"}):
        with pytest.raises(
            RunError, match=f"of a run with {next(iter(change))} .*; allowed: the same; delete"
        ):
            records.keep(finished(**change))
    assert json.loads(path.read_text())["metrics"]["strategy"] == "none"


def test_the_commit_of_a_record_shows_whether_the_code_was_modified(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.commit() == ""

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )

    code = tmp_path / "cifar10_trainer" / "engine.py"
    code.parent.mkdir()
    code.write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    head = git("rev-parse", "--short", "HEAD").stdout.strip()
    (tmp_path / "README.md").write_text("a table of results")
    assert records.commit() == head
    code.write_text("b")
    assert records.commit() == f"{head}-modified"


# --- tables -------------------------------------------------------------------------------------------


def test_the_table_groups_seeds_and_shows_what_was_cut():
    rows = tables.results_table(
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


def test_the_table_shows_the_hardware():
    gpu = record("leaky.baseline", 40, 1)
    gpu["environment"]["gpus"] = "NVIDIA H100"
    for found, expected in [
        ([record("leaky.baseline", 40, 0)] * 2, "AMD EPYC, 2 cores"),
        ([gpu], "NVIDIA H100"),
        ([record("leaky.baseline", 40, 0), gpu], "AMD EPYC, 2 cores; NVIDIA H100"),
    ]:
        row = tables.results_table(found).splitlines()[2]
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
def test_epochs_run_of_epochs_claimed(recipe, given, run, expected):
    group = [record(recipe, given, seed, epochs=n) for seed, n in enumerate(run)]
    assert tables.epochs_run(recipe, group) == expected


def test_versus_takes_the_best_of_our_runs_that_fits_a_tenth():
    def cells(found):
        return [
            [c.strip() for c in row.split("|")[1:-1]] for row in tables.versus_table(found).splitlines()[2:]
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


def test_rewrite_replaces_what_is_between_the_marks(tmp_path):
    path = tmp_path / "x.md"
    path.write_text("a\n<!-- t -->\nold\nold\n<!-- /t -->\nb\n")
    tables.rewrite(path, "t", "new \\1")
    assert path.read_text() == "a\n<!-- t -->\nnew \\1\n<!-- /t -->\nb\n"
    with pytest.raises(RunError, match="has no <!-- u -->"):
        tables.rewrite(path, "u", "")


def test_the_document_shows_the_tables_of_the_records():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert between(text, "results") == tables.results_table(records.load())
    assert between(text, "versus") == tables.versus_table(records.load())


def test_the_readme_shows_tables_and_numbers_of_the_records():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = records.load()
    assert between(text, "highlights") == tables.highlights_table(found)
    benchmark = bench_record.read(bench_record.RECORD)
    assert between(text, "speed") == bench_record.speed_table(benchmark)
    words = " ".join(text.split())
    rows = {name: row for part in benchmark["sections"].values() for name, row in part["rows"].items()}
    seconds = rows["fast.85: to 85%"]["median"]
    assert (
        f"passes 85% validation accuracy on CIFAR-10 {seconds:.0f} seconds after the process starts" in words
    )
    others = (
        bench_record.read(ROOT / "results" / f"benchmark-{machine}.json")["sections"]["target"]["rows"]
        for machine in ("zen4", "zen3")
    )
    zen4, zen3 = (part["fast.85: to 85%"]["median"] for part in others)
    assert f"starts ({zen4:.0f} on a Zen 4, {zen3:.0f} on a Zen 3)" in words
    seconds = rows["fast.94: whitening, training and test"]["median"]
    mean = next(
        v["value"] for v in benchmark["sections"]["gpu_94"]["verdicts"] if "averaged views" in v["what"]
    )
    compiling = rows["fast.94: compiling, once"]["median"]
    claim = f"reaches {mean:.1f}% test accuracy, with test-time augmentation (TTA), in {seconds:.1f} seconds, after {compiling:.0f} seconds of compiling"
    assert claim in words
    of_85 = [
        r["metrics"] for r in found if r["metrics"]["recipe"] == "fast.85" and r["config"]["epochs"] == 3
    ]
    median = statistics.median(m["total_seconds"] for m in of_85)
    accuracy = statistics.mean(m["test_accuracy"] for m in of_85)
    assert f"# begin here: {accuracy:.0%} test accuracy, {median:.0f} s on two CPU cores" in words
    rows_of = {  # all in float32, which auto is there
        machine: bench_record.read(ROOT / "results" / f"benchmark-{machine}.json")["sections"]["own_model"][
            "rows"
        ]
        for machine in ("zen4", "zen3")
    }
    zen4 = rows_of["zen4"]["MobileNetV2: this project, float32"]["ratio"]
    zen3 = rows_of["zen3"]["MobileNetV2: this project, precision auto"]["ratio"]
    shown = f"takes {zen4:.2f} of the time of `Model.fit` on a Zen 4 and {zen3:.2f} on a Zen 3"
    assert f"MobileNetV2 in float32, {shown}" in words


def test_the_numbers_of_other_peoples_models_are_those_of_the_record():
    part = bench_record.read(ROOT / "results" / "benchmark-zen3.json")["sections"]["own_model"]
    tutorial, mobilenet = (f"{verdict['value']:.2f}" for verdict in part["verdicts"])
    library = " ".join((ROOT / "docs" / "library.md").read_text().split())
    assert (
        f"takes {tutorial} of the time of `Model.fit` for tutorial 4's network, and {mobilenet} for MobileNetV2"
        in library
    )


def test_the_limits_of_steps_are_those_of_the_records():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    zen4, xeon, model_207 = (
        bench_record.read(ROOT / "results" / f"benchmark-{name}.json")["sections"]["limit"]
        for name in ("zen4", "xeon", "xeon-207")
    )
    assert bench_record.read(bench_record.RECORD)["sections"]["limit"] == zen4
    machines = (zen4["verdicts"], xeon["verdicts"], model_207["verdicts"])
    for of_name in zip(*machines, strict=True):
        name = of_name[0]["what"].rpartition(": ")[2]
        shown = [bench_record.number_beside(r["value"], r["goal"]) for r in of_name]
        assert f"| step time / limit: `{name}` |  | {shown[0]} |  | {shown[1]} | {shown[2]} |" in text
    missed = text[text.index("## Goals missed") :]
    for result in [result for verdicts in machines for result in verdicts]:
        name, value = result["what"].rpartition(": ")[2], result["value"]
        shown = bench_record.number_beside(value, result["goal"])
        bound = re.fullmatch(r"(?:at most ([\d.]+))?", result["goal"])[1]
        is_missed = bool(bound) and value > float(bound)
        assert (f"`{name}` | {shown} | {value - float(bound or 0):.2f} |" in missed) == is_missed


def test_the_document_shows_the_processors_of_the_records():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert between(text, "processors") == bench_record.processors_table()


def test_a_column_of_processors_has_the_sections_of_its_machine(tmp_path, monkeypatch):
    """The first record holds sections of two machines; of the second machine's, memory is left out, and so is another record of it."""

    def section(processor, rows, **results):
        verdicts = [{"what": w, "value": v, "goal": "", "unit": ""} for w, v in results.items()]
        return {"environment": {"processor": processor}, "rows": rows, "verdicts": verdicts}

    zen4 = "AMD EPYC (family 25, model 17), 2 cores"
    step = {"this project": {"median": 55.44, "unit": "ms"}}
    slow = {"this project": {"median": 1234.0, "unit": "ms"}}
    memory = {"this project / the tutorial's code": 0.5}
    monkeypatch.setattr(bench_record, "RECORD", tmp_path / "benchmark.json")
    for file, sections in {
        "benchmark.json": {
            "step": section("AMD EPYC, 2 cores", step),
            "memory": section("another", {}, **memory),
        },
        "benchmark-zen4.json": {"step": section(zen4, slow), "memory": section(zen4, {}, **memory)},
        "benchmark-zen3.json": {"step": section(zen4, slow)},
    }.items():
        (tmp_path / file).write_text(json.dumps({"sections": sections}))
    rows = [line.strip("| ").split("|") for line in bench_record.processors_table().splitlines()]
    found = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}
    assert found["step: this project"] == ["55.4 ms", "1,234 ms"]
    assert found["memory / tutorial 4"] == ["", "0.50"]


def test_highlights_leave_out_what_has_no_record():
    one = [record("fast.85", 3, s, test_accuracy=0.86, total_seconds=40.0) for s in range(2)]
    *_, row = tables.highlights_table(one).splitlines()
    assert row.startswith("| `fast.85` | 10 | 3 | 86.00 ± 0.00 (2) |  | 40 s | AMD EPYC, 2 cores |")


def test_the_speed_table_has_the_sections_that_were_measured():
    rows = {
        "tutorial 4, its own code": {"median": 100.0, "unit": "ms"},
        "this project": {"median": 40.0, "unit": "ms"},
    }
    rows["this project"]["ratio"] = 0.4
    table = bench_record.speed_table({"sections": {"step": {"rows": rows}}}).splitlines()
    assert table[2:] == [
        "| a training step of tutorial 4's network, batch 128 | 40.0 ms | 100 ms: its own code | 0.40 |"
    ]
    rows |= {
        "PyTorch 3, compiled": {"median": 50.0, "unit": "ms"},
        "PyTorch 3": {"median": 60.0, "unit": "ms"},
    }
    table = bench_record.speed_table({"sections": {"step": {"rows": rows}}}).splitlines()
    assert table[2].endswith("| 100 ms: its own code; 50.0 ms: PyTorch 3, compiled | 0.40; 0.80 |")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python -m cifar10_trainer --data_dir=/a --seed=1", "python -m cifar10_trainer --seed=1"),
        (
            "python -m cifar10_trainer --seed=1 --data_dir '/my pictures/b'",
            "python -m cifar10_trainer --seed=1",
        ),
        ("python -m cifar10_trainer '--data_dir=/my pictures'", "python -m cifar10_trainer"),
        (
            "python -m cifar10_trainer --set 'options.filters=[4, 8]'",
            "python -m cifar10_trainer --set 'options.filters=[4, 8]'",
        ),
    ],
)
def test_a_record_does_not_name_where_the_images_are(command, expected):
    assert records.without_data_dir(command) == expected


def test_what_a_session_added_keeps_its_origin(monkeypatch):
    made = [{"commit": "a"}, {"commit": "a"}, {"commit": "b"}]
    monkeypatch.setattr(records, "made_by", lambda command: made.pop(0))
    record = {}
    assert [records.session(record, "x") for _ in range(3)] == [0, 0, 1]
    assert record["sessions"] == [{"commit": "a"}, {"commit": "b"}]


def test_every_table_has_one_document_and_one_place_in_it():
    names = [name for some in tables.DOCUMENTS.values() for name in some]
    assert len(names) == len(set(names)) == 10
    for document, some in tables.DOCUMENTS.items():
        text = (ROOT / document).read_text(encoding="utf-8")
        for name in some:
            assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- /{name} -->\n") == 1
            assert tables.document_of(name) == ROOT / document


# --- accuracy against cost ----------------------------------------------------------------------------


RECORDS = [
    record("fast.default", 40.0, 0, test_accuracy=0.93, views=6, test_accuracy_views=0.94, total_seconds=2000.0, pflop=0.8),
    record("fast.default", 4.0, 0, test_accuracy=0.88, views=6, test_accuracy_views=0.90, total_seconds=200.0, pflop=0.08),
    record("fast.default", 4.0, 1, test_accuracy=0.90, views=6, test_accuracy_views=0.92, total_seconds=300.0, pflop=0.08),
    record("leaky.baseline", 40, test_accuracy=0.85, best_val_accuracy=0.86, total_seconds=1500.0, pflop=0.33),
    record("leaky.sgd", 20, test_accuracy=0.95, best_val_accuracy=0.95, pflop=0.1),
    record("leaky.three", 40, test_accuracy=0.87, best_val_accuracy=0.85, pflop=0.1),
    record("vgg.final", 400, test_accuracy=0.89, best_val_accuracy=None, pflop=0.1),
    record("fast.digits", 20, dataset="digits", pflop=0.1),
    record("course.baseline", 10, test_accuracy=None, test_accuracy_views=None, pflop=0.1),
]  # fmt: skip


def test_a_point_holds_all_seeds():
    points = frontier.points_of(RECORDS)
    four, forty = frontier.points_by_epochs(points, "fast.default")
    assert (four.epochs, four.seconds, four.pflop) == (4, 250, 0.08)
    assert (four.validation, four.test, four.test_with_tta) == ((0.8, 0.8), (0.88, 0.90), (0.90, 0.92))
    assert (forty.epochs, forty.test) == (40, (0.93,))
    theirs = {"leaky.baseline", "leaky.three", "leaky.sgd", "vgg.final"}
    assert {p.recipe for p in points} == {"fast.default"} | theirs
    lengths = {
        recipe: [n for name, n in frontier.missing(RECORDS) if name == recipe] for recipe in frontier.OWN
    }
    assert lengths == {"fast.default": [2, 8, 16], "fast.95": [2, 4, 8, 16, 40]}


def test_a_tutorials_best_is_chosen_on_validation_images():
    found = frontier.tutorials(frontier.points_of(RECORDS))
    assert list(found) == ["tutorial 2", "tutorial 4"]
    assert [p.recipe for p in found["tutorial 4"]] == ["leaky.baseline", "leaky.three"]  # leaky.sgd was cut


def test_the_table_of_the_frontier():
    lines = frontier.table(frontier.points_of(RECORDS)).splitlines()[2:]
    assert lines == [
        # of 88 and 90, and of 90 and 92, the sample standard deviation is the square root of 2
        "| `fast.default` | 4 | 4 min | 0.08 | 80.00 ± 0.00 (2) | 89.00 ± 1.41 (2) | 91.00 ± 1.41 (2) |",
        "| `fast.default` | 40 | 33 min | 0.8 | 80.00 | 93.00 | 94.00 |",
        "| `vgg.final` (best measured of tutorial 2) | 400 | 100 s | 0.1 |  | 89.00 |  |",
        "| `leaky.baseline` (best measured of tutorial 4) | 40 | 25 min | 0.33 | 86.00 | 85.00 |  |",
    ]


@pytest.mark.parametrize(
    "found", [RECORDS, RECORDS[:1], RECORDS[3:4], []], ids=["all", "one", "theirs", "none"]
)
def test_the_figure_is_drawn_from_what_there_is(found, tmp_path):
    frontier.draw(frontier.points_of(found), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_shows_the_frontier_of_the_records():
    points = frontier.points_of(records.load())
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert between(text, "frontier") == frontier.table(points)


@pytest.mark.parametrize("content", ['{"metrics": ', "[1]"])
def test_a_damaged_record_is_named(content, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path)
    (tmp_path / "fast.85-3-0.json").write_text(content)
    with pytest.raises(RunError, match=r"cannot read .*/fast.85-3-0.json: "):
        records.load()
