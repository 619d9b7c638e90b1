"""One of two replicas over gloo; replica 1 goes after the first sync. Arguments: rank, port, "killed" or "stuck"."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from hf_edit.config import EDiTConfig
from tests.dist.nets import train

TIMEOUT_SECONDS = 4.0


def main() -> None:
    rank, port, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)

    def before_step(step: int, engine: object, model: object, optimizer: object) -> None:
        if rank == 1 and step == 3:
            if how == "killed":
                os._exit(9)
            time.sleep(60)

    try:
        train(rank, 2, EDiTConfig(sync_interval=2), 8, before_step=before_step, timeout_seconds=TIMEOUT_SECONDS)
    except RuntimeError as error:
        print(f"said: {error}", flush=True)
        os._exit(3)


if __name__ == "__main__":
    main()
