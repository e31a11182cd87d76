"""The architectures: one file each, whose `build` returns an uncompiled functional `keras.Model` on raw images.

Importing this package does not import Keras. The file of an architecture is imported when a function here needs it.
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

# Name -> description. Each name is that of a file in this folder.
ARCHITECTURES: dict[str, str] = {
    "fast": "whitened patches, then three wide two-convolution blocks with batch norm: the project's own",
    "practical": "three convolutions with batch norm and a dense layer (tutorial 1)",
    "vgg": "VGG blocks with dropout, L2 and batch norm by option (tutorial 2)",
    "course": "three unpadded convolutions with batch norm, pooling and dropout (tutorial 3)",
    "leaky": "three pairs of convolutions with LeakyReLU and batch norm (tutorial 4)",
    "wide_head": "three pairs of convolutions and two wide dense layers (tutorial 5)",
    "transfer": "a Keras Applications backbone, pretrained on ImageNet, with a new head",
}

# These arguments of a build function depend on the data, so they are not options of a recipe.
_DATA_ARGUMENTS = ("input_shape", "num_classes", "mean", "std")


def build(
    config: Config,
    *,
    input_shape: Sequence[int | None],
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> keras.Model:
    """Builds the model of `config.architecture` with `config.options`.

    Args:
        config: the architecture and its options.
        input_shape: height, width and channels of the images.
        num_classes: the number of classes.
        mean: one number per channel, in units of 0-1 pixels, that preprocessing subtracts; None: 0.
        std: one number per channel, in units of 0-1 pixels, by which preprocessing divides; None: 1.

    Returns:
        An uncompiled functional model: images [n, height, width, channels], uint8 or float, 0-255, to float32
        probabilities [n, num_classes].

    Raises:
        ConfigError: if the architecture or an option is unknown, or if a value is invalid.
    """
    build_function = _build_function(config.architecture)
    check_options(config.architecture, config.options)
    if len(input_shape) != 3 or any(side is not None and side < 1 for side in input_shape):
        raise ConfigError(
            f"input_shape is {tuple(input_shape)}; allowed: (height, width, channels), all positive"
        )
    if num_classes < 2:
        raise ConfigError(f"num_classes is {num_classes}; allowed: 2 or more")
    try:
        return build_function(
            input_shape=tuple(input_shape), num_classes=num_classes, mean=mean, std=std, **config.options
        )
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # Keras's own, about the value of an option
        raise ConfigError(
            f"options is {dict(config.options)}; allowed with the architecture {config.architecture}:"
            f" values that Keras accepts ({error})"
        ) from error


def forward_flops(model: keras.Model, side: int | None = None) -> int:
    """Counts the FLOPs (floating-point operations) of a forward pass on one image: two per multiply-add.

    Args:
        model: functional. Only its convolutions and dense layers are counted.
        side: of a square image, in pixels; None: the input shape of the model.

    Returns:
        The number of operations.
    """
    import keras

    if side is not None:
        shape = (side, side, model.input_shape[-1])
        model = keras.models.clone_model(model, input_tensors=keras.Input(shape))
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
            positions = 1
            for length in layer.output.shape[1:-1]:
                positions *= length
            total += 2 * positions * int(layer.kernel.shape.num_elements())
    return total


def check_options(architecture: str, options: Mapping[str, Any]) -> None:
    """Checks that an architecture has these options; their values are not checked.

    Raises:
        ConfigError: if the architecture or the name of an option is unknown.
    """
    parameters = inspect.signature(_build_function(architecture)).parameters
    allowed = [name for name in parameters if name not in _DATA_ARGUMENTS]
    for name in options:
        if name not in allowed:
            raise unknown(f"option of {architecture}", name, allowed)


def _build_function(architecture: str) -> Callable[..., keras.Model]:
    """Imports the build function of an architecture. Raises ConfigError if the architecture is unknown."""
    if architecture not in ARCHITECTURES:
        raise unknown("architecture", architecture, ARCHITECTURES)
    return importlib.import_module(f"{__name__}.{architecture}").build
