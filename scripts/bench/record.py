"""The record of the benchmark, a JSON file, and the table and the bars that are made from it."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from pathlib import Path
from typing import Any

from results.records import ROOT

from cifar10_trainer import DEFAULT_RECIPE, ConfigError
from results import records, tables

from . import cpu, gpu
from .limit import GOALS, RATIO
from .timing import min_to_max, number

RECORD = ROOT / "results" / "benchmark.json"  # the one that docs/benchmarks.md shows
FIGURE = ROOT / "docs" / "benchmark.png"
# Of the table of processors: its columns, the record of each, and the processor of its sections; those of another one are left out.
PROCESSORS = {
    "AMD EPYC (generation not recorded)": ("benchmark.json", "AMD EPYC, 2 cores"),
    "AMD EPYC Zen 4, 2.6 GHz": ("benchmark-zen4.json", "AMD EPYC (family 25, model 17), 2 cores"),
    "AMD EPYC Zen 3": ("benchmark-zen3.json", "AMD EPYC (family 25, model 1), 2 cores"),
    "Intel Xeon with AMX": (
        "benchmark-xeon.json",
        "Intel(R) Xeon(R) Processor (family 6, model 167), 2 cores",
    ),
    "Intel Xeon, model 207, with AMX": (
        "benchmark-xeon-207.json",
        "Intel(R) Xeon(R) Processor (family 6, model 207), 2 cores",
    ),
}
# Its rows: their words, the section, and how the row or the result that they show begins.
COMPARED = [
    ("step: tutorial 4, its own code", "step", cpu.TUTORIAL),
    ("step: this project, float32", "step", cpu.OURS_FLOAT32),
    ("step: this project", "step", cpu.OURS),
    ("step: PyTorch, float32, channels last", "step", "PyTorch *, float32, channels last"),
    ("step: PyTorch, bfloat16, channels last", "step", "PyTorch *, bfloat16, channels last"),
    ("step: this project / tutorial 4", "step", "this project / the tutorial's own code"),
    ("step: this project / the best PyTorch", "step", "this project / the best PyTorch"),
    *(
        (f"`train(model=...)` / `Model.fit`: {name}", "own_model", f"{name}: this project / Model.fit")
        for name in ("tutorial 4's network", "MobileNetV2")
    ),
    *((f"step time / limit: `{name}`", "limit", f"{RATIO}: {name}") for name in GOALS),
    ("input pipeline with cutout / Keras layers without", "loader", "with cutout / Keras layers"),
    ("the same, to float32 images as Keras's", "loader", "with cutout, as float32 / Keras layers"),
    ("data in a step of `leaky.baseline`", "waiting", f"{cpu.SHARE_OF_DATA} of leaky.baseline"),
    ("data in a step of `fast.85`", "waiting", f"{cpu.SHARE_OF_DATA} of fast.85"),
    ("memory / tutorial 4", "memory", "this project / the tutorial's code"),
    ("`fast.85` to 85% validation accuracy", "target", "fast.85: to 85%"),
    ("tutorial 4 to 85% / `fast.85`", "target", "the tutorial's code to 85%"),
]
QUIET = 0.05  # the share of the processors that other processes may take

# Words in older records -> the words that the table shows.
RENAMED = {
    "with averaged views": "with TTA",
    "averaged views": "with TTA",
    "share of data in a step of ": f"{cpu.SHARE_OF_DATA} of ",
}


def read(path: Path) -> dict[str, Any]:
    """The record at `path`; an empty one where there is no file. Raises ConfigError where the file is something else."""
    if not path.exists():
        return {"sections": {}}
    try:
        return {"sections": dict(json.loads(path.read_text())["sections"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"record is {path}, which is no record of the benchmark; allowed: a new file, or a record of this command"
        ) from error


def keep(path: Path, name: str, found: dict[str, Any], *, command: str, quick: bool) -> dict[str, Any]:
    """Writes the numbers of a section into the record at `path`, with their date, commit, command and environment.

    Returns:
        The record.
    """
    from cifar10_trainer import files

    record = read(path)
    record["sections"][name] = {
        **records.made_by(command),
        "quick": quick,
        **found,
    }
    files.write_json(path, record, indent=1)
    return record


def publish(record: dict[str, Any], changed: str) -> None:
    """Replaces the table in its document and, where the section `changed` is in the figure, the figure."""
    tables.publish("benchmark", table(record))
    tables.publish("speed", speed_table(record))
    if changed in ("step", "loader"):
        bars(record, FIGURE)


def table(record: dict[str, Any]) -> str:
    """The Markdown table of the record: a block for each section, and the machines at the end."""
    lines = ["| | median or result | range | ratio | goal |", "|---|--:|--:|--:|---|"]
    made: dict[str, list[str]] = {}
    for name, section in {**cpu.SECTIONS, **gpu.SECTIONS}.items():
        if name not in record["sections"]:
            continue
        part = record["sections"][name]
        lines.append(f"| **{name}**: {(section.__doc__ or '').strip().rstrip('.')} | | | | |")
        exact = {r["value"]: number_beside(r["value"], r["goal"]) for r in part["verdicts"]}
        for row_name, row in part["rows"].items():
            ratio = exact.get(row["ratio"], f"{row['ratio']:.2f}") if "ratio" in row else ""
            median = f"{number(row['median'])} {row['unit']}"
            lines.append(f"| {present_words(row_name)} | {median} | {min_to_max(row)} | {ratio} | |")
        for result in part["verdicts"]:
            goal = result["goal"] + (" (missed)" if misses(result["value"], result["goal"]) else "")
            value = f"{number_beside(result['value'], goal)}{result['unit']}"
            lines.append(f"| *{present_words(result['what'])}* | **{value}** | | | {goal} |")
        made.setdefault(origin(part), []).append(name)
    return "\n".join([*lines, "", *(f"{', '.join(names)}: {how}." for how, names in made.items())])


def of_processors() -> list[Path]:
    """The records that the table of processors shows."""
    return [RECORD.with_name(file).resolve() for file, _ in PROCESSORS.values()]


def processors_table() -> str:
    """The Markdown table of the machines without a GPU, a column each; empty where a record has no such number."""
    rows = []
    for words, section, start in COMPARED:
        cells = []
        for file, processor in PROCESSORS.values():
            part = read(RECORD.with_name(file))["sections"].get(section)
            of_this = part and part["environment"]["processor"] == processor
            cells.append(_number_of(part, start) if of_this else "")
        rows.append([words, *cells])
    return tables.markdown(["", *PROCESSORS], [""], rows)


def _number_of(section: dict[str, Any], start: str) -> str:
    """A row's median, or else the first result whose name begins with `start`; "" where there is neither.

    start: in a row's name "*" stands for anything, such as a version.
    """
    for name, row in section["rows"].items():
        if fnmatch.fnmatchcase(name, start):
            return _shown(row)
    with contextlib.suppress(StopIteration):
        result = _result(section, start)
        return number_beside(result["value"], result["goal"]) + result["unit"]
    return ""


def misses(value: float, goal: str) -> bool:
    """Whether `value` is on the wrong side of a goal "at most N" or "at least N"; other goals are for people to judge."""
    limit = re.match(r"at (most|least) ([\d.,]*\d)", goal)
    if limit is None:
        return False
    bound = float(limit[2].replace(",", ""))
    return value > bound if limit[1] == "most" else value < bound


def number_beside(value: float, goal: str) -> str:
    """`number(value)`, or one more digit where rounding would hide that the goal is missed: 0.504, at most 0.5."""
    text = number(value)
    hidden = misses(value, goal) and not misses(float(text.replace(",", "")), goal)
    return f"{value:.3f}" if hidden else text


def speed_table(record: dict[str, Any]) -> str:
    """The README's table: the numbers of a user's first questions."""
    rows = []
    for make in (_target, _step, _loader, _memory, _gpu_step, _gpu_94):
        with contextlib.suppress(KeyError, StopIteration):  # not measured, or not all of it
            rows.append(make(record["sections"]))
    head = ["", "this project", "compared with", "ratio"]
    return tables.markdown(head, ["", "this project", "compared with"], rows)


def _shown(row: dict[str, Any]) -> str:
    return f"{number(row['median'])} {row['unit']}"


def _result(section: dict[str, Any], start: str) -> dict[str, Any]:
    return next(r for r in section["verdicts"] if present_words(r["what"]).startswith(start))


def _target(sections: dict[str, Any]) -> list[str]:
    """Time to the target, beside the tutorial's epochs."""
    rows = sections["target"]["rows"]
    ratio = _result(sections["target"], "the tutorial's code to 85%")["value"]
    seconds = rows["fast.85: to 85%"]["median"]
    epoch = next(row["median"] for name, row in rows.items() if name.startswith(f"{cpu.TUTORIAL}: an epoch"))
    epochs = f"{ratio * seconds / epoch:.0f} epochs of {epoch:.0f} s"
    peer = f"{ratio * seconds / 60:.0f} min, estimated: {epochs} of tutorial 4's own code"
    what = "85% validation accuracy, from the start of the process"
    return [what, f"{seconds:.0f} s, `fast.85`", peer, f"{1 / ratio:.3f}"]


