from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from cifar10_trainer import optim
from cifar10_trainer.config import Optimizer, Schedule
from cifar10_trainer.errors import ConfigError
from cifar10_trainer.optim import SGD, Muon, RunSchedule, leave_out_others, make_optimizer

# ---- schedules: peak 2, run of 100 steps; {step: learning rate}, computed by hand


LINEAR = Schedule(name="linear", warmup=0.2, start=0.1, end=0.05)
SCHEDULES = {
    "constant": (Schedule(), {0: 2, 50: 2, 99: 2}),
    "constant with warmup": (Schedule(warmup=0.5, start=0.2), {0: 0.4, 25: 1.2, 49: 1.968, 50: 2, 99: 2}),
    "linear": (Schedule(name="linear"), {0: 2, 25: 1.5, 99: 0.02, 100: 0, 120: 0}),
    "linear with warmup": (LINEAR, {0: 0.2, 10: 1.1, 19: 1.91, 20: 2, 60: 1.05, 100: 0.1, 150: 0.1}),
    "linear from nothing": (Schedule(name="linear", warmup=0.1), {0: 0, 5: 1, 10: 2, 55: 1, 100: 0}),
    "cosine": (
        Schedule(name="cosine"),
        {0: 2, 25: 1 + np.sqrt(0.5), 50: 1, 75: 1 - np.sqrt(0.5), 100: 0, 130: 0},
    ),
    "cosine with warmup": (
        Schedule(name="cosine", warmup=0.2, start=0.5, end=0.1),
        {0: 1, 10: 1.5, 20: 2, 40: 2 * (0.1 + 0.45 * (1 + np.sqrt(0.5))), 60: 1.1, 100: 0.2},
    ),
    "step": (
        Schedule(name="step"),
        {0: 2, 49: 2, 50: 0.2, 74: 0.2, 75: 0.02, 99: 0.02},
    ),
    "step with warmup": (
        Schedule(name="step", drop=0.5, drops=(0.3, 0.6, 0.9), warmup=0.2),
        {0: 0, 10: 1, 20: 2, 29: 2, 30: 1, 59: 1, 60: 0.5, 89: 0.5, 90: 0.25},
    ),
    "cyclic": (
        Schedule(name="cyclic", cycles=5, end=0.1),
        {0: 0.2, 5: 1.1, 10: 2, 15: 1.1, 20: 0.2, 30: 2, 90: 2, 95: 1.1, 100: 0.2},
    ),
    "cyclic with warmup": (
        Schedule(name="cyclic", cycles=2, end=0.5, warmup=0.2, start=0.1),
        {0: 0.2, 10: 1.1, 20: 1, 40: 2, 60: 1, 80: 2, 100: 1},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_at_points_computed_by_hand(name):
    schedule, points = SCHEDULES[name]
    run_schedule = RunSchedule(2, 100, schedule)
    inside = tf.function(lambda step: run_schedule(step))
    for step, expected in points.items():
        # a millionth of the peak: float32's cosine
        np.testing.assert_allclose(run_schedule(step), expected, atol=2e-6)
        np.testing.assert_allclose(inside(tf.constant(step, tf.int64)), expected, atol=2e-6)
        assert run_schedule(step).dtype == tf.float32


@pytest.mark.parametrize("steps", [10, 100, 490, 977, 39_100])
def test_drops_and_warmup_end_at_the_same_step_inside_a_graph(steps):
    run_schedule = RunSchedule(1, steps, Schedule(name="step", drop=0.5, drops=(0.1, 0.3, 0.7, 0.9)))
    warm = RunSchedule(1, steps, Schedule(name="cyclic", cycles=1, end=0.5, warmup=0.3, start=0))
    inside = tf.function(lambda step: (run_schedule(step), warm(step)))
    for step in {round(f * steps) + i for f in (0.1, 0.3, 0.7, 0.9) for i in (-1, 0, 1)}:
        dropped, warmed = inside(tf.constant(step, tf.int64))
        # in tenths, and in whole numbers: no rounding
        assert float(dropped) == 0.5 ** sum(10 * step >= tenths * steps for tenths in (1, 3, 7, 9))
        if 10 * step < 3 * steps:
            assert float(warmed) == pytest.approx(step / (0.3 * steps), abs=1e-6)
        else:
            done = (step / steps - 0.3) / 0.7
            assert float(warmed) == pytest.approx(1 - abs(1 - 2 * done) / 2, abs=1e-4)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedule_does_not_depend_on_the_length_of_the_run(name):
    schedule = Schedule(name=name, warmup=0.23, start=0.2, end=0.07)
    short, long = RunSchedule(1, 100, schedule), RunSchedule(1, 70_000, schedule)
    for step in range(0, 101, 10):
        np.testing.assert_allclose(short(step), long(700 * step), atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_survives_serialisation(name):
    schedule, points = SCHEDULES[name]
    run_schedule = RunSchedule(2, 100, schedule)
    schedules = keras.optimizers.schedules
    again = schedules.deserialize(schedules.serialize(run_schedule))
    assert isinstance(again, RunSchedule)
    assert (again.peak, again.steps, again.schedule) == (2, 100, schedule)
    for step in points:
        assert float(again(step)) == float(run_schedule(step))


# ---- variables to optimise


def variables_of(seed=0):
    """A convolution's kernel and bias, and a norm's gamma and beta: keras Variables with the paths of layers."""
    convolution = keras.layers.Conv2D(6, 3, name="conv")
    norm = keras.layers.BatchNormalization(name="norm")
    convolution.build((None, 8, 8, 4))
    norm.build((None, 8, 8, 6))
    variables = [convolution.kernel, convolution.bias, norm.gamma, norm.beta]
    assert variables[3].path == "norm/beta"
    rng = np.random.default_rng(seed)
    for v in variables:
        v.assign(rng.normal(size=v.shape))
    return variables


def gradients_of(variables, steps, seed=1):
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=v.shape).astype(np.float32) for v in variables] for _ in range(steps)]


