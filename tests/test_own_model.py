"""A user's own Keras classifier on this engine: what is taken, what becomes of it, what is refused."""

from __future__ import annotations

import json
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from cifar10_trainer import (
    Averaging,
    Config,
    Optimizer,
    evaluate_model,
    load_data,
    machine,
    precision,
    predict_images,
    preparation,
    train,
)
from cifar10_trainer.accelerate import PREPROCESSING_LAYERS, has_depthwise, make_training_model
from cifar10_trainer.engine import make_engine
from cifar10_trainer.errors import ConfigError, RunInterrupted
from cifar10_trainer.layers import FastConv2D, FastDropout, FusedBatchNormalization
from cifar10_trainer.models import transfer
from cifar10_trainer.models.own import digest, plain_model

CONFIG = Config(
    recipe="mine",
    epochs=2,
    batch_size=100,
    optimizer=Optimizer(name="adam", learning_rate=0.005),
    precision="float32",
    pixels="unit",
)
ENDINGS = (
    "dense softmax",
    "softmax layer",
    "activation layer",
    "softmax operation",
    "logits",
    "scaled logits",
)


def mobile():
    """A small network with a depthwise convolution in a model inside it."""
    images = keras.Input((8, 8, 3))
    inner = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.DepthwiseConv2D(3), keras.layers.Flatten()]
    )
    return keras.Model(images, keras.layers.Dense(2, activation="softmax")(inner(images)))


@pytest.mark.parametrize(
    ("build", "expected"), [(mobile, "float32"), (lambda: classifier(), "mixed_bfloat16")]
)
def test_auto_takes_float32_for_depthwise_convolutions(build, expected, tmp_path, monkeypatch):
    """Where bfloat16 is measured to be faster for convolutions, as on a CPU that has it."""
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(precision, "bfloat16_ratio", lambda: (0.5, "measured so"))
    model = build()
    side, classes = model.input_shape[1], model.output_shape[-1]
    data = np.zeros((20 * classes, side, side, 3), np.uint8), np.arange(20 * classes) % classes
    config = CONFIG.override(precision="auto", epochs=1, batch_size=10)
    metrics = train(config, tmp_path, data=data, model=model, verbose=0)
    assert metrics["precision"] == expected


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.RandomSaturation((0.3, 0.3), seed=1),
        keras.layers.RandomGrayscale(0.5, seed=1),
        keras.layers.AutoContrast(),
        keras.layers.Normalization(mean=1.0, variance=4.0),
    ],
)  # fmt: skip
def test_all_preprocessing_stays_in_float32(layer):
    images = keras.Input((8, 8, 3))
    outputs = keras.layers.Dense(2, activation="softmax")(keras.layers.Flatten()(layer(images)))
    made = make_training_model(keras.Model(images, outputs), "mixed_bfloat16")
    (copy,) = (x for x in made.layers if type(x) is type(layer))
    assert copy.compute_dtype == "float32" and made.layers[-1].compute_dtype == "float32"
    assert keras.layers.Conv2D not in PREPROCESSING_LAYERS and keras.layers.Layer not in PREPROCESSING_LAYERS


@pytest.mark.parametrize(("epsilon", "fused"), [(1e-3, True), (1e-5, True), (1e-6, False), (1e-7, False)])
def test_batch_norm_of_a_small_epsilon_is_the_models_own(epsilon, fused):
    """Inputs whose variance is of the size of the epsilon, in training, beside the formula."""
    images = keras.Input((4, 4, 3))
    norm = keras.layers.BatchNormalization(epsilon=epsilon, scale=False, center=False)
    model = keras.Model(images, keras.layers.Softmax()(keras.layers.Flatten()(norm(images))))
    made = make_training_model(model, "float32")
    assert isinstance(made.layers[1], FusedBatchNormalization) == fused
    pixels = np.random.default_rng(0).normal(0, 3e-3, (64, 4, 4, 3)).astype("float32")
    mean, variance = pixels.mean((0, 1, 2)), pixels.var((0, 1, 2))
    expected = (pixels - mean) / np.sqrt(variance + epsilon)
    # 1e-5 acts as 1.001e-5: less than 0.03% of the standard deviation here, where the variance is 9e-6
    np.testing.assert_allclose(made(pixels, training=True), expected.reshape(64, -1), rtol=5e-4, atol=1e-3)


@pytest.mark.parametrize("name", transfer.BACKBONES)
def test_the_backbones_with_depthwise_convolutions(name):
    chosen = transfer.BACKBONES[name]
    network = getattr(keras.applications, chosen.application)(
        input_shape=(32, 32, 3), weights=None, include_top=False
    )
    assert has_depthwise(network) == chosen.depthwise
    config = CONFIG.override(architecture="transfer", options={"backbone": name})
    assert preparation.has_depthwise(config) == chosen.depthwise
    assert not preparation.has_depthwise(CONFIG)


