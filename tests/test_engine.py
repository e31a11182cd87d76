"""The engine against plain Keras, NumPy and itself. Strategies of several replicas are test_distribution's."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.utils.class_weight import compute_sample_weight

from cifar10_trainer import layers, models, scoring
from cifar10_trainer.accelerate import ELEMENTWISE, check_sizes, make_training_model, synchronizes
from cifar10_trainer.config import Augmentation, Averaging, Config, Optimizer, Schedule
from cifar10_trainer.engine import Engine, weigh
from cifar10_trainer.errors import ConfigError, RunError
from cifar10_trainer.layers import (
    FastConv2D,
    FastDropout,
    FastLeakyReLU,
    FastMaxPooling2D,
    FastReLU,
    FusedBatchNormalization,
    fast_activation,
    fast_relu,
    kernel_gradient,
)
from cifar10_trainer.models import fast
from cifar10_trainer.pipeline import BatchMaker, index_data, training_data
from cifar10_trainer.recipes import RECIPES

SGD = Optimizer(name="sgd", learning_rate=0.05, momentum=0.9)
ADAM = Optimizer(name="adam", learning_rate=0.01)
# With ReLU, whose last bit does not depend on how the graph around it is fused.
FAST = Config(
    architecture="fast",
    options={"filters": (4, 8), "activation": "relu"},
    optimizer=SGD,
    batch_size=16,
    epochs=2,
)
VGG = Config(
    architecture="vgg",
    options={"filters": (4, 8), "dense": 8, "batch_norm": True},
    pixels="unit",
    optimizer=SGD,
    batch_size=16,
    epochs=2,
)


def pictures(n=64, seed=0):
    """Random uint8 images [n, 32, 32, 3] whose brightness tells their label of 10, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    noise = generator.integers(0, 60, (n, 32, 32, 3))
    return (noise + 20 * labels[:, None, None, None]).astype(np.uint8), labels


def plain_model(config, images=None):
    keras.utils.set_random_seed(config.seed)
    half = None if config.pixels == "unit" else (0.5, 0.5, 0.5)
    model = models.build(config, input_shape=(32, 32, 3), num_classes=10, mean=half, std=half)
    if config.whitening:
        fast.whiten(model, images, half, half)
    return model


def make_engine(config, n=64, policy="float32", strategy=None, **options):
    images, labels = pictures(n)
    options["strategy"] = strategy or tf.distribute.get_strategy()
    model = plain_model(config, images)
    return Engine(model, config, images, labels, policy=policy, num_classes=10, **options)


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


# --- fused batch norm -----------------------------------------------------------------------------------


def norm_and_gradients(layer, x, weights, seeds, training):
    """Output, gradients to input and weights of sum(output * seeds), moving mean and variance."""
    layer.build(x.shape)
    layer.set_weights(weights)
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        output = layer(x, training=training)
        total = tf.reduce_sum(tf.cast(output, tf.float32) * seeds)
    scale_and_offset = [v.value for v in (layer.gamma, layer.beta) if v is not None]
    gradients = tape.gradient(total, [x, *scale_and_offset])
    return output, gradients, [np.array(layer.moving_mean), np.array(layer.moving_variance)]


