"""The errors that users meet. Each text is one line: what was received, what is allowed, what to do."""

from __future__ import annotations

import difflib
import math
import numbers
import re
import shlex
from collections.abc import Collection
from typing import Any

VALUE_LENGTH = 100  # characters of a value that an error shows
PATH_LENGTH = 500  # of a word with a slash: a path, or a flag with one, that a user will copy
MESSAGE_LENGTH = 1500  # characters of an error
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, in Keras's errors


def shown(value: object) -> str:
    """A received value as an error shows it: its repr in printable characters, at most VALUE_LENGTH of them."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deeply nested lists
        text = f"<{type(value).__name__}, too large to be shown>"
    return cut(text)


def cut(text: object, length: int = VALUE_LENGTH) -> str:
    """The text in printable characters, and in at most `length` of them: what is left out is in the middle."""
    text, half = str(text), (length - 3) // 2
    text = text if len(text) <= length else f"{text[:half]}...{text[-half:]}"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def _cut_word(word: re.Match[str]) -> str:
    return cut(word[0], PATH_LENGTH if "/" in word[0] else VALUE_LENGTH)


class _OneLine(Exception):
    """An error whose text is one line of printable characters, whatever was received: long words are cut, too."""

    def __init__(self, text: object = ""):
        words = re.sub(r"\S{101,}", _cut_word, re.sub(r"\s*\n\s*", " ", COLOURS.sub("", str(text))))
        super().__init__(cut(words, MESSAGE_LENGTH))


class ConfigError(_OneLine, ValueError):
    """Wrong usage: a flag, a name or a setting that is not allowed. Exit status 2."""


class RunError(_OneLine, RuntimeError):
    """Right usage that failed: data, files, network, a diverged training. Exit status 1."""


class WriteError(RunError):
    """Nothing can be written: the disk is full, or the folder has gone or is not writable."""


class FolderBusyError(RunError):
    """Another process uses the folder."""


class RunInterrupted(RunError):
    """A signal stopped the run after it saved everything: the same command resumes it."""


def interrupted(
    how: str, workdir: object, overwrite: bool, saved: str = "everything", *, chief: bool = True
) -> RunInterrupted:
    """The error after a signal, when what is to be resumed is saved in `workdir`.

    Args:
        how: what happened, as in "stopped by SIGINT at step 3".
        workdir: the folder to resume from.
        overwrite: whether the command had --overwrite, which must go before it is repeated.
        saved: what is.
        chief: whether this process has saved it, and not worker 0 of its cluster, whose folder may be another.
    """
    if chief:
        how += f"; {saved} is saved in {workdir}; to resume, repeat the command with --workdir={shlex.quote(str(workdir))}"
    else:
        how += f"; worker 0 has saved {saved}; to resume, repeat the commands of all workers"
    return RunInterrupted(f"{how} and without --overwrite" if overwrite else how)


def unknown(what: str, received: object, allowed: Collection[str]) -> ConfigError:
    """The error for a name that is not in `allowed`. It suggests the nearest name, if one is near."""
    near = difflib.get_close_matches(str(received)[:VALUE_LENGTH], list(allowed), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {what} {shown(received)}; allowed: {', '.join(allowed)}.{hint}")


def check_type(name: str, value: object, kinds: type | tuple[type, ...], allowed: str) -> None:
    """Raises ConfigError where `value` has none of the types. True and False are no numbers; NumPy's numbers are."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ConfigError(f"{name} is {shown(value)}; allowed: {allowed}")


def check_number(
    name: str, value: Any, kind: type, low: float, high: float = math.inf, *, words: str | None = None
) -> None:
    """Raises ConfigError where `value` is no number of this kind from `low` to `high`.

    Args:
        name: what the error calls it.
        value: what was received.
        kind: numbers.Integral or numbers.Real.
        low, high: the range, both included.
        words: what is allowed; None: made from the kind and the range.
    """
    whole, form = ("a whole number", "") if kind is numbers.Integral else ("a number", "g")
    words = words or (
        f"{whole}, {low:{form}} or more"
        if high == math.inf
        else f"{whole} from {low:{form}} to {high:{form}}"
    )
    check_type(name, value, kind, words)
    if not low <= value <= high:
        raise ConfigError(f"{name} is {shown(value)}; allowed: {words}")


def one_line(error: object, length: int = 200) -> str:
    """The text of an error in one line, cut to `length` characters."""
    return " ".join(COLOURS.sub("", str(error)).split())[:length]


def reason_of(error: BaseException) -> str:
    """The first line of an error's text: for a system error, what the system calls it."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.partition("\n")[0].rstrip(":")
