"""Downloads CIFAR-10 to the folder where TFDS looks for it; an interrupted download resumes."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import RunError, reason_of
from ..files import expanded, folder_lock, regular_file

PYTHON_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
BINARY_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
BINARY_SIZE = 170_052_171
BINARY_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_ATTEMPTS = 5  # in a row that receive no byte
_PAUSE = 1.0  # seconds before the second attempt; each further attempt doubles it
_TIMEOUT = 60.0  # seconds without a byte from the server


def tfds_folder() -> Path:
    """Returns the folder where TFDS keeps its data sets."""
    return expanded(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def download() -> Path:
    """Downloads the binary archive to the folder where TFDS looks for it.

    The address and the sha256 are those of TFDS, and `tfds.load("cifar10")` finds the archive in
    <data_dir>/downloads/manual/. TFDS's own downloader starts from the beginning after a broken connection, which
    matters because this server is slow at times. TFDS's preparation step is omitted, because the archive can be read
    faster than what TFDS makes of it.

    Returns:
        The path of the archive. If it existed before, it is returned without being read.

    Raises:
        RunError: if the download fails, has a wrong sha256, or cannot be written.
    """
    folder = tfds_folder() / "downloads" / "manual"
    if str(folder).startswith("~"):
        raise RunError(
            "CIFAR-10 is not on this machine, and this user has no home folder; set TFDS_DATA_DIR, or name a copy with --data_dir"
        )
    archive = folder / "cifar-10-binary.tar.gz"
    part = folder / "cifar-10-binary.tar.gz.part"
    try:
        with folder_lock(folder, lambda: print("cifar10: waiting for another process", file=sys.stderr)):
            # Another process has just downloaded it, or it is damaged; then the error comes from reading it.
            if archive.exists():
                return archive
            print(
                f"cifar10: not on this machine; downloading {BINARY_SIZE / 1e6:.0f} MB from {BINARY_URL}"
                f" to {folder}. The server can be slow. If you stop, the next run resumes the download;"
                " if you have a copy elsewhere, name it with --data_dir.",
                file=sys.stderr,
            )
            if part.exists():
                regular_file(part)
            _fetch(part)
            sha256 = hashlib.sha256(part.read_bytes()).hexdigest()
            if sha256 != BINARY_SHA256:
                part.unlink()
                raise RunError(
                    f"the download from {BINARY_URL} has the sha256 {sha256}, not {BINARY_SHA256}, and was"
                    " deleted; run again, or name another copy with --data_dir"
                )
            os.replace(part, archive)
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or folder}: {reason_of(error)};"
            " correct that, or set TFDS_DATA_DIR to a folder with 200 MB to spare"
        ) from error
    return archive


def _fetch(part: Path) -> None:
    """Completes `part` from the server, over several connections if they break. Raises RunError if it gives up."""
    failures = 0
    while (before := _size_of(part)) < BINARY_SIZE:
        reason = "the connection closed early"
        try:
            _receive(part, before)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answered {error.code} {error.reason}"
            if 400 <= error.code < 500 and error.code not in (408, 429):
                failures = _ATTEMPTS  # a client error stays one
        except (urllib.error.URLError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)  # urllib wraps what the socket raised
            reason = reason_of(cause) if isinstance(cause, Exception) else str(cause)
        after = _size_of(part)
        if after >= BINARY_SIZE:
            break
        failures = 0 if after > before else failures + 1
        if failures >= _ATTEMPTS:
            raise RunError(
                f"cannot download {BINARY_URL}: {reason}; run again to resume from {after / 1e6:.1f} MB,"
                f" or download {PYTHON_URL} elsewhere and name it with --data_dir"
            )
        pause = _PAUSE * 2 ** max(failures - 1, 0)
        print(f"cifar10: {reason}; trying again in {pause:.0f} s", file=sys.stderr)
        time.sleep(pause)


def _size_of(part: Path) -> int:
    """Returns the size in bytes of a file that may not exist."""
    return part.stat().st_size if part.exists() else 0


def _receive(part: Path, offset: int) -> None:
    """Requests the bytes from `offset` on, and appends them to `part`; replaces it if the server sends all bytes."""
    request = urllib.request.Request(BINARY_URL, headers={"Range": f"bytes={offset}-"} if offset else {})
    with _of_the_network():
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    with response:
        start = offset if response.status == 206 else 0  # 206: partial content, as requested
        length = response.headers.get("Content-Length")
        if length is not None and start + int(length) != BINARY_SIZE:
            raise RunError(
                f"{BINARY_URL} sends {start + int(length):,} bytes, not {BINARY_SIZE:,}: perhaps the page of"
                " a proxy; check the network, or name another copy with --data_dir"
            )
        progress = _progress(start)
        with open(part, "ab" if start else "wb") as file:
            while file.tell() < BINARY_SIZE and (chunk := _read(response)):
                file.write(chunk)
                progress(file.tell())


def _read(response: http.client.HTTPResponse) -> bytes:
    with _of_the_network():
        return response.read1(1 << 16)


@contextlib.contextmanager
def _of_the_network() -> Iterator[None]:
    """Makes each error of the system in this context a URLError. The others in `_receive` are the disk's."""
    try:
        yield
    except urllib.error.URLError:
        raise
    except OSError as error:
        raise urllib.error.URLError(error) from error


def _progress(start: int) -> Callable[[int], None]:
    """Returns a function of the bytes received so far, which prints megabytes, rate and time left.

    On a terminal it updates one line; otherwise it prints a line every 30 seconds.
    """
    terminal = sys.stderr.isatty()
    interval = 0.2 if terminal else 30.0
    began = time.monotonic()
    shown = began

    def show(done: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < interval and done < BINARY_SIZE:
            return
        shown = now
        rate = (done - start) / max(now - began, 1e-3)
        left = (BINARY_SIZE - done) / max(rate, 1.0)
        text = (
            f"cifar10: {done / 1e6:.1f} of {BINARY_SIZE / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s,"
            f" {left // 60:.0f} min {left % 60:.0f} s left"
        )
        end = "" if terminal and done < BINARY_SIZE else "\n"
        print(f"\r{text:<70}" if terminal else text, end=end, file=sys.stderr, flush=True)

    return show
