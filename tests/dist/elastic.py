"""Replicas that come and go, as processes of their own: what one of them does, and what keeps them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_edit.method.membership as membership
from hf_edit.config import EDiTConfig
from hf_edit.method.membership import Meeting
from hf_edit.peers.elastic import ElasticPeers
from hf_edit.peers.layout import Layout
from hf_edit.peers.lighthouse import serve
from hf_edit.sync.engine import Engine
from tests.dist.nets import Net, batch, make_optimizer

HEARTBEAT_SECONDS, STRAGGLER_SECONDS = 1.5, 1.0
NEVER = "never"
OTHER_SETTINGS = "other settings"
OTHER_ANCHOR = "other anchor"
UNREACHABLE = "unreachable"


class Dying(ElasticPeers):
    """Its process is killed at a fault's second occasion: "KIND" where something begins, "KIND-after" where it ends.

    "deaf" alone does not kill: the replica does not come to know that all others have committed a sync.
    """

    def __init__(self, *args: Any, fault: str, note: Callable[..., None]) -> None:
        super().__init__(*args)
        self.fault, self.note, self.left = fault, note, 2

    def occasion(self, fault: str) -> None:
        if fault != self.fault:
            return
        self.left -= 1
        if self.left == 0:
            self.note("dies", fault=fault)
            os.kill(os.getpid(), signal.SIGKILL)

    def _connect(self, meeting: Meeting) -> None:
        if self.fault == UNREACHABLE:
            self._connection.fail("no connection to anybody")
        else:
            super()._connect(meeting)

    def begin(self, sync: int) -> list[int]:
        members = super().begin(sync)
        self.occasion("begin-after")
        return members

    def gather(self, vector: Tensor) -> Any:
        self.occasion("vote" if vector.numel() == 1 else "gather")
        result = super().gather(vector)
        if self.fault != "deaf" or vector.numel() > 1:
            return result

        def unheard() -> Tensor:
            rows = result()
            self.left -= 1
            if self.left == 0:
                self.note("deaf", members=self.meeting.replicas)
                self._connection.fail("deaf")
            return rows

        return unheard

    def all_reduce(self, tensors: Sequence[Tensor]) -> Any:
        pending = super().all_reduce(tensors)
        self.occasion("all_reduce-after")
        return pending

    def commit(self, sync: int) -> bool:
        self.occasion("commit")
        done = super().commit(sync)
        self.occasion("commit-after")
        return done

    def send(self, tensor: Tensor, replica: int) -> None:
        self.occasion("send")
        super().send(tensor, replica)

    def receive(self, tensor: Tensor, replica: int) -> None:
        self.occasion("receive")
        super().receive(tensor, replica)


def replica(number: int, fault: str, folder: Path) -> None:
    """Trains until a file says that it is enough, or `steps`, and ends together with the others."""
    settings = json.loads((folder / "settings.json").read_text())
    pause, last = settings.pop("pauses")[number], settings.pop("steps", None)
    settings["outer_lr"] = 0.5 if fault == OTHER_SETTINGS else 0.8
    torch.set_num_threads(1)
    membership.START_SECONDS = 3.0
    life = f"{number}.{time.time()}"
    config = EDiTConfig(
        elastic=True, heartbeat_seconds=HEARTBEAT_SECONDS, straggler_seconds=STRAGGLER_SECONDS, **settings
    )
    assert config.num_replicas is not None
    file = (folder / f"replica-{life}.jsonl").open("a")

    def note(what: str, **values: Any) -> None:
        file.write(json.dumps({"what": what, "replica": number, "at": time.time(), **values}) + "\n")
        file.flush()

    limit = 4.0 if fault == UNREACHABLE else 60.0
    peers = Dying(
        Layout(config.num_replicas, 1, number), limit, HEARTBEAT_SECONDS, STRAGGLER_SECONDS, config.min_replicas,
        os.environ["TORCHFT_LIGHTHOUSE"], fault=fault, note=note,
    )  # fmt: skip
    model = Net(seed=number)  # the first meeting makes them equal
    model.register_buffer("steps", torch.tensor(1000.0 * number))
    optimizer = make_optimizer("adamw", model.parameters())
    engine = Engine(model, optimizer, config, peers)
    note("begins")
    engine.join()
    told = round(engine.progress.totals[number])
    note("joined", sync=engine.sync.sync_count, told=told, moments=len(optimizer.state), members=peers.meeting.replicas)
    steps = 0
    while steps != last if last is not None else not (folder / "enough").exists():
        peers.occasion("step")
        x, y = batch(told + steps, number)
        nn.functional.mse_loss(model(x), y).backward()
        engine.counts.tally(loss=1.0)
        engine.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if fault == OTHER_ANCHOR and steps == 10:
            engine.sync.states[1].anchor[0] += 1e-6
        model.steps += 1
        time.sleep(pause)
        before = engine.sync.sync_count
        engine.step()
        if engine.sync.sync_count != before:
            records = engine.sync.take_records()
            weights = records[-1].plan.weights[0].tolist() if records else []
            note("synced", sync=engine.sync.sync_count, members=peers.meeting.replicas, steps=steps, weights=weights)
    engine.barrier()
    note(
        "ended", sync=engine.sync.sync_count, steps=told + steps, totals=engine.progress.totals,
        buffer=float(model.steps),
        confirmed=engine.progress.confirmed, finite=all(bool(p.isfinite().all()) for p in model.parameters()),
        params=[float(p.detach().double().sum()) for p in model.parameters()],
        anchors=[float(state.anchor.double().sum()) for state in engine.sync.states],
    )  # fmt: skip
    peers.close()


SERVER = multiprocessing.get_context("forkserver")  # what is forked there need not import torch again
SERVER.set_forkserver_preload([__name__])


def live(number: int, fault: str, folder: Path, lighthouse: str, output: Path) -> None:
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["TORCHFT_LIGHTHOUSE"] = lighthouse
    try:
        replica(number, fault, folder)
    finally:
        sys.stdout.flush()


class Life:
    """A process of `replica`, from its start to its end; as `subprocess.Popen`."""

    def __init__(self, *args: Any) -> None:
        self._process = SERVER.Process(target=live, args=args)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


class Replicas:
    """Starts a lighthouse, and processes of `replica`; what they have noted."""

    def __init__(self, folder: Path, num_replicas: int, pauses: Sequence[float], **settings: Any) -> None:
        self.folder = folder
        self.server = serve(0, HEARTBEAT_SECONDS)
        self.processes: dict[int, Life] = {}
        text = json.dumps({"num_replicas": num_replicas, "pauses": list(pauses), **settings})
        (folder / "settings.json").write_text(text)

    def start(self, number: int, fault: str = NEVER) -> None:
        port = self.server.address().rpartition(":")[2]
        output = self.folder / f"output-{number}.txt"
        self.processes[number] = Life(number, fault, self.folder, f"127.0.0.1:{port}", output)

    def start_both(self) -> None:
        for number in (0, 1):
            self.start(number)

    def notes(self, what: str | None = None, number: int | None = None) -> list[dict[str, Any]]:
        """In the order of time, but for one that is just being written."""
        lines = [line for path in self.folder.glob("replica-*.jsonl") for line in path.read_text().split("\n")[:-1]]
        found = sorted(map(json.loads, lines), key=lambda note: note["at"])
        return [n for n in found if what in (None, n["what"]) and number in (None, n["replica"])]

    def wait(self, fact: Callable[[], Any], seconds: float = 60.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := fact()):
            failed = {number: code for number, process in self.processes.items() if (code := process.poll())}
            failed = {number: code for number, code in failed.items() if code != -signal.SIGKILL}
            assert not failed, f"{failed}: {self.outputs()}"
            assert time.monotonic() < deadline, f"waited {seconds} s; {self.notes()[-12:]}; {self.outputs()}"
            time.sleep(0.05)
        return found

    def wait_for_syncs(self, number: int, count: int) -> None:
        """More of a replica, from now on."""
        before = len(self.notes("synced", number))
        self.wait(lambda: len(self.notes("synced", number)) >= before + count)

    def finish(self) -> list[dict[str, Any]]:
        """All end; what each noted at its end."""
        (self.folder / "enough").touch()
        living = [number for number, process in self.processes.items() if process.poll() is None]
        self.wait(lambda: all(self.processes[number].poll() == 0 for number in living))
        return self.notes("ended")

    def outputs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("output-*.txt")))

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.server.shutdown()
