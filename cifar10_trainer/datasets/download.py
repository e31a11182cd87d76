"""Downloading CIFAR-10, resumably, to where TFDS looks for it."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from ..errors import RunError, reason_of
from ..files import folder_lock

PYTHON_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
BINARY_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
BINARY_SIZE = 170_052_171
BINARY_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_ATTEMPTS = 5  # in a row without a byte received
_PAUSE = 1.0  # seconds before the second attempt; it doubles with each
_TIMEOUT = 60.0  # seconds without a byte from the server


def tfds_folder() -> Path:
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def download() -> Path:
    """Downloads the binary archive to where TFDS looks for it, and gives its path.

    It is the download of TFDS: the same address, the same sha256, and `tfds.load("cifar10")` takes it from
    <data_dir>/downloads/manual/. But TFDS's downloader starts again from nothing after a broken connection,
    and this server has been slow enough for that to matter. TFDS's preparation is left out: the archive
    itself reads faster than what it would be turned into.
    """
    folder = tfds_folder() / "downloads" / "manual"
    archive = folder / "cifar-10-binary.tar.gz"
    part = folder / "cifar-10-binary.tar.gz.part"
    try:
        with folder_lock(folder, lambda: print("cifar10: waiting for another process", file=sys.stderr)):
            if (
                archive.exists()
            ):  # another process has just brought it; or it is damaged, as reading it will tell
                return archive
            print(
                f"cifar10: not on this machine; downloading {BINARY_SIZE / 1e6:.0f} MB from {BINARY_URL}"
                f" to {folder}. The server can be slow. If you stop, the next run goes on from there;"
                " a copy from elsewhere is named with --data_dir.",
                file=sys.stderr,
            )
            _fetch(part)
            received = hashlib.sha256(part.read_bytes()).hexdigest()
            if received != BINARY_SHA256:
                part.unlink()
                raise RunError(
                    f"the download from {BINARY_URL} has the sha256 {received}, not {BINARY_SHA256}, and was"
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
    """Completes `part` from the server, over as many connections as it takes."""
    failures = 0
    while (have := part.stat().st_size if part.exists() else 0) < BINARY_SIZE:
        reason = "the connection closed early"
        try:
            _receive(part, have)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answered {error.code} {error.reason}"
            if 400 <= error.code < 500 and error.code not in (408, 429):
                failures = _ATTEMPTS
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            cause = getattr(error, "reason", error)  # urllib wraps what the socket raised
            reason = reason_of(cause) if isinstance(cause, Exception) else str(cause)
        now = part.stat().st_size if part.exists() else 0
        if now >= BINARY_SIZE:
            break
        failures = 0 if now > have else failures + 1
        if failures >= _ATTEMPTS:
            raise RunError(
                f"cannot download {BINARY_URL}: {reason}; run again to go on from {now / 1e6:.1f} MB,"
                f" or download {PYTHON_URL} elsewhere and name it with --data_dir"
            )
        pause = _PAUSE * 2 ** max(failures - 1, 0)
        print(f"cifar10: {reason}; trying again in {pause:.0f} s", file=sys.stderr)
        time.sleep(pause)


def _receive(part: Path, have: int) -> None:
    """One request for the bytes from `have` on, appended to `part`; or from the start, if need be."""
    request = urllib.request.Request(BINARY_URL, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        start = have if response.status == 206 else 0  # partial content; otherwise the server sends it all
        length = response.headers.get("Content-Length")
        if length is not None and start + int(length) != BINARY_SIZE:
            raise RunError(
                f"{BINARY_URL} gives {start + int(length):,} bytes, not {BINARY_SIZE:,}: perhaps the page of"
                " a proxy; check the network, or name another copy with --data_dir"
            )
        progress = _progress(start)
        with open(part, "ab" if start else "wb") as file:
            while file.tell() < BINARY_SIZE and (chunk := response.read1(1 << 16)):
                file.write(chunk)
                progress(file.tell())


def _progress(start: int) -> Callable[[int], None]:
    """Shows megabytes, rate and time left: on a terminal in one line, otherwise a line each half minute."""
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
