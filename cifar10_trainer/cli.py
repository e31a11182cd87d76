"""What every command has in common: flags, one-line errors, signals, exit status."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import inspect
import math
import os
import platform
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from . import __version__, process
from .errors import VALUE_LENGTH, ConfigError, RunError, cut, reason_of, shown
from .files import parse_json
from .keras_state import check_backend


def define_common(flag_values: flags.FlagValues) -> None:
    """Defines --help, --version and --debug in a command's own `flag_values`."""
    flags.DEFINE_boolean("version", False, "print the versions and exit", flag_values=flag_values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=flag_values)
    flags.DEFINE_boolean("debug", False, "show the traceback of an error", flag_values=flag_values)


def definer(flag_values: flags.FlagValues, module_name: str) -> Callable[..., None]:
    """A function that defines a flag in `flag_values`: define(absl's DEFINE function, name, help text, default, ...).

    module_name: the heading of the flags in --help.
    """

    def define(kind: Callable[..., Any], name: str, text: str, default: Any = None, **more: Any) -> None:
        values = [more.pop("enum_values")] if "enum_values" in more else []  # absl wants them by position
        kind(name, default, *values, text, flag_values=flag_values, module_name=module_name, **more)

    return define


def define_set(define: Callable[..., None], example: str) -> None:
    """Defines --set with a `definer`'s function; `parse_settings` reads it. example: of its use, for --help."""
    define(
        flags.DEFINE_multi_string,
        "set",
        "any other setting, named as in config.json, with a JSON value; may be repeated. For example "
        + example,
        [],
    )


def define_folder_options(define: Callable[..., None]) -> None:
    """Defines --strict and --max_bad with a `definer`'s function; `folder_options` reads them."""
    define(
        flags.DEFINE_boolean,
        "strict",
        "refuse a folder with files that are no images, or cannot be read, rather than leave them out",
        False,
    )
    define(
        flags.DEFINE_float,
        "max_bad",
        "the share of a folder's images, below 1, that may be left out because they cannot be read; default: 0.05",
        lower_bound=0,
        upper_bound=1,
    )


def folder_options(values: flags.FlagValues) -> dict[str, Any]:
    """What --strict and --max_bad ask for, as `datasets.load` takes it: those that were given."""
    return {name: values[name].value for name in ("strict", "max_bad") if values[name].present}


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """What --set sets, as `Config.override` takes it: "optimizer.momentum=0.9" becomes {"optimizer__momentum": 0.9}.

    Raises ConfigError on a text without "=".
    """
    changes: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {shown(text)}; allowed: name=value or section.name=value")
        try:
            changes[name.replace(".", "__")] = parse_json(value)
        except ValueError:
            changes[name.replace(".", "__")] = value
    return changes


# Keras and TensorFlow import these packages where they are installed, for wrappers, plots and notebooks that no command
# uses. Without them a command starts a second sooner.
HIDDEN_PACKAGES = ("matplotlib", "sklearn", "scipy", "IPython")


