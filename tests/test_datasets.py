"""Reading, verifying, downloading and splitting. Most tests use a miniature CIFAR-10 of 20 images a batch."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import http.server
import io
import os
import pickle
import re
import shutil
import ssl
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar10_trainer import datasets
from cifar10_trainer.datasets import cifar10, download
from cifar10_trainer.errors import ConfigError, RunError

ROOT = Path(datasets.__file__).parents[2]
BATCHES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
ROWS = 20
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch, tmp_path_factory):
    """No test sees this machine's caches, reaches the network, or has images that a test before it read ahead."""
    monkeypatch.setattr(cifar10, "_AHEAD", {})
    home = tmp_path_factory.mktemp("home")
    for name in ("CIFAR10_TRAINER_DATA", "TFDS_DATA_DIR", "KERAS_HOME", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    monkeypatch.setattr(download, "BINARY_URL", "http://127.0.0.1:9/nothing-listens-here")
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    return home


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- a miniature CIFAR-10


def python2_pickle(labels: np.ndarray, planes: np.ndarray) -> bytes:
    """A batch as Python 2 pickled it (protocol 2): byte strings, and an array rebuilt by numpy.core."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + string(b"b")
    array += b"\x87R(" + number(1) + number(planes.shape[0]) + number(planes.shape[1]) + b"\x86"
    array += dtype + b"\x89" + string(planes.tobytes()) + b"tb"
    numbers = b"](" + b"".join(number(int(label)) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"labels") + numbers + string(b"data") + array + b"u."


@dataclass
class Miniature:
    images: np.ndarray  # uint8 [120, 32, 32, 3], the test images last
    labels: np.ndarray
    python: dict[str, bytes]  # the members of the two archives
    binary: dict[str, bytes]

    def write(self, form: str, folder: Path) -> Path:
        """Writes one form into `folder` and gives the path to load it by."""
        kind = "py" if "python" in form else "bin"
        members = self.python if kind == "py" else self.binary
        if form.startswith("extracted"):
            path = folder / f"cifar-10-batches-{kind}"
            path.mkdir(parents=True)
            for name, content in members.items():
                (path / name).write_bytes(content)
            return path
        path = folder / f"cifar-10-{form}.tar.gz"
        folder.mkdir(parents=True, exist_ok=True)
        write_archive(path, {f"cifar-10-batches-{kind}/{name}": data for name, data in members.items()})
        return path


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


FORMS = ["python", "binary", "extracted python", "extracted binary"]


@pytest.fixture
def tiny(monkeypatch) -> Miniature:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (6 * ROWS, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, 6 * ROWS)
    planes = images.transpose(0, 3, 1, 2).reshape(-1, 3072)
    python = {"batches.meta": b"not needed", "readme.html": b"nor this"}
    binary = {"batches.meta.txt": "\n".join(datasets.CIFAR10_CLASSES).encode(), "readme.html": b"nor this"}
    for i, name in enumerate(BATCHES):
        at = slice(i * ROWS, (i + 1) * ROWS)
        python[name] = python2_pickle(labels[at], planes[at])
        binary[f"{name}.bin"] = np.column_stack([labels[at].astype(np.uint8), planes[at]]).tobytes()
    batches = {name: data for name, data in {**python, **binary}.items() if "_batch" in f"_{name}"}
    del batches["batches.meta"], batches["batches.meta.txt"]
    monkeypatch.setattr(cifar10, "_ROWS", ROWS)
    monkeypatch.setattr(cifar10, "_MD5", {k: hashlib.md5(v).hexdigest() for k, v in batches.items()})
    return Miniature(images, labels, python, binary)


def assert_is(dataset: datasets.Dataset, tiny: Miniature, source: Path) -> None:
    assert dataset.source == str(source)
    assert dataset.name == "cifar10" and dataset.num_classes == 10 and dataset.input_shape == (32, 32, 3)
    assert dataset.validation is None
    assert [getattr(dataset, name).dtype for name in ARRAYS] == [np.uint8, np.int64, np.uint8, np.int64]
    np.testing.assert_array_equal(dataset.train_images, tiny.images[: 5 * ROWS])
    np.testing.assert_array_equal(dataset.train_labels, tiny.labels[: 5 * ROWS])
    np.testing.assert_array_equal(dataset.test_images, tiny.images[5 * ROWS :])
    np.testing.assert_array_equal(dataset.test_labels, tiny.labels[5 * ROWS :])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_arrays(tiny, tmp_path, form):
    path = tiny.write(form, tmp_path)
    assert_is(datasets.load(data_dir=path), tiny, path)
    assert_is(datasets.load(data_dir=str(tmp_path)), tiny, path)  # by the folder that holds it
    assert sorted(tmp_path.rglob("*.tmp*")) == [] and len(list(tmp_path.iterdir())) == 1  # nothing written


def test_archive_members_may_come_in_any_order(tiny, tmp_path):
    write_archive(tmp_path / "mine.tar.gz", dict(reversed(tiny.python.items())))
    assert_is(datasets.load(data_dir=tmp_path / "mine.tar.gz"), tiny, tmp_path / "mine.tar.gz")


def write_tfds(tiny: Miniature, data_dir: Path, monkeypatch) -> Path:
    """What TFDS itself prepares from the miniature's binary batches."""
    tfds = pytest.importorskip("tensorflow_datasets")
    extracted = data_dir / "extracted"
    tiny.write("extracted binary", extracted)
    builder = tfds.builder("cifar10", data_dir=str(data_dir))
    manager = tfds.download.DownloadManager
    monkeypatch.setattr(manager, "download_and_extract", lambda self, url: tfds.core.Path(extracted))
    builder.download_and_prepare()
    return Path(builder.data_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TFDS's own dependencies, while it prepares
def test_tfds_form_gives_the_same_arrays_in_the_official_order(tiny, tmp_path, monkeypatch):
    version = write_tfds(tiny, tmp_path, monkeypatch)
    for path in (tmp_path, version.parent, version):
        assert_is(datasets.load(data_dir=path), tiny, version)

    (record_file,) = version.glob("*-train.tfrecord*")
    content = bytearray(record_file.read_bytes())
    content[-100] ^= 1
    record_file.write_bytes(content)
    with pytest.raises(RunError, match=f"{version} cannot be used"):
        datasets.load(data_dir=tmp_path)
    record_file.unlink()
    with pytest.raises(RunError, match=f"{version} cannot be used: it is not CIFAR-10 as TFDS prepares it"):
        datasets.load(data_dir=tmp_path)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(cifar10, "_tfrecords", refuse)
    with pytest.raises(RunError, match=r"cannot read .*cifar10-train.tfrecord.*: Permission denied"):
        datasets.load(data_dir=tmp_path)


def test_tfds_form_of_another_dataset(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(RunError, match="not CIFAR-10 as TFDS prepares it") as error:
        datasets.load(data_dir=tmp_path)
    one_line(error)


# ---- where CIFAR-10 is looked for


def test_environment_variable_comes_after_the_argument(tiny, tmp_path, monkeypatch):
    first = tiny.write("binary", tmp_path / "first")
    second = tiny.write("python", tmp_path / "second")
    monkeypatch.setenv("CIFAR10_TRAINER_DATA", str(second.parent))
    assert datasets.load(data_dir=first).source == str(first)
    assert datasets.load().source == str(second)


def test_home_is_expanded(tiny, nothing_cached):
    path = tiny.write("binary", nothing_cached / "somewhere")
    assert datasets.load(data_dir="~/somewhere").source == str(path)


@pytest.mark.parametrize(
    ("form", "place"),
    [
        ("binary", "tensorflow_datasets/downloads/manual"),
        ("extracted python", ".keras/datasets"),  # Keras 2
        ("extracted python", ".keras/datasets/cifar-10-batches-py-target"),  # Keras 3
        ("python", "data"),  # torchvision, in the current folder
        ("extracted python", "data"),
    ],
)
def test_caches_of_other_libraries(tiny, nothing_cached, form, place):
    path = tiny.write(form, nothing_cached / place)
    expected = path.relative_to(nothing_cached) if place == "data" else path
    assert_is(datasets.load(), tiny, expected)


@pytest.mark.parametrize("name", ["cifar-10-batches-py-target_archive", "cifar-10-batches-py.tar.gz"])
def test_archives_under_the_names_keras_gives_them(tiny, nothing_cached, name):
    path = tiny.write("python", nothing_cached / ".keras/datasets")
    path = path.rename(path.with_name(name))
    assert_is(datasets.load(), tiny, path)


@pytest.mark.parametrize(
    ("variable", "below"), [("TFDS_DATA_DIR", "downloads/manual"), ("KERAS_HOME", "datasets")]
)
def test_caches_moved_by_their_variables(tiny, tmp_path, monkeypatch, variable, below):
    monkeypatch.setenv(variable, str(tmp_path))
    path = tiny.write("binary", tmp_path / below)
    assert datasets.load().source == str(path)


def test_damaged_cache_is_passed_over(tiny, nothing_cached, capsys):
    keras = nothing_cached / ".keras/datasets/cifar-10-batches-py-target_archive"
    keras.parent.mkdir(parents=True)
    keras.write_bytes(b"half a download")
    path = tiny.write("python", nothing_cached / "data")
    assert datasets.load().source == str(path.relative_to(nothing_cached))
    assert f"skipping a cached copy: {keras}" in capsys.readouterr().err


def test_a_small_archive_takes_little_memory(tmp_path):
    """Python allocates as many bytes as a `read` asks for, also where the file is shorter."""
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(gzip.compress(b"nothing"))
    with open(path, "rb") as file:
        tracemalloc.start()
        try:
            assert cifar10._unpacked(file) == b"nothing"
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_an_archive_of_several_gzip_members_with_padding(tiny, tmp_path):
    path = tiny.write("python", tmp_path)
    plain = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(plain[:70_000]) + gzip.compress(plain[70_000:]) + bytes(600))
    assert_is(datasets.load(data_dir=path), tiny, path)


# ---- reading ahead


def finish_reading() -> None:
    for ahead in cifar10._AHEAD.values():
        ahead.exception()  # waits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("named", ["by argument", "by variable", "in a cache"])
def test_what_is_read_ahead_is_not_read_again(tiny, nothing_cached, tmp_path, monkeypatch, form, named):
    if named == "in a cache":
        path = tiny.write(form, nothing_cached / "data").relative_to(nothing_cached)
    else:
        path = tiny.write(form, tmp_path)
    if named == "by variable":
        monkeypatch.setenv("CIFAR10_TRAINER_DATA", str(path))
    given = path if named == "by argument" else None
    datasets.read_ahead("cifar10", given)
    finish_reading()
    for file in [path] if path.is_file() else path.iterdir():
        file.write_bytes(b"")  # it is still found, but could not be read again
    assert_is(datasets.load(data_dir=given), tiny, path)
    with pytest.raises(RunError):
        datasets.load(data_dir=path)


def test_an_error_of_reading_ahead_comes_when_the_images_are_needed(tiny, nothing_cached, tmp_path, capsys):
    broken = tmp_path / "cifar-10-python.tar.gz"
    broken.write_bytes(b"half a download")
    datasets.read_ahead("cifar10", broken)
    with pytest.raises(RunError, match=f"{broken} cannot be used") as error:
        datasets.load(data_dir=broken)
    one_line(error)
    keras = nothing_cached / ".keras/datasets/cifar-10-batches-py-target_archive"
    keras.parent.mkdir(parents=True)
    keras.write_bytes(b"half a download")
    path = tiny.write("python", nothing_cached / "data")
    datasets.read_ahead("cifar10", None)
    assert datasets.load().source == str(path.relative_to(nothing_cached))
    assert f"skipping a cached copy: {keras}" in capsys.readouterr().err
    assert not cifar10._AHEAD


def test_what_cannot_be_read_ahead_is_left_to_load(tmp_path):
    (tmp_path / "3.0.2").mkdir()
    (tmp_path / "3.0.2" / "dataset_info.json").write_text("{}")  # TFDS, which needs TensorFlow
    for name, place in (
        ("cifar10", tmp_path), ("cifar10", tmp_path / "nowhere"), ("cifar10", None), ("digits", None), ("folder", tmp_path),
    ):  # fmt: skip
        datasets.read_ahead(name, place)
        assert not cifar10._AHEAD
    with pytest.raises(ConfigError, match="does not exist"):
        datasets.load(data_dir=tmp_path / "nowhere")


# ---- damage


def test_missing_path_is_wrong_usage(tmp_path, monkeypatch):
    missing = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=f"data_dir is {missing}, which does not exist") as error:
        datasets.load(data_dir=missing)
    one_line(error)
    monkeypatch.setenv("CIFAR10_TRAINER_DATA", str(missing))
    with pytest.raises(ConfigError, match=re.escape(f"$CIFAR10_TRAINER_DATA is {missing}")):
        datasets.load()


def test_folder_with_nothing_recognisable(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(
        RunError, match=f"{tmp_path} holds no CIFAR-10; allowed: cifar-10-python.tar.gz"
    ) as error:
        datasets.load(data_dir=tmp_path)
    assert "Pictures of your own need --dataset=folder" in str(error.value)
    assert "download https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in one_line(error)


@pytest.mark.parametrize("form", FORMS)
def test_missing_member(tiny, tmp_path, form):
    for members in (tiny.python, tiny.binary):
        for name in ("data_batch_3", "test_batch"):
            members.pop(name, members.pop(f"{name}.bin", None))
    path = tiny.write(form, tmp_path)
    with pytest.raises(RunError, match=f"{path} cannot be used: it lacks data_batch_3, test_batch;") as error:
        datasets.load(data_dir=tmp_path)
    text = one_line(error)
    assert "delete it and download it again from https://www.cs" in text and "--data_dir" in text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["flipped bit", "truncated", "longer"])
def test_changed_member(tiny, tmp_path, form, change):
    kind, suffix = (tiny.python, "") if "python" in form else (tiny.binary, ".bin")
    content = kind[f"data_batch_2{suffix}"]
    changed = {
        "flipped bit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "truncated": content[:-1],
        "longer": content + b"x",
    }
    kind[f"data_batch_2{suffix}"] = changed[change]
    path = tiny.write(form, tmp_path)
    with pytest.raises(
        RunError, match=f"{path} cannot be used: the md5 of its data_batch_2{suffix} is"
    ) as error:
        datasets.load(data_dir=path)
    one_line(error)


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("kept", [0.0, 0.00001, 0.3, 0.999])
def test_truncated_archive(tiny, tmp_path, form, kept):
    path = tiny.write(form, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(RunError, match=f"{path} cannot be used") as error:
        datasets.load(data_dir=path)
    assert "download it again" in one_line(error)


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9])
def test_damaged_archive(tiny, tmp_path, where):
    path = tiny.write("binary", tmp_path)
    content = bytearray(path.read_bytes())
    at = int(len(content) * where)
    content[at : at + 50] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{path} cannot be used") as error:
        datasets.load(data_dir=path)
    one_line(error)


