"""Times this project beside other people's code, and keeps the numbers in results/benchmark.json and docs/benchmarks.md.

    python scripts/benchmark.py                   # every section for a CPU
    python scripts/benchmark.py --quick           # smaller, under five minutes; leaves out `precision`
    python scripts/benchmark.py step loader       # only these sections
    python scripts/benchmark.py --gpu             # the sections for a machine with a GPU, under eight minutes
    python scripts/benchmark.py --gpu --airbench=PATH    # also airbench's own scripts, from a checkout of it
    python scripts/benchmark.py --gpu gpu_96      # the recipe for 95-96%, too long for the eight minutes
    python scripts/benchmark.py --record=results/benchmark-xeon.json step    # the record of another machine

docs/benchmarks.md has the rules of measuring, the baselines and the results. PyTorch is compared where it is installed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags
from bench import cpu, gpu, record, timing

from cifar10_trainer import ConfigError, cli
from cifar10_trainer.errors import unknown
from results import tables

GPU_SECONDS = 460  # the time after which airbench's scripts are stopped; the runs that they finished count

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
flags.DEFINE_boolean("quick", False, "fewer rounds and seeds, shorter runs", flag_values=FLAGS)
flags.DEFINE_boolean("gpu", False, "the sections for a machine with a GPU", flag_values=FLAGS)
flags.DEFINE_integer(
    "seeds", None, "runs of what is trained; default: 5, on a GPU 20, with --quick 1 and 3", lower_bound=1,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("data_dir", None, "where CIFAR-10 is", flag_values=FLAGS)
flags.DEFINE_string("airbench", None, "with --gpu: the folder of airbench's checkout", flag_values=FLAGS)
flags.DEFINE_string(
    "record", None, "the file for the numbers; default: results/benchmark.json, which docs/benchmarks.md shows",
    flag_values=FLAGS,
)  # fmt: skip


def options() -> timing.Options:
    """How much the flags ask for."""
    usual = (3 if FLAGS.quick else 20) if FLAGS.gpu else (1 if FLAGS.quick else 5)
    less: dict[str, Any] = {"rounds": 3, "batches": 5} if FLAGS.quick else {"rounds": 3} if FLAGS.gpu else {}
    return timing.Options(
        quick=FLAGS.quick,
        seeds=FLAGS.seeds or usual,
        # Other commands run in another folder.
        data_dir=FLAGS.data_dir and str(Path(FLAGS.data_dir).absolute()),
        airbench=FLAGS.airbench,
        deadline=time.perf_counter() + GPU_SECONDS,
        **less,
    )


def command_of(name: str) -> str:
    """The command that measures one section again; no folder of data or of airbench is in it."""
    words = [f"XLA_FLAGS={v!r}" for v in [os.environ.get("XLA_FLAGS")] if v and FLAGS.gpu]
    words += ["python scripts/benchmark.py", name]
    words += [f"--{n}" for n in ("gpu", "quick") if FLAGS[n].value]
    words += [f"--seeds={FLAGS.seeds}"] if FLAGS.seeds else []
    words += ["--airbench=PATH"] if FLAGS.airbench else []
    words += [f"--record={FLAGS.record}"] if FLAGS.record else []
    return " ".join(words)


def measure(name: str, section: timing.Section, asked: timing.Options) -> None:
    """Runs one section and keeps its numbers. Those of the default record, and of PROCESSORS, are published, too."""
    print(f"\n== {name}: {section.__doc__}", flush=True)
    busy = timing.others_share()
    if busy is not None and busy > record.QUIET:
        print(f"  other processes take {busy:.0%} of the processors: even ratios will be wrong", flush=True)
    found = section(asked)
    if not found:
        return
    path = Path(FLAGS.record or record.RECORD)
    found = {"others_share": busy, **found}
    kept = record.keep(path, name, found, command=command_of(name), quick=FLAGS.quick)
    if path.resolve() == record.RECORD.resolve():
        record.publish(kept, name)
    if path.resolve() in record.of_processors():
        tables.publish("processors", record.processors_table())


def main(argv: list[str]) -> None:
    sections = gpu.SECTIONS if FLAGS.gpu else cpu.SECTIONS
    for name in argv:
        if name not in sections:
            raise unknown("section", name, sections)
    if len(set(argv)) < len(argv):
        raise ConfigError(f"the sections are {' '.join(argv)}; allowed: each one once")
    if FLAGS.airbench and not FLAGS.gpu:
        raise ConfigError(f"airbench is {FLAGS.airbench}; allowed with --gpu only")
    document = tables.document_of("benchmark")
    if not document.exists():
        raise ConfigError(f"the benchmark runs in a checkout, and {document} is not there")
    record.read(Path(FLAGS.record or record.RECORD))  # fails now, not after everything is measured
    cli.import_tensorflow()
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # it warns of many traced functions, which are intended here
    if FLAGS.gpu and not tf.config.list_physical_devices("GPU"):
        raise ConfigError("gpu is True, but TensorFlow sees no GPU; allowed: on a machine with one")
    began, asked = time.perf_counter(), options()
    left_out = (*gpu.NAMED_ONLY, *(cpu.NOT_QUICK if FLAGS.quick else ()))
    for name in argv or [n for n in sections if n not in left_out]:
        measure(name, sections[name], asked)
        print(f"  ({time.perf_counter() - began:.0f} s so far)", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__ or ""))
