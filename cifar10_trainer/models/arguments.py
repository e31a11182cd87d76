"""Checks the arguments of build functions against their annotations, so that a wrong type is an error of one line."""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from ..config import python_value
from ..errors import ConfigError, shown

BuildFunction = typing.TypeVar("BuildFunction", bound=Callable[..., Any])


def checked(build: BuildFunction) -> BuildFunction:
    """Decorates a build function: an argument whose type does not fit its annotation raises ConfigError."""
    hints = {name: hint for name, hint in typing.get_type_hints(build).items() if name != "return"}

    @functools.wraps(build)
    def check_and_build(**arguments: Any) -> Any:
        arguments = {name: without_numpy(value) for name, value in arguments.items()}
        for name, value in arguments.items():
            if name in hints and not _fits(value, hints[name]):
                raise ConfigError(f"{name} is {shown(value)}; allowed: {_in_words(hints[name])}")
        return build(**arguments)

    return typing.cast(BuildFunction, check_and_build)


def without_numpy(value: Any) -> Any:
    """`value` with NumPy's scalars and arrays as Python's numbers and tuples, also within lists and tuples."""
    value = python_value(value)
    return tuple(map(without_numpy, value)) if isinstance(value, list | tuple) else value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` has the type `hint`: None, bool, int, float, str, a sequence of them, or one of several."""
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is Sequence:
            (item,) = typing.get_args(kind)
            fits = isinstance(value, tuple) and all(_fits(v, item) for v in value)
        elif kind is float:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = number and math.isfinite(value)
        elif kind is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, kind)
        if fits:
            return True
    return False


def _in_words(hint: Any, plural: bool = False) -> str:
    words = {
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
        bool: ("True or False", "True or False"),
        str: ("a string", "strings"),
        type(None): ("None", "None"),
    }
    found = []
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is Sequence:
            inner = _in_words(typing.get_args(kind)[0], plural=True)
            found.append(f"sequences of {inner}" if plural else f"a sequence of {inner}")
        else:
            found.append(words[kind][plural])
    return " or ".join(found)
