"""Every layer against an independent reference: NumPy's `pad`, SciPy's `affine_transform`, loops over pixels."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import tensorflow as tf

from cifar10_trainer import augment
from cifar10_trainer.augment import (
    RandomColorJitter,
    RandomCutout,
    RandomFlip,
    RandomRotation,
    RandomShift,
    RandomZoom,
)
from cifar10_trainer.config import Augmentation
from cifar10_trainer.errors import ConfigError

H, W = 9, 12  # neither square nor even: rows and columns cannot be mixed up unseen


def some_images(n=12, height=H, width=W, seed=0):
    # No pixel is 0, so that what is black came in from outside.
    return np.random.default_rng(seed).integers(1, 256, (n, height, width, 3), np.uint8)


def some_numbers(n=12, draws=1, seed=1):
    return np.random.default_rng(seed).random((n, draws), np.float32)


# ---- references: image [h, w, c], numbers [draws] -> image


def reference_flip(image, numbers):
    return image[:, ::-1] if numbers[0] < 0.5 else image


def reference_shift(image, numbers, pixels, fill):
    mode = {"reflect": "reflect", "nearest": "edge", "constant": "constant"}[fill]
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode)
    top, left = (int(number * (2 * pixels + 1)) for number in numbers)
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


def reference_affine(image, matrix, fill):
    """Bilinear, about the centre: pixel p of the result is at centre + matrix (p - centre), all as (row, column)."""
    # SciPy's "constant" drops a pixel that is partly outside; "grid-constant" blends it, as we do.
    mode = {"reflect": "reflect", "nearest": "nearest", "constant": "grid-constant"}[fill]
    centre = (np.array(image.shape[:2]) - 1) / 2
    offset = centre - matrix @ centre
    channels = [
        scipy.ndimage.affine_transform(c.astype(np.float64), matrix, offset, order=1, mode=mode)
        for c in np.moveaxis(image, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def reference_rotation(image, numbers, turns, fill):
    angle = (2 * float(numbers[0]) - 1) * turns * 2 * np.pi
    cos, sin = np.cos(angle), np.sin(angle)
    return reference_affine(image, np.array([[cos, sin], [-sin, cos]]), fill)


def reference_zoom(image, numbers, amount, fill):
    height, width = (1 + (2 * float(number) - 1) * amount for number in numbers)
    return reference_affine(image, np.diag([height, width]), fill)


def reference_cutout(image, numbers, size):
    image = image.copy()
    middle = [int(number * side) for number, side in zip(numbers, image.shape, strict=False)]
    for r in range(image.shape[0]):
        for c in range(image.shape[1]):
            if all(0 <= p - (m - size // 2) < size for p, m in zip((r, c), middle, strict=True)):
                image[r, c] = 127
    return image


def reference_jitter(image, numbers, brightness, contrast):
    more, factor = (2 * float(number) - 1 for number in numbers)
    brighter = image.astype(np.float64) + 255 * brightness * more
    return np.clip(127 + (brighter - 127) * (1 + contrast * factor), 0, 255)


FILLS = ("reflect", "nearest", "constant")
# name -> layer, its reference, and by how many levels they may differ: a float32 angle can tip one pixel's rounding
CASES = {
    "flip": (RandomFlip(), reference_flip, 0),
    **{
        f"shift {pixels} {fill}": (
            RandomShift(pixels, fill),
            lambda image, numbers, p=pixels, f=fill: reference_shift(image, numbers, p, f),
            0,
        )
        for pixels in (1, 4, 8)
        for fill in FILLS
    },
    "shift of more than the image": (
        RandomShift(14, "constant"),
        lambda image, numbers: reference_shift(image, numbers, 14, "constant"),
        0,
    ),
    **{
        f"rotation {fill}": (
            RandomRotation(0.3, fill),
            lambda image, numbers, f=fill: reference_rotation(image, numbers, 0.3, f),
            1,
        )
        for fill in FILLS
    },
    **{
        f"zoom {fill}": (
            RandomZoom(0.6, fill),
            lambda image, numbers, f=fill: reference_zoom(image, numbers, 0.6, f),
            1,
        )
        for fill in FILLS
    },
    "cutout even": (RandomCutout(4), lambda image, numbers: reference_cutout(image, numbers, 4), 0),
    "cutout odd": (RandomCutout(5), lambda image, numbers: reference_cutout(image, numbers, 5), 0),
    "cutout of everything": (
        RandomCutout(40),
        lambda image, numbers: reference_cutout(image, numbers, 40),
        0,
    ),
    **{
        f"jitter {brightness} {contrast}": (
            RandomColorJitter(brightness, contrast),
            lambda image, numbers, b=brightness, c=contrast: reference_jitter(image, numbers, b, c),
            0.501,  # rounded
        )
        for brightness, contrast in ((0.3, 0), (0, 0.4), (0.2, 0.9), (1, 1))
    },
}
LAYERS = {
    "flip": RandomFlip,
    "shift": lambda: RandomShift(3, "nearest"),
    "rotation": lambda: RandomRotation(0.2, "constant"),
    "zoom": lambda: RandomZoom(0.4),
    "cutout": lambda: RandomCutout(4),
    "jitter": lambda: RandomColorJitter(0.1, 0.2),
}


@pytest.fixture(params=["float32", "mixed_bfloat16"])
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


def expected_of(reference, images, numbers):
    return np.stack([reference(*pair) for pair in zip(images, numbers, strict=True)]).astype(np.float64)


# ---- what a layer does to an image


@pytest.mark.parametrize("case", CASES)
def test_layer_equals_its_reference(case):
    layer, reference, tolerance = CASES[case]
    images, numbers = some_images(), some_numbers(12, layer.draws)
    result = layer.transform(tf.constant(images), tf.constant(numbers))
    assert result.dtype == tf.uint8
    expected = expected_of(reference, images, numbers)
    assert np.abs(result.numpy() - expected).max() <= tolerance
    if tolerance:  # rounded to the nearest, not cut off: half a level away nearly everywhere
        assert np.mean(np.abs(result.numpy() - expected) > 0.501) < 0.001
    assert (result.numpy() != images).any()


@pytest.mark.parametrize("name", LAYERS)
def test_layer_in_tf_data_and_under_a_policy(name, policy):
    layer = LAYERS[name]()
    images, numbers = some_images(), some_numbers(12, layer.draws)
    plain = layer.transform(tf.constant(images), tf.constant(numbers)).numpy()
    data = tf.data.Dataset.from_tensor_slices((images, numbers)).batch(5)  # 5, 5, 2: batches of unknown size
    mapped = np.concatenate([x.numpy() for x in data.map(layer.transform)])
    np.testing.assert_array_equal(mapped, plain)
    # the layer's own call, which makes the numbers itself, in a batch of three an element
    eager = layer(tf.constant(images), seed=(3, 4))
    assert eager.dtype == tf.uint8
    whole = tf.data.Dataset.from_tensors(images).map(lambda x: layer(x, seed=(3, 4)))
    np.testing.assert_array_equal(next(iter(whole)).numpy(), eager.numpy())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [tf.uint8, tf.float32])
def test_the_policy_changes_no_pixel(name, dtype):
    images = tf.cast(some_images(), dtype)
    if dtype == tf.float32:
        images += 0.123  # which bfloat16 cannot hold
    before = keras.config.dtype_policy()
    plain = LAYERS[name]()(images, seed=(1, 2)).numpy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        mixed = LAYERS[name]()(images, seed=(1, 2)).numpy()
    finally:
        keras.config.set_dtype_policy(before)
    assert mixed.dtype == plain.dtype == dtype.as_numpy_dtype
    np.testing.assert_array_equal(mixed, plain)


def test_quarter_and_half_turns_are_exact():
    square = some_images(1, 8, 8)
    quarter = RandomRotation(0.25).transform(square, np.zeros((1, 1), np.float32)).numpy()[0]
    assert any((quarter == np.rot90(square[0], k)).all() for k in (1, -1))
    half = RandomRotation(0.5).transform(square, np.zeros((1, 1), np.float32)).numpy()[0]
    np.testing.assert_array_equal(half, square[0, ::-1, ::-1])


def test_zoom_takes_height_and_width_apart():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[:, 2:6, 2:6] = 200  # half of the height, half of the width
    # a number of 0 shows half of a side, 0.5 the side as it is
    taller = RandomZoom(0.5).transform(image, np.array([[0, 0.5]], np.float32)).numpy()[0, ..., 0]
    wider = RandomZoom(0.5).transform(image, np.array([[0.5, 0]], np.float32)).numpy()[0, ..., 0]
    assert (taller[3] == [0, 0, 200, 200, 200, 200, 0, 0]).all()
    assert (taller[:, 3] > 0).all()
    np.testing.assert_array_equal(wider, taller.T)


@pytest.mark.parametrize("name", LAYERS)
def test_the_batch_does_not_matter_to_an_image(name):
    layer = LAYERS[name]()
    images, numbers = some_images(), some_numbers(12, layer.draws)
    together = layer.transform(images, numbers).numpy()
    backwards = layer.transform(images[::-1], numbers[::-1]).numpy()[::-1]
    alone = np.concatenate([layer.transform(images[i : i + 1], numbers[i : i + 1]) for i in range(12)])
    np.testing.assert_array_equal(backwards, together)
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("name", LAYERS)
def test_each_image_of_a_batch_draws_for_itself(name):
    same = np.repeat(some_images(1), 32, axis=0)
    results = LAYERS[name]()(same, seed=(0, 1)).numpy()
    different = len({image.tobytes() for image in results})
    assert different == 2 if name == "flip" else different > 15


@pytest.mark.parametrize("name", LAYERS)
def test_seeds(name):
    images = some_images(32)

    def of(seed):
        return LAYERS[name]()(images, seed=seed).numpy()

    first = of((1, 2))
    np.testing.assert_array_equal(of((1, 2)), first)
    np.testing.assert_array_equal(of(tf.stack([1, tf.constant(2, tf.int64)])), first)
    assert (of((1, 3)) != first).any()
    assert (of((2, 2)) != first).any()


@pytest.mark.parametrize("name", LAYERS)
def test_epochs_differ_although_a_global_seed_is_set(name):
    """tf.random in `map` repeats itself after a global seed (tensorflow#35682); seeds of a step do not."""
    keras.utils.set_random_seed(0)
    layer, images = LAYERS[name](), some_images(32)
    epochs = [layer(tf.constant(images), seed=(0, step)).numpy() for step in range(3)]
    steps = tf.data.Dataset.range(3)
    mapped = steps.map(lambda step: layer(tf.constant(images), seed=tf.stack([0, step])))
    for here, there in zip(epochs, mapped, strict=True):
        np.testing.assert_array_equal(here, there.numpy())
    assert len({epoch.tobytes() for epoch in epochs}) == 3


# ---- how often


def index_images(n, side):
    """Images whose pixels tell their own row and column."""
    rows, columns = np.mgrid[:side, :side].astype(np.uint8)
    return np.broadcast_to(np.stack([rows, columns, rows], -1), (n, side, side, 3))


def test_half_of_the_images_flip():
    n = 10_000
    flipped = RandomFlip()(index_images(n, 2), seed=(0, 0)).numpy()[:, 0, 0, 1] == 1
    # five standard deviations of a fair coin
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(n)


def test_all_shifts_occur_equally_often():
    n, pixels = 10_000, 2
    middle = RandomShift(pixels)(index_images(n, 5), seed=(0, 0)).numpy()[:, 2, 2]
    offsets = middle[:, :2].astype(int) - 2
    counts = np.array([[(offsets == (dy, dx)).all(1).sum() for dx in range(-2, 3)] for dy in range(-2, 3)])
    assert counts.sum() == n
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 0.001


def test_cutouts_are_centred_everywhere_equally_often():
    n = 6400
    holes = RandomCutout(1)(np.zeros((n, 8, 8, 3), np.uint8), seed=(0, 0)).numpy()[..., 0] == 127
    assert (holes.sum((1, 2)) == 1).all()
    assert scipy.stats.chisquare(holes.sum(0).ravel()).pvalue > 0.001


def test_a_share_of_the_images_has_a_cutout_which_is_centred_everywhere_equally_often():
    n = 20_000
    numbers = np.random.default_rng(0).random((n, 2), np.float32)
    for share in (0.0, 0.3, 1.0, 7.0):
        first = augment.cut_out_some(numbers[:, 0], share)
        drawn = np.stack([first, numbers[:, 1]], axis=1)
        holes = RandomCutout(1).transform(np.zeros((n, 8, 8, 1), np.uint8), drawn).numpy()[..., 0] == 127
        cut = holes.any((1, 2))
        np.testing.assert_array_equal(cut, numbers[:, 0] < share)
        if cut.any():
            assert scipy.stats.chisquare(holes.sum(0).ravel()).pvalue > 0.001
    np.testing.assert_array_equal(augment.cut_out_some(numbers[:, 0], 1.0), numbers[:, 0])


def test_an_image_without_a_cutout_has_none_however_large_it_is():
    """The square of an image with the first draw 1 would begin in the image, were it as large as this one."""
    images = np.zeros((2, 8, 8, 3), np.uint8)
    found = RandomCutout(32).transform(images, tf.constant([[0.5, 0.5], [1.0, 0.5]])).numpy()
    assert (found[0] == 127).all() and (found[1] == 0).all()


@pytest.mark.parametrize("make", [RandomCutout, RandomColorJitter], ids=["cutout", "jitter"])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (-0.5, 0.5)])
def test_layers_know_the_range_of_the_pixels(make, low, high):
    arguments = (4,) if make is RandomCutout else (0.4, 0.8)
    images, numbers = some_images().astype(np.float32), some_numbers(12, make.draws)
    scaled = low + (high - low) * images / 255
    expected = low + (high - low) * make(*arguments).transform(images, numbers).numpy() / 255
    layer = make(*arguments, value_range=(low, high))
    np.testing.assert_allclose(layer.transform(scaled, numbers), expected, atol=1e-6)
    again = make.from_config(layer.get_config())
    np.testing.assert_array_equal(again.transform(scaled, numbers), layer.transform(scaled, numbers))


