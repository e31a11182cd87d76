"""Executes scripts/tutorial1.ipynb from top to bottom and keeps what it shows, in place or in another file.

    python scripts/notebook.py
    python scripts/notebook.py --output=executed.ipynb

It runs in an empty folder, so that nothing is left behind. Needs nbclient and ipykernel (the extra `test`).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from absl import flags

from cifar10_trainer import ConfigError, RunError, cli

NOTEBOOK = Path(__file__).resolve().parent / "tutorial1.ipynb"

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
flags.DEFINE_string("output", None, "the file to write; default: the notebook itself", flag_values=FLAGS)


def execute(output: Path) -> None:
    """Writes the notebook, executed anew, to `output`. Raises RunError where a cell fails."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    from cifar10_trainer import files

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=40"],  # it warns of its own port on the loopback
        )
        try:
            client.execute()
        except CellExecutionError as error:
            raise RunError(f"a cell of {NOTEBOOK.name} fails: {error.ename}: {error.evalue}") from error
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}  # not which Python it was
    files.write_atomic(output, nbformat.writes(notebook) + "\n")


def main(argv: list[str]) -> None:
    if argv:
        raise ConfigError(f"unexpected argument {argv[0]!r}; allowed: flags, as --name=value")
    execute(Path(FLAGS.output or NOTEBOOK))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
