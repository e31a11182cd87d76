from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

from cifar10_trainer import models
from cifar10_trainer.config import Config
from cifar10_trainer.errors import ConfigError, RunError

# Every architecture small enough to be built, saved and trained a step in a second or two.
SMALL = {
    "fast": {"filters": (4, 8)},
    "practical": {"filters": (4, 8, 8), "dense": (8, 8)},
    "vgg": {"filters": (4, 8), "dense": 8, "dropout": 0.1, "l2": 0.001, "batch_norm": True},
    "course": {"filters": (4, 8), "dense": 8},
    "leaky": {"blocks": ((4, 4), (8,)), "dropout": 0.1, "dense": 8},
    "wide_head": {"filters": (4, 8), "dense": (16, 8)},
    "transfer": {"weights": None, "backbone": "vgg16", "dense": (8,)},  # the one with the fewest layers
}


def build(architecture, input_shape=(32, 32, 3), num_classes=10, mean=None, std=None, **options):
    config = Config(architecture=architecture, options=options)
    return models.build(config, input_shape=input_shape, num_classes=num_classes, mean=mean, std=std)


def small(architecture, **data):
    return build(architecture, **data, **SMALL[architecture])


def images_and_labels(count=6, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 10


@pytest.fixture
def mixed_bfloat16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(before)


# --- what the tutorials' networks are -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "options", "parameters"),
    [
        ("practical", {}, 2_195_146),
        ("vgg", {"filters": (32,)}, 1_060_138),
        ("vgg", {"filters": (32, 64)}, 591_274),
        ("vgg", {}, 550_570),
        ("vgg", {"dropout": (0.2, 0.3, 0.4, 0.5), "l2": 0.001}, 550_570),
        ("vgg", {"batch_norm": True}, 552_874),
        ("course", {}, 161_610),
        ("leaky", {}, 1_345_066),
        ("wide_head", {}, 2_915_114),
    ],
)
def test_parameter_counts_are_the_tutorials(architecture, options, parameters):
    assert build(architecture, **options).count_params() == parameters


ROLES = {
    "Conv2D": "conv",
    "BatchNormalization": "norm",
    "ReLU": "relu",
    "LeakyReLU": "leaky",
    "MaxPooling2D": "pool",
    "Dropout": "dropout",
    "Flatten": "flatten",
    "Dense": "dense",
    "Activation": "softmax",
}


@pytest.mark.parametrize(
    ("architecture", "options", "order"),
    [
        (
            "practical",
            {},
            "conv norm relu pool " * 2 + "conv norm relu flatten dense norm relu dropout dense softmax",
        ),
        ("vgg", {}, "conv relu conv relu pool " * 3 + "flatten dense relu dense softmax"),
        (
            "vgg",
            {"dropout": 0.2, "batch_norm": True},
            "conv relu norm conv relu norm pool dropout " * 3
            + "flatten dense relu norm dropout dense softmax",
        ),
        ("course", {}, "conv relu norm pool dropout " * 3 + "flatten dense relu norm dropout dense softmax"),
        (
            "leaky",
            {},
            "conv leaky norm conv leaky norm pool dropout " * 3
            + "flatten dense leaky norm dropout dense softmax",
        ),
        (
            "wide_head",
            {},
            "conv relu dropout conv relu pool " * 3
            + "flatten dropout dense relu dropout dense relu dropout dense softmax",
        ),
    ],
)
def test_layers_stand_in_the_tutorials_order(architecture, options, order):
    layers = build(architecture, **options).layers
    assert [layer.name for layer in layers[:2]] == ["images", "preprocess"]
    assert [ROLES[type(layer).__name__] for layer in layers[2:]] == order.split()


@pytest.mark.parametrize(
    ("architecture", "options", "rates"),
    [
        ("practical", {}, [0.5]),
        ("vgg", {"dropout": 0.2}, [0.2] * 4),
        ("vgg", {"dropout": (0.2, 0.3, 0.4, 0.5)}, [0.2, 0.3, 0.4, 0.5]),
        ("course", {}, [0.25] * 3 + [0.5]),
        ("leaky", {}, [0.2, 0.3, 0.4, 0.4]),
        ("wide_head", {}, [0.2] * 6),
    ],
)
def test_dropout_rates_are_the_tutorials(architecture, options, rates):
    layers = build(architecture, **options).layers
    assert [layer.rate for layer in layers if isinstance(layer, keras.layers.Dropout)] == rates


