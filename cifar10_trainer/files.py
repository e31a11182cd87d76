"""Files that appear whole or not at all, and folders that one process holds at a time."""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import json
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError, FolderBusyError, RunError, WriteError, reason_of

KINDS = {  # what a user's path may be instead of a regular file
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# of the largest JSON file that is read; a search of thousands of trials has a few megabytes
JSON_BYTES = 64 << 20


def regular_file(path: str | os.PathLike[str], limit: float | None = None) -> Path:
    """`path`, where it is a regular file of at most `limit` bytes. To be called before a user's file is opened.

    To open a FIFO blocks until somebody writes to it, and a device may never end.

    Raises:
        OSError: where there is no such file, where it is something else, and where it is larger.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
    if limit is not None and found.st_size > limit:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes; allowed: up to {limit:,.0f}", str(path))
    return Path(path)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, also where its brackets are nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, durable: bool = False, parents: bool = True) -> Iterator[Path]:
    """Gives a temporary file beside `path` to write to, and renames it to `path` at the end. Makes the folder.

    So `path` has the old content or all of the new one, never a part. The temporary name has the suffix of `path`, because
    writers determine the format from it.

    Args:
        path: the file to write.
        durable: whether the new file is on the disk at the end, so that a power failure does not lose it.
        parents: whether to make the parents of the folder, too.

    Raises:
        RunError: if nothing can be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=parents, exist_ok=True)
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def new_workdir(name: str) -> Path:
    """runs/<name>-<time>, where nothing is yet; of two runs that begin in the same second the later one gets "-2"."""
    path = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([path], (f"{path}-{i}" for i in itertools.count(2)))
    return next(Path(name) for name in names if not os.path.lexists(name))


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with ~ as the home folder. That of a user who does not exist stays as it is; `Path.expanduser` would raise."""
    return Path(os.path.expanduser(path))


def sync(path: str | os.PathLike[str]) -> None:
    """Waits until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do that for a folder
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Removes what killed processes left of `replacing` the files `names` in `folder`, whose lock the caller holds."""
    for name in names:
        pattern = re.compile(rf"\.{re.escape(name)}\.\d+\.\d+\.tmp({re.escape(Path(name).suffix)})?")
        for path in folder.glob(f".{glob.escape(name)}.*"):
            if pattern.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(
                    missing_ok=True
                )


def write_atomic(
    path: str | os.PathLike[str], content: str | bytes, *, durable: bool = False, parents: bool = True
) -> None:
    """Writes `content` (text as UTF-8) to `path`, whole or not at all; see `replacing`. Raises RunError."""
    with replacing(path, durable=durable, parents=parents) as temporary:
        # A file name that is not UTF-8 may be a part of the text.
        temporary.write_bytes(
            content.encode(errors="backslashreplace") if isinstance(content, str) else content
        )


@contextlib.contextmanager
def folder_lock(folder: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Makes `folder` and locks it against other processes. Where it is locked, calls `busy` and then waits.

    The lock is the operating system's: it ends with the process, and leaves no file. Folders that this call made and that
    are still empty at its end are removed.

    Args:
        folder: the folder to lock.
        busy: called before waiting; an exception from it ends the attempt.

    Raises:
        OSError: if the folder cannot be made.
    """
    made, descriptor = _lock(folder, busy)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()
        if descriptor is not None:
            os.close(descriptor)  # last, so that a process that waits finds the folders removed or staying


def _lock(folder: Path, busy: Callable[[], None]) -> tuple[list[Path], int | None]:
    """The folders made, the innermost first, and the descriptor that locks `folder`; None where no locks exist."""
    made: list[Path] = []
    while True:
        made += [path for path in _make_folders(folder) if path not in made]
        descriptor = None
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            if not _flock(descriptor, busy) or os.path.samestat(os.fstat(descriptor), folder.stat()):
                return made, descriptor
        except FileNotFoundError:
            pass  # the process that held it left it empty and removed it: try again
        except BaseException:  # `busy` raises rather than waits, or a signal arrived
            if descriptor is not None:
                os.close(descriptor)
            raise
        if descriptor is not None:
            os.close(descriptor)


