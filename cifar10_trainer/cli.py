"""How every command of the project starts and ends: flags, one-line errors, exit status 0, 1 or 2."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

from absl import flags

from .errors import ConfigError, RunError


def define_common(flag_values: flags.FlagValues) -> None:
    """Defines --help and --debug in a command's own `flag_values`."""
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=flag_values)
    flags.DEFINE_boolean("debug", False, "show the traceback of an error", flag_values=flag_values)


def import_tensorflow() -> None:
    """Imports TensorFlow and finds its devices, without the dozen lines its C++ side prints whatever it is told."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.list_physical_devices()
        except BaseException:
            said.seek(0)
            os.write(stderr, said.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def run(
    main: Callable[[list[str]], None],
    flag_values: flags.FlagValues,
    usage: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses `argv`, calls `main(positional arguments)`, and gives the exit status.

    0: done; 2: wrong usage; 1: anything else that failed; 130: interrupted before anything could be saved.
    An error is one line on stderr; the traceback only with --debug.
    """
    argv = list(sys.argv if argv is None else argv)
    try:
        try:
            positional = flag_values(argv)[1:]
        except flags.Error as error:
            raise ConfigError(f"{str(error).strip()} (--help shows every flag)") from error
        if flag_values["help"].value:
            print(usage + "\n")
            print(flag_values.get_help())
            return 0
        main(positional)
        return 0
    except BrokenPipeError:
        # Whoever read the output has had enough (`| head`): nothing to tell, and no second try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if flag_values["debug"].value:
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ConfigError | RunError):
            text = f"{type(error).__name__}: {text[:500]} (--debug shows the traceback)"
        print(f"error: {text}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
