from __future__ import annotations

from itertools import pairwise

import keras
import numpy as np
import pytest
import tensorflow as tf

from cifar10_trainer.errors import ConfigError
from cifar10_trainer.models import fast

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def smooth_images(n=60, side=12, channels=3, seed=0):
    """uint8 images whose neighbouring pixels and channels are alike, as those of photographs are."""
    noise = np.random.default_rng(seed).normal(size=(n, side + 3, side + 3, channels))
    for axis in (1, 2):
        noise = np.cumsum(noise, axis=axis)
    noise[..., 1:] += 2 * noise[..., :-1]
    noise = noise[:, 3:, 3:] - noise[:, :-3, :-3]
    return np.clip(128 + 12 * noise, 0, 255).astype(np.uint8)


def patches_of(images, mean, std):
    """float64 [patches, 4 * channels]: each 2x2 patch of the preprocessed images, by loops."""
    x = (images / 255.0 - np.array(mean)) / np.array(std)
    rows, columns = x.shape[1] - 1, x.shape[2] - 1
    found = [x[:, r : r + 2, c : c + 2].reshape(len(x), -1) for r in range(rows) for c in range(columns)]
    return np.concatenate(found)


def whitened(model, images):
    """What the layer "whitening" gives, before its activation."""
    part = keras.Model(model.input, model.get_layer("whitening").output)
    return np.array(part(images))


# ---- whitening


@pytest.mark.parametrize("epsilon", [5e-4, 0.05])
def test_whitened_patches_are_uncorrelated_and_of_variance_one(epsilon):
    images = smooth_images()
    model = fast.build(input_shape=(12, 12, 3), mean=MEAN, std=STD, filters=(4, 4))
    fast.whiten(model, images, MEAN, STD, epsilon)
    found = whitened(model, images).reshape(-1, 24).astype(np.float64)
    moments = found.T @ found / len(found)
    patches = patches_of(images, MEAN, STD)
    values = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    # up to the epsilon: eigenvalue / (eigenvalue + epsilon) on the diagonal, 0 elsewhere. In float32, the
    # smallest eigenvalue is known to about 1e-7 of the largest.
    assert values[0] > 1e-4
    np.testing.assert_allclose(moments[:12, :12], np.diag(values / (values + epsilon)), atol=5e-3)
    # the second half is the first half's negative
    np.testing.assert_allclose(found[:, 12:], -found[:, :12], atol=1e-5)


def test_whitening_is_near_identity_where_epsilon_is_small():
    images = smooth_images(seed=3)
    model = fast.build(input_shape=(12, 12, 3), mean=MEAN, std=STD, filters=(4,))
    fast.whiten(model, images, MEAN, STD, epsilon=1e-7)
    found = whitened(model, images).reshape(-1, 24)[:, :12]
    np.testing.assert_allclose(found.T @ found / len(found), np.eye(12), atol=0.01)


def test_whitening_does_not_leave_signs_to_lapack(monkeypatch):
    images, kernels = smooth_images(), []
    eigh = np.linalg.eigh
    for signs in (1, np.resize([-1, 1, 1], 12)):
        monkeypatch.setattr(np.linalg, "eigh", lambda x, signs=signs: (eigh(x)[0], eigh(x)[1] * signs))
        model = fast.build(input_shape=(12, 12, 3), filters=(4,))
        fast.whiten(model, images, MEAN, STD)
        kernels.append(np.array(model.get_layer("whitening").kernel).reshape(12, 24))
    np.testing.assert_array_equal(*kernels)
    first = kernels[0][:, :12]
    assert (np.take_along_axis(first, np.abs(first).argmax(0)[None], 0) > 0).all()