def test_another_archive(tmp_path):
    path = tmp_path / "cifar-100-python.tar.gz"
    write_archive(path, {"cifar-100-python/train": b"1", "cifar-100-python/test": b"2"})
    with pytest.raises(RunError, match=f"{path} cannot be used: it holds no batch of CIFAR-10"):
        datasets.load(data_dir=path)


def test_file_that_is_no_archive(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not an archive, but long enough to hold a header " * 40)
    with pytest.raises(RunError, match=f"{path} cannot be used: it is damaged, or not an archive") as error:
        datasets.load(data_dir=path)
    one_line(error)


READER = "cifar10_trainer.datasets.cifar10.regular_file"


@pytest.mark.parametrize("target", [READER, "os.listdir"])
def test_no_read_permission(tiny, tmp_path, monkeypatch, target):
    # Raised by hand, since nothing is forbidden to root, as whom containers run tests.
    path = tiny.write("python", tmp_path)

    def refuse(name, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr(target, refuse)
    path = path if target == READER else tmp_path
    with pytest.raises(RunError, match=f"cannot read {path}: Permission denied; correct that") as error:
        datasets.load(data_dir=path)
    one_line(error)


class Evil:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("form", ["python", "extracted python"])
def test_malicious_pickle_is_never_opened(tiny, tmp_path, form):
    victim = tmp_path / "pwned"
    tiny.python["data_batch_1"] = pickle.dumps({"labels": Evil(victim)}, protocol=2)
    pickle.loads(tiny.python["data_batch_1"])  # the attack works
    victim.rmdir()
    path = tiny.write(form, tmp_path)
    with pytest.raises(RunError, match="the md5 of its data_batch_1 is"):
        datasets.load(data_dir=path)
    assert not victim.exists()


def test_malicious_pickle_meets_the_allow_list_behind_the_checksum(tmp_path):
    attack = pickle.dumps({"labels": Evil(tmp_path / "pwned")}, protocol=2)
    with pytest.raises(pickle.UnpicklingError, match="mkdir is not allowed in a batch of images"):
        cifar10._parse("data_batch_1", attack)
    assert not (tmp_path / "pwned").exists()


# ---- downloading


@dataclass
class Server:
    """A server's behaviour, and what it was asked."""

    content: bytes
    ranges: bool = True
    drop_after: list[int] = field(default_factory=list)  # bytes before each of the first connections breaks
    status: list[int] = field(default_factory=list)  # answers to the first requests instead of content
    length: bool = True
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server(tiny, tmp_path, monkeypatch):
    """Serves the miniature's binary archive on loopback in the place of the real one."""
    behaviour = Server(tiny.write("binary", tmp_path / "served").read_bytes())

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked = self.headers.get("Range")
            behaviour.asked.append(asked)
            if behaviour.status:
                self.send_error(behaviour.status.pop(0))
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and behaviour.ranges else 0
            body = behaviour.content[start:]
            self.send_response(206 if start else 200)
            if behaviour.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: behaviour.drop_after.pop(0)] if behaviour.drop_after else body)

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    behaviour.url = f"http://127.0.0.1:{httpd.server_port}/cifar-10-binary.tar.gz"
    monkeypatch.setattr(download, "BINARY_URL", behaviour.url)
    monkeypatch.setattr(download, "BINARY_SIZE", len(behaviour.content))
    monkeypatch.setattr(download, "BINARY_SHA256", hashlib.sha256(behaviour.content).hexdigest())
    yield behaviour
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def manual(nothing_cached) -> Path:
    """Where TFDS looks for files that were downloaded by hand."""
    return nothing_cached / "tensorflow_datasets/downloads/manual"