def test_vgg_starts_he_uniform_and_the_others_as_keras_does():
    def initializers(model):
        kernels = [layer for layer in model.layers if hasattr(layer, "kernel")]
        return [type(layer.kernel_initializer).__name__ for layer in kernels]

    assert initializers(build("vgg")) == ["HeUniform"] * 7 + ["GlorotUniform"]  # the last is the logits'
    for architecture in ("practical", "course", "leaky", "wide_head"):
        assert set(initializers(small(architecture))) == {"GlorotUniform"}


def test_l2_adds_the_penalty_of_every_kernel_to_the_losses():
    model = build("vgg", filters=(4, 8), dense=8, l2=0.01)
    kernels = [layer.kernel.numpy() for layer in model.layers if hasattr(layer, "kernel")]
    assert len(kernels) == 6
    expected = 0.01 * sum(np.sum(kernel.astype(np.float64) ** 2) for kernel in kernels)
    # float32 sums of some thousand terms
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)
    assert build("vgg", filters=(4, 8), dense=8).losses == []


def test_leaky_relu_has_slope_one_tenth_and_is_a_relu_where_it_is_zero():
    def slopes(model):
        return {layer.negative_slope for layer in model.layers if isinstance(layer, keras.layers.LeakyReLU)}

    assert slopes(build("leaky")) == {0.1}
    assert slopes(build("leaky", negative_slope=0.0)) == {0.0}


def test_only_the_course_convolves_without_padding():
    for architecture in ("practical", "vgg", "course", "leaky", "wide_head"):
        convolutions = [m for m in small(architecture).layers if isinstance(m, keras.layers.Conv2D)]
        assert {c.padding for c in convolutions} == {"valid" if architecture == "course" else "same"}


def test_practical_takes_other_kernels_layers_and_pools():
    model = build("practical", filters=(4, 8, 16, 16), kernel_size=5, pools=3, dense=(8, 6))
    # By hand: 5x5 kernels, three pools leave 4x4 maps; batch norm has 4 values a channel.
    convolutions = 25 * (3 * 4 + 4 * 8 + 8 * 16 + 16 * 16) + 44 + 4 * 44
    head = (16 * 16 * 8 + 8) + 32 + (8 * 6 + 6) + 24 + (6 * 10 + 10)
    assert model.count_params() == convolutions + head


# --- what every architecture promises -------------------------------------------------------------------

