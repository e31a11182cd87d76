"""The architectures: one file each, whose `build` gives an uncompiled functional `keras.Model` on raw images.

Importing this package costs no Keras; an architecture's own file is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import ConfigError, unknown

if TYPE_CHECKING:
    import keras

# Name -> what it is. Each is the file of that name in this folder.
ARCHITECTURES: dict[str, str] = {
    "fast": "whitened patches, then three wide two-convolution blocks with batch norm: the project's own",
    "practical": "three convolutions with batch norm and a dense layer (tutorial 1)",
    "vgg": "VGG blocks with dropout, L2 and batch norm by option (tutorial 2)",
    "course": "three unpadded convolutions with batch norm, pooling and dropout (tutorial 3)",
    "leaky": "three pairs of convolutions with LeakyReLU and batch norm (tutorial 4)",
    "wide_head": "three pairs of convolutions and two wide dense layers (tutorial 5)",
    "transfer": "a Keras Applications backbone, pretrained on ImageNet, with a new head",
}

_GIVEN = ("input_shape", "num_classes", "mean", "std")  # by the data, so no option of a recipe


def build(
    config: Config,
    *,
    input_shape: Sequence[int | None],
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> keras.Model:
    """The uncompiled model of `config.architecture` with `config.options`.

    input_shape: (height, width, channels); mean, std: one float a channel, in units of 0-1 pixels, or None.
    The model takes images [n, height, width, channels], uint8 or float, 0-255, and gives float32
    probabilities [n, num_classes]. Raises ConfigError where no such network can be.
    """
    function = _build_function(config.architecture)
    check_options(config.architecture, config.options)
    if len(input_shape) != 3 or any(side is not None and side < 1 for side in input_shape):
        raise ConfigError(
            f"input_shape is {tuple(input_shape)}; allowed: (height, width, channels), all positive"
        )
    if num_classes < 2:
        raise ConfigError(f"num_classes is {num_classes}; allowed: 2 or more")
    try:
        return function(
            input_shape=tuple(input_shape), num_classes=num_classes, mean=mean, std=std, **config.options
        )
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # Keras's own, about the value of an option
        raise ConfigError(
            f"{config.architecture} cannot be built with {dict(config.options)}: {error}"
        ) from error


def forward_flops(model: keras.Model, side: int | None = None) -> int:
    """Floating-point operations of the convolutions and dense layers for one image: two a multiply-add.

    side: of a square image, where it is not the model's own input.
    """
    import keras

    if side is not None:
        shape = (side, side, model.input_shape[-1])
        model = keras.models.clone_model(model, input_tensors=keras.Input(shape))
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
            places = 1
            for length in layer.output.shape[1:-1]:
                places *= length
            total += 2 * places * int(layer.kernel.shape.num_elements())
    return total


def check_options(architecture: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError on an unknown architecture, or an option that its build function does not take."""
    parameters = inspect.signature(_build_function(architecture)).parameters
    allowed = [name for name in parameters if name not in _GIVEN]
    for name in options:
        if name not in allowed:
            raise unknown(f"option of {architecture}", name, allowed)


def _build_function(architecture: str) -> Callable[..., keras.Model]:
    if architecture not in ARCHITECTURES:
        raise unknown("architecture", architecture, ARCHITECTURES)
    return importlib.import_module(f"{__name__}.{architecture}").build