@pytest.mark.parametrize("mode", ["training", "inference", "frozen"])
@pytest.mark.parametrize("scale_and_center", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (7, 3)], ids=["rank4", "rank2"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_fused_batch_norm_is_keras_batch_norm(policy, shape, scale_and_center, mode):
    generator = np.random.default_rng(1)
    scale, center = scale_and_center
    # Numbers that bfloat16 holds exactly, so that both start from the same.
    x = tf.cast(tf.cast(generator.normal(1, 2, shape), tf.bfloat16), tf.float32).numpy()
    seeds = generator.normal(size=shape).astype(np.float32)
    weights = [w for w, on in (([0.5, 2.0, -1.0], scale), ([0.1, -0.2, 3.0], center)) if on]
    weights = [np.float32(w) for w in (*weights, [0.5, 1.5, 1.0], [4.0, 3.0, 5.0])]
    options = {"scale": scale, "center": center, "momentum": 0.7, "epsilon": 0.002}
    results = []
    for kind, dtype in ((FusedBatchNormalization, policy), (keras.layers.BatchNormalization, "float32")):
        layer = kind(**options, dtype=dtype)
        layer.trainable = mode != "frozen"
        results.append(norm_and_gradients(layer, x, weights, seeds, mode != "inference"))
    (output, gradients, moving), (plain_output, plain_gradients, plain_moving) = results

    # float32: rounding of sums over 120 numbers. bfloat16: eight bits of each number in and out.
    near = {"rtol": 1e-4, "atol": 1e-4} if policy == "float32" else {"rtol": 0.02, "atol": 0.05}
    assert output.dtype == (tf.bfloat16 if policy == "mixed_bfloat16" else tf.float32)
    assert output.shape == shape
    np.testing.assert_allclose(tf.cast(output, tf.float32), plain_output, **near)
    for one, other in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(one, other, **near)
    # The statistics are computed in float32 from the same numbers, whatever the policy.
    for one, other, before in zip(moving, plain_moving, weights[-2:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
        assert np.array_equal(one, before) == (mode != "training")


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("rate", [0.2, 0.3, 0.5])
def test_fast_dropout_is_dropout(policy, rate):
    layer = FastDropout(rate, seed=1, dtype=policy)
    ones = tf.ones([999, 101])  # an odd number of numbers
    first, second = (tf.cast(layer(ones, training=True), tf.float32).numpy() for _ in range(2))
    # Keras's own values, within the eight bits of bfloat16
    kept = float(keras.ops.max(keras.layers.Dropout(rate, dtype="float32")(ones, training=True)))
    for output in (first, second):
        assert output.shape == (999, 101)
        assert set(np.unique(output == 0)) == {False, True}
        np.testing.assert_allclose(output[output != 0], kept, rtol=4e-3 if "b" in policy else 1e-4)
        # five standard deviations of a share of 100,899 numbers
        assert abs((output == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / output.size)
    zeros = [(x == 0).ravel() for x in (first, second, np.roll(first, 1, 0), np.roll(first, 1, 1))]
    for other in zeros[1:]:  # neither the next call nor a neighbour: correlation below five in sqrt(n)
        assert abs(np.corrcoef(zeros[0], other)[0, 1]) < 5 / np.sqrt(first.size)
    assert layer(ones) is ones or np.array_equal(layer(ones), ones)


@pytest.mark.parametrize("rate", [1.0, 1 - 2**-18])
def test_fast_dropout_may_drop_everything(rate):
    output = FastDropout(rate, seed=1)(tf.ones([8, 8]), training=True)
    np.testing.assert_array_equal(output, keras.layers.Dropout(1.0)(tf.ones([8, 8]), training=True))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "float64"])
def test_fast_dropout_gates_its_gradient(policy, loops):
    values = np.random.default_rng(0).normal(1, 0.1, (64, 33)).astype(np.float32)
    dtype = "float64" if policy == "float64" else "float32"
    output, gradient, compiles = differentiated(FastDropout(0.25, seed=3, dtype=policy), values, dtype)
    output = tf.cast(output, tf.float64).numpy()
    near = 8e-3 if "16" in policy else 1e-6  # two roundings to 8 bits
    np.testing.assert_allclose(output, np.where(output == 0, 0, values * 4 / 3), rtol=near)
    np.testing.assert_allclose(tf.cast(gradient, tf.float64), np.where(output == 0, 0, 8 / 3), rtol=near)
    assert 0 < (output == 0).mean() < 0.5
    assert compiles == (loops == "large")


@pytest.fixture(params=["small", "large", "no XLA"])
def loops(request, monkeypatch):
    """Small maps, which TensorFlow's kernels compute; large ones, for which XLA compiles; and a TensorFlow without XLA."""
    monkeypatch.setattr(layers, "LARGE", 1 if request.param != "small" else 1 << 62)
    monkeypatch.setattr(layers, "has_xla", lambda: request.param != "no XLA")
    return request.param


def differentiated(layer, values, dtype="float32"):
    """The output of a layer for `values`, and its gradient where that of the output is 2."""
    inputs = keras.Input(values.shape[1:], dtype=dtype)
    model = keras.Model(inputs, layer(inputs))

    @tf.function(autograph=False)
    def differentiate(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = model(x, training=True)
        return output, tape.gradient(output, x, 2 * tf.ones_like(output))

    x = tf.constant(values, dtype)
    compiles = "_XlaMustCompile" in str(differentiate.get_concrete_function(x).graph.as_graph_def())
    output, gradient = differentiate(x)
    return output, gradient, compiles


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "float64"])
@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_fast_relu_is_relu(slope, policy, loops):
    values = np.float32([[-1e30, -2.5, -1e-4, -0.0, np.nan], [0.0, 1e-4, 2.5, 1e30, np.inf]])
    dtype = "float64" if policy == "float64" else "float32"
    kinds = (FastReLU, keras.layers.ReLU) if slope == 0 else (FastLeakyReLU, keras.layers.LeakyReLU)
    arguments = {"dtype": policy} | ({"negative_slope": slope} if slope else {})
    fast, plain = (differentiated(kind(**arguments), values, dtype) for kind in kinds)
    assert fast[0].dtype == plain[0].dtype == keras.DTypePolicy(policy).compute_dtype
    for one, other in zip(fast[:2], plain[:2], strict=True):
        one, other = (tf.cast(x, tf.float64) for x in (one, other))
        np.testing.assert_allclose(
            one, other, rtol=1e-7
        )  # TensorFlow's slope is a float32; all else is equal
    by_hand = np.where(values > 0, 2, 2 * slope)
    np.testing.assert_allclose(fast[1], by_hand, rtol=4e-3 if "16" in policy else 1e-6)
    assert (fast[2], plain[2]) == (loops == "large", False)


def test_fast_relu_that_nothing_fuses_is_compiled():
    values = np.float32([[-2.5, -0.0, 2.5]])
    output, gradient, compiles = differentiated(keras.layers.Activation(fast_relu(0.0, False)), values)
    np.testing.assert_array_equal(output, [[0, 0, 2.5]])
    np.testing.assert_array_equal(gradient, [[0, 0, 2]])
    assert compiles


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "float64"])
@pytest.mark.parametrize("name", ["elu", "gelu", "mish", "silu"])
def test_fast_activations_are_the_activations(name, policy, loops):
    """Beside Keras's gradient in float64. A result next to 5 is rounded by 0.016 in bfloat16."""
    function = getattr(keras.activations, name)
    assert function in ELEMENTWISE
    values = np.float32([-80, -20.25, -5, -1, -0.125, -1e-30, 0, 1e-30, 0.125, 1, 5, 20.25, 80])
    values = np.stack([values, values[::-1]])
    dtype = "float64" if policy == "float64" else "float32"
    fast = differentiated(keras.layers.Activation(fast_activation(function), dtype=policy), values, dtype)
    exact = differentiated(keras.layers.Activation(function, dtype="float64"), values, "float64")
    near = {"float32": 2e-6, "mixed_bfloat16": 0.03, "mixed_float16": 0.003, "float64": 1e-12}[policy]
    assert fast[0].dtype == keras.DTypePolicy(policy).compute_dtype
    np.testing.assert_allclose(tf.cast(fast[0], tf.float64), exact[0], rtol=near, atol=near)
    np.testing.assert_allclose(tf.cast(fast[1], tf.float64), exact[1], atol=2 * near)
    assert (fast[2], exact[2]) == (loops != "no XLA", False)


def test_fast_silu_by_hand():
    """x s(x), whose slope is s + x s (1 - s)."""
    values = np.float32([[-20.25, -1, 0, 0.125, 5]])
    output, gradient, _ = differentiated(
        keras.layers.Activation(fast_activation(keras.activations.silu)), values
    )
    s = 1 / (1 + np.exp(-values.astype(np.float64)))
    np.testing.assert_allclose(output, values * s, atol=2e-6)
    np.testing.assert_allclose(gradient, 2 * (s + values * s * (1 - s)), atol=4e-6)


def test_where_fast_activations_are(monkeypatch):
    """On a CPU, unless XLA compiles the whole step; and the ReLU after a convolution without bias is compiled itself."""

    def chosen(recipe, **options):
        model = models.build(RECIPES[recipe], input_shape=(32, 32, 3), num_classes=10)
        found = make_training_model(model, "mixed_bfloat16", **options).layers
        return [layer.activation for layer in found if type(layer) is keras.layers.Activation]

    silu, relu, lone_relu = (
        fast_activation(keras.activations.silu),
        fast_relu(0.0, True),
        fast_relu(0.0, False),
    )
    assert chosen("fast.94") == chosen("fast.94", any_size=True) == [silu] * 7
    assert chosen("fast.85") == [lone_relu] + [relu] * 6  # after the whitening, and after each batch norm
    assert chosen("fast.94", compiled=True) == [keras.activations.silu] * 7
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: ["a GPU"])
    assert chosen("fast.94") == [keras.activations.silu] * 7


