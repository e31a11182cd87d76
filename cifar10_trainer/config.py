"""What a training run is: frozen, validated dataclasses, to and from JSON.

A value out of range raises `ConfigError`, whose text says what was received and what is allowed. This module does not
import TensorFlow.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError, check_number, check_type, shown, unknown

DATASETS = ("cifar10", "digits", "folder")
STRATEGIES = ("auto", "none", "mirrored", "multi_worker")
PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")
PIXELS = ("unit", "centred", "standardised")
SPLITS = ("stratified", "last")
RESIZES = ("squash", "crop", "pad")
CLASS_WEIGHTS = ("none", "balanced")
# What a run may choose by the number of its images, see `adaptation`.
ADAPTABLE = ("batch_size", "epochs", "validation_fraction", "validation_interval")
FLIPS = ("none", "random", "alternating")
FILLS = ("reflect", "nearest", "constant")
OPTIMIZERS = ("sgd", "adam", "adamw", "muon")
RECORDED = (  # what config.json holds besides the Config
    "class_names",
    "data_dir",
    "data_name",
    "data_source",
    "fingerprint",
    "parameters",
    "own_model",
    "command",
    "environment",
)
# Settings, of a Config or of one of its sections, that `to_dict` leaves out at their defaults.
YOUNGER = ("resize", "class_weights", "adapt", "views_share", "cutout_warmup", "brightness", "contrast")
FLOAT32_TINY, FLOAT32_HUGE = 2.0**-126, (2 - 2.0**-23) * 2.0**127
OPTION_DEPTH = 5  # of the lists in an option
SCHEDULES = ("constant", "linear", "cosine", "step", "cyclic", "plateau")

_UNUSED = {  # optimizer -> settings that it ignores, so that setting one is an error
    "adam": ("momentum", "nesterov", "weight_decay", "bias_multiplier"),
    "adamw": ("momentum", "nesterov", "bias_multiplier"),
}


def _written(value: Any) -> Any:
    """A dataclass, with those inside it, as a dict without the fields of YOUNGER that have their default; others as they are."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {f.name: _written(v) for f, v in fields.items() if f.name not in YOUNGER or v != f.default}