@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name]().compilable])
def test_equal_seeds_give_equal_images_under_xla(name):
    layer, images = LAYERS[name](), tf.constant(some_images())
    compiled = tf.function(lambda x: layer(x, seed=(7, 3)), jit_compile=True)
    difference = np.abs(compiled(images).numpy().astype(int) - layer(images, seed=(7, 3)).numpy())
    assert difference.max() <= (name == "jitter")  # a product may be rounded otherwise


def test_pixels_that_the_dtype_does_not_hold_do_not_wrap():
    images, numbers = some_images(), some_numbers(12, 2)
    assert RandomCutout(40, value_range=(-300, -200)).transform(images, numbers).numpy().max() == 0
    layer = RandomColorJitter(0.4, 0.9, value_range=(-100, 400))
    exact = layer.transform(images.astype(np.float32), numbers).numpy()
    assert exact.min() < 0 and exact.max() > 255
    assert np.abs(layer.transform(images, numbers).numpy() - np.clip(exact, 0, 255)).max() <= 0.5


def test_brightness_and_contrast_of_known_draws():
    image = np.full((1, 2, 2, 3), [27, 127, 227], np.uint8)
    for numbers, expected in (
        ([0.5, 0.5], [27, 127, 227]),
        ([1.0, 0.5], [78, 178, 255]),  # brighter by a fifth of 255, and clipped
        ([0.0, 0.5], [0, 76, 176]),
        ([0.5, 1.0], [0, 127, 255]),  # one and a half times as far from 127
        ([0.5, 0.0], [77, 127, 177]),
        ([1.0, 0.0], [102, 152, 202]),  # rounded to even from 102.5, 152.5 and 202.5
    ):
        found = RandomColorJitter(0.2, 0.5).transform(image, tf.constant([numbers], tf.float32))
        np.testing.assert_array_equal(found[0, 0, 0], expected)


