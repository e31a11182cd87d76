"""Readers of what users and networks give, on what Hypothesis makes up, for a bounded time each.

Whatever a reader gets, it returns a value of its kind or raises ConfigError or RunError, in one line; and its memory
stays within a bound.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import tarfile
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cifar10_trainer import __main__ as command
from cifar10_trainer import datasets
from cifar10_trainer.cluster import Place, place_in_tf_config
from cifar10_trainer.config import Config
from cifar10_trainer.datasets import cifar10
from cifar10_trainer.errors import ConfigError, RunError
from cifar10_trainer.recipes import RECIPES
from cifar10_trainer.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))  # for each reader
MEMORY = 100 << 20  # bytes that Python and NumPy may allocate for an example

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([10**400, -(10**400), 1e-320, 5e-324, math.inf, math.nan, "x" * 500, "\udcff", 2**63]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip
BYTES = st.binary(max_size=2000)


@st.composite
def changed(draw, original: bytes):
    """`original` with some bytes replaced, a piece taken out or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 20)))
        data[start:end] = draw(st.binary(max_size=20))
    return bytes(data)


def fuzz(strategy, check) -> None:
    """Calls `check` with examples, until SECONDS are over. One that raises anything else is a failure, and is shown."""
    end, calls = time.monotonic() + SECONDS, []

    @settings(
        max_examples=50,
        phases=[Phase.generate],  # to make an example smaller may take minutes
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example):
        if time.monotonic() > end:
            return
        calls.append(1)
        tracemalloc.start()
        try:
            check(example)
        except (ConfigError, RunError) as error:
            text = str(error)
            assert text.isprintable() and 0 < len(text) <= 1500, text
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MEMORY, f"{peak:,} bytes"

    while time.monotonic() < end:
        run()
    assert len(calls) >= 20, "too few examples to mean anything"


def nested(values: dict) -> list[tuple[str, ...]]:
    return [
        (k, *inner) for k, v in values.items() for inner in (nested(v) if isinstance(v, dict) and v else [()])
    ]


RECORD = RECIPES["fast.digits"].to_dict()


@st.composite
def records(draw):
    """The record of a recipe, with a few fields replaced by anything."""
    values = copy.deepcopy(RECORD)
    for path in draw(st.lists(st.sampled_from(nested(RECORD)), max_size=3)):
        target = values
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = draw(JSON)
    return values


def test_configs(tmp_path):
    path = tmp_path / "config.json"

    def check(content):
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        config = command.read_config(str(path))
        assert Config.from_dict(config.to_dict()) == config

    text = json.dumps(RECORD).encode()
    fuzz(records() | JSON | BYTES | changed(text) | st.integers(0, 20_000).map(lambda n: b"[" * n), check)


def test_flags():
    names = [n for n in command.FLAGS if not command.FLAGS[n].boolean]
    settings_ = st.tuples(st.sampled_from([".".join(p) for p in nested(RECORD)]) | st.text(max_size=9), JSON)
    flag = st.tuples(st.sampled_from(names), st.text(max_size=30) | JSON.map(json.dumps)).map(
        lambda p: f"--{p[0]}={p[1]}"
    ) | settings_.map(lambda p: f"--set={p[0]}={json.dumps(p[1])}")

    def check(argv):
        command.FLAGS.unparse_flags()
        for name in command.FLAGS:
            command.FLAGS[name].unparse()
        try:
            command.FLAGS(["command", *argv])
        except command.flags.Error:
            return
        if command.FLAGS.config and os.path.exists(command.FLAGS.config):
            return  # a file of this machine
        assert isinstance(command.config_from_flags(), Config)

    fuzz(st.lists(flag, max_size=4), check)


def small_archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in (
            "cifar-10-batches-bin/data_batch_1.bin",
            "cifar-10-batches-bin/test_batch.bin",
            "readme",
        ):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(600)))
    return file.getvalue()


def test_archives(tmp_path, monkeypatch):
    """The batches are never whole, so every archive is an error."""
    import gzip

    monkeypatch.setattr(cifar10, "_ROWS", 10)  # the arrays that an honest archive fills
    path = tmp_path / "archive.tar.gz"

    def check(content):
        path.write_bytes(content)
        datasets.load("cifar10", path)
        pytest.fail("it took an archive without images")

    plain = small_archive()
    packed = gzip.compress(plain)
    fuzz(BYTES | changed(plain) | changed(plain).map(gzip.compress) | changed(packed), check)


def small_state() -> bytes:
    file = io.BytesIO()
    np.savez(file, meta=np.array("{}"), engine=np.zeros(4), **{"weights/0": np.ones((3, 2), np.float32)})
    return file.getvalue()


@st.composite
def headers(draw):
    """A state whose first array has another header."""
    text = draw(
        st.sampled_from(
            ["(10**11,)", "(1, -1)", "(0, 9999999999999)", "((" * 999, "(2,)", "(" + "1," * 99 + ")"]
        )
        | st.text(max_size=40)
    )
    kind = draw(st.sampled_from(["<f8", "|O", "<U0", "|V0", "<U99999999", "[('a', '<f8')]", "x"]))
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {text}}}".encode() + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", draw(st.sampled_from([0, 8, 12, 14]))) as archive:
        archive.writestr(
            "meta.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + draw(BYTES)
        )
    return file.getvalue()


def test_states(tmp_path):
    folder = RunFolder(tmp_path)
    config = Config(dataset="digits")
    folder.write_config(config.to_dict(), resumed=False)

    def check(content):
        folder.state_file.write_bytes(content)
        arrays = folder.unfinished_state(config, print)
        assert all(isinstance(a, np.ndarray) for a in arrays.values())

    fuzz(BYTES | changed(small_state()) | headers(), check)


def test_clusters(monkeypatch):
    """What TF_CONFIG holds is a cluster or none, or an error."""
    task = st.fixed_dictionaries({}, optional={"type": JSON | st.just("worker"), "index": JSON | st.just(0)})
    hosts = st.lists(st.sampled_from(["a:1", "b:2", "localhost:9999"]) | JSON, max_size=4)
    cluster = st.dictionaries(
        st.sampled_from(["worker", "chief", "ps"]) | st.text(max_size=5), hosts | JSON, max_size=3
    )
    whole = st.fixed_dictionaries({}, optional={"cluster": cluster | JSON, "task": task | JSON})

    def check(value):
        text = value if isinstance(value, str) else json.dumps(value)
        text = text.replace("\0", "").encode("utf-8", "replace").decode()
        monkeypatch.setenv("TF_CONFIG", text)
        assert isinstance(place_in_tf_config(), Place | None)

    fuzz(whole | JSON | st.text(max_size=50) | st.integers(0, 20_000).map(lambda n: "[" * n), check)


def picture(kind: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_images(tmp_path, kind, monkeypatch):
    monkeypatch.setitem(globals(), "SECONDS", SECONDS / 4)
    path = tmp_path / "image"

    def check(content):
        path.write_bytes(content)
        image = datasets.read_image(path, (8, 6))
        assert image.shape == (8, 6, 3) and image.dtype == np.uint8

    fuzz(BYTES | changed(picture(kind)), check)