def test_the_activations_of_layers_are_fast():
    images = keras.Input((8, 8, 64))
    x = keras.layers.Conv2D(64, 3, padding="same", activation="relu")(images)
    x = keras.layers.Conv2D(64, 3, use_bias=False, activation="relu")(x)
    x = keras.layers.Dense(8, activation="gelu")(keras.layers.Flatten()(x))
    x = keras.layers.ReLU(max_value=6)(keras.layers.Dense(8, activation="tanh")(x))
    model = keras.Model(images, keras.layers.Dense(10, activation="softmax")(x))
    result = make_training_model(model, "float32", any_size=False)
    found = [layer.activation for layer in result.layers if hasattr(layer, "activation")]
    gelu = fast_activation(keras.activations.gelu)
    assert found[:4] == [fast_relu(0.0, True), fast_relu(0.0, False), gelu, keras.activations.tanh]
    assert sum(type(layer) is keras.layers.ReLU for layer in result.layers) == 1  # of at most 6
    assert model.layers[1].activation is keras.activations.relu, "the plain model stays as it is"


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [(2, 2), (5, 4), (6, 7), (7, 7)], ids=str)
@pytest.mark.parametrize("any_size", [False, True])
def test_fast_pooling_is_max_pooling(any_size, size, compiled, policy):
    """The numbers are few, so that equal ones meet: the first of them has the gradient."""
    generator = np.random.default_rng(3)
    x = generator.integers(-1, 3, (4, *size, 5)).astype(np.float32)
    seeds = generator.normal(size=(4, size[0] // 2, size[1] // 2, 5)).astype(np.float32)
    results = []
    for kind in (FastMaxPooling2D, keras.layers.MaxPooling2D):
        maps = keras.Input((None, None, 5) if any_size else (*size, 5))
        model = keras.Model(maps, kind(dtype=policy)(maps))

        @tf.function(jit_compile=compiled)
        def differentiate(model, maps):
            with tf.GradientTape() as tape:
                tape.watch(maps)
                output = model(maps)
                total = tf.reduce_sum(seeds * tf.cast(output, tf.float32))
            return output, tape.gradient(total, maps)

        results.append(differentiate(model, tf.constant(x)))
    assert results[0][0].dtype == (tf.bfloat16 if policy == "mixed_bfloat16" else tf.float32)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(tf.cast(one, tf.float32), tf.cast(other, tf.float32))
    for n in range(4):  # the first window of each image and channel, by hand
        for c in range(5):
            gradient = np.zeros(4)
            gradient[x[n, :2, :2, c].argmax()] = tf.cast(seeds[n, 0, 0, c], results[0][0].dtype)
            np.testing.assert_array_equal(results[0][1][n, :2, :2, c], gradient.reshape(2, 2))


def test_fast_pooling_is_where_xla_compiles():
    def chosen(model, **options):
        return [
            type(layer) is FastMaxPooling2D
            for layer in make_training_model(model, "float32", **options).layers
        ]

    model = models.build(RECIPES["leaky.baseline"], input_shape=(32, 32, 3), num_classes=10)
    assert sum(chosen(model, compiled=True)) == 3
    assert sum(chosen(model)) == 0
    images = keras.Input((12, 12, 3))
    for options in ({"pool_size": 3}, {"strides": 1}, {"padding": "same"}):
        x = keras.layers.MaxPooling2D(**options)(images)
        x = keras.layers.Dense(10, activation="softmax")(keras.layers.GlobalMaxPooling2D()(x))
        assert sum(chosen(keras.Model(images, x), compiled=True)) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (3, 5), (8, 8)], ids=str)
def test_kernel_gradient_by_its_definition(size):
    """Kernel place (i, j) has the sum over all pixels p of x[p + (i, j)] dy[p]."""
    generator = np.random.default_rng(0)
    x, dy = (generator.normal(size=(2, *size, channels)).astype(np.float32) for channels in (3, 4))
    expected = np.zeros((3, 3, 3, 4))
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for i in range(3):
        for j in range(3):
            part = padded[:, i : i + size[0], j : j + size[1]]
            expected[i, j] = np.einsum("nhwc,nhwd->cd", part, dy)
    found = kernel_gradient(tf.constant(x), tf.constant(dy))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # float32 sums of up to 128


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("side", [4, 5], ids=["small", "not small"])
@pytest.mark.parametrize("any_size", [False, True])
def test_fast_convolution_is_the_convolution(any_size, side, policy):
    """Of 64 channels, maps of 4x4 are small and those of 5x5 are not."""
    assert (FastConv2D.small(side, side, 64)) == (side == 4)
    generator = np.random.default_rng(1)
    x, weights = generator.normal(size=(3, side, side, 64)), generator.normal(size=(3, 3, 64, 64)) / 24
    seeds, results = tf.constant(generator.normal(size=(3, side, side, 64)), tf.float32), []
    for kind in (FastConv2D, keras.layers.Conv2D):
        layer = kind(64, 3, padding="same", activation="relu", dtype=policy)
        maps = keras.Input((None, None, 64) if any_size else (side, side, 64))
        model = keras.Model(maps, layer(maps))
        layer.set_weights([weights, np.full(64, 0.1)])
        images = tf.constant(x, tf.float32)

        @tf.function
        def differentiate(model, images):
            with tf.GradientTape() as tape:
                tape.watch(images)
                output = model(images)
                total = tf.reduce_sum(seeds * tf.cast(output, tf.float32))
            return output, *tape.gradient(total, [images, *model.trainable_variables])

        results.append(differentiate(model, images))
    tolerance = 2e-2 if policy == "mixed_bfloat16" else 1e-5
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        one, other = tf.cast(one, tf.float32), tf.cast(other, tf.float32)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


def test_fast_convolutions_are_where_they_pay(monkeypatch):
    def chosen(recipe, **options):
        model = models.build(RECIPES[recipe], input_shape=(32, 32, 3), num_classes=10)
        training_model = make_training_model(model, "float32", **options)
        return [layer.name for layer in training_model.layers if type(layer) is FastConv2D]

    last = ["block3_conv1", "block3_conv2"]
    # 32 pixels: the maps of fast are 31, 15, 15, 7, 7 and 3 pixels a side.
    assert chosen("fast.default") == ["block2_conv2", *last]
    assert chosen("fast.85") == last[1:]  # 7 x 7 pixels are many for 128 channels
    assert chosen("fast.85", any_size=True) == ["block2_conv2", *last]
    assert chosen("leaky.baseline") == []  # 8x8 and more
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: ["a GPU"])
    assert chosen("fast.default") == []


def test_the_training_model_has_the_fast_layers():
    training_model = make_training_model(
        models.build(RECIPES["leaky.baseline"], input_shape=(32, 32, 3), num_classes=10), "float32"
    )
    found = [layer for layer in training_model.layers if isinstance(layer, keras.layers.Dropout)]
    assert [layer.rate for layer in found] == [0.2, 0.3, 0.4, 0.4]
    assert all(type(layer) is FastDropout for layer in found)
    found = [layer for layer in training_model.layers if isinstance(layer, keras.layers.LeakyReLU)]
    assert [type(layer) for layer in found] == [FastLeakyReLU] * 7
    assert {layer.negative_slope for layer in found} == {0.1}


# --- the training model ---------------------------------------------------------------------------------


def logits_of(model, images):
    head = keras.Model(model.input, model.get_layer("logits").output)
    return head(images.astype(np.float32), training=False).numpy()