def test_turns_and_zooms_are_uniform():
    numbers = np.linspace(0, 1, 5, dtype=np.float32)[:, None]
    (cos, minus_sin), (sin, also_cos) = RandomRotation(0.1).matrix(numbers)
    expected = np.array([-36, -18, 0, 18, 36]) * np.pi / 180
    np.testing.assert_allclose(np.arctan2(sin, cos), expected, atol=1e-6)
    np.testing.assert_allclose(sin, -minus_sin)
    np.testing.assert_allclose(cos, also_cos)
    (x, _), (_, y) = RandomZoom(0.2).matrix(np.tile(numbers, (1, 2)) * [[1, 0.5]])
    np.testing.assert_allclose(y, [0.8, 0.9, 1.0, 1.1, 1.2], atol=1e-6)
    np.testing.assert_allclose(x, [0.8, 0.85, 0.9, 0.95, 1.0], atol=1e-6)


# ---- several layers at once


COMPOSITIONS = {
    "none": [],
    "flip": [RandomFlip()],
    "flip, shift": [RandomFlip(), RandomShift(3)],
    "shift, flip": [RandomShift(3, "constant"), RandomFlip()],
    "flip, shift, cutout": [RandomFlip(), RandomShift(3, "constant"), RandomCutout(4)],
    "flip, nearest, cutout": [RandomFlip(), RandomShift(2, "nearest"), RandomCutout(5)],
    "two shifts": [RandomShift(3, "constant"), RandomShift(4, "constant")],
    "two fills": [RandomShift(3, "nearest"), RandomShift(4, "constant")],
    "two fills more": [RandomShift(3, "constant"), RandomShift(4, "reflect"), RandomShift(2, "nearest")],
    "cutout first": [RandomCutout(4), RandomFlip(), RandomShift(2)],
    "flip, cutout, jitter": [RandomFlip(), RandomCutout(4), RandomColorJitter(0.1, 0.1)],
    "two cutouts": [RandomCutout(4), RandomCutout(2)],
    "all": [RandomFlip(), RandomShift(2, "constant"), RandomRotation(0.1), RandomZoom(0.2), RandomCutout(4)],
    "turn between": [RandomFlip(), RandomRotation(0.1, "nearest"), RandomShift(2), RandomCutout(3)],
}


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("known", [True, False])
def test_fetch_is_the_layers_one_after_the_other(composition, known):
    layers = COMPOSITIONS[composition]
    images, index = some_images(7), np.array([3, 0, 6, 3, 3, 5, 1, 2, 4, 6], np.int32)
    numbers = some_numbers(10, sum(layer.draws for layer in layers), seed=5)
    # with a table of known size, as in training, and of unknown size, as inside tf.data
    shape = images.shape if known else [None, *images.shape[1:]]
    fetch = tf.function(
        lambda x, i, u: augment.fetch(augment.image_table(x), i, layers, u),
        input_signature=[
            tf.TensorSpec(shape, tf.uint8),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None, numbers.shape[1]]),
        ],
    )
    expected, first = images[index], 0
    for layer in layers:
        expected = layer.transform(expected, numbers[:, first : first + layer.draws]).numpy()
        first += layer.draws
    result = fetch(images, index, numbers)
    assert result.dtype == tf.uint8
    np.testing.assert_array_equal(result.numpy(), expected)


