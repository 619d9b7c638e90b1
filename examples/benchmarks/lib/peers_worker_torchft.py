"""torchft's DiLoCo for peers_worker.py: a store and a manager on each host, which find each other at the lighthouse."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from lib.peers_worker import Job, Loop
from torch import nn
from torch.distributed import TCPStore
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

STORE_PORT = 29501
TIMEOUT = timedelta(seconds=120)


@contextlib.contextmanager
def diloco(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Loop]:
    """DiLoCo with Nesterov 0.7/0.9 over one fragment; `options` are keyword arguments of torchft's own.

    More than one fragment would leave only a part of the interval to a fragment's delay: torchft wants
    fragment_sync_delay < sync_every / fragments.
    """
    address = os.environ["PEERS_ADDRESS"]
    store = TCPStore(address, STORE_PORT, is_master=True, wait_for_workers=False)
    manager = _manager(address, store.port)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)

    def check() -> None:
        syncs = job.total_steps // job.sync_interval
        if manager.current_step() != syncs or manager.num_participants() != 2:
            raise RuntimeError(
                f"torchft committed {manager.current_step()} syncs of {syncs}, the last with "
                f"{manager.num_participants()} participant(s) of 2."
            )

    with DiLoCo(manager, [model], optimizer, outer, sync_every=job.sync_interval, **job.options):
        yield Loop(model, optimizer, check=check)
    manager.shutdown(wait=False)


def _manager(address: str, store_port: int) -> Manager:
    """The manager of a replica of one rank. All start with equal weights, so that nothing is sent at the first sync."""

    def no_recovery(*_: Any) -> Any:
        raise RuntimeError("A replica wants to recover from another one, but none was to fail.")

    return Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=no_recovery,
        state_dict=no_recovery,
        min_replica_size=2,
        use_async_quorum=False,
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr=address,
        store_port=store_port,
        replica_id=f"host_{os.environ['PEERS_HOST']}",
        hostname=address,
        init_sync=False,
        max_retries=0,
    )