@pytest.mark.parametrize("config", [FAST.override(whitening=True), VGG], ids=["fast", "vgg"])
def test_the_training_model_computes_what_the_plain_model_does(config):
    images, _ = pictures(8)
    model = plain_model(config, images)
    # Statistics unlike those of a fresh layer, so that a forgotten one shows.
    generator = np.random.default_rng(0)
    model.set_weights([w + generator.uniform(0, 0.1, w.shape) for w in model.get_weights()])
    training_model = make_training_model(model, "float32")
    found = training_model(images, training=False)
    np.testing.assert_allclose(found, logits_of(model, images), rtol=1e-4, atol=1e-5)  # float32 rounding
    assert found.shape == (8, 10)

    assert [v.path for v in training_model.variables if "seed" not in v.path] == [
        v.path for v in model.variables if "seed" not in v.path
    ]
    assert [v.path for v in training_model.trainable_variables] == [v.path for v in model.trainable_variables]
    for one, other in zip(training_model.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(isinstance(layer, FusedBatchNormalization) for layer in training_model.layers)


def test_the_training_model_of_any_size_has_the_weights_of_one_size():
    images, _ = pictures(4)
    model = plain_model(FAST)
    small = models.build(FAST, input_shape=(20, 20, 3), num_classes=10, mean=(0.5,) * 3, std=(0.5,) * 3)
    small.set_weights(model.get_weights())
    found = make_training_model(model, "float32", any_size=True)(images[:, :20, :20], training=False)
    np.testing.assert_allclose(found, logits_of(small, images[:, :20, :20]), rtol=1e-4, atol=1e-5)


def test_the_training_model_keeps_pixels_and_logits_in_float32():
    training_model = make_training_model(plain_model(VGG), "mixed_bfloat16")
    computed = {layer.name: layer.compute_dtype for layer in training_model.layers}
    assert computed["preprocess"] == computed["logits"] == "float32"
    assert computed["block1_conv1"] == computed["block1_norm1"] == computed["head_dense1"] == "bfloat16"
    assert all(v.dtype == "float32" for v in training_model.trainable_variables)
    assert training_model(pictures(2)[0]).dtype == tf.float32


def test_synchronised_batch_norm_is_keras_own():
    norms = [
        layer
        for layer in make_training_model(plain_model(VGG), "float32", synchronize=True, replicas=2).layers
        if "norm" in layer.name
    ]
    assert norms and all(
        type(layer) is keras.layers.BatchNormalization and layer.synchronized for layer in norms
    )


def test_a_batch_norm_that_asks_for_it_is_synchronised_among_replicas():
    images = keras.Input((8, 8, 3))
    x = keras.layers.BatchNormalization(synchronized=True, name="own")(images)
    x = keras.layers.BatchNormalization(name="other")(x)
    model = keras.Model(images, keras.layers.Dense(3, activation="softmax")(keras.layers.Flatten()(x)))
    of = {n: make_training_model(model, "float32", replicas=n) for n in (1, 2)}
    assert type(of[1].get_layer("own")) is type(of[2].get_layer("other")) is FusedBatchNormalization
    own = of[2].get_layer("own")
    assert type(own) is keras.layers.BatchNormalization and own.synchronized
    assert synchronizes(model) and not synchronizes(plain_model(VGG))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="batch_size is 65; allowed: at most the 64 training images"):
        make_engine(VGG.override(batch_size=65))


# --- a step ---------------------------------------------------------------------------------------------


def smooth_model(l2):
    """Without ReLU and max pooling, whose jumps would turn float32's rounding into visible differences."""
    keras.utils.set_random_seed(0)
    penalty = keras.regularizers.L2(l2) if l2 else None
    images = keras.Input((32, 32, 3), name="images")
    x = keras.layers.Rescaling(1 / 255, name="preprocess")(images)
    x = keras.layers.Conv2D(6, 5, strides=3, use_bias=False, kernel_regularizer=penalty, name="conv")(x)
    x = keras.layers.BatchNormalization(momentum=0.8, name="norm")(x)
    x = keras.layers.Activation("tanh", name="tanh")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dense(10, kernel_regularizer=penalty, name="logits")(x)
    return keras.Model(images, keras.layers.Activation("softmax", name="probabilities")(x))


STEPS = {
    "plain": {"optimizer__momentum": 0.0},
    "momentum": {},
    "nesterov": {"optimizer__nesterov": True},
    "decay in the gradient": {"optimizer__weight_decay": 0.1},
    "L2 in the loss": {"l2": 0.05},
    "label smoothing": {"label_smoothing": 0.3},
    "class weights": {"label_smoothing": 0.3, "class_weights": "balanced"},
    "adam": {"optimizer": ADAM},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_of_keras(name):
    """The whole training set is one batch, so its order is no matter."""
    settings = dict(STEPS[name])
    model = smooth_model(settings.pop("l2", 0.0))
    config = Config(optimizer=SGD, batch_size=32, epochs=3).override(**settings)
    images = np.random.default_rng(4).integers(0, 256, (32, 32, 32, 3), np.uint8)
    labels, image_weights = np.arange(32) % 10, None
    if config.class_weights == "balanced":
        labels = np.r_[np.arange(10), np.zeros(10, int), np.ones(8, int), [7] * 4]
        image_weights = compute_sample_weight("balanced", labels)
    plain = keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    none = tf.distribute.get_strategy()
    engine = Engine(model, config, images, labels, strategy=none, policy="float32", num_classes=10)
    o = config.optimizer
    optimizer = (
        keras.optimizers.Adam(o.learning_rate)
        if o.name == "adam"
        else keras.optimizers.SGD(o.learning_rate, momentum=o.momentum, nesterov=o.nesterov)
    )
    targets = np.eye(10, dtype=np.float32)[labels]
    cross_entropy = keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing)
    expected, weights = [], [v.value for v in plain.trainable_variables]
    for _ in range(3):
        with tf.GradientTape() as tape:
            probabilities = plain(images.astype(np.float32), training=True)
            loss = cross_entropy(targets, probabilities, sample_weight=image_weights)
            objective = loss + tf.add_n(plain.losses) if plain.losses else loss
        gradients = tape.gradient(objective, weights)
        if o.weight_decay:
            gradients = [g + o.weight_decay * w for g, w in zip(gradients, weights, strict=True)]
        optimizer.apply(gradients, plain.trainable_variables)
        expected.append((float(loss), np.mean(probabilities.numpy().argmax(1) == labels)))

    before = model.get_weights()
    sums = np.cumsum(expected, axis=0)
    for step in range(3):
        logs = engine.train(1)
        means = sums[step] / (step + 1)  # since the start
        np.testing.assert_allclose([logs["loss"], logs["accuracy"]], means, rtol=1e-5, err_msg=f"step {step}")
    # float32 rounding: Adam divides by the root of small squares, which enlarges it.
    near = {"rtol": 1e-3, "atol": 1e-4} if o.name == "adam" else {"rtol": 1e-5, "atol": 1e-6}
    found = engine.export().get_weights()
    for variable, start, one, other in zip(plain.weights, before, found, plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, **near, err_msg=variable.path)
        assert np.abs(one - start).max() > 1e-3


