"""What a training run is: frozen, validated dataclasses, to and from JSON.

Importing this module costs nothing: it knows names and ranges, not TensorFlow.
A value out of range raises `ConfigError`, whose text says what was received and what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError, unknown

DATASETS = ("cifar10", "digits", "folder")
STRATEGIES = ("auto", "none", "mirrored", "multi_worker")
PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")
PIXELS = ("unit", "centred", "standardised")
SPLITS = ("stratified", "last")
FLIPS = ("none", "random", "alternating")
FILLS = ("reflect", "nearest", "constant")
OPTIMIZERS = ("sgd", "adam", "adamw", "muon")
RECORDED = (  # beside a Config in config.json
    "class_names",
    "data_dir",
    "data_source",
    "fingerprint",
    "parameters",
    "command",
    "environment",
)
SCHEDULES = ("constant", "linear", "cosine", "step", "cyclic", "plateau")

_UNUSED = {  # settings that would change nothing
    "adam": ("momentum", "nesterov", "weight_decay", "bias_multiplier"),
    "adamw": ("momentum", "nesterov", "bias_multiplier"),
}


class _Section:
    """Checks the fields of a dataclass against their annotations, then their ranges (`_check`)."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _coerce(f.name, getattr(self, f.name), hints[f.name])
            object.__setattr__(self, f.name, value)
        self._check()

    def _check(self) -> None: ...

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise unknown(name, getattr(self, name), allowed)

    def _between(self, name: str, low: float, high: float, *, exclusive: bool = False) -> None:
        value = getattr(self, name)
        inside = low < value < high if exclusive else low <= value <= high
        if not (math.isfinite(value) and inside):
            how = "greater than {} and less than {}" if exclusive else "from {} to {}"
            raise ConfigError(f"{name} is {value}; allowed: {how.format(low, high)}")


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it: lists become tuples and whole numbers floats; anything else raises."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None:
            return None
        (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
    origin = typing.get_origin(hint) or hint
    if isinstance(origin, type) and issubclass(origin, _Section):
        if isinstance(value, Mapping):
            return _section_from_dict(origin, value, name)
    elif origin is tuple and isinstance(value, list | tuple):
        (item, *_) = typing.get_args(hint)
        return tuple(_coerce(name, v, item) for v in value)
    elif origin is Mapping and isinstance(value, Mapping):
        return {str(k): _tuples(v) for k, v in value.items()}
    if isinstance(value, bool) and origin is not bool:
        pass
    elif origin is float and isinstance(value, int | float):
        return float(value)
    elif origin is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(value, origin):
        return value
    raise ConfigError(f"{name} is {value!r}; allowed: a value of type {getattr(hint, '__name__', hint)}")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _section_from_dict(cls: type, values: Mapping[str, Any], where: str) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise unknown(f"key in {where}", key, names)
    return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Augmentation(_Section):
    """Random changes to training images; each image draws for itself, from (seed, step) alone.

    They are applied in the order of the fields. Lengths are in pixels, angles in turns (0.1 is
    36 degrees), zoom is a fraction of the image's side.
    """

    flip: str = (
        "none"  # horizontal: "random", or "alternating": once at random, then mirrored every other epoch
    )
    shift: int = 0  # up to this many pixels both ways, up, down, left and right
    rotation: float = 0.0
    zoom: float = 0.0
    fill: str = "reflect"  # what shift, rotation and zoom find outside the image; "constant" is black
    cutout: int = 0  # side of the square that is blanked
    mixup: float = 0.0  # alpha of the Beta distribution of the mixing share; 0: off
    cutmix: float = 0.0

    def _check(self) -> None:
        self._one_of("flip", FLIPS)
        self._one_of("fill", FILLS)
        self._between("shift", 0, 16)
        self._between("rotation", 0, 0.5)
        self._between("zoom", 0, 0.9)
        self._between("cutout", 0, 32)
        self._between("mixup", 0, 10)
        self._between("cutmix", 0, 10)
        if self.mixup and self.cutmix:
            raise ConfigError(f"mixup is {self.mixup} and cutmix is {self.cutmix}; allowed: one of the two")


@dataclass(frozen=True, kw_only=True)
class Optimizer(_Section):
    """How gradients become updates. The loss is the mean over the batch."""

    name: str = "sgd"
    learning_rate: float = 0.1  # the peak; the schedule scales it
    momentum: float = 0.0  # sgd and muon
    nesterov: bool = False  # sgd
    weight_decay: float = 0.0  # sgd, muon's non-matrix weights: added to the gradient; adamw: decoupled
    bias_multiplier: float = 1.0  # on the learning rate of batch-norm offsets; sgd and muon
    clip_norm: float | None = None  # of the whole gradient of one replica

    def _check(self) -> None:
        self._one_of("name", OPTIMIZERS)
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        for name in _UNUSED.get(self.name, ()):
            if getattr(self, name) != usual[name]:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, which {self.name} does not use; allowed: {usual[name]}"
                )
        self._between("learning_rate", 0, 100, exclusive=True)
        self._between("momentum", 0, 0.9999)
        self._between("weight_decay", 0, 1)
        self._between("bias_multiplier", 0, 1000)
        if self.clip_norm is not None:
            self._between("clip_norm", 0, 1e6, exclusive=True)