def _step(sections: dict[str, Any]) -> list[str]:
    rows = sections["step"]["rows"]
    ours, tutorial = rows[cpu.OURS], rows[cpu.TUTORIAL]
    torch = [(row["median"], name) for name, row in rows.items() if name.startswith("PyTorch")]
    peer, ratio = f"{_shown(tutorial)}: its own code", f"{ours['ratio']:.2f}"
    if cpu.TUTORIAL_BFLOAT16 in rows:
        same = rows[cpu.TUTORIAL_BFLOAT16]["median"]
        peer += f"; {number(same)} ms: the same in bfloat16"
        ratio += f"; {ours['median'] / same:.2f}"
    if torch:
        median, name = min(torch)
        peer += f"; {number(median)} ms: {name}"
        ratio += f"; {ours['median'] / median:.2f}"
    shown = _shown(ours)
    if cpu.TUTORIAL_BFLOAT16 in rows:
        shown += f" in bfloat16, {number(rows[cpu.OURS_FLOAT32]['median'])} in float32"
    return ["a training step of tutorial 4's network, batch 128", shown, peer, ratio]


def _loader(sections: dict[str, Any]) -> list[str]:
    rows = sections["loader"]["rows"]
    ours, keras = rows["this project: flip, shift, cutout"], rows["Keras layers in map: flip, shift"]
    what = "input pipeline, `make_dataset`: flip, shift, cutout, to uint8"
    peer = f"{_shown(keras)}: Keras's layers, without cutout, to float32"
    return [what, _shown(ours), peer, f"{ours['ratio']:.2f}"]


