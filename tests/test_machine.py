"""What is read from the operating system: processors, their flags, the start of the process."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from cifar10_trainer import machine


def test_cpu_flags(proc):
    proc({"cpuinfo": "processor\t: 0\nflags\t\t: fpu vme avx512_bf16\nbugs\t\t: x\n\nflags\t\t: other\n"})
    assert machine.cpu_flags() == {"fpu", "vme", "avx512_bf16"}


def test_cpu_flags_elsewhere(proc):
    proc({})
    assert machine.cpu_flags() == set()


@pytest.mark.parametrize(
    ("files", "affinity", "expected"),
    [
        ({}, 8, 8),
        ({"cpu.max": "max 100000"}, 8, 8),
        ({"cpu.max": "200000 100000"}, 8, 2),
        ({"cpu.max": "150000 100000"}, 8, 2),  # one and a half: two threads keep them busy
        ({"cpu.max": "10000 100000"}, 8, 1),
        ({"cpu.max": "1600000 100000"}, 8, 8),  # more than there are
        ({"cpu.max": "nonsense"}, 4, 4),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 8, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8, 8),
    ],
)
def test_processors_of_a_container(files, affinity, expected, monkeypatch, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.removeprefix("/sys/fs/cgroup/"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(affinity), raising=False)
    assert machine.cpu_count() == expected


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="only Linux sets the processors of a process"
)
def test_processors_of_a_process_that_may_use_one():
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{one}]); from cifar10_trainer import machine; print(machine.cpu_count())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


SLEPT = """
import time
from cifar10_trainer import machine
print(time.monotonic() - machine.PROCESS_START)
"""


def test_the_clock_starts_with_python_and_not_with_a_shell_that_became_it():
    """bash turns into the last command of -c, so for the kernel the process began before the sleep."""
    words = ["bash", "-c", f"sleep 2 && {sys.executable} -c '{SLEPT}'"]
    began = time.time()
    seconds = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert 0 < seconds < time.time() - began - 2 + 0.05


def test_the_clock_counts_what_python_did_before():
    """Half a second of work before the import belongs to the process, as the interpreter's own start does."""
    code = f"import time\nwhile time.process_time() < 0.5: pass\n{SLEPT}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) >= 0.5
