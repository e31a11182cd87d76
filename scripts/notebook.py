"""Executes the notebooks in examples/ from top to bottom, and writes their outputs in place or into another file.

    python scripts/notebook.py
    python scripts/notebook.py --output=executed.ipynb

A notebook runs in an empty temporary folder, so that it leaves no files behind. Needs nbclient and ipykernel (the
extra `test`).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from absl import flags

from cifar10_trainer import ConfigError, RunError, cli

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
flags.DEFINE_string("output", None, "the file to write; default: the notebook itself", flag_values=FLAGS)


def execute(path: Path, output: Path) -> None:
    """Executes the notebook `path` and writes it to `output`. Raises RunError where a cell fails."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    from cifar10_trainer import files

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,  # the output does not depend on how fast a cell prints
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=40"],  # the kernel warns of its own port on the loopback
        )
        try:
            client.execute()
        except CellExecutionError as error:
            raise RunError(f"a cell of {path.name} fails: {error.ename}: {error.evalue}") from error
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}  # without the version of Python
    files.write_atomic(output, nbformat.writes(notebook) + "\n")


def main() -> None:
    notebooks = sorted(EXAMPLES.glob("*.ipynb"))
    if FLAGS.output and len(notebooks) != 1:
        raise ConfigError(
            f"output is {FLAGS.output}, but examples/ has {len(notebooks)} notebooks; allowed with one only"
        )
    for path in notebooks:
        execute(path, Path(FLAGS.output or path))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
