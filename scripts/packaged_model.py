"""Makes the network in the package, cifar10_trainer/packaged/cifar10.keras, and its record, results/packaged.json.

    python scripts/packaged_model.py                  # trains the recipe, or resumes its run; then the rest
    python scripts/packaged_model.py --run=runs/mine  # takes up a finished run of another folder

After the training:

1. The kernels are rounded to float16, and stored so. All else is of the rounded network.
2. The number above which a picture looks like none of the ten is set on the held-out images: the entropy of
   FALSE_ALARMS of them is higher. Beside it, three other scores are compared, on drawn images that serve this purpose
   only.
3. The test images are scored, once; and how often the number catches images of no class, drawn in other ways.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from drawn import pictures

from cifar10_trainer import RunError, archives, cli, datasets, process
from cifar10_trainer.files import replacing, write_json
from cifar10_trainer.model_file import PACKAGED, ModelInfo, load_model, write_model
from cifar10_trainer.run_folder import RunFolder
from results import photos, records

if TYPE_CHECKING:
    import keras

TRAINING = ("--recipe=fast.default", "--epochs=60", "--validation_fraction=0.04", "--seed=0")
FALSE_ALARMS = 0.05  # of the held-out images
SCORE = "entropy, negative"  # what `predict` compares
DRAWN = 1000  # images of each drawn set
LARGEST = 4_000_000  # bytes in the wheel

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
_define = cli.definer(FLAGS, "packaged_model.py")
_define(flags.DEFINE_string, "run", "the run folder; a finished run is taken up", "runs/packaged")
_define(flags.DEFINE_string, "data_dir", "where CIFAR-10 is")
_define(flags.DEFINE_string, "out", "the model file to write", str(PACKAGED))
_define(flags.DEFINE_string, "record", "the record to write", str(photos.PACKAGED))


def train(run: RunFolder) -> None:
    """Trains in `run`, or resumes, in a process of its own. Raises RunError."""
    command = [sys.executable, "-m", "cifar10_trainer", *TRAINING, f"--workdir={run}"]
    if FLAGS.data_dir:
        command.append(f"--data_dir={FLAGS.data_dir}")
    status, stopped_by = process.call(command)
    if status or stopped_by:
        raise process.failure("the training", stopped_by)


def rounded(model: keras.Model) -> keras.Model:
    """`model`, its kernels rounded to float16. Vectors are few, and stay as they are."""
    model.set_weights(
        [w.astype(np.float16).astype(w.dtype) if w.ndim > 1 else w for w in model.get_weights()]
    )
    return model


def store_as_float16(path: Path) -> None:
    """Writes a .keras file again with the kernels as float16; any Keras reads them into its float32 variables."""
    import h5py

    with archives.rewriting(path) as members:
        found = io.BytesIO()
        with h5py.File(io.BytesIO(members["model.weights.h5"])) as source, h5py.File(found, "w") as target:
            target.attrs.update(source.attrs)

            def copy(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset):
                    target[name] = item[()].astype(np.float16) if item.ndim > 1 else item[()]
                else:
                    target.require_group(name)
                target[name].attrs.update(item.attrs)

            source.visititems(copy)
        members["model.weights.h5"] = found.getvalue()


def scores(logits: keras.Model, images: np.ndarray) -> dict[str, np.ndarray]:
    """Four scores of each image, higher for what looks like one of the classes; `logits` ends before the softmax."""
    x = logits.predict(images, 500, verbose=0).astype(np.float64)
    log_sum = np.logaddexp.reduce(x, axis=1)
    log_p = x - log_sum[:, None]
    return {
        "highest probability": np.exp(log_p.max(axis=1)),
        SCORE: np.sum(np.exp(log_p) * log_p, axis=1),
        "highest logit": x.max(axis=1),
        "energy, negative": log_sum,
    }


def compare_scores(logits: keras.Model, held_out: np.ndarray) -> dict[str, dict[str, float]]:
    """Score -> set -> the share of it that is caught, where the held-out images have FALSE_ALARMS."""
    known = scores(logits, held_out)
    sets = {
        "stripes": pictures.draw(pictures.stripes, DRAWN, 1),
        "clouds": pictures.draw(pictures.clouds, DRAWN, 2),
        "letters": pictures.draw(pictures.letter, DRAWN, 3),
        "held-out images in 16 squares that change places": pictures.mosaics(held_out[:DRAWN], 4),
    }
    found: dict[str, dict[str, float]] = {name: {} for name in known}
    for title, images in sets.items():
        for name, values in scores(logits, images).items():
            found[name][title] = _share(values < np.quantile(known[name], FALSE_ALARMS))
    return found


def catch_rates(logits: keras.Model, above: float) -> dict[str, float]:
    """Set -> the share of its images that look like none of the ten. These images have served for nothing else."""
    digits = datasets.load("digits")
    sets = {
        "digits": np.concatenate([digits.train_images, digits.test_images]),
        "noise": pictures.draw(pictures.noise, DRAWN, 11),
        "plain colours": pictures.draw(pictures.plain_colour, DRAWN, 12),
        "shapes": pictures.draw(pictures.shapes, DRAWN, 13),
    }
    return {name: _share(scores(logits, x)[SCORE] < -above) for name, x in sets.items()}


def _share(mask: np.ndarray) -> float:
    return round(float(np.mean(mask)), 4)


def digest(model: keras.Model) -> str:
    """A hash of all weights, as float32 in their order."""
    return hashlib.sha256(b"".join(w.astype(np.float32).tobytes() for w in model.get_weights())).hexdigest()


def wheel_bytes(path: Path) -> int:
    """The size of a file in a wheel, which is a zip archive."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(path)
    return len(archive.getvalue())