def test_download_and_the_next_run(server, tiny, manual, capsys):
    assert_is(datasets.load(), tiny, manual / "cifar-10-binary.tar.gz")
    shown = capsys.readouterr().err
    assert server.url in shown and str(manual) in shown
    assert re.search(r"0\.4 of 0\.4 MB, .* MB/s, 0 min 0 s left\n", shown)  # 120 images of 3,073 bytes
    assert [path.name for path in manual.iterdir()] == ["cifar-10-binary.tar.gz"]
    assert_is(datasets.load(), tiny, manual / "cifar-10-binary.tar.gz")
    assert server.asked == [None]


def test_dropped_connections_resume(server, tiny, manual, capsys):
    server.drop_after = [1000, 70_000, 0]
    assert_is(datasets.load(), tiny, manual / "cifar-10-binary.tar.gz")
    assert server.asked == [None, "bytes=1000-", "bytes=71000-", "bytes=71000-"]
    assert "the connection closed early; trying again" in capsys.readouterr().err


def test_interrupted_download_resumes_in_the_next_run(server, tiny, manual):
    manual.mkdir(parents=True)
    (manual / "cifar-10-binary.tar.gz.part").write_bytes(server.content[:5000])
    assert_is(datasets.load(), tiny, manual / "cifar-10-binary.tar.gz")
    assert server.asked == ["bytes=5000-"]


