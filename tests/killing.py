"""Kills a process before each step that it takes on the disk, and looks at what is left. Imports no TensorFlow.

    python tests/killing.py run|search FOLDER

prints the number of steps. An assertion fails where a moment is wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from cifar10_trainer.config import Config
from cifar10_trainer.errors import ConfigError, RunError
from cifar10_trainer.run_folder import RunFolder
from tuning.search_folder import SearchFolder

os.fsync = lambda descriptor: None  # a kill needs none, and these are hundreds
OLD, NEW = Config(seed=1), Config(seed=2)
STEPS = {"os.remove", "os.rename", "os.rmdir", "os.mkdir"}  # Python's audit events, and "open" for writing


def is_killed(step, act):
    """Does `act` in a process of its own, which ends before its step number `step`. Whether it came so far."""
    child = os.fork()
    if child == 0:
        left = step

        def hook(event, arguments):
            nonlocal left
            if event in STEPS or (event == "open" and set(str(arguments[1])) & set("wxa+")):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(hook)
        act()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    return status == 9


def every_kill(folder, start, act):
    """Yields the number of each step, with `folder` as it is when `act` was killed before that step."""
    for step in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        start(folder)
        if not is_killed(step, lambda: act(folder)):
            return
        yield step


# ---- runs


def train(folder, config, overwrite):
    """What a run of two epochs does with its folder. Returns the seed in the state that it resumed, or None."""
    run = RunFolder(folder)
    with run.lock():
        saved = None if overwrite else run.unfinished_state(config, print)
        if overwrite:
            run.remove_run()
        run.write_config(config.to_dict(), resumed=bool(saved))
        for epoch in (1, 2):
            (folder / "model.keras").write_text(str(config.seed))
            run.write_history([{"epoch": epoch, "seconds": config.seed}])
            run.write_state(config, {"seed": np.array(config.seed)})
        (folder / "figures").mkdir(exist_ok=True)
        (folder / "figures" / "curves.png").write_text(str(config.seed))
        run.write_metrics({"seed": config.seed})
    return saved and int(saved["seed"])


def unfinished(folder):
    """With two states."""
    run = RunFolder(folder)
    with run.lock():
        run.write_config(OLD.to_dict(), resumed=False)
        (folder / "model.keras").write_text("1")
        for _ in range(2):
            run.write_state(OLD, {"seed": np.array(1)})


def of_1_0_0(folder):
    unfinished(folder)
    (folder / "state.previous.npz").unlink()
    np.savez(folder / "state.npz", seed=np.array(1))


def killed_by_1_0_0(folder):
    """Its --overwrite removed config.json first, and was killed then."""
    of_1_0_0(folder)
    (folder / "metrics.json").write_text('{"seed": 1}')
    (folder / "config.json").unlink()


def check_run(folder, overwrite):
    """No file is of another run than config.json, and each config is refused, resumes its own state or begins anew."""
    run = RunFolder(folder)
    if run.has_run():
        seed = run.read_config()["seed"]
        if run.is_finished():
            assert run.read_metrics()["seed"] == seed
        for path in (run.model_file, run.figures / "curves.png"):
            assert not path.exists() or path.read_text() in (
                str(seed),
                "",
            )  # "": the test's own write is not atomic
        if run.history_file.exists():
            assert {row["seconds"] for row in run.read_history()} <= {seed}
    for config in (OLD, NEW):
        copy = folder.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        with contextlib.suppress(ConfigError, RunError):
            assert train(copy, config, False) in (None, config.seed)
            assert RunFolder(copy).read_metrics()["seed"] == config.seed
        assert not [path for path in copy.rglob(".*")], "what the killed one left is removed"
    if overwrite:
        train(folder, NEW, True)
        assert RunFolder(folder).read_config()["seed"] == RunFolder(folder).read_metrics()["seed"] == 2
        assert not list(folder.glob("state*"))


def check_runs(folder):
    steps = 0
    for start, config in ((unfinished, NEW), (of_1_0_0, NEW), (killed_by_1_0_0, NEW), (unfinished, OLD)):
        overwrite = config == NEW
        for _ in every_kill(folder, start, lambda f, c=config, o=overwrite: train(f, c, o)):
            check_run(folder, overwrite)
            steps += 1
    return steps


# ---- searches


def search(folder, number, overwrite):
    """What a search does with its folder."""
    found = SearchFolder(folder)
    with found.lock():
        found.begin({"search": number}, overwrite)
        resumed = found.state_file.read_text() if found.state_file.exists() else None
        for name in ("trials", "trials/trial_0", "tensorboard"):
            (folder / name).mkdir(exist_ok=True)
        for path in ("trials/search_state.json", "trials/trial_0/metrics.json", "tensorboard/events"):
            (folder / path).write_text(str(number))
        for path in (found.leaderboard_file, found.best_config_file, found.figure_file):
            path.write_text(str(number))
    return resumed


def check_searches(folder):
    steps = 0
    for _ in every_kill(folder, lambda f: search(f, 1, False), lambda f: search(f, 2, True)):
        steps += 1
        if (folder / "search.json").exists():
            number = json.loads((folder / "search.json").read_text())["search"]
            visible = (
                p
                for p in folder.rglob("*")
                if p.is_file() and not p.relative_to(folder).as_posix().startswith(".")
            )
            for path in visible:
                assert path.name == "search.json" or path.read_text() in (str(number), ""), path
        for number in (1, 2):
            copy = folder.with_name("copy")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            with contextlib.suppress(ConfigError, RunError):
                assert search(copy, number, False) in (None, "", str(number))
            assert not [path for path in copy.rglob(".*")]
        assert search(folder, 2, True) in (None, "")
    return steps


if __name__ == "__main__":
    check = {"run": check_runs, "search": check_searches}[sys.argv[1]]
    print(check(Path(sys.argv[2])))