def test_a_mixed_image_counts_as_both_of_its_parts_do():
    """Of class 0 with weight 3 and class 2 with weight 0.5, by hand."""
    class_weights = np.array([3.0, 1.0, 0.5], np.float32)
    targets = tf.constant([[0.25, 0, 0.75], [0, 1, 0]])
    logits = tf.constant([[1.0, -2.0, 0.5], [0.1, 0.2, 0.3]])
    aims, weights = weigh(targets, class_weights)
    found = weights * tf.nn.softmax_cross_entropy_with_logits(aims, logits)
    log_p = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    expected = [-(0.25 * 3 * log_p[0, 0] + 0.75 * 0.5 * log_p[0, 2]), -log_p[1, 1]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(weights, [0.25 * 3 + 0.75 * 0.5, 1.0], rtol=1e-6)


def test_class_weights_count_in_mixed_images():
    """With a head of zeros all classes are equally likely, and the loss of an image is log(10) times its weight."""
    images, labels = pictures(64)
    labels = np.where(labels < 5, 0, labels)  # half of all images are of one class, and 1 to 4 have none
    config = FAST.override(augmentation__mixup=0.4, class_weights="balanced", batch_size=64)
    model = plain_model(config)
    head = model.get_layer("head")
    head.set_weights([np.zeros_like(w) for w in head.get_weights()])
    none = tf.distribute.get_strategy()
    engine = Engine(model, config, images, labels, strategy=none, policy="float32", num_classes=10)
    _, targets = BatchMaker(config.augmentation, 10)(engine.table, engine.labels, *engine.sampler.epoch(0))
    counts = np.bincount(labels, minlength=10)
    by_hand = np.where(counts > 0, 64 / (10 * np.maximum(counts, 1)), 0)
    expected = np.log(10) * (targets.numpy() @ by_hand).mean()
    assert engine.train(1)["loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected / np.log(10) - 1) > 0.01


def test_one_call_of_many_steps_is_many_calls_of_one():
    config = FAST.override(
        optimizer=ADAM,
        options__dropout=0.3,
        averaging=Averaging(every=3),
        augmentation=Augmentation(flip="random", shift=2),
        schedule=Schedule(name="cosine", warmup=0.2),
    )
    one, other, third = (make_engine(config) for _ in range(3))
    logs = one.train(8)
    for _ in range(8):
        same = other.train(1)
    for count in (1, 2, 4, 1):
        third.train(count)
    assert one.step == other.step == third.step == 8
    assert logs == same == third.running.logs()
    assert_same(other.state(), one.state())
    assert_same(third.state(), one.state())


AUGMENTED = Augmentation(
    flip="alternating",
    shift=2,
    cutout=6,
    cutout_warmup=3,
    rotation=0.1,
    brightness=0.1,
    contrast=0.2,
    mixup=0.4,
)


@pytest.mark.parametrize(
    "config",
    [FAST.override(augmentation=AUGMENTED, label_smoothing=0.1), FAST.override(sizes=(20, 32))],
    ids=["augmented", "sizes"],
)
def test_images_on_the_device_give_the_same_run(config):
    here, there = (make_engine(config, on_device=on_device) for on_device in (False, True))
    while here.step < here.steps:
        assert here.train(5) == there.train(5)
    assert_same(there.state(), here.state())


def test_lookahead_averaging():
    """An engine without averaging does the steps, and NumPy the averaging, batch-norm statistics included."""
    config = FAST.override(batch_size=16, epochs=2)
    every, decay, steps = 3, 0.9, 8
    averaging = make_engine(config.override(averaging=Averaging(every=every, decay=decay)))
    plain = make_engine(config)
    assert averaging.steps == plain.steps == steps

    variables = [v for v in plain.training_model.variables if v.dtype == "float32"]
    assert any(v.path.endswith("moving_mean") for v in variables)
    averages = [v.numpy() for v in variables]
    moved = 0
    for step in range(1, steps + 1):
        plain.train(1)
        if step % every == 0:
            keep = np.float32(decay**every * (step / steps) ** 3)
            for i, v in enumerate(variables):
                if v.trainable or v.path.endswith(("moving_mean", "moving_variance")):
                    averages[i] = keep * averages[i] + (1 - keep) * v.numpy()
                    moved = max(moved, np.abs(averages[i] - v.numpy()).max())
                    v.assign(averages[i])
    averaging.train(steps)
    assert moved > 0.01  # or there is nothing to see
    for v, w in zip(plain.training_model.get_weights(), averaging.training_model.get_weights(), strict=True):
        np.testing.assert_allclose(w, v, rtol=1e-4, atol=1e-6)  # the factor in float32 and in float64


IMAGES, LABELS = pictures(20)


@pytest.mark.parametrize(
    ("images", "labels", "num_classes", "text"),
    [
        ((IMAGES / 255).astype("float32"), LABELS, 10, "images has dtype float32"),
        (IMAGES.astype("int64") + 300, LABELS, 10, "images has dtype int64"),
        (IMAGES, LABELS + 1, 10, "num_classes is 10, but the labels go up to 10"),
        (IMAGES, LABELS - 1, 10, "labels has the value -1; allowed: integers from 0"),
        (IMAGES, LABELS[:5], 10, r"labels has shape \(5,\); allowed: \(20,\)"),
        (IMAGES, LABELS, 11, "num_classes is 11, but .* the model has 10 outputs"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(images, labels, num_classes, text):
    with pytest.raises(ConfigError, match=text):
        Engine(
            plain_model(VGG), VGG, images, labels,
            strategy=tf.distribute.get_strategy(), policy="float32", num_classes=num_classes,
        )  # fmt: skip


@pytest.mark.parametrize("call", [lambda e: e.train(0), lambda e: e.train(-1), lambda e: e.train(1.5)])
def test_a_number_of_steps_below_one_is_refused(call):
    engine = make_engine(FAST)
    with pytest.raises(ConfigError, match=r"count is .*; allowed: a whole number, 1 or more"):
        call(engine)
    with pytest.raises(ConfigError, match="images has none; allowed: 1 or more"):
        engine.evaluate(np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0, np.int64))
    assert engine.step == 0


def test_an_evaluation_takes_the_images_and_labels_that_training_takes():
    engine = make_engine(FAST)
    scores = engine.evaluate(IMAGES, LABELS)
    for labels in (np.eye(10)[LABELS], LABELS[:, None], list(LABELS), LABELS.astype(">i2")):
        assert engine.evaluate(IMAGES, labels) == scores
    grey = IMAGES[..., 0]
    assert engine.evaluate(grey, LABELS) == engine.evaluate(np.stack([grey] * 3, axis=-1), LABELS)


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (IMAGES, LABELS[:5], r"labels has shape \(5,\); allowed: \(20,\)"),
        (IMAGES[:5], LABELS, r"labels has shape \(20,\); allowed: \(5,\)"),
        ((IMAGES / 255).astype("float32"), LABELS, "images has dtype float32"),
        (IMAGES, LABELS + 1, "the labels go up to 10"),
        (IMAGES, LABELS - 1, "labels has the value -1"),
        (IMAGES[:, :24], LABELS, r"images are \(24, 32, 3\); allowed: \(32, 32, 3\), as the training images"),
    ],
)
def test_an_evaluation_refuses_what_does_not_fit(images, labels, text):
    with pytest.raises(ConfigError, match=text):
        make_engine(FAST).evaluate(images, labels)


def test_the_clip_acts_on_the_whole_gradient():
    config = VGG.override(batch_size=32, epochs=1, optimizer__momentum=0.0, optimizer__clip_norm=0.01)
    engine = make_engine(config, 32)
    before = [v.numpy() for v in engine.training_model.trainable_variables]
    engine.train(1)
    after = [v.numpy() for v in engine.training_model.trainable_variables]
    length = np.sqrt(sum(np.sum((a - b).astype(np.float64) ** 2) for a, b in zip(after, before, strict=True)))
    assert length == pytest.approx(
        0.01 * config.optimizer.learning_rate, rel=1e-2
    )  # weights round their change


def test_a_frozen_layer_stays():
    engine = make_engine(FAST.override(whitening=True))
    before = engine.model.get_layer("whitening").get_weights()
    engine.train(4)
    np.testing.assert_array_equal(engine.export().get_layer("whitening").get_weights(), before)


def test_divergence_is_an_error():
    engine = make_engine(VGG)
    engine.train(1)
    engine.training_model.get_layer("logits").bias.assign([float("nan")] * 10)
    with pytest.raises(RunError, match=r"the loss is nan at step 3: training diverged; .*--learning_rate"):
        engine.train(2)


def test_running_out_of_memory_is_one_line(monkeypatch):
    engine = make_engine(VGG)

    def exhausted(batches, first, count):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor\nwith a long story")

    monkeypatch.setattr(engine, "_graph", lambda size: exhausted)
    with pytest.raises(
        RunError, match=r"out of memory: use a smaller --batch_size .OOM when allocating"
    ) as info:
        engine.train(1)
    assert "\n" not in str(info.value)


def test_no_thread_tunes_the_data():
    """The end of an iterator waits for such a thread, for up to a minute: at each change of size, and at the end."""
    engine = make_engine(FAST)
    for on_device in (False, True):
        engine.on_device = on_device
        data = engine._batches(8, None)
        assert type(data).__name__ == "OwnedIterator"  # no distributed one, whose own iterators are tuned
        engine._iterator = None
    index = index_data(engine.sampler, 0, 8)
    batch_maker = engine._batch_maker(None)
    batches = training_data(
        engine.sampler, 0, 8, table=engine.table, labels=engine.labels, batch_maker=batch_maker
    )
    assert [data.options().autotune.enabled for data in (index, batches)] == [False, False]


# --- the images' sizes ----------------------------------------------------------------------------------


def test_sizes_are_in_proportion_to_the_images():
    config, (images, labels) = FAST.override(sizes=(20, 24, 32)), pictures(16)
    small = images[:, ::2, ::2].copy()
    none, model = tf.distribute.get_strategy(), plain_model(config, small)
    engine = Engine(model, config, small, labels, strategy=none, policy="float32", num_classes=10)
    assert engine.sizes == (10, 12, 16)
    np.testing.assert_array_equal(engine.images, small)


@pytest.mark.parametrize("on_device", [False, True])
def test_each_size_has_its_share_of_the_steps(on_device):
    config = FAST.override(sizes=(20, 24, 32), epochs=2.75)
    engine = make_engine(config, on_device=on_device)
    assert engine.steps == 11
    seen, traced, true = [], [], engine._gradients_of

    def watch(weights, non_trainable, images, targets):
        traced.append(images.shape[1:])  # when a graph is made
        tf.py_function(lambda shape: seen.append(tuple(shape.numpy())), [tf.shape(images)], [])
        return true(weights, non_trainable, images, targets)

    engine._gradients_of = watch
    ends = []
    while engine.step < engine.steps:
        engine.train(100)
        ends.append(engine.step)
    assert ends == [4, 7, 11]  # thirds of 11, rounded
    sides = [20] * 4 + [24] * 3 + [32] * 4
    assert seen == [(16, side, side, 3) for side in sides]
    # One graph serves all sizes, but where it makes the images itself.
    graphs = [(20, 20, 3), (24, 24, 3), (32, 32, 3)] if on_device else [(None, None, 3)]
    assert list(dict.fromkeys(tuple(shape) for shape in traced)) == graphs


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (VGG.override(sizes=(24, 32)), r"sizes is \(24, 32\), but vgg flattens its maps"),
        (
            FAST.override(options__filters=(4, 4, 4), sizes=(8, 32)),
            "fast does not take 8x8 pixels .*larger ones where it is too deep|too deep for 8x8",
        ),
    ],
)
def test_sizes_that_the_network_does_not_take(config, reason):
    with pytest.raises(ConfigError, match=reason) as info:
        make_engine(config)
    assert "\n" not in str(info.value)