def test_image_table():
    images = some_images(3)
    table = augment.image_table(tf.constant(images)).numpy()
    assert table.shape == (4, H, W, 3)
    np.testing.assert_array_equal(table[:-1], images)
    np.testing.assert_array_equal(table[-1, 0, 0], [0] * 3)
    np.testing.assert_array_equal(table[-1, -1, -1], [127] * 3)


def test_table_of_a_data_set_is_not_copied_and_gives_its_memory_back(table_bytes):
    images = some_images(3)
    table = augment.host_table(images)
    np.testing.assert_array_equal(table.numpy(), augment.image_table(tf.constant(images)).numpy())
    assert images.nbytes < table_bytes() < 2 * images.nbytes  # a table of TensorFlow's own is not seen
    del table
    assert table_bytes() == 0


def test_layers_of_an_augmentation():
    everything = Augmentation(
        flip="random",
        shift=2,
        rotation=0.1,
        zoom=0.2,
        fill="nearest",
        cutout=5,
        brightness=0.1,
        contrast=0.3,
        mixup=0.2,
    )
    layers = augment.layers_of(everything)
    assert [type(layer).__name__ for layer in layers] == [
        "RandomFlip",
        "RandomShift",
        "RandomRotation",
        "RandomZoom",
        "RandomCutout",
        "RandomColorJitter",
    ]
    _, shift, rotation, zoom, cutout, jitter = layers
    assert (jitter.brightness, jitter.contrast) == (0.1, 0.3)
    assert (shift.pixels, rotation.amount, zoom.amount, cutout.size) == (2, 0.1, 0.2, 5)
    assert shift.fill == rotation.fill == zoom.fill == "nearest"
    assert augment.layers_of(Augmentation(mixup=1.0)) == []
    assert [type(x) for x in augment.layers_of(Augmentation(flip="alternating"))] == [RandomFlip]


