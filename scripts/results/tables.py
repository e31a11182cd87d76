"""The tables of the records, and the documents that show them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from cifar10_trainer import RECIPES, RunError

from .records import ROOT, Group, Record, group, is_own, lengths, mean_validation, pflop

# document -> the tables that it shows, each between the lines <!-- name --> and <!-- /name -->
DOCUMENTS = {
    "README.md": ("highlights", "speed"),
    "results/README.md": ("results", "versus"),
    "docs/benchmarks.md": ("benchmark", "frontier", "processors"),
    "docs/search.md": ("tuners",),
    "docs/photos.md": ("packaged", "photos"),
}
TUTORIALS = (1, 2, 3, 4, 5)
HIGHLIGHTS = (  # recipe and epochs: the project's own, and the best measured of each tutorial
    ("fast.85", 3),
    ("fast.default", 40),
    ("fast.95", 40),
    ("fast.94", 10),
    ("fast.96", 40),
    ("practical.plateau", 30),
    ("vgg.3_rising_dropout_augmented_bn", 400),
    ("course.baseline", 10),
    ("leaky.augmented", 40),
    ("wide_head.baseline", 25),
)


# ---- documents -------------------------------------------------------------------------------------------


def document_of(name: str) -> Path:
    """The document that shows the table `name`."""
    return next(ROOT / document for document, names in DOCUMENTS.items() if name in names)


def publish(name: str, content: str) -> None:
    """Replaces the table `name` in its document. Raises RunError where the document has no place for it."""
    rewrite(document_of(name), name, content)


def publish_results(records: Sequence[Record]) -> None:
    """Replaces the tables of recipes."""
    publish("highlights", highlights_table(records))
    publish("results", results_table(records))
    publish("versus", versus_table(records))


def rewrite(path: Path, name: str, content: str) -> None:
    """Puts `content` between the lines <!-- name --> and <!-- /name --> of a Markdown file."""
    from cifar10_trainer import files

    text = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise RunError(f"{path} has no <!-- {name} --> ... <!-- /{name} -->")
    files.write_atomic(path, pattern.sub(lambda m: m[1] + content + "\n" + m[2], text))


# ---- tables ----------------------------------------------------------------------------------------------


def markdown(head: list[str], left: list[str], rows: list[list[str]]) -> str:
    """A Markdown table. The columns in `left` hold texts, the others numbers."""
    rule = ["---" if name in left else "--:" for name in head]
    return "\n".join(
        ["| " + " | ".join(head) + " |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(r)} |" for r in rows)]
    )


def highlights_table(records: Sequence[Record]) -> str:
    """The rows of HIGHLIGHTS that have records."""
    groups, rows = group(records), []
    for key in HIGHLIGHTS:
        runs = groups.get(key)
        if not runs:
            continue
        rows.append([*what_ran(key[0], runs), *how_it_ended(runs)])
    head = ["recipe", "parameters", "epochs", "test, %", "with TTA, %", "time", "hardware", "command"]
    return markdown(head, ["recipe", "hardware", "command"], rows)


def results_table(records: Sequence[Record]) -> str:
    """A row for each recipe and number of epochs."""
    rows = []
    for (name, _), runs in group(records).items():
        claim = RECIPES[name].origin.claim if name in RECIPES else None
        claimed = "" if claim is None else f"{100 * claim:.2f}"
        validation = mean_and_deviation([r["metrics"]["best_val_accuracy"] for r in runs])
        rows.append([*what_ran(name, runs), claimed, validation, *how_it_ended(runs)])
    head = ["recipe", "parameters", "epochs", "claimed", "validation", "test", "test with TTA", "time"]
    return markdown([*head, "hardware", "command"], ["recipe", "hardware", "command"], rows)


def versus_table(records: Sequence[Record]) -> str:
    """A row for each tutorial: the recipe with its highest claim, beside one of the project's own.

    The project's own recipe trains with at most a tenth of the tutorial's FLOPs; of those that do, it is the one with
    the best validation accuracy. Recipes without validation images are considered last. FLOPs are three forward
    passes of the convolutions and dense layers for each training image; the tutorial's are those of all its epochs, or of those until its early stopping.
    A row without records is left out.
    """
    groups = group(records)
    rows = [row for tutorial in TUTORIALS if (row := versus_row(tutorial, groups))]
    theirs, ours = "its recipe, highest claim", "our recipe, best validation"
    head = ["tutorial", theirs, "claimed", "measured", "its PFLOP", ours, "our test", "our PFLOP", "share"]
    return markdown(head, ["tutorial", theirs, ours], rows)


def versus_row(tutorial: int, groups: dict[tuple[str, float], Group]) -> list[str]:
    """The cells of one tutorial; none where a record is missing."""
    names = [n for n, c in RECIPES.items() if c.origin.source.startswith(f"tutorial {tutorial},")]
    best = max(RECIPES[n].origin.claim or 0 for n in names)
    theirs = [k for k in groups if k[0] in names and (RECIPES[k[0]].origin.claim or 0) == best]
    if not theirs:
        return []
    name, epochs = max(theirs, key=lambda k: (k[1] / RECIPES[k[0]].epochs, mean_validation(groups[k])))
    of = RECIPES[name].epochs
    # Early stopping is a part of a recipe, so the epochs until then are all that the tutorial trains.
    budget = pflop(groups[name, epochs], None if RECIPES[name].early_stopping else of)
    fitting = {k: pflop(g) for k, g in groups.items() if is_own(k[0]) and pflop(g) <= budget / 10}
    if not fitting:
        return []
    ours = max(fitting, key=lambda k: (mean_validation(groups[k]), fitting[k]))
    trained = max(lengths(groups[name, epochs]))
    measured = mean_and_deviation([r["metrics"]["test_accuracy"] for r in groups[name, epochs]])
    return [
        str(tutorial),
        f"`{name}`",
        f"{100 * best:.2f}" if best else "none",
        measured if trained >= of else f"{measured}, {trained:g} of {of:g} epochs",
        f"{budget:.3g}",
        f"`{ours[0]}`, {ours[1]:g} epochs",
        mean_and_deviation([r["metrics"]["test_accuracy"] for r in groups[ours]]),
        f"{fitting[ours]:.3g}",
        f"{100 * fitting[ours] / budget:.1f}%",
    ]


# ---- cells -----------------------------------------------------------------------------------------------


def what_ran(name: str, runs: Group) -> list[str]:
    """Recipe, parameters and epochs."""
    return [f"`{name}`", f"{runs[0]['metrics']['params']:,}", epochs_run(name, runs)]


def how_it_ended(runs: Group) -> list[str]:
    """Test accuracy, test accuracy with TTA, time, hardware and command."""
    tta = any(r["metrics"]["views"] > 1 for r in runs)
    return [
        mean_and_deviation([r["metrics"]["test_accuracy"] for r in runs]),
        mean_and_deviation([r["metrics"]["test_accuracy_views"] for r in runs]) if tta else "",
        duration(statistics.median(r["metrics"]["total_seconds"] for r in runs)),
        "; ".join(dict.fromkeys(hardware(r) for r in runs)),
        command_of(runs),
    ]


def outcome(record: Record) -> str:
    """How one run ended, in a line: "test accuracy 93.57%, 94.53% with TTA, in 28 min on AMD EPYC, 2 cores"."""
    test, tta, time, where, _ = how_it_ended([record])
    with_tta = f", {tta}% with TTA" if tta else ""
    return f"test accuracy {test}%{with_tta}, in {time} on {where}"


def full_length(name: str, given: float) -> float:
    """The epochs of the recipe; `given` where it anneals over any number of epochs, or is not known."""
    return given if name not in RECIPES or is_own(name) else RECIPES[name].epochs


def epochs_run(name: str, runs: Group) -> str:
    """The epochs that the runs trained, and of how many: "20 of 100", "14-17 of 30, stopped early"."""
    trained, given = sorted(lengths(runs)), runs[0]["config"]["epochs"]
    text = f"{trained[0]:g}" if trained[0] == trained[-1] else f"{trained[0]:g}-{trained[-1]:g}"
    of = full_length(name, given)
    if trained[0] < of:
        text += f" of {of:g}"
    return f"{text}, stopped early" if trained[0] < given else text


def hardware(record: Record) -> str:
    """The GPUs or, without any, the processor."""
    environment = record["environment"]
    return environment["processor"] if environment["gpus"] == "none" else environment["gpus"]


def command_of(runs: Group) -> str:
    """The command that makes all the records of a row."""
    text = runs[0]["command"]
    if len(runs) > 1 and text.startswith("python scripts/reproduce.py"):
        text += f" --seeds={len(runs)}"
    return f"`{text}`"


def mean_and_deviation(accuracies: Sequence[float | None]) -> str:
    """The mean of accuracies 0-1, in percent; of several also their standard deviation and their number."""
    known = [100 * a for a in accuracies if a is not None]
    if not known:
        return ""
    if len(known) == 1:
        return f"{known[0]:.2f}"
    return f"{statistics.mean(known):.2f} ± {statistics.stdev(known):.2f} ({len(known)})"


def duration(seconds: float) -> str:
    """Whole seconds, from two minutes on whole minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