def apply_all(optimizer, variables, gradients, graph=False):
    """The variables after all gradients, as float64 arrays."""
    optimizer.build(variables)
    apply = (
        tf.function(lambda g: optimizer.apply(g, variables))
        if graph
        else lambda g: optimizer.apply(g, variables)
    )
    for step in gradients:
        apply([tf.constant(g) for g in step])
    return [np.array(v, np.float64) for v in variables]


def clipped(gradients, norm):
    total = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients))
    return [g * min(1, norm / total) for g in gradients] if norm else gradients


def reference_sgd(weights, gradients, rate, momentum, nesterov, l2, multiplier, clip_norm=None):
    """velocity = momentum * velocity + g; weights -= rate * (velocity, or g + momentum * velocity), g with decay."""
    weights = [w.copy() for w in weights]
    velocity = [np.zeros_like(w) for w in weights]
    for t, step in enumerate(gradients):
        lr = rate(t) if callable(rate) else rate
        for i, g in enumerate(clipped(step, clip_norm)):
            g = g * (multiplier if i == 3 else 1) + l2 * weights[i]
            # Keras's velocity holds the rate of the step it comes from
            velocity[i] = momentum * velocity[i] - lr * g
            weights[i] += momentum * velocity[i] - lr * g if nesterov else velocity[i]
    return weights


# ---- SGD


@pytest.mark.parametrize(
    ("momentum", "nesterov", "l2", "multiplier", "clip_norm"),
    [
        (0.0, False, 0.0, 1.0, None),
        (0.9, False, 0.0, 1.0, None),
        (0.85, True, 0.0, 1.0, None),
        (0.0, False, 0.01, 1.0, None),
        (0.85, True, 0.01, 64.0, None),
        (0.85, False, 0.0, 64.0, None),
        (0.85, True, 0.01, 64.0, 0.7),
        (0.9, False, 0.01, 1.0, 1e5),
    ],
)
@pytest.mark.parametrize("graph", [False, True])
def test_sgd_against_its_reference(momentum, nesterov, l2, multiplier, clip_norm, graph):
    variables = variables_of()
    start = [np.array(v, np.float64) for v in variables]
    gradients = gradients_of(variables, 4)
    given = Optimizer(
        name="sgd",
        learning_rate=0.05,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=l2,
        bias_multiplier=multiplier,
        clip_norm=clip_norm,
    )
    found = apply_all(make_optimizer(given, Schedule(), 4), variables, gradients, graph)
    expected = reference_sgd(start, gradients, 0.05, momentum, nesterov, l2, multiplier, clip_norm)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # float32


def test_sgd_follows_its_schedule():
    variables = variables_of()
    start = [np.array(v, np.float64) for v in variables]
    gradients = gradients_of(variables, 5)
    given = Optimizer(learning_rate=0.2, momentum=0.9, nesterov=True)
    optimizer = make_optimizer(given, Schedule(name="linear"), 5)
    found = apply_all(optimizer, variables, gradients)
    expected = reference_sgd(start, gradients, lambda t: 0.2 * (1 - t / 5), 0.9, True, 0, 1)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert float(optimizer.learning_rate) == 0
    assert int(optimizer.iterations) == 5