def test_every_size_is_checked_and_layers_may_have_several_outputs():
    layers, images = keras.layers, keras.Input((16, 16, 3))
    x = layers.Conv2D(4, 3, padding="same")(images)
    skip = layers.Concatenate()([x, layers.UpSampling2D()(layers.MaxPooling2D()(x))])  # even sides only
    inner = keras.Input((None, None, 8))
    two = keras.Model(inner, [layers.Activation("tanh")(inner), layers.ReLU()(inner)])
    model = keras.Model(images, layers.GlobalAveragePooling2D()(layers.Add()(two(skip))))
    check_sizes(model, (12, 14, 16))
    with pytest.raises(ConfigError, match=r"sizes is \(12, 13, 16\), but .* does not take 13x13 pixels"):
        check_sizes(model, (12, 13, 16))


def test_sizes_of_images_that_are_not_square():
    images, labels = pictures(64)
    config = FAST.override(sizes=(24, 32))
    with pytest.raises(
        ConfigError,
        match=r"sizes is \(24, 32\), but images are 32x28; allowed: \(\), which leaves all images as",
    ):
        Engine(
            plain_model(FAST, images), config, images[:, :, :28], labels, policy="float32", num_classes=10,
            strategy=tf.distribute.get_strategy(),
        )  # fmt: skip


def test_pflop_by_hand():
    """fast with filters (4, 8) on 32x32: the maps are 31, 31 -> 15, 15 -> 7; on 20x20: 19 -> 9 -> 4."""

    def forward(first, second, third):
        conv = first**2 * 24 * 12  # 2x2x3 -> 24
        conv += first**2 * 4 * 9 * 24 + second**2 * 4 * 9 * 4
        conv += second**2 * 8 * 9 * 4 + third**2 * 8 * 9 * 8
        return 2 * (conv + 8 * 10)

    engine = make_engine(FAST)
    assert engine.pflop() == 0
    engine.train(3)
    assert engine.pflop() == pytest.approx(3 * 16 * 3 * forward(31, 15, 7) / 1e15, rel=1e-12)
    mixed = make_engine(FAST.override(sizes=(20, 32)))
    mixed.train(4)
    mixed.train(1)
    expected = 3 * 16 * (4 * forward(19, 9, 4) + forward(31, 15, 7)) / 1e15
    assert mixed.step == 5 and mixed.pflop() == pytest.approx(expected, rel=1e-12)


