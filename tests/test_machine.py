"""What is read from the operating system: processors, their flags, the start of the process."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from cifar10_trainer import machine
from cifar10_trainer.errors import RunError


def test_cpu_flags(proc):
    proc({"cpuinfo": "processor\t: 0\nflags\t\t: fpu vme avx512_bf16\nbugs\t\t: x\n\nflags\t\t: other\n"})
    assert machine.cpu_flags() == {"fpu", "vme", "avx512_bf16"}


def test_cpu_flags_elsewhere(proc):
    proc({})
    assert machine.cpu_flags() == set()


@pytest.mark.parametrize(
    ("flags", "setting", "expected"),
    [
        ("sse4_2 avx avx2 fma", None, "1"),  # Zen 1 to 3, Haswell to Comet Lake
        ("avx2 avx512f", None, "1"),  # Skylake-X
        ("avx2 avx512f avx512_vnni", None, None),  # TensorFlow does it by itself
        ("avx2 avx_vnni", None, None),
        ("sse4_2 avx", None, None),  # not measured
        ("", None, None),  # another architecture, another system
        ("avx2", "0", "0"),  # as the user wants it
        ("avx2", "1", "1"),
    ],
)
def test_onednn_where_tensorflow_would_do_without(proc, monkeypatch, flags, setting, expected):
    proc({"cpuinfo": f"flags\t\t: {flags}\n"})
    monkeypatch.setenv(
        machine.ONEDNN, setting or ""
    )  # at the end it is as before, whatever use_onednn has set
    if setting is None:
        monkeypatch.delenv(machine.ONEDNN)
    assert machine.without_onednn() == (setting is None and expected == "1")
    machine.use_onednn()  # too late
    assert os.environ.get(machine.ONEDNN) == setting
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    machine.use_onednn()
    assert os.environ.get(machine.ONEDNN) == expected
    assert not machine.without_onednn()


@pytest.mark.skipif("avx2" not in machine.cpu_flags(), reason="needs a processor with AVX2")
def test_tensorflow_takes_the_setting():
    program = "import cifar10_trainer, tensorflow; from tensorflow.python.util import _pywrap_util_port as p; print(p.IsMklEnabled())"
    environment = {name: value for name, value in os.environ.items() if name != machine.ONEDNN}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == "True\n"


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
from cifar10_trainer.errors import RunError
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


# --- memory ---------------------------------------------------------------------------------------------

GB = 10**9
MEMINFO = {"/proc/meminfo": "MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\n"}
V2 = {"/proc/self/cgroup": "0::/one/two\n"}
V1 = {"/proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n"}


def group(folder, limit, used, cache=0, version=2):
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder = f"/sys/fs/cgroup/{folder}"
    stat = f"anon 7\n{names[2]} {cache}\n"
    return {f"{folder}/{names[0]}": limit, f"{folder}/{names[1]}": used, f"{folder}/memory.stat": stat}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 8_192_000_000),
        ({**MEMINFO, **V2, **group("one/two", "max", 5)}, 8_192_000_000),
        ({**MEMINFO, **V2, **group("one/two", 4 * GB, 3 * GB, GB // 2)}, 3 * GB // 2),
        ({**MEMINFO, **V2, **group("one/two", "max", 5), **group("one", 2 * GB, GB)}, GB),  # the group above
        (
            {**MEMINFO, **V2, **group("", 2 * GB, GB)},
            GB,
        ),  # in a container that sees its own group as the root
        ({**V2, **group("one/two", GB, 2 * GB)}, 0),
        ({**MEMINFO, **V1, **group("memory/job", 4 * GB, 3 * GB, GB, version=1)}, 2 * GB),
        ({**MEMINFO, **V1, **group("memory", 2**63 - 4096, 3 * GB, version=1)}, 8_192_000_000),
        ({"/proc/meminfo": "MemAvailable: nonsense\n"}, None),
    ],
)
def test_available_memory(files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        path = tmp_path / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / str(path)[1:])
    assert machine.available_memory() == expected


def test_what_does_not_fit_is_refused_with_both_sizes_and_advice(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 2 * GB)
    machine.check_fits(2 * GB, "pictures")
    said = r"^pictures: needs 31\.5 GB of memory, 2\.0 GB are available; use fewer images, or a smaller --image_size$"
    with pytest.raises(RunError, match=said):
        machine.check_fits(31.5 * GB, "pictures")
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    machine.check_fits(1e30, "pictures")


def test_this_machine_has_memory():
    """Compared with what the kernel says of free memory: that much can be had, unless a container forbids it."""
    available = machine.available_memory()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available is None or 0 < available <= total