def check_views(views: int, views_share: float) -> None:
    """Raises ConfigError where there is no such TTA."""
    if views not in (1, 2, 6):
        raise ConfigError(f"views is {shown(views)}; allowed: 1, 2, 6")
    check_number("views_share", views_share, numbers.Real, math.nextafter(0, 1), 1, words="above 0, up to 1")


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
        if not inside:
            how = "greater than {} and less than {}" if exclusive else "from {} to {}"
            raise ConfigError(f"{name} is {shown(value)}; allowed: {how.format(low, high)}")


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` with the type `hint`: a list becomes a tuple and a whole number a float. Any other type raises ConfigError."""
    value = python_value(value)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None:
            return None
        (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
    origin = typing.get_origin(hint) or hint
    if isinstance(origin, type) and issubclass(origin, _Section):
        if isinstance(value, Mapping):
            return section_from_dict(origin, value, name)
    elif origin is tuple and isinstance(value, list | tuple):
        (item, *_) = typing.get_args(hint)
        return tuple(_coerce(name, v, item) for v in value)
    elif origin is Mapping and isinstance(value, Mapping):
        return {str(k): _option(f"{name}.{k}", v) for k, v in value.items()}
    if isinstance(value, bool) and origin is not bool:
        pass
    elif origin is float and isinstance(value, int | float):
        return _float(name, value)
    elif origin is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(value, origin):
        return value
    raise ConfigError(f"{name} is {shown(value)}; allowed: a value of type {getattr(hint, '__name__', hint)}")


def _float(name: str, value: float) -> float:
    """`value` as a float that float32 can hold, as all arithmetic of a run is in it. Raises ConfigError."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {shown(value)}; allowed: a finite number")
    size = abs(value)
    if not (value == 0 or FLOAT32_TINY <= size <= FLOAT32_HUGE):
        allowed = f"0, or a size from {FLOAT32_TINY:.3g} to {FLOAT32_HUGE:.3g}, which float32 holds"
        raise ConfigError(f"{name} is {shown(value)}; allowed: {allowed}")
    return float(value)


def _option(name: str, value: Any, depth: int = 0) -> Any:
    """The value of an option: lists as tuples, numbers within their ranges. Raises ConfigError."""
    value = python_value(value)
    if isinstance(value, list | tuple):
        if depth >= OPTION_DEPTH:
            raise ConfigError(f"{name} is {shown(value)}; allowed: lists that are nested {OPTION_DEPTH} deep")
        return tuple(_option(name, v, depth + 1) for v in value)
    if isinstance(value, float):
        return _float(name, value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{name} is {shown(value)}; allowed: an integer of 64 bits")
    if not (value is None or isinstance(value, str | int)):
        raise ConfigError(
            f"{name} is {shown(value)}; allowed: a number, a text, true, false, null, or a list of these"
        )
    return value


def python_value(value: Any) -> Any:
    """A scalar or array of NumPy as Python's number or lists, without an import of NumPy."""
    return value.tolist() if type(value).__module__ == "numpy" else value


def section_from_dict(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A section, or a whole Config, of these fields. Raises ConfigError on an unknown one, or a value out of range."""
    check_type(where, values, Mapping, "names with their values")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise unknown(f"key in {where}", key, names)
    return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Augmentation(_Section):
    """Random changes to the training images, a new draw for each image and epoch, determined by the seed.

    They are applied in the order of the attributes.

    Attributes:
        flip: horizontally: "none", "random", or "alternating", which is at random in epoch 1 and then the opposite of the epoch
            before.
        shift: the most pixels along each axis, in either direction, 0 to 16.
        rotation: the largest angle in turns (0.1 is 36 degrees), in either direction, 0 to 0.5.
        zoom: 1 - zoom to 1 + zoom of the image's height is visible and, independently, of its width, 0 to 0.9.
        fill: what shift, rotation and zoom show outside the image: "reflect", "nearest", or "constant", which is black.
        cutout: the side of a grey square in pixels, 0 to 32.
        cutout_warmup: the epochs in which the share of the images with a cutout rises from 0 to 1, 0 to 100,000: of epoch 1 it is 0,
            of epoch cutout_warmup + 1 it is 1. Unlike the learning rate's, this warm-up does not depend on the length of the run:
            the more often the network has seen an image, the more there is to gain from hiding a part of it.
        brightness: the most that is added to all pixels of an image, in either direction, as a share of black to white, 0 to 1.
        contrast: the distance of all pixels to middle grey is scaled by 1 - contrast to 1 + contrast, 0 to 1.
        mixup: alpha of the Beta distribution that the mixing weight is drawn from, 0 (off) to 10.
        cutmix: the same for cutmix. Only one of the two may be on.
    """

    flip: str = "none"
    shift: int = 0
    rotation: float = 0.0
    zoom: float = 0.0
    fill: str = "reflect"
    cutout: int = 0
    cutout_warmup: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return bool(self.mixup or self.cutmix)

    def _check(self) -> None:
        self._one_of("flip", FLIPS)
        self._one_of("fill", FILLS)
        self._between("shift", 0, 16)
        self._between("rotation", 0, 0.5)
        self._between("zoom", 0, 0.9)
        self._between("cutout", 0, 32)
        self._between("cutout_warmup", 0, 100_000)
        self._between("brightness", 0, 1)
        self._between("contrast", 0, 1)
        self._between("mixup", 0, 10)
        self._between("cutmix", 0, 10)
        if self.mixup and self.cutmix:
            raise ConfigError(f"mixup is {self.mixup} and cutmix is {self.cutmix}; allowed: one of the two")


@dataclass(frozen=True, kw_only=True)
class Optimizer(_Section):
    """How gradients become updates. The loss is the mean over the batch.

    Attributes:
        name: "sgd", "adam", "adamw" or "muon".
        learning_rate: the peak, above 0 and below 100; the schedule scales it. Of muon: the kernels' rate; sgd, for what muon
            leaves to it, has six times that.
        momentum: of sgd, and of sgd for what muon leaves to it, 0 to 0.9999. Muon's own is 0.6.
        nesterov: of sgd, and of sgd for what muon leaves to it: whether the momentum is Nesterov's.
        weight_decay: of sgd, and of sgd for what muon leaves to it: L2, in the gradient. Of adamw: decoupled. 0 to 1.
        bias_multiplier: of sgd and muon: times the learning rate, for batch-norm offsets (beta), 0 to 1000.
        clip_norm: the largest norm of the whole gradient of a step, before weight_decay and bias_multiplier, above 0; None: no limit.
    """

    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    bias_multiplier: float = 1.0
    clip_norm: float | None = None

    def _check(self) -> None:
        self._one_of("name", OPTIMIZERS)
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        unused = [name for name in _UNUSED.get(self.name, ()) if getattr(self, name) != usual[name]]
        if unused:
            found = ", ".join(f"{name} is {shown(getattr(self, name))}" for name in unused)
            allowed = ", ".join(str(usual[name]) for name in unused)
            at_once = (
                f'--set \'optimizer={{"name": "{self.name}", "learning_rate": 0.001}}\' sets all of them'
            )
            raise ConfigError(f"{found}, which {self.name} does not use; allowed: {allowed}; {at_once}")
        self._between("learning_rate", 0, 100, exclusive=True)
        self._between("momentum", 0, 0.9999)
        self._between("weight_decay", 0, 1)
        self._between("bias_multiplier", 0, 1000)
        if self.clip_norm is not None:
            self._between("clip_norm", 0, 1e6, exclusive=True)


@dataclass(frozen=True, kw_only=True)
class Schedule(_Section):
    """The learning rate over the whole run, as a multiple of the optimizer's peak rate.

    All lengths are fractions of the run, so a recipe anneals to its end over any number of epochs.

    Attributes:
        name: "constant", "linear", "cosine", "step", "cyclic" or "plateau".
        warmup: the fraction of the run in which the rate rises linearly from `start` to 1, 0 to 0.9. Of plateau: 0.
        start: the first value of the warm-up, 0 to 1.
        end: of linear and cosine the last value, of cyclic and plateau the lowest one, 0 to 1.
        drop: of step and plateau: the rate is multiplied by this at each drop, above 0 and below 1.
        drops: of step: the drops, as rising fractions of the run.
        cycles: of cyclic: triangles in the run, 1 to 1000.
        patience: of plateau: epochs without a val_loss that is lower by 1e-4, as Keras asks, before a drop, 1 to 1000.
    """

    name: str = "constant"
    warmup: float = 0.0
    start: float = 0.0
    end: float = 0.0
    drop: float = 0.1
    drops: tuple[float, ...] = (0.5, 0.75)
    cycles: int = 4
    patience: int = 5

    def _check(self) -> None:
        self._one_of("name", SCHEDULES)
        self._between("warmup", 0, 0.9)
        self._between("start", 0, 1)
        self._between("end", 0, 1)
        self._between("drop", 0, 1, exclusive=True)
        self._between("cycles", 1, 1000)
        self._between("patience", 1, 1000)
        if list(self.drops) != sorted(self.drops) or not all(0 < d < 1 for d in self.drops):
            raise ConfigError(
                f"drops is {shown(self.drops)}; allowed: rising fractions of the run between 0 and 1"
            )
        if self.name == "plateau" and self.warmup:
            raise ConfigError(f"warmup is {self.warmup}; allowed with the plateau schedule: 0")


@dataclass(frozen=True, kw_only=True)
class Averaging(_Section):
    """Lookahead: every `every` steps the running average of the weights replaces the weights.

    average = a * average + (1 - a) * weights with a = decay**every * (step / steps)**3, then weights = average. As a grows
    with the step, the average reaches further back towards the end of the run. Zhang et al. 2019, arXiv:1907.08610, with
    airbench's schedule of a.

    Attributes:
        every: steps, 0 (off) to 10,000.
        decay: 0 to 1.
    """

    every: int = 0
    decay: float = 0.95

    def _check(self) -> None:
        self._between("every", 0, 10_000)
        self._between("decay", 0, 1)


@dataclass(frozen=True, kw_only=True)
class Origin(_Section):
    """Where a recipe comes from, and what its source claims.

    Attributes:
        source: in words.
        claim: the test accuracy, 0-1, unless the comment at the recipe says otherwise; None: no claim.
        parameters: of the network.
    """

    source: str = ""
    claim: float | None = None
    parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class Config(_Section):
    """Everything that determines a training run. `RECIPES` holds named ones, and `override` derives others from them.

    Attributes:
        recipe: its name, a part of the run folder's: up to 100 letters, digits and . + - _
        origin: where it comes from. It changes nothing.
        dataset: "cifar10", "digits" or "folder".
        image_size: the side in pixels to which the images of a folder are resized, 8 to 512.
        resize: how: "squash" the whole image, "crop" to its middle, or "pad" it with black.
        validation_fraction: of the training images, held out. None: none is, and the last weights are kept, unless the
            data set has validation images of its own.
        validation_split: "stratified": the same share of each class; "last": the last images, as tutorials do.
        validation_fold: of stratified: which of the 1 / validation_fraction parts is held out, from 0.
        augmentation: random changes to the training images.
        architecture: a name in `cifar10_trainer.models.ARCHITECTURES`.
        options: keyword arguments of the architecture's build function.
        pixels: how the network scales them: "standardised" is minus the channel mean, over the deviation; "centred" minus the
            mean; "unit" 0-1.
        whitening: whether the layer "whitening" is set to the patch whitening of the images, and frozen.
        epochs: above 0 and below 100,000. A fraction ends the run within an epoch.
        batch_size: the global one, over all replicas.
        sizes: progressive resizing: the sides of the training images, each for an equal share of the steps, so that training
            starts on small images. The last one stands for the full size, and the others are in proportion to it. Empty: off.
        label_smoothing: 0 to 0.99.
        class_weights: "none", or "balanced": the loss of an image counts n / (classes * images of its class) times, over the
            training images.
        optimizer: how gradients become updates.
        schedule: the learning rate over the run.
        averaging: lookahead.
        early_stopping: epochs without a better val_loss after which the run ends; None: it does not end early.
        validation_interval: epochs between validations. The last epoch always has one.
        views: of test-time augmentation (TTA), which averages their logits: 1 is the image alone, 2 adds the mirror
            image, 6 also diagonal shifts.
        views_share: of the images, those of which the model is least sure, that get the further views; above 0, up to 1.
        target: the validation accuracy, 0-1, at which the time is reported.
        seed: 0 to 2**31 - 1.
        adapt: the settings, of batch_size, epochs, validation_fraction and validation_interval, that the run chooses by the
            number of its images.
        strategy: "auto", "none", "mirrored" or "multi_worker".
        precision: "auto", "float32", "mixed_bfloat16" or "mixed_float16".
        synchronize_batch_norm: whether batch norm computes its statistics over all replicas.
    """

    recipe: str = "custom"
    origin: Origin = field(default_factory=Origin)

    # data
    dataset: str = "cifar10"
    image_size: int = 32
    resize: str = "squash"
    validation_fraction: float | None = 0.1
    validation_split: str = "stratified"
    validation_fold: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    # model
    architecture: str = "fast"
    options: Mapping[str, Any] = field(default_factory=dict)
    pixels: str = "standardised"
    whitening: bool = False

    # optimisation
    epochs: float = 40.0
    batch_size: int = 512
    sizes: tuple[int, ...] = ()
    label_smoothing: float = 0.0
    class_weights: str = "none"
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    averaging: Averaging = field(default_factory=Averaging)
    early_stopping: int | None = None
    validation_interval: int = 1
    views: int = 1
    views_share: float = 1.0
    target: float = 0.85
    seed: int = 0
    adapt: tuple[str, ...] = ()

    # where it runs
    strategy: str = "auto"
    precision: str = "auto"
    synchronize_batch_norm: bool = False

    def _check(self) -> None:
        # a part of the run folder's name
        if not re.fullmatch(r"[\w.+-]{0,99}\w", self.recipe, re.ASCII):
            raise ConfigError(
                f"recipe is {shown(self.recipe)}; allowed: up to 100 letters, digits and . + - _"
            )
        self._one_of("dataset", DATASETS)
        self._one_of("validation_split", SPLITS)
        self._one_of("pixels", PIXELS)
        self._one_of("resize", RESIZES)
        self._one_of("class_weights", CLASS_WEIGHTS)
        for name in self.adapt:
            if name not in ADAPTABLE:
                raise unknown("setting in adapt", name, ADAPTABLE)
        self._one_of("strategy", STRATEGIES)
        self._one_of("precision", PRECISIONS)
        self._between("image_size", 8, 512)
        for name, only in (("image_size", 32), ("resize", "squash")):
            if getattr(self, name) != only and self.dataset != "folder":
                raise ConfigError(
                    f"{name} is {shown(getattr(self, name))}; allowed with the dataset {self.dataset}: {only}"
                )
        self._between("epochs", 0, 100_000, exclusive=True)
        self._between("batch_size", 1, 1_000_000)
        if self.validation_fraction is not None:
            self._between("validation_fraction", 0, 1, exclusive=True)
        self._between("label_smoothing", 0, 0.99)
        self._between("validation_interval", 1, 100_000)
        self._between("target", 0, 1)
        self._between("seed", 0, 2**31 - 1)
        self._check_fold()
        check_views(self.views, self.views_share)
        if self.early_stopping is not None:
            self._between("early_stopping", 1, 100_000)
        if any(not 8 <= s <= 512 for s in self.sizes):
            raise ConfigError(f"sizes is {shown(self.sizes)}; allowed: sides from 8 to 512 pixels")
        watching = ["--set early_stopping=null"] if self.early_stopping is not None else []
        watching += ["--set schedule.name=constant"] if self.schedule.name == "plateau" else []
        # A folder may have validation images of its own; `preparation.prepare` looks.
        unwatched = self.validation_fraction is None and self.dataset != "folder"
        if watching and (unwatched or self.validation_interval > 1):
            name, allowed = (
                ("validation_fraction", "a fraction") if unwatched else ("validation_interval", "1")
            )
            raise ConfigError(
                f"{name} is {getattr(self, name)}, but early stopping and the plateau schedule watch val_loss after every"
                f" epoch; allowed: {allowed}, or neither of them"
                f" ({' '.join(watching)})"
            )

    def _check_fold(self) -> None:
        parts = int(1 / self.validation_fraction + 1e-9) if self.validation_fraction else 1
        if self.validation_split != "stratified":
            parts = 1
        if not 0 <= self.validation_fold < parts:
            raise ConfigError(
                f"validation_fold is {shown(self.validation_fold)}; allowed with the {self.validation_split} split and"
                f" validation_fraction {self.validation_fraction}: from 0 to {parts - 1}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The Config as JSON values; `from_dict` is the inverse.

        Settings that are younger than version 1.0.0 are left out at their defaults, so that a Config that does not use them
        is written, and recognised, as before.
        """
        return json.loads(json.dumps(_written(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`. Raises ConfigError on an unknown key or a value out of range."""
        return section_from_dict(cls, values, "the configuration")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Config:
        """The Config in a run's config.json, which holds the keys RECORDED as well. Raises ConfigError."""
        return cls.from_dict({k: v for k, v in record.items() if k not in RECORDED})

    def override(self, /, **values: Any) -> Config:
        """A copy with other values.

        Args:
            values: field=value. A double underscore reaches into a section: `optimizer__learning_rate=0.1`.

        Raises:
            ConfigError: on an unknown name or a value out of range.
        """
        names = [f.name for f in dataclasses.fields(self)]
        changes: dict[str, Any] = {}
        parts: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            section, _, key = name.partition("__")
            if section not in names:
                raise unknown("setting", section, names)
            if key:
                parts.setdefault(section, {})[key] = value
            else:
                changes[section] = value
        # All changes of a section at once, because two values may be valid only together.
        for section, new in parts.items():
            current = changes.get(section, getattr(self, section))
            current = vars(current) if dataclasses.is_dataclass(current) else current
            if not isinstance(current, Mapping):
                raise unknown("setting", f"{section}__{next(iter(new))}", names)
            changes[section] = {**current, **new}
        return dataclasses.replace(self, **changes)
