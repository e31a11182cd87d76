"""What a search has found: progress lines, leaderboard.csv, best_config.json, search.png, TensorBoard's HParams tab."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras_tuner as kt
import tensorflow as tf
from keras_tuner.engine.trial import Trial, TrialStatus
from tensorboard.plugins.hparams import api as hparams

from cifar10_trainer import files
from cifar10_trainer.config import Config, Origin

from .oracle import SearchOracle
from .search_folder import SearchFolder, trial_folder

METRICS = ("val_accuracy", "val_loss", "epochs", "parameters", "pflop", "seconds")
COLUMNS = ("trial", "folder", "status", *METRICS, "ended")


@dataclass(frozen=True)
class Row:
    """A trial. Its number counts from 1; `ended`: seconds of the search at its end; `reason`: why it failed."""

    trial: int
    status: str
    folder: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    ended: float | None = None
    reason: str = ""

    @property
    def accuracy(self) -> float:
        """On the validation images, 0-1; nan where the trial has none."""
        return self.metrics.get("val_accuracy", math.nan)


def make_row(trial: Trial, ended: float | None = None, names: Sequence[str] = ()) -> Row:
    """names: of the hyperparameters, in their order, which a trial that came from a worker has lost."""
    done = trial.status == TrialStatus.COMPLETED
    failed = trial.status == TrialStatus.FAILED
    values = {k: v for k, v in trial.hyperparameters.values.items() if not k.startswith("tuner/")}
    lines = (trial.message or "its process was lost").strip().splitlines()
    return Row(
        trial=int(trial.trial_id) + 1,
        status="completed" if done else "failed" if failed else "unfinished",
        folder=trial_folder(trial.trial_id),
        values={k: values[k] for k in dict.fromkeys([*names, *values]) if k in values},
        # float32 is enough for any of them, and drops the digits that are rounding
        metrics={m: float(f"{trial.metrics.get_best_value(m):.7g}") for m in METRICS} if done else {},
        ended=ended,
        reason=lines[-1] if failed else "",
    )


def format_value(value: Any) -> str:
    """A value as people write it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_exact(value: Any) -> str:
    """A value to be read again: a float to ten digits, more than any of them is good for."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f}%"


def in_epochs(epochs: float) -> str:
    return f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class Leaderboard:
    """Watches an oracle, tells how its search goes, and keeps the search's folder up to date.

    configure: hyperparameters -> Config of the trial. max_trials: the budget.
    """

    def __init__(
        self,
        oracle: SearchOracle,
        folder: SearchFolder,
        configure: Callable[[kt.HyperParameters], Config],
        *,
        target: float,
        max_trials: int,
        log: Callable[[str], None] = print,
    ):
        self.oracle, self.folder, self.configure = oracle, folder, configure
        self.target, self.max_trials, self.log = target, max_trials, log
        oracle.on_begin, oracle.on_end = self.on_begin, self.on_end

    def rows(self) -> list[Row]:
        """All trials: the best first, then those that failed, then the unfinished."""
        sign = -1 if self.oracle.objective.direction == "max" else 1
        name = self.oracle.objective.name
        order = ("completed", "failed", "unfinished")
        rows = [self.row(t) for t in list(self.oracle.trials.values())]
        return sorted(rows, key=lambda r: (order.index(r.status), sign * r.metrics.get(name, 0), r.trial))

    def row(self, trial: Trial) -> Row:
        names = [p.name for p in self.oracle.hyperparameters.space]
        return make_row(trial, self.oracle.ended.get(trial.trial_id), names)

    def best_trial(self) -> Trial | None:
        row = self.rows()[0] if self.oracle.trials else None
        if row is None or row.status != "completed":
            return None
        return next(t for t in list(self.oracle.trials.values()) if int(t.trial_id) + 1 == row.trial)

    def best_config(self) -> Config | None:
        """The Config of the best trial, ready for the main command."""
        trial = self.best_trial()
        if trial is None:
            return None
        config = self.configure(trial.hyperparameters)
        accuracy = percent(self.row(trial).accuracy)
        source = f"trial {int(trial.trial_id) + 1} of a search from {config.recipe}: {accuracy} validation accuracy"
        return config.override(recipe="search.best", origin=Origin(source=source), target=self.target)

    # -- while it runs --------------------------------------------------------------------------------------------

    def on_begin(self, trial: Trial) -> None:
        row = self.row(trial)
        values = " ".join(f"{k}={format_value(v)}" for k, v in row.values.items())
        try:
            epochs = in_epochs(self.configure(trial.hyperparameters).epochs)
        except Exception:  # the trial itself will say what is wrong with it
            epochs = "?"
        start = " (the starting point)" if self.oracle.baseline and row.trial == 1 else ""
        self.log(f"trial {row.trial} of {self.max_trials}: {values}, {epochs}{start}")

    def on_end(self, trial: Trial) -> None:
        self.write()
        rows = self.rows()
        row = next(r for r in rows if r.trial == int(trial.trial_id) + 1)
        ended = [r for r in rows if r.status != "unfinished"]
        if row.status == "failed":
            parts = [f"trial {row.trial} of {self.max_trials}: failed: {row.reason}"]
        else:
            parts = [f"trial {row.trial} of {self.max_trials}: {percent(row.accuracy)}"]
            parts[0] += f" in {duration(row.metrics['seconds'])}"
        best = rows[0]
        if best.status == "completed":
            side = "past" if best.accuracy >= self.target else "short of"
            parts.append(
                f"best {percent(best.accuracy)} (trial {best.trial}), {side} the target {percent(self.target)}"
            )
        left = self.time_left(rows)
        left_trials = self.max_trials - len(ended)
        if left is not None and left_trials > 0 and not self.oracle.stopped:
            parts.append(f"{left_trials} to go, about {duration(left)}")
        self.log("; ".join(parts))

    def time_left(self, rows: Sequence[Row]) -> float | None:
        """Seconds for the trials to come, if they take as long as those so far, on as many workers as live now."""
        seconds = [r.metrics["seconds"] for r in rows if r.status == "completed"]
        left = self.max_trials - sum(r.status != "unfinished" for r in rows)
        workers = max(1, len(self.oracle.live_workers()))
        return statistics.fmean(seconds) * left / workers if seconds else None

    def write(self) -> None:
        """leaderboard.csv, best_config.json and the TensorBoard logs, complete as of now."""
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row.values))
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        # A hyperparameter may be called like a metric: epochs.
        writer.writerow([*COLUMNS, *(f"hp.{name}" for name in names), "reason"])
        for r in rows:
            ended = "" if r.ended is None else f"{r.ended:.1f}"
            metrics = (format_exact(r.metrics.get(m, "")) for m in METRICS)
            values = (format_exact(r.values.get(name, "")) for name in names)
            writer.writerow([r.trial, r.folder, r.status, *metrics, ended, *values, r.reason])
        files.write_atomic(self.folder.leaderboard_file, out.getvalue())
        config = self.best_config()
        if config:
            files.write_json(self.folder.best_config_file, config.to_dict())
        for row in rows:
            self._tensorboard(row)

    def _tensorboard(self, row: Row) -> None:
        folder = self.folder.tensorboard / f"trial{row.trial:03d}"
        if row.status != "completed" or folder.exists():
            return
        writer = tf.summary.create_file_writer(str(folder))
        with writer.as_default():
            hparams.hparams(row.values, trial_id=folder.name)
            for name, value in row.metrics.items():
                tf.summary.scalar(name, value, step=round(row.metrics["epochs"]))
        writer.close()

    # -- at its end -----------------------------------------------------------------------------------------------

    def table(self, count: int = 10) -> str:
        """The best `count` trials, as text."""
        rows = [r for r in self.rows() if r.status == "completed"][:count]
        names = list(dict.fromkeys(name for row in rows for name in row.values))
        lines = [["trial", "accuracy", "epochs", "seconds", "PFLOP", *names]]
        for r in rows:
            m = r.metrics
            numbers = [f"{m['epochs']:.3g}", f"{m['seconds']:.0f}", f"{m['pflop']:.3g}"]
            values = [format_value(r.values.get(name, "")) for name in names]
            lines.append([str(r.trial), percent(r.accuracy), *numbers, *values])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(x, widths, strict=True)) for x in lines)

    def conclusion(self) -> str:
        """Whether the target was passed, when, at what cost; and whether the starting point was beaten."""
        rows = sorted((r for r in self.rows() if r.ended is not None), key=lambda r: r.ended or 0)
        best = self.rows()[0]
        lines = [f"best: trial {best.trial} with {percent(best.accuracy)} validation accuracy"]
        spent = 0.0
        for row in rows:
            spent += row.metrics.get("pflop", 0)
            if row.accuracy >= self.target:
                when = f"after {duration(row.ended or 0)} and {spent:.3g} PFLOP"
                lines.append(f"target {percent(self.target)}: first passed by trial {row.trial}, {when}")
                break
        else:
            lines.append(f"target {percent(self.target)}: not reached")
        start = next((r for r in rows if r.trial == 1 and r.status == "completed"), None)
        if self.oracle.baseline and start:
            gain = best.accuracy - start.accuracy
            how = f"beaten by {100 * gain:.2f} points" if gain > 0 else "no trial beats it"
            epochs = f"{in_epochs(start.metrics['epochs'])}, the best in {in_epochs(best.metrics['epochs'])}"
            lines.append(f"starting point: trial 1 with {percent(start.accuracy)}; {how} ({epochs})")
        failed = sum(r.status == "failed" for r in rows)
        if failed:
            lines.append(
                f"{failed} of {len(rows)} trials failed; {self.folder.leaderboard_file.name} has the reasons"
            )
        return "\n".join(lines)