def _memory(sections: dict[str, Any]) -> list[str]:
    rows = sections["memory"]["rows"]
    ours, tutorial = rows[cpu.OURS], rows[cpu.TUTORIAL]
    return [
        "peak memory of training",
        f"{_shown(ours)}, `{DEFAULT_RECIPE}`",
        f"{_shown(tutorial)}: tutorial 4's own code",
        f"{ours['ratio']:.3f}",
    ]


def _gpu_step(sections: dict[str, Any]) -> list[str]:
    rows, card = sections["gpu_step"]["rows"], sections["gpu_step"]["environment"]["gpus"]
    ours, fit = rows["this project, none"], rows["Model.fit, default settings"]
    what = f"{card}: training tutorial 4's network"
    peer, ratio = f"{_shown(fit)}: `Model.fit`", f"{ours['ratio']:.2f}"
    fastest, name = max((row["median"], name) for name, row in rows.items() if name.startswith("Model.fit"))
    if fastest > fit["median"]:
        peer += f"; {number(fastest)}: with {name.partition(', ')[2]}"
        ratio += f"; {ours['median'] / fastest:.2f}"
    return [what, _shown(ours), peer, ratio]


def _gpu_94(sections: dict[str, Any]) -> list[str]:
    """94% of the test images, whitening included on both sides, compilation on neither."""
    rows = sections["gpu_94"]["rows"]
    ours, compiling = rows["fast.94: whitening, training and test"], rows["fast.94: compiling, once"]
    airbench = sections["gpu_airbench"]["rows"]["airbench94.py"]
    what = f"{sections['gpu_94']['environment']['gpus']}: 94% on the test images, with TTA"
    ratio = f"{ours['median'] / airbench['median']:.2f}"
    return [
        what,
        f"{_shown(ours)}, `fast.94`, compiled in {_shown(compiling)}",
        f"{_shown(airbench)} on another card: airbench94, in PyTorch, not compiled",
        ratio,
    ]


def present_words(text: str) -> str:
    """The name of a row, without the words that only older records use."""
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    return text


def origin(part: dict[str, Any]) -> str:
    """The machine, versions and date of a section's numbers."""
    where = part["environment"]
    device = where["processor"] + ("" if where["gpus"] == "none" else f", {where['gpus']}")
    versions = f"TensorFlow {where['tensorflow']}, Keras {where['keras']}"
    notes = ", with --quick" if part["quick"] else ""
    notes += ", beside other work" if (part["others_share"] or 0) > QUIET else ""
    return f"{device}; {versions}; {part['date']}{notes}"


def bars(record: dict[str, Any], path: Path) -> None:
    """Draws the medians and ranges of the sections step and loader to the PNG file `path`; nothing where both are missing."""
    from cifar10_trainer.figures import BLUE, FAINT, INK, new_figure, save_figure, style_axes

    found = [(n, record["sections"][n]) for n in ("step", "loader") if n in record["sections"]]
    if not found:
        return
    heights = [len(section["rows"]) for _, section in found]
    figure = new_figure(9, 0.28 * sum(heights) + 0.9 * len(found))
    panels = figure.subplots(len(found), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (name, section) in zip(panels, found, strict=True):
        rows = section["rows"]
        unit = next(iter(rows.values()))["unit"]
        titles = {"step": f"A training step, {unit}", "loader": f"The input pipeline, {unit}"}
        style_axes(axes, titles[name], grid="x")
        medians = [row["median"] for row in rows.values()]
        colours = [BLUE if row_name.startswith(cpu.OURS) else FAINT for row_name in rows]
        axes.barh(range(len(rows)), medians, color=colours, height=0.72)
        for i, row in enumerate(rows.values()):
            axes.plot([row["min"], row["max"]], [i, i], color=INK, linewidth=1)
            axes.annotate(
                number(row["median"]), (row["max"], i), (4, 0), textcoords="offset points",
                va="center", fontsize=8.5, color=INK,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(row["max"] for row in rows.values()))
    save_figure(figure, path)
