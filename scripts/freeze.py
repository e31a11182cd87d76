"""Shows that a change of the code changes no result: it compares digests of a dozen small runs before and after.

    python scripts/freeze.py --out=before.json        # before the change
    python scripts/freeze.py --compare=before.json    # after it
    python scripts/freeze.py digits folds             # only these runs

Each run is a process of a command that users call, on the embedded digits, offline. Its digests cover the final
weights, the history without its seconds, and the scores and first probabilities that `evaluate` prints. Digests depend
on the processor, the number of its cores and the library versions, so both files must come from the same machine and
the same Python environment. All runs together take about four minutes on two cores.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from cifar10_trainer import ConfigError, RunError, cli, files
from cifar10_trainer.errors import unknown

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
flags.DEFINE_string("out", None, "write the digests to this JSON file", flag_values=FLAGS)
flags.DEFINE_string("compare", None, "compare with the digests in this JSON file", flag_values=FLAGS)

MIXUP = [
    "--recipe=vgg.3_dropout", "--epochs=1.5", "--batch_size=64", "--set", "options.filters=[8,16]",
    "--set", "augmentation.mixup=0.3", "--set", "augmentation.flip=random",
]  # fmt: skip
FAST = [
    "--recipe=fast.94", "--batch_size=96", "--set", "options.filters=[16,32,32]", "--validation_fraction=0.2",
    "--set", "augmentation.cutout=6",
]  # fmt: skip
CUTMIX = [
    "--recipe=practical.augmented_plateau", "--epochs=4", "--batch_size=64", "--set", "options.filters=[8,16,16]",
    "--set", "options.dense=[32]", "--set", "augmentation.cutmix=1", "--set", "schedule.patience=1",
]  # fmt: skip
LEAKY = [
    "--recipe=leaky.early_stopping", "--epochs=3", "--batch_size=64", "--set", "options.blocks=[[8,8],[16,16]]",
    "--set", "options.dropout=[0.2,0.3]", "--set", "optimizer.name=adamw", "--set", "optimizer.weight_decay=0.01",
    "--set", "early_stopping=1",
]  # fmt: skip

# name -> flags of `python -m cifar10_trainer`, apart from data set and folder
RUNS: dict[str, list[str]] = {
    "digits": ["--epochs=3"],
    "digits-float32": ["--epochs=3", "--precision=float32", "--seed=1"],
    "vgg-mixup": [*MIXUP, "--precision=mixed_bfloat16"],
    "vgg-mixup-float32": [*MIXUP, "--precision=float32"],
    "fast": [*FAST, "--epochs=6", "--precision=mixed_bfloat16"],
    "fast-float32": [*FAST, "--epochs=2", "--precision=float32"],
    "leaky-adamw": [*LEAKY, "--precision=float32"],
    "practical-cutmix": [*CUTMIX, "--precision=float32"],
    "final-fit": ["--epochs=2", "--final_fit", "--hdf5", "--set", "optimizer.clip_norm=1"],
    "mirrored-2": ["--epochs=2", "--cpu_replicas=2", "--precision=float32"],
    "mirrored-2-sync": [*FAST, "--epochs=2", "--cpu_replicas=2", "--sync_batch_norm"],
}
OTHERS = ("resumed", "folds", "search")


def digest(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 hash."""
    return hashlib.sha256(content).hexdigest()[:16]


