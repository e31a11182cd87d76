"""docs/scale_out.md: its files have the right form, and its commands run, with loopback and stand-ins for the machines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cluster import ROOT, free_addresses
from test_documents import ROOT as CHECKOUT
from test_documents import blocks_of

from cifar10_trainer import __main__ as command
from cifar10_trainer import cluster

BLOCKS = blocks_of(CHECKOUT / "docs" / "scale_out.md")


def parse_yaml(text):
    """Mappings, lists and scalars by indentation: the part of YAML that the files use. Raises ValueError elsewhere."""
    lines = [
        (len(line) - len(line.lstrip()), line.strip())
        for line in text.splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    value, rest = _node(lines, lines[0][0])
    if rest:
        raise ValueError(f"indentation: {rest[0]}")
    return value


def _node(lines, indent):
    is_list = lines[0][1].startswith("- ")
    found = [] if is_list else {}
    while lines and lines[0][0] == indent and lines[0][1].startswith("- ") == is_list:
        (_, line), lines = lines[0], lines[1:]
        if is_list:
            item = line[2:]
            if re.match(r"[\w./-]+:( |$)", item) and not item.startswith("--"):
                lines = [(indent + 2, item), *lines]
                value, lines = _node(lines, indent + 2)
            else:
                value = _scalar(item)
            found.append(value)
            continue
        match = re.fullmatch(r"([\w./-]+):(?: (.+))?", line)
        if match is None or match[1] in found:
            raise ValueError(line)
        if match[2] is not None:
            value = _scalar(match[2])
        elif lines and lines[0][0] > indent:
            value, lines = _node(lines, lines[0][0])
        else:
            raise ValueError(f"{line} has no value")
        found[match[1]] = value
    if lines and lines[0][0] > indent:
        raise ValueError(f"indentation: {lines[0]}")
    return found, lines


def _scalar(text):
    if re.fullmatch(r"\d+|true|false|\[[\d, ]*\]", text):
        return json.loads(text)
    if text[0] in "&*!|>{[%@`\"'" or ": " in text or " #" in text:
        raise ValueError(text)
    return text


def test_the_reader_of_yaml_sees_errors():
    assert parse_yaml("a: 1\nb:\n  - c: x\n    d:\n      - --e=1\n      - f\n") == {
        "a": 1,
        "b": [{"c": "x", "d": ["--e=1", "f"]}],
    }
    for wrong in ("a: 1\n  b: 2", "a:\nb: 1", "a: 1\na: 2", "a", "- a\nb: 1", "a: {b: 1}"):
        with pytest.raises(ValueError):
            parse_yaml(wrong)


def documents():
    texts = [part for b in BLOCKS if b.language == "yaml" for part in re.split(r"^---$", b.code, flags=re.M)]
    return {found["kind"]: found for found in map(parse_yaml, texts)}


def flags_of(words):
    """The flags of a command `python -m cifar10_trainer`, which must exist and fit."""
    assert words[:3] == ["python", "-m", "cifar10_trainer"]
    command.FLAGS.unparse_flags()
    for name in command.FLAGS:
        command.FLAGS[name].unparse()
    command.FLAGS(["cifar10_trainer", *words[3:]])
    command.config_from_flags()
    return command.FLAGS


def test_the_job_of_kubernetes(monkeypatch):
    found = documents()
    job, service, policy = found["Job"]["spec"], found["Service"], found["NetworkPolicy"]["spec"]
    assert (found["Job"]["apiVersion"], job["completionMode"]) == ("batch/v1", "Indexed")
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    words = [w.replace("$(JOB_COMPLETION_INDEX)", "1") for w in container["command"]]
    flags = flags_of(words)
    name, port = found["Job"]["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert flags.workers == [
        f"{name}-{i}.{service['metadata']['name']}:{port}" for i in range(job["completions"])
    ]
    assert job["parallelism"] == job["completions"] and flags.worker_index == 1
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert (
        service["spec"]["publishNotReadyAddresses"] is True
    )  # the workers must find one another to become ready
    chosen = {"job-name": name}  # the label that Kubernetes gives the pods of a Job
    assert service["spec"]["selector"] == policy["podSelector"]["matchLabels"] == chosen
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": chosen}}]}]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {"operator": "In", "values": [2]}
    assert pod["restartPolicy"] == "Never"  # which the failure policy needs
    mounted(container, pod, flags.workdir)


def mounted(container, pod, workdir):
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"] and workdir.startswith(mount["mountPath"])


def test_the_tfjob_of_kubeflow():
    job = documents()["TFJob"]
    assert job["apiVersion"] == "kubeflow.org/v1"
    (kind,) = job["spec"]["tfReplicaSpecs"]
    assert kind == "Worker"
    pod = job["spec"]["tfReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "tensorflow" and container["ports"][0]["name"] == "tfjob-port"
    flags = flags_of(container["command"])
    assert flags.workers is None
    mounted(container, pod, flags.workdir)


def test_the_tf_config_of_kubeflow(monkeypatch):
    """As its operator writes it."""
    hosts = [f"cifar10-worker-{i}.default.svc:2222" for i in range(2)]
    text = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": 1}, "environment": "cloud"}
    monkeypatch.setenv("TF_CONFIG", json.dumps(text))
    assert cluster.place_in_tf_config() == cluster.Place(tuple(hosts), 1)


def test_the_script_of_slurm(tmp_path):
    """With stand-ins: `srun` starts its command once for each node, `python` prints its arguments."""
    (script,) = (b.code for b in BLOCKS if b.code.startswith("#!/bin/bash"))
    stand_ins = {
        "scontrol": '[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"',
        "srun": 'shift; for i in 0 1; do SLURM_PROCID=$i "$@"; done',
        "python": "printf '%s\\n' python \"$@\" .",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    usual = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/home/me"}
    job = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[1-2]"}
    done = subprocess.run(["bash", "-c", script], env=usual | job, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for index, lines in enumerate(done.stdout.split("\n.\n")[:2]):
        flags = flags_of(lines.splitlines())
        assert flags.workers == ["node1:24567", "node2:24567"] and flags.worker_index == index
        assert flags.workdir == "/home/me/runs/fast.96"
    directives = re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.M)
    assert dict(directives)["ntasks-per-node"] == "1" and len(directives) == 7


@pytest.mark.slow
def test_the_commands_by_hand_on_loopback(tmp_path):
    """Those of the document, with addresses of this machine, a folder of this test and a small run."""
    (code,) = (b.code for b in BLOCKS if "10.0.0.1:5000" in b.code)
    first, second = free_addresses(2)
    environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    environment |= {"PYTHONPATH": ROOT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    processes = []
    for line in code.splitlines():
        line = line.replace("10.0.0.1:5000", first).replace("10.0.0.2:5000", second)
        line = line.replace("/shared/run", "run").partition("#")[0] + "--dataset=digits --epochs=1"
        words = ["bash", "-c", f"exec {line}"]
        processes.append(
            subprocess.Popen(
                words,
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=600) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        assert "strategy: 2 replica(s) on 2 worker(s)" in out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["strategy"], metrics["replicas"]) == ("multi_worker", 2)


def test_the_numbers_of_the_guide_are_those_of_the_record():
    root = Path(ROOT)
    text = " ".join((root / "docs" / "scale_out.md").read_text(encoding="utf-8").split())
    record = json.loads((root / "results" / "benchmark-zen4.json").read_text())["sections"]["scale_out"]
    one, two, processes, _, gpus, hosts = [verdict["value"] for verdict in record["verdicts"]]
    for words in (
        f"`mirrored` on one device takes {one:.4g} times as long as no strategy",
        f"two logical devices {two:.3g} times as long as one",
        f"two processes {processes:.3g} times as long as one",
        f"8 GPUs train {gpus:.3g} times as many images a second as one, and 4 hosts of 8 GPUs {hosts:.3g} times as many",
    ):
        assert words in text, words
