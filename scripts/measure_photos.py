"""Measures what trains best on a folder of few pictures, and keeps results/photos.json, run by run.

    python scripts/measure_photos.py                  # all; started again, it continues where it was
    python scripts/measure_photos.py --sets=letters --images=20 --seeds=1 --methods=transfer.cifar

The pictures are JPEG files of 150 to 200 pixels a side, in a temporary folder:

- cifar10: the ten classes that the packaged network knows, from test images of CIFAR-10, enlarged. It has never seen
  them, but it knows the classes, so this is the easy set. What scores are 1,000 other test images.
- digits: the handwritten digits of scikit-learn, at most 100 a class.
- letters: ten capital letters, drawn in any colours, sizes and places.

The methods are recipes of this project as a user's command has them, adapted to the number of images, and Keras's own
way: image_dataset_from_directory and MobileNetV2 from random weights, at 96 pixels, Adam, 20 epochs. Each run is a process of its own, so that its seconds
hold everything, from the start of Python on. A fifth of the training pictures is the validation set.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from drawn import pictures
from PIL import Image

from cifar10_trainer import ConfigError, RunError, cli, datasets
from cifar10_trainer.files import read_json, write_json
from cifar10_trainer.run_folder import RunFolder
from results import photos, records

SETS = ("cifar10", "letters", "digits")
METHODS = ("transfer.cifar", "fast.default", "fast.85", "keras")
SCORED = 1000  # test pictures of a set, at most
MOST = 100  # digits a class to train on; the others are for the test

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
_define = cli.definer(FLAGS, "measure_photos.py")
_define(flags.DEFINE_list, "sets", "sets of pictures", list(SETS))
_define(flags.DEFINE_list, "images", "training pictures a class, validation included", ["20", "60", "300"])
_define(flags.DEFINE_list, "methods", "recipes, and keras", list(METHODS))
_define(flags.DEFINE_integer, "seeds", "runs of each, seeds 0 to n - 1", 3, lower_bound=1)
_define(flags.DEFINE_integer, "image_size", "the side in pixels on which this project's recipes train", 32)
_define(flags.DEFINE_string, "data_dir", "where CIFAR-10 is")
_define(flags.DEFINE_string, "out", "the record", str(photos.PHOTOS))
_define(flags.DEFINE_boolean, "publish", "write the table of docs/photos.md", True)

# Keras's own way, as its documentation has it; the arguments are the folder, the seed and the file for the result.
KERAS = """
import json, sys
import keras
folder, seed, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
keras.utils.set_random_seed(seed)
read = lambda part: keras.utils.image_dataset_from_directory(
    f"{folder}/{part}", image_size=(96, 96), batch_size=32, shuffle=part == "train", seed=seed, verbose=False)
train, validation, test = map(read, ("train", "val", "test"))
model = keras.Sequential([
    keras.Input((96, 96, 3)),
    keras.layers.RandomFlip("horizontal"),
    keras.layers.Rescaling(1 / 127.5, offset=-1),
    keras.applications.MobileNetV2(input_shape=(96, 96, 3), include_top=False, weights=None, pooling="avg"),
    keras.layers.Dropout(0.2),
    keras.layers.Dense(len(train.class_names), activation="softmax"),
])
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
best = keras.callbacks.ModelCheckpoint("best.weights.h5", "val_accuracy", save_best_only=True, save_weights_only=True)
model.fit(train, validation_data=validation, epochs=20, callbacks=[best], verbose=0)
model.load_weights("best.weights.h5")
scores = [model.evaluate(x, verbose=0)[1] for x in (validation, test)]
json.dump(scores, open(out, "w"))
"""


def images_of(name: str, count: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Class -> images, to train on (`count` a class) and to score, with no image in both."""
    if name in ("cifar10", "digits"):
        dataset = datasets.load(name, FLAGS.data_dir if name == "cifar10" else None)
        if name == "cifar10":
            images, labels = dataset.test_images, dataset.test_labels
            names = list(dataset.class_names)
        else:
            images = np.concatenate([dataset.train_images, dataset.test_images])
            labels = np.concatenate([dataset.train_labels, dataset.test_labels])
            names = [f"digit {name}" for name in dataset.class_names]
            count = min(count, MOST)
        rng = np.random.default_rng(seed)
        order = [rng.permutation(np.flatnonzero(labels == k)) for k in range(len(names))]
        last, fewest = SCORED // len(names), min(map(len, order))
        if count >= fewest:
            raise ConfigError(f"images is {count}; allowed with {name}: fewer than the {fewest} of a class")
        # What scores comes from the end of each class, so it is never trained on.
        training = {n: images[o[:count]] for n, o in zip(names, order, strict=True)}
        return training, {
            n: images[o[max(count, len(o) - last) :]] for n, o in zip(names, order, strict=True)
        }
    kinds: dict[str, pictures.Draw] = {
        c: lambda rng, side, c=c: pictures.letter(rng, side, c)  # type: ignore[misc]
        for c in pictures.LETTERS
    }
    last = SCORED // len(kinds)
    drawn = {n: pictures.draw(k, count + last, 100 * seed + i) for i, (n, k) in enumerate(kinds.items())}
    return {n: x[:count] for n, x in drawn.items()}, {n: x[count:] for n, x in drawn.items()}