def run(*words: str, status: int = 0) -> str:
    """What a Python command prints. Raises RunError where its exit status is not `status`."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode != status:
        raise RunError(f"{' '.join(words)} gave exit status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def history_of(folder: Path) -> str:
    """The rows of history.csv as JSON, without the column of seconds."""
    with open(folder / "history.csv", newline="") as file:
        return json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])


def digests_of(folder: Path) -> dict[str, str]:
    """The digests of a finished run in `folder`."""
    import keras

    model = keras.models.load_model(folder / "model.keras", compile=False)
    weights = b"".join(w.tobytes() for w in model.get_weights())
    words = ("-m", "cifar10_trainer.evaluate", f"--workdir={folder}", "--json", "--show=50")
    scores = json.loads(run(*words))
    # the scores of version 1.0.0
    for name in ("model", "balanced_accuracy", "accuracy_interval", "views_share"):
        scores.pop(name)
    return {
        "weights": digest(weights),
        "history": digest(history_of(folder).encode()),
        "scores": digest(json.dumps(scores).encode()),
    }


def train(name: str, folder: Path) -> dict[str, str]:
    """Trains one of RUNS in `folder`, and returns its digests."""
    run("-m", "cifar10_trainer", *RUNS[name], "--dataset=digits", f"--workdir={folder}")
    return digests_of(folder)


def resumed(folder: Path) -> dict[str, str]:
    """The run `fast`, interrupted by SIGTERM as soon as it trains, and resumed. It must have the digests of `fast`."""
    words = ["-m", "cifar10_trainer", *RUNS["fast"], "--dataset=digits", f"--workdir={folder}", "--verbose"]
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout
        seen = b""
        while b"accuracy: " not in seen and (part := os.read(process.stdout.fileno(), 4096)):
            seen += part
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    if process.returncode != 1 or not (folder / "state.npz").exists():
        raise RunError(
            f"the run to resume ended with exit status {process.returncode} before it was interrupted"
        )
    run(*words)
    return digests_of(folder)


def folds(folder: Path) -> dict[str, str]:
    """Cross-validation over two folds."""
    run("-m", "cifar10_trainer", "--dataset=digits", "--epochs=1", "--folds=2", f"--workdir={folder}")
    found = json.loads((folder / "folds.json").read_text())
    for one in found["runs"]:
        one.pop("train_seconds")
    parts = [history_of(folder / f"fold-{i}-of-2") for i in (1, 2)]
    return {"folds": digest(json.dumps(found).encode()), "history": digest("".join(parts).encode())}


def search(folder: Path) -> dict[str, str]:
    """Three trials of a search."""
    flags = ["--dataset=digits", "--epochs=1", "--max_trials=3", f"--workdir={folder}"]
    run("-m", "tuning.search", *flags)
    with open(folder / "leaderboard.csv", newline="") as file:
        rows = [
            {k: v for k, v in row.items() if k not in ("seconds", "ended")} for row in csv.DictReader(file)
        ]
    parts = [history_of(path.parent) for path in sorted((folder / "trials").glob("*/history.csv"))]
    return {
        "leaderboard": digest(json.dumps(rows).encode()),
        "best_config": digest((folder / "best_config.json").read_bytes()),
        "history": digest("".join(parts).encode()),
    }


def digest_all(names: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (name, digests) of each run when it ends."""
    others = {"resumed": resumed, "folds": folds, "search": search}
    with tempfile.TemporaryDirectory() as parent:
        for name in names:
            began, folder = time.monotonic(), Path(parent, name)
            found = others[name](folder) if name in others else train(name, folder)
            shown = " ".join(f"{k}={v}" for k, v in found.items())
            print(f"{name:18s} {time.monotonic() - began:5.1f} s  {shown}", flush=True)
            yield name, found


def main(argv: list[str]) -> None:
    known = [*RUNS, *OTHERS]
    for name in argv:
        if name not in known:
            raise unknown("run", name, known)
    names = argv or known
    before = files.read_json(Path(FLAGS.compare)) if FLAGS.compare else None
    runs = {} if before is None else before.get("runs")
    has_all = isinstance(runs, dict) and set(names) <= set(runs)
    if before is not None and not (before.get("environment") and has_all):
        raise ConfigError(
            f"compare is {FLAGS.compare}; allowed: a file of --out with digests of {', '.join(names)}"
        )
    out = Path(FLAGS.out).absolute() if FLAGS.out else None
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"out is {FLAGS.out}; allowed: a file in a folder that exists")
    cli.import_tensorflow()
    from cifar10_trainer import precision, runtime

    environment = {name: value for name, value in runtime.describe().items() if name != "platform"}
    if before is not None and before["environment"] != environment:
        raise ConfigError(
            f"{FLAGS.compare} is from another machine or other versions: {before['environment']}"
        )
    with tempfile.TemporaryDirectory() as cache:
        # What a loaded machine measures must not decide: with --precision=auto the runs take bfloat16 where it is native.
        os.environ["XDG_CACHE_HOME"] = cache
        precision.keep(0.5)
        found = dict(digest_all(names))
    if "fast" in found and "resumed" in found and found["fast"] != found["resumed"]:
        raise RunError(
            f"the resumed run differs from the uninterrupted one: {found['resumed']}, {found['fast']}"
        )
    if FLAGS.out:
        files.write_json(Path(FLAGS.out), {"environment": environment, "runs": found}, indent=1)
    if before is not None:
        different = [name for name in found if found[name] != before["runs"][name]]
        if different:
            raise RunError(f"results differ from {FLAGS.compare}: {', '.join(different)}")
        print(f"all {len(found)} runs have the digests of {FLAGS.compare}")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
