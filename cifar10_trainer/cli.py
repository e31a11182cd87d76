"""How every command of the project starts and ends: flags, one-line errors, exit status 0, 1 or 2."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from .errors import ConfigError, RunError


def define_common(flag_values: flags.FlagValues) -> None:
    """Defines --help and --debug in a command's own `flag_values`."""
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=flag_values)
    flags.DEFINE_boolean("debug", False, "show the traceback of an error", flag_values=flag_values)


# Keras and TensorFlow import these, where they are installed, for wrappers, plots and notebooks that no command uses:
# a second of start-up.
SPARED = ("matplotlib", "sklearn", "scipy", "IPython")


def import_tensorflow() -> None:
    """Imports TensorFlow and finds its devices, without the dozen lines its C++ side prints whatever it is told."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said, _not_installed(*SPARED):
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            import keras  # noqa: F401
            import tensorflow as tf

            tf.config.list_physical_devices()
        except Exception:
            said.seek(0)
            os.write(stderr, said.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextlib.contextmanager
def _not_installed(*names: str) -> Iterator[None]:
    """Lets the packages `names` look as if they were not installed, unless they are imported already."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: the documented way
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def run(
    main: Callable[[list[str]], None],
    flag_values: flags.FlagValues,
    usage: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses `argv`, calls `main(positional arguments)`, and gives the exit status.

    0: done; 2: wrong usage; 1: anything else that failed; 130: interrupted before anything could be saved; 141: nobody
    reads the output any more.
    An error is one line on stderr; the traceback only with --debug. SIGTERM interrupts as Ctrl-C does.
    """
    argv = list(sys.argv if argv is None else argv)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's
            signal.signal(signal.SIGTERM, _interrupt)
        try:
            positional = flag_values(argv)[1:]
        except flags.Error as error:
            raise ConfigError(f"{str(error).strip()} (--help shows every flag)") from error
        if flag_values["help"].value:
            print(usage + "\n")
            print(flag_values.get_help())
            return 0
        for name in flag_values:
            if flag_values[name].value == "":  # as from a shell's variable that is not set
                raise ConfigError(f"--{name} is empty; allowed: a value, or no such flag")
        main(positional)
        return 0
    except BrokenPipeError as error:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read the output has had enough (`| head`): nothing to tell, and no second try at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        return _failed(error, flag_values)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(error, flag_values)
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)


def _failed(error: Exception, flag_values: flags.FlagValues) -> int:
    """Tells of `error` in one line, and gives the exit status."""
    if flag_values["debug"].value:
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, ConfigError | RunError):
        text = f"{type(error).__name__}: {text[:500]} (--debug shows the traceback)"
    print(f"error: {text}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1


def _interrupt(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the second one does not wait for anything
    raise KeyboardInterrupt