# --- evaluation and export ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    engine = make_engine(FAST.override(epochs=3, optimizer__learning_rate=0.3))
    engine.train(12)
    return engine


@pytest.mark.parametrize("n", [3, 500, 730, 1001])
def test_evaluation_covers_every_image_once(trained, n):
    images, labels = pictures(n, seed=n)
    labels = (labels * 7 + np.arange(n) // 13) % 10  # some right, some wrong
    probabilities = scoring.predict_probabilities(trained.export(), images)
    expected = scoring.score(labels, probabilities)
    found = trained.evaluate(images, labels)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)  # float32 quotient
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)  # fused and plain kernels in float32


def test_an_image_does_not_depend_on_its_batch(trained):
    images, _ = pictures(40, seed=3)
    together = trained.training_model(images, training=False).numpy()
    alone = [trained.training_model(images[i : i + 1], training=False).numpy()[0] for i in range(0, 40, 9)]
    np.testing.assert_allclose(alone, together[::9], rtol=1e-4, atol=1e-5)
    assert np.ptp(together, axis=0).min() > 0  # and they do differ


def test_evaluation_leaves_no_copy_of_the_images(trained, monkeypatch):
    """Copies once stayed until Python's garbage collector came, which after an epoch it does not."""
    copies, constant = [], tf.constant

    def watched(value, *args, **options):
        tensor = constant(value, *args, **options)
        if np.ndim(value) == 4:
            copies.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(tf, "constant", watched)
    gc.disable()
    try:
        trained.evaluate(*pictures(20))
        assert copies and not any(copy() is not None for copy in copies)
    finally:
        gc.enable()


def test_evaluation_changes_nothing(trained):
    before = trained.state()
    trained.evaluate(*pictures(20))
    assert_same(trained.state(), before)


def test_the_saved_file_needs_no_more_than_keras(trained, tmp_path):
    images, _ = pictures(5, seed=2)
    trained.export().save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images)
    script = """
import sys
for name in ("cifar10_trainer", "tuning"):
    sys.modules[name] = None  # an import of it would fail
import keras, numpy as np
model = keras.models.load_model("model.keras")
assert model.output.dtype == "float32"
np.save("probabilities.npy", model.predict(np.load("images.npy"), verbose=0))
"""
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True, timeout=300)
    found = np.load(tmp_path / "probabilities.npy")
    expected = tf.nn.softmax(trained.training_model(images, training=False))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_it_learns():
    options = {"filters": (8, 16), "dense": 32}  # narrower ones often die of their ReLUs
    engine = make_engine(VGG.override(options=options, optimizer=ADAM, epochs=60))
    before = engine.evaluate(*pictures())
    while engine.step < engine.steps:
        engine.train(100)
    after = engine.evaluate(*pictures(seed=1))  # other noise
    assert before["accuracy"] < 0.2 and after["accuracy"] > 0.5 and after["loss"] < before["loss"]


# --- state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["float32", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)])
def test_a_restored_engine_continues_as_if_never_stopped(policy):
    config = FAST.override(
        optimizer=ADAM,
        options__dropout=0.4,
        averaging=Averaging(every=2),
        augmentation=Augmentation(flip="alternating", shift=2, cutout=4, cutout_warmup=3),
        sizes=(24, 32),
        schedule=Schedule(name="linear", warmup=0.3),
        epochs=2.5,
    )
    whole = make_engine(config, policy=policy)
    first = make_engine(config, policy=policy)
    for engine in (whole, first):
        while engine.step < 6:  # a step into the second size, and into the second epoch
            engine.train(6 - engine.step)
    kept = first.state()
    first.train(3)  # must not reach what was kept

    fresh = make_engine(config.override(seed=5), policy=policy)  # other weights, other dropout
    again = Engine(
        fresh.model,
        config,
        *pictures(),
        strategy=tf.distribute.get_strategy(),
        policy=policy,
        num_classes=10,
    )
    again.restore(kept)
    assert again.step == 6
    assert whole.train(4) == again.train(4)
    assert whole.step == again.step == whole.steps == 10
    assert_same(again.state(), whole.state())


def test_the_state_is_a_copy():
    engine = make_engine(FAST)
    before = engine.state()
    copies = {name: value.copy() for name, value in before.items()}
    engine.train(2)
    assert_same(before, copies)
    assert any(not np.array_equal(value, before[name]) for name, value in engine.state().items())


# --- other ways to compute ------------------------------------------------------------------------------


def test_a_step_compiled_by_xla_is_the_same_step():
    config = FAST.override(options__filters=(4,), epochs=0.5, optimizer__learning_rate=0.01)
    plain, compiled = (make_engine(config, compiled=c) for c in (False, True))
    assert compiled.compiled and not plain.compiled
    one, other = plain.train(2), compiled.train(2)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for v, w in zip(plain.training_model.get_weights(), compiled.training_model.get_weights(), strict=True):
        np.testing.assert_allclose(w, v, rtol=1e-3, atol=1e-5)  # other kernels, two steps


WHOLE = FAST.override(
    options__filters=(4, 8),
    augmentation=Augmentation(flip="alternating", shift=2, cutout=6, cutout_warmup=2, mixup=0.4),
)


def whole(config, **options):
    """An engine whose loop of whole steps XLA compiles, as it does on one GPU."""
    return make_engine(config, on_device=True, compiled=True, **options)


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (WHOLE.override(sizes=(20, 32), averaging__every=3, optimizer__name="muon"), 1e-4),
        (VGG.override(epochs=0.5, optimizer__learning_rate=1e-3), 1e-4),
        (WHOLE.override(epochs=1, optimizer=Optimizer(name="adam", learning_rate=1e-4)), 1e-3),
    ],
    ids=["muon, sizes, averaging", "sgd", "adam"],
)
def test_whole_steps_compiled_by_xla_are_the_same_steps(config, tolerance):
    """At low rates, and with SGD two steps only: XLA's kernels round otherwise, by processor, and a ReLU may then change sides."""
    config = config.override(optimizer__learning_rate=min(config.optimizer.learning_rate, 0.01))
    plain, compiled = make_engine(config), whole(config)
    assert compiled.compile_loop and not plain.compile_loop
    while plain.step < plain.steps:
        one = plain.train(plain.steps)
    while compiled.step < compiled.steps:
        other = compiled.train(2)
    assert int(compiled.optimizer.iterations) == compiled.steps == plain.steps
    assert other["loss"] == pytest.approx(one["loss"], rel=tolerance)
    for v, w in zip(plain.training_model.get_weights(), compiled.training_model.get_weights(), strict=True):
        np.testing.assert_allclose(w, v, rtol=10 * tolerance, atol=10 * tolerance)