def test_decay_of_the_offsets_is_not_multiplied():
    variables = variables_of()
    before = np.array(variables[3])
    zeros = [[np.zeros(v.shape, np.float32) for v in variables]]
    apply_all(SGD(0.1, l2=0.5, bias_multiplier=64.0), variables, zeros)
    np.testing.assert_allclose(np.array(variables[3]), before * (1 - 0.1 * 0.5), rtol=1e-6)


# ---- Muon


def by_singular_values(matrix, steps=3):
    """Newton-Schulz as what it does to singular values: s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5, from s / |matrix|."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@pytest.mark.parametrize("shape", [(36, 6), (6, 36), (8, 8), (1, 5), (27, 24)])
def test_orthogonal_is_the_polynomial_of_the_singular_values(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for scale in (1, 1e-4, 1e4):
        # float32, and a sum of 1e-7 in the norm that only matters to tiny matrices
        np.testing.assert_allclose(
            optim.orthogonalize([tf.constant(matrix * scale)])[0],
            by_singular_values(matrix),
            atol=2e-3 if scale < 1 else 2e-5,
        )


@pytest.mark.parametrize("shape", [(576, 64), (64, 576), (216, 64)])
def test_singular_values_come_near_one(shape):
    matrix = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    before = np.linalg.svd(matrix, compute_uv=False)
    assert before.max() / before.min() > 1.9
    values = np.linalg.svd(optim.orthogonalize([tf.constant(matrix)])[0], compute_uv=False)
    # the coefficients are chosen for speed: they settle between 0.7 and 1.2, and three rounds come close to it
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_matrices_of_all_shapes_in_one_batch(monkeypatch):
    """On a GPU. bfloat16 has eight bits, and three rounds multiply small singular values, and errors, by up to 41."""
    generator = np.random.default_rng(2)
    shapes = [(36, 6), (6, 36), (8, 8), (1, 5), (27, 24)]
    matrices = [10.0**k * generator.normal(size=s).astype(np.float32) for k, s in enumerate(shapes)]
    alone = optim.orthogonalize([tf.constant(x) for x in matrices])
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: ["a GPU"])
    found = optim.orthogonalize([tf.constant(x) for x in matrices])
    for x, one, other in zip(matrices, alone, found, strict=True):
        assert other.shape == x.shape and other.dtype == tf.float32
        expected = by_singular_values(x)
        np.testing.assert_allclose(one, expected, atol=2e-5)
        error = np.linalg.norm(other - expected) / np.linalg.norm(expected)
        assert 1e-4 < error < 41 * 2**-9  # it is bfloat16


def test_kernels_are_updated_together(monkeypatch):
    """Keras's own loop takes variables one by one. Where Keras no longer asks Muon, this fails, and only speed is lost."""
    given = []
    alone = optim.orthogonalize
    monkeypatch.setattr(
        optim, "orthogonalize", lambda matrices: given.append(len(matrices)) or alone(matrices)
    )
    generator = np.random.default_rng(0)
    kernels = [keras.Variable(generator.normal(size=(3, 3, 2, n)), dtype="float32") for n in (2, 3, 4)]
    variables = [kernels[0], keras.Variable(np.ones(3), dtype="float32"), *kernels[1:]]
    start = [np.array(v, np.float64) for v in variables]
    gradients = gradients_of(variables, 3)
    found = apply_all(Muon(0.02, momentum=0.0), variables, gradients)
    assert given == [3, 3, 3]
    for i in (0, 2, 3):
        np.testing.assert_allclose(
            found[i], reference_muon(start[i], [g[i] for g in gradients], 0.02), atol=1e-4
        )


def reference_muon(kernel, gradients, rate, momentum=0.6):
    velocity = np.zeros_like(kernel)
    for g in gradients:
        velocity = momentum * velocity + g
        update = by_singular_values((g + momentum * velocity).reshape(-1, kernel.shape[-1]))
        kernel = kernel * np.sqrt(kernel.shape[-1]) / np.sqrt((kernel**2).sum())
        kernel = kernel - rate * update.reshape(kernel.shape)
    return kernel


