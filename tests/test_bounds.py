"""Nothing that is read is without a bound: FIFOs, archives that claim more than they hold, values of any length."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import h5py
import keras
import numpy as np
import pytest

from cifar10_trainer import __main__ as command
from cifar10_trainer import build_model, cli, datasets, evaluate, machine, scoring
from cifar10_trainer.archives import check_hdf5, check_npz, check_zip
from cifar10_trainer.config import Config
from cifar10_trainer.datasets import cifar10
from cifar10_trainer.errors import ConfigError, RunError, cut, shown
from cifar10_trainer.errors import one_line as error_line
from cifar10_trainer.files import parse_json, read_json, regular_file
from cifar10_trainer.run_folder import RunFolder
from tuning.search_folder import SearchFolder

MB = 10**6
TINY = Config(dataset="digits", architecture="vgg", options={"filters": (2,), "dense": 4}, pixels="unit")


def test_an_error_carries_no_colours_of_a_terminal():
    """As Keras's messages do."""
    assert str(ConfigError("\x1b[1mToo\nlarge\x1b[0m.")) == "Too large."
    assert error_line(ValueError("\x1b[31;1mred\x1b[0m")) == "red"


def one_line(info) -> str:
    text = str(info.value)
    assert text and "\n" not in text and len(text) < 600, text
    return text


# --- what is not a regular file --------------------------------------------------------------------------


def read_state(path):
    folder = RunFolder(path.parent)
    folder.write_config(TINY.to_dict(), resumed=False)
    os.replace(path, folder.state_file)
    folder.unfinished_state(TINY, print)


def read_batches(path):
    os.replace(path, path.parent / "data_batch_1.bin")
    datasets.load("cifar10", path.parent)


def read_prepared(path):
    os.replace(path, path.parent / "dataset_info.json")
    datasets.load("cifar10", path.parent)


def read_history(path):
    os.replace(path, path.parent / "history.csv")
    RunFolder(path.parent).read_history()


def read_search(path):
    os.replace(path, path.parent / "search.json")
    SearchFolder(path.parent).begin({"seed": 0}, overwrite=False)


def read_weights(path):
    build_model("transfer", weights=str(path), input_shape=(32, 32, 3), mean=None, std=None)