# ---- wrong usage


@pytest.mark.parametrize("kind", [RandomShift, RandomRotation, RandomZoom])
def test_unknown_fill(kind):
    with pytest.raises(
        ConfigError, match=r"unknown fill 'reflct'; allowed: reflect, nearest, constant.*'reflect'"
    ):
        kind(1, fill="reflct")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RandomShift(2.5), "pixels is 2.5; allowed: a whole number, 0 or more"),
        (lambda: RandomCutout(-3), "size is -3; allowed: a whole number, 0 or more"),
        (lambda: RandomCutout("8"), "size is '8'; allowed"),
        (lambda: RandomRotation(-1), "amount is -1; allowed: a number, 0 or more"),
        (lambda: RandomZoom(5.0), "amount is 5.0; allowed: a number from 0 to 1"),
        (lambda: RandomColorJitter(1.5), "brightness is 1.5; allowed: a number from 0 to 1"),
        (lambda: RandomColorJitter(0.1, "much"), "contrast is 'much'; allowed: a number from 0 to 1"),
        (lambda: RandomCutout(4, value_range=(1, 0)), "value_range is (1, 0); allowed: two numbers"),
        (lambda: RandomColorJitter(value_range=255), "value_range is 255; allowed: two numbers"),
        (lambda: RandomCutout(4, value_range=(0, "1")), "value_range is (0, '1'); allowed: two numbers"),
    ],
)
def test_amounts_out_of_range_are_one_line(make, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        make()


@pytest.mark.parametrize("name", LAYERS)
def test_no_images_and_seeds_of_another_shape(name):
    layer = LAYERS[name]()
    assert layer(some_images(1)[:0], seed=(0, 0)).shape == (0, H, W, 3)
    with pytest.raises(ConfigError, match=r"seed has shape \(3,\); allowed: two integers"):
        layer(some_images(1), seed=(1, 2, 3))


def test_impossible_shifts():
    with pytest.raises(ConfigError, match="pixels is -1; allowed: a whole number, 0 or more"):
        RandomShift(-1)
    RandomShift(8)(some_images(1, 9, 9), seed=(0, 0))
    with pytest.raises(ConfigError, match=r"9 pixels of 9x12.*less than the shorter side"):
        RandomShift(9)(some_images(1), seed=(0, 0))


# ---- as Keras layers


@pytest.mark.parametrize("name", LAYERS)
def test_layer_survives_serialisation(name):
    layer = LAYERS[name]()
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    images = some_images()
    np.testing.assert_array_equal(again(images, seed=(5, 6)).numpy(), layer(images, seed=(5, 6)).numpy())


def test_layers_inside_a_saved_model(tmp_path, policy):
    x = images = keras.Input((H, W, 3), dtype="uint8")
    for i, make in enumerate(LAYERS.values()):
        x = make()(x, seed=(7, i))
        assert (x.shape, x.dtype) == ((None, H, W, 3), "uint8")
    model = keras.Model(images, x)
    expected = some_images()
    for i, make in enumerate(LAYERS.values()):
        expected = make()(expected, seed=(7, i)).numpy()
    np.testing.assert_array_equal(model(some_images()).numpy(), expected)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(some_images()).numpy(), expected)


