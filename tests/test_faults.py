"""What goes wrong around a run: folders, disks, damaged files, memory. Each is one clear line, and costs nothing saved."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from cifar10_trainer import __main__ as command
from cifar10_trainer import cli, datasets
from cifar10_trainer.config import Config, Optimizer
from cifar10_trainer.datasets import Dataset
from cifar10_trainer.engine import Engine
from cifar10_trainer.errors import RunError
from cifar10_trainer.training import train_and_evaluate

PER_EPOCH = 4
TINY = Config(
    dataset="digits",
    architecture="vgg",
    options={"filters": (2,), "dense": 4},
    pixels="unit",
    optimizer=Optimizer(name="adam", learning_rate=0.001),
    precision="float32",
    batch_size=9,
    epochs=4,
)


@pytest.fixture(scope="module")
def few():
    """40 images, 36 of them to train on, in place of the digits."""
    whole = datasets.load("digits")
    chosen = np.concatenate([np.flatnonzero(whole.train_labels == k)[:4] for k in range(10)])
    return Dataset(
        "digits",
        whole.train_images[chosen],
        whole.train_labels[chosen],
        whole.test_images[:5],
        whole.test_labels[:5],
        whole.class_names,
        "scikit-learn",
    )


def run(config, workdir, dataset, *callbacks, **options):
    options = {"verbose": 0, "full_report": False, **options}
    return train_and_evaluate(config, workdir, dataset=dataset, callbacks=callbacks, **options)


def after(epoch, action):
    """A callback that does `action` at the end of an epoch, counted from 1."""
    return keras.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: action() if e + 1 == epoch else None)


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, few):
    workdir = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(RunError, match="stopped by SIGTERM at step 4 of 16"):
        run(TINY, workdir, few, after(1, interrupt))
    return workdir


@pytest.fixture
def begun(tmp_path, interrupted):
    """A run folder that was interrupted after the first of four epochs."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def one_line(info) -> str:
    text = str(info.value)
    assert "\n" not in text and len(text) < 400
    return text


# --- the run folder -------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "run"])
def test_the_run_folder_is_a_file(tmp_path, few, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        RunError, match=r"cannot write to .*file.*; choose another folder with --workdir"
    ) as info:
        run(TINY, tmp_path / "file" / below, few)
    one_line(info)
    assert (tmp_path / "file").read_text() == "mine"


@contextlib.contextmanager
def as_nobody():
    """Root may write everywhere, so it becomes somebody else for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("made", [True, False])
def test_no_permission_to_write(tmp_path, few, made):
    parent = tmp_path / "readonly"
    workdir = parent / "run"
    (workdir if made else parent).mkdir(parents=True)
    for folder in (workdir, parent) if made else (parent,):
        folder.chmod(0o555)
    for folder in tmp_path.parents[:2]:  # pytest's own are for their owner alone
        folder.chmod(0o755)
    tmp_path.chmod(0o755)
    reason = r"cannot write to .*: Permission denied; choose another"
    with pytest.raises(RunError, match=reason) as info, as_nobody():
        run(TINY, workdir, few)
    one_line(info)
    parent.chmod(0o755)


# --- a full disk ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_larger_than(size):
    """A disk that is full, as far as a process without its own disk can have one: writing fails half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["model.keras", "state.npz"])
def test_a_full_disk_leaves_the_old_files_whole(begun, few, monkeypatch, what):
    if what == "model.keras":
        monkeypatch.setattr(Engine, "evaluate", lambda *_: {"loss": 1.0, "accuracy": 1.0})
    else:
        monkeypatch.setattr(Engine, "evaluate", lambda *_: {"loss": 1.0, "accuracy": 0.0})
    before = {p.name: p.read_bytes() for p in begun.iterdir()}
    limit = 8000
    assert len(before[what]) > limit > len(before["config.json"])
    reason = rf"cannot write .*{what}: .*; make room or choose another folder"
    with pytest.raises(RunError, match=reason) as info, no_file_larger_than(limit):
        run(TINY, begun, few, save_seconds=60 if what == "model.keras" else 0)
    one_line(info)
    now = {p.name: p.read_bytes() for p in begun.iterdir()}
    assert now.keys() == before.keys()  # nothing half-written lies about
    assert all(now[name] == before[name] for name in ("model.keras", "state.npz"))
    assert run(TINY, begun, few)["epochs"] == 4