@pytest.mark.parametrize("momentum", [0.0, 0.85])
@pytest.mark.parametrize("graph", [False, True])
def test_muon_against_its_reference(momentum, graph):
    variables = variables_of()
    start = [np.array(v, np.float64) for v in variables]
    gradients = gradients_of(variables, 4)
    given = Optimizer(
        name="muon",
        learning_rate=0.02,
        momentum=momentum,
        nesterov=True,
        weight_decay=0.01,
        bias_multiplier=8.0,
    )
    found = apply_all(make_optimizer(given, Schedule(), 4), variables, gradients, graph)
    np.testing.assert_allclose(found[0], reference_muon(start[0], [g[0] for g in gradients], 0.02), atol=1e-4)
    # everything that is no kernel of a convolution: SGD at six times the rate, with the decay
    expected = reference_sgd(start, gradients, 6 * 0.02, momentum, True, 0.01, 8.0)
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RunSchedule(0.1, 0, Schedule()), "steps is 0; allowed: a whole number, 1 or more"),
        (lambda: RunSchedule(None, 10, Schedule()), "peak is None; allowed: a number, 0 or more"),
        (lambda: RunSchedule(float("nan"), 10, Schedule()), "peak is nan; allowed: a number, 0 or more"),
        (lambda: RunSchedule(0.1, 10, {"nam": "cosine"}), "unknown key in schedule 'nam'; allowed: name,"),
        (lambda: RunSchedule(0.1, 10, "cosine"), "schedule is 'cosine'; allowed: a Schedule"),
        (lambda: Muon(kernel_momentum=2), "kernel_momentum is 2; allowed: a number from 0 to 1"),
    ],
)
def test_arguments_out_of_range_are_one_line(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize("kind", [SGD, Muon])
def test_only_offsets_of_batch_norm_have_a_rate_of_their_own(kind):
    layers, images = keras.layers, keras.Input((4, 4, 2))
    x = layers.LayerNormalization(name="ln")(layers.BatchNormalization(name="bn")(images))
    model = keras.Model(images, layers.GroupNormalization(1, name="gn")(x))
    optimizer = kind(0.01, bias_multiplier=64.0)
    leave_out_others(optimizer, model)
    optimizer.build(model.trainable_variables)
    optimizer.apply([tf.ones(v.shape) for v in model.trainable_variables], model.trainable_variables)
    moved = {v.path: -v.numpy()[0] for v in model.trainable_variables if v.path.endswith("beta")}
    assert moved["bn/beta"] == pytest.approx(64 * moved["ln/beta"], rel=1e-6)
    assert moved["ln/beta"] == moved["gn/beta"] > 0


def test_muon_leaves_other_kernels_to_sgd():
    """A depthwise kernel is one filter for each channel, and a transposed one has its outputs elsewhere."""
    images = keras.Input((8, 8, 3))
    layers = keras.layers
    kinds = {
        "conv": layers.Conv2D(4, 3, padding="same"),
        "depthwise": layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same"),
        "separable": layers.SeparableConv2D(6, 3, depth_multiplier=2, padding="same"),
        "transposed": layers.Conv2DTranspose(5, 3, padding="same"),
    }
    x = images
    for layer in kinds.values():
        x = layer(x)
    model, optimizer = keras.Model(images, x), Muon(0.1)
    leave_out_others(optimizer, model)
    optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=v.shape).astype(np.float32) for v in model.trainable_variables]
    before = [v.numpy() for v in model.trainable_variables]
    optimizer.apply([tf.constant(g) for g in gradients], model.trainable_variables)
    taken = {
        v.path
        for v, old, g in zip(model.trainable_variables, before, gradients, strict=True)
        if not np.allclose(
            v.numpy(), old - 0.1 * optimizer.sgd_ratio * g * (1 + optimizer.momentum), rtol=1e-4
        )
    }
    conv, pointwise = kinds["conv"].kernel, kinds["separable"].pointwise_kernel
    assert taken == {conv.path, pointwise.path}


def test_muon_begins_with_a_kernel_of_zeros():
    variables = variables_of()
    variables[0].assign(np.zeros(variables[0].shape))
    apply_all(Muon(0.01, momentum=0.85), variables, gradients_of(variables, 2))
    norm = np.linalg.norm(np.array(variables[0]))
    assert np.isfinite(norm) and norm > 0


def test_muon_holds_the_norm_of_a_kernel():
    variables = variables_of()
    variables[0].assign(1000 * np.array(variables[0]))
    gradients = gradients_of(variables, 30)
    apply_all(Muon(0.01, momentum=0.85), variables, gradients)
    # set to sqrt(6 filters) before each update; an update of rate 0.01 has a norm of 0.01 * sqrt(6) at most, or so
    assert abs(np.linalg.norm(np.array(variables[0])) / np.sqrt(6) - 1) < 0.0125
    # and the size of the gradient does not matter
    a, b = variables_of(), variables_of()
    apply_all(Muon(0.01), a, gradients[:3])
    apply_all(Muon(0.01), b, [[100 * g for g in step] for step in gradients[:3]])
    np.testing.assert_allclose(np.array(a[0]), np.array(b[0]), atol=1e-4)