@dataclass(frozen=True, kw_only=True)
class Schedule(_Section):
    """The learning rate's course over the whole run, as a multiple of the optimizer's peak.

    All lengths are fractions of the run, so that a recipe anneals completely over any number of epochs.
    """

    name: str = "constant"
    warmup: float = 0.0  # fraction of the run spent rising linearly from `start` to 1
    start: float = 0.0
    end: float = 0.0  # linear, cosine: the last value; cyclic, plateau: the lowest
    drop: float = 0.1  # step, plateau: the factor of each drop
    drops: tuple[float, ...] = (0.5, 0.75)  # step: where in the run
    cycles: int = 4  # cyclic: triangles in the run
    patience: int = 5  # plateau: epochs without a better val_loss

    def _check(self) -> None:
        self._one_of("name", SCHEDULES)
        self._between("warmup", 0, 0.9)
        self._between("start", 0, 1)
        self._between("end", 0, 1)
        self._between("drop", 0, 1, exclusive=True)
        self._between("cycles", 1, 1000)
        self._between("patience", 1, 1000)
        if list(self.drops) != sorted(self.drops) or not all(0 < d < 1 for d in self.drops):
            raise ConfigError(f"drops is {self.drops}; allowed: rising fractions of the run between 0 and 1")
        if self.name == "plateau" and self.warmup:
            raise ConfigError(f"warmup is {self.warmup}; allowed with the plateau schedule: 0")


@dataclass(frozen=True, kw_only=True)
class Averaging(_Section):
    """Lookahead: every `every` steps the weights move to their running average, ever less of the way.

    average = a * average + (1 - a) * weights with a = decay**every * (step / steps)**3, then weights = average.
    """

    every: int = 0  # steps; 0: off
    decay: float = 0.95

    def _check(self) -> None:
        self._between("every", 0, 10_000)
        self._between("decay", 0, 1)


