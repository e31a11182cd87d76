"""The benchmark's command, its record, and the document that it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import benchmark
import pytest
import tensorflow as tf
from bench import cpu, record, timing

from cifar10_trainer import cli, runtime
from results import records, tables

ROOT = Path(__file__).resolve().parent.parent


def between(text, name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.S)[1]


# --- the command ----------------------------------------------------------------------------------------


def command(*argv):
    return cli.run(benchmark.main, benchmark.FLAGS, "usage", ["benchmark.py", *argv])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stepp"], "unknown section 'stepp'; allowed: step, own_model, limit, .* Did you mean 'step'"),
        (["--gpu"], "gpu is True, but TensorFlow sees no GPU; allowed: on a machine with one"),
        (["--gpu", "step"], "unknown section 'step'; allowed: gpu_step, gpu_94, gpu_airbench, gpu_96"),
        (["--nogpu", "--airbench=x"], "airbench is x; allowed with --gpu only"),
        (
            [f"--record={ROOT}/README.md", "step"],
            "record is .*README.md, which is no record of the benchmark; allowed: a new file",
        ),
        (
            [f"--record={ROOT}/docs", "step"],
            "record is .*docs, which is no record of the benchmark; allowed: a new file",
        ),
    ],
)
def test_wrong_usage_is_one_line(argv, message, capsys):
    assert not tf.config.list_physical_devices("GPU")
    benchmark.FLAGS.unparse_flags()
    for name in ("gpu", "airbench", "record"):
        benchmark.FLAGS[name].unparse()
    assert command(*argv) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(message, error)


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """A checkout with no record yet."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text(
        "x\n<!-- benchmark -->\n<!-- /benchmark -->\n<!-- processors -->\n<!-- /processors -->\n"
    )
    (tmp_path / "README.md").write_text("x\n<!-- speed -->\n<!-- /speed -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RECORD", tmp_path / "results" / "benchmark.json")
    monkeypatch.setattr(record, "FIGURE", tmp_path / "docs" / "benchmark.png")
    monkeypatch.setattr(timing, "others_share", lambda: 0.0)
    for name in ("gpu", "airbench", "quick", "seeds", "record"):
        benchmark.FLAGS[name].unparse()
    return tmp_path


def section_of(name, value):
    def section(o):
        """A comparison of things."""
        rows = timing.rows_of({"this project": [value]}, "ms")
        return {"rows": rows, "verdicts": [timing.against_goal("it", value, "at least 1", " ms")]}

    section.__name__ = name
    return section


def test_the_record_of_another_processor_fills_its_column(documents, monkeypatch):
    monkeypatch.setitem(cpu.SECTIONS, "step", section_of("step", 2.5))
    document = documents / "docs" / "benchmarks.md"
    before = "  |" * list(record.PROCESSORS).index(column := "Intel Xeon with AMX")
    here = runtime.describe()["processor"]
    for name, processor, filled in (("mine", here, False), ("xeon", here, True), ("xeon", "another", False)):
        monkeypatch.setitem(record.PROCESSORS, column, ("benchmark-xeon.json", processor))
        assert command("--quick", f"--record={documents}/results/benchmark-{name}.json", "step") == 0
        text = document.read_text()
        assert "<!-- benchmark -->\n<!-- /benchmark -->" in text, "the tables are those of the default record"
        assert (f"| step: this project |{before} 2.50 ms |" in text) == filled == ("2.50 ms" in text)


def test_a_section_does_not_relabel_the_others(documents, monkeypatch):
    monkeypatch.setitem(cpu.SECTIONS, "step", section_of("step", 2.5))
    monkeypatch.setitem(cpu.SECTIONS, "loader", section_of("loader", 7.0))
    monkeypatch.setattr(records.time, "strftime", lambda _: "2030-01-01")
    monkeypatch.setattr(records, "commit", lambda: "aaaaaaa")
    assert command("--quick", "step", "loader") == 0
    first = json.loads(record.RECORD.read_text())["sections"]
    monkeypatch.setattr(records.time, "strftime", lambda _: "2031-02-02")
    monkeypatch.setattr(records, "commit", lambda: "bbbbbbb")
    monkeypatch.setattr(timing, "others_share", lambda: 0.5)
    assert command("--noquick", "loader", "--data_dir=/of/one/machine") == 0
    second = json.loads(record.RECORD.read_text())["sections"]
    assert second["step"] == first["step"]
    assert first["step"]["command"] == "python scripts/benchmark.py step --quick"
    assert (first["step"]["date"], first["step"]["commit"]) == ("2030-01-01", "aaaaaaa")
    assert (second["loader"]["date"], second["loader"]["commit"]) == ("2031-02-02", "bbbbbbb")
    assert second["loader"]["command"] == "python scripts/benchmark.py loader"
    assert {"tensorflow", "keras", "processor", "gpus"} <= set(second["loader"]["environment"])

    text = (documents / "docs" / "benchmarks.md").read_text()
    assert between(text, "benchmark") == record.table({"sections": second})
    assert "| this project | 2.50 ms | 2.50 - 2.50 |  | |" in text
    assert "| *it* | **7.00 ms** | | | at least 1 |" in text
    *_, quick, whole = between(text, "benchmark").splitlines()
    assert re.fullmatch(r"step: .*; 2030-01-01, with --quick\.", quick)
    assert re.fullmatch(r"loader: .*; 2031-02-02, beside other work\.", whole)
    assert record.FIGURE.read_bytes().startswith(b"\x89PNG")