# ---- by name


def used_by(name, **settings):
    """The settings that the optimizer does not refuse."""
    kept = {"adam": (), "adamw": ("weight_decay",)}.get(name, tuple(settings))
    return {key: settings[key] for key in kept}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", SGD), ("muon", Muon), ("adam", optim.Adam), ("adamw", keras.optimizers.AdamW)],
)
def test_make_optimizer(name, kind):
    given = Optimizer(
        name=name,
        learning_rate=0.125,
        clip_norm=2,
        **used_by(name, momentum=0.5, nesterov=True, weight_decay=0.25, bias_multiplier=3),
    )
    optimizer = make_optimizer(given, Schedule(), 10)
    assert type(optimizer) is kind
    assert float(optimizer.learning_rate) == 0.125
    assert optimizer.global_clipnorm == 2
    assert optimizer.clipnorm is None
    if name in ("sgd", "muon"):
        # the decay is in the gradient: Keras's own, decoupled one stays off
        assert optimizer.weight_decay is None
        found = (optimizer.momentum, optimizer.nesterov, optimizer.l2, optimizer.bias_multiplier)
        assert found == (0.5, True, 0.25, 3)
    else:
        assert optimizer.weight_decay == {"adam": None, "adamw": 0.25}[name]
    assert make_optimizer(Optimizer(name=name), Schedule(), 10).global_clipnorm is None


@pytest.mark.parametrize("name", ["sgd", "muon", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["constant", "plateau", "linear", "warm"])
def test_make_optimizer_makes_a_schedule_if_there_is_one(name, schedule):
    made = Schedule(warmup=0.5) if schedule == "warm" else Schedule(name=schedule)
    optimizer = make_optimizer(Optimizer(name=name, learning_rate=0.5), made, 10)
    optimizer.build(variables_of())
    if schedule in ("constant", "plateau"):
        optimizer.learning_rate = 0.25  # as ReduceLROnPlateau does
        assert float(optimizer.learning_rate) == 0.25
    else:
        assert isinstance(optimizer._learning_rate, RunSchedule)
        assert optimizer._learning_rate.peak == 0.5
        assert optimizer._learning_rate.steps == 10
        assert float(optimizer.learning_rate) == (0 if schedule == "warm" else 0.5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_clip_norm_is_of_the_whole_gradient(name):
    given = {"name": name, "learning_rate": 0.01, "weight_decay": 0.1 if name == "adamw" else 0.0}
    found, expected = variables_of(), variables_of()
    # clipping is by one number a step: Adam only sees it if the steps are clipped differently
    gradients = gradients_of(found, 3)
    gradients = [[g * scale for g in step] for step, scale in zip(gradients, (0.001, 1, 10), strict=True)]
    apply_all(make_optimizer(Optimizer(**given, clip_norm=1), Schedule(), 3), found, gradients)
    already = [[np.float32(g) for g in clipped(step, 1)] for step in gradients]
    apply_all(make_optimizer(Optimizer(**given), Schedule(), 3), expected, already)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "muon", "adam", "adamw"])
@pytest.mark.parametrize("schedule", [Schedule(), LINEAR])
def test_optimizer_survives_serialisation(name, schedule):
    given = Optimizer(
        name=name,
        learning_rate=0.02,
        clip_norm=1,
        **used_by(name, momentum=0.8, nesterov=True, weight_decay=0.01, bias_multiplier=8),
    )
    optimizer = make_optimizer(given, schedule, 4)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(again) is type(optimizer)
    assert again.get_config() == optimizer.get_config()
    here, there = variables_of(), variables_of()
    gradients = gradients_of(here, 3)
    for a, b in zip(apply_all(optimizer, here, gradients), apply_all(again, there, gradients), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_optimizer_keeps_its_own_settings_in_its_config(name):
    kind = {"sgd": SGD, "muon": Muon}[name]
    more = {"kernel_momentum": 0.3, "sgd_ratio": 2.0} if name == "muon" else {}
    config = kind(0.1, l2=0.5, bias_multiplier=7.0, momentum=0.25, nesterov=True, **more).get_config()
    assert (
        config.items()
        >= {"l2": 0.5, "bias_multiplier": 7.0, "momentum": 0.25, "nesterov": True, **more}.items()
    )
