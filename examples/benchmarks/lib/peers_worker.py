"""One host of peers.py: trains the same model in the same loop, synced as one library does it.

Argument: the Job as JSON. Leaves host0.json, host1.json in the job's folder. Each host is one rank and one replica; the
libraries are imported where they are used, since torchft may live in an environment of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lib.bench import RandomTokens, build_llama
from torch import Tensor, nn

BYTES_SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


@dataclass(frozen=True)
class Job:
    """What a host is to train, and how.

    `kind` picks the library, `options` are its own. `warmup_steps` and `measured_steps` are multiples of
    `sync_interval`, inner steps; one more interval follows, so that no final sync falls into the measured ones.
    """

    kind: str
    folder: str
    sync_interval: int
    warmup_steps: int
    measured_steps: int
    batch_size: int
    sequence_length: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def marks(self) -> tuple[int, int]:
        """The steps after which measuring begins and ends.

        A sync becomes due there: a blocking one has just ended, and one in the background has at most just begun, the
        one before it having been applied. So the bytes of whole syncs lie between the marks.
        """
        return self.warmup_steps, self.warmup_steps + self.measured_steps

    @property
    def total_steps(self) -> int:
        return self.warmup_steps + self.measured_steps + self.sync_interval


@dataclass
class Loop:
    """What a training loop calls: `model(input_ids, labels)`, `backward(loss)`, `optimizer.step()`, `after_step(loss)`.

    `check` raises if the library did not do what the job says; it runs after the last step.
    """

    model: Callable[..., Any]
    optimizer: Any
    backward: Callable[[Tensor], object] = Tensor.backward
    after_step: Callable[[Tensor], object] = lambda loss: None
    check: Callable[[], object] = lambda: None


@dataclass
class Marks:
    """The clock and the bytes that this host had sent at one step."""

    seconds: float
    bytes_sent: int

    @classmethod
    def now(cls) -> Marks:
        return cls(time.perf_counter(), int(BYTES_SENT.read_text()))


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The inner optimizer of every method."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@contextlib.contextmanager
def never(job: Job, model: nn.Module) -> Iterator[Loop]:
    """The bound: both hosts train at the same time and know nothing of each other."""
    yield Loop(model, build_optimizer(model))


@contextlib.contextmanager
def ddp(job: Job, model: nn.Module) -> Iterator[Loop]:
    dist.init_process_group("gloo")
    _expect_two(dist.get_world_size())
    yield Loop(nn.parallel.DistributedDataParallel(model), build_optimizer(model))
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def local_sgd(job: Job, model: nn.Module) -> Iterator[Loop]:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator()
    _expect_two(accelerator.num_processes)
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model))
    with LocalSGD(accelerator, wrapped, local_sgd_steps=job.sync_interval) as local:
        yield Loop(wrapped, optimizer, accelerator.backward, lambda loss: local.step())
    accelerator.end_training()


@contextlib.contextmanager
def edit(job: Job, model: nn.Module) -> Iterator[Loop]:
    """hf_edit's loop; `options` are a preset's name and what is to differ from it."""
    from hf_edit import EDiT, EDiTConfig

    settings = dict(job.options)
    config = EDiTConfig.preset(settings.pop("preset"), num_replicas=2, sync_interval=job.sync_interval, **settings)
    accelerator = EDiT.accelerator(config)
    _expect_two(accelerator.num_processes)
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model))
    with EDiT(accelerator, wrapped, optimizer, config) as engine:
        yield Loop(wrapped, optimizer, accelerator.backward, engine.step)
    accelerator.end_training()


@contextlib.contextmanager
def torchft(job: Job, model: nn.Module) -> Iterator[Loop]:
    from lib.peers_worker_torchft import diloco

    with diloco(job, model, build_optimizer(model)) as loop:
        yield loop


KINDS = {"never": never, "ddp": ddp, "local_sgd": local_sgd, "edit": edit, "torchft": torchft}


def train(job: Job, loop: Loop, host: int) -> list[Marks]:
    """The job's steps on random tokens, no two hosts' alike; the two marks."""
    data = RandomTokens(job.sequence_length)
    rows = iter(range(host, len(data), 2))
    marks = []
    for step in range(1, job.total_steps + 1):
        tokens = torch.stack([data[next(rows)]["input_ids"] for _ in range(job.batch_size)])
        loss = loop.model(input_ids=tokens, labels=tokens).loss
        loop.backward(loss)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.after_step(loss)
        if step in job.marks:
            marks.append(Marks.now())
    loop.check()
    return marks


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    host = int(os.environ["PEERS_HOST"])
    torch.set_num_threads(1)
    model = build_llama()
    with KINDS[job.kind](job, model) as loop:
        before, after = train(job, loop, host)
    report = {
        "seconds": after.seconds - before.seconds,
        "bytes_sent": after.bytes_sent - before.bytes_sent,
        "parameter_bytes": sum(p.numel() * 4 for p in model.parameters()),
        "checksum": sum(p.detach().double().abs().sum().item() for p in model.parameters()),
        "torch": torch.__version__,
    }
    (Path(job.folder) / f"host{host}.json").write_text(json.dumps(report), encoding="utf-8")


def _expect_two(num_processes: int) -> None:
    if num_processes != 2:
        raise RuntimeError(f"The library sees {num_processes} process(es), but the benchmark has 2 hosts of one rank.")


if __name__ == "__main__":
    main()