def test_whitening_of_grey_images_as_three_equal_channels():
    """Eight of twelve eigenvalues are zero. Their filters would show nothing but rounding, so they repeat the other four."""
    half, quarter = (0.5,) * 3, (0.25,) * 3
    grey = np.repeat(smooth_images(channels=1), 3, axis=-1)
    model = fast.build(input_shape=(12, 12, 3), mean=half, std=quarter, filters=(4,))
    fast.whiten(model, grey, half, quarter)
    kernel = np.array(model.get_layer("whitening").kernel).reshape(12, 24)
    np.testing.assert_array_equal(kernel[:, :8], np.concatenate([kernel[:, 8:12]] * 2, axis=1))
    np.testing.assert_array_equal(kernel[:, 12:], -kernel[:, :12])
    found = whitened(model, grey).reshape(-1, 24)[:, 8:12].astype(np.float64)
    assert np.abs(found.T @ found / len(found) - np.eye(4)).max() < 0.2  # up to the epsilon
    # What bfloat16 makes of the filters' output differs by its own rounding, 2**-9 of the largest product, and no more.
    x = tf.constant((grey / 255 - 0.5) / 0.25, tf.float32)
    exact, rounded = (
        tf.cast(tf.nn.conv2d(tf.cast(x, d), tf.cast(kernel.reshape(2, 2, 3, 24), d), 1, "VALID"), tf.float64)
        for d in (tf.float32, tf.bfloat16)
    )
    assert np.std(rounded - exact) < 0.05 * np.std(exact)


def test_whitening_of_coloured_images_keeps_every_filter():
    model = fast.build(input_shape=(12, 12, 3), mean=MEAN, std=STD, filters=(4,))
    fast.whiten(model, smooth_images(), MEAN, STD)
    kernel = np.array(model.get_layer("whitening").kernel).reshape(12, 24)[:, :12]
    assert np.linalg.matrix_rank(kernel) == 12


def test_whitening_uses_images_from_all_over():
    """A folder's images are sorted by class: every second of 4,000, not the first 2,000."""
    images = np.concatenate(
        [np.tile(smooth_images(50, 5), (40, 1, 1, 1)), np.zeros((2000, 5, 5, 3), np.uint8)]
    )
    kernels = []
    for given in (images[::2], images, images[:2000]):
        model = fast.build(input_shape=(5, 5, 3), filters=(4,))
        fast.whiten(model, given, MEAN, STD)
        kernels.append(np.array(model.get_layer("whitening").kernel))
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[1] - kernels[2]).max() > 0.01


def test_whitening_freezes_its_layer_and_no_other():
    model = fast.build(filters=(4, 4))
    before = [v.path for v in model.trainable_variables]
    fast.whiten(model, smooth_images(side=32), MEAN, STD)
    assert [v.path for v in model.trainable_variables] == [p for p in before if p != "whitening/kernel"]
    assert "whitening/kernel" in before


@pytest.mark.parametrize(("mean", "std"), [(None, None), (MEAN, None)])
def test_whitening_of_pixels_that_are_not_standardised(mean, std):
    images = smooth_images()
    model = fast.build(input_shape=(12, 12, 3), mean=mean, std=std, filters=(4, 4))
    fast.whiten(model, images, mean, std)
    found = whitened(model, images).reshape(-1, 24)[:, :12].astype(np.float64)
    patches = patches_of(images, mean or (0,) * 3, (1,) * 3)
    values = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    np.testing.assert_allclose(found.T @ found / len(found), np.diag(values / (values + 5e-4)), atol=5e-3)


def test_whitening_of_one_channel_and_of_flat_images():
    images = smooth_images(channels=1)
    model = fast.build(input_shape=(12, 12, 1), mean=(0.5,), std=(0.25,), filters=(4,))
    assert model.get_layer("whitening").kernel.shape == (2, 2, 1, 8)
    fast.whiten(model, images, (0.5,), (0.25,))
    found = whitened(model, images).reshape(-1, 8)[:, :4]
    assert np.abs(found.T @ found / len(found) - np.eye(4)).max() < 0.2
    # images without any variance have eigenvalues of zero, and the epsilon keeps the filters finite
    fast.whiten(model, np.full((20, 12, 12, 1), 128, np.uint8), (0.5,), (0.25,))
    assert np.isfinite(model.get_layer("whitening").kernel).all()
    assert np.abs(model.get_layer("whitening").kernel).max() <= 1 / np.sqrt(4e-4)


def test_whitening_a_network_without_such_a_layer():
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()], name="leaky")
    with pytest.raises(ConfigError, match="whitening is True; allowed with the architecture leaky: False"):
        fast.whiten(model, smooth_images(), MEAN, STD)


# ---- how it starts