def classifier(ending="dense softmax", seed=1):
    """A small network with a model inside it, a frozen layer, and a layer that is used twice."""
    keras.utils.set_random_seed(seed)
    images = keras.Input((32, 32, 3))
    x = keras.layers.Rescaling(1 / 255)(images)
    inner = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Conv2D(8, 3, strides=2), keras.layers.ReLU()]
    )
    x = keras.layers.BatchNormalization()(inner(x))
    frozen = keras.layers.Conv2D(8, 1, trainable=False)
    twice = keras.layers.Conv2D(8, 3, padding="same", activation="relu")
    x = keras.layers.MaxPooling2D()(twice(twice(frozen(x))))
    x = keras.layers.Dropout(0.1)(keras.layers.Flatten()(x))
    dense = keras.layers.Dense(10, activation="softmax" if ending == "dense softmax" else None)
    x = dense(x)
    if ending == "softmax layer":
        x = keras.layers.Softmax()(x)
    elif ending == "activation layer":
        x = keras.layers.Activation("softmax")(x)
    elif ending == "softmax operation":
        x = keras.ops.softmax(x)
    elif ending == "scaled logits":
        x = keras.layers.Rescaling(0.5)(x)
    return keras.Model(images, x)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def softmax(x):
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_training_model_gives_the_logits_of_the_model(ending, digits):
    model, images = classifier(ending), digits.test_images[:20]
    trained = make_training_model(plain_model(model, (32, 32, 3), 10), "float32")
    logits = trained(images, training=False).numpy()
    outputs = model.predict(images, verbose=0)
    expected = softmax(outputs) if "logits" in ending else outputs
    np.testing.assert_allclose(softmax(logits), expected, atol=1e-5)
    kinds = {type(layer) for layer in trained.layers}
    assert {FusedBatchNormalization, FastDropout} <= kinds  # faster where the engine knows how


def dense_end(x, **more):
    return keras.layers.Dense(10, **more)(keras.layers.Flatten()(x))


def unusual():
    """name -> a model whose structure trips a naive copy."""
    one = keras.Input((32, 32, 3))
    x = keras.ops.relu(one / 255 - 0.5)
    yield "operations", keras.Model(one, dense_end(x + keras.layers.Conv2D(3, 1)(x), activation="softmax"))
    normalization = keras.layers.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(100, 30, (50, 32, 32, 3)))
    yield "normalization", keras.Model(one, dense_end(normalization(one), activation="softmax"))
    inner = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(10, activation="softmax")]
    )
    yield (
        "nested softmax",
        keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), inner]),
    )
    nested = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(10), keras.layers.Softmax()]
    )
    yield (
        "nested softmax layer",
        keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), nested]),
    )
    named = keras.layers.Dense(10, name="logits")(
        keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(one))
    )
    yield (
        "a misleading name",
        keras.Model(one, keras.layers.Softmax()(keras.layers.BatchNormalization()(named))),
    )
    softmax = keras.layers.Softmax()
    softmax(keras.Input((10,)))  # another model used it first
    yield "a shared softmax", keras.Model(one, softmax(dense_end(keras.layers.Rescaling(1 / 255)(one))))
    tokens = keras.layers.BatchNormalization()(
        keras.layers.Reshape((-1, 96))(keras.layers.Rescaling(1 / 255)(one))
    )
    yield "tokens", keras.Model(one, dense_end(tokens, activation="softmax"))
    any_side = keras.Input((None, None, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(
        keras.layers.Conv2D(4, 3)(keras.layers.Rescaling(1 / 255)(any_side))
    )
    yield "any size", keras.Model(any_side, keras.layers.Dense(10, activation="softmax")(pooled))
    yield "lists", keras.Model([one], [dense_end(keras.layers.Rescaling(1 / 255)(one), activation="softmax")])


@pytest.mark.parametrize("case", range(9))
def test_unusual_models_train_as_they_are(case, digits, tmp_path):
    keras.utils.set_random_seed(3)
    name, model = list(unusual())[case]
    images = digits.test_images[:20]
    trained = make_training_model(plain_model(model, (32, 32, 3), 10), "float32")
    expected = model.predict(images, verbose=0)
    np.testing.assert_allclose(
        softmax(trained(images, training=False).numpy()), expected, atol=1e-5, err_msg=name
    )
    metrics = train(
        CONFIG.override(epochs=1), tmp_path, data=digits, model=model, verbose=0, full_report=False
    )
    accuracy = (model.predict(digits.test_images, verbose=0).argmax(axis=1) == digits.test_labels).mean()
    assert metrics["test_accuracy"] == pytest.approx(accuracy, abs=0.003), name
    assert metrics["pflop"] > 0


def test_layers_added_one_by_one_are_replaced_like_those_of_a_list():
    """Each `add` uses all layers again, so they have several nodes."""
    model = keras.Sequential([keras.Input((32, 32, 3))])
    for layer in (keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(), keras.layers.Dropout(0.1)):
        model.add(layer)
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10, activation="softmax"))
    plain = plain_model(model, (32, 32, 3), 10)
    assert {FusedBatchNormalization, FastDropout} <= {
        type(x) for x in make_training_model(plain, "float32").layers
    }
    synchronized = make_training_model(plain, "float32", synchronize=True, replicas=2)
    (norm,) = [x for x in synchronized.layers if isinstance(x, keras.layers.BatchNormalization)]
    assert norm.synchronized


