"""Several hosts on one Linux machine: network namespaces joined by a switch, and the bytes that each one sent.

Needs root, `ip` and `tc` (iproute2), and gcc for a delay. Nothing else crosses between the hosts, so the counters are
the true traffic.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from lib.bench import worker_environment
from lib.cpu_quota import CpuQuota

HERE = Path(__file__).resolve().parent
TICK_SECONDS = 0.05
SENT = "/sys/class/net/eth0/statistics/tx_bytes"


def unavailable(delay: bool = False) -> str | None:
    """Why this machine cannot make hosts (with a `delay` between them), or None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if None in (shutil.which("ip"), shutil.which("tc"), shutil.which("ss")):
        return "`ip`, `tc` or `ss` is missing (Debian: apt-get install iproute2)"
    if delay and shutil.which("gcc") is None:
        return "a delay needs gcc, to compile delay_switch.c (Debian: apt-get install gcc libc6-dev)"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return f"no network namespace can be made: {probe.stderr.strip()}" if probe.returncode else None


def share_cores(num_hosts: int) -> list[list[int]]:
    """This process's cores, dealt out to the hosts, so that they do not slow one another.

    Raises:
        RuntimeError: there are fewer cores than hosts.
    """
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // num_hosts
    if not each:
        raise RuntimeError(f"{num_hosts} hosts need a core each, but this process may use {len(cores)} only")
    return [cores[host * each : (host + 1) * each] for host in range(num_hosts)]


