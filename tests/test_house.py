"""The structure of the code: imports run one way, functions stay short, every module has its place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From top to bottom. A module imports from modules below it, and from its own package.
LAYERS = [
    "__main__",
    "predict",
    "evaluate",
    "cross_validation",
    "training",
    "preparation",
    "summary",
    "loop",
    "hooks",
    "engine",
    "accelerate",
    "layers",
    "pipeline",
    "augment",
    "optim",
    "scoring",
    "runtime",
    "precision",
    "report",
    "figures",
    "measures",
    "models",
    "datasets",
    "run_folder",
    "model_file",
    "adaptation",
    "recipes",
    "config",
    "cli",
    "launch",
    "cluster",
    "archives",
    "keras_state",
    "process",
    "machine",
    "files",
    "errors",
]
TUNING = [
    "search",
    "tuner",
    "chief",
    "worker",
    "trial",
    "figure",
    "leaderboard",
    "oracle",
    "search_folder",
    "space",
    "options",
]
COMMANDS = [
    "benchmark",
    "reproduce",
    "compare_tuners",
    "notebook",
    "freeze",
    "model_files",
    "packaged_model",
    "measure_photos",
]
LENGTHS = {"main": 80, "train_and_evaluate": 120}  # lines, docstring included; 60 for any other function


def modules(package: str) -> dict[str, list[Path]]:
    """Name of a module, or of a package in it -> its files. The package's own __init__ is not one of them."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name, *inner = path.relative_to(ROOT / package).with_suffix("").parts
        if name != "__init__" or inner:
            found.setdefault(name, []).append(path)
    return found


def imports(path: Path, package: str) -> set[str]:
    """The modules of `package` that a file imports, anywhere in it, but for those that only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    inside = ["", *path.relative_to(ROOT / package).parts[:-1]]  # the packages from the outermost one
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parents = inside[1 : len(inside) - node.level + 1]
                start = ".".join([package, *parents, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith(f"{package}.")}
    return found


@pytest.mark.parametrize(("package", "layers"), [("cifar10_trainer", LAYERS), ("tuning", TUNING)])
def test_imports_run_one_way(package, layers):
    found = modules(package)
    assert sorted(found) == sorted(layers), "a module without a place, or a place without a module"
    for name, paths in found.items():
        for path in paths:
            above = [
                other
                for other in imports(path, package) & set(layers)
                if layers.index(other) < layers.index(name)
            ]
            assert not above, f"{path.relative_to(ROOT)} imports upwards: {above}"


def test_the_trainer_does_not_know_the_search():
    for path in (ROOT / "cifar10_trainer").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) tuning\b", path.read_text(encoding="utf-8"), re.M), path


def test_nothing_imports_a_command():
    for path in (ROOT / "scripts").rglob("*.py"):
        found = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.M)
        assert not set(found) & set(COMMANDS), path


def test_the_check_sees_an_import_upwards(tmp_path, monkeypatch):
    """Each way to write one."""
    monkeypatch.setattr("test_house.ROOT", tmp_path)
    folder = tmp_path / "cifar10_trainer" / "models"
    folder.mkdir(parents=True)
    for text in (
        "from .. import engine",
        "from ..engine import Engine",
        "import cifar10_trainer.engine",
        "from cifar10_trainer import engine",
        "def f():\n    from ..engine import Engine",
    ):
        (folder / "fast.py").write_text(text)
        assert "engine" in imports(folder / "fast.py", "cifar10_trainer"), text
    (folder / "fast.py").write_text(
        "if TYPE_CHECKING:\n    from ..engine import Engine\nfrom . import common"
    )
    assert "engine" not in imports(folder / "fast.py", "cifar10_trainer")


@pytest.mark.parametrize("package", ["cifar10_trainer", "tuning", "scripts"])
def test_functions_are_short(package):
    long = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > LENGTHS.get(node.name, 60):
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not long, "\n".join(long)


def test_only_the_run_folder_knows_its_files():
    """The names of a run's files stand in run_folder.py, and elsewhere only in texts for people."""
    names = re.compile(
        r'"(?:history\.csv|metrics\.json|state\.npz|classification_report\.txt|report\.html|model\.h5)"'
    )
    for package in ("cifar10_trainer", "tuning"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "run_folder.py":
                assert not names.search(path.read_text(encoding="utf-8")), path