def test_a_model_made_under_another_policy_trains_in_the_runs():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = classifier()
    finally:
        keras.config.set_dtype_policy("float32")
    trained = make_training_model(plain_model(model, (32, 32, 3), 10), "float32")
    assert {x.dtype_policy.name for x in trained._flatten_layers() if x.weights} == {"float32"}


def test_make_training_model_needs_probabilities():
    images = keras.Input((32, 32, 3))
    with pytest.raises(
        ConfigError, match="does not end in a softmax; allowed: a model that returns probabilities"
    ):
        make_training_model(keras.Model(images, dense_end(images)), "float32")


def test_another_setting_of_a_layer_is_another_model():
    def model(**changes):
        settings = {"activation": "relu", "rate": 0.1, **changes}
        images = keras.Input((32, 32, 3))
        x = keras.layers.Conv2D(4, 3, activation=settings["activation"])(images)
        return keras.Model(images, dense_end(keras.layers.Dropout(settings["rate"])(x)))

    assert digest(model()) == digest(model())  # under other names
    assert len({digest(m) for m in (model(), model(activation="tanh"), model(rate=0.9))}) == 3


def test_the_same_model_made_again_is_the_same_whatever_keras_draws_or_numbers():
    def model(filters=4, dtype="float32"):
        images = keras.Input((32, 32, 3))
        x = keras.layers.RandomCrop(28, 28)(images)  # draws a seed, and keeps it in its configuration
        inner = keras.layers.Conv2D(filters, 3, dtype=dtype)  # its name is in the wrapper's configuration
        return keras.Model(images, dense_end(keras.layers.SpectralNormalization(inner)(x)))

    assert digest(model()) == digest(model())
    assert len({digest(m) for m in (model(), model(filters=5), model(dtype="mixed_bfloat16"))}) == 3