# ---- mixing


def one_hot(n, classes=10, seed=0):
    return np.eye(classes, dtype=np.float32)[np.random.default_rng(seed).integers(0, classes, n)]


def reference_mixup(images, labels, numbers, alpha):
    share = scipy.stats.beta.ppf(numbers[:, 0].astype(np.float64), alpha, alpha)
    mixed, targets = np.empty(images.shape), np.empty(labels.shape)
    for i in range(len(images)):
        mixed[i] = share[i] * images[i] + (1 - share[i]) * images[i - 1].astype(float)
        targets[i] = share[i] * labels[i] + (1 - share[i]) * labels[i - 1]
    return mixed, targets


def reference_cutmix(images, labels, numbers, alpha):
    mixed, targets = images.astype(np.float64), np.empty(labels.shape)
    share = scipy.stats.beta.ppf(numbers[:, 0].astype(np.float64), alpha, alpha)
    height, width = images.shape[1:3]
    for i in range(len(images)):
        bounds = []
        for side, number in ((height, numbers[i, 1]), (width, numbers[i, 2])):
            half = np.sqrt(1 - share[i]) * side / 2
            middle = int(number * side)
            bounds.append((max(round(middle - half), 0), min(round(middle + half), side)))
        (top, bottom), (left, right) = bounds
        mixed[i, top:bottom, left:right] = images[i - 1, top:bottom, left:right]
        area = max(bottom - top, 0) * max(right - left, 0) / (height * width)
        targets[i] = (1 - area) * labels[i] + area * labels[i - 1]
    return mixed, targets


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup(alpha, policy):
    images, labels, numbers = some_images(24), one_hot(24), some_numbers(24, augment.MIX_DRAWS)
    mixed, targets = augment.mix(images, labels, numbers, mixup=alpha)
    assert mixed.dtype == targets.dtype == tf.float32
    expected, expected_targets = reference_mixup(images, labels, numbers, alpha)
    # the Beta's table has steps of 1/2000
    np.testing.assert_allclose(targets, expected_targets, atol=5e-4)
    np.testing.assert_allclose(mixed, expected, atol=255 * 5e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_cutmix(alpha, policy):
    images, labels, numbers = some_images(24), one_hot(24), some_numbers(24, augment.MIX_DRAWS)
    mixed, targets = augment.mix(images, labels, numbers, cutmix=alpha)
    assert mixed.dtype == targets.dtype == tf.float32
    expected, expected_targets = reference_cutmix(images, labels, numbers, alpha)
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_allclose(targets, expected_targets, atol=1e-6)
    assert (mixed.numpy() != images).any()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_in_tf_data(kind, policy):
    images, labels, numbers = some_images(24), one_hot(24), some_numbers(24, augment.MIX_DRAWS)
    eager = augment.mix(images, labels, numbers, **{kind: 0.7})
    data = tf.data.Dataset.from_tensors((images, labels, numbers))
    inside = next(iter(data.map(lambda *batch: augment.mix(*batch, **{kind: 0.7}))))
    for here, there in zip(eager, inside, strict=True):
        # the graph may multiply and add in one rounding
        np.testing.assert_allclose(there, here, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_labels_are_shares(kind):
    labels = one_hot(500)
    _, targets = augment.mix(some_images(500), labels, some_numbers(500, 3), **{kind: 1.0})
    np.testing.assert_allclose(targets.numpy().sum(1), 1, atol=1e-6)
    assert (targets.numpy() >= 0).all()
    kept = (targets.numpy() * labels).sum(1)[(labels != np.roll(labels, 1, 0)).any(1)]
    if kind == "mixup":  # Beta(1, 1) is uniform
        assert scipy.stats.kstest(kept, "uniform").pvalue > 0.001
    else:  # what hangs over the border does not count: more is kept
        assert 0.5 < kept.mean() < 0.9


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 10.0])
def test_beta_quantile(alpha):
    uniform = np.concatenate([[0, 1e-6, 1 - 2**-23], np.linspace(0.001, 0.999, 999)]).astype(np.float32)
    expected = scipy.stats.beta.ppf(uniform.astype(np.float64), alpha, alpha)
    result = augment._beta_quantile(alpha, tf.constant(uniform))
    # linear between 2,001 points: never more than a step away
    np.testing.assert_allclose(result, expected, atol=1 / 2000)