def test_whole_steps_do_not_depend_on_the_calls_nor_on_a_break():
    config = WHOLE.override(epochs=3, averaging__every=3)
    one, other = whole(config), whole(config)
    ends = []
    while one.step < one.steps:
        one.train(100)
        ends.append(one.step)
    assert ends == [4, 8, 12]  # a call ends with its epoch
    for count in (1, 3, 2, 1):
        other.train(count)
    resumed = whole(config)
    resumed.restore(other.state())
    while resumed.step < resumed.steps:
        resumed.train(3)
    assert_same(resumed.state(), one.state())
    mirrored = whole(config, strategy=tf.distribute.MirroredStrategy(["CPU:0"]))
    while mirrored.step < mirrored.steps:
        mirrored.train(100)
    assert_same(mirrored.state(), one.state())


def test_whole_steps_are_traced_once_for_each_size():
    """XLA compiles for each trace, and so for each value of what it takes for a constant: seconds on a CPU."""
    engine = whole(WHOLE.override(sizes=(20, 32)))
    traced, gradients = [], engine._gradients_of
    engine._gradients_of = lambda *args: traced.append(1) or gradients(*args)
    for count in (1, 2, 1, 3, 1):
        engine.train(count)
    assert len(traced) == 2


@pytest.mark.parametrize("sizes", [(), (16, 20)], ids=str)
@pytest.mark.parametrize("make", [make_engine, whole], ids=["plain", "whole"])
def test_there_is_no_step_after_the_last(make, sizes):
    engine = make(WHOLE.override(sizes=sizes, epochs=1))
    while engine.step < engine.steps:
        logs = engine.train(100)
    weights = engine.training_model.get_weights()
    assert engine.train(100) == logs and engine.step == engine.steps
    for v, w in zip(engine.training_model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(v, w)


def test_what_xla_cannot_compile_stays_outside():
    engine = whole(WHOLE.override(augmentation__rotation=0.1))
    assert engine.compiled and not engine.compile_loop
    plain = make_engine(WHOLE.override(augmentation__rotation=0.1))
    assert engine.train(1)["loss"] == pytest.approx(plain.train(1)["loss"], rel=1e-4)


@pytest.mark.parametrize("sizes", [(), (16, 32)], ids=str)
def test_steps_with_fast_convolutions_are_the_same_steps(sizes, monkeypatch):
    config = FAST.override(options__filters=(64, 64, 64), sizes=sizes, optimizer__learning_rate=0.01)
    fast = make_engine(config)
    monkeypatch.setattr(FastConv2D, "suits", lambda *_: False)
    plain = make_engine(config)
    kinds = [
        sum(type(layer) is FastConv2D for layer in engine.training_model.layers) for engine in (fast, plain)
    ]
    assert kinds == [5 if sizes else 1, 0]  # all but the first, of 24 channels; or that on 3x3 pixels
    while fast.step < fast.steps:
        assert fast.train(100)["loss"] == pytest.approx(plain.train(100)["loss"], rel=1e-4)
    for v, w in zip(plain.training_model.get_weights(), fast.training_model.get_weights(), strict=True):
        np.testing.assert_allclose(w, v, rtol=1e-3, atol=1e-4)  # sums in another order, eight steps


def test_float16_scales_its_loss():
    config = FAST.override(options__filters=(4,), optimizer__learning_rate=0.01)
    engine, plain = make_engine(config, policy="mixed_float16"), make_engine(config)
    assert isinstance(engine.optimizer, keras.optimizers.LossScaleOptimizer)
    engine.optimizer.dynamic_scale.assign(1024.0)  # a first scale that overflows would skip steps
    one, other = engine.train(3), plain.train(3)
    assert int(engine.optimizer.iterations) == 3
    assert one["loss"] == pytest.approx(other["loss"], rel=0.01)  # float16 has 11 bits
    for v, w in zip(
        plain.training_model.trainable_variables, engine.training_model.trainable_variables, strict=True
    ):
        np.testing.assert_allclose(w.numpy(), v.numpy(), rtol=0.02, atol=2e-3)

    before = engine.training_model.get_weights()
    engine.optimizer.dynamic_scale.assign(1e30)  # gradients overflow: no step, and half the scale
    engine.train(1)
    assert float(np.array(engine.optimizer.dynamic_scale)) == pytest.approx(5e29)
    for v, variable in zip(before, engine.training_model.weights, strict=True):
        if variable.trainable:
            np.testing.assert_array_equal(variable.numpy(), v)

    again = make_engine(config, policy="mixed_float16")
    again.restore(engine.state())
    assert_same(again.state(), engine.state())
    assert any(np.array_equal(v, np.float32(5e29)) for v in again.state().values())


# --- every recipe ---------------------------------------------------------------------------------------

HEAVY = ("transfer", "fast.96")


def recipe_cases():
    """All in both precisions. Not slow: each light network once, in bfloat16, which mixes types."""
    networks = []
    for name, recipe in RECIPES.items():
        for policy in ("mixed_bfloat16", "float32"):
            network = recipe.architecture, recipe.options
            slow = policy == "float32" or network in networks or name.startswith(HEAVY)
            networks.append(network)
            yield pytest.param(name, policy, marks=[pytest.mark.slow] if slow else [])


_saved: set[str] = set()  # networks whose saved file has been tried


@pytest.mark.parametrize(("name", "policy"), list(recipe_cases()))
def test_every_recipe_trains_two_steps_and_saves(name, policy, tmp_path):
    recipe = RECIPES[name]
    if recipe.architecture == "transfer":  # its pretrained weights are a download
        recipe = recipe.override(options__weights=None)
    engine = make_engine(recipe.override(batch_size=8), 16, policy)
    before = [v.numpy() for v in engine.training_model.trainable_variables]
    logs = engine.train(1)
    assert 0 < logs["loss"] < 100 and 0 <= logs["accuracy"] <= 1 and engine.step == 1
    engine.train(1)  # a second one, because a warm-up may begin at a learning rate of zero
    changed = [
        not np.array_equal(v.numpy(), b)
        for v, b in zip(engine.training_model.trainable_variables, before, strict=True)
    ]
    # A bias before a batch norm has no gradient but rounding.
    assert np.mean(changed) > 0.5
    assert all(np.isfinite(v.numpy()).all() for v in engine.training_model.trainable_variables)
    model = engine.export()
    images, _ = pictures(4)
    if (network := f"{recipe.architecture} {recipe.options} {policy}") not in _saved:
        _saved.add(network)
        for path in (tmp_path / "model.keras", tmp_path / "model.h5"):
            model.save(path)
            loaded = keras.models.load_model(path, compile=False)
            np.testing.assert_array_equal(loaded(images, training=False), model(images, training=False))
    # The training model is what was trained; the plain model is what users get.
    expected = tf.nn.softmax(engine.training_model(images, training=False))
    near = 1e-4 if policy == "float32" else 0.1  # bfloat16 rounds every map to eight bits
    np.testing.assert_allclose(model(images, training=False), expected, atol=near)