def test_download_whose_last_byte_had_come(server, tiny, manual):
    manual.mkdir(parents=True)
    (manual / "cifar-10-binary.tar.gz.part").write_bytes(server.content)
    assert_is(datasets.load(), tiny, manual / "cifar-10-binary.tar.gz")
    assert server.asked == []


def test_server_without_ranges_starts_again(server, tiny, manual):
    server.ranges = False
    server.drop_after = [1000]
    assert_is(datasets.load(), tiny, manual / "cifar-10-binary.tar.gz")
    assert server.asked == [None, "bytes=1000-"]


def test_server_that_does_not_tell_the_length(server, tiny, manual):
    server.length = False
    assert_is(datasets.load(), tiny, manual / "cifar-10-binary.tar.gz")


def test_busy_server_is_asked_again(server, tiny, manual):
    server.status = [503, 429]
    assert_is(datasets.load(), tiny, manual / "cifar-10-binary.tar.gz")
    assert server.asked == [None, None, None]


def test_connection_that_always_breaks_gives_up_and_keeps_what_came(server, manual):
    server.drop_after = [1000] + [0] * 20
    with pytest.raises(
        RunError, match=r"the connection closed early; run again to resume from 0\.0 MB"
    ) as error:
        datasets.load()
    one_line(error)
    assert len(server.asked) == 1 + download._ATTEMPTS
    assert (manual / "cifar-10-binary.tar.gz.part").read_bytes() == server.content[:1000]


def test_wrong_content_is_deleted(server, manual):
    server.content = server.content[:-1] + b"?"
    with pytest.raises(RunError, match=f"the download from {server.url} has the sha256") as error:
        datasets.load()
    assert "run again" in one_line(error)
    assert not manual.exists()


def test_wrong_length_is_refused_and_spares_what_is_there(server, manual):
    manual.mkdir(parents=True)
    part = manual / "cifar-10-binary.tar.gz.part"
    part.write_bytes(server.content[:5000])
    server.content, server.ranges = b"<html>Please log in</html>", False
    with pytest.raises(RunError, match=r"sends 26 bytes, not [0-9,]+: perhaps the page of a proxy") as error:
        datasets.load()
    one_line(error)
    assert part.stat().st_size == 5000


def test_not_found_is_not_tried_again(server, manual):
    server.status = [404] * 20
    with pytest.raises(RunError, match=f"cannot download {server.url}: the server answered 404") as error:
        datasets.load()
    assert "name it with --data_dir" in one_line(error)
    assert len(server.asked) == 1
    assert not manual.exists()


def test_no_network(capsys):
    with pytest.raises(RunError, match=r"cannot download .*: .*[Rr]efused; run again") as error:
        datasets.load()
    one_line(error)
    assert capsys.readouterr().err.count("trying again") == download._ATTEMPTS - 1


def test_damaged_download_is_not_downloaded_again(server, manual):
    manual.mkdir(parents=True)
    archive = manual / "cifar-10-binary.tar.gz"
    archive.write_bytes(server.content[:5000])
    with pytest.raises(RunError, match=f"{archive} cannot be used: .*; delete it and download it again"):
        datasets.load()
    assert server.asked == [] and archive.stat().st_size == 5000  # the user's file: not ours to delete


def test_nowhere_to_download_to(server, nothing_cached):
    (nothing_cached / "tensorflow_datasets").write_text("a file in the way")
    with pytest.raises(RunError, match=r"cannot write .*tensorflow_datasets.*; correct that") as error:
        datasets.load()
    assert "TFDS_DATA_DIR" in one_line(error)
    assert server.asked == []


