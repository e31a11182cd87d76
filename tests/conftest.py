"""Fixtures for more than one test module."""

from __future__ import annotations

import gc
import os
import signal
import tracemalloc

from cifar10_trainer import augment, figures, machine, precision  # isort: skip  (before Keras, for oneDNN)

import keras
import matplotlib
import numpy as np
import pytest

ARRAYS = np.lib.tracemalloc_domain  # what NumPy allocates for its arrays

# Under nohup, or in the background of a shell, the tests would ignore these, and so would the processes that they start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The tests, and the processes that they start, neither use the user's cache nor depend on what is measured here.

    Where the processor has native bfloat16, "auto" takes it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # it would make its list of fonts again
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        assert precision.keep(0.5)
        yield


@pytest.fixture(scope="module", autouse=True)
def settled():
    """Python's garbage collections do not look at what the modules before this one left behind, which is much."""
    yield
    keras.utils.clear_session()  # collects, too
    gc.freeze()


@pytest.fixture(scope="session")
def realdata() -> str:
    """The path of the real CIFAR-10; without it the test is skipped. (Mark such tests `realdata`, too.)"""
    path = os.environ.get("CIFAR10_TRAINER_DATA")
    if not path:
        pytest.skip("needs the real CIFAR-10: set CIFAR10_TRAINER_DATA to an archive or a folder with it")
    return os.path.abspath(path)


@pytest.fixture
def table_bytes():
    """table_bytes(): the bytes that the tables of training images hold now, and Python's garbage collector rests."""

    def size():
        found = tracemalloc.take_snapshot()
        for kind in (tracemalloc.Filter(True, augment.__file__), tracemalloc.DomainFilter(True, ARRAYS)):
            found = found.filter_traces([kind])
        return sum(trace.size for trace in found.traces)

    tracemalloc.start()
    gc.disable()
    yield size
    gc.enable()
    tracemalloc.stop()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, to look at their contents; they are saved as usual, but not emptied."""
    found, save = [], figures.save_figure

    def keep(figure, path):
        monkeypatch.setattr(figure, "clear", lambda: None)
        found.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save_figure", keep)
    return found


@pytest.fixture
def proc(monkeypatch, tmp_path):
    """A /proc of the test's own: proc({"cpuinfo": text}); what is not given does not exist."""

    def pretend(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.removeprefix("/proc/"))

    return pretend
