"""The record results/tuners/trials.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ANNEALED, FIT = "annealed", "fit"
WAYS = {
    ANNEALED: (1.0, 1 / 3),
    FIT: (1.0,),
}  # how a trial trains -> the shares of a full trial that are recorded


def key(trial: dict[str, Any]) -> tuple[Any, ...]:
    """What distinguishes a trial from the others."""
    return trial["way"], trial["filters"], trial["dropout"], trial["learning_rate"], round(trial["share"], 4)


def read(path: Path) -> dict[str, Any] | None:
    """The record, or None where there is none."""
    import json

    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
