from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from cifar10_trainer import augment
from cifar10_trainer.config import Augmentation
from cifar10_trainer.errors import ConfigError
from cifar10_trainer.pipeline import BatchMaker, EpochSampler, index_data, make_dataset, resize, training_data

N, BATCH = 22, 4  # five steps an epoch, two images left over
FLIP_SHIFT = Augmentation(flip="random", shift=2)


def sampler_of(n=N, batch_size=BATCH, seed=3, augmentation=FLIP_SHIFT, replicas=1):
    return EpochSampler(n, batch_size, seed, augmentation, replicas)


def batches(data):
    """[(index, numbers), ...] of a tf.data pipeline, as arrays."""
    return [tuple(x.numpy() for x in element) for element in data]


def joined(parts):
    """The arrays of several batches, one after the other."""
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for here, there in zip(found, expected, strict=True):
        for a, b in zip(here, there, strict=True):
            np.testing.assert_array_equal(a, b)


def numbers_by_image(sampler, epoch):
    """float32 [n, draws]: row i is what image i gets in `epoch`."""
    index, numbers = (x.numpy() for x in sampler.epoch(epoch))
    result = np.empty_like(numbers)
    result[index] = numbers
    return result


def some_data(n=N, side=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 256, (n, side, side, 3), np.uint8), rng.integers(0, 5, n).astype(np.int32)


# ---- the order of the images


def test_an_epoch_is_a_permutation():
    for epoch in range(5):
        index, numbers = sampler_of().epoch(epoch)
        assert sorted(index.numpy()) == list(range(N))
        assert index.dtype == tf.int32
        assert numbers.shape == (N, 3)
        assert numbers.dtype == tf.float32
        assert (numbers.numpy() >= 0).all()
        assert (numbers.numpy() < 1).all()


def test_epochs_and_seeds_differ_and_equal_seeds_agree():
    seen = set()
    for seed in range(4):
        for epoch in range(4):
            index, numbers = (x.numpy() for x in sampler_of(seed=seed).epoch(epoch))
            again = (x.numpy() for x in sampler_of(seed=seed).epoch(tf.constant(epoch, tf.int64)))
            assert_same([(index, numbers)], [tuple(again)])
            seen |= {index.tobytes(), numbers.tobytes()}
    assert len(seen) == 2 * 16


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_no_epoch_repeats_although_a_global_seed_is_set(flip):
    """`Model.fit` on arrays visits one permutation in every epoch after keras.utils.set_random_seed; we must not."""
    sampler = sampler_of(augmentation=Augmentation(flip=flip, shift=2))
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        runs.append(batches(sampler.dataset(0, 4 * sampler.steps_per_epoch)))
    assert_same(*runs)
    epochs = [joined(runs[0][5 * e : 5 * e + 5]) for e in range(4)]
    assert len({index.tobytes() for index, _ in epochs}) == 4
    assert len({numbers.tobytes() for _, numbers in epochs}) == 4


def test_every_image_comes_first_equally_often():
    sampler = sampler_of(n=8, batch_size=8)
    first = [int(sampler.epoch(e)[0][0]) for e in range(400)]
    assert scipy.stats.chisquare(np.bincount(first, minlength=8)).pvalue > 0.001


def test_the_rest_of_an_epoch_is_dropped_and_differs():
    sampler = sampler_of()
    assert sampler.steps_per_epoch == 5
    left = []
    for epoch in range(6):
        index, _ = joined(batches(sampler.dataset(5 * epoch, 5 * epoch + 5)))
        assert len(index) == len(set(index)) == 20
        left.append(frozenset(range(N)) - set(index))
    assert len(set(left)) > 1


