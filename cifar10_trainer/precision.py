"""Whether bfloat16 is faster than float32 on this processor: measured once a machine, and kept in the user's cache.

The flags of a processor do not tell. Some that multiply bfloat16 natively take 1.6 times as long for a convolution in
bfloat16 as in float32. Imports TensorFlow only to measure.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import machine
from .errors import FolderBusyError, RunError
from .files import folder_lock, read_json, write_json

# Flags of processors that multiply bfloat16. Without one, bfloat16 was never faster.
NATIVE = ("amx_bf16", "avx512_bf16")
# bfloat16 costs a little accuracy (0.2 points of fast.85), and a step is not made of convolutions alone. So it must save
# a tenth of their time. The known processors are far from this limit, at 0.6 and 1.6. Other processes beside a
# measurement move 0.6 to between 0.4 and 0.75.
CLEARLY_AHEAD = 0.9
VERSION = 1  # of the measurement; another one makes what is kept worthless
# Images, side and channels of 3x3 convolutions, as the networks here have them.
LAYERS = ((32, 32, 32), (32, 8, 128))
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 6, 0.2  # after so many seconds and rounds, no further round begins
WAIT = 10.0  # seconds to wait for another process that measures
# The largest ratio that is returned, also where oneDNN may not use these instructions and fails.
SLOWEST = 100.0
SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # variables that forbid oneDNN instructions

# By `_digest`: what this process has found, so that its runs agree even without a cache.
_ratios: dict[str, float] = {}


def native_flags() -> list[str]:
    """The processor's flags for native bfloat16; empty where it has none, or TensorFlow does without oneDNN."""
    if os.environ.get(machine.ONEDNN, "").lower() in ("0", "false"):
        return []
    return sorted(machine.cpu_flags() & set(NATIVE))


def bfloat16_ratio() -> tuple[float, str]:
    """The time of convolutions in bfloat16 over that in float32, on this processor.

    It is measured where no earlier measurement is kept, in less than half a second. One process measures at a time: the
    others wait, and take its answer. A cache that cannot be read or written never fails a run.

    Returns:
        The ratio, greater than 0, and where it comes from, for people.
    """
    here = _machine()
    file = cache_file(here)
    found = _read(file, here)
    if found is not None:
        return found
    with _one_at_a_time(file):
        found = _read(file, here)  # another process may have measured meanwhile
        if found is not None:
            return found
        began = time.monotonic()
        ratio = measure()
        seconds = time.monotonic() - began
        kept = f"kept in {_short(file)}" if keep(ratio) else "the cache cannot be written, so it is not kept"
        return ratio, f"measured just now in {seconds:.1f} s; {kept}"


def measure() -> float:
    """The time of a few convolutions in bfloat16 over that in float32: forward, to the images and to the kernels.

    At most SLOWEST. The two alternate, and the shortest time of each layer counts, so that other processes disturb both alike.
    """
    import tensorflow as tf

    def tensors(images: int, side: int, channels: int, dtype: str) -> tuple[Any, Any]:
        maps, kernel = (images, side, side, channels), (3, 3, channels, channels)
        return tuple(tf.fill(shape, tf.cast(0.01, dtype)) for shape in (maps, kernel))

    def seconds(maps: Any, kernel: Any) -> float:
        how: dict[str, Any] = {"strides": [1, 1, 1, 1], "padding": "SAME"}
        began = time.perf_counter()
        tf.raw_ops.Conv2D(input=maps, filter=kernel, **how)
        tf.raw_ops.Conv2DBackpropInput(input_sizes=maps.shape, filter=kernel, out_backprop=maps, **how)
        tf.raw_ops.Conv2DBackpropFilter(input=maps, filter_sizes=kernel.shape, out_backprop=maps, **how)
        return time.perf_counter() - began

    end = time.perf_counter() + SECONDS
    with tf.device("CPU:0"):
        cases = {
            (layer, dtype): tensors(*layer, dtype) for layer in LAYERS for dtype in ("float32", "bfloat16")
        }
        best = dict.fromkeys(cases, float("inf"))
        for turn in range(1 + MAX_ROUNDS):
            if turn > MIN_ROUNDS and time.perf_counter() > end:
                break
            for case, (maps, kernel) in cases.items():
                try:
                    spent = seconds(maps, kernel)
                except (tf.errors.AbortedError, tf.errors.UnimplementedError):
                    return SLOWEST
                if turn > 0:  # oneDNN prepares its kernels in the first
                    best[case] = min(best[case], spent)
    total = {dtype: sum(t for (_, d), t in best.items() if d == dtype) for dtype in ("float32", "bfloat16")}
    return min(total["bfloat16"] / total["float32"], SLOWEST)


# ---- the cache ----------------------------------------------------------------------------------------------


def cache_file(here: dict[str, Any] | None = None) -> Path | None:
    """Where this machine's answer is kept: a file in $XDG_CACHE_HOME, or ~/.cache; None where there is no home.

    Its name holds a digest of what the answer depends on, `here`, so that machines can share a home.
    """
    parent = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if not parent.is_absolute():  # the specification wants such a value ignored
        try:
            parent = Path.home() / ".cache"
        except RuntimeError:
            return None
    return parent / "cifar10-trainer" / f"precision-{_digest(here or _machine())}.json"


def keep(ratio: float) -> bool:
    """Keeps a ratio as this machine's, in the cache and in this process. Returns whether the cache could be written."""
    here = _machine()
    _ratios[_digest(here)] = ratio
    file = cache_file(here)
    with contextlib.suppress(RunError):
        if file is not None:
            write_json(file, {"bfloat16_over_float32": ratio, "machine": here})
            return True
    return False


def _machine() -> dict[str, Any]:
    """What the answer depends on, as JSON values."""
    return {
        "version": VERSION,
        "processor": machine.processor(),
        "flags": native_flags(),
        "cores": machine.cpu_count(),
        "tensorflow": importlib.metadata.version("tensorflow"),
        **{name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def _digest(here: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]


def _read(file: Path | None, here: dict[str, Any]) -> tuple[float, str] | None:
    """The ratio that is known for this machine, and from where; None where none is, or what is kept is damaged."""
    known = _ratios.get(_digest(here))
    if known is not None:
        return known, "measured before in this process"
    if file is None:
        return None
    try:
        values = read_json(file)
    except RunError:
        return None
    ratio = values.get("bfloat16_over_float32")
    if values.get("machine") != here or not isinstance(ratio, float) or not 0 < ratio <= SLOWEST:
        return None
    return ratio, f"measured before; kept in {_short(file)}"


@contextlib.contextmanager
def _one_at_a_time(file: Path | None) -> Iterator[None]:
    """Waits while another process measures, since each would slow down the other; but for at most WAIT seconds."""

    def refuse() -> None:
        raise FolderBusyError("another process measures")

    end = time.monotonic() + WAIT
    with contextlib.ExitStack() as stack:
        while file is not None and time.monotonic() < end:
            try:
                stack.enter_context(folder_lock(file.parent, refuse))
                break
            except FolderBusyError:
                time.sleep(0.05)
            except OSError:  # the folder cannot be made; then nothing is kept either
                break
        yield


def _short(path: Path | None) -> str:
    """A path with ~ for the home."""
    home = os.path.expanduser("~") + os.sep
    return str(path).replace(home, "~/", 1) if str(path).startswith(home) else str(path)
