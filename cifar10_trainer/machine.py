"""What the operating system says about this machine and this process. Imports no TensorFlow."""

from __future__ import annotations

import math
import os
import platform
import time
from pathlib import Path

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
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return found