@pytest.mark.parametrize(
    ("augmentation", "draws"),
    [
        ({}, 0),
        ({"flip": "random"}, 1),
        ({"flip": "alternating", "shift": 2}, 3),
        ({"shift": 2, "rotation": 0.1, "zoom": 0.1, "cutout": 4}, 2 + 1 + 2 + 2),
        ({"flip": "random", "mixup": 0.2}, 1 + 3),
        ({"cutmix": 1.0}, 3),
    ],
)
def test_draws(augmentation, draws):
    sampler = sampler_of(augmentation=Augmentation(**augmentation))
    assert sampler.draws == draws
    (batch,) = batches(sampler.dataset(0, 1))
    assert batch[1].shape == (BATCH, draws)


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_what_an_image_gets_does_not_depend_on_batch_size_or_replicas(flip):
    augmentation = Augmentation(flip=flip, shift=2)
    first = sampler_of(n=24, augmentation=augmentation)
    for other in (sampler_of(24, 8, 3, augmentation), sampler_of(24, 12, 3, augmentation, replicas=3)):
        for epoch in (0, 1, 2):
            found = joined(
                batches(other.dataset(epoch * other.steps_per_epoch, (epoch + 1) * other.steps_per_epoch))
            )
            numbers = np.empty_like(found[1])
            numbers[found[0]] = found[1]
            np.testing.assert_array_equal(numbers, numbers_by_image(first, epoch))


# ---- alternating flip


def test_alternating_flip_is_random_at_first_and_changes_sides_every_epoch():
    n = 4000
    sampler = sampler_of(n=n, augmentation=Augmentation(flip="alternating", shift=2))
    # the last two are the end of the longest run that a Config allows
    epochs = (0, 1, 2, 3, 400, 401, 99_998, 99_999)
    flips = {e: numbers_by_image(sampler, e)[:, 0] < 0.5 for e in epochs}
    assert abs(flips[0].mean() - 0.5) < 5 * 0.5 / np.sqrt(n)  # five standard deviations of a fair coin
    for e in epochs:
        np.testing.assert_array_equal(flips[e], flips[0] if e % 2 == 0 else ~flips[0])
    other = numbers_by_image(sampler_of(n=n, seed=4, augmentation=sampler.augmentation), 0)[:, 0] < 0.5
    assert 0.4 < (other == flips[0]).mean() < 0.6


def test_alternating_flip_mirrors_the_images():
    images, labels = some_data()
    sampler = sampler_of(n=N, batch_size=N, augmentation=Augmentation(flip="alternating"))
    batch_maker = BatchMaker(sampler.augmentation, 5)
    table = augment.image_table(tf.constant(images))
    seen = []
    for index, numbers in batches(sampler.dataset(0, 4)):
        fetched, _ = batch_maker(table, tf.constant(labels), index, numbers)
        epoch = np.empty_like(images)
        epoch[index] = fetched.numpy()
        seen.append(epoch)
    for before, after in pairwise(seen):
        np.testing.assert_array_equal(after, before[:, :, ::-1])
    plain = (seen[0] == images).all((1, 2, 3))
    assert 3 <= plain.sum() <= N - 3


# ---- cutout for some of the images


CUTOUT = {
    "flip": "alternating",
    "shift": 1,
    "rotation": 0.1,
    "cutout": 4,  # column 4
    "contrast": 0.2,
    "mixup": 0.2,
}


@pytest.mark.parametrize(
    ("epoch", "share"), [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0), (9, 1.0), (99_999, 1.0)]
)
def test_the_share_of_images_with_a_cutout_grows_with_the_epochs(epoch, share):
    n = 4000
    numbers = numbers_by_image(sampler_of(n=n, augmentation=Augmentation(**CUTOUT, cutout_warmup=4)), epoch)
    fixed = numbers_by_image(sampler_of(n=n, augmentation=Augmentation(**CUTOUT)), epoch)
    cut = numbers[:, 4] < 1
    np.testing.assert_array_equal(cut, fixed[:, 4] < share)
    assert abs(cut.mean() - share) <= 5 * np.sqrt(share * (1 - share) / n)  # five standard deviations
    assert (numbers[~cut, 4] == 1).all()
    np.testing.assert_allclose(numbers[cut, 4], fixed[cut, 4] / (share or 1), rtol=1e-6)
    others = [i for i in range(numbers.shape[1]) if i != 4]
    np.testing.assert_array_equal(numbers[:, others], fixed[:, others])


def test_images_without_a_cutout_are_whole():
    images, labels = some_data(n=200)
    images[images == 127] = 128  # of a cutout only
    a = Augmentation(cutout=4, cutout_warmup=2)
    passes = make_dataset(images, labels, 200, augmentation=a, epochs=3)
    shares = [(x.numpy() == 127).all(3).any((1, 2)).mean() for x, _ in passes]
    assert shares[0] == 0 and 0.35 < shares[1] < 0.65 and shares[2] == 1


