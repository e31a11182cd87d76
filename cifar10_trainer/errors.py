"""The two errors that users meet. Their texts are one line: what was received, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection


class ConfigError(ValueError):
    """Wrong usage: a flag, a name or a configuration that cannot be. Exit status 2."""


class RunError(RuntimeError):
    """Right usage that could not be carried out: data, files, network, divergence. Exit status 1."""


class FolderBusyError(RunError):
    """Another process is at work in the folder."""


class RunInterrupted(RunError):
    """A signal ended the run, with everything saved: the same command goes on from there."""


def interrupted(how: str, workdir: object, overwrite: bool) -> RunInterrupted:
    """The error for what a signal ended, with everything saved in `workdir`.

    how: what happened, as in "stopped by SIGINT at step 3"; overwrite: whether the command said --overwrite.
    """
    return RunInterrupted(
        f"{how}; everything is saved in {workdir}; the same command with --workdir={workdir}"
        f"{' and without --overwrite' if overwrite else ''} goes on from there"
    )


def unknown(what: str, received: object, allowed: Collection[str]) -> ConfigError:
    """The error for a name that is not one of `allowed`, with the nearest name where there is one."""
    near = difflib.get_close_matches(str(received), list(allowed), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {what} {received!r}; allowed: {', '.join(allowed)}.{hint}")


def reason_of(error: BaseException) -> str:
    """The first line of an error's text: for a system error, what the system calls it."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.partition("\n")[0].rstrip(":")
