"""The space of the command line: hyperparameters -> Config. This module does not import TensorFlow.

A space is any function of KerasTuner's `hp` that returns a Config. `Space` is such a function. To add a hyperparameter
to the command line, add a line to SPACE.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar10_trainer.config import Augmentation, Config
from cifar10_trainer.errors import ConfigError, RunError, shown, unknown
from cifar10_trainer.models import build, check_options


@dataclass(frozen=True)
class Parameter:
    """The setting of a hyperparameter, and its default range.

    Attributes:
        setting: the name that `Config.override` takes. If the setting has several numbers, the hyperparameter is the first
            one, and the others keep their ratios to it. For an augmentation, it is the strength; the recipe's is 1.
        low: the lower limit.
        high: the upper limit.
        whole: whether the values are whole numbers.
        relative: whether the limits and a linear step are multiples of the recipe's value.
        log: whether the values are drawn from a logarithmic scale; `step` is then a factor.
        step: the step between two values; None: any value.
    """

    setting: str
    low: float
    high: float
    whole: bool = False
    relative: bool = False
    log: bool = False
    step: float | None = None


SPACE = {
    "filters": Parameter("options__filters", 0.5, 1.5, whole=True, relative=True, step=0.25),
    "dropout": Parameter("options__dropout", 0.0, 0.5, step=0.05),
    "learning_rate": Parameter("optimizer__learning_rate", 0.25, 4, relative=True, log=True),
    "weight_decay": Parameter("optimizer__weight_decay", 0.1, 10, relative=True, log=True),
    "batch_size": Parameter("batch_size", 0.5, 2, whole=True, relative=True, log=True, step=2),
    "label_smoothing": Parameter("label_smoothing", 0.0, 0.4, step=0.05),
    "augmentation": Parameter("augmentation", 0.0, 2.0, step=0.5),
    "epochs": Parameter("epochs", 0.5, 2, relative=True, log=True),
}
DEFAULT_SPACE = ("filters", "dropout", "learning_rate")
# (architecture, setting) -> the architecture's own name of that setting
_OPTION_NAMES = {("leaky", "options__filters"): "options__blocks"}


def parse(texts: Sequence[str]) -> dict[str, tuple[float, float] | None]:
    """Parses hyperparameters with their ranges.

    Args:
        texts: each a name of SPACE, or "name=low:high", as in ["dropout", "learning_rate=0.1:2"].

    Returns:
        name -> (low, high), or None for the default range, as in {"dropout": None, "learning_rate": (0.1, 2.0)}.

    Raises:
        ConfigError: if a name is unknown or a range is not valid, or if there is no hyperparameter.
    """
    ranges: dict[str, tuple[float, float] | None] = {}
    for text in texts:
        name, equals, rest = (part.strip() for part in text.partition("="))
        if name not in SPACE:
            raise unknown("hyperparameter", name, SPACE)
        try:
            low, high = (float(x) for x in rest.split(":")) if equals else (0, 1)
        except ValueError:
            raise ConfigError(
                f"the range of {name} is {shown(rest)}; allowed: low:high, two numbers"
            ) from None
        if not (low < high and math.isfinite(high - low)):
            raise ConfigError(
                f"the range of {name} is {shown(rest)}; allowed: low:high, two finite numbers with low < high"
            )
        ranges[name] = (low, high) if equals else None
    if not ranges:
        raise ConfigError(f"the space is empty; allowed: one or more of {', '.join(SPACE)}")
    return ranges


@dataclass(frozen=True)
class Space:
    """A space around a recipe: a function of KerasTuner's `hp` that returns a Config.

    The default value of a hyperparameter is the recipe's value, or the nearest limit of its range.

    Attributes:
        base: the recipe.
        ranges: name of SPACE -> (low, high), or None for the default range.

    Raises:
        ConfigError: if the recipe does not have a hyperparameter, a range is not valid, or a hyperparameter has no effect.
    """

    base: Config
    ranges: dict[str, tuple[float, float] | None]

    def __post_init__(self) -> None:
        for name in self.ranges:
            option = self._setting(name).partition("__")
            if option[0] == "options":
                try:
                    check_options(self.base.architecture, {option[2]: None})
                except ConfigError as error:
                    rest = ",".join(other for other in self.ranges if other != name) or "learning_rate"
                    raise ConfigError(
                        f"{str(error).rstrip('.')}; or leave {name} out: --space={rest}"
                    ) from None
            low, high, step = self._range(name)
            if not SPACE[name].log and step is not None and high - low < step * (1 - 1e-9):
                raise ConfigError(
                    f"the range of {name} is {low:g}:{high:g}, narrower than its step; allowed: {step:g} or more from low to high"
                )
            if SPACE[name].log and step is not None and high < low * step:
                raise ConfigError(
                    f"the range of {name} is {low:g}:{high:g}, but its values grow by the factor {step:g}; allowed: from low to"
                    f" {step:g} times low or more"
                )
            if isinstance(low, int) and low < 1:
                raise ConfigError(f"the range of {name} begins at {low}; allowed: whole numbers from 1")
            if name == "dropout" and not (low >= 0 and high < 1):
                raise ConfigError(
                    f"the range of {name} is {low:g}:{high:g}; allowed: rates from 0 to less than 1"
                )
            if SPACE[name].log and low <= 0:
                raise ConfigError(
                    f"the range of {name} begins at {low:g}, but its scale is logarithmic;"
                    f" allowed: low greater than 0, as in --space={name}=0.0001:0.01"
                )
            if self._end(name, low) == self._end(name, high):
                raise ConfigError(
                    f"{name} changes nothing in {self.base.recipe}; allowed: a space without it"
                )

    def __call__(self, hp: Any) -> Config:
        """Draws the hyperparameters.

        Args:
            hp: KerasTuner's HyperParameters.

        Returns:
            The Config to train.
        """
        values = {}
        for name in self.ranges:
            (low, high, step), own = self._range(name), self._own(name)
            draw = hp.Int if SPACE[name].whole else hp.Float
            sampling = "log" if SPACE[name].log else "linear"
            default = _short(type(own)(min(max(own, low), high)))
            values[name] = _short(draw(name, low, high, step=step, sampling=sampling, default=default))
        return self.config(values)

    def check_networks(self, input_shape: Sequence[int], num_classes: int) -> None:
        """Raises ConfigError where both ends of a range give the same network, as with dropout after no layer. Imports Keras."""
        from cifar10_trainer.models.own import digest

        for name in self.ranges:
            if not self._setting(name).startswith("options__"):
                continue
            low, high, _ = self._range(name)
            try:
                first, second = (
                    digest(build(self.config({name: x}), input_shape=input_shape, num_classes=num_classes))
                    for x in (low, high)
                )
            except (ConfigError, RunError):  # only the trials there fail, and say why
                continue
            if first == second:
                raise ConfigError(
                    f"{name} changes nothing in {self.base.recipe}: {low:g} and {high:g} give the same network;"
                    " allowed: a space without it"
                )

    def _setting(self, name: str) -> str:
        """The name that `Config.override` takes."""
        setting = SPACE[name].setting
        return _OPTION_NAMES.get((self.base.architecture, setting), setting)

    def _recipe_value(self, name: str) -> Any:
        """The recipe's value of a setting; if the recipe has none, the architecture's default."""
        section, _, key = self._setting(name).partition("__")
        value = getattr(self.base, section)
        if section != "options":
            return getattr(value, key) if key else value
        if key in value:
            return value[key]
        build = importlib.import_module(f"cifar10_trainer.models.{self.base.architecture}").build
        return inspect.signature(build).parameters[key].default

    def _range(self, name: str) -> tuple[Any, Any, Any]:
        """(low, high, step) in the units of the setting; integers if the parameter is whole."""
        parameter, own = SPACE[name], self._own(name)
        low, high = self.ranges[name] or (parameter.low, parameter.high)
        step: float | None = parameter.step
        if parameter.relative and self.ranges[name] is None:
            low, high = low * own, high * own
        if parameter.relative and not parameter.log and step is not None:
            step = step * own
        if parameter.whole:
            return round(low), round(high), max(1, round(step or 1))
        return low, high, step

    def _own(self, name: str) -> float | int:
        """The recipe's value of the hyperparameter. Raises ConfigError where that is no number."""
        recipe_value = self._recipe_value(name)
        value, whole = _first(recipe_value), SPACE[name].whole
        if isinstance(recipe_value, tuple) and value == 0:
            raise ConfigError(
                f"{recipe_value} begins with 0, to which the other numbers have no ratio; allowed: another recipe"
            )
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            setting = self._setting(name).replace("__", ".")
            kind = "whole numbers" if whole else "numbers"
            raise ConfigError(f"{setting} is {shown(recipe_value)}; allowed in a search over {name}: {kind}")
        return value if whole else float(value)

    def _end(self, name: str, value: float | int) -> Config:
        """The recipe at one end of a range. Raises ConfigError where the end is not allowed."""
        try:
            return self.config({name: value})
        except ConfigError as error:
            raise ConfigError(
                f"{str(error).rstrip('.')}; the range of {name} ends there; another one: --space={name}=LOW:HIGH"
            ) from error

    def config(self, values: Mapping[str, Any]) -> Config:
        """The recipe with these values of hyperparameters, by their names in SPACE."""
        changes = {self._setting(n): _scaled(self._recipe_value(n), value) for n, value in values.items()}
        return self.base.override(**changes)


def _short(value: float | int) -> float | int:
    """A number of five digits: they are enough, and the numbers in the Config stay short. Whole numbers as they are."""
    return value if isinstance(value, int) else float(f"{value:.5g}")


def _first(value: Any) -> float | int:
    """The number that the hyperparameter replaces; for an augmentation, its strength."""
    if isinstance(value, Augmentation):
        return 1.0
    while isinstance(value, tuple) and value:
        value = value[0]
    return value


def _scaled(own: Any, value: Any) -> Any:
    """`own` with `value` as its first number. The other numbers keep their ratios to the first one; rates end at 0.9."""
    if isinstance(own, Augmentation):
        amounts = ("shift", "rotation", "zoom", "cutout", "brightness", "contrast")
        changes = {key: getattr(own, key) * value for key in amounts}
        whole = {key: round(changes[key]) for key in ("shift", "cutout")}
        return dataclasses.replace(own, **{**changes, **whole})
    if not isinstance(own, tuple):
        return value
    first = _first(own)

    def scale(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(scale(p) for p in part)
        part = part * value / first
        return max(1, round(part)) if isinstance(first, int) else min(0.9, float(f"{part:.5g}"))  # a rate

    return scale(own)