def test_without_a_cutout_its_warmup_changes_nothing():
    plain, warmed = ({**CUTOUT, "cutout": 0}, {**CUTOUT, "cutout": 0, "cutout_warmup": 4})
    samplers = [sampler_of(augmentation=Augmentation(**a)) for a in (plain, warmed)]
    assert samplers[0].draws == samplers[1].draws
    assert_same(*(batches(s.dataset(0, 7)) for s in samplers))


def test_random_flip_draws_anew_every_epoch():
    sampler = sampler_of(n=4000)
    first, second, third = (numbers_by_image(sampler, e)[:, 0] < 0.5 for e in range(3))
    for a, b in ((first, second), (first, third), (second, third)):
        assert abs((a == b).mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)


def test_no_number_serves_twice():
    """Flips come from a draw of their own: the shifts of the first epoch must not be the same numbers again."""
    sampler = sampler_of(n=2000, augmentation=Augmentation(flip="alternating", shift=2))
    columns = numbers_by_image(sampler, 0)
    # of 2^23 possible values 4,000 are taken: one in 2,000 flips meets one by chance
    assert np.isin(columns[:, 0], columns[:, 1:]).mean() < 0.02
    assert np.isin(numbers_by_image(sampler, 1), columns).mean() < 0.02


# ---- starting anywhere


@pytest.mark.parametrize("flip", ["random", "alternating"])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 9, 10, 13])
def test_starting_at_a_step_goes_on_as_the_uninterrupted_run(start, flip):
    sampler = sampler_of(augmentation=Augmentation(flip=flip, shift=2))
    whole = batches(sampler.dataset(0, 14))
    assert len(whole) == 14
    assert_same(batches(sampler.dataset(start, 14)), whole[start:])
    # a stretch across two ends of an epoch
    stop = min(start + 7, 14)
    assert_same(batches(sampler.dataset(start, stop)), whole[start:stop])


def test_a_run_of_less_than_an_epoch():
    sampler = sampler_of()
    assert_same(batches(sampler.dataset(0, 2)), batches(sampler.dataset(0, 5))[:2])
    assert batches(sampler.dataset(3, 3)) == []