@keras.saving.register_keras_serializable("test_own_model")
class Block(keras.layers.Layer):
    """A layer of two others, whose constructor does not tell which of them is frozen."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()

    def build(self, shape):
        self.a.build(shape)
        self.b.build(self.a.compute_output_shape(shape))

    def call(self, x):
        return self.b(self.a(x))


def test_what_is_frozen_within_a_layer_stays_frozen(tmp_path, digits):
    images = keras.Input((32, 32, 3))
    first, second, third = Block(), Block(), keras.layers.Conv2D(4, 1)
    x = third(second(first(keras.layers.Rescaling(1 / 255)(images))))
    model = keras.Model(images, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)))
    first.a.trainable = second.b.trainable = False
    third.kernel.trainable = False
    twin = make_training_model(plain_model(model, (32, 32, 3), 10), "float32")
    names = [[v.path.rpartition("/")[2] for v in m.trainable_variables] for m in (model, twin)]
    assert names[0] == names[1] == ["gamma", "beta", "kernel", "bias", "bias", "kernel", "bias"]
    frozen = [*first.a.weights, *second.b.weights, third.kernel]
    before = [v.numpy() for v in frozen]
    train(CONFIG.override(epochs=1), tmp_path, data=digits, model=model, verbose=0, full_report=False)
    for variable, value in zip(frozen, before, strict=True):
        np.testing.assert_array_equal(
            variable.numpy(), value
        )  # a frozen batch norm keeps its statistics, too


def test_a_head_that_begins_with_equal_outputs_is_none_of_probabilities():
    images = keras.Input((8, 8, 3))
    head = keras.layers.Dense(
        4, kernel_initializer="zeros", bias_initializer=keras.initializers.Constant(0.25)
    )
    model = plain_model(keras.Model(images, head(keras.layers.Flatten()(images))), (8, 8, 3), 4)
    assert model.layers[-1].activation is keras.activations.softmax


def test_another_frozen_part_is_another_model():
    def model(freeze):
        images = keras.Input((8, 8, 3))
        block = Block()
        model = keras.Model(images, keras.layers.Dense(4)(keras.layers.Flatten()(block(images))))
        freeze(block)
        return digest(model)

    parts = [
        lambda b: None,
        lambda b: setattr(b.a, "trainable", False),
        lambda b: setattr(b.a.bias, "trainable", False),
    ]
    assert len({model(part) for part in parts}) == 3


def test_in_16_bits_the_logits_and_the_preprocessing_stay_in_32():
    trained = make_training_model(plain_model(classifier(), (32, 32, 3), 10), "mixed_bfloat16")
    policies = {type(layer).__name__: layer.dtype_policy.name for layer in trained.layers}
    assert policies["Rescaling"] == policies["Dense"] == "float32"
    assert policies["Conv2D"] == policies["FusedBatchNormalization"] == "mixed_bfloat16"


def test_depthwise_convolutions_stay_in_float32_on_a_cpu():
    images = keras.Input((32, 32, 3))
    x = keras.layers.SeparableConv2D(4, 3)(keras.layers.DepthwiseConv2D(3)(keras.layers.Conv2D(4, 3)(images)))
    model = keras.Model(images, keras.layers.Dense(10)(keras.layers.Flatten()(x)))
    trained = make_training_model(plain_model(model, (32, 32, 3), 10), "mixed_bfloat16")
    policies = {type(layer).__name__: layer.dtype_policy.name for layer in trained.layers if layer.weights}
    assert policies.pop("Conv2D") == "mixed_bfloat16" and set(policies.values()) == {"float32"}


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("strategy", ["none", "mirrored"])
def test_a_run_ends_with_the_kept_weights_in_the_model(tmp_path, digits, strategy, precision):
    model = classifier("logits")
    frozen = next(layer for layer in model.layers if not layer.trainable and layer.weights)
    before = frozen.get_weights()[0]
    metrics = train(
        CONFIG.override(strategy=strategy, precision=precision),
        tmp_path,
        data=(digits.train_images, digits.train_labels),
        test_data=(digits.test_images, np.eye(10)[digits.test_labels]),
        model=model,
        verbose=0,
    )
    predicted = model.predict(digits.test_images, verbose=0).argmax(axis=1)
    assert metrics["test_accuracy"] == pytest.approx((predicted == digits.test_labels).mean(), abs=0.004)
    assert (
        metrics["best_val_accuracy"] > 0.5
        and metrics["dataset"] == "arrays"
        and metrics["strategy"] == strategy
    )
    np.testing.assert_array_equal(frozen.get_weights()[0], before)
    saved = keras.models.load_model(tmp_path / "model.keras")
    for one, other in zip(saved.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    probabilities = saved.predict(digits.test_images, verbose=0)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)  # its softmax is part of the file
    record = json.loads((tmp_path / "config.json").read_text())
    assert len(record["own_model"]) == 16 or len(record["own_model"]) == 8
    assert (tmp_path / "report.html").exists()


class StopAt(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_it_resumes_exactly_and_with_its_own_kind_of_model_only(tmp_path, digits, monkeypatch):
    monkeypatch.setattr("cifar10_trainer.loop.CALL_SECONDS", 0.0)
    options = {"data": digits, "verbose": 0, "full_report": False}
    whole = classifier()
    train(CONFIG, tmp_path / "whole", model=whole, **options)
    with pytest.raises(RunInterrupted):
        train(CONFIG, tmp_path / "parts", model=classifier(), callbacks=[StopAt(5)], **options)
    with pytest.raises(ConfigError, match="unfinished run with model"):
        train(CONFIG, tmp_path / "parts", **options)
    other = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(10)])
    with pytest.raises(ConfigError, match="unfinished run with model"):
        train(CONFIG, tmp_path / "parts", model=other, **options)
    resumed = classifier(seed=7)  # other initial weights, which the state replaces
    train(CONFIG, tmp_path / "parts", model=resumed, **options)
    for one, expected in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(one, expected)


@keras.saving.register_keras_serializable("tests")
class Drawing(keras.layers.Layer):
    """Remembers two numbers that it draws in training, without a generator of its own."""

    def build(self, shape):
        self.drawn = self.add_weight(shape=(2,), trainable=False, name="drawn")

    def call(self, x, training=False):
        if training:
            self.drawn.assign(keras.ops.stack([keras.random.uniform(()), keras.random.uniform(())]))
        return x


@keras.saving.register_keras_serializable("tests")
class TensorFlowNoise(keras.layers.Layer):
    def call(self, x, training=False):
        return x + tf.random.normal(tf.shape(x)) if training else x


def ends_after(layer):
    images = keras.Input((8, 8, 3))
    return keras.Model(images, keras.layers.Dense(10)(keras.layers.Flatten()(layer(images))))


def engine_of(model, digits, **changes):
    images, labels = digits.train_images[:200, 8:16, 8:16], digits.train_labels[:200]
    return make_engine(
        CONFIG.override(batch_size=20, seed=5, **changes), images, labels,
        num_classes=10, strategy=tf.distribute.get_strategy(), policy="float32", model=model,
    )  # fmt: skip


def test_layers_without_a_generator_draw_anew_at_each_step_and_resume_exactly(digits):
    engine = engine_of(ends_after(Drawing()), digits)
    (drawn,) = (v for v in engine.non_trainable if v.path.endswith("drawn"))

    def after(steps):
        engine.train(steps)
        return drawn.numpy().tolist()

    # Keras's generators count: the k-th draw of seed 5 is that of the seed (5, k).
    expected = tf.stack([tf.random.stateless_uniform((), (5, k)) for k in range(12)]).numpy().reshape(6, 2)
    assert after(1) == expected[0].tolist()
    assert after(1) == expected[1].tolist()
    state = engine.state()
    assert after(3) == expected[4].tolist()
    engine.restore(state)
    assert after(1) == expected[2].tolist()
    assert engine.resumes_exactly
    plain = engine_of(ends_after(keras.layers.GaussianNoise(0.1)), digits)
    assert len(plain.non_trainable) == len(plain.training_model.non_trainable_variables) == 1


def test_a_layer_that_draws_from_tensorflow_is_named_as_inexact(digits, tmp_path, capsys):
    assert not engine_of(ends_after(TensorFlowNoise()), digits).resumes_exactly
    for layer, noted in ((TensorFlowNoise(), True), (Drawing(), False)):
        train(
            CONFIG.override(epochs=0.2), tmp_path / layer.name, full_report=False,
            data=(digits.train_images[:, 8:16, 8:16], digits.train_labels), model=ends_after(layer),
        )  # fmt: skip
        assert ("a layer of the model draws from tf.random" in capsys.readouterr().out) == noted


def test_a_compiled_model_stays_compiled(tmp_path, digits):
    model = classifier()
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    train(CONFIG.override(epochs=1), tmp_path, data=digits, model=model, verbose=0, full_report=False)
    assert len(model.evaluate(digits.test_images, digits.test_labels, verbose=0)) == 2


class Subclassed(keras.Model):
    def call(self, images):
        return images


def inputs(n):
    return [keras.Input((32, 32, 3)) for _ in range(n)]


def refused():
    one, (a, b) = keras.Input((32, 32, 3)), inputs(2)
    flat = keras.layers.Flatten()(one)
    dense = keras.layers.Dense(10)
    yield "dense", "model is str"
    yield Subclassed(), "model is Subclassed, a subclassed model"
    yield keras.Sequential([keras.layers.Dense(10)]), "a Sequential model without an input shape"
    both = keras.layers.Flatten()(keras.layers.Add()([a, b]))
    yield keras.Model([a, b], keras.layers.Dense(10)(both)), "model has 2 inputs and 1 outputs"
    yield keras.Model(one, [dense(flat), keras.layers.Dense(3)(flat)]), "model has 1 inputs and 2 outputs"
    yield (
        keras.Model(one, keras.layers.Dense(9)(flat)),
        r"returns \(None, 9\), but the data set has 10 classes",
    )
    yield (
        keras.Model(one, keras.layers.Dense(10, activation="sigmoid")(flat)),
        "ends in the activation sigmoid",
    )
    by_function = keras.layers.Dense(10, activation=keras.ops.softmax)(flat)
    yield keras.Model(one, by_function), r'ends in the activation softmax; .* \(activation="softmax"\)'
    yield keras.Model(one, keras.ops.sigmoid(dense(flat))), "model ends in the operation Sigmoid; allowed"
    grey = keras.Input((32, 32, 1))
    yield (
        keras.Model(grey, keras.layers.Dense(10)(keras.layers.Flatten()(grey))),
        r"the images are \(32, 32, 3\); grey images become three equal channels; allowed",
    )
    small = keras.Input((28, 28, 3))
    yield (
        keras.Model(small, keras.layers.Dense(10)(keras.layers.Flatten()(small))),
        r"takes \(None, 28, 28, 3\), but the images are \(32, 32, 3\)",
    )
    yield keras.Model(one, keras.layers.Conv2D(10, 3)(one)), r"returns \(None, 30, 30, 10\)"


def refusal(model, text, tmp_path, digits):
    """The one line in which the model is refused, which matches `text`, before anything is written."""
    with pytest.raises(ConfigError, match=text) as caught:
        train(CONFIG, tmp_path / "run", data=digits, model=model, verbose=0)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    return str(caught.value)


@keras.saving.register_keras_serializable("test_own_model")
class Incomplete(keras.layers.Layer):
    """Its get_config lacks the factor, and its constructor takes nothing else."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, inputs):
        return inputs * self.factor


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            keras.layers.Lambda(lambda x: x / 255, name="scale"),
            "the Lambda layer 'scale', whose function no file",
        ),
        (Incomplete(2.0), r"Incomplete.from_config\(layer.get_config\(\)\) fails \(.*'trainable'"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_that_no_file_can_hold_is_refused_in_a_line(layer, text, nested, tmp_path, digits):
    images = keras.Input((32, 32, 3))
    x = keras.Sequential([keras.Input((32, 32, 3)), layer])(images) if nested else layer(images)
    model = keras.Model(images, keras.layers.Dense(10)(keras.layers.Flatten()(x)))
    refusal(model, text, tmp_path, digits)


@pytest.mark.parametrize("case", range(12))
def test_what_the_engine_cannot_train_is_refused_in_a_line(case, tmp_path, digits):
    model, text = list(refused())[case]
    said = refusal(model, text, tmp_path, digits)
    assert "allowed: a functional or built Sequential Keras model" in said


def refused_although_classifiers():
    one = keras.Input((32, 32, 3))
    flat = keras.layers.Flatten()(one)
    probabilities = keras.layers.Dense(10, activation="softmax")(flat)
    cast = keras.layers.Activation("linear", dtype="float32", name="cast")(probabilities)
    yield keras.Model(one, cast), "model returns probabilities, but its last layer, 'cast', is no softmax"
    yield (
        keras.Model(one, keras.layers.Reshape((10,))(probabilities)),
        "is no softmax; allowed: a softmax at the",
    )
    fixed = keras.Model(one, keras.layers.Dense(10)(flat))
    fixed.trainable = False
    yield fixed, "model has no weights to train"
    normed = keras.layers.SpectralNormalization(keras.layers.Conv2D(4, 3, name="normed"))(one)
    yield (
        keras.Model(one, dense_end(normed)),
        "normed/kernel' itself, as SpectralNormalization does",
    )
    floor = Floor(10, activation="softmax", name="floor")
    yield keras.Model(one, floor(flat)), "ends in 'floor', a Floor with the activation softmax, after which"
    yield keras.Model(one, Head()(flat)), "a Head with the activation softmax, after which it may compute"
    penalty = keras.regularizers.L2(0.1)
    dense = keras.layers.Dense(10, activation="softmax", activity_regularizer=penalty, name="end")
    yield keras.Model(one, dense(flat)), "ends in 'end', whose activity_regularizer would act on the logits"
    end = keras.layers.Activation("softmax", activity_regularizer=penalty, name="end")
    yield keras.Model(one, end(keras.layers.Dense(10)(flat))), "ends in 'end', whose activity_regularizer"


@keras.saving.register_keras_serializable("test_own_model")
class Floor(keras.layers.Dense):
    """Probabilities of at least 2%."""

    def call(self, inputs, training=None):
        return 0.8 * super().call(inputs) + 0.2 / self.units


@keras.saving.register_keras_serializable("test_own_model")
class Head(keras.layers.Layer):
    """It has an activation that its configuration does not name."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.dense, self.activation = keras.layers.Dense(10), keras.activations.softmax

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, inputs):
        return self.activation(self.dense(inputs))


@pytest.mark.parametrize("case", range(8))
def test_a_softmax_within_and_nothing_to_train_are_refused_in_a_line(case, tmp_path, digits):
    model, text = list(refused_although_classifiers())[case]
    assert "; allowed: " in refusal(model, text, tmp_path, digits)


def test_a_subclassed_model_inside_is_refused_in_a_line(tmp_path, digits):
    images = keras.Input((32, 32, 3))
    inside = Subclassed(name="inside")(images)
    flat = keras.layers.Flatten()(inside)
    reason = "has the model 'inside' inside, which is Subclassed, a subclassed one"
    ending = Subclassed(name="inside")(keras.layers.Dense(10)(keras.layers.Flatten()(images)))
    for model in (keras.Model(images, keras.layers.Dense(10)(flat)), keras.Model(images, ending)):
        refusal(model, reason, tmp_path, digits)


def shared_endings():
    """Models that use a softmax within and at the end, and whether both uses are the same layer with weights."""
    images = keras.Input((8, 8, 3))
    x = keras.layers.Dense(4)(keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(images)))
    for gate in (keras.layers.Activation("softmax"), keras.layers.Softmax()):
        yield keras.Model(images, gate(keras.layers.Dense(4)(gate(x)))), False
    dense = keras.layers.Dense(4, activation="softmax")
    yield keras.Model(images, dense(x)), False
    yield keras.Model(images, dense(dense(x))), True
    inputs = keras.Input((4,))
    inner = keras.Model(inputs, keras.layers.Dense(4, activation="softmax")(inputs))
    yield keras.Model(images, inner(x)), False
    yield keras.Model(images, inner(inner(x))), True


@pytest.mark.parametrize("case", range(6))
def test_only_the_softmax_at_the_end_is_left_out(case):
    model, refused = list(shared_endings())[case]
    plain = plain_model(model, (8, 8, 3), 4)
    if refused:
        with pytest.raises(
            ConfigError, match="which it also uses elsewhere; allowed: a last layer of its own"
        ):
            make_training_model(plain, "float32")
        return
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    logits = np.asarray(make_training_model(plain, "float32")(images))
    np.testing.assert_allclose(softmax(logits), np.asarray(model(images)), atol=1e-6)


@keras.saving.register_keras_serializable("test_own_model")
class Residual(keras.layers.Layer):
    """Makes its layers itself, as Keras's guides show it: one in the constructor, one when it is built."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.convolution = keras.layers.Conv2D(filters, 3, padding="same")

    def build(self, shape):
        self.convolution.build(shape)
        self.normalization = keras.layers.BatchNormalization()
        self.normalization.build(shape)

    def call(self, inputs, training=None):
        return inputs + self.normalization(self.convolution(inputs), training=training)

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


def residual():
    """One in the model, and one in a Sequential inside it, whose last layer stays in float32 on a CPU."""
    images = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(4, 3, padding="same")(keras.layers.Rescaling(1 / 255)(images))
    inner = keras.Sequential([keras.Input((32, 32, 4)), Residual(4), keras.layers.DepthwiseConv2D(3)])
    x = keras.layers.GlobalAveragePooling2D()(inner(Residual(4)(x)))
    return keras.Model(images, keras.layers.Dense(10)(x))


def test_layers_that_a_layer_makes_itself_are_in_16_bits_as_well(tmp_path, digits):
    metrics = train(
        CONFIG.override(precision="mixed_bfloat16", epochs=0.2),
        tmp_path / "run",
        data=digits,
        model=residual(),
        verbose=0,
    )
    assert metrics["precision"] == "mixed_bfloat16" and metrics["test_accuracy"] > 0
    (layer,) = (x for x in residual().layers if isinstance(x, Residual))
    assert layer.convolution.compute_dtype == "float32"  # the user's own policy is back


@keras.saving.register_keras_serializable("test_own_model")
class Adds(keras.layers.Layer):
    def call(self, inputs):
        return inputs + keras.ops.ones_like(inputs, dtype="float32")


def test_what_does_not_work_in_16_bits_is_one_line(tmp_path, digits):
    images = keras.Input((32, 32, 3))
    x = Adds()(keras.layers.Conv2D(4, 3)(images))
    model = keras.Model(images, keras.layers.Dense(10)(keras.layers.Flatten()(x)))
    with pytest.raises(
        ConfigError, match=r"does not work in mixed_bfloat16 \(.*\); allowed: --precision=float32"
    ):
        train(
            CONFIG.override(precision="mixed_bfloat16"), tmp_path / "run", data=digits, model=model, verbose=0
        )


def test_an_adapted_normalization_within_a_layer_and_inputs_of_8_bits():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    normalization = keras.layers.Normalization()
    normalization.adapt(pixels.astype("float32").reshape(-1, 8, 3))
    images, bytes_ = keras.Input((8, 8, 3)), keras.Input((None, 8, 3), dtype="uint8")
    wraps = keras.ops.cast(bytes_ - 128, "float32") / 255  # 0 becomes 128, not -128
    for inputs, x in ((images, keras.layers.TimeDistributed(normalization)(images)), (bytes_, wraps)):
        model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(x)))
        logits = np.asarray(make_training_model(plain_model(model, (8, 8, 3), 4), "float32")(pixels))
        np.testing.assert_allclose(logits, np.asarray(model(pixels)), rtol=1e-4, atol=1e-5)


