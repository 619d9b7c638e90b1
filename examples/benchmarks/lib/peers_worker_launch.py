"""Starts the workers of peers.py on two hosts of one core each, and reads their reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lib.hosts import Hosts, share_cores
from lib.peers_worker import Job

TORCH_PORT = 29400
LIGHTHOUSE_PORT = 29510
# Every host gets its address for a name, since torchft tells its peers the name of the machine.
OWN_HOST_NAME = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']


class PeerHosts(Hosts):
    """Two hosts on a link of `rate`, each bound to a core."""

    def __init__(self, rate: str) -> None:
        super().__init__(2, rate, cores=[cores[:1] for cores in share_cores(2)])

    def train(self, job: Job, python: str, timeout: float, lighthouse: str | None = None) -> None:
        """Runs the worker on both hosts with the interpreter `python`.

        Args:
            timeout: seconds after which it has failed.
            lighthouse: torchft's program at which its managers find each other; it runs on host 0. None: not needed.

        Raises:
            RuntimeError: a host failed or the time is over; with all output.
        """
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder) / f"{name}.log" for name in (*self.names, "lighthouse")]
            beside = None
            if lighthouse is not None:
                words = [lighthouse, "--min_replicas=2", "--join_timeout_ms=10000", f"--bind=0.0.0.0:{LIGHTHOUSE_PORT}"]
                beside = self._start(0, words, logs[-1])
            workers = [self._start(host, self._words(host, job, python), logs[host]) for host in range(2)]
            problem = self._wait(workers, timeout, meanwhile=None)  # ends all that runs on the hosts
            if beside is not None:
                beside.wait()
            outputs = [log.read_text(errors="replace") for log in logs if log.exists()]
        if problem:
            raise RuntimeError(f"{problem}\n" + "\n".join(outputs))

    def _words(self, host: int, job: Job, python: str) -> list[str]:
        """The worker's command on `host`, with the environment that torchrun would give it."""
        group = {"MASTER_ADDR": self.address(0), "MASTER_PORT": TORCH_PORT, "RANK": host, "WORLD_SIZE": 2}
        local = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": host}
        own = {"PEERS_HOST": host, "PEERS_ADDRESS": self.address(host), "ACCELERATE_USE_CPU": "true"}
        torchft = {"TORCHFT_LIGHTHOUSE": f"http://{self.address(0)}:{LIGHTHOUSE_PORT}"}
        environment = [f"{name}={value}" for name, value in {**group, **local, **own, **torchft}.items()]
        worker = [python, "-m", "lib.peers_worker", json.dumps(asdict(job))]
        return [*OWN_HOST_NAME, self.address(host), "env", *environment, *worker]


def run(job: Job, rate: str, python: str | None, timeout: float) -> dict[str, Any]:
    """Trains on both hosts; each host's seconds and bytes sent, and what is the same on both.

    Args:
        python: torchft's interpreter for a job that is its own; else unused.

    Raises:
        RuntimeError: the job cannot run here or failed; a training that syncs has left the hosts with different
            parameters.
    """
    if job.kind == "torchft":
        interpreter, lighthouse = torchft_programs(python)
    else:
        interpreter, lighthouse = sys.executable, None
    hosts = PeerHosts(rate)
    with hosts:
        hosts.train(job, interpreter, timeout, lighthouse)
    reports = [json.loads((Path(job.folder) / f"host{host}.json").read_text(encoding="utf-8")) for host in range(2)]
    sums = [one["checksum"] for one in reports]
    if job.kind != "never" and abs(sums[0] - sums[1]) > 1e-6 * sums[0]:
        raise RuntimeError(f"After the last sync the hosts' parameters differ: sums {sums}.")
    same = {name: reports[0][name] for name in ("parameter_bytes", "torch")}
    return {**same, **{name: [one[name] for one in reports] for name in ("seconds", "bytes_sent")}}


def torchft_programs(python: str | None) -> tuple[str, str]:
    """torchft's interpreter and the lighthouse beside it.

    Raises:
        RuntimeError: one is missing, or torchft cannot be imported; says why.
    """
    if python is None:
        raise RuntimeError("torchft has an environment of its own: name its interpreter with --torchft_python")
    interpreter = Path(os.path.abspath(python))  # no symbolic link is followed: it leads out of the environment
    lighthouse = interpreter.with_name("torchft_lighthouse")
    for program in (interpreter, lighthouse):
        if not program.is_file():
            raise RuntimeError(f"there is no {program.name} beside --torchft_python")
    words = [str(interpreter), "-c", "import torchft.local_sgd, transformers"]
    probe = subprocess.run(words, capture_output=True, text=True)
    if probe.returncode:
        raise RuntimeError(f"torchft cannot be imported: {probe.stderr.strip().splitlines()[-1]}")
    return str(interpreter), str(lighthouse)
