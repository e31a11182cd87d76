"""Who the workers are: their addresses, from TF_CONFIG or flags, and this process's place among them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..errors import ConfigError
from ..files import parse_json

_LABEL = r"[^\s:/\[\].]{1,63}"  # of a host's name; IDNA refuses longer and empty ones
EXAMPLE = '{"cluster": {"worker": ["HOST:PORT", "HOST:PORT"]}, "task": {"type": "worker", "index": 0}}'


@dataclass(frozen=True)
class Place:
    """This process's place among the workers.

    Attributes:
        addresses: HOST:PORT of all workers; the first is the chief's, who writes the run's files.
        index: this worker's, from 0.
        task_types: those in TF_CONFIG.
    """

    addresses: tuple[str, ...]
    index: int
    task_types: str = "worker"

    def name(self, index: int | None = None) -> str:
        """A worker for people, as in "worker 1 (10.0.0.2:5000)"; None: this one."""
        index = self.index if index is None else index
        return f"worker {index} ({self.addresses[index]})"


def place_of(addresses: Sequence[str], index: int, where: str) -> Place:
    """Checks a list of workers. `where` names it in errors. Raises ConfigError."""
    if not addresses:
        raise ConfigError(f"{where} names no worker; allowed: HOST:PORT of each, separated by commas")
    for address in addresses:
        host_and_port(address, where)
    for i, address in enumerate(addresses):
        if address in addresses[:i]:
            raise ConfigError(
                f"{where} names {address} twice; allowed: an address of its own for each worker"
            )
    if not 0 <= index < len(addresses):
        raise ConfigError(
            f"the worker index is {index}, but {where} names {len(addresses)} worker(s); allowed: from 0 to"
            f" {len(addresses) - 1}"
        )
    return Place(tuple(addresses), index)


def place_in_tf_config() -> Place | None:
    """The place that TF_CONFIG gives to this process; None where it is not set, empty or {}. Raises ConfigError."""
    text = os.environ.get("TF_CONFIG") or "{}"

    def wrong(what: str) -> ConfigError:
        return ConfigError(
            f"TF_CONFIG is {text[:200]!r}: {what}; allowed: JSON with 'cluster' and 'task', as {EXAMPLE}, or nothing"
        )

    try:
        config = parse_json(text)
    except ValueError as error:
        raise wrong("it is not JSON") from error
    if config == {}:
        return None
    if not isinstance(config, dict) or not isinstance(config.get("cluster"), dict) or not config["cluster"]:
        raise wrong("it has no 'cluster' with lists of addresses")
    cluster, task = config["cluster"], config.get("task")
    if not isinstance(task, dict) or not {"type", "index"} <= set(task):
        raise wrong(
            "it has no 'task' with 'type' and 'index', which say which of the workers this process is"
        )
    for job in (*cluster, task["type"]):
        if job not in ("chief", "worker"):
            raise wrong(
                f"it has the task type {job!r}; 'chief' and 'worker' work here (parameter servers do not work with Keras 3,"
                " and a run evaluates by itself)"
            )
    if not all(is_list_of_texts(addresses) for addresses in cluster.values()):
        raise wrong("each task type of 'cluster' needs a list of HOST:PORT")
    if len(cluster.get("chief", [""])) != 1:
        raise wrong("a cluster has one chief, or none")
    if type(task["index"]) is not int:
        raise wrong(f"the index is {task['index']!r}, not an integer")
    own = cluster.get(task["type"], [])
    if not 0 <= task["index"] < len(own):
        raise wrong(f"the index is {task['index']}, but 'cluster' lists {len(own)} of type {task['type']!r}")
    first = len(cluster.get("chief", ())) if task["type"] == "worker" else 0
    addresses = [*cluster.get("chief", ()), *cluster.get("worker", ())]
    place = place_of(addresses, first + task["index"], "TF_CONFIG")
    return dataclasses.replace(place, task_types=" and ".join(sorted(cluster)))


def set_tf_config(addresses: Sequence[str], index: int, where: str) -> str:
    """TF_CONFIG for a worker, as JSON. Raises ConfigError on a wrong list; `where` names it."""
    place = place_of(addresses, index, where)
    cluster = {"worker": list(place.addresses)}
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": place.index}})


def is_list_of_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def host_and_port(address: str, where: str) -> tuple[str, int]:
    """The two parts of HOST:PORT, where HOST may be an IPv6 address in brackets. Raises ConfigError."""
    match = re.fullmatch(
        rf"(?:\[([0-9A-Fa-f:.]+)\]|({_LABEL}(?:\.{_LABEL})*\.?)):([1-9][0-9]{{0,4}})", address
    )
    if match is None or int(match[3]) > 65535:
        raise ConfigError(
            f"{where} names the address {address!r}; allowed: HOST:PORT with a port from 1 to 65535, as 10.0.0.1:5000"
        )
    return match[1] or match[2], int(match[3])
