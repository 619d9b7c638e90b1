"""What a hand-written loop leaves behind when its `with` block ends."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock, create_autospec

import pytest

from hf_edit import EDiT
from hf_edit.peers.elastic import ElasticPeers
from hf_edit.sync.engine import Engine


def entered() -> tuple[EDiT, Any, Any]:
    edit, engine, peers = object.__new__(EDiT), create_autospec(Engine), create_autospec(ElasticPeers)
    engine.schedule, engine.progress, engine.sync = (
        Mock(step=3),
        Mock(value=3.0),
        Mock(**{"take_records.return_value": []}),
    )
    edit._engine, edit._peers, edit._journal, edit._hook, edit._part = engine, peers, None, Mock(), None
    edit._accelerator, edit._logs, edit._said_dropped = Mock(is_main_process=True), [], False  # type: ignore[assignment]
    return edit, engine, peers


def test_an_elastic_replica_leaves_the_others_at_its_end() -> None:
    edit, engine, peers = entered()
    with edit:
        pass
    assert [call[0] for call in engine.method_calls] == ["barrier", "sync.take_records", "close"]
    peers.close.assert_called_once()


def test_and_after_an_error_without_a_last_sync() -> None:
    edit, engine, peers = entered()
    with pytest.raises(MemoryError), edit:
        raise MemoryError
    assert [call[0] for call in engine.method_calls] == ["abandon", "close"]
    peers.close.assert_called_once()
