"""A connection that fails raises nothing, whatever the error says; without a group there is nothing to wait for."""

from __future__ import annotations

from typing import Any

import pytest

from hf_edit.peers.connection import Connection
from hf_edit.peers.layout import Layout


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("a collective without a group would be torch's default group's")


@pytest.mark.parametrize("why", ["Connection closed by peer\nin a trace", ""])
def test_a_failure_ends_it(why: str, caplog: pytest.LogCaptureFixture) -> None:
    connection = Connection(Layout(2, 1, 1))
    connection.fail(why)
    assert connection.error == why
    assert caplog.messages[0].startswith("EDiT: a sync of replica 1 came to nothing, and is tried again: ")
    assert "trace" not in caplog.text


def test_nothing_is_started_where_a_replica_is_alone() -> None:
    connection = Connection(Layout(2, 1, 1))
    operation = connection.start(never)
    operation.wait()
    assert connection.error is None