def test_a_save_that_is_cut_short_leaves_nothing(begun, few, monkeypatch):
    before = {p.name: p.read_bytes() for p in begun.iterdir()}
    true = os.replace

    def cut_short(source, target):
        if Path(target).name in ("model.keras", "state.npz"):
            raise KeyboardInterrupt
        true(source, target)

    for accuracy, seconds in ((1.0, 60), (0.0, 0)):
        monkeypatch.setattr(Engine, "evaluate", lambda *_, a=accuracy: {"loss": 1.0, "accuracy": a})
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", cut_short)
            with pytest.raises(KeyboardInterrupt):
                run(TINY, begun, few, save_seconds=seconds)
        now = {p.name: p.read_bytes() for p in begun.iterdir()}
        if seconds == 0:  # it is cut short when the old state has made room, and is the one before
            now["state.npz"] = now.pop("state.previous.npz")
        assert now.keys() == before.keys()
        assert all(now[name] == before[name] for name in ("model.keras", "state.npz"))
    assert run(TINY, begun, few)["epochs"] == 4


def test_what_a_killed_process_left_does_not_confuse_the_next(begun, few):
    """A process killed while it saves cannot clean up."""
    (begun / ".model.keras").write_bytes(b"half a model")
    ours = [".state.npz.1234.5678.tmp", ".state.npz.1.2.tmp.npz", ".history.csv.3.4.tmp.csv", ".writable"]
    theirs = [".model.keras.1.tmp", ".mine.npz.1.2.tmp.npz", ".state.npz.swp"]
    for name in ours + theirs:
        (begun / name).write_bytes(b"half")
    (begun / "figures").mkdir()
    (begun / "figures" / ".training_curves.png.5.6.tmp.png").write_bytes(b"half a figure")
    (begun / "figures" / "training_curves.png").write_bytes(b"of before")
    metrics = run(TINY, begun, few)
    assert metrics["epochs"] == 4 and keras.models.load_model(begun / "model.keras")
    assert (begun / "metrics.json").exists()
    assert not [name for name in ours if (begun / name).exists()]
    assert all((begun / name).read_bytes() == b"half" for name in theirs)
    assert [path.name for path in (begun / "figures").iterdir()] == ["training_curves.png"]


# --- damaged files --------------------------------------------------------------------------------------


def flip_a_byte(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def resaved(change):
    def damage(content, path):
        with np.load(path) as arrays:
            arrays = dict(arrays)
        change(arrays)
        np.savez(path, **arrays)
        return path.read_bytes()

    return damage


DAMAGES = {
    "empty": lambda content, path: b"",
    "text": lambda content, path: b"not an archive",
    "cut off": lambda content, path: content[:-300],
    "a flipped byte": lambda content, path: flip_a_byte(content),
    "without a variable": resaved(lambda arrays: arrays.pop("weights/1")),
    "without its story": resaved(lambda arrays: arrays.pop("meta")),
    "of another network": resaved(lambda arrays: arrays.update({"weights/0": np.zeros((3, 3, 3, 5))})),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state(begun, few, name):
    path = begun / "state.npz"
    path.write_bytes(DAMAGES[name](path.read_bytes(), path))
    with pytest.raises(
        RunError, match=r"state\.npz is damaged, or of other data \(.*\); delete it to begin this run again"
    ) as info:
        run(TINY, begun, few)
    one_line(info)
    if name == "text":  # what the line says works
        path.unlink()
        assert run(TINY, begun, few)["epochs"] == 4


@pytest.mark.parametrize("content", [b"", b"{not json", b"[1, 2]", b"7", b"\xff\xfe\x00"])
def test_a_damaged_config(tmp_path, few, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=r"config\.json is damaged \(.*\); .*--overwrite") as info:
        run(TINY, tmp_path, few)
    one_line(info)
    assert (tmp_path / "config.json").read_bytes() == content


# --- memory ---------------------------------------------------------------------------------------------


def test_out_of_memory(tmp_path, few, monkeypatch, capsys):
    """One line, exit status 1, and the run can go on with what was saved."""
    monkeypatch.setattr(datasets, "load", lambda *_, **__: few)

    def exhausted(engine, size):
        def graph(batches, first, count):
            message = "OOM when allocating tensor with shape[4096,64,32,32]\nHint: a long one"
            raise tf.errors.ResourceExhaustedError(None, None, message)

        return graph

    monkeypatch.setattr(Engine, "_graph", exhausted)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    command.FLAGS.unparse_flags()
    for name in command.FLAGS:
        command.FLAGS[name].unparse()
    argv = ["command", f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'run'}"]
    assert cli.run(command.main, command.FLAGS, command.USAGE, argv) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: out of memory: use a smaller --batch_size (OOM when allocating tensor")
    assert "Hint" not in said[-1]
