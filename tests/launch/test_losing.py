"""A replica that dies or gets stuck ends the others' sync with its number, within the time limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.launch.launching import ROOT, SCRIPTS, free_port

SCRIPT = SCRIPTS / "losing.py"


@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_the_missing_replica_is_named(how: str) -> None:
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(port), how],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    started = time.monotonic()
    try:
        output, _ = ranks[0].communicate(timeout=100)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 3, output
    assert time.monotonic() - started < 60, "it waited for replica 1 to come back"
    assert "on replica 0 after" in output
    assert "replicas [1] did not come to it" in output
    assert "sync_timeout_seconds=4" in output
    assert "Start again from the last saved model once all hosts are back" in output