def store(model: keras.Model, out: Path) -> keras.Model:
    """Writes the file, and reads the model back. Raises RunError, with `out` as it was, where that is another one or too large."""
    with replacing(out) as temporary:
        write_model(model, temporary)
        store_as_float16(temporary)
        stored = load_model(temporary)
        if digest(stored) != digest(model):
            raise RunError(f"{out} stays as it is: the new file has other weights than the model")
        if wheel_bytes(temporary) > LARGEST:
            raise RunError(
                f"{out} stays as it is: the new file takes {wheel_bytes(temporary):,} bytes in a wheel; allowed: {LARGEST:,}"
            )
    return stored


def main() -> None:
    run, out = RunFolder(FLAGS.run), Path(FLAGS.out)
    if not run.is_finished():
        train(run)
    cli.import_tensorflow()
    import keras

    from cifar10_trainer import evaluate, predict, scoring

    settings, metrics = run.read_config(), run.read_metrics()
    dataset = datasets.load("cifar10", FLAGS.data_dir or settings["data_dir"])
    model = rounded(load_model(run.model_file))

    # ---- the threshold, on held-out images
    held_out, labels = evaluate.select(dataset, "validation", settings)
    validation = scoring.score(labels, scoring.predict_probabilities(model, held_out))
    logits = keras.Model(model.input, model.get_layer("logits").output)
    above = round(-float(np.quantile(scores(logits, held_out)[SCORE], FALSE_ALARMS)), 4)
    compared = compare_scores(logits, held_out)

    # ---- the file
    model.info = ModelInfo(dataset.class_names, none_above=above)
    stored = store(model, out)

    # ---- the test images, once
    probabilities = scoring.predict_probabilities(stored, dataset.test_images)
    test = scoring.score(dataset.test_labels, probabilities)
    alarms = _share(np.array([predict.entropy(p) for p in probabilities]) > above)
    record = {
        **records.made_by(records.given_command("packaged_model.py")),
        "training": {
            "command": records.without_data_dir(settings["command"]).partition(" --workdir")[0],
            "environment": settings["environment"],
            "metrics": metrics,
            "config": {k: v for k, v in settings.items() if k not in records.PRIVATE},
        },
        "file": {
            "bytes": out.stat().st_size,
            "bytes_in_wheel": wheel_bytes(out),
            "weights_sha256": digest(stored),
        },
        "validation": validation,
        "test": test,
        "none_of_the_ten": {
            "above": above,  # nats
            "false_alarms_held_out": FALSE_ALARMS,
            "false_alarms_test": alarms,
            "caught": catch_rates(logits, above),
            "scores_compared": compared,
        },
    }
    write_json(FLAGS.record, record)
    photos.publish()
    print(json.dumps({k: record[k] for k in ("file", "validation", "test", "none_of_the_ten")}, indent=1))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
