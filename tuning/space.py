"""Hyperparameters -> Config, and nothing else: importing this costs no TensorFlow.

A space is a function of KerasTuner's `hp` that gives a Config; `Space` is the one that the command line makes.
To add a hyperparameter, add its line to SPACE.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cifar10_trainer.config import Augmentation, Config
from cifar10_trainer.errors import ConfigError, unknown
from cifar10_trainer.models import check_options


@dataclass(frozen=True)
class Parameter:
    """Where a hyperparameter goes, and its range unless another is asked for.

    setting: as `Config.override` names it. Of several numbers the first is searched, and the others keep their
    proportion; of a whole section of augmentations it is the strength, 1 being the recipe's own.
    """

    setting: str
    low: float
    high: float
    relative: bool = False  # low, high and a linear step are multiples of the recipe's own value
    log: bool = False  # even in the logarithm; `step` is then a factor
    step: float | None = None


SPACE = {
    "filters": Parameter("options__filters", 0.5, 1.5, relative=True, step=0.25),
    "dropout": Parameter("options__dropout", 0.0, 0.5, step=0.05),
    "learning_rate": Parameter("optimizer__learning_rate", 0.25, 4, relative=True, log=True),
    "weight_decay": Parameter("optimizer__weight_decay", 0.1, 10, relative=True, log=True),
    "batch_size": Parameter("batch_size", 0.5, 2, relative=True, log=True, step=2),
    "label_smoothing": Parameter("label_smoothing", 0.0, 0.4, step=0.05),
    "augmentation": Parameter("augmentation", 0.0, 2.0, step=0.5),
    "epochs": Parameter("epochs", 0.5, 2, relative=True, log=True),
}
DEFAULT_SPACE = ("filters", "dropout", "learning_rate")
_OPTION_NAMES = {("leaky", "options__filters"): "options__blocks"}  # what an architecture calls it


def parse(texts: Sequence[str]) -> dict[str, tuple[float, float] | None]:
    """["dropout", "learning_rate=0.1:2"] -> {"dropout": None, "learning_rate": (0.1, 2.0)}. Raises ConfigError."""
    ranges: dict[str, tuple[float, float] | None] = {}
    for text in texts:
        name, equals, rest = (part.strip() for part in text.partition("="))
        if name not in SPACE:
            raise unknown("hyperparameter", name, SPACE)
        try:
            low, high = (float(x) for x in rest.split(":")) if equals else (0, 1)
        except ValueError:
            raise ConfigError(f"the range of {name} is {rest!r}; allowed: low:high, two numbers") from None
        if not low < high:
            raise ConfigError(
                f"the range of {name} is {rest}, which is empty; allowed: low:high with low < high"
            )
        ranges[name] = (low, high) if equals else None
    if not ranges:
        raise ConfigError(f"the space is empty; allowed: one or more of {', '.join(SPACE)}")
    return ranges


@dataclass(frozen=True)
class Space:
    """The space around `base` of the hyperparameters in `ranges`: called with `hp`, it gives a Config.

    ranges: name of SPACE -> (low, high), or None for its usual range. `base` itself is at the hyperparameters'
    defaults, as far as the ranges hold it. Raises ConfigError where a hyperparameter cannot be, or has no effect.
    """

    base: Config
    ranges: dict[str, tuple[float, float] | None]

    def __post_init__(self) -> None:
        for name in self.ranges:
            option = self._setting(name).partition("__")
            if option[0] == "options":
                check_options(self.base.architecture, {option[2]: None})
            low, high, _ = self._range(name)
            if SPACE[name].log and low <= 0:
                raise ConfigError(
                    f"the range of {name} begins at {low:g}, but is searched by its logarithm;"
                    f" allowed: low greater than 0, as in --space={name}=0.0001:0.01"
                )
            if self._config({name: low}) == self._config({name: high}):
                raise ConfigError(
                    f"{name} changes nothing in {self.base.recipe}; allowed: a space without it"
                )

    def __call__(self, hp: Any) -> Config:
        values = {}
        for name in self.ranges:
            (low, high, step), own = self._range(name), _first(self._recipe_value(name))
            draw = hp.Int if isinstance(own, int) else hp.Float
            sampling = "log" if SPACE[name].log else "linear"
            # Five digits are more than any of them is known to; the Config then reads well.
            default = float(f"{min(max(own, low), high):.5g}")
            value = draw(name, low, high, step=step, sampling=sampling, default=type(own)(default))
            values[name] = type(own)(f"{value:.5g}")
        return self._config(values)

    def _setting(self, name: str) -> str:
        setting = SPACE[name].setting
        return _OPTION_NAMES.get((self.base.architecture, setting), setting)

    def _recipe_value(self, name: str) -> Any:
        """The recipe's own value; an option that it leaves open has the architecture's default."""
        section, _, key = self._setting(name).partition("__")
        value = getattr(self.base, section)
        if section != "options":
            return getattr(value, key) if key else value
        if key in value:
            return value[key]
        build = importlib.import_module(f"cifar10_trainer.models.{self.base.architecture}").build
        return inspect.signature(build).parameters[key].default

    def _range(self, name: str) -> tuple[Any, Any, Any]:
        """(low, high, step) in the units of the setting, whole numbers where it is one."""
        parameter, own = SPACE[name], _first(self._recipe_value(name))
        low, high = self.ranges[name] or (parameter.low, parameter.high)
        step: float | None = parameter.step
        if parameter.relative and self.ranges[name] is None:
            low, high = low * own, high * own
        if parameter.relative and not parameter.log and step is not None:
            step = step * own
        if isinstance(own, int):
            return round(low), round(high), max(1, round(step or 1))
        return low, high, step

    def _config(self, values: dict[str, Any]) -> Config:
        changes = {self._setting(n): _scaled(self._recipe_value(n), value) for n, value in values.items()}
        return self.base.override(**changes)


def _first(value: Any) -> float | int:
    """The number that is searched."""
    if isinstance(value, Augmentation):
        return 1.0
    while isinstance(value, tuple):
        value = value[0]
    return value


def _scaled(own: Any, value: Any) -> Any:
    """`own` with `value` for its first number, and the rest of it in proportion."""
    if isinstance(own, Augmentation):
        changes = {key: getattr(own, key) * value for key in ("shift", "rotation", "zoom", "cutout")}
        whole = {key: round(changes[key]) for key in ("shift", "cutout")}
        return dataclasses.replace(own, **{**changes, **whole})
    if not isinstance(own, tuple):
        return value
    first = _first(own)
    if not first:
        raise ConfigError(
            f"{own} begins with 0, so that nothing is in proportion to it; allowed: another recipe"
        )

    def scale(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(scale(p) for p in part)
        part = part * value / first
        return max(1, round(part)) if isinstance(first, int) else min(0.9, float(f"{part:.5g}"))  # a rate

    return scale(own)