@keras.saving.register_keras_serializable("test_own_model")
class AddsLosses(keras.layers.Layer):
    """Adds a loss that is 0, one value for each image."""

    def call(self, inputs):
        self.add_loss(0 * keras.ops.sum(inputs, axis=(1, 2, 3)))
        return inputs


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        (AddsLosses(), "float32"),
        (keras.layers.ActivityRegularization(l2=0.0), "mixed_bfloat16"),
        (keras.layers.Conv2D(3, 1, dtype="float64", kernel_regularizer="l2", trainable=False), "float32"),
    ],
)
def test_losses_that_a_layer_adds_are_summed_in_any_dtype(layer, precision):
    """A loss of 0 changes no step: the head's bias, from zeros, moves by the mean gradient of the cross-entropy."""
    images = keras.Input((8, 8, 3))
    x = keras.layers.Flatten()(layer(keras.layers.Rescaling(1 / 255)(images)))
    model = keras.Model(images, keras.layers.Dense(2, kernel_initializer="zeros")(x))
    config = Config(
        batch_size=4,
        epochs=1,
        optimizer=Optimizer(learning_rate=1.0),
        pixels="unit",
        validation_fraction=None,
    )
    pixels, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 0, 0, 1])
    engine = make_engine(
        config,
        pixels,
        labels,
        num_classes=2,
        model=model,
        strategy=tf.distribute.get_strategy(),
        policy=precision,
    )
    engine.train(1)
    # p = 1/2: the mean of (label - p) is 1/4 and -1/4
    np.testing.assert_allclose(
        engine.training_model.trainable_variables[-1].numpy(), [0.25, -0.25], atol=1e-3
    )


