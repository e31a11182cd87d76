"""Compares the tuners: how good is the best trial, by the compute that a search has spent?

    python scripts/compare_tuners.py

Each tuner searches a space of a few values of filters, dropout and learning rate, with many seeds. Each trial trains once, when
the first search asks for it; later searches look it up. So a comparison trains the whole space at most once: each trial at its
full length and at a third of it. All full trials have the same FLOPs: a wide network trains for fewer epochs than a narrow one.

KerasTuner's own Hyperband on `Model.fit` is compared as well. Its trials have the same network, optimizer, images and
augmentation, at a constant learning rate, and a promoted trial continues from its own weights.

This writes results/tuners/trials.json and searches.json, and with these files the table and the figure of docs/search.md. It
takes hours; started again, it continues.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from cifar10_trainer import cli
from cifar10_trainer.config import DATASETS, Config, Schedule
from cifar10_trainer.errors import ConfigError
from cifar10_trainer.recipes import RECIPES
from results import records, tuners
from tuning.space import Space

if TYPE_CHECKING:
    from cifar10_trainer.datasets import Dataset

USAGE = __doc__ or ""
FLAGS = flags.FlagValues()
cli.define_common(FLAGS)


_define = cli.definer(FLAGS, "compare_tuners.py")

_define(flags.DEFINE_string, "recipe", "the recipe around which the tuners search", "fast.85")
_define(flags.DEFINE_float, "epochs", "epochs of a full trial of the recipe itself", 1.0)
_define(flags.DEFINE_string, "dataset", f"one of {', '.join(DATASETS)}; default: the recipe's", None)
_define(flags.DEFINE_string, "data_dir", "where the images are", None)
_define(flags.DEFINE_string, "out", "folder of trials.json and searches.json", str(tuners.FOLDER))
_define(flags.DEFINE_integer, "seeds", "searches of each tuner, seeds 0 to n - 1", 30)
_define(flags.DEFINE_integer, "fit_seeds", "the same for the searches on Model.fit", 2)

# The values of the space, as multiples of the recipe's; those of dropout as they are.
FILTERS, DROPOUT, LEARNING_RATE = (0.5, 0.75, 1, 1.25, 1.5), (0.0, 0.2, 0.4), (0.25, 0.5, 1, 2, 4)


def space(base: Config) -> dict[str, list[float]]:
    """The values of each hyperparameter."""
    width, rate = base.options["filters"][0], base.optimizer.learning_rate
    return {
        "filters": [round(f * width) for f in FILTERS],
        "dropout": list(DROPOUT),
        "learning_rate": [float(f"{r * rate:.5g}") for r in LEARNING_RATE],
    }


def configure(base: Config, trial: tuners.Trial) -> Config:
    """The Config of a full trial: as many epochs as make its FLOPs those of the base."""
    around = Space(base, dict.fromkeys(tuners.HYPERPARAMETERS))
    config = around.config({name: trial[name] for name in tuners.HYPERPARAMETERS})
    return config.override(epochs=float(f"{base.epochs * flops(base) / flops(config):.4g}"))


def flops(config: Config) -> float:
    """The FLOPs of a forward pass on one image, the mean over the image sizes of a run."""
    from cifar10_trainer import models

    model = models.build(config, input_shape=(32, 32, 3), num_classes=10)
    sizes = config.sizes or (config.image_size,)
    return sum(models.forward_flops(model, side) for side in sizes) / len(sizes)


def train(config: Config, thirds: int, data: Dataset) -> dict[str, Any]:
    """Trains one trial of this project for so many thirds of its epochs, annealed to the end."""
    from cifar10_trainer.training import train_and_evaluate

    with tempfile.TemporaryDirectory() as folder:
        metrics = train_and_evaluate(
            config.override(epochs=float(f"{config.epochs * thirds / tuners.THIRDS:.6g}")),
            folder,
            dataset=data,
            verbose=0,
            full_report=False,
            score_test=False,
        )
    return {"val_accuracy": metrics["best_val_accuracy"], "pflop": metrics["pflop"]}


def fit(config: Config, thirds: int, data: Dataset) -> dict[str, Any]:
    """Trains so many thirds of a trial by `Model.fit` at a constant rate, and validates after each."""
    import keras

    from cifar10_trainer import datasets, make_dataset, make_training_model, runtime
    from cifar10_trainer.keras_state import seeded
    from cifar10_trainer.models import forward_flops
    from cifar10_trainer.models.initial import initial_model
    from cifar10_trainer.optim import make_optimizer

    images, labels, *validation = datasets.split(data, config.validation_fraction, seed=config.seed)
    with seeded(config.seed):
        model = initial_model(config, images, data.num_classes)
        training_model = make_training_model(model, runtime.choose_precision("auto")[0])
    # All steps see images of full size, so as many FLOPs are fewer steps.
    per_image = forward_flops(model)
    images_of_third = config.epochs * len(labels) * flops(config) / per_image / tuners.THIRDS
    steps = max(1, round(images_of_third / config.batch_size))
    dataset = make_dataset(
        images,
        labels,
        config.batch_size,
        augmentation=config.augmentation,
        seed=config.seed,
        epochs=1 + thirds * steps * config.batch_size // len(labels),
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = make_optimizer(config.optimizer, Schedule(name="constant"), thirds * steps)
    training_model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    history = training_model.fit(
        dataset,
        epochs=thirds,
        steps_per_epoch=steps,
        validation_data=validation,
        validation_batch_size=1000,
        shuffle=False,  # the data set does it
        verbose=0,
    ).history
    accuracies = [round(a, 6) for a in history["val_accuracy"]]
    return {"val_accuracy": accuracies, "pflop": 3 * per_image * thirds * steps * config.batch_size / 1e15}


class Trials:
    """The trials of a record, and those that it lacks: they train when they are asked for.

    Args:
        base: the recipe at the length of a full trial.
        path: the file of the record.
        record: what it holds so far.
    """

    def __init__(self, base: Config, path: Path, record: dict[str, Any]):
        self.base, self.path, self.record = base, path, record
        self._data: Dataset | None = None
        self._found = {tuners.key(trial): trial for trial in record["trials"]}

    def __call__(self, trial: tuners.Trial) -> tuners.Trial:
        """The trial with its result."""
        if tuners.key(trial) not in self._found:
            self._found[tuners.key(trial)] = self._train(trial)
        return self._found[tuners.key(trial)]

    def _train(self, trial: tuners.Trial) -> dict[str, Any]:
        """Trains a trial, and writes the record."""
        import keras

        from cifar10_trainer import datasets, files

        self._data = self._data or datasets.load(self.base.dataset, FLAGS.data_dir)
        keras.utils.clear_session()
        config, start = configure(self.base, trial), time.monotonic()
        do = train if trial["way"] == tuners.ANNEALED else fit
        found = {**trial, **do(config, trial["thirds"], self._data), "epochs": config.epochs}
        found["seconds"] = round(time.monotonic() - start, 2)
        found["session"] = records.session(self.record, records.given_command("compare_tuners.py"))
        self.record["trials"].append(found)
        files.write_json(self.path, self.record, indent=1)
        print(f"{len(self.record['trials'])}: {found}", flush=True)
        return found


def main() -> None:
    # ---- the flags
    if "filters" not in RECIPES[FLAGS.recipe].options:
        raise ConfigError(
            f"recipe is {FLAGS.recipe}, which sets no filters; allowed: one that does, as fast.85"
        )
    for name in ("seeds", "fit_seeds"):
        if (FLAGS[name].value or 0) < 2:
            raise ConfigError(f"{name} is {FLAGS[name].value}; allowed: 2 or more")
    names = [name for name in ("dataset", "epochs") if FLAGS[name].value is not None]
    base = RECIPES[FLAGS.recipe].override(**{name: FLAGS[name].value for name in names})
    path = Path(FLAGS.out) / tuners.TRIALS
    settings = {"recipe": FLAGS.recipe, "dataset": base.dataset, "epochs": base.epochs}
    record = tuners.read(path) or {**settings, "trials": []}
    for key, value in settings.items():  # a space is trained in one way
        if record[key] != value:
            raise ConfigError(f"{path} is of {key} {record[key]!r}, not {value!r}; choose another --out")
    cli.import_tensorflow()

    # ---- the searches and their table
    from cifar10_trainer import files

    trials, curves = Trials(base, path, record), {}
    for contender in tuners.CONTENDERS:
        seeds = range(FLAGS.fit_seeds if contender.way == tuners.FIT else FLAGS.seeds)
        curves[contender.name] = [tuners.search(contender, s, space(base), trials) for s in seeds]
    files.write_json(
        path.with_name(tuners.SEARCHES),
        {**records.made_by(records.given_command("compare_tuners.py")), "curves": curves},
        indent=None,
    )
    target = tuners.hard_target(record["trials"])
    print(f"\n{tuners.table(curves, target)}")
    if path.parent.resolve() == tuners.FOLDER:
        tuners.publish_comparison(curves, target)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, USAGE))
