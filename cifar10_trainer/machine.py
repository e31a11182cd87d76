"""What the operating system says about this machine and this process. Imports no TensorFlow."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import RunError

# When Python began to run this process, by time.monotonic(): now, less the processor time used so far. Until here Python only
# loads modules, so it waits for nothing but the disk. The kernel's start of the process may be earlier: with
# `bash -c 'sleep 9 && python ...'` the shell becomes the Python process.
PROCESS_START = time.monotonic() - time.process_time()


def monotonic(since: float | None) -> float:
    """A moment by `time.monotonic()`, which no setting of the clock changes.

    Args:
        since: by `time.monotonic()`; or by `time.time()`, as in version 1.0.0, which is more than any uptime; None: now.
    """
    now = time.monotonic()
    if since is None:
        return now
    return since if since <= now else now - max(0.0, time.time() - since)


def cpu_count() -> int:
    """The processors that this process may use, at least 1: limited by affinity (`taskset`) and by a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _container_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def _container_quota() -> float | None:
    """The processors that Linux's control group allows; None where it sets no limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:  # version 1 of control groups
        folder = Path("/sys/fs/cgroup/cpu")
        quota, length = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / length if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def check_fits(needed: float, what: str, advice: str = "use fewer images, or a smaller --image_size") -> None:
    """Raises RunError where `needed` bytes are more than this process can still have. To be called before they are read.

    Args:
        needed: the bytes that are about to be allocated, copies included.
        what: what needs them, for the error, as in "data_dir/train, 70,000 images of 224 pixels".
        advice: what to do about it.

    Raises:
        RunError: if they do not fit. Where the operating system does not say what is available, nothing is raised.
    """
    available = available_memory()
    if available is not None and needed > available:
        raise RunError(
            f"{what}: needs {_in_units(needed)} of memory, {_in_units(available)} are available; {advice}"
        )


def _in_units(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def available_memory() -> int | None:
    """The bytes that this process can still allocate without swapping: of the machine, and within a container's limit.

    Returns:
        at least 0; None where the operating system does not say.
    """
    found = [*_machine_memory(), *_container_memory()]
    return max(0, min(found)) if found else None


def _machine_memory() -> Iterator[int]:
    """The bytes that Linux estimates to be available for new work, caches that it can drop included."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass


def _container_memory() -> Iterator[int]:
    """The bytes left in each control group of this process that has a limit, page cache that can be dropped included."""
    for folder, limit, usage, cache in _memory_groups():
        try:
            allowed = int((folder / limit).read_text())  # "max" in version 2: no limit
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield allowed - used + int(stat.get(cache, 0))
        except (OSError, ValueError):
            pass


def _memory_groups() -> Iterator[tuple[Path, str, str, str]]:
    """(folder, names of limit, usage and droppable cache) of each control group around this process, of both versions."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = "/sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = "/sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # The limit of every group above counts, too. In a container the path may be the host's, and only the root exists.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield Path("/".join([root, *parts[:depth]])), *names


# The variable that TensorFlow reads once, when it is imported, and the flags of the processors where it uses oneDNN without it.
ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
ONEDNN_BY_DEFAULT = {"amx_bf16", "amx_int8", "amx_tile", "avx512_bf16", "avx512_vnni", "avx_vnni"}


def use_onednn() -> None:
    """Has TensorFlow use oneDNN where it would do without, and is not imported yet."""
    if without_onednn() and "tensorflow" not in sys.modules:
        os.environ[ONEDNN] = "1"


def without_onednn() -> bool:
    """Whether TensorFlow does without oneDNN by its own choice, on a processor where oneDNN is faster.

    These are processors with AVX2 that have no instructions for neural networks: most of the years 2013 to 2020. No
    convolution was slower with oneDNN there (docs/measurements.md). A user's own setting stays.
    """
    if ONEDNN in os.environ:
        return False
    flags = cpu_flags()
    return "avx2" in flags and not flags & ONEDNN_BY_DEFAULT


def cpu_flags() -> set[str]:
    """The processor's feature flags from Linux's /proc/cpuinfo; empty elsewhere."""
    return set(_cpu_info().get("flags", "").split())


def processor() -> str:
    """The processor's name, family and model, as in "AMD EPYC (family 25, model 17)"."""
    info = _cpu_info()
    name = info.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= set(info):  # on a virtual machine the name holds the maker only
        name += f" (family {info['cpu family']}, model {info['model']})"
    return name


def _cpu_info() -> dict[str, str]:
    """The first processor's entries in Linux's /proc/cpuinfo; empty elsewhere."""
    found: dict[str, str] = {}
    try:
        with Path("/proc/cpuinfo").open() as file:
            for line in file:
                if not line.strip():  # the next processor begins
                    break
                key, _, value = line.partition(":")
                found[key.strip()] = value.strip()
    except OSError:
        pass
    return found
