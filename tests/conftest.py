"""Fixtures for more than one test module."""

from __future__ import annotations

import os
import signal

import matplotlib
import pytest

from cifar10_trainer import figures, machine, precision

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


@pytest.fixture(scope="session")
def realdata() -> str:
    """The path of the real CIFAR-10; without it the test is skipped. (Mark such tests `realdata`, too.)"""
    path = os.environ.get("CIFAR10_TRAINER_DATA")
    if not path:
        pytest.skip("needs the real CIFAR-10: set CIFAR10_TRAINER_DATA to an archive or a folder with it")
    return os.path.abspath(path)


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
