"""Several hosts on one Linux machine: network namespaces joined by a bridge, and the bytes that each one sent.

Needs root, `ip` and `tc` (iproute2). Nothing else crosses between the hosts, so the counters are the true traffic.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType


def unavailable() -> str | None:
    """Why this machine cannot make hosts, or None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "`ip` and `tc` are missing (Debian: apt-get install iproute2)"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return f"no network namespace can be made: {probe.stderr.strip()}" if probe.returncode else None


class Hosts:
    """`num_hosts` namespaces with addresses 10.88.0.1, 10.88.0.2, ..., gone again at the end of the `with` block.

    Args:
        rate: limit of every host in each direction, as `tc` writes it ("100mbit"); None: unlimited.
    """

    def __init__(self, num_hosts: int, rate: str | None = None) -> None:
        self.names = [f"edit{os.getpid()}h{host}" for host in range(num_hosts)]
        self.switch = f"edit{os.getpid()}sw"
        self.rate = rate

    def address(self, host: int) -> str:
        return f"10.88.0.{host + 1}"

    def __enter__(self) -> Hosts:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _build(self) -> None:
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")
        for host, name in enumerate(self.names):
            port = f"p{host}"
            ip("netns", "add", name)
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", self.switch)
            ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
            if self.rate:
                for namespace, device in ((name, "eth0"), (self.switch, port)):
                    command("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate", self.rate,
                            "burst", "256kb", "limit", "8mb")  # fmt: skip

    def _remove(self) -> None:
        for name in [*self.names, self.switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def bytes_sent(self) -> list[int]:
        """What each host has sent to the others so far."""
        counter = "/sys/class/net/eth0/statistics/tx_bytes"
        return [int(command("ip", "netns", "exec", name, "cat", counter)) for name in self.names]

    def torchrun(self, per_host: int, script: Path, *arguments: str, timeout: float = 300.0) -> str:
        """Runs `script` on every host with `per_host` ranks each; host 0's output.

        Raises:
            RuntimeError: a rank failed or the time is over; with all hosts' output.
        """
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder) / f"{name}.log" for name in self.names]
            processes = []
            for host, (name, log) in enumerate(zip(self.names, logs, strict=True)):
                launch = [
                    sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(self.names)}",
                    f"--node-rank={host}", f"--nproc-per-node={per_host}", f"--master-addr={self.address(0)}",
                    "--master-port=29400", str(script), *arguments,
                ]  # fmt: skip
                with log.open("w") as file:
                    processes.append(
                        subprocess.Popen(
                            ["ip", "netns", "exec", name, *launch],
                            env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                        )
                    )  # fmt: skip
            problem = _wait(processes, timeout)
            outputs = [log.read_text(errors="replace") for log in logs]
        if problem:
            raise RuntimeError(f"{problem}\n" + "\n".join(outputs))
        return outputs[0]


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> str | None:
    """Until all have ended, one has failed, or the time is over; what went wrong, or None. None is left running."""
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                time.sleep(2.0)  # the others' last words
                break
            if time.monotonic() > deadline:
                return f"the hosts did not end within {timeout:g} s"
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    codes = [process.returncode for process in processes]
    return f"exit codes by host: {codes}" if any(codes) else None


def command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def ip(*words: str) -> str:
    return command("ip", *words)
