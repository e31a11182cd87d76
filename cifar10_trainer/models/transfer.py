"""A Keras Applications backbone, pretrained on ImageNet, under a new head: the extension of tutorial 2.

The backbone's own preprocessing is part of the model, as everywhere here: it takes raw images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import keras
from keras import layers

from ..errors import ConfigError, RunError, unknown
from . import common


class Backbone(NamedTuple):
    """A name in `keras.applications`, and what its weights expect of RGB pixels: (x / 255 - mean) / std."""

    application: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False  # the weights come from Caffe, whose images have blue first


BACKBONES = {
    "vgg16": Backbone("VGG16", (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3, bgr=True),
    "mobilenetv2": Backbone("MobileNetV2", (0.5,) * 3, (0.5,) * 3),
    "resnet50v2": Backbone("ResNet50V2", (0.5,) * 3, (0.5,) * 3),
    "densenet121": Backbone("DenseNet121", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SMALLEST = 32  # side of the smallest image that these backbones leave a map of


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
    """Images [n, h, w, 3], uint8 or float, 0-255 -> float32 probabilities [n, num_classes].

    weights: "imagenet" (cached by Keras, or downloaded), a weights file of this backbone, or None for random
    ones; frozen: train the head alone, unless the weights are random; image_size: side, in pixels, to which
    the images are resized first, None for as they are; dense: units of each hidden dense layer; dropout:
    after each of these.
    Raises ConfigError on a mean or std, since the backbone brings its own, and on images that are too small;
    RunError where the weights cannot be had.
    """
    if backbone not in BACKBONES:
        raise unknown("backbone", backbone, BACKBONES)
    if mean is not None or std is not None:
        raise ConfigError(
            f"mean is {mean} and std {std}, but {backbone} brings its own; allowed: None (pixels='unit')"
        )
    if input_shape[-1] != 3:
        raise ConfigError(f"input_shape is {tuple(input_shape)}; allowed for transfer: three channels")
    chosen = BACKBONES[backbone]

    images = keras.Input(input_shape, dtype="float32", name="images")
    x = common.preprocess(images, chosen.mean, chosen.std)
    if image_size is not None:
        # Said here, because this layer takes a bare call of the model for training, and batch norm after it too.
        x = layers.Resizing(image_size, image_size, dtype="float32", name="resize")(x, training=False)
    common.check_side(x, SMALLEST, backbone)
    base = _pretrained(backbone, x, weights)
    if chosen.bgr and weights is not None:
        # Turning the first kernel around once equals turning every image around.
        kernel = next(layer for layer in base.layers if isinstance(layer, layers.Conv2D)).kernel
        kernel.assign(kernel.numpy()[:, :, ::-1, :])
    for layer in base.layers:
        layer.trainable = weights is None or not frozen

    x = layers.GlobalAveragePooling2D(name="head_pool")(base.output)
    for number, units in enumerate(dense, start=1):
        x = layers.Dense(units, name=f"head_dense{number}")(x)
        x = layers.ReLU(name=f"head_relu{number}")(x)
        x = common.dropout(x, dropout, f"head_dropout{number}")
    return keras.Model(images, common.classifier_head(x, num_classes), name="transfer")


def _pretrained(backbone: str, x: keras.KerasTensor, weights: str | None) -> keras.Model:
    """The backbone without its top on `x`, in one graph with it. Raises as `build` does."""
    application = getattr(keras.applications, BACKBONES[backbone].application)
    if weights not in ("imagenet", None) and not os.path.isfile(weights):
        raise ConfigError(f"weights is {weights!r}; allowed: 'imagenet', an existing file, or None")
    make = dict(include_top=False, input_tensor=x, input_shape=x.shape[1:])
    if weights is None:
        return application(weights=None, **make)
    try:
        return application(weights=weights, **make)
    except Exception as error:  # Keras raises no narrower class when a download fails
        if weights != "imagenet":
            raise RunError(
                f"{weights} does not hold the weights of {backbone} without its top: {error}"
            ) from error
        folder = os.path.join(os.environ.get("KERAS_HOME", "~/.keras"), "models")
        file = re.search(r"https?://\S+/([^\s/]+\.h5)", str(error))
        remedy = f"put {file[1]} into {folder}" if file else f"replace its file in {folder}"
        raise RunError(
            f"the ImageNet weights of {backbone} cannot be had ({error}): {remedy},"
            " or train from scratch with weights=None (--set options.weights=null)"
        ) from error