def _flock(descriptor: int, busy: Callable[[], None]) -> bool:
    """Locks a folder, or calls `busy` and waits; False where no locks exist, as on Windows and some network file systems."""
    try:
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):
        return False
    return True


def _make_folders(folder: Path) -> list[Path]:
    """Makes `folder`. Returns the folders that did not exist before, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def write_json(
    path: str | os.PathLike[str],
    values: Any,
    indent: int | None = 2,
    *,
    durable: bool = False,
    parents: bool = True,
) -> None:
    """Writes `values` as a JSON file, whole or not at all; see `replacing`. Raises RunError."""
    write_atomic(path, json.dumps(values, indent=indent) + "\n", durable=durable, parents=parents)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises RunError where it cannot be read, or holds something else."""
    try:
        values = parse_json(regular_file(path, JSON_BYTES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {reason_of(error)}") from error
    if not isinstance(values, dict):
        raise RunError(f"cannot read {path}: it is not a JSON object")
    return values


def remove_files(folder: Path, marker: str, names: Iterable[str]) -> None:
    """Removes the files and folders `names` from `folder`, but only where the file `marker` shows that they are ours.

    It removes them in their order, and the marker last, so that another call completes what a kill cuts short. A folder
    goes as a whole: it first gets a name that `remove_leftovers` knows. Raises RunError where one cannot be removed.
    """
    if not (folder / marker).exists():
        return
    try:
        for path in (folder / name for name in (*names, marker)):
            remove(path)
    except OSError as error:
        raise cannot_write(folder, error) from error


def remove(path: Path) -> None:
    """Removes a file, if it is there, or a folder, as `remove_files` does. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def cannot_write(folder: Path, error: OSError) -> WriteError:
    """The one-line error for a folder that cannot be written to."""
    return WriteError(
        f"cannot write to {folder}: {error.strerror or error}; choose another folder with --workdir"
    )


class LockedFolder:
    """A folder in which one process at a time works, and which must stay where it is meanwhile. The base of runs and searches.

    Args:
        path: the folder. It need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._shown = expanded(path)
        # Absolute, because a callback or another thread may change the current folder.
        self.path = self._shown
        with contextlib.suppress(OSError):  # where that is gone, what follows reports it
            self.path = self._shown.absolute()
        self._identity: tuple[int, int] | None = None  # of the folder that is locked

    def __str__(self) -> str:
        return str(self._shown)

    @contextlib.contextmanager
    def _locked(self, busy: str) -> Iterator[None]:
        """Makes the folder, keeps others out of it, and tidies it. A folder that was made and left empty is removed again.

        Raises FolderBusyError with the text `busy` where another process is in it, RunError where it cannot be written to, ConfigError
        on Windows.
        """
        if sys.platform == "win32":  # no folder can be locked or flushed there, and no signal passed on
            raise ConfigError("this package trains on Linux; on Windows, install it in WSL 2")

        def refuse() -> None:
            raise FolderBusyError(busy)

        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(folder_lock(self.path, refuse))
                self._tidy()
                self._identity = self._found()
            except OSError as error:
                raise cannot_write(self.path, error) from error
            yield

    def _tidy(self) -> None:
        """Removes the temporary files that killed processes left. Raises OSError."""

    def _found(self) -> tuple[int, int]:
        """What tells the folder from another one of the same name. Raises OSError where there is none."""
        found = self.path.stat()
        return found.st_dev, found.st_ino

    def check_there(self) -> None:
        """Raises RunError where the folder was removed or replaced since it was locked."""
        with contextlib.suppress(OSError):
            if self._identity is None or self._found() == self._identity:
                return
        raise WriteError(
            f"cannot write to {self}: it was removed or replaced meanwhile; nothing more is written; begin again"
        )