# ---- as Keras's own layers

OWN_DRAWS = {
    "flip": lambda **more: RandomFlip(**more),
    "shift": lambda **more: RandomShift(3, **more),
    "rotation": lambda **more: RandomRotation(0.2, **more),
    "zoom": lambda **more: RandomZoom(0.4, **more),
    "cutout": lambda **more: RandomCutout(4, **more),
    "jitter": lambda **more: RandomColorJitter(0.1, 0.2, **more),
}


def pictures(n=32, dtype=np.uint8):
    return np.random.default_rng(4).integers(0, 256, (n, 12, 12, 3)).astype(dtype)


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_without_a_seed_each_call_draws_anew_in_training_only(name):
    layer, images = OWN_DRAWS[name](), pictures()
    first, second = layer(images).numpy(), layer(images).numpy()
    assert first.dtype == np.uint8 and first.shape == images.shape
    assert not np.array_equal(first, second) and not np.array_equal(first, images)
    assert not np.array_equal(first[0], images[0]) or not np.array_equal(first[1:] - images[1:], 0)
    np.testing.assert_array_equal(layer(images, training=False).numpy(), images)


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_a_layers_own_seed_repeats_its_sequence_of_draws(name):
    images = pictures()
    one, other, third = (OWN_DRAWS[name](seed=seed) for seed in (5, 5, 6))
    calls = [(one(images).numpy(), other(images).numpy(), third(images).numpy()) for _ in range(2)]
    for a, b, c in calls:
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
    assert not np.array_equal(calls[0][0], calls[1][0])


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_with_a_seed_of_a_call_a_layer_stays_a_pure_function(name):
    layer, images = OWN_DRAWS[name](), pictures()
    layer(images)  # its own draws change nothing in calls with a seed
    one, again = layer(images, seed=(7, 1)).numpy(), OWN_DRAWS[name](seed=3)(images, seed=(7, 1)).numpy()
    np.testing.assert_array_equal(one, again)


