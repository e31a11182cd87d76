"""The documents: every code block is executed, or parsed with the reason why it is not executed; every link leads somewhere.

The comment before a block names what happens to it:

    <!-- test: run -->              executed in an empty folder
    <!-- test: run in NAME -->      executed in a folder that the function NAME below has filled
    <!-- test: parse; REASON -->    its commands' flags are checked
    <!-- test: none; REASON -->     nothing
    <!-- ci: NAME -->               executed by .ci/run

Blocks of the language `text` are output or listings.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from cifar10_trainer import __main__ as trainer
from cifar10_trainer import build_model, load_model, predict_images
from cifar10_trainer.model_file import ModelInfo, write_model
from tuning import search as searcher

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("results/*.md"),
        *ROOT.glob("examples/*.md"),
    ]
)
COMMANDS = {
    "cifar10_trainer": "cifar10_trainer.__main__",
    "cifar10_trainer.evaluate": "cifar10_trainer.evaluate",
    "cifar10_trainer.predict": "cifar10_trainer.predict",
    "tuning.search": "tuning.search",
}


@dataclass(frozen=True)
class Block:
    document: Path
    line: int
    language: str
    directive: str  # "run", "run in NAME", "parse; REASON", "none; REASON", "ci NAME" or ""
    code: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    lines = path.read_text(encoding="utf-8").splitlines()
    found, start = [], None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        before = re.fullmatch(r"<!-- (test|ci): (.+) -->", lines[start - 1]) if start else None
        directive = "" if not before else before[2] if before[1] == "test" else f"ci {before[2]}"
        code = "\n".join(lines[start + 1 : number])
        found.append(Block(path, start + 1, lines[start].removeprefix("```"), directive, code))
        start = None
    assert start is None, f"{path}: a code block does not end"
    return found


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]


def chosen(kind: str) -> list:
    return [pytest.param(b, id=str(b)) for b in BLOCKS if b.directive.split(";")[0].split(" ")[0] == kind]


# ---- folders in which blocks run


def digits(folder: Path) -> None:
    Image.new("RGB", (50, 40), "white").save(folder / "digit.png")


def pictures(folder: Path) -> None:
    for name, colour in (("apple", (200, 30, 30)), ("lemon", (230, 220, 40))):
        (folder / "pictures" / "train" / name).mkdir(parents=True)
        for i in range(60):
            shade = tuple(max(0, c - i) for c in colour)
            Image.new("RGB", (40, 48), shade).save(folder / "pictures" / "train" / name / f"{i}.jpg")
    Image.new("RGB", (60, 40), "yellow").save(folder / "photo.jpg")


def photos(folder: Path) -> None:
    pictures(folder)
    Image.new("RGB", (180, 150), (220, 200, 60)).save(folder / "new.jpg")


def exported(folder: Path) -> None:
    keras.utils.set_random_seed(2)  # some weights hardly tell one picture from another
    model = build_model(filters=(8,), num_classes=2)
    model.info = ModelInfo(("apple", "lemon"))
    write_model(model, folder / "fruit.keras")
    Image.new("RGB", (180, 150), (220, 200, 60)).save(folder / "new.jpg")


def search(folder: Path) -> None: ...


def space(folder: Path) -> None: ...


FOLDERS = {f.__name__: f for f in (digits, pictures, photos, exported, search, space)}


# ---- the tests


def test_there_are_documents_and_blocks():
    assert {path.name for path in DOCUMENTS} >= {
        "README.md",
        "BUILD_NOTES.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    }
    assert len(chosen("run")) >= 4 and len(chosen("parse")) >= 3


@pytest.mark.parametrize("block", [pytest.param(b, id=str(b)) for b in BLOCKS])
def test_every_block_is_executed_or_says_why_not(block):
    if block.language == "text":
        return
    kind, _, reason = block.directive.partition(";")
    assert re.fullmatch(r"run|run in \w+|parse|none|ci \w+", kind), (
        f"{block} has no comment that says what becomes of it"
    )
    if kind in ("parse", "none"):
        assert len(reason.split()) > 2, f"{block} does not give the reason"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", chosen("run"))
def test_block_runs(block, tmp_path):
    _, _, name = block.directive.partition(" in ")
    if name:
        FOLDERS[name](tmp_path)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    if block.language == "python":
        (tmp_path / "block.py").write_text(block.code + "\n")
        words = [sys.executable, "block.py"]
    else:
        words = ["bash", "-euc", block.code]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{block}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def test_the_lines_without_this_package_show_the_model_what_this_package_does(tmp_path, monkeypatch, capsys):
    """A picture that lies on its side, with transparent parts, as PNG in spite of its name."""
    exported(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)
    pixels[:20, :, :3] //= 4
    upright = Image.Exif()
    upright[0x112] = 6  # orientation
    Image.fromarray(pixels).save(tmp_path / "new.jpg", format="PNG", exif=upright)
    Image.fromarray(pixels[..., :3]).save(tmp_path / "plain.png")
    monkeypatch.chdir(tmp_path)
    (block,) = (b for b in BLOCKS if b.directive == "run in exported" and b.language == "python")
    exec(block.code, {})
    label, probability = capsys.readouterr().out.split()[-2:]
    one, other = predict_images(load_model("fruit.keras"), ["new.jpg", "plain.png"])
    assert label == one["label"] and float(probability) == pytest.approx(one["probability"], abs=1e-4)
    assert (
        abs(one["probabilities"][label] - other["probabilities"][label]) > 1e-3
    )  # or there is nothing to see


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command that starts with `python` or one of the console commands."""
    lines = re.sub(r"\\\n\s*", " ", block.code).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w]


def flags_of(words: list[str]):
    """The module of a command, and its arguments."""
    while re.fullmatch(r"\w+=.*", words[0]):  # variables before the command
        words = words[1:]
    console = re.fullmatch(r"cifar10-(\w+)", words[0])
    if console:
        names = {"train": "cifar10_trainer.__main__", "search": "tuning.search"}
        return names.get(console[1], f"cifar10_trainer.{console[1]}"), words[1:]
    assert words[0] == "python", words
    if words[1] == "-m":
        return COMMANDS[words[2]], words[3:]
    return Path(words[1]).stem, words[2:]


@pytest.mark.parametrize("block", chosen("parse"))
def test_commands_have_flags_that_exist_and_fit(block, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    seen = 0
    for words in commands_of(block):
        name, arguments = flags_of(words)
        module = importlib.import_module(name)
        module.FLAGS.unparse_flags()
        for flag in module.FLAGS:
            module.FLAGS[flag].unparse()
        module.FLAGS([name, *arguments])
        if module is trainer:
            trainer.config_from_flags()
        if module is searcher:
            searcher.options_from_flags(searcher.base_from_flags().recipe)
        seen += 1
    assert seen, f"{block} holds no command"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in DOCUMENTS])
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{path.name} links to {target}"


@pytest.mark.parametrize("name", ["README.md", "BUILD_NOTES.md"])
def test_doors_are_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 130


def test_one_way_to_call_python():
    """An activated environment, in all documents."""
    for path in DOCUMENTS:
        assert ".venv/bin/python" not in path.read_text(encoding="utf-8"), path
