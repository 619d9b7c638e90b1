"""`hf-edit lighthouse`: where replicas that come and go (elastic=True) find each other."""

from __future__ import annotations

import argparse
import threading

from hf_edit.config import EDiTConfig
from hf_edit.peers.lighthouse import serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=29510, help="on all interfaces (default: 29510); 0: any free one")
    parser.add_argument(
        "--heartbeat_seconds",
        type=float,
        default=EDiTConfig.heartbeat_seconds,
        metavar="S",
        help="a replica that is not heard of for so long is gone; give the replicas the same (default: 5)",
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        server = serve(arguments.port, arguments.heartbeat_seconds)
    except (RuntimeError, ValueError) as error:
        print(f"hf-edit lighthouse: port {arguments.port}: {error}")
        return 1
    place = server.address().rpartition("://")[2]
    print(f"Lighthouse on {place}; its page is http://{place}. In each replica's launch:", flush=True)
    print(f"  TORCHFT_LIGHTHOUSE={place} EDIT_REPLICA=0 (1, 2, ...) accelerate launch ...", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.shutdown()
    return 0