def write_pictures(folder: Path, name: str, count: int, seed: int) -> None:
    """train/, val/ and test/ with JPEG files of 150 to 200 pixels a side."""
    rng = np.random.default_rng(seed)
    training, test = images_of(name, count, seed)
    for title, images in training.items():
        held_out = max(1, len(images) // 5)
        parts = {"val": images[:held_out], "train": images[held_out:], "test": test[title]}
        for part, chosen in parts.items():
            place = folder / part / title
            place.mkdir(parents=True)
            for i, image in enumerate(chosen):
                width, height = rng.integers(150, 201, 2).tolist()
                Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC).save(
                    place / f"{i}.jpg", quality=90
                )


def run(method: str, folder: Path, seed: int, scratch: Path) -> dict[str, float]:
    """Trains in a process, and returns validation and test accuracy, 0-1, and seconds."""
    begun, out = time.monotonic(), scratch / "result.json"
    if method == "keras":
        command = [sys.executable, "-c", KERAS, str(folder), str(seed), str(out)]
    else:
        command = [sys.executable, "-m", "cifar10_trainer", "--dataset=folder", f"--data_dir={folder}"]
        command += [f"--recipe={method}", f"--seed={seed}", f"--workdir={scratch / 'run'}", "--quiet"]
        command += [f"--image_size={FLAGS.image_size}"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{method} failed: {done.stderr.strip()[-500:]}")
    seconds = round(time.monotonic() - begun, 1)
    if method == "keras":
        validation, test = json.loads(out.read_text(encoding="utf-8"))
    else:
        metrics = RunFolder(scratch / "run").read_metrics()
        validation, test = metrics["best_val_accuracy"], metrics["test_accuracy"]
    return {"validation": round(validation, 4), "test": round(test, 4), "seconds": seconds}


def main() -> None:
    for name, allowed in (("sets", SETS), ("methods", METHODS)):
        chosen: list[str] = getattr(FLAGS, name)
        if not set(chosen) <= set(allowed):
            raise ConfigError(f"{name} is {','.join(chosen)}; allowed: some of {', '.join(allowed)}")
    counts = [int(n) if n.isdecimal() else 0 for n in FLAGS.images]
    if min(counts, default=0) < 2:
        raise ConfigError(f"images is {','.join(FLAGS.images)}; allowed: whole numbers, 2 or more")
    if "keras" in FLAGS.methods and FLAGS.image_size != 32:
        raise ConfigError(
            f"image_size is {FLAGS.image_size}, but keras trains at 96 pixels; allowed: --methods without it"
        )
    cli.import_tensorflow()
    path = Path(FLAGS.out)
    record = read_json(path) if path.exists() else {}
    runs: list[dict[str, Any]] = record.setdefault("runs", [])
    for name, count, seed in [(s, n, k) for n in counts for s in FLAGS.sets for k in range(FLAGS.seeds)]:
        each = min(count, MOST) if name == "digits" else count
        here = (name, each, seed, FLAGS.image_size)
        there = {
            r["method"] for r in runs if (r["set"], r["images_per_class"], r["seed"], r["image_size"]) == here
        }
        missing = [method for method in FLAGS.methods if method not in there]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "pictures"
            write_pictures(folder, name, count, seed)
            for method in missing:
                scratch = Path(temporary) / method
                scratch.mkdir()
                found = run(method, folder, seed, scratch)
                about = {
                    "set": name,
                    "images_per_class": each,
                    "image_size": FLAGS.image_size,
                    "method": method,
                    "seed": seed,
                }
                number = records.session(record, records.given_command("measure_photos.py"))
                runs.append({**about, **found, "session": number})
                print(json.dumps(runs[-1]), flush=True)
                write_json(path, record, indent=1)
    if FLAGS.publish:
        photos.publish()


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