# ---- replicas


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_the_parts_of_the_replicas_are_the_batch_of_one(replicas, start):
    whole = batches(sampler_of(batch_size=8, n=45).dataset(start, 13))
    parts = batches(sampler_of(batch_size=8, n=45, replicas=replicas).dataset(start, 13))
    assert len(parts) == replicas * len(whole)
    assert {len(index) for index, _ in parts} == {8 // replicas}
    steps = [joined(parts[i : i + replicas]) for i in range(0, len(parts), replicas)]
    assert_same(steps, whole)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_parts_of_the_workers_are_the_batch_of_one(workers):
    images, labels = some_data(45)
    one, four = sampler_of(n=45, batch_size=8), sampler_of(n=45, batch_size=8, replicas=4)
    batch_maker = BatchMaker(FLIP_SHIFT, 5)
    data = {
        "table": augment.image_table(tf.constant(images)),
        "labels": tf.constant(labels),
        "batch_maker": batch_maker,
    }
    for make in (index_data, lambda *args: training_data(*args[:3], context=args[3], **data)):
        whole = batches(make(one, 2, 9, None))
        local = 4 // workers
        shares = [
            batches(make(four, 2, 9, SimpleNamespace(input_pipeline_id=w, num_input_pipelines=workers)))
            for w in range(workers)
        ]
        steps = [
            joined([part for share in shares for part in share[local * s : local * (s + 1)]])
            for s in range(7)
        ]
        assert_same(steps, whole)


def test_mirrored_replicas_get_the_parts_in_order():
    """As distribute_datasets_from_function hands them out, on four logical CPUs, which want a process of their own."""
    script = """
import numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4)
from cifar10_trainer import augment
from cifar10_trainer.config import Augmentation
from cifar10_trainer.pipeline import BatchMaker, EpochSampler, index_data, training_data
a = Augmentation(flip="alternating", shift=2, cutout=3)
images = np.random.default_rng(0).integers(0, 256, (45, 8, 8, 3), np.uint8)
table, labels = augment.image_table(tf.constant(images)), tf.range(45) % 5
batch_maker = BatchMaker(a, 5)
def make(kind, sampler, context=None):
    if kind == "index":
        return index_data(sampler, 3, 13, context)
    return training_data(sampler, 3, 13, table=table, labels=labels, batch_maker=batch_maker, context=context)
for replicas in (2, 4):
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    for kind in ("index", "images"):
        sampler = EpochSampler(45, 8, 0, a, replicas)
        handed = strategy.distribute_datasets_from_function(lambda context: make(kind, sampler, context))
        steps = 0
        for parts, whole in zip(handed, make(kind, EpochSampler(45, 8, 0, a)), strict=True):
            for part, expected in zip(parts, whole, strict=True):
                local = strategy.experimental_local_results(part)
                assert len(local) == replicas
                np.testing.assert_array_equal(np.concatenate(local), expected)
            steps += 1
        assert steps == 10, steps
print("agree")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "agree"


# ---- from indices to images


AUGMENTATIONS = {
    "none": Augmentation(),
    "flip, shift": FLIP_SHIFT,
    "alternating, cutout": Augmentation(flip="alternating", shift=2, cutout=3, fill="constant"),
    "everything": Augmentation(flip="random", shift=1, rotation=0.1, zoom=0.1, cutout=3, mixup=0.4),
    "cutmix": Augmentation(flip="random", shift=1, cutmix=1.0),
}


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in AUGMENTATIONS for size in (None, 6)] + [("flip, shift", 8)]
)
def test_tf_data_and_the_step_make_the_same_images(name, size):
    images, labels = some_data()
    sampler = sampler_of(augmentation=AUGMENTATIONS[name])
    batch_maker = BatchMaker(sampler.augmentation, 5, size)
    table, labels = augment.image_table(tf.constant(images)), tf.constant(labels)
    inside = batches(training_data(sampler, 3, 9, table=table, labels=labels, batch_maker=batch_maker))
    in_step = tf.function(lambda index, numbers: batch_maker(table, labels, index, numbers))
    by_hand = [tuple(x.numpy() for x in in_step(*batch)) for batch in index_data(sampler, 3, 9)]
    assert_same(inside, by_hand)
    side = size or 8
    assert inside[0][0].shape == (BATCH, side, side, 3)
    mixed_or_resized = side != 8 or sampler.augmentation.mixup or sampler.augmentation.cutmix
    assert inside[0][0].dtype == (np.float32 if mixed_or_resized else np.uint8)
    assert inside[0][1].dtype == np.float32
    assert 0 <= inside[0][0].min() <= inside[0][0].max() <= 255
    # and once more: nothing is left to the order in which threads come
    again = training_data(sampler, 3, 9, table=table, labels=labels, batch_maker=batch_maker)
    assert_same(batches(again), inside)


def test_the_step_may_be_compiled():
    images, labels = some_data()
    sampler = sampler_of(augmentation=AUGMENTATIONS["alternating, cutout"])
    batch_maker = BatchMaker(sampler.augmentation, 5)
    table, labels = augment.image_table(tf.constant(images)), tf.constant(labels)
    compiled = tf.function(
        lambda index, numbers: batch_maker(table, labels, index, numbers), jit_compile=True
    )
    for batch in index_data(sampler, 0, 2):
        assert_same(
            [[x.numpy() for x in compiled(*batch)]], [[x.numpy() for x in batch_maker(table, labels, *batch)]]
        )


def test_a_batch_is_augmentation_then_mixing_then_resizing():
    images, labels = some_data()
    a = Augmentation(flip="random", shift=2, cutout=3, mixup=1.0)
    index = np.array([4, 0, 21, 7], np.int32)
    numbers = np.random.default_rng(0).random((4, 1 + 2 + 2 + 3), np.float32)
    found, targets = BatchMaker(a, 5, 6)(
        augment.image_table(tf.constant(images)), tf.constant(labels), index, numbers
    )
    expected, first = images[index], 0
    for layer in augment.layers_of(a):
        expected = layer.transform(expected, numbers[:, first : first + layer.draws])
        first += layer.draws
    expected, expected_targets = augment.mix(
        expected, np.eye(5, dtype=np.float32)[labels[index]], numbers[:, 5:], mixup=1.0
    )
    np.testing.assert_allclose(found, resize(expected, 6), rtol=1e-6)
    np.testing.assert_array_equal(targets, expected_targets)


def test_labels_are_one_hot_and_belong_to_their_images():
    images = np.broadcast_to(np.arange(N, dtype=np.uint8)[:, None, None, None], (N, 8, 8, 3))
    labels = np.arange(N, dtype=np.int32) % 7
    data = training_data(
        sampler_of(augmentation=Augmentation()),
        0,
        5,
        table=augment.image_table(tf.constant(images)),
        labels=tf.constant(labels),
        batch_maker=BatchMaker(Augmentation(), 7),
    )
    for batch, targets in data:
        which = batch.numpy()[:, 0, 0, 0]
        np.testing.assert_array_equal(targets, np.eye(7)[labels[which]])
        np.testing.assert_array_equal(batch, images[which])


# ---- resizing


def reference_resize(image, size):
    """An antialiased triangle, pixel by pixel: float64 [h, w, c] -> [size, size, c]."""

    def weights(side):
        scale, result = side / size, np.zeros((size, side))
        for o in range(size):
            for i in range(side):
                distance = abs((i + 0.5) - (o + 0.5) * scale) / max(scale, 1)
                result[o, i] = max(0.0, 1 - distance)
            result[o] /= result[o].sum()
        return result

    w = weights(image.shape[0])
    return np.stack([w @ image[..., c] @ w.T for c in range(image.shape[-1])], axis=-1)


@pytest.mark.parametrize(
    ("side", "size"),
    [(32, 20), (32, 24), (32, 28), (32, 16), (32, 17), (31, 13), (9, 8), (33, 32), (9, 1), (8, 12)],
)
def test_resize(side, size):
    images, _ = some_data(3, side)
    result = resize(tf.constant(images), size)
    assert result.shape == (3, size, size, 3)
    assert result.dtype == tf.float32
    # float32 sums of numbers up to 255
    expected = np.stack([reference_resize(image.astype(np.float64), size) for image in images])
    np.testing.assert_allclose(result, expected, atol=1e-3)
    np.testing.assert_allclose(result, tf.image.resize(images, (size, size), antialias=True), atol=1e-2)


def test_resize_keeps_flat_images_and_same_sizes():
    flat = np.full((1, 32, 32, 3), 200, np.uint8)
    np.testing.assert_allclose(resize(flat, 21), 200, atol=1e-3)
    images, _ = some_data(2, 16)
    np.testing.assert_allclose(resize(images, 16), images, atol=1e-3)


# ---- make_dataset


def arrays(n=40, side=12):
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (n, side, side, 3), np.uint8), np.arange(n) % 5


def elements(data):
    return [(images.numpy(), labels.numpy()) for images, labels in data]


@pytest.mark.parametrize(
    "augmentation", [Augmentation(), FLIP_SHIFT, Augmentation(flip="alternating", cutout=4, zoom=0.2)]
)
def test_make_dataset_is_what_the_engine_sees(augmentation):
    """Two epochs, next to the engine's own pipeline for the same seed."""
    images, labels = arrays()
    sampler, maker = EpochSampler(40, 8, 3, augmentation), BatchMaker(augmentation, 5)
    table, targets = augment.image_table(tf.constant(images)), tf.constant(labels, tf.int32)
    expected = elements(training_data(sampler, 0, 10, table=table, labels=targets, batch_maker=maker))
    data = make_dataset(images, labels, 8, augmentation=augmentation, seed=3, epochs=2, one_hot=True)
    assert len(data) == 10
    for (x, y), (u, v) in zip(elements(data), expected, strict=True):
        np.testing.assert_array_equal(x, u)
        np.testing.assert_array_equal(y, v)


def test_each_pass_is_the_next_epoch_and_a_number_of_epochs_is_one_pass():
    images, labels = arrays()
    options = {"augmentation": FLIP_SHIFT, "seed": 3}
    endless, two = (
        make_dataset(images, labels, 8, **options),
        make_dataset(images, labels, 8, epochs=2, **options),
    )
    assert len(endless) == 5
    passes = [*elements(endless), *elements(endless)]
    for (x, y), (u, v) in zip(passes, elements(two), strict=True):
        np.testing.assert_array_equal(x, u)
        np.testing.assert_array_equal(y, v)
    assert all(np.array_equal(x, u) for (x, _), (u, _) in zip(elements(two), elements(two), strict=True))
    assert not np.array_equal(passes[0][0], passes[5][0])


def test_the_images_of_a_data_set_go_with_it(table_bytes):
    """They once stayed until Python's garbage collector came, and those of a data set that was read for ever."""
    images, labels = arrays()
    data = make_dataset(images, labels, 8, augmentation=FLIP_SHIFT, epochs=1)
    iterator = iter(data)
    next(iterator)
    assert table_bytes() > images.nbytes
    del data, iterator
    assert table_bytes() == 0


def test_labels_of_make_dataset_belong_to_their_images():
    images, labels = arrays()
    images[:] = labels[:, None, None, None] * 10  # an image's colour is its label
    for x, y in elements(make_dataset(images, np.eye(5)[labels], 8, augmentation=FLIP_SHIFT)):
        assert x.dtype == np.uint8 and y.dtype == np.int32
        np.testing.assert_array_equal(x[:, 0, 0, 0], y * 10)


def test_one_hot_labels_of_make_dataset_keep_their_width():
    images, labels = arrays()
    for _, y in elements(make_dataset(images, np.eye(7)[labels], 8, one_hot=True)):
        assert y.shape == (8, 7)


def test_mixing_makes_float_images_and_soft_labels():
    images, labels = arrays()
    (x, y), *_ = elements(make_dataset(images, labels, 8, augmentation=Augmentation(mixup=1.0), one_hot=True))
    assert x.dtype == np.float32 and y.shape == (8, 5)
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_size": 0}, "batch_size is 0; allowed: a whole number from 1 to 40"),
        ({"batch_size": 41}, "batch_size is 41; allowed: a whole number from 1 to 40"),
        ({"batch_size": 8.0}, "batch_size is 8.0; allowed: a whole number from 1 to 40"),
        ({"seed": -1}, "seed is -1; allowed: a whole number from 0 to 2147483647"),
        ({"seed": 2**31}, "seed is 2147483648; allowed"),
        ({"epochs": 1.5}, "epochs is 1.5; allowed: None, or a whole number, 1 or more"),
        ({"epochs": True}, "epochs is True; allowed: None, or a whole number, 1 or more"),
        ({"epochs": 0}, "epochs is 0; allowed: None, or a whole number, 1 or more"),
        (
            {"augmentation": Augmentation(mixup=1.0)},
            "one_hot is False, but mixup and cutmix mix labels; allowed: True",
        ),
        (
            {"augmentation": Augmentation(cutmix=1.0), "one_hot": True, "batch_size": 1},
            "batch_size is 1, one image for each replica, but mixup and cutmix mix two; allowed: 2 or more",
        ),
        ({"augmentation": Augmentation(shift=12)}, "shift is 12"),
        (
            {"labels": [*range(39), 2**32 + 1]},
            "labels go up to 4294967297; allowed: .* at most 1,000,000 of them",
        ),
        ({"labels": [*range(39), 2**31 - 1]}, "labels go up to 2147483647; allowed"),
        ({"labels": np.arange(39)}, "labels has shape \\(39,\\)"),
        ({"images": np.zeros((40, 12, 12, 3))}, "images has dtype float64"),
    ],
)
def test_make_dataset_refuses(changes, text):
    images, labels = arrays()
    with pytest.raises(ConfigError, match=text):
        make_dataset(**{"images": images, "labels": labels, "batch_size": 8, **changes})


def test_options_of_tf_data_are_set_once(caplog):
    """TensorFlow warns where an option changes its value, in the middle of the progress bar."""
    images, labels = arrays()
    sampler, maker = EpochSampler(40, 8, 0, FLIP_SHIFT), BatchMaker(FLIP_SHIFT, 5, size=8)
    table, targets = augment.image_table(tf.constant(images)), tf.constant(labels, tf.int32)
    data = training_data(sampler, 0, 5, table=table, labels=targets, batch_maker=maker, any_size=True)
    assert len(elements(data)) == 5
    assert "Changing the value of option" not in caplog.text