def test_in_a_model_the_layers_train_and_leave_predictions_alone(tmp_path):
    images, labels = pictures(dtype=np.float32), np.arange(32) % 3
    layers = [make() for make in OWN_DRAWS.values()]
    model = keras.Sequential(
        [keras.Input((12, 12, 3)), *layers, keras.layers.Flatten(), keras.layers.Dense(3)]
    )
    plain = keras.Sequential([keras.Input((12, 12, 3)), *model.layers[-2:]])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images / 255, labels, epochs=2, batch_size=16, verbose=0)
    np.testing.assert_array_equal(model.predict(images, verbose=0), plain.predict(images, verbose=0))
    assert not np.array_equal(model(images, training=True), model(images, training=True))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), model.predict(images, verbose=0))
    functional = keras.Model(model.inputs[0], keras.layers.Flatten()(RandomFlip()(model.inputs[0])))
    np.testing.assert_array_equal(functional.predict(images, verbose=0), images.reshape(32, -1))


def test_in_map_passes_over_a_data_set_differ():
    images, layer = pictures(), RandomShift(3)
    data = tf.data.Dataset.from_tensor_slices(images).batch(8).map(layer, num_parallel_calls=2)
    first, second = (np.concatenate(list(data.as_numpy_iterator())) for _ in range(2))
    assert first.dtype == np.uint8 and not np.array_equal(first, second)


def test_one_image_is_augmented_as_a_batch_of_one():
    images = pictures(1)
    one = RandomShift(3)(images[0], seed=(1, 2)).numpy()
    np.testing.assert_array_equal(one, RandomShift(3)(images, seed=(1, 2)).numpy()[0])


def test_images_without_static_sides_are_one_line():
    with pytest.raises(ConfigError, match=r"images has shape \(None, None, None, 3\); allowed"):
        tf.data.Dataset.from_generator(
            lambda: [], output_signature=tf.TensorSpec((None, None, None, 3), tf.uint8)
        ).map(RandomFlip())


def test_keras_learns_which_layers_xla_can_compile():
    jit = {name: make().supports_jit for name, make in OWN_DRAWS.items()}
    assert jit == {
        "flip": True,
        "shift": True,
        "rotation": False,
        "zoom": False,
        "cutout": True,
        "jitter": True,
    }


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", OWN_DRAWS)
def test_images_keep_their_dtype(name, dtype):
    images = pictures(dtype=np.uint8)
    layer = OWN_DRAWS[name]()
    augmented = layer(images.astype(dtype), seed=(1, 2)).numpy()
    assert augmented.dtype == dtype
    expected = layer(images, seed=(1, 2)).numpy().astype(np.float64)
    np.testing.assert_allclose(augmented.astype(np.float64), expected, atol=0.6)  # rounded where it is uint8


def test_float_images_are_not_rounded():
    """In a model, images are float32: between two pixels there are values that integers do not have."""
    images = pictures(dtype=np.float32)
    turned = RandomRotation(0.2, seed=1)(images).numpy()
    assert turned.dtype == np.float32 and (turned != np.round(turned)).mean() > 0.5
    rounded = RandomRotation(0.2, seed=1)(images.astype(np.uint8)).numpy()
    np.testing.assert_array_equal(np.round(turned), rounded)