READERS = {
    "--config": lambda path: command.read_config(str(path)),
    "a run's JSON files": read_json,
    "history.csv": read_history,
    "search.json": read_search,
    "the state": read_state,
    "an archive": lambda path: datasets.load("cifar10", path),
    "a batch in a folder": read_batches,
    "what TFDS prepared": read_prepared,
    "a model": evaluate.load_model,
    "weights of a backbone": read_weights,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device", "a folder"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_a_regular_file_is_one_line_and_never_hangs(tmp_path, reader, kind):
    path = tmp_path / "x.keras"
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "a FIFO":
            os.mkfifo(path)
        elif kind == "a socket":
            os.chdir(tmp_path)  # its name may not be long
            server.bind(path.name)
        elif kind == "a device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        with pytest.raises((ConfigError, RunError)) as info:
            READERS[reader](path)
    one_line(info)


@pytest.fixture(autouse=True)
def _back_to_this_folder():
    before = os.getcwd()
    yield
    os.chdir(before)


def test_a_file_that_is_larger_than_allowed(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b" " * 1001)
    assert regular_file(path, 1001) == path
    with pytest.raises(OSError, match=r"it has 1,001 bytes; allowed: up to 1,000"):
        regular_file(path, 1000)
    with open(path, "wb") as file:
        file.truncate(command.CONFIG_BYTES + 1)  # zeros that take no room
    with pytest.raises(ConfigError, match=r"cannot read --config=.*: it has 4,194,305 bytes; allowed: up to"):
        command.read_config(str(path))


# --- archives of CIFAR-10 --------------------------------------------------------------------------------

MEASURED = """
import resource, sys
from cifar10_trainer import datasets
from cifar10_trainer.config import Config
from cifar10_trainer.errors import RunError
from cifar10_trainer.run_folder import RunFolder

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

before, (what, path) = peak(), sys.argv[1:]
try:
    if what == "archive":
        datasets.load("cifar10", path)
    elif what == "state":
        RunFolder(path).unfinished_state(Config(dataset="digits"), print)
    else:
        from cifar10_trainer import cli, evaluate
        cli.import_tensorflow()
        import keras
        keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
        before = peak()
        evaluate.load_model(path)
except RunError as error:
    print(peak() - before, error)
"""


def megabytes_to_refuse(what, path) -> tuple[float, str]:
    """Reads `path` in a process of its own: by how much its memory grew until the error, and the error."""
    done = subprocess.run([sys.executable, "-c", MEASURED, what, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr[-2000:]
    grown, _, error = done.stdout.strip().partition(" ")
    return float(grown), error


def deflated(pieces) -> bytes:
    packer = zlib.compressobj(1, wbits=31)
    return b"".join([*(packer.compress(piece) for piece in pieces), packer.flush()])


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


ZEROS = [bytes(MB)]
BOMBS = {
    "a batch that is too large": ([member("data_batch_1", 150 * MB), *ZEROS * 150], "a part of it has"),
    "a header that is too large": (
        [member("x", 150 * MB, tarfile.XHDTYPE), *ZEROS * 150],
        "a part of it has",
    ),
    "another member that is too large": ([member("x", 250 * MB), *ZEROS * 250], "it holds more than"),
    "eight members": (
        [member("x", 31 * MB // 512 * 512), bytes(31 * MB // 512 * 512)] * 8,
        "it holds more",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_gzip_bomb_as_an_archive(tmp_path, bomb):
    pieces, reason = BOMBS[bomb]
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(deflated(pieces))
    assert path.stat().st_size < 1.2 * MB
    grown, error = megabytes_to_refuse("archive", path)
    assert grown < 60, "an honest archive needs 184 MB"
    assert "it is damaged, or not an archive" in error and reason in error


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("target", ["data_batch_1", "/etc/passwd", "../../etc/passwd"])
def test_links_in_an_archive(tmp_path, kind, target):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("../../cifar-10-batches-py/data_batch_1")
        info.type, info.linkname = kind, target
        tar.addfile(info)
    with pytest.raises(RunError, match=r"its data_batch_1 is a link, or no file") as info:
        datasets.load("cifar10", path)
    one_line(info)


@pytest.mark.parametrize(
    "pack", [lambda b: __import__("bz2").compress(b), lambda b: __import__("lzma").compress(b)]
)
def test_archives_of_other_packers_are_not_unpacked(tmp_path, pack):
    """An xz archive may ask for gigabytes to unpack it."""
    (tmp_path / "x.tar.xz").write_bytes(pack(bytes(MB)))
    with pytest.raises(RunError, match="it is damaged, or not an archive"):
        datasets.load("cifar10", tmp_path / "x.tar.xz")


def test_a_record_of_any_length(tmp_path):
    (tmp_path / "x.tfrecord").write_bytes(struct.pack("<QI", 2**60, 0) + b"png")
    with pytest.raises(ValueError, match="a record has 1,152,921,504,606,846,976 bytes"):
        list(cifar10._tfrecords(tmp_path / "x.tfrecord"))


# --- states ----------------------------------------------------------------------------------------------


def npy(header: str, content: bytes) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def falsified(data: bytes) -> bytes:
    """A zip archive whose one member claims to have 100 bytes, in both of its headers."""
    first, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    data = data[: first + 22] + struct.pack("<I", 100) + data[first + 26 :]
    return data[: central + 24] + struct.pack("<I", 100) + data[central + 28 :]


def zipped(content: bytes, how: int = zipfile.ZIP_DEFLATED, name: str = "meta.npy") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def shape(text: str) -> str:
    return f"{{'descr': '<f8', 'fortran_order': False, 'shape': {text}}}"


STATES = {
    "deflated zeros": (lambda: zipped(npy(shape("(18750000,)"), bytes(150 * MB))), "claims to hold"),
    "deflated zeros with a false size": (lambda: falsified(zipped(bytes(150 * MB))), "CRC|Bad|bad|truncated"),
    "a terabyte in the header": (lambda: zipped(npy(shape("(10**11,)"), b"x" * 80)), "no header of an array"),
    "a huge shape": (lambda: zipped(npy(shape("(100000000000,)"), b"x" * 80)), "which are not an array"),
    "a negative shape": (lambda: zipped(npy(shape("(-1, -10)"), b"x" * 80)), "which are not an array"),
    "brackets": (lambda: zipped(npy("(" * 5000, b"")), "no header of an array"),
    "pickled objects": (
        lambda: zipped(npy("{'descr': '|O', 'fortran_order': False, 'shape': (10,)}", b"x" * 80)),
        "[Oo]bject arrays",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_claims_more_than_it_holds(tmp_path, name):
    make, reason = STATES[name]
    folder = RunFolder(tmp_path)
    folder.write_config(Config(dataset="digits").to_dict(), resumed=False)
    folder.state_file.write_bytes(make())
    with pytest.raises(RunError, match=rf"state\.npz is damaged, or of other data \(.*({reason})") as info:
        folder.unfinished_state(Config(dataset="digits"), print)
    one_line(info)
    if "zeros" in name:
        assert folder.state_file.stat().st_size < MB
        assert megabytes_to_refuse("state", tmp_path)[0] < 40


def test_an_honest_archive_passes(tmp_path):
    arrays = {
        "a": np.arange(12.0).reshape(3, 4),
        "b": np.array("text"),
        "c": np.zeros((0, 5)),
        "d": np.array(1),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    assert check_npz(tmp_path / "x.npz") == sum(
        len(np.lib.format.MAGIC_PREFIX) * 0 + 128 + a.nbytes for a in arrays.values()
    )
    np.savez_compressed(tmp_path / "y.npz", **arrays)
    assert check_npz(tmp_path / "y.npz") == check_npz(tmp_path / "x.npz")


def test_a_state_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write_config(TINY.to_dict(), resumed=False)
    folder.write_state(TINY, {"a": np.zeros(MB)})
    monkeypatch.setattr(machine, "available_memory", lambda: MB)
    with pytest.raises(
        RunError, match=r"the state in .*state\.npz: needs 8 MB of memory, 1 MB are available"
    ):
        folder.unfinished_state(TINY, print)


# --- models ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return build_model("fast", filters=(4, 4), input_shape=(16, 16, 3), num_classes=3)


def rewritten(path, change) -> None:
    """Writes the members of a .keras file again, as `change`(name, content) gives them; deflated."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def wide(name, content):
    """A head of a billion units, without the weights."""
    return content.replace(b'"units": 3', b'"units": 3000000000') if name == "config.json" else content


def long(name, content):
    return content + b" " * 150 * MB if name == "config.json" else content


def deep(name, content):
    return b"[" * 100_000 if name == "config.json" else content


def hollow(path) -> None:
    """Replaces the first array of an HDF5 file by one of 3 GB, none of whose pieces exists."""
    with h5py.File(path, "a") as file:
        names = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        del file[names[0]]
        file.create_dataset(names[0], (10**9, 3), "u1", chunks=(MB, 3), compression="gzip")


def hollow_member(name, content, tmp_path):
    if name != "model.weights.h5":
        return content
    (tmp_path / "w.h5").write_bytes(content)
    hollow(tmp_path / "w.h5")
    return (tmp_path / "w.h5").read_bytes()


MODELS = {
    "layers without weights": (wide, "it describes a model of"),
    "zeros": (long, "claims to hold"),
    "brackets": (deep, ""),
    "an array without content": (hollow_member, "claims to hold"),
    "no config": (lambda name, content: content if name != "config.json" else b"", ""),
}


def model_bomb(tmp_path, model, bomb):
    """A model file that claims too much, and what its error contains."""
    change, reason = MODELS[bomb]
    path = tmp_path / "x.keras"
    model.save(path)
    rewritten(
        path, change if bomb != "an array without content" else lambda n, c: hollow_member(n, c, tmp_path)
    )
    return path, reason


@pytest.mark.parametrize("bomb", MODELS)
def test_a_model_file_that_claims_more_than_it_holds(tmp_path, model, bomb):
    path, reason = model_bomb(tmp_path, model, bomb)
    assert path.stat().st_size < MB
    with pytest.raises(RunError, match=rf"x\.keras does not open as a Keras model \(.*{reason}") as info:
        evaluate.load_model(path)
    one_line(info)


@pytest.mark.slow
@pytest.mark.parametrize("bomb", ["layers without weights", "zeros", "an array without content"])
def test_the_memory_that_a_false_model_file_takes(tmp_path, model, bomb):
    path, reason = model_bomb(tmp_path, model, bomb)
    grown, error = megabytes_to_refuse("model", path)
    assert grown < 60 and reason in error


def test_words_in_a_model_file_that_are_nested_too_deep(tmp_path, model):
    path = tmp_path / "x.keras"
    model.save(path)
    rewritten(path, lambda name, content: b"[" * 50_000 if name == "metadata.json" else content)
    with pytest.raises(
        RunError, match=r"x\.keras does not open as a Keras model \(.*nested too deep"
    ) as info:
        evaluate.load_model(path)
    one_line(info)


def test_an_hdf5_model_that_claims_more_than_it_holds(tmp_path, model):
    model.save(tmp_path / "x.h5")
    hollow(tmp_path / "x.h5")
    with pytest.raises(RunError, match=r"x\.h5 does not open as a Keras model \(it has .* claims to hold"):
        evaluate.load_model(tmp_path / "x.h5")


@pytest.mark.parametrize("link", [h5py.SoftLink("/a"), h5py.ExternalLink("other.h5", "/a")])
def test_links_in_an_hdf5_file(tmp_path, link):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"] = np.zeros(5)
        assert check_hdf5(file, 40) == 40
        file["b"] = link
        with pytest.raises(ValueError, match="/b is a link"):
            check_hdf5(file, 40)


def test_an_honest_model_that_was_packed_again_opens(tmp_path, model):
    path = tmp_path / "x.keras"
    model.save(path)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    expected = evaluate.predict_probabilities(model, images)
    rewritten(path, lambda name, content: content)
    assert check_zip(path) > path.stat().st_size
    np.testing.assert_array_equal(evaluate.predict_probabilities(evaluate.load_model(path), images), expected)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"filters": (10**9,)}, "864.0 GB"),
        ({"filters": (8, 10**8)}, "28.8 GB"),
        ({"filters": (10**18,)}, "GB"),
    ],
)
def test_huge_filters_are_refused_before_they_are_allocated(options, size, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 20 * 10**9)
    said = rf"a model of the architecture fast: needs .*{size} of memory, 20\.0 GB are available; make its layers"
    with pytest.raises(RunError, match=said) as info:
        build_model(**options)
    one_line(info)


def test_the_weights_do_not_depend_on_the_check():
    """The shapes are found without a draw: two models of one seed are equal, whoever counts them."""
    keras.utils.set_random_seed(3)
    ours = build_model("course").get_weights()
    keras.utils.set_random_seed(3)
    from cifar10_trainer.models import course

    plain = course.build().get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(ours, plain, strict=True))


# --- values of any length --------------------------------------------------------------------------------

LONG = ["x" * 5000, "a b " * 2000, "9" * 5000, "-" + "9" * 400, "[" * 10_000, "\udcff\x1b[31m\n" * 500]


def test_shown():
    assert shown("it's") == '"it\'s"' and shown((1, 2.5)) == "(1, 2.5)"
    assert len(shown("x" * 1000)) == 99 and shown("x" * 1000).startswith("'xxx")
    assert shown("\ud800\x1b\n") == r"'\ud800\x1b\n'"
    assert shown(10**6000) == "<int, too large to be shown>"
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "<list, too large to be shown>"
    assert cut("ab\nc") == r"ab\nc" and len(cut("\udcff" * 100)) <= 100


def test_an_error_is_one_line_of_bounded_words():
    text = str(RunError("cannot read\n  /tmp/" + "d/" * 500 + "x: no such \udcff file " + "y " * 5000))
    assert "\n" not in text and text.isprintable() and len(text) <= 1500
    assert text.startswith("cannot read /tmp/d/d") and "/x: no such" in text
    assert isinstance(ConfigError("a"), ValueError) and isinstance(RunError("a"), RuntimeError)
    way_on = "--workdir=/" + "d/" * 150  # is to be copied
    assert way_on in str(RunError(f"stopped; resume with {way_on}"))


def status_of(capsys, *argv) -> tuple[int, str]:
    command.FLAGS.unparse_flags()
    for name in command.FLAGS:
        command.FLAGS[name].unparse()
    status = cli.run(command.main, command.FLAGS, command.USAGE, ["command", *argv])
    return status, capsys.readouterr().err


def check_line(text: str, value: str) -> None:
    assert text.count("\n") == 1 and "Traceback" not in text, text[:500]
    assert text.strip().isprintable()
    assert len(text) < 1600 and (len(value) <= 100 or value[:101] not in text)


VALUE_FLAGS = [n for n in command.FLAGS if not command.FLAGS[n].boolean and n not in ("workdir", "data_dir")]


@pytest.mark.parametrize("value", LONG, ids=range(len(LONG)))
@pytest.mark.parametrize("flag", VALUE_FLAGS)
def test_a_long_value_of_a_flag_is_one_short_line(flag, value, capsys, monkeypatch):
    monkeypatch.setattr(cli, "import_tensorflow", lambda: pytest.fail("the value passed"))
    if flag == "folds" and value.lstrip("-").isdecimal() and len(value) < 4300:
        return  # the number of images decides
    text = f"optimizer.{value}={value}" if flag == "set" else value
    status, said = status_of(capsys, f"--{flag}={text}")
    assert status == 2
    check_line(said, value)


FIELDS = [
    (*section, field.name)
    for section, kind in [
        ((), Config),
        *(((f.name,), type(getattr(Config(), f.name))) for f in dataclasses.fields(Config) if f.name in
          ("origin", "augmentation", "optimizer", "schedule", "averaging")),
    ]
    for field in dataclasses.fields(kind)
]  # fmt: skip
WRONG = [
    "x" * 5000,
    10**400,
    -(10**400),
    1e-320,
    float("nan"),
    float("inf"),
    [1e-320] * 1000,
    {"x" * 5000: "y"},
    ["z"] * 5000,
    [[[[[[[[1]]]]]]]],
]
FREE = {("origin", "source"), ("origin", "parameters")}  # any string, any integer


@pytest.mark.parametrize("value", WRONG, ids=[str(i) for i in range(len(WRONG))])
@pytest.mark.parametrize("field", FIELDS, ids=".".join)
def test_a_long_value_of_a_field_is_one_short_line(field, value):
    values = TINY.to_dict()
    target = values
    for section in field[:-1]:
        target = target[section]
    if field in FREE and isinstance(value, str | int):
        return
    target[field[-1]] = {"filters": value} if field == ("options",) and not isinstance(value, dict) else value
    try:
        config = Config.from_dict(values)
        if field in (("options",), ("architecture",)):
            build_model(config.architecture, **config.options)
    except ConfigError as error:
        check_line(f"{error}\n", repr(value))
    else:
        pytest.fail(f"{field} took {value!r}"[:300])


@pytest.mark.parametrize("text", ["[" * 10_000, '{"a":' * 10_000, "9" * 5000, "\ud800", "{"])
def test_json_that_is_none(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_name_that_is_not_utf8(tmp_path, capsys):
    status, said = status_of(capsys, "--workdir=/tmp/\udcff", "--dataset=digits")
    assert status == 2 and "--workdir is '/tmp/\\udcff'; allowed: names in UTF-8" in said
    RunFolder(tmp_path).write_config({"data_dir": "/tmp/\udcff"}, resumed=False)
    assert json.loads((tmp_path / "config.json").read_text())["data_dir"] == "/tmp/\udcff"


# --- batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(8, 8, 500), (32, 32, 500), (64, 64, 125), (224, 224, 10), (2000, 2000, 1)],
)
def test_a_batch_of_larger_images_has_fewer_of_them(height, width, expected):
    assert scoring.default_batch(np.zeros((3, height, width, 3), np.uint8)) == expected