def import_tensorflow() -> None:
    """Imports TensorFlow and finds its devices. Hides the dozen lines that its C++ side prints at any log level.

    Raises ConfigError where Keras has another backend.
    """
    check_backend()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    with tempfile.TemporaryFile() as output, _not_installed(*HIDDEN_PACKAGES):
        stderr = os.dup(2)
        os.dup2(output.fileno(), 2)
        try:
            import keras  # noqa: F401
            import tensorflow as tf

            tf.config.list_physical_devices()
        except Exception:
            output.seek(0)
            os.write(stderr, output.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextlib.contextmanager
def _not_installed(*names: str) -> Iterator[None]:
    """Hides the packages `names` from imports, unless they are imported already."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None blocks an import
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def versions() -> str:
    """The versions of this package, of Python, TensorFlow and Keras, in one line. Imports none of them."""
    names = {"TensorFlow": "tensorflow", "Keras": "keras"}
    others = ", ".join(f"{name} {importlib.metadata.version(package)}" for name, package in names.items())
    return f"cifar10-trainer {__version__} (Python {platform.python_version()}, {others})"


def run(
    main: Callable[..., None],
    flag_values: flags.FlagValues,
    usage: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the flags, calls `main` and turns its errors into one line on stderr.

    SIGTERM and SIGHUP interrupt as Ctrl-C does. --debug prints the traceback of an error as well.

    Args:
        main: the command; a function of the list of positional arguments, or of nothing where none is allowed.
        flag_values: the command's own flags.
        usage: what --help prints before the flags.
        argv: the command line, its first element the program; None: `sys.argv`.

    Returns:
        the exit status. 0: done; 2: wrong usage; 1: anything else failed; 130: interrupted before anything could be
        saved; 141: the program that reads the output has ended.
    """
    process.open_standard_streams()
    with contextlib.suppress(AttributeError, ValueError):  # somebody's own stream
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # rather than end for a name
    # SIGINT raises KeyboardInterrupt by itself.
    before = process.set_handlers(_interrupt, set(process.stop_signals()) - {signal.SIGINT})
    try:
        with process.enduring_stderr():
            return _run(main, flag_values, usage, list(sys.argv if argv is None else argv))
    finally:
        process.restore_handlers(before)


def _run(main: Callable[..., None], flag_values: flags.FlagValues, usage: str, argv: list[str]) -> int:
    """`run` without its surroundings."""
    try:
        # The handlers are set. A SIGINT that has waited since `launch` started this worker is raised here.
        process.admit_interrupt()
        try:
            positional = flag_values(argv)[1:]
        except flags.Error as error:
            text = str(error).strip()
            for value in (word.partition("=")[2] or word for word in argv):
                # absl repeats it, whatever its length, and Python 199 letters of it
                if len(value) > VALUE_LENGTH:
                    text = text.replace(value, cut(value)).replace(value[:199], cut(value))
            raise ConfigError(f"{text} (--help shows every flag)") from error
        if flag_values["help"].value:
            print(f"{usage}\n\n{flag_values.get_help()}")
        elif flag_values["version"].value:
            print(versions())
        else:
            _check_texts(flag_values)
            _expand_homes(flag_values)
            _call(main, positional)
        if sys.stdout is not None:  # None where the shell closed it
            sys.stdout.flush()  # here, so that an error of it is handled as any other
        return 0
    except BrokenPipeError as error:
        if not _reader_has_gone():
            return _failed(error, flag_values)
        # The reader of the output has gone, as in `| head`. Python would write again at exit: to nowhere, then.
        process.to_nowhere(sys.stdout)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(error, flag_values)


def _call(main: Callable[..., None], positional: list[str]) -> None:
    """Calls `main` with the positional arguments that it takes. Raises ConfigError where it takes none."""
    if inspect.signature(main).parameters:
        main(positional)
    elif positional:
        raise ConfigError(
            f"unexpected argument {shown(positional[0])}; allowed: flags, as --name=value (--help shows them)"
        )
    else:
        main()


def _check_texts(flag_values: flags.FlagValues) -> None:
    """Raises ConfigError on a flag without a value, as from an unset variable of the shell, on what is not UTF-8, and on nan."""
    for name in flag_values:
        value = flag_values[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{name} is {value}; allowed: a finite number")
        if value == "" or (value == [] and flag_values[name].present):
            raise ConfigError(f"--{name} is empty; allowed: a value; to use the default, leave the flag out")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
                utf8 = sys.getfilesystemencoding() == "utf-8"
                advice = "rename the file" if utf8 else "set PYTHONUTF8=1"
                raise ConfigError(f"--{name} is {shown(text)}; allowed: names in UTF-8; {advice}")


def _expand_homes(flag_values: flags.FlagValues) -> None:
    """Replaces the ~ of --flag=~/file, which bash leaves as it is, by the home folder."""
    for name in flag_values:
        value = flag_values[name].value
        if isinstance(value, str) and value.startswith("~"):
            flag_values[name].value = os.path.expanduser(value)


def _reader_has_gone() -> bool:
    """Whether stdout is a pipe that nothing reads any more."""
    try:
        sys.stdout.flush()
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR)
        return bool(poll.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, AttributeError):  # no file behind it; Windows has no poll
        return False


def _failed(error: Exception, flag_values: flags.FlagValues) -> int:
    """Prints `error` as one line, and returns the exit status."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        process.to_nowhere(sys.stdout)
    if flag_values["debug"].value:
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        text = f"cannot use {cut(error.filename)}: {reason_of(error)}; choose a shorter name"
    elif not isinstance(error, ConfigError | RunError):
        text = f"{type(error).__name__}: {cut(text, 500)} (--debug shows the traceback)"
    print(f"error: {text}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1


def _interrupt(number: int, frame: Any) -> None:
    for other in process.stop_signals():
        if other != signal.SIGINT:
            signal.signal(other, signal.SIG_DFL)  # a second one ends the process at once
    raise KeyboardInterrupt