def test_a_user_without_a_home_downloads_nowhere(server, nothing_cached, monkeypatch):
    monkeypatch.setattr(download, "tfds_folder", lambda: Path("~/tensorflow_datasets"))
    monkeypatch.chdir(nothing_cached)
    with pytest.raises(RunError, match="no home folder; set TFDS_DATA_DIR"):
        download.download()
    assert not (nothing_cached / "~").exists() and server.asked == []


def test_full_disk_is_not_mistaken_for_the_network(server, monkeypatch):
    def full(done):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_progress", lambda start: full)
    with pytest.raises(RunError, match=r"cannot write .*: No space left on device"):
        datasets.load()
    assert server.asked == [None]


@pytest.mark.parametrize(
    "reason", [OSError(errno.EHOSTUNREACH, "No route to host"), ssl.SSLError(1, "[SSL] record layer failure")]
)
def test_an_error_of_the_network_is_not_mistaken_for_the_disk(
    server, tiny, manual, monkeypatch, capsys, reason
):
    read1, calls = http.client.HTTPResponse.read1, []

    def breaking(response, n=-1):
        calls.append(n)
        if len(calls) == 2:
            raise reason
        return read1(response, 1000 if len(calls) == 1 else n)

    monkeypatch.setattr(http.client.HTTPResponse, "read1", breaking)
    assert_is(datasets.load(), tiny, manual / "cifar-10-binary.tar.gz")
    assert server.asked == [None, "bytes=1000-"]
    assert f"{reason.strerror}; trying again" in capsys.readouterr().err