def test_the_record_of_another_machine_is_not_published(documents, monkeypatch):
    monkeypatch.setitem(cpu.SECTIONS, "step", section_of("step", 2.5))
    monkeypatch.setitem(cpu.SECTIONS, "loader", section_of("loader", 7.0))
    before, path = (documents / "docs" / "benchmarks.md").read_text(), documents / "other.json"
    assert command(f"--record={path}", "step") == 0
    assert command("loader") == 0
    sections = json.loads(path.read_text())["sections"]
    assert set(sections) == {"step", "loader"}
    assert sections["step"]["command"] == f"python scripts/benchmark.py step --record={path}"
    assert not record.RECORD.exists() and not record.FIGURE.exists()
    assert (documents / "docs" / "benchmarks.md").read_text() == before


def test_the_default_record_is_published_by_its_name_too(documents, monkeypatch):
    monkeypatch.setitem(cpu.SECTIONS, "step", section_of("step", 2.5))
    assert command("--quick", f"--record={record.RECORD}", "step") == 0
    assert "| this project | 2.50 ms |" in (documents / "docs" / "benchmarks.md").read_text()


def test_a_section_named_twice_is_refused(documents, capsys):
    assert command("step", "step") == 2
    assert "the sections are step step; allowed: each one once" in capsys.readouterr().err


def test_quick_leaves_out_what_takes_whole_trainings(documents, monkeypatch):
    ran = []
    for name in cpu.SECTIONS:
        monkeypatch.setitem(cpu.SECTIONS, name, lambda o, name=name: ran.append((name, o)) or {})
    assert command("--quick") == 0
    assert [name for name, _ in ran] == [n for n in cpu.SECTIONS if n != "precision"]
    assert all(o.quick and o.seeds == 1 and o.rounds == 3 for _, o in ran)
    ran.clear()
    benchmark.FLAGS["quick"].unparse()
    assert command("--seeds=2") == 0
    assert [name for name, _ in ran] == list(cpu.SECTIONS)
    assert all(not o.quick and o.seeds == 2 and o.rounds == 7 for _, o in ran)


def test_without_its_document_the_benchmark_measures_nothing(documents, capsys):
    (documents / "docs" / "benchmarks.md").unlink()
    assert command("step") == 2
    assert "the benchmark runs in a checkout, and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("airbench94.py: averaged views", "airbench94.py: with TTA"),
        ("fast.94: test with averaged views", "fast.94: test with TTA"),
        ("mean of 20 seeds, averaged views", "mean of 20 seeds, with TTA"),
        ("fast.94: test accuracy, plain", "fast.94: test accuracy, plain"),
        (
            "share of data in a step of fast.85",
            "share of data in a step (median over the rounds' shares) of fast.85",
        ),
    ],
)
def test_the_table_shows_an_older_record_in_present_words(old, new):
    rows = {old: {"unit": "%", "median": 94.0, "min": 93.0, "max": 95.0}}
    results = [{"what": old, "value": 94.0, "unit": "%", "goal": ""}]
    environment = {"processor": "AMD EPYC", "gpus": "none", "tensorflow": "2.21.0", "keras": "3.15.1"}
    section = {"rows": rows, "verdicts": results, "environment": environment, "date": "2030-01-01"}
    section |= {"quick": False, "others_share": None}
    _, _, _, row, result, *_ = record.table({"sections": {"gpu_94": section}}).splitlines()
    assert row == f"| {new} | 94.0 % | 93.0 - 95.0 |  | |"
    assert result == f"| *{new}* | **94.0%** | | |  |"
    assert record.present_words(new) == new


@pytest.mark.parametrize(
    ("value", "goal", "ratio", "shown", "goal_shown"),
    [
        (0.504, "at most 0.5", "0.504", "0.504", "at most 0.5 (missed)"),  # 0.50 would look met
        (7.996, "at least 8", "7.996", "7.996", "at least 8 (missed)"),
        (0.43, "at most 0.40", "0.43", "0.43", "at most 0.40 (missed)"),
        (0.3, "at most 0.40", "0.30", "0.30", "at most 0.40"),
        (1.204, "at most 1.20", "1.204", "1.204", "at most 1.20 (missed)"),
        (1.998, "2 within 5%", "2.00", "2.00", "2 within 5%"),
        (160_000.0, "at least 160,000", "160,000", "160,000", "at least 160,000"),
    ],
)
def test_rounding_never_makes_a_missed_goal_look_met(value, goal, ratio, shown, goal_shown):
    rows = {"this project": {"unit": "ms", "median": 1.0, "min": 1.0, "max": 1.0, "ratio": value}}
    results = [{"what": "it", "value": value, "unit": "", "goal": goal}]
    environment = {"processor": "AMD EPYC", "gpus": "none", "tensorflow": "2.21.0", "keras": "3.15.1"}
    section = {"rows": rows, "verdicts": results, "environment": environment, "date": "2030-01-01"}
    section |= {"quick": False, "others_share": None}
    _, _, _, row, result, *_ = record.table({"sections": {"step": section}}).splitlines()
    assert row == f"| this project | 1.00 ms | 1.00 - 1.00 | {ratio} | |"
    assert result == f"| *it* | **{shown}** | | | {goal_shown} |"


def test_the_document_shows_the_table_of_the_record():
    written = json.loads(record.RECORD.read_text())
    assert between((ROOT / "docs" / "benchmarks.md").read_text(), "benchmark") == record.table(written)
    for section in written["sections"].values():
        assert {"date", "commit", "command", "quick", "environment", "others_share"} <= set(section)
        for row in section["rows"].values():
            assert row["min"] <= row["median"] <= row["max"]
            assert row["samples"]