class Hosts:
    """`num_hosts` namespaces with addresses 10.88.0.1, 10.88.0.2, ..., gone again at the end of the `with` block.

    Args:
        rate: limit of every host in each direction, as `tc` writes it ("100mbit"), or "unlimited".
        delay_milliseconds: how long the network keeps a frame, one way; a round trip takes twice that.
        cores: for each host, the cores that its processes are bound to; None: any.
        quotas: for each host, the processor seconds per second that it may use (None: no limit); `set_quota` changes
            them. None: no control groups are made.
    """

    def __init__(
        self,
        num_hosts: int,
        rate: str = "unlimited",
        delay_milliseconds: float = 0.0,
        cores: Sequence[Sequence[int]] | None = None,
        quotas: Sequence[float | None] | None = None,
    ) -> None:
        self.names = [f"edit{os.getpid()}h{host}" for host in range(num_hosts)]
        self.switch = f"edit{os.getpid()}sw"
        self.rate = rate
        self.delay_milliseconds = delay_milliseconds
        self.cores = cores
        self._quotas = quotas
        self._groups: list[CpuQuota] = []
        self._delay_switch: subprocess.Popen[str] | None = None

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
        for host, name in enumerate(self.names):
            port = f"p{host}"
            ip("netns", "add", name)
            ip("link", "add", "eth0", "address", f"02:ed:17:00:00:{host:02x}", "netns", name,
               "type", "veth", "peer", "name", port, "netns", self.switch)  # fmt: skip
            ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            ip("-n", self.switch, "link", "set", port, "up")
            if self.rate != "unlimited":
                for namespace, device in ((name, "eth0"), (self.switch, port)):
                    command("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate", self.rate,
                            "burst", "256kb", "limit", "8mb")  # fmt: skip
        if self.delay_milliseconds:
            self._start_delay_switch()
        else:
            self._bridge_ports()
        self._groups = [CpuQuota(name, cores) for name, cores in zip(self.names, self._quotas or (), strict=False)]

    def _bridge_ports(self) -> None:
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")
        for host in range(len(self.names)):
            ip("-n", self.switch, "link", "set", f"p{host}", "master", "br0")

    def _start_delay_switch(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            program = str(Path(folder) / "delay_switch")
            command("gcc", "-O2", "-o", program, str(HERE / "delay_switch.c"))
            microseconds = str(round(1000 * self.delay_milliseconds))
            ports = [f"p{host}" for host in range(len(self.names))]
            self._delay_switch = subprocess.Popen(
                ["ip", "netns", "exec", self.switch, program, microseconds, *ports], stdout=subprocess.PIPE, text=True
            )
            assert self._delay_switch.stdout is not None
            if self._delay_switch.stdout.readline() != "ready\n":
                raise RuntimeError("delay_switch did not start; it has said why above")

    def _remove(self) -> None:
        for name in self.names:
            _end_all_in(name)
        if self._delay_switch is not None:
            self._delay_switch.kill()
            self._delay_switch.communicate()
        while self._groups:
            self._groups.pop().close()
        for name in [*self.names, self.switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)  # not there if it could not be built

    # -- what happens to a host while it runs -------------------------------------------------------------------------

    def set_quota(self, host: int, cores: float | None) -> None:
        """Changes the processor seconds per second of `host`; None: no limit. The hosts must have been given quotas."""
        self._groups[host].set(cores)

    def set_rate(self, rate: str) -> None:
        """Changes the limit of every host in each direction; the hosts must have been given one."""
        for host, name in enumerate(self.names):
            for namespace, device in ((name, "eth0"), (self.switch, f"p{host}")):
                command("tc", "-n", namespace, "qdisc", "change", "dev", device, "root", "tbf", "rate", rate,
                        "burst", "256kb", "limit", "8mb")  # fmt: skip

    def pause(self, host: int) -> None:
        """Stops every process of `host` where it is, until `resume`; its network stays up."""
        _signal_all_in(self.names[host], signal.SIGSTOP)

    def resume(self, host: int) -> None:
        _signal_all_in(self.names[host], signal.SIGCONT)

    def kill(self, host: int) -> None:
        """Kills every process of `host`."""
        _signal_all_in(self.names[host], signal.SIGKILL)

    def cut(self, host: int) -> None:
        """Takes `host` off the network, until `mend`; its processes go on."""
        ip("-n", self.switch, "link", "set", f"p{host}", "down")

    def mend(self, host: int) -> None:
        ip("-n", self.switch, "link", "set", f"p{host}", "up")

    def bytes_sent(self) -> list[int]:
        """What each host has sent to the others so far."""
        return [int(command("ip", "netns", "exec", name, "cat", SENT)) for name in self.names]

    # -- training -----------------------------------------------------------------------------------------------------

    def torchrun(
        self,
        per_host: int,
        module: str,
        *arguments: str,
        timeout: float = 300.0,
        meanwhile: Callable[[], None] | None = None,
    ) -> str:
        """Runs `module`, such as "lib.traffic_worker", on every host with `per_host` ranks each; host 0's output.

        Args:
            timeout: seconds after which it has failed.
            meanwhile: called about every `TICK_SECONDS` while the hosts run.

        Raises:
            RuntimeError: a rank failed or the time is over; with all hosts' output.
        """
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder) / f"{name}.log" for name in self.names]
            processes = []
            for host, log in enumerate(logs):
                launch = [
                    sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(self.names)}",
                    f"--node-rank={host}", f"--nproc-per-node={per_host}", f"--master-addr={self.address(0)}",
                    "--master-port=29400", "-m", module, *arguments,
                ]  # fmt: skip
                processes.append(self.start(host, launch, log))
            problem = self._wait(processes, timeout, meanwhile)
            outputs = [log.read_text(errors="replace") for log in logs]
        if problem:
            raise RuntimeError(f"{problem}\n" + "\n".join(outputs))
        return outputs[0]

    def start(self, host: int, words: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a command on `host`, on its cores and under its quota; its output goes to `log`."""

        def enter_host() -> None:
            if self.cores is not None:
                os.sched_setaffinity(0, self.cores[host])
            if self._groups:
                self._groups[host].enter()

        with log.open("w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *words],
                env=worker_environment(GLOO_SOCKET_IFNAME="eth0", **environment), stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=enter_host,
            )  # fmt: skip

    def _wait(
        self, processes: list[subprocess.Popen[bytes]], timeout: float, meanwhile: Callable[[], None] | None
    ) -> str | None:
        """Until all have ended, one has failed, or time is over; what went wrong, or None. None is left running."""
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in processes):
                if any(process.returncode for process in processes):
                    time.sleep(2.0)  # the others' last words
                    break
                if time.monotonic() > deadline:
                    return f"the hosts did not end within {timeout:g} s"
                if meanwhile is not None:
                    meanwhile()
                time.sleep(TICK_SECONDS)
        finally:
            for name in self.names:
                _end_all_in(name)  # torchrun's workers are sessions of their own, and outlive it
            for process in processes:
                process.wait()
        codes = [process.returncode for process in processes]
        return f"exit codes by host: {codes}" if any(codes) else None


def sent_from_here() -> int:
    """What the host of this process has sent to the others so far, without what TCP sent again where a segment was lost
    or came late; of connections that are open."""
    resent = 0
    for line in command("ss", "--tcp", "--numeric", "--info", "--oneline", "--no-header").splitlines():
        _, _, _, own, peer, *facts = line.split()
        if own.rpartition(":")[0] != peer.rpartition(":")[0]:  # else it never left the host
            resent += sum(int(fact.partition(":")[2]) for fact in facts if fact.startswith("bytes_retrans:"))
    return int(Path(SENT).read_text(encoding="utf-8")) - resent


def _signal_all_in(name: str, number: signal.Signals) -> int:
    """Sends a signal to every process of the namespace `name`; how many there were."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
    for word in found:
        try:
            os.kill(int(word), number)
        except ProcessLookupError:
            continue  # it has ended by itself
    return len(found)


def _end_all_in(name: str) -> None:
    deadline = time.monotonic() + 10.0
    while _signal_all_in(name, signal.SIGKILL):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes of host {name} do not end")
        time.sleep(0.05)


def command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def ip(*words: str) -> str:
    return command("ip", *words)