def test_whitening_needs_the_networks_of_this_project(tmp_path, digits):
    with pytest.raises(ConfigError, match="whitening is True; allowed with a model of your own: False"):
        train(CONFIG.override(whitening=True), tmp_path / "run", data=digits, model=classifier(), verbose=0)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_layers_of_another_dtype_train_as_they_are_and_resume(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("cifar10_trainer.loop.CALL_SECONDS", 0.0)
    images = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(4, 3, dtype=dtype)(keras.layers.Rescaling(1 / 255)(images))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.BatchNormalization(dtype=dtype)(x))
    model = keras.Model(images, keras.layers.Dense(2)(x))
    data = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8), np.arange(40) % 2
    config = CONFIG.override(epochs=2, batch_size=8, averaging=Averaging(every=2, decay=0.9))
    initial = model.get_weights()
    options = {"data": data, "verbose": 0, "full_report": False}
    metrics = train(config, tmp_path / "whole", model=model, **options)
    assert metrics["epochs"] == 2 and model.layers[3].moving_variance.dtype == dtype
    assert float(model.layers[3].moving_mean.numpy()[0]) != 0
    whole = model.get_weights()
    model.set_weights(initial)
    with pytest.raises(RunInterrupted):
        train(config, tmp_path / "parts", model=model, callbacks=[StopAt(5)], **options)
    model.set_weights(initial)
    train(config, tmp_path / "parts", model=model, **options)
    for one, expected in zip(model.get_weights(), whole, strict=True):
        np.testing.assert_array_equal(one, expected)