def test_two_processes_download_once(server, tiny, manual):
    results = []
    threads = [threading.Thread(target=lambda: results.append(datasets.load())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert server.asked == [None]


def test_progress_on_a_terminal_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(download, "BINARY_SIZE", 170_000_000)
    clock = iter([100.0, 100.1, 110.0, 270.0])
    monkeypatch.setattr(download.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show = download._progress(50_000_000)
    show(50_500_000)  # too soon after the last
    show(60_000_000)  # 10 MB in 10 s; 110 MB to go
    show(170_000_000)
    lines = capsys.readouterr().err.split("\r")
    assert [line.rstrip(" ") for line in lines] == [
        "",
        "cifar10: 60.0 of 170.0 MB, 1.00 MB/s, 1 min 50 s left",
        "cifar10: 170.0 of 170.0 MB, 0.71 MB/s, 0 min 0 s left".ljust(70) + "\n",
    ]


# ---- digits


def test_digits():
    digits = datasets.load("digits")
    assert digits.class_names == tuple("0123456789") and digits.input_shape == (32, 32, 3)
    assert digits.source == "scikit-learn"
    assert digits.train_images.shape == (1438, 32, 32, 3) and digits.test_images.shape == (359, 32, 32, 3)
    assert digits.train_images.dtype == np.uint8 and digits.test_labels.dtype == np.int64
    assert digits.train_images.min() == 0 and digits.train_images.max() == 255
    assert (digits.train_images == digits.train_images[..., :1]).all()  # grey
    # A fifth of each class, to within one image.
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    assert (np.abs(test - (train + test) / 5) < 1).all()


def test_digits_are_upright_and_belong_to_their_labels():
    from sklearn.datasets import load_digits

    digits = datasets.load("digits")
    # Shrunk to 8x8 again by averaging, each is nearest to an original of the same label.
    small = digits.test_images[..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64) * (16 / 255)
    original = load_digits()
    nearest = np.array([np.argmin(((original.data - image) ** 2).sum(1)) for image in small])
    assert (original.target[nearest] == digits.test_labels).mean() > 0.98


def test_digits_test_images_are_always_the_same():
    np.random.seed(123)
    first = datasets.load("digits")
    np.random.seed(321)
    np.testing.assert_array_equal(first.test_images, datasets.load("digits").test_images)


# ---- folder


def write_image(path: Path, colour, size=(20, 10), mode="RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def pets(tmp_path) -> Path:
    """Two classes in train/, val/ and test/, with images of different sizes and kinds."""
    root = tmp_path / "pets"
    write_image(root / "train/dog/2.png", (0, 0, 200))
    write_image(root / "train/dog/1.bmp", (0, 200, 0), size=(7, 30))
    write_image(root / "train/cat/a.png", 90, mode="L")
    write_image(root / "train/cat/b.png", (200, 100, 0, 255), mode="RGBA", size=(300, 200))
    write_image(root / "train/cat/c.png", (1, 2, 3))
    write_image(root / "val/dog/v.png", (4, 5, 6))
    write_image(root / "test/cat/t.png", (7, 8, 9))
    return root


def test_folder(pets):
    (pets / "train/.hidden").mkdir()
    (pets / "train/dog/.DS_Store").write_bytes(b"no image")
    data = datasets.load("folder", pets, image_size=16)
    assert data.class_names == ("cat", "dog") and data.num_classes == 2
    assert data.input_shape == (16, 16, 3) and data.source == str(pets)
    colours = [(90, 90, 90), (200, 100, 0), (1, 2, 3), (0, 200, 0), (0, 0, 200)]  # by class, then file name
    assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int64
    assert data.train_images.shape == (5, 16, 16, 3)
    for image, colour in zip(data.train_images, colours, strict=True):
        assert (image == colour).all()
    np.testing.assert_array_equal(data.train_labels, [0, 0, 0, 1, 1])
    assert (data.test_images == (7, 8, 9)).all() and data.test_labels.tolist() == [0]
    images, labels = data.validation
    assert (images == (4, 5, 6)).all() and labels.tolist() == [1]


def test_folder_without_test_and_val(pets):
    shutil.rmtree(pets / "test")
    shutil.rmtree(pets / "val")
    data = datasets.load("folder", str(pets), image_size=8)
    assert data.test_images.shape == (0, 8, 8, 3) and data.test_images.dtype == np.uint8
    assert data.test_labels.shape == (0,) and data.test_labels.dtype == np.int64
    assert data.validation is None


def test_folder_needs_a_data_dir(tmp_path):
    with pytest.raises(
        ConfigError, match="data_dir is not set; allowed with the dataset folder: a folder with"
    ):
        datasets.load("folder")
    with pytest.raises(
        ConfigError, match="nowhere, which does not exist; allowed: a folder with train/<class>"
    ):
        datasets.load("folder", tmp_path / "nowhere")


def test_folder_without_train(tmp_path):
    with pytest.raises(
        RunError, match=f"{tmp_path} holds no class folders; allowed: .*train/<class>/"
    ) as error:
        datasets.load("folder", tmp_path)
    one_line(error)
    write_image(tmp_path / "val/cat/a.png", (1, 1, 1))
    with pytest.raises(RunError, match=f"{tmp_path} has val/ but no folder train/; allowed: .*<class>/"):
        datasets.load("folder", tmp_path)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_folder_with_an_empty_class(pets, part):
    (pets / part / "newt").mkdir()
    (pets / part / "newt/.hidden").write_bytes(b"")
    with pytest.raises(
        RunError, match=f"the class folder {pets}/{part}/newt holds no pictures; put some into it"
    ):
        datasets.load("folder", pets)


def test_folder_with_one_class(pets):
    (pets / "train/dog").rename(pets / "dog")
    with pytest.raises(RunError, match=r"train has 1 class folder \(cat\); allowed: two or more"):
        datasets.load("folder", pets)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_folder_with_no_classes(pets, part):
    shutil.rmtree(pets / part)
    (pets / part).mkdir()
    with pytest.raises(
        RunError, match=f"{part} holds no class folders; allowed: a folder with train/<class>"
    ):
        datasets.load("folder", pets)


@pytest.mark.parametrize("part", ["val", "test"])
def test_folder_with_a_class_that_train_lacks(pets, part):
    write_image(pets / part / "newt/1.png", (1, 1, 1))
    with pytest.raises(
        ConfigError, match=f"{part} has the class newt, which train/ lacks; allowed: cat, dog"
    ):
        datasets.load("folder", pets)


def test_folder_with_an_image_outside_the_classes(pets):
    write_image(pets / "train/lost.png", (1, 1, 1))
    with pytest.raises(RunError, match=f"{pets}/train/lost.png is not in the folder of a class"):
        datasets.load("folder", pets)


def test_folder_that_may_not_be_read(pets, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(RunError, match=f"cannot read {pets}: Permission denied"):
        datasets.load("folder", pets)


# ---- wrong usage


def test_unknown_dataset():
    with pytest.raises(
        ConfigError, match=r"unknown dataset 'cifar11'; allowed: cifar10, digits, folder.* 'cifar10'"
    ):
        datasets.load("cifar11")


@pytest.mark.parametrize(
    ("name", "size", "allowed"),
    [
        ("cifar10", 64, "32"),
        ("digits", 8, "32"),
        ("folder", 7, "a whole number from 8 to 512"),
        ("folder", 513, "a whole number from 8 to 512"),
    ],
)
def test_image_size_out_of_range(tmp_path, name, size, allowed):
    with pytest.raises(ConfigError, match=f"image_size is {size}; allowed.*: {allowed}"):
        datasets.load(name, image_size=size)


def test_digits_take_no_data_dir(tmp_path):
    with pytest.raises(ConfigError, match=r"data_dir is .*; allowed with the dataset digits: none"):
        datasets.load("digits", data_dir=tmp_path)


# ---- one image


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "webp"])
def test_read_image_keeps_the_pixels_of_its_own_size(tmp_path, suffix):
    pixels = (
        np.random.default_rng(0).integers(0, 256, (6, 9, 1), np.uint8).repeat(3, -1)
    )  # grey: GIF keeps it
    Image.fromarray(pixels).save(
        tmp_path / f"image.{suffix}", **({"lossless": True} if suffix == "webp" else {})
    )
    image = datasets.read_image(tmp_path / f"image.{suffix}", (6, 9))
    assert image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, pixels)


@pytest.mark.parametrize(
    ("mode", "colour"), [("RGB", (200, 100, 50)), ("CMYK", (55, 155, 205, 0)), ("L", 77)]
)
def test_read_image_jpeg(tmp_path, mode, colour):
    path = write_image(tmp_path / "image.jpg", colour, size=(640, 480), mode=mode)
    expected = (77, 77, 77) if mode == "L" else (200, 100, 50)
    image = datasets.read_image(str(path), (24, 40)).astype(int)
    assert image.shape == (24, 40, 3)
    assert np.abs(image - expected).max() <= 2  # JPEG rounds its YCbCr


def test_read_image_16_bit(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = datasets.read_image(tmp_path / "deep.png", (1, 4))
    np.testing.assert_array_equal(image[0], [[0] * 3, [1] * 3, [128] * 3, [255] * 3])


def test_read_image_shows_transparency_on_white(tmp_path):
    # Half of red over half of white; a transparent pixel's own colour does not show.
    write_image(tmp_path / "rgba.png", (255, 0, 0, 51), mode="RGBA", size=(4, 4))
    assert (datasets.read_image(tmp_path / "rgba.png", (4, 4)) == (255, 204, 204)).all()
    write_image(tmp_path / "la.png", (0, 51), mode="LA", size=(4, 4))
    assert (datasets.read_image(tmp_path / "la.png", (4, 4)) == (204, 204, 204)).all()

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    np.testing.assert_array_equal(
        datasets.read_image(tmp_path / "palette.png", (1, 2)), [[[255, 255, 255], [40, 50, 60]]]
    )
    Image.new("RGB", (2, 2), (9, 9, 9)).save(tmp_path / "key.png", transparency=(9, 9, 9))
    assert (datasets.read_image(tmp_path / "key.png", (2, 2)) == 255).all()


def test_read_image_follows_the_camera(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3, 1).repeat(3, -1) * 40
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise to show
    Image.fromarray(pixels).save(tmp_path / "upright.png", exif=exif)
    image = datasets.read_image(tmp_path / "upright.png", (3, 2))
    np.testing.assert_array_equal(image[..., 0], [[120, 0], [160, 40], [200, 80]])


def test_read_image_takes_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("lime", "red")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (datasets.read_image(tmp_path / "moving.gif", (5, 5)) == (0, 255, 0)).all()


def test_read_image_keeps_the_whole_image_and_smooths(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    # Nearest or unsmoothed sampling would give 0 and 255.
    assert np.abs(datasets.read_image(tmp_path / "board.png", (32, 32)).astype(int) - 127.5).max() < 20

    halves = np.zeros((40, 80, 3), np.uint8)
    halves[:, 40:] = 255
    Image.fromarray(halves).save(tmp_path / "halves.png")
    image = datasets.read_image(tmp_path / "halves.png", (16, 16))
    assert (image[:, :7] == 0).all() and (image[:, 9:] == 255).all()  # the right end is not cut off


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "folder", "missing"])
def test_read_image_names_what_it_cannot_read(tmp_path, kind):
    path = tmp_path / "image.png"
    if kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(
        RunError, match=f"{path} cannot be read as an image.*PNG, JPEG, WebP, GIF, BMP"
    ) as error:
        datasets.read_image(path, (8, 8))
    one_line(error)


# ---- the split


def numbered(labels, **changes) -> datasets.Dataset:
    """A dataset whose images are one pixel, holding their own index."""
    labels = np.asarray(labels, np.int64)
    number = np.arange(labels.size)
    images = np.stack([number % 256, number // 256, number * 0], axis=-1).astype(np.uint8)[:, None, None]
    names = tuple(f"class{k}" for k in range(labels.max() + 1))
    data = datasets.Dataset("x", images, labels, images[:0], labels[:0], names, "here")
    return replace(data, **changes)


def indices(images) -> list[int]:
    return (images[:, 0, 0, 0] + 256 * images[:, 0, 0, 1].astype(int)).tolist()


def test_last_split():
    train_images, train_labels, val_images, val_labels = datasets.split(numbered([0, 1] * 10), 0.13, "last")
    assert indices(train_images) == list(range(17)) and indices(val_images) == [17, 18, 19]  # round(2.6)
    assert train_labels.tolist() == [0, 1] * 8 + [0] and val_labels.tolist() == [1, 0, 1]


def test_stratified_split_is_exact_and_complete():
    labels = np.random.default_rng(3).permutation([0] * 100 + [1] * 50 + [2] * 10)
    train_images, train_labels, val_images, val_labels = datasets.split(
        numbered(labels), 0.1, "stratified", 7
    )
    assert np.bincount(val_labels).tolist() == [10, 5, 1]
    train, val = indices(train_images), indices(val_images)
    assert train == sorted(train) and val == sorted(val)
    assert sorted(train + val) == list(range(160))
    assert train_labels.tolist() == labels[train].tolist() and val_labels.tolist() == labels[val].tolist()


@pytest.mark.parametrize(("fraction", "expected"), [(0.1, [1, 1, 0]), (0.25, [2, 2, 1]), (0.5, [4, 3, 3])])
def test_stratified_split_gives_the_largest_remainders_their_due(fraction, expected):
    # 7, 7 and 6 images. 0.1: shares 0.7, 0.7, 0.6, in all 2. 0.25: 1.75, 1.75, 1.5, in all 5.
    # 0.5: 3.5, 3.5, 3, in all 10; of equal remainders the first class wins.
    val_labels = datasets.split(numbered([0] * 7 + [1] * 7 + [2] * 6), fraction)[3]
    assert np.bincount(val_labels, minlength=3).tolist() == expected


@pytest.mark.parametrize("folds", [2, 3, 7, 10, 49])
def test_every_training_image_is_in_exactly_one_fold(folds):
    rng = np.random.default_rng(folds)
    labels = rng.permutation(np.repeat([0, 1, 2], [143, 100, 59]))
    data = numbered(labels)
    seen = []
    for fold in range(folds):
        train, train_labels, val, val_labels = datasets.split(data, 1 / folds, "stratified", 4, fold)
        seen.append(indices(val))
        assert sorted(seen[-1] + indices(train)) == list(range(labels.size))
        assert train_labels.tolist() == labels[indices(train)].tolist()
        assert val_labels.tolist() == labels[seen[-1]].tolist()
        # In proportion: sizes and classes differ from equal parts by less than an image or two of rounding.
        assert abs(val_labels.size - labels.size / folds) <= 1
        assert (np.abs(np.bincount(val_labels, minlength=3) - np.bincount(labels) / folds) < 2).all()
    assert sorted(i for fold in seen for i in fold) == list(range(labels.size))
    assert seen[0] == indices(datasets.split(data, 1 / folds, "stratified", 4)[2])


def test_stratified_split_depends_on_the_seed_alone():
    data = numbered([0, 1] * 100)
    np.random.seed(1)
    first = indices(datasets.split(data, 0.2, seed=5)[2])
    np.random.seed(2)
    assert indices(datasets.split(data, 0.2, seed=5)[2]) == first
    assert indices(datasets.split(data, 0.2, seed=6)[2]) != first


def test_no_fraction_trains_on_all():
    data = numbered([0, 1, 1])
    train_images, train_labels, val_images, val_labels = datasets.split(data, None)
    assert train_images is data.train_images and train_labels is data.train_labels
    assert val_images.shape == (0, 1, 1, 3) and val_images.dtype == np.uint8
    assert val_labels.shape == (0,) and val_labels.dtype == np.int64


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_own_validation_images_win(fraction):
    own = (np.full((2, 1, 1, 3), 99, np.uint8), np.array([1, 0]))
    data = numbered([0, 1, 1], validation=own)
    train_images, _, val_images, val_labels = datasets.split(data, fraction)
    assert train_images is data.train_images and val_images is own[0] and val_labels is own[1]


@pytest.mark.parametrize("kind", ["stratified", "last"])
@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_split_fraction_out_of_range(kind, fraction):
    with pytest.raises(
        ConfigError, match=f"validation_fraction is {fraction}; allowed: greater than 0 and less"
    ):
        datasets.split(numbered([0, 1] * 5), fraction, kind)


@pytest.mark.parametrize("kind", ["stratified", "last"])
def test_split_without_a_validation_image(kind):
    with pytest.raises(ConfigError, match=r"is 0\.04, which is none of 10 images; allowed: 0\.1 or more"):
        datasets.split(numbered([0, 1] * 5), 0.04, kind)


def test_the_last_image_of_a_class_is_not_held_out():
    labels = [0] * 20 + [1]
    for seed in range(20):
        _, train_labels, _, held_out = datasets.split(numbered(labels), 0.3, seed=seed)
        assert 1 in train_labels and len(held_out) >= 5
    with pytest.raises(ConfigError, match=r"none of 10 images, as each class keeps one; .*--final_fit"):
        datasets.split(numbered(list(range(10))), 0.2)


def test_a_fold_without_an_image_is_refused():
    """Nine images in ten folds."""
    data, sizes = numbered([0, 1, 2] * 3), []
    for fold in range(10):
        try:
            sizes.append(len(datasets.split(data, 0.1, fold=fold)[3]))
        except ConfigError as error:
            assert f"which is none of 9 images in fold {fold}; allowed: a larger one" in str(error)
            sizes.append(0)
    assert sum(sizes) == 9 and sizes.count(0) == 1


def test_split_that_would_lose_a_class():
    with pytest.raises(
        ConfigError, match="which with the last split leaves no training image of class1; allowed"
    ):
        datasets.split(numbered([0] * 8 + [1] * 2), 0.2, "last")
    with pytest.raises(
        ConfigError, match="which with the stratified split leaves no training image of class1"
    ):
        datasets.split(numbered([0] * 8 + [1, 1]), 0.9, "stratified")


def test_split_of_an_unknown_kind():
    with pytest.raises(ConfigError, match="unknown validation_split 'first'; allowed: stratified, last"):
        datasets.split(numbered([0, 1]), 0.5, "first")


# ---- the whole


def test_fingerprints_tell_data_sets_apart():
    dataset = datasets.load("digits")
    images, labels = dataset.train_images.copy(), dataset.train_labels.copy()
    expected = datasets.fingerprint(dataset)
    assert datasets.fingerprint(replace(dataset, train_images=images)) == expected
    without_tests = replace(dataset, test_images=dataset.test_images[:0], test_labels=dataset.test_labels[:0])
    assert datasets.fingerprint(without_tests) == expected, "as a fold of a cross-validation has it"
    labels[77] = (labels[77] + 1) % 10
    for change in (
        {"train_images": 255 - images},
        {"train_images": images[::-1]},
        {"train_images": images[:-1], "train_labels": dataset.train_labels[:-1]},
        {"train_labels": labels},
        {"class_names": tuple("abcdefghij")},
        {"validation": (images, dataset.train_labels)},
    ):
        assert datasets.fingerprint(replace(dataset, **change)) != expected, list(change)


def test_import_and_small_datasets_need_no_tensorflow(pets):
    code = (
        "import sys; from cifar10_trainer import datasets\n"
        "heavy = {'tensorflow', 'keras', 'tensorflow_datasets', 'sklearn', 'PIL', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        f"datasets.load('digits'); datasets.load('folder', {str(pets)!r})\n"
        "assert not {'tensorflow', 'keras', 'tensorflow_datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def real(realdata) -> datasets.Dataset:
    return datasets.load(data_dir=realdata)


def official_batches(dataset: datasets.Dataset) -> dict[str, bytes]:
    """The six files of the binary form."""
    images = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels]).astype(np.uint8)
    rows = np.column_stack([labels, images.transpose(0, 3, 1, 2).reshape(-1, 3072)])
    return {f"{name}.bin": rows[i * 10_000 : (i + 1) * 10_000].tobytes() for i, name in enumerate(BATCHES)}


@pytest.mark.realdata
def test_real_cifar10(real):
    assert real.train_images.shape == (50_000, 32, 32, 3) and real.test_images.shape == (10_000, 32, 32, 3)
    assert (np.bincount(real.train_labels) == 5000).all() and (np.bincount(real.test_labels) == 1000).all()
    # The channel statistics everybody quotes.
    pixels = real.train_images.reshape(-1, 3)
    np.testing.assert_allclose(pixels.mean(0) / 255, [0.4914, 0.4822, 0.4465], atol=5e-5)
    # The first images, as every tutorial shows them.
    names = [real.class_names[k] for k in (*real.train_labels[:5], *real.test_labels[:3])]
    assert names == ["frog", "truck", "truck", "deer", "automobile", "cat", "ship", "ship"]
    val_labels = datasets.split(real, 0.1, seed=1)[3]
    assert (np.bincount(val_labels) == 500).all()


@pytest.mark.realdata
def test_real_binary_form(real, tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, content in official_batches(real).items():
        (folder / name).write_bytes(content)
    binary = datasets.load(data_dir=tmp_path)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(binary, name), getattr(real, name))


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TFDS's own dependencies, while it prepares
def test_real_tfds_form(real, tmp_path, monkeypatch):
    batches = official_batches(real) | {"batches.meta.txt": "\n".join(real.class_names).encode()}
    version = write_tfds(Miniature(None, None, {}, batches), tmp_path, monkeypatch)
    prepared = datasets.load(data_dir=tmp_path)
    assert prepared.source == str(version)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(prepared, name), getattr(real, name))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reading_the_tfds_form_leaves_the_devices_to_be_configured(tiny, tmp_path, monkeypatch):
    write_tfds(tiny, tmp_path, monkeypatch)
    code = (
        "import tensorflow as tf; from cifar10_trainer import datasets\n"
        "from cifar10_trainer.datasets import cifar10\n"
        f"cifar10._ROWS = {ROWS}; cifar10._MD5 = {cifar10._MD5}\n"
        f"datasets.load(data_dir={str(tmp_path)!r})\n"
        "cpu = tf.config.list_physical_devices('CPU')[0]\n"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)\n"
        "assert len(tf.config.list_logical_devices('CPU')) == 2\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
