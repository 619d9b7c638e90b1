"""Who waits where for a collective under way."""

from __future__ import annotations

from hf_edit.peers.faults import Arrivals
from hf_edit.peers.group import _Works
from hf_edit.peers.layout import Layout


class OnDevice:
    """A Work of NCCL: `wait` keeps a stream waiting, and the host goes on."""

    def __init__(self, looks: int) -> None:
        self.looks, self.waited = looks, False

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        assert self.looks < 0, "the host would queue FSDP2's collectives behind it"
        self.waited = True


def test_the_host_waits_for_what_is_on_the_device() -> None:
    works = [OnDevice(0), OnDevice(3)]
    _Works([*works], Arrivals(Layout(2, 1, 0), 60.0)).wait()
    assert all(work.waited for work in works)