def test_a_model_of_any_size_gets_the_layers_of_one_of_fixed_size():
    """Its layers are called once more, for the size of the images."""

    def kinds(*sides):
        images = keras.Input((*sides, 3))
        inner = keras.Sequential([keras.Input((*sides, 3)), keras.layers.Conv2D(16, 3, padding="same")])
        x = keras.layers.BatchNormalization()(inner(images))
        x = keras.layers.MaxPooling2D(8)(x)
        x = keras.layers.Conv2D(64, 3, padding="same")(keras.layers.Conv2D(64, 3, padding="same")(x))
        model = keras.Model(images, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)))
        twin = make_training_model(plain_model(model, (32, 32, 3), 10), "mixed_bfloat16")
        return [type(layer) for layer in twin._flatten_layers(include_self=False) if layer.weights]

    fixed = kinds(32, 32)
    assert FusedBatchNormalization in fixed and FastConv2D in fixed
    assert kinds(None, None) == fixed


def test_a_model_of_any_size_is_scored_and_predicts(tmp_path):
    images = keras.Input((None, None, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(images))
    model = keras.Model(images, keras.layers.Dense(2, activation="softmax")(x))
    model.layers[-1].set_weights([np.array([[0, 9.0]] * 3), np.array([9.0, 0])])  # dark is 0, bright is 1
    for side in (8, 13):
        pixels = np.repeat(np.array([10, 250], np.uint8), side * side * 3).reshape(2, side, side, 3)
        assert evaluate_model(model, (pixels, np.array([0, 1])))["accuracy"] == 1
        assert [r["label"] for r in predict_images(model, pixels)] == ["0", "1"]
    with pytest.raises(ConfigError, match=r"labels has 3 classes; allowed: \('n', None, None, 3\)"):
        evaluate_model(model, (pixels, np.array([0, 2])))
    with pytest.raises(ConfigError, match="images are files, but the model takes images of any size"):
        predict_images(model, ["picture.png"])