NAMES = re.compile(
    r"images|preprocess|resize|whitening(_activation)?|flatten|flatten_dropout|pool|dropout|head|head_pool"
    r"|block\d+_(conv|norm|relu|activation|add)\d+|block\d+_(pool|dropout)"
    r"|head_(dense|norm|relu|dropout)\d+|logits|probabilities"
)


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_layers_are_named_by_their_role(architecture):
    model = small(architecture)
    names = [layer.name for layer in model.layers]  # VGG-16's own names follow the same convention
    assert [name for name in names if not NAMES.fullmatch(name)] == []
    assert names[:2] == ["images", "preprocess"]
    assert names[-2:] == ["logits", "probabilities"]
    assert type(model) is keras.Model or type(model).__name__ == "Functional"
    assert not model.compiled


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_takes_uint8_and_float_alike_and_gives_probabilities(architecture):
    model = small(architecture, num_classes=7)
    images, _ = images_and_labels()
    from_bytes = model(images).numpy()
    from_floats = model(images.astype(np.float32)).numpy()
    assert from_bytes.shape == (6, 7)
    assert from_bytes.dtype == np.float32
    np.testing.assert_array_equal(from_bytes, from_floats)
    # seven float32 summands, each rounded once
    np.testing.assert_allclose(from_bytes.sum(axis=1), 1, atol=1e-6)
    assert (from_bytes >= 0).all()
    assert np.ptp(from_bytes, axis=0).max() > 0  # it does look at the images


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_trains_by_plain_compile_and_fit(architecture):
    model = small(architecture)
    before = model.get_layer("logits" if architecture != "fast" else "head").kernel.numpy()
    images, labels = images_and_labels(8)
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(images, labels, batch_size=8, epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    after = model.get_layer("logits" if architecture != "fast" else "head").kernel.numpy()
    assert np.abs(after - before).max() > 0


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_mixed_precision_keeps_pixels_logits_and_probabilities_in_float32(architecture, mixed_bfloat16):
    model = small(architecture)
    dtypes = {layer.name: layer.compute_dtype for layer in model.layers}
    assert dtypes["preprocess"] == dtypes["logits"] == dtypes["probabilities"] == "float32"
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert {layer.compute_dtype for layer in convolutions} == {"bfloat16"}
    assert {layer.variable_dtype for layer in convolutions} == {"float32"}
    probabilities = model(images_and_labels()[0])
    assert probabilities.dtype == "float32"
    # bfloat16 would be off by up to 2^-8
    np.testing.assert_allclose(np.sum(probabilities, axis=1), 1, atol=1e-6)


def test_saved_models_open_where_this_package_is_not(tmp_path):
    images, _ = images_and_labels()
    np.save(tmp_path / "images.npy", images)
    expected = {}
    for architecture in models.ARCHITECTURES:
        model = small(architecture, num_classes=5)
        for ending in ("keras", "h5"):
            model.save(tmp_path / f"{architecture}.{ending}")
        expected[architecture] = model(images).numpy()
    script = """
import sys
sys.modules["cifar10_trainer"] = None  # importing it now raises, wherever it is installed
import keras, numpy as np
images = np.load("images.npy")
for name in sys.argv[1:]:
    for ending in ("keras", "h5"):
        model = keras.models.load_model(f"{name}.{ending}", compile=False)
        np.save(f"{name}.{ending}.npy", model(images).numpy())
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", script, *expected]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for architecture, probabilities in expected.items():
        for ending in ("keras", "h5"):
            loaded = np.load(tmp_path / f"{architecture}.{ending}.npy")
            np.testing.assert_array_equal(loaded, probabilities, err_msg=f"{architecture}.{ending}")


@pytest.mark.parametrize("architecture", [a for a in models.ARCHITECTURES if a != "transfer"])
def test_other_images_and_classes(architecture):
    model = small(architecture, input_shape=(20, 28, 1), num_classes=2)
    assert model.output_shape == (None, 2)
    assert model(np.zeros((1, 20, 28, 1), np.uint8)).shape == (1, 2)


# --- preprocessing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [a for a in models.ARCHITECTURES if a != "transfer"])
def test_preprocessing_is_part_of_the_model(architecture):
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
    images, _ = images_and_labels()
    for data, expected in [
        ({"mean": mean, "std": std}, (images / 255 - np.array(mean)) / np.array(std)),
        ({"mean": mean}, images / 255 - np.array(mean)),
        ({}, images / 255),
    ]:
        model = small(architecture, **data)
        preprocess = keras.Model(model.input, model.get_layer("preprocess").output)
        # x * scale + offset in float32 against float64; the values reach 7
        np.testing.assert_allclose(preprocess(images), expected, atol=2e-6)


# --- what cannot be built -------------------------------------------------------------------------------


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown architecture 'vg'; allowed: fast, .* Did you mean 'vgg'"):
        build("vg")


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_unknown_option_names_the_allowed_ones(architecture):
    with pytest.raises(
        ConfigError, match=rf"unknown option of {architecture} 'dropuot'; allowed: .*'dropout'"
    ):
        models.check_options(architecture, {"dropuot": 0.1})
    with pytest.raises(ConfigError, match="unknown option"):  # what the data decide is no option
        models.check_options(architecture, {"num_classes": 3})
    models.check_options(architecture, SMALL[architecture])


@pytest.mark.parametrize(
    ("architecture", "options", "side"),
    [
        ("practical", {"filters": (4,) * 4, "pools": 4}, 8),
        ("vgg", {"filters": (4,) * 6}, 32),
        ("course", {"filters": (4,) * 4}, 32),  # 32, 15, 6, 2: no fourth 3x3 window
        ("leaky", {"blocks": ((4,),) * 6, "dropout": 0.1}, 32),
        ("wide_head", {}, 4),
        ("transfer", {"weights": None}, 16),
    ],
)
def test_network_too_deep_for_the_image(architecture, options, side):
    with pytest.raises(ConfigError, match=r"too deep for the image: \w+ receives maps of \d+x\d+; allowed"):
        build(architecture, input_shape=(side, side, 3), **options)


def test_the_smallest_image_that_fits_is_taken():
    assert build("vgg", input_shape=(8, 8, 3), dense=8).get_layer("flatten").output.shape == (None, 128)
    assert build("course", input_shape=(22, 22, 3), dense=8).get_layer("flatten").output.shape == (None, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (32, 32)}, r"input_shape is \(32, 32\)"),
        ({"input_shape": (32, 0, 3)}, r"input_shape is \(32, 0, 3\)"),
        ({"input_shape": (None, None, 3)}, "a fixed height and width"),
        ({"num_classes": 1}, "num_classes is 1; allowed: 2 or more"),
        ({"mean": (0.5,)}, r"mean is \[0.5\].*allowed: 3 numbers each"),
        ({"std": (1, 1, 0)}, "allowed: 3 numbers each, all positive in std"),
        ({"dropout": (0.1, 0.2)}, r"dropout is \(0.1, 0.2\); allowed: one number, or 4"),
        ({"dropout": 1.5}, r"dropout is 1.5; allowed: from 0 to less than 1"),
        ({"filters": 32}, r"filters is 32; allowed: a sequence of integers"),
        ({"filters": (-1,)}, r"options is \{.*\(-1,\).*\}; allowed with the architecture vgg"),
    ],
)
def test_impossible_values_are_configuration_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build("vgg", **arguments)


# --- transfer -------------------------------------------------------------------------------------------


def transfer(**options):
    return build("transfer", **{**SMALL["transfer"], **options})


def test_transfer_trains_the_head_alone_where_the_backbone_is_trained_already(tmp_path):
    head = ["head_dense1/kernel", "head_dense1/bias", "logits/kernel", "logits/bias"]
    scratch = transfer()
    # 13 convolutions of VGG-16, 14,714,688 parameters; by hand 512 * 8 + 8 + 8 * 10 + 10 for the head
    assert scratch.count_params() == 14_714_688 + 4_194
    assert len(scratch.trainable_variables) == 26 + len(head)
    path = str(tmp_path / "weights.h5")
    keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3)).save(path)
    assert [v.path for v in transfer(weights=path).trainable_variables] == head
    assert len(transfer(weights=path, frozen=False).trainable_variables) == 26 + len(head)


def test_transfer_resizes_where_it_is_told_to():
    model = build("transfer", input_shape=(20, 20, 3), **{**SMALL["transfer"], "image_size": 40})
    assert model.get_layer("resize").output.shape == (None, 40, 40, 3)
    assert model(np.zeros((1, 20, 20, 3), np.uint8)).shape == (1, 10)
    assert "resize" not in [layer.name for layer in transfer().layers]


def test_a_bare_call_of_transfer_is_at_rest():
    """Keras's Resizing takes such a call for training, and hands that on to batch norm."""
    model = transfer(backbone="mobilenetv2", image_size=40)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    at_rest = np.array(model(images, training=False))
    np.testing.assert_array_equal(np.array(model(images)), at_rest)
    assert not np.allclose(np.array(model(images, training=True)), at_rest)


@pytest.mark.parametrize(
    ("backbone", "module"),
    [
        ("vgg16", "vgg16"),
        pytest.param("mobilenetv2", "mobilenet_v2", marks=pytest.mark.slow),
        pytest.param("resnet50v2", "resnet_v2", marks=pytest.mark.slow),
        pytest.param("densenet121", "densenet", marks=pytest.mark.slow),
    ],
)
def test_transfer_sees_what_the_backbone_was_trained_on(backbone, module, tmp_path):
    """Our model on raw RGB images gives the features of the backbone after Keras's own preprocess_input."""
    name = {"mobilenetv2": "MobileNetV2", "resnet50v2": "ResNet50V2", "densenet121": "DenseNet121"}
    application = getattr(keras.applications, name.get(backbone, "VGG16"))
    keras.utils.set_random_seed(1)
    reference = application(weights=None, include_top=False, input_shape=(32, 32, 3), pooling="avg")
    reference.save(tmp_path / "weights.h5")
    model = transfer(backbone=backbone, weights=str(tmp_path / "weights.h5"))
    features = keras.Model(model.input, model.get_layer("head_pool").output)
    images, _ = images_and_labels(2)
    preprocess_input = getattr(keras.applications, module).preprocess_input
    expected = reference.predict(preprocess_input(images.astype(np.float32)), verbose=0)
    scale = np.abs(expected).max()
    assert scale > 0
    # float32 convolutions, in another order of channels
    np.testing.assert_allclose(features.predict(images, verbose=0) / scale, expected / scale, atol=1e-4)


def test_transfer_weights_from_the_cache_and_where_they_cannot_be_had(tmp_path):
    """In a process of its own, whose Keras home is a new folder and whose network is a closed port."""
    home = tmp_path / "models"
    home.mkdir()
    cached = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_{}_no_top.h5"
    backbone = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(96, 96, 3))
    backbone.save(home / cached.format(96))
    (home / cached.format(128)).write_bytes(b"cut short")
    script = """
import json, sys
sys.path.insert(0, sys.argv[1])
from cifar10_trainer.errors import RunError
from cifar10_trainer.models import transfer
answers = {}
for backbone, size in [("mobilenetv2", 96), ("mobilenetv2", 128), ("vgg16", None)]:
    try:
        model = transfer.build(backbone=backbone, image_size=size)
        answers[f"{backbone} {size}"] = float(model.get_layer("Conv_1").kernel.numpy().sum())
    except RunError as error:
        answers[f"{backbone} {size}"] = str(error)
print(json.dumps(answers))
"""
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(models.__path__[0])))
    done = subprocess.run(
        [sys.executable, "-c", script, root], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["mobilenetv2 96"] == float(backbone.get_layer("Conv_1").kernel.numpy().sum())
    assert re.search(
        rf"cannot load the ImageNet weights of mobilenetv2 .*: replace its file in {re.escape(str(home))}, or train from scratch",
        answers["mobilenetv2 128"],
    )
    assert re.search(
        r"cannot load the ImageNet weights of vgg16 \(URL fetch failure .*: put vgg16_weights_tf_dim_ordering_tf_kernels_notop\.h5"
        rf" into {re.escape(str(home))}, or train from scratch with weights=None",
        answers["vgg16 None"],
    )


def test_transfer_refuses_what_it_would_ignore(tmp_path):
    with pytest.raises(ConfigError, match="brings its own"):
        build("transfer", mean=(0.5, 0.5, 0.5), **SMALL["transfer"])
    with pytest.raises(ConfigError, match="allowed for transfer: three channels"):
        build("transfer", input_shape=(32, 32, 1), **SMALL["transfer"])
    with pytest.raises(ConfigError, match=r"unknown backbone 'vgg'; allowed: vgg16"):
        transfer(backbone="vgg")
    with pytest.raises(ConfigError, match=r"weights is 'nowhere\.h5'"):
        transfer(weights="nowhere.h5")
    (tmp_path / "other.h5").write_bytes(b"not weights")
    with pytest.raises(RunError, match="does not hold the weights of vgg16"):
        transfer(weights=str(tmp_path / "other.h5"))


# ---- build_model


@pytest.mark.parametrize("name", [n for n in models.ARCHITECTURES if n != "transfer"])
def test_build_model_builds_every_architecture(name):
    model = models.build_model(name, num_classes=7, input_shape=(40, 40, 3))
    assert model.name == name and model.output_shape == (None, 7) and model.input_shape == (None, 40, 40, 3)


def test_build_model_builds_the_projects_own_network_by_default():
    model = models.build_model(filters=(8, 16, 16), dropout=0.1)
    assert model.name == "fast" and [
        layer.rate for layer in model.layers if type(layer) is keras.layers.Dropout
    ] == [0.1]
    assert models.build_model("transfer", weights=None, backbone="mobilenetv2").name == "transfer"


@pytest.mark.parametrize(
    ("architecture", "rates"),
    [("fast", (0.1, 0.2, 0.3)), ("vgg", (0.1, 0.2, 0.3, 0.4)), ("leaky", (0.1, 0.2, 0.3))],
)
def test_dropout_takes_one_rate_per_block(architecture, rates):
    more = {"head_dropout": 0.0} if architecture == "leaky" else {}
    model = models.build_model(architecture, dropout=rates, **more)
    assert [layer.rate for layer in model.layers if type(layer) is keras.layers.Dropout] == list(rates)
    with pytest.raises(
        ConfigError, match=rf"dropout is \(0\.1, 0\.2\); allowed: one number, or {len(rates)} numbers"
    ):
        models.build_model(architecture, dropout=(0.1, 0.2))


TEXTS = ("activation", "backbone", "weights")


def wrong_types():
    """Every argument of every build function, with a value of a type that it does not take."""
    for name in models.ARCHITECTURES:
        build = models._build_function(name)
        for argument in inspect.signature(build).parameters:
            for value in (object(), {"a": 1}, "many" if argument not in TEXTS else 3, [None], float("nan")):
                yield pytest.param(name, argument, value, id=f"{name}-{argument}-{type(value).__name__}")


@pytest.mark.parametrize(("architecture", "argument", "value"), list(wrong_types()))
def test_an_argument_of_a_wrong_type_is_one_line(architecture, argument, value):
    with pytest.raises(ConfigError) as caught:
        models.build_model(architecture, **{argument: value})
    assert "\n" not in str(caught.value) and "allowed: " in str(caught.value)
    assert str(caught.value).startswith(f"{argument} is ")


def test_numpy_numbers_are_numbers():
    shape, rates = (np.int64(32), 32, np.int32(3)), np.array([0.1, 0.2, 0.3])
    model = models.build_model(
        "leaky", input_shape=shape, num_classes=np.int64(3), dropout=rates, dense=np.int32(8)
    )
    assert model.input_shape == (None, 32, 32, 3) and model.output_shape == (None, 3)
    assert models.build_model("fast", dropout=np.float32(0.25)).get_layer("dropout").rate == 0.25
    assert models.build_model("vgg", batch_norm=np.bool_(True)).get_layer("block1_norm1")


def test_an_unknown_argument_is_one_line():
    with pytest.raises(
        ConfigError, match=r"unknown option of leaky 'block'; allowed: .*Did you mean 'blocks'\?"
    ):
        models.build_model("leaky", block=((8,),))
    with pytest.raises(ConfigError, match="unknown architecture 'lenet'"):
        models.build_model("lenet")


# ---- FLOPs, by hand


def test_flops_of_depthwise_and_separable_convolutions():
    images = keras.Input((10, 10, 6))
    depthwise = keras.Model(
        images, keras.layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(images)
    )
    assert models.forward_flops(depthwise) == 2 * (10 * 10) * (3 * 3) * (
        6 * 2
    )  # a 3x3 window for each of 12 maps
    separable = keras.Model(images, keras.layers.SeparableConv2D(5, 3, strides=2, padding="same")(images))
    assert models.forward_flops(separable) == 2 * (5 * 5) * (9 * 6 + 6 * 5)


def test_flops_of_a_layer_that_is_used_twice():
    images, layer = keras.Input((8, 8, 3)), keras.layers.Conv2D(3, 3)
    assert models.forward_flops(keras.Model(images, layer(layer(images)))) == 2 * (36 + 16) * 9 * 3 * 3


def test_flops_of_a_model_inside_a_model():
    def chain(shape):
        return keras.Sequential([keras.Input(shape), keras.layers.Conv2D(4, 3), keras.layers.Conv2D(5, 3)])

    images = keras.Input((12, 12, 3))
    outer = keras.Model(
        images, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(chain((12, 12, 3))(images)))
    )
    expected = 2 * (10 * 10 * 9 * 3 * 4 + 8 * 8 * 9 * 4 * 5) + 2 * 5 * 2
    assert models.forward_flops(outer) == expected


def test_flops_of_models_inside_that_take_other_shapes_and_several_inputs():
    layers, images = keras.layers, keras.Input((16, 8, 3))
    any_size = keras.Input((None, None, 3))
    inner = keras.Model(any_size, layers.Conv2D(4, 3, padding="same")(any_size))
    x = inner(images)  # 128 positions of 27 inputs and 4 outputs
    tokens = keras.Input((None, 4))
    dense = keras.Model(tokens, layers.Dense(5)(tokens))
    y = layers.Reshape((128, 4))(x)
    one, two = keras.Input((128, 5)), keras.Input((128, 5))
    both = keras.Model([one, two], layers.Dense(2)(layers.Add()([one, two])))
    model = keras.Model(images, both([dense(y), layers.ReLU()(dense(y))]))
    assert models.forward_flops(model) == 2 * 128 * (27 * 4 + 2 * 4 * 5 + 5 * 2)
