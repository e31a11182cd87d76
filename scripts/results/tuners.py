"""The records in results/tuners: what each tuner spent until its first trial past a target, and their table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuning import TUNERS


def make_record(settings: dict[str, Any], rows: Sequence[Any]) -> dict[str, Any]:
    """The record of a search.

    Args:
        settings: the flags of the search; "target" is the validation accuracy to pass, 0-1.
        rows: the trials, as rows of a leaderboard.

    Returns:
        The settings, all trials by the time of their end, and what was spent until the target or, where no trial
        passed it, in all.
    """
    done = sorted((r for r in rows if r.ended is not None), key=lambda r: r.ended)
    trials, pflop, first = [], 0.0, None
    for r in done:
        pflop += r.metrics.get("pflop", 0.0)
        accuracy = r.metrics.get("val_accuracy")
        trials.append(
            {
                "trial": r.trial,
                "status": r.status,
                "val_accuracy": accuracy,
                "epochs": r.metrics.get("epochs"),
                "pflop": r.metrics.get("pflop"),
                "ended": round(r.ended, 2),
                "values": r.values,
            }
        )
        if first is None and accuracy is not None and accuracy >= settings["target"]:
            first = {"trials": len(trials), "pflop": pflop, "seconds": round(r.ended, 2)}
    spent = first or {"trials": len(trials), "pflop": pflop, "seconds": trials[-1]["ended"]}
    best = max((t["val_accuracy"] or 0.0 for t in trials), default=0.0)
    return {
        **settings,
        "reached": first is not None,
        "spent": spent,
        "best_val_accuracy": best,
        "runs": trials,
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row for each tuner: how many searches reached the target, and the mean cost of one that does.

    The cost is what all searches of the tuner spent, those without success included, divided by the number of
    successes. This is the expected cost when a search that fails is followed by another one.
    """
    lines = [["tuner", "reached", "trials", "PFLOP", "seconds", "PFLOP of each", "best accuracy"]]
    for tuner in dict.fromkeys(r["tuner"] for r in records):
        own = [r for r in records if r["tuner"] == tuner]
        reached = sum(r["reached"] for r in own)
        cost = {
            k: sum(r["spent"][k] for r in own) / reached if reached else None
            for k in ("trials", "pflop", "seconds")
        }
        each = " ".join(f"{r['spent']['pflop']:.3g}" + ("" if r["reached"] else "+") for r in own)
        best = [100 * r["best_val_accuracy"] for r in own]
        deviation = f" ± {statistics.stdev(best):.2f}" if len(best) > 1 else ""
        numbers = [
            "-" if cost[k] is None else f"{cost[k]:{f}}"
            for k, f in zip(cost, (".1f", ".3g", ".0f"), strict=True)
        ]
        lines.append(
            [tuner, f"{reached} of {len(own)}", *numbers, each, f"{statistics.fmean(best):.2f}%{deviation}"]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)).rstrip() for x in lines)


def read(folder: Path) -> list[dict[str, Any]]:
    """All records in `folder`, in the order of TUNERS and of the seeds."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(records, key=lambda r: (list(TUNERS).index(r["tuner"]), r["seed"]))