@dataclass(frozen=True, kw_only=True)
class Origin(_Section):
    """Where a recipe comes from and what it is said to reach there."""

    source: str = ""
    claim: float | None = None  # accuracy, 0-1, on the test images unless `source` says otherwise
    parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class Config(_Section):
    """One training run. `RECIPES` holds named ones; `dataclasses.replace` derives from them."""

    recipe: str = "custom"
    origin: Origin = field(default_factory=Origin)

    # data
    dataset: str = "cifar10"
    image_size: int = 32  # side that the images of a folder are resized to
    validation_fraction: float | None = (
        0.1  # of the training images; None: train on all, keep the last weights
    )
    validation_split: str = "stratified"  # "last": the last ones, as tutorials do
    validation_fold: int = 0  # stratified: which of the equal parts of that size, from 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    # model
    architecture: str = "fast"
    options: Mapping[str, Any] = field(default_factory=dict)  # of the architecture's build function
    pixels: str = (
        "standardised"  # "unit": 0-1; "centred": minus the mean; "standardised": and by the deviation
    )
    whitening: bool = False  # set the layer "whitening" to the data's patch whitening, and freeze it

    # optimisation
    epochs: float = 40.0
    batch_size: int = 512  # over all replicas
    # Sides of the training images, each for an equal share of the steps; the last stands for the images as they are,
    # the others are in proportion. Empty: as they are.
    sizes: tuple[int, ...] = ()
    label_smoothing: float = 0.0
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    averaging: Averaging = field(default_factory=Averaging)
    early_stopping: int | None = None  # epochs without a better val_loss
    validation_interval: int = 1  # epochs between validations; the last epoch always has one
    views: int = 1  # test-time averaging: 1 plain, 2 with the mirror image, 6 with diagonal shifts too
    target: float = 0.85  # validation accuracy whose time is reported
    seed: int = 0

    # where it runs
    strategy: str = "auto"
    precision: str = "auto"
    synchronize_batch_norm: bool = False

    def _check(self) -> None:
        if not re.fullmatch(r"[\w.+-]*\w", self.recipe, re.ASCII):  # it names the run folder
            raise ConfigError(f"recipe is {self.recipe!r}; allowed: letters, digits and . + - _")
        self._one_of("dataset", DATASETS)
        self._one_of("validation_split", SPLITS)
        self._one_of("pixels", PIXELS)
        self._one_of("strategy", STRATEGIES)
        self._one_of("precision", PRECISIONS)
        self._between("image_size", 8, 512)
        if self.image_size != 32 and self.dataset != "folder":
            raise ConfigError(f"image_size is {self.image_size}; allowed with the dataset {self.dataset}: 32")
        self._between("epochs", 0, 100_000, exclusive=True)
        self._between("batch_size", 1, 1_000_000)
        if self.validation_fraction is not None:
            self._between("validation_fraction", 0, 1, exclusive=True)
        self._between("label_smoothing", 0, 0.99)
        self._between("validation_interval", 1, 100_000)
        self._between("target", 0, 1)
        self._between("seed", 0, 2**31 - 1)
        self._check_fold()
        if self.views not in (1, 2, 6):
            raise ConfigError(f"views is {self.views}; allowed: 1, 2, 6")
        if self.early_stopping is not None:
            self._between("early_stopping", 1, 100_000)
        if any(not 8 <= s <= 512 for s in self.sizes):
            raise ConfigError(f"sizes is {self.sizes}; allowed: sides from 8 to 512 pixels")
        needs_validation = self.early_stopping is not None or self.schedule.name == "plateau"
        if needs_validation and self.validation_fraction is None:
            raise ConfigError(
                "validation_fraction is None, but early stopping and the plateau schedule watch val_loss;"
                " allowed: a fraction, or neither of them"
            )
        if needs_validation and self.validation_interval > 1:
            raise ConfigError(
                f"validation_interval is {self.validation_interval}, but early stopping and the plateau schedule"
                " watch val_loss after every epoch; allowed: 1, or neither of them"
            )

    def _check_fold(self) -> None:
        parts = int(1 / self.validation_fraction + 1e-9) if self.validation_fraction else 1
        if self.validation_split != "stratified":
            parts = 1
        if not 0 <= self.validation_fold < parts:
            raise ConfigError(
                f"validation_fold is {self.validation_fold}; allowed with the {self.validation_split} split and"
                f" validation_fraction {self.validation_fraction}: from 0 to {parts - 1}"
            )

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`. Raises ConfigError on an unknown key or a value out of range."""
        return _section_from_dict(cls, values, "the configuration")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Config:
        """The Config in a run's config.json, which also records what the run found."""
        return cls.from_dict({k: v for k, v in record.items() if k not in RECORDED})

    def override(self, **values: Any) -> Config:
        """A copy with `values` set; `optimizer__learning_rate=0.1` reaches into a section.

        Raises ConfigError on an unknown name or a value out of range.
        """
        changes: dict[str, Any] = {}
        parts: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            section, _, key = name.partition("__")
            if section not in (f.name for f in dataclasses.fields(self)):
                raise unknown("setting", section, [f.name for f in dataclasses.fields(self)])
            if key:
                parts.setdefault(section, {})[key] = value
            else:
                changes[section] = value
        # All of a section's at once: two values may only be right together.
        for section, new in parts.items():
            current = changes.get(section, getattr(self, section))
            if isinstance(current, Mapping):
                changes[section] = {**current, **new}
                continue
            if not dataclasses.is_dataclass(current):
                name = f"{section}__{next(iter(new))}"
                raise unknown("setting", name, [f.name for f in dataclasses.fields(self)])
            allowed = [f.name for f in dataclasses.fields(current)]
            for key in new:
                if key not in allowed:
                    raise unknown(f"setting in {section}", key, allowed)
            changes[section] = dataclasses.replace(current, **new)  # type: ignore[type-var]
        return dataclasses.replace(self, **changes)
