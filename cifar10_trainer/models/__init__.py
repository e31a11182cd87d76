"""The architectures: one file each, whose `build` returns an uncompiled functional `keras.Model` on raw images.

Importing this package does not import Keras. The file of an architecture is imported when a function here needs it.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import ConfigError, shown, unknown
from ..keras_state import keras_defaults
from ..machine import check_fits

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
    "transfer": "a trained network, the packaged one or one of Keras Applications, with a new head",
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
    check_options(config.architecture, config.options)
    data = {"input_shape": input_shape, "num_classes": num_classes, "mean": mean, "std": std}
    return _call(config.architecture, {**data, **config.options})


@keras_defaults()
def build_model(
    architecture: str = "fast",
    *,
    input_shape: Sequence[int | None] = (32, 32, 3),
    num_classes: int = 10,
    **options: Any,
) -> keras.Model:
    """Builds an uncompiled Keras model of one of this project's architectures.

    Args:
        architecture: a name in ARCHITECTURES; each is a file in `cifar10_trainer/models`.
        input_shape: height, width and channels of the images.
        num_classes: the number of classes, 2 or more.
        options: further arguments of the architecture's build function, such as filters, dropout, mean and std.

    Returns:
        A functional model: images [n, height, width, channels], uint8 or float, 0-255, to float32 probabilities
        [n, num_classes].

    Raises:
        ConfigError: if the architecture or an option is unknown, or if a value has the wrong type or is out of range.
        RunError: if the weights do not fit into memory.
    """
    check_options(architecture, options, reserved=())
    return _call(architecture, {"input_shape": input_shape, "num_classes": num_classes, **options})


def _call(architecture: str, arguments: Mapping[str, Any]) -> keras.Model:
    """Calls the build function. Raises ConfigError where an argument has a wrong value."""
    from .arguments import without_numpy

    function = _build_function(architecture)
    shape, num_classes = (without_numpy(arguments[name]) for name in ("input_shape", "num_classes"))
    sides = shape if isinstance(shape, tuple) else ()
    if len(sides) != 3 or not all(side is None or (isinstance(side, int) and side >= 1) for side in sides):
        raise ConfigError(f"input_shape is {shown(shape)}; allowed: (height, width, channels), all positive")
    if isinstance(num_classes, int) and num_classes < 2:
        raise ConfigError(f"num_classes is {shown(num_classes)}; allowed: 2 or more")
    from ..model_file import bounded_weights

    def check(size: int) -> None:
        check_fits(size, f"a model of the architecture {architecture}", "make its layers smaller")

    try:
        with bounded_weights(check):
            return function(**{**arguments, "input_shape": sides})
    except ConfigError:
        raise
    except (TypeError, ValueError, OverflowError) as error:  # Keras's own, about the value of an option
        options = {k: v for k, v in arguments.items() if k not in _DATA_ARGUMENTS}
        raise ConfigError(
            f"options is {shown(options)}; allowed with the architecture {architecture}: values that Keras accepts ({error})"
        ) from error


def forward_flops(model: keras.Model, side: int | None = None) -> int:
    """Counts the FLOPs (floating-point operations) of a forward pass on one image: two per multiply-add.

    Args:
        model: functional. Its convolutions, depthwise and separable ones too, and dense layers are counted, also those
            of models inside it.
        side: of a square image, in pixels; None: the input shape of the model.

    Returns:
        The number of operations.
    """
    import keras

    if side is not None:
        shape = (side, side, model.input_shape[-1])
        images = keras.Input(shape, dtype=model.inputs[0].dtype)
        model = keras.models.clone_model(model, input_tensors=images)
    graph = model._functional if isinstance(model, keras.Sequential) else model
    return sum(_node_flops(node) for nodes in graph._nodes_by_depth.values() for node in nodes)


def _node_flops(node: Any) -> int:
    """Counts the FLOPs of one use of a layer in a functional model."""
    import keras

    layer = node.operation
    if isinstance(layer, keras.Model):
        here = [tuple(tensor.shape[1:]) for tensor in node.input_tensors]
        if here != [tuple(tensor.shape[1:]) for tensor in layer.inputs]:
            inputs = [keras.Input(s, dtype=t.dtype) for s, t in zip(here, layer.inputs, strict=True)]
            functional = not isinstance(layer, keras.Sequential)  # its inputs may be a list or a dictionary
            tensors = keras.tree.pack_sequence_as(layer.input, inputs) if functional else inputs[0]
            layer = keras.models.clone_model(layer, input_tensors=tensors)
        return forward_flops(layer)
    if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D | keras.layers.Dense):
        # each number: one multiply-add per position, if depthwise, too
        kernels = math.prod(layer.kernel.shape)
    elif isinstance(layer, keras.layers.SeparableConv2D):
        kernels = math.prod(layer.depthwise_kernel.shape) + math.prod(layer.pointwise_kernel.shape)
    else:
        return 0
    return 2 * math.prod(node.output_tensors[0].shape[1:-1]) * kernels


def check_options(
    architecture: str, options: Mapping[str, Any], reserved: Sequence[str] = _DATA_ARGUMENTS
) -> None:
    """Checks that an architecture has these options, and that none is `reserved`; their values are not checked.

    Raises:
        ConfigError: if the architecture or the name of an option is unknown.
    """
    parameters = inspect.signature(_build_function(architecture)).parameters
    allowed = [name for name in parameters if name not in reserved]
    for name in options:
        if name not in allowed:
            raise unknown(f"option of {architecture}", name, allowed)


def _build_function(architecture: str) -> Callable[..., keras.Model]:
    """Imports the build function of an architecture. Raises ConfigError if the architecture is unknown."""
    if architecture not in ARCHITECTURES:
        raise unknown("architecture", architecture, ARCHITECTURES)
    return importlib.import_module(f"{__name__}.{architecture}").build
