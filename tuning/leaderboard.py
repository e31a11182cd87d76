"""The results of a search: progress lines, leaderboard.csv, best_config.json and TensorBoard's HParams tab."""

from __future__ import annotations

import csv
import io
import math
import shutil
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
from cifar10_trainer.process import Log

from .oracle import SearchOracle, rounded
from .search_folder import SearchFolder, trial_folder

METRICS = ("val_accuracy", "val_loss", "epochs", "parameters", "pflop", "seconds")
COLUMNS = ("trial", "folder", "status", *METRICS, "ended")


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        trial: its number, from 1.
        status: "completed", "failed" or "unfinished".
        folder: its run folder, relative to the search's folder.
        values: hyperparameter -> value.
        metrics: METRICS -> value; empty unless completed. Accuracies are 0-1, times in seconds.
        ended: seconds of the search at its end; None for an unfinished trial.
        reason: why it failed, in one line.
    """

    trial: int
    status: str
    folder: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    ended: float | None = None
    reason: str = ""

    @property
    def accuracy(self) -> float:
        """The accuracy on the validation images, 0-1; nan if the trial has none."""
        return self.metrics.get("val_accuracy", math.nan)


def format_value(value: Any) -> str:
    """A value for people: a float with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_exact(value: Any) -> str:
    """A value for programs: a float with ten digits, which is more than its accuracy."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def in_epochs(epochs: float) -> str:
    """A number of epochs with its unit."""
    return f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class Leaderboard:
    """Logs the progress of a search, and updates the search's folder when a trial ends.

    Args:
        oracle: the oracle of the search. It calls the leaderboard when a trial begins or ends.
        folder: the search's folder.
        configure: hyperparameters -> Config of the trial.
        target: the validation accuracy to reach, 0-1.
        max_trials: the budget.
        log: prints a line.
    """

    def __init__(
        self,
        oracle: SearchOracle,
        folder: SearchFolder,
        configure: Callable[[kt.HyperParameters], Config],
        *,
        target: float,
        max_trials: int,
        log: Log = print,
    ):
        self.oracle, self.folder, self.configure = oracle, folder, configure
        self.target, self.max_trials, self.log = target, max_trials, log
        oracle.on_begin, oracle.on_end = self.on_begin, self.on_end

    def rows(self) -> list[Row]:
        """All trials: the completed ones, the best first, then the failed and the unfinished ones."""
        return sorted((self.row(t) for t in list(self.oracle.trials.values())), key=self._rank)

    def _rank(self, row: Row) -> tuple[float, ...]:
        """What the rows are sorted by."""
        objective = self.oracle.objective
        sign = -1 if objective.direction == "max" else 1
        order = ("completed", "failed", "unfinished").index(row.status)
        # Of few validation images many trials get as many right.
        return order, sign * row.metrics.get(objective.name, 0), row.metrics.get("val_loss", 0), row.trial

    def row(self, trial: Trial) -> Row:
        """The row of a trial. Its metrics, which are float32 numbers, are rounded to seven digits, but for counts."""
        done = trial.status == TrialStatus.COMPLETED
        failed = trial.status == TrialStatus.FAILED
        values = {k: v for k, v in trial.hyperparameters.values.items() if not k.startswith("tuner/")}
        # In the order of the space, which a trial from a worker does not keep.
        names = dict.fromkeys([*(p.name for p in self.oracle.hyperparameters.space), *values])
        lines = (trial.message or "its process was lost").strip().splitlines()
        return Row(
            trial=int(trial.trial_id) + 1,
            status="completed" if done else "failed" if failed else "unfinished",
            folder=trial_folder(trial.trial_id),
            values={name: values[name] for name in names if name in values},
            metrics={m: rounded(trial.metrics.get_best_value(m)) for m in METRICS} if done else {},
            ended=self.oracle.ended.get(trial.trial_id),
            reason=lines[-1] if failed else "",
        )

    def best_trial(self) -> Trial | None:
        """The completed trial with the best objective; None if no trial is completed."""
        done = [t for t in list(self.oracle.trials.values()) if t.status == TrialStatus.COMPLETED]
        return min(done, key=lambda trial: self._rank(self.row(trial)), default=None)

    def best_config(self) -> Config | None:
        """The Config of the best trial, for the main command; None if no trial is completed."""
        trial = self.best_trial()
        if trial is None:
            return None
        config = self.configure(trial.hyperparameters)
        accuracy = f"{self.row(trial).accuracy:.2%}"
        source = f"trial {int(trial.trial_id) + 1} of a search from {config.recipe}: {accuracy} validation accuracy"
        return config.override(recipe="search.best", origin=Origin(source=source), target=self.target)

    # ---- during the search

    def on_begin(self, trial: Trial) -> None:
        """Logs the values of a trial that begins."""
        row = self.row(trial)
        values = " ".join(f"{k}={format_value(v)}" for k, v in row.values.items())
        try:
            epochs = in_epochs(self.configure(trial.hyperparameters).epochs)
        except Exception:  # the trial will fail with this error, which is logged then
            epochs = "?"
        start = " (the starting point)" if self.oracle.baseline and row.trial == 1 else ""
        self.log(f"trial {row.trial} of {self.max_trials}: {values}, {epochs}{start}")

    def on_end(self, trial: Trial) -> None:
        """Updates the folder, and logs the result of a trial, the best trial and the remaining time."""
        self.write()
        rows = self.rows()
        row = self.row(self.oracle.trials[trial.trial_id])
        ended = [r for r in rows if r.status != "unfinished"]
        if row.status == "failed":
            parts = [f"trial {row.trial} of {self.max_trials}: failed: {row.reason}"]
        else:
            parts = [f"trial {row.trial} of {self.max_trials}: {row.accuracy:.2%}"]
            parts[0] += f" in {duration(row.metrics['seconds'])}"
        best = rows[0]
        if best.status == "completed":
            # With another objective, the best trial need not have the highest accuracy.
            side = "past" if (self.oracle.best_accuracy() or 0) >= self.target else "short of"
            parts.append(
                f"best {best.accuracy:.2%} (trial {best.trial}), {side} the target {self.target:.2%}"
            )
        left = self.time_left(rows)
        left_trials = self.max_trials - len(ended)
        if left is not None and left_trials > 0 and not self.oracle.stopped:
            parts.append(f"{left_trials} to go, about {duration(left)}")
        self.log("; ".join(parts))

    def time_left(self, rows: Sequence[Row]) -> float | None:
        """Estimates the remaining time from the mean time of the completed trials and the number of live workers.

        Args:
            rows: all trials.

        Returns:
            Seconds; None if no trial is completed.
        """
        seconds = [r.metrics["seconds"] for r in rows if r.status == "completed"]
        left = self.max_trials - sum(r.status != "unfinished" for r in rows)
        workers = max(1, len(self.oracle.live_workers()))
        return statistics.fmean(seconds) * left / workers if seconds else None

    def write(self) -> None:
        """Writes leaderboard.csv, best_config.json and the TensorBoard logs of all trials so far."""
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row.values))
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        # The prefix is necessary because a hyperparameter may have the name of a metric: epochs.
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
        """Writes the TensorBoard logs of a completed trial, once."""
        folder = self.folder.tensorboard / f"trial{row.trial:03d}"
        if row.status != "completed" or folder.exists():
            return
        unfinished = folder.with_name(folder.name + ".part")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed here
        writer = tf.summary.create_file_writer(str(unfinished))
        with writer.as_default():
            hparams.hparams(row.values, trial_id=folder.name)
            for name, value in row.metrics.items():
                tf.summary.scalar(name, value, step=round(row.metrics["epochs"]))
        writer.close()
        unfinished.rename(folder)

    # ---- at the end

    def table(self, count: int = 10) -> str:
        """A table of the best trials as text.

        Args:
            count: the largest number of trials in the table.

        Returns:
            One line for the names of the columns, and one for each trial.
        """
        rows = [r for r in self.rows() if r.status == "completed"][:count]
        names = list(dict.fromkeys(name for row in rows for name in row.values))
        lines = [["trial", "accuracy", "epochs", "seconds", "PFLOP", *names]]
        for r in rows:
            m = r.metrics
            numbers = [f"{m['epochs']:.3g}", f"{m['seconds']:.0f}", f"{m['pflop']:.3g}"]
            values = [format_value(r.values.get(name, "")) for name in names]
            lines.append([str(r.trial), f"{r.accuracy:.2%}", *numbers, *values])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(x, widths, strict=True)) for x in lines)

    def conclusion(self) -> str:
        """Three to four lines of text: the best trial, the cost until the target, and the gain over the first trial."""
        rows = sorted((r for r in self.rows() if r.ended is not None), key=lambda r: r.ended or 0)
        best = self.rows()[0]
        lines = [f"best: trial {best.trial} with {best.accuracy:.2%} validation accuracy"]
        spent = 0.0
        for row in rows:
            spent += row.metrics.get("pflop", 0)
            if row.accuracy >= self.target:
                when = f"after {duration(row.ended or 0)} and {spent:.3g} PFLOP"
                lines.append(f"target {self.target:.2%}: first passed by trial {row.trial}, {when}")
                break
        else:
            lines.append(f"target {self.target:.2%}: not reached")
        start = next((r for r in rows if r.trial == 1 and r.status == "completed"), None)
        if self.oracle.baseline and start:
            gain = best.accuracy - start.accuracy
            if gain > 0:
                how = f"beaten by {100 * gain:.2f} points"
            elif best.trial == 1 or self.oracle.objective.name == "val_accuracy":
                how = "no trial beats it"
            else:
                how = f"{-100 * gain:.2f} points more than the best, whose {self.oracle.objective.name} is better"
            epochs = f"{in_epochs(start.metrics['epochs'])}, the best in {in_epochs(best.metrics['epochs'])}"
            lines.append(f"starting point: trial 1 with {start.accuracy:.2%}; {how} ({epochs})")
        failed = sum(r.status == "failed" for r in rows)
        if failed:
            lines.append(
                f"{failed} of {len(rows)} trials failed; {self.folder.leaderboard_file.name} has the reasons"
            )
        return "\n".join(lines)
