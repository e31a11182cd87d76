"""A trained network without its last layers, the backbone, under a new head.

It is the network in this package, trained on CIFAR-10, or one of Keras Applications, pretrained on ImageNet, which is the
extension of tutorial 2. The backbone's own preprocessing is part of the model, so this model takes raw images like all
others here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import keras
from keras import layers

from ..errors import ConfigError, RunError, shown, unknown
from ..keras_state import keras_home
from ..model_file import load_model
from . import common, fast
from .arguments import checked


class Backbone(NamedTuple):
    """A backbone and the preprocessing that its weights expect: (x / 255 - mean) / std of RGB pixels.

    Attributes:
        application: its name in `keras.applications`.
        mean: one number per channel, in units of 0-1 pixels.
        std: one number per channel, in units of 0-1 pixels.
        bgr: whether the weights expect blue first, as those from Caffe do.
        depthwise: whether it has depthwise convolutions.
    """

    application: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False
    depthwise: bool = False


BACKBONES = {
    "vgg16": Backbone("VGG16", (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3, bgr=True),
    "mobilenetv2": Backbone("MobileNetV2", (0.5,) * 3, (0.5,) * 3, depthwise=True),
    "resnet50v2": Backbone("ResNet50V2", (0.5,) * 3, (0.5,) * 3),
    "densenet121": Backbone("DenseNet121", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
CIFAR = "cifar"  # the backbone that comes with this package, and other networks of the architecture fast
PACKAGED_WEIGHTS = "packaged"
SMALLEST = 32  # side in pixels of the smallest image that every backbone accepts


@checked
def build(
    *,
    input_shape: Sequence[int | None] = (32, 32, 3),
    num_classes: int = 10,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backbone: str = "vgg16",
    weights: str | None = "imagenet",
    frozen: bool = True,
    image_size: int | None = None,
    dense: Sequence[int] = (256,),
    dropout: float = 0.5,
) -> keras.Model:
    """Builds the network: preprocessing, the backbone, global pooling, hidden dense layers, and the classes.

    Args:
        input_shape: height, width and channels of the images; there must be 3 channels.
        num_classes: the number of classes.
        mean: must be None, because the backbone brings its own preprocessing.
        std: must be None, because the backbone brings its own preprocessing.
        backbone: a key of BACKBONES, or "cifar".
        weights: "imagenet" (from Keras's cache, or downloaded), a weights file of this backbone, or None for random
            weights. With "cifar": "packaged", the model file of a network of the architecture fast, or None.
        frozen: whether to train the head alone. Random weights are always trained.
        image_size: the side in pixels that images are resized to first; None: the images as they are, which "cifar" needs.
        dense: units of each hidden dense layer, which is followed by ReLU and dropout.
        dropout: the rate after each hidden dense layer.

    Returns:
        An uncompiled functional model: images [n, height, width, 3], uint8 or float, 0-255, to float32 probabilities
        [n, num_classes].

    Raises:
        ConfigError: if the images are too small, or if an argument is invalid.
        RunError: if the weights cannot be loaded.
    """
    _check_arguments(backbone, input_shape, mean, std)
    images = keras.Input(input_shape, dtype="float32", name="images")
    if backbone == CIFAR:
        if image_size is not None:
            raise ConfigError(
                f"image_size is {image_size}; allowed with the backbone {CIFAR}: None, it takes images of any size"
            )
        x = _cifar_features(images, weights, frozen)
    else:
        x = _application_features(backbone, images, image_size, weights, frozen)
    for i, units in enumerate(dense, start=1):
        x = layers.Dense(units, name=f"head_dense{i}")(x)
        x = layers.ReLU(name=f"head_relu{i}")(x)
        x = common.dropout(x, dropout, f"head_dropout{i}")
    head = fast.scaled_head if backbone == CIFAR else common.classifier_head
    return keras.Model(images, head(x, num_classes), name="transfer")


def _application_features(
    backbone: str, images: keras.KerasTensor, image_size: int | None, weights: str | None, frozen: bool
) -> keras.KerasTensor:
    """Features [n, f] of a backbone of Keras Applications. Raises as `build` does."""
    chosen = BACKBONES[backbone]
    x = common.preprocess(images, chosen.mean, chosen.std)
    if image_size is not None:
        # Without `training`, a bare call of the model would count as training, even for batch norm after this layer.
        x = layers.Resizing(image_size, image_size, dtype="float32", name="resize")(x, training=False)
    common.check_side(x, SMALLEST, backbone)
    base = _pretrained(backbone, x, weights)
    if chosen.bgr and weights is not None:
        # Reversing the channels of the first kernel once equals reversing those of every image.
        kernel = next(layer for layer in base.layers if isinstance(layer, layers.Conv2D)).kernel
        kernel.assign(kernel.numpy()[:, :, ::-1, :])
    for layer in base.layers:
        layer.trainable = weights is None or not frozen
    return layers.GlobalAveragePooling2D(name="head_pool")(base.output)


def _cifar_features(images: keras.KerasTensor, weights: str | None, frozen: bool) -> keras.KerasTensor:
    """Features [n, f] of a network of the architecture fast, up to its pooling. Raises as `build` does."""
    if weights == "imagenet":
        raise ConfigError(
            f"weights is 'imagenet'; allowed with the backbone {CIFAR}: {PACKAGED_WEIGHTS!r}, a model file, or None"
        )
    if weights is None:
        network = fast.build()
    else:
        network = load_model(None if weights == PACKAGED_WEIGHTS else weights)
    names = [layer.name for layer in network.layers]
    if not {"preprocess", "pool"} <= set(names):
        raise ConfigError(
            f"weights is {weights!r}; allowed: the model file of a network of the architecture fast"
        )
    common.check_side(images, 9, f"the backbone {CIFAR}")  # three poolings
    body = keras.Model(network.input, network.get_layer("pool").output)
    for layer in body.layers:
        # The whitening stays as it is, as in the training of the network itself.
        layer.trainable = layer.trainable and (weights is None or not frozen)
    # The same layers on images of another size.
    return keras.models.clone_model(body, input_tensors=images, clone_function=lambda layer: layer).output


def _check_arguments(
    backbone: str,
    input_shape: Sequence[int | None],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    """Raises ConfigError if an argument of `build` is invalid."""
    if backbone not in (*BACKBONES, CIFAR):
        raise unknown("backbone", backbone, (*BACKBONES, CIFAR))
    if mean is not None or std is not None:
        raise ConfigError(
            f"mean is {shown(mean)} and std is {shown(std)}, but {backbone} brings its own; allowed: None (pixels='unit')"
        )
    if input_shape[-1] != 3:
        raise ConfigError(f"input_shape is {tuple(input_shape)}; allowed for transfer: three channels")


def _pretrained(backbone: str, x: keras.KerasTensor, weights: str | None) -> keras.Model:
    """Returns the backbone, without its top, as one graph with its input `x`. Raises as `build` does."""
    application = getattr(keras.applications, BACKBONES[backbone].application)
    if weights not in ("imagenet", None) and not os.path.isfile(weights):
        raise ConfigError(f"weights is {shown(weights)}; allowed: 'imagenet', an existing file, or None")
    options = dict(include_top=False, input_tensor=x, input_shape=x.shape[1:])
    if weights is None:
        return application(weights=None, **options)
    try:
        return application(weights=weights, **options)
    except Exception as error:  # Keras raises a plain Exception when a download fails
        if weights != "imagenet":
            raise RunError(
                f"{weights} does not hold the weights of {backbone} without its top: {error}"
            ) from error
        folder = keras_home() / "models"
        file = re.search(r"https?://\S+/([^\s/]+\.h5)", str(error))
        remedy = f"put {file[1]} into {folder}" if file else f"replace its file in {folder}"
        raise RunError(
            f"cannot load the ImageNet weights of {backbone} ({error}): {remedy},"
            " or train from scratch with weights=None (--set options.weights=null)"
        ) from error
