"""A replica that waits long for another says for whom, and goes on when it comes."""

from __future__ import annotations

import logging
import os
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_edit.peers import faults
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout


def live(rank: int, folder: Path, late_seconds: float) -> None:
    faults.SAY_AFTER_SECONDS = 0.2
    logging.basicConfig(filename=folder / f"log-{rank}", level=logging.WARNING, force=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    peers = ProcessGroupPeers(Layout(2, 1, rank), timeout_seconds=60.0)
    if rank == 1:
        time.sleep(late_seconds)
    rows = peers.gather(torch.tensor([float(rank)]))()
    assert rows.tolist() == [[0.0], [1.0]]
    peers.barrier()


@pytest.mark.timeout(120)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its ranks")
def test_who_is_late_is_said(tmp_path: Path) -> None:
    ranks = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                live(rank, tmp_path, late_seconds=1.0)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        ranks.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in ranks] == [0, 0]
    said = (tmp_path / "log-0").read_text(encoding="utf-8")
    assert 2 <= said.count("replica 0 has waited") <= 6, said
    assert "s at a sync for replicas [1]; the limit is sync_timeout_seconds=60" in said
    assert (tmp_path / "log-1").read_text(encoding="utf-8") == ""
