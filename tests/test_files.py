"""Files that appear whole or not at all, and folders that one process holds at a time."""

from __future__ import annotations

import errno
import os
import shlex
import threading
from pathlib import Path

import pytest

from cifar10_trainer import files
from cifar10_trainer.errors import ConfigError, RunError, interrupted
from cifar10_trainer.files import folder_lock
from cifar10_trainer.run_folder import RunFolder


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    files.write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(RunError, match="No space left"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_without_its_own_text_is_shown(tmp_path):
    assert "cannot write to x: odd; choose" in str(files.cannot_write(Path("x"), OSError("odd")))


def test_the_command_to_resume_can_be_pasted_into_a_shell(tmp_path):
    text = str(interrupted("stopped", tmp_path / "it's $mine", overwrite=False))
    words = shlex.split(text.partition("repeat the command with ")[2])
    assert words == [f"--workdir={tmp_path / chr(39).join(('it', 's $mine'))}"]


def test_a_folder_for_a_run_is_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files.time, "strftime", lambda form: "20260102-030405")
    first = files.new_workdir("fast.85")
    assert str(first) == "runs/fast.85-20260102-030405"
    first.mkdir(parents=True)
    (tmp_path / f"{first}-2").symlink_to("nowhere")
    assert str(files.new_workdir("fast.85")) == f"{first}-3"


def test_a_folder_is_held_by_one_and_goes_when_it_is_empty(tmp_path):
    folder, calls = tmp_path / "a" / "b", []
    with folder_lock(folder, lambda: calls.append("busy")):
        assert folder.is_dir() and list(folder.iterdir()) == []

        def second():
            with folder_lock(folder, lambda: calls.append("busy")):
                calls.append("in")

        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        assert calls == ["busy"]
    thread.join(30)
    assert calls == ["busy", "in"]
    assert list(tmp_path.iterdir()) == []
    with folder_lock(folder, calls.clear):
        (folder / "file").touch()
    assert folder.is_dir() and calls


def test_a_folder_that_cannot_be_opened_is_not_taken_for_locked(tmp_path, monkeypatch):
    """As where too many files are open: two runs would write the same files."""

    def full(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(files.os, "open", full)
    with pytest.raises(OSError, match="Too many open files"), folder_lock(tmp_path, lambda: None):
        pass


def test_windows_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files.sys, "platform", "win32")
    wsl = "trains on Linux; on Windows, install it in WSL 2"
    with pytest.raises(ConfigError, match=wsl), RunFolder(tmp_path / "run").lock():
        pass
    assert not (tmp_path / "run").exists()


def test_who_does_not_wait_for_a_held_folder_leaves_no_open_file(tmp_path):
    def busy():
        raise RunError("busy")

    with folder_lock(tmp_path / "a", busy):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(RunError, match="busy"), folder_lock(tmp_path / "a", busy):
            pass
        assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []
