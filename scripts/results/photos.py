"""The tables of docs/photos.md, from the records results/packaged.json and results/photos.json."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from typing import Any

from . import records, tables

PACKAGED = records.ROOT / "results" / "packaged.json"
PHOTOS = records.ROOT / "results" / "photos.json"


def packaged_table(record: dict[str, Any]) -> str:
    """The numbers of the network in the package."""
    none = record["none_of_the_ten"]
    rows = [
        ["test accuracy, plain", _percent(record["test"]["accuracy"])],
        ["size in the wheel", f"{record['file']['bytes_in_wheel'] / 1e6:.2f} MB"],
        ['test images that "look like none of the classes"', _percent(none["false_alarms_test"])],
        *([f"{name} that do", _percent(share)] for name, share in none["caught"].items()),
    ]
    return tables.markdown(["the network in the package", ""], ["the network in the package"], rows)


def photos_table(runs: list[dict[str, Any]]) -> str:
    """What trains best on few pictures: means over the seeds, and the median of the times."""
    groups: dict[tuple[str, int, int], dict[str, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for run in runs:
        groups[run["set"], run["images_per_class"], run["image_size"]][run["method"]].append(run)
    rows = []
    for (name, count, size), methods in sorted(groups.items()):
        for method, found in sorted(methods.items(), key=lambda item: -_mean(item[1], "test")):
            seconds = statistics.median(run["seconds"] for run in found)
            rows.append(
                [
                    name,
                    str(count),
                    method if size == 32 else f"{method}, {size} pixels",
                    _percent(_mean(found, "validation")),
                    _percent(_mean(found, "test")),
                    f"{seconds:.0f} s",
                    str(len(found)),
                ]
            )
    head = ["pictures", "a class", "method", "validation", "test", "time", "seeds"]
    return tables.markdown(head, ["pictures", "method"], rows)


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def publish() -> None:
    """Writes the tables of the records that there are."""
    for name, path, make in (("packaged", PACKAGED, packaged_table), ("photos", PHOTOS, photos_table)):
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            tables.publish(name, make(found["runs"] if name == "photos" else found))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
