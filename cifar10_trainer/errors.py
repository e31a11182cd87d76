"""The errors that users meet. Each text is one line: what was received, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection


class ConfigError(ValueError):
    """Wrong usage: a flag, a name or a setting that is not allowed. Exit status 2."""


class RunError(RuntimeError):
    """Right usage that failed: data, files, network, a diverged training. Exit status 1."""


class FolderBusyError(RunError):
    """Another process uses the folder."""


class RunInterrupted(RunError):
    """A signal stopped the run after it saved everything: the same command resumes it."""


def interrupted(how: str, workdir: object, overwrite: bool) -> RunInterrupted:
    """The error after a signal, when everything is saved in `workdir`.

    Args:
        how: what happened, as in "stopped by SIGINT at step 3".
        workdir: the folder to resume from.
        overwrite: whether the command had --overwrite, which must go before it is repeated.
    """
    return RunInterrupted(
        f"{how}; everything is saved in {workdir}; to resume, repeat the command with --workdir={workdir}"
        f"{' and without --overwrite' if overwrite else ''}"
    )


def unknown(what: str, received: object, allowed: Collection[str]) -> ConfigError:
    """The error for a name that is not in `allowed`. It suggests the nearest name, if one is near."""
    near = difflib.get_close_matches(str(received), list(allowed), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {what} {received!r}; allowed: {', '.join(allowed)}.{hint}")


def reason_of(error: BaseException) -> str:
    """The first line of an error's text: for a system error, what the system calls it."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.partition("\n")[0].rstrip(":")
