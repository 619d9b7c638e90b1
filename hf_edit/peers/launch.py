"""How a launch comes to its `Peers`: by its settings, and as a replica of its own by its environment, too."""

from __future__ import annotations

import os

from hf_edit.config import EDiTConfig
from hf_edit.peers.elastic import ElasticPeers
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout


def make_peers(layout: Layout, config: EDiTConfig) -> ProcessGroupPeers | ElasticPeers:
    """The other replicas, as `config` has them; all ranks of this launch call it together."""
    if not config.elastic:
        return ProcessGroupPeers(layout, config.longest_wait_seconds)
    return ElasticPeers(
        layout, config.longest_wait_seconds, config.heartbeat_seconds, config.straggler_seconds, config.min_replicas,
        lighthouse_of_this_launch(),
    )  # fmt: skip


def replica_of_this_launch(num_replicas: int) -> int:
    """The number that `EDIT_REPLICA` gives it.

    Raises:
        ValueError: there is none, or it is none of 0 ... num_replicas - 1.
    """
    given = os.environ.get("EDIT_REPLICA", "")
    if not given.isdecimal() or int(given) >= num_replicas:
        raise ValueError(
            f"elastic=True, and EDIT_REPLICA={given!r}: each replica is a launch of its own, which must know its "
            f"number. Set EDIT_REPLICA to one of 0 ... {num_replicas - 1}, to another one in each launch."
        )
    return int(given)


def lighthouse_of_this_launch() -> str:
    """What `TORCHFT_LIGHTHOUSE` says.

    Raises:
        ValueError: it says nothing.
    """
    address = os.environ.get("TORCHFT_LIGHTHOUSE", "")
    if ":" not in address.rpartition("://")[2]:
        raise ValueError(
            f"elastic=True, and TORCHFT_LIGHTHOUSE={address!r}: the replicas find each other through a lighthouse. "
            "Start one with `hf-edit lighthouse`, and set TORCHFT_LIGHTHOUSE=host:port in each launch."
        )
    return address
