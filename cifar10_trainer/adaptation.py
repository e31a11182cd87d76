"""Settings that depend on the number of images: a recipe for 50,000 images, adapted to 30 or to 300,000."""

from __future__ import annotations

import math
from typing import Any

from .config import Config

SMALLEST_BATCH = 8  # fewer images say too little for batch norm
STEPS_PER_EPOCH = 10  # at least; a batch is a power of two, and never larger than the recipe's
STEPS = 500  # of a run, at least; an annealed run of fewer steps has hardly begun
IMAGES = 2_000_000  # of a run, all epochs together, about as many as 40 epochs of CIFAR-10
EPOCHS = 8  # that IMAGES leaves to the largest data sets
HELD_OUT = 200  # images that validate, at least, up to the share SHARE
SHARE = 0.2
VALIDATIONS = 50  # of a run, at most


def adapt(config: Config, n: int, own_validation: bool, replicas: int = 1) -> Config:
    """Chooses the settings that `config.adapt` names.

    Args:
        config: whose values stay where they suit the number of images.
        n: training images, before validation images are held out.
        own_validation: whether the data set has validation images of its own.
        replicas: how many share a batch.

    Returns:
        A Config of whole values: its `adapt` is empty.
    """
    values: dict[str, Any] = {name: getattr(config, name) for name in config.adapt}
    fraction = config.validation_fraction
    if "validation_fraction" in values and fraction is not None and not own_validation:
        fraction = max(fraction, min(SHARE, float(f"{HELD_OUT / max(1, n):.4g}")))
        values["validation_fraction"] = fraction
    left = n if own_validation or fraction is None else n - round(n * fraction)
    batch = config.batch_size
    if "batch_size" in values:
        suits = 2 ** max(0, math.floor(math.log2(max(1, left / STEPS_PER_EPOCH))))
        batch = min(batch, max(SMALLEST_BATCH, suits), max(1, left))
        batch = values["batch_size"] = max(1, batch // replicas) * replicas
    epochs = config.epochs
    if "epochs" in values:
        steps = max(1, left // batch)
        most = max(EPOCHS, round(IMAGES / max(1, left)))
        epochs = values["epochs"] = min(max(epochs, math.ceil(STEPS / steps)), most)
    if (
        "validation_interval" in values
        and config.early_stopping is None
        and config.schedule.name != "plateau"
    ):
        values["validation_interval"] = max(config.validation_interval, math.ceil(epochs / VALIDATIONS))
    return config.override(**values, adapt=())


def in_words(
    before: Config, after: Config, n: int, advice: str = "--set NAME=VALUE sets another"
) -> str | None:
    """What `adapt` changed, in a line that ends with `advice`; None where it changed nothing."""
    changed = [
        f"{name} {getattr(after, name):g} (recipe: {getattr(before, name):g})"
        for name in before.adapt
        if getattr(before, name) != getattr(after, name)
    ]
    if not changed:
        return None
    return f"adapted to {n:,} images: {', '.join(changed)}; {advice}"
