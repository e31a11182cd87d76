"""The size of a model's weights, checked before they are allocated."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def bounded_weights(check: Callable[[int], None]) -> Iterator[None]:
    """Calls `check` with the bytes of all variables so far, before each one that Keras makes in the block is allocated.

    Args:
        check: raises an error where they are too many.
    """
    import tensorflow as tf

    total = 0

    def create(make: Callable[..., Any], **options: Any) -> Any:
        nonlocal total
        value = options.get("initial_value")
        if callable(value):
            with tf.Graph().as_default():  # gives the shape, and computes nothing
                value = value()
        if isinstance(value, tf.Tensor):
            total += math.prod(value.shape) * value.dtype.size
            check(total)
        return make(**options)

    with tf.variable_creator_scope(create):
        yield
