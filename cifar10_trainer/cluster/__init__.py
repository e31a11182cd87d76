"""The workers of one run: who they are, how they meet, what must agree among them, and whether they live.

TensorFlow's strategy waits for the other workers in C++, where no signal handler, and no other thread of Python, can run.
So the workers meet here first, in Python. Worker 0 listens on its own address and the others connect to it. They keep these
connections, compare what must be equal, and send a heartbeat, so that nobody waits for a worker that is frozen or gone.

There is no password, as TensorFlow's server has none: workers belong in a private network. Imports no TensorFlow.
"""

from __future__ import annotations

import importlib.metadata
import platform

from .. import __version__
from ..errors import ConfigError
from ..process import Log
from .meeting import LostWorkerError, Team
from .place import Place, place_in_tf_config, set_tf_config
from .servers import connecting_servers

__all__ = [
    "TIMEOUT",
    "LostWorkerError",
    "Place",
    "Team",
    "connecting_servers",
    "join_workers",
    "place_in_tf_config",
    "set_tf_config",
    "team",
]

TIMEOUT = 600.0  # seconds that workers wait for one another before the run gives up

_team: Team | None = None  # a process belongs to one cluster, as TensorFlow allows one server a process


def join_workers(requested: str, timeout: float = TIMEOUT, log: Log = print) -> Team | None:
    """Meets the other workers of the cluster in TF_CONFIG, once in a process, and compares versions with theirs.

    Args:
        requested: the strategy: "multi_worker", or "auto", which is that where there is a cluster.
        timeout: seconds to wait for the others.
        log: prints whom this worker waits for.

    Returns:
        The team; None where there is no cluster, or the strategy is one of a single process.
    Raises:
        ConfigError: if multi_worker finds no cluster, TF_CONFIG is wrong, or the workers differ.
        RunError: if the others do not come, or have ended.
    """
    global _team
    if requested not in ("auto", "multi_worker"):
        return None
    if _team is None:
        place = place_in_tf_config()
        if place is None and requested == "multi_worker":
            raise ConfigError(
                "strategy multi_worker found no cluster; set TF_CONFIG to JSON with 'cluster' (worker addresses) and"
                " 'task' (type and index) in every process, or use --workers and --worker_index, or --strategy=mirrored"
                " for the GPUs of one machine"
            )
        if place is None:
            return None
        team = Team(place, timeout, log)
        packages = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "numpy")}
        python = ".".join(platform.python_version_tuple()[:2])
        types = {"task types of TF_CONFIG": place.task_types}
        try:
            team.agree(**{"cifar10-trainer": __version__, "Python": python, **packages, **types})
        except BaseException:  # another call must meet and compare again
            team.close()
            raise
        _team = team
    return _team


def team() -> Team | None:
    """What `join_workers` has found in this process."""
    return _team