@pytest.mark.parametrize("filters", [(32, 16, 40), (24, 24, 24)])
def test_convolutions_start_near_the_identity(filters):
    model = fast.build(filters=filters)
    inside = 24  # channels of the whitening layer
    for b, width in enumerate(filters, start=1):
        for c in (1, 2):
            kernel = np.array(model.get_layer(f"block{b}_conv{c}").kernel)
            assert kernel.shape == (3, 3, inside, width)
            passed = min(inside, width)
            expected = np.zeros((3, 3, inside, passed))
            for i in range(passed):
                expected[1, 1, i, i] = 1
            np.testing.assert_array_equal(kernel[..., :passed], expected)
            rest = kernel[..., passed:]
            if rest.size:  # uniform within 1 / sqrt(fan in)
                bound = 1 / np.sqrt(9 * inside)
                assert 0.98 * bound < np.abs(rest).max() <= bound * (1 + 1e-6)
                np.testing.assert_allclose(rest.std(), bound / np.sqrt(3), rtol=0.05)
            inside = width


def test_a_convolution_that_is_the_identity_passes_its_input_on():
    model = fast.build(filters=(24,), input_shape=(8, 8, 3))
    inside = keras.Model(model.input, model.get_layer("whitening_activation").output)
    outside = keras.Model(model.input, model.get_layer("block1_conv1").output)
    images = smooth_images(side=8)
    np.testing.assert_allclose(outside(images), inside(images), atol=1e-5)


def test_parameters_of_the_defaults():
    # 12 * 24 and no bias; 9 * in * out; a norm has beta, mean and variance; the head has no bias
    widths = (24, 64, 64, 256, 256, 256, 256)
    expected = 12 * 24 + sum(9 * a * b + 3 * b for a, b in pairwise(widths)) + 256 * 10
    assert fast.build().count_params() == expected == 1_973_920


# ---- depth and shortcuts


def test_depth_counts_the_convolutions_of_a_block():
    for depth in (1, 2, 3, 4):
        names = [layer.name for layer in fast.build(filters=(4, 6), depth=depth).layers]
        for b in (1, 2):
            assert [n for n in names if n.startswith(f"block{b}_conv")] == [
                f"block{b}_conv{c}" for c in range(1, depth + 1)
            ]
            assert [n for n in names if n.startswith(f"block{b}_add")] == [
                f"block{b}_add{c}" for c in range(3, depth + 1)
            ]
            assert names.count(f"block{b}_pool") == 1


def test_from_the_third_convolution_on_a_shortcut_goes_around():
    images = smooth_images(side=16).astype(np.float32)
    shape = (16, 16, 3)
    options = {"filters": (6, 8), "input_shape": shape, "activation": "relu"}
    shallow, deep = (fast.build(depth=d, **options) for d in (2, 4))
    for layer in shallow.layers:
        deep.get_layer(layer.name).set_weights(layer.get_weights())
    different = np.abs(np.array(deep(images)) - np.array(shallow(images))).max()
    assert different > 1e-4
    # what the further convolutions add is nothing where their kernels are zero; ReLU leaves the rest as it is
    for layer in deep.layers:
        if layer.name.endswith(("conv3", "conv4")):
            layer.kernel.assign(np.zeros(layer.kernel.shape))
    np.testing.assert_allclose(deep(images), shallow(images), atol=1e-6)


def test_logits_are_a_ninth_of_the_head():
    model = fast.build(filters=(4,), input_shape=(8, 8, 3))
    parts = keras.Model(model.input, [model.get_layer(n).output for n in ("head", "logits")])
    head, logits = parts(smooth_images(side=8))
    np.testing.assert_allclose(logits, np.array(head) / 9, rtol=1e-6)
    assert model.get_layer("head").bias is None


def test_dropout_is_there_where_it_is_asked_for():
    assert fast.build(filters=(4,), dropout=0.3).get_layer("dropout").rate == 0.3
    assert "dropout" not in [layer.name for layer in fast.build(filters=(4,)).layers]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_smallest_image(blocks):
    side = 2**blocks + 1
    model = fast.build(filters=(4,) * blocks, input_shape=(side, side, 3))
    assert model(smooth_images(2, side)).shape == (2, 10)
    with pytest.raises(ConfigError, match=f"{blocks} blocks need images of {side}x{side}"):
        fast.build(filters=(4,) * blocks, input_shape=(side, side - 1, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": ()}, "one positive width per block"),
        ({"filters": (4, 0)}, "one positive width per block"),
        ({"depth": 0}, "depth is 0; allowed: 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0; allowed: 0 to less than 1"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ConfigError, match=message):
        fast.build(**options)
